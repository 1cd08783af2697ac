"""A node's report in ComfyUI's real page: it stays where it was shown, and goes into no prompt and no saved workflow."""

import json
import re

import pytest

from lcm_kit.demo.graphs import TINY, Graph, load, merge
from lcm_kit.tests.with_comfyui.web_page import becomes, open_graph, opened_page, report_on, run_in_page

REPORTING = ("LCMKitLoadLoRA", "LCMKitMergeLoRA", "LCMKitApplyLoRA", "LCMKitCompareLoRA")


def graph_of_reports():
    graph = Graph()
    loaded = load(graph, TINY)
    merged = merge(graph, TINY, 0.8, 1.0)
    applied = graph.add(
        "LCMKitApplyLoRA", model=loaded.model, clip=loaded.clip, lora=merged, strength_model=1.0, strength_clip=1.0
    )
    graph.add("PreviewAny", source=[applied, 2])
    loras = {f"lora_{n}": graph[merged[0]]["inputs"][f"lora_{n}"] for n in (1, 2)}
    compared = graph.add("LCMKitCompareLoRA", rank=0, **loras, **{f"strength_{n}": 1.0 for n in range(1, 5)})
    graph.add("PreviewAny", source=[compared, 1])
    return graph


def reports(page):
    return {type_: report_on(page, type_) for type_ in REPORTING}


@pytest.fixture
def told(page, server):
    """The reports after a run in which nothing was cached."""
    open_graph(page, graph_of_reports(), "reports")
    assert run_afresh(page, server)["status"]["status_str"] == "success"
    found = reports(page)
    assert found["LCMKitLoadLoRA"].startswith("tiny_emoji_")
    assert found["LCMKitMergeLoRA"].startswith("Merged 2 LoRAs")
    assert "modules applied at strength 1" in found["LCMKitApplyLoRA"].splitlines()[0]
    return found


def run_afresh(page, server):
    """Runs the open graph with nothing cached: an old host sends nothing of a cached node that is no output node."""
    for _ in range(10):
        body = json.dumps({"unload_models": True, "free_memory": True}).encode()
        server.request("/free", body, {"Content-Type": "application/json"})
        history = run_in_page(page)
        if not cached(history):  # else the run began before the server emptied its cache
            break
    return history


def cached(history):
    """Numbers of the nodes that did not run."""
    return [
        node for kind, data in history["status"]["messages"] if kind == "execution_cached" for node in data["nodes"]
    ]


def change_tabs(page, type_):
    """To an empty workflow and back to this one, which has a node of that type."""
    page.evaluate("() => app.extensionManager.command.execute('Comfy.NewBlankWorkflow')")
    page.wait_for_function("() => app.graph.nodes.length === 0")
    page.evaluate("() => app.extensionManager.command.execute('Workspace.PreviousOpenedWorkflow')")
    page.wait_for_function("type => app.graph.nodes.some(n => n.type === type)", arg=type_)


def saved(page):
    """The open graph as the page writes it into a file."""
    return page.evaluate("() => JSON.parse(JSON.stringify(app.graph.serialize()))")


def ours(page):
    """(widgets_values as the page saves them, the inputs as it sends them) of our nodes in the open graph."""
    saved_nodes = [node for node in saved(page)["nodes"] if node["type"].startswith("LCMKit")]
    sent = page.evaluate("() => app.graphToPrompt().then(both => both.output)")
    inputs = {id_: node["inputs"] for id_, node in sent.items() if node["class_type"].startswith("LCMKit")}
    return [(node["type"], node.get("widgets_values")) for node in saved_nodes], inputs


def test_a_report_is_in_no_saved_workflow_and_in_no_prompt(page, server):
    open_graph(page, graph_of_reports(), "before")
    before = ours(page)
    run_afresh(page, server)
    assert None not in reports(page).values()
    assert ours(page) == before


def test_reports_are_there_after_a_second_run_that_is_cached(page, told):
    assert len(cached(run_in_page(page))) > 3
    assert reports(page) == told


def test_reports_are_there_after_a_change_of_tabs(page, told):
    change_tabs(page, "LCMKitMergeLoRA")
    assert becomes(page, told, lambda: reports(page)) == told
    run_in_page(page)
    assert reports(page) == told


