"""The LCM-LoRA Loader in ComfyUI's real web page: its report is on the node.

The screenshot goes to demo/output/loader.png.
"""

import json

from lcm_kit.demo.graphs import TINY, Shot, lcm_only
from lcm_kit.tests.with_comfyui.test_browser import SCREENSHOT, browser, page  # noqa: F401

LOADER = SCREENSHOT.with_name("loader.png")


def test_the_report_is_on_the_node_after_a_run(page):  # noqa: F811
    graph = json.dumps(lcm_only(TINY, Shot("cat face", seed=7, steps=4)))
    page.evaluate("text => app.loadApiJson(JSON.parse(text), 'loader')", graph)
    page.wait_for_function("() => app.graph.nodes.some(n => n.type === 'LCMKitLoader')")
    page.get_by_test_id("queue-button").click()
    report = page.wait_for_function(
        """() => {
            const node = app.graph.nodes.find(n => n.type === 'LCMKitLoader');
            const shown = node.widgets.find(w => w.name.includes('node-text-preview'))?.value;
            const finished = app.graph.nodes.find(n => n.type === 'SaveImage').imgs?.length;
            return finished && shown || app.lastExecutionError;
        }"""
    ).json_value()
    assert isinstance(report, str), report
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
            node.setSize([620, 420]);
            app.canvas.ds.scale = 1.6;
            app.canvas.ds.offset = [90, 70 - node.pos[1]];
            app.canvas.setDirty(true, true);
        }"""
    )
    page.wait_for_timeout(1500)  # the page fades its progress out
    # what a person sees, and not only what the node holds
    assert page.get_by_text("effective scale 1").first.is_visible()
    LOADER.parent.mkdir(exist_ok=True)
    page.screenshot(path=LOADER, clip={"x": 60, "y": 50, "width": 1160, "height": 740})
