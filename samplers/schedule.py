"""Which training timesteps an N-step LCM run visits, and the sigmas they stand for in a model's own table."""

import math
import re
from collections.abc import Sequence
from itertools import pairwise
from operator import index as as_integer

import torch
from torch import Tensor

MOST_STEPS = 1000
"""Of a run, as every node has it: a longer list was not meant."""

TIMESTEPS = 1000
"""What timesteps count: thousandths of the way from the picture to noise, however many levels a model's table has."""


def training_grid(original_steps: int = 50, *, train_timesteps: int = 1000) -> list[int]:
    """Timesteps an LCM was distilled on, ascending: 19, 39, ..., 999 for the usual 50 of 1000.

    original_steps: solver steps of the distillation, 1..train_timesteps (50: LCM-LoRA, 100: AnimateLCM).
    Multiples of k = train_timesteps // original_steps, minus one (Luo et al. 2023, arXiv 2310.04378, section 4.3).
    Raises ValueError for original_steps outside that range.
    """
    if not 1 <= original_steps <= train_timesteps:
        raise ValueError(
            f"original_steps is {original_steps}; it counts the timesteps the LCM was distilled on, 1 to "
            f"{train_timesteps} (the model's training timesteps). LCM-LoRA uses 50."
        )
    stride = train_timesteps // original_steps
    return [stride * (i + 1) - 1 for i in range(original_steps)]


def lcm_timesteps(
    steps: int, *, original_steps: int = 50, strength: float = 1.0, train_timesteps: int = 1000
) -> list[int]:
    """Timesteps of an LCM run: `steps` integers, strictly descending, every one on the training grid.

    steps: model calls, 1..int(original_steps * strength); 4 gives 999 759 499 259.
    original_steps, train_timesteps: see training_grid.
    strength: (0, 1], share of the grid that is kept, from its clean end. 1 starts from pure noise; 0.6 starts at
    timestep 599 and keeps more of an input image. All `steps` are run at every strength.

    The rule is that of LCMScheduler in diffusers 0.24 and later: indices floor(linspace(0, n, steps, endpoint=False))
    into the n kept grid points, latest first. We depart from it once: n survives float rounding, so that strength
    0.58 keeps 29 of 50 points, where int(50 * 0.58) is 28.
    Raises ValueError, naming the value and what to change, if no such schedule exists.
    """
    grid = training_grid(original_steps, train_timesteps=train_timesteps)
    if steps < 1:
        raise ValueError(f"steps is {steps}; an LCM run needs at least 1 step.")
    check_strength(strength)
    if steps > original_steps:
        raise ValueError(
            f"steps is {steps} but the LCM was distilled on original_steps = {original_steps} timesteps. "
            f"Use at most {original_steps} steps, or raise original_steps."
        )
    kept = kept_points(original_steps, strength)
    if steps > kept:
        shorten = f"use at most {kept} steps" if kept else "no number of steps fits"
        raise ValueError(
            f"steps is {steps} but denoise strength {strength:g} keeps only {kept} of {original_steps} timesteps: "
            f"{shorten}; or raise the strength to at least {_round_up(steps / original_steps):g}."
        )
    # In float on purpose: numpy's linspace rounds i * (kept / steps), and i * kept // steps differs from it by one
    # point in rare cases (11 * (30 / 22) is just below 15). Equal to the reference is worth more here.
    stride = kept / steps
    return [grid[kept - 1 - math.floor(i * stride)] for i in range(steps)]


def kept_points(points: int, strength: float) -> int:
    """How many of so many points a strength keeps, rounded down."""
    # 50 * 0.58 is 28.999999999999996: a float error must not cost a grid point. 1e-4 of a point covers strengths
    # that were float32 once, on the longest grid, and is far below any difference a person would type.
    return math.floor(points * strength + 1e-4)


def parse_timesteps(text: str) -> list[int]:
    """Whole numbers of a text such as "999, 759, 499, 259", in their order; [] if the text is blank.

    Commas and white space separate, any number of them. Range and order are custom_timesteps' business.
    Raises ValueError naming the first entry that is not a whole number, or for more than MOST_STEPS.
    """
    entries = text.replace(",", " ").split()
    if len(entries) > MOST_STEPS:
        raise ValueError(f"timesteps has {len(entries):,} entries; a run has at most {MOST_STEPS:,} steps. Give fewer.")
    for entry in entries:
        # Stricter than int(), which also reads "9_9" and digits of other scripts.
        if not re.fullmatch(r"[+-]?[0-9]{1,9}", entry):
            raise ValueError(
                f"timesteps: {entry[:40]!r} is not a whole number. Write them descending, separated by commas: "
                "999, 759, 499, 259"
            )
    return [int(entry) for entry in entries]


