"""A training run on disk: named tensors and plain facts in one safetensors file, whole or not at all."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

# The one road by which this pack writes files, and the one by which it reads tensors.
from ..lora_merge.disk import tensor_file
from ..lora_merge.disk.header import check_header
from ..lora_merge.disk.whole import check_place, is_plain_file, write_whole

FACTS = "lcm_kit.distillation"


def write(path: Path, tensors: Mapping[str, Tensor], facts: Mapping[str, Any]) -> None:
    """Write a checkpoint in the place of the one before; a stop in the middle leaves that one.

    facts: anything JSON holds. Raises OSError, with the path, if it cannot be written, and FileExistsError for a file
    that is there and no checkpoint.
    """
    check_writable(path)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise OSError(f"{path.parent}: the folder cannot be made ({error.strerror}).") from error
    notes = {FACTS: json.dumps(dict(facts))}
    write_whole(path, lambda file: tensor_file.write(file, tensors, notes), _only_checkpoints)


def check_writable(path: Path) -> None:
    """Raises ValueError or FileExistsError if `write` would not write a checkpoint of that name."""
    if path.parent.is_dir():
        check_place(path, _only_checkpoints)


def read(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """(tensors on the CPU, facts) of a checkpoint. Raises ValueError if the file is none."""
    try:
        tensors, metadata = tensor_file.read(path)
        facts = json.loads(metadata[FACTS])
        if not isinstance(facts, dict):
            raise ValueError("what it says of its training is no JSON object")
    except (KeyError, ValueError, RecursionError) as error:
        raise ValueError(
            f"{path}: is not a training checkpoint of LCM Kit, or damaged ({error}). Remove it, or use another name."
        ) from error
    return tensors, facts


def _only_checkpoints(path: Path) -> None:
    """A LoRA that was distilled has the same key, among others."""
    try:
        ours = is_plain_file(path) and check_header(path).metadata.keys() == {FACTS}
    except ValueError:
        ours = False
    if not ours:
        raise FileExistsError(
            f"{path}: exists already and is no checkpoint of LCM Kit. Remove it, or use another name."
        )


def differences(then: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """ "name: then, now" for every fact that differs, sorted. Compared as JSON, in which a tuple is a list."""
    plain = json.loads(json.dumps(dict(now)))
    names = sorted(then.keys() | plain.keys())
    return [f"{name}: {then.get(name)}, now {plain.get(name)}" for name in names if then.get(name) != plain.get(name)]
