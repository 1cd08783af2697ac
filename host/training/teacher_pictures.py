"""Data without pictures: the MODEL's own, made by ComfyUI's sampler, once."""

from pathlib import Path

import comfy.model_sampling
import comfy.sample
import comfy.utils
import torch

from ...distillation import checkpoint
from ...distillation.draws import SAMPLES, generator
from ...distillation.settings import Settings
from ..page import show
from .data import fingerprint

STEPS = 25

# The last pictures: another learning rate must not cost them again. fingerprint -> latents.
_made: dict[str, list[torch.Tensor]] = {}


def is_flow(model) -> bool:
    """Whether the MODEL's noisy latents are (1 - sigma) * z0 + sigma * noise."""
    return isinstance(model.get_model_object("model_sampling"), comfy.model_sampling.CONST)


def teachers_pictures(model, prompts: list[tuple], empty: torch.Tensor, settings: Settings, cache: Path | None) -> list:
    """One (1, ...) latent for each prompt, as the graph has latents, on the CPU.

    prompts: (entry of positive, entry of negative) for each.   empty: (1, ...) zeros.   settings: batch, seed and cfg,
    of whose range the middle is used.   cache: file that keeps the latents for a run that is resumed, or None.
    Raises ValueError for a file from other inputs.
    """
    cfg = sum(settings.cfg) / 2
    inputs = {"prompts": fingerprint(prompts), "shape": list(empty.shape), "cfg": cfg, "seed": settings.seed}
    if cache is not None and cache.exists():
        kept, facts = checkpoint.read(cache)
        if wrong := checkpoint.differences(facts, inputs):
            raise ValueError(
                f"{cache.name} holds pictures that the model made for another training ({'; '.join(wrong)}). Set these "
                "as they were, or use another resume name."
            )
        return list(kept["latents"].split(1))
    identity = fingerprint(inputs, str(model.patches_uuid), id(model.model))
    if identity not in _made:
        made = _sampled(model, prompts, empty, settings, cfg)
        _made.clear()
        _made[identity] = made
    if cache is not None:
        checkpoint.write(cache, {"latents": torch.cat(_made[identity])}, inputs)
    return _made[identity]


def _sampled(model, prompts, empty, settings, cfg) -> list[torch.Tensor]:
    sampler, scheduler = ("euler", "simple") if is_flow(model) else ("dpmpp_2m", "sgm_uniform")
    alike: dict[tuple[int, int], list[int]] = {}
    for number, (positive, negative) in enumerate(prompts):
        alike.setdefault((id(positive), id(negative)), []).append(number)
    results: dict[int, torch.Tensor] = {}
    progress = comfy.utils.ProgressBar(len(prompts))
    for numbers in alike.values():
        positive, negative = prompts[numbers[0]]
        for first in range(0, len(numbers), settings.batch):
            chunk = numbers[first : first + settings.batch]
            noise = torch.cat([
                torch.randn(empty.shape, generator=generator(settings.seed, 0, number, SAMPLES)) for number in chunk
            ])  # fmt: skip
            made = comfy.sample.sample(
                model, noise, STEPS, cfg, sampler, scheduler, [positive], [negative], torch.zeros_like(noise),
                disable_pbar=not comfy.utils.PROGRESS_BAR_ENABLED, seed=settings.seed,
            )  # fmt: skip
            results |= {number: one.float().cpu() for number, one in zip(chunk, made.split(1), strict=True)}
            progress.update_absolute(len(results))
            show(f"the model has made {len(results)} of {len(prompts)} pictures to learn from")
    return [results[number] for number in range(len(prompts))]
