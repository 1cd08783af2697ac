"""LORA_MODELs through the comparison of lora_merge/, with ComfyUI's progress bar and stop button."""

from collections.abc import Mapping

import numpy as np
import torch

from ...lora_merge.comparing.compare import compare
from ...lora_merge.comparing.picture import draw
from ...lora_merge.comparing.report import as_text
from ..progress import Progress
from .slots import connected
from .targets import aligned_in


def compare_slots(slots: Mapping[str, object], rank: int, model=None) -> tuple[torch.Tensor, str]:
    """(IMAGE, report). slots: lora_1, strength_1, lora_2, ... as the node has them; an empty lora slot is left out.

    model: tells which names are of one weight, where nothing else does.
    """
    used = connected(slots)
    loras = aligned_in([slot.lora for slot in used], model)
    found = compare([(lora, slot.strength) for lora, slot in zip(loras, used, strict=True)], progress=Progress())
    pixels = np.asarray(draw(found, rank), dtype=np.float32) / 255.0
    return torch.from_numpy(pixels)[None], as_text(found, rank)
