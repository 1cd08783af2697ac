"""What a merge can be told, checked once before any work is done."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping
from dataclasses import InitVar, dataclass, field, fields
from functools import partial
from typing import Literal

import torch

from ..keywords import nearest
from ..methods.table import Method, Parameter, all_parameters, find_method
from ..words import many

AIMS = ("keep", "retain", "max_mb")
Protect = int | Literal["auto"] | None
DTYPES = (torch.float16, torch.bfloat16, torch.float32)


@dataclass(frozen=True)
class MergeOptions:
    """How LoRAs are merged. At most one of rank, keep, retain and max_mb is given; with none the result is exact.

    method: a name in methods.METHODS.
    density, spread, outliers: parameters of methods that people set most, put into `parameters`.
    parameters: name in methods.METHODS -> value; None, and a name left out, is the method's default. A density of 1 is
        accepted by every method.
    seed: of methods that draw at random, 0 or more.
    dense: methods that look at single entries look at those of the whole update, as their papers do, instead of those of
        the small core. Slow, and without a rank the result is a whole-weight difference: large.
    rank: modules whose ranks add up to more are cut to that rank; 0 cuts nothing.
    keep: (0, 1], share of the sum's energy to keep, with as few numbers as possible over all modules.
    retain: (0, 1], share of its own energy that every input has to keep, likewise.
    max_mb: size of the file in MB of 10**6 bytes, in out_dtype, in float16 if that is None; ranks where they are worth most.
    balanced: directions for a cut are chosen with every input counting alike, however weak it is (algebra/lowrank.py).
    protect: number of the input, from 0, that the others step aside for (protect.py); "auto" is the one recognised as
        an acceleration LoRA, if there is one; None is nobody.
    mu: how far they step aside, 0 not at all.
    leave_out: leave modules that do not add up out of the result and count them as refused, instead of raising.
    out_dtype: of the result, float16, bfloat16 or float32; None is float32.
    """

    method: str = "linear"
    rank: int = 0
    keep: float | None = None
    retain: float | None = None
    max_mb: float | None = None
    balanced: bool = False
    density: InitVar[float | None] = None
    spread: InitVar[float | None] = None
    outliers: InitVar[float | None] = None
    parameters: Mapping[str, float | None] = field(default_factory=dict, hash=False)
    seed: int = 0
    dense: bool = False
    protect: Protect = None
    mu: float = 0.0
    leave_out: bool = False
    out_dtype: torch.dtype | None = None

    def __post_init__(self, density: float | None, spread: float | None, outliers: float | None) -> None:
        parameters = {name: value for name, value in self.parameters.items() if value is not None}
        for name, value in (("density", density), ("spread", spread), ("outliers", outliers)):
            # `is`: what is not a number equals nothing, and is refused later.
            if value is not None and (other := parameters.setdefault(name, value)) is not value and other != value:
                raise ValueError(f"{name} is given twice, as {value:g} and in parameters as {other:g}.")
        object.__setattr__(self, "parameters", parameters)

    @property
    def the_method(self) -> Method:
        return find_method(self.method)

    @property
    def cuts(self) -> bool:
        """Whether the result may be smaller than exact."""
        return bool(self.rank) or self.aim is not None

    @property
    def aim(self) -> str | None:
        """Which of keep, retain and max_mb is given."""
        return next((name for name in AIMS if getattr(self, name) is not None), None)

    @property
    def values(self) -> dict[str, float]:
        """Value of each parameter that the method has."""
        given = self.parameters
        return {
            name: parameter.default if (value := given.get(name)) is None else float(value)
            for name, parameter in self.the_method.parameters.items()
        }

    def check(self, inputs: int) -> None:
        """Raises ValueError for what is out of range or contradicts itself, for that number of inputs."""
        if not inputs:
            raise ValueError("there is nothing to merge: give at least one LoRA")
        self._check_method(inputs)
        self._check_cut()
        self._check_protection(inputs)
        if self.out_dtype is not None and self.out_dtype not in DTYPES:
            raise ValueError(f"out_dtype is {self.out_dtype}, but it has to be one of {', '.join(map(str, DTYPES))}")

    def _check_method(self, inputs: int) -> None:
        method = self.the_method
        self._check_parameters(method)
        if method.exact_inputs and inputs != method.exact_inputs:
            raise ValueError(
                f"method {self.method} takes {many(method.exact_inputs, 'LoRAs')}, but there are {inputs}. Choose another method "
                "or another number of LoRAs."
            )
        if self.seed < 0:
            raise ValueError(f"seed is {self.seed}, but it has to be 0 or more.")

    def _check_parameters(self, method: Method) -> None:
        known = all_parameters()
        for name, value in self.parameters.items():
            if value is None:
                continue
            if name not in known:
                near = nearest(name, list(known))
                raise ValueError(
                    f"parameters has {name!r}, which is no parameter of any method"
                    f"{f' (did you mean {near!r}?)' if near else ''}. There are {', '.join(known)}."
                )
            if name not in method.parameters:
                self._refuse_parameter(name, value, next(iter(known[name].values())))
            elif not method.parameters[name].low <= value <= method.parameters[name].high:
                low, high = method.parameters[name].low, method.parameters[name].high
                raise ValueError(f"{name} is {value:g}, but it has to be within {low:g} and {high:g}.")
        if method.refuses is not None and (why := method.refuses(self.values)) is not None:
            raise ValueError(why)

    def _refuse_parameter(self, name: str, value: float, elsewhere: Parameter) -> None:
        """A parameter that other methods have, unless its value leaves all as it is."""
        if elsewhere.neutral is None:
            raise ValueError(f"{name} is {value:g}, but method {self.method} has no {name}. Leave {name} out.")
        if value != elsewhere.neutral:
            raise ValueError(
                f"{name} is {value:g}, but method {self.method} {elsewhere.without or f'has no {name}'}. "
                f"Set {name} to {elsewhere.neutral:g}."
            )

    def _check_cut(self) -> None:
        if self.rank < 0:
            raise ValueError(f"rank is {self.rank}, but it has to be 0 (exact) or more")
        given = (["rank"] if self.rank else []) + [name for name in AIMS if getattr(self, name) is not None]
        if len(given) > 1:
            raise ValueError(f"{' and '.join(given)} are given, but each alone says how small the result is. Give one.")
        for name in ("keep", "retain"):
            share = getattr(self, name)
            if share is not None and not 0 < share <= 1:
                raise ValueError(
                    f"{name} is {share:g}; it is a share of the energy, above 0 and at most 1 (1 loses nothing)."
                )
        if self.max_mb is not None and not (math.isfinite(self.max_mb) and self.max_mb > 0):
            raise ValueError(f"max_mb is {self.max_mb:g}, but it has to be above 0, in MB of a million bytes.")
        self._check_way_of_cutting()

    def _check_way_of_cutting(self) -> None:
        if self.balanced and not self.cuts:
            raise ValueError(
                "balanced chooses what a cut keeps, but nothing is cut. Give rank, keep, retain or max_mb too."
            )
        if self.dense and self.the_method.entrywise and self.aim is not None:
            raise ValueError(
                f"dense and {self.aim} do not go together: the ranks of whole updates are not shared out. Give a rank."
            )
        if self.dense and self.balanced and self.the_method.entrywise:
            raise ValueError("dense and balanced do not go together: leave one of them out.")

    def _check_protection(self, inputs: int) -> None:
        if not (math.isfinite(self.mu) and self.mu >= 0):
            raise ValueError(f"mu is {self.mu}; it must be 0 (exact sum) or more (others step aside, 1 by half).")
        if isinstance(self.protect, int) and not 0 <= self.protect < inputs:
            raise ValueError(f"protect is {self.protect}, but the inputs are numbered from 0 to {inputs - 1}.")
        if not isinstance(self.protect, int) and self.protect not in ("auto", None):
            raise ValueError(f"protect is {self.protect!r}, but it has to be the number of an input, 'auto' or None.")
        if self.mu and self.protect is None:
            raise ValueError(f"mu is {self.mu:g}, but no LoRA is protected. Say which (protect), or set mu to 0.")

    def to_dict(self) -> dict[str, object]:
        """As JSON can hold it; the method's parameters with their values, so that later defaults change nothing."""
        result: dict[str, object] = {}
        for option in fields(self):
            value = getattr(self, option.name)
            # Those that nobody gave are named too.
            found = {**dict.fromkeys(all_parameters()), **self.parameters, **self.values}
            result |= found if option.name == "parameters" else {option.name: value}
        dtype = self.out_dtype
        result["out_dtype"] = None if dtype is None else str(dtype).removeprefix("torch.")
        return result


