"""How LoRAs stand to one another: strength, agreement, shared directions, and what a cut of their sum would cost.

Everything comes from the factors. With the ups side by side = Q_u R_u and the downs^T = Q_d R_d, each update is
Q_u (R_u,i R_d,i^T) Q_d^T; norms, angles, singular values and shares of energy are those of the small core in the middle,
so neither an update nor the Qs are ever formed.
"""

from __future__ import annotations

import math
from collections import Counter, defaultdict
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import replace
from functools import partial
from itertools import combinations

import torch

from ..algebra.orthonormal import Triangle, triangle
from ..algebra.singular import Singular, singular_of
from ..algebra.sums import lying
from ..algebra.threads import in_order
from ..disk.garbage import uncollected
from ..files.keys import BIAS_PARTS, WEIGHT_PARTS
from ..files.lora import Lora
from ..keywords import named
from ..merging.align import fused_with_slices, unify
from ..metadata.adapter_config import of_peft
from ..naming import names
from ..naming.blocks import place
from ..naming.unet import infer_layout
from ..one_module.fault import at_fault
from ..updates.layer import LoraLayer, Share, whole_factors
from ..updates.side_by_side import side_by_side
from .comparison import Comparison, Group, Input, Measure, Module, Pair, Part, cosine_variance, inside, overlap
from .curve import Curve, curve_of
from .own import Own, own_of

# Inner products of the updates at strength 1, by the numbers of two inputs, the smaller first.
Products = dict[tuple[int, int], float]


