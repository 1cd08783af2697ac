"""The limit of the denoised picture: values worked out by hand, an independent slow version, and its invariances."""

import math

import pytest
import torch

from lcm_kit.samplers import limits
from lcm_kit.samplers.limits import limit_denoised

SHAPES = [(1, 4, 64), (2, 4, 8, 8), (1, 3, 2, 5, 7)]


def pair(shape, seed=0, guidance=3.0, dtype=torch.float32):
    """(guided, unguided) x0 as classifier-free guidance makes them."""
    generator = torch.Generator().manual_seed(seed)
    with_prompt, without = (torch.randn(shape, generator=generator, dtype=torch.float64) for _ in range(2))
    return (without + guidance * (with_prompt - without)).to(dtype), with_prompt.to(dtype)


def slow(guided, unguided, quantile):
    """The definition, one value at a time."""
    limited = guided.clone()
    for image in range(guided.shape[0]):
        for channel in range(guided.shape[1]):
            ordered = sorted(unguided[image, channel].flatten().tolist())
            upper = math.ceil(round(quantile * (len(ordered) - 1), 4))
            low, high = ordered[len(ordered) - 1 - upper], ordered[upper]
            values = [
                min(max(g, min(low, u)), max(high, u))
                for g, u in zip(
                    guided[image, channel].flatten().tolist(), unguided[image, channel].flatten().tolist(), strict=True
                )
            ]
            limited[image, channel] = torch.tensor(values, dtype=guided.dtype).reshape(guided.shape[2:])
    return limited


def test_values_worked_out_by_hand():
    """Ten values and quantile 0.9: the largest but one of 0..9 is at 8.1, outwards the 9; at 8/9 it is the 8."""
    unguided = torch.arange(10.0).reshape(1, 1, 10)
    guided = torch.tensor([-5.0, 20.0, -1.0, 3.5, 9.0, 8.5, 0.5, 8.0, 8.75, 12.0]).reshape(1, 1, 10)
    whole = [0.0, 9.0, 0.0, 3.5, 9.0, 8.5, 0.5, 8.0, 8.75, 9.0]
    assert limit_denoised(guided, unguided, 0.9).flatten().tolist() == whole
    assert limit_denoised(guided, unguided, 1.0).flatten().tolist() == whole
    # the range is 1 to 8; 0 may stay where the unguided value is 0, 9 where it is 9
    inner = [0.0, 8.0, 1.0, 3.5, 8.0, 8.0, 1.0, 8.0, 8.0, 9.0]
    assert limit_denoised(guided, unguided, 8 / 9).flatten().tolist() == inner


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("quantile", [0.51, 0.9, 0.95, 0.99, 1.0])
def test_limit_is_its_definition(shape, quantile):
    guided, unguided = pair(shape)
    limited = limit_denoised(guided, unguided, quantile)
    assert torch.equal(limited, slow(guided, unguided, quantile))
    assert not torch.equal(limited, guided)  # guidance 3 on noise leaves the range of the unguided


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("quantile", [0.51, 0.9, 1.0])
def test_guidance_one_is_left_alone_bit_by_bit(shape, quantile):
    _, unguided = pair(shape)
    assert torch.equal(limit_denoised(unguided, unguided, quantile), unguided)


def test_what_guidance_pulls_towards_the_middle_is_left_alone():
    _, unguided = pair((1, 4, 8, 8))
    assert torch.equal(limit_denoised(0.5 * unguided, unguided, 0.9), 0.5 * unguided)


@pytest.mark.parametrize("scale", [4.0, -0.25])
def test_scaling_and_shifting_a_channel_does_the_same_to_the_result(scale):
    """Exactly: powers of two. A sign too, because both sides are treated alike."""
    guided, unguided = pair((2, 4, 8, 8))
    factor, shift = torch.ones(1, 4, 1, 1), torch.zeros(1, 4, 1, 1)
    factor[:, 2] = scale
    expected = factor * limit_denoised(guided, unguided, 0.95)
    assert torch.equal(limit_denoised(factor * guided, factor * unguided, 0.95), expected)
    shift[:, 1] = 3.0
    shifted = limit_denoised(guided + shift, unguided + shift, 0.95)
    torch.testing.assert_close(shifted, limit_denoised(guided, unguided, 0.95) + shift)


