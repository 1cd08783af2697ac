"""The table of merge methods: what each makes of the updates of one weight, with its parameters and its paper."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from .consensus import disjoint, orthogonalised, slerp
from .sparsify import at_random, by_magnitude, by_magnitude_at_random, without_outliers


@dataclass(frozen=True, kw_only=True)
class Parameter:
    """A number that a method takes: its default, the smallest and the largest allowed, and what it means.

    neutral: the value at which the method changes no update, which every other method accepts too; None if there is none.
    without: what methods do that do not have the parameter, for the message that refuses it there.
    step: of a widget.
    """

    default: float
    low: float
    high: float
    meaning: str
    neutral: float | None = None
    without: str = ""
    step: float = 0.01


@dataclass(frozen=True, kw_only=True)
class Situation:
    """All that a method may know besides the updates.

    strengths, inputs: of each update, its strength and the number of the input it comes from.
    values: parameter -> value, for all parameters of the method.   module: a name of the weight, whatever the files call it.
    seed: of the whole merge.
    """

    strengths: tuple[float, ...]
    inputs: tuple[int, ...]
    values: Mapping[str, float]
    module: str
    seed: int

    def generator(self, index: int) -> torch.Generator:
        """Draws for one update. They depend on seed, module and number of the input only: not on the order in which
        modules are done, the number of threads or the device."""
        text = f"{self.seed}/{self.inputs[index]}/{self.module}"
        number = int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big")
        return torch.Generator().manual_seed(number)


Combine = Callable[[Sequence[Tensor], Situation], Tensor]


@dataclass(frozen=True, kw_only=True)
class Method:
    """A way to combine the updates of one weight.

    combine: updates of one shape with their strengths multiplied in -> what takes their place, float32. They are the
        cores of a CoreSpace, or whole updates (out, in * kernel). None for the plain sum, which needs neither.
    summary: what comes out.   source: where the formula stands.
    parameters: by name, in the order of the formula.
    entrywise: it looks at single entries, so that its result depends on the axes: of whole updates it is another one than
        of their cores, of the same strength (algebra/core_space.py).
    draws: it draws at random, so that the seed matters.
    elects: entries of the weaker sign fall away.   scales_down: inputs come out weaker than strength * update, as a rule.
    refuses: values of its parameters -> why they do not go together, or None.
    exact_inputs: how many inputs it takes, 0 for any number.   signed: strengths may be negative.
    averages: strengths are weights of a mean, each divided by the sum of all.
    """

    combine: Combine | None
    summary: str
    source: str
    parameters: Mapping[str, Parameter] = field(default_factory=dict)
    entrywise: bool = False
    draws: bool = False
    elects: bool = False
    scales_down: bool = False
    exact_inputs: int = 0
    signed: bool = True
    averages: bool = False
    refuses: Callable[[Mapping[str, float]], str | None] | None = None

    def neutral(self, values: Mapping[str, float]) -> str | None:
        """The parameter at whose value it changes no update by itself, None if none has such a value."""
        return next((name for name, parameter in self.parameters.items() if values[name] == parameter.neutral), None)

    def changes_one(self, values: Mapping[str, float]) -> bool:
        """Whether it changes an update that is alone on its weight."""
        return self.entrywise and self.neutral(values) is None

    def is_sum(self, values: Mapping[str, float]) -> bool:
        """Whether it makes the plain sum."""
        return self.combine is None or (self.neutral(values) is not None and not self.elects)


def _each(prune: Callable[[Tensor, Situation, int], Tensor], together: Callable[[list[Tensor]], Tensor]) -> Combine:
    def combine(deltas: Sequence[Tensor], situation: Situation) -> Tensor:
        return together([prune(delta, situation, index) for index, delta in enumerate(deltas)])

    return combine


def _trim(delta: Tensor, situation: Situation, index: int) -> Tensor:
    return by_magnitude(delta, situation.values["density"])


def _dropped(delta: Tensor, situation: Situation, index: int) -> Tensor:
    return at_random(delta, situation.values["density"], situation.generator(index))


def _magprune(delta: Tensor, situation: Situation, index: int) -> Tensor:
    values = situation.values
    return by_magnitude_at_random(delta, values["density"], values["spread"], situation.generator(index))


def _breadcrumbs(delta: Tensor, situation: Situation, index: int) -> Tensor:
    values = situation.values
    # A density of 1 keeps all, outliers too, in every method.
    return delta.float() if values["density"] == 1 else without_outliers(delta, values["density"], values["outliers"])


def _sum(deltas: list[Tensor]) -> Tensor:
    return torch.stack(deltas).sum(dim=0)


def _disjoint_mean(deltas: list[Tensor]) -> Tensor:
    return disjoint(deltas, mean=True)


def _disjoint_sum(deltas: list[Tensor]) -> Tensor:
    return disjoint(deltas, mean=False)


# Strengths between this and its inverse leave float32 numbers within float32's range.
_USUAL = 2.0**-40


def _slerp(deltas: Sequence[Tensor], situation: Situation) -> Tensor:
    total = sum(situation.strengths)
    if len(deltas) < 2 or 0 in situation.strengths:
        return _sum(list(deltas))
    if all(_USUAL <= strength <= 1 / _USUAL for strength in situation.strengths):
        first, second = (delta / strength for delta, strength in zip(deltas, situation.strengths, strict=True))
        return total * slerp(first, second, situation.strengths[1] / total)
    # float64, and shares of the total: the same point, and no number leaves its range.
    shares = [strength / total for strength in situation.strengths]
    first, second = (delta.double() / share for delta, share in zip(deltas, shares, strict=True))
    return slerp(first, second, shares[1])


def _tsv(deltas: Sequence[Tensor], situation: Situation) -> Tensor:
    return orthogonalised([delta.float() for delta in deltas])


def _density(default: float, meaning: str) -> Parameter:
    return Parameter(default=default, low=0.0, high=1.0, meaning=meaning, neutral=1.0, without="keeps every LoRA whole")


def _too_many(values: Mapping[str, float]) -> str | None:
    density, outliers = values["density"], values["outliers"]
    if density == 1 or density + outliers <= 1 + 1e-9:
        return None
    return (
        f"density {density:g} and outliers {outliers:g} add up to more than 1: they are shares of the same entries. "
        "Lower one of them."
    )


# DELLA's epsilon, the difference between the chances of the largest and the smallest entry of a row: the whole width;
# mergekit's is half of it, 0.15 unless told otherwise.
_SPREAD = Parameter(
    default=0.3, low=0.0, high=1.0, meaning="how much likelier the largest entries stay than the smallest; 0 is dare"
)
_OUTLIERS = Parameter(
    default=0.01,
    low=0.0,
    high=1.0,
    meaning="share of the entries that is cut off as too large; with density at most 1",
    step=0.005,
)
_DARE = "Yu et al. 2023, DARE, arXiv 2311.03099"
_DELLA = "Deep et al. 2024, DELLA-Merging, arXiv 2406.11617"
_TIES = "Yadav et al. 2023, TIES-Merging, arXiv 2306.01708"
# So many methods are named where a parameter is theirs.
_NAMED = 2
_CHANCE = "chance of an entry to stay; those that stay are divided by it"

# Where the defaults come from, and where others differ (mergekit of June 2026, PEFT 0.21, the authors' own code):
# TIES keeps 20 % in its paper. For DARE and DELLA there is none: they drop up to 90 % and more of large language models,
# mergekit drops nothing and PEFT wants a number. Few-step sampling does not bear the noise, whose energy is
# 1 / density - 1 times the update's: as strong as the update at 0.5, harmless at 0.9 (benchmarks/RESULTS.md). mergekit's `rescale` restores the sum of
# magnitudes; ours is the papers' 1 / density, and DELLA's 1 / chance of each entry. mergekit's `della` elects signs and
# takes the mean, as the authors do; our `della` is its `della_linear`, and our `della_ties` takes the sum, as
# strengths are never averaged. Breadcrumbs' authors keep some 15 % of each row and cut off 0.6 % as too large, for merging
# many models at a fifth of their strength; mergekit keeps all unless told, and 90 % less 1 % in its guide, as here.
METHODS: dict[str, Method] = {
    "linear": Method(
        combine=None,
        summary="the sum of strength * delta, exact; strengths count as they are and are never averaged",
        source="Luo et al. 2023, LCM-LoRA, arXiv 2311.05556, equation 3",
    ),
    # Of deltas: the product of two averaged factors is another update than the mean of the products.
    "average": Method(
        combine=None,
        summary="the mean of the deltas, exact, with the strengths as weights: for checkpoints of one training",
        source="Izmailov et al. 2018, Stochastic Weight Averaging, arXiv 1803.05407",
        scales_down=True,
        averages=True,
    ),
    "ties": Method(
        combine=_each(_trim, _disjoint_mean),
        summary="the largest entries of each, then at each place the mean of those with the stronger sign",
        source=_TIES,
        parameters={"density": _density(0.2, "share of entries kept, the largest")},
        entrywise=True,
        elects=True,
        scales_down=True,
    ),
    "dare": Method(
        combine=_each(_dropped, _sum),
        summary="entries dropped at random and the rest scaled up, then the sum",
        source=_DARE,
        parameters={"density": _density(0.9, _CHANCE)},
        entrywise=True,
        draws=True,
    ),
    "dare_ties": Method(
        combine=_each(_dropped, _disjoint_sum),
        summary="entries dropped at random and the rest scaled up, then at each place the sum of those with the stronger sign",
        source=f"{_DARE}, with {_TIES}",
        parameters={"density": _density(0.9, _CHANCE)},
        entrywise=True,
        draws=True,
        elects=True,
        scales_down=True,
    ),
    "della": Method(
        combine=_each(_magprune, _sum),
        summary="entries dropped at random, small ones rather than large ones, the rest scaled up, then the sum",
        source=_DELLA,
        parameters={"density": _density(0.9, f"mean {_CHANCE}"), "spread": _SPREAD},
        entrywise=True,
        draws=True,
    ),
    "della_ties": Method(
        combine=_each(_magprune, _disjoint_sum),
        summary="entries dropped as in della, then at each place the sum of those with the stronger sign",
        source=f"{_DELLA}, with {_TIES}",
        parameters={"density": _density(0.9, f"mean {_CHANCE}"), "spread": _SPREAD},
        entrywise=True,
        draws=True,
        elects=True,
        scales_down=True,
    ),
    "magnitude": Method(
        combine=_each(_trim, _sum),
        summary="the largest entries of each, then the sum",
        source=f"the trim of {_TIES}",
        parameters={"density": _density(0.5, "share of entries kept, the largest")},
        entrywise=True,
        scales_down=True,
    ),
    "breadcrumbs": Method(
        combine=_each(_breadcrumbs, _sum),
        summary="neither the very largest nor the smallest entries of each, then the sum",
        source="Davari & Belilovsky 2023, Model Breadcrumbs, arXiv 2312.06795",
        parameters={
            "density": _density(0.9, "share of entries kept, the largest below the outliers; 1 keeps outliers too"),
            "outliers": _OUTLIERS,
        },
        entrywise=True,
        scales_down=True,
        refuses=_too_many,
    ),
    "slerp": Method(
        combine=_slerp,
        summary="(s1 + s2) times the point between the two on the arc, s2 / (s1 + s2) of the way; two LoRAs, no negative strength",
        source="Shoemake 1985, Animating rotation with quaternion curves",
        exact_inputs=2,
        signed=False,
    ),
    "tsv": Method(
        combine=_tsv,
        summary="the sum, after the singular vectors of all have been made orthogonal to one another",
        source="Gargiulo et al. 2024, Task Singular Vectors, arXiv 2412.00081",
    ),
}


def find_method(name: str) -> Method:
    """The method of that name. Raises ValueError, listing all names, if there is none."""
    if name not in METHODS:
        raise ValueError(f"method is {name!r}, but it has to be one of: {', '.join(METHODS)}")
    return METHODS[name]


def all_parameters() -> dict[str, dict[str, Parameter]]:
    """Parameter -> method -> what it is there, of all methods, in the order of the table."""
    result: dict[str, dict[str, Parameter]] = {}
    for method, row in METHODS.items():
        for name, parameter in row.parameters.items():
            result.setdefault(name, {})[method] = parameter
    return result


def methods_with(name: str) -> str:
    """Whose parameter it is, in words."""
    methods = list(all_parameters()[name])
    return "methods that have it" if len(methods) > _NAMED else " and ".join(methods)
