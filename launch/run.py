"""A run of the command line: from a checkpoint file and captions or pictures to a LoRA file."""

from __future__ import annotations

import argparse
import dataclasses
import logging
import os
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor
from tqdm import tqdm  # type: ignore[import-untyped]

from ..distillation import checkpoint
from ..distillation.engine import Engine
from ..distillation.settings import Settings
from ..distillation.trainer import Trainer
from ..lora_merge import Lora, save
from ..lora_merge.disk.file_names import name_trouble, shown
from ..lora_merge.disk.pictures import check_picture, write_picture
from ..lora_merge.files.dtypes import DTYPES
from ..lora_merge.files.load_save import check_output
from . import comfyui as launch_comfyui
from . import data as launch_data
from .processes import check_same, first_of_a_machine, has_accelerator, processes

# Pictures handed to the VAE; ComfyUI makes that as few as fit. Not --batch: latents differ with it in their last digits.
AT_ONCE = 8


@dataclasses.dataclass(frozen=True)
class Texts:
    """What there is to learn, as text. captions: all different ones.   which: of them, the one of each picture.

    pictures: empty where the model makes its own.
    """

    captions: list[str]
    which: list[int]
    pictures: list[launch_data.Picture]


def run(options: argparse.Namespace) -> str:
    """Distil as `options` says; returns the report, in the first process only, elsewhere "".

    Raises ValueError or OSError for bad input, before anything is trained; FloatingPointError for a loss that is no
    number any more, MemoryError where the device is too small.
    """
    settings, texts = _settings(options), _texts(options)
    comfyui, folder = launch_comfyui.find(options.comfyui), _folder(options)
    check_output(options.output, options.overwrite)
    if options.picture:
        check_picture(options.picture, options.overwrite)
    cpu = options.cpu or not has_accelerator()
    quiet = os.environ.get("RANK", "0") != "0"
    with processes(cpu=cpu) as engine:  # before ComfyUI, which takes the device that is current
        launch_comfyui.prepare(comfyui, cpu=cpu, packs=options.custom_nodes)
        import comfy.model_management  # type: ignore[import-not-found]
        import comfy.utils  # type: ignore[import-not-found]

        if quiet:
            logging.getLogger().setLevel(logging.ERROR)  # one of them warns
            comfy.utils.set_progress_bar_enabled(False)
        try:
            return _distil(options, settings, texts, folder, engine)
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


def _texts(options: argparse.Namespace) -> Texts:
    captions = None if options.prompts is None else launch_data.read_captions(options.prompts)
    pictures = launch_data.find_pictures(options.pictures)
    if pictures:
        wanted = launch_data.captions_of(pictures, captions)
    else:
        assert captions is not None
        wanted = [captions[number % len(captions)] for number in range(options.samples)]
    different = list(dict.fromkeys(wanted))
    places = {caption: place for place, caption in enumerate(different)}
    return Texts(different, [places[caption] for caption in wanted], pictures)


def _folder(options: argparse.Namespace) -> Path:
    folder: Path = options.resume or options.output.with_suffix(".run")
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"--resume is {folder}, which is a file; name a folder.")
    if not folder.exists() and (trouble := name_trouble(folder.name)):
        raise ValueError(f"--resume is {shown(str(folder))}, and its last part {trouble}.")
    return folder


def _distil(options: argparse.Namespace, settings: Settings, texts: Texts, folder: Path, engine: Engine) -> str:
    # ComfyUI is there only now.
    from ..host.training.loan import compute_type
    from ..host.training.run import Work, sigma_table, training
    from ..host.training.strip import rough_previewer

    started, kept = time.monotonic(), folder / "run.safetensors"
    with torch.no_grad():
        model, clip, vae = launch_comfyui.load(options.checkpoint, options.vae, options.lora)
        table, dtype = sigma_table(model), compute_type(model, options.dtype)
        rough = rough_previewer(model.get_model_object("latent_format"))
        settings = dataclasses.replace(settings, scale_loss=dtype == torch.float16)
        conds = [_encoded(clip, caption) for caption in texts.captions]
        uncond = _zeros(conds[0]) if options.zero_negative else _encoded(clip, options.negative)
        del clip
        with first_of_a_machine(engine):
            data = _latents(options, settings, texts, model, vae, conds, uncond, folder / "data.safetensors")
        if not options.picture:
            del vae
    work = Work(
        model, data, conds, [uncond], [(place, 0) for place in texts.which], table=table, settings=settings, dtype=dtype,
        rank=options.rank, alpha=options.alpha, recompute=options.gradient_checkpointing,
    )  # fmt: skip
    together = {"images per step": settings.batch * settings.accumulate * engine.num_processes}

    def check(identity: dict[str, Any]) -> None:
        done = checkpoint.read(kept)[1].get("done") if kept.exists() else 0
        check_same(engine, identity | {"steps done, by the checkpoint": done, "settings": settings.kept()})

    with training(work, engine=engine, facts=together, check=check) as run:
        _train(run.trainer, kept, options.save_every)
        if engine.process_index:
            return ""
        tensors = run.tensors()
        strip = run.strip(vae, rough) if options.picture else None
        last = strip.last() if strip else None
    if strip:
        pixels = (strip.picture(last)[0] * 255).round().clamp(0, 255).byte()
        write_picture(Image.fromarray(pixels.numpy()), options.picture, options.overwrite)
    lora = Lora.from_state_dict(tensors, metadata=run.metadata(**together), source=options.output.name)
    save(lora, options.output, dtype=DTYPES[options.save_dtype], overwrite=options.overwrite)
    lines = run.report(tensors, bool(texts.pictures), time.monotonic() - started)
    if engine.num_processes > 1:
        lines.append(f"On {engine.num_processes} processes, {together['images per step']} images to a step together.")
    return "\n".join([*lines, f"Written: {options.output}. {folder} can be removed.", ""])


