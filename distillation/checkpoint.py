"""A training run on disk: named tensors and plain facts in one safetensors file, whole or not at all."""

import json
import os
import secrets
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

FACTS = "lcm_kit.distillation"


def write(path: Path, tensors: Mapping[str, Tensor], facts: Mapping[str, Any]) -> None:
    """Write a checkpoint in the place of the one before; a stop in the middle leaves that one.

    facts: anything JSON holds. Raises OSError, with the path, if it cannot be written.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}.tmp")
    try:
        save_file({name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}, temporary,
                  {FACTS: json.dumps(dict(facts), sort_keys=True)})  # fmt: skip
        with open(temporary, "rb+") as file:
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except SafetensorError as error:
        raise OSError(f"{path}: could not be written ({error}); is the disk full?") from error
    finally:
        temporary.unlink(missing_ok=True)


def read(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """(tensors on the CPU, facts) of a checkpoint. Raises ValueError if the file is none."""
    try:
        with safe_open(path, framework="pt") as file:
            facts = json.loads((file.metadata() or {})[FACTS])
            if not isinstance(facts, dict):
                raise ValueError("what it says of its training is no JSON object")
            tensors: dict[str, Tensor] = {key: file.get_tensor(key) for key in file.keys()}
    except (SafetensorError, KeyError, ValueError, RecursionError) as error:
        raise ValueError(
            f"{path}: is not a training checkpoint of LCM Kit, or damaged ({error}). Remove it, or use another name."
        ) from error
    return tensors, facts


def differences(then: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """ "name: then, now" for every fact that differs, sorted. Compared as JSON, in which a tuple is a list."""
    plain = json.loads(json.dumps(dict(now)))
    names = sorted(then.keys() | plain.keys())
    return [f"{name}: {then.get(name)}, now {plain.get(name)}" for name in names if then.get(name) != plain.get(name)]
