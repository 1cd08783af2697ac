"""The workflows that users open are sound: every node, socket and widget in them is what the server knows."""

import io
import json
import os
from pathlib import Path
from urllib.error import HTTPError
from urllib.parse import quote

import pytest
import tomllib
from PIL import Image

from lcm_kit.demo.graphs import TINY
from lcm_kit.tests.helpers import ROOT
from lcm_kit.tests.with_comfyui.comfy_server import PACK, pack_server
from lcm_kit.tools.flows import packs, writing
from lcm_kit.tools.flows.descriptions import FLOWS
from lcm_kit.tools.flows.files import LCM_SD15, SD15, STYLE, ModelFile

EXAMPLES = sorted((ROOT / "example_workflows").glob("*.json"))
WORKFLOWS = [ROOT / "demo" / "workflow.json", *EXAMPLES]
VERSION = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["version"]
NOTES = {"MarkdownNote", "Note"}  # known to the page only
WIDGETS = {"INT", "FLOAT", "STRING", "BOOLEAN", "COMBO"}
NOT_THERE = {"value_not_in_list", "custom_validation_failed"}
DYNAMIC = "COMFY_DYNAMICCOMBO_V3"
# What the page downloads from.
SITES = ("https://huggingface.co/", "https://civitai.com/")
FOLDERS = {"animatediff_models", "checkpoints", "controlnet", "diffusion_models", "loras", "text_encoders", "vae"}

COMFYUI = "0.30.0"  # whose definitions the files are written with


def on_sd15(flow):
    files = {value for node in flow.nodes for value in node.inputs.values() if isinstance(value, ModelFile)}
    return files <= {SD15, LCM_SD15, STYLE}


def foreign(flow):
    """Types of its nodes that other packs have."""
    return {node.type for node in flow.nodes} & packs.nodes().keys()


every_workflow = pytest.mark.parametrize("path", WORKFLOWS, ids=lambda path: path.stem)
every_example = pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.stem)


@pytest.fixture(scope="module")
def known(server):
    """Node id -> its entry in /object_info; of other packs' as it was recorded."""
    return json.loads(server.request("/object_info")) | packs.nodes()


def read(path):
    """(workflow, its nodes but the notes)."""
    workflow = json.loads(path.read_text(encoding="utf-8"))
    return workflow, [node for node in workflow["nodes"] if node["type"] not in NOTES]


def inputs_of(info):
    """[(name, type, options)], in the order of the page; of a list of choices that bring inputs along only itself."""
    return [
        (name, "COMBO" if isinstance(kind, list) or kind == DYNAMIC else kind, {"group": group, "kind": kind} | options)
        for group in ("required", "optional")
        for name, spec in info["input"].get(group, {}).items()
        for kind, options, *_ in [(*spec, {})]
    ]


def widgets_of(info, values):
    """[(name, type, options, value)], in the order of the page. Takes as many values as there are widgets, not more."""
    found = []
    for name, kind, options in inputs_of(info):
        if kind not in WIDGETS:
            continue
        if not values and options["group"] == "optional" and not info["name"].startswith("LCMKit"):
            continue  # a core node's, of a newer version
        found.append((name, kind, options, values.pop(0)))
        if options["kind"] == DYNAMIC:
            (chosen,) = (choice for choice in options["options"] if choice["key"] == found[-1][3])
            found += widgets_of({"input": chosen["inputs"], "name": info["name"]}, values)
        if options.get("control_after_generate"):
            assert values.pop(0) in ("fixed", "increment", "decrement", "randomize"), (info["name"], name)
    return found


@every_workflow
def test_nodes_have_the_sockets_and_widgets_of_the_server(path, known):
    for node in read(path)[1]:
        assert node["type"] in known
        specs = inputs_of(known[node["type"]])
        kinds = {name: kind for name, kind, _ in specs}
        for socket in node["inputs"]:
            assert kinds[socket["name"]] == socket["type"], node["type"]
        sockets = [name for name, kind, _ in specs if kind not in WIDGETS]
        assert [socket["name"] for socket in node["inputs"] if "widget" not in socket] == sockets, node["type"]
        outputs = known[node["type"]]
        named = [(slot["name"], slot["type"]) for slot in node["outputs"]]
        served = list(zip(outputs["output_name"], outputs["output"], strict=True))
        # Core nodes may gain outputs, as SaveImage did after 0.16.3; ours are in the file as they are.
        assert named == (served if node["type"].startswith("LCMKit") else served[: len(named)]), node["type"]


