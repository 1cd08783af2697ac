"""What step noise is under a feathered mask, and with the options of core's SamplerLCM."""

import inspect
from functools import cache

import comfy.samplers
import pytest
import torch
from comfy.k_diffusion import sampling as core
from comfy.model_base import ModelType
from comfy_extras import nodes_differential_diffusion
from nodes import SetLatentNoiseMask

from lcm_kit.samplers.noise import StepNoise
from lcm_kit.samplers.shaped_noise import ShapedNoise
from lcm_kit.tests.helpers import relative
from lcm_kit.tests.with_comfyui import tiny
from lcm_kit.tests.with_comfyui.sampled import (
    cores_sampler,
    in_parts,
    ksampler,
    ours,
    picture,
    sampler_custom,
    scheduled,
)

pytestmark = pytest.mark.usefixtures("no_gradients")

VALUES = [1.0, 0.9, 0.75, 0.5, 0.25, 0.1, 0.0]
SIDE, LARGE = 8, 64
EVERY_TYPE = pytest.mark.parametrize("model_type", [ModelType.EPS, ModelType.V_PREDICTION, ModelType.FLOW])


@cache
def made(model_type):
    return tiny.small_model(model_type)


@pytest.fixture(autouse=True, scope="module")
def _models_are_let_go():
    yield
    made.cache_clear()


# ---- feathered masks


def feathered(batch=1, side=SIDE):
    """An empty latent with a stripe of every mask value."""
    mask = torch.tensor(VALUES).repeat_interleave(side).expand(side, -1)
    (masked,) = SetLatentNoiseMask().set_mask({"samples": torch.zeros(batch, 4, side, side * len(VALUES))}, mask)
    return masked


def noise_seen(model_type, run):
    """For every call of a model whose x0 is always 0: the standard deviation of each stripe, in shares of the noise told."""
    seen, model = [], made(model_type).clone()
    forward = model.get_model_object("model_sampling").noise_scaling

    def watched(apply_model, args):
        sigma = args["timestep"][0]
        told = float(forward(sigma, torch.ones(()), torch.zeros(())))
        seen.append([float(stripe.std()) / told for stripe in args["input"].chunk(len(VALUES), dim=-1)])
        return torch.zeros_like(args["input"])

    model.set_model_unet_function_wrapper(watched)
    run(model)
    return seen


@EVERY_TYPE
@pytest.mark.parametrize("settings", [{}, {"gamma": 0.3}, {"gamma": 0.0}, {"gammas": "1, 0, 0.5"}])
def test_the_model_sees_the_noise_it_is_told_at_every_mask_value(model_type, settings):
    shares = noise_seen(model_type, lambda model: ksampler(model, feathered(side=LARGE), **settings))
    assert len(shares) == 4
    # Five standard errors of 16384 numbers are 2.8 %; without the cure 0.5 shows 0.71 from the second call on.
    assert all(share == pytest.approx(1.0, abs=0.028) for call in shares for share in call)


def test_so_does_the_second_of_two_experts():
    model = made(ModelType.FLOW)
    settings = {"boundary": 0.6, "gamma": 0.3}
    seen = noise_seen(ModelType.FLOW, lambda high: ksampler(high, feathered(side=LARGE), model_low=high, **settings))
    assert len(seen) == 4
    assert all(share == pytest.approx(1.0, abs=0.028) for call in seen for share in call)
    assert torch.equal(
        ksampler(model, feathered(), model_low=model, **settings), ksampler(model, feathered(), gamma=0.3)
    )


@EVERY_TYPE
def test_a_mask_of_zeros_and_ones_alone_is_cores_maths(model_type):
    model, latent = made(model_type), picture(batch=2)
    (masked,) = SetLatentNoiseMask().set_mask(latent, torch.eye(8))
    expected, _ = sampler_custom(model, masked, cores_sampler(), scheduled(model))
    assert relative(ksampler(model, masked), expected["samples"]) < 2e-5


def test_noise_at_zero_and_one_is_the_same_to_the_bit_as_without_feathers(monkeypatch):
    """The pixel under 1 gets the plain step noise, whatever lies beside it."""
    drawn = {ShapedNoise: [], StepNoise: []}

    def watch(kind, call):
        def watched(source, level, like):
            noise = call(source, level, like)
            drawn[kind].append(noise.clone())
            return noise

        monkeypatch.setattr(kind, "__call__", watched)

    for kind in drawn:
        watch(kind, kind.__call__)
    ksampler(made(ModelType.EPS), feathered())
    assert len(drawn[ShapedNoise]) == len(drawn[StepNoise]) == 3
    for shaped, plain in zip(drawn[ShapedNoise], drawn[StepNoise], strict=True):
        for stripe in (0, len(VALUES) - 1):
            columns = slice(stripe * SIDE, (stripe + 1) * SIDE)
            assert torch.equal(shaped[..., columns], plain[..., columns])
        assert not torch.equal(shaped, plain)


