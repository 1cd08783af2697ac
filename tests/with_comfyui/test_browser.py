"""The workflows and the loader's report in ComfyUI's real web page: a Chromium opens, runs and sees them.

The screenshots go to demo/output/screenshot.png and loader.png.
"""

import json

import pytest

from lcm_kit.demo.graphs import TINY, Shot, lcm_only, style_in_few_steps
from lcm_kit.tests.helpers import ROOT
from lcm_kit.tests.with_comfyui.comfy_server import newest_page, pack_server
from lcm_kit.tests.with_comfyui.web_page import becomes, open_graph, opened_page, report_on
from lcm_kit.tools.flows import packs, writing
from lcm_kit.tools.flows.descriptions import FLOWS

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


# Nodes and note with their titles, groups: x, y, width, height of each; and what the page shows of the graph right of its side bar and
# below its menu.
DRAWN = """() => {
    const canvas = app.canvas.canvas.getBoundingClientRect();
    const [scale, [x, y]] = [app.canvas.ds.scale, app.canvas.ds.offset];
    return {
        nodes: app.graph.nodes.map(n => [n.pos[0], n.pos[1] - 30, n.size[0], n.size[1] + 30, n.type]),
        groups: app.graph.groups.map(g => [...g._bounding, g.title]),
        view: [60 / scale - x, 60 / scale - y, (canvas.width - 60) / scale, (canvas.height - 60) / scale],
    };
}"""


def apart(one, other):
    x, y, width, height, *_ = one
    left, top, wide, high, *_ = other
    return x >= left + wide or left >= x + width or y >= top + high or top >= y + height


def inside(box, frame):
    x, y, width, height, *_ = box
    left, top, wide, high, *_ = frame
    return x >= left and y >= top and x + width <= left + wide and y + height <= top + high


def all_in_view(page):
    """All nodes, now and a moment later."""
    drawn = page.evaluate(DRAWN)
    page.wait_for_timeout(100)
    return page.evaluate(DRAWN) == drawn and all(inside(node, drawn["view"]) for node in drawn["nodes"])


@pytest.mark.parametrize("flow", FLOWS, ids=lambda flow: flow.name)
def test_example_workflow_opens_whole_in_view_and_is_the_prompt_of_its_description(page, flow):
    known = page.evaluate("() => fetch('/object_info').then(answer => answer.json())") | packs.nodes()
    open_workflow(page, EXAMPLES / f"{flow.name}.json")
    foreign = {str(node.id) for node in flow.nodes if node.type in packs.nodes()}
    assert missing_nodes(page) == [node.type for node in flow.nodes if str(node.id) in foreign]
    becomes(page, True, lambda: all_in_view(page))  # the page fits the view after it has opened the graph
    drawn = page.evaluate(DRAWN)
    for number, node in enumerate(drawn["nodes"]):
        assert [other for other in drawn["nodes"][:number] if not apart(node, other)] == [], node
        assert inside(node, drawn["view"]), (node, drawn["view"])
        if node[-1] != "MarkdownNote":
            assert [group for group in drawn["groups"] if inside(node, group)], node
    sent = page.evaluate("() => app.graphToPrompt().then(prompt => prompt.output)")
    made = {id: {"class_type": node["class_type"], "inputs": node["inputs"]} for id, node in sent.items()}
    described = writing.prompt(flow, known)
    for id in (
        foreign
    ):  # the page does not know what its fields are called; older ones give all one name, so that one is left
        shown, told = ({v for v in one.pop(id)["inputs"].values() if isinstance(v, str)} for one in (made, described))
        assert shown <= told
        assert shown
    assert made == described
    assert becomes(page, 0, lambda: closed_one(page)) == 0


def closed_one(page):
    """Closes the uppermost dialog, such as that of missing models, or of missing nodes; returns how many were open."""
    count = page.locator(".p-dialog:visible").count()
    page.keyboard.press("Escape")
    return count


def test_the_report_is_on_the_node_after_a_run(page):
    open_graph(page, lcm_only(TINY, Shot("cat face", seed=7, steps=4)))
    page.evaluate("() => { ended.length = 0; }")
    # All of it in view: the page takes a node's picture when it draws the node.
    page.evaluate(
        "() => { app.canvas.ds.scale = 0.5; app.canvas.ds.offset = [200, 200]; app.canvas.setDirty(true, true); }"
    )
    page.get_by_test_id("queue-button").click()
    page.wait_for_function("() => app.graph.nodes.find(n => n.type === 'SaveImage').imgs?.length")
    page.wait_for_function("() => ended.length")
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
    # what a person sees, and not only what the node holds
    box = page.get_by_label("LCM-LoRA Loader: report")
    box.wait_for()
    fits = "box => box.scrollHeight <= box.clientHeight + 2"
    assert becomes(page, True, lambda: box.evaluate(fits)), "it is as large as its text"
    page.wait_for_timeout(1500)  # for the picture alone: the page fades its progress out
    LOADER.parent.mkdir(exist_ok=True)
    page.screenshot(path=LOADER, clip={"x": 60, "y": 50, "width": 1160, "height": 740})


def test_demo_workflow_runs_in_the_page_and_shows_its_pictures(page):
    run_the_demo(page)
    page.wait_for_timeout(1500)  # for the picture alone: the page fades its progress out
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
