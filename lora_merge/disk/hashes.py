"""The hashes by which other programs know a LoRA file, made while it is written.

sshs_model_hash, sshs_legacy_hash: what kohya's trainers write, and what A1111 and Forge believe. The first is the sha256 of
    all behind the header. The second begins with the bytes that A1111 once took of any checkpoint, 64 kB from the first MB
    on, of the file as it would be with its training metadata (`ss_...`) alone; eight digits of their sha256.
modelspec.hash_sha256: sha256 of all behind the header, with 0x before it (Stability AI's ModelSpec 1.0.0).
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Mapping
from pathlib import Path

from .header import check_header
from .whole import open_plain

MODEL, LEGACY, MODELSPEC = "sshs_model_hash", "sshs_legacy_hash", "modelspec.hash_sha256"
# As long as what takes their place, so that a header can be written before its hashes are known.
BLANK: Mapping[str, str] = {MODEL: "0" * 64, LEGACY: "0" * 8, MODELSPEC: "0x" + "0" * 64}
_LEGACY_BYTES = (0x100000, 0x110000)
_BLOCK = 1 << 20


def training(metadata: Mapping[str, str]) -> dict[str, str]:
    """The part of the metadata that the legacy hash counts."""
    return {key: value for key, value in metadata.items() if key.startswith("ss_")}


class Hashes:
    """Fed with a file's data in its order. head: the 8 bytes and the header of the file with training metadata alone."""

    def __init__(self, head: bytes) -> None:
        self._model, self._legacy, self._at = hashlib.sha256(), hashlib.sha256(), 0
        self._add_to_legacy(memoryview(head))

    def add(self, data: memoryview) -> None:
        self._model.update(data)
        self._add_to_legacy(data)

    def found(self) -> dict[str, str]:
        """The keys of BLANK with their values."""
        model = self._model.hexdigest()
        return {MODEL: model, LEGACY: self._legacy.hexdigest()[:8], MODELSPEC: f"0x{model}"}

    def _add_to_legacy(self, data: memoryview) -> None:
        start, stop = _LEGACY_BYTES[0] - self._at, _LEGACY_BYTES[1] - self._at
        if start < data.nbytes and stop > 0:
            self._legacy.update(data[max(0, start) : stop])
        self._at += data.nbytes


def weights_sha256(path: str | os.PathLike[str]) -> str:
    """sha256 of all behind a safetensors file's header, which stays when only the metadata changes.

    Raises ValueError for what is no whole safetensors file, OSError for what cannot be read.
    """
    value = hashlib.sha256()
    begin = check_header(Path(path)).begin
    with open_plain(path) as file:
        file.seek(begin)
        while block := file.read(_BLOCK):
            value.update(block)
    return value.hexdigest()


def stated(metadata: Mapping[str, str]) -> str | None:
    """The sha256 of the weights that a file states of itself, None where it states none; it need not be true."""
    for key in (MODELSPEC, MODEL):
        value = metadata.get(key, "").lower().removeprefix("0x")
        if len(value) == 64 and set(value) <= set("0123456789abcdef"):
            return value
    return None
