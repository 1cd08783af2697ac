"""Files that hold more than updates, or are spelled like no other: what Load LoRA gives patches what ComfyUI's loader does.

And names: whatever ComfyUI calls a weight, it knows the name that a LoRA is written with.
"""

import comfy.lora
import comfy.lora_convert
import comfy.model_patcher
import pytest
import torch

from lcm_kit.host.lora import patches
from lcm_kit.host.lora.fit import fit
from lcm_kit.host.lora.weights import from_lora
from lcm_kit.lora_merge import Lora
from lcm_kit.lora_merge.naming import names
from lcm_kit.lora_merge.naming.unet import Layout
from lcm_kit.tests.with_comfyui import bases, dits, tiny


def rand(*shape):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(sum(shape)))


def plain(name, out, inputs, rank=2, ends=("lora_up", "lora_down")):
    return {f"{name}.{ends[0]}.weight": rand(out, rank), f"{name}.{ends[1]}.weight": rand(rank, inputs)}


PROJ, QKV = "diffusion_model.double_blocks.0.img_attn.proj", "diffusion_model.double_blocks.0.img_attn.qkv"
PEFT = ("lora_B", "lora_A")
CONTROL = (
    plain("img_in", 16, 8, ends=PEFT)
    | {"img_in.lora_B.bias": rand(16)}
    | plain("double_blocks.0.img_attn.qkv", 48, 16, ends=PEFT)
    | {"double_blocks.0.img_attn.qkv.lora_B.bias": rand(48), "single_blocks.0.norm.key_norm.scale": rand(8)}
)
USO = {
    f"{name}.{end}.weight": tensor
    for name, (out, inputs) in {
        "double_blocks.0.processor.qkv_lora1": (48, 16),
        "double_blocks.0.processor.proj_lora2": (16, 16),
        "double_blocks.18.processor.qkv_lora2": (48, 16),
        "single_blocks.0.processor.qkv_lora": (48, 16),
        "single_blocks.0.processor.proj_lora": (16, 80),
        "single_blocks.37.processor.qkv_lora": (48, 16),
    }.items()
    for end, tensor in (("up", rand(out, 2)), ("down", rand(2, inputs)))
}
WAN = "diffusion_model.blocks.0"
FILES = {
    "control LoRA": ("Flux", CONTROL, 0),
    "USO": ("Flux", USO, 0),
    "alpha of nothing": ("Flux", plain(PROJ, 16, 16) | {f"{QKV}.alpha": torch.tensor(4.0)}, 1),
    "DoRA of nothing": ("Flux", plain(PROJ, 16, 16) | {f"{QKV}.dora_scale": rand(48, 1)}, 1),
    "DoRA beside a difference": ("Flux", {f"{PROJ}.diff": rand(16, 16), f"{PROJ}.dora_scale": rand(16, 1)}, 1),
    "alpha beside a difference": ("Flux", {f"{PROJ}.diff": rand(16, 16), f"{PROJ}.alpha": torch.tensor(2.0)}, 1),
    "bias of PEFT's": ("Flux", plain(PROJ, 16, 16, ends=PEFT) | {f"{PROJ}.lora_B.bias": rand(16)}, 1),
    "scalar": ("Flux", plain(PROJ, 16, 16) | {f"{PROJ}.scalar": torch.tensor(0.5)}, 1),
    "emb_params": ("Flux", plain(PROJ, 16, 16) | {"emb_params": rand(2, 8)}, 1),
    "rank 0": ("Flux", plain(PROJ, 16, 16) | plain(QKV, 48, 16, rank=0), 2),
    "whole LoKr, alpha infinite": ("Flux", {f"{PROJ}.lokr_w1": rand(4, 2), f"{PROJ}.lokr_w2": rand(4, 8), f"{PROJ}.alpha": torch.tensor(float("inf"))}, 1),
    "wider weight": ("Flux", plain("diffusion_model.img_in", 16, 8) | {"diffusion_model.img_in.reshape_weight": torch.tensor([16, 8])}, 0),
    "reshape_weight beside LoHa": ("Flux", {f"{PROJ}.hada_w{n}_{ab}": rand(16, 16) for n in "12" for ab in "ab"} | {f"{PROJ}.reshape_weight": torch.tensor([16, 16])}, 1),
    "ranks of many sizes": ("Flux", plain(PROJ, 16, 16, rank=7) | plain(QKV, 48, 16, rank=1), 0),
    "a weight set to one number": ("Flux", {f"{PROJ}.set_weight": torch.tensor(0.5)}, 0),
    "IA3 beside LoRA": ("Flux", plain(PROJ, 16, 16) | {f"{QKV}.on_input": rand(16), f"{QKV}.weight": rand(16)}, 2),
    "lightx2v": (
        "Wan I2V",
        plain(f"{WAN}.self_attn.q", 24, 24)
        | {f"{WAN}.self_attn.q.diff_b": rand(24), f"{WAN}.norm3.diff": rand(24), f"{WAN}.norm3.diff_b": rand(24)}
        | plain(f"{WAN}.cross_attn.k_img", 24, 24)
        | {f"{WAN}.cross_attn.norm_k_img.diff": rand(24), f"{WAN}.diff_m": rand(1, 6, 24)},
        0,
    ),
}  # fmt: skip


