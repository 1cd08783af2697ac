"""One module of a merge, from its updates to what stands in the result."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import fields, replace

import torch
from torch import Tensor

from ..algebra.core_space import core_space
from ..algebra.lowrank import (
    Directions,
    Prospect,
    directions,
    directions_in,
    energy_of,
    truncated_matrix,
    truncated_sum,
)
from ..algebra.precision import cast, cast_part
from ..algebra.sums import Term, dense_sum, weighted_sum
from ..files.lora import Lora
from ..methods.table import Situation
from ..updates.layer import Layer, LoraLayer
from .account import Finished
from .differences import weight_deltas, weight_sum
from .options import MergeOptions
from .protect import dense_stepping_aside, stepping_aside
from .strengths import Strengths


class Engine:
    """The merge of single modules; safe to use from several threads, since it changes nothing of its own.

    loras: with canonical names that agree.   options: checked, `protect` a number or None.
    dense_modules: those that an input changes by a whole-weight difference.   device: where to compute.
    """

    def __init__(
        self,
        loras: Sequence[Lora],
        strengths: Strengths,
        options: MergeOptions,
        dense_modules: Mapping[str, None],
        device: torch.device,
    ):
        self.loras = loras
        self.strengths = strengths
        self.options = options
        self.method = options.the_method
        self.values = options.values
        self.dense_modules = dense_modules
        self.device = device

    def prospect(self, module: str) -> Prospect:
        """What each rank of the module would keep, of all inputs: 0 of those that do not have the module."""
        owners, terms, _ = self._terms(module)
        found = self._directions(module, owners, terms)[0].prospect()
        kept = found.kept.new_zeros(1 + len(self.loras), found.kept.shape[1])
        kept[[0, *(1 + index for index in owners)]] = found.kept
        return replace(found, kept=kept.cpu(), priority=found.priority.cpu())

    def finish(self, module: str, rank: int) -> Finished:
        """The module of the result, in the result's dtype. rank: the largest that it may have, 0 for any."""
        done = self._dense(module) if module in self.dense_modules else self._low_rank(module, rank)
        dtype = self.options.out_dtype
        try:
            if isinstance(done.layer, LoraLayer):
                layer = replace(done.layer, up=done.layer.up.cpu(), down=done.layer.down.cpu())
                in_dtype = cast(layer, dtype or layer.up.dtype)
                # The cut's layer as well: it would keep a float32 copy alive.
                cut = done.cut and replace(done.cut, layer=in_dtype.layer)
                done = replace(done, layer=in_dtype.layer, cut=cut, rebalanced=in_dtype.balanced)
            elif done.diff is not None:
                part, diff = done.diff
                done = replace(done, diff=(part, cast_part(diff.cpu(), dtype, copy=False)))
        except ValueError as error:
            raise ValueError(f"{module}: {error}") from None
        return done

    def _terms(self, module: str) -> tuple[tuple[int, ...], list[Term], dict[int, tuple[float, float]]]:
        """(owners, their terms with room made for the protected one, energy of each before and after)."""
        at = self.strengths.at(module)
        owners = tuple(index for index, lora in enumerate(self.loras) if module in lora.modules)
        terms: list[Term] = [(_moved(self.loras[index].modules[module], self.device), at[index]) for index in owners]
        protect, mu = self.options.protect, self.options.mu
        if not mu or protect not in owners:
            return owners, terms, {}
        aside = stepping_aside(terms, owners.index(protect), mu)
        energies = {
            index: (energy_of(before), energy_of(after)) if after is not before else (energy_of(before),) * 2
            for index, before, after in zip(owners, terms, aside, strict=True)
        }
        return owners, aside, energies

    def _situation(self, module: str, owners: tuple[int, ...]) -> Situation:
        at = self.strengths.at(module)
        return Situation(tuple(at[index] for index in owners), owners, self.values, module, self.options.seed)

    def _directions(
        self, module: str, owners: tuple[int, ...], terms: list[Term]
    ) -> tuple[Directions, tuple[Tensor, Tensor] | None]:
        """Directions of what the method makes, and the products of Finished."""
        balanced = self.options.balanced
        if self.method.combine is None:
            return directions(terms, balanced=balanced), None
        space = core_space(terms)
        core = self.method.combine(space.cores, self._situation(module, owners))
        return directions_in(space, core, balanced=balanced), _products(space.cores, core)

    def _low_rank(self, module: str, rank: int) -> Finished:
        owners, terms, aside = self._terms(module)
        method = self.method
        alone = method.combine is not None and len(terms) == 1 and not method.changes_one(self.values)
        if method.combine is None or alone:
            products = _products_of_one(terms[0]) if alone else None
            if not rank:
                layer = weighted_sum(terms, self.options.out_dtype or torch.float32)
                return Finished(module, owners, layer, None, None, products, aside)
            cut = truncated_sum(terms, rank, balanced=self.options.balanced)
            return Finished(module, owners, cut.layer, None, cut, products, aside)
        if self.options.dense and method.entrywise:
            deltas = [strength * layer.delta() for layer, strength in terms]
            return replace(self._combined(module, owners, deltas, rank), aside=aside)
        if rank:
            found, both = self._directions(module, owners, terms)
            cut = found.cut(rank)
            return Finished(module, owners, cut.layer, None, cut, both, aside)
        space = core_space(terms)
        core = method.combine(space.cores, self._situation(module, owners))
        return Finished(module, owners, space.layer(core), None, None, _products(space.cores, core), aside)

    def _dense(self, module: str) -> Finished:
        """A module with a whole-weight difference. Such differences stay whole, whatever is cut."""
        at = self.strengths.at(module)
        found = weight_deltas(module, self.loras, at)[1]
        owners = tuple(found)
        shape = next(tuple(diff.shape) for _, diffs in found.values() for diff, _ in diffs)
        # Norms have no rows to prune; they are added up.
        if len(shape) < 2 or (self.method.combine is None and not self.options.mu):
            return Finished(module, owners, None, weight_sum(module, self.loras, at))
        zero = torch.zeros(shape)
        deltas = [dense_sum(terms, [*diffs, (zero, 0.0)]).to(self.device) for terms, diffs in found.values()]
        return self._combined(module, owners, deltas, 0, aside=True)

    def _combined(
        self, module: str, owners: tuple[int, ...], deltas: list[Tensor], rank: int, *, aside: bool = False
    ) -> Finished:
        """What the method makes of whole updates (out, in, *kernel), strengths multiplied in."""
        protect, shape = self.options.protect, deltas[0].shape
        energies: dict[int, tuple[float, float]] = {}
        if aside and self.options.mu and protect in owners:
            moved = dense_stepping_aside(deltas, owners.index(protect), self.options.mu)
            energies = {
                index: (float(before.double().square().sum()), float(after.double().square().sum()))
                for index, before, after in zip(owners, deltas, moved, strict=True)
            }
            deltas = moved
        flat = [delta.reshape(shape[0], -1) for delta in deltas]
        if self.method.combine is None:
            total, products = torch.stack(flat).sum(dim=0), None
        else:
            total = self.method.combine(flat, self._situation(module, owners))
            products = _products(flat, total)
        total = total.reshape(shape)
        if not rank:
            return Finished(module, owners, None, ("diff", total), None, products, energies)
        cut = truncated_matrix(total, deltas, rank)
        return Finished(module, owners, cut.layer, None, cut, products, energies)


def _products(deltas: Sequence[Tensor], total: Tensor) -> tuple[Tensor, Tensor]:
    flat = torch.stack([delta.flatten() for delta in (*deltas, total)])
    # float64 would double the memory of whole updates; the sums are for a report.
    products = (flat @ flat.T).double().cpu()
    return products[:-1, :-1], products[:-1, -1]


def _products_of_one(term: Term) -> tuple[Tensor, Tensor]:
    energy = torch.tensor([energy_of(term)], dtype=torch.float64)
    return energy[None], energy


def _moved(layer: Layer, device: torch.device) -> Layer:
    """The layer with its tensors on a device."""
    if device.type == "cpu":
        return layer
    tensors = {f.name: value for f in fields(layer) if isinstance(value := getattr(layer, f.name), Tensor)}  # type: ignore[arg-type]
    return replace(layer, **{name: tensor.to(device) for name, tensor in tensors.items()})  # type: ignore[type-var]
