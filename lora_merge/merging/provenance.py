"""How a merged file came about, as JSON in its metadata: enough to make it again."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass

import torch

from ..disk import json_text
from ..metadata.fields import PROVENANCE_KEY
from ..settings.options import MergeOptions, options_from_dict
from .account import Account
from .by_target import ModelNames

VERSION = 2


@dataclass(frozen=True)
class Ingredient:
    """One input as the provenance names it. sha256: of its file, None where none was known.   weights: of all behind the
    header, by which a file is known that was made again on another day.
    """

    name: str
    sha256: str | None
    strength: float
    block_strengths: str
    weights: str | None = None


@dataclass(frozen=True)
class Recipe:
    """All that a merge was told. model: by a connected model, of what the inputs call its weights."""

    inputs: tuple[Ingredient, ...]
    options: MergeOptions
    model: ModelNames | None = None


def to_json(account: Account) -> str:
    """The provenance that goes into the file."""
    inputs = [
        {
            "name": source.name,
            "sha256": source.sha256,
            "weights": source.weights,
            "strength": source.strength,
            "block_strengths": source.block_strengths,
            "modules": source.modules,
            "merged": source.merged,
            "passed_through": source.passed_through,
            "refused": source.refused,
            "retention": source.retention,
            "effect": source.effect,
            "stepped_aside": source.stepped_aside,
        }
        for source in account.sources
    ]
    told = {} if account.model is None else {"model": account.model.to_dict()}
    return json.dumps(
        {
            "version": VERSION,
            "inputs": inputs,
            "method": account.method,
            "rank": account.rank,
            "relative_error": account.relative_error,
            "ranks": account.ranks,
            "options": account.options.to_dict(),
            "torch": torch.__version__,
            **told,
        }
    )


def recipe_of(metadata: Mapping[str, str], source: str) -> Recipe:
    """What the file says it was made of. Raises ValueError where it says nothing, or nothing that can be read."""
    if PROVENANCE_KEY not in metadata:
        raise ValueError(f"{source}: it does not say how it was made; only files merged or resized with LCM Kit do.")
    try:
        notes = json_text.parse_object(metadata[PROVENANCE_KEY])
        if notes["version"] != VERSION:
            raise ValueError(f"version {notes['version']}, and this one reads {VERSION}")
        inputs = tuple(
            Ingredient(
                name=str(entry["name"]),
                sha256=None if entry["sha256"] is None else str(entry["sha256"]),
                strength=float(entry["strength"]),
                block_strengths=str(entry["block_strengths"]),
                weights=entry.get("weights"),
            )
            for entry in notes["inputs"]
        )
        model = ModelNames.from_dict(notes["model"]) if "model" in notes else None
        return Recipe(inputs, options_from_dict(dict(notes["options"])), model)
    except (KeyError, IndexError, TypeError, ValueError, AttributeError) as error:
        raise ValueError(f"{source}: what it says of how it was made cannot be read ({error}).") from None
