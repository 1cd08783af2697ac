"""Limited and scaled noise: identities by hand, and unit variance under a feathered mask for every share of old noise."""

import pytest
import torch

from lcm_kit.samplers.noise import StepNoise
from lcm_kit.samplers.shaped_noise import ShapedNoise, feathered_factors, ramp

LEVEL = 500_000


def like(batch=2, side=8):
    return torch.zeros(batch, 4, side, side)


def test_without_settings_it_is_the_source_to_the_bit():
    assert torch.equal(ShapedNoise(StepNoise(3))(LEVEL, like()), StepNoise(3)(LEVEL, like()))


def test_the_limit_is_in_standard_deviations_of_the_images_own_noise():
    plain, limited = (source(LEVEL, like()) for source in (StepNoise(3), ShapedNoise(StepNoise(3), clip_std=1.5)))
    for image, of_image in zip(plain, limited, strict=True):
        bound = 1.5 * image.std()
        assert torch.equal(of_image, image.clamp(-bound, bound))
        assert (of_image.abs() == bound).any()


def test_noise_of_one_value_has_no_deviation_to_be_limited_by():
    one = torch.zeros(3, 1)
    assert torch.equal(ShapedNoise(StepNoise(3), clip_std=0.5)(LEVEL, one), StepNoise(3)(LEVEL, one))


def test_an_image_is_limited_alike_alone_and_in_a_batch():
    together = ShapedNoise(StepNoise(3), clip_std=1.0)(LEVEL, like(3))
    alone = ShapedNoise(StepNoise(3, [2]), clip_std=1.0)(LEVEL, like(1))
    assert torch.equal(alone[0], together[2])


def test_a_level_is_multiplied_by_its_own_factor():
    source = ShapedNoise(StepNoise(3), factors={LEVEL: 0.5, 7: torch.full((1, 1, 8, 8), 2.0)})
    assert torch.equal(source(LEVEL, like()), StepNoise(3)(LEVEL, like()) * 0.5)
    assert torch.equal(source(7, like()), StepNoise(3)(7, like()) * 2)
    assert torch.equal(source(8, like()), StepNoise(3)(8, like()))


def test_the_tensors_of_a_source_that_keeps_them_are_not_changed():
    tape = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    before = tape.clone()
    ShapedNoise(lambda level, like: tape, clip_std=1.0, factors={LEVEL: 3.0})(LEVEL, like())
    assert torch.equal(tape, before)


def test_a_ramp_goes_from_its_start_in_the_first_step_to_its_end_in_the_last():
    assert ramp(1.0, 0.0, range(5), 5) == [1.0, 0.75, 0.5, 0.25, 0.0]
    assert ramp(1.0, 0.0, [3, 4], 5) == [0.25, 0.0]
    assert ramp(0.7, 0.1, [0], 1) == [0.7]


def test_lcms_own_steps_under_a_feathered_mask_have_the_factor_worked_out_by_hand():
    mask = torch.tensor([0.0, 0.1, 0.5, 0.9, 1.0])
    (factor,) = feathered_factors(mask, [0.0])
    expected = [1.0, (1.9 / 0.1) ** 0.5, 3.0**0.5, (1.1 / 0.9) ** 0.5, 1.0]
    torch.testing.assert_close(factor, torch.tensor(expected))
    assert factor[0] == factor[-1] == 1.0


@pytest.mark.parametrize("kept", [0.0, 0.3, 0.7, 1.0])
def test_where_all_may_change_or_nothing_noise_is_added_as_it_is(kept):
    mask = torch.tensor([0.0, 1.0])
    for factor in feathered_factors(mask, [0.9, 0.1, 0.7, 0.33], kept):
        assert factor.tolist() == [1.0, 1.0]


@pytest.mark.parametrize("shares", [[0.0] * 4, [0.9, 0.5, 0.1], [1.0, 0.0, 0.3], [0.3] * 6, [1.0, 1.0]])
@pytest.mark.parametrize("value", [0.02, 0.25, 0.5, 0.9, 1.0])
def test_what_the_model_sees_has_unit_variance_after_every_step(shares, value):
    """The noise written out as coefficients of the independent draws, whose squares add up to its variance."""
    x = [1.0] + [0.0] * len(shares)  # of the initial noise, of each step's fresh noise
    for step, (share, factor) in enumerate(
        zip(shares, feathered_factors(torch.tensor(value, dtype=torch.float64), shares), strict=True)
    ):
        x = [share * coefficient for coefficient in x]
        x[step + 1] += (1 - share**2) ** 0.5 * float(factor)
        seen = [value * coefficient for coefficient in x]
        seen[0] += 1 - value
        assert sum(coefficient**2 for coefficient in seen) == pytest.approx(1.0, abs=1e-12)


def test_a_part_goes_on_with_what_is_left_of_the_initial_noise():
    mask = torch.linspace(0, 1, 11)
    whole = feathered_factors(mask, [0.7, 0.4, 0.2])
    rest = feathered_factors(mask, [0.4, 0.2], kept=0.7)
    for factor, expected in zip(rest, whole[1:], strict=True):
        assert torch.equal(factor, expected)
