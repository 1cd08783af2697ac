"""One step of consistency sampling is a linear combination of three tensors; here are its weights."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from .consistency import boundary_scalings
from .noise import level_numbers
from .renoise import NoiseScaling, noise_kept, signal_and_noise, variance_exploding

HALF_RESOLUTION = 2.0**-25


# c_skip and c_out where f is the model's x0.
_WITHOUT_SKIP = (0.0, 1.0)


@dataclass(frozen=True)
class Plan:
    """All that is known of a run before it begins: for each step its weights, and the number of the level it returns to."""

    weights: "tuple[StepWeights, ...]"
    numbers: tuple[int, ...]


def plan_run(
    sigmas: Tensor,
    *,
    gamma: float | Sequence[float] = 1.0,
    timesteps: Tensor | Sequence[int] | None = None,
    table: Tensor | None = None,
    noise_scaling: NoiseScaling = variance_exploding,
) -> Plan:
    """The plan of a run; the arguments are those of multistep.sample_lcm, and so are the errors.

    A function of its arguments' values alone, so who runs one schedule again and again may keep it.
    """
    _check_levels(sigmas)
    weights = step_weights(sigmas, gamma=gamma, timesteps=timesteps, table=table, noise_scaling=noise_scaling)
    return Plan(tuple(weights), tuple(level_numbers(sigmas[1:], table)))


@dataclass(frozen=True)
class StepWeights:
    """x_next = x * (latent) + denoised * (model's x0) + fresh * (unit noise drawn for this step)."""

    x: float
    denoised: float
    fresh: float


def step_weights(
    sigmas: Tensor,
    *,
    gamma: float | Sequence[float] = 1.0,
    timesteps: Tensor | Sequence[int] | None = None,
    table: Tensor | None = None,
    noise_scaling: NoiseScaling = variance_exploding,
) -> list[StepWeights]:
    """(steps,) weights of a run; the arguments are those of multistep.sample_lcm.

    With the latent x_t = a_t * x0 + b_t * noise (1 and sigma in the variance-exploding process), a step is

        f      = c_skip * x_t / sqrt(a_t^2 + b_t^2) + c_out * D      the consistency function (arXiv 2310.04378, eq. 9)
        e      = (x_t - a_t * f) / b_t                               the noise that f implies
        x_next = a * f + b * (r * e + sqrt(1 - r^2) * z)             back to the next level; r from renoise.noise_kept

    with D the model's x0 and z fresh noise. c_skip is defined for the variance-preserving latent that a model is
    trained on, hence the root. Everything but x_t, D and z is known before the run, so the weights are plain numbers:
    the loop then costs one pass over each tensor and reads nothing back from the device.
    A weight is exactly 0 where its tensor is not needed: fresh at r = 1 and in the step to sigma 0. Where c_skip is
    below half of float32's resolution (timestep 290 and above), adding it could not be seen in f: c_skip is 0 and
    c_out 1 there.
    Raises ValueError as sample_lcm does.
    """
    steps = max(len(sigmas) - 1, 0)
    sigmas = sigmas.detach().cpu()
    scalings = [_WITHOUT_SKIP] * steps if timesteps is None else _scalings(timesteps, steps)
    shares = noise_kept(sigmas, gamma, table=table, noise_scaling=noise_scaling)
    levels = signal_and_noise(sigmas, noise_scaling)
    return [_weights(levels[i], levels[i + 1], *scalings[i], shares[i]) for i in range(steps)]


def _weights(
    level: tuple[float, float],
    next_level: tuple[float, float],
    c_skip: float,
    c_out: float,
    share: float,
) -> StepWeights:
    (a_t, b_t), (a, b) = level, next_level
    if c_skip < HALF_RESOLUTION:
        c_skip, c_out = _WITHOUT_SKIP
    skip = c_skip / math.hypot(a_t, b_t)
    if share and b and not b_t:
        raise ValueError(
            f"a step goes from a latent without noise to one with noise {b:g}, so there is no noise to keep. Set gamma to "
            "1, which draws all of it anew."
        )
    # Not divided where nothing is kept: a process without noise of its own has b = b_t = 0.
    kept = b * share / b_t if share and b else 0.0
    return StepWeights(
        x=a * skip + kept * (1.0 - a_t * skip),
        denoised=(a - kept * a_t) * c_out,
        fresh=b * math.sqrt((1.0 - share) * (1.0 + share)),
    )


def _check_levels(sigmas: Tensor) -> None:
    if sigmas.ndim != 1:
        raise ValueError(f"sigmas has shape {tuple(sigmas.shape)}; it must be (steps + 1,).")
    levels = sigmas.tolist()
    if not all(math.isfinite(level) and level >= 0 for level in levels) or 0.0 in levels[:-1]:
        raise ValueError(f"sigmas are {levels}; all must be finite and above 0, the last may be 0.")


def _scalings(timesteps: Tensor | Sequence[int], steps: int) -> list[tuple[float, float]]:
    if len(timesteps) != steps:
        raise ValueError(
            f"there are {len(timesteps)} timesteps for {steps} steps; give one for each of sigmas[:-1], or None."
        )
    values = timesteps.tolist() if isinstance(timesteps, Tensor) else timesteps
    return [boundary_scalings(int(value)) for value in values]
