"""The rows of published LoRAs: what a row says agrees with its file's own name, and with its preset."""

import re

import pytest

from lcm_kit.lora_merge.recognise.catalogue import PUBLISHED, Published, instead
from lcm_kit.samplers.presets import PRESETS

BY_NAME = {entry.name: entry for entry in PUBLISHED}
# What a file for any number of steps is called with a number for.
ANY_STEPS = ("Hyper-SD unified",)


@pytest.mark.parametrize("entry", PUBLISHED, ids=lambda entry: f"{entry.name} {entry.sha256[:4]}")
def test_a_file_is_called_by_the_steps_and_the_base_that_its_row_says(entry):
    steps = re.search(r"(\d+)_?steps?(?![a-z])", entry.file.lower())
    if steps and entry.preset not in ANY_STEPS:
        assert int(steps[1]) == (entry.steps or PRESETS[entry.preset].steps)
    words = entry.file.lower().replace("_", "-")
    if entry.repository in ("ByteDance/Hyper-SD", "wangfuyun/PCM_Weights", "ByteDance/SDXL-Lightning"):
        assert ("sdxl" in words, "sd15" in words) == (entry.base == "SDXL", entry.base == "SD1.5")
    else:
        assert "sd15" not in words
    assert entry.file.endswith(".safetensors")
    assert entry.link == f"https://huggingface.co/{entry.repository}"
    assert re.fullmatch(r"[\w.-]+/[\w.-]+", entry.repository)


def rows(*beginnings):
    return [entry for entry in PUBLISHED if entry.name.startswith(beginnings)]


def test_the_official_lcm_loras_state_what_was_counted():
    found = [entry for entry in rows("LCM-LoRA") if "copy" not in entry.name]
    assert [entry.base for entry in found] == ["SD1.5", "SDXL", "SSD-1B"]
    for entry in found:
        assert entry.name == f"LCM-LoRA {entry.base}"
        assert (entry.preset, entry.rank, entry.alpha) == ("LCM", 64, 8.0)
        assert entry.repository == f"latent-consistency/lcm-lora-{entry.base.lower().replace('sd1.5', 'sdv1-5')}"
        if entry.bytes is not None:  # two bytes a value, and a header
            assert 0 < entry.bytes - 2 * entry.parameters < 1e-3 * entry.bytes + 2e5
    for entry in PUBLISHED:
        if entry not in found:
            assert (entry.modules, entry.rank, entry.alpha, entry.parameters) == (None,) * 4


def test_sizes_are_stated_where_the_repository_states_them():
    """Of one base and kind all files of a repository have one size: the same modules, rank and dtype."""
    assert {e.bytes for e in rows("Hyper-SDXL") if e.name.endswith("CFG")} == {825_798_408}
    assert {e.name: e.bytes for e in rows("Hyper-SDXL") if not e.name.endswith("CFG")} == {
        "Hyper-SDXL 1step": None, "Hyper-SDXL 2steps": None, "Hyper-SDXL 4steps": 787_359_648, "Hyper-SDXL 8steps": 787_359_648
    }  # fmt: skip
    for entry in rows("Qwen-Image", "lightx2v"):
        assert (entry.bytes is None) != (entry.about is None)
        assert entry.steps in (4, 8)
    for entry in rows("Qwen-Image"):
        # float32 is twice as large as bfloat16; two files do not say which they are, and are as large as float32.
        size = 849_608_296 if "bf16" in entry.name else 1_698_951_104
        assert entry.bytes == size or abs(entry.about - size) < 0.01 * size
        assert (entry.preset, entry.steps) == (
            f"Qwen-Image-Lightning {entry.steps} steps",
            int(entry.name.split("-Lightning-")[1][0]),
        )
    halves = [(e.base, e.expert) for e in rows("lightx2v Wan 2.2")]
    assert set(halves) == {("Wan 2.1/2.2 14B", "high"), ("Wan 2.1/2.2 14B", "low")}
    for entry in rows("lightx2v"):
        assert entry.steps == 4
        noise = re.search(r"(high|low) noise", entry.name.split("(")[0])
        assert entry.expert == (noise[1] if noise else None)
        assert entry.preset == ("Wan 2.2 lightx2v" if noise else "Wan 2.1 lightx2v")
        for rank in re.findall(r"rank[ _]?(\d+)", entry.file.lower()):
            if "rank" in entry.name:
                assert f"rank {rank}" in entry.name


def test_the_rows_of_phased_models_are_told_by_base_and_kind():
    found = rows("PCM")
    assert {(e.base, e.preset) for e in found if e.base == "SD1.5"} == {
        ("SD1.5", e.preset) for e in found if e.base == "SDXL"
    }
    for entry in found:
        kind = entry.name.removeprefix(f"PCM {entry.base} ")
        assert entry.file == "{0}/pcm_{0}_{1}_converted.safetensors".format(
            {"SD1.5": "sd15", "SDXL": "sdxl"}[entry.base], kind.replace(" ", "_")
        )
        assert entry.preset.replace(" ", "").replace("steps", "step") == f"PCM{kind}".replace(" ", "").replace(
            "lcmlikelora", "LCM-like"
        )


EXACT = Published("a", "SD1.5", "LCM", "0" * 64, "b/c", bytes=1000, about=7)
ROUNDED = Published("a", "SD1.5", "LCM", "0" * 64, "b/c", about=1000)
UNKNOWN = Published("a", "SD1.5", "LCM", "0" * 64, "b/c")


@pytest.mark.parametrize(
    ("row", "sizes"),
    [
        (EXACT, {1000: True, 999: False, 1001: False, 7: False}),
        (ROUNDED, {1000: True, 990: True, 1010: True, 989: False, 1011: False}),
        (UNKNOWN, {1000: None, 0: None}),
    ],
)
def test_a_rounded_size_is_that_of_a_file_within_a_hundredth(row, sizes):
    assert {size: row.may_have(size) for size in sizes} == sizes


def test_instead_of_a_file_for_another_base_comes_that_of_the_same_preset_or_the_lcm_lora():
    assert instead("SDXL", "Hyper-SD 4 steps").name == "Hyper-SDXL 4steps"
    assert instead("SD1.5", "Hyper-SD 4 steps").name == "Hyper-SD15 4steps"
    for preset in ("Lightning 4 steps", "LCM", None, "nonsense"):
        assert instead("SD1.5", preset).name == "LCM-LoRA SD1.5"
    assert instead("Wan 2.1/2.2 14B", "LCM") is None
    assert instead("SDXL", "LCM", [UNKNOWN]) is None
    assert instead("SD1.5", "x", [UNKNOWN]) is UNKNOWN
