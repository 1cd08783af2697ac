"""Boundary scalings of a consistency model, and the consistency function they make of a denoiser."""

from collections.abc import Sequence

import torch
from torch import Tensor


def boundary_scalings(
    timesteps: Tensor | Sequence[int], sigma_data: float = 0.5, timestep_scaling: float = 10.0
) -> tuple[Tensor, Tensor]:
    """c_skip and c_out at the given timesteps, each float32 in the timesteps' shape. Exactly (1, 0) at timestep 0.

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
    s = timestep_scaling * torch.as_tensor(timesteps).to(torch.float32)
    squares = s.square() + sigma_data**2
    return sigma_data**2 / squares, s / squares.sqrt()


def consistency_output(x: Tensor, denoised: Tensor, sigma: Tensor, c_skip: float, c_out: float) -> Tensor:
    """Consistency function f = c_skip * x_vp + c_out * denoised, in the shape of x.

    x: latent in sigma space, x = x0 + sigma * eps.   denoised: the model's x0 for it.   sigma: () level of x.
    The scalings are defined for the variance-preserving latent a model is trained on, x_vp = x / sqrt(1 + sigma^2);
    multiplying x itself would be too large by that root.
    """
    return c_skip * (x / (1.0 + sigma * sigma).sqrt()) + c_out * denoised
