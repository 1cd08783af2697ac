"""Images of a batch in SamplerCustom, whose samplers are not told a batch index: each is the image made alone."""

import comfy.sample
import comfy_extras.nodes_post_processing  # noqa: F401  first: it and nodes_latent import each other
import pytest
import torch
from comfy.model_base import ModelType
from comfy_extras import nodes_latent
from nodes import LatentFromBatch

from lcm_kit.host.sampling.batch import indices_by_noise
from lcm_kit.tests.helpers import relative
from lcm_kit.tests.with_comfyui import tiny
from lcm_kit.tests.with_comfyui.sampled import (
    SEED,
    in_parts,
    in_parts_advanced,
    ksampler,
    ours,
    picture,
    sampler_custom,
    scheduled,
)

pytestmark = pytest.mark.usefixtures("no_gradients")

FRONT_ENDS = pytest.mark.parametrize("front_end", [ksampler, in_parts, in_parts_advanced])


@FRONT_ENDS
@pytest.mark.parametrize("index", [0, 2, 5])
def test_an_image_of_a_batch_is_the_image_made_alone(front_end, index):
    model, latent = tiny.small_model(ModelType.V_PREDICTION), picture(batch=6)
    (alone,) = LatentFromBatch().frombatch(latent, index, 1)
    assert relative(front_end(model, alone), front_end(model, latent)[index : index + 1]) < 1e-5


@pytest.mark.parametrize("indices", [[0], [7], [0, 1, 2], [2, 0], [9, 4, 4], [3, 3, 3]])
@pytest.mark.parametrize("parts", [in_parts, in_parts_advanced])
def test_parts_are_lcm_ksampler_to_the_bit_whatever_the_batch_index(parts, indices):
    latent = picture(batch=len(indices)) | {"batch_index": indices}
    model = tiny.small_model()
    assert torch.equal(parts(model, latent), ksampler(model, latent))


@FRONT_ENDS
def test_frames_of_a_fixed_batch_seed_are_equal(front_end):
    one = picture()["samples"]
    latent = nodes_latent.LatentBatchSeedBehavior.execute({"samples": one.expand(4, -1, -1, -1)}, "fixed").result[0]
    frames = front_end(tiny.small_model(ModelType.V_PREDICTION), latent)
    assert relative(frames[1:], frames[:1].expand(3, -1, -1, -1)) < 1e-5


def test_frames_of_a_fixed_batch_seed_stay_equal_in_a_run_of_two_parts():
    one = picture()["samples"]
    latent = {"samples": one.expand(3, -1, -1, -1), "batch_index": [4, 4, 4]}
    model = tiny.small_model(ModelType.V_PREDICTION)
    sigmas = scheduled(model)
    halfway, _ = sampler_custom(model, latent, ours(), sigmas[:3])
    halfway["samples"] = halfway["samples"][:1].expand(3, -1, -1, -1)  # but for the rounding of a batch
    finished, _ = sampler_custom(model, halfway, ours(), sigmas[2:], add_noise=False)
    assert relative(finished["samples"][1:], finished["samples"][:1].expand(2, -1, -1, -1)) < 1e-5


# ---- what the index is read from


@pytest.mark.parametrize("shape", [(4, 8, 8), (16, 3, 4, 4), (1, 48)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("indices", [[0, 1, 2, 3], [17], [5, 5, 1]])
def test_cores_noise_tells_its_batch_indices_in_any_precision(shape, dtype, indices):
    samples = torch.zeros(len(indices), *shape)
    noise = comfy.sample.prepare_noise(samples, SEED, indices).to(
        dtype
    )  # as core rounds it to the latent's, but in 0.16
    assert indices_by_noise(noise.float(), samples, SEED) == indices


def test_cores_noise_of_a_batch_without_an_index_counts_from_zero():
    samples = torch.zeros(5, 4, 8, 8)
    assert indices_by_noise(comfy.sample.prepare_noise(samples, SEED), samples, SEED) == [0, 1, 2, 3, 4]


def test_images_of_an_odd_size_which_core_draws_otherwise_together_count_from_zero():
    samples = torch.zeros(3, 4, 5, 5)
    assert indices_by_noise(comfy.sample.prepare_noise(samples, SEED), samples, SEED) == [0, 1, 2]
    one = samples[:1]
    assert indices_by_noise(comfy.sample.prepare_noise(one, SEED, [2]), one, SEED) == [2]


def test_noise_of_another_source_counts_from_zero_and_equal_noise_is_one_image():
    generator = torch.Generator().manual_seed(77)
    noise, latent = torch.randn(3, 4, 8, 8, generator=generator), torch.zeros(3, 4, 8, 8)
    assert indices_by_noise(noise, latent, SEED) == [0, 1, 2]
    assert indices_by_noise(noise[[0, 0, 1]], latent, SEED) == [0, 0, 2]
    assert indices_by_noise(noise, latent, None) == [0, 1, 2]
    assert indices_by_noise(None, latent, SEED) == [0, 1, 2]


def test_latents_that_come_with_their_noise_count_from_zero_and_equal_ones_are_one_image():
    latent = picture(batch=3)["samples"]
    zeros = torch.zeros_like(latent)
    assert indices_by_noise(zeros, latent, SEED) == [0, 1, 2]
    assert indices_by_noise(zeros, latent[[1, 1, 0]], SEED) == [0, 0, 2]


def test_no_images_have_no_indices():
    assert indices_by_noise(torch.zeros(0, 4, 8, 8), torch.zeros(0, 4, 8, 8), SEED) == []


def test_torchs_own_generator_is_not_touched():
    noise = torch.randn(2, 4, 8, 8)
    before = torch.get_rng_state()
    indices_by_noise(noise, torch.zeros_like(noise), SEED + 1)
    assert torch.equal(torch.get_rng_state(), before)
