"""LoRAs of another base, and of a text encoder that is not there."""

import logging

import comfy.sd
import comfy.utils
import pytest
import torch

from lcm_kit.nodes.loading import ApplyLoRA, LCMLoader
from lcm_kit.tests.with_comfyui import tiny
from lcm_kit.tests.with_comfyui.lora_nodes import applied, assert_same_weights, by_comfyui, loaded

pytestmark = pytest.mark.usefixtures("no_gradients")


# ---- wrong base


@pytest.fixture(scope="module")
def deep():
    """Another base: more transformer blocks, so more modules."""
    return tiny.tiny_model(transformer_depth=[1, 1, 3, 3], transformer_depth_output=[1, 1, 1, 3, 3, 3])


def test_another_shape_is_refused_with_counts(model, wide, put):
    total = len(tiny.modules(model))
    wrong = sum(name.endswith(("attn2.to_k", "attn2.to_v")) for name, _, _ in tiny.modules(model))
    name = put("wide.safetensors", tiny.lora(wide))
    message = rf"wide\.safetensors does not fit this model \(TinyConfig\): of its {total} modules {total - wrong} fit, "
    message += rf"{wrong} have another shape .*\(\d+, 24\) on a weight of \(\d+, 16\)\).*made for another base model"
    with pytest.raises(ValueError, match=message):
        LCMLoader.execute(model, name, 1.0, "refuse")
    with pytest.raises(ValueError, match=message):
        applied(model, loaded(name))


def test_modules_without_a_place_are_refused_by_the_lcm_loader(model, deep, put):
    extra = len(tiny.modules(deep)) - len(tiny.modules(model))
    name = put("deep.safetensors", tiny.lora(deep))
    with pytest.raises(ValueError, match=rf"modules {len(tiny.modules(model))} fit, {extra} have no place"):
        LCMLoader.execute(model, name, 1.0, "refuse")


def test_a_lora_that_leaves_much_of_the_model_alone_is_refused_by_the_lcm_loader(model, deep, put):
    """As SSD-1B's on SDXL, on models that have no name: everything in it fits."""
    name = put("shallow.safetensors", tiny.lora(model))
    few, all_of_them = len(tiny.modules(model)), len(tiny.modules(deep))
    message = (
        rf"of its {few} modules {few} fit, {all_of_them - few} of the model's {all_of_them} modules of these kinds"
    )
    with pytest.raises(ValueError, match=message):
        LCMLoader.execute(deep, name, 1.0, "refuse")
    assert "pictures may be spoilt" in LCMLoader.execute(deep, name, 1.0, "warn").result[6]
    # not by the node for any LoRA: nobody says that a style has to cover the model
    assert len(applied(deep, loaded(name))[0].patches) == few


def test_apply_can_be_told_to_apply_what_fits(model, wide):
    fitting = {k: v for k, v in tiny.lora(wide).items() if "attn2_to_k" not in k and "attn2_to_v" not in k}
    changed, _, report = ApplyLoRA.execute(model, tiny.lora(wide), 1.0, 1.0, wrong_base="warn").result
    assert_same_weights(changed, by_comfyui(model, (fitting, 1.0)))
    assert "have another shape than this model's weights" in report


def test_warn_applies_what_fits_and_says_what_does_not(model, wide, put, caplog):
    caplog.set_level(logging.WARNING)
    result = LCMLoader.execute(model, put("wide.safetensors", tiny.lora(wide, seed=4)), 1.0, "warn").result
    assert "have another shape than this model's weights" in result[6]
    assert "have another shape than this model's weights" in caplog.text
    fitting = {
        key: value
        for key, value in tiny.lora(wide, seed=4).items()
        if "attn2_to_k" not in key and "attn2_to_v" not in key
    }
    assert_same_weights(result[0], by_comfyui(model, (fitting, 1.0)))
    assert "ERROR lora" not in caplog.text


def test_a_few_modules_without_a_place_are_named_by_apply(model, caplog):
    lora = tiny.lora(model)
    stray = {key.replace("lora_unet_mid_block_attentions_0_proj_in", "lora_unet_stray"): lora[key] for key in lora}
    report = applied(model, stray)[2]
    total = len(tiny.modules(model))
    assert f"{total - 1} of {total} modules applied" in report
    assert "1 has no place in this model: lora_unet_stray." in report
    assert "lora_unet_stray" in caplog.text


def test_a_lora_for_something_else_is_refused_by_apply(model):
    lora = {
        "transformer.blocks.0.attn.lora_up.weight": torch.ones(8, 1),
        "transformer.blocks.0.attn.lora_down.weight": torch.ones(1, 8),
    }
    with pytest.raises(ValueError, match=r"of its 1 module 0 fit, 1 has no place in it .*transformer\.blocks\.0\.attn"):
        applied(model, lora)


@pytest.mark.parametrize(("module", "has_bias"), [("to_q", False), ("to_out.0", True)])
def test_a_bias_that_the_model_lacks_has_no_place(model, module, has_bias):
    name = f"diffusion_model.input_blocks.1.1.transformer_blocks.0.attn1.{module}"
    lora = tiny.lora(model, "generic") | {f"{name}.diff_b": torch.ones(32)}
    changed, _, report = applied(model, lora)
    assert (f"1 has no place in this model: {name}." in report) is not has_bias
    assert (f"{name}.bias" in changed.patches) is has_bias


def test_one_weight_named_by_two_modules_is_refused(model):
    lora = tiny.lora(model, "kohya") | tiny.lora(model, "kohya on ldm")
    with pytest.raises(ValueError, match=r"names a weight twice: .* and .*, and \d+ pairs? more"):
        applied(model, lora)


# ---- text encoder


def test_text_encoder_modules_need_a_clip_and_say_so(model):
    clip = tiny.tiny_clip()
    lora = tiny.lora(model, endings=tiny.STYLE) | tiny.clip_lora(clip)
    without, _, report = applied(model, lora)
    assert "8 text-encoder modules not applied: no CLIP is connected" in report
    changed, changed_clip, report = applied(model, lora, clip, strength_model=0.5, strength_clip=2.0)
    assert "not applied" not in report
    expected, expected_clip = comfy.sd.load_lora_for_models(model, clip, dict(lora), 0.5, 2.0)
    assert_same_weights(changed, expected)
    assert_same_weights(changed_clip.patcher, expected_clip.patcher)
    assert len(changed_clip.patcher.patches) == 8
    assert clip.patcher.patches == {}
    assert without.patches.keys() == changed.patches.keys()


def test_a_lora_for_the_text_encoder_alone_asks_for_a_clip(model):
    with pytest.raises(ValueError, match=r"changes the text encoder only \(8 modules\)\. Connect a CLIP"):
        applied(model, tiny.clip_lora(tiny.tiny_clip()))


def test_a_lora_without_text_encoder_passes_the_clip_through(model):
    clip = tiny.tiny_clip()
    assert applied(model, tiny.lora(model), clip)[1] is clip
