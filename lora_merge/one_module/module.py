"""One module of a merge, from its updates to what stands in the result."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import replace
from types import MappingProxyType

import torch
from torch import Tensor

from ..algebra.core_space import core_space
from ..algebra.lowrank import (
    Directions,
    Known,
    Prospect,
    directions_in,
    energy_of,
    prospect_and_known,
    truncated_matrix,
    truncated_sum,
)
from ..algebra.precision import COARSE, cast, cast_part, rounding
from ..algebra.scaling import levelled, raised, raised_whole
from ..algebra.sums import dense_dtype, dense_sum_in, weighted_sum
from ..files.lora import Lora
from ..methods.table import Situation
from ..settings.options import MergeOptions
from ..settings.strengths import Strengths
from ..updates.layer import Layer, LoraLayer, Term, exponent, largest
from .differences import sums_of_one, weight_sum, weight_terms
from .fault import in_words
from .protect import dense_stepping_aside, stepping_aside
from .tally import Finished
from .unshared import smaller_whole, uncut, unshared

# Powers of two within which the squares of whole updates, and sums of millions of them, are within float32.
_SQUARED = 50


class ModuleMerger:
    """Merges single modules; safe to use from several threads, a module from one at a time.

    What `prospect` finds of a module is kept until `finish`.

    loras: with canonical names that agree.   options: checked, `protect` a number or None.
    dense_modules: those that an input changes by a whole-weight difference.   device: where to compute.
    drawn_by: module -> the name that draws for it are of; its own where there is none.
    """

    def __init__(
        self,
        loras: Sequence[Lora],
        strengths: Strengths,
        options: MergeOptions,
        dense_modules: Mapping[str, None],
        device: torch.device,
        drawn_by: Mapping[str, str] = MappingProxyType({}),
    ):
        self.loras = loras
        self.strengths = strengths
        self.options = options
        self.method = options.the_method
        self.values = options.values
        self.dense_modules = dense_modules
        self.device = device
        self.drawn_by = drawn_by
        self.known: dict[str, Known | None] = {}

    def prospect(self, module: str) -> Prospect:
        """What each rank of the module would keep, of all inputs: 0 of those that do not have the module."""
        with self._in_words(module):
            owners, terms, _, power = self._terms(module)
            if self.method.combine is None:
                found, self.known[module] = prospect_and_known(terms, balanced=self.options.balanced)
            else:
                found = self._directions(module, owners, terms)[0].prospect()
            kept = found.kept.cpu()
            if len(owners) < len(self.loras):
                kept = kept.new_zeros(1 + len(self.loras), kept.shape[1])
                kept[[0, *(1 + index for index in owners)]] = found.kept.cpu()
            energy = 4.0**power
            return replace(found, kept=kept * energy, priority=found.priority.cpu() * energy)

    def finish(self, module: str, rank: int) -> Finished:
        """The module of the result, in the result's dtype. rank: the largest that it may have, 0 for any."""
        with self._in_words(module):
            done = self._dense(module) if module in self.dense_modules else self._low_rank(module, rank)
            dtype = self.options.out_dtype
            if done.layer is not None:
                in_dtype = cast(_moved(done.layer, torch.device("cpu")), dtype or torch.float32)
                if in_dtype.layer is done.layer:
                    return done
                # The cut's layer as well: it would keep a float32 copy alive.
                cut = done.cut and replace(done.cut, layer=in_dtype.layer)
                done = replace(
                    done, layer=in_dtype.layer, cut=cut, rebalanced=in_dtype.balanced, rounding=in_dtype.error
                )
            elif done.diff is not None:
                part, diff = done.diff
                rounded = cast_part(diff.cpu(), dtype, copy=False)
                done = replace(done, diff=(part, rounded), rounding=rounding(diff.cpu(), rounded))
            return done

    def _in_words(self, module: str) -> AbstractContextManager[None]:
        """Names files and module in what is raised."""
        strengths, dtype = self.strengths.at(module), self.options.out_dtype
        return in_words(module, lambda: sums_of_one(module, self.loras, strengths, dtype))

    def unshared(self, module: str) -> Layer | None:
        """The LoHa or LoKr that can stand in the result as it came, times its strength."""
        layer = unshared(self.loras, self.strengths, module) if self._adds_up(module) else None
        return layer if layer is not None and self._is_held(layer) else None

    def _adds_up(self, module: str) -> bool:
        """Whether the method makes the plain sum of the module's updates, or changes nothing since there is only one."""
        method = self.method
        return method.combine is None or (len(self._owners(module)) == 1 and not method.changes_one(self.values))

    def _is_held(self, layer: Layer) -> bool:
        """Whether the result's dtype holds the layer; LoRA factors have alpha for what it does not."""
        try:
            return cast(layer, self.options.out_dtype or torch.float32).error <= COARSE
        except ValueError:
            return False

    def _owners(self, module: str) -> tuple[int, ...]:
        return tuple(index for index, lora in enumerate(self.loras) if module in lora.modules)

    def _terms(
        self, module: str, *, exact: bool = False
    ) -> tuple[tuple[int, ...], list[Term], dict[int, tuple[float, float]], int]:
        """(owners, their terms with room made for the protected one, energy of each before and after, power): the terms
        are 2 ** -power of what they should be. exact: for weighted_sum alone, which levels terms itself."""
        at, owners = self.strengths.at(module), self._owners(module)
        terms: list[Term] = [(_moved(self.loras[index].modules[module], self.device), at[index]) for index in owners]
        protect, mu = self.options.protect, self.options.mu
        room = bool(mu) and protect in owners
        terms, power = (terms, 0) if exact and not room else levelled(terms)
        if not room:
            return owners, terms, {}, power
        aside = stepping_aside(terms, owners.index(protect), mu)
        energies = {
            index: (energy_of(before), energy_of(after)) if after is not before else (energy_of(before),) * 2
            for index, before, after in zip(owners, terms, aside, strict=True)
        }
        return owners, aside, energies, power

    def _situation(self, module: str, owners: tuple[int, ...]) -> Situation:
        at = self.strengths.at(module)
        return Situation(
            strengths=tuple(at[index] for index in owners),
            inputs=owners,
            values=self.values,
            module=self.drawn_by.get(module, module),
            seed=self.options.seed,
        )

    def _directions(
        self, module: str, owners: tuple[int, ...], terms: list[Term]
    ) -> tuple[Directions, tuple[Tensor, Tensor]]:
        """Directions of what a method other than the sum makes, and the products of Finished."""
        assert self.method.combine is not None
        space = core_space(terms)
        core = self.method.combine(space.cores, self._situation(module, owners))
        return directions_in(space, core, balanced=self.options.balanced), _products(space.cores, core)

    def _low_rank(self, module: str, rank: int) -> Finished:
        adds = self._adds_up(module)
        owners, terms, aside, power = self._terms(module, exact=adds and not rank)
        if not adds:
            return _raised(replace(self._by_method(module, owners, terms, rank), aside=aside), power)
        products = None if self.method.combine is None else _products_of_one(terms[0])
        done = Finished(module=module, owners=owners, products=products, aside=aside)
        whole = self.unshared(module)
        if whole is not None and self._stays(whole, rank):
            cut = uncut(whole, terms) if rank else None
            # In its own size already.
            return replace(_raised(replace(done, cut=cut), power), layer=whole)
        # What is multiplied by a power of two afterwards is rounded afterwards.
        dtype = torch.float32 if power else self.options.out_dtype or torch.float32
        if not rank:
            return _raised(replace(done, layer=weighted_sum(terms, dtype)), power)
        known = self.known.pop(module, None)
        cut = truncated_sum(terms, rank, balanced=self.options.balanced, known=known, dtype=dtype)
        return _raised(replace(done, layer=cut.layer, cut=cut), power)

    def _stays(self, whole: Layer, rank: int) -> bool:
        """Whether a LoHa or LoKr stays what it is where modules are cut to that rank, 0 for no cut."""
        return not rank or (whole.rank <= rank and (not self.options.aim or smaller_whole(whole, rank)))

    def _by_method(self, module: str, owners: tuple[int, ...], terms: list[Term], rank: int) -> Finished:
        """What the method makes of terms of ordinary size."""
        method = self.method
        if self.options.dense and method.entrywise:
            deltas = [strength * layer.delta() for layer, strength in terms]
            return self._combined(module, owners, deltas, rank)
        if rank:
            found, both = self._directions(module, owners, terms)
            cut = found.cut(rank)
            return Finished(module=module, owners=owners, layer=cut.layer, cut=cut, products=both)
        space = core_space(terms)
        assert method.combine is not None
        core = method.combine(space.cores, self._situation(module, owners))
        return Finished(module=module, owners=owners, layer=space.layer(core), products=_products(space.cores, core))

    def _dense(self, module: str) -> Finished:
        """The merge of a weight that some input changes by a dense difference; the result is dense and never cut."""
        at = self.strengths.at(module)
        found = weight_terms(module, self.loras, at)[1]
        owners = tuple(found)
        shape = next(tuple(diff.shape) for terms in found.values() for diff, _ in terms.dense)
        # Norms have no rows to prune; they are added up.
        if len(shape) < 2 or (self.method.combine is None and not self.options.mu):
            return Finished(module=module, owners=owners, diff=weight_sum(module, self.loras, at))
        zero = torch.zeros(shape)
        summed = [(terms.low_rank, [*terms.dense, (zero, 0.0)]) for terms in found.values()]
        deltas = [dense_sum_in(dense_dtype(*both), *both) for both in summed]
        power = _power(deltas)
        deltas = [(delta * 2.0**-power if power else delta).float().to(self.device) for delta in deltas]
        return _raised(self._combined(module, owners, deltas, 0, aside=True), power)

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
            return Finished(module=module, owners=owners, diff=("diff", total), products=products, aside=energies)
        cut = truncated_matrix(total, deltas, rank)
        return Finished(module=module, owners=owners, layer=cut.layer, cut=cut, products=products, aside=energies)


