"""Phases: a trajectory cut into parts of equal length, each with an end of its own (Wang et al. 2024, Phased Consistency
Models, arXiv 2405.18407, section 3.2).

The consistency function leads from x at sigma to the edge below it and not to the picture: one DDIM step there,
f(x, t) = x + (sigma_e - sigma) (x - x0) / sigma, with x0 the network's. At the edge it is x itself, whatever the network says.
So a network of M phases makes a picture in M such steps, without noise in between. With one phase it is the latent
consistency function.
"""

import torch
from torch import Tensor

START = -1
"""The edge below the first phase, timestep 0 being the first level of a table: sigma 0, the picture."""


def check_phases(phases: int, skip: int, train_timesteps: int) -> None:
    """Raises ValueError if phases and solver steps do not end where the other's do."""
    if train_timesteps % phases:
        fitting = [n for n in range(1, train_timesteps + 1) if train_timesteps % n == 0]
        raise ValueError(
            f"phases is {phases}, which does not divide the model's {train_timesteps} timesteps evenly; use "
            f"{_nearest(phases, fitting)}."
        )
    length = train_timesteps // phases
    if length % skip:
        fitting = [n for n in range(1, length + 1) if length % n == 0]
        raise ValueError(
            f"skip is {skip}, and a phase has {length} timesteps ({train_timesteps} in {phases} phases), which solver steps "
            f"of {skip} do not divide evenly; use {_nearest(skip, fitting)} for skip. Half a phase is {length / 2:g}."
        )


def _nearest(value: int, fitting: list[int]) -> str:
    below = [n for n in fitting if n < value][-1:]
    above = [n for n in fitting if n > value][:1]
    return " or ".join(map(str, below + above))


def edge_timesteps(phases: int, train_timesteps: int) -> tuple[int, ...]:
    """The timesteps that a run of one step a phase visits, descending: 999, 749, 499, 249 for 4 phases of 1000."""
    length = train_timesteps // phases
    return tuple(length * phase - 1 for phase in range(phases, 0, -1))


def edge_below(timestep: Tensor, phases: int, train_timesteps: int) -> Tensor:
    """(b,) timesteps -> (b,) where the phase of each ends, START for those of the lowest."""
    length = train_timesteps // phases
    return timestep // length * length - 1


def levels(table: Tensor, timestep: Tensor) -> Tensor:
    """Sigmas of timesteps, 0 for START. table: ascending sigmas of all training timesteps."""
    return torch.where(timestep.to(table.device) == START, 0.0, table[timestep.clamp(min=0)])


def phased_target(teacher: Tensor, own: Tensor, sigma: Tensor, sigma_next: Tensor, sigma_edge: Tensor) -> Tensor:
    """The x0 with which one DDIM step from sigma to the edge ends where two do: the teacher's to sigma_next, then one to
    the edge with the student's own x0 from there.

    teacher, own: (b, ...), x0 of the teacher at sigma and of the student at sigma_next.   Sigmas broadcast against them and
    descend: sigma > sigma_next >= sigma_edge >= 0.   A weighted mean of the two, for those steps are linear in x0: the
    teacher's alone where sigma_next is the edge, the student's alone where the edge is 0 and sigma_next above it.
    """
    # What each step leaves of its x. No number at 0 / 0, where sigma_next is the edge and the mean is not used.
    first, second = sigma_next / sigma, sigma_edge / sigma_next
    share = second * (1 - first) / (1 - first * second)
    return torch.where(sigma_next == sigma_edge, teacher, share * teacher + (1 - share) * own)
