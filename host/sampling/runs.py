"""A run of a guider as ComfyUI's own nodes make it: the noise it starts from, torch's generators, previews, the LATENT."""

import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import comfy.sample
import comfy.samplers
import comfy.utils
import latent_preview
import torch

from .latents import fitted, given_out

logger = logging.getLogger(__name__)


def run(
    guider,
    latent: dict,
    sigmas: torch.Tensor,
    sampler_for: Callable[[list[int]], comfy.samplers.Sampler],
    *,
    seed: int,
    calls: int,
) -> dict:
    """A LATENT sampled as ComfyUI's own nodes do it, with previews and a progress bar of so many calls.

    sampler_for: batch indices of the images -> the sampler.
    """
    model = guider.model_patcher
    latent = fitted(model, latent)
    indices = batch_indices_of(latent)
    with generators_kept(model.load_device):
        samples = guider.sample(
            initial_noise(latent["samples"], seed, indices),
            latent["samples"],
            sampler_for(indices),
            sigmas,
            denoise_mask=latent.get("noise_mask"),
            callback=latent_preview.prepare_callback(model, calls),
            disable_pbar=not comfy.utils.PROGRESS_BAR_ENABLED,
            seed=seed,
        )
    return given_out(latent, samples)


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

    The parts of a nested latent are drawn as one, as they are sampled. Core draws one part for all images, then the
    next: how many images there are would change the second.
    """
    if not samples.is_nested:
        return comfy.sample.prepare_noise(samples, seed, batch_indices)
    packed, shapes = comfy.utils.pack_latents(samples.unbind())
    noise = comfy.sample.prepare_noise(packed, seed, batch_indices)
    return type(samples)(comfy.utils.unpack_latents(noise, shapes))


def batch_indices_of(latent: dict) -> list[int]:
    count = latent["samples"].shape[0]
    indices = latent.get("batch_index")
    if indices is None:
        return list(range(count))
    if len(indices) != count:
        logger.warning(
            "The latent has %d images but %d batch indices; its noise is numbered from 0 instead.", count, len(indices)
        )
        return list(range(count))
    return [int(index) for index in indices]
