"""A comparison as text for people, and as CSV and JSON for programs."""

from __future__ import annotations

import csv
import io
import json
import math
from collections.abc import Sequence

from ..merging.report import fused_notes, notes_on
from ..words import many
from .comparison import Comparison, Group, Measure, Module, Pair, Part
from .verdict import answer, relation

_RANKS = (4, 8, 16, 32, 64, 128, 256)
_SHOWN_PAIRS = 3
_SHOWN_SETTINGS = 4


def as_text(comparison: Comparison, rank: int = 0) -> str:
    """One screen: the answer; the inputs, the sum, every two of them, the blocks, a cut (to `rank` among others)."""
    first, *rest = answer(comparison)
    sections = [
        [f"Will they fight? {first}", *(f"  {line}" for line in rest)],
        _inputs(comparison),
        _sum(comparison),
        _pairs(comparison),
        _blocks(comparison),
        _cuts(comparison, rank),
        [f"Note: {note}." for note in _notes(comparison)],
    ]
    return "\n\n".join("\n".join(section) for section in sections if section)


def _notes(c: Comparison) -> list[str]:
    """What the user should know about the inputs."""
    inputs = [(one.source, one.unread, one.peft) for one in c.inputs]
    return notes_on(inputs) + fused_notes(c.fused, [one.source for one in c.inputs])


def _inputs(c: Comparison) -> list[str]:
    lines = ["Inputs, norms with alpha and strength:"]
    for index, (label, one) in enumerate(zip(c.labels, c.inputs, strict=True)):
        shared = f", {len(one.only_here)} only here" if len(c.inputs) > 1 else ""
        size = one.values * 2 / 1e6
        lines.append(
            f"  {label} * {one.strength:g}: norm {c.norm(index):.4g}, {many(one.modules, 'modules')}{shared}, {size:.1f} MB in float16"
        )
        shown = one.settings[:_SHOWN_SETTINGS]
        settings = [
            f"{kind} rank {rank} alpha {'none' if alpha is None else f'{alpha:g}'} (scale {scale:g}): {count}"
            for kind, rank, alpha, scale, count in shown
        ]
        if len(one.settings) > len(shown):
            settings.append(many(len(one.settings) - len(shown), "other settings"))
        lines.append(f"    {'; '.join(settings) or 'nothing that can be compared'}")
        for found, *words in (
            (one.zero, "modules are zero and do nothing", "module is zero and does nothing"),
            (one.deficient, "modules have a smaller rank than factors", "module has a smaller rank than factors"),
        ):
            if found:
                lines.append(f"    {many(len(found), *words)} (first: {found[0]})")
        aside = [f"{many(count, 'modules')} of kind {kind}" for kind, count in one.carried]
        aside += [many(one.biases, "bias differences")] if one.biases else []
        if aside:
            lines.append(f"    not compared: {', '.join(aside)}")
    norms = [c.norm(index) for index in range(len(c.inputs))]
    if len(norms) == 2 and min(norms) > 0:
        strong, weak = sorted((0, 1), key=lambda index: -norms[index])
        lines.append(f"  {c.labels[strong]} is {norms[strong] / norms[weak]:.3g} times as strong as {c.labels[weak]}.")
    return lines


def _sum(c: Comparison) -> list[str]:
    if len(c.inputs) < 2:
        return []
    return [f"Norm of the sum: {math.sqrt(c.whole.energy):.4g}, {c.growth():.3f} times what independent LoRAs give."]


def _pairs(c: Comparison) -> list[str]:
    if not c.whole.pairs:
        return []
    leading = f"{100 * c.leading_energy:.0f} %"
    lines = [f"Each two together (chance in brackets; leading directions hold {leading} of a LoRA's energy):"]
    for pair in c.whole.pairs:
        one, two = (c.labels[i] for i in pair.which)
        lines += [
            f"  {one} and {two}: {many(pair.shared, 'modules')} shared, cosine {pair.cosine:+.4f} (0 +- {pair.cosine_deviation:.4f})",
            f"    same outputs {_percent(pair.left)}, same inputs {_percent(pair.right)}",
            f"    of {one} in the leading inputs of {two}: {_percent(pair.first_inside)}; "
            f"of {two} in those of {one}: {_percent(pair.second_inside)}",
        ]
    return lines


def _percent(measure: Measure) -> str:
    return f"{100 * measure.share:.1f} % ({100 * measure.expected_share:.1f} %)"


def _blocks(c: Comparison) -> list[str]:
    if not c.blocks:
        return []
    pairs = [pair.which for pair in c.whole.pairs][:_SHOWN_PAIRS]
    wide = max(5, *(len(block.name) for block in c.blocks))
    head = [
        f"{'block':{wide}}",
        f"{'modules':>8}",
        *(f"{f'norm {index}':>10}" for index in range(1, len(c.inputs) + 1)),
    ]
    head += [f"{'sum/apart':>10}", *(f"{f'cosine {i + 1}-{j + 1}':>12}" for i, j in pairs)]
    lines = ["Blocks (norms in the order of the inputs; sum/apart is 1 for independent LoRAs):", f"  {''.join(head)}"]
    for block in c.blocks:
        row = [f"{block.name:{wide}}", f"{block.modules:8}"]
        row += [f"{c.norm(index, block):10.4g}" for index in range(len(c.inputs))]
        row.append(f"{c.growth(block):10.3f}")
        for which in pairs:
            pair = find(block, which)
            row.append(f"{'-' if pair is None else f'{pair.cosine:+.3f}':>12}")
        lines.append(f"  {''.join(row)}")
    return lines


