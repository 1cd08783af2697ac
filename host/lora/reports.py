"""What the LoRA nodes say: one screen about a LoRA and what became of it, or why it was refused."""

import re
from collections.abc import Mapping, Sequence

import torch

from ...lora_merge import describe
from ...lora_merge.files.keys import unread_text
from ...lora_merge.metadata.about import describe_metadata
from ...lora_merge.recognise import catalogue
from ...lora_merge.recognise.identity import Identity
from ...samplers.preset import settings_in_words
from .case import Case
from .halves import about_halves
from .identity import identity_of, preset_of
from .weights import named, to_lora

SHOWN = 5
# A module with the number of its block.
_NUMBERED = re.compile(r"(.+?[._])(\d+)([._].+)")
_END = "Setting wrong_base to warn applies what fits all the same."


def contents(weights: Mapping[str, torch.Tensor]) -> str:
    """What is in a LORA_MODEL and what it is, in a few lines."""
    weights = named(weights)
    identity = identity_of(weights)
    lines = [describe(to_lora(weights)), *describe_metadata(weights.metadata)]
    if identity is not None:
        lines += [f"  {line}" for line in _what(identity)]
        lines += [f"  {line}" for line in _counts(identity)]
    return "\n".join(lines)


def applied_lines(
    case: Case, strength_model: float, strength_clip: float, clip, *, wrong: bool, for_sampling: bool = False
) -> list[str]:
    """What was applied, what was not, and how to sample with it.

    for_sampling: whether settings are expected of it, so that it is said where there are none.
    """
    found = case.found
    strength = f"{strength_model:g}" if clip is None else f"{strength_model:g} (text encoder {strength_clip:g})"
    lines = [f"{case.name}: {len(found.placed)} of {case.counts.asked} modules applied at strength {strength}."]
    if case.identity is not None:
        lines += _what(case.identity, case.model.words, for_sampling)
        lines += _counts(case.identity)
    elif for_sampling:
        lines.append(_no_settings(None))
    lines += about_halves(case)
    if wrong:
        lines.append(f"Warning: {_why(case) or 'it was made for another base model'}; pictures may be spoilt.")
    elif case.accelerates and case.left:
        lines.append(f"{len(case.left)} of the model's {case.could} modules of these kinds are not changed by it.")
    if found.waiting:
        lines.append(f"{len(found.waiting)} text-encoder modules not applied: no CLIP is connected.")
    for branch, modules in case.absent.items():
        lines.append(
            f"{len(modules)} belong to the {branch}, which this model is made without, and are left out: "
            f"{', '.join(counted(modules))}."
        )
    for what, modules in (
        ("have no place in this model", case.homeless),
        ("have another shape than this model's weights", found.clashing),
        ("pairs name one weight twice, and one of the two is left out", found.twice),
    ):
        if modules:
            names = counted(modules)
            more = f" and {len(names) - SHOWN} more" if len(names) > SHOWN else ""
            lines.append(f"{len(modules)} {what}: {', '.join(names[:SHOWN])}{more}.")
    if found.unread:
        lines.append(f"Without effect in ComfyUI: {unread_text(found.unread)}.")
    return lines


def refusal(case: Case) -> str:
    """Why a LoRA is not applied: what it is, what the model is, the counts, and which file to use instead."""
    name, found = case.name, case.found
    if found.waiting and not found.asked:
        return f"{name} changes the text encoder only ({len(found.waiting)} modules). Connect a CLIP."
    if not found.asked:
        return f"{name} is empty. Use another LoRA."
    if case.absent and not case.counts.asked:
        return (
            f"{name} changes nothing but the {' and the '.join(case.absent)}, which this model is made without. {_END}"
        )
    if found.twice and not case.counts.foreign and not case.other_base:
        return _names_twice(name, found.twice)
    identity = case.identity
    counts = ", ".join(filter(None, [f"of its {case.counts.asked} modules {len(found.placed)} fit", _why(case)]))
    if identity is None or not identity.bases:
        return (
            f"{name} does not fit this model ({case.model.config}): {counts}. It was made for another base model; use "
            f"the LoRA for this one, or load the checkpoint family it was made for. {_END}"
        )
    # "LCM-LoRA SDXL" says for what it is
    made_for = " or ".join(identity.bases)
    kind = (
        identity.published.name if identity.published else f"{_article(identity.kind)} {identity.kind} for {made_for}"
    )
    fast = case.accelerates or identity.published is not None
    other = case.model.base and fast and catalogue.instead(case.model.base, identity.preset)
    checkpoint = f"load {_article(made_for)} {made_for} checkpoint"
    way_out = (
        f"Use {other.name} ({other.link}, {other.file}), or {checkpoint}"
        if other
        else f"It was made for another base model; use the LoRA for this one, or {checkpoint}"
    )
    return (
        f"{name} does not fit this model ({case.model.config}): it is {kind}, and the model is {case.model.words}. "
        f"{way_out}. {counts[0].upper()}{counts[1:]}. {_END}"
    )


