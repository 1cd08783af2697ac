"""What a model is, told by its contents: the same however it is loaded, stored or placed."""

import comfy.lora
import pytest
import torch

from lcm_kit.host.training.identity import identity_of
from lcm_kit.tests.with_comfyui import tiny
from lcm_kit.tests.with_comfyui.families import FAMILIES
from lcm_kit.tests.with_comfyui.test_dynamic_vram import loader
from lcm_kit.tests.with_comfyui.test_quantised import quantised  # noqa: F401


@pytest.fixture(autouse=True)
def _as_the_executor_does():
    with torch.inference_mode():
        yield


@pytest.mark.parametrize("patched", [False, True])
def test_dynamic_vram_makes_no_other_model_of_it(patched):
    models = [loader(3), tiny.small_model(seed=3)]
    if patched:
        for model in models:
            homes = comfy.lora.model_lora_keys_unet(model.model, {})
            model.add_patches(comfy.lora.load_lora(tiny.lora(model), homes), 0.5)
    assert len({*map(identity_of, models)}) == 1
    assert identity_of(models[0]) != identity_of(loader(4))


def test_quantised_weights_have_an_identity_that_lasts(quantised):  # noqa: F811
    assert identity_of(quantised) == identity_of(quantised.clone())


@pytest.mark.parametrize("name", FAMILIES)
def test_every_family_has_an_identity_that_lasts(name):
    assert identity_of(FAMILIES[name].model()) == identity_of(FAMILIES[name].model())
    assert len({identity_of(family.model()) for family in FAMILIES.values()}) == len(FAMILIES)