def _train(trainer: Trainer, kept: Path, save_every: int) -> None:
    steps = trainer.settings.steps
    with tqdm(total=steps, desc="Distilling", disable=bool(trainer.engine.process_index)) as bar:

        def after_step(done: int, loss: float) -> None:
            bar.update(done - bar.n)
            bar.set_postfix(loss=f"{loss:.4g}", refresh=False)

        trainer.run(save_to=kept, save_every=save_every, callback=after_step)


def _encoded(clip: Any, text: str) -> Any:
    """The one entry of the CONDITIONING that CLIPTextEncode makes."""
    return clip.encode_from_tokens_scheduled(clip.tokenize(text))[0]


def _zeros(entry: Any) -> Any:
    """What ConditioningZeroOut makes of an entry."""
    tensor, options = entry
    pooled = options.get("pooled_output")
    return [torch.zeros_like(tensor), options | ({} if pooled is None else {"pooled_output": torch.zeros_like(pooled)})]


def _latents(
    options: argparse.Namespace, settings: Settings, texts: Texts, model: Any, vae: Any, conds: Sequence[Any],
    uncond: Any, cache: Path,
) -> list[Tensor]:  # fmt: skip
    """One (1, ...) latent for each place of texts.which, of the pictures or by the model; kept in `cache`."""
    from ..host.training.data import pictures as as_pictures
    from ..host.training.run import empty_latent
    from ..host.training.teacher_pictures import teachers_pictures

    if not texts.pictures:
        prompts = [(conds[place], uncond) for place in texts.which]
        empty = empty_latent(model, [], options.width, options.height)
        with _one_bar("Making pictures", len(prompts)):
            found: list[Tensor] = teachers_pictures(model, prompts, empty, settings, cache)
        return found
    facts = {
        "pictures": launch_data.listing(texts.pictures),
        "size": [options.width, options.height],
        "vae": options.vae,
    }
    if cache.exists():
        latents, then = checkpoint.read(cache)
        if wrong := checkpoint.differences(then, facts):
            raise ValueError(
                f"{cache} holds the latents of another training ({'; '.join(wrong)}). Set these as they were, or use "
                "another --resume folder."
            )
    else:
        if vae is None:
            raise ValueError(f"{options.checkpoint} has no VAE to encode pictures with; give one by --vae.")
        parts: list[Tensor] = []
        for first in tqdm(range(0, len(texts.pictures), AT_ONCE), desc="Encoding pictures"):
            chunk = texts.pictures[first : first + AT_ONCE]
            images = torch.stack([launch_data.pixels(picture, options.width, options.height) for picture in chunk])
            parts.append(vae.encode(images).float().cpu())
        latents = {"latents": torch.cat(parts)}
        checkpoint.write(cache, latents, facts)
    found = as_pictures(model, [{"samples": latents["latents"]}])
    if not found:
        raise ValueError("the VAE makes nothing of these pictures (all latents are 0); is it the one of this model?")
    return found


@contextmanager
def _one_bar(title: str, total: int) -> Iterator[None]:
    """ComfyUI's progress as one bar for all, in place of one for every call of a sampler."""
    import comfy.utils

    enabled, hook = comfy.utils.PROGRESS_BAR_ENABLED, comfy.utils.PROGRESS_BAR_HOOK
    with tqdm(total=total, desc=title, disable=not enabled) as bar:
        comfy.utils.set_progress_bar_enabled(False)
        comfy.utils.set_progress_bar_global_hook(lambda value, *_, **__: bar.update(value - bar.n))
        try:
            yield
        finally:
            comfy.utils.set_progress_bar_enabled(enabled)
            comfy.utils.set_progress_bar_global_hook(hook)
