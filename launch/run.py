"""A run of the command line: from a checkpoint file and captions or pictures to a LoRA file."""

from __future__ import annotations

import argparse
import dataclasses
import logging
import os
import time
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from tqdm import tqdm  # type: ignore[import-untyped]

from ..distillation import checkpoint
from ..distillation.engine import Engine
from ..distillation.kept import Kept
from ..distillation.optimizers import check_optimizer
from ..distillation.recipes import set_otherwise
from ..distillation.settings import Settings, Setup
from ..host.training.report import rate_words, recipe_words
from ..lora_merge import Lora, save
from ..lora_merge.disk.file_names import name_trouble, shown
from ..lora_merge.disk.pictures import check_picture, write_picture
from ..lora_merge.files.dtypes import DTYPES
from ..lora_merge.files.load_save import check_output
from . import comfyui as launch_comfyui
from .gathering import Texts, gathered, texts_asked
from .loggers import check_writers, writers
from .processes import check_same, first_of_a_machine, has_accelerator, processes
from .report import Looked, data_words, end_words

logger = logging.getLogger(__name__)


def run(options: argparse.Namespace) -> str:
    """Distil as `options` says; returns the report, in the first process only, elsewhere "".

    Raises ValueError or OSError for bad input, before anything is trained; FloatingPointError for a loss that is no
    number any more, MemoryError where the device is too small.
    """
    settings, setup, texts = _settings(options), _setup(options), texts_asked(options)
    comfyui, folder = launch_comfyui.find(options.comfyui), _folder(options)
    check_output(options.output, options.overwrite)
    check_optimizer(settings)
    check_writers(options.log_with)
    if options.picture:
        check_picture(options.picture, options.overwrite)
    cpu = options.cpu or not has_accelerator()
    quiet = os.environ.get("RANK", "0") != "0"
    for words in () if quiet else rate_words(settings):
        logger.warning("%s", words)
    with processes(cpu=cpu) as engine:  # before ComfyUI, which takes the device that is current
        launch_comfyui.prepare(comfyui, cpu=cpu, packs=options.custom_nodes)
        import comfy.model_management  # type: ignore[import-not-found]
        import comfy.utils  # type: ignore[import-not-found]

        if quiet:
            logging.getLogger().setLevel(logging.ERROR)  # one of them warns
            comfy.utils.set_progress_bar_enabled(False)
        try:
            return _distil(options, setup, settings, texts, folder, engine)
        except comfy.model_management.OOM_EXCEPTION as error:
            first = str(error).splitlines()[0]
            raise MemoryError(
                f"the device's memory is too small ({first}). Lower --batch and raise --accumulate by as much, or lower "
                "--width and --height."
            ) from error


def _settings(options: argparse.Namespace) -> Settings:
    """Raises ValueError for settings that make no sense. An L2 distance is written as --huber-c 0."""
    if options.average_target and not options.average:
        raise ValueError("average_target needs a moving average: set average, for example to 0.95.")
    known = {one.name: getattr(options, one.name, None) for one in dataclasses.fields(Settings)}
    known |= {"betas": tuple(options.betas)}
    settings = Settings(**{name: value for name, value in known.items() if value is not None})
    return dataclasses.replace(settings, huber_c=settings.huber_c or None)


def _setup(options: argparse.Namespace) -> Setup:
    """Raises ValueError for what makes no sense."""
    return Setup(**{one.name: getattr(options, one.name) for one in dataclasses.fields(Setup)})


def _folder(options: argparse.Namespace) -> Path:
    folder: Path = options.resume or options.output.with_suffix(".run")
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"--resume is {folder}, which is a file; name a folder.")
    if not folder.exists() and (trouble := name_trouble(folder.name)):
        raise ValueError(f"--resume is {shown(str(folder))}, and its last part {trouble}.")
    return folder


