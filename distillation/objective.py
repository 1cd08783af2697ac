"""The latent consistency distillation loss (Luo et al. 2023, arXiv 2311.05556, Algorithm 1), in sigma space.

Everything is written on denoisers, x0 = denoiser(x, sigma), with x = z0 + sigma * noise: the same lines serve
epsilon and v-prediction models. Teacher, student and target are one network, with its LoRA off or on.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from ..samplers.consistency import boundary_scalings

Denoiser = Callable[[Tensor, Tensor], Tensor]
"""(x (b, ...), sigma (b,)) -> denoised (b, ...)."""


def guided(denoised: Tensor, denoised_uncond: Tensor, cfg: float | Tensor) -> Tensor:
    """Classifier-free guidance: denoised_uncond + cfg * (denoised - denoised_uncond).

    cfg: ComfyUI's scale, 1 means none; a number or (b, 1, ...). The paper's w is cfg - 1: (1 + w) cond - w uncond.
    """
    return denoised_uncond + cfg * (denoised - denoised_uncond)


def ddim_step(x: Tensor, denoised: Tensor, sigma: Tensor, sigma_next: Tensor) -> Tensor:
    """x at sigma_next by one DDIM step (Song et al. 2021, eta = 0), which in sigma space is one Euler step.

    sigma, sigma_next: broadcast against x. sigma above 0.
    """
    return x + (sigma_next - sigma) * (x - denoised) / sigma


def pseudo_huber(error: Tensor, c: float = 0.001) -> Tensor:
    """sqrt(error^2 + c^2) - c, elementwise: quadratic below c, linear above (Song and Dhariwal 2023, equation 7)."""
    # The same number without the difference of two near-equal ones, which leaves few digits of a small error.
    square = error.square()
    return square / ((square + c * c).sqrt() + c)


def consistency(denoise: Denoiser, x: Tensor, sigma: Tensor, timestep: Tensor) -> Tensor:
    """The consistency function f(x, t) = c_skip * x_vp + c_out * x0, (b, ...). At timestep 0 it is x_vp itself.

    x: (b, ...) at levels sigma (b,); timestep: (b,) integers, the training timesteps of those levels.
    """
    wide = sigma.view(-1, *[1] * (x.ndim - 1))
    c_skip, c_out = (c.to(x.device).view_as(wide) for c in boundary_scalings(timestep.cpu()))
    return c_skip * x / (1 + wide * wide).sqrt() + c_out * denoise(x, sigma)


def consistency_loss(
    student: Denoiser,
    teacher: Denoiser,
    target: Denoiser,
    z0: Tensor,
    noise: Tensor,
    timestep: Tensor,
    stride: int,
    table: Tensor,
    *,
    huber_c: float = 0.001,
) -> Tensor:
    """Mean pseudo-Huber distance of the consistency function at neighbouring points of the teacher's trajectory: ().

    student, target: the network with its LoRA (the target without gradient).   teacher: guided, without the LoRA.
    z0, noise: (b, ...).   timestep: (b,) points of the skipping grid.   stride: training timesteps per solver step
    (the paper's k; 20 for a grid of 50).   table: ascending sigmas of all training timesteps.
    The neighbour of timestep t is max(t - stride, 0); there the target is the trajectory's own point, which anchors
    the whole function.
    """
    shape = (-1, *[1] * (z0.ndim - 1))
    timestep_next = (timestep - stride).clamp(min=0)
    sigma, sigma_next = table[timestep], table[timestep_next]
    x = z0 + sigma.view(shape) * noise
    with torch.no_grad():
        x_next = ddim_step(x, teacher(x, sigma), sigma.view(shape), sigma_next.view(shape))
        wanted = consistency(target, x_next, sigma_next, timestep_next)
    return pseudo_huber(consistency(student, x, sigma, timestep) - wanted, huber_c).mean()
