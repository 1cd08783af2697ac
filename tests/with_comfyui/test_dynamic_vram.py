"""A MODEL under ComfyUI's dynamic VRAM, which pages weights by itself: training gets another one.

Core never makes such a patcher for the CPU; here it is made all the same, and nothing may load it.
"""

import comfy.lora
import comfy.model_patcher
import pytest
import torch

from lcm_kit.host.training.loan import lent
from lcm_kit.nodes.distilling import Distill
from lcm_kit.tests.with_comfyui import tiny
from lcm_kit.tests.with_comfyui.test_distilling import WIDGETS

CPU = torch.device("cpu")

pytestmark = pytest.mark.usefixtures("no_gradients")


class Forced(comfy.model_patcher.ModelPatcherDynamic):
    def __new__(cls, *args, **kwargs):
        return object.__new__(cls)

    def __init__(self, model, load_device, offload_device, size=0, weight_inplace_update=False):
        # Without the pinned memory, for which there is no library without a GPU.
        comfy.model_patcher.ModelPatcher.__init__(self, model, load_device, offload_device, size, weight_inplace_update)

    def load(self, *args, **kwargs):
        raise AssertionError("a dynamic model was loaded")

    def __del__(self):
        """Core's lets go of memory of a GPU."""


def loader(seed, disable_dynamic=False):
    """As core's loaders: the model anew, with dynamic VRAM or without."""
    plain = tiny.small_model(seed=seed)
    if disable_dynamic:
        return plain
    made = Forced(plain.model, CPU, CPU)
    made.cached_patcher_init = (loader, (seed,))
    return made


def distilled(model, **widgets):
    inputs = {name: [value] for name, value in (WIDGETS | {"steps": 2} | widgets).items()}
    latent = [tiny.latent(4, seed=1)]
    return Distill.execute([model], [tiny.cond(1)], [tiny.cond(2)], latent=latent, **inputs).result[0]


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_a_dynamic_model_is_distilled_as_the_same_model_without(dtype):
    model = loader(3)
    assert model.is_dynamic()
    patches = tiny.lora(model)
    model.add_patches(comfy.lora.load_lora(patches, comfy.lora.model_lora_keys_unet(model.model, {})), 0.5)
    plain = tiny.small_model(seed=3)
    plain.add_patches(comfy.lora.load_lora(patches, comfy.lora.model_lora_keys_unet(plain.model, {})), 0.5)
    before = dict(model.model.named_parameters())
    values = {name: parameter.clone() for name, parameter in before.items()}
    lora, expected = distilled(model, dtype=dtype), distilled(plain, dtype=dtype)
    assert lora.keys() == expected.keys()
    assert all(torch.equal(lora[key], expected[key]) for key in expected)
    after = dict(model.model.named_parameters())
    assert all(after[name] is parameter for name, parameter in before.items())
    assert all(torch.equal(after[name], value) for name, value in values.items())
    assert model.is_dynamic()


def test_what_is_lent_is_not_dynamic_and_not_the_same_network():
    model = loader(3)
    with torch.inference_mode(False), lent(model, torch.float32) as patcher:
        assert not patcher.is_dynamic()
        assert patcher.model is not model.model


def test_a_dynamic_model_that_cannot_be_loaded_again_is_refused_in_words():
    model = loader(3)
    model.cached_patcher_init = None
    with pytest.raises(ValueError, match=r"dynamic VRAM .* one of ComfyUI's own loaders, .*--disable-dynamic-vram"):
        distilled(model)
