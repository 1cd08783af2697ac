"""Nodes of other packs that example workflows have: what a real ComfyUI with the pack said of them, kept in other_packs.json.

make workflows PACKS=/folder/of/packs asks again: that folder holds the packs, each in a folder of its registry name.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import tomllib

FILE = Path(__file__).with_name("other_packs.json")
_KEPT = ("input", "output", "output_name", "display_name", "output_node")


def recorded() -> dict[str, Any]:
    """Name of a pack in the registry -> "version", and "nodes": id -> its entry of /object_info."""
    return json.loads(FILE.read_text(encoding="utf-8"))


def nodes() -> dict[str, Any]:
    """Node id -> its entry of /object_info, of all these packs."""
    return {id: entry for pack in recorded().values() for id, entry in pack["nodes"].items()}


def homes() -> dict[str, tuple[str, str]]:
    """Node id -> name and version of its pack."""
    return {id: (name, pack["version"]) for name, pack in recorded().items() for id in pack["nodes"]}


def record(known: Mapping[str, Any], folder: Path) -> None:
    """Writes the file anew. known: /object_info of a ComfyUI with these packs.   folder: that of the packs."""
    packs = recorded()
    for name, pack in packs.items():
        project = tomllib.loads((folder / name / "pyproject.toml").read_text(encoding="utf-8"))["project"]
        pack["version"] = project["version"]
        for id in pack["nodes"]:
            pack["nodes"][id] = {key: known[id][key] for key in _KEPT}
            pack["nodes"][id]["input"].pop("hidden", None)
    FILE.write_text(json.dumps(packs, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
