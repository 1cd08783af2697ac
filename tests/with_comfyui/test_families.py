"""Transformers of ComfyUI's own classes: Distill trains them, and a LoRA reaches the weights that core leaves alone."""

import re
from contextlib import contextmanager
from functools import partial
from types import SimpleNamespace

import comfy.model_management
import comfy.sd
import comfy.utils
import pytest
import torch

from lcm_kit.distillation.draws import draw
from lcm_kit.distillation.objective import distillation_loss
from lcm_kit.distillation.settings import Settings
from lcm_kit.host.lora import patches
from lcm_kit.host.lora.stored import never_patched, stored_weight, weight_keys
from lcm_kit.host.lora.weights import LoraWeights
from lcm_kit.host.training import distilling
from lcm_kit.host.training.data import Batches, Item, encoded
from lcm_kit.host.training.loan import Denoiser, lent
from lcm_kit.host.training.run import sigma_table
from lcm_kit.nodes.distilling import Distill
from lcm_kit.tests.with_comfyui import negative_models, tiny
from lcm_kit.tests.with_comfyui.families import CPU, FAMILIES
from lcm_kit.tests.with_comfyui.test_distilling import WIDGETS

SKIP = 1000

pytestmark = pytest.mark.usefixtures("no_gradients")


# ---- Distill


def fixed_loss(family, teacher, student):
    """The distillation loss of `student` against `teacher` on draws that are always the same."""
    fp32 = torch.float32
    with torch.inference_mode(False), torch.no_grad(), lent(teacher, fp32) as one, lent(student, fp32) as other:
        latents = [one.model.process_latent_in(part.clone()) for part in family.latent()["samples"].split(1)]
        cond, uncond = (encoded(one, family.cond(seed), latents[0], "positive")[0] for seed in (1, 2))
        batch = Batches([Item(latent, cond, uncond) for latent in latents], seed=0, per_step=2, device=CPU).batch(
            [0, 1]
        )
        student_denoise, guided, switch = Denoiser(other), Denoiser(one), SimpleNamespace(teacher=False)

        @contextmanager
        def disabled():
            switch.teacher = True
            yield
            switch.teacher = False

        switch.disabled = disabled
        table = sigma_table(one).clone()
        draws = [draw(77, step, range(2), batch.z0, [len(table) - 1], (3.0, 3.0)) for step in range(2)]
        return float(sum(
            distillation_loss(
                lambda *call: guided(*call) if switch.teacher else student_denoise(*call),
                switch, batch, one_draw, stride=SKIP, table=table, flow=True,
            )
            for one_draw in draws
        ))  # fmt: skip


def distilled(family, model, **widgets):
    inputs = (
        WIDGETS
        | {"steps": 12, "batch": 2, "rank": 4, "learning_rate": 4e-3, "skip": SKIP, "guidance_min": 3.0}
        | widgets
    )
    return Distill.execute(
        [model], [family.cond(1)], [family.cond(2)], latent=[family.latent()],
        **{name: [value] for name, value in inputs.items()},
    ).result[0]  # fmt: skip


DISTILLED = ("Wan", "Flux", "Qwen-Image", "Z-Image")
# Trained too, for fewer steps than would lower a loss.
TRAINED = ("SD3", "HunyuanVideo", "LTXV")
# What may be refused, and in which words; some versions of ComfyUI train Anima.
REFUSED = {
    "Cosmos Predict 2": "continuous noise levels, not on numbered timesteps",
    "LTX-2": "latent has 2 parts in one, such as picture and sound",
    "Anima": "cannot be trained in this ComfyUI: .* operation that has no gradient",
    # Whose encoder of a face is most of a tiny one, and little of a whole one.
    "Wan Animate": "layers that an LCM-LoRA changes are of a kind that cannot be trained .EqualConv2d",
}


@pytest.mark.parametrize("name", TRAINED)
def test_distill_trains_a_lora_that_core_loads_whole(name, caplog):
    family = FAMILIES[name]
    model = family.model()
    lora = distilled(family, model, steps=2)
    with_lora, _ = comfy.sd.load_lora_for_models(model, None, dict(lora), 1.0, 0)
    assert "not loaded" not in caplog.text
    assert with_lora.patches


