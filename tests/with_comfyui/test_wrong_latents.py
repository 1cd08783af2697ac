"""What would silently make a wrong picture: an empty latent where a picture is counted on, and another model's noise levels."""

import logging

import pytest
import torch
from comfy.model_base import ModelType

from lcm_kit.samplers.presets import PRESETS
from lcm_kit.tests.helpers import relative
from lcm_kit.tests.with_comfyui import tiny
from lcm_kit.tests.with_comfyui.sampled import ksampler, ours, picture, sampler_custom, scheduled

pytestmark = pytest.mark.usefixtures("no_gradients")
EMPTY = {"samples": torch.zeros(1, 4, 8, 8)}


@pytest.fixture(scope="module")
def model():
    return tiny.small_model()


def told(caplog, model, latent, **changed):
    """What LCM KSampler warns of."""
    caplog.clear()
    ksampler(model, latent, **changed)
    return [record.getMessage() for record in caplog.records if record.levelno >= logging.WARNING]


@pytest.mark.parametrize(
    ("changed", "words"),
    [
        ({"denoise": 0.6}, "denoise is 0.6 and latent_image is empty"),
        ({"start_at_step": 2}, "start_at_step is 2 and latent_image is empty"),
        ({"add_noise": False}, "add_noise is off and latent_image is empty"),
        ({"add_noise": False, "start_at_step": 2}, "add_noise is off and latent_image is empty"),
    ],
)
def test_an_empty_latent_is_named_where_a_picture_or_noise_is_counted_on(model, changed, words, caplog):
    (line,) = told(caplog, model, EMPTY, **changed)
    assert words in line
    assert told(caplog, model, picture(), **changed) == []


@pytest.mark.parametrize("changed", [{}, {"end_at_step": 2}, {"preset": PRESETS["DMD2 1 step"]}, {"denoise": 0.0}])
def test_it_is_not_where_pure_noise_is_the_start_or_nothing_runs(model, changed, caplog):
    assert told(caplog, model, EMPTY, **changed) == []


def test_one_part_of_a_nested_latent_is_enough(caplog):
    pair = tiny.nested(torch.zeros(1, 4, 8, 8), torch.ones(1, 3, 5))
    assert told(caplog, tiny.pair_model(), pair, denoise=0.6) == []


def test_levels_of_another_model_are_refused_on_a_flow_model(model):
    flow = tiny.small_model(ModelType.FLOW)
    with pytest.raises(ValueError, match=r"sigmas begin at 14\.61, .* 1 is pure noise .* to LCM Scheduler too"):
        sampler_custom(flow, picture(), ours(), scheduled(model))
    # Within a table's own rounding, and above the table of models that have no such end.
    sampler_custom(flow, picture(), ours(), torch.tensor([1.0005, 0.5, 0.0]))
    sampler_custom(model, picture(), ours(), torch.tensor([20.0, 5.0, 0.0]))


@pytest.mark.parametrize("seed", [0, 2**31, 2**32 + 1, 2**63 - 1, 2**63, 2**64 - 1])
def test_every_seed_is_a_picture_of_its_own(model, seed):
    once = ksampler(model, picture(), seed=seed)
    assert torch.equal(ksampler(model, picture(), seed=seed), once)
    assert relative(ksampler(model, picture(), seed=(seed + 1) % 2**64), once) > 1e-3
    assert bool(once.isfinite().all())


# ---- flow models from one node to the next

# ComfyUI hands a noisy latent on divided by 1 - sigma, and multiplies again: two roundings there, and two of the latent's
# scale and its inverse (six where the scale has a shift as well). Each is 2^-24 of a number at most.
ROUNDED = 8 * 2.0**-24


@pytest.mark.parametrize(
    ("make", "shape"), [(lambda: tiny.small_model(ModelType.FLOW), (4, 8, 8)), (tiny.tiny_video_model, (16, 2, 8, 8))]
)
def test_a_flow_model_goes_on_with_the_latent_but_for_rounding(make, shape):
    """The bound that the help page states. What a network makes of it is its own affair: 1e-5 here."""
    seen = []
    model = make()
    model.set_model_unet_function_wrapper(
        lambda apply_model, args: (
            seen.append(args["input"].clone()),
            apply_model(args["input"], args["timestep"], **args["c"]),
        )[1]
    )
    latent = {"samples": torch.zeros(1, *shape)}
    undivided = ksampler(model, latent)
    for place in (1, 2, 3):
        del seen[4:]
        halfway = {"samples": ksampler(model, latent, end_at_step=place, return_with_leftover_noise=True)}
        finished = ksampler(model, halfway, start_at_step=place, add_noise=False)
        handed_on, expected = seen[4 + place], seen[place]
        assert relative(handed_on, expected) < ROUNDED
        assert relative(finished, undivided) < 1e-5
