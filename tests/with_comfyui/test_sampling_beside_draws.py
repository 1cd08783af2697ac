"""Nodes on a model that draw from torch's own generators while it is sampled, which core's samplers seed."""

from functools import cache

import pytest
import torch
from comfy_extras import nodes_hypertile, nodes_tomesd

from lcm_kit.tests.helpers import relative
from lcm_kit.tests.with_comfyui import tiny
from lcm_kit.tests.with_comfyui.sampled import SEED, edited, in_parts, in_parts_advanced, ksampler, picture

pytestmark = pytest.mark.usefixtures("no_gradients")


def hypertile(model):
    return nodes_hypertile.HyperTile.execute(model, 32, 8, 0, False)[0]


def tome(model):
    return nodes_tomesd.TomePatchModel.execute(model, 0.5).result[0]


def noise_on_the_prompt(model):
    """As nodes that anneal the prompt do."""

    def wrapped(apply_model, args):
        prompt = args["c"]["c_crossattn"]
        conds = args["c"] | {"c_crossattn": prompt + 0.3 * torch.randn_like(prompt)}
        return apply_model(args["input"], args["timestep"], **conds)

    model = model.clone()
    model.set_model_unet_function_wrapper(wrapped)
    return model


PATCHES = {patch.__name__: patch for patch in (hypertile, tome, noise_on_the_prompt)}
EVERY_PATCH = pytest.mark.parametrize("name", PATCHES)


@cache
def patched(name):
    return PATCHES[name](tiny.small_model())


@pytest.fixture(autouse=True, scope="module")
def _models_are_let_go():
    yield
    patched.cache_clear()


@EVERY_PATCH
@pytest.mark.parametrize("front_end", [ksampler, edited])
def test_three_runs_of_a_seed_make_one_picture(front_end, name):
    latent = picture(size=32)
    runs = [front_end(patched(name), latent) for _ in range(3)]
    assert all(torch.equal(run, runs[0]) for run in runs[1:])
    # The patch does draw: for another seed it does something else to the same noise.
    plain = front_end(tiny.small_model(), latent)
    assert relative(runs[0], plain) > 1e-4


@EVERY_PATCH
@pytest.mark.parametrize("batch", [1, 2])
@pytest.mark.parametrize("parts", [in_parts, in_parts_advanced])
def test_lcm_ksampler_equals_its_parts(parts, batch, name):
    latent = picture(size=32, batch=batch)
    assert torch.equal(ksampler(patched(name), latent), parts(patched(name), latent))


@pytest.mark.parametrize("front_end", [ksampler, edited])
def test_the_run_begins_with_the_generator_as_core_leaves_it_and_ends_with_it_as_it_was(front_end):
    seen = []
    model = tiny.small_model()
    model.set_model_unet_function_wrapper(
        lambda apply_model, args: (
            seen.append(torch.get_rng_state()) or torch.rand(3),
            apply_model(args["input"], args["timestep"], **args["c"]),
        )[1]
    )
    latent = picture()
    torch.manual_seed(123)
    before = torch.get_rng_state()
    front_end(model, latent)
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(SEED)
    torch.randn(latent["samples"].shape)  # core's initial noise
    assert torch.equal(seen[0], torch.get_rng_state())


def test_the_generator_is_put_back_after_an_error():
    model = tiny.small_model()

    def broken(apply_model, args):
        raise RuntimeError("out of memory")

    model.set_model_unet_function_wrapper(broken)
    before = torch.get_rng_state()
    with pytest.raises(RuntimeError, match="out of memory"):
        ksampler(model, picture())
    assert torch.equal(torch.get_rng_state(), before)
