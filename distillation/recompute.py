"""Gradient checkpointing of any network: activations of a block are computed again in the backward pass, not kept."""

import weakref
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.utils._pytree import tree_flatten, tree_unflatten

from .inplace import Keeping, Kept, kept_values
from .targets import adaptable

CONTAINERS = (nn.ModuleList, nn.ModuleDict, nn.Sequential)


def blocks(network: nn.Module) -> list[nn.Module]:
    """The largest modules within `network` that are no mere lists and have at least two layers to adapt.

    ResBlock and SpatialTransformer in ComfyUI's UNets, the down, mid and up blocks in diffusers', the double and single
    blocks of transformers. A single layer would save nothing: its input is kept anyway.
    """
    found: list[nn.Module] = []
    _collect(network, found)
    return found


def _collect(module: nn.Module, found: list[nn.Module]) -> None:
    for child in module.children():
        if isinstance(child, CONTAINERS):
            _collect(child, found)
        elif sum(map(adaptable, child.modules())) > 1:
            found.append(child)


@contextmanager
def recomputing(network: nn.Module, active: bool = True) -> Iterator[None]:
    """Within it every block of `blocks` keeps its inputs only, while gradients are asked for; nothing else changes.

    The network must be deterministic (no dropout); it then gives the same numbers as without. It may write into its own
    tensors (x += ...), with `active` False too: what the backward pass needs of them is kept, see inplace.py.
    """
    scope = _Scope()
    forwards = {network: kept_values(network.forward, scope.enter)}
    if active:
        forwards |= {block: _recomputed(block.forward, scope) for block in blocks(network)}
    with replaced_forwards(forwards):
        yield


class _Scope:
    """`keeping`: that of the network's present call."""

    keeping: Keeping | None = None

    def enter(self, keeping: Keeping) -> None:
        self.keeping = keeping


@contextmanager
def replaced_forwards(forwards: Mapping[nn.Module, Callable[..., Any]]) -> Iterator[None]:
    """Within it these modules compute so. On the instance: the class and every other network of it stay as they are."""
    before = {module: vars(module).get("forward") for module in forwards}
    try:
        for module, forward in forwards.items():
            module.forward = forward
        yield
    finally:
        for module, forward_before in before.items():
            vars(module).pop("forward", None)
            if forward_before is not None:
                module.forward = forward_before


def _recomputed(forward: Callable[..., Any], scope: _Scope) -> Callable[..., Any]:
    def wrapped(*args: Any, **kwargs: Any) -> Any:
        if not torch.is_grad_enabled() or scope.keeping is None:
            return forward(*args, **kwargs)
        call = _Call(forward, args, kwargs, scope.keeping)
        with saved_tensors_hooks(call.number, call.value):
            return forward(*args, **kwargs)

    return wrapped


class _Enough(Exception):
    """All that the backward pass needs of a block is there; the rest of the block need not be computed."""


class _Call:
    """One call of a block: its inputs, and in the backward pass what autograd would have kept of it.

    torch's own checkpoint is not used: it computes again from inputs that the block has written into meanwhile, and
    hands out values that the second computation has written into, both without a word where they come by keyword.
    """

    def __init__(self, forward: Callable[..., Any], args: Any, kwargs: Any, keeping: Keeping) -> None:
        self.forward = forward
        leaves, self.structure = tree_flatten((args, kwargs))
        # The same tensor given twice stays one.
        kept = {id(leaf): (keeping.keep(leaf), leaf.requires_grad) for leaf in leaves if isinstance(leaf, Tensor)}
        self.inputs = [kept.get(id(leaf), leaf) for leaf in leaves]
        # Weak: what the backward pass has done with is given free.
        self.asked: list[weakref.ref[Kept]] = []
        self.again = False

    def number(self, tensor: Tensor) -> Kept:
        """In place of a value of the forward pass: an empty place for it."""
        kept = Kept()
        self.asked.append(weakref.ref(kept))
        return kept

    def value(self, kept: Kept) -> Tensor:
        """What belongs in that place."""
        if not self.again:
            self.again = True
            self._compute_again()
        assert kept.tensor is not None, "a block computed otherwise the second time"
        return kept.tensor

    def _compute_again(self) -> None:
        found = 0

        def fill(tensor: Tensor) -> None:
            nonlocal found
            kept = self.asked[found]()
            found += 1
            if kept is not None:
                keeping.keep(tensor, kept)
            if found == len(self.asked):
                raise _Enough

        with torch.enable_grad(), Keeping() as keeping:
            known: dict[int, Tensor] = {}
            leaves = [self._input(entry, known) for entry in self.inputs]
            args, kwargs = tree_unflatten(leaves, self.structure)
            # Of this computation there is no backward pass; a result handed back here would hold itself for ever.
            with saved_tensors_hooks(fill, lambda nothing: nothing), suppress(_Enough):
                self.forward(*args, **kwargs)
        self.inputs = []

    @staticmethod
    def _input(entry: Any, known: dict[int, Tensor]) -> Any:
        if not isinstance(entry, tuple):
            return entry
        kept, trained = entry
        if id(kept) not in known:
            tensor = kept.tensor
            # A clone of it, as autograd forbids writing into a tensor that itself asks for a gradient.
            known[id(kept)] = tensor.detach().requires_grad_().clone() if trained else tensor
        return known[id(kept)]
