"""What a training is told, and the grid of timesteps it works on.

Names and defaults of the node and the command are read here, without torch: a command line has to answer at once.
"""

import math
from bisect import bisect_left
from dataclasses import Field, asdict, dataclass, field, fields
from numbers import Integral, Real
from typing import Any, Literal, get_args, get_origin

Weighting = Literal["x0", "v"]
Compute = Literal["auto", "bf16", "fp16", "fp32"]
Optimizer = Literal["adamw", "radam", "nadam", "adafactor", "sgd", "adamw8bit"]
Fall = Literal["linear", "cosine", "sqrt"]
PIXELS = 8  # to a side of a latent's cell, at least


def _said(
    help: str, *, low: float | None = None, high: float | None = None, metavar: str | None = None, above: bool = False
) -> dict[str, Any]:
    """Metadata of a field that node and command have too: what it is, in few words, and its range; None is no end.

    above: low itself is not in it.
    """
    return {"help": help, "low": low, "high": high, "metavar": metavar, "above": above}


@dataclass(frozen=True)
class Settings:
    """What is trained and how. The defaults are the paper's, as far as it and the authors' scripts tell.

    cfg: both ends of the guidance, on ComfyUI's scale (the paper's omega + 1; LCM-LoRA: omega fixed at 7.5).
    skip: the paper's k.   original_steps: 0 takes those that the solver visits, one every `skip`. More of them than that
    train the timesteps between its visits as well.
    warmup, decay, decay_shape: the learning rate rises over the first steps and falls over the last, see rate_at.
    optimizer: see optimizers.py.   caption_dropout: of what a host calls the negative prompt.
    huber_c: None is L2 too.   weighting: see objective.consistency_loss.
    scale_loss: for float16, whose smallest gradients would vanish otherwise.
    """

    steps: int = field(default=1000, metadata=_said("optimizer steps", low=1))
    batch: int = field(default=4, metadata=_said("images at once, on each process", low=1))
    accumulate: int = field(default=1, metadata=_said("batches to a step", low=1))
    learning_rate: float = field(default=1e-4, metadata=_said("of the optimizer", low=0.0, above=True))
    warmup: int = field(default=20, metadata=_said("steps until it is reached", low=0, metavar="STEPS"))
    decay: float = field(
        default=0.0,
        metadata=_said("share of all steps, at the end, in which it falls to 0", low=0.0, high=1.0, metavar="SHARE"),
    )
    decay_shape: Fall = field(
        default="linear", metadata=_said("how it falls; cosine: slowly at first and last; sqrt: fast at first")
    )
    optimizer: Optimizer = field(
        default="adamw",
        metadata=_said(
            "adamw8bit needs bitsandbytes; adafactor needs the least memory of the others; sgd wants a far higher rate"
        ),
    )
    weight_decay: float = field(default=0.0, metadata=_said("of the optimizer", low=0.0))
    betas: tuple[float, float] = field(default=(0.9, 0.999), metadata=_said("of the adams", low=0.0, high=1.0))
    clip: float = field(default=1.0, metadata=_said("largest norm of the gradient"))
    guidance_min: float = field(default=8.5, metadata=_said("guidance that is built in, on the scale of cfg", low=1.0))
    guidance_max: float = field(default=8.5, metadata=_said("above it, each image draws one in between", low=1.0))
    skip: int = field(default=20, metadata=_said("timesteps that a solver step skips", low=1))
    original_steps: int = field(
        default=0,
        metadata=_said(
            "timesteps that are trained, evenly spaced, as the samplers' input of that name; 0: one every --skip",
            low=0,
            metavar="N",
        ),
    )
    phases: int = field(
        default=1,
        metadata=_said(
            "parts of the way from noise to picture, each with an end of its own: a LoRA of 4 phases is for 4 steps, at "
            "timesteps of its own; 1: LCM, for 1 to 8 steps",
            low=1,
            metavar="N",
        ),
    )
    huber_c: float | None = field(default=0.001, metadata=_said("c of the pseudo-Huber distance, 0 for L2", low=0.0))
    weighting: Weighting = field(
        default="x0",
        metadata=_said(
            "what the distance is measured in; v asks for the same precision at every noise level; x0: as published"
        ),
    )
    average: float = field(
        default=0.0,
        metadata=_said(
            "rate of a moving average, such as 0.95, that is saved in place of the last weights and is what the student "
            "is compared with; 0: none",
            low=0.0,
            high=1.0,
            metavar="RATE",
        ),
    )
    average_target: bool = field(
        default=True, metadata=_said("whether the average is what the student is compared with, too")
    )
    caption_dropout: float = field(
        default=0.0,
        metadata=_said(
            "share of the pictures that are learnt with the negative prompt in place of their own", low=0.0, high=1.0,
            metavar="SHARE",
        ),
    )  # fmt: skip
    seed: int = field(default=0, metadata=_said("of all that is drawn"))
    scale_loss: bool = False

    @property
    def cfg(self) -> tuple[float, float]:
        return self.guidance_min, self.guidance_max

    def __post_init__(self) -> None:
        low, high = self.cfg
        _check_all(self)
        if not self.clip > 0:  # it may be infinite: then nothing is cut
            raise ValueError(f"clip is {self.clip}; it has to be above 0. LCM-LoRA was trained with 1.")
        if low > high:
            raise ValueError(
                f"guidance_min is {low} and guidance_max is {high}; the first is the lower end. Exchange them, or set "
                "both to one number."
            )
        if 1 in (self.average, *self.betas):
            raise ValueError(
                f"average is {self.average} and betas are {self.betas}; each has to be below 1, or nothing is ever learnt."
            )

    def rate_at(self, step: int) -> float:
        """The learning rate of step 0, 1, ..."""
        return self.learning_rate * min(1.0, self._rising(step), self._falling(step))

    def _rising(self, step: int) -> float:
        return (step + 1) / self.warmup if self.warmup else math.inf

    def _falling(self, step: int) -> float:
        falling = min(1.0, (self.steps - step) / (self.decay * self.steps)) if self.decay else 1.0
        if self.decay_shape == "cosine":
            return (1 - math.cos(math.pi * falling)) / 2
        return 1 - math.sqrt(1 - falling) if self.decay_shape == "sqrt" else falling

    @property
    def highest_rate(self) -> float:
        """The largest learning rate of any step; warmup and decay together may never reach `learning_rate`.

        It is where the rise meets the fall: of the two beside that place, the higher one.
        """
        meets = bisect_left(range(self.steps), True, key=lambda step: self._rising(step) >= self._falling(step))
        return max(self.rate_at(step) for step in (max(0, meets - 1), min(meets, self.steps - 1)))

    def kept(self) -> dict[str, Any]:
        """What a resumed run must have as before; a longer run is the same run unless its rate falls at the end."""
        facts = asdict(self)
        facts["cfg"] = facts.pop("guidance_min"), facts.pop("guidance_max")
        facts["average_target"] = self.average_target and self.average > 0
        if not self.decay:
            del facts["steps"]
        for name in (
            "original_steps",
            "phases",
            "weighting",
            "caption_dropout",
            "optimizer",
            "decay_shape",
        ):  # earlier checkpoints do not name them
            if facts[name] == getattr(Settings, name):
                del facts[name]
        return facts

    def grid(self, train_timesteps: int) -> list[int]:
        """The timesteps that are trained, ascending. Raises ValueError where the samplers would not visit them."""
        from ..samplers.schedule import training_grid  # late: it needs torch

        if self.phases > 1:
            return self._phased_grid(train_timesteps)
        if self.original_steps:
            if train_timesteps // self.original_steps > self.skip:
                raise ValueError(
                    f"original_steps is {self.original_steps} and skip is {self.skip}: a solver step ends between two trained "
                    f"timesteps, where the target is untrained. Use original_steps of at least "
                    f"{-(-train_timesteps // self.skip)}, 0, or a larger skip."
                )
            return training_grid(self.original_steps, train_timesteps=train_timesteps)
        return skipping_grid(self.skip, train_timesteps)

    def _phased_grid(self, train_timesteps: int) -> list[int]:
        """Raises ValueError unless each phase is divided evenly by solver steps, and these by trained timesteps."""
        from ..samplers.schedule import training_grid
        from .phases import check_phases

        check_phases(self.phases, self.skip, train_timesteps)
        visited = train_timesteps // self.skip
        if self.original_steps and (self.original_steps % visited or train_timesteps % self.original_steps):
            raise ValueError(
                f"original_steps is {self.original_steps}, and a solver with skip {self.skip} visits {visited} timesteps in "
                f"{self.phases} phases: it has to be a multiple of that, and a divisor of {train_timesteps}. Use {visited}, or "
                "0, which takes those."
            )
        return training_grid(self.original_steps or visited, train_timesteps=train_timesteps)


