"""Normalised attention guidance: worked values, its neutral points, and the limit it promises."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lcm_kit.samplers.attention_guidance import normalized_attention_guidance

USUAL = {"scale": 3.0, "tau": 2.5, "alpha": 0.5}


def attention(seed, *shape, dtype=torch.float32):
    return torch.randn(shape or (2, 7, 24), generator=torch.Generator().manual_seed(seed)).to(dtype)


def published(z_positive, z_negative, scale, tau, alpha):
    """The equations one token at a time, in double precision."""
    result = torch.empty_like(z_positive, dtype=torch.float64)
    for index in torch.cartesian_prod(*(torch.arange(n) for n in z_positive.shape[:-1])):
        positive, negative = (z[tuple(index)].double().tolist() for z in (z_positive, z_negative))
        guided = [scale * p - (scale - 1) * n for p, n in zip(positive, negative, strict=True)]
        ratio = sum(map(abs, guided)) / sum(map(abs, positive))
        guided = [g * min(ratio, tau) / ratio for g in guided]
        blended = [alpha * g + (1 - alpha) * p for g, p in zip(guided, positive, strict=True)]
        result[tuple(index)] = torch.tensor(blended, dtype=torch.float64)
    return result


def test_a_value_worked_out_by_hand():
    positive, negative = torch.tensor([[1.0, 1.0]]), torch.tensor([[3.0, 0.0]])
    # 3 z+ - 2 z- = (-3, 3), length 6 against 2: three times as long, cut to 2.5 times: (-2.5, 2.5); half and half
    guided = normalized_attention_guidance(positive, negative, **USUAL)
    assert torch.equal(guided, torch.tensor([[-0.75, 1.75]]))


@pytest.mark.parametrize(("scale", "tau", "alpha"), [(3, 2.5, 0.5), (5, 1.0, 0.25), (11, 10, 1.0), (1.1, 1.5, 0.9)])
def test_it_is_the_published_formula(scale, tau, alpha):
    positive, negative = attention(1), attention(2)
    expected = published(positive, negative, scale, tau, alpha)
    guided = normalized_attention_guidance(positive, negative, scale=scale, tau=tau, alpha=alpha)
    torch.testing.assert_close(guided.double(), expected, rtol=1e-5, atol=1e-6)  # float32 against float64


@pytest.mark.parametrize("off", [{"scale": 1.0}, {"alpha": 0.0}])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_scale_one_and_alpha_zero_return_the_positive_to_the_bit(off, dtype):
    positive = attention(1, dtype=dtype)
    # nothing of the negative is looked at, be it ever so broken
    negative = torch.full_like(positive, float("nan"))
    assert torch.equal(normalized_attention_guidance(positive, negative, **USUAL | off), positive)


@given(scale=st.floats(1.0, 30.0), tau=st.floats(1.0, 10.0), alpha=st.floats(0.0, 1.0), seed=st.integers(0, 9))
def test_a_negative_equal_to_the_positive_changes_nothing(scale, tau, alpha, seed):
    positive = attention(seed)
    guided = normalized_attention_guidance(positive, positive.clone(), scale=scale, tau=tau, alpha=alpha)
    assert torch.equal(guided, positive)


@given(scale=st.floats(1.0, 100.0), tau=st.floats(1.0, 10.0), alpha=st.floats(0.0, 1.0), seed=st.integers(0, 9))
def test_no_token_gets_longer_than_tau_allows(scale, tau, alpha, seed):
    positive, negative = attention(seed), 5 * attention(seed + 100)
    guided = normalized_attention_guidance(positive, negative, scale=scale, tau=tau, alpha=alpha)
    longest = (alpha * tau + 1 - alpha) * positive.abs().sum(-1)
    assert (guided.abs().sum(-1) <= longest * (1 + 1e-5)).all()


def test_tokens_do_not_see_each_other():
    positive, negative = attention(1), attention(2)
    together = normalized_attention_guidance(positive, negative, **USUAL)
    alone = normalized_attention_guidance(positive[1:, 3:4], negative[1:, 3:4], **USUAL)
    assert torch.equal(together[1:, 3:4], alone)


def test_a_token_of_zeros_stays_zeros():
    positive = attention(1)
    positive[0, 0] = 0
    guided = normalized_attention_guidance(positive, attention(2), **USUAL)
    assert torch.equal(guided[0, 0], torch.zeros(24))
    assert torch.isfinite(guided).all()
    both = normalized_attention_guidance(torch.zeros(1, 4), torch.zeros(1, 4), **USUAL)
    assert torch.equal(both, torch.zeros(1, 4))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_computed_in_float32_and_returned_as_it_came(dtype):
    # in float16 the sum of 1280 channels of 100 overflows
    positive, negative = (100 * attention(seed, 1, 3, 1280, dtype=dtype) for seed in (1, 2))
    guided = normalized_attention_guidance(positive, negative, **USUAL)
    assert guided.dtype == dtype
    assert torch.equal(guided, normalized_attention_guidance(positive.float(), negative.float(), **USUAL).to(dtype))


def test_nothing_that_was_handed_in_is_changed():
    positive, negative = attention(1), attention(2)
    before = positive.clone(), negative.clone()
    normalized_attention_guidance(positive, negative, **USUAL)
    assert torch.equal(positive, before[0])
    assert torch.equal(negative, before[1])


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"scale": 0.9}, r"scale is 0\.9; it must be 1 \(off\) or more.*exchange the two prompts"),
        ({"scale": float("nan")}, "scale is nan"),
        ({"scale": float("inf")}, "scale is inf"),
        ({"tau": 0.5}, r"tau is 0\.5; it must be 1 or more.*lower alpha"),
        ({"alpha": 1.5}, r"alpha is 1\.5; it must be from 0 \(off\) to 1"),
        ({"alpha": float("nan")}, "alpha is nan"),
    ],
)
def test_values_out_of_range_are_refused(wrong, message):
    with pytest.raises(ValueError, match=message):
        normalized_attention_guidance(attention(1), attention(2), **USUAL | wrong)
