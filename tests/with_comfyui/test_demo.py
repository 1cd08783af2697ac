"""The main job through the real server: merged LoRAs, four steps, a picture; and what users get wrong on the way."""

import contextlib
import io
import itertools
import os
import re
import signal
import subprocess
import sys
import time

import numpy as np
import psutil
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

from lcm_kit.demo import prompts
from lcm_kit.demo.comfyui_client import ExecutionFailed, PromptRejected
from lcm_kit.demo.graphs import STYLED_BASELINE, STYLED_LCM, TINY, Shot, lcm_only, pictures, style_in_few_steps
from lcm_kit.tests.helpers import ROOT, as_read
from lcm_kit.tests.with_comfyui.comfy_server import comfyui

SHOT = Shot("cat face", seed=5, steps=4)


def nodes_of(graph, class_type):
    return [node for node, content in graph.items() if content["class_type"] == class_type]


def settings_of(graph, class_type):
    (node,) = nodes_of(graph, class_type)
    return graph[node]["inputs"]


def picture(client, graph):
    """The pictures of a run, one below the other, (height, width, 3) in 0..255."""
    files = client.images(client.run(graph, timeout=120))
    assert files
    return np.concatenate([np.array(Image.open(io.BytesIO(file)).convert("RGB"), dtype=int) for file in files])


def test_main_job_makes_a_picture_in_four_model_calls(client):
    graph = style_in_few_steps(TINY, SHOT)
    (sampler,), (saver,) = nodes_of(graph, "LCMKitKSampler"), nodes_of(graph, "SaveImage")
    prompt_id = client.submit(graph)
    events = list(client.follow(prompt_id, timeout=120))
    assert [e.data for e in events if e.kind == "execution_error"] == []
    progress = [(e.data["value"], e.data["max"]) for e in events if e.kind == "progress" and e.node == sampler]
    assert list(dict.fromkeys(progress)) == [(1, 4), (2, 4), (3, 4), (4, 4)]

    (file,) = client.images({saver: client.history(prompt_id)["outputs"][saver]})
    pixels = np.array(Image.open(io.BytesIO(file)).convert("RGB"), dtype=float)
    assert pixels.shape == (64, 64, 3)
    assert pixels.std() > 8  # a blank picture has 0, one of noise around its mean would still pass


def test_equal_settings_make_equal_pictures_and_another_prompt_another(client):
    first = picture(client, style_in_few_steps(TINY, SHOT, batch=2))
    # LCM only, in between, so that nothing comes from the cache and the LoRA was taken off once
    picture(client, lcm_only(TINY, SHOT))
    assert np.array_equal(first, picture(client, style_in_few_steps(TINY, SHOT, batch=2)))
    other = picture(client, style_in_few_steps(TINY, Shot("pizza", SHOT.seed, SHOT.steps), batch=2))
    assert not np.array_equal(first, other)


def test_graph_of_many_pictures_makes_the_same_picture_as_the_main_job(client):
    graph, [(_, preview)] = pictures(TINY, STYLED_LCM, [SHOT])
    (file,) = client.images({preview: client.run(graph, timeout=120)[preview]})
    many = np.array(Image.open(io.BytesIO(file)).convert("RGB"), dtype=int)
    assert np.array_equal(many, picture(client, style_in_few_steps(TINY, SHOT)))


def test_baseline_graph_runs_on_core_nodes_alone(client):
    graph, _ = pictures(TINY, STYLED_BASELINE, [Shot("cat face", 5, 2)])
    assert not [node for node in graph.values() if node["class_type"].startswith("LCMKit")]
    assert picture(client, graph).shape == (64, 64, 3)


