"""LCM Grid on the embedded model: every cell is the picture that the single nodes make."""

import json

import comfy.model_management
import comfy.utils
import pytest
import torch
from PIL import Image

from lcm_kit.host.grid import grid as grids
from lcm_kit.host.grid.sheet import Sheet, cell_size
from lcm_kit.host.lora import patches
from lcm_kit.nodes.grid import LCMGrid
from lcm_kit.nodes.sampling import LCMKSampler
from lcm_kit.samplers.presets import PRESETS
from lcm_kit.tests.with_comfyui.conftest import DEMO_MODELS

pytestmark = pytest.mark.usefixtures("no_gradients")
PROMPT = "cat face"


@pytest.fixture
def parts(tiny_emoji, tiny_emoji_lcm, vae, monkeypatch):
    monkeypatch.setattr(grids, "_kept", [])
    clip = tiny_emoji[1]
    lora = comfy.utils.load_torch_file(str(DEMO_MODELS / "loras" / "tiny_emoji_ink_lora.safetensors"))
    return {
        "model": tiny_emoji_lcm,
        "positive": clip.encode_from_tokens_scheduled(clip.tokenize(PROMPT)),
        "latent_image": {"samples": torch.zeros(1, 12, 8, 8)},
        "vae": vae,
        "lora": lora,
    }


def make(parts, row_axis="strength of lora", rows="0, 1", column_axis="steps", columns="1, 2", **more):
    inputs = {"seed": 3, "steps": 4, "cfg": 1.0} | more
    return LCMGrid.execute(**parts | inputs, row_axis=row_axis, rows=rows, column_axis=column_axis, columns=columns)


def alone(parts, *, strength=None, positive=None, **changed):
    """The picture of one cell by the nodes that stand for it."""
    model = parts["model"]
    if strength is not None:
        model = patches.apply(model, None, parts["lora"], strength, 1.0).model
    inputs = {
        "seed": 3, "steps": 4, "cfg": 1.0, "denoise": 1.0, "gamma": 1.0, "cfg_steps": -1, "original_steps": 50,
    } | changed  # fmt: skip
    latent = LCMKSampler.execute(
        model=model, positive=positive or parts["positive"], latent_image=parts["latent_image"], **inputs
    ).result[0]
    return parts["vae"].decode(latent["samples"])[:1]


def test_a_cell_is_the_picture_made_alone(parts):
    sheet, pictures, settings, report = make(parts).result
    assert settings == ["x 0, 1 step", "x 0, 2 steps", "x 1, 1 step", "x 1, 2 steps"]
    for picture, (strength, steps) in zip(pictures, [(0, 1), (0, 2), (1, 1), (1, 2)], strict=True):
        assert torch.equal(picture, alone(parts, strength=strength, steps=steps))
    assert report.startswith("4 cells, strength of lora by steps: 4 made in ")
    assert sheet.shape[0] == 1
    assert sheet.shape[3] == 3
    assert 0 <= float(sheet.min())
    assert float(sheet.max()) <= 1


@pytest.mark.parametrize(
    ("axis", "values", "changed"),
    [
        ("seed", "3, 18446744073709551615", [{"seed": 3}, {"seed": 2**64 - 1}]),
        ("gamma", "0, 1", [{"gamma": 0.0}, {"gamma": 1.0}]),
        ("denoise", "1:0.5:-0.5", [{"denoise": 1.0}, {"denoise": 0.5}]),
        ("preset", "LCM, TCD", [{"preset": PRESETS["LCM"]}, {"preset": PRESETS["TCD"]}]),
        ("nothing", "", [{}]),
    ],
)
def test_every_setting_can_be_varied(parts, axis, values, changed):
    parts.pop("lora")
    pictures = make(parts, row_axis="nothing", column_axis=axis, columns=values).result[1]
    for picture, one in zip(pictures, changed, strict=True):
        assert torch.equal(picture, alone(parts, **one))


def test_prompt_words_are_replaced_and_the_lora_is_on_the_text_too(parts, tiny_emoji):
    clip = tiny_emoji[1]
    parts = parts | {"clip": clip, "positive": None}
    words = make(parts, row_axis="prompt words", rows="cat, dog", columns="2", prompt=PROMPT).result[1]
    for picture, text in zip(words, ["cat face", "dog face"], strict=True):
        other = clip.encode_from_tokens_scheduled(clip.tokenize(text))
        assert torch.equal(picture, alone(parts, strength=1.0, steps=2, positive=other))
    assert not torch.equal(*words)


