"""Gradient checkpointing of any network: activations of a block are computed again in the backward pass, not kept."""

from collections.abc import Callable, Iterator
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
    changed = blocks(network) if active else []
    for block in changed:
        # On the instance, so the class and every other network of it stay as they are.
        block.forward = _recomputed(block.forward)
    try:
        yield
    finally:
        for block in changed:
            del block.forward


def _recomputed(forward: Callable[..., Any]) -> Callable[..., Any]:
    def wrapped(*args: Any, **kwargs: Any) -> Any:
        if not torch.is_grad_enabled():
            return forward(*args, **kwargs)
        # Without dropout there is no random state to keep, and the global one is left alone.
        return checkpoint(forward, *args, use_reentrant=False, preserve_rng_state=False, **kwargs)

    return wrapped
