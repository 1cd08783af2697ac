"""LORA_MODELs through the comparison of lora_merge/, with ComfyUI's progress bar and stop button."""

from collections.abc import Mapping

import comfy.model_management
import comfy.utils
import numpy as np
import torch

from ...lora_merge.comparing.compare import compare
from ...lora_merge.comparing.picture import draw
from ...lora_merge.comparing.report import as_text
from .weights import to_lora


def compare_slots(slots: Mapping[str, object], rank: int) -> tuple[torch.Tensor, str]:
    """(IMAGE, report). slots: lora_1, strength_1, lora_2, ... as the node has them; an empty lora slot is left out."""
    numbers = [key.removeprefix("lora_") for key in slots if key.startswith("lora_") and slots[key] is not None]
    inputs = [
        (to_lora(slots[f"lora_{number}"], f"lora_{number}"), slots[f"strength_{number}"])
        for number in sorted(numbers, key=int)
    ]
    progress = comfy.utils.ProgressBar(1)

    def after_module(done: int, total: int) -> None:
        comfy.model_management.throw_exception_if_processing_interrupted()
        progress.update_absolute(done, total)

    found = compare(inputs, progress=after_module)
    pixels = np.asarray(draw(found, rank), dtype=np.float32) / 255.0
    return torch.from_numpy(pixels)[None], as_text(found, rank)
