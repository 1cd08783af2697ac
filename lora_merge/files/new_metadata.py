"""What a new LoRA file says about itself in safetensors metadata, in the words that other tools read."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from datetime import datetime, timezone

from ..disk import json_text
from ..metadata.adapter_scales import METADATA_KEY as ADAPTER_KEY
from ..metadata.fields import ARCHITECTURE, DATE, IMPLEMENTATION, NETWORK, SAVED_KEY, SCALES, is_hash
from ..updates.layer import Layer
from .lora import Format, Lora

_SPEC = "1.0.0"
# The codebases that kohya's trainers name. Of SDXL they name Stability AI's, though modules may be called as in diffusers.
_STABILITY_AI = "https://github.com/Stability-AI/generative-models"
_IMPLEMENTATIONS = {"stable-diffusion-xl": _STABILITY_AI, "stable-diffusion-v": "diffusers"}


def for_file(lora: Lora, title: str, format: Format) -> dict[str, str]:
    """The LoRA's metadata brought up to date: network dimensions (kohya's ss_*), modelspec, diffusers' adapter config.

    Without hashes, which tensor_file.write knows. What says how the LoRA was trained, dates included, stays.
    """
    aside = {*SCALES, *NETWORK}
    result = {key: value for key, value in lora.metadata.items() if key not in aside and not is_hash(key)}
    result |= _network(lora)
    result["ss_output_name"] = title
    result.setdefault("modelspec.title", title)
    # To the day, so that the same work on one day makes the same file.
    result[DATE] = datetime.now(timezone.utc).date().isoformat()
    _set_implementation(result, format)
    result["format"] = "pt"
    result[SAVED_KEY] = "1"
    if format == "diffusers":
        result[ADAPTER_KEY] = json.dumps(_adapter_config(lora), sort_keys=True)
    return result


def _set_implementation(metadata: dict[str, str], format: Format) -> None:
    """The specification names the fields that have to be there, so it is claimed where they are."""
    architecture = metadata.get(ARCHITECTURE, "")
    known = next((value for start, value in _IMPLEMENTATIONS.items() if architecture.startswith(start)), None)
    if format == "diffusers":
        metadata[IMPLEMENTATION] = "diffusers"
    elif known is not None:
        metadata.setdefault(IMPLEMENTATION, known)
    if metadata.keys() >= {ARCHITECTURE, IMPLEMENTATION}:
        metadata.setdefault("modelspec.sai_model_spec", _SPEC)


def _network(lora: Lora) -> dict[str, str]:
    """kohya's account of the modules."""
    plain = [layer for layer in lora.modules.values() if all(size == 1 for size in layer.kernel)]
    convolutions = [layer for layer in lora.modules.values() if any(size > 1 for size in layer.kernel)]
    algorithms = [kind.lower() for kind in lora.kinds if kind != "difference"] or ["full"]
    before = lora.metadata.get("ss_network_module", "")
    # Trainers for other models than Stable Diffusion say networks.lora_flux and the like.
    own = before if before.startswith("networks.lora") else "networks.lora"
    module = own if algorithms == ["lora"] else "lycoris.kohya"
    arguments = {**_algorithm(algorithms), **_of_convolutions(convolutions)}
    if before == module:
        arguments = _other_arguments(lora.metadata) | arguments
    return {
        "ss_network_module": module,
        # kohya's resize script writes Dynamic where modules differ.
        "ss_network_dim": _one([_dim(layer) for layer in plain or convolutions]),
        "ss_network_alpha": _one([layer.written_alpha for layer in plain or convolutions]),
        **({"ss_network_args": json.dumps(arguments)} if arguments else {}),
    }


def _algorithm(algorithms: Sequence[str]) -> dict[str, object]:
    if list(algorithms) == ["lora"]:
        return {}
    return {"algo": algorithms[0] if len(algorithms) == 1 else "mixed"}


def _of_convolutions(layers: Sequence[Layer]) -> dict[str, object]:
    if not layers:
        return {}
    return {
        "conv_dim": _one([_dim(layer) for layer in layers]),
        "conv_alpha": _one([layer.written_alpha for layer in layers]),
    }


def _other_arguments(metadata: Mapping[str, str]) -> dict[str, object]:
    """What was said of the network besides its dimensions."""
    try:
        found = json_text.parse_object(metadata.get("ss_network_args", "{}"))
    except ValueError:
        return {}
    return {name: value for name, value in found.items() if name not in ("algo", "conv_dim", "conv_alpha")}


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