def _prepared(
    options: argparse.Namespace, setup: Setup, settings: Settings, texts: Texts, folder: Path, engine: Engine
) -> tuple[Any, Any, Any, Looked | None]:
    """(Work, VAE, rough previewer, what became of the pictures) of a run; the VAE only if it is needed still."""
    # ComfyUI is there only now.
    from ..host.training.loan import compute_type
    from ..host.training.run import Work, check_lora, sigma_table
    from ..host.training.strip import rough_previewer

    with torch.no_grad():
        model, clip, vae = launch_comfyui.load(options.checkpoint, options.vae, options.lora)
        start = launch_comfyui.lora_weights(options.start_from) if options.start_from else None
        table, dtype = sigma_table(model), compute_type(model, setup.dtype, setup.tf32, setup.compile)
        # Both raise for what does not fit, before pictures are made.
        settings.grid(len(table))
        check_lora(model, setup.rank, start)
        rough = rough_previewer(model.get_model_object("latent_format"))
        settings = dataclasses.replace(settings, scale_loss=dtype == torch.float16)
        with first_of_a_machine(engine):
            data = gathered(options, setup, settings, texts, model, clip, vae, Kept(folder / "kept"))
    work = Work(
        model=model, latents=data.latents, conds=data.conds, unconds=data.unconds, prompts=data.prompts, table=table,
        settings=settings, dtype=dtype, rank=setup.rank, alpha=setup.alpha, recompute=setup.gradient_checkpointing,
        shown=data.shown, names=data.names, start=start, own=not texts.pictures, tf32=setup.tf32,
        compile=setup.compile,
    )  # fmt: skip
    return work, vae if options.picture else None, rough, data.looked


def _distil(
    options: argparse.Namespace, setup: Setup, settings: Settings, texts: Texts, folder: Path, engine: Engine
) -> str:
    from ..host.training.run import training

    started, kept = time.monotonic(), folder / "run.safetensors"
    work, vae, rough, looked = _prepared(options, setup, settings, texts, folder, engine)
    settings = work.settings
    together = {"images per step": settings.batch * settings.accumulate * engine.num_processes}

    def check(identity: dict[str, Any]) -> None:
        done = checkpoint.read(kept)[1].get("done") if kept.exists() else 0
        check_same(engine, identity | {"steps done, by the checkpoint": done, "settings": settings.kept()})

    with training(work, engine=engine, facts=together, check=check) as run:
        strip = run.strip(vae, rough)
        course = _train(options, run, strip, folder, kept)
        if engine.process_index:
            return ""
        tensors = run.tensors()
    lora = Lora.from_state_dict(tensors, metadata=run.metadata(**together), source=options.output.name)
    save(lora, options.output, dtype=DTYPES[options.save_dtype], overwrite=options.overwrite)
    if options.picture:
        pixels = (strip.picture(course.validation)[0] * 255).round().clamp(0, 255).byte()
        write_picture(Image.fromarray(pixels.numpy()), options.picture, options.overwrite)
    recipe = recipe_words(options.recipe, set_otherwise(options.recipe, vars(options)))
    lines = run.report(tensors, time.monotonic() - started, course.validation)
    end = end_words(engine.num_processes, together["images per step"], options.output, folder)
    return "\n".join([*filter(None, [recipe]), *lines, *data_words(looked), *end])


def _train(options: argparse.Namespace, run: Any, strip: Any, folder: Path, kept: Path) -> Any:
    """Trains, with a bar; returns the Course of it. run: a Training.   strip: a Strip."""
    from ..host.training.course import Course, write_lora

    trainer, dtype = run.trainer, DTYPES[options.save_dtype]
    steps, main = trainer.settings.steps, not trainer.engine.process_index

    def after_step(course: Any, new: bool) -> None:
        bar.update(trainer.done - bar.n)
        known = {"validation": f"{course.validation[-1][1]:.4g}"} if course.validation else {}
        bar.set_postfix({"loss": f"{trainer.losses[-1]:.4g}"} | known, refresh=False)
        if new and main and (samples := strip.roughly()) is not None:
            try:
                (folder / "samples").mkdir(parents=True, exist_ok=True)
                write_picture(samples, folder / "samples" / f"{trainer.done:06}.png", True)
            except (OSError, ValueError) as error:  # what was learnt is not thrown away for a picture
                logger.warning("No samples of step %d: %s", trainer.done, error)

    def save_lora() -> None:
        lora = run.lora("lora.safetensors")
        write_lora(lora, folder / "lora.safetensors", dtype)
        if options.keep_loras:
            write_lora(lora, folder / "loras" / f"{trainer.done:06}.safetensors", dtype)

    course = Course(
        trainer, strip, run.picture, every=options.save_every, table=folder / "losses.csv", shown=after_step,
        save_lora=save_lora, writers=writers(options.log_with, folder) if main else (),
    )  # fmt: skip
    with tqdm(total=steps, desc="Distilling", disable=not main) as bar:
        course.run(kept)
    return course