@pytest.mark.parametrize(("dtype", "pixels"), [("fp32", 1), ("fp16", 3)])  # of 255; fp16 rounds the factors to 11 bits
def test_saved_merge_in_cores_lora_loader_gives_the_same_picture(client, server, dtype, pixels):
    merged = style_in_few_steps(TINY, SHOT)
    lora = settings_of(merged, "LCMKitApplyLoRA")["lora"]
    merged.add(
        "LCMKitSaveLoRA",
        lora=lora,
        filename_prefix=f"LCMKit/fast-{dtype}",
        dtype=dtype,
        format="kohya",
        output_name_mode="overwrite",
    )
    expected = picture(client, merged)

    core = style_in_few_steps(TINY, SHOT)
    (apply,) = nodes_of(core, "LCMKitApplyLoRA")
    model, clip = core[apply]["inputs"]["model"], core[apply]["inputs"]["clip"]
    inputs = {"model": model, "clip": clip, "strength_model": 1.0, "strength_clip": 1.0}
    core[apply] = {
        "class_type": "LoraLoader",
        "inputs": {**inputs, "lora_name": os.path.join("LCMKit", f"fast-{dtype}.safetensors")},
    }
    for node in [*nodes_of(core, "LCMKitLoadLoRA"), *nodes_of(core, "LCMKitMergeLoRA")]:
        del core[node]
    before = len(server.log_text())
    found = picture(client, core)
    log = server.log_text()[before:]
    assert "lora key not loaded" not in log
    assert "ERROR lora" not in log
    assert np.abs(found - expected).max() <= pixels


def test_lora_mix_makes_the_picture_of_the_four_nodes(client, server):
    """With `auto` for the LCM-LoRA, and with its preset for the sampler's settings. It adds the LCM-LoRA first and they the
    style, so that float32 rounds otherwise: a level of 255 at most."""
    for file in (server.home / "models" / "loras").rglob("*.safetensors"):
        if not file.name.startswith("tiny_emoji"):  # other tests train LCM-LoRAs for this very model
            file.unlink()
    graph = style_in_few_steps(TINY, SHOT)
    expected = picture(client, graph)
    (apply,), (sampler,) = nodes_of(graph, "LCMKitApplyLoRA"), nodes_of(graph, "LCMKitKSampler")
    model, clip = graph[apply]["inputs"]["model"], graph[apply]["inputs"]["clip"]
    rows = {"lora_1": TINY.style, "strength_1": 0.8, "lora_4": TINY.style, "on_4": False}
    graph[apply] = {"class_type": "LCMKitLoRAMix", "inputs": {"model": model, "clip": clip, **rows}}
    graph[sampler]["inputs"] |= {"preset": [apply, 3], "steps": 50, "cfg": 7.0}
    for node in [*nodes_of(graph, "LCMKitLoadLoRA"), *nodes_of(graph, "LCMKitMergeLoRA")]:
        del graph[node]
    graph["report"] = {"class_type": "PreviewAny", "inputs": {"source": [apply, 5]}}
    assert np.abs(picture(client, graph) - expected).max() <= 1
    report = as_read(client.run(graph)["report"]["text"][0])
    assert f"  lcm_lora: {TINY.lcm} * 1: LCM LoRA, ok\n  lora_1: {TINY.style} * 0.8: " in report
    assert f"  lora_4: {TINY.style}: off\n" in report
    assert f"auto: {TINY.lcm} is the one for this model among " in report


def truncated(server, path):
    path.write_bytes((server.home / "models" / "loras" / TINY.lcm).read_bytes()[:-1000])


def foreign(server, path):
    name = "lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn1_to_q"
    up, down = torch.ones(320, 4), torch.ones(4, 320)
    save_file({f"{name}.lora_up.weight": up, f"{name}.lora_down.weight": down}, path)


NOT_THERE = r"lora_name: 'missing\.safetensors' is not in the loras folder\. Put it there .* or choose another file"
CUT_OFF = r"truncated\.safetensors\b.* is cut off: \d+ of \d+ bytes are there; download it again"
FOREIGN = r"foreign\.safetensors does not fit this model \(TinyEmoji\).*made for another base model; use the LoRA for"
MISMATCH = (
    r"tiny_emoji_ink_lora\.safetensors updates a weight of shape \(\d+, \d+\), foreign\.safetensors one of shape "
    r"\(320, 320\); they were made for different base models, so merge LoRAs of one base"
)