def _parameter(name: str, options: MergeOptions) -> float | None:
    return options.parameters.get(name)


for _name in ("density", "spread", "outliers"):
    # What was given, as if it were a field; `values` has defaults filled in.
    setattr(MergeOptions, _name, property(partial(_parameter, _name)))


def options_from_dict(values: Mapping[str, object]) -> MergeOptions:
    """Undoes `to_dict`. Raises ValueError for names or kinds of values that are no options."""
    numbers = all_parameters().keys()
    names = {option.name for option in fields(MergeOptions)} - {"parameters"}
    if unknown := [name for name in values if name not in names and name not in numbers]:
        raise ValueError(f"unknown options ({', '.join(unknown)})")
    _check_kinds(values, numbers)
    dtypes = {str(dtype).removeprefix("torch."): dtype for dtype in DTYPES}
    dtype = values.get("out_dtype")
    if dtype is not None and dtype not in dtypes:
        raise ValueError(f"out_dtype is {dtype!r}, but it has to be one of {', '.join(dtypes)}")
    options = {name: value for name, value in values.items() if name in names}
    parameters = {name: value for name, value in values.items() if name in numbers}
    return MergeOptions(**options | {"out_dtype": dtypes.get(str(dtype)), "parameters": parameters})  # type: ignore[arg-type]


def _check_kinds(values: Mapping[str, object], parameters: Collection[str]) -> None:
    kinds = {"method": str, "rank": int, "seed": int, "balanced": bool, "dense": bool, "leave_out": bool}
    for name, value in values.items():
        if name in kinds and (not isinstance(value, kinds[name]) or (kinds[name] is int and isinstance(value, bool))):
            raise ValueError(f"{name} is {value!r}, which is no {kinds[name].__name__}")
        if name in (*AIMS, "mu", *parameters) and isinstance(value, (str, list, dict, bool)):
            raise ValueError(f"{name} is {value!r}, which is no number")
