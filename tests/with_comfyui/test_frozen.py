"""Workflows that people have saved open for ever: nodes keep what these depend on, and what was saved is sent as it was.

tests/frozen holds the nodes of the first release, and workflows as its page saved them; tools/frozen.py wrote it.
"""

import json
from urllib.error import HTTPError

import pytest

from lcm_kit.tests.helpers import ROOT
from lcm_kit.tools import frozen
from lcm_kit.tools.flows import packs
from lcm_kit.tools.scenes import NOT_RUN, SCENES, scene_of

KEPT = json.loads(frozen.NODES.read_text(encoding="utf-8"))
FILES = sorted((frozen.FROZEN / "workflows").glob("*.json"))
OF_A_NODE = [path for path in FILES if path.stem in SCENES]
# What a node may gain later without a word in old workflows.
FREE = ("min", "max", "step", "options", "replaces")


@pytest.fixture(scope="module")
def nodes(server):
    return frozen.contract(json.loads(server.request("/object_info")))


@pytest.mark.parametrize("node", sorted(KEPT["nodes"]))
def test_a_node_still_takes_and_gives_what_it_did(nodes, node):
    """Inputs in their order with their types and defaults, new ones behind them; outputs in theirs, new ones behind them."""
    before, now = KEPT["nodes"][node], nodes[node]
    assert [pair[1] for pair in now["outputs"]][: len(before["outputs"])] == [pair[1] for pair in before["outputs"]]
    for group in ("required", "optional"):
        old, new = ([entry for entry in one["inputs"] if entry[1] == group] for one in (before, now))
        for entry, there in zip(old, new, strict=False):
            assert _fixed(there) == _fixed(entry)
            assert _choices(entry) <= _choices(there)
        assert len(new) >= len(old)
        assert group == "optional" or len(new) == len(old), "a new input has to be optional"


def _fixed(entry):
    name, group, kind, options = entry
    return name, group, kind, {key: value for key, value in options.items() if key not in FREE}


def _choices(entry):
    return {one if isinstance(one, str) else one[0] for one in entry[3].get("options", ())}


def test_a_change_of_a_node_is_in_the_changelog(nodes):
    """If this fails: write a line in CHANGELOG.md, then python tools/frozen.py --line "that line"."""
    known = [frozen.digest(KEPT["nodes"]), *(change["digest"] for change in KEPT["changes"])]
    assert frozen.digest(nodes) == known[-1], sorted(n for n in nodes if nodes[n] != KEPT["nodes"].get(n))
    changelog = (ROOT / "CHANGELOG.md").read_text(encoding="utf-8").replace("\n  ", " ")
    assert [change["changelog"] for change in KEPT["changes"] if change["changelog"] not in changelog] == []


def test_a_node_that_changes_is_noticed(nodes):
    """Each number, name and choice counts."""
    for change in (
        lambda node: node["inputs"][0].__setitem__(0, "other"),
        lambda node: node["inputs"].reverse(),
        lambda node: node["outputs"].pop(),
    ):
        changed = json.loads(json.dumps(nodes))
        change(changed["LCMKitKSampler"])
        assert frozen.digest(changed) != frozen.digest(nodes)


def test_there_is_a_workflow_of_every_node_and_each_example():
    assert {path.stem for path in OF_A_NODE} == KEPT["nodes"].keys()
    assert len(FILES) - len(OF_A_NODE) >= 17


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_a_saved_workflow_opens_and_is_sent_as_it_was(page, path):
    saved = json.loads(path.read_text(encoding="utf-8"))
    frozen.open_workflow(page, saved["workflow"])
    unknown = "() => app.graph.nodes.filter(n => !LiteGraph.registered_node_types[n.type]).map(n => n.type)"
    assert set(page.evaluate(unknown)) <= packs.nodes().keys()
    sent = frozen.both(page)["prompt"]
    assert sent.keys() == saved["prompt"].keys()
    for id_, node in saved["prompt"].items():
        there = sent[id_]["inputs"]
        assert {name: there.get(name) for name in node["inputs"]} == node["inputs"], node["class_type"]


@pytest.mark.parametrize("path", OF_A_NODE, ids=lambda path: path.stem)
def test_a_saved_workflow_of_a_node_is_taken_by_the_server(server, path):
    """By its validation; what it then does the other tests say. It is taken from the queue before it runs."""
    if path.stem in NOT_RUN:
        pytest.skip("its model is not among the demo's")
    graph = dict(scene_of(path.stem)[0])
    graph |= json.loads(path.read_text(encoding="utf-8"))["prompt"]
    request = json.dumps({"prompt": graph}).encode()
    try:
        answer = json.loads(server.request("/prompt", request, {"Content-Type": "application/json"}))
    except HTTPError as refused:
        with refused:
            pytest.fail(refused.read().decode()[:2000])
    assert answer["node_errors"] == {}
    for path_, body in (("/queue", {"clear": True}), ("/interrupt", {})):
        server.request(path_, json.dumps(body).encode(), {"Content-Type": "application/json"})
