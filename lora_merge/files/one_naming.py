"""LoRAs of one model in several namings, brought into the model's own: where a family's tables say what is what, exactly."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from math import prod

import torch
from torch import Tensor

from ..naming.aliases import body, text_encoder
from ..naming.families import family_by_width, family_of, one_for_all, written
from ..naming.family import Family, Part, Rows
from ..updates.layer import Layer, LoraLayer, is_safe
from ..updates.weight_dependent import DORA, Carried
from .keys import WEIGHT_PARTS
from .lora import Lora

Place = tuple[str, Rows]
Shape = tuple[int, ...]


@dataclass(frozen=True)
class Renaming:
    """What becomes of one LoRA's modules.

    names: old canonical name -> new one.   turned: old names of those that change with their halves the other way about.
    """

    names: Mapping[str, str]
    turned: frozenset[str]


def family_of_loras(loras: Iterable[Lora]) -> Family | None:
    """The one family that each LoRA, as far as it changes the model at all, is recognised as of."""
    changing = [lora for lora in loras if of_model(lora)]
    return family_of(map(of_model, changing)) or family_by_width(map(model_shapes, changing))


def are_read(loras: Iterable[Lora]) -> bool:
    """Whether ComfyUI reads all names of the LoRAs, as far as their family is known."""
    loras = list(loras)
    family = family_of_loras(loras)
    return family is None or all(family.reads(lora.spellings[name]) for lora in loras for name in of_model(lora))


def in_own_naming(loras: Sequence[Lora], *, whole: bool = False) -> list[Lora] | None:
    """The LoRAs with the canonical names of their model's own naming, so that the same weights meet.

    Slices become part of the fused weight where another LoRA changes that or ComfyUI has no name for them, and stay
    slices elsewhere unless `whole` is wanted. All modules of the model are spelled in one naming: dotted if any of the own
    names had dots. Where names do not tell the family, those that differ in their prefixes alone get one that is read in
    each of the families. None if no family has all of the names.
    """
    family = family_of_loras(loras)
    if family is None:
        return _behind_one_prefix(loras)
    new = [_new_names(lora, family) for lora in loras]
    if any(len(set(one.names.values())) < len(one.names) for one in new):
        return None
    own = [renamed(lora, one) for lora, one in zip(loras, new, strict=True)]
    shapes = {module: layer.shape for lora in own for module, layer in lora.modules.items()}
    dots = _has_dots(loras, family)
    return [_spelled(_fused(lora, family, shapes, whole), family, dots) for lora in own]


def _behind_one_prefix(loras: Sequence[Lora]) -> list[Lora] | None:
    first: dict[str, str] = {}
    spellings: dict[str, list[str]] = {}
    news = []
    for lora in loras:
        new = {module: first.setdefault(body(module), module) for module in of_model(lora)}
        if len(set(new.values())) < len(new):
            return None
        for module, name in new.items():
            spellings.setdefault(name, []).append(lora.spellings[module])
        news.append(new)
    every = {module: shape for lora in loras for module, shape in model_shapes(lora).items()}
    chosen = one_for_all(every, spellings)
    if chosen is None:
        return None
    made = [renamed(lora, Renaming(new, frozenset())) for lora, new in zip(loras, news, strict=True)]
    return [replace(one, spellings={m: chosen.get(m, s) for m, s in one.spellings.items()}) for one in made]


def of_model(lora: Lora) -> list[str]:
    return [module for module, spelled in lora.spellings.items() if text_encoder(spelled) is None]


def model_shapes(lora: Lora) -> dict[str, Shape]:
    """Module of the model -> shape of its weight, as far as the LoRA tells."""
    shapes = {module: shape for module, is_bias, shape in lora.shapes() if not is_bias}
    shapes |= {module: update.shape for module, update in lora.carried.items() if update.shape is not None}
    return {module: shapes.get(module, ()) for module in of_model(lora)}


def _new_names(lora: Lora, family: Family) -> Renaming:
    shapes: dict[str, set[Shape]] = {}
    for module, _, shape in lora.shapes():
        shapes.setdefault(module, set()).add(shape)
    names, turned = {}, set()
    for module in of_model(lora):
        own = family.own(module)
        others = {family.turn(module, shape) for shape in shapes.get(module, ())}
        if len(others) == 1 and (other := others.pop()) is not None:
            # What cannot be turned keeps diffusers' name.
            own = other if can_turn(lora, module) else None
            turned |= {module} if own else set()
        names[module] = own or module
    return Renaming(names, frozenset(turned))


def can_turn(lora: Lora, module: str) -> bool:
    layer = lora.modules.get(module)
    return module not in lora.carried and (layer is None or (isinstance(layer, LoraLayer) and layer.mid is None))


def turned(values: Tensor) -> Tensor:
    """Rows (or values) with their two halves the other way about; the same again turns them back."""
    return torch.roll(values, values.shape[0] // 2, 0)


def renamed(lora: Lora, new: Renaming) -> Lora:
    def name(module: str) -> str:
        return new.names.get(module, module)

    def layer(module: str, layer: Layer) -> Layer:
        return replace(layer, up=turned(layer.up)) if module in new.turned and isinstance(layer, LoraLayer) else layer

    return replace(
        lora,
        modules={name(module): layer(module, update) for module, update in lora.modules.items()},
        diffs={
            (name(module), part): turned(diff) if module in new.turned else diff
            for (module, part), diff in lora.diffs.items()
        },
        carried={name(module): update for module, update in lora.carried.items()},
        spellings={name(module): spelled for module, spelled in lora.spellings.items()},
    )


def _has_dots(loras: Sequence[Lora], family: Family) -> bool:
    """Whether a name of the model's own is written with dots anywhere, or none is written at all."""
    own = [
        spelled
        for lora in loras
        for module in of_model(lora)
        if (dots := family.dots(module))
        and (spelled := lora.spellings[module]).endswith((dots, dots.replace(".", "_")))
    ]
    return not own or any("." in spelled for spelled in own)


