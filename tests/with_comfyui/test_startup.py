"""The real server starts with the pack: imported at once, without a warning, with every node of the contract."""

import importlib.metadata
import re

import pytest

from lcm_kit.demo.comfyui_client import ExecutionFailed, PromptRejected
from lcm_kit.demo.comfyui_server import ServerError
from lcm_kit.tests.with_comfyui.comfy_server import PACK, comfyui, import_times, own_page, pack_server, page_version

# Saved workflows depend on these ids: inputs may be added, never renamed.
CONTRACT = {
    "LCMKitScheduler": "model steps denoise original_steps timesteps",
    "LCMKitSampler": "gamma seed",
    "LCMKitKSampler": "model positive negative latent_image seed steps cfg denoise gamma cfg_steps original_steps",
    "LCMKitLoader": "model clip lora_name strength_model wrong_base lora_stack",
    "LCMKitLoadLoRA": "lora_name",
    "LCMKitMergeLoRA": "lora_1 lora_2 lora_3 lora_4 strength_1 strength_2 strength_3 strength_4 method size",
    "LCMKitApplyLoRA": "model clip lora strength_model strength_clip wrong_base",
    "LCMKitSaveLoRA": "lora filename_prefix dtype format output_name_mode title author trigger_words",
}
OUTPUTS = {
    "LCMKitScheduler": ["SIGMAS"],
    "LCMKitSampler": ["SAMPLER"],
    "LCMKitKSampler": ["LATENT"],
    "LCMKitLoader": ["MODEL", "CLIP", "LCM_PRESET", "LORA_MODEL", "INT", "FLOAT", "STRING"],
    "LCMKitLoadLoRA": ["LORA_MODEL", "STRING"],
    "LCMKitMergeLoRA": ["LORA_MODEL", "STRING"],
    "LCMKitApplyLoRA": ["MODEL", "CLIP", "STRING"],
    "LCMKitSaveLoRA": ["STRING"],
}


def test_log_shows_the_pack_imported(server):
    times = import_times(server.log_text())
    assert PACK in times, server.log_text()
    _, imported = times[PACK]
    assert imported, server.log_text()


def test_log_has_no_warning_about_the_pack(server):
    suspicious = ("warning", "error", "traceback", "failed", "unable", "cannot", "skip")
    at_start, started, _ = server.log_text().partition("Starting server")  # what other tests provoked comes later
    assert started
    about_us = [line for line in at_start.splitlines() if PACK in line or "LCM Kit" in line or "LCMKit" in line]
    assert about_us
    assert [line for line in about_us if any(word in line.lower() for word in suspicious)] == []


def test_the_page_is_the_one_that_this_comfyui_names(server):
    wanted = page_version(comfyui())
    if own_page(comfyui()):
        assert re.search(rf"web root: .*\b{re.escape(wanted)}$", server.log_text(), re.MULTILINE)
    elif (installed := importlib.metadata.version("comfyui-frontend-package")) != wanted:
        pytest.skip(f"this ComfyUI names the page {wanted}, {installed} is installed")


@pytest.mark.parametrize("node", CONTRACT)
def test_node_has_the_inputs_and_outputs_of_the_contract(client, node):
    info = client.object_info()
    assert node in info, f"the server knows {[name for name in info if name.startswith('LCMKit')]}"
    inputs = {name for group in ("required", "optional") for name in info[node]["input"].get(group, {})}
    assert set(CONTRACT[node].split()) - inputs == set()
    assert info[node]["output"] == OUTPUTS[node]
    assert info[node]["category"].split("/")[0] == "LCM Kit"


def test_every_node_and_every_input_is_explained(client):
    ours = {name: info for name, info in client.object_info().items() if name.startswith("LCMKit")}
    assert ours
    silent = [name for name, info in ours.items() if not info["description"]]
    for name, info in ours.items():
        for group in ("required", "optional"):
            for key, (_, *options) in info["input"].get(group, {}).items():
                if not (options and options[0].get("tooltip")):
                    silent.append(f"{name}.{key}")
    assert silent == []


def test_refused_workflow_names_the_node(client):
    workflow = {
        "7": {"class_type": "VAEDecode", "inputs": {}},
        "9": {"class_type": "PreviewImage", "inputs": {"images": ["7", 0]}},
    }
    with pytest.raises(PromptRejected, match=r"node 7 \(VAEDecode\): Required input is missing: samples"):
        client.submit(workflow)


def test_run_sends_events_and_files_its_picture(client):
    """The client and the server themselves, on core nodes only."""
    workflow = {
        "1": {"class_type": "EmptyImage", "inputs": {"width": 8, "height": 8, "batch_size": 1, "color": 0xFF0000}},
        "2": {"class_type": "PreviewImage", "inputs": {"images": ["1", 0]}},
    }
    prompt_id = client.submit(workflow)
    events = list(client.follow(prompt_id, timeout=60))
    assert [event.node for event in events if event.kind == "executed"] == ["2"]
    (picture,) = client.images(client.history(prompt_id)["outputs"])
    assert picture.startswith(b"\x89PNG")


def test_failing_start_shows_the_end_of_the_log(tmp_path):
    with (
        pytest.raises(ServerError, match=r"(?s)ended with status 2.*unrecognized arguments: --no-such-option"),
        pack_server(tmp_path, arguments=["--no-such-option"]),
    ):
        pass


def test_failing_node_is_named(client, tmp_path):
    not_a_picture = tmp_path / "broken.png"
    not_a_picture.write_text("text")
    workflow = {
        "4": {"class_type": "LoadImage", "inputs": {"image": client.upload_image(not_a_picture)}},
        "5": {"class_type": "PreviewImage", "inputs": {"images": ["4", 0]}},
    }
    with pytest.raises(ExecutionFailed, match=r"node 4 \(LoadImage\): cannot identify image file") as failed:
        client.run(workflow, timeout=60)
    assert failed.value.node == "4"
    assert client.object_info()["LoadImage"]  # the server lives on
