"""A run of a guider as ComfyUI's own nodes make it: the noise it starts from, torch's generators, previews, the LATENT."""

import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import comfy.sample
import comfy.samplers
import comfy.utils
import latent_preview
import torch

from ...lora_merge.words import many
from ...samplers.noise import level_numbers, stream_seed
from ...samplers.schedule import MOST_STEPS
from .latents import fitted, given_out

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Section:
    """Which part of a schedule is run, and whether the latent begins and ends with noise, as in core's KSamplerAdvanced.

    start, end: steps of the schedule, counted from 0; the section is start, ..., end - 1.
    add_noise: False where the latent comes with the noise of the level that the section starts from.
    leftover: True keeps the noise of the level that it ends at, for who goes on; False ends in a picture.
    """

    start: int = 0
    end: int = MOST_STEPS
    add_noise: bool = True
    leftover: bool = False

    def of(self, sigmas: torch.Tensor) -> torch.Tensor:
        """(steps + 1,) the section's levels, of all levels of a schedule. A single one where no step is left."""
        section = sigmas[self.start : self.end + 1].clone()
        if not self.leftover and len(section):
            section[-1] = 0.0
        return section if len(section) > 1 else sigmas[-1:]


WHOLE = Section()


def run(
    stages: Sequence[tuple[comfy.samplers.CFGGuider, torch.Tensor]],
    latent: dict,
    sampler_for: Callable[[list[int]], comfy.samplers.Sampler],
    *,
    seed: int,
    calls: int,
    add_noise: bool = True,
    watch: Callable | None = None,
) -> dict:
    """A LATENT sampled as ComfyUI's own nodes do it, with previews and a progress bar of so many calls.

    stages: (guider, sigmas) one after another; all but the first start from the level that the one before ends at, and
    the sampler carries the latent over itself (sampler.Relay).
    sampler_for: batch indices of the images -> the sampler of all stages.
    watch: is called with (call, x0, x, calls) after each step, in place of what shows previews and progress.
    """
    first = stages[0][0].model_patcher
    latent = fitted(first, latent)
    indices = batch_indices_of(latent)
    shown = watch or latent_preview.prepare_callback(first, calls)
    with generators_kept(first.load_device):
        noise = _noise(latent["samples"], seed, indices, add_noise, stages[0][1])
        sampler, done = sampler_for(indices), 0
        for guider, sigmas in stages:
            samples = guider.sample(
                noise,
                latent["samples"],
                sampler,
                sigmas,
                denoise_mask=latent.get("noise_mask"),
                callback=lambda call, x0, x, _, done=done: shown(call + done, x0, x, calls),
                disable_pbar=not comfy.utils.PROGRESS_BAR_ENABLED,
                seed=seed,
            )
            done += len(sigmas) - 1
    return given_out(latent, samples)


def _noise(samples, seed: int, indices: list[int], add_noise: bool, sigmas: torch.Tensor):
    """What is added to the latent; torch's own generators are seeded."""
    if add_noise:
        return initial_noise(samples, seed, indices)
    # Core leaves them unseeded here. The level counts, or nodes that draw would repeat what they drew in the first part.
    torch.manual_seed(stream_seed(seed, 0, *level_numbers(sigmas[:1])))
    if samples.is_nested:
        return type(samples)([torch.zeros_like(part) for part in samples.unbind()])
    return torch.zeros_like(samples)


@contextmanager
def generators_kept(device: torch.device) -> Iterator[None]:
    """torch's own generators, of the CPU and of all devices of this kind, are afterwards as they were before.

    Core's initial noise seeds them and leaves them so, which nodes that draw while a model is sampled count on
    (HyperTile, Token Merging, noise on the prompt). So does a run here; what comes after it in the graph does not see it.
    """
    states = [(torch.set_rng_state, torch.get_rng_state())]
    kind = getattr(torch, device.type, None)
    for every in ("_all", ""):  # MPS has one device only
        read, write = (getattr(kind, f"{verb}_rng_state{every}", None) for verb in ("get", "set"))
        if device.type != "cpu" and read and write:
            states.append((write, read()))
            break
    try:
        yield
    finally:
        for write, state in states:
            write(state)


def initial_noise(samples: torch.Tensor, seed: int, batch_indices: list[int]) -> torch.Tensor:
    """Core's initial noise, drawn image by image: what is drawn at once differs where an image's size is no
    multiple of 16. Leaves torch's own generators as core's function does, seeded and that many numbers further on.

    Of a nested latent each image has its parts drawn one after the other: a single image is core's. Core draws one part
    for all images, then the next: how many images there are would change the second.
    """
    if not samples.is_nested:
        return comfy.sample.prepare_noise(samples, seed, batch_indices)
    generator, parts, drawn = torch.manual_seed(seed), samples.unbind(), {}
    for index in range(max(batch_indices) + 1):
        image = [torch.randn(1, *part.shape[1:], generator=generator).to(part.dtype) for part in parts]
        if index in batch_indices:
            drawn[index] = image
    return type(samples)([torch.cat([drawn[index][n] for index in batch_indices]) for n in range(len(parts))])


def batch_indices_of(latent: dict) -> list[int]:
    count = latent["samples"].shape[0]
    indices = latent.get("batch_index")
    if indices is None:
        return list(range(count))
    if len(indices) != count:
        logger.warning(
            "The latent has %s but %s; its noise is numbered from 0 instead.",
            many(count, "images"), many(len(indices), "batch indices", "batch index"),
        )  # fmt: skip
        return list(range(count))
    return [int(index) for index in indices]
