"""LoRA by Step: a run whose strength changes is the run in parts, each with the model that has that strength."""

import comfy.samplers
import pytest
import torch

from lcm_kit.host.lora import patches
from lcm_kit.host.lora.by_step import EARLY, _frames
from lcm_kit.nodes.by_step import LoRAByStep
from lcm_kit.nodes.sampling import LCMKSampler
from lcm_kit.nodes.scheduling import LCMScheduler
from lcm_kit.tests.with_comfyui import tiny

pytestmark = pytest.mark.usefixtures("no_gradients")


def euler(model, positive, negative, sigmas, latent, cfg, noise=None):
    guider = comfy.samplers.CFGGuider(model)
    guider.set_conds(positive, negative)
    guider.set_cfg(cfg)
    noise = torch.zeros_like(latent) if noise is None else noise
    return guider.sample(noise, latent, comfy.samplers.sampler_object("euler"), sigmas, disable_pbar=True)


@pytest.mark.parametrize("cfg", [1.0, 2.0])
@pytest.mark.parametrize("steps", [2, 4, 8])
@pytest.mark.parametrize("scheduler", ["lcm", "simple", "sgm_uniform"])
def test_a_run_is_its_steps_with_the_model_of_each_strength(cfg, steps, scheduler):
    model, lora = tiny.small_model(), tiny.lora(tiny.small_model())
    strengths = [1.0, 0.25, 0.25, 0.0, -0.5, 0.5, 0.0, 1.0][:steps]
    sampling = model.get_model_object("model_sampling")
    if scheduler == "lcm":
        sigmas = LCMScheduler.execute(model=model, steps=steps, denoise=1.0, original_steps=50, timesteps="").result[0]
    else:
        sigmas = comfy.samplers.calculate_sigmas(sampling, scheduler, steps)
    noise = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(1))
    positive, negative, _, report = LoRAByStep.execute(
        model=model, lora=lora, positive=tiny.cond(1), negative=tiny.cond(2), strengths=", ".join(map(str, strengths))
    ).result
    found = euler(model, positive, negative, sigmas, torch.zeros_like(noise), cfg, noise)
    wanted, latent = None, torch.zeros_like(noise)
    for number, strength in enumerate(strengths):
        patched = patches.apply(model, None, lora, strength, 0.0).model
        two = sigmas[number : number + 2]
        wanted = euler(patched, tiny.cond(1), tiny.cond(2), two, latent, cfg, noise if number == 0 else None)
        latent = wanted
    assert float((found - wanted).abs().max()) <= 2e-5 * float(wanted.abs().max())
    assert "strength 1 at first, 0.25 from" in report


def test_one_strength_is_the_lora_applied():
    model, lora = tiny.small_model(), tiny.lora(tiny.small_model())
    positive, negative, hooks, _ = LoRAByStep.execute(
        model=model, lora=lora, positive=tiny.cond(1), strengths="0.7"
    ).result
    assert negative is None
    assert [hook.weights is not None for hook in hooks.hooks] == [True]
    settings = {
        "seed": 5, "steps": 4, "cfg": 1.0, "denoise": 1.0, "gamma": 1.0, "cfg_steps": -1, "original_steps": 50,
        "latent_image": tiny.latent(),
    }  # fmt: skip
    found = LCMKSampler.execute(model=model, positive=positive, **settings).result[0]["samples"]
    patched = patches.apply(model, None, lora, 0.7, 0.0).model
    wanted = LCMKSampler.execute(model=patched, positive=tiny.cond(1), **settings).result[0]["samples"]
    assert float((found - wanted).abs().max()) <= 2e-5 * float(wanted.abs().max())


def test_the_prompts_and_the_model_stay_as_they_were():
    model, prompt = tiny.small_model(), tiny.cond(1)
    LoRAByStep.execute(model=model, lora=tiny.lora(model), positive=prompt, strengths="1, 0")
    assert "hooks" not in prompt[0][1]
    assert not model.patches


@pytest.mark.parametrize("count", [1, 2, 3, 4, 8, 50])
def test_a_strength_begins_before_its_step_and_after_the_one_before(count):
    frames = _frames([float(n % 2) for n in range(count)])
    assert [start for start, _ in frames] == [0.0] + [(n - EARLY) / count for n in range(1, count)]
    assert _frames([0.5] * count) == [(0.0, 0.5)]


@pytest.mark.parametrize(
    ("strengths", "word"), [("", "strengths is empty"), ("1, x", "'x' is no number"), ("1000", "not from -100")]
)
def test_what_is_no_list_of_strengths_is_refused(strengths, word):
    model = tiny.small_model()
    with pytest.raises(ValueError, match=word):
        LoRAByStep.execute(model=model, lora=tiny.lora(model), positive=tiny.cond(1), strengths=strengths)


def test_a_lora_for_another_model_is_refused():
    model = tiny.small_model()
    other = {
        "lora_unet_nowhere_0.lora_up.weight": torch.ones(4, 2),
        "lora_unet_nowhere_0.lora_down.weight": torch.ones(2, 4),
    }
    with pytest.raises(ValueError, match="does not fit this model"):
        LoRAByStep.execute(model=model, lora=other, positive=tiny.cond(1), strengths="1, 0")
