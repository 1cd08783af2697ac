"""A merge of whole LoRAs in three stages: plan, compute, outcome.

The functions are long for their signatures alone: every option stands there with its type and default, and is handed on
by name.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace

import torch

from ..disk.garbage import uncollected
from ..files.lora import Lora
from ..keywords import named
from ..metadata.fields import MERGED_FROM, changed, is_computed, is_name
from ..metadata.inherit import is_picture
from ..settings.options import MergeOptions, Protect
from ..settings.strengths import Blocks
from .account import Account, Source
from .by_target import ModelNames
from .compute import Progress, compute
from .outcome import outcome
from .plan import Input, plan

__all__ = ["Account", "Input", "Progress", "Source", "merge", "merge_with_account", "resize", "resize_with_account"]

Hashes = Sequence[str | None] | Callable[[], Sequence[str | None]]


@named
def merge(
    inputs: Sequence[Input],
    *,
    method: str = "linear",
    rank: int = 0,
    keep: float | None = None,
    retain: float | None = None,
    max_mb: float | None = None,
    balanced: bool = False,
    density: float | None = None,
    spread: float | None = None,
    outliers: float | None = None,
    parameters: Mapping[str, float | None] | None = None,
    seed: int = 0,
    dense: bool = False,
    protect: Protect = None,
    mu: float = 0.0,
    leave_out: bool = False,
    out_dtype: torch.dtype | None = None,
    block_strengths: Blocks | Sequence[Blocks] = None,
    workers: int | None = None,
    device: str | torch.device = "cpu",
    progress: Progress | None = None,
    sha256: Hashes = (),
    metadata: Mapping[str, str] | None = None,
    model: ModelNames | None = None,
) -> Lora:
    """One LoRA whose update of every module is the sum of strength * update over the (lora, strength) inputs.

    Any number of inputs from 1 on, of any rank, alpha and spelling, strengths of any sign; modules that one input has
    alone are in the result too. LoRA becomes LoRA factors with alpha = rank, and so do LoHa and LoKr where another input
    changes the same weight or a cut makes them smaller; untouched by others they stay what they are, times the strength.
    Where one of the inputs changes the whole weight (`.diff`, a norm) the result is such a difference too, and stays whole in every cut.
    Updates that depend on the weight (Lora.carried: DoRA, OFT, ...) do not add up. One is passed through as it is if no
    other input changes the module and its strength is 1, and falls away at strength 0.
    Strengths are multiplied into the updates before a method looks at them, and never normalised. Biases and norms are
    added up by every method.
    Exact sums of plain LoRAs are made when their factors are read or saved: until then the inputs' tensors have to stay as
    they are. So is what keep, retain and max_mb cut of LoRAs in files, which are refused if they are written to before.
    Options: see `MergeOptions` and `merge_with_account`.
    """
    return merge_with_account(
        inputs,
        method=method,
        rank=rank,
        keep=keep,
        retain=retain,
        max_mb=max_mb,
        balanced=balanced,
        density=density,
        spread=spread,
        outliers=outliers,
        parameters=parameters,
        seed=seed,
        dense=dense,
        protect=protect,
        mu=mu,
        leave_out=leave_out,
        out_dtype=out_dtype,
        block_strengths=block_strengths,
        workers=workers,
        device=device,
        progress=progress,
        sha256=sha256,
        metadata=metadata,
        model=model,
    )[0]


@named
@uncollected()
def merge_with_account(
    inputs: Sequence[Input],
    *,
    method: str = "linear",
    rank: int = 0,
    keep: float | None = None,
    retain: float | None = None,
    max_mb: float | None = None,
    balanced: bool = False,
    density: float | None = None,
    spread: float | None = None,
    outliers: float | None = None,
    parameters: Mapping[str, float | None] | None = None,
    seed: int = 0,
    dense: bool = False,
    protect: Protect = None,
    mu: float = 0.0,
    leave_out: bool = False,
    out_dtype: torch.dtype | None = None,
    block_strengths: Blocks | Sequence[Blocks] = None,
    workers: int | None = None,
    device: str | torch.device = "cpu",
    progress: Progress | None = None,
    sha256: Hashes = (),
    metadata: Mapping[str, str] | None = None,
    model: ModelNames | None = None,
) -> tuple[Lora, Account]:
    """`merge`, and what it did to each input.

    method to out_dtype: see `MergeOptions`.
    block_strengths: factors on the strengths by block, kind of layer and pattern (naming/blocks.py), as text or parsed; one for
        all inputs or one for each.
    workers: threads that modules are shared among; None is torch.get_num_threads(). The result is the same for any.
    device: where to compute, results are on the CPU. Small matrices are as fast there.
    progress: called after each step with (steps done, steps in all), a step for each module, two where ranks are shared
        out (keep, retain, max_mb); what it raises ends the merge.
    sha256: of the inputs' files, for the provenance; a function is asked for them at the end.
    metadata: for the result, before what it keeps of its inputs' (inherit.py); an empty value keeps nothing of that name.
    model: what the model that the LoRAs are for says of their names, where these do not tell what is one weight.
    Raises ValueError without inputs, for options that are out of range or contradict one another, a strength that is not
    finite, for LoRAs that were made for different base models, and for modules that do not add up.
    """
    options = MergeOptions(
        method=method,
        rank=rank,
        keep=keep,
        retain=retain,
        max_mb=max_mb,
        balanced=balanced,
        density=density,
        spread=spread,
        outliers=outliers,
        parameters=parameters or {},
        seed=seed,
        dense=dense,
        protect=protect,
        mu=mu,
        leave_out=leave_out,
        out_dtype=out_dtype,
    )
    planned = plan(inputs, options, block_strengths, metadata, model)
    computed = compute(planned, threads=workers, device=torch.device(device), progress=progress)
    return outcome(planned, computed, list(sha256() if callable(sha256) else sha256))


@named
def resize(
    lora: Lora,
    *,
    method: str = "linear",
    rank: int = 0,
    keep: float | None = None,
    retain: float | None = None,
    max_mb: float | None = None,
    balanced: bool = False,
    density: float | None = None,
    spread: float | None = None,
    outliers: float | None = None,
    parameters: Mapping[str, float | None] | None = None,
    seed: int = 0,
    dense: bool = False,
    protect: Protect = None,
    mu: float = 0.0,
    leave_out: bool = False,
    out_dtype: torch.dtype | None = None,
    block_strengths: Blocks | Sequence[Blocks] = None,
    workers: int | None = None,
    device: str | torch.device = "cpu",
    progress: Progress | None = None,
    sha256: Hashes = (),
    metadata: Mapping[str, str] | None = None,
    model: ModelNames | None = None,
) -> Lora:
    """A smaller LoRA for the same, cut where least is lost. Its metadata stays, with the provenance added.

    Exactly one of rank, keep, max_mb (and retain, which is keep here) says how small; the others are those of `merge`.
    Raises ValueError as that does, and if nothing says how small the result is to be.
    """
    return resize_with_account(
        lora,
        method=method,
        rank=rank,
        keep=keep,
        retain=retain,
        max_mb=max_mb,
        balanced=balanced,
        density=density,
        spread=spread,
        outliers=outliers,
        parameters=parameters,
        seed=seed,
        dense=dense,
        protect=protect,
        mu=mu,
        leave_out=leave_out,
        out_dtype=out_dtype,
        block_strengths=block_strengths,
        workers=workers,
        device=device,
        progress=progress,
        sha256=sha256,
        metadata=metadata,
        model=model,
    )[0]


@named
def resize_with_account(
    lora: Lora,
    *,
    method: str = "linear",
    rank: int = 0,
    keep: float | None = None,
    retain: float | None = None,
    max_mb: float | None = None,
    balanced: bool = False,
    density: float | None = None,
    spread: float | None = None,
    outliers: float | None = None,
    parameters: Mapping[str, float | None] | None = None,
    seed: int = 0,
    dense: bool = False,
    protect: Protect = None,
    mu: float = 0.0,
    leave_out: bool = False,
    out_dtype: torch.dtype | None = None,
    block_strengths: Blocks | Sequence[Blocks] = None,
    workers: int | None = None,
    device: str | torch.device = "cpu",
    progress: Progress | None = None,
    sha256: Hashes = (),
    metadata: Mapping[str, str] | None = None,
    model: ModelNames | None = None,
) -> tuple[Lora, Account]:
    """`resize`, and what it did."""
    if not MergeOptions(rank=rank, keep=keep, retain=retain, max_mb=max_mb).cuts:
        raise ValueError("nothing says how small the result is to be. Give rank, keep or max_mb.")
    # It makes the same pictures still.
    pictures = {
        key: value
        for key, value in lora.metadata.items()
        if is_picture(key, value) and is_name(key) and not is_computed(key)
    }
    small, account = merge_with_account(
        [(lora, 1.0)],
        method=method,
        rank=rank,
        keep=keep,
        retain=retain,
        max_mb=max_mb,
        balanced=balanced,
        density=density,
        spread=spread,
        outliers=outliers,
        parameters=parameters,
        seed=seed,
        dense=dense,
        protect=protect,
        mu=mu,
        leave_out=leave_out,
        out_dtype=out_dtype,
        block_strengths=block_strengths,
        workers=workers,
        device=device,
        progress=progress,
        sha256=sha256,
        metadata={**pictures, **(metadata or {})},
        model=model,
    )
    merged_from = {MERGED_FROM: lora.metadata.get(MERGED_FROM, "")}
    return replace(small, metadata=changed(small.metadata, merged_from), source=lora.source), account
