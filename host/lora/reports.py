"""What the LoRA nodes say: one screen about a LoRA and what became of it, or why it was refused."""

from collections.abc import Mapping, Sequence

import torch

from ...lora_merge import describe
from ...lora_merge.files.keys import unread_text
from ...lora_merge.metadata.adapter_config import of_peft
from ...lora_merge.metadata.report import describe_metadata, peft_remarks, remarks
from ...lora_merge.recognise import catalogue
from ...lora_merge.recognise.identity import How, Identity
from ...lora_merge.words import counted, many
from ...samplers.preset_words import settings_in_words
from .case import Case
from .fit import Clash
from .identity import identity_of, preset_of
from .weights import named, to_lora

SHOWN = 5
_SURE: dict[How, str] = {
    "sha256": "certainly: by sha256, it is the published file byte for byte",
    "structure": "very likely: by structure, its modules, rank, alpha and size; LoRAs of the same training script look alike",
    "metadata": "likely: by metadata, the file says so",
    "unknown": "not known by sha256, structure or metadata",
}
# Where it stands which half of a model a LoRA is for; elsewhere it is a field of the metadata.
_WHERE = {"sha256": "its sha256", "file name": "its file name"}
# Of what does not fit, in the order of _misfits, many and one.
_LEFT_OUT = (
    ("have no place in this model", "has no place in this model"),
    ("have another shape than this model's weights", "has another shape than this model's weight"),
    ("pairs name one weight twice, and one of the two is left out", "pair names one weight twice, and one of the two is left out"),
)  # fmt: skip
_WHY = (
    ("have no place in it", "has no place in it"),
    ("have another shape", "has another shape"),
    ("pairs of them name a weight twice", "pair of them names a weight twice"),
)
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
    lines = [
        f"{case.name}: {len(found.placed)} of {many(case.counts.asked, 'modules')} applied at strength {strength}."
    ]
    if case.identity is not None:
        lines += _what(case.identity, case.model.words, for_sampling)
        lines += _counts(case.identity)
    elif for_sampling:
        lines.append(_no_settings(None))
    lines += _halves(case)
    if wrong:
        lines.append(f"Warning: {_why(case) or 'it was made for another base model'}; pictures may be spoilt.")
    elif case.accelerates and case.left:
        lines.append(
            f"{len(case.left)} of the model's {many(case.could, 'modules')} of these kinds {_be(case.left)} not changed by it."
        )
    if found.waiting:
        lines.append(f"{many(len(found.waiting), 'text-encoder modules')} not applied: no CLIP is connected.")
    for branch, modules in case.absent.items():
        lines.append(
            f"{many(len(modules), 'belong', 'belongs')} to the {branch}, which this model is made without, and {_be(modules)} left out: "
            f"{', '.join(counted(modules))}."
        )
    for what, modules in zip(_LEFT_OUT, _misfits(case), strict=True):
        if modules:
            names = counted(modules)
            more = f" and {len(names) - SHOWN} more" if len(names) > SHOWN else ""
            lines.append(f"{many(len(modules), *what)}: {', '.join(names[:SHOWN])}{more}.")
    if found.unread:
        lines.append(f"Without effect in ComfyUI: {unread_text(found.unread)}.")
    return lines


def not_applied(name: str) -> str:
    return f"{name}: not applied, its strength is 0."


def metadata_lines(metadata: Mapping[str, str]) -> list[str]:
    """What of a file's metadata could not be read, and where ComfyUI's reading of a file of PEFT's is not PEFT's."""
    return [*remarks(metadata), *(f"Note: {remark}." for remark in peft_remarks(of_peft(metadata)))]


def by_step_lines(case: Case, frames: Sequence[tuple[float, float]]) -> list[str]:
    """frames: (share of the schedule, strength that holds from there)."""
    told = ", ".join(
        f"{strength:g} {f'from {100 * start:.0f} %' if start else 'at first'}" for start, strength in frames
    )
    fitting = f"{len(case.found.placed)} of {many(case.counts.asked, 'modules')}"
    return [
        f"{case.name}: {fitting} at strength {told} of the schedule.",
        *applied_lines(case, 1.0, 1.0, None, wrong=False)[1:],
    ]