@pytest.mark.parametrize(
    ("graph", "make", "node_type", "says"),
    [
        (lcm_only, truncated, "LCMKitLoader", CUT_OFF),
        (lcm_only, foreign, "LCMKitLoader", FOREIGN),
        (style_in_few_steps, truncated, "LCMKitLoadLoRA", CUT_OFF),
        (style_in_few_steps, foreign, "LCMKitMergeLoRA", MISMATCH),
    ],
)
def test_bad_lora_file_is_named_and_the_server_lives_on(client, server, graph, make, node_type, says):
    name = f"{make.__name__}.safetensors"
    make(server, server.home / "models" / "loras" / name)
    bad = with_file(graph(TINY, SHOT), name)
    with pytest.raises(ExecutionFailed, match=says) as failed:
        client.run(bad, timeout=120)
    assert failed.value.node_type == node_type
    assert_server_lives_on(client)


@pytest.mark.parametrize(("graph", "node_type"), [(lcm_only, "LCMKitLoader"), (style_in_few_steps, "LCMKitLoadLoRA")])
def test_a_missing_lora_file_is_named_before_anything_runs(client, server, graph, node_type):
    with pytest.raises(PromptRejected, match=NOT_THERE) as rejected:
        client.run(with_file(graph(TINY, SHOT), "missing.safetensors"))
    assert f"({node_type}): Custom validation failed" in str(rejected.value)
    assert str(server.home) not in str(rejected.value)
    assert "Value not in list" not in str(rejected.value)


def test_a_style_in_the_lcm_loader_gives_no_settings_and_whoever_asks_for_them_is_told(client):
    graph = with_file(lcm_only(TINY, SHOT), TINY.style)
    asked = rf"LCM-LoRA Loader has no (steps|cfg) to give: {re.escape(TINY.style)} is no acceleration LoRA"
    with pytest.raises(ExecutionFailed, match=asked) as failed:
        client.run(graph, timeout=120)
    assert failed.value.node_type == "LCMKitKSampler"
    # With settings of its own the sampler runs; an empty preset is as one that is not connected.
    (loader,), sampler = nodes_of(graph, "LCMKitLoader"), settings_of(graph, "LCMKitKSampler")
    sampler |= {"steps": 4, "cfg": 1.0}
    plain = picture(client, graph)
    sampler["preset"] = [loader, 2]
    assert np.array_equal(picture(client, graph), plain)


def with_file(workflow, name):
    """The workflow with this file in its last LoRA loader."""
    loaders = [node for node, content in workflow.items() if "lora_name" in content["inputs"]]
    workflow[loaders[-1]]["inputs"]["lora_name"] = name
    return workflow


def assert_server_lives_on(client):
    fresh = Shot("star", time.time_ns() % 10**9, 1)  # nothing of it can come from the cache
    assert picture(client, style_in_few_steps(TINY, fresh)).shape == (64, 64, 3)


@pytest.mark.parametrize(
    ("setting", "value", "says"),
    [
        ("steps", 51, r"steps is 51.*50"),
        ("gammas", "0, 2", r"'2' is not a number from 0"),
    ],
)
def test_impossible_setting_is_named_and_the_server_lives_on(client, setting, value, says):
    bad = style_in_few_steps(TINY, SHOT)
    settings_of(bad, "LCMKitKSampler")[setting] = value
    with pytest.raises(ExecutionFailed, match=says) as failed:
        client.run(bad, timeout=120)
    assert failed.value.node_type == "LCMKitKSampler"
    assert_server_lives_on(client)


@pytest.mark.parametrize("prompt", [*itertools.chain(*prompts.GRID), *prompts.FIGURE, *prompts.EXAMPLES])
def test_demo_draws_only_what_the_tiny_model_can_read(prompt):
    known, unknown = prompts.split(prompt)
    assert (known, unknown) == (prompt.split(), [])


COMMAND = [sys.executable, str(ROOT / "demo" / "run.py")]


