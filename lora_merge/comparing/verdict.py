"""Will LoRAs fight, and where? An answer in words from the figures of a comparison."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from ..words import many
from .comparison import Comparison, Group, Measure, Pair

Kind = Literal["oppose", "alike", "crowd", "independent"]

# Its strength is 0; all that can be compared is zeros; nothing of it can be.
Silence = Literal["off", "zeros", "unknown"]
_SILENT: dict[Silence, str] = {
    "off": "{} adds nothing, its strength is 0",
    "zeros": "{} adds nothing, its updates are zeros",
    "unknown": "nothing of {} can be compared",
}

# What matters: a cosine of 0.1 changes the norm of the sum of two equal LoRAs by 5 %, of unequal ones by less; and a tenth
# of a LoRA's energy in another's leading directions is the least that protection could visibly take from it.
MATTERS = 0.1
# What chance does not do: no distribution leaves ten standard deviations in more than one of 100 cases (Chebyshev), and
# those here, close to normal, almost never. In large layers this is far below MATTERS; in tiny ones it says "not known".
DEVIATIONS = 10.0
# A block with less of each LoRA's energy than this decides nothing.
_LITTLE = 0.01
_SHOWN = 5
_EVERYWHERE = 0.8


@dataclass(frozen=True)
class Relation:
    """How two inputs stand to one another in a group of modules.

    kind: "oppose", they cancel in part; "alike", they do the same in part; "crowd", one has much of its energy in the
    leading input directions of the other; else "independent".   degree: cosine, or the larger excess of such energy.
    """

    kind: Kind
    degree: float


def relation(pair: Pair) -> Relation:
    """The first that holds, by effect and by chance at once: beyond MATTERS, and beyond DEVIATIONS."""
    cosine = pair.cosine
    if abs(cosine) >= max(MATTERS, DEVIATIONS * pair.cosine_deviation):
        return Relation("alike" if cosine > 0 else "oppose", cosine)
    crowds = [one.excess for one in (pair.first_inside, pair.second_inside) if _crowds(one)]
    return Relation("crowd", max(crowds)) if crowds else Relation("independent", cosine)


def _crowds(measure: Measure) -> bool:
    return measure.excess >= max(MATTERS, DEVIATIONS * measure.deviation)


def dependent_blocks(comparison: Comparison, which: tuple[int, int]) -> list[tuple[Group, Relation]]:
    """Blocks in which two inputs are not independent, the strongest first; without blocks that hold little of both."""
    found = []
    for block in comparison.blocks:
        pair = next((one for one in block.pairs if one.which == which), None)
        shares = [block.energies[i] / whole if (whole := comparison.whole.energies[i]) > 0 else 0.0 for i in which]
        if pair is not None and max(shares) >= _LITTLE and (what := relation(pair)).kind != "independent":
            found.append((block, what))
    order = ("oppose", "alike", "crowd")
    return sorted(found, key=lambda entry: (order.index(entry[1].kind), -abs(entry[1].degree)))


def silence(comparison: Comparison, index: int) -> Silence | None:
    """Why an input has no norm; None for one that has."""
    one = comparison.inputs[index]
    if comparison.norm(index):
        return None
    return "off" if not one.strength else "zeros" if one.compared else "unknown"


def headline(comparison: Comparison) -> str:
    """One line: will they fight?"""
    pairs = _acting(comparison)
    if len(comparison.inputs) < 2:
        return "One LoRA alone has nobody to fight with."
    if not pairs and comparison.fused:
        return "Not known: they change the same weights under two names, as a whole and in slices."
    silent = [silence(comparison, index) for index in range(len(comparison.inputs))]
    if not pairs and "unknown" in silent:
        return "Not known: nothing of one of these LoRAs can be compared."
    if not pairs and all(silent):
        return "Nothing to fight: none of these LoRAs adds anything."
    if not pairs:
        return "Nothing to fight: no two of these LoRAs change the same modules."
    kinds = {relation(pair).kind for pair in pairs}
    local = {what.kind for pair in pairs for _, what in dependent_blocks(comparison, pair.which)}
    if "oppose" in kinds:
        return "They fight: what one adds another takes away in part."
    if "alike" in kinds:
        return "They double up: in part they do the same, so together they are stronger than each was meant to be."
    if "oppose" in local:
        return "They fight in places, and are independent on the whole."
    if "crowd" in kinds:
        return "They do not cancel, but they crowd: one acts where the other is strongest."
    if "alike" in local:
        return "They double up in places, and are independent on the whole."
    if "crowd" in local:
        return "No fight; but in places one acts where the other is strongest."
    return "No fight: they are independent, and their sum does what each of them does."


def answer(comparison: Comparison) -> list[str]:
    """A few sentences on every two inputs: whether, where, and what helps."""
    lines = [headline(comparison)]
    labels = comparison.labels
    acting = {pair.which: pair for pair in _acting(comparison)}
    calm: list[str] = []
    for i in range(len(labels)):
        for j in range(i + 1, len(labels)):
            pair = acting.get((i, j))
            is_calm = pair and relation(pair).kind == "independent" and not dependent_blocks(comparison, (i, j))
            (calm if is_calm else lines).append(_sentence(comparison, (i, j), pair))
    return [*lines, *calm] if len(calm) <= _SHOWN else [*lines, f"The other {many(len(calm), 'pairs')}: independent."]


def _acting(comparison: Comparison) -> list[Pair]:
    """Pairs of which both have a strength."""
    return [pair for pair in comparison.whole.pairs if all(comparison.inputs[i].strength for i in pair.which)]


def _sentence(comparison: Comparison, which: tuple[int, int], pair: Pair | None) -> str:
    one, two = (comparison.labels[i] for i in which)
    both = f"{one} and {two}"
    silent = {comparison.labels[i]: why for i in which if (why := silence(comparison, i))}
    if silent:
        return f"{both}: {', and '.join(_SILENT[why].format(label) for label, why in silent.items())}."
    if pair is None:
        return f"{both}: they change different modules, so neither touches what the other does there."
    what, where = relation(pair), dependent_blocks(comparison, which)
    chance = f"by chance up to {DEVIATIONS * pair.cosine_deviation:.2g}"
    cosine = f"cosine {pair.cosine:+.3f} ({chance})"
    if what.kind == "oppose":
        text = (
            f"{both}: opposed, {cosine}. Part of one undoes the other; lower one, or keep it out of the blocks below."
        )
    elif what.kind == "alike":
        text = f"{both}: alike, {cosine}. They add up to more than either was meant to be; lower their strengths."
    elif what.kind == "crowd":
        text = f"{both}: no cancelling, {cosine}, but {_crowding(pair, one, two)}. Protecting the one (mu) makes room."
    elif abs(pair.cosine) > DEVIATIONS * pair.cosine_deviation:
        text = f"{both}: nearly independent, {cosine}, which changes the sum little."
    else:
        text = f"{both}: independent, {cosine}."
    if not where:
        return text
    shown = ", ".join(_at(block, found) for block, found in where[:_SHOWN])
    shared = sum(any(one.which == which for one in block.pairs) for block in comparison.blocks)
    if len(where) > max(_SHOWN, _EVERYWHERE * shared):
        return f"{text} Where: nearly everywhere, most in {shown}."
    more = f", and {many(len(where) - _SHOWN, 'more blocks')}" if len(where) > _SHOWN else ""
    return f"{text} Where: {shown}{more}."


def _crowding(pair: Pair, one: str, two: str) -> str:
    told = [
        f"{100 * inside.share:.0f} % of {who} lies where {other} is strongest ({100 * inside.expected_share:.0f} % by chance)"
        for inside, who, other in ((pair.first_inside, one, two), (pair.second_inside, two, one))
        if _crowds(inside)
    ]
    return " and ".join(told)


def _at(block: Group, what: Relation) -> str:
    if what.kind == "crowd":
        return f"{block.name} (crowded, {100 * what.degree:.0f} % above chance)"
    return f"{block.name} (cosine {what.degree:+.2f})"
