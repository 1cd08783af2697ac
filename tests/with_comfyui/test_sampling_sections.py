"""LCM KSampler from a step to a step, and with two models: against the undivided run, core's nodes and loops by hand."""

from functools import cache

import comfy.sample
import comfy.utils
import pytest
import torch
from comfy.model_base import ModelType
from comfy_extras import nodes_model_advanced
from nodes import KSamplerAdvanced, SetLatentNoiseMask

from lcm_kit.host.sampling.runs import initial_noise
from lcm_kit.samplers.noise import StepNoise, level_numbers
from lcm_kit.samplers.presets import PRESETS
from lcm_kit.tests.helpers import relative
from lcm_kit.tests.with_comfyui import tiny
from lcm_kit.tests.with_comfyui.sampled import (
    CAT,
    DOG,
    SEED,
    ksampler,
    ours,
    picture,
    sampler_custom,
    scheduled,
)

pytestmark = pytest.mark.usefixtures("no_gradients")

FIRST = {"return_with_leftover_noise": True}
GOES_ON = {"add_noise": False}
# Four steps, two of them at or above 0.875 at shift 5: times 1, 0.9375, 0.8333, 0.625.
WAN = {"preset": PRESETS["DMD2"]}


@cache
def epsilon():
    return tiny.small_model()


@cache
def experts():
    """(high, low) of Wan's architecture, with the shift that Wan 2.2 is sampled at."""
    patch = nodes_model_advanced.ModelSamplingSD3()
    return tuple(patch.patch(tiny.tiny_video_model(seed=seed), 5.0)[0] for seed in (0, 1))


@pytest.fixture(autouse=True, scope="module")
def _models_are_let_go():
    yield
    epsilon.cache_clear()
    experts.cache_clear()


def video(batch=1):
    return {"samples": torch.zeros(batch, 16, 2, 8, 8)}


# ---- from a step to a step


@pytest.mark.parametrize("settings", [{}, {"gammas": "0, 0.3, 1, 0.2"}, {"cfg": 1.5, "negative": DOG, "cfg_steps": 3}])
def test_two_sections_are_the_undivided_run_wherever_they_meet(settings):
    latent = picture(batch=2) | {"batch_index": [3, 7]}
    undivided = ksampler(epsilon(), latent, steps=6, denoise=0.8, **settings)
    for place in range(1, 6):
        settings_of_both = {"steps": 6, "denoise": 0.8, **settings}
        halfway = ksampler(epsilon(), latent, end_at_step=place, **FIRST, **settings_of_both)
        rest = latent | {"samples": halfway}
        finished = ksampler(epsilon(), rest, start_at_step=place, **GOES_ON, **settings_of_both)
        assert torch.equal(finished, undivided)


def test_sections_of_one_step_are_the_undivided_run():
    latent = picture()
    undivided = ksampler(epsilon(), latent)
    for step in range(4):
        samples = ksampler(epsilon(), latent, start_at_step=step, end_at_step=step + 1, add_noise=step == 0, **FIRST)
        latent = {"samples": samples}
    assert torch.equal(samples, undivided)


def test_another_prompt_from_the_middle_on_is_sampler_custom_on_the_rest_of_the_schedule():
    halfway = {"samples": ksampler(epsilon(), picture(), end_at_step=2, **FIRST)}
    expected, _ = sampler_custom(epsilon(), halfway, ours(), scheduled(epsilon())[2:], add_noise=False)
    assert torch.equal(ksampler(epsilon(), halfway, start_at_step=2, **GOES_ON), expected["samples"])
    changed = ksampler(epsilon(), halfway, start_at_step=2, positive=DOG, **GOES_ON)
    assert relative(changed, expected["samples"]) > 1e-3


def test_a_section_that_leaves_no_noise_ends_in_what_the_model_sees_there():
    _, denoised = sampler_custom(epsilon(), picture(), ours(), scheduled(epsilon())[:3])
    # The boundary scalings, of which the model knows nothing, are below 7e-6.
    assert relative(ksampler(epsilon(), picture(), end_at_step=2), denoised["samples"]) < 1e-5


@pytest.mark.parametrize(("start", "end"), [(4, 1000), (9, 1000), (0, 0), (3, 3), (3, 2)])
def test_where_no_step_is_left_the_latent_is_given_on_and_said_so(start, end, caplog):
    model, seen = tiny.count_calls(epsilon())
    assert torch.equal(ksampler(model, picture(), start_at_step=start, end_at_step=end), picture()["samples"])
    assert seen.calls == 0
    assert f"no step from {start} on and before {end} in a run of 4" in caplog.text