def patched(found, weights):
    """Weight -> its value with the patches; weights are random."""
    result = {}
    for target, patch in found.items():
        weight, part = dits.target_of(target)
        if weight in weights:
            before = result.get(weight, rand(*weights[weight]))
            result[weight] = comfy.lora.calculate_weight([(0.7, patch, 1.0, part, None)], before.clone(), weight)
    return result


@pytest.mark.parametrize("file", FILES)
def test_all_that_comfyui_reads_is_applied_and_the_rest_is_listed(file):
    name, tensors, without_effect = FILES[file]
    if file == "control LoRA" and not any(key.endswith("key_norm.weight") for key in dits.shapes(name)):
        pytest.skip("this ComfyUI has another name for Flux' norms")
    lora = Lora.from_state_dict(tensors, source="x.safetensors")
    assert len(lora.keys.unread) == without_effect
    assert sorted(lora.keys.understood + lora.keys.carried + lora.keys.unread) == sorted(tensors)
    weights, homes = dits.shapes(name), dits.homes(name)
    # ComfyUI has no name for a difference of a modulation but this.
    tensors = {key.replace(".diff_m", ".modulation.diff"): tensor for key, tensor in tensors.items()}
    theirs = patched(comfy.lora.load_lora(comfy.lora_convert.convert_lora(dict(tensors)), homes), weights)
    cpu = torch.device("cpu")
    model = comfy.model_patcher.ModelPatcher(dits.model(name), load_device=cpu, offload_device=cpu)
    raw = comfy.lora_convert.convert_lora(dict(tensors))
    for given in (from_lora(lora), raw, from_lora(Lora.from_state_dict(from_lora(lora)))):
        found = fit(given, model)
        assert found.clashing == found.twice == ()
        (patches,) = found.patches()
        ours = patched(patches, weights)
        if file == "rank 0":  # core adds zeros
            ours = {QKV + ".weight": rand(48, 16)} | ours
        assert ours.keys() == theirs.keys() != set()
        for key, value in ours.items():
            torch.testing.assert_close(value, theirs[key], rtol=0, atol=0, msg=lambda text, key=key: f"{key}: {text}")


def test_apply_lists_what_has_no_effect_and_refuses_nothing_for_it():
    model = tiny.tiny_model()
    extra = {"diffusion_model.blocks.0.diff_m": torch.ones(3), "lora_unet_out_2.alpha": torch.tensor(1.0)}
    lora = tiny.lora(model, seed=1)
    plain_report = patches.apply(model, None, lora, 1.0, 1.0, demand_all=True).report
    report = patches.apply(model, None, dict(lora) | extra, 1.0, 1.0, demand_all=True).report
    listed = (
        "Without effect in ComfyUI: difference that is no weight's or bias's (1 key: diffusion_model.blocks.0.diff_m); "
        "scale of nothing (1 key: lora_unet_out_2.alpha)."
    )
    assert report.splitlines()[0] == plain_report.splitlines()[0]
    assert report.splitlines()[-1] == listed


# ---- names


def kept(homes, has_shape):
    """Names of ComfyUI whose weight is another one, or none, when read and written here."""
    lost = {}
    for spelled, home in homes.items():
        if has_shape(dits.target_of(home)[0]):
            written = names.tidy(
                {names.canonical(names.kohya_name(spelled), Layout()): names.kohya_name(spelled)}
            ).popitem()[1]
            if homes.get(written) != home:
                lost[spelled] = written
    return lost


@pytest.mark.parametrize("name", dits.KNOWN)
def test_every_name_of_a_transformers_weight_survives(name):
    assert kept(dits.homes(name), dits.shapes(name).__contains__) == {}


@pytest.mark.parametrize("base", ["SD1.5", "SD2", "SDXL", "SSD-1B", "KOALA-700M"])
def test_every_name_of_a_unets_weight_survives(base):
    model = bases.model(base).model
    assert kept(comfy.lora.model_lora_keys_unet(model, {}), model.state_dict().__contains__) == {}


def test_names_survive_a_whole_file():
    homes, shapes = dits.homes("HiDream"), dits.shapes("HiDream")
    file = {f"{name}.diff": torch.ones(shapes[home]) for name, home in homes.items() if name.startswith("lora_unet_")}
    written = Lora.from_state_dict(file).to_state_dict()
    assert comfy.lora.load_lora(written, homes).keys() == comfy.lora.load_lora(file, homes).keys()
    assert len(written) == len(file)
    model = bases.model("SD1.5").model
    homes, shapes = comfy.lora.model_lora_keys_unet(model, {}), {k: v.shape for k, v in model.state_dict().items()}
    file = {f"{name}.diff": torch.ones(shapes[home]) for name, home in homes.items() if name.endswith(".bias")}
    written = Lora.from_state_dict(file).to_state_dict()
    assert comfy.lora.load_lora(written, homes).keys() == comfy.lora.load_lora(file, homes).keys() != set()
