"""Distils an LCM-LoRA from a MODEL: latents and conditionings in, LORA_MODEL, picture and report out."""

import logging
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import get_args

import comfy.model_management
import comfy.utils
import torch
from tqdm.auto import tqdm

from ...distillation.health import Diverged
from ...distillation.kept import Kept
from ...distillation.optimizers import check_optimizer
from ...distillation.recipes import NONE, followed
from ...distillation.settings import Compute, Optimizer, Settings, Setup, Weighting
from ..lora.weights import LoraWeights
from ..page import show
from ..progress import Progress
from .course import Course, write_lora
from .data import entries, paired, partners, pictures
from .loan import compute_type
from .places import Places, check_name, places_of
from .report import disk_words, rate_words, recipe_words
from .run import Training, Work, check_lora, empty_latent, sigma_table, training
from .strip import PICTURES, Strip, rough_previewer
from .teacher_pictures import teachers_pictures

logger = logging.getLogger(__name__)

DTYPES = get_args(Compute)
WEIGHTINGS = get_args(Weighting)
OPTIMIZERS = get_args(Optimizer)
STRIPS = 10  # sample strips in a run, in the page


def only_ones(inputs: Mapping[str, Sequence]) -> dict:
    """The value of each input, out of its list. Raises ValueError for an input with several."""
    several = [f"{name} has {len(values)} values" for name, values in inputs.items() if len(values) != 1]
    if several:
        raise ValueError(
            f"{', '.join(several)}, but one training takes one of each; only positive, negative, latent and validation may have many. "
            "Connect a node that gives one value."
        )
    return {name: values[0] for name, values in inputs.items()}


def distil_lists(
    positive: list, negative: list, latents: Sequence | None, vae: Sequence | None, validation: Sequence | None = None,
    **inputs: Sequence,
):  # fmt: skip
    """What `distil` returns, of inputs that are all lists: prompts and latents may be many, of the rest there is one."""
    single = only_ones(inputs | {"vae": vae or (None,)})
    recipe = single.pop("recipe", NONE)
    single, own = followed(recipe, single, asdict(Settings()) | asdict(Setup()))
    several = {"latents": latents, "validation": validation}
    given = {name: [one for one in values or () if one] for name, values in several.items()}
    lora, picture, report = distil(positive=positive, negative=negative, **given, **single)
    return lora, picture, "\n".join(filter(None, [recipe_words(recipe, own), report]))


def distil(
    model, positive, negative, latents, vae, *, rank, alpha, samples, width, height, dtype, gradient_checkpointing, resume,
    validation=(), save_every=Setup.save_every, start_from=None, tf32=Setup.tf32, compile=Setup.compile, **training_settings,
):  # fmt: skip
    """(LORA_MODEL, IMAGE, report). The MODEL is as before afterwards, whatever happens.

    positive, negative: lists of CONDITIONINGs.   latents: list of LATENTs, may be empty.   vae: VAE or None.
    alpha: 0 takes the rank.   training_settings: see Settings.
    samples, width, height: of the model's own pictures, where no latents are given.
    resume: name under which the training is kept, "auto" makes one, "" keeps nothing.
    start_from: LORA_MODEL to begin with, or None.
    validation: list of CONDITIONINGs, the prompts of the samples; empty takes those of the first pictures.
    Raises ValueError for inputs that do not go together, before anything is loaded or trained.
    """
    check_name(resume)
    Setup(
        rank=rank, alpha=alpha, samples=samples, width=width, height=height, dtype=dtype, save_every=save_every, tf32=tf32,
        compile=compile, gradient_checkpointing=gradient_checkpointing,
    )  # raises for what makes no sense  # fmt: skip
    conds, unconds = entries(positive, "positive"), entries(negative, "negative")
    shown = entries(validation, "validation")[:PICTURES] if validation else []
    table, type_ = sigma_table(model), compute_type(model, dtype, tf32, compile)
    settings = Settings(**training_settings, scale_loss=type_ == torch.float16)
    settings.grid(len(table))
    check_optimizer(settings)
    for words in rate_words(settings):
        logger.warning("%s", words)
    rough = rough_previewer(model.get_model_object("latent_format"))
    check_lora(model, rank, start_from)
    given = pictures(model, latents)
    which = paired(conds, len(given)) if given else [number % len(conds) for number in range(samples)]
    prompts = [*zip(which, partners(conds, unconds, which), strict=True)]
    empty = empty_latent(model, latents, width, height)
    made_of = settings.kept(), rank, alpha, conds, unconds, given or [samples, [*empty.shape]], dict(start_from or {})
    places = places_of(resume, model, made_of)
    own = None if places is None else Kept(places.pictures)
    data = given or teachers_pictures(
        model, [(conds[cond], unconds[uncond]) for cond, uncond in prompts], empty, settings, own
    )  # fmt: skip
    work = Work(
        model=model, latents=data, conds=conds, unconds=unconds, prompts=prompts, table=table, settings=settings,
        dtype=type_, rank=rank, alpha=alpha, recompute=gradient_checkpointing, shown=shown, start=start_from,
        own=not given, tf32=tf32, compile=compile,
    )  # fmt: skip
    lora, picture, lines = _trained(work, vae, rough, places, save_every)
    if places is not None:
        lines += disk_words(places.on_disk(None if given else own))
    return lora, picture, "\n".join(lines)


def _trained(work: Work, vae, rough, places: Places | None, every: int) -> tuple[LoraWeights, torch.Tensor, list[str]]:
    """(LoRA, IMAGE, lines for the report)."""
    with training(work) as run:
        strip = run.strip(vae, rough)
        course, seconds = _run(run, strip, places, every)
        tensors = run.tensors()
    # The VAE, which this needs, would have taken the place of the MODEL before.
    picture = strip.picture(course.validation)
    lora = LoraWeights(tensors, name="LCM-LoRA", metadata=run.metadata())
    return lora, picture, run.report(tensors, seconds, course.validation)


def _run(run: Training, strip: Strip, places: Places | None, every: int) -> tuple[Course, float]:
    """Trains with progress on the node, in the page and in the console; returns the seconds it took, too."""
    steps = run.trainer.settings.steps
    progress, started, told = Progress(), time.monotonic(), 0.0

    def after_step(course: Course, new: bool) -> None:
        nonlocal told
        done = course.trainer.done

        def preview():
            if not new:
                strip.take()
            return strip.preview(course.validation)

        progress(done, steps, None if done % max(1, min(every, steps // STRIPS)) else preview)
        bar.update(done - bar.n)
        bar.set_postfix(loss=f"{course.trainer.losses[-1]:.4g}", refresh=False)
        if (now := time.monotonic()) - told > 0.5:
            told = now
            show(course.words)

    course = Course(
        run.trainer, strip, run.picture, every=every, shown=after_step, table=places and places.table,
        save_lora=places and (lambda: write_lora(run.lora(places.lora.name), places.lora)),
    )  # fmt: skip
    with tqdm(total=steps, desc="Distilling", disable=not comfy.utils.PROGRESS_BAR_ENABLED) as bar:
        try:
            course.run(places and places.checkpoint)
        except Diverged as error:
            if places is not None and error.kept:
                # A name made of the inputs would be another one with another learning rate.
                error.args = (f"{error} For that, write {places.checkpoint.stem} into resume.",)
            raise
    return course, time.monotonic() - started