def _spelled(lora: Lora, family: Family, dots: bool) -> Lora:
    def spelling(module: str, known: str) -> str:
        if text_encoder(known) is not None:
            return known
        if module.startswith("lora_unet_") and not dots and family.dots(module) and family.reads(module):
            return module
        return written(family, module) or known

    return replace(lora, spellings={module: spelling(module, known) for module, known in lora.spellings.items()})


def _fused(lora: Lora, family: Family, shapes: Mapping[str, Shape], every: bool) -> Lora:
    """The LoRA with slices put together of weights that another LoRA has whole, or that ComfyUI knows no slices of; or of
    every one.

    shapes: of all weights in the LoRAs, by their names.
    """
    shapes = {**_whole_shapes(lora, family, every), **shapes}
    lora = put_together(lora, lambda module, layer: _place(module, layer, family, shapes), shapes)
    return _carried_fused(_differences_fused(lora, family, shapes), family, shapes)


def put_together(lora: Lora, place_of: Callable[[str, Layer], Place | None], shapes: Mapping[str, Shape]) -> Lora:
    """The LoRA with the updates of slices as one of the whole weight, which is named canonically.

    place_of: (module, layer) -> the whole weight and the slice's rows; None for what stays as it is. shapes: of the former.
    """
    found: dict[str, list[Place]] = {}
    for module, layer in lora.modules.items():
        if (place := place_of(module, layer)) is not None and place[0] not in lora.spellings:
            found.setdefault(place[0], []).append((module, place[1]))
    if not found:
        return lora
    gone = {module for parts in found.values() for module, _ in parts}
    modules: dict[str, Layer] = {module: layer for module, layer in lora.modules.items() if module not in gone}
    for whole, parts in found.items():
        modules[whole] = stacked([(rows, lora.modules[module]) for module, rows in parts], shapes[whole])
    return replace(lora, modules=modules)