def test_reports_in_a_subgraph(page, server):
    """After a run, and after a change of tabs; pages name such a node in two ways."""
    version = page.evaluate("() => window.__COMFYUI_FRONTEND_VERSION__").split(".")
    if tuple(map(int, version[:2])) < (1, 39):
        pytest.skip("older pages than that of ComfyUI 0.16.3 lost one of these three")
    open_graph(page, graph_of_reports(), "subgraph")
    page.evaluate(
        "() => app.graph.convertToSubgraph(new Set(app.graph.nodes.filter(n => /LoadLoRA|MergeLoRA/.test(n.type))))"
    )
    inside = """() => [...(app.rootGraph ?? app.graph).subgraphs.values()].flatMap(graph => graph.nodes)
        .map(n => n.widgets?.find(w => w.name === "lcm_kit_report")?.element.value ?? null)"""
    run_afresh(page, server)
    told = page.evaluate(inside)
    assert len(told) == 3
    assert all(told)
    change_tabs(page, "LCMKitCompareLoRA")
    assert becomes(page, told, lambda: page.evaluate(inside)) == told


def test_reports_are_kept_with_a_workflow_and_come_again_in_a_page_that_was_loaded_anew(browser, server, page, told):
    """Of one without them with the next run, which is cached: on all nodes where the host can do it, on output nodes with any."""
    new = opened_page(browser, server)
    kept = saved(page)
    new.evaluate("graph => app.loadGraphData(graph)", kept)
    new.wait_for_function("() => app.graph.nodes.some(n => n.type === 'LCMKitMergeLoRA')")
    assert becomes(new, told, lambda: reports(new)) == told
    for node in kept["nodes"]:
        node["properties"].pop("lcm_kit_report", None)
    new.evaluate("graph => app.loadGraphData(graph)", kept)
    new.wait_for_function("() => app.graph.nodes.some(n => n.type === 'LCMKitMergeLoRA')")
    assert reports(new) == dict.fromkeys(REPORTING)
    run_in_page(new)
    node = json.loads(server.request("/object_info/LCMKitLoadLoRA"))["LCMKitLoadLoRA"]
    found = reports(new)
    new.close()
    if "has_intermediate_output" in node:
        assert node["has_intermediate_output"]
        assert found == told
    assert found["LCMKitCompareLoRA"] == told["LCMKitCompareLoRA"]


BOXES = """() => app.graph.nodes.flatMap(n => n.widgets ?? []).filter(w => w.name === "lcm_kit_report").map(w => ({
    readOnly: w.element.readOnly, text: w.element.value,
    fits: w.element.scrollHeight <= w.element.clientHeight + 2, height: w.element.clientHeight,
}))"""


def test_a_report_is_as_large_as_its_text_and_read_only(page, told):
    def too_small():
        return [box for box in page.evaluate(BOXES) if not box["fits"] and box["height"] < 250]

    assert becomes(page, [], too_small) == []
    boxes = page.evaluate(BOXES)
    assert len(boxes) == len(REPORTING) + 1  # Load LoRA twice
    assert all(box["readOnly"] for box in boxes)


def test_reports_in_nodes_2_0_stay_and_are_seen_whole(browser, server):
    new = opened_page(browser, server, **{"Comfy.VueNodes.Enabled": True})
    open_graph(new, graph_of_reports(), "nodes 2.0")
    run_afresh(new, server)
    told = reports(new)
    assert None not in told.values()
    change_tabs(new, "LCMKitMergeLoRA")
    assert becomes(new, told, lambda: reports(new)) == told
    whole = "box => box.getBoundingClientRect().height > 20 && box.scrollHeight <= box.clientHeight + 2"
    for type_ in ("Merge LoRAs", "Apply LoRA"):
        box = new.get_by_label(re.compile(f"^{type_}.*: report$"))
        assert becomes(new, True, lambda box=box: box.evaluate(whole))
    assert new.evaluate(
        "() => app.graph.nodes.filter(n => /^LCMKit/.test(n.type)).every(n => n.properties.lcm_kit_report)"
    )
    new.evaluate("() => app.graph.clear()")
    new.close()
