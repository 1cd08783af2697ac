"""Distill LCM-LoRA on real UNets: what it learns, what it leaves alone, and Table 1 of the paper."""

import json
import re
from contextlib import contextmanager
from dataclasses import fields
from functools import partial
from types import SimpleNamespace

import comfy.conds
import comfy.latent_formats
import comfy.model_base
import comfy.model_detection
import comfy.model_management
import comfy.model_patcher
import comfy.sample
import comfy.sd
import comfy.utils
import pytest
import safetensors.torch
import torch
from comfy.model_base import ModelType

from lcm_kit.distillation.adapter import LoraAdapters
from lcm_kit.distillation.draws import draw
from lcm_kit.distillation.health import Diverged
from lcm_kit.distillation.kept import Kept
from lcm_kit.distillation.log import read_table
from lcm_kit.distillation.objective import distillation_loss
from lcm_kit.distillation.settings import Settings, Setup
from lcm_kit.host.training import distilling, strip, teacher_pictures
from lcm_kit.host.training.advice import FewPictures
from lcm_kit.host.training.data import Batches, Item, encoded, moved
from lcm_kit.host.training.identity import identity_of
from lcm_kit.host.training.loan import Denoiser, lent
from lcm_kit.host.training.picture import HEIGHT, LABEL, WIDTH
from lcm_kit.host.training.prompts import chunks
from lcm_kit.host.training.report import remark_words
from lcm_kit.host.training.run import _fingerprint_of_weights, advice_for
from lcm_kit.host.training.strip import Strip
from lcm_kit.lora_merge import Lora, load
from lcm_kit.nodes.distilling import Distill
from lcm_kit.tests.distillation.live_memory import LiveMemory
from lcm_kit.tests.with_comfyui import tiny

CPU = torch.device("cpu")
WIDGETS = {
    "steps": 4, "batch": 2, "accumulate": 1, "rank": 2, "alpha": 0.0, "learning_rate": 3e-3, "guidance_min": 1.5,
    "guidance_max": 3.0, "skip": 200, "seed": 4, "samples": 2, "width": 64, "height": 64, "dtype": "auto",
    "gradient_checkpointing": False, "resume": "",
}  # fmt: skip


@pytest.fixture(autouse=True)
def _as_the_executor_does():
    with torch.inference_mode():
        yield


def calm_model(model_type=ModelType.EPS, **options):
    """A MODEL half as large as the tiny one and nearly linear in its inputs: a few steps teach it something.

    As loaded by a node, its weights are inference tensors.
    """
    model = tiny.tiny_model(model_type, **tiny.WITH_MIDDLE | options)
    for name, weight in model.model.diffusion_model.named_parameters():
        if name.endswith(("out_layers.3.weight", "proj_out.weight", "attn1.to_out.0.weight", "net.2.weight")):
            weight.mul_(0.05)
    return model


@pytest.fixture
def model():
    return calm_model(**tiny.SMALL)


@pytest.fixture
def with_middle():
    return calm_model()


def distilled(model, *, positive=None, negative=None, latent=None, **widgets):
    """(LoRA, picture, report) of the node, called as the executor calls a node that takes lists."""
    inputs = {name: [value] for name, value in (WIDGETS | widgets).items()}
    if latent is None:
        latent = [tiny.latent(4, seed=1)]
    output = Distill.execute([model], positive or [tiny.cond(1)], negative or [tiny.cond(2)], latent=latent, **inputs)
    return output.result


def state_of(model):
    """Everything about a MODEL that a training could have changed; of the weights, with its patches and without."""
    network = model.model
    picture = comfy.sample.sample(
        model, tiny.latent(seed=9)["samples"], 2, 2.0, "euler", "simple", tiny.cond(1), tiny.cond(2),
        tiny.latent()["samples"], disable_pbar=True, seed=0,
    )  # fmt: skip
    patched = {f"patched {name}": tensor.clone() for name, tensor in network.state_dict().items()}
    model.detach()
    return SimpleNamespace(
        weights=patched | {name: tensor.clone() for name, tensor in network.state_dict().items()},
        trainable={name: p.requires_grad for name, p in network.named_parameters()},
        hooks=sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in network.modules()),
        forwards=[name for name, m in network.named_modules() if "forward" in vars(m)],
        casts=[name for name, m in network.named_modules() if getattr(m, "comfy_cast_weights", False)],
        cast_type=network.manual_cast_dtype,
        patches={key: list(value) for key, value in model.patches.items()},
        uuid=model.patches_uuid,
        options=model.model_options,
        picture=picture,
    )


def assert_same_state(after, before):
    assert after.weights.keys() == before.weights.keys()
    for name, weight in before.weights.items():
        assert torch.equal(after.weights[name], weight), name
    assert torch.equal(after.picture, before.picture)
    for part in ("trainable", "hooks", "forwards", "casts", "cast_type", "uuid", "options"):
        assert getattr(after, part) == getattr(before, part), part
    assert {k: [id(p) for p in v] for k, v in after.patches.items()} == {
        k: [id(p) for p in v] for k, v in before.patches.items()
    }


def assert_same_lora(actual, expected):
    assert actual.keys() == expected.keys()
    for key in expected:
        assert torch.equal(actual[key], expected[key]), key