@named
@uncollected()
def compare(
    inputs: Sequence[tuple[Lora, float]],
    *,
    energy: float = 0.5,
    workers: int | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> Comparison:
    """Figures of (lora, strength) inputs for each module, each block, and all together.

    energy: (0, 1], share of a LoRA's squared norm that its "leading" input directions have to hold, module by module.
    workers: threads that modules are shared among; None is torch.get_num_threads(). The figures are the same for any.
    progress: called after each module with (modules done, modules in all); what it raises ends the comparison.
    Updates that depend on the weight (DoRA, OFT, ...) and bias differences are counted, not compared.
    Raises ValueError without inputs, for a strength that is not finite, and for LoRAs of different base models.
    """
    _check(inputs, energy)
    loras = unify([lora for lora, _ in inputs])
    strengths = tuple(float(strength) for _, strength in inputs)
    order = dict.fromkeys([name for lora in loras for name in (*lora.modules, *(module for module, _ in lora.diffs))])
    wanted = [name for name in order if any(_has(lora, name) for lora in loras)]
    layout = infer_layout(names.unet_bodies(wanted))

    def work(name: str) -> tuple[Module, Curve, Products]:
        where = place(name, layout)
        block = f"{where.part} {where.block}".strip()
        try:
            return _module(name, block, loras, strengths, energy)
        except OverflowError:
            raise ValueError(_beyond(name, [lora for lora in loras if _has(lora, name)], energy)) from None

    modules: list[Module] = []
    curves: list[Curve] = []
    products: Products = defaultdict(float)
    for module, curve, dots in in_order(work, wanted, workers):
        modules.append(module)
        curves.append(curve)
        for which, dot in dots.items():
            products[which] += dot
        if progress is not None:
            progress(len(modules), len(wanted))
    return _together(loras, strengths, modules, Curve.total(curves, len(loras)), products, energy)


def _beyond(name: str, loras: Sequence[Lora], energy: float) -> str:
    # Each beside itself, since products of two are what is too large first.
    alone = [(lora, partial(_module, name, "", [lora] * 2, [1.0] * 2, energy)) for lora in loras]
    return (
        f"{at_fault(name, alone)}: the squares of its updates are beyond float64, so that none compares. Leave the LoRA "
        "out: no trained one is of that size."
    )


def _check(inputs: Sequence[tuple[Lora, float]], energy: float) -> None:
    if not inputs:
        raise ValueError("there is nothing to compare: give at least one LoRA")
    for lora, strength in inputs:
        if not math.isfinite(strength):
            raise ValueError(f"{lora.source}: strength is {strength}, but it has to be a finite number")
    if not 0 < energy <= 1:
        raise ValueError(f"energy is {energy}; it must be above 0 and at most 1.")


def _together(
    loras: Sequence[Lora],
    strengths: Sequence[float],
    modules: Sequence[Module],
    curve: Curve,
    products: Products,
    energy: float,
) -> Comparison:
    """The figures of blocks, of all modules together, and of each input."""
    blocks = dict.fromkeys(sorted({module.block for module in modules}, key=_in_order))
    count = range(len(loras))
    return Comparison(
        inputs=tuple(_facts(index, loras, modules, strength) for index, strength in enumerate(strengths)),
        modules=tuple(modules),
        blocks=tuple(_group(block, [m for m in modules if m.block == block], len(loras)) for block in blocks),
        whole=_group("all", modules, len(loras)),
        products=tuple(tuple(products[min(i, j), max(i, j)] for j in count) for i in count),
        kept=tuple(map(tuple, curve.kept.tolist())),
        numbers=tuple(map(int, curve.numbers.tolist())),
        leading_energy=energy,
        fused=tuple(fused_with_slices(loras)),
    )


def _has(lora: Lora, module: str) -> bool:
    return module in lora.modules or any((module, part) in lora.diffs for part in WEIGHT_PARTS)


def _shares(lora: Lora, module: str) -> list[Share]:
    """The update at strength 1, a sum of products, with the scale of each in `above`; none if the LoRA does not change it."""
    found = []
    if module in lora.modules:
        layer = lora.modules[module]
        found.append(Share(*layer.stored_factors(), above=layer.scale))
    for part in WEIGHT_PARTS:
        if (module, part) in lora.diffs:
            diff = lora.diffs[module, part].detach().to(torch.float32)
            found.append(Share(*whole_factors(diff.reshape(diff.shape[0] if diff.ndim else 1, -1))))
    return found


def _triangles(shares: Sequence[Share], rows: int, columns: int) -> tuple[Triangle, Triangle]:
    """Of the ups and the downs^T of all shares side by side, without scales."""
    wide = any(factor.dtype == torch.float64 for share in shares for factor in (share.up, share.down))
    bare = [replace(share, above=1.0) for share in shares]
    whole = side_by_side(bare, (rows, columns), torch.float64 if wide else torch.float32)
    with ExitStack() as until:
        up, down = (lying(factor, until) for factor in whole.stored_factors())
        return triangle(up), triangle(down.T)


def _module(
    name: str, block: str, loras: Sequence[Lora], strengths: Sequence[float], share: float
) -> tuple[Module, Curve, Products]:
    """Its figures, its part of the curve of cuts, and the inner products of the updates at strength 1."""
    found = {index: shares for index, lora in enumerate(loras) if (shares := _shares(lora, name))}
    first = next(iter(found.values()))[0]
    rows, columns = first.up.shape[0], math.prod(first.down.shape[1:])
    owns, singular = _owns(found, (rows, columns), strengths, share)
    parts = [_part(lora, name, owns[index]) if index in owns else None for index, lora in enumerate(loras)]
    dots = {(index, index): own.energy for index, own in owns.items()}
    pairs = []
    for i, j in combinations(found, 2):
        dots[i, j] = owns[i].dot(owns[j])
        if owns[i].energy > 0 and owns[j].energy > 0:
            sign = math.copysign(1.0, strengths[i] * strengths[j])
            pairs.append(_pair((i, j), owns[i], owns[j], sign * dots[i, j], (rows, columns)))

    is_dense = any((name, part) in lora.diffs for lora in loras for part in WEIGHT_PARTS)
    counted = sum(own.up.shape[1] for index, own in owns.items() if strengths[index])
    curve = curve_of(owns, strengths, (rows, columns), counted, is_dense, singular)
    compared = Module(
        name=name,
        block=block,
        shape=(rows, columns),
        parts=tuple(parts),
        energy=float(curve.kept[0, -1]),
        pairs=tuple(pairs),
    )
    return compared, curve, dots


def _owns(
    found: Mapping[int, Sequence[Share]], shape: tuple[int, int], strengths: Sequence[float], share: float
) -> tuple[dict[int, Own], Callable[[], Singular | None]]:
    """The updates in the small space that they share, and the directions of their weighted sum, in that order."""
    ranks = {index: sum(one.rank for one in shares) for index, shares in found.items()}
    # The first is spared a decomposition.
    order = sorted(found, key=lambda index: -ranks[index])
    every = [one for index in order for one in found[index]]
    sizes = [ranks[index] for index in order]
    up, down = _triangles(every, *shape)
    scales = torch.tensor([one.above for one in every for _ in range(one.rank)], dtype=torch.float64)
    r_up, r_down = torch.split(up.r * scales, sizes, dim=1), torch.split(down.r, sizes, dim=1)
    owns = {
        index: own_of(a, b, share, is_triangle=index == order[0], alone=len(order) == 1)
        for index, a, b in zip(order, r_up, r_down, strict=True)
    }

    def singular() -> Singular | None:
        at = torch.tensor([strengths[index] for index in order for _ in range(ranks[index])], dtype=torch.float64)
        return singular_of(up, down, scales * at, sizes)

    return owns, singular


def _part(lora: Lora, module: str, own: Own) -> Part:
    layer = lora.modules.get(module)
    if layer is None:
        return Part(
            kind="difference",
            rank=own.up.shape[1],
            effective=own.effective,
            alpha=None,
            scale=1.0,
            energy=own.energy,
            deficient=False,
        )
    # Only of a plain LoRA the factors' rank is what somebody chose.
    possible = min(layer.rank, layer.shape[0], math.prod(layer.shape[1:]))
    deficient = isinstance(layer, LoraLayer) and 0 < own.effective < possible and (module, "diff") not in lora.diffs
    return Part(
        kind=layer.kind,
        rank=layer.rank,
        effective=own.effective,
        alpha=layer.alpha,
        scale=layer.scale,
        energy=own.energy,
        deficient=deficient,
    )


def _pair(which: tuple[int, int], first: Own, second: Own, dot: float, shape: tuple[int, int]) -> Pair:
    rows, columns = shape
    lefts, rights = first.left.T @ second.left, first.right.T @ second.right
    ranks = (first.effective, second.effective)
    return Pair(
        which=which,
        shared=1,
        dot=dot,
        norms=math.sqrt(first.energy * second.energy),
        dot_variance=cosine_variance(rows, columns) * first.energy * second.energy,
        left=overlap(float(lefts.square().sum()), *ranks, rows),
        right=overlap(float(rights.square().sum()), *ranks, columns),
        first_inside=inside(first.inside(second), first.energy, second.leading, columns),
        second_inside=inside(second.inside(first), second.energy, first.leading, columns),
    )


def _group(name: str, modules: Sequence[Module], inputs: int) -> Group:
    energies = [sum(part.energy for m in modules if (part := m.parts[index])) for index in range(inputs)]
    pairs = []
    for i, j in combinations(range(inputs), 2):
        found = [pair for module in modules for pair in module.pairs if pair.which == (i, j)]
        if found:
            pairs.append(_summed(found, energies[i], energies[j]))
    return Group(
        name=name,
        modules=len(modules),
        energies=tuple(energies),
        energy=sum(module.energy for module in modules),
        pairs=tuple(pairs),
    )


def _summed(pairs: Sequence[Pair], first: float, second: float) -> Pair:
    """Sum of the pairs of a group. first, second: the inputs' energies over all its modules, shared or not."""
    return Pair(
        which=pairs[0].which,
        shared=sum(pair.shared for pair in pairs),
        dot=sum(pair.dot for pair in pairs),
        norms=math.sqrt(first * second),
        dot_variance=sum(pair.dot_variance for pair in pairs),
        left=Measure.total(pair.left for pair in pairs),
        right=Measure.total(pair.right for pair in pairs),
        first_inside=Measure.total((pair.first_inside for pair in pairs), whole=first),
        second_inside=Measure.total((pair.second_inside for pair in pairs), whole=second),
    )


def _facts(index: int, loras: Sequence[Lora], modules: Sequence[Module], strength: float) -> Input:
    lora = loras[index]
    own = [(module, part) for module in modules if (part := module.parts[index])]
    settings = Counter((part.kind, part.rank, part.alpha, part.scale) for _, part in own)
    return Input(
        source=lora.source,
        strength=strength,
        modules=len(lora.spellings),
        compared=len(own),
        only_here=tuple(m.name for m, _ in own if sum(part is not None for part in m.parts) == 1),
        zero=tuple(m.name for m, part in own if part.energy == 0),
        deficient=tuple(m.name for m, part in own if part.deficient),
        settings=tuple((*setting, count) for setting, count in sorted(settings.items(), key=lambda item: -item[1])),
        biases=sum(part in BIAS_PARTS for _, part in lora.diffs),
        carried=tuple(sorted(Counter(update.kind for update in lora.carried.values()).items())),
        values=lora.parameters,
        unread=lora.keys.unread,
        peft=of_peft(lora.metadata),
    )


def _in_order(block: str) -> tuple[object, ...]:
    """Text encoders first, then the way through the model: in, down, mid, up, out, then whatever is numbered."""
    part, _, rest = block.partition(" ")
    side, _, number = rest.partition(".")
    sides = ("in", "down", "mid", "up", "out")
    return (
        ("te1", "te2", "te3", "unet").index(part) if part in ("te1", "te2", "te3", "unet") else 9,
        sides.index(side) if side in sides else 9,
        side,
        int(number) if number.isdigit() else -1,
    )
