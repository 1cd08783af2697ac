"""What comes out of single modules of a merge, and their sums."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from ..algebra.lowrank import Truncated
from ..algebra.precision import COARSE
from ..updates.layer import Layer

# What float32 makes of inner products, relative to the norms.
_ROUNDING = 1e-6


@dataclass(frozen=True, eq=False, kw_only=True)
class Finished:
    """One module of the result: a layer, or a whole-weight difference under its part name, and how it came about.

    owners: numbers of the inputs it was made of.   cut: None where nothing was to be cut.
    products: (owners, owners) and (owners,) float64, of the updates with one another and with what the method made of
        them; None where that is their sum.
    aside: input -> its energy here before and after it stepped aside.   rebalanced: factors balanced for float16.
    rounding: relative error of an update too small for the result's dtype, 0 for one that is not.
    """

    module: str
    owners: tuple[int, ...]
    layer: Layer | None = None
    diff: tuple[str, Tensor] | None = None
    cut: Truncated | None = None
    products: tuple[Tensor, Tensor] | None = None
    aside: Mapping[int, tuple[float, float]] = field(default_factory=dict)
    rebalanced: bool = False
    rounding: float = 0.0


class Tally:
    """Sums over the modules of a merge."""

    def __init__(self, inputs: int):
        self.source_energy = [0.0] * inputs
        self.kept_energy = [0.0] * inputs
        self.energy = self.lost_energy = 0.0
        self.cut = self.rebalanced = 0
        self.gram = torch.zeros(inputs, inputs, dtype=torch.float64)
        self.along = torch.zeros(inputs, dtype=torch.float64)
        self.before = [0.0] * inputs
        self.after = [0.0] * inputs
        self.ranks: list[int] = []
        self.too_small: dict[str, float] = {}

    def add(self, done: Finished, rank: int | None) -> None:
        self.rebalanced += done.rebalanced
        self.add_rounding(done.module, done.rounding)
        if rank is not None:
            self.ranks.append(rank)
        if done.cut is not None:
            self.energy += done.cut.energy
            self.lost_energy += done.cut.lost_energy
            self.cut += done.cut.lost_energy > 0
            for index, whole, kept in zip(done.owners, done.cut.source_energy, done.cut.kept_energy, strict=True):
                self.source_energy[index] += whole
                self.kept_energy[index] += kept
        if done.products is not None:
            at = torch.tensor(done.owners)
            self.gram[at[:, None], at] += done.products[0]
            self.along[at] += done.products[1]
        for index, (before, after) in done.aside.items():
            self.before[index] += before
            self.after[index] += after

    def add_rounding(self, module: str, error: float) -> None:
        if error > COARSE:
            self.too_small[module] = max(error, self.too_small.get(module, 0.0))

    def effects(self) -> list[float | None]:
        """Coefficient of each input in what the method made, by least squares; None for an input without energy.

        Inputs of one direction, a LoRA that is given twice, have the coefficient of their sum. Where inputs depend on one
        another in other ways the coefficients are the smallest that fit.
        """
        energies = self.gram.diagonal()
        if not bool(energies.any()):
            return [None] * len(energies)
        together = _one_direction(self.gram)
        gram, along = together.T @ self.gram @ together, together.T @ self.along
        # Float32 products of inputs that depend on one another leave directions of rounding. Beside each input's own norm it is
        # as large for all of them, so that one far weaker than the others is told from it.
        norms = gram.diagonal().sqrt()
        units = torch.where(norms > 0, 1 / norms, 0.0)
        values, vectors = torch.linalg.eigh(gram * torch.outer(units, units))
        roots, vectors = values[values > _ROUNDING].sqrt(), vectors[:, values > _ROUNDING]
        # (roots * vectors * norms).T times itself is the Gram matrix without rounding; of all solutions the smallest one.
        solved = (
            together @ torch.linalg.pinv((vectors * roots).T * norms) @ (vectors.T @ (along * units) / roots)
        ).tolist()
        return [c if energy > 0 else None for c, energy in zip(solved, energies.tolist(), strict=True)]


def _one_direction(gram: Tensor) -> Tensor:
    """(inputs, inputs), a 1 in each row: at the first input of the same direction or the opposite one, by the products."""
    norms = gram.diagonal().sqrt()
    cosines = gram.abs() / torch.outer(norms, norms).clamp(min=torch.finfo(gram.dtype).tiny)
    same = (cosines > 1 - _ROUNDING) | torch.eye(len(gram), dtype=torch.bool)
    return torch.nn.functional.one_hot(same.int().argmax(dim=1), len(gram)).to(gram.dtype)
