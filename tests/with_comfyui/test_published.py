"""Every preset against what its source publishes, on ComfyUI's own model_sampling, patched and not.

The numbers are written from the sources, apart from the table they are held against.
"""

import inspect
import logging
import math

import comfy.model_base
import comfy.samplers
import comfy.supported_models
import pytest
import torch
from comfy.model_base import ModelType
from comfy_extras import nodes_flux, nodes_model_advanced

from lcm_kit.host.sampling.experts import WAN_BOUNDARY, steps_above
from lcm_kit.nodes.scheduling import LCMPreset, LCMScheduler
from lcm_kit.samplers.presets import PRESETS
from lcm_kit.tests.with_comfyui.levels import Sampled, shifted

FLOW_PRESETS = [name for name, preset in PRESETS.items() if preset.flow]


def sd3(shift):
    return lambda model: nodes_model_advanced.ModelSamplingSD3().patch(model, shift)[0]


def aura(shift):
    return lambda model: nodes_model_advanced.ModelSamplingAuraFlow().patch_aura(model, shift)[0]


def flux(width, height):
    return lambda model: nodes_model_advanced.ModelSamplingFlux().patch(model, 1.15, 0.5, width, height)[0]


def flux_mu(width, height):
    return 0.5 + 0.65 * (width * height / 256 - 256) / (4096 - 256)


def unpatched(model):
    return model


# As comfy/supported_models.py sets them up: family -> kind, settings, patch, the shift of the result.
FAMILIES = {
    "Wan": (ModelType.FLOW, {"shift": 8.0}, unpatched, 8.0),
    "Wan, shift 5": (ModelType.FLOW, {"shift": 8.0}, sd3(5.0), 5.0),
    "SD3.5": (ModelType.FLOW, {"shift": 3.0}, unpatched, 3.0),
    "HiDream, shift 6": (ModelType.FLOW, {}, sd3(6.0), 6.0),
    "HunyuanVideo": (ModelType.FLOW, {"shift": 7.0}, unpatched, 7.0),
    "FastHunyuan, shift 17": (ModelType.FLOW, {"shift": 7.0}, sd3(17.0), 17.0),
    "MiniMax-H3": (ModelType.FLOW, {"shift": 12.0}, unpatched, 12.0),
    "HiDream-O1": (ModelType.FLOW, {"shift": 3.0, "noise_scale": 8.0}, unpatched, 3.0),
    "HiDream": (ModelType.FLOW, {}, unpatched, 1.0),
    "HiDream, shift 3": (ModelType.FLOW, {}, sd3(3.0), 3.0),
    "Z-Image": (ModelType.FLOW, {"multiplier": 1.0, "shift": 3.0}, unpatched, 3.0),
    "Boogu": (ModelType.FLOW, {"multiplier": 1.0, "shift": 3.16}, unpatched, 3.16),
    "ERNIE-Image": (ModelType.FLOW, {"multiplier": 1000.0, "shift": 3.0}, unpatched, 3.0),
    "Stable Audio 3": (ModelType.FLOW, {"multiplier": 1.0, "shift": 2.0}, unpatched, 2.0),
    "Flux schnell": (ModelType.FLOW, {"multiplier": 1.0, "shift": 1.0}, unpatched, 1.0),
    "PiD": (ModelType.FLOW, {"shift": 1.5}, unpatched, 1.5),
    "Flux": (ModelType.FLUX, {}, unpatched, math.exp(1.15)),
    "Flux, 512 x 512": (ModelType.FLUX, {}, flux(512, 512), math.exp(flux_mu(512, 512))),
    "Flux.2": (ModelType.FLUX, {"shift": 2.02}, unpatched, math.exp(2.02)),
    "LTX": (ModelType.FLUX, {"shift": 2.37}, unpatched, math.exp(2.37)),
    "Qwen-Image": (ModelType.FLUX, {"multiplier": 1.0, "shift": 1.15}, unpatched, math.exp(1.15)),
    "Qwen-Image, shift 3": (ModelType.FLUX, {"multiplier": 1.0, "shift": 1.15}, aura(3.0), 3.0),
    "Qwen-Image, shift 3.1": (ModelType.FLUX, {"multiplier": 1.0, "shift": 1.15}, aura(3.1), 3.1),
    "Lens": (ModelType.FLUX, {"shift": 1.829}, unpatched, math.exp(1.829)),
    "Mage-Flow": (ModelType.FLOW, {"multiplier": 1.0, "shift": 6.0}, unpatched, 6.0),
    "HunyuanVideo 1.5 SR": (ModelType.FLOW, {"shift": 2.0}, unpatched, 2.0),
    "Wan VACE, shift 8": (ModelType.FLOW, {"shift": 8.0}, sd3(8.0), 8.0),
}


