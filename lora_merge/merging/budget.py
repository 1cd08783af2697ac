"""How large a file will be, before there is one."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from math import prod

from torch import Tensor

from ..files.keys import BIAS_PARTS
from ..files.lora import Lora
from ..naming import names
from ..naming.unet import infer_layout
from ..settings.options import MergeOptions
from ..updates.weight_dependent import Carried

# What a header says of one tensor besides its name, at most: dtype, shape of four numbers, offsets of ten digits.
_ENTRY = 100
# kohya's longest ending of a key.
_ENDING = len(".lora_down.weight")
_TENSORS = 3
# The same of diffusers' two tensors a module, letter by letter, and of PEFT's configuration beside them, which names a
# module as a target, with its rank and with its alpha.
_FACTOR = len('".lora_A.weight":{"dtype":"BF16","shape":[99999,99999,9,9],"data_offsets":[9999999999,9999999999]},')
_CONFIGURED = len(r"\"\", \"\": 99999, \"\": 99999, ")
# What saving says of every file, with what the provenance says of all; and of each input.
_NOTES, _NOTES_OF_INPUT = 2000, 600


def numbers_within(
    options: MergeOptions,
    loras: Sequence[Lora],
    modules: Iterable[str],
    passed: Mapping[str, Carried],
    spellings: Mapping[str, str],
    biases: Mapping[tuple[str, str], Tensor],
    notes: int,
) -> int | None:
    """Numbers that the low-rank factors may hold for the file to stay within max_mb; None without that option.

    notes: bytes of metadata that the merge keeps of its inputs.

    Header, metadata, alphas, differences of whole weights and what is passed through are taken off; the header and
    metadata by an upper bound, of whichever format needs more. Raises ValueError where these alone are too large.
    """
    if options.max_mb is None:
        return None
    size = 2 if options.out_dtype is None else options.out_dtype.itemsize
    written = [*modules, *passed, *(module for module, _ in biases)]
    header = sum(_TENSORS * (len(spellings[module]) + _ENDING + _ENTRY) + 4 for module in written)
    sources = sum(_NOTES_OF_INPUT + 8 * len(lora.source) for lora in loras)
    whole = {
        module: prod(diff.shape)
        for lora in loras
        for (module, part), diff in lora.diffs.items()
        if part not in BIAS_PARTS
    }
    numbers = sum(whole.values()) + sum(diff.numel() for diff in biases.values())
    numbers += sum(update.parameters for update in passed.values())
    if not whole and not passed and not biases:
        dotted = _names_of_diffusers(written, spellings)
        header = max(header, sum(2 * (len(name) + _FACTOR) + 3 * len(name) + _CONFIGURED for name in dotted))
    left = options.max_mb * 1e6 - header - sources - notes - _NOTES - size * numbers
    if left <= 0:
        raise ValueError(
            f"max_mb is {options.max_mb:g}, but what is not cut (header, metadata, biases, whole weights) takes "
            f"{options.max_mb - left / 1e6:.2f} MB. Allow more than that."
        )
    return int(left / size)


def _names_of_diffusers(modules: Sequence[str], spellings: Mapping[str, str]) -> list[str]:
    """Of all modules, none where one has no name in that format."""
    layout = infer_layout(names.unet_bodies(spellings.values()))
    dotted = [name for module in modules if (name := names.dotted(spellings[module], layout)) is not None]
    return dotted if len(dotted) == len(modules) else []
