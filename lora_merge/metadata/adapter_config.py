"""What the metadata of a LoRA keeps of a file of PEFT's and of its configuration, for scales and for reports."""

from __future__ import annotations

import json
import re
from collections.abc import Collection, Mapping
from typing import Any, Literal, NamedTuple

from ..disk import json_text
from .adapter_scales import METADATA_KEY

# In the metadata of a Lora: "used", or as JSON the Misfit for which it was not.
CONFIG_KEY = "lcm_kit.adapter_config"
_FIELDS = ("init_lora_weights", "use_dora")
# Ways of PEFT to begin a training that take something out of the base model first.
_CHANGES_BASE = re.compile(r"pissa.*|olora|corda|loftq|lora_ga|milora", re.I)


class Misfit(NamedTuple):
    """Why an adapter_config.json is not of the file beside it: no JSON; or it does not name the module; or says another rank
    than the module has, as it is written there."""

    module: str = ""
    rank: int | None = None
    said: str = ""


class OfPeft(NamedTuple):
    """What is known of how PEFT made a LoRA.

    config: what became of the adapter_config.json beside its file: None where there is none, "used" for its scale, or why not.
    changed_base: how its training took something out of the base model first, "" for any other.
    dora: whether it has DoRA that PEFT trained.
    """

    config: Misfit | Literal["used"] | None = None
    changed_base: str = ""
    dora: bool = False


def noted(metadata: Mapping[str, str], keys: Collection[str]) -> dict[str, str]:
    """The metadata with what the packed configuration of diffusers and the keys of the file say beside it."""
    result = dict(metadata)
    try:
        packed = json_text.parse_object(metadata.get(METADATA_KEY, "{}"))
    except ValueError:
        packed = {}
    for name, value in packed.items():
        field = name.rpartition(".")[2]
        if field in _FIELDS and isinstance(value, (str, bool)):
            result.setdefault(field, str(value))
    if any(".lora_magnitude_vector" in key for key in keys):
        result["use_dora"] = "True"
    return result


def of_config(config: Mapping[str, Any]) -> dict[str, str]:
    """What an adapter_config.json adds to the metadata, for scales (adapter_scales.py) and remarks."""
    known = [key for key in ("lora_alpha", "use_rslora", *_FIELDS) if config.get(key) is not None]
    notes = {key: str(config[key]) for key in known}
    if config.get("alpha_pattern"):
        notes["alpha_pattern"] = json.dumps(config["alpha_pattern"])
    return notes


def of_peft(metadata: Mapping[str, str]) -> OfPeft:
    """What the metadata of a LoRA says of its making by PEFT."""
    begun = metadata.get("init_lora_weights", "")
    return OfPeft(
        config=_config(metadata.get(CONFIG_KEY)),
        changed_base=begun if _CHANGES_BASE.fullmatch(begun) else "",
        dora=metadata.get("use_dora", "").lower() == "true",
    )


def _config(text: str | None) -> Misfit | Literal["used"] | None:
    if text is None or text == "used":
        return text  # type: ignore[return-value]
    try:
        found = json_text.parse_object(text)
        rank = found["rank"]
        return Misfit(str(found["module"]), None if rank is None else int(rank), str(found["said"]))
    except (ValueError, KeyError, TypeError):
        return None  # somebody else's


def unused(why: Misfit) -> dict[str, str]:
    """What the metadata keeps of a configuration that is of another file."""
    return {CONFIG_KEY: json.dumps(why._asdict())}


def misfit(config: Mapping[str, Any], ranks: Mapping[str, int]) -> Misfit | None:
    """Why an adapter_config.json is of another file than one with these modules and ranks; None if it may be its own."""
    pattern = config.get("rank_pattern")
    known = [config.get("r"), *(pattern.values() if isinstance(pattern, dict) else ())]
    other = next((module for module, rank in ranks.items() if rank not in known), None)
    if other is not None:
        return Misfit(other, ranks[other], str(config.get("r"))[:40])
    targets = config.get("target_modules")
    if isinstance(targets, list):
        ends = tuple(map(str, targets))
        for module in ranks:
            if not any(module == end or module.endswith(f".{end}") for end in ends):
                return Misfit(module)
    return None
