"""ComfyUI's progress bar and stop button for work that counts its parts."""

from collections.abc import Callable
from typing import Any

import comfy.model_management
import comfy.utils


class Progress:
    """progress(done, total): moves the bar of the node that runs, and raises ComfyUI's interrupt once it was stopped."""

    def __init__(self) -> None:
        self._bar = comfy.utils.ProgressBar(1)

    def __call__(self, done: int, total: int, preview: Callable[[], Any] | None = None) -> None:
        """preview: makes the picture beside the bar, (format, PIL image, longest side) or None; called only where one is
        shown, which the console does not do."""
        # ComfyUI's layers and the server's hook look for an interrupt too, but not in every kind of work.
        comfy.model_management.throw_exception_if_processing_interrupted()
        shown = preview() if preview is not None and self._bar.hook is not None else None
        self._bar.update_absolute(done, total, shown)
