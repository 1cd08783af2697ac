"""What a training is told, and the grid of timesteps it works on."""

import math
from dataclasses import asdict, dataclass
from typing import Any, get_args

from ..samplers.schedule import training_grid
from .objective import Weighting


@dataclass(frozen=True)
class Settings:
    """What is trained and how. The defaults are the paper's, as far as it and the authors' scripts tell.

    steps: optimizer steps.   batch: images at once, on each process.   accumulate: such batches to a step.
    learning_rate: of AdamW, reached after `warmup` steps; in the last share `decay` of all steps it falls to 0.
    clip: largest norm of the gradient.   cfg: lowest and highest guidance, ComfyUI's scale (the paper's omega + 1;
    LCM-LoRA: omega fixed at 7.5).   skip: training timesteps per solver step, the paper's k.
    original_steps: how many timesteps are trained, evenly spaced, as the samplers' input of that name; 0 takes those that
    the solver visits, one every `skip`. More of them than that train the timesteps between its visits as well.
    huber_c: c of the pseudo-Huber distance; None is L2.
    weighting: what the distance is measured in, "x0" or "v"; see objective.consistency_loss.
    average: rate mu of the moving average that is returned, 0 for none; average_target: whether it is the target too.
    scale_loss: for float16, whose smallest gradients would vanish otherwise.
    """

    steps: int
    batch: int = 4
    accumulate: int = 1
    learning_rate: float = 1e-4
    warmup: int = 0
    decay: float = 0.0
    weight_decay: float = 0.0
    betas: tuple[float, float] = (0.9, 0.999)
    clip: float = 1.0
    cfg: tuple[float, float] = (8.5, 8.5)
    skip: int = 20
    huber_c: float | None = 0.001
    average: float = 0.0
    average_target: bool = False
    scale_loss: bool = False
    seed: int = 0
    original_steps: int = 0
    weighting: Weighting = "x0"

    def __post_init__(self) -> None:
        low, high = self.cfg
        for name, value, low_end, high_end in (
            ("steps", self.steps, 1, None),
            ("batch", self.batch, 1, None),
            ("accumulate", self.accumulate, 1, None),
            ("skip", self.skip, 1, None),
            ("original_steps", self.original_steps, 0, None),
            ("warmup", self.warmup, 0, None),
            ("learning_rate", self.learning_rate, 0.0, None),
            ("decay", self.decay, 0.0, 1.0),
            ("weight_decay", self.weight_decay, 0.0, None),
            ("betas: the first", self.betas[0], 0.0, 1.0),
            ("betas: the second", self.betas[1], 0.0, 1.0),
            ("guidance_min", low, 1.0, None),
            ("guidance_max", high, 1.0, None),
            ("huber_c", 0.0 if self.huber_c is None else self.huber_c, 0.0, None),
            ("average", self.average, 0.0, 1.0),
        ):
            _check(name, value, low_end, high_end)
        if not self.learning_rate > 0 or not self.clip > 0:  # clip may be infinite: then nothing is cut
            raise ValueError(
                f"learning_rate is {self.learning_rate} and clip is {self.clip}; both must be above 0. "
                "LCM-LoRA was trained with 1e-4 and 1."
            )
        if low > high:
            raise ValueError(
                f"guidance_min is {low} and guidance_max is {high}; the first is the lower end. Exchange them, or set "
                "both to one number."
            )
        if 1 in (self.average, *self.betas):
            raise ValueError(
                f"average is {self.average} and betas are {self.betas}; each has to be below 1, or nothing is ever learnt."
            )
        if self.weighting not in get_args(Weighting):
            raise ValueError(f"weighting is {self.weighting!r}; it has to be one of {', '.join(get_args(Weighting))}.")
        if self.average_target and not self.average:
            raise ValueError("average_target needs a moving average: set average, for example to 0.95.")

    def rate_at(self, step: int) -> float:
        """The learning rate of step 0, 1, ..."""
        rising = (step + 1) / self.warmup if self.warmup else 1.0
        falling = (self.steps - step) / (self.decay * self.steps) if self.decay else 1.0
        return self.learning_rate * min(1.0, rising, falling)

    def kept(self) -> dict[str, Any]:
        """What a resumed run must have as before; a longer run is the same run unless its rate falls at the end."""
        facts = asdict(self)
        if not self.decay:
            del facts["steps"]
        for name in ("original_steps", "weighting"):  # earlier checkpoints do not name them
            if facts[name] == getattr(Settings, name):
                del facts[name]
        return facts

    def grid(self, train_timesteps: int) -> list[int]:
        """The timesteps that are trained, ascending. Raises ValueError where the samplers would not visit them."""
        if self.original_steps:
            return training_grid(self.original_steps, train_timesteps=train_timesteps)
        return skipping_grid(self.skip, train_timesteps)


def _check(name: str, value: float, low: float, high: float | None) -> None:
    """Raises ValueError for a setting that is not finite or not from low to high; None is no end."""
    if not math.isfinite(value) or value < low or (high is not None and value > high):
        allowed = f"at least {low:g}" if high is None else f"from {low:g} to {high:g}"
        default = getattr(Settings, name, None)
        advice = "" if default is None else f" The default is {default:g}."
        raise ValueError(f"{name} is {value}; it has to be a finite number, {allowed}.{advice}")


def skipping_grid(skip: int, train_timesteps: int) -> list[int]:
    """The timesteps skip - 1, 2 skip - 1, ... that the solver visits, which the LCM samplers visit too.

    Raises ValueError for a skip that no whole number of solver steps gives.
    """
    points = max(1, train_timesteps // skip)
    stride = train_timesteps // points
    if stride != skip:
        nearest = f"{stride} or {train_timesteps // (points + 1)}" if skip < train_timesteps else str(train_timesteps)
        raise ValueError(
            f"skip is {skip}, but samplers divide the model's {train_timesteps} timesteps into whole steps; use {nearest}, "
            "or say by original_steps which timesteps are trained. LCM-LoRA skips 20."
        )
    return training_grid(points, train_timesteps=train_timesteps)
