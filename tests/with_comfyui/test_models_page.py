"""docs/models.md: its table says what the tables of the code and the tests beside this one say."""

import re

import pytest

from lcm_kit.host.sampling.negative.families import FAMILIES as NEGATIVE
from lcm_kit.samplers.presets import PRESETS
from lcm_kit.tests.helpers import ROOT
from lcm_kit.tests.with_comfyui import dits
from lcm_kit.tests.with_comfyui.test_families import DISTILLED, TRAINED
from lcm_kit.tests.with_comfyui.test_own_naming import family
from lcm_kit.tests.with_comfyui.test_saved_formats import BOTH, NOT_IN_BOTH, TRUE_WIDTH

LINES = (ROOT / "docs" / "models.md").read_text(encoding="utf-8").splitlines()
HEAD = ["model", "LoRA", "saved", "presets", "negative", "distil"]


def cells(line):
    return [cell.strip() for cell in line.strip("|").split("|")]


def table():
    """Model of dits.MODELS -> its row."""
    start = next(number for number, line in enumerate(LINES) if cells(line) == HEAD)
    rows = []
    for line in LINES[start + 2 :]:
        if not line.startswith("|"):
            break
        rows.append(dict(zip(HEAD, cells(line), strict=True)))
    named = {}
    for row in rows:
        for name in row["model"].split(", "):
            if name in dits.MODELS:
                assert name not in named
                named[name] = row
    return named


def squashed(text):
    return re.sub(r"\W", "", text).lower()


# What presets call a model, where they do not call it as the table does.
IN_PRESETS = {"HunyuanVideo": "fasthunyuan", "Cosmos Predict 2": "cosmos"}


def presets_of(name):
    """Those made for a model; of two models whose names begin alike those of the longer name are that one's."""
    keys = {model: IN_PRESETS.get(model, squashed(model)) for model in dits.MODELS}

    def is_made_for(part):
        fitting = [key for key in keys.values() if squashed(part).startswith(key)]
        return keys[name] in fitting and len(keys[name]) == max(map(len, fitting))

    return [one for one in PRESETS.values() if one.flow and any(map(is_made_for, one.models.split(", ")))]


def test_every_model_has_a_row():
    assert table().keys() == dits.MODELS.keys()


@pytest.mark.parametrize("name", dits.KNOWN)
def test_what_a_saved_file_is_called(name):
    known = family(name)
    names = {"diffusers": "diffusers' names", "comfy": "ComfyUI's names"}[known.saved]
    # A variant is read as the model that it is one of.
    whose = {"Wan I2V": "Wan", "Wan VACE": "Wan", "SD3.5 medium": "SD3"}.get(name, name)
    both = ", both" if whose in {*BOTH} - NOT_IN_BOTH or whose in TRUE_WIDTH else ""
    said, _, fused = table()[name]["saved"].partition("; ")
    assert said.startswith(f"{names}{both}")
    assert both or "both" not in said
    if fused:
        assert known.saved == "diffusers"
        also = ", both" if name in TRUE_WIDTH else ""
        assert fused == f"fused weights as {'kohya' if known.saved_fused == 'kohya' else 'ComfyUI'}'s{also}"


@pytest.mark.parametrize("name", dits.MODELS)
def test_whether_a_negative_prompt_works(name):
    _, module, cls, *_ = dits.MODELS[name]
    said = table()[name]["negative"]
    # SD3's class is derived from the one here.
    known = f"{module}.{cls}" in NEGATIVE or (module, cls) == ("modules.diffusionmodules.mmdit", "MMDiT")
    assert said.startswith("yes") if known else said == "refused by name"


@pytest.mark.parametrize("name", dits.MODELS)
def test_whether_it_was_trained(name):
    rows = table()
    said = rows[name]["distil"]
    others = [other for other, row in rows.items() if row is rows[name]]
    trained = any(other in {*DISTILLED, *TRAINED} for other in others)
    assert said == ("yes" if trained else "")


@pytest.mark.parametrize("name", dits.MODELS)
def test_which_presets_there_are(name):
    """Every word stands for a preset that is made for a model of the row, and every such preset is told by a word."""
    rows = table()
    others = [other for other, row in rows.items() if row is rows[name]]
    presets = {preset.name: preset for other in others for preset in presets_of(other)}
    told = [word.removesuffix("s") for word in re.split(r", | and ", rows[name]["presets"]) if word]
    experts = [word for word in told if word.startswith("two expert")]
    assert bool(experts) == any(preset.first_expert for preset in presets.values())
    words = [word for word in told if word not in experts]
    found = {word: {n for n, one in presets.items() if squashed(word) in squashed(n + one.models)} for word in words}
    assert all(found.values()), found
    assert set().union(*found.values()) == presets.keys()


def test_which_presets_there_are_for_stable_diffusion():
    told = next(cells(line)[3] for line in LINES if line.startswith("| SD 1.x")).split(", ")
    of_unets = [one.name for one in PRESETS.values() if one.models.startswith(("SD", "SDXL")) and not one.flow]
    assert all(any(squashed(word) in squashed(name) for name in of_unets) for word in told)
    assert all(any(squashed(word) in squashed(name) for word in told) for name in of_unets)


@pytest.mark.parametrize("name", dits.KNOWN)
def test_whose_loras_are_understood(name):
    assert family(name) is not None
    assert table()[name]["LoRA"].startswith("yes")
