"""Compare LoRAs on ComfyUI's LORA_MODELs, and in a running server."""

import comfy.model_management
import pytest
import torch

from lcm_kit.host.lora.comparing import compare_slots
from lcm_kit.host.lora.weights import LoraWeights, to_lora
from lcm_kit.lora_merge.comparing.report import as_text
from lcm_kit.nodes.comparing import CompareLoRA
from lcm_kit.tests.helpers import as_read
from lcm_kit.tests.with_comfyui import tiny


@pytest.fixture(scope="module")
def loras():
    model = tiny.tiny_model()
    style = tiny.lora(model, endings=tiny.STYLE, seed=1)
    lcm = tiny.lora(model, "diffusers PEFT", rank=6, seed=2)
    return LoraWeights(style, name="style.safetensors"), LoraWeights(lcm, name="lcm.safetensors")


def compared(loras, **changed):
    slots = {f"lora_{n}": lora for n, lora in enumerate(loras, start=1)}
    slots |= {f"strength_{n}": 1.0 for n in range(1, 5)}
    return CompareLoRA.execute(**{"rank": 0, **slots, **changed})


def test_the_node_gives_a_picture_and_a_report(loras):
    image, report = compared(loras, strength_1=0.8, rank=4).result
    assert image.dtype == torch.float32
    assert image.shape[0] == 1
    assert image.shape[2:] == (1024, 3)
    assert 0 <= float(image.min()) < 0.3  # ink
    assert float(image.max()) == 1
    assert "style * 0.8: norm" in report
    assert "<- this rank" in report
    assert "style and lcm: independent" in report.splitlines()[1]


def test_spellings_of_one_module_meet(loras):
    """The same update in kohya's and in diffusers' names is the same LoRA."""
    model = tiny.tiny_model()
    same = [LoraWeights(tiny.lora(model, way, seed=5), name=way) for way in ("kohya on ldm", "diffusers PEFT")]
    report = compared(same).result[1]
    assert "cosine +1.0000" in report
    assert "They double up" in report


def test_slots_may_be_empty_and_strengths_belong_to_their_slot(loras):
    style, lcm = loras
    slots = {"lora_1": style, "lora_2": lcm, "lora_3": None, "lora_4": style}
    slots |= {f"strength_{n}": 0.1 * n for n in range(1, 5)}
    text = compare_slots(slots, 0)[1]
    assert "style (1) * 0.1: norm" in text
    assert "style (2) * 0.4: norm" in text


def test_the_report_is_that_of_the_core(loras):
    from lcm_kit.lora_merge.comparing.compare import compare

    found = compare([(to_lora(lora), 1.0) for lora in loras])
    assert as_read(compared(loras).result[1]) == as_text(found)


def test_the_stop_button_stops(loras):
    comfy.model_management.interrupt_current_processing(True)
    with pytest.raises(comfy.model_management.InterruptProcessingException):
        compared(loras)


def test_it_runs_in_the_server_and_shows_the_picture(client):
    graph = {
        "1": {"class_type": "LCMKitLoadLoRA", "inputs": {"lora_name": "tiny_emoji_ink_lora.safetensors"}},
        "2": {"class_type": "LCMKitLoadLoRA", "inputs": {"lora_name": "tiny_emoji_lcm_lora.safetensors"}},
        "3": {
            "class_type": "LCMKitCompareLoRA",
            "inputs": {"lora_1": ["1", 0], "lora_2": ["2", 0], "rank": 8} | {f"strength_{n}": 1.0 for n in range(1, 5)},
        },
    }
    outputs = client.run(graph)["3"]
    assert len(outputs["images"]) == 1
    assert "tiny_emoji_ink_lora and tiny_emoji_lcm_lora" in outputs["text"][0]


@pytest.mark.parametrize("off", [0, 1])
def test_a_lora_that_is_switched_off_is_left_out(loras, off):
    rest = [lora for n, lora in enumerate(loras) if n != off]
    left = compared([None if n == off else lora for n, lora in enumerate(loras)])
    assert left.result[1] == compared(rest).result[1]


def test_without_a_lora_it_says_what_to_connect():
    with pytest.raises(
        ValueError, match=r"^Compare LoRAs: No LoRA is connected, or all are switched off\. Connect one"
    ):
        compared([])