def custom_timesteps(values: Sequence[int], *, strength: float = 1.0, train_timesteps: int = 1000) -> list[int]:
    """A user's own timesteps, checked: at least one, strictly descending, each 0..train_timesteps - 1.

    They need not lie on the training grid; an LCM is trained there only, others (DMD2: 999 749 499 249) elsewhere.
    off_grid tells which do not.
    strength: (0, 1], share of the list that is run, from its clean end: int(n * strength) of n, guarded against float
    rounding as in lcm_timesteps. The rule of LCMScheduler in diffusers, without its flaw: there the shortened run
    still adds noise after its last step.
    Raises ValueError naming the offending entries, TypeError for an entry that is not an integer.
    """
    timesteps = [as_integer(value) for value in values]
    if not timesteps:
        raise ValueError("timesteps is empty; give at least one, such as 999.")
    outside = [t for t in timesteps if not 0 <= t < train_timesteps]
    if outside:
        raise ValueError(
            f"timesteps {', '.join(map(str, outside))} lie outside 0 to {train_timesteps - 1}, the range this model "
            f"was trained on. The nearest: {', '.join(str(min(max(t, 0), train_timesteps - 1)) for t in outside)}."
        )
    rising = [f"{t} then {t_next}" for t, t_next in pairwise(timesteps) if t <= t_next]
    if rising:
        raise ValueError(f"timesteps must fall from each step to the next, but have {', '.join(rising)}.")
    check_strength(strength)
    kept = kept_points(len(timesteps), strength)
    if kept == 0:
        raise ValueError(
            f"denoise strength {strength:g} leaves none of the {len(timesteps)} timesteps. Raise it to at least "
            f"{_round_up(1 / len(timesteps)):g}, or give more timesteps."
        )
    return timesteps[len(timesteps) - kept :]


def off_grid(timesteps: Sequence[int], *, original_steps: int = 50, train_timesteps: int = 1000) -> dict[int, int]:
    """Those timesteps that the training grid lacks -> the nearest one that it has; the lower of two equally near.

    original_steps, train_timesteps: see training_grid, whose errors are raised.
    """
    grid = training_grid(original_steps, train_timesteps=train_timesteps)
    missing = set(timesteps) - set(grid)
    return {t: min(grid, key=lambda point: abs(point - t)) for t in timesteps if t in missing}


def table_entries(timesteps: Sequence[int], length: int) -> list[int]:
    """Where timesteps lie in a table of so many levels: themselves in one of 1000, every tenth entry in one of 10,000.

    Timestep t is the time (t + 1) / 1000, and entry i of n is (i + 1) / n (ComfyUI's flow models: sigma(1) is the last
    entry), so i = round((t + 1) * n / 1000) - 1.   timesteps: strictly descending, each 0..999.
    Raises ValueError for timesteps that break this rule, or that a table of under 1000 levels cannot tell apart.
    """
    entries = [round((t + 1) * length / TIMESTEPS) - 1 for t in custom_timesteps(timesteps)]
    if entries[-1] < 0 or any(entry <= lower for entry, lower in pairwise(entries)):
        raise ValueError(
            f"timesteps {', '.join(map(str, timesteps))} are too close together, or too near 0, for this model's "
            f"table of {length} noise levels. Use fewer steps, or a higher denoise."
        )
    return entries


def sigmas_at(timesteps: Sequence[int], table: Tensor) -> Tensor:
    """Noise levels of a run: float32 (steps + 1,), the table's own entries and a last 0, on the table's device.

    timesteps: (steps,) strictly descending entries, each 0..len(table) - 1 (see table_entries).
    table: (train_timesteps,) ascending sigmas.
    Exact: no interpolation, so the latent has the very noise level that the model is told.
    Raises ValueError for timesteps or a table that break these rules.
    """
    _check_table(table)
    sigmas = table[custom_timesteps(timesteps, train_timesteps=len(table))].to(torch.float32)
    return torch.cat([sigmas, sigmas.new_zeros(1)])


def timesteps_at(sigmas: Tensor, table: Tensor) -> Tensor:
    """Timesteps whose table entries are nearest to sigmas in log sigma: int64 (n,), on the CPU. Undoes sigmas_at.

    sigmas: (n,), each above 0; leave out the final 0 of a schedule, it is no training timestep.
    table: (train_timesteps,) ascending sigmas. Exact for table entries, else off by at most half a timestep; beyond
    the table's ends the end is taken.
    Raises ValueError if a sigma is not above 0, or for a table that is not ascending.
    """
    _check_table(table)
    if not bool((sigmas > 0).all()):
        raise ValueError(f"sigmas must be above 0 to have a timestep, got {sigmas.tolist()}; leave out the final 0.")
    # float64 on the CPU (some devices lack it): neighbours of a long table differ by little more than float32's step.
    log_sigmas, log_table = sigmas.detach().cpu().double().log(), table.detach().cpu().double().log()
    return (log_sigmas[:, None] - log_table).abs().argmin(dim=1)


def check_strength(strength: float) -> None:
    """Raises ValueError unless it is above 0 and at most 1."""
    if not 0.0 < strength <= 1.0:  # also catches NaN
        raise ValueError(
            f"denoise strength is {strength}; it must be above 0 and at most 1 (1 ignores the input image, "
            "small values change it little)."
        )


def _check_table(table: Tensor) -> None:
    """Raises ValueError unless table is (n,), n >= 1, not descending anywhere and positive."""
    if table.ndim != 1 or len(table) == 0:
        raise ValueError(f"the sigma table has shape {tuple(table.shape)}; it must be (train_timesteps,).")
    if not bool(table[0] > 0) or not bool((table.diff() >= 0).all()):
        raise ValueError(
            "the sigma table must hold the positive sigmas of all training timesteps in ascending order; "
            f"it starts {table[:3].tolist()} and ends {table[-3:].tolist()}."
        )


def _round_up(strength: float) -> float:
    """Strength with at most four decimals, not below the given one, so that following the advice works."""
    return math.ceil(strength * 10_000 - 1e-6) / 10_000
