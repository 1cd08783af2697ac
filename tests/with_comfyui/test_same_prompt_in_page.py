"""What people do with a graph in ComfyUI's real page leaves its prompt: copies, subgraphs, files, pictures; and nodes are found by
the words that people know."""

import base64
import json
import re

import pytest

from lcm_kit.demo.graphs import TINY, Shot, style_in_few_steps
from lcm_kit.tests.with_comfyui.test_browser import tree_of_picture
from lcm_kit.tests.with_comfyui.web_page import becomes, open_graph, opened_page, run_in_page

# What people type -> the node that they mean.
WORDS = {
    "lcm": "LCMKitKSampler", "latent consistency": "LCMKitKSampler", "few steps": "LCMKitKSampler", "tcd": "LCMKitPreset",
    "dmd2": "LCMKitPreset", "hyper": "LCMKitPreset", "lightning": "LCMKitPreset", "turbo": "LCMKitPreset",
    "nag": "LCMKitNegativePrompt", "cfg 1": "LCMKitNegativePrompt", "negative prompt": "LCMKitNegativePrompt",
    "dare": "LCMKitMergeLoRA", "ties": "LCMKitMergeLoRA", "lora merge": "LCMKitMergeLoRA", "merge lora": "LCMKitMergeLoRA",
    "lora stack": "LCMKitLoRAMix", "xy plot": "LCMKitGrid", "grid": "LCMKitGrid",
    "dynamic thresholding": "LCMKitLimitDenoised", "model difference": "LCMKitExtractLoRA", "lora block": "LCMKitMergeLoRA",
    "lcm lora": "LCMKitLoader", "train lcm": "LCMKitDistill", "distill": "LCMKitDistill", "facedetailer": "LCMKitAnyKSampler",
    "resize lora": "LCMKitResizeLoRA", "save lora": "LCMKitSaveLoRA", "compare lora": "LCMKitCompareLoRA",
    "lora schedule": "LCMKitLoRAByStep", "edit": "LCMKitEdit",
}  # fmt: skip


def sent(page):
    return page.evaluate("() => app.graphToPrompt().then(both => JSON.parse(JSON.stringify(both.output)))")


@pytest.fixture
def opened(page):
    """The tree of the picture that the open graph makes."""
    open_graph(page, style_in_few_steps(TINY, Shot("cat face", seed=3, steps=4)), "same")
    page.evaluate(
        """() => app.graph.nodes.flatMap(n => n.widgets ?? [])
            .filter(w => w.name === "control_after_generate").forEach(w => { w.value = "fixed"; })"""
    )
    return tree_of_picture(sent(page))


def test_a_copy_of_the_nodes_is_the_same(page, opened):
    """Two pictures then, of the same tree."""
    page.evaluate(
        "() => { app.canvas.selectItems(app.graph.nodes); app.canvas.copyToClipboard(); app.canvas.pasteFromClipboard(); }"
    )
    graph = sent(page)
    savers = [id_ for id_, node in graph.items() if node["class_type"] == "SaveImage"]
    assert len(savers) == 2
    for id_ in savers:
        assert tree_of_picture({k: v for k, v in graph.items() if k == id_ or k not in savers}) == opened


def test_our_nodes_in_a_subgraph_are_the_same(page, opened):
    page.evaluate("() => app.graph.convertToSubgraph(new Set(app.graph.nodes.filter(n => /^LCMKit/.test(n.type))))")
    assert tree_of_picture(sent(page)) == opened


def test_a_saved_workflow_and_a_picture_bring_the_graph_back(browser, server, page, opened):
    history = run_in_page(page)
    workflow = page.evaluate("() => JSON.parse(JSON.stringify(app.graph.serialize()))")
    (image,) = (image for output in history["outputs"].values() for image in output.get("images", []))
    picture = server.request(f"/view?filename={image['filename']}&subfolder={image['subfolder']}&type={image['type']}")
    new = opened_page(browser, server)
    new.evaluate("graph => app.loadGraphData(graph)", workflow)
    new.wait_for_function("count => app.graph.nodes.length === count", arg=len(workflow["nodes"]))
    assert tree_of_picture(sent(new)) == opened
    new.evaluate("() => app.graph.clear()")
    new.evaluate(
        """data => app.handleFile(new File([Uint8Array.from(atob(data), c => c.charCodeAt(0))], "made.png", {type: "image/png"}))""",
        base64.b64encode(picture).decode(),
    )
    new.wait_for_function("count => app.graph.nodes.length === count", arg=len(workflow["nodes"]))
    assert tree_of_picture(sent(new)) == opened
    new.close()


@pytest.mark.parametrize("type_", ["LCMKitApplyLoRA", "LCMKitKSampler", "LCMKitMergeLoRA"])
def test_a_bypassed_node_hands_on_what_it_got(page, opened, type_):
    """Without the LoRA the model and the text encoder go on; without the sampler the empty latent; of a merge lora_1."""
    page.evaluate("type => { app.graph.nodes.find(n => n.type === type).mode = 4; }", type_)
    graph = sent(page)
    types = [node["class_type"] for node in graph.values()]
    assert type_ not in types
    links = {value[0] for node in graph.values() for value in node["inputs"].values() if isinstance(value, list)}
    assert links <= graph.keys()
    taker, input_, expected = {
        "LCMKitApplyLoRA": ("LCMKitKSampler", "model", "CheckpointLoaderSimple"),
        "LCMKitKSampler": ("VAEDecode", "samples", "EmptyLatentImage"),
        "LCMKitMergeLoRA": ("LCMKitApplyLoRA", "lora", "LCMKitLoadLoRA"),
    }[type_]
    (source,) = (node["inputs"][input_][0] for node in graph.values() if node["class_type"] == taker)
    assert graph[source]["class_type"] == expected
    assert graph[source]["inputs"].get("lora_name", TINY.style) == TINY.style


@pytest.fixture(scope="module")
def search(browser, server):
    """Whether the page's own search finds a node by a text, and what it lists."""
    page = opened_page(browser, server)
    page.evaluate("() => app.extensionManager.command.execute('Workspace.SearchBox.Toggle')")
    field = page.locator("[role=dialog] input, .comfy-vue-node-search-container input").first
    field.wait_for(timeout=20_000)

    listed = page.locator("[role=dialog], .comfy-vue-node-search-container, [role=listbox]")

    def shown():
        return re.sub(r"\s+", " ", " ".join(listed.all_inner_texts()))

    def finds(text, name):
        """Whether it comes to list the name, which it does not list before."""
        field.fill("no node is called so")
        assert becomes(page, False, lambda: name in shown()) is False
        field.fill(text)
        return becomes(page, True, lambda: name in shown()), shown()

    yield finds
    page.close()


@pytest.mark.parametrize("words", WORDS)
def test_the_words_that_people_type_find_the_node(search, server, words):
    names = json.loads(server.request("/object_info"))
    name = names[WORDS[words]]["display_name"]
    found, shown = search(words, re.sub(r"\s+", " ", name))
    assert found, shown[:600]