def in_few_words(case: Case, wrong: bool) -> str:
    """What a LoRA is, beside its name."""
    identity = case.identity
    if wrong:
        return f"wrong base, made for {' or '.join(case.bases) or 'another model'}, this model is {case.model.words}"
    if identity is None:
        return "of an unknown kind, applied as ComfyUI reads it"
    if identity.preset is None and not case.accelerates:
        return "style"
    if identity.preset is None:
        return "changes all that acceleration LoRAs change, and nothing says whether it is one"
    return f"{identity.kind}, ok"


def refusal(case: Case) -> str:
    """Why a LoRA is not applied: what it is, what the model is, the counts, and which file to use instead."""
    name, found = case.name, case.found
    if found.waiting and not found.asked:
        return f"{name} changes the text encoder only ({many(len(found.waiting), 'modules')}). Connect a CLIP."
    if not found.asked:
        return f"{name} is empty. Use another LoRA."
    if case.absent and not case.counts.asked:
        return (
            f"{name} changes nothing but the {' and the '.join(case.absent)}, which this model is made without. {_END}"
        )
    if found.twice and not case.counts.foreign and not case.other_base:
        return _names_twice(name, list(map(" and ".join, found.twice)))
    identity = case.identity
    counts = ", ".join(
        filter(
            None, [f"of its {many(case.counts.asked, 'modules')} {many(len(found.placed), 'fit', 'fits')}", _why(case)]
        )
    )
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


def _halves(case: Case) -> list[str]:
    """A line for a LoRA that is for one half of a model in two, [] for any other.

    Both halves of Wan 2.2's A14B models have the same weights' names and shapes, and so have their LoRAs: only names and
    published hashes tell one from the other. None is refused: names may be wrong.
    """
    half = case.identity.expert if case.identity else None
    if half is None or case.model.make is None or "Wan" not in case.model.make.name:
        return []
    said = f"It is for the {half.expert}-noise half of Wan 2.2, by {_WHERE.get(half.source, f'its metadata {half.source}')}"
    if case.model.expert is None:
        return [
            f"{said}. Nothing says which half this model is{_in_file(case)}: see that it is the {half.expert}-noise one."
        ]
    if case.model.expert == half.expert:
        return [f"{said}, and this model is that half by its file name{_in_file(case)}."]
    return [
        f"Warning: {said}, but this model is the {case.model.expert}-noise half by its file name{_in_file(case)}. It is applied "
        "all the same; if the two LoRAs were swapped, swap them back."
    ]


def _in_file(case: Case) -> str:
    return f" ({case.model.file})" if case.model.file else ""


def chosen_lines(name: str, identity: Identity, count: int, others: Mapping[str, Identity]) -> list[str]:
    """Which of `count` files `auto` has taken, and the others that fit."""
    lines = [f"auto: {name} is the one for this model among {many(count, 'files')}, {_SURE[identity.how]}."]
    if others:
        more = f" and {len(others) - SHOWN} more" if len(others) > SHOWN else ""
        shown = ", ".join(f"{other} ({one.kind})" for other, one in [*others.items()][:SHOWN])
        lines.append(f"Others that fit, to be chosen by name: {shown}{more}.")
    return lines


def none_found(model: str, published: catalogue.Published | None, near: Sequence[str], left: int) -> str:
    """Why `auto` takes no file, and which to get. model: in words.   near: files that fit and do not say that they are one.
    left: files that are not looked at yet."""
    text = f"auto finds no acceleration LoRA for this model ({model}) in the loras folder. "
    if left:
        text += f"{many(left, 'files are', 'file is')} not looked at yet, for there are many: run again to go on. "
    if near:
        text += f"Of what fits ({', '.join(near[:SHOWN])}) nothing says that it is one: choose it by name if you know. "
    if published is None:
        return f"{text}LCM Kit knows of none for such models: choose a file by name."
    size = f", {published.bytes / 1e6:.0f} MB" if published.bytes else ""
    return (
        f"{text}Get {published.name}: {published.link}, the file {published.file}{size}. Put it into models/loras, under "
        "any name, and press R."
    )


