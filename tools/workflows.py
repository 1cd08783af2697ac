"""Writes example_workflows/*.json and demo/workflow.json from the descriptions in tools/flows/, by the node definitions of a real ComfyUI,
and a small picture of each for the template browser.

make workflows                          PACKS=/folder/of/other/packs also records anew the nodes of those packs
"""

from __future__ import annotations

import argparse
import importlib
import importlib.util
import json
import os
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = "lcm_kit"
PICTURED = ("1 First picture with an LCM-LoRA", "2 Style LoRA and LCM-LoRA")  # by the demo, with what comes out


def package_module(name: str):
    """A module of this clone as one of the package lcm_kit, whatever its folder is called."""
    if PACKAGE not in sys.modules:
        spec = importlib.util.spec_from_file_location(
            PACKAGE, ROOT / "__init__.py", submodule_search_locations=[str(ROOT)]
        )
        sys.modules[PACKAGE] = importlib.util.module_from_spec(spec)
    return importlib.import_module(f"{PACKAGE}.{name}")


def main() -> int:
    asked = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    asked.add_argument("--packs", type=Path, help="folder of the other packs whose nodes are to be recorded")
    options = asked.parse_args()
    writing, recording = package_module("tools.flows.writing"), package_module("tools.flows.packs")
    comfyui = Path(os.environ.get("COMFYUI_PATH") or ROOT / ".comfyui")
    packs = {"lcm-kit": ROOT}
    if options.packs:
        packs |= {name: options.packs.resolve() / name for name in recording.recorded()}
    server = package_module("demo.comfyui_server").ComfyUIServer
    with tempfile.TemporaryDirectory() as home, server(comfyui, home, packs=packs) as running:
        if options.packs:
            recording.record(json.loads(running.request("/object_info")), options.packs)
        texts = writing.texts(running)
    for path in set(writing.FOLDER.glob("*.json")) - set(texts):
        path.unlink()
        path.with_suffix(".jpg").unlink(missing_ok=True)
        print(f"removed {path.relative_to(ROOT)}, which nothing describes")
    draw = package_module("tools.flows.thumbnail").draw
    for path, text in texts.items():
        path.write_text(text, encoding="utf-8")
        if path != writing.DEMO and path.stem not in PICTURED:
            path.with_suffix(".jpg").write_bytes(draw(json.loads(text)))
    print(f"{len(texts)} workflows in {writing.FOLDER.relative_to(ROOT)} and {writing.DEMO.relative_to(ROOT)}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