# Class in comfy/supported_models.py, class in comfy/model_base.py, family.
CORE_CLASSES = [
    ("WAN21_T2V", "WAN21", "Wan"),
    ("SD3", "SD3", "SD3.5"),
    ("HiDream", "HiDream", "HiDream"),
    ("HunyuanVideo", "HunyuanVideo", "HunyuanVideo"),
    ("MiniMaxH3", "MiniMaxH3", "MiniMax-H3"),
    ("HiDreamO1", "HiDreamO1", "HiDream-O1"),
    ("ZImage", "Lumina2", "Z-Image"),
    ("Anima", "Anima", "Z-Image"),
    ("ACEStep15", "ACEStep15", "Z-Image"),
    ("Boogu", "Boogu", "Boogu"),
    ("ErnieImage", "ErnieImage", "ERNIE-Image"),
    ("StableAudio3", "StableAudio3", "Stable Audio 3"),
    ("PiD", "PiD", "PiD"),
    ("Flux", "Flux", "Flux"),
    ("Flux2", "Flux2", "Flux.2"),
    ("LTXV", "LTXV", "LTX"),
    ("QwenImage", "QwenImage", "Qwen-Image"),
    ("Krea2", "Krea2", "Qwen-Image"),
    ("Lens", "Lens", "Lens"),
    ("MageFlow", "MageFlow", "Mage-Flow"),
    ("HunyuanVideo15_SR_Distilled", "HunyuanVideo15_SR_Distilled", "HunyuanVideo 1.5 SR"),
]


@pytest.mark.parametrize(("config", "model", "family"), CORE_CLASSES)
def test_the_families_are_set_up_as_comfyui_does(config, model, family):
    if not hasattr(comfy.supported_models, config):
        pytest.skip(f"this ComfyUI has no {config} yet")
    kind, settings, *_ = FAMILIES[family]
    # The noise of a video's sound, which newer versions shift by itself, is no sampler's.
    theirs = dict(getattr(comfy.supported_models, config).sampling_settings)
    theirs.pop("audio_shift", None)
    assert theirs == settings
    # FLOW_AV is FLOW with a shift of its own for sound.
    default = inspect.signature(getattr(comfy.model_base, model).__init__).parameters["model_type"].default
    assert default.name.removesuffix("_AV") == kind.name


def model_of(family):
    kind, settings, patch, _ = FAMILIES[family]
    return patch(Sampled(kind, settings))


def levels(model, name):
    preset = LCMPreset.execute(name, 0).result[0]
    return LCMScheduler.execute(model, 1, 1.0, 50, "", preset=preset).result[0]


def even(steps):
    return [1 - i / steps for i in range(steps)]


FOUR_AT_3, FOUR_AT_5 = [1, 0.9, 0.75, 0.5], [1, 0.9375, 0.8333333, 0.625]
EIGHT_AT_3 = [1, 0.9545455, 0.9, 0.8333333, 0.75, 0.6428571, 0.5, 0.3]
EIGHT_OF_FLUX = [1, 0.956738, 0.904535, 0.840318, 0.759511, 0.65459, 0.512817, 0.310869]