def _names_twice(name: str, pairs: Sequence[str]) -> str:
    more = f", and {len(pairs) - 1} pairs more" if len(pairs) > 1 else ""
    return (
        f"{name} names a weight twice: {pairs[0]}{more}; ComfyUI would use only one of the two updates. If it was merged "
        "from LoRAs of two spellings, apply those one after the other, or merge them again from files of one spelling. "
        "Setting wrong_base to warn applies one of each pair."
    )


def _why(case: Case) -> str:
    """What does not fit, in numbers; with the first of each where nothing else says what went wrong."""
    found, known = case.found, case.other_base
    reasons = []
    for modules, words in (
        (case.homeless, "have no place in it"),
        (found.clashing, "have another shape"),
        (found.twice, "pairs of them name a weight twice"),
    ):
        if modules:
            reasons.append(f"{len(modules)} {words}" + ("" if known else f" (the first: {modules[0]})"))
    if case.left and (known or not reasons):
        first = "" if known else f" (the first: {case.left[0]})"
        reasons.append(
            f"{len(case.left)} of the model's {case.could} modules of these kinds are left without it{first}"
        )
    return ", ".join(reasons)


def _what(identity: Identity, model: str | None = None, for_sampling: bool = False) -> list[str]:
    lines = [f"It is: {identity.kind}, {identity.sure}."]
    if identity.bases or model:
        beside = f", this model: {model}" if model else ""
        branches = identity.structure.recognised.branches
        with_branches = f" (with {' and '.join(branches)})" if branches else ""
        lines.append(f"Made for: {' or '.join(identity.bases) or 'not known'}{with_branches}{beside}.")
    if (preset := preset_of(identity)) is not None:
        lines.append(f"Settings ({preset.name}): LCM KSampler, {settings_in_words(preset)}.")
    elif for_sampling or identity.preset or identity.structure.accelerates:
        lines.append(_no_settings(identity))
    return lines


def _no_settings(identity: Identity | None) -> str:
    """Whatever is not known gets no settings: those of another method would spoil pictures and look like an answer."""
    end = "no preset, steps or cfg are given. Set them as the LoRA's page says."
    if identity is None:
        return f"No acceleration LoRA recognised: {end}"
    if identity.preset:
        steps = (
            f"is for {identity.published.steps} steps" if identity.published and identity.published.steps else "is one"
        )
        return f"It {steps}, but its settings ({identity.preset}) are none of those known here: {end}"
    if identity.structure.accelerates:
        return f"It changes what acceleration LoRAs change, but which one it is is not known: {end}"
    if identity.looks_like:
        return f"Its name says {identity.looks_like}, but it is none of the files known here: {end}"
    return f"No acceleration LoRA recognised: {end}"


def counted(modules: Sequence[str]) -> list[str]:
    """Names of modules, those of one place in several blocks once: "blocks.0-39.cross_attn.k_img"."""
    numbers: dict[tuple[str, str], list[int]] = {}
    for module in modules:
        match = _NUMBERED.fullmatch(module)
        numbers.setdefault((match[1], match[3]) if match else (module, ""), []).append(int(match[2]) if match else -1)
    return [
        before if found == [-1] else f"{before}{_ranges(found)}{behind}" for (before, behind), found in numbers.items()
    ]


def _ranges(numbers: Sequence[int]) -> str:
    parts: list[list[int]] = []
    for number in sorted(numbers):
        if parts and number == parts[-1][-1] + 1:
            parts[-1].append(number)
        else:
            parts.append([number])
    return ",".join(str(run[0]) if len(run) == 1 else f"{run[0]}-{run[-1]}" for run in parts)


def _counts(identity: Identity) -> list[str]:
    facts = identity.structure
    parts = [f"parameters {facts.parameters:,}"]
    if facts.ranks and facts.scales:
        alpha = f"alpha {_span(facts.alphas)}" if facts.alphas else "no alpha"
        parts = [f"rank {_span(facts.ranks)}", alpha, f"effective scale {_span(facts.scales)}", *parts]
    line = ", ".join(parts)
    return [f"{line[0].upper()}{line[1:]}."]


def _span(pair: tuple[float, float]) -> str:
    low, high = pair
    return f"{low:g}" if low == high else f"{low:g} to {high:g}"


def _article(word: str) -> str:
    """Names in capitals are spelt out: an S-D, an L-C-M."""
    return "an" if word.startswith(("SD", "SSD", "LCM")) else "a"
