"""Teaches ComfyUI the demo's tiny text-to-image model, so that its stock loaders read the files in demo/models.

Used by the demo and the tests only; it is not part of LCM Kit.
"""

import logging


async def comfy_entrypoint():
    """Called by ComfyUI once, at start-up. The pack adds a model type and no nodes."""
    try:
        import comfy.supported_models
        from comfy_api.latest import ComfyExtension

        from .model import TinyEmoji
    except Exception:
        logging.getLogger(__name__).exception("the tiny emoji model could not be registered")
        raise
    if not any(known.__name__ == TinyEmoji.__name__ for known in comfy.supported_models.models):
        comfy.supported_models.models.insert(0, TinyEmoji)

    class TinyEmojiExtension(ComfyExtension):
        async def get_node_list(self):
            return []

    return TinyEmojiExtension()
