"""LCM for any KSampler: core's nodes with the name "lcm" against LCM KSampler, to the bit, and all else left alone."""

import logging
import math

import comfy.hooks
import comfy.model_management
import comfy.samplers
import comfy.sd
import pytest
import torch
from comfy.model_base import ModelType
from comfy_extras import nodes_custom_sampler as custom
from comfy_extras import nodes_hypertile
from nodes import KSampler, KSamplerAdvanced, SetLatentNoiseMask

from lcm_kit.host.sampling.sampler import lcm_sampler
from lcm_kit.host.sampling.schedules import lcm_sigmas
from lcm_kit.host.sampling.tables import sigma_table
from lcm_kit.nodes.any_ksampler import LCMAnyKSampler
from lcm_kit.nodes.sampling import LCMKSampler
from lcm_kit.samplers.presets import PRESETS
from lcm_kit.samplers.schedule import timesteps_at
from lcm_kit.tests.with_comfyui import tiny

SEED = 5
SCHEDULERS = list(comfy.samplers.KSampler.SCHEDULERS)
STEPS, DENOISE = (1, 2, 4, 8), (0.2, 0.3, 0.5, 0.6, 0.75, 1.0)
GAMMAS = {"gamma": 1.0, "original_steps": 50}

pytestmark = pytest.mark.usefixtures("no_gradients")


@pytest.fixture(scope="module")
def model():
    return tiny.small_model()


def exact(model, **changed):
    return LCMAnyKSampler.execute(model=model, **GAMMAS | changed).result[0]


def by_name(model, latent=None, *, steps=4, cfg=1.0, denoise=1.0, scheduler="simple", sampler="lcm", positive=None):
    """Core's KSampler."""
    latent = latent or tiny.latent(1, seed=9)
    positive = positive or tiny.cond(1)
    return KSampler().sample(model, SEED, steps, cfg, sampler, scheduler, positive, tiny.cond(2), latent, denoise)[0][
        "samples"
    ]


def advanced(
    model, latent, start, end, *, steps=4, add="enable", leftover="disable", sampler="lcm", scheduler="simple"
):
    """Core's KSampler (Advanced), as a LATENT."""
    return KSamplerAdvanced().sample(
        model, add, SEED, steps, 1.0, sampler, scheduler, tiny.cond(1), tiny.cond(2), latent, start, end, leftover
    )[0]


def lcm(model, latent=None, *, steps=4, cfg=1.0, denoise=1.0, gamma=1.0, gammas="", preset=None, positive=None):
    """LCM KSampler."""
    return LCMKSampler.execute(
        model=model, positive=positive or tiny.cond(1), negative=tiny.cond(2), latent_image=latent or tiny.latent(1, seed=9),
        seed=SEED, steps=steps, cfg=cfg, denoise=denoise, gamma=gamma, cfg_steps=-1, original_steps=50,
        gammas=gammas,
        preset=preset,
    ).result[0]["samples"]  # fmt: skip


class Levels:
    """Counts on a clone of a MODEL at which noise levels it is called."""

    def __init__(self, model):
        self.seen = []
        self.model = model.clone()

        def call(apply_model, args):
            self.seen.append(float(args["timestep"].max()))
            return apply_model(args["input"], args["timestep"], **args["c"])

        self.model.set_model_unet_function_wrapper(call)


def timestep(model, sigma):
    return int(timesteps_at(torch.tensor([sigma]), sigma_table(model.get_model_object("model_sampling"))))


