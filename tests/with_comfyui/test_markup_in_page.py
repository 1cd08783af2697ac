"""No text of ours becomes markup in a page: names out of files and what workflows bring are shown as they are written.

Planted is markup that would run a script or make an element, in everything that ends in a report, an error or a
progress text; looked at are the page that runs the graph and another one in which the same graph is open. What a
stranger's POST /prompt shows in pages that did not ask for it is looked at too.
"""

import json
import re
import shutil
import time
import urllib.error

import pytest
import safetensors.torch
import torch

from lcm_kit.demo.comfyui_client import Client
from lcm_kit.demo.graphs import TINY, Graph, load, merge
from lcm_kit.host.page import WORD_JOINER, plain
from lcm_kit.tests.helpers import ROOT
from lcm_kit.tests.with_comfyui.test_distilling_in_server import training
from lcm_kit.tests.with_comfyui.web_page import SLOW, becomes, open_graph, opened_page, report_on, run_in_page

INK = ROOT / "demo" / "models" / "loras" / TINY.style
# A name of a module cannot hold a dot, nor a name of a file a slash.
SCRIPT = '<img src=x onerror="planted=1">'
ELEMENT = "<x-planted>"
LINKS = "![x-planted](javascript:planted=2) [[x-planted|javascript:planted=3]] [x-planted](javascript:planted=4)"
MARKUP = f"{ELEMENT}{SCRIPT} {LINKS}"

# Before any other script: every element that markup of ours would make leaves its name in `made`, however short it lives.
WATCH = """
    window.planted = 0;
    window.made = [];
    const OURS = "x-planted, img[src='x'], img[alt*='x-planted'], a[href^='javascript:']";
    new MutationObserver(changes => {
        for (const change of changes) for (const node of change.addedNodes) {
            if (!(node instanceof Element)) continue;
            const found = [...(node.matches(OURS) ? [node] : []), ...node.querySelectorAll(OURS)];
            window.made.push(...found.map(element => element.outerHTML));
        }
    }).observe(document, {childList: true, subtree: true});
"""


# Of what may come in plain text when a node runs: numbers only.
PROGRESS = re.compile(
    r"step \d+ of \d+, loss [\d.e+-]+(; [\d.]+ \w+ a step, [\d:]+ left)?|the model has made \d+ of \d+ pictures to learn from"
)


def harm(page):
    """(what ran, what was made) of the planted markup."""
    return page.evaluate("() => [window.planted, window.made.splice(0)]")


def watched_page(browser, server):
    page = opened_page(browser, server, WATCH)
    page.evaluate(
        """() => {
            window.texts = [];
            app.api.addEventListener("progress_text", event => window.texts.push(event.detail.text));
        }"""
    )
    return page


@pytest.fixture(scope="module")
def runner(browser, server):
    page = watched_page(browser, server)
    yield page
    page.close()


@pytest.fixture(scope="module")
def onlooker(browser, server):
    page = watched_page(browser, server)
    yield page
    page.close()


def post(server, graph, page=None):
    """Runs a graph to its end, in the name of a page or of nobody; what went wrong, in words, or "" if nothing did."""
    body = {"prompt": graph} | ({"client_id": page.evaluate("() => app.api.clientId")} if page else {})
    try:
        answer = server.request("/prompt", json.dumps(body).encode(), {"Content-Type": "application/json"})
    except urllib.error.HTTPError as refused:
        refused.close()
        return "refused"
    id_ = json.loads(answer)["prompt_id"]
    end = time.monotonic() + SLOW / 1000
    while id_ not in (history := json.loads(server.request(f"/history/{id_}"))):
        assert time.monotonic() < end, "the run is not in the history"
        time.sleep(0.1)
    told = [data["exception_message"] for kind, data in history[id_]["status"]["messages"] if kind == "execution_error"]
    return " ".join(told)


@pytest.fixture(scope="module", autouse=True)
def hostile(server):
    """A LoRA file that is the demo's ink LoRA with markup in a module's name and in metadata."""
    tensors = safetensors.torch.load_file(INK)
    with safetensors.safe_open(INK, "pt") as file:
        metadata = dict(file.metadata() or {})
    down, up = torch.ones(1, 4), torch.ones(4, 1)
    tensors |= {f"lora_unet_{MARKUP}.lora_down.weight": down, f"lora_unet_{MARKUP}.lora_up.weight": up}
    keys = "ss_base_model_version ss_network_module ss_network_args ss_output_name ss_sd_model_name modelspec.title"
    keys += " modelspec.architecture modelspec.implementation lcm_kit.distillation base_model"
    metadata |= dict.fromkeys(keys.split(), MARKUP)
    metadata["lcm_kit.merge"] = json.dumps({"inputs": [{"name": MARKUP, "strength": 1.0, "sha256": MARKUP}]})
    path = server.home / "models" / "loras" / "hostile.safetensors"
    safetensors.torch.save_file(tensors, path, metadata)
    yield path
    path.unlink()


