"""The guidance embedding of full LCMs: diffusers', the formula itself, and the ends of its ranges."""

import math
import warnings

import pytest
import torch

from lcm_kit.samplers.guidance import guidance_embedding

SCALES = [0.0, 1.0, 3.0, 4.0, 7.5, 8.0, 8.5, 13.0, 15.0]

# Sum, sum of magnitudes, first and last entry at CFG scales, computed with diffusers 0.42.1.
SUMS = {
    1.0: (128.0, 128.0, 0.0, 1.0),
    4.0: (34.157196, 163.289001, 0.219190, 0.955337),
    7.5: (-0.686271, 163.111542, -0.044785, 0.796084),
    8.0: (7.969544, 163.653519, 0.506885, 0.764842),
}


def embedding_of_diffusers(w, dim):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from diffusers.pipelines.latent_consistency_models import pipeline_latent_consistency_text2img as module
    method = module.LatentConsistencyModelPipeline.get_guidance_scale_embedding
    return method(None, w, embedding_dim=dim)


@pytest.mark.parametrize("dim", [4, 5, 64, 255, 256, 512])
def test_embedding_is_that_of_diffusers(dim):
    w = torch.tensor(SCALES) - 1.0
    torch.testing.assert_close(guidance_embedding(w, dim), embedding_of_diffusers(w, dim), rtol=0, atol=1e-6)


@pytest.mark.parametrize("scale", SUMS)
def test_embedding_has_the_recorded_sums(scale):
    embedding = guidance_embedding(scale - 1.0)
    total, magnitude, first, last = SUMS[scale]
    # 1e-2: another processor's exp may round one frequency differently, which moves sines by up to 1e-3
    assert embedding.sum().item() == pytest.approx(total, abs=1e-2)
    assert embedding.abs().sum().item() == pytest.approx(magnitude, abs=1e-2)
    # the ends have the frequencies 1 and 1e-4
    assert embedding[0].item() == pytest.approx(first, abs=1e-5)
    assert embedding[-1].item() == pytest.approx(last, abs=1e-5)


def test_embedding_is_the_formula():
    """In Python's own floats, entry by entry."""
    w, half = 3.5, 8
    angles = [1000 * w * 10000 ** (-i / (half - 1)) for i in range(half)]
    expected = [*map(math.sin, angles), *map(math.cos, angles)]
    # float32 keeps an angle of 3500 to 2e-4
    torch.testing.assert_close(guidance_embedding(w, 16), torch.tensor(expected), rtol=0, atol=1e-3)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.int64])
def test_a_weight_of_any_dtype_has_the_embedding_of_the_number_it_is(dtype):
    embedding = guidance_embedding(torch.tensor([7, -2], dtype=dtype), 16)
    assert embedding.dtype == torch.float32
    assert torch.equal(embedding[0], guidance_embedding(7.0, 16))


def test_no_guidance_is_zeros_and_ones():
    assert torch.equal(guidance_embedding(0.0, 8), torch.tensor([0.0] * 4 + [1.0] * 4))


def test_odd_lengths_end_in_a_zero():
    embedding = guidance_embedding(7.0, 9)
    assert torch.equal(embedding[:8], guidance_embedding(7.0, 8))
    assert embedding[8] == 0


def test_many_weights_give_what_each_gives_alone():
    w = torch.tensor([2.0, 6.5])
    together = guidance_embedding(w, 32)
    assert together.shape == (2, 32)
    assert together.dtype == torch.float32
    for row, weight in zip(together, w.tolist(), strict=True):
        assert torch.equal(row, guidance_embedding(weight, 32))


@pytest.mark.parametrize("w", [math.nan, math.inf, torch.tensor([1.0, math.nan])])
def test_a_weight_that_is_not_finite_is_refused(w):
    with pytest.raises(ValueError, match=r"must be finite.*CFG scale minus 1"):
        guidance_embedding(w)


@pytest.mark.parametrize("dim", [-1, 0, 3])
def test_a_length_without_frequencies_is_refused(dim):
    with pytest.raises(ValueError, match=rf"dim is {dim}; .*at least 4"):
        guidance_embedding(7.0, dim)
