"""Merge LoRAs and Apply LoRA beside ComfyUI's own loading of the same files, one after another."""

import pytest
import torch

from lcm_kit.tests.with_comfyui import tiny
from lcm_kit.tests.with_comfyui.lora_nodes import applied, assert_same_weights, by_comfyui, loaded, merged

pytestmark = pytest.mark.usefixtures("no_gradients")


@pytest.mark.parametrize("style", ["kohya", "kohya on ldm", "generic", "generic PEFT"])
@pytest.mark.parametrize("lcm", ["kohya", "kohya on ldm"])
def test_one_merged_lora_patches_as_the_two_do(model, style, lcm):
    style_lora = tiny.lora(model, style, endings=tiny.STYLE, rank=3, alpha=None if "PEFT" in style else 1.5, seed=1)
    lcm_lora = tiny.lora(model, lcm, rank=5, alpha=0.625, seed=2)
    one, report = merged((style_lora, 0.8), (lcm_lora, 1.0))
    assert "Exact" in report
    assert_same_weights(applied(model, one)[0], by_comfyui(model, (style_lora, 0.8), (lcm_lora, 1.0)))


def test_negative_strengths_and_six_loras_in_a_chain_of_merges(model):
    strengths = [1.0, -0.7, 0.3, 0.0, 2.0, -1.0]
    pairs = [(tiny.lora(model, "kohya", rank=2, seed=n), strength) for n, strength in enumerate(strengths)]
    chain = merged((merged(*pairs[:4])[0], 1.0), *pairs[4:])[0]
    assert_same_weights(applied(model, chain)[0], by_comfyui(model, *pairs))


def test_diffusers_attention_names_are_read_where_core_misses_them(model, put):
    """ComfyUI 0.30.0 knows `unet....attn1.processor.to_q`, which today's diffusers does not write."""
    tensors = tiny.lora(model, "diffusers PEFT", alpha=None, seed=3)
    ours = applied(model, loaded(put("peft.safetensors", tensors)))[0]
    expected = by_comfyui(model, (tiny.lora(model, "kohya", alpha=None, seed=3), 1.0))
    assert_same_weights(ours, expected)


def test_a_scale_that_stands_in_metadata_only_is_used(model, put):
    tensors = tiny.lora(model, "generic PEFT", rank=4, alpha=None, seed=3)
    name = put("peft.safetensors", tensors, {"lora_alpha": "2"})
    assert_same_weights(applied(model, loaded(name))[0], by_comfyui(model, (tensors, 0.5)))


def test_a_smaller_rank_is_reported_with_its_error(model):
    one, report = merged((tiny.lora(model, rank=4, seed=1), 1.0), (tiny.lora(model, rank=4, seed=2), 1.0), rank=6)
    assert "relative error" in report
    assert {t.shape[1] for k, t in one.items() if "lora_up" in k} == {6}


def test_empty_slots_are_left_out(model):
    pairs = [(tiny.lora(model, rank=1, seed=1), 1.0), (tiny.lora(model, rank=1, seed=2), 1.0)]
    expected = merged(*pairs)[0]
    again = merged(*pairs, (None, 5.0))[0]
    assert all(torch.equal(again[key], expected[key]) for key in expected)


def test_inputs_are_not_changed(model):
    lora = tiny.lora(model)
    before = {key: value.clone() for key, value in lora.items()}
    one, _ = merged((lora, 2.0), (lora, -1.0))
    applied(model, one)
    assert all(torch.equal(lora[key], before[key]) for key in before)


def test_loras_for_different_bases_do_not_merge(model, wide):
    with pytest.raises(ValueError, match="lora_2"):
        merged((tiny.lora(model), 1.0), (tiny.lora(wide), 1.0))


def test_a_merge_works_in_cores_own_lora_nodes(model):
    """LORA_MODEL is core's socket, so its nodes take what ours make."""
    from comfy_extras.nodes_train import LoraModelLoader

    one, _ = merged((tiny.lora(model, seed=1), 0.5), (tiny.lora(model, "generic", seed=2), 1.0))
    assert_same_weights(LoraModelLoader.execute(model, one, 1.0).result[0], applied(model, one)[0])
