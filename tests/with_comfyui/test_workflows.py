"""The workflows that users open are sound: every node, socket and widget in them is what the server knows."""

import io
import json
from urllib.error import HTTPError

import pytest
import tomllib
from PIL import Image

from lcm_kit.tests.helpers import ROOT
from lcm_kit.tests.with_comfyui.comfy_server import PACK

EXAMPLES = sorted((ROOT / "example_workflows").glob("*.json"))
WORKFLOWS = [ROOT / "demo" / "workflow.json", *EXAMPLES]
VERSION = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["version"]
NOTES = {"MarkdownNote", "Note"}  # known to the page only
WIDGETS = {"INT", "FLOAT", "STRING", "BOOLEAN", "COMBO"}
CHOICE = "COMFY_DYNAMICCOMBO_V3"  # its options have inputs of their own

every_workflow = pytest.mark.parametrize("path", WORKFLOWS, ids=lambda path: path.stem)
every_example = pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.stem)


@pytest.fixture(scope="module")
def known(server):
    """Node id -> its entry in /object_info."""
    return json.loads(server.request("/object_info"))


def read(path):
    """(workflow, its nodes but the notes)."""
    workflow = json.loads(path.read_text(encoding="utf-8"))
    return workflow, [node for node in workflow["nodes"] if node["type"] not in NOTES]


def inputs_of(info):
    """[(name, type, options)], in the order of the page."""
    groups = (info["input"].get(group, {}) for group in ("required", "optional"))
    specs = [(name, *spec, {}) for group in groups for name, spec in group.items()]
    return [(name, "COMBO" if isinstance(kind, list) else kind, options) for name, kind, options, *_ in specs]


def chosen(info, values):
    """[(name, type, options, value)] of the node's inputs, with those of the options that its widgets' values choose."""
    values = iter(values)
    return [one for spec in inputs_of(info) for one in opened(*spec, values)]


def opened(name, kind, options, values):
    if kind == CHOICE:
        keys = [option["key"] for option in options["options"]]
        key = next(values)
        yield name, "COMBO", {"options": keys}, key
        for own, *spec in inputs_of({"input": options["options"][keys.index(key)]["inputs"]}):
            yield from opened(f"{name}.{own}", *spec, values)
        return
    yield name, kind, options, next(values) if kind in WIDGETS else None
    if options.get("control_after_generate"):
        choices = {"options": ["fixed", "increment", "decrement", "randomize"]}
        yield f"{name}, after a run", "COMBO", choices, next(values)


@every_workflow
def test_nodes_have_the_sockets_and_widgets_of_the_server(path, known):
    for node in read(path)[1]:
        assert node["type"] in known
        specs = inputs_of(known[node["type"]])
        kinds = {name: kind for name, kind, _ in specs}
        for socket in node["inputs"]:
            assert kinds[socket["name"]] == socket["type"], node["type"]
        sockets = [name for name, kind, _ in specs if kind not in {*WIDGETS, CHOICE}]
        assert [socket["name"] for socket in node["inputs"] if "widget" not in socket] == sockets, node["type"]
        outputs = known[node["type"]]
        named = [(slot["name"], slot["type"]) for slot in node["outputs"]]
        served = list(zip(outputs["output_name"], outputs["output"], strict=True))
        # Core nodes may gain outputs, as SaveImage did after 0.16.3; ours are in the file as they are.
        assert named == (served if node["type"].startswith("LCMKit") else served[: len(named)]), node["type"]


@every_workflow
def test_widget_values_are_in_range(path, known):
    for node in read(path)[1]:
        values = iter(node["widgets_values"])
        for name, kind, options, value in chosen(known[node["type"]], values):
            if kind in ("INT", "FLOAT"):
                assert isinstance(value, int | float), (node["type"], name)
                assert options["min"] <= value <= options["max"], (node["type"], name)
            elif kind in WIDGETS:
                assert isinstance(value, bool if kind == "BOOLEAN" else str), (node["type"], name)
            if name.endswith(", after a run"):
                assert value in options["options"], (node["type"], name)
        assert list(values) == [], f"{node['type']} has more values than widgets"


@every_workflow
def test_links_are_consistent(path):
    workflow, _ = read(path)
    nodes = {node["id"]: node for node in workflow["nodes"]}
    assert len(nodes) == len(workflow["nodes"])
    assert workflow["last_node_id"] == max(nodes)
    assert workflow["last_link_id"] == max(link[0] for link in workflow["links"])
    into, out_of = set(), set()
    for link, source, output, target, index, kind in workflow["links"]:
        assert link in nodes[source]["outputs"][output]["links"]
        assert nodes[source]["outputs"][output]["type"] == kind
        assert nodes[target]["inputs"][index]["link"] == link
        assert nodes[target]["inputs"][index]["type"] == kind
        into.add((target, index))
        out_of |= {(source, output, link)}
    linked = {(n, i) for n in nodes for i, slot in enumerate(nodes[n]["inputs"]) if slot["link"] is not None}
    given = {(n, i, link) for n in nodes for i, slot in enumerate(nodes[n]["outputs"]) for link in slot["links"]}
    assert (into, out_of) == (linked, given)


@every_workflow
def test_every_node_names_its_pack(path):
    for node in read(path)[1]:
        expected = ("lcm-kit", VERSION) if node["type"].startswith("LCMKit") else ("comfy-core", "0.30.0")
        assert (node["properties"]["cnr_id"], node["properties"]["ver"]) == expected, node["type"]


@every_workflow
def test_nodes_do_not_overlap(path):
    title = 30  # pixels above pos
    boxes = [(*node["pos"], *node["size"], node["type"]) for node in read(path)[0]["nodes"]]
    for i, (x, y, width, height, name) in enumerate(boxes):
        for left, top, wide, high, other in boxes[:i]:
            apart = x >= left + wide or left >= x + width or y - title >= top + high or top - title >= y + height
            assert apart, f"{name} lies over {other}"


@every_example
def test_files_to_download_are_linked(path):
    """As the page's missing-models dialog wants it: name, folder, and a direct link to a safetensors file."""
    _, nodes = read(path)
    linked = {m["name"]: m for node in nodes for m in node["properties"].get("models", [])}
    for model in linked.values():
        assert model["url"].startswith("https://huggingface.co/")
        assert model["url"].endswith(".safetensors")
        assert model["directory"] in ("checkpoints", "loras")
    chosen = {value for node in nodes for value in node["widgets_values"] if str(value).endswith(".safetensors")}
    assert chosen - {"my-style-lora.safetensors"} == set(linked)


@every_example
def test_example_is_in_the_template_browser_with_its_picture(path, server):
    assert path.stem in json.loads(server.request("/workflow_templates"))[PACK]
    template = f"/api/workflow_templates/{PACK}/{path.stem}"
    assert json.loads(server.request(f"{template}.json")) == json.loads(path.read_text(encoding="utf-8"))
    try:
        picture = Image.open(io.BytesIO(server.request(f"{template}.jpg")))
    except HTTPError as error:
        error.close()
        pytest.fail(f"example_workflows/{path.stem}.jpg is missing: `python demo/run.py --update-readme` makes it")
    assert picture.format == "JPEG"
    assert min(picture.size) >= 256