# Preset -> the family it is used on, and the list that its source gives, or that follows from its source's rule.
LISTS = {
    "Wan 2.1 lightx2v": ("Wan, shift 5", FOUR_AT_5),
    "Wan 2.2 lightx2v": ("Wan, shift 5", FOUR_AT_5),
    "Self-Forcing": ("Wan, shift 5", FOUR_AT_5),
    "ChronoEdit": ("Wan, shift 5", FOUR_AT_5),
    "Wan Animate 2 lightx2v": ("Wan, shift 5", [1, 0.9615385, 0.9090909, 0.8333333, 0.7142857, 0.5]),
    "Wan Animate 2 distilled": ("Wan, shift 5", shifted(5, even(10))),
    "CausVid": ("Wan", [1, 0.757, 0.522]),
    "CausVid LoRA": ("Wan VACE, shift 8", [1, 0.96, 0.8888889, 0.7272727]),
    "rCM": ("Wan", [0.9876543, 0.9337811, 0.8528955, 0.6089778]),
    "Qwen-Image-Lightning 4 steps": ("Qwen-Image, shift 3", FOUR_AT_3),
    "Qwen-Image-Lightning 8 steps": ("Qwen-Image, shift 3", EIGHT_AT_3),
    "Wuli Qwen-Image Turbo": ("Qwen-Image, shift 3", [1, 0.75]),
    "FireRed-Edit Lightning": (
        "Qwen-Image, shift 3.1",
        [1, 0.955947, 0.902913, 0.837838, 0.756098, 0.65035, 0.508197, 0.306931],
    ),
    "Qwen-Image 2.1 turbo": (
        "Qwen-Image",
        [1, 0.978453, 0.95418, 0.926626, 0.89508, 0.845148, 0.704534, 0.414568],
    ),
    "Z-Image-Turbo": ("Z-Image", EIGHT_AT_3),
    "Flux schnell": ("Flux schnell", [1, 0.75, 0.5, 0.25]),
    "Flux Turbo": ("Flux", EIGHT_OF_FLUX),
    "Hyper-FLUX 8 steps": ("Flux", EIGHT_OF_FLUX),
    "Flux.2 Turbo": ("Flux.2", [1, 0.6509, 0.4374, 0.2932, 0.1893, 0.1108, 0.0495, 0.00031]),
    "Flux.2 Klein": ("Flux.2", [1, 0.9674, 0.9081, 0.7672]),
    "SD3.5 Turbo": ("SD3.5", FOUR_AT_3),
    "HiDream dev": ("HiDream, shift 6", None),
    "HiDream fast": ("HiDream, shift 3", None),
    "HiDream-O1 dev": ("HiDream-O1", None),
    "Anima turbo": ("Z-Image", EIGHT_AT_3),
    "Krea 2 turbo": ("Flux", EIGHT_OF_FLUX),
    "ERNIE-Image turbo": ("ERNIE-Image", EIGHT_AT_3),
    "Lens turbo": ("Lens", [1, 0.949187, 0.861637, 0.674868]),
    "Mage-Flow turbo": ("Mage-Flow", [1, 0.947368, 0.857143, 0.666667]),
    # In no ComfyUI that is tested here; any family's shift will do.
    "FIBO 2 turbo": ("Flux", shifted(math.exp(1.15), even(4))),
    "Boogu turbo": ("Boogu", None),
    "PiD": ("PiD", [1, 0.8181818, 0.6, 0.3333333]),
    "LTX-2 distilled": ("LTX", [1, 0.99375, 0.9875, 0.98125, 0.975, 0.909375, 0.725, 0.421875]),
    "LTX-2 second stage": ("LTX", [0.909375, 0.725, 0.421875]),
    "LTX-2.3 second stage": ("LTX", [0.85, 0.725, 0.4219]),
    "HunyuanVideo distilled": ("FastHunyuan, shift 17", shifted(17, even(6))),
    "HunyuanVideo 1.5 upscaler": (
        "HunyuanVideo 1.5 SR",
        [1, 0.933333, 0.857143, 0.769231, 0.666667, 0.545455, 0.4, 0.222222],
    ),
    "MiniMax-H3 turbo": ("MiniMax-H3", shifted(12, even(8))),
    "FastH3": ("MiniMax-H3", shifted(12, even(8))),
    "Stable Audio 3 pingpong": ("Stable Audio 3", shifted(2, even(8))),
    "ACE-Step 1.5 turbo": ("Z-Image", EIGHT_AT_3),
}
# What does not start from pure noise: a second stage goes on from the first one's picture, and rCM's noise is that of
# TrigFlow's angle atan(80).
STARTS_BELOW_NOISE = {"LTX-2 second stage", "LTX-2.3 second stage", "rCM"}

