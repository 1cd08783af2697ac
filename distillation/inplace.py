"""Values kept for the backward pass of networks that write into their own tensors.

Autograd keeps tensors and not copies of them: after `norm(x)` a line `x += y`, as in the blocks of Flux, spoils what the
norm's gradient needs. Here a kept tensor is copied just before something is written into its memory. The network's
operations and results stay the same to the bit, and nothing is copied where nothing is written.
"""

import weakref
from collections import defaultdict
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.utils._python_dispatch import TorchDispatchMode

PLAIN = (Tensor, nn.Parameter)
# Operation -> (place, name) of the arguments that it writes into. As many as there are operations.
_WRITTEN: dict[Any, tuple[tuple[int, str], ...]] = {}


class Kept:
    """`tensor`: as it was when it was kept, whatever is written into its memory later. Empty until something is kept."""

    __slots__ = ("__weakref__", "tensor")

    def __init__(self) -> None:
        self.tensor: Tensor | None = None


class Keeping(TorchDispatchMode):  # type: ignore[no-untyped-call, unused-ignore]
    """Within it whatever `keep` was given keeps its values; everything computes as usual."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call, unused-ignore]
        # Memory -> what was kept of it. Weak: autograd lets go of values while others are still being kept.
        self._kept: defaultdict[int, list[weakref.ref[Kept]]] = defaultdict(list)

    def keep(self, tensor: Tensor, kept: Kept | None = None) -> Kept:
        """The tensor's values, without its gradient. kept: an empty one to put them into."""
        kept = kept or Kept()
        # Detached: a tensor that its own gradient needs (exp's result) would hold itself for ever.
        kept.tensor = tensor if tensor.grad_fn is None else tensor.detach()
        if type(tensor) in PLAIN:  # nothing writes into weights in a packed form
            self._kept[_memory(tensor)].append(weakref.ref(kept))
        return kept

    def __torch_dispatch__(self, function: Any, types: Any, args: Sequence[Any] = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        # Every operation comes by here, so those that write nothing are to be let through quickly.
        written = _WRITTEN.get(function)
        if written is None:
            written = _WRITTEN[function] = _written(function)
        for place, name in written:
            value = args[place] if place < len(args) else kwargs.get(name)
            for tensor in value if isinstance(value, list | tuple) else (value,):
                if type(tensor) in PLAIN:
                    self._copy(tensor)
        return function(*args, **kwargs)

    def _copy(self, tensor: Tensor) -> None:
        """What was kept of this memory gets memory of its own; equal views share it."""
        copies: dict[Any, Tensor] = {}
        for reference in self._kept.pop(_memory(tensor), ()):
            kept = reference()
            if kept is None or kept.tensor is None:
                continue
            view = kept.tensor
            form = (view.dtype, view.storage_offset(), tuple(view.shape), view.stride())
            if form not in copies:
                copies[form] = view.clone()
            kept.tensor = copies[form]


def kept_values(forward: Callable[..., Any], enter: Callable[[Keeping], Any]) -> Callable[..., Any]:
    """`forward`, and while gradients are asked for, its backward pass gets the values that there were.

    enter: told the Keeping of a call before it begins, for others that keep something meanwhile.
    """

    def called(*args: Any, **kwargs: Any) -> Any:
        if not torch.is_grad_enabled():
            return forward(*args, **kwargs)
        with Keeping() as keeping, saved_tensors_hooks(keeping.keep, lambda kept: kept.tensor):
            enter(keeping)
            return forward(*args, **kwargs)

    return called


def _memory(tensor: Tensor) -> int:
    """A number of the memory behind a tensor: all views share it, and no other has it while one of them lives."""
    return int(tensor.untyped_storage()._cdata)


def _written(function: Any) -> tuple[tuple[int, str], ...]:
    """What _WRITTEN has for an operation."""
    arguments = enumerate(function._schema.arguments)
    return tuple((n, each.name) for n, each in arguments if each.alias_info is not None and each.alias_info.is_write)