def reporting():
    """Every node that says something about a LoRA, on the hostile file."""
    graph = Graph()
    loaded = load(graph, TINY)
    lora = [graph.add("LCMKitLoadLoRA", lora_name="hostile.safetensors"), 0]
    graph.add("PreviewAny", source=[lora[0], 1])
    merged = merge(graph, TINY, 0.8, 1.0)
    graph[merged[0]]["inputs"]["lora_1"] = lora
    inputs = {"model": loaded.model, "clip": loaded.clip}
    applied = graph.add("LCMKitApplyLoRA", **inputs, lora=merged, strength_model=1.0, strength_clip=1.0)
    graph.add("PreviewAny", source=[applied, 2])
    resized = graph.add("LCMKitResizeLoRA", lora=lora, size="rank", **{"size.rank": 8}, dtype="fp16")
    graph.add("PreviewAny", source=[resized, 1])
    loras = {"lora_1": lora, "lora_2": graph[merged[0]]["inputs"]["lora_2"]}
    graph.add("LCMKitCompareLoRA", rank=0, **loras, **{f"strength_{n}": 1.0 for n in range(1, 5)})
    return graph


def failing(type_, **inputs):
    """A graph whose node of that type gets text that it cannot take."""
    graph = Graph()
    loaded = load(graph, TINY)
    if type_ == "LCMKitLoader":
        node = graph.add(type_, model=loaded.model, strength_model=1.0, wrong_base="refuse", **inputs)
    elif type_ == "LCMKitScheduler":
        node = graph.add(type_, model=loaded.model, steps=4, denoise=1.0, original_steps=50, **inputs)
    elif type_ == "LCMKitMergeLoRA":
        (node, _) = merge(graph, TINY, 0.8, 1.0)
        graph[node]["inputs"] |= inputs
    elif type_ == "LCMKitSaveLoRA":
        lora = [graph.add("LCMKitLoadLoRA", lora_name=TINY.lcm), 0]
        node = graph.add(
            type_, lora=lora, **{"dtype": "fp16", "format": "kohya", "output_name_mode": "exact name"} | inputs
        )
    else:
        node = graph.add(type_, **inputs)
    # What shows a result is given the shortest one, should there be any.
    graph.add("PreviewAny", source=[node, {"LCMKitLoader": 6, "LCMKitMergeLoRA": 1, "LCMKitLoadLoRA": 1}.get(type_, 0)])
    return graph


FAILING = {
    "a file that is not there": failing("LCMKitLoadLoRA", lora_name=f"{MARKUP}.safetensors"),
    "a LoRA for another model": failing("LCMKitLoader", lora_name="hostile.safetensors"),
    "no preset of that name": failing("LCMKitPreset", name=MARKUP, steps=0),
    "timesteps that are words": failing("LCMKitScheduler", timesteps=MARKUP),
    "gammas in words": failing("LCMKitSampler", gamma=1.0, seed=0, gammas=MARKUP),
    "block strengths in words": failing("LCMKitMergeLoRA", block_strengths=f"{MARKUP}=1=2"),
    "blocks of that name": failing("LCMKitMergeLoRA", block_strengths=f"/{SCRIPT}/=1"),
    "a method of that name": failing("LCMKitMergeLoRA", method=MARKUP),
    "no place for a file": failing("LCMKitSaveLoRA", filename_prefix=f"../{MARKUP}"),
    "a type of that name": failing("LCMKitSaveLoRA", filename_prefix="x", dtype=MARKUP),
}


def test_these_tests_would_notice(browser, server):
    """What has to hold of the planted markup, of a page that draws text as HTML."""
    page = watched_page(browser, server)
    page.evaluate("text => { document.body.appendChild(document.createElement('p')).innerHTML = text; }", MARKUP)
    page.wait_for_function("() => window.planted")
    planted, made = harm(page)
    assert planted == 1
    assert {element.split()[0].split(">")[0] for element in made} == {"<x-planted", "<img"}
    page.close()


def test_reports_are_shown_as_they_are_written(runner, onlooker):
    for page in (runner, onlooker):
        open_graph(page, reporting(), "hostile")
    history = run_in_page(runner)
    assert history["status"]["status_str"] == "success", history["status"]["messages"][-1]
    told = report_on(runner, "LCMKitApplyLoRA").replace(WORD_JOINER, "")
    assert SCRIPT in told
    assert LINKS[-20:] in told
    # Core's own preview of a text can be told to take it for Markdown.
    for way in (True, False):
        runner.evaluate(
            """way => app.graph.nodes.filter(n => n.type === "PreviewAny").flatMap(n => n.widgets)
                .filter(w => typeof w.value === "boolean").forEach(w => { w.value = way; w.callback?.(way); })""",
            way,
        )
        runner.wait_for_timeout(500)
    assert [harm(runner), harm(onlooker)] == [[0, []]] * 2


