"""Gaussian data, whose probability-flow ODE is solved by hand, and a network that a LoRA can turn into its solution."""

import torch
from torch import nn

from lcm_kit.distillation.objective import Batch
from lcm_kit.distillation.settings import Settings

BETAS = torch.linspace(0.00085**0.5, 0.012**0.5, 1000, dtype=torch.float64) ** 2
ALPHA_BAR = torch.cumprod(1 - BETAS, 0)
TABLE = ((1 - ALPHA_BAR) / ALPHA_BAR).sqrt().float()
SPREAD = 0.5  # standard deviation of the data, centred
SIZE = 3  # numbers in an "image"
STRIDE = 200
SETTINGS = Settings(
    steps=6,
    batch=4,
    accumulate=2,
    learning_rate=0.02,
    warmup=0,
    guidance_min=1.0,
    guidance_max=3.0,
    skip=STRIDE,
    seed=3,
)
GRID = torch.arange(1000 // STRIDE) * STRIDE + STRIDE - 1


def width(sigma):
    """Standard deviation of x = z0 + sigma * noise. Along the ODE, x / width(sigma) does not change."""
    return (SPREAD**2 + sigma**2).sqrt()


def perfect_denoiser(x, sigma):
    """E[z0 | x]."""
    return x * (SPREAD**2 / width(sigma) ** 2).view(-1, 1)


def perfect_jump(x, sigma):
    """Where the ODE leads from x at sigma, at the start of the table."""
    return x * (width(TABLE[0]) / width(sigma)).view(-1, 1)


def exact_step_gain(timestep, stride):
    """The gain g for which a DDIM step with denoised = g * x lands on the ODE's own solution."""
    sigma, sigma_next = TABLE[timestep], TABLE[(timestep - stride).clamp(min=0)]
    return 1 + (width(sigma_next) / width(sigma) - 1) * sigma / (sigma - sigma_next)


class Gains(nn.Module):
    """denoised = gain(timestep) * x: one linear layer per grid point, the teacher of `exact_step_gain`."""

    def __init__(self, points=GRID, stride=STRIDE):
        super().__init__()
        self.points = torch.cat([torch.zeros(1, dtype=torch.long), points])
        self.blocks = nn.ModuleList(nn.Linear(SIZE, SIZE, bias=False) for _ in self.points)
        for layer, point in zip(self.blocks, self.points, strict=True):
            layer.weight.data = torch.eye(SIZE) * (exact_step_gain(point, stride) if point else 1.0)

    def forward(self, x, sigma):
        nearest = (TABLE[self.points][None] - sigma[:, None]).abs().argmin(1)
        return torch.stack([layer(x) for layer in self.blocks])[nearest, torch.arange(len(x))]


def denoiser(network):
    """The network as the trainer calls it; this toy has no prompts."""
    return lambda x, sigma, cond: network(x, sigma)


def data(step, items):
    """Fresh Gaussian data, from the numbers of step and item alone."""
    draws = [torch.randn(SIZE, generator=torch.Generator().manual_seed(step * 1000 + item)) for item in items]
    return Batch(SPREAD * torch.stack(draws), None, None)