def test_an_image_has_the_same_limit_alone_and_in_a_batch():
    guided, unguided = pair((3, 4, 8, 8))
    together = limit_denoised(guided, unguided, 0.95)
    for image in range(3):
        alone = limit_denoised(guided[image : image + 1], unguided[image : image + 1], 0.95)
        assert torch.equal(together[image : image + 1], alone)


def test_position_counts_only_through_the_unguided_value_there():
    guided, unguided = pair((1, 2, 64))
    order = torch.randperm(64, generator=torch.Generator().manual_seed(1))
    shuffled = limit_denoised(guided[..., order], unguided[..., order], 0.95)
    assert torch.equal(shuffled, limit_denoised(guided, unguided, 0.95)[..., order])


def test_a_lower_quantile_limits_more():
    guided, unguided = pair((1, 4, 16, 16))
    changes = [(limit_denoised(guided, unguided, q) - guided).abs().sum() for q in (1.0, 0.99, 0.95, 0.9, 0.7)]
    assert changes == sorted(changes)
    assert changes[0] < changes[-1]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_dtype_stays_and_nothing_given_is_changed(dtype):
    guided, unguided = pair((1, 4, 8, 8), dtype=dtype)
    before = guided.clone(), unguided.clone()
    limited = limit_denoised(guided, unguided, 0.9)
    assert limited.dtype == dtype
    assert torch.equal(guided, before[0])
    assert torch.equal(unguided, before[1])
    wide = limit_denoised(guided.double(), unguided.double(), 0.9)
    assert torch.equal(limited.double(), wide)  # it picks values and computes none


@pytest.mark.parametrize("quantile", [0.51, 0.9, 0.99, 1.0])
@pytest.mark.parametrize("count", [1, 2, 10, 101])
def test_both_ways_to_find_the_quantiles_agree(quantile, count, monkeypatch):
    """Other devices sort; the CPU only selects."""
    values = torch.randn(2, 3, count, generator=torch.Generator().manual_seed(0))

    class Elsewhere(torch.Tensor):
        device = torch.device("cuda")

    sorted_there = limits._outer_values(values.as_subclass(Elsewhere), quantile)
    for selected, ordered in zip(limits._outer_values(values, quantile), sorted_there, strict=True):
        assert torch.equal(selected, ordered.as_subclass(torch.Tensor))


def test_quantiles_are_those_of_torch():
    values = torch.randn(1, 2, 101, generator=torch.Generator().manual_seed(0))
    for quantile in (0.9, 0.95, 0.99, 1.0):  # on 101 values these fall on entries
        low, high = limits._outer_values(values, quantile)
        torch.testing.assert_close(high.flatten(), torch.quantile(values[0], quantile, dim=-1, interpolation="nearest"))
        torch.testing.assert_close(
            low.flatten(), torch.quantile(values[0], 1 - quantile, dim=-1, interpolation="nearest")
        )


def test_a_video_of_more_values_than_torch_quantile_takes():
    unguided = torch.zeros(1, 1, 2**24 + 1)
    unguided[..., -1] = 2.0
    guided = unguided + 3.0
    assert limit_denoised(guided, unguided, 1.0).max() == 2.0


@pytest.mark.parametrize("quantile", [0.5, 0.0, -1.0, 1.01, math.nan])
def test_a_quantile_out_of_range_is_refused(quantile):
    guided, unguided = pair((1, 4, 8, 8))
    with pytest.raises(ValueError, match=r"above 0\.5 and at most 1"):
        limit_denoised(guided, unguided, quantile)


@pytest.mark.parametrize("shapes", [((1, 4, 8, 8), (1, 4, 8, 7)), ((2, 4), (2, 4)), ((1, 4, 8, 8), (1, 1, 8, 8))])
def test_shapes_that_do_not_fit_are_named(shapes):
    guided, unguided = (torch.zeros(shape) for shape in shapes)
    with pytest.raises(ValueError, match=r"must be the same \(batch, channels, \.\.\.\)"):
        limit_denoised(guided, unguided, 0.9)
