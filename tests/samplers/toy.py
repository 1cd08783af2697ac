"""What the sampler tests share: Stable Diffusion's noise levels, a toy network behind four prediction types, and
diffusers as the reference.
"""

import warnings
from collections.abc import Callable
from types import ModuleType

import torch
from torch import Tensor

from lcm_kit.samplers.noise import level_numbers

TRAIN_TIMESTEPS = 1000


def alphas_cumprod() -> Tensor:
    """Stable Diffusion's "scaled linear" schedule, float32 (1000,)."""
    betas = torch.linspace(0.00085**0.5, 0.012**0.5, TRAIN_TIMESTEPS, dtype=torch.float32) ** 2
    return torch.cumprod(1.0 - betas, dim=0)


def zero_snr_alphas_cumprod() -> Tensor:
    """The same, rescaled to end in pure noise (Lin et al. 2023, arXiv 2305.08891, Algorithm 1), as ComfyUI holds it:
    its last entry is 4.897e-8, not 0, so that a finite sigma exists.
    """
    root = alphas_cumprod().sqrt()
    abar = ((root - root[-1]) * root[0] / (root[0] - root[-1])) ** 2
    abar[-1] = 4.8973451890853435e-08
    return abar


def sigma_table(abar: Tensor | None = None) -> Tensor:
    """A schedule as ascending sigmas, sqrt((1 - abar) / abar), float32 (1000,); Stable Diffusion's unless given."""
    abar = alphas_cumprod() if abar is None else abar
    return ((1.0 - abar) / abar).sqrt()


def toy_network(x_vp: Tensor, timestep: float) -> Tensor:
    """A network output that depends on every channel, on neighbours and on the timestep; smooth, not linear."""
    mixed = 0.6 * x_vp.flip(1) + 0.3 * x_vp.roll(1, -1)
    return 0.8 * x_vp + 0.3 * torch.tanh(mixed + timestep / TRAIN_TIMESTEPS)


def as_denoiser(prediction_type: str, table: Tensor) -> Callable[..., Tensor]:
    """toy_network behind k-diffusion's protocol: (x, sigma (batch,)) -> x0, all images at the same level.

    prediction_type: "epsilon", "v_prediction" or "sample", as diffusers calls them.
    """
    timesteps = {level: timestep for timestep, level in enumerate(table.tolist())}

    def model(x: Tensor, sigma: Tensor) -> Tensor:
        level = sigma[0]
        assert torch.equal(sigma, level.expand(x.shape[0])), "all images must be at the same level"
        assert level.item() in timesteps, "the model must be called at exact table entries"
        scale = (1.0 + level**2).sqrt()
        output = toy_network(x / scale, timesteps[level.item()])
        if prediction_type == "epsilon":
            return x - level * output
        if prediction_type == "v_prediction":
            return (x / scale - level * output) / scale
        assert prediction_type == "sample"
        return output

    return model


def as_flow_denoiser(x: Tensor, sigma: Tensor) -> Tensor:
    """toy_network as the velocity of a rectified flow, behind the same protocol."""
    assert torch.equal(sigma, sigma[:1].expand(x.shape[0])), "all images must be at the same level"
    return x - sigma[0] * toy_network(x, sigma[0].item() * TRAIN_TIMESTEPS)


def rectified_flow(sigma: Tensor, noise: Tensor, latent: Tensor) -> Tensor:
    """The forward process of flow models, as ComfyUI's noise_scaling."""
    return sigma * noise + (1.0 - sigma) * latent


def step_generator(seed: int, step: int) -> torch.Generator:
    """Where the noise of one step is drawn from, here and in diffusers, whichever of the others draw any."""
    return torch.Generator().manual_seed(seed * TRAIN_TIMESTEPS + step)


def tape(seed: int, sigmas: Tensor, table: Tensor | None = None) -> Callable[[int, Tensor], Tensor]:
    """Noise of the levels of this run from step_generator, whose steps are counted there."""
    step_to = {number: step for step, number in enumerate(level_numbers(sigmas[1:], table))}
    return lambda level, like: torch.randn(like.shape, generator=step_generator(seed, step_to[level]))


def diffusers() -> ModuleType:
    """The diffusers package. Warnings are errors in these tests, but not those that its own import gives off."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        import diffusers
        import diffusers.schedulers.scheduling_flow_match_lcm
        import diffusers.schedulers.scheduling_lcm
        import diffusers.schedulers.scheduling_tcd
    return diffusers
