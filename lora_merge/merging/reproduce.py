"""A merged file made again from its inputs, and whether it comes out the same."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from pathlib import Path

import torch
from torch import Tensor

from ..algebra.scaling import levelled
from ..algebra.sums import stacked
from ..disk.digests import sha256_of
from ..disk.hashes import weights_sha256
from ..disk.tensor_file import read
from ..files.formats import SAVE_FORMATS, named_for
from ..files.load_save import load
from ..files.lora import Lora
from ..keywords import named
from ..settings.options import DTYPES
from ..updates.layer import Term
from ..words import many
from .merge import Progress, merge_with_account
from .provenance import Ingredient, recipe_of

# Other processors round otherwise, so that factors of cut modules differ and their product hardly does. Twice to four
# times the rounding of the dtype.
_SAME = {torch.float16: 2e-3, torch.bfloat16: 2e-2, torch.float32: 1e-4}


@dataclass(frozen=True)
class Reproduction:
    """identical: every tensor is the same, bit for bit.   difference: of all updates together, relative, Frobenius norm.
    same: the difference is no more than rounding.   inputs: the files that it was made from.
    """

    identical: bool
    difference: float
    same: bool
    inputs: tuple[Path, ...]


@named
def reproduce(
    path: str | os.PathLike[str],
    folders: Sequence[str | os.PathLike[str]] = (),
    *,
    workers: int | None = None,
    progress: Progress | None = None,
) -> Reproduction:
    """Makes a file that `save` wrote after `merge` or `resize` again, and compares.

    folders: where its inputs are, with all below them; the file's own folder if none is given.
    Raises ValueError if the file does not say how it was made or was changed since in what it consists of, and
    FileNotFoundError, naming all, for inputs that are not there or not the same files as then.
    """
    path = Path(path)
    given = load(path)
    recipe = recipe_of(given.metadata, path.name)
    found = _find(recipe.inputs, [Path(folder) for folder in folders] or [path.parent], path)
    # Not mapped: a file that is cut off meanwhile is an error in words and ends nothing.
    tensors, _ = read(path, mapping=False)
    dtype = _dtype(tensors)
    inputs = [(load(file), entry.strength) for file, entry in zip(found, recipe.inputs, strict=True)]
    made, _ = merge_with_account(
        inputs,
        block_strengths=[entry.block_strengths for entry in recipe.inputs],
        workers=workers,
        progress=progress,
        model=recipe.model,
        **vars(recipe.options),
    )
    state = _as_written(made, dtype, tensors)
    if state.keys() != tensors.keys():
        differing = sorted(state.keys() ^ tensors.keys())
        raise ValueError(
            f"{path.name}: was changed since it was made: it differs in {many(len(differing), 'keys')}, {differing[0]}."
        )
    if all(torch.equal(state[key], tensor) for key, tensor in tensors.items()):
        return Reproduction(True, 0.0, True, tuple(found))
    difference = _difference(given, Lora.from_state_dict(state, metadata=given.metadata))
    return Reproduction(False, difference, difference <= _SAME[dtype], tuple(found))


def _find(inputs: Iterable[Ingredient], folders: Sequence[Path], made: Path) -> list[Path]:
    files = sorted({file for folder in folders for file in folder.rglob("*.safetensors") if file.is_file()} - {made})
    found, trouble = [], []
    for entry in inputs:
        file = _file_of(entry, files)
        if file is not None:
            found.append(file)
        elif any(file.name == entry.name for file in files):
            trouble.append(f"{entry.name} is another file than the one it was made from")
        else:
            trouble.append(f"{entry.name} is not there")
    if trouble:
        where = ", ".join(map(str, folders))
        raise FileNotFoundError(f"{made.name}: {'; '.join(trouble)}. Looked in {where}; name the folder of the inputs.")
    return found


def _file_of(entry: Ingredient, files: Sequence[Path]) -> Path | None:
    """The file that an input was: of its hash, or, made again on another day with another date, of its name and weights."""
    named = [file for file in files if file.name == entry.name]
    if entry.sha256 is None:
        return next(iter(named), None)
    # A renamed file is the same file.
    rest = (file for file in files if file.name != entry.name)
    same = (file for file in chain(named, rest) if sha256_of(file) == entry.sha256)
    same_weights = (file for file in named if entry.weights and _weights(file) == entry.weights)
    return next(chain(same, same_weights), None)


def _weights(file: Path) -> str | None:
    try:
        return weights_sha256(file)
    except ValueError:
        return None  # no LoRA of anybody's


def _dtype(tensors: dict[str, Tensor]) -> torch.dtype:
    kinds = [tensor.dtype for key, tensor in tensors.items() if not key.endswith(".alpha") and tensor.dtype in DTYPES]
    return max(set(kinds), key=kinds.count) if kinds else torch.float32


def _as_written(made: Lora, dtype: torch.dtype, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The LoRA as a state dict in the format whose keys are those of the file, or the fewest others."""
    found = {}
    for format in SAVE_FORMATS:
        try:
            lora, written_in = named_for(made, format)
            pieces = lora.pieces(dtype, format=written_in, copy=False)
        except ValueError:  # what the format cannot hold
            continue
        if pieces.keys() == tensors.keys():
            return lora.to_state_dict(dtype, format=written_in, copy=False)
        found[len(pieces.keys() ^ tensors.keys())] = lora, written_in
    lora, written_in = found[min(found)] if found else named_for(made, "auto")
    return lora.to_state_dict(dtype, format=written_in, copy=False)


def _difference(first: Lora, second: Lora) -> float:
    """Relative Frobenius norm of the difference of all updates."""
    lost = whole = 0.0
    for module, layer in first.modules.items():
        lost += _norm([(layer, 1.0), (second.modules[module], -1.0)]) ** 2
        whole += _norm([(layer, 1.0)]) ** 2
    for key, diff in first.diffs.items():
        lost += float((diff.double() - second.diffs[key].double()).square().sum())
        whole += float(diff.double().square().sum())
    return float((lost / whole) ** 0.5) if whole > 0 else float(lost > 0)


def _norm(terms: list[Term]) -> float:
    # Triangular factors: products of Gram matrices would lose half of the digits where terms cancel.
    terms, power = levelled(terms)
    total = stacked(terms)
    up, down = torch.linalg.qr(total.up)[1], torch.linalg.qr(total.down.T)[1]
    return float((up @ down.T).double().norm()) * 2.0**power
