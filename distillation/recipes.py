"""Named sets of settings: what to begin with for a kind of model, card or aim.

A recipe gives the settings that were left as they come; what somebody sets stays. Without torch, like settings.py.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

NONE = "none"


@dataclass(frozen=True)
class Recipe:
    """about: what it is for, in few words.   settings: names and values of fields of Settings and Setup."""

    about: str
    settings: Mapping[str, Any]


# For short trainings: each call has a quarter of the way to learn, in two of the teacher's steps.
_FAST_TO_LEARN = {"phases": 4, "skip": 125, "weighting": "v", "average": 0.95}

RECIPES = {
    NONE: Recipe("the settings as they are", {}),
    "try it in 10 minutes": Recipe(
        "SD1.5 on 12 GB: few pictures and steps, to see whether it works",
        _FAST_TO_LEARN | {"steps": 100, "batch": 2, "accumulate": 4, "rank": 32, "learning_rate": 5e-4, "samples": 32},
    ),
    "SD1.5 on 12 GB": Recipe(
        "as published, in steps of 12 images",
        {"steps": 1000, "batch": 4, "accumulate": 3, "samples": 400, "width": 512, "height": 512},
    ),
    "SDXL on 24 GB": Recipe(
        "as published, in steps of 12 images of 1024 x 1024; connect ConditioningZeroOut as negative",
        {"steps": 1000, "batch": 4, "accumulate": 3, "samples": 200, "width": 1024, "height": 1024},
    ),
    "a DiT": Recipe(
        "Flux, SD3, Wan, Qwen-Image, Z-Image: one image at a time, guidance of their templates",
        {
            "steps": 1000, "batch": 1, "accumulate": 8, "rank": 32, "samples": 100, "width": 1024, "height": 1024,
            "guidance_min": 3.5, "guidance_max": 3.5,
        },
    ),
    "accelerate this style": Recipe(
        "the model with a style's LoRA on it, from an LCM-LoRA as start_from: 4 steps in that style",
        _FAST_TO_LEARN | {"steps": 600, "batch": 4, "accumulate": 6, "learning_rate": 2e-4, "samples": 400},
    ),
}  # fmt: skip
"""Name -> recipe."""


def followed(name: str, given: Mapping[str, Any], defaults: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """(given with the recipe's settings in it, those of its settings that stay otherwise than it says).

    given: settings by name; one that is not its default was meant and stays.   Raises ValueError for an unknown name.
    """
    if name not in RECIPES:
        raise ValueError(f"recipe is {name!r}; it has to be one of {', '.join(RECIPES)}.")
    wanted = RECIPES[name].settings
    own = {key: given[key] for key in wanted if key in given and given[key] != defaults[key]}
    used = {**given, **wanted, **own}
    return used, set_otherwise(name, used)


def set_otherwise(name: str, used: Mapping[str, Any]) -> dict[str, Any]:
    """Those of `used`, all settings as they are, that the recipe says otherwise."""
    wanted = RECIPES[name].settings
    return {key: used[key] for key in wanted if used[key] != wanted[key]}
