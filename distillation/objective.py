"""The latent consistency distillation loss: Algorithm 1 of Luo et al. 2023 (arXiv 2310.04378), whose parameters are
those of a LoRA in arXiv 2311.05556 (its Algorithm 1 and section 3.1).

Everything is written on denoisers, x0 = denoiser(x, sigma), in ComfyUI's sigma space: x = z0 + sigma * noise for
diffusion models, x = (1 - sigma) * z0 + sigma * noise for flow models. So the same lines serve epsilon, v-prediction
and flow. The paper's letters: z_t = x / sqrt(1 + sigma^2), alpha(t) = 1 / sqrt(1 + sigma^2), omega = cfg - 1.
Teacher, student and target are one network, with its LoRA off or on.
"""

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..samplers.consistency import boundary_scalings
from .adapter import LoraAdapters
from .phases import edge_below, levels, phased_target
from .settings import Weighting

Denoiser = Callable[[Tensor, Tensor], Tensor]
"""(x (b, ...), sigma (b,)) -> denoised (b, ...)."""

ConditionalDenoiser = Callable[[Tensor, Tensor, Any], Tensor]
"""(x (b, ...), sigma (b,), cond for these b images) -> denoised (b, ...). What a cond is, its maker knows."""


@dataclass(frozen=True)
class Batch:
    """b images to learn from, on the network's device.

    z0: (b, ...) latents as the network sees them.   cond, uncond: what the denoiser takes for b images.
    both: cond and uncond joined for 2 b images, so that the teacher runs once; None runs it twice.
    """

    z0: Tensor
    cond: Any
    uncond: Any
    both: Any = None


@dataclass(frozen=True)
class Draws:
    """What one step draws for its b images: Algorithm 1's n, omega and the noise of z_{t_n+k}.

    timestep: (b,) integers on the CPU, points of the skipping grid.   cfg: (b,) omega + 1.
    noise: (b, ...), standard normal.
    """

    timestep: Tensor
    cfg: Tensor
    noise: Tensor


def guided(denoised: Tensor, denoised_uncond: Tensor, cfg: float | Tensor) -> Tensor:
    """Classifier-free guidance: denoised_uncond + cfg * (denoised - denoised_uncond).

    cfg: ComfyUI's scale, 1 means none; a number or (b, 1, ...). The paper's omega is cfg - 1, Algorithm 1's line for
    z_hat: (1 + omega) Psi(cond) - omega Psi(null). DDIM's Psi is linear in the denoised, so guiding that is the same.
    """
    return denoised_uncond + cfg * (denoised - denoised_uncond)


def noised(z0: Tensor, noise: Tensor, sigma: Tensor, *, flow: bool = False) -> Tensor:
    """x at level sigma, Algorithm 1's "sample z_{t_n+k} ~ N(alpha(t) z; sigma^2(t) I)". sigma: broadcasts against z0."""
    return ((1 - sigma) * z0 if flow else z0) + sigma * noise


def ddim_step(x: Tensor, denoised: Tensor, sigma: Tensor, sigma_next: Tensor) -> Tensor:
    """x at sigma_next: Algorithm 1's z_hat = z + Psi(z, t, t_next), with DDIM (Song et al. 2021, eta = 0) for Psi.

    In sigma space DDIM is one Euler step, and the same line is Euler's for flow models.
    sigma, sigma_next: broadcast against x. sigma above 0.
    """
    return x + (sigma_next - sigma) * (x - denoised) / sigma


def pseudo_huber(error: Tensor, c: float = 0.001) -> Tensor:
    """sqrt(error^2 + c^2) - c, elementwise: quadratic below c, linear above (Song and Dhariwal 2023, equation 7)."""
    # The same number without the difference of two near-equal ones, which leaves few digits of a small error.
    square = error.square()
    return square / ((square + c * c).sqrt() + c)


