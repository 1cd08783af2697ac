"""Distils an LCM-LoRA from a MODEL: latents and conditionings in, LORA_MODEL, picture and report out."""

import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import get_args

import comfy.model_management
import comfy.utils
import folder_paths
import torch
from tqdm.auto import tqdm

from ...distillation.settings import Compute, Settings, Weighting
from ...distillation.trainer import Trainer
from ...lora_merge.disk.file_names import name_trouble
from ..door.rules import shown
from ..lora.weights import LoraWeights
from ..page import show
from .data import entries, paired, partners, pictures
from .loan import compute_type
from .run import Work, empty_latent, sigma_table, training
from .strip import Strip, rough_previewer
from .teacher_pictures import teachers_pictures

DTYPES = get_args(Compute)
WEIGHTINGS = get_args(Weighting)
SAVE_EVERY = 100
STRIPS = 10  # sample strips in a run
LATENTS = ".latents"  # behind the name of a run: its pictures


def only_ones(inputs: Mapping[str, Sequence]) -> dict:
    """The value of each input, out of its list. Raises ValueError for an input with several."""
    several = [f"{name} has {len(values)} values" for name, values in inputs.items() if len(values) != 1]
    if several:
        raise ValueError(
            f"{', '.join(several)}, but one training takes one of each; only positive, negative and latent may have many. "
            "Connect a node that gives one value."
        )
    return {name: values[0] for name, values in inputs.items()}


def distil_lists(positive: list, negative: list, latents: Sequence | None, vae: Sequence | None, **inputs: Sequence):
    """What `distil` returns, of inputs that are all lists: prompts and latents may be many, of the rest there is one."""
    single = only_ones(inputs | {"vae": vae or (None,)})
    return distil(positive=positive, negative=negative, latents=[one for one in latents or () if one], **single)


def distil(
    model, positive, negative, latents, vae, *, rank, alpha, samples, width, height, dtype, gradient_checkpointing, resume,
    **training_settings,
):  # fmt: skip
    """(LORA_MODEL, IMAGE, report). The MODEL is as before afterwards, whatever happens.

    positive, negative: lists of CONDITIONINGs.   latents: list of LATENTs, may be empty.   vae: VAE or None.
    alpha: 0 takes the rank.   training_settings: see Settings.
    samples, width, height: of the model's own pictures, where no latents are given.
    resume: name of the checkpoint, "" keeps none.
    Raises ValueError for inputs that do not go together, before anything is loaded or trained.
    """
    checkpoint_file = _checkpoint_file(resume)
    conds, unconds = entries(positive, "positive"), entries(negative, "negative")
    table, type_ = sigma_table(model), compute_type(model, dtype)
    settings = Settings(**training_settings, scale_loss=type_ == torch.float16)
    rough = rough_previewer(model.get_model_object("latent_format"))
    given = pictures(model, latents)
    which = paired(conds, len(given)) if given else [number % len(conds) for number in range(samples)]
    prompts = [*zip(which, partners(conds, unconds, which), strict=True)]
    data = given or teachers_pictures(
        model, [(conds[cond], unconds[uncond]) for cond, uncond in prompts],
        empty_latent(model, latents, width, height), settings, _beside(checkpoint_file, LATENTS),
    )  # fmt: skip
    work = Work(
        model, data, conds, unconds, prompts, table=table, settings=settings, dtype=type_, rank=rank, alpha=alpha,
        recompute=gradient_checkpointing,
    )  # fmt: skip
    with training(work) as run:
        strip = run.strip(vae, rough)
        seconds = _run(run.trainer, strip, checkpoint_file)
        last = strip.last()
        tensors = run.tensors()
    lines = run.report(tensors, bool(given), seconds)
    if checkpoint_file is not None:
        place = checkpoint_file.relative_to(folder_paths.get_output_directory())
        lines.append(f"Checkpoint: {place.as_posix()} in the output folder.")
    lora = LoraWeights(tensors, name="LCM-LoRA", metadata=run.metadata())
    return lora, strip.picture(last), "\n".join(lines)


def _run(trainer: Trainer, strip: Strip, checkpoint_file: Path | None) -> float:
    """Trains with progress on the node, in the page and in the console; returns the seconds it took."""
    steps = trainer.settings.steps
    progress = comfy.utils.ProgressBar(steps)
    started, told = time.monotonic(), 0.0
    with tqdm(total=steps, desc="Distilling", disable=not comfy.utils.PROGRESS_BAR_ENABLED) as bar:

        def after_step(done: int, loss: float) -> None:
            nonlocal told
            # ComfyUI's layers look for an interrupt too, in the middle of a step.
            comfy.model_management.throw_exception_if_processing_interrupted()
            watched = progress.hook is not None
            preview = strip.preview() if watched and done % max(1, steps // STRIPS) == 0 else None
            progress.update_absolute(done, steps, preview)
            bar.update(done - bar.n)
            bar.set_postfix(loss=f"{loss:.4g}", refresh=False)
            if (now := time.monotonic()) - told > 0.5:
                told = now
                show(f"step {done} of {steps}, loss {loss:.4g}")

        trainer.run(save_to=checkpoint_file, save_every=SAVE_EVERY, callback=after_step)
    return time.monotonic() - started


def _checkpoint_file(name: str) -> Path | None:
    """Where a run of that name is kept, in the output folder; None for no name. Raises ValueError for a bad name."""
    if not name.strip():
        return None
    said = f"resume is {shown(name)}"
    trouble = name_trouble(name) or name_trouble(f"{name}{LATENTS}.safetensors")
    if trouble or name.startswith("."):
        raise ValueError(
            f"{said}, and it {trouble or 'begins with a dot, which hides files'}; write a plain name such as my-lcm, "
            "without folders, or leave it empty."
        )
    if name.lower().endswith(LATENTS):
        raise ValueError(f"{said}, where the pictures of {shown(name[: -len(LATENTS)])} are kept. Write another name.")
    return Path(folder_paths.get_output_directory()) / "LCMKit" / "distilling" / f"{name}.safetensors"


def _beside(file: Path | None, ending: str) -> Path | None:
    return None if file is None else file.with_name(f"{file.stem}{ending}{file.suffix}")