def test_an_image_under_a_feathered_mask_is_the_image_made_alone():
    model = made(ModelType.V_PREDICTION)
    together = ksampler(model, feathered(2))
    alone = ksampler(model, feathered(1) | {"batch_index": [1]})
    assert relative(alone, together[1:]) < 1e-5


def test_parts_are_lcm_ksampler_under_a_feathered_mask():
    model = made(ModelType.V_PREDICTION)
    assert torch.equal(in_parts(model, feathered()), ksampler(model, feathered()))


def test_differential_diffusion_decides_the_mask_itself_and_stays_cores_maths():
    model = nodes_differential_diffusion.DifferentialDiffusion.execute(made(ModelType.V_PREDICTION)).result[0]
    expected, _ = sampler_custom(model, feathered(), cores_sampler(), scheduled(model))
    assert relative(ksampler(model, feathered()), expected["samples"]) < 2e-5


# ---- s_noise, s_noise_end, noise_clip_std


NEWER = pytest.mark.skipif(
    "s_noise" not in inspect.signature(core.sample_lcm).parameters, reason="this ComfyUI's lcm has no s_noise"
)
OPTIONS = [
    {"s_noise": 0.9, "s_noise_end": 0.9},
    {"s_noise": 1.2, "s_noise_end": 0.5},
    {"noise_clip_std": 2.5},
    {"s_noise": 1.0, "s_noise_end": 0.0, "noise_clip_std": 1.0},
]


def with_options(options):
    """Core's "lcm" with these options and our noise."""
    plain = cores_sampler().sampler_function
    return comfy.samplers.KSAMPLER(plain, options)


@NEWER
@EVERY_TYPE
@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("steps", [1, 4])
def test_the_options_of_cores_sampler_are_cores(model_type, options, steps):
    model, latent = made(model_type), picture(batch=1)
    sigmas = scheduled(model, steps)
    expected, _ = sampler_custom(model, latent, with_options(options), sigmas)
    result, _ = sampler_custom(model, latent, ours(**options), sigmas)
    assert relative(result["samples"], expected["samples"]) < 2e-5
    if steps > 1:
        assert relative(result["samples"], in_parts(model, latent)) > 1e-3


@pytest.mark.parametrize("gamma", [1.0, 0.4, 0.0])
def test_their_defaults_are_the_sampler_without_them_to_the_bit(gamma):
    neutral = {"s_noise": 1.0, "s_noise_end": 1.0, "noise_clip_std": 0.0}
    model, latent = made(ModelType.EPS), picture(batch=2)
    assert torch.equal(in_parts(model, latent, gamma=gamma, **neutral), ksampler(model, latent, gamma=gamma))


@pytest.mark.parametrize("options", OPTIONS)
def test_an_image_of_a_batch_is_the_image_made_alone_with_them(options):
    model, latent = made(ModelType.V_PREDICTION), picture(batch=3)
    together = in_parts(model, latent, **options)
    alone = {"samples": latent["samples"][2:], "batch_index": [2]}
    assert relative(in_parts(model, alone, **options), together[2:]) < 1e-5


@pytest.mark.parametrize("options", OPTIONS)
def test_a_run_in_parts_with_them_is_the_undivided_run(options):
    model, latent = made(ModelType.EPS), picture()
    sigmas = scheduled(model)
    halfway, _ = sampler_custom(model, latent, ours(sigmas=sigmas, **options), sigmas[:3])
    finished, _ = sampler_custom(model, halfway, ours(sigmas=sigmas, **options), sigmas[2:], add_noise=False)
    assert torch.equal(finished["samples"], in_parts(model, latent, **options))


def test_a_part_that_cannot_know_its_place_is_refused_where_s_noise_changes():
    model, sigmas = made(ModelType.EPS), scheduled(made(ModelType.EPS))
    sampler = ours(s_noise=1.0, s_noise_end=0.5)
    for part, add_noise in ((sigmas[:3], True), (sigmas[2:], False)):
        with pytest.raises(
            ValueError, match=r"s_noise changes.*Connect the whole schedule.*set s_noise_end to s_noise"
        ):
            sampler_custom(model, picture(), sampler, part, add_noise=add_noise)
    sampler_custom(model, picture(), ours(s_noise=0.5, s_noise_end=0.5), sigmas[:3])


def test_gamma_zero_draws_nothing_that_could_be_shaped(monkeypatch):
    monkeypatch.setattr(StepNoise, "__call__", None)
    sampler_custom(made(ModelType.EPS), picture(), ours(gamma=0.0, s_noise=2.0), scheduled(made(ModelType.EPS)))
