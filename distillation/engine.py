"""How processes train together. The work is done by an existing engine; here is what the trainer asks of it."""

from contextlib import AbstractContextManager, nullcontext
from typing import Any, Protocol

from torch import Tensor, nn


class Engine(Protocol):
    """How processes work together; `accelerate.Accelerator` is one. `Alone` is the other."""

    process_index: int
    num_processes: int

    def prepare(self, module: nn.Module) -> nn.Module: ...
    def backward(self, loss: Tensor) -> None: ...
    def reduce(self, tensor: Tensor, reduction: str) -> Tensor: ...
    def no_sync(self, module: nn.Module) -> AbstractContextManager[Any]: ...


class Alone:
    """One process."""

    process_index = 0
    num_processes = 1

    def prepare(self, module: nn.Module) -> nn.Module:
        return module

    def backward(self, loss: Tensor) -> None:
        loss.backward()  # type: ignore[no-untyped-call]

    def reduce(self, tensor: Tensor, reduction: str) -> Tensor:
        return tensor

    def no_sync(self, module: nn.Module) -> AbstractContextManager[Any]:
        return nullcontext()
