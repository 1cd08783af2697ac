"""Every preset for flow models on a transformer of its own family: the levels that the network is told are the published
ones, in LCM KSampler and by LCM for any KSampler in core's.
"""

from functools import cache

import nodes
import pytest
import torch

from lcm_kit.nodes.any_ksampler import LCMAnyKSampler
from lcm_kit.nodes.scheduling import LCMPreset
from lcm_kit.samplers.presets import PRESETS
from lcm_kit.tests.with_comfyui import test_published as published
from lcm_kit.tests.with_comfyui.families import FAMILIES
from lcm_kit.tests.with_comfyui.sampled import SEED, ksampler

pytestmark = pytest.mark.usefixtures("no_gradients")

# How a row of test_published.FAMILIES begins -> a small model of that kind. Of the others ComfyUI's model is too large for a
# test, or there is none; their levels are those of a row with the same sampling settings.
NETWORKS = {"Wan": "Wan", "Flux": "Flux", "Qwen-Image": "Qwen-Image", "Z-Image": "Z-Image", "LTX": "LTXV",
            "HunyuanVideo": "HunyuanVideo", "FastHunyuan": "HunyuanVideo", "SD3.5": "SD3"}  # fmt: skip


def network_of(preset):
    row = published.LISTS[preset][0]
    fitting = [start for start in NETWORKS if row.startswith(start) and row not in ("Flux.2", "Flux schnell")]
    return NETWORKS[max(fitting, key=len)] if fitting and "1.5" not in row else None


TRIED = [name for name, (_, listed) in published.LISTS.items() if listed and network_of(name)]


@cache
def made(family):
    return FAMILIES[family].model()


@pytest.fixture(autouse=True, scope="module")
def _models_are_let_go():
    yield
    made.cache_clear()


def watched(model):
    """A clone of the MODEL, and a list that gets the level of each call."""
    model, levels = model.clone(), []

    def wrapper(apply_model, args):
        levels.append(float(args["timestep"][0]))
        return apply_model(args["input"], args["timestep"], **args["c"])

    model.set_model_unet_function_wrapper(wrapper)
    return model, levels


def test_most_are_tried():
    assert len(TRIED) > 20


@pytest.mark.parametrize("name", TRIED)
def test_the_network_is_told_the_published_levels(name):
    row, listed = published.LISTS[name]
    family = FAMILIES[network_of(name)]
    options = {"attention_mask": torch.ones(1, 5, dtype=torch.long)} if family.name == "LTXV" else {}
    (positive,) = ([[text, about | options]] for text, about in family.cond(1))
    chosen = LCMPreset.execute(name, 0).result[0]
    model, levels = watched(published.FAMILIES[row][2](made(network_of(name))))
    latent = family.latent(batch=1)
    picture = ksampler(model, latent, positive=positive, preset=chosen)
    torch.testing.assert_close(torch.tensor(levels), torch.tensor([float(x) for x in listed]), rtol=0, atol=1e-4)
    assert picture.isfinite().all()
    if published.PRESETS[name].sigmas and name in published.STARTS_BELOW_NOISE:
        return  # core's schedulers start at pure noise
    levels.clear()
    model = LCMAnyKSampler.execute(model, 1.0, 50, preset=chosen).result[0]
    nodes.KSampler().sample(model, SEED, PRESETS[name].steps, 1.0, "lcm", "simple", positive, positive, latent)
    torch.testing.assert_close(torch.tensor(levels), torch.tensor([float(x) for x in listed]), rtol=0, atol=1e-4)