# ---- Table 1 of the paper


SD15 = {
    "image_size": 32, "in_channels": 4, "out_channels": 4, "model_channels": 320, "num_res_blocks": [2, 2, 2, 2],
    "channel_mult": [1, 2, 4, 4], "transformer_depth": [1, 1, 1, 1, 1, 1, 0, 0],
    "transformer_depth_output": [1, 1, 1, 1, 1, 1, 1, 1, 1, 0, 0, 0], "transformer_depth_middle": 1,
    "context_dim": 768, "num_heads": 8, "use_linear_in_transformer": False, "use_spatial_transformer": True,
    "use_temporal_attention": False, "adm_in_channels": None,
}  # fmt: skip
SDXL = SD15 | {
    "num_res_blocks": [2, 2, 2], "channel_mult": [1, 2, 4], "transformer_depth": [0, 0, 2, 2, 10, 10],
    "transformer_depth_output": [0, 0, 0, 2, 2, 2, 10, 10, 10], "transformer_depth_middle": 10, "context_dim": 2048,
    "num_heads": -1, "num_head_channels": 64, "use_linear_in_transformer": True, "adm_in_channels": 2816,
    "num_classes": "sequential",
}  # fmt: skip
SSD1B = SDXL | {
    "transformer_depth": [0, 0, 2, 2, 4, 4], "transformer_depth_output": [0, 0, 0, 1, 1, 2, 10, 4, 4],
    "transformer_depth_middle": -1,
}  # fmt: skip


