"""The help page of the presets in ComfyUI's real page, in the panel beside the graph, as wide as that comes."""

from lcm_kit.tests.with_comfyui.web_page import becomes, open_graph, open_help

TABLES = """() => [...document.querySelectorAll(".node-help-content table")].map(
    table => [table.querySelector("th").textContent, table.scrollWidth - table.clientWidth])"""


def test_no_table_of_the_presets_is_cut_off(page):
    open_graph(page, {"1": {"class_type": "LCMKitPreset", "inputs": {}}}, "help")
    open_help(page, "LCMKitPreset")
    titles = ["input", "in the tables", "preset", "preset"]
    assert becomes(page, titles, lambda: [title for title, _ in page.evaluate(TABLES)]) == titles
    assert max(hidden for _, hidden in page.evaluate(TABLES)) <= 1
