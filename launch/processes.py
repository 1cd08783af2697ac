"""One process, or several that `accelerate launch` or torchrun has started: whom the trainer works with."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from datetime import timedelta
from typing import Any

import torch

from ..distillation.engine import Alone, Engine

logger = logging.getLogger(__name__)

PATIENCE = timedelta(hours=24)  # the others wait while the first one makes the pictures


def has_accelerator() -> bool:
    """Whether there is a GPU or the like that ComfyUI would compute on."""
    if hasattr(torch, "accelerator"):  # torch 2.6
        return torch.accelerator.is_available()
    return torch.cuda.is_available() or torch.backends.mps.is_available()


@contextmanager
def processes(*, cpu: bool) -> Iterator[Engine]:
    """What joins the processes that take part; each has its own device then. Raises ValueError without accelerate.

    cpu: they compute on the CPU, also where there are GPUs.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        # What accelerate (1.15) leaves behind when it was asked for several and starts one: by default, on CPUs.
        if "WORLD_SIZE" not in os.environ and {"ACCELERATE_MIXED_PRECISION", "MASTER_ADDR"} <= os.environ.keys():
            logger.warning(
                "`accelerate launch` has started one process. If you asked for more, add --multi_gpu, on CPUs too, or use "
                "torchrun."
            )
        yield Alone()
        return
    try:
        from accelerate import Accelerator  # type: ignore[import-untyped]
        from accelerate.utils import (  # type: ignore[import-untyped]
            DistributedDataParallelKwargs,
            DistributedType,
            InitProcessGroupKwargs,
        )
    except ImportError as error:
        raise ValueError("more than one process needs accelerate: pip install accelerate") from error
    # The network computes in the type that --dtype says, whatever accelerate's own settings are.
    # Gradients are views of what is exchanged, or each process would hold them twice.
    handlers = [InitProcessGroupKwargs(timeout=PATIENCE), DistributedDataParallelKwargs(gradient_as_bucket_view=True)]
    accelerator = Accelerator(cpu=cpu, mixed_precision="no", kwargs_handlers=handlers)
    kinds = [name for name in ("FSDP", "DEEPSPEED", "MEGATRON_LM") if hasattr(DistributedType, name)]
    if accelerator.distributed_type in [getattr(DistributedType, name) for name in kinds]:
        raise ValueError(
            f"accelerate is set to {accelerator.distributed_type.value}, which splits a model; a LoRA is small, so "
            "training is data parallel. Choose that in `accelerate config`, or pass --multi_gpu."
        )
    try:
        yield accelerator
        accelerator.wait_for_everyone()
    finally:
        if torch.distributed.is_initialized():
            torch.distributed.destroy_process_group()


def first_of_a_machine(engine: Engine) -> Any:
    """Context that the first process of each machine goes through before the others."""
    return nullcontext() if isinstance(engine, Alone) else engine.local_main_process_first()  # type: ignore[attr-defined]


def check_same(engine: Engine, facts: dict[str, Any]) -> None:
    """Raises ValueError, in all processes, if they do not all have the same facts."""
    if isinstance(engine, Alone):
        return
    from accelerate.utils import gather_object

    everyone = gather_object([facts])
    different = sorted(name for name in facts if any(other[name] != facts[name] for other in everyone))
    if different:
        raise ValueError(
            f"the processes differ in {', '.join(different)}. All machines need the same files and options, and a "
            "--resume folder that all of them see."
        )
