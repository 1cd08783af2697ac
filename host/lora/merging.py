"""LORA_MODELs through lora_merge/ and back."""

from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import PurePath

import folder_paths

from ...lora_merge import describe_merge, merge_with_account, resize_with_account
from ...lora_merge.files.dtypes import DTYPES
from ...lora_merge.methods.table import find_method
from ...lora_merge.one_module.protect import protected_of, which_protected
from ...lora_merge.recognise.identity import sha256_of
from ...lora_merge.settings.strengths import for_inputs
from ..progress import watched
from .files import lora_names
from .identity import KnownWeights, identity_of
from .slots import LORA, NUMBERS, Slot, connected
from .targets import meeting_in
from .weights import LoraWeights, from_lora, named, to_lora

PROTECT = ("auto", "none", *(f"{LORA}{number}" for number in NUMBERS))
AIMS = ("keep", "retain", "max_mb")


def merge(slots: Mapping[str, object], *, method: str, block_strengths: str, protect: str, model=None, **choices):
    """(merged, report). slots: lora_1, strength_1, lora_2, ... as the node has them; an empty lora slot is left out.
    With them come parameters of methods; widgets have a value always, so those of other methods are left out.

    model: tells which names are of one weight, where nothing else does.
    choices: the node's other widgets; 0 leaves keep, retain and max_mb out.
    """
    used = connected(slots)
    labels = [str(slot.number) for slot in used]
    loras = meeting_in([slot.lora for slot in used], model)
    inputs = [(lora, slot.strength) for lora, slot in zip(loras, used, strict=True)]
    merged, account = _watched(
        [slot.weights for slot in used],
        lambda **more: merge_with_account(
            inputs,
            method=method,
            protect=_protected(protect, used, labels),
            block_strengths=for_inputs(block_strengths, labels),
            parameters={name: slots[name] for name in find_method(method).parameters if name in slots},
            **_given(choices),
            **more,
        ),
    )
    return from_lora(merged), describe_merge(account, merged)


def _protected(protect: str, used: list[Slot], labels: list[str]):
    """As which_protected, but `auto` finds LoRAs that are known by their files' hashes too."""
    which = which_protected(protect, labels)
    if which != "auto":
        return which
    found = protected_of([identity_of(named(slot.weights)) for slot in used], [slot.strength for slot in used])
    return which if found is None else found


def resize(lora, *, dtype: str, **choices) -> tuple[LoraWeights, str]:
    """(smaller one, report). choices: rank, keep, max_mb; 0 leaves them out."""
    whole = to_lora(lora)
    small, account = _watched(
        [lora], lambda **more: resize_with_account(whole, out_dtype=DTYPES[dtype], **_given(choices), **more)
    )
    return from_lora(small), describe_merge(account, small)


def _given(choices: Mapping[str, object]) -> dict[str, object]:
    return {name: value for name, value in choices.items() if name not in AIMS or value}


def _watched(weights: list, work: Callable):
    """work with ComfyUI's progress bar and interrupt, and the hashes of the files computed beside it."""
    with ThreadPoolExecutor(1) as pool:
        hashes = [pool.submit(_sha256, one) for one in weights]
        try:
            return work(progress=watched(), sha256=lambda: [one.result() for one in hashes])
        finally:
            pool.shutdown(cancel_futures=True)


def _sha256(weights) -> str | None:
    """sha256 of the weights' file, None if they were made or changed in the graph."""
    if not isinstance(weights, KnownWeights) or not weights.untouched:
        return None
    paths = [name for name in lora_names() if PurePath(name).name == weights.name]
    path = folder_paths.get_full_path("loras", paths[0]) if len(paths) == 1 else None
    return None if path is None else sha256_of(path)