@pytest.mark.parametrize("leftover", [False, True])
@pytest.mark.parametrize(("start", "end"), [(0, 2), (1, 3), (2, 4), (0, 1000), (5, 9)])
def test_a_section_at_gamma_zero_is_cores_ksampler_advanced_with_euler(start, end, leftover):
    high, _ = experts()
    generator = torch.Generator().manual_seed(9)
    latent, add = {"samples": torch.randn(video()["samples"].shape, generator=generator)}, start == 0
    core = KSamplerAdvanced().sample(
        high, "enable" if add else "disable", SEED, 4, 1.0, "euler", "simple", CAT, CAT, latent, start, end,
        "enable" if leftover else "disable",
    )[0]["samples"]  # fmt: skip
    result = ksampler(
        high, latent, gammas="0", start_at_step=start, end_at_step=end, add_noise=add,
        return_with_leftover_noise=leftover, **WAN,
    )  # fmt: skip
    assert relative(result, core) < 1e-5


def test_a_mask_in_a_section_that_goes_on_keeps_the_noise_as_in_core_and_that_is_said(caplog):
    (masked,) = SetLatentNoiseMask().set_mask(picture(), torch.eye(8))
    halfway = masked | {"samples": ksampler(epsilon(), masked, end_at_step=2, **FIRST)}
    assert not caplog.records
    finished = ksampler(epsilon(), halfway, start_at_step=2, **GOES_ON)
    kept = (torch.eye(8) == 0).expand(1, 4, 8, 8)
    assert torch.equal(finished[kept], halfway["samples"][kept])
    assert relative(finished[kept], picture()["samples"][kept]) > 0.1
    assert caplog.text.count("What the mask keeps stays as it came, with the noise") == 1


def test_nodes_that_draw_do_the_same_in_every_run_of_a_section_but_not_in_every_section():
    drawn = []
    model = tiny.small_model()
    model.set_model_unet_function_wrapper(
        lambda apply_model, args: (
            drawn.append(float(torch.rand(()))),
            apply_model(args["input"], args["timestep"], **args["c"]),
        )[1]
    )
    for _ in range(2):
        ksampler(model, picture(), start_at_step=2, **GOES_ON)
    ksampler(model, picture(), start_at_step=1, **GOES_ON)
    assert drawn[:2] == drawn[2:4]
    assert len(set(drawn)) == 2 + 3


# ---- two models


def core_halves(latent):
    """As in the published graphs: two KSamplerAdvanced of Euler's method, that meet at step 2."""
    high, low = experts()
    arguments = (4, 1.0, "euler", "simple", CAT, CAT)
    halfway = KSamplerAdvanced().sample(high, "enable", SEED, *arguments, latent, 0, 2, "enable")[0]
    return KSamplerAdvanced().sample(low, "disable", 0, *arguments, halfway, 2, 4, "disable")[0]["samples"]


@pytest.mark.parametrize("boundary", [0.875, 0.9, 0.9375, 0.84])
def test_two_experts_at_gamma_zero_are_cores_two_ksampler_advanced(boundary):
    high, low = experts()
    result = ksampler(high, video(), model_low=low, boundary=boundary, gammas="0", **WAN)
    assert relative(result, core_halves(video())) < 1e-5


def by_hand(models, latent, sigmas, gamma=1.0):
    """Every step of a flow model written out, each by the model that the level belongs to; x0 + fresh noise."""
    indices = list(range(len(latent)))
    noise, table = initial_noise(latent, SEED, indices), models[0].get_model_object("model_sampling").sigmas
    x, numbers = sigmas[0] * noise + (1 - sigmas[0]) * latent, level_numbers(sigmas, table)
    for step, sigma in enumerate(sigmas[:-1]):
        model = models[0] if sigma >= 0.875 else models[1]
        prompt = CAT[0][0].expand(len(latent), -1, -1)
        x0 = model.model.apply_model(x, sigma.expand(len(latent)), c_crossattn=prompt)
        if sigmas[step + 1] > 0:
            fresh = StepNoise(SEED)(numbers[step + 1], x0)
            x0 = sigmas[step + 1] * fresh + (1 - sigmas[step + 1]) * x0
        x = x0
    return models[0].model.process_latent_out(x)


@pytest.mark.parametrize("batch", [1, 2])
def test_two_experts_at_gamma_one_are_a_loop_that_changes_the_model(batch):
    latent = video(batch)
    expected = by_hand(experts(), latent["samples"], scheduled_as_wan())
    result = ksampler(experts()[0], latent, model_low=experts()[1], **WAN)
    assert relative(result, expected) < 1e-5
    assert relative(ksampler(experts()[0], latent, **WAN), expected) > 0.01


