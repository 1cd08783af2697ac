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
    strengths = {f"strength_{n}": 1.0 for n in range(1, 5)} | {"strength_1": 0.8}
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
            "inputs": {"lora_1": ["1", 0], "lora_2": ["2", 0], "method": "linear", "size": "exact"} | strengths,
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


@pytest.mark.parametrize(
    ("given", "says"),
    [
        ({"method": "ties"}, "method ties (density 0.2)"),
        ({"method": "ties", "method.density": 0.4}, "method ties (density 0.4)"),
        ({"method": "della", "method.spread": 0.1, "method.seed": 7}, "method della (density 0.9, spread 0.1, seed 7)"),
        ({"size": "rank", "size.rank": 2}, ", rank 2, "),
        ({"method": "slerp", "method.density": 0.4}, "method slerp:"),  # of another method: left out by ComfyUI
        ({"lora_1": None}, "One LoRA is connected: the result is test_lcm.safetensors * 1."),
    ],
)
def test_choices_and_their_numbers_reach_the_merge_over_the_api(client, loras, given, says):
    workflow = merge_workflow()
    inputs = workflow["3"]["inputs"] | given
    workflow["3"]["inputs"] = {name: value for name, value in inputs.items() if value is not None}
    assert says in client.run(workflow)["3"]["text"][0]


@pytest.mark.parametrize("name", ["method", "size"])
@pytest.mark.parametrize("value", ["nonsense", None])
def test_a_choice_that_is_misspelt_or_missing_is_asked_for(client, loras, name, value):
    workflow = merge_workflow()
    workflow["3"]["inputs"].pop(name)
    workflow["3"]["inputs"] |= {} if value is None else {name: value}
    with pytest.raises(ExecutionFailed, match=f"Merge LoRAs: {name} is missing or unknown"):
        client.run(workflow)