# Those whose source is a core scheduler's rounding to the table: the scheduler itself is asked.
CORE_SCHEDULER = {"HiDream dev": "normal", "HiDream fast": "normal", "HiDream-O1 dev": "normal", "Boogu turbo": "sgm_uniform"}  # fmt: skip


def warnings_of(caplog):
    return [record.getMessage() for record in caplog.records if record.levelno >= logging.WARNING]


def test_every_flow_preset_is_held_against_a_list():
    assert sorted(LISTS) == sorted(FLOW_PRESETS)


@pytest.mark.parametrize("name", [name for name, (_, listed) in LISTS.items() if listed])
def test_a_preset_gives_the_list_of_its_source_without_a_warning(name, caplog):
    family, listed = LISTS[name]
    torch.testing.assert_close(levels(model_of(family), name), torch.tensor([*listed, 0.0]), rtol=0, atol=1e-4)
    assert warnings_of(caplog) == []


@pytest.mark.parametrize("name", CORE_SCHEDULER)
def test_a_preset_of_a_core_scheduler_gives_its_levels(name, caplog):
    model = model_of(LISTS[name][0])
    expected = comfy.samplers.calculate_sigmas(model.model_sampling, CORE_SCHEDULER[name], PRESETS[name].steps)
    torch.testing.assert_close(levels(model, name), expected, rtol=0, atol=1e-4)
    assert warnings_of(caplog) == []


