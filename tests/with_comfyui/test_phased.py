"""A LoRA of phases in ComfyUI: distilled by the node, told by its file, handed its settings by whatever loads it."""

import folder_paths
import pytest
import torch
from comfy.model_base import ModelType

from lcm_kit.distillation.phases import edge_timesteps
from lcm_kit.host.lora import files
from lcm_kit.host.lora.weights import to_lora
from lcm_kit.host.training import distilling, strip
from lcm_kit.lora_merge import save
from lcm_kit.nodes.loading import LCMLoader, LoadLoRA
from lcm_kit.nodes.mix import LoRAMix
from lcm_kit.nodes.scheduling import LCMScheduler
from lcm_kit.samplers.multistep import sample_lcm
from lcm_kit.samplers.presets import phased
from lcm_kit.tests.with_comfyui import tiny
from lcm_kit.tests.with_comfyui.test_distilling import (
    WIDGETS,
    assert_same_lora,
    calm_model,
    distilled,
)

IN_4 = {"phases": 4, "skip": 125}


@pytest.fixture(autouse=True)
def _as_the_executor_does():
    with torch.inference_mode():
        yield


@pytest.fixture(scope="module")
def model():
    with torch.inference_mode():
        return calm_model(**tiny.SMALL)


@pytest.fixture
def loras(tmp_path, monkeypatch):
    monkeypatch.setitem(folder_paths.folder_names_and_paths, "loras", ([str(tmp_path)], {".safetensors"}))
    folder_paths.filename_list_cache.pop("loras", None)
    yield tmp_path
    folder_paths.filename_list_cache.pop("loras", None)
    files._cache.clear()


def test_phases_of_one_are_what_the_node_did_before_to_the_bit(model):
    assert_same_lora(distilled(model)[0], distilled(model, phases=1)[0])


def test_phases_reach_the_training(model):
    assert not torch.equal(
        *(
            next(value for key, value in distilled(model, skip=125, phases=n)[0].items() if "lora_up" in key)
            for n in (1, 4)
        )
    )


@pytest.mark.parametrize("kind", [ModelType.EPS, ModelType.V_PREDICTION, ModelType.FLOW])
def test_every_kind_of_model_is_distilled_in_phases(kind):
    """The loss stays a number, and the report says how to sample."""
    lora, _, report = distilled(calm_model(kind, **tiny.SMALL), **IN_4)
    assert all(bool(tensor.isfinite().all()) for tensor in lora.values())
    assert "In 4 phases: for 4 steps, cfg 1, gamma 0, timesteps 999, 749, 499, 249." in report


@pytest.mark.parametrize("phases", [2, 4, 5, 8])
def test_its_file_is_known_and_gets_its_preset(model, loras, phases):
    lora = distilled(model, phases=phases, skip=1000 // phases)[0]
    save(to_lora(lora), loras / "fast.safetensors")
    _, _, preset, _, steps, cfg, report = LCMLoader.execute(model, "fast.safetensors", 1.0, "refuse").result
    assert preset == phased(phases)
    assert (steps, cfg) == (phases, 1.0)
    assert (
        f"Settings (Phased LCM {phases} steps): LCM KSampler, {phases} steps, cfg 1, gamma 0, timesteps 999" in report
    )
    auto = LCMLoader.execute(model, "auto", 1.0, "refuse").result
    assert auto[2] == preset
    mixed = LoRAMix.execute(model=model, lcm_lora="fast.safetensors").result
    assert preset in mixed
    assert f"Phased LCM {phases} steps" in LoadLoRA.execute("fast.safetensors").result[1]


def test_an_ordinary_lora_is_an_lcm_lora_still(model, loras):
    save(to_lora(distilled(model)[0]), loras / "lcm.safetensors")
    assert LCMLoader.execute(model, "lcm.safetensors", 1.0, "refuse").result[2].name == "LCM"


def test_the_sampler_visits_the_edges(model):
    sigmas = LCMScheduler.execute(model, 4, 1.0, 50, "", preset=phased(4)).result[0]
    table = model.get_model_object("model_sampling").sigmas
    torch.testing.assert_close(sigmas, torch.cat([table[list(edge_timesteps(4, 1000))], torch.zeros(1)]))


def test_samples_on_the_way_are_made_from_edge_to_edge_without_noise(monkeypatch):
    monkeypatch.setattr(tiny.TinyLatent, "latent_rgb_factors", [[0.1, 0.2, 0.3]] * 4, raising=False)
    model, seen = calm_model(**tiny.SMALL), []

    def watched(denoise, x, sigmas, **options):
        seen.append((sigmas, options["gamma"]))
        return sample_lcm(denoise, x, sigmas, **options)

    monkeypatch.setattr(strip, "sample_lcm", watched)
    start = distilled(model, steps=1)[0]
    seen.clear()
    _, picture, _ = distilled(model, **IN_4, steps=2, save_every=2, start_from=start)
    table = model.get_model_object("model_sampling").sigmas
    assert len(seen) == 2  # before, with the LoRA it begins with, and after
    for sigmas, gamma in seen:
        assert gamma == 0.0
        torch.testing.assert_close(sigmas.cpu(), torch.cat([table[[999, 749, 499, 249]], torch.zeros(1)]))
    assert picture.shape[0] == 1


def test_a_recipe_sets_what_was_left_and_the_report_says_so(model):
    """What WIDGETS changes stays; phases, weighting and average come from the recipe."""
    recipe = "accelerate this style"
    by_recipe = distilled(model, recipe=recipe, skip=125)
    by_hand = distilled(model, phases=4, weighting="v", average=0.95, accumulate=6, skip=125)
    assert_same_lora(by_recipe[0], by_hand[0])
    said = by_recipe[2].splitlines()[0]
    assert said.startswith(f"Recipe {recipe}: phases 4, skip 125, weighting v, average 0.95, accumulate 6.")
    assert f"steps {WIDGETS['steps']}" in said.partition("Set by you: ")[2]


def test_what_does_not_fit_is_refused_before_pictures_are_made(model, monkeypatch):
    monkeypatch.setattr(distilling, "teachers_pictures", lambda *_: pytest.fail("pictures were made"))
    with pytest.raises(ValueError, match="skip is 200, and a phase has 250 timesteps"):
        distilled(model, phases=4, latent=[])
