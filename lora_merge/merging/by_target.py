"""LoRAs of a model that no table knows, brought into one naming by the weights that a loader would change."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from ..files.lora import Lora
from ..files.one_naming import Place, Renaming, Shape, can_turn, fits, of_model, put_together, renamed
from ..files.twice import undecided
from ..naming import names
from ..naming.family import Rows
from ..naming.unet import Layout
from ..updates.layer import Layer, LoraLayer, is_safe
from ..words import many


@dataclass(frozen=True)
class Target:
    """What a name stands for in a model: a weight, or rows of one.

    weight: the model's own name of it, `diffusion_model.blocks.0.attn.qkv.weight`.   rows: None for all of them.
    turned: whether the name's update has the two halves of the weight the other way about.
    """

    weight: str
    rows: Rows | None = None
    turned: bool = False

    @property
    def spelling(self) -> str:
        """How the whole weight is written, which every ComfyUI reads."""
        return names.kohya_name(self.weight.removesuffix(".weight"))

    @property
    def canonical(self) -> str:
        return names.canonical(self.spelling, Layout())


@dataclass(frozen=True, eq=False)
class ModelNames:
    """What a model says of names. targets: spelling -> what it stands for.   shapes: of the model's weights."""

    targets: Mapping[str, Target]
    shapes: Mapping[str, Shape]

    def of(self, loras: Sequence[Lora]) -> ModelNames:
        """As much of it as counts for these LoRAs."""
        known = {names.kohya_name(name): target for name, target in self.targets.items()}
        used = {s: known[s] for lora in loras for module in of_model(lora) if (s := lora.spellings[module]) in known}
        return ModelNames(used, {target.weight: self.shapes[target.weight] for target in used.values()})

    def to_dict(self) -> dict[str, object]:
        """As JSON can hold it: of each name the number of its weight, its rows, whether the halves change places."""
        numbers = {weight: number for number, weight in enumerate(self.shapes)}
        names = {
            name: [numbers[t.weight], *([] if t.rows is None else [t.rows.start, t.rows.length])]
            for name, t in self.targets.items()
        }
        turned = [name for name, target in self.targets.items() if target.turned]
        return {"weights": {w: [*shape] for w, shape in self.shapes.items()}, "names": names, "turned": turned}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> ModelNames:
        """Undoes `to_dict`. Raises ValueError, KeyError, TypeError, IndexError or AttributeError for anything else."""
        shapes = {str(weight): tuple(map(int, shape)) for weight, shape in values["weights"].items()}
        weights, turned = [*shapes], {*values["turned"]}
        targets = {}
        for name, (number, *rows) in values["names"].items():
            weight = weights[int(number)]
            own = Rows(*map(int, rows)) if rows else None
            if own is not None and not 0 <= own.start < own.start + own.length <= shapes[weight][0]:
                raise ValueError(f"{name} is rows {own.start} to {own.start + own.length} of {weight}")
            targets[str(name)] = Target(weight, own, name in turned)
        return cls(targets, shapes)


def by_target(loras: Sequence[Lora], targets: Mapping[str, Target], shapes: Mapping[str, Shape]) -> list[Lora]:
    """The LoRAs, with one name for what changes one weight, where their own names do not tell that.

    targets: spelling -> what it stands for in the model; shapes: of the model's weights.
    Slices become part of the whole weight where a LoRA changes that. What the model has no place for keeps its name.
    Raises ValueError for a LoRA of which nothing has a place in the model.
    """
    known = {names.kohya_name(name): target for name, target in targets.items()}
    homes = [
        {module: known[s] for module in of_model(lora) if (s := lora.spellings[module]) in known} for lora in loras
    ]
    for lora, found in zip(loras, homes, strict=True):
        if of_model(lora) and not found:
            raise ValueError(
                f"{lora.source}: none of its {many(len(of_model(lora)), 'modules')} has a place in the connected model (the first is "
                f"{lora.spellings[of_model(lora)[0]]}). Connect the model that the LoRAs are for, or none."
            )
    if not _needed(loras, homes):
        return list(loras)
    first: dict[Target, tuple[str, str]] = {}
    for lora, found in zip(loras, homes, strict=True):
        for module, target in found.items():
            first.setdefault(target, (module, lora.spellings[module]))
    return [_named(lora, found, first, homes, shapes) for lora, found in zip(loras, homes, strict=True)]


def _needed(loras: Sequence[Lora], homes: Sequence[Mapping[str, Target]]) -> bool:
    called: dict[Target, set[str]] = {}
    for found in homes:
        for module, target in found.items():
            called.setdefault(replace(target, turned=False), set()).add(module)
    whole = {target.weight for target in called if target.rows is None}
    sliced = {target.weight for target in called if target.rows is not None}
    if any(len(modules) > 1 for modules in called.values()) or whole & sliced:
        return True
    return undecided([named for index, lora in enumerate(loras) for named in lora.named(index)]) is not None


def _named(
    lora: Lora,
    found: Mapping[str, Target],
    first: Mapping[Target, tuple[str, str]],
    homes: Sequence[Mapping[str, Target]],
    shapes: Mapping[str, Shape],
) -> Lora:
    new, spelled = {}, {}
    for module, target in found.items():
        if target.turned and not can_turn(lora, module):
            continue
        name, spelling = first[target] if target.rows else (target.canonical, target.spelling)
        new[module] = name
        spelled[name] = spelling
    if len(set(new.values())) < len(new):
        twice = next(name for name in new.values() if [*new.values()].count(name) > 1)
        those = " and ".join(lora.spellings[module] for module, name in new.items() if name == twice)
        raise ValueError(f"{lora.source}: {those} are one weight of the connected model; remove one of them.")
    lora = renamed(lora, Renaming(new, frozenset(m for m in new if found[m].turned)))
    whole = {target.weight for those in homes for target in those.values() if target.rows is None}
    rows = {new[m]: t for m, t in found.items() if m in new and t.rows is not None and t.weight in whole}

    def place_of(module: str, layer: Layer) -> Place | None:
        target = rows.get(module)
        if target is None or target.rows is None or not isinstance(layer, LoraLayer) or not is_safe(layer):
            return None
        return (target.canonical, target.rows) if fits(layer, target.rows, shapes[target.weight]) else None

    together = put_together(lora, place_of, {t.canonical: shapes[t.weight] for t in rows.values()})
    spelled |= {target.canonical: target.spelling for target in rows.values()}
    return replace(together, spellings={m: spelled.get(m, s) for m, s in together.spellings.items()})
