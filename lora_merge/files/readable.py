"""Whether a file that is about to be written will be read back as the LoRA that it was made of."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping

from ..updates.layer import shape_of_both
from .lora import Lora, Pieces

_SHOWN = 3


def check_readable(lora: Lora, pieces: Pieces, notes: Mapping[str, str], beside: Mapping[str, str]) -> None:
    """pieces, notes: what is to be written and its metadata; what is unmade stays so, since names and shapes are what counts.
    beside: what a reader finds in files of the same folder.

    The header is checked where it is written (tensor_file.write).
    Raises ValueError, naming what is wrong, if `load` would refuse the file or read another LoRA from it.
    """
    if not lora.spellings:
        raise ValueError(f"{lora.source}: there is nothing to save: it changes no module.")
    _check_names(lora)
    try:
        again = Lora.from_state_dict(pieces, metadata={**notes, **beside}, source=lora.source)
    except ValueError as error:
        raise ValueError(f"{error} It cannot be saved, since no loader could read the file.") from None
    lost = [f"{key} would not be read" for key in again.keys.unread if key not in lora.unread]
    if changed := lost + _differences(lora, again):
        more = f", and {len(changed) - _SHOWN} more" if len(changed) > _SHOWN else ""
        raise ValueError(
            f"{lora.source}: cannot be saved, since a loader would read something else: {'; '.join(changed[:_SHOWN])}{more}. "
            "Rename these modules."
        )


def _check_names(lora: Lora) -> None:
    twice = [name for name, count in Counter(lora.spellings.values()).items() if count > 1]
    if twice:
        modules = [module for module, name in lora.spellings.items() if name == twice[0]]
        raise ValueError(
            f"{lora.source}: cannot be saved, since {' and '.join(modules[:_SHOWN])} would both be written as {twice[0]}. "
            "Rename one of them."
        )


def _differences(lora: Lora, again: Lora) -> list[str]:
    """One sentence for each module of `lora` that is not the same in `again`."""
    result: list[str] = []
    taken: set[str] = set()
    diffs, diffs_again = _diffs(lora), _diffs(again)
    for module, spelling in lora.spellings.items():
        try:
            found = again.find(module if module in again.spellings else spelling)
        except KeyError:
            result.append(f"{spelling} has another name in it")
            continue
        if found in taken:
            result.append(f"{spelling} is the same as another module in it")
        taken.add(found)
        if not _same(lora, module, again, found) or diffs.get(module) != diffs_again.get(found):
            result.append(f"{spelling} has other parts or another shape in it")
    return result


def _same(lora: Lora, module: str, again: Lora, found: str) -> bool:
    first, second = lora.modules.get(module), again.modules.get(found)
    if (first is None) != (second is None) or (module in lora.carried) != (found in again.carried):
        return False
    return first is None or second is None or shape_of_both(first.shape, second.shape) is not None


def _diffs(lora: Lora) -> dict[str, dict[str, tuple[int, ...]]]:
    """Module -> shape of each of its differences."""
    result: dict[str, dict[str, tuple[int, ...]]] = {}
    for (module, part), diff in lora.diffs.items():
        # A b_norm without its w_norm means the same as a diff_b.
        result.setdefault(module, {})["diff_b" if part == "b_norm" else part] = tuple(diff.shape)
    return result
