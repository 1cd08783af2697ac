"""A run that is made in parts is the undivided run: SplitSigmas at every place, step by step, other gammas in each step."""

from functools import cache

import pytest
import torch
from comfy.model_base import ModelType
from comfy_extras import nodes_custom_sampler as custom

from lcm_kit.samplers.noise import StepNoise
from lcm_kit.tests.helpers import relative
from lcm_kit.tests.with_comfyui import tiny
from lcm_kit.tests.with_comfyui.sampled import (
    CAT,
    SEED,
    ksampler,
    ours,
    picture,
    sampler_custom,
    scheduled,
)

pytestmark = pytest.mark.usefixtures("no_gradients")

# kind -> how to make it, and how exactly ComfyUI itself hands a latent on from one node to the next: it is scaled, by a
# power of 2 here, and in flow models divided by 1 - sigma.
KINDS = {
    "epsilon": (tiny.small_model, 0.0),
    "v": (lambda: tiny.small_model(ModelType.V_PREDICTION), 0.0),
    "v, zero terminal SNR": (lambda: tiny.small_model(ModelType.V_PREDICTION, sampling_settings={"zsnr": True}), 0.0),
    "EDM": (lambda: tiny.small_model(ModelType.EDM), 0.0),
    "flow": (lambda: tiny.small_model(ModelType.FLOW), 1e-4),
    "flow, 10000 levels": (lambda: tiny.small_model(ModelType.FLUX), 1e-4),
    "flow of videos": (tiny.tiny_video_model, 1e-4),
}
GAMMAS = {"1": {}, "0.3": {"gamma": 0.3}, "0": {"gamma": 0.0}, "list": {"gammas": "0, 0.3, 1, 0.2"}}


@cache
def made(kind):
    return KINDS[kind][0]()


@pytest.fixture(autouse=True, scope="module")
def _models_are_let_go():
    yield
    made.cache_clear()


def latent_of(kind):
    return {"samples": torch.zeros(2, 16, 3, 4, 6)} if "video" in kind else picture(batch=2)


def levels(kind, steps):
    if kind == "EDM":
        return torch.cat([torch.logspace(1, -1, steps), torch.zeros(1)])
    return scheduled(made(kind), steps)


def one_after_another(kind, parts, **settings):
    """The parts in turn, one LCM Multistep Sampler with one seed; noise is added before the first."""
    latent = latent_of(kind)
    for number, sigmas in enumerate(parts):
        latent, _ = sampler_custom(made(kind), latent, ours(**settings), sigmas, add_noise=number == 0)
    return latent["samples"]


def same(kind, result, expected):
    tolerance = KINDS[kind][1]
    return relative(result, expected) < tolerance if tolerance else torch.equal(result, expected)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("gamma", GAMMAS)
@pytest.mark.parametrize("steps", [4, 8])
def test_a_run_split_anywhere_is_the_undivided_run(kind, gamma, steps):
    sigmas = levels(kind, steps)
    settings = GAMMAS[gamma] | {"sigmas": sigmas}
    undivided = one_after_another(kind, [sigmas], **settings)
    everywhere = kind in ("epsilon", "flow") and gamma in ("1", "list")
    places = range(1, steps) if everywhere else [1, steps // 2, steps - 1]
    for place in places:
        parts = custom.SplitSigmas.execute(sigmas, place).result
        assert same(kind, one_after_another(kind, parts, **settings), undivided), f"split at {place}"
    single_steps = [sigmas[place : place + 2] for place in range(steps)]
    assert same(kind, one_after_another(kind, single_steps, **settings), undivided)


@pytest.mark.parametrize("kind", ["epsilon", "flow"])
def test_the_undivided_run_is_lcm_ksamplers(kind):
    expected = ksampler(made(kind), latent_of(kind), gammas="0, 0.3, 1")
    assert torch.equal(one_after_another(kind, [levels(kind, 4)], gammas="0, 0.3, 1"), expected)


def advanced(noise, sampler, sigmas, latent):
    guider = custom.BasicGuider.execute(made("epsilon"), CAT).result[0]
    return custom.SamplerCustomAdvanced.execute(noise.result[0], guider, sampler, sigmas, latent).result[0]


def test_disable_noise_goes_on_with_the_seed_that_both_samplers_were_given(caplog):
    sigmas, latent = levels("epsilon", 4), latent_of("epsilon")
    undivided = advanced(custom.RandomNoise.execute(3), ours(seed=SEED), sigmas, latent)
    halfway = advanced(custom.RandomNoise.execute(3), ours(seed=SEED), sigmas[:3], latent)
    finished = advanced(custom.DisableNoise.execute(), ours(seed=SEED), sigmas[2:], halfway)
    assert torch.equal(finished["samples"], undivided["samples"])
    assert not caplog.records


def test_disable_noise_without_a_seed_takes_zero_and_says_so_once(caplog):
    sigmas = levels("epsilon", 4)
    halfway = advanced(custom.RandomNoise.execute(3), ours(), sigmas[:2], latent_of("epsilon"))
    assert not caplog.records
    finished = advanced(custom.DisableNoise.execute(), ours(), sigmas[1:], halfway)
    assert torch.equal(
        finished["samples"], advanced(custom.DisableNoise.execute(), ours(seed=0), sigmas[1:], halfway)["samples"]
    )
    assert caplog.text.count("set the seed of LCM Multistep Sampler") == 1
    # Nothing is drawn in these, so nothing is said.
    advanced(custom.DisableNoise.execute(), ours(gamma=0.0), sigmas[1:], halfway)
    advanced(custom.DisableNoise.execute(), ours(), sigmas[-2:], halfway)
    assert len(caplog.records) == 1


def test_no_noise_is_drawn_twice_however_a_run_is_divided(monkeypatch):
    drawn = []
    call = StepNoise.__call__

    def watched(source, level, like):
        drawn.append((source.seed, source.batch_indices, level))
        return call(source, level, like)

    monkeypatch.setattr(StepNoise, "__call__", watched)
    sigmas = levels("epsilon", 8)
    one_after_another("epsilon", [sigmas[place : place + 2] for place in range(8)])
    assert len(set(drawn)) == len(drawn) == 7


def test_a_list_of_gammas_needs_the_whole_schedule_where_a_run_goes_on():
    sigmas = levels("epsilon", 4)
    with pytest.raises(
        ValueError,
        match=r"gammas has a number for each step.*noise input is off.*Connect the whole schedule.*sigmas input",
    ):
        one_after_another("epsilon", [sigmas[:3], sigmas[2:]], gammas="0, 0, 1")
    # Not for one that says the same of all steps.
    settings = {"gammas": "1, 1"}
    assert torch.equal(
        one_after_another("epsilon", [sigmas[:3], sigmas[2:]], **settings), one_after_another("epsilon", [sigmas])
    )


def test_a_schedule_that_is_not_the_runs_own_is_refused():
    with pytest.raises(ValueError, match="no step of it starts from"):
        one_after_another("epsilon", [levels("epsilon", 4)], gammas="0, 1", sigmas=levels("epsilon", 3))