def consistency(denoise: Denoiser, x: Tensor, sigma: Tensor, timestep: Tensor, *, flow: bool = False) -> Tensor:
    """The consistency function f(x, t) = c_skip(t) z_t + c_out(t) x0, (b, ...): f_theta of Algorithm 1.

    x: (b, ...) at levels sigma (b,); timestep: (b,) integers, the training timesteps of those levels. At timestep 0 it
    is z_t itself: that anchors the function. For flow models z_t is x, for diffusion models x / sqrt(1 + sigma^2).
    """
    wide = sigma.view(-1, *[1] * (x.ndim - 1))
    # On the CPU: boundary_scalings returns exactly (1, 0) at timestep 0 there.
    c_skip, c_out = (c.to(x.device, x.dtype).view_as(wide) for c in boundary_scalings(timestep.cpu()))
    z = x if flow else x / (1 + wide * wide).sqrt()
    return c_skip * z + c_out * denoise(x, sigma)


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
    huber_c: float | None = 0.001,
    weighting: Weighting = "x0",
    flow: bool = False,
    phases: int = 1,
) -> Tensor:
    """Mean distance d(f(z_{t_n+k}, t_n+k), f_minus(z_hat_{t_n}, t_n)) of Algorithm 1: (), float32.

    student, target: the network with its LoRA (the target without gradient).   teacher: guided, without the LoRA.
    z0, noise: (b, ...).   timestep: (b,) points of the skipping grid.   stride: training timesteps per solver step
    (the paper's k; 20 for a grid of 50).   table: ascending sigmas of all training timesteps.
    huber_c: c of the pseudo-Huber distance, as in the authors' scripts; None is the paper's L2, squared.
    weighting: "x0" as published; "v" measures the same error as one of v, x0's times sqrt(1 + 1 / sigma^2) (Salimans and
    Ho 2022, section 4), so that the network is asked for the same precision at every noise level.
    The neighbour of timestep t is max(t - stride, 0); there the target is the trajectory's own point.
    phases: above 1, trajectories end at the edge of their phase (see phases.py), and the error is that of the x0 whose
    step leads there: of the point at the edge it is a share that shrinks towards the edge.
    """
    shape = (-1, *[1] * (z0.ndim - 1))
    sigma = table[timestep]
    x = noised(z0, noise, sigma.view(shape), flow=flow)
    if phases > 1:
        with torch.no_grad():
            wanted = _phased(teacher, target, x, timestep, stride, table, phases)
        error = student(x, sigma) - wanted
    else:
        timestep_next = (timestep - stride).clamp(min=0)
        sigma_next = table[timestep_next]
        with torch.no_grad():
            x_next = ddim_step(x, teacher(x, sigma), sigma.view(shape), sigma_next.view(shape))
            wanted = consistency(target, x_next, sigma_next, timestep_next, flow=flow)
        error = consistency(student, x, sigma, timestep, flow=flow) - wanted
    if weighting == "v":
        # A flow model's v is (x - x0) / sigma.
        error = error * (1 / sigma if flow else (1 + sigma**-2).sqrt()).view(shape)
    return (error.square() if huber_c is None else pseudo_huber(error, huber_c)).mean()


def _phased(
    teacher: Denoiser, target: Denoiser, x: Tensor, timestep: Tensor, stride: int, table: Tensor, phases: int
) -> Tensor:
    """The x0 that the student should have at x, (b, ...), for its step to the edge below. See consistency_loss."""
    edge = edge_below(timestep, phases, len(table))
    following = torch.maximum(timestep - stride, edge)
    sigma, sigma_next, sigma_edge = (levels(table, t) for t in (timestep, following, edge))
    wide = [level.view(-1, *[1] * (x.ndim - 1)) for level in (sigma, sigma_next, sigma_edge)]
    by_teacher = teacher(x, sigma)
    x_next = ddim_step(x, by_teacher, wide[0], wide[1])
    # Networks know no level below the table; what is asked for there is not used.
    own = target(x_next, sigma_next.clamp(min=float(table[0])))
    return phased_target(by_teacher, own, *wide)


def distillation_loss(
    denoise: ConditionalDenoiser,
    adapters: LoraAdapters,
    batch: Batch,
    draws: Draws,
    *,
    stride: int,
    table: Tensor,
    huber_c: float | None = 0.001,
    weighting: Weighting = "x0",
    flow: bool = False,
    phases: int = 1,
    averaged: Callable[[], AbstractContextManager[None]] = nullcontext,
) -> Tensor:
    """consistency_loss with one network in all three parts: (), with gradients for the adapters only.

    denoise: the network that `adapters` sits on. Off, it is the teacher, guided by draws.cfg; on, student and target.
    averaged: context in which the LoRA is Algorithm 1's theta_minus, the moving average; by default theta_minus is
    theta, as in the authors' LoRA scripts.
    """
    cfg = draws.cfg.view(-1, *[1] * (batch.z0.ndim - 1))

    def student(x: Tensor, sigma: Tensor) -> Tensor:
        return denoise(x, sigma, batch.cond)

    def target(x: Tensor, sigma: Tensor) -> Tensor:
        with averaged():
            return denoise(x, sigma, batch.cond)

    def teacher(x: Tensor, sigma: Tensor) -> Tensor:
        with adapters.disabled():
            if batch.both is None:
                cond, uncond = denoise(x, sigma, batch.cond), denoise(x, sigma, batch.uncond)
            else:
                cond, uncond = denoise(torch.cat([x, x]), torch.cat([sigma, sigma]), batch.both).chunk(2)
        return guided(cond, uncond, cfg)

    return consistency_loss(
        student, teacher, target, batch.z0, draws.noise, draws.timestep, stride, table, huber_c=huber_c,
        weighting=weighting, flow=flow, phases=phases,
    )  # fmt: skip