def starts_of_lcm(original_steps=50):
    """First timestep of LCM KSampler -> the denoise that gives it."""
    return {1000 // original_steps * kept - 1: kept / original_steps for kept in range(1, original_steps + 1)}


# ---- the picture is that of LCM KSampler


@pytest.mark.parametrize("scheduler", SCHEDULERS)
@pytest.mark.parametrize("steps", STEPS)
def test_the_picture_is_that_of_lcm_ksampler_from_the_nearest_level(model, scheduler, steps):
    # Every other one, the rest with the next scheduler and the next number of steps: all pairs of the three.
    for denoise in DENOISE[(SCHEDULERS.index(scheduler) + STEPS.index(steps)) % 2 :: 2]:
        if scheduler == "kl_optimal" and steps == 1:
            continue  # core divides by steps - 1 there
        plain, changed = Levels(model), Levels(model)
        by_name(plain.model, steps=steps, denoise=denoise, scheduler=scheduler)
        picture = by_name(exact(changed.model), steps=steps, denoise=denoise, scheduler=scheduler)
        asked, start = timestep(model, plain.seen[0]), timestep(model, changed.seen[0])
        nearest = min(starts_of_lcm(), key=lambda point: abs(point - asked))
        assert abs(start - asked) == abs(nearest - asked)
        wanted = min(len(plain.seen), (start + 1) // 20)
        assert len(changed.seen) == wanted
        assert torch.equal(picture, lcm(model, steps=wanted, denoise=starts_of_lcm()[start]))


@pytest.mark.parametrize("scheduler", ["simple", "sgm_uniform"])
@pytest.mark.parametrize("steps", STEPS)
def test_where_both_can_start_at_the_level_of_denoise_the_pictures_are_equal(model, scheduler, steps):
    for denoise in DENOISE:
        levels = comfy.samplers.KSampler(model, steps, "cpu", "lcm", scheduler, denoise).sigmas
        if abs(timestep(model, float(levels[0])) - (math.floor(50 * denoise + 1e-4) * 20 - 1)) <= 1:
            picture = by_name(exact(model), steps=steps, denoise=denoise, scheduler=scheduler)
            assert torch.equal(picture, lcm(model, steps=steps, denoise=denoise))


@pytest.mark.parametrize("kind", [ModelType.EPS, ModelType.V_PREDICTION, ModelType.FLOW])
@pytest.mark.parametrize("cfg", [1.0, 1.5])
@pytest.mark.parametrize("masked", [False, True])
def test_it_holds_for_kinds_of_models_cfg_masks_and_batches(kind, cfg, masked):
    model, latent = tiny.small_model(kind), tiny.latent(3, seed=9)
    if masked:
        mask = torch.linspace(0, 1, 64).reshape(8, 8)
        (latent,) = SetLatentNoiseMask().set_mask(latent, mask)
    for denoise in (0.5, 1.0):
        assert torch.equal(
            by_name(exact(model), latent, cfg=cfg, denoise=denoise), lcm(model, latent, cfg=cfg, denoise=denoise)
        )


@pytest.mark.parametrize("name", [name for name, preset in PRESETS.items() if preset.steps <= 16])
def test_a_preset_is_that_of_lcm_ksampler(model, name):
    preset = PRESETS[name]
    if preset.flow:
        model = tiny.small_model(ModelType.FLOW)
    expected = lcm(model, preset=preset, cfg=1.0) if preset.cfg == 1.0 else lcm(model, preset=preset, cfg=preset.cfg)
    picture = by_name(exact(model, preset=preset), steps=preset.steps, cfg=preset.cfg, scheduler="sgm_uniform")
    assert torch.equal(picture, expected)


def test_a_preset_goes_with_the_steps_of_the_node_or_says_that_it_cannot(model):
    picture = by_name(exact(model, preset=PRESETS["TCD"]), steps=8)
    assert torch.equal(picture, lcm(model, steps=8, gamma=0.3))
    with pytest.raises(
        ValueError,
        match=r"^LCM for any KSampler: .* asks for 8 steps, and .* Lightning 4 steps .* that many\. Set steps to 4",
    ):
        by_name(exact(model, preset=PRESETS["Lightning 4 steps"]), steps=8)


@pytest.mark.parametrize("indices", [[0], [3], [2, 5], [5, 2], [7, 7], [63]])
def test_an_image_of_a_batch_is_the_image_made_alone(model, indices):
    latent = tiny.latent(len(indices), seed=9) | {"batch_index": indices}
    picture = by_name(exact(model), latent, denoise=0.5)
    assert torch.equal(picture, lcm(model, latent, denoise=0.5))
    other = by_name(exact(model), tiny.latent(len(indices), seed=9), denoise=0.5)
    assert torch.equal(picture, other) is (indices == [0])


def test_a_latent_in_half_precision_is_sampled_as_by_lcm_ksampler(model):
    if not hasattr(comfy.model_management, "intermediate_dtype"):
        pytest.skip("core's KSampler of this ComfyUI divides by 0 in half precision, whatever the sampler")
    latent = {"samples": tiny.latent(2, seed=9)["samples"].half(), "batch_index": [4, 1]}
    assert torch.equal(by_name(exact(model), latent), lcm(model, latent))


def test_nested_latents_are_sampled_as_by_lcm_ksampler():
    model, latent = tiny.pair_model(), tiny.nested(torch.zeros(1, 4, 8, 8), torch.zeros(1, 4, 4))
    for part, expected in zip(by_name(exact(model), latent).unbind(), lcm(model, latent).unbind(), strict=True):
        assert torch.equal(part, expected)


# ---- parts of a run


@pytest.mark.parametrize("scheduler", ["simple", "sgm_uniform"])
@pytest.mark.parametrize(("steps", "at"), [(2, 1), (4, 2), (8, 4)])
def test_two_halves_that_meet_at_a_trained_level_visit_the_levels_of_one_run(model, scheduler, steps, at):
    whole, halves = Levels(model), Levels(model)
    lcm(whole.model, steps=steps)
    options = {"steps": steps, "scheduler": scheduler}
    half = advanced(exact(halves.model), tiny.latent(1), 0, at, leftover="enable", **options)
    advanced(exact(halves.model), half, at, 10_000, add="disable", **options)
    # 1e-3: sgm_uniform meets at timestep 499.5, and what is handed over has that much noise
    assert halves.seen == pytest.approx(whole.seen, rel=1e-3 if scheduler == "simple" else 1e-2)


@pytest.mark.parametrize("at", [1, 2, 3])
@pytest.mark.parametrize("scheduler", SCHEDULERS)
def test_where_two_nodes_meet_the_level_is_the_one_both_know(model, scheduler, at):
    """gamma 0 draws nothing, so a half is a slice of the run over its levels: euler can go on, and did begin."""
    sigmas = comfy.samplers.KSampler(model, 4, "cpu", "lcm", scheduler).sigmas
    end = len(sigmas) - 1
    first, second = Levels(model), Levels(model)
    half = advanced(exact(first.model, gamma=0.0), tiny.latent(1), 0, at, leftover="enable", scheduler=scheduler)
    advanced(exact(second.model, gamma=0.0), half, at, 10_000, add="disable", scheduler=scheduler)
    assert len(first.seen) == at
    assert len(second.seen) == end - at
    assert second.seen[0] == pytest.approx(float(sigmas[at]), rel=1e-6)
    # What the first half left is the picture it saw and the noise of exactly that level.
    assert torch.equal(half["samples"], advanced(
        exact(model, gamma=0.0), tiny.latent(1), 0, at, leftover="enable", scheduler=scheduler
    )["samples"])  # fmt: skip
    expected = custom.SamplerCustom.execute(
        model, True, SEED, 1.0, tiny.cond(1), tiny.cond(2), lcm_sampler(gamma=0.0, seed=-1),
        torch.tensor([*first.seen, float(sigmas[at])]), tiny.latent(1),
    ).result[0]["samples"]  # fmt: skip
    torch.testing.assert_close(half["samples"], expected, rtol=1e-4, atol=1e-4)


def test_gammas_count_the_steps_of_the_whole_run(model):
    listed = exact(model, gammas="0, 0, 1")
    half = advanced(listed, tiny.latent(1), 0, 2, leftover="enable")
    deterministic = advanced(exact(model, gamma=0.0), tiny.latent(1), 0, 2, leftover="enable")
    assert torch.equal(half["samples"], deterministic["samples"])
    rest = advanced(listed, half, 2, 10_000, add="disable")["samples"]
    assert torch.equal(rest, advanced(exact(model, gamma=1.0), half, 2, 10_000, add="disable")["samples"])
    assert not torch.equal(rest, advanced(exact(model, gamma=0.0), half, 2, 10_000, add="disable")["samples"])
    whole = lcm(model, tiny.latent(1), gammas="0, 0, 1")
    torch.testing.assert_close(rest, whole, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(("steps", "at"), [(2, 1), (4, 2), (5, 1), (5, 4), (8, 4), (10, 3)])
@pytest.mark.parametrize("gamma", [1.0, 0.3, 0.0])
def test_a_run_split_where_the_scheduler_meets_a_trained_level_is_the_undivided_run(model, steps, at, gamma):
    changed = exact(model, gamma=gamma)
    half = advanced(changed, tiny.latent(1), 0, at, steps=steps, leftover="enable")
    rest = advanced(changed, half, at, 10_000, steps=steps, add="disable")["samples"]
    torch.testing.assert_close(rest, lcm(model, tiny.latent(1), steps=steps, gamma=gamma), rtol=1e-5, atol=1e-5)


def test_leftover_noise_of_another_sampler_is_taken_as_it_is(model):
    """Base with euler, refiner with lcm."""
    half = advanced(model, tiny.latent(1), 0, 1, leftover="enable", sampler="euler")
    rest = Levels(model)
    finished = advanced(exact(rest.model), half, 1, 10_000, add="disable")["samples"]
    table = sigma_table(model.get_model_object("model_sampling"))
    assert rest.seen == pytest.approx(table[[749, 499, 259]].tolist())
    levels = torch.tensor([*rest.seen, 0.0])
    expected = custom.SamplerCustom.execute(
        model, False, SEED, 1.0, tiny.cond(1), tiny.cond(2), lcm_sampler(gamma=1.0, seed=SEED), levels, half
    ).result[0]["samples"]  # fmt: skip
    torch.testing.assert_close(finished, expected, rtol=1e-5, atol=1e-5)


def test_advanced_without_a_split_is_the_whole_run(model):
    assert torch.equal(advanced(exact(model), tiny.latent(1), 0, 10_000)["samples"], lcm(model, tiny.latent(1)))
    late = advanced(exact(model), tiny.latent(1, seed=9), 2, 10_000)["samples"]
    assert torch.equal(late, lcm(model, steps=2, denoise=0.5))


# ---- what is said


def test_a_start_at_another_level_is_said(model, caplog):
    with caplog.at_level(logging.INFO):
        by_name(exact(model), denoise=0.6)
    assert "asked to start at timestep 666" in caplog.text
    assert "starts at 659" in caplog.text
    caplog.clear()
    with caplog.at_level(logging.INFO):
        by_name(exact(model), denoise=0.5)
        by_name(exact(model), scheduler="karras")
    assert "LCM for any KSampler" not in caplog.text


def test_more_steps_than_there_are_levels_are_cut_and_that_is_said(model, caplog):
    seen = Levels(model)
    picture = by_name(exact(seen.model), steps=8, denoise=0.1)
    assert "8 steps were asked for, but from timestep 99 on the model was trained on 5 only" in caplog.text
    assert len(seen.seen) == 5
    assert torch.equal(picture, lcm(model, steps=5, denoise=0.1))


# ---- everything else is left alone


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("sampler", [name for name in comfy.samplers.SAMPLER_NAMES if name != "lcm"])
def test_other_samplers_are_as_they_were_to_the_bit(model, sampler):
    """Where core's sampler cannot run here, for a package that is missing or for few steps, its error is the same."""
    expected, picture = picture_or_error(model, sampler), picture_or_error(exact(model), sampler)
    assert type(picture) is type(expected)
    assert torch.equal(picture, expected) if isinstance(expected, torch.Tensor) else str(picture) == str(expected)


def picture_or_error(model, sampler):
    try:
        return by_name(model, sampler=sampler)
    except Exception as error:
        return error


def test_the_model_and_every_list_of_comfyui_stay_as_they_were(model):
    before = by_name(model)
    lists = [*comfy.samplers.KSampler.SAMPLERS], [*comfy.samplers.KSampler.SCHEDULERS]
    patched = exact(model)
    assert not torch.equal(by_name(patched), before)
    assert torch.equal(by_name(model), before)
    assert not model.wrappers.get("outer_sample")
    assert ([*comfy.samplers.KSampler.SAMPLERS], [*comfy.samplers.KSampler.SCHEDULERS]) == lists


def test_our_own_nodes_are_as_without_it(model):
    assert torch.equal(lcm(exact(model, gamma=0.0)), lcm(model))
    sigmas = lcm_sigmas(model, steps=4, denoise=1.0, original_steps=50, timesteps="999, 500, 3")
    arguments = (True, SEED, 1.0, tiny.cond(1), tiny.cond(2), lcm_sampler(gamma=1.0, seed=-1), sigmas, tiny.latent(1))
    ours, expected = (custom.SamplerCustom.execute(m, *arguments).result[0] for m in (exact(model, gamma=0.0), model))
    assert torch.equal(ours["samples"], expected["samples"])


def test_a_sampler_with_options_of_its_own_and_a_climb_are_left_alone(model):
    latent, changed = tiny.latent(1, seed=9), exact(model)
    sigmas = lcm_sigmas(model, steps=4, denoise=1.0, original_steps=50)

    def run(model, sampler, sigmas):
        return custom.SamplerCustom.execute(
            model, False, SEED, 1.0, tiny.cond(1), tiny.cond(2), sampler, sigmas, latent
        ).result[0]["samples"]  # fmt: skip

    by_hand = comfy.samplers.ksampler("lcm", {"noise_sampler": lambda sigma, sigma_next: torch.zeros(1, 4, 8, 8)})
    assert torch.equal(run(changed, by_hand, sigmas), run(model, by_hand, sigmas))
    plain = comfy.samplers.sampler_object("lcm")
    climb = sigmas[1:].flip(0)[1:]
    assert torch.equal(run(changed, plain, climb), run(model, plain, climb))
    assert not torch.equal(run(changed, plain, sigmas[1:]), run(model, plain, sigmas[1:]))


# ---- where it stands in the graph


def test_loras_and_patches_may_stand_before_or_after_it(model):
    lora = tiny.lora(model)

    def with_lora(model):
        return comfy.sd.load_lora_for_models(model, None, lora, 0.7, 0.0)[0]

    expected = lcm(with_lora(model))
    assert not torch.equal(expected, lcm(model))
    assert torch.equal(by_name(exact(with_lora(model))), expected)
    assert torch.equal(by_name(with_lora(exact(model))), expected)
    assert torch.equal(by_name(exact(model).clone().clone()), lcm(model))


def test_a_schedule_set_after_it_is_the_one_that_counts():
    from comfy_extras.nodes_model_advanced import ModelSamplingSD3

    model = tiny.small_model(ModelType.FLOW)

    def shifted(model):
        return ModelSamplingSD3().patch(model, 5.0)[0]

    expected = lcm(shifted(model))
    assert not torch.equal(expected, lcm(model))
    assert torch.equal(by_name(shifted(exact(model))), expected)
    assert torch.equal(by_name(exact(shifted(model))), expected)


def test_of_two_the_later_one_holds(model):
    first = exact(model, gamma=0.0)
    assert torch.equal(by_name(exact(first, gamma=1.0)), lcm(model))
    assert torch.equal(by_name(first), lcm(model, gamma=0.0))


def test_hooks_on_a_prompt_work_as_in_lcm_ksampler(model):
    hooks = comfy.hooks.create_hook_lora(lora=tiny.lora(model), strength_model=0.7, strength_clip=0.0)
    positive = comfy.hooks.set_hooks_for_conditioning(tiny.cond(1), hooks)
    expected = lcm(model, positive=positive)
    assert not torch.equal(expected, lcm(model))
    assert torch.equal(by_name(exact(model), positive=positive), expected)


@pytest.mark.parametrize("kind", ["EDM", "V_PREDICTION_CONTINUOUS"])
def test_a_model_of_continuous_levels_has_the_levels_of_lcm_ksampler(kind):
    model = tiny.small_model(getattr(ModelType, kind))
    assert torch.equal(by_name(exact(model), scheduler="karras"), lcm(model))
    plain, changed = Levels(model), Levels(model)
    by_name(plain.model, scheduler="karras", denoise=0.5)
    by_name(exact(changed.model), scheduler="karras", denoise=0.5)
    assert len(changed.seen) == 4
    assert changed.seen[0] == pytest.approx(plain.seen[0], rel=0.02)


def test_a_patch_that_draws_gives_one_picture_for_one_seed(model):
    tiles = nodes_hypertile.HyperTile
    run = tiles.execute if hasattr(tiles, "execute") else tiles().patch
    made = run(model, 32, 2, 1, False)
    drawn = exact(getattr(made, "result", made)[0])
    latent = tiny.latent(1, 16, 16, seed=9)
    picture = lcm(drawn, latent)
    assert not torch.equal(picture, lcm(model, latent))
    assert all(torch.equal(by_name(drawn, latent), picture) for _ in range(5))
