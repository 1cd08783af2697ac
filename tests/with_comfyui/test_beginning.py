"""A training that begins with an existing LoRA: in every spelling that ComfyUI loads, exactly, or refused in words."""

import comfy.sd
import pytest
import torch

from lcm_kit.distillation.adapter import LoraAdapters
from lcm_kit.distillation.kept import Kept
from lcm_kit.distillation.settings import Settings
from lcm_kit.host.lora.weights import LoraWeights
from lcm_kit.host.training import teacher_pictures
from lcm_kit.host.training.beginning import factors_of
from lcm_kit.host.training.report import lost_words
from lcm_kit.nodes.distilling import Distill
from lcm_kit.tests.with_comfyui import tiny
from lcm_kit.tests.with_comfyui.families import FAMILIES
from lcm_kit.tests.with_comfyui.test_distilling import WIDGETS, assert_same_lora, calm_model, distilled


@pytest.fixture(autouse=True)
def _as_the_executor_does():
    with torch.inference_mode():
        yield


def updates(model, patches_of):
    """Layer -> what a LORA_MODEL adds to its weight, by core."""
    patched, _ = comfy.sd.load_lora_for_models(model, None, dict(patches_of), 1.0, 0)
    weights, before = tiny.patched_weights(patched), dict(model.model.state_dict())
    return {key: weight - before[key] for key, weight in weights.items()}


@pytest.fixture
def model():
    return calm_model(**tiny.SMALL)


@pytest.mark.parametrize("spelling", tiny.SPELLINGS)
def test_it_begins_with_what_core_adds_to_the_weights(spelling, model):
    lora = LoraWeights(tiny.lora(model, spelling), name="given.safetensors")
    network = model.model.diffusion_model
    adapters = LoraAdapters(network, 8, generator=torch.Generator().manual_seed(0))
    factors, lost = factors_of(lora, model, adapters.names, lora.name)
    adapters.start_from(factors)
    expected = updates(model, lora)
    for name, branch in zip(adapters.names, adapters.branches, strict=True):
        delta = (branch.up.flatten(1) @ branch.down.flatten(1)) * (branch.alpha / branch.rank)
        wanted = expected.get(f"diffusion_model.{name}.weight", torch.zeros_like(delta)).flatten(1)
        torch.testing.assert_close(delta.detach(), wanted, atol=1e-5, rtol=1e-4)
    adapters.remove()
    assert all("begin anew" in one or "not in the result" in one for one in lost_words(lost))


def test_no_step_of_training_changes_nothing_about_it_and_one_does(model):
    """Through the node: at a rate of almost nothing the result is what was given."""
    given = distilled(model, steps=4, rank=2, learning_rate=0.01)[0]
    same = distilled(model, steps=1, rank=2, learning_rate=1e-7, start_from=given)[0]
    assert_same_updates(same, given, 1e-5)
    padded = distilled(model, steps=1, rank=5, learning_rate=1e-7, start_from=given)[0]
    assert_same_updates(padded, given, 1e-5)
    more = distilled(model, steps=2, rank=2, learning_rate=0.01, start_from=given)[0]
    with pytest.raises(AssertionError):
        assert_same_updates(more, given, 1e-3)


def assert_same_updates(actual, expected, tolerance):
    for key in expected:
        if key.endswith("lora_up.weight"):
            down = key.replace("lora_up", "lora_down")
            one, other = (lora[key].flatten(1) @ lora[down].flatten(1) for lora in (actual, expected))
            assert (one - other).norm() <= tolerance * other.norm() + 1e-7, key


def test_a_run_that_began_with_a_lora_goes_on_with_that_one_only(model, comfy_home):
    given = distilled(model, steps=2, rank=2)[0]
    whole = distilled(model, steps=4, rank=2, start_from=given)[0]
    distilled(model, steps=2, rank=2, start_from=given, resume="begun")
    assert_same_lora(distilled(model, steps=4, rank=2, start_from=given, resume="begun")[0], whole)
    with pytest.raises(ValueError, match=r"begun\.safetensors is the checkpoint of another training \(start: "):
        distilled(model, steps=4, rank=2, resume="begun")


def test_a_higher_rank_is_refused_with_the_way_out(model):
    with pytest.raises(
        ValueError, match=r"start_from is LCM-LoRA, of rank 3 .*, and rank is 2\. Set rank to 3, or make"
    ):
        distilled(model, rank=2, start_from=distilled(model, steps=1, rank=3)[0])


def test_a_lora_for_another_model_and_other_kinds_are_refused(model):
    strange = LoraWeights({"lora_unet_nowhere.lora_up.weight": torch.ones(2, 2),
                           "lora_unet_nowhere.lora_down.weight": torch.ones(2, 2)}, name="strange")  # fmt: skip
    with pytest.raises(ValueError, match="start_from is strange, which changes none of the layers that are trained"):
        distilled(model, start_from=strange)
    given = distilled(model, steps=1, rank=2)[0]
    key = next(key for key in given if key.endswith("lora_up.weight"))
    wider = dict(given) | {key: torch.ones(given[key].shape[0] + 1, *given[key].shape[1:])}
    with pytest.raises(ValueError, match="start_from is The LoRA, which is for another model"):
        distilled(model, rank=2, start_from=wider)
    module = key.removesuffix(".lora_up.weight")
    rows, columns = given[key].shape[0], given[key.replace("up", "down")].flatten(1).shape[1]
    loha = {f"{module}.hada_w{n}_{side}": torch.ones(*shape) for n in (1, 2)
            for side, shape in (("a", (rows, 1)), ("b", (1, columns)))}  # fmt: skip
    with pytest.raises(ValueError, match=r"more than a plain low-rank update \(loha\).*Resize LoRA"):
        distilled(model, rank=2, start_from=loha)


@pytest.mark.parametrize("name", ["Wan", "Flux", "Qwen-Image", "Z-Image"])
def test_transformers_begin_with_a_lora_too(name):
    """Of which core spreads some modules over parts of one weight, such as q, k and v."""
    family = FAMILIES[name]
    model = family.model()

    def made(steps, **more):
        inputs = WIDGETS | {"steps": steps, "rank": 4, "learning_rate": 4e-3, "skip": 1000, "guidance_min": 3.0} | more
        return Distill.execute(
            [model], [family.cond(1)], [family.cond(2)], latent=[family.latent()],
            **{name: [value] for name, value in inputs.items()},
        ).result[0]  # fmt: skip

    given = made(2)
    again = made(1, learning_rate=1e-7, start_from=given)
    assert again.keys() == given.keys()
    assert_same_updates(again, given, 1e-4)


@pytest.mark.parametrize("name", sorted(FAMILIES))
def test_every_family_makes_pictures_of_two_prompts_as_of_each(name, monkeypatch):
    monkeypatch.setattr(teacher_pictures, "STEPS", 2)
    family = FAMILIES[name]
    model, empty = family.model(), torch.zeros_like(family.latent()["samples"][:1])
    prompts = [(family.cond(seed)[0], family.cond(2)[0]) for seed in (1, 3, 1)]

    def made(batch):
        settings = Settings(batch=batch, seed=5, guidance_min=2.0, guidance_max=2.0)
        return torch.cat(teacher_pictures.teachers_pictures(model, prompts, empty, settings, Kept()))

    torch.testing.assert_close(made(3), made(1), atol=1e-4, rtol=1e-3)
