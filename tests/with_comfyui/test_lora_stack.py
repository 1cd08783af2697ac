"""LORA_STACKs of other packs, and files that are not there or broken."""

import comfy.sd
import comfy.utils
import pytest
import safetensors.torch

from lcm_kit.nodes.loading import LCMLoader
from lcm_kit.tests.helpers import as_read
from lcm_kit.tests.with_comfyui import tiny
from lcm_kit.tests.with_comfyui.lora_nodes import assert_same_weights, by_comfyui, loaded

pytestmark = pytest.mark.usefixtures("no_gradients")


# ---- a stack of LoRAs from another pack


def test_a_lora_stack_is_applied_before_the_lcm_lora(model, put):
    clip = tiny.tiny_clip()
    style = tiny.lora(model, endings=tiny.STYLE, seed=1) | tiny.clip_lora(clip)
    other, lcm = tiny.lora(model, rank=2, seed=2), tiny.lora(model, seed=3)
    put("style.safetensors", style)
    put("other.safetensors", other)
    stack = [("style.safetensors", 0.8, 0.5), ("other.safetensors", -0.3, 0.0), ("None", 1.0, 1.0)]
    result = LCMLoader.execute(model, put("lcm.safetensors", lcm), 1.0, "refuse", clip, stack).result
    assert_same_weights(result[0], by_comfyui(model, (style, 0.8), (other, -0.3), (lcm, 1.0)))
    _, expected_clip = comfy.sd.load_lora_for_models(model, clip, dict(style), 0.8, 0.5)
    assert_same_weights(result[1].patcher, expected_clip.patcher)
    assert result[6].startswith("lcm.safetensors: ")
    lines = as_read(result[6]).splitlines()
    assert any(line.startswith("style.safetensors: ") and "strength 0.8 (text encoder 0.5)" in line for line in lines)
    assert any(line.startswith("other.safetensors: ") for line in lines)


@pytest.mark.parametrize("stack", [None, [], (), [["None", 1, 1], (None, 1.0, 1.0)]])
def test_an_empty_stack_changes_nothing(model, put, stack):
    lcm = tiny.lora(model)
    result = LCMLoader.execute(model, put("lcm.safetensors", lcm), 1.0, "refuse", None, stack).result
    assert_same_weights(result[0], by_comfyui(model, (lcm, 1.0)))


@pytest.mark.parametrize(
    ("stack", "message"),
    [
        (
            "style.safetensors",
            r"lora_stack is 'style\.safetensors', but .* a LORA_STACK, a list of \(file name .*stacker node",
        ),
        ({"a": 1}, r"lora_stack is a dict of 1 entry, but"),
        ([("style.safetensors", 1.0)], r"entry 1 is \('style\.safetensors', 1\.0\), but a LORA_STACK is a list of"),
        (["style.safetensors"], r"entry 1 is 'style\.safetensors', but"),
        ([("lcm.safetensors", 1.0, 1.0), (7, 1.0, 1.0)], r"entry 2 names its file by 7, but"),
        (
            [("style.safetensors", "much", 1.0)],
            r"entry 1 \('style\.safetensors'\) has strengths \['much', 1\.0\], .*finite numbers",
        ),
        ([("style.safetensors", float("nan"), 1.0)], r"has strengths \[nan, 1\.0\]"),
        ([("style.safetensors", 1.0, float("inf"))], r"has strengths \[1\.0, inf\]"),
        (
            [("gone.safetensors", 1.0, 1.0)],
            r"lora_stack: 'gone\.safetensors' is not in the loras folder.*extra_model_paths\.yaml",
        ),
        ([("/gone/there.safetensors", 1.0, 1.0)], r"lora_stack: '/gone/there\.safetensors' is not in the loras folder"),
    ],
)
def test_a_wrong_stack_is_named(model, put, stack, message):
    name = put("lcm.safetensors", tiny.lora(model))
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        LCMLoader.execute(model, name, 1.0, "refuse", None, stack)
    assert model.patches == {}


def test_a_stack_may_name_a_file_by_its_path(model, put, tmp_path):
    """As Lora-Manager does for a folder that ComfyUI does not know."""
    style, lcm = tiny.lora(model, endings=tiny.STYLE, seed=1), tiny.lora(model, seed=3)
    path = tmp_path / "style.safetensors"
    safetensors.torch.save_file(style, path)
    result = LCMLoader.execute(
        model, put("lcm.safetensors", lcm), 1.0, "refuse", None, [(str(path), 0.8, 0.5)]
    ).result  # fmt: skip
    assert_same_weights(result[0], by_comfyui(model, (style, 0.8), (lcm, 1.0)))
    assert any(line.startswith("style.safetensors: ") for line in result[6].splitlines())
    assert str(tmp_path) not in result[6]
    pickle = tmp_path / "style.pt"
    pickle.write_bytes(path.read_bytes())
    with pytest.raises(ValueError, match=r"lora_stack: .* is not in the loras folder"):
        LCMLoader.execute(model, "lcm.safetensors", 1.0, "refuse", None, [(str(pickle), 1.0, 1.0)])


def test_a_stacked_lora_for_another_base_is_refused(model, wide, put):
    put("wide.safetensors", tiny.lora(wide))
    with pytest.raises(ValueError, match=r"wide\.safetensors does not fit this model"):
        LCMLoader.execute(model, put("lcm.safetensors", tiny.lora(model)), 1.0, "refuse", None, [("wide.safetensors", 1.0, 1.0)])  # fmt: skip


# ---- bad files


def test_a_missing_file_is_named(loras_folder):
    with pytest.raises(ValueError, match=r"lora_name: 'gone\.safetensors' is not in the loras folder.*press R"):
        loaded("gone.safetensors")


def test_a_truncated_file_is_named(model, put, loras_folder):
    name = put("cut.safetensors", tiny.lora(model))
    path = loras_folder / name
    path.write_bytes(path.read_bytes()[:-1000])
    for node in (lambda: loaded(name), lambda: LCMLoader.execute(model, name, 1.0, "refuse")):
        with pytest.raises(ValueError, match=r"cut\.safetensors: is cut off: .*download it again"):
            node()
