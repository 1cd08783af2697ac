"""Distils an LCM-LoRA from a MODEL: latents and conditionings in, LORA_MODEL, picture and report out."""

import json
import re
import time
from pathlib import Path

import comfy.model_management
import comfy.sample
import comfy.utils
import folder_paths
import torch
from tqdm.auto import tqdm

from ...distillation.settings import Settings
from ...distillation.trainer import Trainer, adapters_on
from .show import show
from .strip import Strip
from .tables import is_distilled, trained_sigma_table
from .teacher_pictures import is_flow, teachers_pictures
from .training_data import Batches, Item, encoded, entries, fingerprint, paired, partners, pictures
from .training_loan import Denoiser, compute_type, lent
from .weights import LoraWeights

DTYPES = ("auto", "bf16", "fp16", "fp32")
TRAIN_TIMESTEPS = 1000
WARMUP = 20
SAVE_EVERY = 100
STRIPS = 10  # sample strips in a run
NAME = re.compile(r"[\w\- ][\w\-. ]*")


def distil(
    model, positive, negative, latents, vae, *, steps, batch, accumulate, rank, alpha, learning_rate, guidance_min,
    guidance_max, skip, seed, samples, width, height, dtype, gradient_checkpointing, resume,
):  # fmt: skip
    """(LORA_MODEL, IMAGE, report). The MODEL is as before afterwards, whatever happens.

    positive, negative: lists of CONDITIONINGs.   latents: list of LATENTs, may be empty.   vae: VAE or None.
    alpha: 0 takes the rank.   guidance_min, guidance_max: on the scale of cfg.
    samples, width, height: of the model's own pictures, where no latents are given.
    resume: name of the checkpoint, "" keeps none.
    Raises ValueError for inputs that do not go together, before anything is loaded or trained.
    """
    checkpoint_file = _checkpoint_file(resume)
    conds, unconds = entries(positive, "positive"), entries(negative, "negative")
    table, type_ = _table(model), compute_type(model, dtype)
    settings = Settings(
        steps=steps, batch=batch, accumulate=accumulate, learning_rate=learning_rate, warmup=WARMUP,
        cfg=(guidance_min, guidance_max), skip=skip, scale_loss=type_ == torch.float16, seed=seed,
    )  # fmt: skip
    given = pictures(model, latents)
    which = paired(conds, len(given)) if given else [number % len(conds) for number in range(samples)]
    prompts = [*zip(which, partners(conds, unconds, which), strict=True)]
    data = given or teachers_pictures(
        model, [(conds[cond], unconds[uncond]) for cond, uncond in prompts], _empty(model, latents, width, height),
        settings, _beside(checkpoint_file, ".latents"),
    )  # fmt: skip

    # The executor's inference mode allows no gradients.
    with torch.inference_mode(False), torch.enable_grad(), lent(model, type_) as patcher:
        device, network = patcher.load_device, patcher.model.diffusion_model
        items = _items(patcher, data, conds, unconds, prompts)
        batches = Batches(items, seed=seed, per_step=batch * accumulate, device=device)
        with adapters_on(
            network, rank, alpha or None, seed=seed, recompute=gradient_checkpointing, device=device
        ) as adapters:
            identity = {
                "model": _fingerprint_of_weights(network, adapters.names),
                "data": fingerprint([[item.latent, item.cond, item.uncond] for item in items]),
                "rank": rank,
                "alpha": alpha or rank,
            }
            denoise = Denoiser(patcher)
            trainer = Trainer(
                denoise, adapters, batches, table.to(device), settings, flow=is_flow(model), identity=identity
            )
            strip = Strip(patcher, denoise, batches, trainer, vae)
            seconds = _run(trainer, strip, checkpoint_file)
            last = strip.last()
            with trainer.result():
                tensors = adapters.lora_state_dict(spelling=_published_names(patcher.model))
    facts = {"settings": settings.kept(), "steps": trainer.done, "model": type(model.model.model_config).__name__}
    metadata = {"modelspec.title": "LCM-LoRA", "lcm_kit.distillation": json.dumps(facts, sort_keys=True)}
    lines = _report(trainer, tensors, len(data), bool(given), seconds, type_)
    if checkpoint_file is not None:
        place = checkpoint_file.relative_to(folder_paths.get_output_directory())
        lines.append(f"Checkpoint: {place.as_posix()} in the output folder.")
    lora = LoraWeights(tensors, name="LCM-LoRA", metadata=metadata)
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


