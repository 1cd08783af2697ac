"""Distill LCM-LoRA in ComfyUI's own server, on the embedded model: executor, progress, previews, a stop in the middle."""

import io

import numpy as np
import pytest
import safetensors.torch
from PIL import Image

from lcm_kit.demo.graphs import TINY, Graph, Shot, lcm_only, load

PROMPTS = ("cat face", "rocket")


def training(**widgets):
    """(workflow, id of the training node, of the node that saves the LoRA, of the picture's)."""
    graph = Graph()
    loaded = load(graph, TINY)
    positive = [graph.add("CLIPTextEncode", clip=loaded.clip, text=text) for text in PROMPTS]
    both = graph.add("ConditioningCombine", conditioning_1=[positive[0], 0], conditioning_2=[positive[1], 0])
    negative = graph.add("CLIPTextEncode", clip=loaded.clip, text="")
    widgets = {
        "steps": 4, "batch": 2, "accumulate": 1, "rank": 2, "alpha": 0.0, "learning_rate": 1e-3, "guidance_min": 3.0,
        "guidance_max": 3.0, "skip": 200, "seed": 1, "samples": 2, "width": 64, "height": 64, "dtype": "auto",
        "gradient_checkpointing": True, "resume": "",
    } | widgets  # fmt: skip
    node = graph.add(
        "LCMKitDistill", model=loaded.model, positive=[both, 0], negative=[negative, 0], vae=loaded.vae, **widgets
    )
    saver = graph.add(
        "LCMKitSaveLoRA", lora=[node, 0], filename_prefix="test_distilled", dtype="fp32", format="kohya",
        output_name_mode="overwrite",
    )  # fmt: skip
    shown = graph.add("PreviewImage", images=[node, 1])
    return graph, node, saver, shown


@pytest.fixture
def files(server):
    """The server's loras folder and its folder of checkpoints; what the test wrote there is removed."""
    loras, checkpoints = server.home / "models" / "loras", server.home / "output" / "LCMKit" / "distilling"
    yield loras, checkpoints
    for file in [*loras.glob("test_*"), *loras.glob("LCMKit/test*"), *checkpoints.glob("test*")]:
        file.unlink()


def pictures(client, outputs):
    return [np.array(Image.open(io.BytesIO(file)).convert("RGB"), dtype=int) for file in client.images(outputs)]


def test_a_training_gives_a_lora_file_a_picture_and_progress(client, files):
    graph, node, saver, shown = training()
    prompt_id = client.submit(graph)
    events = list(client.follow(prompt_id, timeout=120))
    assert [e.data for e in events if e.kind == "execution_error"] == []
    progress = [(e.data["value"], e.data["max"]) for e in events if e.kind == "progress" and e.node == node]
    assert [pair for pair in dict.fromkeys(progress) if pair[1] == 4] == [(1, 4), (2, 4), (3, 4), (4, 4)]
    assert any(e.kind == "preview" for e in events)

    outputs = client.history(prompt_id)["outputs"]
    assert "4 steps of 2 images from 2 pictures that the model made itself" in outputs[node]["text"][0]
    (path,) = outputs[saver]["text"]
    lora = safetensors.torch.load_file(files[0] / path)
    assert sum(key.endswith(".alpha") for key in lora) == 177
    assert any(tensor.abs().max() > 0 for key, tensor in lora.items() if "lora_up" in key)
    (picture,) = pictures(client, {shown: outputs[shown]})
    assert picture[300:].std() > 8  # below the curve are the samples, not blank


def test_a_stopped_training_goes_on_and_pictures_are_as_before(client, files):
    _, checkpoints = files
    before = pictures(client, client.run(lcm_only(TINY, Shot("cat face", seed=5, steps=2)), timeout=120))
    graph, node, saver, _ = training(steps=5, resume="test-stopped")
    prompt_id = client.submit(graph)
    stopped = False
    for event in client.follow(prompt_id, timeout=120):
        if event.kind == "progress" and event.node == node and event.data["max"] == 5 and not stopped:
            client.interrupt()
            stopped = True
    status = client.history(prompt_id)["status"]
    assert status["status_str"] == "error"
    assert any(kind == "execution_interrupted" for kind, _ in status["messages"])
    assert (checkpoints / "test-stopped.safetensors").exists()

    (path,) = client.run(graph, timeout=120)[saver]["text"]
    resumed = safetensors.torch.load_file(files[0] / path)
    graph, _, saver, _ = training(steps=5)
    (path,) = client.run(graph, timeout=120)[saver]["text"]
    whole = safetensors.torch.load_file(files[0] / path)
    for key, tensor in whole.items():
        assert resumed[key].equal(tensor), key

    again = pictures(client, client.run(lcm_only(TINY, Shot("cat face", seed=5, steps=2)), timeout=120))
    assert len(before) == len(again) == 1
    assert np.array_equal(before[0], again[0])
