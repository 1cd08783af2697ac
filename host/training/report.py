"""What people read of a training: while it runs, when it ends, and of what is allowed and hardly meant."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ...distillation.recipes import RECIPES
from ...distillation.settings import Settings
from ...lora_merge.words import many
from ...samplers.preset_words import settings_in_words
from ...samplers.presets import phased
from .advice import GUIDANCE, Advice, FewPictures, ForeignGuidance

RISEN = 1.3  # times the lowest validation loss
Validation = Sequence[tuple[int, float]]
"""(step, validation loss), ascending."""


@dataclass(frozen=True, kw_only=True)
class Lost:
    """What of a LoRA that a training begins with is not in the result.

    name: of the LoRA.   elsewhere: its modules that are not trained.   waiting: number of those of a text encoder.
    anew: trained layers that it has nothing for, of so many `layers`.
    """

    name: str
    elsewhere: Sequence[str]
    waiting: int
    anew: int
    layers: int


Remark = Advice | Lost


@dataclass(frozen=True, kw_only=True)
class Account:
    """A training in numbers.

    done: steps.   losses: of each.   pictures: learnt from; own: whether the model made them.   dtype: of the network.
    modules, parameters: of the LoRA.   still: those of its modules that are nothing yet.   remarks: what was said before it began.
    """

    settings: Settings
    done: int
    losses: Sequence[float]
    validation: Validation
    pictures: int
    own: bool
    dtype: str
    modules: int
    parameters: int
    still: Sequence[str]
    seconds: float
    remarks: Sequence[Remark]


@dataclass(frozen=True, kw_only=True)
class OnDisk:
    """What is on disk of a training: paths in the output folder, that of the LoRA in the loras folder; None is not there.

    checkpoint: with its bytes.   table: name of the file of its losses.   pictures: folder, number and bytes of those that
    models have made.
    """

    checkpoint: tuple[str, int] | None
    table: str
    lora: str | None
    pictures: tuple[str, int, int] | None


def describe(account: Account) -> list[str]:
    """Lines about a training that has ended."""
    settings, losses = account.settings, account.losses
    low, high = settings.cfg
    tenth = max(1, len(losses) // 10)
    lines = [
        f"LCM-LoRA with {many(account.modules, 'modules')}, {account.parameters:,} parameters ({account.parameters * 2 / 1e6:.1f} MB "
        "in fp16).",
        f"{many(account.done, 'steps')} of {many(settings.batch * settings.accumulate, 'images')} from "
        f"{many(account.pictures, 'pictures')}{' that the model made itself' if account.own else ''}; guidance "
        f"{f'{low:g}' if low == high else f'{low:g} to {high:g}'}, skip {settings.skip}, {account.dtype}.",
        f"Loss {sum(losses[:tenth]) / tenth:.4g} in the first tenth, {sum(losses[-tenth:]) / tenth:.4g} in the last; "
        f"{account.seconds:.0f} seconds.",
        *([phased_words(settings.phases)] if settings.phases > 1 else []),
    ]
    still = still_words(account.still, account.modules)
    remarks = [words for remark in account.remarks for words in remark_words(remark)]
    return [*lines, *validation_words(account.validation), *still, *remarks, *rate_words(settings)]


def phased_words(phases: int) -> str:
    preset = phased(phases)
    return (
        f"In {many(phases, 'phases')}: for {settings_in_words(preset)}. LCM-LoRA Loader and LoRA Mix read that from the file; "
        f"elsewhere it is LCM Preset {preset.name}."
    )


def validation_words(validation: Validation) -> list[str]:
    """A sentence on (step, validation loss) of a whole training; none if there is nothing to compare."""
    if len(validation) < 2:
        return []
    (first, before), (_, last) = validation[0], validation[-1]
    lowest, best = min((loss, step) for step, loss in validation)
    said = (
        f"Validation loss, always of the same pictures and noise: {before:.4g} at step {first}, {last:.4g} at the end; lowest "
        f"{lowest:.4g} at step {best}."
    )
    if last > RISEN * lowest:
        said += " It has risen since: a lower learning_rate, one that falls, or a moving average may help."
    return [said]


def still_words(still: Sequence[str], modules: int) -> list[str]:
    """A sentence on modules that nobody is to take for trained; none without such."""
    if not still:
        return []
    return [
        f"{len(still)} of {many(modules, 'modules')} have not changed, as no gradient reaches them: the picture does not depend on them "
        f"({', '.join(still[:2])}{', ...' if len(still) > 2 else ''})."
    ]


def recipe_words(name: str, own: Mapping[str, Any]) -> str:
    """What a recipe sets; nothing for none. own: of its settings, those that somebody has set."""
    wanted = RECIPES[name].settings
    if not wanted:
        return ""
    said = f"Recipe {name}: {_listed({key: value for key, value in wanted.items() if key not in own})}."
    return f"{said} Set by you: {_listed(own)}." if own else said


def _listed(settings: Mapping[str, Any]) -> str:
    return ", ".join(f"{key} {value}" for key, value in settings.items())


def rate_words(settings: Settings) -> list[str]:
    """A sentence on a learning rate that is never reached."""
    highest = settings.highest_rate
    if highest >= settings.learning_rate / 2:
        return []
    tenth = settings.steps // 10
    return [
        f"learning_rate {settings.learning_rate:g} is never reached, only {highest:.2g}: warmup is {settings.warmup} of "
        f"{many(settings.steps, 'steps')}{f' and decay {settings.decay:g}' if settings.decay else ''}. Set warmup to {tenth}"
        f"{' or less' if tenth else ''}, or train longer."
    ]


def remark_words(remark: Remark) -> list[str]:
    """Sentences on what is to be known before a training begins."""
    match remark:
        case FewPictures():
            return [
                f"Few pictures: the model made {remark.made}, and each is learnt about {remark.times} times. Some hundreds, of "
                "varied prompts, make a LoRA that works for more; raise samples."
            ]
        case ForeignGuidance():
            kind = remark.usual
            usual = f"; templates have {GUIDANCE[kind]} for {kind}" if kind else ""
            return [
                f"Guidance {Settings.guidance_min:g} is Stable Diffusion 1.5's, and this model is another ({remark.model}){usual}. "
                "Set guidance_min and guidance_max to the cfg at which it makes its best pictures."
            ]
        case Lost():
            return lost_words(remark)


def lost_words(lost: Lost) -> list[str]:
    """A sentence for each part of it."""
    found = []
    if lost.elsewhere:
        be = "is" if len(lost.elsewhere) == 1 else "are"
        found.append(
            f"{many(len(lost.elsewhere), 'modules')} of {lost.name} {be} not among the trained layers and {be} not in the result "
            f"({', '.join(lost.elsewhere[:2])}{', ...' if len(lost.elsewhere) > 2 else ''})."
        )
    if lost.waiting:
        found.append(
            f"{many(lost.waiting, 'modules')} of {lost.name} {'is' if lost.waiting == 1 else 'are'} of a text encoder, which is not trained."
        )
    if lost.anew:
        found.append(
            f"{lost.name} has nothing for {lost.anew} of the {many(lost.layers, 'trained layers')}; these begin anew."
        )
    return found


def disk_words(kept: OnDisk) -> list[str]:
    """What may be gone on from, and removed."""
    found = []
    if kept.checkpoint is not None:
        path, size = kept.checkpoint
        found.append(
            f"Checkpoint: {path} in the output folder ({size / 1e6:.1f} MB); the same inputs with more steps go on from it. "
            f"Its losses are in {kept.table}."
        )
    if kept.lora is not None:
        found.append(f"LoRA so far: {kept.lora} in the loras folder, for Load LoRA.")
    if kept.pictures is not None:
        path, count, size = kept.pictures
        found.append(
            f"Pictures: {count} that models made, in {path} ({size / 1e6:.1f} MB); no training makes one of them again. "
            "All of it may be removed."
        )
    return found


def progress_words(done: int, steps: int, loss: float, validation: Validation, seconds_a_step: float) -> str:
    """Where a training is, and how long it will take."""
    said = f"step {done} of {steps}, loss {loss:.4g}"
    if validation:
        said += f", validation loss {validation[-1][1]:.4g} ({validation[0][1]:.4g} at first)"
    if seconds_a_step:
        said += f"; {seconds_a_step:.2g} seconds a step, {clock((steps - done) * seconds_a_step)} left"
    return said


def clock(seconds: float) -> str:
    """1:05 or 2:03:04."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"
