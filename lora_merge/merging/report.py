"""What people read about a LoRA or a merge."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from math import prod

import torch

from ..files.keys import unread_text
from ..files.lora import Lora, too_small
from ..files.twice import Pair, pairs_text
from ..metadata.adapter_config import OfPeft, of_peft
from ..metadata.report import in_words, peft_remarks, shown
from ..methods.table import METHODS, Parameter
from ..settings.options import MergeOptions
from ..updates.layer import Layer, LoraLayer
from ..words import many
from .account import Account, Source
from .provenance import recipe_of

_INPUTS = 50
# An effect below these is worth a warning: for the protected LoRA, and for any other.
_AS_IT_IS, _HALF = 0.99, 0.5
_NOBODY = "no input is recognised as an acceleration LoRA, so no LoRA is protected and mu has no effect"


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
        lines.append(f"  kinds: {_kinds(lora)}")
    if lora.carried:
        lines.append(f"  {_depending(len(lora.carried))}")
    if lora.diffs:
        lines.append(f"  weight and bias differences: {len(lora.diffs)}")
    if lora.keys.unread:
        lines.append(f"  without effect in ComfyUI: {unread_text(lora.keys.unread)}")
    lines += [f"  note: {remark}" for remark in peft_remarks(of_peft(lora.metadata))]
    lines.append(f"  size: {size_text(lora, torch.float16)} in float16")
    return "\n".join(lines)


def describe_merge(account: Account, merged: Lora) -> str:
    """What went into a merge, what came out, and what each input lost."""
    one = len(account.sources) == 1
    head = f"Merged {many(len(account.sources), 'LoRAs')}, method {account.method}"
    lines = [f"{'Made from one LoRA' if one else head}{_choices(account)}:"]
    lines += [f"  {source.name} * {source.strength:g}: {', '.join(_facts(source, one))}" for source in account.sources]
    lines.append(_result(account, merged))
    lines += _staying(merged)
    lines += _method_lines(account) + _cut_lines(account)
    if account.rebalanced:
        lines.append(
            f"Factors of {many(account.rebalanced, 'modules')} balanced to fit float16; their updates are the same."
        )
    if not one and all(source.only_here == source.modules for source in account.sources):
        lines.append("Note: the inputs share no module. They may be made for different base models.")
    if any(source.strength == 0 for source in account.sources):
        lines.append("Note: an input of strength 0 adds nothing.")
    lines += [f"Warning: {one}." if one[-1] != "." else f"Warning: {one}" for one in warnings_of(account)]
    return "\n".join(lines)


def _depending(count: int) -> str:
    return many(
        count,
        "of them depend on the weight they change: they load, and do not merge",
        "of them depends on the weight it changes: it loads, and does not merge",
    )


def _choices(account: Account) -> str:
    options = account.options
    chosen = [f"{name} {value:g}" for name, value in options.values.items()]
    chosen += ["on whole updates"] if options.dense and options.the_method.entrywise else []
    chosen += [f"seed {options.seed}"] if options.seed and options.the_method.draws else []
    return f" ({', '.join(chosen)})" if chosen else ""


def _facts(source: Source, one: bool) -> list[str]:
    facts = [many(source.modules, "modules")]
    if not one:
        facts.append(f"{source.modules - source.only_here} shared, {source.only_here} only here")
    if source.ranks and source.alphas:
        facts.append(f"rank {_span(*source.ranks)}, alpha {_span(*source.alphas)}")
    if source.diffs:
        facts.append(many(source.diffs, "weight or bias differences"))
    if source.merged < source.modules:
        facts.append(f"{source.merged} merged")
    if source.passed_through:
        facts.append(many(source.passed_through, "passed through as they are", "passed through as it is"))
    if source.refused:
        facts.append(f"{source.refused} refused and left out")
    if source.block_strengths:
        facts.append(f"times {source.block_strengths}")
    if source.protected:
        facts.append("protected")
    return facts


def _result(account: Account, merged: Lora) -> str:
    ranks = [layer.rank for layer in merged.modules.values() if isinstance(layer, LoraLayer)]
    rank = f", rank {_span(min(ranks), max(ranks))}" if ranks else ""
    if account.options.aim and account.ranks and account.ranks[0] != account.ranks[2]:
        rank += f" (median {account.ranks[1]:g})"
    kinds = f" ({_kinds(merged)})" if set(merged.kinds) - {"LoRA"} else ""
    return (
        f"Result: {many(len(merged.spellings), 'modules')}{kinds}{rank}, {size_text(merged, torch.float16)} in float16"
    )


def _kinds(lora: Lora) -> str:
    return ", ".join(f"{kind} {count}" for kind, count in lora.kinds.items())


def _staying(merged: Lora) -> list[str]:
    """Modules that are no LoRA factors and need none."""
    staying = [layer for layer in merged.modules.values() if not isinstance(layer, LoraLayer)]
    if not staying:
        return []
    kinds = " and ".join(sorted({layer.kind for layer in staying}))
    expanded = sum(layer.rank * (layer.shape[0] + prod(layer.shape[1:])) for layer in staying)
    return [
        f"{many(len(staying), 'modules that no other input changes stay', 'module that no other input changes stays')} {kinds}: {_megabytes(staying)} in float16, as LoRA "
        f"{expanded * 2 / 1e6:.1f} MB."
    ]


def _megabytes(layers: Sequence[Layer]) -> str:
    return f"{sum(layer.parameters for layer in layers) * 2 / 1e6:.1f} MB"


def _method_lines(account: Account) -> list[str]:
    """What the method and the protection left of each input."""
    lines = []
    if account.options.the_method.combine is not None:
        lines.append("Effect of each input in the result, 100 % being strength * LoRA as it is:")
        for source in account.sources:
            lines.append(f"  {source.name}: {'no update' if source.effect is None else f'{100 * source.effect:.1f} %'}")
    if account.options.the_method.averages:
        total = sum(source.strength for source in account.sources)
        lines.append(f"The mean of the LoRAs: each strength is a weight, divided by their sum, {total:g}.")
    protected = account.options.protect
    if account.options.mu and isinstance(protected, int):
        left = [
            f"{source.name} keeps {100 * source.stepped_aside:.1f} % of its energy there"
            for source in account.sources
            if not source.protected
        ]
        lines.append(f"Made room for {account.sources[protected].name}, mu {account.options.mu:g}: {', '.join(left)}.")
    return lines


def _cut_lines(account: Account) -> list[str]:
    linear = account.options.the_method.combine is None
    if account.cut_modules == 0:
        exact = linear and not account.options.mu
        return ["Exact: no module was cut." if exact else "No module was cut."]
    options = account.options
    aims = {
        "keep": lambda: f"to keep {100 * (options.keep or 0):g} % of the energy",
        "retain": lambda: f"so that each input keeps {100 * (options.retain or 0):g} % of its energy",
        "max_mb": lambda: f"to {options.max_mb:g} MB",
    }
    how = aims[options.aim]() if options.aim else f"to rank {account.rank}"
    balanced = ", every input counting alike" if options.balanced else ""
    lines = [
        f"Cut {how} in {account.cut_modules} of {many(account.modules, 'modules')}{balanced}; "
        f"relative error {account.relative_error:.3g}. Left of each input's energy:"
    ]
    for source in account.sources:
        left = "nothing was there" if source.retention is None else f"{100 * source.retention:.1f} %"
        lines.append(f"  {source.name}: {left}")
    return lines


def describe_provenance(lora: Lora) -> list[str]:
    """What a file says of how it was made, in lines; none where it says nothing that can be read."""
    try:
        recipe = recipe_of(lora.metadata, lora.source)
    except ValueError:
        return []
    default = MergeOptions().to_dict()
    chosen = {name: value for name, value in recipe.options.to_dict().items() if value != default[name]}
    lines = [f"  made from: {', '.join(f'{name} {value}' for name, value in chosen.items()) or 'the exact sum'}"]
    for entry in recipe.inputs[:_INPUTS]:
        blocks = f", times {shown(entry.block_strengths)}" if entry.block_strengths else ""
        lines.append(f"    {shown(entry.name)} * {entry.strength:g}{blocks}, sha256 {shown(entry.sha256 or 'unknown')}")
    if (more := len(recipe.inputs) - _INPUTS) > 0:
        lines.append(f"    and {more} more")
    return lines


def size_text(lora: Lora, dtype: torch.dtype) -> str:
    """Size of the weights in a dtype, in MB of 10**6 bytes."""
    return f"{lora.parameters * dtype.itemsize / 1e6:.1f} MB"


def _part(module: str) -> str:
    if module.startswith("lora_unet_") or module.startswith("lora_transformer_"):
        return "diffusion model"
    return f"text encoder {module[7]}" if module.startswith("lora_te") and module[7:8].isdigit() else "other"


def _span(low: float, high: float) -> str:
    return f"{low:g}" if low == high else f"{low:g} to {high:g}"


def warnings_of(account: Account) -> tuple[str, ...]:
    """What a user should know of a merge besides its numbers: of the inputs first, then of what became of them."""
    options, sources = account.options, account.sources
    return (
        *map(in_words, account.notes),
        *notes_on((source.name, source.unread, source.peft) for source in sources),
        *fused_notes(account.fused, [source.name for source in sources]),
        *([_NOBODY] if account.protects_nobody else []),
        *([too_small(account.too_small, options.out_dtype)] if account.too_small else []),
        *_idle(options),
        *_scaled_protection(sources, options),
        *_lost(sources, options),
    )


def fused_notes(pairs: Sequence[Pair], names: Sequence[str]) -> list[str]:
    """What to say about them where modules that meet are looked at together; nothing without pairs. names: of the inputs."""
    if not pairs:
        return []
    shown = pairs_text(pairs, names)
    return [f"a weight as a whole and a slice of it do not meet here, each goes its own way: {shown}"]


def notes_on(inputs: Iterable[tuple[str, Sequence[str], OfPeft]]) -> list[str]:
    """Sentences about the inputs for a report, each (name, keys without effect, how PEFT made it)."""
    inputs = list(inputs)
    idle = [
        f"{name} holds what has no effect in ComfyUI and is left out: {unread_text(unread)}"
        for name, unread, _ in inputs
        if unread
    ]
    return idle + [f"{name}: {remark}" for name, _, peft in inputs for remark in peft_remarks(peft)]


def _scaled_protection(sources: Sequence[Source], options: MergeOptions) -> list[str]:
    *others, last = [name for name, method in METHODS.items() if not method.scales_down]
    return [
        f"method {options.method} scales down what it merges: about {100 * (source.effect or 0):.0f} % is left of "
        f"{source.name}, which is protected. {', '.join(others)} and {last} keep it."
        for source in sources
        if source.protected and options.the_method.scales_down and (source.effect or 0) < _AS_IT_IS
    ]


def _idle(options: MergeOptions) -> list[str]:
    method, values = options.the_method, options.values
    name = method.neutral(values)
    if name is None or not method.is_sum(values):
        return []
    return [
        f"{name} is {values[name]:g}, at which method {options.method} prunes nothing: this is the plain sum. "
        f"Choose a {_away(method.parameters[name])} {name}."
    ]


def _away(parameter: Parameter) -> str:
    """Which way from the neutral value the others are."""
    return "lower" if parameter.neutral == parameter.high else "higher"


def _lost(sources: Sequence[Source], options: MergeOptions) -> list[str]:
    """Inputs of which the method or the cut has left less than half."""
    gentler = [
        f"a {'higher' if _away(parameter) == 'lower' else 'lower'} {name}, or "
        for name, parameter in options.the_method.parameters.items()
        if parameter.neutral is not None
    ]
    result = []
    for source in sources:
        warned = source.protected and options.the_method.scales_down
        if source.effect is not None and source.effect < _HALF and not warned:
            result.append(
                f"method {options.method} leaves about {100 * max(0.0, source.effect):.0f} % of {source.name}. Choose "
                f"{''.join(gentler)}another method such as linear."
            )
        if options.cuts and source.retention is not None and source.retention < _HALF:
            result.append(
                f"the cut leaves {100 * source.retention:.0f} % of the energy of {source.name}. Choose a higher rank, or "
                "retain or balanced, which look after the weaker LoRA."
            )
    return result
