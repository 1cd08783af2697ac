"""What a LoRA file says about itself in safetensors metadata, in the words that other tools read."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from datetime import datetime, timezone
from typing import Any

from ..updates.layer import Layer
from . import hashes, json_text
from .lora import Format, Lora
from .peft import METADATA_KEY as ADAPTER_KEY
from .remarks import CONFIG_KEY

# Keys of this pack begin so.
OURS = "lcm_kit."
# In every file that `save` writes: what may be replaced without asking.
SAVED_KEY = "lcm_kit.saved"
PROVENANCE_KEY = "lcm_kit.merge"
MERGED_FROM = "modelspec.merged_from"
ARCHITECTURE, IMPLEMENTATION = "modelspec.architecture", "modelspec.implementation"
_DISTILLED_KEY = "lcm_kit.distillation"

# Scales that a reader would apply a second time.
_SCALES = (ADAPTER_KEY, "r", "lora_alpha", "alpha_pattern", "rank_pattern", "use_rslora", CONFIG_KEY)
_DATE = "modelspec.date"
_NETWORK = ("ss_network_module", "ss_network_dim", "ss_network_alpha", "ss_network_args")
_COMPUTED = (
    *_SCALES,
    *hashes.BLANK,
    *_NETWORK,
    _DATE,
    MERGED_FROM,
    "ss_output_name",
    "modelspec.sai_model_spec",
    "format",
)
_SPEC = "1.0.0"
# The codebases that kohya's trainers name. Of SDXL they name Stability AI's, though modules may be called as in diffusers.
_STABILITY_AI = "https://github.com/Stability-AI/generative-models"
_IMPLEMENTATIONS = {"stable-diffusion-xl": _STABILITY_AI, "stable-diffusion-v": "diffusers"}
_MAX_KEY = 200


def check(metadata: Mapping[Any, Any]) -> None:
    """Raises ValueError for what a safetensors file cannot hold."""
    for key, value in metadata.items():
        if not json_text.is_text(key) or not json_text.is_text(value):
            raise ValueError(
                f"metadata {ascii(key)[:60]} is {ascii(value)[:60]}, but names and values have to be text, without halves "
                "of surrogate pairs"
            )


def given(metadata: Mapping[str, str] | None) -> dict[str, str]:
    """What somebody wants to be in a file. An empty value asks that there be no such key.

    Raises ValueError for what a file cannot hold, and for what is computed: hashes, dates, dimensions, scales, provenance.
    """
    metadata = dict(metadata or {})
    check(metadata)
    for key in metadata:
        if not is_name(key):
            raise ValueError(
                f"metadata {key[:60]!r}: a name has 1 to {_MAX_KEY} printable characters, no space around it"
            )
        if is_computed(key):
            raise ValueError(f"metadata {key}: this is computed from what is saved and cannot be given; leave it out")
    return metadata


def changed(metadata: Mapping[str, str], wanted: Mapping[str, str]) -> dict[str, str]:
    """With what `given` returned; an empty value takes a key away."""
    return {key: value for key, value in {**metadata, **wanted}.items() if value or key not in wanted}


def is_name(key: str) -> bool:
    """Whether it can be given as a name."""
    return 0 < len(key) <= _MAX_KEY and key.isprintable() and key.strip() == key


def is_computed(key: str) -> bool:
    """Whether what is saved decides its value."""
    return key in _COMPUTED or is_hash(key) or key.startswith(OURS)


def is_hash(key: str) -> bool:
    """Whether it states something of the bytes of its file, so that it is untrue of any other."""
    return key.startswith(("sshs_", "modelspec.hash_"))


def is_scale(key: str) -> bool:
    """Whether readers multiply by it. What is read has its scale in its factors and alphas."""
    return key in _SCALES


def is_ours(metadata: Mapping[str, str]) -> bool:
    """Whether a file says that `save` wrote it. The checkpoint of a training, which has that key alone, does not."""
    older = _DISTILLED_KEY in metadata and "ss_network_module" in metadata
    return SAVED_KEY in metadata or PROVENANCE_KEY in metadata or older


def for_file(lora: Lora, title: str, format: Format) -> dict[str, str]:
    """The LoRA's metadata brought up to date: network dimensions (kohya's ss_*), modelspec, diffusers' adapter config.

    Without hashes, which tensor_file.write knows. What says how the LoRA was trained, dates included, stays.
    """
    aside = {*_SCALES, *_NETWORK}
    result = {key: value for key, value in lora.metadata.items() if key not in aside and not is_hash(key)}
    result |= _network(lora)
    result["ss_output_name"] = title
    result.setdefault("modelspec.title", title)
    # To the day, so that the same work on one day makes the same file.
    result[_DATE] = datetime.now(timezone.utc).date().isoformat()
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
    result = {}
    plain = [layer for layer in lora.modules.values() if all(size == 1 for size in layer.kernel)]
    convolutions = [layer for layer in lora.modules.values() if any(size > 1 for size in layer.kernel)]
    algorithms = [kind.lower() for kind in lora.kinds if kind != "difference"] or ["full"]
    module = lora.metadata.get("ss_network_module", "")
    # Trainers for other models than Stable Diffusion say networks.lora_flux and the like.
    own = module if module.startswith("networks.lora") else "networks.lora"
    result["ss_network_module"] = own if algorithms == ["lora"] else "lycoris.kohya"
    # kohya's resize script writes Dynamic where modules differ.
    result["ss_network_dim"] = _one([_dim(layer) for layer in plain or convolutions])
    result["ss_network_alpha"] = _one([layer.written_alpha for layer in plain or convolutions])
    arguments: dict[str, object] = (
        {} if algorithms == ["lora"] else {"algo": algorithms[0] if len(algorithms) == 1 else "mixed"}
    )
    if convolutions:
        arguments |= {
            "conv_dim": _one([_dim(layer) for layer in convolutions]),
            "conv_alpha": _one([layer.written_alpha for layer in convolutions]),
        }
    if module == result["ss_network_module"]:
        arguments = _other_arguments(lora.metadata) | arguments
    if arguments:
        result["ss_network_args"] = json.dumps(arguments)
    return result


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