def file_size(tensors):
    """Bytes of a safetensors file: 8, a JSON header padded to a multiple of 8, the data."""
    header, end = {}, 0
    for name, tensor in sorted(tensors.items()):
        size = tensor.numel() * tensor.element_size()
        kind = {torch.float16: "F16", torch.float32: "F32"}[tensor.dtype]
        header[name] = {"dtype": kind, "shape": list(tensor.shape), "data_offsets": [end, end + size]}
        end += size
    length = len(json.dumps(header, separators=(",", ":")))
    return 8 + -(-length // 8) * 8 + end


@pytest.mark.parametrize(
    ("config", "kind", "modules", "parameters", "megabytes"),
    [
        (SD15, "SD15", 278, 67_252_224, 134.6),
        (SSD1B, "SSD1B", 423, 104_902_656, 210.0),
        (SDXL, "SDXL", 788, 196_751_360, 393.9),
    ],
    ids=["SD1.5", "SSD-1B", "SDXL"],
)
def test_table_1_at_rank_64(config, kind, modules, parameters, megabytes):
    found = comfy.model_detection.model_config_from_unet_config(dict(config))
    assert type(found).__name__ == kind
    with torch.device("meta"):
        network = found.get_model({}, "", device="meta").diffusion_model
    adapters = LoraAdapters(network, 64, generator=torch.Generator())
    assert len(adapters.names) == modules
    assert sum(p.numel() for p in adapters.parameters()) == parameters

    published = comfy.utils.unet_to_diffusers(found.unet_config)
    spelling = {ldm.removesuffix(".weight"): name.removesuffix(".weight") for name, ldm in published.items()}
    assert set(adapters.names) <= spelling.keys()
    names = [f"lora_unet_{spelling[name].replace('.', '_')}" for name in adapters.names]
    tensors = {}
    for name, branch in zip(names, adapters.branches, strict=True):
        tensors |= {
            f"{name}.lora_down.weight": branch.down.half(),
            f"{name}.lora_up.weight": branch.up.half(),
            f"{name}.alpha": torch.zeros((), dtype=torch.float16),
        }
    assert len(tensors) == 3 * modules
    assert file_size(tensors) / 1e6 == pytest.approx(megabytes, abs=0.05)


def test_the_size_of_a_file_is_what_safetensors_writes(tmp_path):
    tensors = {name: tensor.half() for name, tensor in tiny.lora(tiny.tiny_model()).items()}
    safetensors.torch.save_file(tensors, tmp_path / "lora.safetensors")
    assert file_size(tensors) == (tmp_path / "lora.safetensors").stat().st_size


# ---- what it learns


def held_out_loss(teacher, student):
    """The distillation loss of `student` against `teacher`, two MODELs, on draws that no training has seen."""
    fp32 = torch.float32
    with torch.inference_mode(False), torch.no_grad(), lent(teacher, fp32) as one, lent(student, fp32) as other:
        latents = [one.model.process_latent_in(part.clone()) for part in tiny.latent(4, seed=1)["samples"].split(1)]
        cond, uncond = (encoded(one, prompt, latents[0], "positive")[0] for prompt in (STRONG, tiny.cond(2)))
        items = [Item(latent, cond, uncond) for latent in latents]
        batch = Batches(items, seed=0, per_step=4, device=CPU).batch(range(4))
        denoise, guided = Denoiser(other), Denoiser(one)
        switch = SimpleNamespace(teacher=False)

        @contextmanager
        def disabled():
            switch.teacher = True
            yield
            switch.teacher = False

        switch.disabled = disabled
        draws = [draw(77, step, range(4), batch.z0, [999], (3.0, 3.0)) for step in range(2)]
        losses = [
            distillation_loss(
                lambda *call: guided(*call) if switch.teacher else denoise(*call),
                switch, batch, one_draw, stride=1000, table=one.model.model_sampling.sigmas.clone(),
            )
            for one_draw in draws
        ]  # fmt: skip
        return float(sum(losses))


STRONG = [[4 * tiny.cond(1)[0][0], {}]]


@pytest.mark.parametrize("kind", [ModelType.EPS, ModelType.V_PREDICTION], ids=["epsilon", "v"])
def test_the_lora_lowers_the_loss_after_loading_by_core(kind, monkeypatch):
    # One solver step from noise to data, the most that a few training steps can show; chains of them are learnt in
    # tests/distillation, where the solution is known.
    monkeypatch.setattr(distilling, "Settings", partial(Settings, warmup=1))
    model, other = calm_model(kind), calm_model(kind)
    lora, _, report = distilled(
        model, positive=[STRONG], steps=16, batch=4, rank=4, learning_rate=6e-3, skip=1000, guidance_min=3.0
    )
    with_lora, _ = comfy.sd.load_lora_for_models(other, None, dict(lora), 1.0, 0)
    assert len(with_lora.patches) == sum(key.endswith(".alpha") for key in lora) > 30
    assert held_out_loss(model, with_lora) < 0.85 * held_out_loss(model, other)
    assert "16 steps of 4 images from 4 pictures" in report


def test_a_flow_model_learns_too(monkeypatch):
    monkeypatch.setattr(distilling, "Settings", partial(Settings, warmup=1))
    model = calm_model(ModelType.FLOW, sampling_settings={"shift": 3.0})
    _, _, report = distilled(
        model, positive=[STRONG], steps=16, batch=4, rank=4, learning_rate=6e-3, skip=1000, guidance_min=3.0
    )
    first, last = map(float, re.search(r"Loss (\S+) in the first tenth, (\S+) in the last", report).groups())
    assert last < 0.85 * first


def test_the_lora_is_one_that_merging_reads_and_names_as_published(model):
    lora, picture, _ = distilled(model, steps=1, rank=3, alpha=1.5)
    read = Lora.from_state_dict(lora, metadata=lora.metadata)
    assert {layer.rank for layer in read.modules.values()} == {3}
    assert {layer.alpha for layer in read.modules.values()} == {1.5}
    expected = {f"lora_unet_{diffusers.replace('.', '_')}" for diffusers, _, _ in tiny.modules(model)}
    assert {key.split(".")[0] for key in lora} == expected
    assert json.loads(lora.metadata["lcm_kit.distillation"])["settings"]["skip"] == 200
    assert picture.shape[0] == 1
    assert picture.shape[3] == 3
    assert 0 <= picture.min() < picture.max() <= 1


def test_weighting_average_and_trained_timesteps_reach_the_training():
    """Left out, as by older workflows, they are what was trained before there were such inputs."""
    given = {"original_steps": 50, "weighting": "v", "average": 0.95}
    model = calm_model()
    loras = [distilled(model, steps=2, **more)[0] for more in ({}, {"original_steps": 0, "weighting": "x0"}, given)]
    settings = [json.loads(lora.metadata["lcm_kit.distillation"])["settings"] for lora in loras]
    assert settings[0] == settings[1]
    assert settings[2] == settings[0] | given | {"average_target": True}
    plain, same, other = ({key: tensor for key, tensor in lora.items() if "lora_up" in key} for lora in loras)
    assert all(torch.equal(plain[key], same[key]) for key in plain)
    assert not any(torch.equal(plain[key], other[key]) for key in plain)


def test_checkpointing_changes_nothing_but_memory(model):
    plain, checkpointed = (distilled(model, steps=2, gradient_checkpointing=on)[0] for on in (False, True))
    for key in plain:
        torch.testing.assert_close(checkpointed[key], plain[key])


def test_bf16_learns_nearly_the_same(model):
    exact, coarse = (distilled(model, steps=2, dtype=dtype)[0] for dtype in ("fp32", "bf16"))
    ups = [key for key in exact if "lora_up" in key]
    one, other = (torch.cat([lora[key].flatten() for key in ups]) for lora in (exact, coarse))
    # Adam's first steps are the gradients' signs, of which bf16 turns the smallest.
    assert torch.nn.functional.cosine_similarity(one, other, dim=0) > 0.8


def test_the_nodes_defaults_are_those_of_settings_and_command():
    known = {owner: {one.name: one.default for one in fields(owner) if one.metadata} for owner in (Settings, Setup)}
    node = {entry.id: entry.default for entry in Distill.GET_SCHEMA().inputs if hasattr(entry, "default")}
    for owner, defaults in known.items():
        assert {name: node[name] for name in defaults if name in node} == {
            name: value for name, value in defaults.items() if name in node
        }, owner
    # What the node does not ask for.
    absent = {"warmup", "decay", "weight_decay", "betas", "clip", "huber_c", "average_target", "decay_shape"}
    absent |= {"buckets", "random_crop", "flip", "repeats", "size_labels"}  # it is given latents
    assert {*known[Settings], *known[Setup]} - node.keys() == absent


# ---- what it leaves alone


class Boom(Exception):
    pass


def test_the_model_is_as_before_after_training(model):
    model, _ = comfy.sd.load_lora_for_models(model, None, tiny.lora(model), 0.5, 0)
    before = state_of(model)
    distilled(model, steps=2, dtype="bf16", gradient_checkpointing=True)
    assert_same_state(state_of(model), before)


@pytest.mark.parametrize(("dtype", "interrupt"), [("bf16", False), ("fp32", True)])
def test_the_model_is_as_before_after_an_error_or_an_interrupt_within_a_step(model, dtype, interrupt, monkeypatch):
    model, _ = comfy.sd.load_lora_for_models(model, None, tiny.lora(model), 0.5, 0)
    before = state_of(model)
    calls = []
    apply_model = comfy.model_base.BaseModel.apply_model

    def fail(self, *args, **kwargs):
        calls.append(torch.is_grad_enabled())
        if len(calls) == 6:  # the second step's student
            if not interrupt:
                raise Boom
            comfy.model_management.interrupt_current_processing()
        return apply_model(self, *args, **kwargs)

    monkeypatch.setattr(comfy.model_base.BaseModel, "apply_model", fail)
    expected = comfy.model_management.InterruptProcessingException if interrupt else Boom
    with pytest.raises(expected):
        distilled(model, dtype=dtype, gradient_checkpointing=True)
    assert calls == [False, False, True] * 2
    monkeypatch.undo()
    assert_same_state(state_of(model), before)


@pytest.mark.parametrize(
    ("dtype", "checkpointing", "patched"), [("fp32", True, False), ("bf16", True, True), ("bf16", False, True)]
)
def test_there_is_no_second_copy_of_the_network(dtype, checkpointing, patched, monkeypatch):
    """Not while the MODEL is made ready for training, not among what autograd keeps, not between two steps."""
    peaks, picture = [], Strip.picture
    monkeypatch.setattr(Strip, "picture", lambda *call: peaks.append(memory.peak) or picture(*call))
    with LiveMemory() as memory:
        model = calm_model(model_channels=64)
        network = sum(weight.numel() * weight.element_size() for weight in model.model.parameters())
        if patched:
            model, _ = comfy.sd.load_lora_for_models(model, None, tiny.lora(model), 0.5, 0)
        # ComfyUI keeps patched weights without their patches, too, as it does to sample.
        comfy.model_management.load_models_gpu([model], force_full_load=True)
        memory.peak = before = memory.now
        lora, _, _ = distilled(
            model, latent=[tiny.latent(1)], steps=2, batch=1, rank=1, dtype=dtype, gradient_checkpointing=checkpointing
        )
    factors = sum(tensor.numel() * tensor.element_size() for tensor in lora.values())
    # Gradients and Adam's two means are as large as the factors. The rest, for one picture of 8 x 8, is activations.
    extra = peaks[0] - before - 4 * factors
    assert extra < 0.2 * network


# ---- a MODEL with a LoRA on it


def test_a_patched_model_is_distilled_as_if_the_patch_were_its_weights(with_middle):
    model = with_middle
    patched, _ = comfy.sd.load_lora_for_models(model, None, tiny.lora(model), 0.5, 0)
    baked = calm_model()
    for key, weight in tiny.patched_weights(patched).items():
        comfy.utils.set_attr_param(baked.model, key, weight)
    expected, plain = distilled(baked, steps=3)[0], distilled(model, steps=3)[0]
    actual = distilled(patched, steps=3)[0]
    for key in expected:
        torch.testing.assert_close(actual[key], expected[key], msg=key)
    assert any(not torch.equal(actual[key], plain[key]) for key in plain)


# ---- interrupted and resumed


def test_a_run_stopped_in_the_node_goes_on_to_the_same_lora(model, comfy_home, monkeypatch):
    monkeypatch.setattr(teacher_pictures, "STEPS", 3)
    positive = [tiny.cond(1)]
    expected, _, _ = distilled(model, positive=positive, latent=[])
    hook, seen = comfy.utils.PROGRESS_BAR_HOOK, []
    folder = comfy_home / "output" / "LCMKit" / "distilling"
    before = {file.name for file in folder.glob("*")} - {"pictures"}  # of other tests' trainings

    def stop(done, total, preview, **others):
        seen.append((done, total))
        if (done, total) == (2, 4):
            comfy.model_management.interrupt_current_processing()

    comfy.utils.set_progress_bar_global_hook(stop)
    try:
        with pytest.raises(comfy.model_management.InterruptProcessingException):
            distilled(model, positive=positive, latent=[], resume="stopped")
    finally:
        comfy.utils.set_progress_bar_global_hook(hook)
    assert (3, 4) not in seen
    there = {file.name for file in folder.iterdir()} - before
    assert there == {"pictures", "stopped.csv", "stopped.safetensors"}
    so_far = comfy_home / "models" / "loras" / "LCMKit" / "stopped.safetensors"
    assert '"steps": 2' in load(so_far).metadata["lcm_kit.distillation"]
    monkeypatch.setattr(teacher_pictures, "_make", None)  # the pictures come from their files
    actual, _, report = distilled(model, positive=positive, latent=[], resume="stopped")
    assert_same_lora(actual, expected)
    assert "Checkpoint: LCMKit/distilling/stopped.safetensors in the output folder (" in report
    assert "LoRA so far: LCMKit/stopped.safetensors in the loras folder" in report
    assert "Pictures: 2 that models made, in LCMKit/distilling/pictures (" in report
    assert '"steps": 4' in load(so_far).metadata["lcm_kit.distillation"]
    with pytest.raises(ValueError, match=r"stopped.safetensors is the checkpoint of another training \(learning_rate"):
        distilled(model, positive=positive, latent=[], resume="stopped", learning_rate=0.5)
    monkeypatch.undo()
    with pytest.raises(ValueError, match=r"stopped.safetensors is the checkpoint of another training \(data"):
        distilled(model, positive=[tiny.cond(8)], latent=[], resume="stopped")


def test_pictures_from_before_a_stop_are_not_made_again(model, comfy_home, monkeypatch):
    monkeypatch.setattr(teacher_pictures, "STEPS", 3)
    inputs = {"positive": [[[tiny.cond(1)[0][0] + 0.01, {}]]], "latent": [], "samples": 4, "batch": 1, "steps": 1}
    whole = distilled(model, **inputs)[0]
    counted, seen = tiny.count_calls(model)
    hook = comfy.utils.PROGRESS_BAR_HOOK

    def stop(done, total, preview, **others):
        if (done, total) == (3, 4):  # of the pictures
            comfy.model_management.interrupt_current_processing()

    comfy.utils.set_progress_bar_global_hook(stop)
    try:
        with pytest.raises(comfy.model_management.InterruptProcessingException):
            distilled(counted, **inputs, resume="some made")
    finally:
        comfy.utils.set_progress_bar_global_hook(hook)
    assert len(seen.conds) in (9, 10)  # three pictures, and what the stop lets through
    assert not (comfy_home / "output" / "LCMKit" / "distilling" / "some made.safetensors").exists()
    before = len(seen.conds)
    actual = distilled(counted, **inputs, resume="some made")[0]
    assert_same_lora(actual, whole)
    assert len(seen.conds) - before == 3 + 3  # the fourth picture, and a step's teacher, target and student


def test_the_name_of_a_run_is_made_of_model_and_inputs(model, comfy_home):
    def names(**changed):
        report = distilled(model, steps=1, resume="auto", **changed)[2]
        return re.search(r"LCMKit/distilling/(auto-\S+)\.safetensors", report)[1]

    first = names()
    assert re.fullmatch(r"auto-TinyConfig-[0-9a-f]{8}", first)
    assert names(positive=[[[tiny.cond(1)[0][0].clone(), {}]]]) == first  # equal, and not the same
    assert names(latent=[tiny.latent(4, seed=2)]) != first
    assert names(learning_rate=1e-4) != first
    assert json.loads(load(comfy_home / "models" / "loras" / "LCMKit" / f"{first}.safetensors").metadata[
        "lcm_kit.distillation"
    ])["steps"] == 1  # fmt: skip


def test_a_divergence_under_a_made_name_says_how_to_go_on(with_middle, comfy_home):
    """The rate rises over the first steps, of which the earliest are sound."""
    model = with_middle
    wild = {"steps": 40, "learning_rate": 1.0, "save_every": 5, "resume": "auto"}
    with pytest.raises(
        Diverged, match=r"Lower learning_rate.*For that, write (auto-TinyConfig-\w+) into resume"
    ) as told:
        distilled(model, **wild)
    name = re.search(r"auto-TinyConfig-\w+", str(told.value))[0]
    report = distilled(model, steps=told.value.kept + 2, learning_rate=1e-4, resume=name)[2]
    assert f"{told.value.kept + 2} steps of 2 images" in report


def test_samples_and_validation_losses_come_every_so_many_steps(model, comfy_home):
    plain = distilled(model)[0]
    lora, picture, report = distilled(
        model, save_every=2, resume="watched", validation=tiny.cond(5) + tiny.cond(6) + tiny.cond(7)
    )
    assert_same_lora(lora, plain)
    assert re.search(r"Validation loss, .*: \S+ at step 0, \S+ at the end; lowest \S+ at step [024]\.", report)
    rows = read_table(comfy_home / "output" / "LCMKit" / "distilling" / "watched.csv")
    assert [(row["step"], "validation_loss" in row) for row in rows] == [
        (0, True), (1, False), (2, True), (3, False), (4, True)
    ]  # fmt: skip
    assert all(row["learning_rate"] == pytest.approx(3e-3 * row["step"] / 20) for row in rows[1:])
    assert picture.shape[1] == 256  # this format has no colours: the curve alone


@pytest.mark.parametrize(
    "name",
    [
        "../x",
        "a/b",
        ".hidden",
        "a\\b",
        "a:b",
        "CON",
        "con.x",
        "COM1",
        "x.",
        "é" * 130,
        "a\nb",
    ],
)
def test_a_resume_name_that_leads_elsewhere_is_refused(model, name):
    with pytest.raises(ValueError, match=r"resume is .*write a plain name"):
        distilled(model, resume=name)


# ---- data


def test_without_pictures_the_model_makes_them_once(model, monkeypatch):
    monkeypatch.setattr(teacher_pictures, "STEPS", 3)
    positive = [tiny.cond(1), tiny.cond(3)]
    counted, seen = tiny.count_calls(model)
    teacher_pictures._memory.clear()
    distilled(counted, positive=positive, latent=[], samples=4, steps=1)
    first = seen.calls
    distilled(counted, positive=positive, latent=[tiny.latent()], samples=4, steps=1, learning_rate=1e-3)
    made = [tensors["latent"] for tensors in teacher_pictures._memory._memory.values()]
    assert len(made) == 4
    assert made[0].shape == (1, 4, 8, 8)
    assert not torch.equal(made[0], made[2])  # same prompt, other noise
    # 3 steps for two batches of both prompts, cond and uncond, less: only the training step and the strip are left.
    assert seen.calls - first == first - 3 * 2 * 2


def sampled(model, prompts, batch):
    settings = Settings(batch=batch, seed=5, guidance_min=2.0, guidance_max=2.0)
    return torch.cat(teacher_pictures.teachers_pictures(model, prompts, tiny.latent()["samples"], settings, Kept()))


def test_pictures_of_different_prompts_are_made_in_one_batch_as_they_are_alone(model, monkeypatch):
    monkeypatch.setattr(teacher_pictures, "STEPS", 3)
    negative, entries = tiny.cond(2)[0], [tiny.cond(n)[0] for n in (1, 3, 4)]
    prompts = [(entries[number % 3], negative) for number in range(5)]
    apart = sampled(model, prompts, 1)
    counted, seen = tiny.count_calls(model)
    together = sampled(counted, prompts, 5)
    assert seen.conds == [[0, 1]] * 3
    # Sums in another order, at a noise of 14 spreads.
    torch.testing.assert_close(together, apart, atol=1e-3, rtol=1e-4)


def test_prompts_of_other_length_or_kind_are_not_joined(model):
    long = [torch.cat([tiny.cond(1)[0][0]] * 2, 1), {}]
    odd = [tiny.cond(1)[0][0], {"odd": object()}]
    plain, other = tiny.cond(1)[0], tiny.cond(3)[0]
    negative = tiny.cond(2)[0]
    prompts = [(one, negative) for one in (plain, long, odd, other, long, plain)]
    assert chunks(model, prompts, tiny.latent()["samples"], 4) == [[0, 3, 5], [1, 4], [2]]
    assert chunks(model, prompts, tiny.latent()["samples"], 2) == [[0, 3], [1, 4], [2], [5]]


def test_prompts_that_a_model_counts_together_are_not_joined(model, monkeypatch):
    """As Lumina 2 counts the words of all rows."""
    extra = comfy.model_base.BaseModel.extra_conds

    def counting(self, **kwargs):
        words = comfy.conds.CONDConstant(kwargs["cross_attn"].shape[0])
        return extra(self, **kwargs) | {"num_tokens": words}

    monkeypatch.setattr(comfy.model_base.BaseModel, "extra_conds", counting)
    prompts = [(tiny.cond(n)[0], tiny.cond(2)[0]) for n in (1, 3)]
    prompts += prompts
    assert chunks(model, prompts, tiny.latent()["samples"], 4) == [[0, 2], [1, 3]]


def test_what_a_model_is_does_not_hang_on_being_loaded(with_middle):
    model = with_middle
    patched, _ = comfy.sd.load_lora_for_models(model, None, tiny.lora(model), 0.5, 0)
    again, _ = comfy.sd.load_lora_for_models(calm_model(), None, tiny.lora(model), 0.5, 0)
    weaker, _ = comfy.sd.load_lora_for_models(model, None, tiny.lora(model), 0.25, 0)
    known = identity_of(patched)
    assert identity_of(again) == known
    assert len({known, identity_of(model), identity_of(weaker)}) == 3
    comfy.model_management.load_models_gpu([patched], force_full_load=True)
    assert identity_of(patched) == known


def test_what_a_model_is_tells_patches_of_its_attention_apart(model):
    def with_patch(strength):
        changed = model.clone()
        changed.set_model_attn1_output_patch(lambda out, options: out * strength)
        return identity_of(changed)

    assert with_patch(0.5) == with_patch(0.5)
    assert len({with_patch(0.5), with_patch(0.25), identity_of(model)}) == 3


def captured(model):
    """A clone of the MODEL that keeps what apply_model is given."""
    model, calls = model.clone(), []

    def wrapper(apply_model, args):
        calls.append(args)
        return apply_model(args["input"], args["timestep"], **args["c"])

    model.set_model_unet_function_wrapper(wrapper)
    return model, calls


def test_every_picture_keeps_its_own_prompt_and_size(model):
    watched, calls = captured(model)
    prompts = [tiny.cond(n)[0] for n in (11, 12, 13)]
    latents = [tiny.latent(seed=1), tiny.latent(height=16, seed=2), tiny.latent(seed=3)]
    rows = {float(one["samples"].flatten()[0]) * 0.5: prompt[0] for one, prompt in zip(latents, prompts, strict=True)}
    distilled(watched, positive=[prompts], latent=latents, steps=16)
    sizes = {tuple(call["input"].shape[2:]) for call in calls}
    assert sizes == {(8, 8), (16, 8)}
    prompts_at = {
        (tuple(call["input"].shape[2:]), row.flatten()[0].item())
        for call in calls if call["cond_or_uncond"] == [0] for row in call["c"]["c_crossattn"]
    }  # fmt: skip
    first = [prompt[0].flatten()[0].item() for prompt in prompts]
    assert prompts_at == {((8, 8), first[0]), ((16, 8), first[1]), ((8, 8), first[2])}
    assert len(rows) == 3


def test_teacher_rows_are_cond_then_uncond_and_patches_are_told(model):
    watched, calls = captured(model)
    distilled(watched, steps=1)
    teacher, target, student = calls[:3]
    assert teacher["cond_or_uncond"] == [0, 1] == teacher["c"]["transformer_options"]["cond_or_uncond"]
    assert target["cond_or_uncond"] == student["cond_or_uncond"] == [0]
    context = teacher["c"]["c_crossattn"]
    assert torch.equal(context[:2], tiny.cond(1)[0][0].expand(2, -1, -1))
    assert torch.equal(context[2:], tiny.cond(2)[0][0].expand(2, -1, -1))
    assert torch.equal(teacher["input"][:2], teacher["input"][2:])
    assert torch.equal(student["input"], teacher["input"][:2])


def test_dropped_captions_are_learnt_with_the_negative_prompt(model):
    latents = torch.zeros(1, 4, 8, 8)
    with torch.inference_mode(False), lent(model, torch.float32) as patcher:
        cond, uncond = (encoded(patcher, tiny.cond(n), latents, "positive")[0] for n in (1, 2))
        items = [Item(latents, cond, uncond)] * 4
        plain, half = (Batches(items, seed=3, per_step=4, device=CPU, dropout=rate) for rate in (0.0, 0.5))
        drops = [[half.drops(step, number) for number in range(4)] for step in range(100)]
        rows = half(7, range(4)).cond.values["c_crossattn"]
        for row, dropped in zip(rows, drops[7], strict=True):
            assert torch.equal(row[None], (uncond if dropped else cond)["c_crossattn"].cond)
        assert torch.equal(plain(7, range(4)).cond.values["c_crossattn"][0], cond["c_crossattn"].cond[0])
        # 400 draws: an error of 0.025.
        assert sum(map(sum, drops)) / 400 == pytest.approx(0.5, abs=0.1)
        assert half.chosen(7, range(4)) == plain.chosen(7, range(4))
        # Core repeats the shorter one up to four times.
        long = encoded(patcher, [[torch.cat([tiny.cond(1)[0][0]] * 5, 1), {}]], latents, "positive")[0]
        with pytest.raises(ValueError, match=r"caption_dropout is 0\.5, but a positive prompt is of another length"):
            Batches([Item(latents, long, uncond)], seed=3, per_step=1, device=CPU, dropout=0.5)


def test_sdxl_gets_its_pooled_text_and_its_sizes():
    config = tiny.TinyConfig(tiny.TWO_LEVELS)
    config.unet_config = tiny.TWO_LEVELS | {"adm_in_channels": 2816, "num_classes": "sequential"}
    config.sampling_settings = {}
    base = comfy.model_base.SDXL(config, device=CPU)
    tiny.fill(base.diffusion_model, 0)
    watched, calls = captured(comfy.model_patcher.ModelPatcher(base, load_device=CPU, offload_device=CPU))
    pooled = [torch.full((1, 1280), float(n)) for n in (1, 2)]
    prompts = [
        [tiny.cond(n)[0][0], {"pooled_output": pooled[n], "width": 100 + n, "height": 200, "target_width": 300}]
        for n in (0, 1)
    ]
    nothing = [[tiny.cond(2)[0][0], {"pooled_output": torch.zeros(1, 1280)}]]  # as from ConditioningZeroOut
    distilled(watched, positive=[[p] for p in prompts], negative=[nothing], latent=[tiny.latent(2, seed=1)], steps=1)
    teacher = next(call for call in calls if call["cond_or_uncond"] == [0, 1])
    y = teacher["c"]["y"]
    assert y.shape == (4, 2816)
    order = [int(row[0]) - 1 for row in y[:2]]
    assert sorted(order) == [0, 1]
    for row, n in zip(y[:2], order, strict=True):
        expected = base.encode_adm(
            pooled_output=pooled[n], width=100 + n, height=200, target_width=300, device=CPU, noise=None
        )
        torch.testing.assert_close(row[None], expected)
    assert not y[2:, :1280].any()


def test_a_text_with_many_labels_is_in_memory_once(model):
    text = tiny.cond(1)[0][0]
    with torch.inference_mode(False), lent(model, torch.float32) as patcher:
        known = {}
        entries = [[[text, {"width": width}]] for width in (100, 200)] + [tiny.cond(2)]
        one, same, other = (
            encoded(patcher, entry, torch.zeros(1, 4, 8, 8), "positive", known)[0]["c_crossattn"].cond
            for entry in entries
        )
    assert one is same
    assert one is not other
    assert one.data_ptr() != text.data_ptr()


def test_tensors_of_conditionings_are_copies():
    value = torch.ones(1, 2)
    assert moved(comfy.conds.CONDRegular(value), "cpu").cond.data_ptr() != value.data_ptr()


@pytest.mark.parametrize(
    ("options", "words"),
    [({"control": object()}, "a ControlNet"), ({"strength": 0.5}, "a strength other than 1"), ({"area": (1, 1, 0, 0)}, "an area")],
)  # fmt: skip
def test_a_conditioning_that_training_cannot_mean_is_refused(model, options, words):
    with pytest.raises(ValueError, match=f"positive, entry 2 of 2, has {words}"):
        distilled(model, positive=[tiny.cond(1), [[tiny.cond(1)[0][0], options]]])


def test_prompts_and_pictures_have_to_match(model):
    with pytest.raises(ValueError, match="positive has 2 prompts, but there are 4 pictures"):
        distilled(model, positive=[tiny.cond(1), tiny.cond(3)])


def test_the_lcm_patch_of_core_is_refused(model):
    from comfy_extras.nodes_model_advanced import ModelSamplingDiscrete

    (patched,) = ModelSamplingDiscrete().patch(model, "lcm", False)
    with pytest.raises(ValueError, match="Remove that node for distilling"):
        distilled(patched)


def test_few_pictures_and_another_familys_guidance_are_told(model):
    def said(*training):
        return [words for remark in advice_for(*training) for words in remark_words(remark)]

    few = Settings(steps=100, batch=4)
    assert advice_for(model, few, 64, False) == []
    assert advice_for(model, few, 300, True) == advice_for(model, few, 41, True) == []
    assert advice_for(model, few, 40, True) == [FewPictures(made=40, times=10)]
    assert said(model, few, 40, True)[0].startswith(
        "Few pictures: the model made 40, and each is learnt about 10 times"
    )
    flow = calm_model(ModelType.FLOW, sampling_settings={"shift": 3.0})
    (words,) = said(flow, Settings(), 64, False)
    assert words.startswith(
        "Guidance 8.5 is Stable Diffusion 1.5's, and this model is another (TinyConfig). Set guidance_min"
    )
    assert advice_for(flow, Settings(guidance_min=5.0, guidance_max=5.0), 64, False) == []
    type(flow.model.model_config).__name__, before = "WAN21_T2V", type(flow.model.model_config).__name__
    try:
        assert "(WAN21_T2V); templates have 3.5 to 6 for WAN." in said(flow, Settings(), 64, False)[0]
    finally:
        type(flow.model.model_config).__name__ = before


# ---- resuming: another model


def test_any_patch_makes_another_model_for_a_run_to_be_resumed(with_middle):
    """Also one on a bias, a norm, or the last rows of a layer that the LoRA does not touch."""
    model = with_middle

    def identity(patches):
        patched = model.clone()
        patched.add_patches({f"diffusion_model.{key}": ("diff", (value,)) for key, value in patches.items()})
        with torch.inference_mode(False), lent(patched, torch.float32) as patcher:
            return _fingerprint_of_weights(patcher.model.diffusion_model)

    state = model.model.diffusion_model.state_dict()
    plain = identity({})
    assert identity({}) == plain
    for key in ("time_embed.0.bias", "out.0.weight", "input_blocks.0.0.weight", "middle_block.1.proj_in.weight"):
        assert identity({key: 0.01 * torch.ones_like(state[key])}) != plain
    half = torch.zeros_like(state["middle_block.1.proj_in.weight"])
    half[len(half) // 2 :] = 0.01
    assert identity({"middle_block.1.proj_in.weight": half}) != plain


def test_the_strip_is_ready_before_pictures_are_made(model, monkeypatch):
    """What cannot be shown is known before a long work that would be lost."""

    class NoPreviewer:
        def __init__(self, *given):
            raise Boom

    monkeypatch.setattr(strip.latent_preview, "Latent2RGBPreviewer", NoPreviewer)
    monkeypatch.setattr(tiny.TinyLatent, "latent_rgb_factors", [[0.1, 0.2, 0.3]] * 4, raising=False)
    model = calm_model()
    monkeypatch.setattr(teacher_pictures, "_make", None)
    with pytest.raises(Boom):
        distilled(model, latent=[])


def test_the_picture_has_the_samples_from_before_on_the_way_and_the_end(monkeypatch, comfy_home):
    """Under the curve a row of what is learnt from, and rows of samples; the same in a run that was stopped between."""
    monkeypatch.setattr(tiny.TinyLatent, "latent_rgb_factors", [[0.1, 0.2, 0.3]] * 4, raising=False)
    model = calm_model()
    row_height = LABEL + WIDTH // 4
    whole = distilled(model, save_every=2)[1][0]
    assert whole.shape == (HEIGHT + 4 * row_height, WIDTH, 3)
    rows = [whole[HEIGHT + n * row_height + LABEL :][: WIDTH // 4] for n in range(4)]
    before, middle, end = rows[1:]
    assert not torch.equal(before, middle)
    assert not torch.equal(middle, end)
    distilled(model, steps=2, save_every=2, resume="rows")
    later = distilled(model, save_every=2, resume="rows")[1][0]
    assert torch.equal(later[HEIGHT:], whole[HEIGHT:])
    assert torch.equal(later[:HEIGHT], whole[:HEIGHT])  # the validation losses from its table, too


def test_previews_of_every_latent_format_can_be_made():
    formats = [each for each in vars(comfy.latent_formats).values() if isinstance(each, type)]
    made = [strip.rough_previewer(each()) for each in formats if issubclass(each, comfy.latent_formats.LatentFormat)]
    assert len([previewer for previewer in made if previewer is not None]) > 5
