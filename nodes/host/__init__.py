"""The only place that talks to ComfyUI: it converts between ComfyUI's objects and the cores' tensors."""