def test_kleins_list_is_cores_flux2_scheduler_at_the_size_it_says():
    expected = nodes_flux.Flux2Scheduler.execute(4, 1024, 1024).result[0]
    torch.testing.assert_close(levels(model_of("Flux.2"), "Flux.2 Klein"), expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("name", FLOW_PRESETS)
def test_every_flow_preset_on_every_family(name, caplog):
    """Listed levels stand wherever they are asked for; a rule goes through the model's own shift, and a preset that
    was made for another one says so.
    """
    preset = PRESETS[name]
    for family, (*_, shift) in FAMILIES.items():
        caplog.clear()
        model = model_of(family)
        found = levels(model, name)
        lowest = float(model.model_sampling.sigma_min)
        spaced = {
            "even": even(preset.steps),
            "normal": torch.linspace(1.0, lowest, preset.steps, dtype=torch.float64).tolist(),
            "sgm_uniform": torch.linspace(1.0, lowest, preset.steps + 1, dtype=torch.float64).tolist()[:-1],
        }
        expected = preset.sigmas or shifted(shift, spaced[preset.spacing])
        torch.testing.assert_close(
            found,
            torch.tensor([*expected, 0.0]),
            rtol=0,
            atol=1e-4,
            msg=lambda text, family=family: f"{family}: {text}",
        )
        if name not in STARTS_BELOW_NOISE:
            assert float(found[0]) == pytest.approx(1.0, abs=1e-6), family
        if preset.shift is None or abs(shift / preset.shift - 1) < 0.01:
            assert warnings_of(caplog) == [], family
        else:
            (warning,) = warnings_of(caplog)
            told = f"{name}: shift {preset.shift:g} expected, this model has {shift:.3g}. Put "
            assert warning.startswith(told), family


@pytest.mark.parametrize(
    ("name", "family", "node"),
    [
        ("Wan 2.2 lightx2v", "Wan", "ModelSamplingSD3 with shift 5"),
        ("Qwen-Image-Lightning 4 steps", "Qwen-Image", "ModelSamplingAuraFlow with shift 3"),
        ("Z-Image-Turbo", "Stable Audio 3", "ModelSamplingAuraFlow with shift 3"),
    ],
)
def test_the_node_that_a_warning_of_the_shift_names_helps(name, family, node, caplog):
    model = model_of(family)
    levels(model, name)
    assert f"Put {node} before this node" in warnings_of(caplog)[0]
    caplog.clear()
    patch = (sd3 if "SD3" in node else aura)(PRESETS[name].shift)(model)
    levels(patch, name)
    assert warnings_of(caplog) == []
    # The network is told its level in the same units as before.
    half = torch.tensor([0.5])
    assert patch.model_sampling.timestep(half) == model.model_sampling.timestep(half)


@pytest.mark.parametrize("name", [name for name in PRESETS if name not in FLOW_PRESETS])
def test_the_presets_of_stable_diffusion_on_flow_models_start_from_noise(name, caplog):
    preset = PRESETS[name]
    times = [(t + 1) / 1000 for t in preset.timesteps[: preset.steps]] or even(preset.steps)
    for family, (*_, shift) in FAMILIES.items():
        expected = torch.tensor([*shifted(shift, times), 0.0])
        torch.testing.assert_close(
            levels(model_of(family), name), expected, rtol=0, atol=1e-4,
            msg=lambda text, family=family: f"{family}: {text}",
        )  # fmt: skip
        assert warnings_of(caplog) == [], family


@pytest.mark.parametrize("name", [name for name in FLOW_PRESETS if PRESETS[name].first_expert])
def test_the_experts_of_a_preset_divide_its_steps_where_the_boundary_does(name):
    model = model_of(LISTS[name][0])
    sigmas = levels(model, name)
    assert steps_above(model.model_sampling, sigmas, WAN_BOUNDARY) == PRESETS[name].first_expert


# ---- where they do not fit


@pytest.mark.parametrize("name", FLOW_PRESETS)
@pytest.mark.parametrize(
    "kind", [ModelType.EPS, ModelType.V_PREDICTION, ModelType.EDM, ModelType.V_PREDICTION_CONTINUOUS]
)
def test_a_flow_preset_is_refused_by_any_other_model(name, kind):
    with pytest.raises(ValueError, match=rf"The preset {name} is for flow models .* and this model is none.*Choose"):
        levels(Sampled(kind, {}), name)


def test_on_cosmos_a_flows_levels_are_told_in_its_own_units():
    """Cosmos' levels are noise over picture, sigma / (1 - sigma) of a flow's; its time is a flow's level."""
    model = Sampled(ModelType.FLOW_COSMOS, {"sigma_max": 80.0, "sigma_min": 0.002})
    found = levels(model, "rCM")
    torch.testing.assert_close(found[:-1], torch.tensor([80.0, *map(math.tan, (1.5, 1.4, 1.0))]), rtol=2e-5, atol=0)
    told = model.model_sampling.timestep(found[:-1])
    torch.testing.assert_close(told, torch.tensor(LISTS["rCM"][1]), rtol=0, atol=1e-5)


@pytest.mark.parametrize("name", [name for name in FLOW_PRESETS if name != "rCM"])
def test_a_preset_whose_first_level_cosmos_does_not_know_is_refused(name):
    model = Sampled(ModelType.FLOW_COSMOS, {"sigma_max": 80.0, "sigma_min": 0.002})
    if name.endswith("second stage"):  # begins lower, and nothing speaks against it
        assert float(levels(model, name)[0]) == pytest.approx(PRESETS[name].sigmas[0] / (1 - PRESETS[name].sigmas[0]))
        return
    with pytest.raises(ValueError, match=rf"The preset {name} is for flow models .* its noise levels reach 80"):
        levels(model, name)
