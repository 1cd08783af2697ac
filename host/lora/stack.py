"""LORA_STACK: the list of LoRAs to apply that common node packs emit."""

import os
import reprlib
from collections.abc import Sequence
from dataclasses import replace

from ..door import rules
from . import auto, files, patches
from .weights import LoraWeights

FORM = "a LORA_STACK is a list of (file name in the loras folder, model strength, text encoder strength)"


def entries(stack) -> list[tuple[str, float, float]]:
    """The stack's LoRAs, checked; slots that say "None" are left out. Raises ValueError, naming the entry."""
    if stack is None:
        return []
    found = []
    for number, entry in enumerate(stack, start=1):
        if isinstance(entry, str) or not isinstance(entry, Sequence) or len(entry) != 3:
            raise ValueError(f"lora_stack: entry {number} is {reprlib.repr(entry)}, but {FORM}.")
        name, *strengths = entry
        if name is None or name == "None":
            continue
        if not isinstance(name, str):
            raise ValueError(f"lora_stack: entry {number} names its file by {reprlib.repr(name)}, but {FORM}.")
        if any(rules.number(strength) for strength in strengths):
            raise ValueError(
                f"lora_stack: entry {number} ({rules.shown(name)}) has strengths {reprlib.repr(strengths)}, but they have "
                "to be finite numbers. Correct it in the stacker node."
            )
        found.append((name, float(strengths[0]), float(strengths[1])))
    return found


def apply(model, clip, stack) -> tuple[object, object, list[str]]:
    """(MODEL, CLIP, reports): the stack's LoRAs one after another. Raises what _read and patches.apply raise."""
    reports = []
    for name, strength_model, strength_clip in entries(stack):
        done = patches.apply(model, clip, _read(name), strength_model, strength_clip)
        model, clip = done.model, done.clip
        reports.append(done.report.splitlines()[0])
    return model, clip, reports


def _read(name: str) -> LoraWeights:
    """The LoRA that an entry names: a file in the loras folder, or by its whole path, as stackers with folders of their
    own name theirs. Raises ValueError for one that is not there."""
    if os.path.isabs(name) and name.lower().endswith(files.SUFFIXES) and os.path.isfile(name):
        return files.read_file(name)
    try:
        return files.read_lora(name)
    except FileNotFoundError as error:
        raise ValueError(
            f"lora_stack: {error} If the stacker node has a folder of its own for it, name that folder in ComfyUI's "
            "extra_model_paths.yaml as one of loras."
        ) from None


def load_and_apply(
    model, clip, lora_name: str, strength: float, stack, *, allow_misfit: bool
) -> tuple[LoraWeights, patches.Applied]:
    """(the LoRA in a file, or in that which `auto` finds, MODEL and CLIP with it), after those of a stack; the report tells of
    them too.

    Nearly all of the LoRA has to fit, unless allow_misfit. Raises what `apply` raises.
    """
    lora_name, chosen = auto.choose(lora_name, model)
    lora = files.read_lora(lora_name)
    model, clip, stacked = apply(model, clip, stack)
    done = patches.apply(model, clip, lora, strength, strength, demand_all=True, allow_misfit=allow_misfit)
    return lora, replace(done, report="\n".join([done.report, *chosen, *stacked]))
