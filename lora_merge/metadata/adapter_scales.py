"""Scales that PEFT and diffusers keep in metadata instead of in `.alpha` keys."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from functools import cached_property
from typing import Any

from ..disk import json_text
from ..words import many
from .expressions import Budget, Expression

METADATA_KEY = "lora_adapter_metadata"
# About two seconds.
STEPS = 3_000_000
MAX_EXPRESSIONS = 1_000
MAX_END = 500
_PLAIN = re.compile(r"[\w.-]*")
_COMPONENT = re.compile(r"(unet|transformer|text_encoder(?:_[23])?)\.(.+)")


class AdapterScales:
    """The alphas that a file's metadata gives to its modules, read once for all of them.

    Read are diffusers' `lora_adapter_metadata` (JSON, fields prefixed with the model part, `unet.lora_alpha`) and plain
    `lora_alpha`, with `alpha_pattern` and `use_rslora` (scale lora_alpha / sqrt(rank), Kalajdzievski 2023,
    arXiv 2312.03732) as in PEFT's LoraConfig.
    """

    def __init__(self, metadata: Mapping[str, str]):
        self._metadata = metadata
        self._budget = Budget(STEPS)
        self._parts: dict[str, _Scales] = {}

    @cached_property
    def _packed(self) -> dict[str, Any] | None:
        # Read when a module asks: a file that states every alpha itself needs no metadata that can be read.
        return _json(self._metadata[METADATA_KEY], METADATA_KEY) if METADATA_KEY in self._metadata else None

    def alpha(self, module: str, rank: int) -> float | None:
        """The alpha of a module, as its file spells it; None if the metadata says nothing.

        Raises ValueError for metadata that cannot be read.
        """
        match = _COMPONENT.fullmatch(module)
        part = match[1] if match and self._packed is not None else ""
        if part not in self._parts:
            self._parts[part] = _Scales(self._config(part))
        name = module.rpartition("base_model.model.")[2]
        if match := _COMPONENT.fullmatch(name):
            name = match[2]
        return self._parts[part].alpha(name.replace(".processor.", "."), rank, self._budget)

    def _config(self, part: str) -> dict[str, Any]:
        if self._packed is None:
            return {
                key: _json(self._metadata[key], key) if key == "alpha_pattern" else self._metadata[key]
                for key in ("lora_alpha", "alpha_pattern", "use_rslora")
                if key in self._metadata
            }
        prefix = f"{part}." if part else ""
        return {key.removeprefix(prefix): value for key, value in self._packed.items() if key.startswith(prefix)}


class _Scales:
    """Scales of the modules of one part of a model. The first pattern that fits one says its alpha, as in PEFT."""

    def __init__(self, config: Mapping[str, Any]):
        patterns = config.get("alpha_pattern") or {}
        if not isinstance(patterns, dict):
            raise ValueError(
                f"alpha_pattern in the metadata is {type(patterns).__name__}, but it has to be a JSON object"
            )
        self._alpha = config.get("lora_alpha")
        self._by_rank = config.get("use_rslora") in (True, "True", "true")
        # Most patterns are plain names, for the end of a module's name: these are looked up, not tried.
        self._plain: dict[str, tuple[int, Any]] = {}
        self._expressions: list[tuple[int, str, Expression, Any]] = []
        for number, (pattern, value) in enumerate(patterns.items()):
            if _PLAIN.fullmatch(pattern):
                self._plain[pattern] = (number, value)
            else:
                self._expressions.append((number, pattern, _expression(pattern), value))
        if len(self._expressions) > MAX_EXPRESSIONS:
            raise ValueError(
                f"alpha_pattern in the metadata has {many(len(self._expressions), 'expressions')}, too involved to be tried: at "
                f"most {MAX_EXPRESSIONS} are read"
            )

    def alpha(self, name: str, rank: int, budget: Budget) -> float | None:
        alpha = self._pattern(name, budget)
        if alpha is None:
            return None
        try:
            alpha = float(alpha)
        except (TypeError, ValueError, OverflowError):
            raise ValueError(f"lora_alpha in the metadata is {str(alpha)[:60]!r}, but it has to be a number") from None
        return alpha * math.sqrt(rank) if self._by_rank else alpha

    def _pattern(self, name: str, budget: Budget) -> Any:
        first, result = self._named(name)
        for number, pattern, expression, value in self._expressions:
            if number > first:
                break
            try:
                if expression.ends(name, budget):
                    return value
            except ValueError as error:
                raise ValueError(f"alpha_pattern in the metadata is too involved, {pattern[:60]!r}: {error}") from None
        return result

    def _named(self, name: str) -> tuple[float, Any]:
        """Place and value of the first plain pattern that the name is, or ends with after a dot."""
        if not self._plain:
            return math.inf, self._alpha
        dots = [at for at, letter in enumerate(name) if letter == "." and len(name) - at <= MAX_END]
        ends = [name, *(name[at + 1 :] for at in dots)]
        found = [self._plain[end] for end in ends if end in self._plain]
        return min(found, default=(math.inf, self._alpha))  # no two have one place


def _expression(pattern: str) -> Expression:
    try:
        return Expression(pattern)
    except ValueError as error:
        raise ValueError(
            f"alpha_pattern in the metadata is {pattern[:60]!r}, no regular expression that is read: it {error}"
        ) from None


def _json(text: str, key: str) -> dict[str, Any]:
    try:
        value = json_text.parse(text)
    except ValueError as error:
        raise ValueError(f"{key} in the metadata is not JSON ({error}), so the scale of the LoRA is unknown") from None
    if not isinstance(value, dict):
        raise ValueError(f"{key} in the metadata is {type(value).__name__}, but it has to be a JSON object")
    return value
