"""LCM sampling and LoRA arithmetic for ComfyUI."""

import logging


async def comfy_entrypoint():
    """The extension: ComfyUI calls this once, at start-up."""
    # Imported here and not above: pytest and setuptools import this file too, under other names and
    # without ComfyUI. ComfyUI 0.30.0 reports only str(error) from this function, so the traceback is
    # logged first.
    try:
        from .nodes import LCMKitExtension
    except Exception:
        logging.getLogger(__name__).exception("LCM Kit could not be loaded")
        raise
    return LCMKitExtension()