@every_workflow
def test_widget_values_are_in_range(path, known):
    for node in read(path)[1]:
        values = list(node["widgets_values"])
        for name, kind, options, value in widgets_of(known[node["type"]], values):
            if kind in ("INT", "FLOAT"):
                assert isinstance(value, int | float), (node["type"], name)
                assert options["min"] <= value <= options["max"], (node["type"], name)
            else:
                assert isinstance(value, bool if kind == "BOOLEAN" else str), (node["type"], name)
        assert values == [], f"{node['type']} has more values than widgets"


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
        own, others = node["type"].startswith("LCMKit"), packs.homes()
        expected = ("lcm-kit", VERSION) if own else others.get(node["type"], ("comfy-core", COMFYUI))
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
    """As the page's missing-models dialog wants it: name, folder, and a direct link."""
    _, nodes = read(path)
    linked = {m["name"]: m for node in nodes for m in node["properties"].get("models", [])}
    for name, model in linked.items():
        assert model["url"].startswith(SITES)
        assert "/resolve/main/" in model["url"] or "/api/download/models/" in model["url"]
        assert name.endswith(".safetensors")
        assert model["directory"] in FOLDERS
    chosen = {value for node in nodes for value in node["widgets_values"] if str(value).endswith(".safetensors")}
    assert chosen == set(linked)


def test_a_file_of_one_name_has_one_address():
    models = [m for path in EXAMPLES for node in read(path)[1] for m in node["properties"].get("models", [])]
    places = {(model["name"], model["url"], model["directory"]) for model in models}
    assert len(places) == len({name for name, _, _ in places})


@every_example
def test_the_note_stands_at_the_top_left_and_the_view_is_the_pages_own(path):
    workflow, nodes = read(path)
    (note,) = (node for node in workflow["nodes"] if node["type"] in NOTES)
    assert note["title"] == path.stem
    assert note["pos"] == [0, 0]
    corners = [node["pos"] for node in nodes] + [group["bounding"][:2] for group in workflow["groups"]]
    assert all(x >= 0 and y >= 0 for x, y in corners)
    assert "ds" not in workflow["extra"]


def test_workflows_are_numbered_from_1():
    numbers = [int(flow.name.split()[0]) for flow in FLOWS]
    assert numbers == list(range(1, len(FLOWS) + 1))


def test_the_files_are_what_the_descriptions_say(server):
    """If this fails: make workflows."""
    version = json.loads(server.request("/system_stats"))["system"]["comfyui_version"]
    if version != COMFYUI:
        pytest.skip(f"the files are written with the node definitions of ComfyUI {COMFYUI}, this is {version}")
    assert writing.texts(server) == {path: path.read_text(encoding="utf-8") for path in WORKFLOWS}


@every_example
def test_example_is_in_the_template_browser(path, server):
    assert path.stem in json.loads(server.request("/workflow_templates"))[PACK]
    template = f"/api/workflow_templates/{PACK}/{quote(path.stem)}"
    assert json.loads(server.request(f"{template}.json")) == json.loads(path.read_text(encoding="utf-8"))


@every_example
def test_example_has_a_picture(path, server):
    """If it is missing: make workflows, or python demo/run.py --update-readme for those that the demo draws."""
    picture = Image.open(io.BytesIO(server.request(f"/api/workflow_templates/{PACK}/{quote(path.stem)}.jpg")))
    assert picture.format == "JPEG"
    assert min(picture.size) >= 256


