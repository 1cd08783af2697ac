"""Random workflows through the real server: each answer is a result, or a sentence that names what is wrong.

GRAPHS=2000 in the environment makes it a long run, GRAPH_SEED another one.
"""

import json
import os
import shutil

import pytest

from lcm_kit.demo.comfyui_client import PromptRejected
from lcm_kit.tests.with_comfyui.random_graphs import Maker

GRAPHS = int(os.environ.get("GRAPHS", "34"))
SEED = os.environ.get("GRAPH_SEED", "1")
# Of node errors; MemoryError and the like are no answer.
WORDED = ("ValueError", "FileNotFoundError", "FileExistsError")


@pytest.fixture
def tidy(server):
    yield
    for folder in (server.home / "models" / "loras", server.home / "output" / "LCMKit" / "distilling"):
        for file in folder.glob("test*"):
            shutil.rmtree(file) if file.is_dir() else file.unlink()


def answer(client, graph, names, home):
    """("result" | "rejected" | "error", what is wrong with the answer or None)."""
    try:
        prompt_id = client.submit(graph.nodes)
    except PromptRejected as error:
        told = graph.planted is None or graph.planted[1] in str(error)
        return "rejected", None if told and error.answer.get("node_errors") else str(error)
    failed = [event.data for event in client.follow(prompt_id, timeout=120) if event.kind == "execution_error"]
    if not failed:
        if str(home) in json.dumps(client.history(prompt_id)["outputs"]):
            return "result", "a folder of the machine is in what is shown"
        illegal = graph.planted and graph.nodes[graph.planted[0]]["class_type"]
        return "result", f"an illegal value was taken by {illegal}" if illegal else None
    return "error", fault_of(failed[0], graph, names, home)


def fault_of(error, graph, names, home):
    """What an error lacks, None if nothing."""
    message = error["exception_message"].strip()
    node = names.get(error["node_type"])
    if node is None or error["exception_type"] not in WORDED or not message.startswith(f"{node}: "):
        return f"{error['node_type']} says {error['exception_type']}: {message}\n{error['traceback'][-1]}"
    if graph.planted and graph.planted[0] == error["node_id"] and graph.planted[1] not in message:
        return f"{graph.planted[1]} is not named: {message}"
    if str(home) in message or len(message) > 4000 or len(message) < len(node) + 30:
        return message
    return None


def test_every_answer_is_a_result_or_a_sentence(client, server, tidy):
    info = client.object_info()
    names = {
        kind: about["display_name"].partition(" (")[0] for kind, about in info.items() if kind.startswith("LCMKit")
    }
    kinds = sorted(names)
    counted, wrong = {}, []
    for number in range(GRAPHS):
        graph = Maker(info, f"{SEED} {number}").make(kinds[number % len(kinds)])
        kind, fault = answer(client, graph, names, server.home)
        counted[kind] = counted.get(kind, 0) + 1
        if fault:
            wrong.append(
                f"--- graph {number}, {kind}, illegal value at {graph.planted}: {fault}\n{json.dumps(graph.nodes)}"
            )
    assert not wrong, f"{len(wrong)} of {GRAPHS}\n" + "\n".join(wrong)
    # Else nothing was tried.
    assert min(counted.get(kind, 0) for kind in ("result", "rejected", "error")) > GRAPHS // 20
