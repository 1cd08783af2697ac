"""Writes what others read of the nodes' texts: locales/<language>/nodeDefs.json, which ComfyUI's page shows in place of the English
names and tooltips, and node_list.json, by which ComfyUI-Manager finds the pack that an unknown node belongs to.

    make locales                 from tools/translations/<language>.json and the node definitions of a real ComfyUI
    python tools/locales.py --missing zh      prints the English texts that the language has no words for yet

A translation belongs to its English text: {"English": "translation"}. A text that is changed has none until somebody writes it, and
tests/with_comfyui/test_locales.py names it; so no language says what a node did last year.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import sys
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
TRANSLATIONS = Path(__file__).with_name("translations")
LOCALES = ROOT / "locales"
NODE_LIST = ROOT / "node_list.json"
LANGUAGES = {
    "zh": "Chinese",
    "ja": "Japanese",
    "ko": "Korean",
    "fr": "French",
    "de": "German",  # ComfyUI's page offers no German yet; the files wait for it
    "es": "Spanish",
    "ru": "Russian",
}
NUMBERS = re.compile(r"\d+(?:\.\d+)?")  # what no translation may lose or change


def _inputs(groups: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Mapping[str, Any]]]:
    """(whole name, options) of all inputs, those that a choice brings along included."""
    for group in ("required", "optional"):
        for short, (kind, *more) in groups.get(group, {}).items():
            options = more[0] if more else {}
            yield prefix + short, options
            if kind == "COMFY_DYNAMICCOMBO_V3":
                for choice in options["options"]:
                    yield from _inputs(choice["inputs"], f"{prefix}{short}.")


def english(entry: Mapping[str, Any]) -> dict[str, Any]:
    """What /object_info says of one node, in the shape of nodeDefs.json.

    The page looks an input up by its name with dots written as underscores, an output by its place.
    """
    inputs: dict[str, dict[str, str]] = {}
    for name, options in _inputs(entry["input"]):
        text = {"name": options.get("display_name") or name.rpartition(".")[2]}
        if options.get("tooltip"):
            text["tooltip"] = options["tooltip"]
        inputs[name.replace(".", "_")] = text
    outputs = {}
    tooltips = entry.get("output_tooltips") or [None] * len(entry["output_name"])
    for place, (name, tooltip) in enumerate(zip(entry["output_name"], tooltips, strict=True)):
        outputs[str(place)] = {"name": name, **({"tooltip": tooltip} if tooltip else {})}
    return {
        "display_name": entry["display_name"],
        "description": entry["description"],
        "inputs": inputs,
        "outputs": outputs,
    }


def texts(tree: Any) -> Iterator[str]:
    """All texts of such a tree, in order."""
    if isinstance(tree, str):
        yield tree
        return
    for value in tree.values():
        yield from texts(value)


def translated(tree: Any, table: Mapping[str, str]) -> Any:
    """The tree in another language; a text without a translation is left out, and the page shows the English one."""
    if isinstance(tree, str):
        return table.get(tree)
    parts = {key: translated(value, table) for key, value in tree.items()}
    return {key: value for key, value in parts.items() if value}


def table_of(language: str) -> dict[str, str]:
    path = TRANSLATIONS / f"{language}.json"
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}


def file_of(language: str) -> Path:
    return LOCALES / language / "nodeDefs.json"


def node_list(tree: Mapping[str, Any]) -> dict[str, str]:
    """Node id -> its name and what it does. Manager's scanner finds no ids in classes with a base class of their own."""
    return {node: f"{own['display_name']}: {own['description']}" for node, own in tree.items()}


def as_text(tree: Mapping[str, Any]) -> str:
    return json.dumps(tree, ensure_ascii=False, indent=1) + "\n"


def _definitions() -> dict[str, Any]:
    from workflows import package_module  # the script beside this one, which is found when this one is run

    comfyui = Path(os.environ.get("COMFYUI_PATH") or ROOT / ".comfyui")
    server = package_module("demo.comfyui_server").ComfyUIServer
    with tempfile.TemporaryDirectory() as home, server(comfyui, home, packs={"lcm-kit": ROOT}) as running:
        entries = json.loads(running.request("/object_info"))
    return {name: english(entry) for name, entry in entries.items() if name.startswith("LCMKit")}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--missing", metavar="LANGUAGE", choices=sorted(LANGUAGES))
    asked = parser.parse_args().missing
    tree = _definitions()
    if asked:
        table = table_of(asked)
        print(json.dumps({text: "" for text in texts(tree) if text not in table}, ensure_ascii=False, indent=1))
        return 0
    NODE_LIST.write_text(as_text(node_list(tree)), encoding="utf-8")
    for language in LANGUAGES:
        path = file_of(language)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(as_text(translated(tree, table_of(language))), encoding="utf-8")
    print(f"{len(LANGUAGES)} languages in {LOCALES.relative_to(ROOT)}, {len(tree)} nodes in {NODE_LIST.name}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
