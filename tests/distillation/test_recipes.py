"""Recipes: settings that are there and fit each other, and that give way to what somebody sets."""

from dataclasses import asdict, fields, replace

import pytest

from lcm_kit.distillation.recipes import NONE, RECIPES, followed, set_otherwise
from lcm_kit.distillation.settings import Settings, Setup
from lcm_kit.host.training.report import rate_words, recipe_words
from lcm_kit.launch.options import parsed
from lcm_kit.launch.run import _settings, _setup

DEFAULTS = asdict(Settings()) | asdict(Setup())
LEAST = ["--checkpoint", "model.safetensors", "--prompts", "captions.txt", "-o", "lora.safetensors"]
TOLD = [name for name in RECIPES if name != NONE]


def of(owner, settings):
    return {one.name: settings[one.name] for one in fields(owner) if one.name in settings}


@pytest.mark.parametrize("name", RECIPES)
def test_its_settings_are_there_fit_each_other_and_differ_from_what_they_replace(name):
    wanted = dict(RECIPES[name].settings)
    settings, setup = of(Settings, wanted), of(Setup, wanted)
    assert settings.keys() | setup.keys() == wanted.keys()
    assert Settings(**settings).grid(1000)
    assert Setup(**setup)
    assert rate_words(Settings(**settings)) == []


@pytest.mark.parametrize("name", RECIPES)
def test_it_sets_what_was_left_and_nothing_else(name):
    settings, own = followed(name, DEFAULTS, DEFAULTS)
    said = recipe_words(name, own)
    assert settings == DEFAULTS | RECIPES[name].settings
    assert all(f"{key} {value}" in said for key, value in RECIPES[name].settings.items())
    assert bool(said) == (name != NONE)


@pytest.mark.parametrize("name", TOLD)
def test_what_somebody_sets_stays_and_is_told(name):
    for key, value in RECIPES[name].settings.items():
        own = "x0" if isinstance(value, str) else value + 8
        if own == DEFAULTS[key]:
            continue
        settings, kept = followed(name, DEFAULTS | {key: own}, DEFAULTS)
        assert settings == DEFAULTS | RECIPES[name].settings | {key: own}
        assert f"Set by you: {key} {own}." in recipe_words(name, kept)


def test_an_unknown_one_is_refused_with_those_there_are():
    with pytest.raises(ValueError, match="recipe is 'SD3'; it has to be one of none, try it"):
        followed("SD3", DEFAULTS, DEFAULTS)


@pytest.mark.parametrize("name", RECIPES)
def test_the_command_takes_the_same(name):
    options = parsed([*LEAST, "--recipe", name])
    assert _settings(options) == replace(Settings(), **of(Settings, RECIPES[name].settings))
    assert _setup(options) == replace(Setup(), **of(Setup, RECIPES[name].settings))


@pytest.mark.parametrize("name", RECIPES)
def test_the_command_tells_it_in_the_nodes_words(name):
    flags = {"rank": 7, "learning_rate": 0.5, "skip": 25}
    options = vars(
        parsed([*LEAST, "--recipe", name, *(f"--{key.replace('_', '-')}={value}" for key, value in flags.items())])
    )
    assert set_otherwise(name, options) == followed(name, DEFAULTS | flags, DEFAULTS)[1]


@pytest.mark.parametrize("order", [1, -1])
def test_on_the_command_line_a_flag_holds_even_where_it_says_the_default(order):
    words = [["--recipe", "accelerate this style"], ["--phases", "1"], ["--skip", "20"]][::order]
    settings = _settings(parsed([*LEAST, *(word for pair in words for word in pair)]))
    assert (settings.phases, settings.skip, settings.steps) == (1, 20, 600)
