"""What a published few-step model asks of its sampler, and the noise levels that this makes in a model's own table."""

import math
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from .schedule import TIMESTEPS, check_strength, kept_points, lcm_timesteps
from .times import SPACINGS, even, levels_at, times_at


@dataclass(frozen=True)
class Preset:
    """How to sample one kind of few-step model.

    steps: model calls.   cfg: guidance, 1 is none.   gamma: [0, 1], or a tuple of them, see renoise.gamma_per_step.
    The schedule is the first of these that is given, each as its authors publish it:
    sigmas: noise levels of a flow model, 1 is pure noise; without the closing 0.
    timesteps: thousandths, whatever the length of a model's table (schedule.table_entries). If there are more of them
    than steps, the steps are picked evenly from them.
    original_steps: the training grid that steps are picked from, see schedule.training_grid. A flow model has no such
    grid, nor one of continuous levels: there the steps are times, spaced as times.SPACINGS[spacing] has it.

    flow: made for flow models, and of no use to others.
    shift: the one that the model should have for this; None where it is the model's own affair.
    strength: of the LoRA; None for a whole model, or where the source says none.
    first_expert: of the steps, those of the high-noise model where a model comes in two; 0 for one model.
    sampler: the one that the source uses, in ComfyUI's words.   models: what it is for.   remark: what else to set.
    source: where the settings come from.   date: of the source, year and month.
    """

    name: str
    steps: int
    cfg: float
    gamma: float | tuple[float, ...]
    original_steps: int = 50
    timesteps: tuple[int, ...] = ()
    source: str = ""
    sigmas: tuple[float, ...] = ()
    spacing: str = "even"
    flow: bool = False
    shift: float | None = None
    strength: float | None = None
    first_expert: int = 0
    sampler: str = "lcm"
    models: str = ""
    remark: str = ""
    date: str = ""

    @property
    def fixed(self) -> bool:
        """Made for exactly one number of steps."""
        return self.steps in (len(self.sigmas), len(self.timesteps))

    @property
    def noise_timestep(self) -> int | None:
        """What the network is told of pure noise, where that is not the last timestep of training; None elsewhere.

        Models of one step: their authors hand them noise of unit variance under a lower timestep (DMD2: 399).
        """
        return self.timesteps[0] if self.timesteps and self.timesteps[0] < TIMESTEPS - 1 else None

    def with_steps(self, steps: int) -> "Preset":
        """This preset at another number of steps; 0 keeps its own.

        Raises ValueError if the model was distilled for one number of steps only, or for fewer.
        """
        if steps in (0, self.steps):
            return self
        if self.fixed:
            listed = ", ".join(f"{value:g}" for value in self.sigmas or self.timesteps)
            raise ValueError(
                f"steps is {steps}, but {self.name} was made for exactly {self.steps} ({listed}). Set steps to 0 for "
                f"its own, or load the file for {steps} steps."
            )
        if self.timesteps and not 1 <= steps <= len(self.timesteps):
            raise ValueError(
                f"steps is {steps}, but {self.name} was made for 1 to {len(self.timesteps)}. Use one of these."
            )
        return replace(self, steps=steps)

    def calls(self, strength: float) -> int:
        """Model calls of a run that starts at this strength, (0, 1].

        A model that predicts the picture from wherever it stands runs all its steps, each the shorter. One that was
        trained for steps of one length (listed timesteps, gamma 0) runs fewer, none longer than that: 2 of 4 at 0.5.
        A training grid gives no more steps than it has points left, but one.
        """
        if self.timesteps:
            of_one_length = self.fixed and self.gamma == 0.0
            return max(math.ceil(self.steps * strength - 1e-4), 1) if of_one_length else self.steps
        if self.sigmas or self.flow or self.steps > self.original_steps:
            return self.steps
        return min(self.steps, max(kept_points(self.original_steps, strength), 1))

    def levels(self, table: Tensor, *, strength: float = 1.0) -> Tensor:
        """(calls + 1,) noise levels of a run on a model that knows every time between 0 and 1, the last one 0.

        table: (levels,) ascending, float32, on the CPU.   strength: (0, 1], which scales all times.
        Raises ValueError for another strength, or fewer than one step.
        """
        check_strength(strength)
        if self.steps < 1:
            raise ValueError(f"steps is {self.steps}; a run needs at least 1 step.")
        if self.sigmas and strength == 1.0:
            levels = torch.tensor(self.sigmas)
        elif self.sigmas:
            levels = levels_at([time * strength for time in times_at(self.sigmas, table)], table)
        elif self.timesteps:
            levels = levels_at([time * strength for time in self._listed_times(self.calls(strength))], table)
        else:
            spaced = SPACINGS[self.spacing](self.steps, float(table[0]))
            levels = levels_at([time * strength for time in spaced], table)
        return torch.cat([levels, torch.zeros(1)])

    def schedule(self, *, strength: float = 1.0) -> list[int]:
        """Timesteps of a run on a model of numbered timesteps: each 0..999, strictly descending.

        strength: (0, 1]. Listed timesteps are scaled by it, so that the run starts at that level to one timestep; of a
        training grid the points above it are left out, as lcm_timesteps has it.
        Raises ValueError for another strength, or more steps than the grid has points.
        """
        check_strength(strength)
        if not self.timesteps:
            # Where not one point of the grid is left the lowest is taken.
            kept = max(strength, 1.0 / max(self.original_steps, 1))
            return lcm_timesteps(self.calls(strength), original_steps=self.original_steps, strength=kept)
        times = self._listed_times(self.calls(strength))
        return sorted({max(round(TIMESTEPS * time * strength) - 1, 0) for time in times}, reverse=True)

    def _listed_times(self, calls: int) -> list[float]:
        """So many times of the listed timesteps: picked evenly, or the first's as far as there are fewer calls."""
        listed = [(t + 1) / TIMESTEPS for t in self.timesteps]
        if self.fixed and calls < len(listed):
            return [listed[0] * time for time in even(calls)]
        return [listed[math.floor(i * len(listed) / calls)] for i in range(calls)]
