"""Merge LoRAs in ComfyUI's real page: its choices and their numbers, and LoRAs that are switched off."""

import pytest

from lcm_kit.demo.graphs import TINY, Graph
from lcm_kit.tests.with_comfyui.web_page import open_graph, opened_page, report_on, run_in_page

BYPASSED = 4  # mode of a node, as Ctrl+B sets it
CHOSEN = {"method": "ties", "method.density": 0.4, "size": "retain", "size.retain": 0.8}


def graph_of_three(**chosen):
    graph = Graph()
    names = (TINY.style, TINY.lcm, TINY.style)
    links = {f"lora_{n}": [graph.add("LCMKitLoadLoRA", lora_name=name), 0] for n, name in enumerate(names, start=1)}
    strengths = dict(zip([f"strength_{n}" for n in range(1, 5)], (0.8, 1.0, -0.3, 0.5), strict=True))
    merged = graph.add("LCMKitMergeLoRA", **links, **strengths, **(chosen or {"method": "linear", "size": "exact"}))
    graph.add("PreviewAny", source=[merged, 1])
    return graph


def sent(page):
    """What the page sends for Merge LoRAs."""
    nodes = page.evaluate("() => app.graphToPrompt().then(both => Object.values(both.output))")
    return next(node["inputs"] for node in nodes if node["class_type"] == "LCMKitMergeLoRA")


def test_the_widgets_stand_in_the_order_of_the_node_with_the_numbers_of_what_is_chosen(page):
    open_graph(page, graph_of_three(**CHOSEN), "chosen")
    widgets = page.evaluate("() => app.graph.nodes.find(n => n.type === 'LCMKitMergeLoRA').widgets.map(w => w.name)")
    ours = [name for name in widgets if not name.startswith("lcm_kit_")]
    method = ["method", "method.density", "method.dense"]
    rest = ["size", "size.retain", "balanced", "protect", "mu", "block_strengths"]
    assert ours == [*(f"strength_{n}" for n in range(1, 5)), *method, *rest]


def test_what_is_chosen_is_sent_the_same_after_the_workflow_was_saved_and_loaded(browser, server, page):
    graph = graph_of_three(**CHOSEN)
    open_graph(page, graph, "chosen")
    merge = next(node["inputs"] for node in graph.values() if node["class_type"] == "LCMKitMergeLoRA")
    before = sent(page)
    assert {name: before[name] for name in merge} == merge
    workflow = page.evaluate("() => JSON.parse(JSON.stringify(app.graph.serialize()))")
    new = opened_page(browser, server)
    new.evaluate("graph => app.loadGraphData(graph)", workflow)
    new.wait_for_function("() => app.graph.nodes.some(n => n.type === 'LCMKitMergeLoRA')")
    after = sent(new)
    assert run_in_page(new)["status"]["status_str"] == "success"
    assert "method ties (density 0.4)" in report_on(new, "LCMKitMergeLoRA")
    new.close()
    assert after == before


@pytest.mark.parametrize("off", [[1], [2], [1, 3]], ids=str)
def test_a_lora_that_is_switched_off_leaves_a_merge_of_the_rest(page, off):
    """Each of the rest with its own strength."""
    open_graph(page, graph_of_three(), "off")
    page.evaluate(
        """([off, mode]) => {
            const merge = app.graph.nodes.find(n => n.type === 'LCMKitMergeLoRA');
            for (const n of off) merge.getInputNode(merge.findInputSlot(`lora_${n}`)).mode = mode;
        }""",
        [off, BYPASSED],
    )
    assert run_in_page(page)["status"]["status_str"] == "success"
    told = report_on(page, "LCMKitMergeLoRA")
    strengths = {1: (TINY.style, 0.8), 2: (TINY.lcm, 1.0), 3: (TINY.style, -0.3)}
    for number, (name, strength) in strengths.items():
        assert (f"{name} * {strength:g}: " in told) == (number not in off)
    assert told.startswith("Merged 2 LoRAs" if len(off) == 1 else "Made from one LoRA")