@pytest.mark.slow
@pytest.mark.parametrize("name", negative_models.MODELS)
def test_a_transformer_is_trained_whole_or_refused_in_words(name, caplog):
    """Whole: every matrix in its lists of blocks, counted here by a loop of its own."""
    model = (known := negative_models.MODELS[name]).model()
    widgets = WIDGETS | {"steps": 1, "skip": SKIP, "gradient_checkpointing": True}
    inputs = {key: [one] for key, one in widgets.items()}
    refused, lora = "", {}
    try:
        lora = Distill.execute([model], [known.text(1)], [known.text(2)], latent=[known.latent()], **inputs).result[0]
    except ValueError as error:
        refused = str(error)
    if refused:
        assert name in REFUSED
        assert re.search(REFUSED[name], refused)
        return
    lists = [part for part in model.model.diffusion_model.modules() if isinstance(part, torch.nn.ModuleList)]
    matrices = {id(one) for part in lists for one in part.modules() if isinstance(one, torch.nn.Linear)}
    assert sum(key.endswith(".alpha") for key in lora) >= len(matrices) > 0
    with_lora, _ = comfy.sd.load_lora_for_models(model, None, dict(lora), 1.0, 0)
    assert "not loaded" not in caplog.text
    assert len(with_lora.patches) == sum(key.endswith(".alpha") for key in lora)


@pytest.mark.parametrize(
    "latent",
    [{"latent": [FAMILIES["LTXV"].latent()]}, {"latent": [FAMILIES["LTXV"].empty()]}],
    ids=["pictures", "its own"],
)
@pytest.mark.parametrize("lacks", ["positive", "negative"])
def test_what_a_network_asks_for_beside_the_text_is_named(latent, lacks):
    family = FAMILIES["LTXV"]
    bare = [[family.cond(1)[0][0], {}]]
    texts = {"positive": family.cond(1), "negative": family.cond(2)} | {lacks: bare}
    with pytest.raises(
        ValueError, match=f"{lacks} has no attention_mask, which this model .LTXV. asks for beside the text"
    ):
        Distill.execute(
            [family.model()],
            [texts["positive"]],
            [texts["negative"]],
            **latent,
            **{name: [value] for name, value in WIDGETS.items()},
        )


@pytest.mark.parametrize("name", DISTILLED)
def test_distill_lowers_the_loss_with_checkpointing_and_without(name, monkeypatch, caplog):
    monkeypatch.setattr(distilling, "Settings", partial(Settings, warmup=1))
    family = FAMILIES[name]
    model, other = family.model(), family.model()
    lora = distilled(family, model)
    assert not comfy.model_management.in_training
    checkpointed = distilled(family, model, gradient_checkpointing=True)
    for key, tensor in lora.items():
        torch.testing.assert_close(checkpointed[key], tensor, rtol=1e-4, atol=1e-6, msg=key)
    with_lora, _ = comfy.sd.load_lora_for_models(other, None, dict(lora), 1.0, 0)
    assert "not loaded" not in caplog.text
    assert len(with_lora.patches) == len(lora) // 3
    assert fixed_loss(family, model, with_lora) < 0.95 * fixed_loss(family, model, other)


def test_training_is_announced_and_recalled_whatever_happens():
    """By core's switch for networks whose fused operations have no gradient."""
    model = FAMILIES["Wan"].model()
    for before in (False, True):
        comfy.model_management.in_training = before
        try:
            with pytest.raises(ZeroDivisionError), lent(model, torch.float32):
                1 / (1 - comfy.model_management.in_training)  # by 0 while it is on
            assert comfy.model_management.in_training is before
        finally:
            comfy.model_management.in_training = False


# ---- weights that core does not patch


def patched_state(model):
    """Every weight as it is when the MODEL runs."""
    comfy.model_management.load_models_gpu([model], force_full_load=True)
    try:
        return {key: comfy.utils.get_attr(model.model, key).detach().clone() for key in weight_keys(model)}
    finally:
        model.detach()


def differences(model, keys, seed=0):
    """A LoRA file's whole differences for these weights, as trainers write them."""
    generator = torch.Generator().manual_seed(seed)
    shapes = {key: comfy.utils.get_attr(model.model, key).shape for key in keys}
    return {
        f"{key.removesuffix('.weight')}.diff": 0.1 * torch.randn(shape, generator=generator)
        for key, shape in shapes.items()
    }


@pytest.mark.parametrize("name", FAMILIES)
def test_every_module_that_is_reported_as_applied_has_changed_the_model(name):
    """Also pad tokens and modulations, which core's patches do not reach."""
    model = FAMILIES[name].model()
    keys = [key for key in weight_keys(model, "diffusion_model.") if not key.endswith(".bias")]
    lora = differences(model, keys)
    before = patched_state(model)
    done = patches.apply(model, None, LoraWeights(lora, name="all"), 0.5, 1.0)
    assert f"{len(lora)} of {len(lora)} modules applied" in done.report
    after = patched_state(done.model)
    for key in keys:
        change = 0.5 * lora[f"{key.removesuffix('.weight')}.diff"]
        torch.testing.assert_close(
            after[key] - before[key], change, rtol=1e-4, atol=1e-6, msg=lambda text, key=key: f"{key}: {text}"
        )
    # The MODEL that was given is as before, and so is the network once it is used without the LoRA.
    again = patched_state(model)
    assert all(torch.equal(again[key], value) for key, value in before.items())