def _power(deltas: Sequence[Tensor]) -> int:
    """What whole updates are to be divided by, as an even power of two, for their squares to be within float32; 0 as a rule."""
    size = max(exponent(largest(delta)) for delta in deltas)
    return 0 if size == -math.inf or -_SQUARED <= size <= _SQUARED else 2 * (int(size) // 2)


def _raised(done: Finished, power: int) -> Finished:
    """The module times 2 ** power, and all energies of it."""
    if not power:
        return done
    energy = 4.0**power
    layer = raised(done.layer, power) if isinstance(done.layer, LoraLayer) else done.layer
    cut = done.cut and replace(
        done.cut,
        energy=done.cut.energy * energy,
        lost_energy=done.cut.lost_energy * energy,
        source_energy=tuple(e * energy for e in done.cut.source_energy),
        kept_energy=tuple(e * energy for e in done.cut.kept_energy),
    )
    diff = done.diff and (done.diff[0], raised_whole(done.diff[1], power))
    products = done.products and (done.products[0] * energy, done.products[1] * energy)
    aside = {index: (before * energy, after * energy) for index, (before, after) in done.aside.items()}
    return replace(done, layer=layer, diff=diff, cut=cut, products=products, aside=aside)


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
    if layer.device.type == device.type:
        return layer
    return layer.with_parts({name: part.to(device) for name, part in layer.parts().items()})
