"""The settings of published few-step models."""

import numpy as np
import pytest

from lcm_kit.samplers.preset import Preset
from lcm_kit.samplers.presets import PRESETS, trailing_timesteps
from lcm_kit.samplers.renoise import gamma_per_step
from lcm_kit.samplers.schedule import lcm_timesteps
from lcm_kit.tests.samplers.toy import diffusers


@pytest.mark.parametrize("name", PRESETS)
def test_every_preset_has_a_schedule_as_long_as_its_steps_and_a_source(name):
    preset = PRESETS[name]
    assert preset.name == name
    timesteps = preset.schedule()
    assert len(timesteps) == preset.steps
    assert timesteps == sorted(timesteps, reverse=True)
    assert gamma_per_step(preset.gamma, preset.steps)
    assert preset.cfg >= 1
    assert "arXiv" in preset.source


def test_known_schedules():
    assert PRESETS["LCM"].schedule() == [999, 759, 499, 259]
    assert PRESETS["AnimateLCM"].schedule() == [999, 749, 499, 249]
    assert PRESETS["DMD2"].schedule() == [999, 749, 499, 249]
    assert PRESETS["TDD"].schedule() == [999, 751, 499, 251]
    assert PRESETS["Lightning 8 steps"].schedule() == [999, 874, 749, 624, 499, 374, 249, 124]
    assert PRESETS["Turbo"].with_steps(2).schedule() == [999, 499]


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


def test_strength_cuts_both_kinds_of_schedule():
    assert PRESETS["LCM"].schedule(strength=0.6) == lcm_timesteps(4, strength=0.6)
    assert PRESETS["Lightning 4 steps"].schedule(strength=0.5) == [499, 249]


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
    **{f"PCM normal cfg {steps} steps": (steps, 7.5, 0.0) for steps in (4, 8, 16)},
    "PCM LCM-like": (4, 1.0, 1.0),
    "TDD": (4, 1.7, 0.2),
    "Turbo": (1, 1.0, 1.0),
}


def test_settings_are_those_that_the_papers_give():
    """(steps, cfg, gamma)."""
    assert {name: (p.steps, p.cfg, p.gamma) for name, p in PRESETS.items()} == PUBLISHED
