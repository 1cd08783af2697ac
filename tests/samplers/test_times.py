"""Times and the levels of a table at them, against the formula that the table was made from."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lcm_kit.samplers.preset import Preset
from lcm_kit.samplers.times import SPACINGS, karras_table, levels_at, shift_of, times_at

SHIFTS = [1.0, 1.73, 3.0, math.exp(1.15), 5.0, 8.0, 12.0]


def level(shift, time):
    return shift * time / (1 + (shift - 1) * time)


def table(shift, length=1000):
    return torch.tensor([level(shift, (i + 1) / length) for i in range(length)])


@pytest.mark.parametrize("length", [7, 1000, 10_000])
def test_at_the_times_of_entries_the_levels_are_the_entries(length):
    entries = table(3.0, length)
    assert torch.equal(levels_at([(i + 1) / length for i in range(length)], entries), entries)


@pytest.mark.parametrize("shift", SHIFTS)
def test_between_entries_the_levels_are_those_of_the_shift(shift):
    times = torch.linspace(0.05, 1.0, 777, dtype=torch.float64).tolist()
    expected = torch.tensor([level(shift, time) for time in times])
    torch.testing.assert_close(levels_at(times, table(shift)), expected, rtol=0, atol=2e-5)


@given(times=st.lists(st.floats(1e-4, 1.0), min_size=1, max_size=20), shift=st.sampled_from(SHIFTS))
def test_times_at_undoes_levels_at(times, shift):
    entries = table(shift)
    # A level is float32, and a shift of 12 is as flat as 1/12 at its end.
    assert times_at(levels_at(times, entries).tolist(), entries) == pytest.approx(times, abs=2e-6)


def test_levels_above_the_table_are_at_its_end_and_below_it_between_it_and_zero():
    entries = torch.tensor([0.2, 0.6, 1.0])
    assert times_at([1.5, 0.1], entries) == pytest.approx([1.0, 1 / 6])
    torch.testing.assert_close(levels_at([1 / 6], entries), torch.tensor([0.1]))


@pytest.mark.parametrize("shift", SHIFTS)
@pytest.mark.parametrize("length", [1000, 10_000])
def test_the_shift_is_read_off_the_table(shift, length):
    assert shift_of(table(shift, length)) == pytest.approx(shift, rel=1e-5)


def test_times_are_as_exact_as_float64_has_them():
    """A table may be float32, the numbers asked for are not rounded to it."""
    entries = torch.tensor([0.25, 0.5, 1.0])
    assert times_at([0.1, 0.3, 0.7], entries) == pytest.approx([0.4 / 3, 1.2 / 3, 2.4 / 3], rel=1e-15)
    assert levels_at([1 / 3 - 1e-9], torch.tensor([1e9, 2e9, 3e9])).tolist() == pytest.approx([1e9 - 3.0], abs=64)


def test_karras_levels_are_those_of_the_formula_in_float64():
    for rho, length in ((7.0, 1000), (3.0, 5)):
        low, high = 0.002 ** (1 / rho), 80.0 ** (1 / rho)
        exact = np.linspace(low, high, length) ** rho
        torch.testing.assert_close(
            karras_table(0.002, 80.0, rho=rho, length=length), torch.tensor(exact).float(), rtol=6e-8, atol=0
        )


def test_karras_levels_are_evenly_spaced_in_their_seventh_root():
    levels = karras_table(0.002, 80.0)
    roots = levels.double() ** (1 / 7)
    torch.testing.assert_close(roots.diff(), roots.diff().mean().expand(999), rtol=1e-3, atol=0)
    assert (float(levels[0]), float(levels[-1])) == pytest.approx((0.002, 80.0))


def test_the_spacings():
    assert SPACINGS["even"](4, 0.001) == [1.0, 0.75, 0.5, 0.25]
    assert SPACINGS["normal"](3, 0.5) == [1.0, 0.75, 0.5]
    assert SPACINGS["sgm_uniform"](2, 0.5) == [1.0, 0.75]
    assert SPACINGS["normal"](2, 0.5) == [1.0, 0.5]
    assert SPACINGS["normal"](1, 0.5) == [1.0]


@given(strength=st.floats(0.01, 1.0), steps=st.integers(1, 60), spacing=st.sampled_from(sorted(SPACINGS)))
def test_the_levels_of_a_preset_fall_from_the_time_asked_for_to_zero(strength, steps, spacing):
    preset = Preset("", steps, 1.0, 1.0, flow=True, spacing=spacing)
    levels = preset.levels(table(3.0), strength=strength)
    assert len(levels) == steps + 1
    assert float(levels[0]) == pytest.approx(level(3.0, strength), abs=2e-5)
    assert levels[-1] == 0
    assert bool((levels.diff() < 0).all())


@given(strength=st.floats(0.05, 1.0), steps=st.integers(1, 30), spacing=st.sampled_from(sorted(SPACINGS)))
def test_the_times_of_a_preset_are_those_of_its_spacing_times_the_strength(strength, steps, spacing):
    """ComfyUI's own end at the time that its lowest level is, taken as a time."""
    entries = table(5.0, 100)
    lowest = float(entries[0])
    times = {
        "even": [1 - i / steps for i in range(steps)],
        "normal": np.linspace(1.0, lowest, steps).tolist(),
        "sgm_uniform": np.linspace(1.0, lowest, steps + 1).tolist()[:-1],
    }[spacing]
    levels = Preset("", steps, 1.0, 1.0, flow=True, spacing=spacing).levels(entries, strength=strength)
    wanted = levels_at([strength * time for time in times], entries)
    torch.testing.assert_close(levels[:-1], wanted, rtol=1e-6, atol=1e-7)


def test_listed_levels_of_a_whole_run_are_the_listed_numbers_whatever_the_table():
    listed = (1.25, 0.978453, 0.3)
    for entries in (table(3.0), torch.tensor([0.5, 1.0])):
        assert torch.equal(Preset("", 3, 1.0, 0.0, sigmas=listed).levels(entries)[:-1], torch.tensor(listed))


@given(strength=st.floats(0.05, 1.0))
def test_listed_levels_are_scaled_in_time(strength):
    listed = (1.0, 0.978453, 0.704534, 0.414568)
    entries = table(3.0, 10_000)
    found = Preset("", 4, 1.0, 0.0, sigmas=listed).levels(entries, strength=strength)
    expected = [strength * time for time in times_at(listed, entries)]
    assert times_at(found[:-1].tolist(), entries) == pytest.approx(expected, abs=2e-6)
    assert Preset("", 4, 1.0, 0.0, sigmas=listed).levels(entries).tolist()[:-1] == pytest.approx(listed)


@pytest.mark.parametrize("strength", [0.0, -1.0, 1.5, float("nan")])
def test_a_strength_that_is_none_is_refused(strength):
    with pytest.raises(ValueError, match="denoise strength is"):
        Preset("", 4, 1.0, 0.0).levels(table(3.0), strength=strength)
    with pytest.raises(ValueError, match="denoise strength is"):
        Preset("", 4, 1.0, 0.0, timesteps=(999, 749, 499, 249)).schedule(strength=strength)
