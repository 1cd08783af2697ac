"""torch.compile for the calls without a gradient: the teacher's and the target's, three of a step's six.

The call with a gradient, its second computation and its backward pass stay as they are. What they need is kept by
recompute.py and inplace.py, which see every operation of a network, its writing into its own tensors above all, by
torch's dispatch. Compiled code goes past that, and torch (2.11) leaves alone what it is asked to compile under it.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from .recompute import blocks, replaced_forwards

# Shapes of a network's blocks, each for teacher and student, alone and in a batch; torch's own limit is 8.
VARIANTS = 512


def check_compile(device: torch.device) -> None:
    """Raises ValueError if torch cannot compile for the device. Tries it, as only that tells: some seconds."""
    try:
        torch.compile(_tried)(torch.ones((), device=device))
    except Exception as error:  # whatever a missing compiler, Triton or driver leads to
        first = next(iter(str(error).strip().splitlines()), type(error).__name__)
        needs = "a C++ compiler (g++, clang or MSVC)" if device.type == "cpu" else "Triton and a C compiler"
        raise ValueError(
            f"compile is on, but torch {torch.__version__} cannot compile for {device} here ({first[:200]}). It needs "
            f"{needs}. Switch it off: the LoRA is the same, to rounding."
        ) from error
    finally:
        torch.compiler.reset()


def _tried(x: torch.Tensor) -> torch.Tensor:
    return x.sin()


@contextmanager
def compiling(network: nn.Module, active: bool = True) -> Iterator[None]:
    """Within it the blocks of `network` (see recompute.blocks) run compiled while no gradient is asked for.

    What torch cannot compile runs as before, and torch warns of it. Adapters may come and change within; code that was
    compiled before, also by others, is compiled again afterwards. `active` False does nothing.
    """
    if not active:
        yield
        return
    from torch._dynamo import config

    limit = "recompile_limit" if hasattr(config, "recompile_limit") else "cache_size_limit"  # before torch 2.6
    # Compiled code does not look whether hooks have been added or taken away, so none may be left from before or after.
    torch.compiler.reset()
    try:
        with (
            config.patch({limit: VARIANTS, f"accumulated_{limit}": VARIANTS, "suppress_errors": True}),  # type: ignore[no-untyped-call, unused-ignore]
            replaced_forwards({block: _compiled(block.forward) for block in blocks(network)}),
        ):
            yield
    finally:
        torch.compiler.reset()


def _compiled(forward: Callable[..., Any]) -> Callable[..., Any]:
    quick = torch.compile(forward)

    def called(*args: Any, **kwargs: Any) -> Any:
        return (forward if torch.is_grad_enabled() else quick)(*args, **kwargs)

    return called