def _cuts(c: Comparison, rank: int) -> list[str]:
    full = c.full_rank
    if full < 1 or c.kept[0][-1] <= 0:
        return []
    ranks = sorted({r for r in (*_RANKS, rank) if 0 < r < full})
    lines = [
        f"Of the merge: rank {full} is exact, {c.megabytes():.1f} MB in float16. Cut to a smaller rank:",
        f"  {'rank':>6}{'error':>10}{'MB':>10}"
        + "".join(f"{f'keeps of {n}':>13}" for n in range(1, len(c.inputs) + 1)),
    ]
    for r in ranks:
        kept = [c.retention(index, r) for index in range(len(c.inputs))]
        row = "".join(f"{'-' if share is None else f'{100 * share:.1f} %':>13}" for share in kept)
        lines.append(f"  {r:6}{c.error_at(r):10.3g}{c.megabytes(r):10.1f}{row}{'  <- this rank' if r == rank else ''}")
    return lines


# What such files begin with, by which they are known again.
CSV_BEGINS = "module,block,out,in,norm_of_sum"
JSON_BEGINS = '{\n "version": 1,\n "answer": '


def as_csv(comparison: Comparison) -> str:
    """A row for each module. Norms are with alpha and strength; inputs are numbered from 1 in the columns' names."""
    count = range(len(comparison.inputs))
    pairs = [(i, j) for i in count for j in count if i < j]
    head = CSV_BEGINS.split(",")
    for index in count:
        head += [f"{what}_{index + 1}" for what in ("norm", "kind", "rank", "effective_rank", "alpha", "scale")]
    for i, j in pairs:
        head += [f"{what}_{i + 1}_{j + 1}" for what in _pair_figures(None)]
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(head)
    for module in comparison.modules:
        row: list[object] = [module.name, module.block, *module.shape, math.sqrt(module.energy)]
        for one, part in zip(comparison.inputs, module.parts, strict=True):
            row += _part_figures(part, one.strength)
        for which in pairs:
            row += _pair_figures(find(module, which)).values()
        writer.writerow(["" if value is None else value for value in row])
    return text.getvalue()


def as_json(comparison: Comparison, rank: int = 0) -> str:
    """All figures: inputs, whole, blocks, modules, and the curve of cuts; with the answer in words."""
    c = comparison
    ranks = range(c.full_rank + 1)
    count = range(len(c.inputs))
    return json.dumps(
        {
            "version": 1,
            "answer": answer(c),
            "notes": _notes(c),
            "leading_energy": c.leading_energy,
            "rank": rank or None,
            "inputs": [
                {
                    "label": c.labels[index], "source": one.source, "strength": one.strength, "norm": c.norm(index),
                    "modules": one.modules, "compared": one.compared, "only_here": one.only_here, "zero": one.zero,
                    "rank_deficient": one.deficient, "biases": one.biases, "not_additive": dict(one.carried),
                    "values": one.values,
                    "settings": [
                        dict(zip(("kind", "rank", "alpha", "scale", "modules"), setting, strict=True))
                        for setting in one.settings
                    ],
                }
                for index, one in enumerate(c.inputs)
            ],
            "whole": _group_figures(c, c.whole),
            "blocks": [_group_figures(c, block) for block in c.blocks],
            "modules": [
                {
                    "module": module.name, "block": module.block, "shape": module.shape,
                    "norm_of_sum": math.sqrt(module.energy),
                    "inputs": [
                        None if part is None else dict(zip(_PART, _part_figures(part, one.strength), strict=True))
                        for one, part in zip(c.inputs, module.parts, strict=True)
                    ],
                    "pairs": [{"inputs": _from_one(pair.which), **_pair_figures(pair)} for pair in module.pairs],
                }
                for module in c.modules
            ],
            "cut": {
                "rank": list(ranks),
                "error": [c.error_at(r) for r in ranks],
                "megabytes_float16": [c.megabytes(r) for r in ranks],
                "kept": [[c.retention(index, r) for r in ranks] for index in count],
            },
        },
        indent=1,
    )  # fmt: skip


_PART = ("norm", "kind", "rank", "effective_rank", "alpha", "scale")


def _part_figures(part: Part | None, strength: float) -> list[object]:
    if part is None:
        return [None] * len(_PART)
    norm = abs(strength) * math.sqrt(part.energy)
    return [norm, part.kind, part.rank, part.effective, part.alpha, part.scale]


def _pair_figures(pair: Pair | None) -> dict[str, float | None]:
    figures: dict[str, float | None] = {
        "cosine": None if pair is None else pair.cosine,
        "cosine_chance": None if pair is None else pair.cosine_deviation,
    }
    for name in ("left", "right", "first_inside", "second_inside"):
        measure = None if pair is None else getattr(pair, name)
        figures[name] = None if measure is None else measure.share
        figures[f"{name}_chance"] = None if measure is None else measure.expected_share
    return figures


def _group_figures(c: Comparison, group: Group) -> dict[str, object]:
    return {
        "name": group.name,
        "modules": group.modules,
        "norms": [c.norm(index, group) for index in range(len(c.inputs))],
        "norm_of_sum": math.sqrt(group.energy),
        "growth": c.growth(group),
        "pairs": [
            {
                "inputs": _from_one(pair.which),
                "shared": pair.shared,
                "relation": relation(pair).kind,
                **_pair_figures(pair),
            }
            for pair in group.pairs
        ],
    }


def _from_one(which: Sequence[int]) -> list[int]:
    return [index + 1 for index in which]


def find(group: Group | Module, which: tuple[int, int]) -> Pair | None:
    """The figures of two inputs, None if they do not meet there."""
    return next((pair for pair in group.pairs if pair.which == which), None)
