"""Freezes what saved workflows depend on: tests/frozen/nodes.json and one file for each workflow, as the page saves it.

    python tools/frozen.py                      before the first release: writes all of it anew
    python tools/frozen.py --line "..."         after it: files a changed node under the line of CHANGELOG.md that tells users

tests/with_comfyui/test_frozen.py holds the nodes to it.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import sys
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
FROZEN = ROOT / "tests" / "frozen"
NODES = FROZEN / "nodes.json"
OURS = "LCMKit"
# What a tooltip says and in which order a list of files stands breaks no workflow.
_KEPT = ("default", "min", "max", "step", "control_after_generate", "replaces")


def contract(known: Mapping[str, Any]) -> dict[str, Any]:
    """Node id -> its inputs in their order and its outputs. known: /object_info."""
    return {
        node: {
            "inputs": [
                [name, group, *described(spec)]
                for group in ("required", "optional")
                for name, spec in entry["input"].get(group, {}).items()
            ],
            "outputs": [list(pair) for pair in zip(entry["output_name"], entry["output"], strict=True)],
        }
        for node, entry in sorted(known.items())
        if node.startswith(OURS)
    }


def described(spec: list[Any]) -> list[Any]:
    """[type, options that count] of an input."""
    kind, options = spec[0], spec[1] if len(spec) > 1 else {}
    kept = {name: options[name] for name in _KEPT if name in options}
    choices = kind if isinstance(kind, list) else options.get("options", ())
    if choices and isinstance(choices[0], Mapping):
        kept["options"] = [
            [one["key"], [[n, *described(s)] for group in one["inputs"].values() for n, s in group.items()]]
            for one in choices
        ]
    elif choices and not any(str(choice).endswith((".safetensors", ".ckpt", ".pt")) for choice in choices):
        kept["options"] = list(choices)
    return ["COMBO" if isinstance(kind, list) else kind, kept]


def digest(nodes: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(nodes, sort_keys=True).encode()).hexdigest()


def workflows(page: Any, web_page: Any, package: Any) -> Iterator[tuple[str, dict[str, Any]]]:
    """(name, {"workflow", "prompt"}) of every example and of every node at work, as the page saves and sends them."""
    for file in sorted((ROOT / "example_workflows").glob("*.json")):
        open_workflow(page, json.loads(file.read_text(encoding="utf-8")))
        yield file.stem, both(page)
    scenes = package("tools.scenes")
    for node in scenes.SCENES:
        web_page.open_graph(page, scenes.scene_of(node)[0], node)
        page.wait_for_timeout(200)
        yield node, both(page)


def open_workflow(page: Any, workflow: Mapping[str, Any]) -> None:
    page.evaluate("graph => app.loadGraphData(graph)", workflow)
    page.wait_for_function("count => app.graph.nodes.length === count", arg=len(workflow["nodes"]))
    page.wait_for_timeout(200)
    page.keyboard.press("Escape")  # the dialog that lists the models to download


def both(page: Any) -> dict[str, Any]:
    """What the page saves of the open workflow, and what it sends of our nodes in it."""
    workflow = page.evaluate("() => JSON.parse(JSON.stringify(app.graph.serialize()))")
    sent = page.evaluate("() => app.graphToPrompt().then(both => JSON.parse(JSON.stringify(both.output)))")
    workflow.pop("id", None)  # drawn at random
    # The page does not know what a node of a pack that is not there is called.
    ours = {id_: node for id_, node in sent.items() if node.get("class_type", "").startswith(OURS)}
    return {
        "workflow": workflow,
        "prompt": {id_: {"class_type": node["class_type"], "inputs": node["inputs"]} for id_, node in ours.items()},
    }


def file_a_change(line: str, nodes: Mapping[str, Any]) -> None:
    if line not in (ROOT / "CHANGELOG.md").read_text(encoding="utf-8").replace("\n  ", " "):
        raise SystemExit(f"CHANGELOG.md has no line {line!r}. Tell users there what changes, then give that line here.")
    kept = json.loads(NODES.read_text(encoding="utf-8"))
    kept["changes"].append({"changelog": line, "digest": digest(nodes)})
    NODES.write_text(json.dumps(kept, indent=1) + "\n", encoding="utf-8")


def main() -> int:
    asked = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    asked.add_argument("--line", help="of CHANGELOG.md, for a change of a node after its release")
    options = asked.parse_args()
    sys.path.insert(0, str(ROOT / "tools"))
    from playwright.sync_api import sync_playwright
    from workflows import package_module

    os.environ.setdefault("COMFYUI_PATH", str(ROOT / ".comfyui"))
    server_of = package_module("tests.with_comfyui.comfy_server").pack_server
    web_page = package_module("tests.with_comfyui.web_page")
    with tempfile.TemporaryDirectory() as home, server_of(Path(home)) as server:
        nodes = contract(json.loads(server.request("/object_info")))
        if options.line:
            file_a_change(options.line, nodes)
            return 0
        NODES.write_text(json.dumps({"nodes": nodes, "changes": []}, indent=1) + "\n", encoding="utf-8")
        with sync_playwright() as play:
            browser = play.chromium.launch(executable_path=web_page.chromium(), args=web_page.OPTIONS)
            page = web_page.opened_page(browser, server)
            for old in (FROZEN / "workflows").glob("*.json"):
                old.unlink()
            (FROZEN / "workflows").mkdir(parents=True, exist_ok=True)
            for name, frozen in workflows(page, web_page, package_module):
                text = json.dumps(frozen, ensure_ascii=False, separators=(",", ":"))
                (FROZEN / "workflows" / f"{name}.json").write_text(text + "\n", encoding="utf-8")
            browser.close()
    return 0


if __name__ == "__main__":
    sys.exit(main())