def drawn(tree, output, *arguments):
    """What the demo's command says and draws on the ComfyUI in `tree`: (standard output and error, name -> pixels)."""
    environment = {**os.environ, "COMFYUI_PATH": str(tree)}
    done = subprocess.run(
        [*COMMAND, "--output", str(output), *arguments], capture_output=True, text=True, timeout=600, env=environment
    )
    assert done.returncode == 0, done.stderr
    return done, {file.stem: np.array(Image.open(file).convert("RGB")) for file in output.glob("*.png")}


WORDS = ("--prompt", "fluffy cat face")


@pytest.fixture(scope="module")
def of_words(tmp_path_factory):
    """Of a user's words, on the ComfyUI of these tests: as `drawn`, and the folder."""
    folder = tmp_path_factory.mktemp("words")
    return *drawn(comfyui(), folder, *WORDS), folder


def test_demo_command_draws_the_users_prompt(of_words):
    done, pictures, folder = of_words
    assert "left out: fluffy" in done.stdout
    assert f"{STYLED_LCM.name}      4            4" in done.stdout
    height, width, _ = pictures["prompt"].shape
    assert height > 2 * 128
    assert width > 8 * 128
    assert "100%" in done.stderr  # of the progress bar
    assert "Starting server" in (folder / "comfyui" / "server.log").read_text()


def other_trees():
    """The ComfyUIs of `make setup` beside that of these tests."""
    trees = [ROOT / name for name in (".comfyui", ".comfyui-floor")]
    others = [tree for tree in trees if (tree / "main.py").is_file() and tree.resolve() != comfyui()]
    if not others:
        pytest.skip("no other ComfyUI to compare with: `make setup` fetches them")
    return others


@pytest.mark.slow
def test_every_version_of_comfyui_draws_a_users_words_the_same_to_the_bit(of_words, tmp_path):
    for number, tree in enumerate(other_trees()):
        _, there = drawn(tree, tmp_path / str(number), *WORDS)
        assert there.keys() == of_words[1].keys() == {"prompt"}
        assert np.array_equal(there["prompt"], of_words[1]["prompt"]), f"on {tree}"


@pytest.mark.rare
def test_every_version_of_comfyui_draws_the_pictures_of_the_demo_the_same_to_the_bit(tmp_path):
    _, here = drawn(comfyui(), tmp_path / "here")
    for number, tree in enumerate(other_trees()):
        _, there = drawn(tree, tmp_path / str(number))
        assert there.keys() == here.keys() == {"grid", "figure3", "strength_by_steps"}
        for name, pixels in there.items():
            assert np.array_equal(pixels, here[name]), f"{name} of {tree}"


def test_demo_command_says_which_words_it_knows(tmp_path):
    arguments = ["--prompt", "hello world", "--output", str(tmp_path)]
    done = subprocess.run([*COMMAND, *arguments], capture_output=True, text=True, timeout=60)
    assert done.returncode == 1
    assert done.stderr.count("\n") == 1
    assert 'knows no word of "hello world"; try cat face, ' in done.stderr


def servers_of(command: subprocess.Popen) -> list[psutil.Process]:
    found = []
    for child in psutil.Process(command.pid).children():
        with contextlib.suppress(psutil.NoSuchProcess):  # The probe of setpriv comes and goes.
            if "main.py" in child.cmdline():
                found.append(child)
    return found


def test_interrupted_demo_command_stops_its_server(tmp_path):
    # A shell's background jobs, and so their children, ignore Ctrl-C; a terminal's do not.
    with subprocess.Popen(
        [*COMMAND, "--output", str(tmp_path)],
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    ) as command:
        try:
            deadline = time.monotonic() + 60
            while not (servers := servers_of(command)):
                assert command.poll() is None
                assert time.monotonic() < deadline
                time.sleep(0.05)
            command.send_signal(signal.SIGINT)
            _, errors = command.communicate(timeout=60)
        finally:
            command.kill()
    assert command.returncode == 130
    assert errors.endswith("demo: stopped\n")
    # Interrupted while it starts its server, the command ends before it knows it, and the kernel ends what was tied to it.
    assert psutil.wait_procs(servers, timeout=30)[1] == []
