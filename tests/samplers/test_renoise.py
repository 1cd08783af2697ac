"""gamma: the share of old noise that a step keeps."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lcm_kit.samplers.renoise import (
    gamma_per_step,
    gammas_of_part,
    noise_kept,
    parse_gammas,
    places_in,
    variance_exploding,
)
from lcm_kit.samplers.schedule import MOST_STEPS, sigmas_at
from lcm_kit.tests.samplers.toy import rectified_flow, sigma_table

TABLE = sigma_table()
SIGMAS = sigmas_at([999, 759, 499, 259], TABLE)


def test_the_two_ends_are_exact_and_need_no_table():
    assert noise_kept(SIGMAS, 1.0) == [0.0] * 4
    assert noise_kept(SIGMAS, 0.0) == [1.0] * 4


def test_between_the_ends_the_share_is_the_ratio_of_table_sigmas():
    shares = noise_kept(SIGMAS, 0.3, table=TABLE)
    # floor(0.7 * 759) = 531, floor(0.7 * 499) = 349, floor(0.7 * 259) = 181
    expected = [(TABLE[s] / TABLE[t]).item() for s, t in [(531, 759), (349, 499), (181, 259)]]
    assert shares[:3] == pytest.approx(expected, rel=1e-6)
    assert 1 - shares[0] ** 2 == pytest.approx(0.82, abs=0.01)  # fresh part of the variance: most of it, at gamma 0.3


def test_a_float_error_does_not_shift_the_timestep():
    assert math.floor((1 - 0.9) * 500) == 49  # the trap
    sigmas = sigmas_at([999, 500], TABLE)
    assert noise_kept(sigmas, 0.9, table=TABLE)[0] == pytest.approx((TABLE[50] / TABLE[500]).item(), rel=1e-6)


@given(gamma=st.floats(0.0, 1.0), lower=st.floats(0.0, 1.0), t=st.integers(1, 999))
def test_more_gamma_keeps_less_and_a_share_is_a_share(gamma, lower, t):
    lower, gamma = sorted((gamma, lower))
    sigmas = torch.stack([TABLE[-1], TABLE[t], torch.tensor(0.0)])
    kept, kept_lower = (noise_kept(sigmas, g, table=TABLE) for g in (gamma, lower))
    assert 0.0 <= kept[0] <= kept_lower[0] <= 1.0


@given(sigma=st.floats(0.03, 14.0), gamma=st.sampled_from([1e-15, 1e-9, 1e-6, 1e-3]))
def test_a_level_between_table_entries_keeps_at_most_all_of_its_noise(sigma, gamma):
    assert 0.0 < noise_kept(torch.tensor([14.6, sigma, 0.0]), gamma, table=TABLE)[0] <= 1.0


@pytest.mark.parametrize("noise_scaling", [variance_exploding, rectified_flow])
def test_following_the_trajectory_to_s_then_diffusing_to_t_gives_the_kept_share(noise_scaling):
    """The share from first principles: x_t = (a_t / a_s) x_s + fresh noise, so old noise arrives as (a_t / a_s) b_s."""
    table = torch.linspace(0.001, 1.0, 1000)
    t, gamma = 699, 0.4
    s = math.floor(0.6 * t)
    one, zero = torch.tensor(1.0), torch.tensor(0.0)
    a_s, b_s = noise_scaling(table[s], zero, one), noise_scaling(table[s], one, zero)
    a_t, b_t = noise_scaling(table[t], zero, one), noise_scaling(table[t], one, zero)
    share = noise_kept(torch.stack([table[999], table[t]]), gamma, table=table, noise_scaling=noise_scaling)
    assert share[0] * b_t.item() == pytest.approx((a_t / a_s * b_s).item(), rel=1e-5)


@pytest.mark.parametrize("gamma", [-0.1, 1.1, float("nan")])
def test_gamma_outside_its_range_is_refused(gamma):
    with pytest.raises(ValueError, match=rf"gamma is {gamma}; it must be from 0"):
        noise_kept(SIGMAS, gamma, table=TABLE)


def test_gamma_between_the_ends_asks_for_the_table():
    with pytest.raises(ValueError, match=r"gamma is 0\.3; .* Pass table=.* or use gamma 0 or 1"):
        noise_kept(SIGMAS, 0.3)


def test_no_levels_mean_no_shares():
    assert noise_kept(torch.ones(0), 1.0) == noise_kept(torch.ones(1), 0.5, table=TABLE) == []


def test_each_step_has_its_own_gamma_and_the_last_one_holds():
    assert gamma_per_step([0, 1, 0.3], 5) == [0.0, 1.0, 0.3, 0.3, 0.3]
    assert gamma_per_step(0.7, 3) == [0.7, 0.7, 0.7]
    assert gamma_per_step([0.2, 0.4], 2) == [0.2, 0.4]
    assert gamma_per_step(1.0, 0) == []


def test_a_list_mixes_the_shares_of_its_gammas():
    """Euler first, LCM last, is one list; each share is the one that its gamma alone would give."""
    alone = {gamma: noise_kept(SIGMAS, gamma, table=TABLE) for gamma in (0.0, 0.3, 1.0)}
    mixed = noise_kept(SIGMAS, [0.0, 0.3, 1.0], table=TABLE)
    assert mixed[:3] == [alone[0.0][0], alone[0.3][1], alone[1.0][2]]


def test_a_list_of_ends_needs_no_table():
    assert noise_kept(SIGMAS, [0, 1])[:3] == [1.0, 0.0, 0.0]


@pytest.mark.parametrize(
    ("gamma", "message"),
    [
        ([], "gamma is an empty list; give one number"),
        ([1.0, 2.0], r"gamma is 2\.0; it must be from 0"),
        ([1.0] * 5, "gamma has 5 entries but the run has 4 steps. Give at most one for each step"),
    ],
)
def test_a_list_that_breaks_the_rules_is_refused(gamma, message):
    with pytest.raises(ValueError, match=message):
        noise_kept(SIGMAS, gamma, table=TABLE)


def test_a_run_of_one_step_or_none_takes_one_gamma():
    for steps in (0, 1):
        assert gamma_per_step([0.3], steps) == [0.3] * steps
        with pytest.raises(ValueError, match=f"gamma has 2 entries but the run has {steps} steps"):
            gamma_per_step([0.3, 1.0], steps)


def test_a_level_just_below_an_entry_keeps_all_of_its_noise_and_no_more():
    """The nearest entry is above it, and at gamma 0, almost, that entry is s."""
    level = TABLE[500] * 0.9999
    assert noise_kept(torch.stack([TABLE[-1], level]), 1e-12, table=TABLE) == [1.0]
    share = float(TABLE[499] / TABLE[500])  # one timestep below it
    assert noise_kept(TABLE[[999, 500]], 1 / 501, table=TABLE) == [pytest.approx(share, rel=1e-6)]


@pytest.mark.parametrize(
    ("text", "gammas"),
    [
        ("", []),
        (" \n", []),
        ("1, 1, 0.3", [1.0, 1.0, 0.3]),
        ("0 0,1", [0.0, 0.0, 1.0]),
        (".5;"[:2], [0.5]),
        ("1.", [1.0]),
    ],
)
def test_gammas_are_read_from_text(text, gammas):
    assert parse_gammas(text) == gammas


@pytest.mark.parametrize("text", ["1, 2", "nan", "-0.1", "1_0", "0,3;1", "x", "inf", "1e0"])
def test_text_that_is_no_list_of_gammas_is_refused(text):
    with pytest.raises(ValueError, match=r"is not a number from 0 .* Write one for each step"):
        parse_gammas(text)


# ---- a list of gammas in a run that is made in parts


@pytest.mark.parametrize("gamma", [[0, 0, 1], [1.0, 0.3], [0.2], (1, 0.9, 0.5, 0.3)])
def test_every_part_of_a_run_has_the_gammas_that_its_steps_have_in_the_undivided_run(gamma):
    whole = gamma_per_step(gamma, 4)
    for start in range(4):
        for end in range(start + 1, 5):
            part = gammas_of_part(gamma, SIGMAS[start : end + 1], SIGMAS)
            assert gamma_per_step(part, end - start) == whole[start:end]


def test_without_the_schedule_a_part_is_the_beginning():
    assert gammas_of_part([0, 0, 1], SIGMAS[:3]) == [0, 0]
    assert gammas_of_part([0, 0, 1], SIGMAS) == [0, 0, 1]
    assert gammas_of_part(0.3, SIGMAS[2:]) == 0.3
    # Nothing follows a run that ends at 0: too many entries are a mistake, which gamma_per_step names.
    assert gammas_of_part([0, 0, 1], SIGMAS[-3:]) == [0, 0, 1]


def test_a_part_has_as_many_gammas_as_steps_and_one_at_least():
    gammas = [0, 0.5, 1, 1, 1]
    assert [gammas_of_part(gammas, SIGMAS[:count]) for count in range(1, 5)] == [
        gammas[:1],
        gammas[:1],
        gammas[:2],
        gammas[:3],
    ]
    assert gammas_of_part(gammas, SIGMAS[:0]) is gammas


def test_levels_are_known_as_far_as_float32_has_them():
    """In another dtype, or after a multiplication and a division, a level is the same to some millionths."""
    assert places_in(SIGMAS[1:] * (1 + 5e-6), SIGMAS) == places_in(SIGMAS[1:] * (1 - 5e-6), SIGMAS) == [1, 2, 3]
    assert places_in(SIGMAS, SIGMAS) == [0, 1, 2, 3]
    with pytest.raises(ValueError, match="no step of it starts from"):
        places_in(SIGMAS[1:] * (1 + 5e-5), SIGMAS)


def test_where_there_is_no_signal_or_no_noise_all_of_the_noise_is_old():
    """Pure noise of a flow model at both levels, and a process from picture to picture."""
    table = torch.linspace(0.001, 1.0, 1000)
    assert noise_kept(torch.tensor([1.0, 1.0]), 1e-12, table=table, noise_scaling=rectified_flow) == [1.0]
    assert noise_kept(table[[900, 500]], 0.5, table=table, noise_scaling=lambda sigma, noise, latent: latent) == [1.0]


def test_a_run_has_as_many_gammas_as_steps_at_most():
    assert len(parse_gammas("1," * MOST_STEPS)) == MOST_STEPS
    with pytest.raises(ValueError, match=f"gammas has {MOST_STEPS + 1:,} entries"):
        parse_gammas("1," * (MOST_STEPS + 1))


def test_a_level_that_the_schedule_lacks_is_refused():
    with pytest.raises(ValueError, match=r"no step of it starts from 3:.*as it was before it was split"):
        gammas_of_part([0, 1], torch.tensor([3.0, 0.0]), SIGMAS)


def test_a_part_is_refused_the_gammas_that_the_undivided_run_has_no_steps_for():
    assert gammas_of_part([0, 0, 0, 1], SIGMAS[2:], SIGMAS) == [0, 1]
    with pytest.raises(ValueError, match="gamma has 5 entries but the run has 4 steps"):
        gammas_of_part([0, 0, 0, 0, 1], SIGMAS[2:], SIGMAS)


def test_a_text_may_have_as_many_gammas_as_a_run_has_steps_and_no_more():
    assert parse_gammas("1 " * MOST_STEPS) == [1.0] * MOST_STEPS
    with pytest.raises(ValueError, match="has 1,001 entries"):
        parse_gammas("1 " * (MOST_STEPS + 1))