def test_an_axis_replaces_the_number_of_the_preset(parts):
    preset = PRESETS["TCD"]
    pictures = make(parts, row_axis="gamma", rows="0, 1", preset=preset, columns="2").result[1]
    for picture, gamma in zip(pictures, [0.0, 1.0], strict=True):
        assert torch.equal(picture, alone(parts, strength=1.0, steps=2, gamma=gamma))


def test_cells_are_made_once_while_the_same_things_are_connected(parts):
    first = make(parts).result
    wider = make(parts, columns="1, 2, 3").result
    assert "2 made in" in wider[3]
    assert "4 known from before" in wider[3]
    assert wider[1][0] is first[1][0]
    assert wider[1][1] is first[1][1]
    assert "0 made in" in make(parts).result[3]
    # Another model, if equal, may have another patch on it.
    assert "4 made in" in make(parts | {"model": parts["model"].clone()}).result[3]
    assert "4 made in" in make(parts, seed=4).result[3]


def test_a_model_that_is_gone_is_no_other_model(parts):
    gone = parts["model"].clone()
    make(parts | {"model": gone})
    kept = grids._kept[-1]
    del gone
    comfy.model_management.cleanup_models_gc()
    assert kept.parts[0]() in (grids._GONE, None) or kept.parts[0]() is not parts["model"]
    assert "4 made in" in make(parts).result[3]


def test_an_interrupt_keeps_what_is_done(parts, monkeypatch):
    calls = []
    real = grids.sample

    def third_one_is_stopped(*args, **keywords):
        calls.append(1)
        if len(calls) == 3:
            raise comfy.model_management.InterruptProcessingException
        return real(*args, **keywords)

    monkeypatch.setattr(grids, "sample", third_one_is_stopped)
    with pytest.raises(comfy.model_management.InterruptProcessingException):
        make(parts)
    monkeypatch.setattr(grids, "sample", real)
    assert "2 made in" in make(parts).result[3]


def test_a_cell_that_cannot_be_is_told_and_the_others_are_made(parts):
    _, pictures, settings, report = make(parts, row_axis="preset", rows="LCM, Lightning 4 steps", columns="2, 4").result
    assert settings == ["LCM, 2 steps", "LCM, 4 steps", "Lightning 4 steps, 4 steps"]
    assert len(pictures) == 3
    assert "1 not possible" in report
    assert "Not made: Lightning 4 steps, 2 steps." in report
    with pytest.raises(ValueError, match="No cell could be made"):
        make(parts, row_axis="preset", rows="Lightning 4 steps", columns="2")


@pytest.mark.parametrize(
    ("changed", "word"),
    [
        ({"lora": None}, "no lora is connected"),
        ({"row_axis": "steps", "rows": "1"}, "both vary steps"),
        ({"row_axis": "prompt words", "rows": "cat, dog"}, "Connect clip"),
        ({"positive": None}, "no prompt"),
        (
            {"row_axis": "prompt words", "rows": f"cat, {'w' * 99_999}", "prompt": PROMPT, "clip": True},
            "at most 100,000",
        ),
        ({"rows": "0, x"}, "'x' is no number"),
    ],
)
def test_what_is_missing_is_said_before_anything_is_made(parts, changed, word, monkeypatch):
    monkeypatch.setattr(grids, "sample", None)
    with pytest.raises(ValueError, match=word):
        make(parts | {key: value for key, value in changed.items() if key in parts}, **{
            key: value for key, value in changed.items() if key not in parts
        })  # fmt: skip


def test_the_settings_are_in_the_file(parts, tmp_path, monkeypatch):
    import folder_paths

    monkeypatch.setattr(folder_paths, "get_temp_directory", lambda: str(tmp_path))
    shown = make(parts).ui
    assert shown["text"][0].startswith("4 cells")
    with Image.open(tmp_path / shown["images"][0]["filename"]) as file:
        about = json.loads(file.text["lcm_kit.grid"])
    assert about["rows"] == {"setting": "strength of lora", "values": [0.0, 1.0]}
    assert about["columns"] == {"setting": "steps", "values": [1, 2]}
    assert about["all"]["seed"] == 3


@pytest.mark.parametrize(("rows", "columns", "size"), [(1, 1, (64, 64)), (64, 16, (1024, 512)), (3, 5, (20, 4000))])
def test_a_sheet_is_never_too_large_and_labels_stay_inside(rows, columns, size):
    cell = cell_size(size, 512, rows, columns)
    sheet = Sheet(["a very long label " * 9] * rows, ["another long label " * 9] * columns, cell)
    assert max(sheet.image.size) <= 16384
    assert min(cell) >= 1
    assert max(sheet.small().size) <= 1024
