"""ComfyUI's progress bar and stop button for work that counts its parts."""

from collections.abc import Callable

import comfy.model_management
import comfy.utils


def watched() -> Callable[[int, int], None]:
    """progress(done, total): moves the bar of the node that runs, and raises ComfyUI's interrupt once it was stopped."""
    bar = comfy.utils.ProgressBar(1)

    def progress(done: int, total: int) -> None:
        comfy.model_management.throw_exception_if_processing_interrupted()
        bar.update_absolute(done, total)

    return progress
