"""Beside other packs: what they hand to a sampler, or put in the place of core's for a run, does what it does for core's."""

import logging

import comfy.samplers
import pytest
import torch
from comfy.k_diffusion import sampling as core
from comfy.patcher_extension import WrappersMP
from comfy_extras import nodes_custom_sampler as custom
from nodes import KSampler

from lcm_kit.host.sampling.sampler import lcm_sampler
from lcm_kit.host.sampling.schedules import lcm_sigmas
from lcm_kit.nodes.any_ksampler import LCMAnyKSampler
from lcm_kit.nodes.sampling import LCMKSampler
from lcm_kit.tests.with_comfyui import tiny

SEED = 5

pytestmark = pytest.mark.usefixtures("no_gradients")


@pytest.fixture(scope="module")
def model():
    return tiny.small_model()


def other_noise(model, make):
    """A clone whose runs have another pack's default_noise_sampler, put there and taken away as AnimateDiff-Evolved does."""

    def wrapper(executor, *args, **kwargs):
        cores = core.default_noise_sampler
        core.default_noise_sampler = make
        try:
            return executor(*args, **kwargs)
        finally:
            core.default_noise_sampler = cores

    model = model.clone()
    model.add_wrapper(WrappersMP.SAMPLER_SAMPLE, wrapper)
    return model


def constant(offset):
    """The same noise for all frames, from seed 77 + offset."""

    def make(x, seed=None):
        generator = torch.Generator().manual_seed(77 + offset)
        return lambda sigma, sigma_next: torch.randn(x[:1].shape, generator=generator).expand(x.shape).to(x)

    return make


def sampler_custom(model, sampler, frames=4):
    noise = custom.RandomNoise.execute(SEED).result[0]
    guider = custom.BasicGuider.execute(model, tiny.cond(1)).result[0]
    sigmas = lcm_sigmas(model, steps=4, denoise=1.0, original_steps=50)
    latent = tiny.latent(frames) | {"batch_index": [0] * frames}
    return custom.SamplerCustomAdvanced.execute(noise, guider, sampler, sigmas, latent).result[0]["samples"]


def ksampler(model, frames=4):
    return LCMKSampler.execute(
        model=model, positive=tiny.cond(1), latent_image=tiny.latent(frames) | {"batch_index": [0] * frames}, seed=SEED,
        steps=4, cfg=1.0, denoise=1.0, gamma=1.0, cfg_steps=-1, original_steps=50,
    ).result[0]["samples"]  # fmt: skip


@pytest.mark.parametrize("offset", [0, 5])
def test_step_noise_of_another_pack_is_used_as_core_uses_it(model, offset):
    with_it = other_noise(model, constant(offset))
    expected = sampler_custom(with_it, comfy.samplers.sampler_object("lcm"))
    for picture in (sampler_custom(with_it, lcm_sampler(gamma=1.0, seed=-1)), ksampler(with_it)):
        torch.testing.assert_close(picture, expected, rtol=1e-4, atol=1e-4)
        assert torch.equal(picture[0], picture[3])
    assert not torch.equal(ksampler(with_it), ksampler(model))
    assert torch.equal(ksampler(model), ksampler(model))


def test_another_seed_of_that_noise_is_another_picture(model):
    assert not torch.equal(ksampler(other_noise(model, constant(0))), ksampler(other_noise(model, constant(5))))


def test_gamma_zero_asks_for_none(model):
    def refuse(x, seed=None):
        return lambda sigma, sigma_next: pytest.fail("gamma 0 draws nothing")

    picture = sampler_custom(other_noise(model, refuse), lcm_sampler(gamma=0.0, seed=-1))
    assert torch.equal(picture, sampler_custom(model, lcm_sampler(gamma=0.0, seed=-1)))


def test_any_ksampler_uses_it_too(model):
    exact = LCMAnyKSampler.execute(model=other_noise(model, constant(0)), gamma=1.0, original_steps=50).result[0]
    latent = tiny.latent(4) | {"batch_index": [0] * 4}
    picture = KSampler().sample(
        exact, SEED, 4, 1.0, "lcm", "simple", tiny.cond(1), tiny.cond(2), latent, 1.0
    )[0]["samples"]  # fmt: skip
    assert torch.equal(picture, ksampler(other_noise(model, constant(0))))


def test_options_that_a_wrapper_hands_to_any_sampler_change_nothing(model, caplog):
    """RES4LYF's SharkSampler and its sampler options do so."""
    sampler = lcm_sampler(gamma=1.0, seed=-1)
    expected = sampler_custom(model, sampler)
    sampler.extra_options = sampler.extra_options | {"outer_sigmas_len": 5, "t_fn_formula": "x"}
    with caplog.at_level(logging.INFO):
        assert torch.equal(sampler_custom(model, sampler), expected)
    assert "no use for the option outer_sigmas_len, t_fn_formula" in caplog.text