@pytest.mark.parametrize("name", FAMILIES)
def test_core_saves_the_model_with_its_lora(name, tmp_path):
    """As its node Save Checkpoint does: pad tokens and modulations too, which are no patches of core's kind."""
    model = FAMILIES[name].model()
    keys = weight_keys(model, "diffusion_model.")
    applied = patches.apply(model, None, LoraWeights(differences(model, keys), name="all"), 1.0, 1.0).model
    comfy.sd.save_checkpoint(tmp_path / "baked.safetensors", applied)
    written = comfy.utils.load_torch_file(str(tmp_path / "baked.safetensors"))
    saved = {
        re.sub(r"^model\.(diffusion_)?model\.", "diffusion_model.", name): value for name, value in written.items()
    }
    after = patched_state(applied)
    for key in keys:
        torch.testing.assert_close(saved[key], after[key], msg=lambda text, key=key: f"{key}: {text}")


@pytest.mark.parametrize(
    ("name", "parts"),
    [
        ("Z-Image", {"x_pad_token", "cap_pad_token"}),
        ("Wan", {"blocks.0.modulation", "head.modulation"}),
        ("LTXV", {"scale_shift_table", "transformer_blocks.0.scale_shift_table"}),
        ("Flux", set()),
        ("SD3", set()),
    ],
)
def test_what_core_leaves_alone_is_known(name, parts):
    """Against what core's own patches do when the model is loaded."""
    model = FAMILIES[name].model()
    keys = weight_keys(model, "diffusion_model.")
    alone = never_patched(model.model)
    assert {key.removeprefix("diffusion_model.") for key in keys if alone(key)} >= parts
    patched, before = model.clone(), patched_state(model)
    patched.add_patches(
        {key: ("diff", (torch.ones_like(before[key]),)) for key in keys if before[key].is_floating_point()}
    )
    after = patched_state(patched)
    assert {key for key in keys if torch.equal(after[key], before[key])} == {key for key in keys if alone(key)}


def test_two_loras_on_a_bare_parameter_add_up_and_tell_themselves_apart():
    model, key = FAMILIES["Wan"].model(), "diffusion_model.head.modulation"
    first, second = (LoraWeights(differences(model, [key], seed), name=str(seed)) for seed in (1, 2))
    once = patches.apply(model, None, first, 1.0, 1.0).model
    twice = patches.apply(once, None, second, -0.5, 1.0).model
    base, value = stored_weight(model, key)[0], next(iter(first.values()))
    torch.testing.assert_close(patched_state(twice)[key], base + value - 0.5 * next(iter(second.values())))
    torch.testing.assert_close(patched_state(once)[key], base + value)
    # While one of them is loaded, the weight of another is still its own.
    comfy.model_management.load_models_gpu([twice], force_full_load=True)
    assert torch.equal(stored_weight(model, key)[0], base)
    torch.testing.assert_close(stored_weight(once, key)[0], base + value)
    twice.detach()
    assert len({model.patches_uuid, once.patches_uuid, twice.patches_uuid}) == 3


def test_a_picture_of_a_lora_on_pad_tokens_is_that_of_the_changed_model():
    family = FAMILIES["Z-Image"]
    model, tuned = family.model(), family.model()
    keys = [key for key in weight_keys(model, "diffusion_model.") if key.endswith("pad_token")]
    lora = differences(model, keys)
    for key in keys:
        comfy.utils.get_attr(tuned.model, key).add_(lora[f"{key}.diff"])
    applied = patches.apply(model, None, LoraWeights(lora, name="pads"), 1.0, 1.0).model

    def output(patcher):
        comfy.model_management.load_models_gpu([patcher], force_full_load=True)
        x, text = family.latent(1)["samples"], family.cond(2)[0][0]
        made = patcher.model.diffusion_model(x, torch.tensor([0.5]), context=text, num_tokens=5, transformer_options={})
        patcher.detach()
        return made

    torch.testing.assert_close(output(applied), output(tuned))
    assert not torch.allclose(output(applied), output(model))
    assert tiny.CONTEXT == 16
