"""What the sampler tests share: Stable Diffusion's noise levels, two toy networks, and diffusers as the reference."""

import warnings
from collections.abc import Callable
from types import ModuleType

import torch
from torch import Tensor

from lcm_kit.samplers.schedule import timesteps_at

TRAIN_TIMESTEPS = 1000


def alphas_cumprod() -> Tensor:
    """Stable Diffusion's "scaled linear" schedule, float32 (1000,)."""
    betas = torch.linspace(0.00085**0.5, 0.012**0.5, TRAIN_TIMESTEPS, dtype=torch.float32) ** 2
    return torch.cumprod(1.0 - betas, dim=0)


def sigma_table() -> Tensor:
    """The same schedule as ascending sigmas, sqrt((1 - abar) / abar), float32 (1000,)."""
    abar = alphas_cumprod()
    return ((1.0 - abar) / abar).sqrt()


def toy_network(x_vp: Tensor, timestep: int) -> Tensor:
    """A network output that depends on every channel, on neighbours and on the timestep; smooth, not linear."""
    mixed = 0.6 * x_vp.flip(1) + 0.3 * x_vp.roll(1, -1)
    return 0.8 * x_vp + 0.3 * torch.tanh(mixed + timestep / TRAIN_TIMESTEPS)


def as_denoiser(prediction_type: str, table: Tensor) -> Callable[..., Tensor]:
    """toy_network behind k-diffusion's protocol: (x, sigma (batch,)) -> x0, all images at the same level."""

    def model(x: Tensor, sigma: Tensor) -> Tensor:
        timestep = int(timesteps_at(sigma[:1], table))
        level = table[timestep]
        assert torch.equal(sigma, level.expand(x.shape[0])), "the model must be called at exact table entries"
        x_vp = x / (1.0 + level**2).sqrt()
        output = toy_network(x_vp, timestep)
        if prediction_type == "epsilon":
            return x - level * output
        assert prediction_type == "v_prediction"
        return (x_vp - level * output) / (1.0 + level**2).sqrt()

    return model


def tape(seed: int) -> Callable[[int, Tensor], Tensor]:
    """Step noise drawn one after the other from one generator, as diffusers draws it."""
    generator = torch.Generator().manual_seed(seed)
    return lambda step, like: torch.randn(like.shape, generator=generator)


def diffusers() -> ModuleType:
    """The diffusers package. Warnings are errors in these tests, but not those that its own import gives off."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        import diffusers
        import diffusers.schedulers.scheduling_lcm
        import diffusers.schedulers.scheduling_tcd
    return diffusers
