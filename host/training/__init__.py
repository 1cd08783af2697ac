"""Distilling in the graph and on the command line: lends ComfyUI's model to the trainer, makes its data."""
