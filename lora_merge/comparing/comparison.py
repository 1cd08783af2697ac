"""The figures of a comparison, and what two independent LoRAs would show in their place.

"Independent" means: the singular directions of one have been turned at random against those of the other. Means and
variances below hold for any ranks and spectra; they are those of random subspaces (Haar measure on the rotations).
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass, field

from ..files.twice import Pair as Fused
from ..metadata.adapter_config import OfPeft


@dataclass(frozen=True)
class Measure:
    """A part of a whole, beside the mean and the variance of that part for independent LoRAs."""

    found: float
    expected: float
    variance: float
    whole: float

    @property
    def share(self) -> float:
        """0..1."""
        return self.found / self.whole if self.whole > 0 else 0.0

    @property
    def expected_share(self) -> float:
        return self.expected / self.whole if self.whole > 0 else 0.0

    @property
    def excess(self) -> float:
        """Share above what independent LoRAs have; below 0 for less."""
        return self.share - self.expected_share

    @property
    def deviation(self) -> float:
        """Standard deviation of the share of independent LoRAs."""
        return math.sqrt(self.variance) / self.whole if self.whole > 0 else 0.0

    @classmethod
    def total(cls, measures: Iterable[Measure], whole: float | None = None) -> Measure:
        """Sum of measures over modules, assumed independent: variances add. whole: if it is more than theirs together."""
        every = list(measures)
        return cls(
            found=sum(one.found for one in every),
            expected=sum(one.expected for one in every),
            variance=sum(one.variance for one in every),
            whole=sum(one.whole for one in every) if whole is None else whole,
        )


def cosine_variance(rows: int, columns: int) -> float:
    """Variance of the cosine of two independent (rows, columns) updates; its mean is 0.

    E <A, U B V^T>^2 = |A|^2 |B|^2 / (rows * columns) for random rotations U and V.
    """
    return 1.0 / (rows * columns)


def overlap(found: float, first: int, second: int, width: int) -> Measure:
    """found: sum of the squared cosines of the principal angles between subspaces of dimension `first` and `second`.

    At most the smaller dimension, its mean for random subspaces of R^width first * second / width: as a share
    max(first, second) / width, so that high ranks overlap in narrow layers without having anything in common.
    """
    return Measure(found, first * second / width, _trace_variance(first, second, width), min(first, second))


def inside(found: float, energy: float, directions: int, width: int) -> Measure:
    """found: the part of an update's energy in `directions` directions of another, out of `width`.

    Any share of the energy falls into random directions by the same mean; its variance is largest if the update has
    rank 1, which is assumed here.
    """
    return Measure(found, energy * directions / width, energy**2 * _trace_variance(1, directions, width), energy)


def _trace_variance(first: int, second: int, width: int) -> float:
    """Variance of tr(P Q) for projections of these ranks at random angles in R^width."""
    if width < 2:
        return 0.0
    spread = 2.0 * first * second * (width - first) * (width - second)
    return spread / (width**2 * (width - 1) * (width + 2))


@dataclass(frozen=True, kw_only=True)
class Part:
    """One LoRA in one module. rank: of the factors.   effective: number of singular values that are not 0.
    alpha: None if the file has none.   scale: alpha / rank.   energy: squared norm at strength 1, scale included.
    deficient: a plain LoRA whose update has a smaller rank than its factors.
    """

    kind: str
    rank: int
    effective: int
    alpha: float | None
    scale: float
    energy: float
    deficient: bool


@dataclass(frozen=True, kw_only=True)
class Pair:
    """Two inputs in a module or a group. which: their numbers from 0, the smaller first.   shared: modules both have.

    dot: inner product of the updates at strength 1, its sign turned by negative strengths.   norms: product of their norms.
    left, right: overlap of the subspaces they write to (out) and read from (in * kernel).
    first_inside: share of the first's energy that falls into the second's leading input directions, which is what
        protecting the second removes from the first at most; second_inside the other way about.
    """

    which: tuple[int, int]
    shared: int
    dot: float
    norms: float
    dot_variance: float
    left: Measure
    right: Measure
    first_inside: Measure
    second_inside: Measure

    @property
    def cosine(self) -> float:
        """-1..1: -1 opposite, 0 independent, 1 the same but for size."""
        return max(-1.0, min(1.0, self.dot / self.norms)) if self.norms > 0 else 0.0

    @property
    def cosine_deviation(self) -> float:
        """Standard deviation of the cosine of independent LoRAs."""
        return math.sqrt(self.dot_variance) / self.norms if self.norms > 0 else 0.0


@dataclass(frozen=True, kw_only=True)
class Module:
    """name: canonical.   block: part and block of the model.   shape: (out, in * kernel).   parts: of each input, None
    where it has no such module.   energy: squared norm of the weighted sum.
    """

    name: str
    block: str
    shape: tuple[int, int]
    parts: tuple[Part | None, ...]
    energy: float
    pairs: tuple[Pair, ...]


@dataclass(frozen=True, kw_only=True)
class Group:
    """Several modules together. energies: of each input at strength 1.   energy: of the weighted sum."""

    name: str
    modules: int
    energies: tuple[float, ...]
    energy: float
    pairs: tuple[Pair, ...]


@dataclass(frozen=True, kw_only=True)
class Input:
    """settings: (kind, rank, alpha, scale, number of modules), the commonest first.   biases: differences of biases,
    carried: (kind, number) of updates that depend on the weight; neither is compared.   values: numbers in the file.
    unread: keys of its file that have no effect in ComfyUI.   peft: what is known of how PEFT made it.
    """

    source: str
    strength: float
    modules: int
    compared: int
    only_here: tuple[str, ...]
    zero: tuple[str, ...]
    deficient: tuple[str, ...]
    settings: tuple[tuple[str, int, float | None, float, int], ...]
    biases: int
    carried: tuple[tuple[str, int], ...]
    values: int
    unread: tuple[str, ...] = ()
    peft: OfPeft = field(default_factory=OfPeft)


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """products: inner products of all inputs at strength 1.   leading_energy: what "leading" means, see compare().

    kept: [0][r] energy of the weighted sum inside the first r singular directions of each module, [1 + i][r] that of
    input i; the last entries are the whole.   numbers: values in the file of a merge that is cut to rank r.
    fused: modules of two inputs, by their numbers, of which one is a slice of the other's weight and which are not compared.
    """

    inputs: tuple[Input, ...]
    modules: tuple[Module, ...]
    blocks: tuple[Group, ...]
    whole: Group
    products: tuple[tuple[float, ...], ...]
    kept: tuple[tuple[float, ...], ...]
    numbers: tuple[int, ...]
    leading_energy: float
    fused: tuple[Fused, ...] = ()

    @property
    def labels(self) -> tuple[str, ...]:
        """Short names of the inputs, each once."""
        stems = [one.source.removesuffix(".safetensors") for one in self.inputs]
        return tuple(
            f"{stem} ({stems[: index + 1].count(stem)})" if stems.count(stem) > 1 else stem
            for index, stem in enumerate(stems)
        )

    @property
    def full_rank(self) -> int:
        """The smallest rank that cuts nothing."""
        return len(self.numbers) - 1

    def norm(self, index: int, group: Group | None = None) -> float:
        """Frobenius norm of strength * update of one input, in `group` or over all modules."""
        return abs(self.inputs[index].strength) * math.sqrt((group or self.whole).energies[index])

    def growth(self, group: Group | None = None) -> float:
        """Norm of the weighted sum over the root of the sum of squares: 1 for independent LoRAs, 0 for what cancels."""
        apart = math.hypot(*(self.norm(index, group) for index in range(len(self.inputs))))
        return math.sqrt((group or self.whole).energy) / apart if apart > 0 else 1.0

    def norm_at(self, index: int, strength: float) -> float:
        """Norm of the sum if one input had another strength: |sum|^2 = sum of s_i s_j <t_i, t_j>."""
        strengths = [strength if i == index else one.strength for i, one in enumerate(self.inputs)]
        energy = sum(
            a * b * product
            for a, row in zip(strengths, self.products, strict=True)
            for b, product in zip(strengths, row, strict=True)
        )
        return math.sqrt(max(0.0, energy))

    def error_at(self, rank: int) -> float:
        """Relative error of the sum if each module is cut to that rank, 0..1."""
        whole = self.kept[0][-1]
        lost = 1.0 - self.kept[0][min(rank, self.full_rank)] / whole if whole > 0 else 0.0
        return math.sqrt(max(0.0, lost))

    def retention(self, index: int, rank: int) -> float | None:
        """Share 0..1 of one input's energy that is left after that cut; None if it had none."""
        curve = self.kept[1 + index]
        return min(1.0, curve[min(rank, self.full_rank)] / curve[-1]) if curve[-1] > 0 else None

    def megabytes(self, rank: int | None = None) -> float:
        """Size of a merge in float16, cut to that rank or exact, in MB of 10**6 bytes."""
        return self.numbers[-1 if rank is None else min(rank, self.full_rank)] * 2 / 1e6
