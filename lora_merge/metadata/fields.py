"""The fields of a LoRA file's metadata: which this pack writes, which are computed, which anybody may give."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ..disk import hashes, json_text
from .adapter_config import CONFIG_KEY
from .adapter_scales import METADATA_KEY as ADAPTER_KEY

# Keys of this pack begin so.
OURS = "lcm_kit."
# In every file that `save` writes: what may be replaced without asking.
SAVED_KEY = "lcm_kit.saved"
PROVENANCE_KEY = "lcm_kit.merge"
# Written by whoever makes a LoRA with known settings; the name of a preset.
PRESET_KEY = "lcm_kit.preset"
MERGED_FROM = "modelspec.merged_from"
ARCHITECTURE, IMPLEMENTATION = "modelspec.architecture", "modelspec.implementation"
_DISTILLED_KEY = "lcm_kit.distillation"

# Scales that a reader would apply a second time.
SCALES = (ADAPTER_KEY, "r", "lora_alpha", "alpha_pattern", "rank_pattern", "use_rslora", CONFIG_KEY)
DATE = "modelspec.date"
NETWORK = ("ss_network_module", "ss_network_dim", "ss_network_alpha", "ss_network_args")
_COMPUTED = (
    *SCALES,
    *hashes.BLANK,
    *NETWORK,
    DATE,
    MERGED_FROM,
    "ss_output_name",
    "modelspec.sai_model_spec",
    "format",
)
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
    return key in SCALES


def is_ours(metadata: Mapping[str, str]) -> bool:
    """Whether a file says that `save` wrote it. The checkpoint of a training, which has that key alone, does not."""
    older = _DISTILLED_KEY in metadata and "ss_network_module" in metadata
    return SAVED_KEY in metadata or PROVENANCE_KEY in metadata or older
