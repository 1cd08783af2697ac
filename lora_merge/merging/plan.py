"""The first stage of a merge: what meets what, before any number is computed."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

from ..files.lora import Lora
from ..files.twice import Pair
from ..metadata.fields import ARCHITECTURE, changed, given
from ..metadata.inherit import Note, inherited
from ..naming.aliases import is_foreign
from ..one_module.differences import dense_modules
from ..one_module.protect import protected_input
from ..settings.options import MergeOptions
from ..settings.strengths import Blocks, Strengths, strengths_of
from .align import fused_with_slices, names_for_draws, unify
from .by_target import ModelNames, by_target
from .passthrough import Passthrough, passthrough_of, refusal

Input = tuple[Lora, float]


@dataclass(frozen=True, eq=False, kw_only=True)
class Plan:
    """All that a merge is to do.

    loras: the inputs, with canonical names that agree.   strengths: of each, module by module.
    options: checked, `protect` a number or None.
    modules: to be computed, in order.   whole: those of them, and of what passes through, that an input changes by a
        whole-weight difference.   passthrough: what goes through as it is, and what is left out.
    spellings: canonical name -> the name that the result gives a module.
    drawn_by: canonical name -> the name that a method's draws for a module are of, where that is another one.
    sharing: inputs of which anything is in the sum.
    metadata: that the result starts with.   names_architecture: whether the result says what it is for by itself.
    notes: what of the inputs' metadata is not kept as it was.
    fused: modules of two inputs of which one is a slice of the other's weight, where the method would look at both.
    model: what a model said of their names, as far as anything was changed by it.
    protects_nobody: whether someone was to be protected, and none of the inputs is such a LoRA.
    """

    loras: Sequence[Lora]
    strengths: Strengths
    options: MergeOptions
    modules: Sequence[str]
    whole: Mapping[str, None]
    passthrough: Passthrough
    spellings: Mapping[str, str]
    drawn_by: Mapping[str, str]
    sharing: Sequence[Lora]
    metadata: Mapping[str, str]
    names_architecture: bool
    notes: Sequence[Note]
    fused: Sequence[Pair]
    protects_nobody: bool
    model: ModelNames | None


def plan(
    inputs: Sequence[Input],
    options: MergeOptions,
    block_strengths: Blocks | Sequence[Blocks] = None,
    metadata: Mapping[str, str] | None = None,
    model: ModelNames | None = None,
) -> Plan:
    """The plan of a merge; block_strengths, metadata, model and what is raised are those of `merge_with_account`."""
    options.check(len(inputs))
    wanted = given(metadata)
    loras, told = _met([lora for lora, _ in inputs], model)
    base, averaged = [strength for _, strength in inputs], options.the_method.averages
    strengths = strengths_of(loras, base, block_strengths, averaged=averaged)
    sharing = [lora for index, lora in enumerate(loras) if _has_part(lora, index, strengths)]
    inherits, notes = inherited(sharing)
    kept = changed(inherits, wanted)
    meets = options.the_method.combine is not None or bool(options.mu)
    options, protects_nobody = _protecting(options, loras, strengths)
    passthrough = passthrough_of(loras, strengths)
    if passthrough.refused and not options.leave_out:
        raise ValueError(refusal(loras, passthrough))
    whole = dense_modules(loras)
    modules = _modules(loras, whole, passthrough)
    _check_signs(options, loras, strengths, modules)
    return Plan(
        loras=loras,
        strengths=strengths,
        options=options,
        modules=modules,
        whole=whole,
        passthrough=passthrough,
        spellings=_spellings(loras),
        drawn_by=names_for_draws(loras) if options.the_method.draws else {},
        sharing=sharing,
        metadata=kept,
        names_architecture=ARCHITECTURE not in kept and ARCHITECTURE not in wanted,
        notes=notes,
        fused=fused_with_slices(loras) if meets else [],
        protects_nobody=protects_nobody,
        model=told,
    )


def _met(loras: Sequence[Lora], model: ModelNames | None) -> tuple[list[Lora], ModelNames | None]:
    """The LoRAs with canonical names that agree, and what the model said where that changed anything."""
    if model is None:
        return unify(loras), None
    met = by_target(loras, model.targets, model.shapes)
    changed = any(one is not other for one, other in zip(loras, met, strict=True))
    return unify(met), model.of(loras) if changed else None


def _modules(loras: Sequence[Lora], whole: Mapping[str, None], passthrough: Passthrough) -> list[str]:
    # What meets an update that is passed through has strength 0.
    in_all = dict.fromkeys([*(module for lora in loras for module in lora.modules), *whole])
    return [module for module in in_all if module not in passthrough.updates]


def _protecting(options: MergeOptions, loras: Sequence[Lora], strengths: Strengths) -> tuple[MergeOptions, bool]:
    """The options with the number of whom `auto` protects, and whether that is nobody although there is a mu."""
    if options.protect != "auto":
        return options, False
    options = replace(options, protect=protected_input(loras, strengths.base))
    return options, options.protect is None and bool(options.mu)


def _has_part(lora: Lora, index: int, strengths: Strengths) -> bool:
    """Whether anything of the input is in the sum."""
    return any(strengths.at(module)[index] != 0 for module in lora.spellings)


def _check_signs(options: MergeOptions, loras: Sequence[Lora], strengths: Strengths, modules: Iterable[str]) -> None:
    if options.the_method.signed:
        return
    for module in modules:
        lowest, lora = min(zip(strengths.at(module), loras, strict=True), key=lambda pair: pair[0])
        if lowest < 0:
            raise ValueError(
                f"{lora.source}: strength is {lowest:g} at {lora.spellings.get(module, module)}, but method {options.method} goes from one LoRA to another and takes "
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
