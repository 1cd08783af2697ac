"""How a step returns from x0 to a noise level: the forward process, and gamma's mix of old and fresh noise."""

import math
import re
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from .schedule import MOST_STEPS, timesteps_at

NoiseScaling = Callable[[Tensor, Tensor, Tensor], Tensor]
"""(sigma (n,), noise (n, ...), latent (n, ...)) -> noised latent; linear in noise and in latent.

ComfyUI's model_sampling.noise_scaling."""


def variance_exploding(sigma: Tensor, noise: Tensor, latent: Tensor) -> Tensor:
    """x = latent + sigma * noise, the forward process of ComfyUI's Stable Diffusion models (epsilon, v, x0)."""
    return latent + sigma * noise


def noise_kept(
    sigmas: Tensor,
    gamma: float | Sequence[float],
    *,
    table: Tensor | None = None,
    noise_scaling: NoiseScaling = variance_exploding,
) -> list[float]:
    """Share of the predicted noise in the noise that each step leaves behind: (steps,), each in [0, 1].

    sigmas: (steps + 1,) levels of a run; step i leaves the level sigmas[i + 1]. A step to 0 leaves no noise, and its
    share means nothing.
    gamma: [0, 1]. 1: all noise is fresh, every share exactly 0 (LCM's multistep sampling). 0: none is, every share
    exactly 1 (DDIM, Euler's method). Between: the strategic stochastic sampling of TCD (Zheng et al. 2024, arXiv
    2402.19159): follow the trajectory on to timestep s = floor((1 - gamma) * t), then add noise up to t.
    A sequence gives step after step its own, see gamma_per_step.
    table: ascending sigmas of all training timesteps; only needed for 0 < gamma < 1, to tell s.

    A share r means noise = r * predicted + sqrt(1 - r^2) * fresh, of unit variance, with r the ratio of the
    noise-to-signal ratios at s and t: sigma_s / sigma_t in the variance-exploding process.
    At gamma = 1 the paper's rule stops at s = 0, whose sigma is small but not 0; LCM is the limit, taken here.
    Raises ValueError if a gamma is outside [0, 1], or between the ends without a table, or if there are too many.
    """
    shares = []
    levels = sigmas.tolist()[1:]
    for step, own in enumerate(gamma_per_step(gamma, len(levels))):
        if own in (0.0, 1.0) or levels[step] <= 0:
            shares.append(1.0 - own)
        elif table is None:
            raise ValueError(
                f"gamma is {own}; between 0 and 1 the model's sigma table is needed. Pass table=, the ascending "
                "sigmas of all training timesteps, or use gamma 0 or 1."
            )
        else:
            shares.append(_share(sigmas[step + 1], own, table, noise_scaling))
    return shares


def gamma_per_step(gamma: float | Sequence[float], steps: int) -> list[float]:
    """One gamma for each of `steps` steps: a number for all, or a list whose last entry holds to the end.

    (0, 1) for 4 steps is 0, 1, 1, 1: the first step keeps the noise it finds (Euler), the others draw anew (LCM).
    The step to sigma 0 leaves no noise, so its gamma means nothing and may be left out.
    Raises ValueError for a gamma outside [0, 1], an empty list, or more entries than steps.
    """
    given = [float(gamma)] if isinstance(gamma, int | float) else [float(value) for value in gamma]
    for value in given:
        if not 0.0 <= value <= 1.0:  # also catches NaN
            raise ValueError(f"gamma is {value}; it must be from 0 (deterministic) to 1 (LCM, all noise fresh).")
    if not given:
        raise ValueError("gamma is an empty list; give one number, or one for each step.")
    if len(given) > max(steps, 1):
        raise ValueError(
            f"gamma has {len(given)} entries but the run has {steps} steps. Give at most one for each step; the last "
            "one holds to the end."
        )
    return [given[min(step, len(given) - 1)] for step in range(steps)]


