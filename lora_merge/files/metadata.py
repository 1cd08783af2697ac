"""What a LoRA file says about itself in safetensors metadata, in the words that other tools read."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping, Sequence

from ..updates.layer import Layer
from .lora import Format, Lora
from .peft import METADATA_KEY as ADAPTER_KEY

PROVENANCE_KEY = "lcm_kit.merge"

# Facts about the base model: true of the sum if no input says otherwise.
_CARRIED = ("ss_base_model_version", "ss_v2", "modelspec.architecture", "modelspec.prediction_type")
# Scales that a reader would apply a second time.
_SCALES = (ADAPTER_KEY, "r", "lora_alpha", "alpha_pattern", "rank_pattern", "use_rslora")


def agreed(sources: Sequence[Mapping[str, str]]) -> dict[str, str]:
    """Facts about the base model that all sources which state them state alike."""
    result = {}
    for key in _CARRIED:
        values = {source[key] for source in sources if key in source}
        if len(values) == 1:
            result[key] = values.pop()
    return result


def for_file(lora: Lora, title: str, format: Format) -> dict[str, str]:
    """The LoRA's metadata brought up to date: network dimensions (kohya's ss_*), modelspec, diffusers' adapter config."""
    result = {key: value for key, value in lora.metadata.items() if key not in _SCALES}
    plain = [layer for layer in lora.modules.values() if all(size == 1 for size in layer.kernel)]
    convolutions = [layer for layer in lora.modules.values() if any(size > 1 for size in layer.kernel)]
    algorithms = [kind.lower() for kind in lora.kinds if kind != "difference"] or ["full"]
    result["ss_network_module"] = "networks.lora" if algorithms == ["lora"] else "lycoris.kohya"
    # kohya's resize script writes Dynamic where modules differ.
    result["ss_network_dim"] = _one([_dim(layer) for layer in plain or convolutions])
    result["ss_network_alpha"] = _one([layer.written_alpha for layer in plain or convolutions])
    arguments = {} if algorithms == ["lora"] else {"algo": algorithms[0] if len(algorithms) == 1 else "mixed"}
    if convolutions:
        arguments |= {
            "conv_dim": _one([_dim(layer) for layer in convolutions]),
            "conv_alpha": _one([layer.written_alpha for layer in convolutions]),
        }
    if arguments:
        result["ss_network_args"] = json.dumps(arguments)
    result["ss_output_name"] = title
    result["modelspec.sai_model_spec"] = "1.0.0"
    result.setdefault("modelspec.title", title)
    result["format"] = "pt"
    if format == "diffusers":
        result[ADAPTER_KEY] = json.dumps(_adapter_config(lora), sort_keys=True)
    return result


def _adapter_config(lora: Lora) -> dict[str, object]:
    """PEFT's LoraConfig fields for each part of the model; alpha = rank everywhere, the scale is in the factors."""
    ranks: dict[str, dict[str, int]] = {}
    state_dict_names = lora.diffusers_spellings()
    for module, layer in lora.modules.items():
        part, _, name = state_dict_names[module].partition(".")
        ranks.setdefault(part, {})[name] = layer.rank
    config: dict[str, object] = {}
    for part, by_name in ranks.items():
        common = Counter(by_name.values()).most_common(1)[0][0]
        pattern = {name: rank for name, rank in by_name.items() if rank != common}
        config |= {
            f"{part}.r": common,
            f"{part}.lora_alpha": common,
            f"{part}.rank_pattern": pattern,
            f"{part}.alpha_pattern": pattern,
            f"{part}.target_modules": sorted(by_name),
        }
    return config


def _dim(layer: Layer) -> int:
    """What trainers call the network dimension."""
    return layer.dim or layer.rank


def _one(values: Sequence[float]) -> str:
    kinds = set(values)
    return f"{kinds.pop():g}" if len(kinds) == 1 else "Dynamic"
