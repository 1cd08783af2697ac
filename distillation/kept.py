"""What was computed once and must not be again: tensors on disk, each found by what it was made from.

A folder of shards, safetensors files that are there whole or not at all. What is added is on disk when `add` returns, so
a run that is stopped at any moment, or finds the disk full, loses no more than what it had in hand.
"""

import hashlib
import logging
from collections.abc import Iterable, Mapping
from pathlib import Path

from torch import Tensor

from ..lora_merge.disk.header import check_header
from . import checkpoint

logger = logging.getLogger(__name__)

Tensors = Mapping[str, Tensor]


def key_of(*parts: object) -> str:
    """The name of what is made from `parts`: numbers, texts, bytes and sequences of such."""
    digest = hashlib.sha256()
    for part in parts:
        content = part if isinstance(part, bytes) else repr(part).encode()
        digest.update(len(content).to_bytes(8, "big") + content)
    return digest.hexdigest()[:32]


class Kept:
    """folder: of the shards, made when it is needed; None keeps in memory alone.   `added` counts what was new.

    A shard that is damaged is left where it is, with a warning, and what it held is made again.
    """

    def __init__(self, folder: Path | None = None) -> None:
        self.folder = folder
        self.added = 0
        self._memory: dict[str, dict[str, Tensor]] = {}
        self._shards: dict[str, Path] = {}
        for shard in sorted(folder.glob("*.safetensors")) if folder is not None else []:
            try:
                names = check_header(shard).entries
            except ValueError as error:
                logger.warning("What a file of this training has kept is made again: %s", error)
                continue
            self._shards |= {name.split("/")[0]: shard for name in names}

    def __contains__(self, key: str) -> bool:
        return key in self._memory or key in self._shards

    def __len__(self) -> int:
        return len(self._memory.keys() | self._shards.keys())

    @property
    def size(self) -> int:
        """Bytes on disk, of what is there still."""
        return sum(shard.stat().st_size for shard in {*self._shards.values()} if shard.is_file())

    def get(self, keys: Iterable[str]) -> dict[str, dict[str, Tensor]]:
        """key -> what was added under it. Raises KeyError for one that is not there."""
        found: dict[str, dict[str, Tensor]] = {}
        wanted: dict[Path, set[str]] = {}
        for key in keys:
            if key in self._memory:
                found[key] = self._memory[key]
            else:
                wanted.setdefault(self._shards[key], set()).add(key)
        for shard, names in wanted.items():
            for name, tensor in checkpoint.read(shard)[0].items():
                key, _, part = name.partition("/")
                if key in names:
                    found.setdefault(key, {})[part] = tensor.clone()  # not the whole shard's memory with it
        return found

    def add(self, entries: Mapping[str, Tensors]) -> None:
        """Keep these under their keys. A disk that takes nothing is warned of; then they are in memory."""
        if not entries:
            return
        self.added += len(entries)
        if self.folder is not None:
            try:
                self._write(entries)
                return
            except OSError as error:
                logger.warning("This is kept in memory only, and would be made again after a stop: %s", error)
        self._memory |= {key: dict(tensors) for key, tensors in entries.items()}

    def clear(self) -> None:
        """Forget what is in memory."""
        self._memory.clear()

    def _write(self, entries: Mapping[str, Tensors]) -> None:
        assert self.folder is not None
        name, number = key_of(*sorted(entries)), 0
        while (shard := self.folder / f"{name}{f'-{number}' if number else ''}.safetensors").exists():
            number += 1  # a damaged one has its name
        tensors = {f"{key}/{part}": value for key, parts in entries.items() for part, value in parts.items()}
        checkpoint.write(shard, tensors, {"kept": len(entries)})
        self._shards |= dict.fromkeys(entries, shard)
