"""Takes the pictures of nodes, workflows and help pages in ComfyUI's real page, in both of its renderers.

    make pictures                      web/docs/*.webp, and what is to be looked at in demo/output/pictures
    make pictures ONLY=LCMKitGrid      of one node, or of workflows with these words in their names

The nodes work on the embedded model. A picture of a help page has 60 kB at most.
"""

from __future__ import annotations

import argparse
import io
import os
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

from PIL import Image

ROOT = Path(__file__).resolve().parents[1]


OUT = ROOT / "demo" / "output" / "pictures"
HELP = ROOT / "web" / "docs"
MOST = 60_000  # bytes of a help page's picture
GAP, EDGE = 50, 24
# Leaves the shown nodes, in columns from left to right, with room for what they have grown to; returns the corner and the size.
ARRANGE = """([columns, gap]) => {
    const shown = new Set(columns.flat().map(String));
    for (const node of [...app.graph.nodes]) if (!shown.has(String(node.id))) app.graph.remove(node);
    let x = 0, low = 0;
    for (const column of columns) {
        let y = 0, wide = 0;
        for (const id of column) {
            const node = app.graph.nodes.find(n => String(n.id) === String(id));
            if (node.type === "PreviewImage") node.size = [280, 330];
            node.pos = [x, y];
            y += node.size[1] + 30 + gap / 2;
            wide = Math.max(wide, node.size[0]);
        }
        x += wide + gap;
        low = Math.max(low, y - 30 - gap / 2);
    }
    return [x - gap, low];
}"""
# Else a seed is another one after the run.
FIXED = """() => app.graph.nodes.flatMap(n => n.widgets ?? []).forEach(w => { if (w.name === "control_after_generate") w.value = "fixed"; })"""
LOOK = """([scale, x, y]) => { app.canvas.ds.scale = scale; app.canvas.ds.offset = [x, y]; app.canvas.deselectAll?.(); app.canvas.draw(true, true); }"""


def of_node(page, web_page, node: str, scenes) -> bytes:
    """PNG of a node at work."""
    graph, columns = scenes.scene_of(node)
    types = {number: made["class_type"] for number, made in graph.items()}
    web_page.open_graph(page, graph, node)
    page.evaluate(FIXED)
    if node not in scenes.NOT_RUN:
        history = web_page.run_in_page(page)
        if history["status"]["status_str"] != "success":
            raise SystemExit(f"{node}: {history['status']['messages'][-1]}")
    page.wait_for_timeout(1500)  # the page fades its progress out
    assert all(number in types for column in columns for number in column)
    width, height = page.evaluate(ARRANGE, [columns, GAP])
    page.wait_for_timeout(700)
    width, height = page.evaluate(ARRANGE, [columns, GAP])
    size = page.viewport_size
    left, top = 130, 110  # beside and below what the page lays over the graph
    scale = min(
        1.0, (size["width"] - left - 40) / (width + 2 * EDGE), (size["height"] - top - 40) / (height + 30 + 2 * EDGE)
    )
    page.evaluate(LOOK, [scale, left / scale + EDGE, top / scale + EDGE + 30])
    page.wait_for_timeout(700)
    clip = {"x": left, "y": top, "width": scale * (width + 2 * EDGE), "height": scale * (height + 30 + 2 * EDGE)}
    return page.screenshot(clip=clip)


def as_webp(png: bytes) -> bytes:
    """A picture as good as MOST bytes allow."""
    picture = Image.open(io.BytesIO(png)).convert("RGB")
    for quality in (90, 80, 70, 60, 45, 30):
        packed = io.BytesIO()
        picture.save(packed, "WEBP", quality=quality, method=6)
        if packed.tell() <= MOST:
            break
    return packed.getvalue()


def of_workflow(page, file: Path) -> bytes:
    page.evaluate(
        "([text, name]) => app.handleFile(new File([text], name, {type: 'application/json'}))",
        [file.read_text(encoding="utf-8"), file.name],
    )
    page.wait_for_timeout(2500)
    page.keyboard.press("Escape")  # the dialog that lists the models to download
    page.wait_for_timeout(500)
    return page.screenshot()


def of_help(page, web_page, node: str) -> bytes:
    """PNG of a help page as the page shows it beside the graph."""
    web_page.open_graph(page, {"1": {"class_type": node, "inputs": {}}}, "help")
    web_page.open_help(page, node)
    page.wait_for_timeout(1500)  # the panel may still show the page of the node before
    return page.screenshot()


def wanted(names: list[str], only: str) -> Iterator[str]:
    return (name for name in names if any(words in name for words in only.split(",")))


def main() -> int:
    asked = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    asked.add_argument("--only", default="", help="words of the names of nodes or workflows, between commas")
    asked.add_argument("--what", default="nodes,workflows,help", help="some of nodes, workflows, help")
    options = asked.parse_args()
    from workflows import package_module  # the script beside this one, which is found when this one is run

    os.environ.setdefault("COMFYUI_PATH", str(ROOT / ".comfyui"))
    comfy_server = package_module("tests.with_comfyui.comfy_server")
    web_page = package_module("tests.with_comfyui.web_page")
    scenes = package_module("tools.scenes")
    from playwright.sync_api import sync_playwright

    OUT.mkdir(parents=True, exist_ok=True)
    workflows = sorted((ROOT / "example_workflows").glob("*.json"))
    with (
        tempfile.TemporaryDirectory() as home,
        comfy_server.pack_server(Path(home)) as server,
        sync_playwright() as play,
    ):
        # A list of files that has the full LCM of its scene; nothing reads it.
        unets = server.home / "models" / "diffusion_models"
        unets.mkdir(parents=True, exist_ok=True)
        (unets / scenes.FULL_LCM).touch()
        browser = play.chromium.launch(executable_path=web_page.chromium(), args=web_page.OPTIONS)
        for renderer, vue in (("classic", False), ("nodes2", True)):
            page = web_page.opened_page(browser, server, **{"Comfy.VueNodes.Enabled": vue})
            for node in wanted(list(scenes.SCENES), options.only) if "nodes" in options.what else ():
                png = of_node(page, web_page, node, scenes)
                (OUT / f"{node}.{renderer}.png").write_bytes(png)
                if not vue:
                    (HELP / f"{node}.webp").write_bytes(as_webp(png))
                print(node, renderer, flush=True)
            for file in workflows if "workflows" in options.what else ():
                if [*wanted([file.stem], options.only)]:
                    (OUT / f"{file.stem}.{renderer}.png").write_bytes(of_workflow(page, file))
                    print(file.stem, renderer, flush=True)
            for node in wanted(list(scenes.SCENES), options.only) if "help" in options.what and not vue else ():
                (OUT / f"{node}.help.png").write_bytes(of_help(page, web_page, node))
                print(node, "help", flush=True)
            page.close()
        browser.close()
    return 0


if __name__ == "__main__":
    sys.exit(main())
