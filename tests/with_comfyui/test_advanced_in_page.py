"""Advanced fields in ComfyUI's real page: folded away in the classic one, with a button, and sent and saved as ever."""

import json

import pytest

from lcm_kit.tests.with_comfyui.comfy_server import newest_page, pack_server
from lcm_kit.tests.with_comfyui.web_page import becomes, next_turn, open_graph, opened_page

KSAMPLER = "LCMKitKSampler"
# Newer pages hide the field of a linked input themselves, and keep its row with the socket.
OURS = """() => Object.fromEntries(app.graph.nodes.map(n => [n.type, {
    shown: n.widgets?.filter(w => n.isWidgetRowVisible ? n.isWidgetRowVisible(w) : !w.hidden).map(w => w.name) ?? [],
    all: n.widgets?.map(w => w.name) ?? [],
    height: n.size[1], needed: n.computeSize()[1], saved: n.serialize().widgets_values ?? []}]))"""
PRESS = """type => { const b = app.graph.nodes.find(n => n.type === type).widgets.find(w => w.name === "lcm_kit_more");
    b.callback(); return b.label; }"""
MORE = "lcm_kit_more"


@pytest.fixture(scope="module")
def advanced(server):
    """Node id -> names of its advanced inputs, if there are more than one: a button takes the room of a field."""
    known = json.loads(server.request("/object_info"))
    named = {
        id: {
            name
            for group in ("required", "optional")
            for name, (kind, *more) in entry["input"].get(group, {}).items()
            if more
            and more[0].get("advanced")
            and (isinstance(kind, list) or kind in ("INT", "FLOAT", "STRING", "BOOLEAN", "COMBO"))
        }
        for id, entry in known.items()
        if id.startswith("LCMKit")
    }
    return {id: names if len(names) > 1 else set() for id, names in named.items()}


def fresh(page, types):
    """A node of each type, as from the menu, in a graph of their own."""
    page.evaluate(
        """types => { app.graph.clear(); types.forEach((type, i) => {
            const node = LiteGraph.createNode(type); node.pos = [i * 500, 0]; app.graph.add(node); }); }""",
        types,
    )
    next_turn(page)


def sent(page):
    return page.evaluate("() => app.graphToPrompt().then(both => JSON.parse(JSON.stringify(both.output)))")


def check_a_page(page, advanced):
    """All that holds in the classic page, whatever its version."""
    types = sorted(advanced)
    fresh(page, types)
    folded, prompt = page.evaluate(OURS), sent(page)
    for type, names in advanced.items():
        node = folded[type]
        assert not names & {*node["shown"]}, type
        assert {*node["all"]} - {*node["shown"]} == names & {*node["all"]}, type
        assert (MORE in node["shown"]) == bool(names), type
        assert node["height"] == pytest.approx(node["needed"], abs=1), type
    for type in (type for type in types if advanced[type]):
        page.evaluate(PRESS, type)
    opened = page.evaluate(OURS)
    assert sent(page) == prompt
    for type, names in advanced.items():
        assert {*opened[type]["shown"]} == {*opened[type]["all"]}
        assert opened[type]["saved"] == folded[type]["saved"]
        assert opened[type]["height"] > folded[type]["height"] or not names
    workflow = page.evaluate("() => JSON.parse(JSON.stringify(app.graph.serialize()))")
    page.evaluate("graph => app.loadGraphData(graph)", workflow)
    whole = {*opened[KSAMPLER]["all"]}
    assert becomes(page, whole, lambda: {*page.evaluate(OURS).get(KSAMPLER, {"shown": ()})["shown"]}) == whole
    next_turn(page)
    for type in (type for type in types if advanced[type]):
        page.evaluate(PRESS, type)
    again = page.evaluate(OURS)
    assert {type: node["shown"] for type, node in again.items()} == {
        type: node["shown"] for type, node in folded.items()
    }
    assert {type: node["saved"] for type, node in again.items()} == {
        type: node["saved"] for type, node in folded.items()
    }
    assert again[KSAMPLER]["height"] == pytest.approx(folded[KSAMPLER]["height"], abs=1)
    assert sent(page) == prompt
    page.keyboard.press("Escape")


def test_advanced_fields_are_folded_in_the_classic_page(page, advanced):
    assert {"gamma", "boundary", "gammas"} <= advanced[KSAMPLER]
    check_a_page(page, advanced)


@pytest.mark.slow
def test_advanced_fields_are_folded_in_the_newest_page(browser, tmp_path, advanced):
    if not newest_page():
        pytest.skip("no newer page: `make setup` fetches one")
    with pack_server(tmp_path, arguments=newest_page()) as server:
        page = opened_page(browser, server)
        check_a_page(page, advanced)
        page.close()


def test_a_field_that_is_linked_or_differs_stays_in_sight(page, advanced):
    graph = {
        "1": {"class_type": KSAMPLER, "inputs": {"gamma": 0.3, "original_steps": ["3", 0]}},
        "2": {"class_type": "LCMKitNegativePrompt", "inputs": {"tau": 3.0}},
        "3": {"class_type": "PrimitiveInt", "inputs": {"value": 100}},
    }
    open_graph(page, graph, "kept")
    next_turn(page)
    page.keyboard.press("Shift")  # whatever is linked by hand ends with a click or a key

    def in_sight():
        shown = page.evaluate(OURS)
        return [sorted(advanced[type] & {*shown[type]["shown"]}) for type in (KSAMPLER, "LCMKitNegativePrompt")]

    expected = [["gamma", "original_steps"], ["tau"]]
    assert becomes(page, expected, in_sight) == expected
    page.evaluate(
        f"() => {{ const n = app.graph.nodes.find(n => n.type === '{KSAMPLER}'); n.disconnectInput(n.findInputSlot('original_steps')); }}"
    )
    expected = [["gamma"], ["tau"]]
    assert becomes(page, expected, in_sight) == expected
    assert MORE in page.evaluate(OURS)[KSAMPLER]["shown"]


def test_nodes_2_folds_them_itself(browser, server, advanced):
    page = opened_page(browser, server, **{"Comfy.VueNodes.Enabled": True})
    fresh(page, [KSAMPLER])
    node = page.evaluate(OURS)[KSAMPLER]
    assert node["shown"] == node["all"]
    assert MORE not in node["all"]
    page.close()
    server.request(
        "/settings", json.dumps({"Comfy.VueNodes.Enabled": False}).encode(), {"Content-Type": "application/json"}
    )
