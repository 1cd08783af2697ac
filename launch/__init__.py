"""The command line of the distillation: starts the user's ComfyUI and trains, on one device or many.

No part of what the registry hands out; `python -m distillation` is its door.
"""
