"""The settings of published few-step models."""

import math
import re
from dataclasses import replace

import numpy as np
import pytest
import torch

from lcm_kit.samplers.preset import Preset
from lcm_kit.samplers.preset_words import describe, needs_in_words, settings_in_words
from lcm_kit.samplers.presets import PRESETS, shifted_levels, trailing_timesteps, trigflow_levels
from lcm_kit.samplers.renoise import gamma_per_step
from lcm_kit.samplers.schedule import lcm_timesteps
from lcm_kit.tests.samplers.toy import diffusers

FLOW_TABLE = torch.arange(1, 1001) / 1000


OF_STABLE_DIFFUSION = [name for name, preset in PRESETS.items() if not preset.flow]


@pytest.mark.parametrize("name", PRESETS)
def test_every_preset_says_what_it_is_for_and_where_it_is_from(name):
    preset = PRESETS[name]
    assert preset.name == name
    assert gamma_per_step(preset.gamma, preset.steps)
    assert preset.cfg >= 1
    assert preset.models
    assert preset.sampler
    assert preset.source
    assert re.fullmatch(r"202\d-(0[1-9]|1[0-2])", preset.date)
    # The first two digits of an arXiv number are its year, the next two its month: not after the source's date.
    for year, month in re.findall(r"arXiv (\d\d)(\d\d)\.\d{5}", preset.source):
        assert f"20{year}-{month}" <= preset.date
    assert 0 <= preset.first_expert < preset.steps
    assert not (preset.sigmas and preset.timesteps)
    assert preset.flow or not (preset.sigmas or preset.shift)


@pytest.mark.parametrize("name", OF_STABLE_DIFFUSION)
def test_a_preset_of_stable_diffusion_has_a_schedule_as_long_as_its_steps(name):
    preset = PRESETS[name]
    timesteps = preset.schedule()
    assert len(timesteps) == preset.steps
    assert timesteps == sorted(timesteps, reverse=True)
    assert "arXiv" in preset.source


@pytest.mark.parametrize("name", PRESETS)
@pytest.mark.parametrize("strength", [0.02, 0.2, 0.5, 0.99, 1.0])
def test_a_preset_has_as_many_levels_as_it_makes_calls(name, strength):
    levels = PRESETS[name].levels(FLOW_TABLE, strength=strength)
    assert len(levels) == PRESETS[name].calls(strength) + 1 if PRESETS[name].timesteps else PRESETS[name].steps + 1
    assert bool((levels.diff() < 0).all())
    assert levels[-1] == 0


def test_a_timestep_of_pure_noise_is_told_where_it_is_not_the_last():
    assert PRESETS["DMD2 1 step"].noise_timestep == 399
    assert [PRESETS[name].noise_timestep for name in ("DMD2", "LCM", "Turbo", "Flux.2 Turbo")] == [None] * 4


def flow_times(name, strength=1.0, steps=0):
    """Of a flow model whose levels are its times."""
    return PRESETS[name].with_steps(steps).levels(FLOW_TABLE, strength=strength).tolist()


@pytest.mark.parametrize(
    ("name", "strength", "steps", "expected"),
    [
        ("DMD2", 1.0, 0, [1, 0.75, 0.5, 0.25, 0]),
        ("DMD2", 0.2, 0, [0.2, 0.15, 0.1, 0.05, 0]),
        ("DMD2 1 step", 0.5, 0, [0.2, 0]),
        ("Turbo", 1.0, 2, [1, 0.5, 0]),
        ("Turbo", 0.3, 2, [0.3, 0.15, 0]),
        ("Lightning 4 steps", 0.6, 0, [0.6, 0.4, 0.2, 0]),
        ("LCM", 0.05, 8, [0.05 * (8 - i) / 8 for i in range(9)]),
        ("Wan 2.2 lightx2v", 0.5, 0, [0.5, 0.375, 0.25, 0.125, 0]),
        ("LTX-2 second stage", 0.5, 0, [0.4546875, 0.3625, 0.2109375, 0]),
        ("HiDream fast", 1.0, 3, [1, 0.5005, 0.001, 0]),
        ("Boogu turbo", 0.5, 2, [0.5, 0.25025, 0]),
    ],
)
def test_levels_on_a_model_that_knows_every_time(name, strength, steps, expected):
    assert flow_times(name, strength, steps) == pytest.approx(expected, abs=1e-6)


def test_levels_that_a_rule_lists():
    assert shifted_levels(4, 3.0) == pytest.approx((1.0, 0.9, 0.75, 0.5))
    assert trigflow_levels(math.atan(80.0), math.pi / 4) == pytest.approx((80 / 81, 0.5))


