"""LORA_MODELs through lora_merge/ and back."""

import re
from collections.abc import Callable, Collection, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import PurePath

import folder_paths

from ...lora_merge import describe_merge, merge_with_account, resize_with_account
from ...lora_merge.disk.digests import sha256_of
from ...lora_merge.files.dtypes import DTYPES
from ...lora_merge.methods.table import find_method
from ...lora_merge.one_module.protect import protecting
from ...lora_merge.settings.strengths import for_inputs
from ..progress import Progress
from .files import lora_names
from .identity import KnownWeights, identity_of
from .reports import alone, idle_block_strengths, nobody_protected
from .slots import LORA, NUMBERS, Slot, connected
from .targets import names_in
from .weights import LoraWeights, from_lora, named, to_lora

PROTECT = ("auto", "none", *(f"{LORA}{number}" for number in NUMBERS))
_OF_A_LORA = re.compile(rf"\s*(?:{LORA})?(\d{{1,6}})\s*:")


def merge(slots: Mapping[str, object], **choices):
    """`merge_used` of what is connected. slots: lora_1, strength_1, lora_2, ... as the node has them.

    Raises ValueError if all are empty.
    """
    return merge_used(connected(slots), NUMBERS, **choices)


def merge_used(
    used: Sequence[Slot],
    numbers: Collection[int],
    *,
    method: Mapping[str, object],
    size: Mapping[str, object],
    block_strengths: str,
    protect: str = "auto",
    balanced: bool = False,
    mu: float = 0.0,
    model=None,
):
    """(merged, report). One LoRA alone becomes its strength times itself by every method but a mean, of which it is itself.

    numbers: of all slots; what is said of one that is not used is left out, and the report says so.
    method: under "method" its name, and its own parameters, with seed and dense where it has them.
    size: under "size" its name, and its amount under the name that merge_with_account has for it.
    model: tells which names are of one weight, where nothing else does.
    """
    parameters = dict(method)
    name = parameters.pop("method")
    notes = []
    if len(used) == 1 and not find_method(name).averages:
        notes.append(alone(named(used[0].weights, used[0].name).name, used[0].strength, name))
        name, parameters = "linear", {}
    elsewhere = {key: parameters.pop(key) for key in ("seed", "dense") if key in parameters}
    empty = {str(number) for number in numbers} - {str(slot.number) for slot in used}
    protect, mu, block_strengths = _for_used(empty, protect, mu, block_strengths, notes)
    merged, report = _merge(
        used,
        method=name,
        parameters=parameters,
        block_strengths=block_strengths,
        protect=protect,
        balanced=balanced,
        mu=mu,
        model=model,
        **elsewhere,
        **_amount(size),
    )
    return merged, "\n".join([report, *notes])


def _merge(used: Sequence[Slot], *, block_strengths: str, protect: str, model, **choices):
    """(merged, report). choices: of merge_with_account."""
    labels = [str(slot.number) for slot in used]
    inputs = [(slot.lora, slot.strength) for slot in used]
    merged, account = _watched(
        [slot.weights for slot in used],
        lambda **more: merge_with_account(
            inputs,
            protect=protecting(
                protect,
                labels,
                lambda: [identity_of(named(slot.weights)) for slot in used],
                [slot.strength for slot in used],
            ),
            block_strengths=for_inputs(block_strengths, labels),
            model=names_in(model),
            **choices,
            **more,
        ),
    )
    return from_lora(merged), describe_merge(account, merged)


def _for_used(empty: Collection[str], protect: str, mu: float, text: str, notes: list[str]) -> tuple[str, float, str]:
    """protect, mu and block strengths without what is for a slot that is empty; notes gets a line for each."""
    if protect.removeprefix(LORA) in empty:
        if mu:
            notes.append(nobody_protected(protect))
        protect, mu = "none", 0.0
    kept = []
    for line in text.splitlines():
        match = _OF_A_LORA.match(line)
        if match and match[1] in empty:
            notes.append(idle_block_strengths(line))
        else:
            kept.append(line)
    return protect, mu, "\n".join(kept)


def resize(lora, *, size: Mapping[str, object], dtype: str) -> tuple[LoraWeights, str]:
    """(smaller one, report). size: as of merge_used."""
    whole, aim = to_lora(lora), _amount(size)
    small, account = _watched([lora], lambda **more: resize_with_account(whole, out_dtype=DTYPES[dtype], **aim, **more))
    return from_lora(small), describe_merge(account, small)


def _amount(size: Mapping[str, object]) -> dict[str, object]:
    return {name: amount for name, amount in size.items() if name != "size"}


def _watched(weights: list, work: Callable):
    """work with ComfyUI's progress bar and interrupt, and the hashes of the files computed beside it."""
    with ThreadPoolExecutor(1) as pool:
        hashes = [pool.submit(_sha256, one) for one in weights]
        try:
            return work(progress=Progress(), sha256=lambda: [one.result() for one in hashes])
        finally:
            pool.shutdown(cancel_futures=True)


def _sha256(weights) -> str | None:
    """sha256 of the weights' file, None if they were made or changed in the graph."""
    if not isinstance(weights, KnownWeights) or not weights.untouched:
        return None
    paths = [name for name in lora_names() if PurePath(name).name == weights.name]
    path = folder_paths.get_full_path("loras", paths[0]) if len(paths) == 1 else None
    return None if path is None else sha256_of(path)
