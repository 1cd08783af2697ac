"""LORA_STACK: the list of LoRAs to apply that common node packs emit."""

from collections.abc import Sequence
from numbers import Real

from . import files, patches

FORM = "a LORA_STACK is a list of (file name in the loras folder, model strength, text encoder strength)"


def entries(stack) -> list[tuple[str, float, float]]:
    """The stack's LoRAs, checked; slots that say "None" are left out. Raises ValueError, naming the entry."""
    if stack is None:
        return []
    if isinstance(stack, str | bytes) or not isinstance(stack, Sequence):
        raise ValueError(f"lora_stack is {type(stack).__name__}, but {FORM}. Connect the LORA_STACK of a stacker node.")
    found = []
    for number, entry in enumerate(stack, start=1):
        if isinstance(entry, str) or not isinstance(entry, Sequence) or len(entry) != 3:
            raise ValueError(f"lora_stack: entry {number} is {entry!r}, but {FORM}.")
        name, *strengths = entry
        if name is None or name == "None":
            continue
        if not isinstance(name, str):
            raise ValueError(f"lora_stack: entry {number} names its file by {name!r}, but {FORM}.")
        if not all(isinstance(strength, Real) and strength == strength for strength in strengths):
            raise ValueError(
                f"lora_stack: entry {number} ({name}) has strengths {strengths}, but they have to be numbers."
            )
        found.append((name, float(strengths[0]), float(strengths[1])))
    return found


def apply(model, clip, stack) -> tuple[object, object, list[str]]:
    """(MODEL, CLIP, reports): the stack's LoRAs one after another. Raises what files.read_lora and patches.apply raise."""
    reports = []
    for name, strength_model, strength_clip in entries(stack):
        done = patches.apply(model, clip, files.read_lora(name), strength_model, strength_clip)
        model, clip = done.model, done.clip
        reports.append(done.report.splitlines()[0])
    return model, clip, reports