def test_settings_in_words():
    assert settings_in_words(PRESETS["DMD2"]) == "4 steps, cfg 1, gamma 1, timesteps 999, 749, 499, 249"
    assert settings_in_words(PRESETS["Turbo"]) == "1 step, cfg 1, gamma 1, of the timesteps 999, 749, 499, 249"
    assert settings_in_words(Preset("own", 2, 1.5, (0.0, 1.0))) == "2 steps, cfg 1.5, gamma 0, 1, 50 original steps"
    even = "evenly spaced through the model's own shift"
    assert settings_in_words(PRESETS["Wan 2.2 lightx2v"]) == f"4 steps, cfg 1, gamma 0, {even}"
    assert settings_in_words(PRESETS["HiDream fast"]).endswith(", normal spaced through the model's own shift")
    assert settings_in_words(PRESETS["LTX-2 second stage"]).endswith(", sigmas 0.9094, 0.725, 0.4219")
    assert needs_in_words(PRESETS["Wan 2.2 lightx2v"]) == [
        "shift 5",
        "LoRA at strength 1",
        "the first 2 steps by the high-noise model",
    ]
    assert needs_in_words(PRESETS["Flux.2 Turbo"]) == ["LoRA at strength 1", "FluxGuidance 2.5"]
    assert needs_in_words(PRESETS["LCM"]) == ["LoRA at strength 1"]
    assert needs_in_words(PRESETS["DMD2"]) == []


@pytest.mark.parametrize("name", PRESETS)
def test_what_is_read_about_a_preset_is_a_line_for_each_thing_it_says(name):
    preset, needs = PRESETS[name], needs_in_words(PRESETS[name])
    of_one_length = preset.fixed and bool(preset.timesteps) and preset.gamma == 0 and preset.steps > 1
    assert describe(preset).split("\n") == [
        f"{name}: {settings_in_words(preset)}.",
        *([f"It also asks for: {'; '.join(needs)}."] if needs else []),
        *(["Below denoise 1 fewer steps are run, each as long as it was trained for."] if of_one_length else []),
        f"Made for {preset.models}; there sampled with {preset.sampler}.",
        f"From {preset.source}, {preset.date}.",
    ]


def test_known_schedules():
    assert PRESETS["LCM"].schedule() == [999, 759, 499, 259]
    assert PRESETS["AnimateLCM"].schedule() == [999, 749, 499, 249]
    assert PRESETS["DMD2"].schedule() == [999, 749, 499, 249]
    assert PRESETS["TDD"].schedule() == [999, 751, 499, 251]
    assert PRESETS["Lightning 8 steps"].schedule() == [999, 874, 749, 624, 499, 374, 249, 124]
    assert PRESETS["Turbo"].with_steps(2).schedule() == [999, 499]
    assert PRESETS["Turbo"].with_steps(3).schedule() == [999, 749, 499]


@pytest.mark.parametrize("steps", [1, 2, 3, 4, 7, 8, 12, 16, 50])
def test_trailing_timesteps_are_those_of_diffusers(steps):
    scheduler = diffusers().DDIMScheduler(timestep_spacing="trailing")
    scheduler.set_timesteps(steps)
    np.testing.assert_array_equal(trailing_timesteps(steps), scheduler.timesteps.numpy())


@pytest.mark.parametrize("steps", [0, 1001])
def test_trailing_timesteps_have_their_limits(steps):
    with pytest.raises(ValueError, match=f"steps is {steps}; it must be from 1 to 1000"):
        trailing_timesteps(steps)


def test_other_numbers_of_steps():
    assert PRESETS["TCD"].with_steps(0) is PRESETS["TCD"]
    assert PRESETS["TCD"].with_steps(8).schedule() == lcm_timesteps(8)
    assert PRESETS["DMD2"].with_steps(4) is PRESETS["DMD2"]
    with pytest.raises(ValueError, match=r"DMD2 was made for exactly 4 .999, 749, 499, 249.. Set steps to 0"):
        PRESETS["DMD2"].with_steps(6)
    with pytest.raises(ValueError, match=r"LTX-2 second stage was made for exactly 3 .0\.909375, 0\.725, 0\.421875."):
        PRESETS["LTX-2 second stage"].with_steps(4)
    with pytest.raises(ValueError, match="steps is 5, but Turbo was made for 1 to 4"):
        PRESETS["Turbo"].with_steps(5)


def test_the_fewest_and_the_most_steps_of_a_list_are_allowed_and_none_beyond():
    turbo = PRESETS["Turbo"]
    assert turbo.with_steps(1).schedule() == [999]
    assert turbo.with_steps(4).schedule() == list(turbo.timesteps)
    with pytest.raises(ValueError, match="steps is -1, but Turbo was made for 1 to 4"):
        turbo.with_steps(-1)


def test_a_whole_run_takes_an_uneven_list_as_it_is():
    uneven = replace(PRESETS["DMD2"], timesteps=(999, 899, 299, 99))
    assert uneven.levels(FLOW_TABLE).tolist() == pytest.approx([1.0, 0.9, 0.3, 0.1, 0.0], abs=1e-6)


