"""A language that is chosen in the page's settings."""

import json

from lcm_kit.tests.helpers import ROOT
from lcm_kit.tests.with_comfyui.web_page import open_graph_in, opened_page
from lcm_kit.tools.locales import table_of

HELP = ROOT / "web" / "docs" / "LCMKitKSampler"
NODES = {
    "LCMKitKSampler": "LCM KSampler",
    "LCMKitMergeLoRA": "Merge LoRAs (add, TIES, DARE)",
    "LCMKitCompareLoRA": "Compare LoRAs",
}


def test_the_page_shows_a_chosen_language(browser, server):
    table = table_of("fr")
    page = opened_page(browser, server, **{"Comfy.Locale": "fr"})
    try:
        graph = {str(n): {"class_type": name, "inputs": {}} for n, name in enumerate(NODES)}
        open_graph_in(page, graph, [table[title] for title in NODES.values()])
        label, name = page.evaluate(
            "() => { const steps = app.graph.nodes[0].widgets.find(w => w.name === 'steps'); return [steps.label, steps.name] }"
        )
        strengths = page.evaluate(
            "() => app.graph.nodes.slice(1).flatMap(n => n.widgets).filter(w => w.name === 'strength_1').map(w => w.label)"
        )
        help_page = page.evaluate(
            "() => fetch('/extensions/lcm-kit/docs/LCMKitKSampler/fr.md').then(answer => answer.text())"
        )
    finally:
        server.request("/settings", json.dumps({"Comfy.Locale": "en"}).encode(), {"Content-Type": "application/json"})
        page.close()
    assert label == table["steps"]
    assert strengths == [table["strength_1"]] * 2
    assert name == "steps"  # what a workflow keeps is the same in every language
    assert help_page == (HELP / "fr.md").read_text(encoding="utf-8")
