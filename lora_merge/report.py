"""What people read about a LoRA or a merge."""

from __future__ import annotations

from collections import Counter

import torch

from .lora import Lora
from .merging import Account


def describe(lora: Lora) -> str:
    """A few lines about one LoRA: modules by part of the model, ranks, scales, size."""
    parts = Counter(_part(module) for module in lora.spellings)
    ranks = [layer.rank for layer in lora.modules.values()]
    scales = [layer.scale for layer in lora.modules.values()]
    lines = [
        lora.source,
        f"  modules: {len(lora.spellings)} ({', '.join(f'{part} {count}' for part, count in sorted(parts.items()))})",
    ]
    if ranks:
        lines.append(
            f"  rank: {_span(min(ranks), max(ranks))}, scale (alpha / rank): {_span(min(scales), max(scales))}"
        )
    if set(lora.kinds) - {"LoRA"}:
        lines.append(f"  kinds: {', '.join(f'{kind} {count}' for kind, count in lora.kinds.items())}")
    if lora.carried:
        lines.append(f"  {len(lora.carried)} of them depend on the weight they change: they load, and do not merge")
    if lora.diffs:
        lines.append(f"  weight and bias differences: {len(lora.diffs)}")
    lines.append(f"  size: {size_text(lora, torch.float16)} in float16")
    return "\n".join(lines)


def describe_merge(account: Account, merged: Lora) -> str:
    """What went into a merge, what came out, and what each input lost."""
    lines = [f"Merged {len(account.sources)} LoRAs, method {account.method}:"]
    for source in account.sources:
        facts = [f"{source.modules} modules"]
        if len(account.sources) > 1:
            facts.append(f"{source.modules - source.only_here} shared, {source.only_here} only here")
        if source.ranks and source.alphas:
            facts.append(f"rank {_span(*source.ranks)}, alpha {_span(*source.alphas)}")
        if source.diffs:
            facts.append(f"{source.diffs} weight or bias differences")
        if source.merged < source.modules:
            facts.append(f"{source.merged} merged")
        if source.passed_through:
            facts.append(f"{source.passed_through} passed through as they are")
        if source.refused:
            facts.append(f"{source.refused} refused and left out")
        lines.append(f"  {source.name} * {source.strength:g}: {', '.join(facts)}")
    ranks = [layer.rank for layer in merged.modules.values()]
    rank = f", rank {_span(min(ranks), max(ranks))}" if ranks else ""
    lines.append(f"Result: {len(merged.spellings)} modules{rank}, {size_text(merged, torch.float16)} in float16")
    if account.cut_modules == 0:
        lines.append("Exact: no module was cut.")
    else:
        lines.append(
            f"Cut to rank {account.rank} in {account.cut_modules} of {account.modules} modules; "
            f"relative error {account.relative_error:.3g}. Left of each input's energy:"
        )
        for source in account.sources:
            left = "nothing was there" if source.retention is None else f"{100 * source.retention:.1f} %"
            lines.append(f"  {source.name}: {left}")
    if len(account.sources) > 1 and all(source.only_here == source.modules for source in account.sources):
        lines.append("Note: the inputs share no module. They may be made for different base models.")
    if any(source.strength == 0 for source in account.sources):
        lines.append("Note: an input of strength 0 adds nothing.")
    return "\n".join(lines)


def size_text(lora: Lora, dtype: torch.dtype) -> str:
    """Size of the weights in a dtype, in MB of 10**6 bytes."""
    return f"{lora.parameters * dtype.itemsize / 1e6:.1f} MB"


def _part(module: str) -> str:
    if module.startswith("lora_unet_") or module.startswith("lora_transformer_"):
        return "diffusion model"
    return f"text encoder {module[7]}" if module.startswith("lora_te") and module[7:8].isdigit() else "other"


def _span(low: float, high: float) -> str:
    return f"{low:g}" if low == high else f"{low:g} to {high:g}"