def mixed(count: int, rows: Mapping[str, str], notes: Sequence[str] = (), merged: str = "", applied: str = "") -> str:
    """Of rows of LoRAs of which `count` are on. rows: input -> what is said of it.   merged, applied: reports of those."""
    said = [f"  {input_}: {line}" for input_, line in rows.items()]
    if not count:
        return "\n".join(["No LoRA is on: model and clip are as they came.", *said])
    head = f"{many(count, 'LoRAs')} in one, applied at strength 1."
    return "\n".join([head, *said, *notes, "", merged, "", applied])


def alone(name: str, strength: float, method: str) -> str:
    """Of a merge of one LoRA."""
    passed = f"One LoRA is connected: the result is {name} * {strength:g}"
    return f"Note: {passed}." if method == "linear" else f"Note: {passed}, and method {method} has nothing to merge."


def nobody_protected(slot: str) -> str:
    return f"Note: {slot} is not connected, so that no LoRA is protected and mu does nothing."


def idle_block_strengths(line: str) -> str:
    return f"Note: block strengths {line.strip()!r} are for a LoRA that is not connected."


def _names_twice(name: str, pairs: Sequence[str]) -> str:
    more = f", and {many(len(pairs) - 1, 'pairs')} more" if len(pairs) > 1 else ""
    return (
        f"{name} names a weight twice: {pairs[0]}{more}; ComfyUI would use only one of the two updates. If it was merged "
        "from LoRAs of two spellings, apply those one after the other, or merge them again from files of one spelling. "
        "Setting wrong_base to warn applies one of each pair."
    )


def _misfits(case: Case) -> tuple[Sequence[str], Sequence[str], Sequence[str]]:
    """Modules without a place, of another shape, and pairs of one weight, in words."""
    return case.homeless, list(map(clash_words, case.found.clashing)), list(map(" and ".join, case.found.twice))


def _why(case: Case) -> str:
    """What does not fit, in numbers; with the first of each where nothing else says what went wrong."""
    known, reasons = case.other_base, []
    for words, modules in zip(_WHY, _misfits(case), strict=True):
        if modules:
            reasons.append(many(len(modules), *words) + ("" if known else f" (the first: {modules[0]})"))
    if case.left and (known or not reasons):
        first = "" if known else f" (the first: {case.left[0]})"
        reasons.append(
            f"{len(case.left)} of the model's {many(case.could, 'modules')} of these kinds {_be(case.left)} left without it{first}"
        )
    return ", ".join(reasons)


def _what(identity: Identity, model: str | None = None, for_sampling: bool = False) -> list[str]:
    lines = [f"It is: {identity.kind}, {_SURE[identity.how]}."]
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
            f"is for {many(identity.published.steps, 'steps')}"
            if identity.published and identity.published.steps
            else "is one"
        )
        return f"It {steps}, but its settings ({identity.preset}) are none of those known here: {end}"
    if identity.structure.accelerates:
        return f"It changes all that acceleration LoRAs change; whether it is one is not known: {end}"
    if identity.looks_like:
        return f"Its name says {identity.looks_like}, but it is none of the files known here: {end}"
    return f"No acceleration LoRA recognised: {end}"


def clash_words(clash: Clash) -> str:
    return f"{clash.module}: {clash.update} on a weight of {clash.weight}"


def _counts(identity: Identity) -> list[str]:
    facts = identity.structure
    parts = [f"parameters {facts.parameters:,}"]
    if facts.ranks and facts.scales:
        alpha = f"alpha {_span(facts.alphas)}" if facts.alphas else "no alpha"
        parts = [f"rank {_span(facts.ranks)}", alpha, f"effective scale {_span(facts.scales)}", *parts]
    line = ", ".join(parts)
    return [f"{line[0].upper()}{line[1:]}."]


def _be(those: Sequence[object]) -> str:
    return "is" if len(those) == 1 else "are"


def _span(pair: tuple[float, float]) -> str:
    low, high = pair
    return f"{low:g}" if low == high else f"{low:g} to {high:g}"


def _article(word: str) -> str:
    """Names in capitals are spelt out: an S-D, an L-C-M."""
    return "an" if word.startswith(("SD", "SSD", "LCM")) else "a"
