"""The help pages in ComfyUI's real page, in the panel beside the graph as wide as that comes: nothing is cut off."""

import json

import pytest

from lcm_kit.tests.helpers import ROOT
from lcm_kit.tests.with_comfyui.web_page import open_graph_in, open_help, opened_page
from lcm_kit.tools.locales import file_of

HELP = ROOT / "web" / "docs"
NODES = sorted(path.stem for path in HELP.glob("*.md"))
TRANSLATED = sorted((path.parent.name, path.stem) for path in HELP.glob("*/*.md"))

# Width of the panel's text, and what is wider than its place: [element, its first words, pixels that nobody sees].
WIDE = """() => {
    const help = [...document.querySelectorAll(".node-help-content")].find(one => one.offsetParent);
    const all = [help, ...help.querySelectorAll("*")].filter(one => one.clientWidth > 0);
    return [help.clientWidth, all.filter(one => one.scrollWidth > one.clientWidth + 1)
        .map(one => [one.tagName, one.textContent.trim().slice(0, 40), one.scrollWidth - one.clientWidth])];
}"""
TITLE = (
    "() => [...document.querySelectorAll('.node-help-content h1')].find(one => one.offsetParent)?.textContent.trim()"
)


@pytest.fixture(scope="module", params=["en", "ru"])  # of the translations the one with the longest words
def helped(request, browser, server):
    """(language, page) with a node of each kind, the help panel open."""
    page = opened_page(browser, server, **{"Comfy.Locale": request.param})
    graph = {str(i): {"class_type": node, "inputs": {}} for i, node in enumerate(NODES, start=1)}
    if request.param == "en":
        told = page.evaluate("() => fetch('/object_info').then(answer => answer.json())")
    else:
        told = json.loads(file_of(request.param).read_text(encoding="utf-8"))
    open_graph_in(page, graph, [told[node]["display_name"] for node in NODES])
    open_help(page, NODES[0])
    yield request.param, page
    page.close()
    server.request("/settings", json.dumps({"Comfy.Locale": "en"}).encode(), {"Content-Type": "application/json"})


def test_nothing_on_a_help_page_is_cut_off(helped):
    language, page = helped
    pages = NODES if language == "en" else [node for node, translated in TRANSLATED if translated == language]
    assert pages
    wide = {}
    for node in pages:
        file = HELP / f"{node}.md" if language == "en" else HELP / node / f"{language}.md"
        page.evaluate(
            "type => { app.canvas.deselectAll(); app.canvas.selectNode(app.graph.nodes.find(n => n.type === type)); }",
            node,
        )
        title = file.read_text(encoding="utf-8").splitlines()[0].removeprefix("# ")
        page.wait_for_function(f"title => ({TITLE})() === title", arg=title, timeout=20_000)
        width, found = page.evaluate(WIDE)
        assert width > 200
        wide |= {node: found} if found else {}
    assert wide == {}
