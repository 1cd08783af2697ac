"""The LoRA nodes in ComfyUI's own server: file to merge to file, and messages that leave the server running."""

import json

import pytest
import safetensors.torch
import torch

from lcm_kit.demo.comfyui_client import ExecutionFailed
from lcm_kit.tests.with_comfyui import tiny


@pytest.fixture
def loras(server):
    """The running server's loras folder, with two LoRAs and one that is cut off."""
    folder = server.home / "models" / "loras"
    folder.mkdir(parents=True, exist_ok=True)
    model = tiny.tiny_model()
    files = {"style.safetensors": tiny.lora(model, endings=tiny.STYLE, seed=1), "lcm.safetensors": tiny.lora(model)}
    for name, tensors in files.items():
        safetensors.torch.save_file(tensors, folder / f"test_{name}")
    whole = (folder / "test_lcm.safetensors").read_bytes()
    (folder / "test_cut.safetensors").write_bytes(whole[: len(whole) // 2])
    yield folder
    for file in folder.rglob("test_*"):
        file.unlink()


def merge_workflow(first="test_style.safetensors", second="test_lcm.safetensors", **save):
    strengths = {f"strength_{n}": 1.0 for n in range(1, 7)} | {"strength_1": 0.8}
    save = {
        "filename_prefix": "test_merged",
        "dtype": "fp32",
        "format": "kohya",
        "output_name_mode": "overwrite",
    } | save
    return {
        "1": {"class_type": "LCMKitLoadLoRA", "inputs": {"lora_name": first}},
        "2": {"class_type": "LCMKitLoadLoRA", "inputs": {"lora_name": second}},
        "3": {
            "class_type": "LCMKitMergeLoRA",
            "inputs": {"lora_1": ["1", 0], "lora_2": ["2", 0], "method": "linear", "rank": 0, "density": 1.0, "seed": 0}
            | strengths,
        },
        "4": {"class_type": "LCMKitSaveLoRA", "inputs": {"lora": ["3", 0]} | save},
    }


def test_two_files_become_one_that_says_what_it_is(client, loras):
    outputs = client.run(merge_workflow())
    path = loras / "test_merged.safetensors"
    assert outputs["4"]["text"] == ["test_merged.safetensors"]
    assert "Exact" in outputs["3"]["text"][0]
    with safetensors.safe_open(path, "pt") as file:
        inputs = json.loads(file.metadata()["lcm_kit.merge"])["inputs"]
    assert [(entry["name"], entry["strength"]) for entry in inputs] == [
        ("test_style.safetensors", 0.8),
        ("test_lcm.safetensors", 1.0),
    ]


def test_an_overwritten_file_is_merged_anew(client, loras):
    client.run(merge_workflow())
    before = safetensors.torch.load_file(loras / "test_merged.safetensors")
    safetensors.torch.save_file(tiny.lora(tiny.tiny_model(), seed=7), loras / "test_lcm.safetensors")
    client.run(merge_workflow())
    after = safetensors.torch.load_file(loras / "test_merged.safetensors")
    assert not all(torch.equal(before[key], after[key]) for key in before)


@pytest.mark.parametrize(
    ("workflow", "node", "message"),
    [
        (merge_workflow(second="test_cut.safetensors"), "2", "test_cut.safetensors: is cut off"),
        (merge_workflow(filename_prefix="../test_out"), "4", "lies outside the loras folder"),
    ],
)
def test_a_bad_input_is_told_at_its_node_and_the_server_lives_on(client, loras, workflow, node, message):
    with pytest.raises(ExecutionFailed) as failure:
        client.run(workflow)
    assert failure.value.node == node
    assert message in failure.value.error
    assert client.run(merge_workflow())["4"]["text"]


def test_help_pages_are_served(server):
    page = server.request("/extensions/lcm-kit/docs/LCMKitKSampler.md").decode()
    assert page.startswith("# LCM KSampler")