def test_strength_cuts_both_kinds_of_schedule():
    assert PRESETS["LCM"].schedule(strength=0.6) == lcm_timesteps(4, strength=0.6)
    assert PRESETS["Lightning 4 steps"].schedule(strength=0.5) == [499, 249]
    assert PRESETS["Lightning 4 steps"].schedule(strength=0.6) == [599, 399, 199]
    assert PRESETS["DMD2"].schedule(strength=0.2) == [199, 149, 99, 49]
    assert PRESETS["DMD2"].schedule(strength=0.26) == [259, 194, 129, 64]
    assert PRESETS["Turbo"].schedule(strength=0.3) == [299]
    assert PRESETS["DMD2 1 step"].schedule(strength=0.5) == [199]


def test_a_preset_is_data():
    with pytest.raises(AttributeError):
        PRESETS["LCM"].steps = 5
    assert Preset("own", 3, 1.0, (0.0, 1.0), timesteps=(900, 500, 100)).schedule() == [900, 500, 100]


# Written from the papers and model cards that the presets name, apart from the table they are tested against.
PUBLISHED = {
    "LCM": (4, 1.0, 1.0),
    "AnimateLCM": (4, 1.0, 1.0),
    "TCD": (4, 1.0, 0.3),
    "DMD2": (4, 1.0, 1.0),
    "DMD2 1 step": (1, 1.0, 1.0),
    "Hyper-SD unified": (4, 1.0, 1.0),
    "Hyper-SD 1 step UNet": (1, 1.0, 1.0),
    **{f"Hyper-SD {steps} steps": (steps, 1.0, 0.0) for steps in (2, 4, 8)},
    **{f"Hyper-SD {steps} steps CFG": (steps, 5.0, 0.0) for steps in (8, 12)},
    **{f"Lightning {steps} steps": (steps, 1.0, 0.0) for steps in (2, 4, 8)},
    **{f"PCM small cfg {steps} steps": (steps, 1.0, 0.0) for steps in (2, 4, 8, 16)},
    "PCM normal cfg 4 steps": (4, 3.0, 0.0),
    "PCM normal cfg 8 steps": (8, 4.5, 0.0),
    "PCM normal cfg 16 steps": (16, 7.5, 0.0),
    "PCM LCM-like": (4, 1.0, 1.0),
    **{f"Phased LCM {steps} steps": (steps, 1.0, 0.0) for steps in (2, 4, 8)},
    "TDD": (4, 1.7, 0.2),
    "Turbo": (1, 1.0, 1.0),
}


def test_settings_are_those_that_the_papers_give():
    """(steps, cfg, gamma)."""
    assert {name: (p.steps, p.cfg, p.gamma) for name, p in PRESETS.items() if not p.flow} == PUBLISHED


def test_a_lora_for_one_number_of_steps_takes_trailing_timesteps_at_strength_one_and_others_say_theirs():
    families = ("Hyper-SD ", "Lightning ", "PCM small cfg ", "PCM normal cfg ", "Phased LCM ")
    each = {name: p for name, p in PRESETS.items() if name.startswith(families) and p.fixed and p.steps > 1}
    assert len(each) == 3 + 2 + 3 + 4 + 3 + 3
    for name, preset in each.items():
        assert preset.timesteps == trailing_timesteps(preset.steps), name
        assert (preset.strength, preset.shift, preset.first_expert) == (1.0, None, 0), name
        assert preset.name == name
    # Whole models, and LoRAs of which the source says none.
    plain = {name for name, p in PRESETS.items() if not p.flow and p.strength is None}
    assert plain == {"AnimateLCM", "DMD2", "DMD2 1 step", "Hyper-SD 1 step UNet", "TDD", "Turbo"}
    others = {name: p.strength for name, p in PRESETS.items() if p.strength not in (None, 1.0)}
    assert others == {"CausVid LoRA": 0.3, "Hyper-FLUX 8 steps": 0.125, "LTX-2.3 second stage": 0.5}


def test_of_a_training_grid_at_least_the_lowest_point_is_left():
    one = Preset("x", steps=4, cfg=1.0, gamma=1.0)
    assert [one.schedule(strength=strength) for strength in (0.01, 0.02, 0.03, 0.04)] == [[19], [19], [19], [39, 19]]
    assert replace(one, original_steps=1, steps=1).schedule(strength=0.5) == [999]
    assert [replace(one, steps=steps).calls(0.5) for steps in (24, 25, 26, 50, 51)] == [24, 25, 25, 25, 51]


def test_listed_timesteps_that_are_not_even_are_run_as_they_are():
    uneven = Preset("x", steps=3, cfg=1.0, gamma=0.0, timesteps=(999, 600, 100))
    assert uneven.schedule() == [999, 600, 100]
    assert uneven.noise_timestep is None
    assert replace(uneven, timesteps=(998, 600, 100)).noise_timestep == 998
    free = replace(uneven, steps=2)
    assert [free.with_steps(steps).steps for steps in (0, 1, 2, 3)] == [2, 1, 2, 3]
    with pytest.raises(ValueError, match="steps is 4, but x was made for 1 to 3"):
        free.with_steps(4)
