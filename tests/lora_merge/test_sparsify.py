"""Pruning: values worked out by hand, expectations, and the ends of every range."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lcm_kit.lora_merge.methods import sparsify
from lcm_kit.lora_merge.methods.sparsify import at_random, by_magnitude, by_magnitude_at_random, without_outliers

DELTA = torch.tensor([[4.0, -1.0, 0.5], [-3.0, 2.0, -5.0]])


def drawn(seed=0):
    return torch.Generator().manual_seed(seed)


PRUNINGS = {
    "magnitude": lambda delta, density: by_magnitude(delta, density),
    "outliers": lambda delta, density: without_outliers(delta, density, 0.0),
    "random": lambda delta, density: at_random(delta, density, drawn()),
    "della": lambda delta, density: by_magnitude_at_random(delta, density, 0.1, drawn()),
}


@pytest.mark.parametrize("prune", PRUNINGS.values(), ids=PRUNINGS)
def test_density_one_keeps_all_and_density_zero_none(prune):
    before = DELTA.clone()
    assert torch.equal(prune(DELTA, 1.0), DELTA)
    assert torch.equal(prune(DELTA, 0.0), torch.zeros_like(DELTA))
    assert torch.equal(DELTA, before)
    assert prune(DELTA, 1.0).data_ptr() != DELTA.data_ptr()


@pytest.mark.parametrize("prune", PRUNINGS.values(), ids=PRUNINGS)
def test_what_a_process_takes_for_its_default_device_draws_nothing(prune):
    """Another pack may have set one: meta stands for a device without numbers."""
    wanted = prune(DELTA, 0.5)
    with torch.device("meta"):
        assert torch.equal(prune(DELTA, 0.5), wanted)


def test_the_largest_entries_stay_as_they_are():
    expected = torch.tensor([[4.0, 0.0, 0.0], [-3.0, 0.0, -5.0]])
    assert torch.equal(by_magnitude(DELTA, 0.5), expected)


def test_breadcrumbs_lose_the_largest_and_the_smallest():
    # one sixth is cut at the top (-5), half stay: 4, -3, 2
    expected = torch.tensor([[4.0, 0.0, 0.0], [-3.0, 2.0, 0.0]])
    assert torch.equal(without_outliers(DELTA, 0.5, 1 / 6), expected)


def test_shares_that_overlap_are_refused():
    with pytest.raises(ValueError, match=r"density 0\.9 and outliers 0\.2 add up to more than 1.* Lower one"):
        without_outliers(DELTA, 0.9, 0.2)


@given(density=st.floats(0.0, 1.0), outliers=st.floats(0.0, 1.0))
def test_the_shares_are_exact_counts(density, outliers):
    delta = torch.arange(1.0, 101.0).reshape(10, 10)
    assert int((by_magnitude(delta, density) != 0).sum()) == round(100 * density)
    if density + outliers <= 1:
        kept = without_outliers(delta, density, outliers)
        assert int((kept != 0).sum()) == min(round(100 * density), 100 - round(100 * outliers))
        assert kept.max() <= 100 - round(100 * outliers)


@pytest.mark.parametrize("density", [0.1, 0.5, 0.9])
def test_random_pruning_keeps_the_expectation(density):
    delta = torch.ones(500, 500)
    kept = at_random(delta, density, drawn())
    assert sorted(kept.unique().tolist()) == pytest.approx([0.0, 1 / density])
    # 250000 draws of standard deviation sqrt((1 - p) / p) <= 3: five standard errors are 0.03
    assert kept.mean().item() == pytest.approx(1.0, abs=0.03)


def test_della_keeps_the_expectation_and_prefers_the_large():
    delta = torch.linspace(0.1, 1.0, 500).expand(2000, 500)
    kept = by_magnitude_at_random(delta, 0.5, 0.4, drawn())
    chance = (kept != 0).float().mean(dim=0)
    # 0.3 for the smallest, 0.7 for the largest of a row; 2000 draws: five standard errors are 0.056
    torch.testing.assert_close(chance, torch.linspace(0.3, 0.7, 500), rtol=0, atol=0.056)
    torch.testing.assert_close(kept.mean(dim=0), delta[0], rtol=0.2, atol=0)


def test_della_without_spread_is_dare():
    delta = torch.randn(20, 30, generator=drawn(1))
    torch.testing.assert_close(by_magnitude_at_random(delta, 0.3, 0.0, drawn(5)), at_random(delta, 0.3, drawn(5)))


def test_the_same_generator_gives_the_same_entries():
    delta = torch.randn(20, 30, generator=drawn(1))
    assert torch.equal(at_random(delta, 0.5, drawn(3)), at_random(delta, 0.5, drawn(3)))
    assert not torch.equal(at_random(delta, 0.5, drawn(3)), at_random(delta, 0.5, drawn(4)))


def test_convolutions_count_as_rows_by_output():
    delta = torch.randn(8, 4, 3, 3, generator=drawn(1))
    flat = by_magnitude_at_random(delta.reshape(8, -1), 0.5, 0.2, drawn(2))
    assert torch.equal(by_magnitude_at_random(delta, 0.5, 0.2, drawn(2)), flat.reshape(delta.shape))


def test_of_two_entries_the_larger_stays_for_sure_where_the_spread_is_whole():
    """Probabilities run from 0.5 - 1 / 2 to 0.5 + 1 / 2 in every row."""
    delta = torch.tensor([[1.0, -2.0], [3.0, 0.5]])
    kept = by_magnitude_at_random(delta, 0.5, 1.0, torch.Generator().manual_seed(0))
    assert torch.equal(kept, torch.tensor([[0.0, -2.0], [3.0, 0.0]]))


def test_a_draw_that_is_the_chance_itself_keeps_nothing(monkeypatch):
    """Draws are below 1 and may be 0: so a chance of 0 keeps nothing, one of 1 all, and each is what it says."""
    delta = torch.tensor([[1.0, -2.0, 4.0], [3.0, 0.5, 6.0]])
    for drawn_as in (0.0, 0.5):
        monkeypatch.setattr(sparsify, "_uniform", lambda like, generator, value=drawn_as: torch.full_like(like, value))
        kept = by_magnitude_at_random(delta, 0.5, 1.0, drawn())  # chances 0, 1/2 and 1
        middle = torch.tensor([[0.0, -4.0, 0.0], [6.0, 0.0, 0.0]]) * (drawn_as < 0.5)
        assert torch.equal(kept, torch.tensor([[0.0, 0.0, 4.0], [0.0, 0.0, 6.0]]) + middle)
        assert torch.equal(at_random(delta, 0.5, drawn()), 2 * delta * (drawn_as < 0.5))
