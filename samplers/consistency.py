"""Boundary scalings of a consistency model."""

from collections.abc import Sequence
from typing import overload

import torch
from torch import Tensor


@overload
def boundary_scalings(
    timesteps: int, sigma_data: float = ..., timestep_scaling: float = ...
) -> tuple[float, float]: ...
@overload
def boundary_scalings(
    timesteps: Tensor | Sequence[int], sigma_data: float = ..., timestep_scaling: float = ...
) -> tuple[Tensor, Tensor]: ...
def boundary_scalings(
    timesteps: Tensor | Sequence[int] | int, sigma_data: float = 0.5, timestep_scaling: float = 10.0
) -> tuple[Tensor, Tensor] | tuple[float, float]:
    """c_skip and c_out: numbers for one timestep, else float32 tensors in the timesteps' shape. (1, 0) at timestep 0.

    c_skip = d^2 / (s^2 + d^2) and c_out = s / sqrt(s^2 + d^2), with s = timestep_scaling * timestep and
    d = sigma_data: latent consistency models (Luo et al. 2023, arXiv 2310.04378), in the form and with the constants
    that the released models were trained with (diffusers LCMScheduler). They make f(x, 0) = x hold by construction.
    At timestep 19, the lowest of the usual grid, c_skip is 7e-6, and it falls as 1 / timestep^2: exactness asks for
    it, eyes do not.
    sigma_data: above 0. timestep_scaling: above 0. Raises ValueError otherwise.
    """
    if not (sigma_data > 0 and timestep_scaling > 0):
        raise ValueError(
            f"sigma_data is {sigma_data} and timestep_scaling is {timestep_scaling}; both must be above 0. "
            "LCM uses 0.5 and 10."
        )
    if isinstance(timesteps, int):
        scaled = timestep_scaling * timesteps
        return sigma_data**2 / (scaled**2 + sigma_data**2), scaled / (scaled**2 + sigma_data**2) ** 0.5
    s = timestep_scaling * torch.as_tensor(timesteps).to(torch.float32)
    squares = s.square() + sigma_data**2
    return sigma_data**2 / squares, s / squares.sqrt()