def test_what_strangers_run_does_nothing_in_open_pages(runner, onlooker, server):
    for page in (runner, onlooker):
        open_graph(page, reporting(), "hostile")
    post(server, reporting())
    with Client(server) as stranger:
        told = json.dumps(stranger.run(reporting()), ensure_ascii=False)
    assert ELEMENT in told.replace(WORD_JOINER, "")
    assert plain(told) == told
    assert ELEMENT in post(server, FAILING["timesteps that are words"]).replace(WORD_JOINER, "")
    runner.wait_for_timeout(500)
    assert [harm(runner), harm(onlooker)] == [[0, []]] * 2
    assert [page.evaluate("() => window.texts") for page in (runner, onlooker)] == [[], []]


def test_a_report_that_a_strangers_workflow_brings_is_text(runner):
    """On a node of ours and on another pack's, which may have one too. Anything but text is no report."""
    graph = Graph()
    shown = graph.add("PreviewAny", source=[graph.add("LCMKitLoadLoRA", lora_name=TINY.lcm), 1])
    graph.add("PreviewAny", source=[shown, 0])
    open_graph(runner, graph, "brought")
    workflow = runner.evaluate("() => JSON.parse(JSON.stringify(app.graph.serialize()))")
    for node, report in zip(workflow["nodes"], (MARKUP, MARKUP, {"length": 1e9}), strict=True):
        node["properties"]["lcm_kit_report"] = report
    runner.evaluate("graph => app.loadGraphData(graph)", workflow)
    boxes = """() => app.graph.nodes.flatMap(n => n.widgets ?? []).filter(w => w.name === "lcm_kit_report").map(w => w.element.value)"""
    assert becomes(runner, [MARKUP] * 2, lambda: runner.evaluate(boxes)) == [MARKUP] * 2
    runner.wait_for_timeout(500)  # for what would come of it
    assert harm(runner) == [0, []]


def test_no_name_of_a_file_becomes_markup_in_a_list(runner, hostile):
    named = hostile.with_name(f"{SCRIPT}.safetensors")
    shutil.copy(hostile, named)
    try:
        graph = Graph()
        graph.add("PreviewAny", source=[graph.add("LCMKitLoadLoRA", lora_name=TINY.lcm), 1])
        open_graph(runner, graph, "list")
        runner.evaluate("() => app.extensionManager.command.execute('Comfy.RefreshNodeDefinitions')")
        at = runner.evaluate(
            """() => {
                const node = app.graph.nodes.find(n => n.type === "LCMKitLoadLoRA"), ds = app.canvas.ds;
                ds.scale = 1;
                ds.offset = [400 - node.pos[0], 300 - node.pos[1]];
                app.canvas.draw(true, true);
                const box = app.canvas.canvas.getBoundingClientRect();
                return [box.x + 400 + node.size[0] / 2, box.y + 300 + node.widgets[0].y + 10];
            }"""
        )
        runner.mouse.click(*at)
        runner.get_by_text(TINY.style).first.wait_for()
        assert harm(runner) == [0, []]
        runner.keyboard.press("Escape")
    finally:
        named.unlink()


def test_a_running_node_tells_numbers_and_only_to_its_own_page(runner, onlooker):
    graph, *_ = training(steps=2)
    for page in (runner, onlooker):
        open_graph(page, graph, "training")
    run_in_page(runner)
    told = runner.evaluate("() => window.texts")
    assert told
    assert [text for text in told if not PROGRESS.fullmatch(text)] == []
    assert onlooker.evaluate("() => window.texts") == []
    names = runner.evaluate("() => app.graph.nodes.find(n => n.type === 'LCMKitDistill').widgets.map(w => w.name)")
    assert "lcm_kit_report" in names
    assert [name for name in names if "text-preview" in name] == []


def test_an_error_is_shown_as_it_is_written(runner):
    open_graph(runner, FAILING["timesteps that are words"], "failing")
    runner.evaluate("() => app.queuePrompt(0)")
    more = runner.get_by_text(re.compile("Show report|View details|See errors", re.IGNORECASE)).first
    more.evaluate("button => button.click()")  # whatever lies over it
    runner.wait_for_function(
        "([text, joiner]) => document.body.innerText.replaceAll(joiner, '').includes(text)", arg=[ELEMENT, WORD_JOINER]
    )
    assert harm(runner) == [0, []]
    runner.keyboard.press("Escape")


def test_what_the_server_refuses_at_once_becomes_no_markup(runner):
    """A newer ComfyUI says so in the answer to the page; an older one runs into our own error."""
    open_graph(runner, FAILING["no preset of that name"], "refused")
    runner.evaluate("() => app.queuePrompt(0)")
    runner.wait_for_function("() => Object.keys(app.lastNodeErrors ?? {}).length || app.lastExecutionError")
    runner.wait_for_timeout(1000)  # for what would come of it
    assert harm(runner) == [0, []]
    runner.keyboard.press("Escape")


def test_no_error_becomes_markup(runner, onlooker, server):
    for graph in FAILING.values():
        told = post(server, graph, runner)
        assert plain(told) == told
        runner.wait_for_timeout(200)
        assert [harm(runner), harm(onlooker)] == [[0, []]] * 2
        runner.keyboard.press("Escape")
