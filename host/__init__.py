"""All that touches ComfyUI: turns the graph's values into those of the cores and back, and decides nothing else."""
