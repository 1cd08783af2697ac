"""LATENTs are taken and given as core's samplers do: the size an empty one is meant for, its keys, the result's dtype."""

import comfy.latent_formats
import comfy.model_base
import comfy.model_management
import comfy.model_patcher
import pytest
import torch
from comfy.model_base import ModelType
from nodes import EmptyLatentImage, KSampler

from lcm_kit.host.sampling.latents import KNOWN
from lcm_kit.host.training.run import empty_latent
from lcm_kit.nodes.editing import LCMEdit
from lcm_kit.nodes.sampling import LCMKSampler
from lcm_kit.tests.with_comfyui import tiny

FORMATS = ["SD15", "SDXL", "Flux", "Flux2", "LTXV", "Wan21", "Wan22", "HunyuanVideo", "Hunyuan3Dv2", "Mochi"]


pytestmark = pytest.mark.usefixtures("no_gradients")


class Network(torch.nn.Module):
    """Predicts a tenth of its input, in any shape."""

    def __init__(self, **config):
        super().__init__()
        self.dtype, self.weight = torch.float32, torch.nn.Parameter(torch.full((1,), 0.1))

    def forward(self, x, timesteps, context=None, **others):
        return x * self.weight


def model_of(latent_format):
    config = tiny.TinyConfig({"dtype": torch.float32})
    config.unet_config, config.sampling_settings = {"dtype": torch.float32}, {"shift": 2.0}
    config.latent_format = getattr(comfy.latent_formats, latent_format)
    cpu = torch.device("cpu")
    model = comfy.model_base.BaseModel(config, model_type=ModelType.FLOW, device=cpu, unet_model=Network)
    model.latent_format = config.latent_format()
    return comfy.model_patcher.ModelPatcher(model, load_device=cpu, offload_device=cpu)


def ours(model, latent, **changed):
    widgets = {"seed": 1, "steps": 2, "cfg": 1.0, "denoise": 1.0, "gamma": 1.0, "cfg_steps": -1, "original_steps": 50}
    return LCMKSampler.execute(
        model=model, positive=tiny.cond(1), negative=None, latent_image=latent, **widgets | changed
    ).result[0]  # fmt: skip


def cores(model, latent):
    return KSampler().sample(model, 1, 2, 1.0, "euler", "simple", tiny.cond(1), tiny.cond(1), latent, 1.0)[0]


LATENTS = {
    "of a picture": lambda: EmptyLatentImage().generate(128, 96, 2)[0],
    "of ComfyUI's SD3": lambda: {"samples": torch.zeros(1, 16, 8, 12), "downscale_ratio_spacial": 8},
    "of Flux.2": lambda: {"samples": torch.zeros(1, 128, 8, 12), "downscale_ratio_spacial": 16},
    "of a video": lambda: {
        "samples": torch.zeros(1, 16, 5, 8, 12), "downscale_ratio_spacial": 8, "downscale_ratio_temporal": 4,
    },
    "without a scale": lambda: {"samples": torch.zeros(1, 4, 8, 12)},
    "of a full picture": lambda: {"samples": torch.ones(1, 4, 8, 12), "downscale_ratio_spacial": 8},
}  # fmt: skip


@pytest.mark.parametrize("what", LATENTS)
@pytest.mark.parametrize("latent_format", FORMATS)
def test_size_and_keys_are_those_of_core(latent_format, what):
    model, latent = model_of(latent_format), LATENTS[what]()
    latent |= {"batch_index": [3, 4][: len(latent["samples"])], "type": "x"}
    given = dict(latent)
    try:
        expected = cores(model, dict(latent))
    except (RuntimeError, ValueError, IndexError) as error:  # a latent of another kind of model
        with pytest.raises(type(error)):
            ours(model, dict(latent))
        return
    made = ours(model, latent)
    assert made["samples"].shape == expected["samples"].shape
    assert made["samples"].dtype == expected["samples"].dtype
    assert made.keys() == expected.keys()
    assert latent.keys() == given.keys()
    assert latent["samples"] is given["samples"]


def test_the_picture_of_flux_2_is_as_large_as_asked_for():
    (empty,) = EmptyLatentImage().generate(256, 256)
    assert ours(model_of("Flux2"), empty)["samples"].shape == (1, 128, 16, 16)
    assert empty_latent(model_of("Flux2"), [], 256, 128).shape == (1, 128, 8, 16)
    assert empty_latent(model_of("Flux2"), [empty], 8, 8).shape == (1, 128, 16, 16)
    assert empty_latent(model_of("SD15"), [], 60, 512).shape == (1, 4, 64, 7)


def test_an_edited_latent_drops_what_only_an_empty_one_means():
    latent = {"samples": torch.ones(1, 4, 8, 8), "batch_index": [7]} | dict.fromkeys(KNOWN, 8)
    made = LCMEdit.execute(
        model=model_of("SD15"), source=tiny.cond(1), target=tiny.cond(2), latent_image=latent, seed=1, steps=2, cfg=1.0,
        denoise=0.5, original_steps=50, keep=0.0,
    ).result[0]  # fmt: skip
    assert set(made) == {"samples", "batch_index"}


def test_results_are_kept_in_the_dtype_that_comfyui_keeps_them_in(monkeypatch):
    if not hasattr(comfy.model_management, "intermediate_dtype"):
        pytest.skip("this ComfyUI has one dtype for results")
    monkeypatch.setattr(comfy.model_management.args, "fp16_intermediates", True)
    (empty,) = EmptyLatentImage().generate(64, 64)
    assert cores(model_of("SD15"), empty)["samples"].dtype == torch.float16
    assert ours(model_of("SD15"), empty)["samples"].dtype == torch.float16
