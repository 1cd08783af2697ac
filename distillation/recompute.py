"""Gradient checkpointing of any network: activations of a block are computed again in the backward pass, not kept."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

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

    The network must be deterministic (no dropout); it then gives the same numbers as without. `active` False does
    nothing.
    """
    with replaced_forwards({block: _recomputed(block.forward) for block in blocks(network)} if active else {}):
        yield


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


def _recomputed(forward: Callable[..., Any]) -> Callable[..., Any]:
    def wrapped(*args: Any, **kwargs: Any) -> Any:
        if not torch.is_grad_enabled():
            return forward(*args, **kwargs)
        # Without dropout there is no random state to keep, and the global one is left alone.
        return checkpoint(forward, *args, use_reentrant=False, preserve_rng_state=False, **kwargs)

    return wrapped
