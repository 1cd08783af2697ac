"""Limit Denoised in ComfyUI's own sampling: exactly off, exactly what the limit says, with every sampler."""

import comfy.samplers
import pytest
import torch
from comfy_extras import nodes_custom_sampler as custom

from lcm_kit.nodes.guidance import LimitDenoised
from lcm_kit.nodes.sampling import LCMKSampler
from lcm_kit.samplers.limits import limit_denoised
from lcm_kit.tests.with_comfyui import tiny

SEED = 7


pytestmark = pytest.mark.usefixtures("no_gradients")


@pytest.fixture(scope="module")
def model():
    return tiny.small_model()


def limited(model, quantile=0.9):
    return LimitDenoised.execute(model=model, quantile=quantile).result[0]


def lcm(model, cfg, steps=4, latent=None):
    return LCMKSampler.execute(
        model=model, positive=tiny.cond(1), negative=tiny.cond(2), latent_image=latent or tiny.latent(2), seed=SEED,
        steps=steps, cfg=cfg, denoise=1.0, gamma=1.0, cfg_steps=-1, original_steps=50,
    ).result[0]["samples"]  # fmt: skip


def through_core(model, cfg, sampler, steps=3):
    sigmas = comfy.samplers.calculate_sigmas(model.get_model_object("model_sampling"), "normal", steps)
    sampler = custom.KSamplerSelect.execute(sampler).result[0]
    return custom.SamplerCustom.execute(
        model, True, SEED, cfg, tiny.cond(1), tiny.cond(2), sampler, sigmas, tiny.latent()
    ).result[0]["samples"]


@pytest.mark.parametrize("cfg", [1.0, 4.0])
def test_off_is_the_model_itself(model, cfg):
    assert limited(model, 1.0) is model
    assert torch.equal(lcm(limited(model, 1.0), cfg), lcm(model, cfg))


@pytest.mark.parametrize("sampler", ["euler", "dpmpp_2m", "lcm"])
def test_guidance_one_is_unchanged_bit_by_bit_in_every_sampler(model, sampler):
    assert torch.equal(through_core(limited(model), 1.0, sampler), through_core(model, 1.0, sampler))
    assert torch.equal(lcm(limited(model), 1.0), lcm(model, 1.0))


@pytest.mark.parametrize("sampler", ["euler", "dpmpp_2m", "lcm"])
def test_higher_guidance_is_limited_in_every_sampler(model, sampler):
    assert not torch.equal(through_core(limited(model), 4.0, sampler), through_core(model, 4.0, sampler))


def test_one_step_is_the_limit_of_the_guided_prediction(model):
    """One LCM step returns x0 up to c_skip * x, 3e-8 of it: it must be the pure function of the two predictions."""
    guided, unguided = lcm(model, 4.0, steps=1), lcm(model, 1.0, steps=1)
    expected = limit_denoised(guided, unguided, 0.9)
    made = lcm(limited(model, 0.9), 4.0, steps=1)
    torch.testing.assert_close(made, expected, rtol=0, atol=1e-5 * float(expected.abs().max()))
    assert float((made - guided).abs().max()) > 1e-2 * float(expected.abs().max())


def test_every_step_is_limited_after_the_guidance_of_other_nodes(model):
    """RescaleCFG replaces the guidance; the limit sees its result."""
    from comfy_extras.nodes_model_advanced import RescaleCFG

    seen = []
    (rescaled,) = RescaleCFG().patch(limited(model, 0.9), 0.7)
    rescaled.set_model_sampler_post_cfg_function(
        lambda args: seen.append((args["denoised"], args["cond_denoised"])) or args["denoised"]
    )
    lcm(rescaled, 4.0)
    assert len(seen) == 4
    for denoised, unguided in seen:
        assert torch.equal(limit_denoised(denoised, unguided, 0.9), denoised)  # nothing is left to limit


def test_model_given_is_left_as_it_was_and_no_model_call_is_added(model):
    before = lcm(model, 4.0)
    counted, seen = tiny.count_calls(model)
    patched = limited(counted)
    lcm(patched, 1.0)
    assert seen.calls == 4  # not 8: cfg 1 stays one call a step
    lcm(patched, 4.0)
    assert seen.calls == 4 + 8
    assert "sampler_post_cfg_function" not in model.model_options
    assert torch.equal(lcm(model, 4.0), before)


def test_an_image_of_a_batch_is_limited_as_if_alone(model):
    alone = lcm(limited(model), 4.0, latent=tiny.latent(1))
    torch.testing.assert_close(lcm(limited(model), 4.0)[:1], alone, rtol=1e-4, atol=1e-4 * float(alone.abs().max()))


def test_a_quantile_out_of_range_is_refused_before_sampling(model):
    with pytest.raises(ValueError, match=r"quantile is 0\.3"):
        limited(model, 0.3)