@dataclass(frozen=True)
class Setup:
    """What node and command ask for beside the Settings.

    alpha: 0 takes the rank.   samples: only where no pictures are given.   dtype: the LoRA is float32 always.
    buckets, random_crop, flip, repeats, size_labels: of pictures that are read from files; a node gets latents.
    """

    rank: int = field(default=64, metadata=_said("size of the LoRA", low=1))
    alpha: float = field(default=0.0, metadata=_said("the scale is alpha / rank; 0: the rank", low=0.0))
    samples: int = field(
        default=64, metadata=_said("how many pictures the model makes, if none are given", low=1, metavar="N")
    )
    width: int = field(default=512, metadata=_said("pictures are cropped and scaled to it", low=1))
    height: int = field(default=512, metadata=_said("pictures are cropped and scaled to it", low=1))
    buckets: bool = field(
        default=False,
        metadata=_said(
            "give each picture the shape nearest to its own of as many pixels, in place of width and height"
        ),
    )
    random_crop: bool = field(default=False, metadata=_said("keep a random part of each picture, not its middle"))
    flip: float = field(
        default=0.0, metadata=_said("share of the pictures that are mirrored", low=0.0, high=1.0, metavar="SHARE")
    )
    repeats: int = field(
        default=1,
        metadata=_said(
            "how often each picture is encoded, each time with a crop and flip of its own", low=1, metavar="N"
        ),
    )
    size_labels: bool = field(
        default=True, metadata=_said("tell SDXL the size of each picture and what was cut off, as it was trained")
    )
    dtype: Compute = field(default="auto", metadata=_said("what the network computes in; auto: by the device"))
    save_every: int = field(
        default=100,
        metadata=_said(
            "steps between two checkpoints, LoRA files, samples and validation losses", low=1, metavar="STEPS"
        ),
    )
    gradient_checkpointing: bool = field(
        default=True, metadata=_said("compute layers again in place of keeping them: slower, in less memory")
    )

    tf32: bool = field(
        default=False, metadata=_said("on a GPU of 2020 or later: float32 products with fewer digits, and much faster")
    )
    compile: bool = field(
        default=False,
        metadata=_said("torch.compile for teacher and target, half of a step: minutes at first, then faster"),
    )

    def __post_init__(self) -> None:
        _check_all(self)
        for name in ("width", "height"):
            if (side := getattr(self, name)) % PIXELS:
                near = sorted({max(PIXELS, side // PIXELS * PIXELS), (side // PIXELS + 1) * PIXELS})
                raise ValueError(
                    f"{name} is {side}; it has to be a multiple of {PIXELS}, use {' or '.join(map(str, near))}."
                )


def _check_all(settings: "Settings | Setup") -> None:
    """Raises ValueError for a field that is of another kind or not in its range."""
    for one in fields(settings):
        value, kind = getattr(settings, one.name), one.type
        if get_origin(kind) is Literal:
            if value not in get_args(kind):
                raise ValueError(f"{one.name} is {value!r}; it has to be one of {', '.join(get_args(kind))}.")
        elif kind is bool:
            if not isinstance(value, bool):
                raise ValueError(f"{one.name} is {value!r}; it has to be True or False.")
        elif get_origin(kind) is tuple:
            if not isinstance(value, (tuple, list)) or len(value) != len(get_args(kind)):
                raise ValueError(f"{one.name} is {value!r}; it has to be {len(get_args(kind))} numbers.")
            for which, number in zip(("the first", "the second"), value, strict=True):
                _check(f"{one.name}: {which}", number, one)
        elif value is not None or type(None) not in get_args(kind):
            _check(one.name, value, one)


def _check(name: str, value: Any, one: "Field[Any]") -> None:
    """Raises ValueError for a setting that is no number of its kind, not finite or not in its range."""
    low, high, above = (one.metadata.get(key) for key in ("low", "high", "above"))
    whole = one.type is int
    sound = isinstance(value, Integral if whole else Real) and not isinstance(value, bool)
    endless = (low, high) == (None, None)  # clip may be infinite
    if sound and (endless or math.isfinite(value)) and not (
        (low is not None and (value <= low if above else value < low)) or (high is not None and value > high)
    ):  # fmt: skip
        return
    allowed = (
        ""
        if low is None
        else f", {'above' if above else 'at least'} {low:g}"
        if high is None
        else f", from {low:g} to {high:g}"
    )
    advice = f" The default is {one.default:g}." if isinstance(one.default, (int, float)) else ""
    raise ValueError(f"{name} is {value!r}; it has to be a {'whole' if whole else 'finite'} number{allowed}.{advice}")


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
    from ..samplers.schedule import training_grid

    return training_grid(points, train_timesteps=train_timesteps)