def _whole_shapes(lora: Lora, family: Family, every: bool) -> dict[str, Shape]:
    """Shapes of fused weights that are told by their slices alone, as far as ComfyUI reads none of these; or of every one."""
    sizes = {module: tuple(diff.shape) for (module, part), diff in lora.diffs.items() if part in WEIGHT_PARTS}
    sizes |= {module: update.shape for module, update in lora.carried.items() if update.shape is not None}
    sizes |= {module: layer.shape for module, layer in lora.modules.items()}
    slices: dict[str, dict[str, Shape]] = {}
    for module, size in sizes.items():
        if (holders := family.fused(module)) and (every or family.slice_name(module) is None):
            for whole in holders:
                slices.setdefault(whole, {})[module] = size
    shapes = {whole: family.whole_shape(whole, known) for whole, known in slices.items()}
    return {whole: shape for whole, shape in shapes.items() if shape is not None}


def _place(module: str, layer: Layer, family: Family, shapes: Mapping[str, Shape]) -> Place | None:
    """The fused weight, and the rows of it, that a slice's update goes to.

    LoHa and LoKr become LoRA of a high rank there: only where a loader would not read them as they are.
    """
    if not isinstance(layer, LoraLayer) and written(family, module) is not None:
        return None
    return _rows_in(module, layer.shape, family, shapes) if is_safe(layer) else None


def _rows_in(module: str, size: Shape, family: Family, shapes: Mapping[str, Shape]) -> Place | None:
    """size: of the slice, (out,) of a bias."""
    for whole in sorted(family.fused(module)):
        shape = shapes.get(whole)
        rows = None if shape is None else family.rows(module, whole, shape)
        if shape is not None and rows is not None and _fit(size, rows, shape):
            return whole, rows
    return None


def _fit(size: Shape, rows: Rows, shape: Shape) -> bool:
    return size[0] == rows.length and (len(size) == 1 or prod(size[1:]) == prod(shape[1:]))


def fits(layer: Layer, rows: Rows, shape: Shape) -> bool:
    """Whether an update can be of these rows of a weight of this shape."""
    return _fit(layer.shape, rows, shape)


def _differences_fused(lora: Lora, family: Family, shapes: Mapping[str, Shape]) -> Lora:
    """The same for whole differences of slices' weights and biases, with zeros in the rows of slices that have none."""
    found: dict[tuple[str, str], list[tuple[Rows, Tensor]]] = {}
    gone = set()
    for (module, part), diff in lora.diffs.items():
        if part not in ("diff", "diff_b") or written(family, module) is not None:
            continue
        place = _rows_in(module, tuple(diff.shape), family, shapes)
        if place is not None and (part == "diff_b" or place[0] not in lora.modules):
            found.setdefault((place[0], part), []).append((place[1], diff))
            gone.add((module, part))
    if not found:
        return lora
    diffs = {key: diff for key, diff in lora.diffs.items() if key not in gone}
    for (whole, part), parts in found.items():
        diffs[whole, part] = _side_by_side(parts, shapes[whole] if part == "diff" else shapes[whole][:1])
    return replace(lora, diffs=diffs)


def _side_by_side(parts: Sequence[tuple[Rows, Tensor]], shape: Shape) -> Tensor:
    dtypes = {tensor.dtype for _, tensor in parts}
    whole = torch.zeros(shape, dtype=dtypes.pop() if len(dtypes) == 1 else torch.float32)
    for rows, tensor in parts:
        whole[rows.start : rows.start + rows.length] = tensor.reshape(rows.length, *shape[1:])
    return whole


