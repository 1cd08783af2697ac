"""The workflows and the loader's report in ComfyUI's real web page: a Chromium opens, runs and sees them.

The screenshots go to demo/output/screenshot.png and loader.png.
"""

import json

import pytest

from lcm_kit.demo.graphs import SD15, TINY, Shot, lcm_only, style_in_few_steps
from lcm_kit.tests.helpers import ROOT
from lcm_kit.tests.with_comfyui.comfy_server import newest_page, pack_server
from lcm_kit.tests.with_comfyui.web_page import open_graph, opened_page, report_on

DEMO = ROOT / "demo" / "workflow.json"
EXAMPLES = ROOT / "example_workflows"
SCREENSHOT = ROOT / "demo" / "output" / "screenshot.png"
LOADER = SCREENSHOT.with_name("loader.png")


def open_workflow(page, path):
    """As if the file had been dropped on the page."""
    page.evaluate(
        "([text, name]) => app.handleFile(new File([text], name, {type: 'application/json'}))",
        [path.read_text(encoding="utf-8"), path.name],
    )
    count = len(json.loads(path.read_text(encoding="utf-8"))["nodes"])
    page.wait_for_function("count => app.graph.nodes.length === count", arg=count)


def missing_nodes(page):
    """Types in the open graph that the page does not know: it draws them red."""
    # Not n.has_errors: newer pages set it as well for a model file that is yet to be downloaded.
    return page.evaluate("() => app.graph.nodes.filter(n => !LiteGraph.registered_node_types[n.type]).map(n => n.type)")


def prompt_of(page):
    """The open graph as the page would send it to the server, `spare` of defaults."""
    return spare(page, page.evaluate("() => app.graphToPrompt().then(prompt => prompt.output)"))


def spare(page, prompt):
    """A graph in API format without optional inputs that have their default value, which means the same."""
    known = page.evaluate("() => fetch('/object_info').then(answer => answer.json())")
    made = {}
    for number, node in prompt.items():
        optional = known[node["class_type"]]["input"].get("optional", {})
        defaults = {name: more[0]["default"] for name, (_, *more) in optional.items() if more and "default" in more[0]}
        inputs = {name: value for name, value in node["inputs"].items() if defaults.get(name, ...) != value}
        made[number] = {**node, "inputs": inputs}
    return made


def tree(graph, node):
    """A node of a graph in API format with all that it depends on, without ids."""
    inputs = {
        name: (tree(graph, value[0]), value[1]) if isinstance(value, list) else value
        for name, value in graph[node]["inputs"].items()
    }
    return graph[node]["class_type"], inputs


def tree_of_picture(graph):
    (node,) = (node for node, content in graph.items() if content["class_type"] == "SaveImage")
    return tree(graph, node)


def enlarged(graph):
    """The tree of a graph's picture with the node that demo/workflow.json has before its last one."""
    save, inputs = tree_of_picture(graph)
    larger = ("ImageScaleBy", {"image": inputs["images"], "upscale_method": "lanczos", "scale_by": 4})
    return save, {**inputs, "images": (larger, 0)}


@pytest.mark.parametrize(
    ("path", "graph"),
    [
        (EXAMPLES / "style-lora-in-4-steps.json", style_in_few_steps),
        (EXAMPLES / "lcm-lora-in-60-seconds.json", lcm_only),
    ],
    ids=lambda value: getattr(value, "stem", ""),
)
def test_example_workflow_opens_without_a_red_node_and_is_the_tested_graph(page, path, graph):
    open_workflow(page, path)
    assert missing_nodes(page) == []
    opened = prompt_of(page)
    prompt = next(node["inputs"]["text"] for node in opened.values() if node["class_type"] == "CLIPTextEncode")
    assert tree_of_picture(opened) == tree_of_picture(spare(page, graph(SD15, Shot(prompt, seed=1, steps=4))))
    page.keyboard.press("Escape")  # the dialog that lists the models to download


def test_the_report_is_on_the_node_after_a_run(page):
    open_graph(page, lcm_only(TINY, Shot("cat face", seed=7, steps=4)))
    page.get_by_test_id("queue-button").click()
    page.wait_for_function("() => app.graph.nodes.find(n => n.type === 'SaveImage').imgs?.length")
    report = report_on(page, "LCMKitLoader")
    assert report is not None
    for words in (
        "modules applied at strength 1.",
        "It is: LCM LoRA, likely: by metadata",
        "this model: of ComfyUI's class TinyEmoji.",
        "Settings (LCM): LCM KSampler, 4 steps, cfg 1, gamma 1",
        "Rank 32, alpha 32, effective scale 1, parameters",
    ):
        assert words in report
    page.evaluate(
        """() => {
            const node = app.graph.nodes.find(n => n.type === 'LCMKitLoader');
            node.pos = [0, 3000];  // away from the others
            app.canvas.ds.scale = 1.6;
            app.canvas.ds.offset = [90, 70 - node.pos[1]];
            app.canvas.setDirty(true, true);
        }"""
    )
    page.wait_for_timeout(1500)  # the page fades its progress out
    # what a person sees, and not only what the node holds
    box = page.get_by_label("LCM-LoRA Loader: report")
    assert box.is_visible()
    assert box.evaluate("box => box.scrollHeight <= box.clientHeight + 2"), "it is as large as its text"
    LOADER.parent.mkdir(exist_ok=True)
    page.screenshot(path=LOADER, clip={"x": 60, "y": 50, "width": 1160, "height": 740})


def test_demo_workflow_runs_in_the_page_and_shows_its_pictures(page):
    run_the_demo(page)
    SCREENSHOT.parent.mkdir(exist_ok=True)
    page.screenshot(path=SCREENSHOT)


@pytest.mark.slow
def test_demo_workflow_runs_in_the_newest_page(browser, tmp_path):
    if not newest_page():
        pytest.skip("no newer page: `make setup` fetches one")
    with pack_server(tmp_path, arguments=newest_page()) as server:
        page = opened_page(browser, server)
        run_the_demo(page)
        page.close()


def run_the_demo(page):
    open_workflow(page, DEMO)
    assert missing_nodes(page) == []
    assert tree_of_picture(prompt_of(page)) == enlarged(
        spare(page, style_in_few_steps(TINY, Shot("cat face", 1, 4), batch=4))
    )
    page.evaluate("() => { app.canvas.ds.scale = 0.6; app.canvas.ds.offset = [180, 190]; }")  # all of it, large
    assert page.locator(".p-dialog:visible").count() == 0
    page.get_by_test_id("queue-button").click()
    shown = page.wait_for_function(
        """() => {
            const node = app.graph.nodes.find(n => n.type === 'SaveImage');
            const done = node.imgs?.length && node.imgs.every(img => img.complete && img.naturalWidth);
            return done ? node.imgs.map(img => [img.naturalWidth, img.naturalHeight]) : app.lastExecutionError;
        }"""
    ).json_value()
    assert shown == [[256, 256]] * 4  # 64 pixels, enlarged to be seen
    assert page.evaluate("() => app.lastNodeErrors") in (None, {})
    page.wait_for_timeout(1500)  # the page fades its progress out
