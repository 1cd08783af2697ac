"""Timesteps and sigmas: known answers, equality with diffusers, and messages for what cannot be."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lcm_kit.samplers.schedule import (
    MOST_STEPS,
    custom_timesteps,
    lcm_timesteps,
    off_grid,
    parse_timesteps,
    sigmas_at,
    table_entries,
    timesteps_at,
    training_grid,
)
from lcm_kit.tests.samplers.toy import diffusers, sigma_table


@pytest.mark.parametrize(
    ("steps", "expected"),
    [
        (1, [999]),
        (2, [999, 499]),
        (3, [999, 679, 339]),
        (4, [999, 759, 499, 259]),
        (6, [999, 839, 679, 499, 339, 179]),
        (7, [999, 859, 719, 579, 439, 299, 159]),
        (8, [999, 879, 759, 639, 499, 379, 259, 139]),
        (50, list(range(999, 0, -20))),
    ],
)
def test_known_schedules_of_lcm_lora(steps, expected):
    assert lcm_timesteps(steps) == expected


@pytest.mark.parametrize(
    ("steps", "strength", "expected"),
    [
        (4, 0.1, [99, 79, 59, 39]),
        (4, 0.6, [599, 459, 299, 159]),
        (4, 0.75, [739, 559, 379, 199]),
        (4, 0.9, [899, 679, 459, 239]),
        (1, 0.5, [499]),
        (1, 0.02, [19]),
    ],
)
def test_strength_cuts_the_noisy_end_of_the_grid_and_keeps_all_steps(steps, strength, expected):
    assert lcm_timesteps(steps, strength=strength) == expected


def test_a_grid_of_100_original_steps_as_in_animatelcm():
    assert lcm_timesteps(4, original_steps=100) == [999, 749, 499, 249]
    assert lcm_timesteps(8, original_steps=100) == [999, 879, 749, 629, 499, 379, 249, 129]


def test_strength_is_not_cut_short_by_float_rounding():
    assert int(50 * 0.58) == 28  # the trap
    assert len(lcm_timesteps(29, strength=0.58)) == 29
    for kept in range(1, 51):
        assert lcm_timesteps(kept, strength=kept / 50)[0] == 20 * kept - 1
        assert lcm_timesteps(kept, strength=float(np.float32(kept / 50)))[0] == 20 * kept - 1


@pytest.mark.parametrize("original_steps", [25, 50, 100])
@pytest.mark.parametrize("strength", [1.0, 0.9, 0.8, 0.75, 0.6, 0.5, 0.3, 0.1])
def test_timesteps_equal_those_of_diffusers(original_steps, strength):
    scheduler = diffusers().LCMScheduler()
    for steps in range(1, min(50, int(original_steps * strength)) + 1):
        scheduler.set_timesteps(steps, original_inference_steps=original_steps, strength=strength)
        ours = lcm_timesteps(steps, original_steps=original_steps, strength=strength)
        assert ours == scheduler.timesteps.tolist(), f"{steps} steps"


@given(data=st.data(), original_steps=st.integers(1, 1000))
def test_a_schedule_descends_on_the_training_grid_from_its_noisiest_kept_point(data, original_steps):
    strength = data.draw(st.floats(1 / original_steps, 1.0))
    kept = int(original_steps * strength + 1e-4)
    steps = data.draw(st.integers(1, kept))
    timesteps = lcm_timesteps(steps, original_steps=original_steps, strength=strength)
    grid = training_grid(original_steps)
    assert len(timesteps) == steps
    assert timesteps[0] == grid[kept - 1]
    assert set(timesteps) <= set(grid)
    assert timesteps == sorted(set(timesteps), reverse=True)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"steps": 0}, r"steps is 0; .* at least 1"),
        ({"steps": -3}, r"steps is -3"),
        ({"steps": 51}, r"steps is 51 .* original_steps = 50 .* at most 50 steps, or raise original_steps"),
        ({"steps": 8, "strength": 0.1}, r"steps is 8 .* 0\.1 keeps only 5 of 50 .* at most 5 steps; .* least 0\.16\."),
        ({"steps": 1, "strength": 0.01}, r"keeps only 0 of 50 .* no number of steps fits; .* least 0\.02\."),
        ({"steps": 4, "strength": 0.0}, r"strength is 0\.0; it must be above 0"),
        ({"steps": 4, "strength": 1.01}, r"strength is 1\.01; .* at most 1"),
        ({"steps": 4, "strength": float("nan")}, r"strength is nan"),
        ({"steps": 4, "original_steps": 1001}, r"original_steps is 1001; .* 1 to 1000"),
        ({"steps": 4, "original_steps": 0}, r"original_steps is 0"),
    ],
)
def test_an_impossible_schedule_is_refused_with_the_way_out(arguments, message):
    with pytest.raises(ValueError, match=message):
        lcm_timesteps(**arguments)


@given(original_steps=st.integers(1, 1000), data=st.data())
def test_the_strength_that_the_error_advises_works(original_steps, data):
    steps = data.draw(st.integers(1, original_steps))
    try:
        lcm_timesteps(steps, original_steps=original_steps, strength=1e-5)
    except ValueError as error:
        advised = float(str(error).removesuffix(".").rsplit(" ", 1)[1])
        assert len(lcm_timesteps(steps, original_steps=original_steps, strength=advised)) == steps
    else:
        pytest.fail("strength 1e-5 keeps no timestep of any grid")


@pytest.mark.parametrize(
    "text", ["999, 759, 499, 259", "999,759,499,259", " 999 759\n499\t259, ", "999,,759 , 499,259"]
)
def test_timesteps_are_read_with_commas_or_spaces(text):
    assert parse_timesteps(text) == [999, 759, 499, 259]


def test_blank_text_holds_no_timesteps():
    assert parse_timesteps("") == parse_timesteps(" \n") == []


@pytest.mark.parametrize("entry", ["abc", "75x", "7.5", "9_9", "٩٩", "[999", "9" * 20])
def test_text_that_is_no_timestep_is_named(entry):
    with pytest.raises(ValueError, match=r"is not a whole number.*999, 759, 499, 259") as error:
        parse_timesteps(f"999, {entry}")
    assert repr(entry) in str(error.value)


def test_custom_timesteps_may_leave_the_training_grid():
    assert custom_timesteps([999, 749, 499, 249]) == [999, 749, 499, 249]
    assert custom_timesteps(np.array([399])) == [399]
    assert custom_timesteps([0]) == [0]


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ([], "timesteps is empty"),
        ([1000, 500, -1], r"timesteps 1000, -1 lie outside 0 to 999.* The nearest: 999, 0\."),
        ([499, 759, 999], "must fall .* 499 then 759, 759 then 999"),
        ([999, 999], "must fall .* 999 then 999"),
    ],
)
def test_custom_timesteps_out_of_range_or_order_are_named(values, message):
    with pytest.raises(ValueError, match=message):
        custom_timesteps(values)


@pytest.mark.parametrize(
    ("strength", "kept"), [(1.0, 4), (0.99, 3), (0.75, 3), (0.5, 2), (0.3, 1), (0.25, 1), (0.58, 2)]
)
def test_strength_keeps_the_clean_end_of_custom_timesteps(strength, kept):
    assert custom_timesteps([999, 749, 499, 249], strength=strength) == [999, 749, 499, 249][4 - kept :]


def test_strength_survives_float_rounding():
    assert int(50 * 0.58) == 28  # the trap
    assert len(custom_timesteps(range(999, 949, -1), strength=0.58)) == 29


def test_a_strength_that_keeps_no_custom_timestep_is_refused():
    with pytest.raises(ValueError, match=r"strength 0\.2 leaves none of the 4 .* at least 0\.25, or give more"):
        custom_timesteps([999, 749, 499, 249], strength=0.2)


@pytest.mark.parametrize("strength", [0.0, -1.0, 1.01, float("nan")])
def test_a_strength_outside_its_range_is_refused(strength):
    with pytest.raises(ValueError, match="must be above 0 and at most 1"):
        custom_timesteps([999], strength=strength)


def test_timesteps_off_the_grid_are_told_with_the_nearest_on_it():
    assert off_grid([999, 749, 499, 249]) == {749: 739, 249: 239}  # both midway: the lower
    assert off_grid([999, 749, 499, 249], original_steps=100) == {}
    assert off_grid([400, 0]) == {400: 399, 0: 19}
    assert off_grid([]) == {}


def test_custom_timesteps_are_integers():
    with pytest.raises(TypeError, match="float"):
        custom_timesteps([999.0])


def test_sigmas_are_exact_table_entries_and_end_in_zero():
    table = sigma_table()
    sigmas = sigmas_at([999, 759, 499, 259], table)
    assert sigmas.dtype == torch.float32
    assert sigmas.tolist() == [table[999], table[759], table[499], table[259], 0.0]
    # Stable Diffusion's levels; the float32 cumulative product leaves about six digits.
    expected = torch.tensor([14.614647, 4.260558, 1.612887, 0.719380, 0.0])
    torch.testing.assert_close(sigmas, expected, rtol=2e-6, atol=0)


def test_sigmas_of_a_float64_table_are_float32_and_the_table_is_unchanged():
    table = sigma_table().double()
    before = table.clone()
    assert sigmas_at([999], table).dtype == torch.float32
    assert torch.equal(table, before)


def test_a_timestep_beyond_the_models_table_is_refused():
    with pytest.raises(ValueError, match="timesteps 999 lie outside 0 to 499"):
        sigmas_at([999, 259], sigma_table()[:500])


@pytest.mark.parametrize("function", [lambda table: sigmas_at([0], table), lambda table: timesteps_at(table, table)])
@pytest.mark.parametrize(
    ("table", "message"),
    [
        (torch.tensor([2.0, 1.0]), "ascending order; it starts"),
        (torch.tensor([0.0, 1.0]), "positive sigmas"),
        (torch.tensor([0.1, float("nan")]), "ascending"),
        (torch.ones(2, 2), r"shape \(2, 2\)"),
        (torch.ones(0), r"shape \(0,\)"),
    ],
)
def test_what_is_no_sigma_table_is_refused(function, table, message):
    with pytest.raises(ValueError, match=message):
        function(table)


def test_a_table_may_have_one_level_or_equal_neighbours():
    assert sigmas_at([0], torch.tensor([2.0])).tolist() == [2.0, 0.0]
    assert timesteps_at(torch.tensor([2.0]), torch.tensor([2.0])).tolist() == [0]
    assert timesteps_at(torch.tensor([3.0]), torch.tensor([1.0, 2.0, 2.0, 3.0])).tolist() == [3]


def test_timesteps_at_undoes_sigmas_at_for_every_timestep():
    table = sigma_table()
    descending = list(range(999, -1, -1))
    assert timesteps_at(sigmas_at(descending, table)[:-1], table).tolist() == descending


def test_neighbours_one_float32_step_apart_are_told_apart():
    table = 100.0 + torch.arange(8) * 2.0**-17  # the spacing of float32 between 64 and 128
    assert timesteps_at(table, table).tolist() == list(range(8))


def test_a_sigma_between_entries_takes_the_nearest_in_log_sigma_and_beyond_the_ends_the_end():
    table = torch.tensor([1.0, 4.0, 16.0])
    assert timesteps_at(torch.tensor([0.01, 1.9, 2.1, 7.9, 8.1, 99.0]), table).tolist() == [0, 0, 1, 1, 2, 2]


def test_sigma_zero_has_no_timestep():
    with pytest.raises(ValueError, match="leave out the final 0"):
        timesteps_at(sigmas_at([999], sigma_table()), sigma_table())


# ---- timesteps in tables of other lengths


def test_timesteps_are_themselves_in_a_table_of_a_thousand_and_every_tenth_entry_in_one_of_ten_thousand():
    timesteps = list(range(999, -1, -1))
    assert table_entries(timesteps, 1000) == timesteps
    assert table_entries(timesteps, 10_000) == [10 * t + 9 for t in timesteps]


@pytest.mark.parametrize("length", [1000, 1500, 4000, 10_000])
def test_a_timestep_is_the_same_share_of_every_table(length):
    for t, entry in zip(range(999, -1, -1), table_entries(range(999, -1, -1), length), strict=True):
        assert abs((entry + 1) / length - (t + 1) / 1000) <= 0.5 / length + 1e-12


def test_a_short_table_gives_what_it_can_tell_apart():
    assert table_entries([999, 749, 499, 249], 100) == [99, 74, 49, 24]
    for timesteps in ([999, 998], [999, 3]):
        with pytest.raises(ValueError, match=r"too close together, or too near 0, for this model's table of 100"):
            table_entries(timesteps, 100)


def test_an_lcm_is_distilled_on_50_timesteps_of_1000_unless_told():
    assert training_grid() == list(range(19, 1000, 20))
    assert training_grid(1) == [999]  # the fewest
    assert training_grid(1000) == list(range(1000))


def test_a_text_may_have_as_many_timesteps_as_a_run_has_steps_and_no_more():
    text = ", ".join(map(str, reversed(range(MOST_STEPS))))
    assert len(parse_timesteps(text)) == MOST_STEPS
    with pytest.raises(ValueError, match="has 1,001 entries"):
        parse_timesteps(f"1000, {text}")


@pytest.mark.parametrize("total", [100, 500, 2000])
@pytest.mark.parametrize("points", [20, 25, 50])
def test_a_model_of_other_training_timesteps_has_the_same_shares_of_them(total, points):
    k = total // points
    assert training_grid(points, train_timesteps=total) == [k * n - 1 for n in range(1, points + 1)]
    for steps in (1, 4, 7):
        wanted = [k * (points - math.floor(i * points / steps)) - 1 for i in range(steps)]
        assert lcm_timesteps(steps, original_steps=points, train_timesteps=total) == wanted


def test_the_nearest_points_are_those_of_the_models_own_grid():
    assert off_grid([499, 498, 100], train_timesteps=500) == {498: 499, 100: 99}
    assert off_grid([499, 498, 105], original_steps=100, train_timesteps=500) == {498: 499, 105: 104}
    assert off_grid([999, 39, 40, 30]) == {40: 39, 30: 39}
    # 1001 is 11 * 91.
    assert off_grid([909, 899], original_steps=91) == {}
    assert lcm_timesteps(2, original_steps=91)[0] == 909


def test_a_table_may_be_longer_than_a_thousand_begin_with_its_first_entry_and_stand_still():
    table = torch.linspace(0.01, 2.0, 2000)
    assert torch.equal(sigmas_at([1999, 1000, 0], table), torch.cat([table[[1999, 1000, 0]], torch.zeros(1)]))
    assert table_entries([999, 0], 1000) == [999, 0]
    with pytest.raises(ValueError, match="too close together, or too near 0"):
        table_entries([999, 0], 400)
    flat = torch.tensor([0.5, 1.0, 1.0, 2.0])
    assert sigmas_at([3, 1], flat).tolist() == [2.0, 1.0, 0.0]
    for wrong in (torch.tensor([0.0, 1.0]), torch.tensor([1.0, 0.5]), torch.tensor([]), torch.ones(2, 2)):
        with pytest.raises(ValueError, match="the sigma table"):
            sigmas_at([1], wrong)