@pytest.mark.parametrize("flow", [flow for flow in FLOWS if foreign(flow)], ids=lambda flow: flow.name)
def test_a_workflow_with_nodes_of_other_packs_says_so_and_lacks_them_alone(flow, known, server):
    (name,) = {packs.homes()[type][0] for type in foreign(flow)}
    words = name.removeprefix("comfyui-").replace("-", " ")
    assert words in flow.note.lower()
    assert "Install Missing Custom Nodes" in flow.note
    body = json.dumps({"prompt": writing.prompt(flow, known)}).encode()
    with pytest.raises(HTTPError) as refused:
        server.request("/prompt", body, {"Content-Type": "application/json"})
    with refused.value as answer:
        assert foreign(flow) == {json.loads(answer.read())["error"]["extra_info"]["class_type"]}


def test_other_packs_nodes_are_what_these_packs_say(tmp_path):
    """With OTHER_PACKS=/folder/of/packs, as `make workflows PACKS=...` takes it."""
    folder = os.environ.get("OTHER_PACKS")
    if not folder:
        pytest.skip("no other packs here: OTHER_PACKS names their folder")
    there = {name: Path(folder) / name for name in packs.recorded()}
    with pack_server(tmp_path, there) as server:
        known = json.loads(server.request("/object_info"))
    for id, entry in packs.nodes().items():
        now = known[id] | {"input": {group: known[id]["input"].get(group, {}) for group in entry["input"]}}
        assert {key: now[key] for key in entry} == entry


@pytest.mark.parametrize("flow", [flow for flow in FLOWS if not foreign(flow)], ids=lambda flow: flow.name)
def test_the_server_asks_for_nothing_but_the_files_to_download(flow, known, server):
    """Every link fits, every value is in range, nothing is missing: what the server refuses is the models alone."""
    (server.input / "example.png").unlink(missing_ok=True)
    graph = writing.prompt(flow, known)
    body = json.dumps({"prompt": graph}).encode()
    with pytest.raises(HTTPError) as refused:
        server.request("/prompt", body, {"Content-Type": "application/json"})
    with refused.value as answer:
        errors = json.loads(answer.read())["node_errors"]
    asked = {(id, error["extra_info"]["input_name"]) for id, node in errors.items() for error in node["errors"]}
    files = {
        (str(node.id), name)
        for node in flow.nodes
        for name, value in node.inputs.items()
        if (isinstance(value, ModelFile) or value == "example.png") and not node.bypassed
    }
    assert asked == files
    assert {error["type"] for node in errors.values() for error in node["errors"]} <= NOT_THERE


def with_the_embedded_model(graph):
    """A workflow on SD 1.5 in API format, small enough for the embedded model, which has its VAE in a file of its own."""
    made = json.loads(json.dumps(graph))
    made["vae"] = {"class_type": "VAELoader", "inputs": {"vae_name": TINY.vae}}
    bases = {id for id, node in made.items() if node["class_type"] == "CheckpointLoaderSimple"}
    names = {"ckpt_name": {SD15: TINY.checkpoint}, "lora_name": {LCM_SD15: TINY.lcm, STYLE: TINY.style}}
    for node in made.values():
        for name, value in node["inputs"].items():
            if isinstance(value, list) and value[0] in bases and value[1] == 2:
                node["inputs"][name] = ["vae", 0]
            elif name in names:
                node["inputs"][name] = names[name][value]
            elif name in ("width", "height", "x", "y") and value:
                node["inputs"][name] = max(8, value // 64 * 8)
            elif node["class_type"] == "LCMKitDistill" and name in ("steps", "samples", "batch"):
                node["inputs"][name] = 2
    return made


@pytest.mark.parametrize("flow", [flow for flow in FLOWS if on_sd15(flow)], ids=lambda flow: flow.name)
def test_workflow_on_sd15_runs_as_described_on_the_embedded_model(flow, known, client, server):
    Image.new("RGB", (96, 80), (200, 90, 90)).save(server.input / "example.png")
    graph = with_the_embedded_model(writing.prompt(flow, known))
    outputs = client.run(graph, timeout=300)
    savers = {id for id, node in graph.items() if node["class_type"] in ("SaveImage", "PreviewImage")}
    assert savers
    assert savers <= set(outputs)
    for file in client.images({id: outputs[id] for id in savers}):
        assert max(high - low for low, high in Image.open(io.BytesIO(file)).convert("RGB").getextrema()) > 20
