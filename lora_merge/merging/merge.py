"""The merge of whole LoRAs: which modules meet, what becomes of each, and the account of it."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import closing
from dataclasses import replace
from functools import partial
from itertools import count

import torch

from ..algebra.precision import cast_part, rounding
from ..algebra.ranks import alike
from ..algebra.threads import in_order
from ..files.lora import Lora
from ..files.metadata import ARCHITECTURE, MERGED_FROM, PROVENANCE_KEY, changed, given, is_computed, is_name
from ..keywords import named
from ..naming import names
from ..naming.aliases import is_foreign
from ..recognise.identity import architecture_of
from ..updates.layer import Layer, LoraLayer
from .account import Account, Finished, Source, Tally, account_of
from .align import fused_notes, fused_with_slices, notes_on, unify
from .differences import Diffs, bias_sums, dense_modules
from .inherit import inherited, is_picture, size_of
from .module import Engine
from .options import MergeOptions, Protect
from .passthrough import refusal, sort_carried
from .protect import protected_input
from .provenance import to_json
from .sizes import numbers_within
from .strengths import Blocks, Strengths, strengths_of
from .unshared import allocate_around

__all__ = ["Account", "Input", "Progress", "Source", "merge", "merge_with_account", "resize", "resize_with_account"]

Input = tuple[Lora, float]
Progress = Callable[[int, int], None]
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
    )[0]


@named
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
        seed=seed,
        dense=dense,
        protect=protect,
        mu=mu,
        leave_out=leave_out,
        out_dtype=out_dtype,
    )
    options.check(len(inputs))
    wanted = given(metadata)
    loras = unify([lora for lora, _ in inputs])
    strengths = strengths_of(loras, [strength for _, strength in inputs], block_strengths)
    sharing = [lora for index, lora in enumerate(loras) if _has_part(lora, index, strengths)]
    kept, warnings = inherited(sharing)
    notes = changed(kept, wanted)
    warnings += notes_on(loras)
    if options.the_method.combine is not None or options.mu:
        warnings += fused_notes(fused_with_slices(loras), loras)
    if options.protect == "auto":
        options = replace(options, protect=protected_input(loras, strengths.base))
        if options.protect is None and options.mu:
            warnings.append("no input is recognised as an acceleration LoRA, so nobody is protected and mu did nothing")
    passing = sort_carried(loras, strengths)
    if passing.refused and not options.leave_out:
        raise ValueError(refusal(loras, passing))
    whole = dense_modules(loras)
    # What meets an update that is passed through has strength 0.
    in_all = dict.fromkeys([*(module for lora in loras for module in lora.modules), *whole])
    modules = [module for module in in_all if module not in passing.updates]
    _check_signs(options, strengths, modules)

    spellings = _spellings(loras)
    engine = Engine(loras, strengths, options, whole, torch.device(device))
    threads = torch.get_num_threads() if workers is None else max(1, workers)
    steps = _Steps(progress, len(modules))
    sums = bias_sums(loras, strengths, {m for m in whole if m not in passing.updates and _is_norm(loras, m)})
    biases = {key: cast_part(diff, options.out_dtype, copy=False) for key, diff in sums.items()}
    ranks: Mapping[str, int] = {}
    if options.aim is not None:
        low_rank = [module for module in modules if module not in whole]
        fixed = numbers_within(options, loras, modules, passing.updates, spellings, biases, size_of(notes))
        ranks = _allocated(engine, options, low_rank, threads, steps, fixed)

    layers: dict[str, Layer] = {}
    diffs: Diffs = {}
    tally = Tally(len(loras))
    for (module, part), diff in biases.items():
        tally.add_rounding(module, rounding(sums[module, part], diff))
    finish = partial(_finish, engine, ranks, options.rank)
    with closing(in_order(finish, modules, threads)) as results:
        for done in results:
            if done.layer is not None:
                layers[done.module] = done.layer
            elif done.diff is not None:
                part, diff = done.diff
                diffs[done.module, part] = diff
            tally.add(done, done.layer.rank if isinstance(done.layer, LoraLayer) else None)
            steps.done()
    diffs |= biases
    digests = list(sha256() if callable(sha256) else sha256)
    digests += [None] * (len(loras) - len(digests))
    account = account_of(loras, strengths, options, tally, len(modules), passing, digests, warnings)
    used = layers.keys() | passing.updates.keys() | {module for module, _ in diffs}
    spellings = {module: spelling for module, spelling in spellings.items() if module in used}
    title = " + ".join(f"{lora.source} * {strength:g}" for lora, strength in zip(loras, strengths.base, strict=True))
    notes |= {PROVENANCE_KEY: to_json(account), MERGED_FROM: ", ".join(lora.source for lora in sharing or loras)}
    merged = Lora(layers, diffs, names.tidy(spellings), notes, title, passing.updates)
    if ARCHITECTURE not in notes and ARCHITECTURE not in wanted and (architecture := architecture_of(merged)):
        merged = replace(merged, metadata=notes | {ARCHITECTURE: architecture})
    return merged, account


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
    )
    merged_from = {MERGED_FROM: lora.metadata.get(MERGED_FROM, "")}
    return replace(small, metadata=changed(small.metadata, merged_from), source=lora.source), account


def _has_part(lora: Lora, index: int, strengths: Strengths) -> bool:
    """Whether anything of the input is in the sum."""
    return any(strengths.at(module)[index] != 0 for module in lora.spellings)


def _finish(engine: Engine, ranks: Mapping[str, int], rank: int, module: str) -> Finished:
    return engine.finish(module, ranks.get(module, rank))


def _allocated(
    engine: Engine, options: MergeOptions, modules: Sequence[str], threads: int, steps: _Steps, parameters: int | None
) -> dict[str, int]:
    """The first of two passes: ranks by what each would keep. Directions are computed anew in the second, since keeping
    those of all modules would take as much memory as the inputs in float32."""
    steps.more(len(modules))
    prospects = {}
    with closing(in_order(engine.prospect, modules, threads)) as results:
        for module, prospect in zip(modules, results, strict=True):
            prospects[module] = prospect
            steps.done()
    if options.balanced:
        prospects = alike(prospects)
    whole = {module: layer for module in modules if (layer := engine.unshared(module)) is not None}
    return allocate_around(whole, prospects, keep=options.keep, retain=options.retain, parameters=parameters)


class _Steps:
    """Counts steps for whoever watches."""

    def __init__(self, progress: Progress | None, total: int):
        self.progress = progress
        self.total = total
        self.counter = count(1)

    def more(self, steps: int) -> None:
        self.total += steps

    def done(self) -> None:
        number = next(self.counter)
        if self.progress is not None:
            self.progress(number, self.total)


def _check_signs(options: MergeOptions, strengths: Strengths, modules: Iterable[str]) -> None:
    if options.the_method.signed:
        return
    for module in modules:
        lowest = min(strengths.at(module))
        if lowest < 0:
            raise ValueError(
                f"{module}: strength is {lowest:g}, but method {options.method} goes from one LoRA to another and takes "
                "no negative strength. Choose another method, such as linear."
            )


def _spellings(loras: Sequence[Lora]) -> dict[str, str]:
    """The first input's spelling of each module; a later one with dots where ComfyUI knows the name by its dots only."""
    spellings: dict[str, str] = {}
    for lora in loras:
        for module, spelling in lora.spellings.items():
            known = spellings.setdefault(module, spelling)
            if known.startswith("lora_unet_") and spelling.startswith("diffusion_model.") and is_foreign(module):
                spellings[module] = spelling
    return spellings


def _is_norm(loras: Sequence[Lora], module: str) -> bool:
    """Whether the weight's difference is a norm's everywhere."""
    parts = {part for lora in loras for part in ("diff", "w_norm") if (module, part) in lora.diffs}
    return parts == {"w_norm"} and not any(module in lora.modules for lora in loras)