def scheduled_as_wan():
    return torch.tensor([1.0, 0.9375, 5 / 6, 0.625, 0.0])


def test_two_experts_draw_no_noise_twice(monkeypatch):
    drawn, call = [], StepNoise.__call__

    def watched(source, level, like):
        drawn.append(call(source, level, like))
        return drawn[-1].clone()

    monkeypatch.setattr(StepNoise, "__call__", watched)
    # Another shift, so another table: its levels have other times.
    other = nodes_model_advanced.ModelSamplingSD3().patch(tiny.tiny_video_model(seed=1), 5 / 3)[0]
    ksampler(experts()[0], video(), model_low=other, **WAN)
    drawn.append(initial_noise(video()["samples"], SEED, [0]))
    assert len({noise.numpy().tobytes() for noise in drawn}) == len(drawn) == 4


@pytest.mark.parametrize("gamma", [1.0, 0.4, 0.0])
def test_a_model_that_is_both_experts_is_the_plain_run(gamma):
    """To the bit, in latents of five dimensions, of one, nested and masked: the stages hand on what the model saw."""
    (masked,) = SetLatentNoiseMask().set_mask(picture(batch=2), torch.eye(8))
    cases = [
        (tiny.small_model(), picture(batch=2)),
        (tiny.small_model(ModelType.FLOW), picture(batch=2)),
        (tiny.small_model(ModelType.FLOW), masked),
        (tiny.tiny_video_model(), video(2)),
        (tiny.pair_model(), tiny.nested(torch.zeros(2, 4, 8, 8), torch.zeros(2, 3, 5))),
    ]
    for model, latent in cases:
        for boundary in (0.5, 0.8):
            result, plain = (
                ksampler(model, latent, gamma=gamma, **settings)
                for settings in ({"model_low": model, "boundary": boundary}, {})
            )
            for part, expected in zip(result.unbind(), plain.unbind(), strict=True):
                assert torch.equal(part, expected)


@pytest.mark.parametrize(
    ("boundary", "calls"), [(0.875, (2, 2)), (1.0, (1, 3)), (0.0, (4, 0)), (0.9, (2, 2)), (0.95, (1, 3))]
)
def test_each_expert_is_asked_for_its_own_steps_alone_and_the_bar_counts_both(boundary, calls):
    (high, of_high), (low, of_low) = (tiny.count_calls(model) for model in experts())
    seen = []
    comfy.utils.set_progress_bar_global_hook(lambda value, total, preview, node_id=None: seen.append((value, total)))
    try:
        ksampler(high, video(), model_low=low, boundary=boundary, **WAN)
    finally:
        comfy.utils.set_progress_bar_global_hook(None)
    assert (of_high.calls, of_low.calls) == calls
    assert seen == [(call, 4) for call in range(1, 5)]


def test_a_section_of_two_experts_is_that_section():
    high, low = experts()
    undivided = ksampler(high, video(), model_low=low, **WAN)
    halfway = {"samples": ksampler(high, video(), model_low=low, end_at_step=3, **FIRST, **WAN)}
    finished = ksampler(high, halfway, model_low=low, start_at_step=3, **GOES_ON, **WAN)
    # ComfyUI hands flow latents on divided by 1 - sigma.
    assert relative(finished, undivided) < 1e-5


@pytest.mark.parametrize(
    ("low", "message"),
    [
        (lambda: tiny.small_model(ModelType.FLOW), r"not the same kind of latent \(Wan21 and TinyLatent\)"),
        (lambda: told_epsilon(), r"not the same way to add noise \(CONST and EPS\)"),
    ],
)
def test_models_that_cannot_share_a_latent_are_refused(low, message):
    with pytest.raises(ValueError, match=message):
        ksampler(experts()[0], video(), model_low=low(), **WAN)


def told_epsilon():
    return nodes_model_advanced.ModelSamplingDiscrete().patch(tiny.tiny_video_model(), "eps", False)[0]


def test_the_generator_goes_on_from_one_expert_to_the_other_and_is_put_back():
    drawn = []

    def watched(model):
        model = model.clone()
        model.set_model_unet_function_wrapper(
            lambda apply_model, args: (
                drawn.append(float(torch.rand(()))),
                apply_model(args["input"], args["timestep"], **args["c"]),
            )[1]
        )
        return model

    before = torch.get_rng_state()
    ksampler(watched(experts()[0]), video(), model_low=watched(experts()[1]), **WAN)
    assert torch.equal(torch.get_rng_state(), before)
    comfy.sample.prepare_noise(video()["samples"], SEED)
    assert drawn == [float(torch.rand(())) for _ in range(4)]