def gammas_of_part(
    gamma: float | Sequence[float], sigmas: Tensor, schedule: Tensor | None = None
) -> float | Sequence[float]:
    """The gamma, or one for each step, of a part of a run: what gamma_per_step gives those steps in the undivided run.

    sigmas: (steps + 1,) levels of the part.   schedule: levels of the undivided run. None: the part is its beginning,
    and entries for later steps are left out; of a part that ends at sigma 0 nothing is left out.
    Raises ValueError as gamma_per_step does, and for a level that is not in the schedule.
    """
    if isinstance(gamma, int | float):
        return gamma
    if schedule is None:
        steps = max(len(sigmas) - 1, 1)
        return gamma if len(sigmas) == 0 or sigmas[-1] <= 0 else list(gamma)[:steps]
    whole = gamma_per_step(gamma, len(schedule) - 1)
    return [whole[place] for place in places_in(sigmas, schedule)] or gamma


def places_in(sigmas: Tensor, schedule: Tensor) -> list[int]:
    """Which step of the undivided run each step of a part of it is, counted from 0: (steps,) for (steps + 1,) sigmas.

    A step is known by the level that it starts from. schedule: (all steps + 1,) levels of the undivided run.
    Raises ValueError for a level that the schedule does not start a step from.
    """
    starts = schedule.tolist()[:-1]
    places = []
    for level in sigmas.tolist()[:-1]:
        place = next((i for i, start in enumerate(starts) if math.isclose(start, level, rel_tol=1e-5)), None)
        if place is None:
            raise ValueError(
                f"sigmas has to be the whole schedule that is run in parts, but no step of it starts from {level:g}: "
                f"{', '.join(f'{start:g}' for start in starts)}. Connect the schedule as it was before it was split."
            )
        places.append(place)
    return places


def parse_gammas(text: str) -> list[float]:
    """Numbers of a text such as "1, 1, 0.3", in their order; [] if the text is blank.

    Commas and white space separate. Raises ValueError naming the first entry that is no number from 0 to 1, or
    for more than MOST_STEPS.
    """
    entries = text.replace(",", " ").split()
    if len(entries) > MOST_STEPS:
        raise ValueError(f"gammas has {len(entries):,} entries; a run has at most {MOST_STEPS:,} steps. Give fewer.")
    for entry in entries:
        # Stricter than float(), which also reads "1_0", "nan" and digits of other scripts.
        if not re.fullmatch(r"[+-]?([0-9]{1,20}(\.[0-9]{0,20})?|\.[0-9]{1,20})", entry) or not 0 <= float(entry) <= 1:
            raise ValueError(
                f"gammas: {entry[:40]!r} is not a number from 0 (deterministic) to 1 (LCM). Write one for each step, first "
                "step first, separated by commas: 0, 0, 1. The last one holds to the end."
            )
    return [float(entry) for entry in entries]


def _share(level: Tensor, gamma: float, table: Tensor, noise_scaling: NoiseScaling) -> float:
    timestep = int(timesteps_at(level[None], table))
    # The guard against float errors of lcm_timesteps: (1 - 0.9) * 500 is 49.99999999999999.
    sigma_s = table[math.floor((1.0 - gamma) * timestep + 1e-6)]
    (signal_s, noise_s), (signal_t, noise_t) = signal_and_noise(torch.stack([sigma_s, level]), noise_scaling)
    if not noise_t or not signal_s:  # nothing to leave behind, or nothing but noise at s
        return 1.0
    share = noise_s * signal_t / (signal_s * noise_t)
    # A level between table entries can lie below the nearest one; more than all of its noise cannot be old.
    return min(share, 1.0)


def signal_and_noise(sigmas: Tensor, noise_scaling: NoiseScaling) -> list[tuple[float, float]]:
    """(a, b) of a linear forward process x = a * x0 + b * noise at each level (n,), read off by asking for each alone."""
    if noise_scaling is variance_exploding:  # the usual case, known without asking
        return [(1.0, sigma) for sigma in sigmas.tolist()]
    one, zero = torch.ones_like(sigmas), torch.zeros_like(sigmas)
    return list(zip(noise_scaling(sigmas, zero, one).tolist(), noise_scaling(sigmas, one, zero).tolist(), strict=True))