def _carried_fused(lora: Lora, family: Family, shapes: Mapping[str, Shape]) -> Lora:
    """The same for DoRA that scales the rows of the weight, of which each is its own: where every row has its scale."""
    found: dict[str, list[tuple[Rows, str]]] = {}
    for module, update in lora.carried.items():
        if written(family, module) is None and update.shape is not None and _scales_rows(update):
            if (place := _rows_in(module, update.shape, family, shapes)) is not None:
                found.setdefault(place[0], []).append((place[1], module))
    carried = dict(lora.carried)
    for whole, slices in found.items():
        if sum(rows.length for rows, _ in slices) < shapes[whole][0]:
            continue
        own = [(rows, carried.pop(module)) for rows, module in slices]
        layers = [(rows, LoraLayer(one.parts["up"], one.parts["down"], one.alpha)) for rows, one in own]
        scales = [(rows, one.parts["dora_scale"].flatten(1)) for rows, one in own]
        parts = stacked(layers, shapes[whole]).parts() | {"dora_scale": _side_by_side(scales, (shapes[whole][0], 1))}
        carried[whole] = Carried(DORA, parts, None, shapes[whole])
    gone = lora.carried.keys() - carried.keys()
    spellings = {module: name for module, name in lora.spellings.items() if module not in gone}
    return replace(lora, carried=carried, spellings=spellings) if gone else lora


def _scales_rows(update: Carried) -> bool:
    if update.kind != DORA or update.parts.keys() != {"up", "down", "dora_scale"}:
        return False
    scale = update.parts["dora_scale"]
    return update.shape is not None and scale.shape[0] == scale.numel() == update.shape[0] and scale.ndim > 1


def stacked(parts: Sequence[tuple[Rows, Layer]], shape: Shape) -> LoraLayer:
    """The update of a fused weight that consists of updates of its slices: (out, in) of `shape`, of scale 1.

    In the slices' own dtype where that holds every number, else float32.

    Ranks add up; each slice's up stands in its own rows and columns, so nothing of them mixes. Slices of one and the same
    down, as `split` makes them, share its columns: what was split comes back as it was.
    """
    ups: list[Tensor] = []
    downs: list[Tensor] = []
    for rows, layer in parts:
        up, down = layer.factors()
        known = (number for number, other in enumerate(downs) if torch.equal(other, down))
        if (number := next(known, len(downs))) == len(downs):
            ups.append(up.new_zeros(shape[0], up.shape[1]))
            downs.append(down)
        ups[number][rows.start : rows.start + rows.length] = up * layer.scale
    up, down = torch.cat(ups, 1), torch.cat(downs)
    dtypes = {
        part.dtype
        for _, layer in parts
        for part in (layer.parts().get("up"), layer.parts().get("down"))
        if part is not None
    }
    if len(dtypes) == 1 and all(
        torch.equal(one.to(dtype := next(iter(dtypes))).to(one.dtype), one) for one in (up, down)
    ):
        return LoraLayer(up.to(dtype), down.to(dtype))
    return LoraLayer(up, down)


def split(layer: LoraLayer, parts: Sequence[Part]) -> dict[str, LoraLayer]:
    """The update of a weight as diffusers has it: name -> the update of those rows. parts: Family.parts of the weight.

    down is the same in all; up is cut by rows. Exact, in the dtype it came in. What `stacked` put together comes back at the
    rank that it had.
    """
    pieces = {name: torch.cat([layer.up[one.start : one.start + one.length] for one in rows]) for name, rows in parts}
    return {name: _without_idle(replace(layer, up=up)) for name, up in pieces.items()}


def _without_idle(layer: LoraLayer) -> LoraLayer:
    """A layer without the ranks whose column of up is zero, at the same scale."""
    used = layer.up.flatten(1).any(dim=0)
    if layer.mid is not None or bool(used.all()) or not bool(used.any()):
        return layer
    alpha = None if layer.alpha is None else layer.scale * int(used.sum())
    return LoraLayer(layer.up[:, used], layer.down[used], alpha)
