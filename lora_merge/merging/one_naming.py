"""LoRAs of one model in two namings, brought into the model's own: where a family's tables say what is what, exactly."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from math import prod

import torch
from torch import Tensor

from ..files.lora import Lora
from ..naming.aliases import text_encoder
from ..naming.families import family_of
from ..naming.family import Family, Rows
from ..updates.layer import Layer, LoraLayer, is_safe

Place = tuple[str, Rows]


def in_own_naming(loras: Sequence[Lora]) -> list[Lora] | None:
    """The LoRAs with the canonical names of their model's own naming, so that the same weights meet.

    Slices become part of the fused weight where another LoRA changes that, and stay slices elsewhere.
    None unless each LoRA, as far as it changes the model at all, is recognised as of one and the same family.
    """
    of_model = [[m for m, spelled in lora.spellings.items() if text_encoder(spelled) is None] for lora in loras]
    family = family_of(filter(None, of_model))
    if family is None:
        return None
    names = [{module: family.own(module) or module for module in modules} for modules in of_model]
    if any(len(set(new.values())) < len(new) for new in names):
        return None
    # What a LoRA spells in the model's own naming is written so; the rest in kohya's format.
    spellings: dict[str, str] = {}
    for lora, new in zip(loras, names, strict=True):
        for old, own in new.items():
            if old == own:
                spellings.setdefault(own, lora.spellings[old])
    renamed = [_renamed(lora, new, spellings) for lora, new in zip(loras, names, strict=True)]
    shapes = {module: layer.shape for lora in renamed for module, layer in lora.modules.items()}
    return [_fused(lora, family, shapes, spellings) for lora in renamed]


def _renamed(lora: Lora, new: Mapping[str, str], spellings: Mapping[str, str]) -> Lora:
    def name(module: str) -> str:
        return new.get(module, module)

    return replace(
        lora,
        modules={name(module): layer for module, layer in lora.modules.items()},
        diffs={(name(module), part): diff for (module, part), diff in lora.diffs.items()},
        carried={name(module): update for module, update in lora.carried.items()},
        spellings={
            name(module): spelled if name(module) == module else spellings.get(name(module), name(module))
            for module, spelled in lora.spellings.items()
        },
    )


def _fused(lora: Lora, family: Family, shapes: Mapping[str, tuple[int, ...]], spellings: Mapping[str, str]) -> Lora:
    """The LoRA with its slices of weights that another LoRA has whole put together. shapes: of those weights."""
    found: dict[str, list[tuple[str, Rows]]] = {}
    for module, layer in lora.modules.items():
        if (place := _place(module, layer, family, shapes)) is not None and place[0] not in lora.spellings:
            found.setdefault(place[0], []).append((module, place[1]))
    if not found:
        return lora
    gone = {module for parts in found.values() for module, _ in parts}
    modules: dict[str, Layer] = {module: layer for module, layer in lora.modules.items() if module not in gone}
    for whole, parts in found.items():
        modules[whole] = stacked([(rows, lora.modules[module]) for module, rows in parts], shapes[whole])
    spelled = dict(lora.spellings) | {whole: spellings.get(whole, whole) for whole in found}
    return replace(lora, modules=modules, spellings=spelled)


def _place(module: str, layer: Layer, family: Family, shapes: Mapping[str, tuple[int, ...]]) -> Place | None:
    """The fused weight, and the rows of it, that a slice's update goes to."""
    for whole in sorted(family.fused(module)):
        shape = shapes.get(whole)
        if shape is None or not isinstance(layer, LoraLayer) or not is_safe(layer):
            continue
        rows = family.rows(module, whole, shape)
        if rows is not None and layer.shape[0] == rows.length and prod(layer.shape[1:]) == prod(shape[1:]):
            return whole, rows
    return None


def stacked(parts: Sequence[tuple[Rows, Layer]], shape: tuple[int, ...]) -> LoraLayer:
    """The update of a fused weight that consists of updates of its slices: (out, in) of `shape`, of scale 1, float32.

    Ranks add up; each slice's up stands in its own rows and columns, so nothing of them mixes.
    """
    ups: list[Tensor] = []
    downs: list[Tensor] = []
    for rows, layer in parts:
        up, down = layer.factors()
        column = up.new_zeros(shape[0], up.shape[1])
        column[rows.start : rows.start + rows.length] = up * layer.scale
        ups.append(column)
        downs.append(down)
    return LoraLayer(torch.cat(ups, 1), torch.cat(downs))
