"""Whose fault it is where a module cannot be merged or compared: people look for a file, not for a module."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import torch

from ..files.lora import Lora

Attempt = tuple[Lora, Callable[[], object]]
"""What is to be done, for one LoRA by itself."""
_ERRORS = (ValueError, ArithmeticError, torch.linalg.LinAlgError)  # type: ignore[attr-defined]


@contextmanager
def in_words(module: str, attempts: Callable[[], Sequence[Attempt]], part: str = "") -> Iterator[None]:
    """Names files and module in what is raised, as a ValueError. attempts: asked only then.   part: of the module."""
    try:
        yield
    except torch.linalg.LinAlgError as error:  # type: ignore[attr-defined]
        said = f"its values are of no use to a decomposition ({error}); leave the LoRA out"
        raise ValueError(f"{at_fault(module, attempts())}{part}: {said}") from None
    except ValueError as error:
        raise ValueError(f"{at_fault(module, attempts())}{part}: {error}") from None


def at_fault(module: str, attempts: Sequence[Attempt]) -> str:
    """ "file: module", the module as that file spells it: of the LoRAs that fail, of all where each would do alone."""
    loras = [lora for lora, attempt in attempts if _fails(attempt)] or [lora for lora, _ in attempts]
    if not loras:
        return module
    sources = " and ".join(dict.fromkeys(lora.source for lora in loras))
    return f"{sources}: {loras[0].spellings.get(module, module)}"


def _fails(attempt: Callable[[], object]) -> bool:
    try:
        attempt()
    except _ERRORS:
        return True
    return False