def _table(model) -> torch.Tensor:
    """(1000,) ascending sigmas of the training timesteps. Raises ValueError for models without such timesteps."""
    sampling = model.get_model_object("model_sampling")
    if is_distilled(sampling):
        raise ValueError(
            "ModelSamplingDiscrete 'lcm' is on this model, which is for sampling with a finished LCM-LoRA. Remove that "
            "node for distilling."
        )
    table = trained_sigma_table(sampling)
    # Flux' table has ten entries to a timestep.
    step = max(1, len(table) // TRAIN_TIMESTEPS)
    return table[step - 1 :: step].clone()


def _empty(model, latents, width: int, height: int) -> torch.Tensor:
    """(1, ...) zeros of the size to train at: of an empty latent that is connected, or of width and height."""
    samples = latents[0]["samples"][:1] if latents else torch.zeros(1, 4, height // 8, width // 8)
    return comfy.sample.fix_empty_latent_channels(model, torch.zeros_like(samples))


def _items(patcher, data, conds, unconds, prompts) -> list[Item]:
    """Latents in the network's scale beside their encoded conditionings, each encoded once for each size."""
    known: dict[torch.Size, tuple[list[dict], list[dict]]] = {}
    items = []
    for latent, (cond, uncond) in zip(data, prompts, strict=True):
        # Cloned: the graph's tensors were made in inference mode.
        latent = patcher.model.process_latent_in(latent.clone())
        if latent.shape not in known:
            known[latent.shape] = (
                encoded(patcher, conds, latent, "positive"),
                encoded(patcher, unconds, latent, "negative"),
            )
        encoded_conds, encoded_unconds = known[latent.shape]
        items.append(Item(latent, encoded_conds[cond], encoded_unconds[uncond]))
    return items


def _fingerprint_of_weights(network: torch.nn.Module, names: list[str]) -> str:
    """Of the weights as they are used, with patches: the first numbers of each layer that is adapted."""
    weights = [network.get_submodule(name).weight for name in names]
    return fingerprint([[tuple(weight.shape), weight.detach().flatten()[:8].float()] for weight in weights])


def _published_names(model) -> dict[str, str]:
    """Layer -> the diffusers name that the published LCM-LoRAs spell; empty for networks that have none."""
    table = comfy.utils.unet_to_diffusers(model.model_config.unet_config)
    return {
        ldm.removesuffix(".weight"): diffusers.removesuffix(".weight")
        for diffusers, ldm in table.items()
        if diffusers.endswith(".weight")
    }


def _checkpoint_file(name: str) -> Path | None:
    """Where a run of that name is kept, in the output folder; None for no name. Raises ValueError for a bad name."""
    name = name.strip()
    if not name:
        return None
    if not NAME.fullmatch(name):
        raise ValueError(f"resume is {name!r}; write a plain name such as my-lcm, without folders, or leave it empty.")
    return Path(folder_paths.get_output_directory()) / "LCMKit" / "distilling" / f"{name}.safetensors"


def _beside(file: Path | None, ending: str) -> Path | None:
    return None if file is None else file.with_name(f"{file.stem}{ending}{file.suffix}")


def _report(trainer: Trainer, tensors, pictures: int, given: bool, seconds: float, dtype: torch.dtype) -> list[str]:
    settings, losses = trainer.settings, trainer.losses
    modules = sum(key.endswith(".alpha") for key in tensors)
    size = sum(tensor.numel() for key, tensor in tensors.items() if not key.endswith(".alpha"))
    low, high = settings.cfg
    tenth = max(1, len(losses) // 10)
    return [
        f"LCM-LoRA with {modules} modules, {size:,} parameters ({size * 2 / 1e6:.1f} MB in fp16).",
        f"{trainer.done} steps of {settings.batch * settings.accumulate} images from {pictures} pictures"
        f"{'' if given else ' that the model made itself'}; guidance "
        f"{f'{low:g}' if low == high else f'{low:g} to {high:g}'}, skip {settings.skip}, {str(dtype).split('.')[-1]}.",
        f"Loss {sum(losses[:tenth]) / tenth:.4g} in the first tenth, {sum(losses[-tenth:]) / tenth:.4g} in the last; "
        f"{seconds:.0f} seconds.",
    ]
