"""Weights that are named twice, in one file or in several: a loader would use one of the updates and drop the other."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations
from math import prod

from torch import Tensor

from ..naming import aliases
from ..naming.families import family_of
from ..updates.layer import Layer, shape_of_both
from ..updates.weight_dependent import BUNDLED, Carried
from ..words import many
from .keys import BIAS_PARTS

_SHOWN = 3


@dataclass(frozen=True)
class Named:
    """An update of a weight or of a bias. owner: number of the LoRA it is in.   shape: None where nothing is known,
    (out,) where the update tells its rows only.
    """

    owner: int
    canonical: str
    spelling: str
    is_bias: bool
    shape: tuple[int, ...] | None

    @property
    def text(self) -> str:
        return f"{self.spelling}{' (bias)' if self.is_bias else ''}"


Pair = tuple[Named, Named]


def named(
    modules: Mapping[str, Layer],
    diffs: Mapping[tuple[str, str], Tensor],
    carried: Mapping[str, Carried],
    spellings: Mapping[str, str],
    owner: int = 0,
) -> list[Named]:
    """Every update of a LoRA, with the fields of one. owner: its number among others."""
    found = [
        Named(owner=owner, canonical=module, spelling=spellings[module], is_bias=False, shape=layer.shape)
        for module, layer in modules.items()
    ]
    for (module, part), diff in diffs.items():
        found.append(
            Named(
                owner=owner,
                canonical=module,
                spelling=spellings[module],
                is_bias=part in BIAS_PARTS,
                shape=tuple(diff.shape),
            )
        )
    for module, update in carried.items():
        if update.kind != BUNDLED:
            found.append(
                Named(owner=owner, canonical=module, spelling=spellings[module], is_bias=False, shape=update.shape)
            )
    return found


def twice(updates: Sequence[Named]) -> list[Pair]:
    """Updates under different names that are, or may be, of one weight, in the order of their names."""
    text = [(one, place) for one in updates if (place := aliases.text_encoder(one.spelling)) is not None]
    encoders = frozenset(encoder for _, (encoder, _) in text)
    models = [one for one in updates if aliases.text_encoder(one.spelling) is None]
    found: dict[tuple[str, str], Pair] = {}
    for first, second in _sharing_a_site(models):
        found.setdefault((first.canonical, second.canonical), (first, second))
    by_body: dict[tuple[str, bool], list[tuple[Named, str]]] = {}
    for one, (encoder, body) in text:
        by_body.setdefault((body, one.is_bias), []).append((one, encoder))
    for (body, _), those in by_body.items():
        for (first, a), (second, b) in combinations(those, 2):
            if first.canonical != second.canonical and aliases.one_encoder(a, b, body, encoders):
                if _may_meet(first.shape, second.shape):
                    found.setdefault((first.canonical, second.canonical), (first, second))
    return [found[key] for key in sorted(found)]


def _sharing_a_site(updates: Iterable[Named]) -> Iterator[Pair]:
    updates = list(updates)
    sites_of = _sites_of(updates)
    by_site: dict[str, list[Named]] = {}
    for one in updates:
        for site in sites_of(one):
            # A bias is the update beside a weight's, or a parameter of its own name.
            by_site.setdefault(f"{site}_bias" if one.is_bias else site, []).append(one)
    for those in by_site.values():
        for first, second in combinations(those, 2):
            other = (first.canonical, first.is_bias) != (second.canonical, second.is_bias)
            if other and _may_meet(first.shape, second.shape):
                yield first, second


def _sites_of(updates: Sequence[Named]) -> Callable[[Named], Iterable[str]]:
    """What gives every name that an update's module may have in its model's own naming: one, if the family is known."""
    owners: dict[int, list[str]] = {}
    for one in updates:
        owners.setdefault(one.owner, []).append(one.canonical)
    family = family_of(owners.values())
    if family is None:
        return lambda one: aliases.sites(one.canonical)

    def own(one: Named) -> list[str]:
        turned = family.turn(one.canonical, one.shape) if one.shape else None
        return [turned or family.own(one.canonical) or one.canonical]

    return own


def slices(updates: Iterable[Named]) -> list[Pair]:
    """Updates of two LoRAs of which the second is of a slice of the first one's weight."""
    updates = [one for one in updates if aliases.text_encoder(one.spelling) is None]
    by_body: dict[tuple[str, bool], list[Named]] = {}
    for one in updates:
        by_body.setdefault((aliases.body(one.canonical), one.is_bias), []).append(one)
    found = []
    for part in updates:
        for body in sorted(aliases.slices_of(part.canonical)):
            fused = [one for one in by_body.get((body, part.is_bias), ()) if one.owner != part.owner]
            found += [(one, part) for one in fused if _holds(one.shape, part.shape)]
    return found


def _holds(whole: tuple[int, ...] | None, part: tuple[int, ...] | None) -> bool:
    if not whole or not part:
        return True
    return whole[0] > part[0] and (1 in (len(whole), len(part)) or prod(whole[1:]) == prod(part[1:]))


def undecided(updates: Sequence[Named]) -> Pair | None:
    """Two modules, of two LoRAs, that may be one weight in namings of which nothing is known here; None if all is clear.

    Namings behind different prefixes are clear if they are the same one, or if all names in them are known.
    """
    groups: dict[tuple[int, str], list[Named]] = {}
    for one in updates:
        if aliases.text_encoder(one.spelling) is None:
            groups.setdefault((one.owner, aliases.prefix_class(one.canonical)), []).append(one)
    for ((owner, prefix), those), ((other, others_prefix), others) in combinations(groups.items(), 2):
        if owner != other and prefix != others_prefix and (pair := _unclear(those, others)) is not None:
            return pair
    return None


def _unclear(those: Sequence[Named], others: Sequence[Named]) -> Pair | None:
    if not {aliases.pattern(one.canonical) for one in those}.isdisjoint(aliases.pattern(o.canonical) for o in others):
        return None
    unknown = [not aliases.is_known(one.canonical) for one in those]
    unknown_others = [not aliases.is_known(one.canonical) for one in others]
    if not any(unknown) and not any(unknown_others):
        return None
    for one, strange in zip(those, unknown, strict=True):
        for other, strange_too in zip(others, unknown_others, strict=True):
            if (strange or strange_too) and one.is_bias == other.is_bias and _may_meet(one.shape, other.shape):
                return one, other
    return None


def _may_meet(first: tuple[int, ...] | None, second: tuple[int, ...] | None) -> bool:
    """Whether updates of these shapes can be of one weight."""
    if first is None or second is None:
        return True
    if len(first) == len(second) or 1 not in (len(first), len(second)):
        return shape_of_both(first, second) is not None
    # A vector of as many values, or the rows alone of a matrix.
    return first[:1] == second[:1] or prod(first) == prod(second)


def pairs_text(pairs: Sequence[Pair], sources: Sequence[str]) -> str:
    """The first few pairs, with the LoRA that each name is from, and how many more there are."""
    shown = [
        f"{first.text} ({sources[first.owner]}) and {second.text} ({sources[second.owner]})"
        if first.owner != second.owner
        else f"{first.text} and {second.text}"
        for first, second in pairs[:_SHOWN]
    ]
    more = f", and {many(len(pairs) - _SHOWN, 'pairs')} more" if len(pairs) > _SHOWN else ""
    return "; ".join(shown) + more
