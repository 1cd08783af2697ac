"""LoRAs whose names no table knows meet by the weights of a connected MODEL: Merge LoRAs and Compare LoRAs."""

import json

import comfy.model_patcher
import pytest
import torch
from safetensors.torch import save_file

from lcm_kit.host.lora.targets import names_in
from lcm_kit.host.lora.weights import LoraWeights, to_lora
from lcm_kit.lora_merge import Lora, load, merge, merge_with_account, save
from lcm_kit.lora_merge.__main__ import main
from lcm_kit.lora_merge.merging.by_target import ModelNames, Target, by_target
from lcm_kit.lora_merge.merging.provenance import recipe_of
from lcm_kit.lora_merge.metadata.fields import PROVENANCE_KEY
from lcm_kit.lora_merge.naming.family import Rows
from lcm_kit.nodes.comparing import CompareLoRA
from lcm_kit.nodes.merging import MergeLoRA
from lcm_kit.tests.helpers import relative
from lcm_kit.tests.with_comfyui import dits, tiny
from lcm_kit.tests.with_comfyui.test_one_weight_twice import by_core, lora

# Of one module each that is called so in several families, so that names alone do not tell: whole weights, slices, and one
# that diffusers has with its halves the other way about.
PAIRS = [
    ("Qwen-Image", "transformer_blocks.0.attn.to_q", "transformer.transformer_blocks.0.attn.to_q"),
    ("Flux", "lora_unet_double_blocks_0_img_attn_proj", "transformer.transformer_blocks.0.attn.to_out.0"),
    ("Flux", "diffusion_model.double_blocks.0.img_attn.qkv", "transformer.transformer_blocks.0.attn.to_k"),
    ("Flux", "lora_transformer_transformer_blocks_0_attn_to_k", "transformer.transformer_blocks.0.attn.to_k"),
    ("AuraFlow", "lora_unet_modF_1", "transformer.norm_out.linear"),
    ("PixArt", "base_model.model.transformer_blocks.0.attn2.to_q", "transformer.transformer_blocks.0.attn2.to_q"),
]


def patcher(name):
    cpu = torch.device("cpu")
    return comfy.model_patcher.ModelPatcher(dits.model(name), load_device=cpu, offload_device=cpu)


def slots(*loras, strengths=(1.0, 0.8)):
    rest = {f"strength_{n}": 1.0 for n in range(3, 5)} | {f"lora_{n}": None for n in range(3, 5)}
    return rest | {
        key: value
        for n, (one, strength) in enumerate(zip(loras, strengths, strict=True), 1)
        for key, value in ((f"lora_{n}", one), (f"strength_{n}", strength))
    }


def merged(model, *loras):
    return MergeLoRA.execute(method="linear", size="exact", model=model, **slots(*loras)).result


@pytest.mark.parametrize("swap", [False, True])
@pytest.mark.parametrize(("name", "first", "second"), PAIRS)
def test_names_that_tell_nothing_meet_by_the_models_weights(name, first, second, swap):
    if name not in dits.KNOWN:
        pytest.skip(f"this ComfyUI has no {name}")
    pair = (second, first) if swap else (first, second)
    homes, weights = dits.homes(name), dits.shapes(name)
    states = [lora(s, dits.shape_at(name, s), seed) for seed, s in enumerate(pair)]
    result, _ = merged(patcher(name), *states)
    modules = {key.rsplit(".lora_", 1)[0].removesuffix(".alpha") for key in result}
    assert modules <= homes.keys()
    assert len(modules) == 1
    ours, one, two = (by_core(state, homes, weights) for state in (result, *states))
    (weight,) = ours
    wanted = one[weight] + 0.8 * two[weight]
    assert relative(ours[weight], wanted) <= 1e-5
    text = CompareLoRA.execute(rank=0, model=patcher(name), **slots(*states)).result[1]
    assert "1 module shared" in text
    assert "Note" not in text


def test_a_model_changes_nothing_where_names_tell_all():
    model = tiny.tiny_model()
    style, lcm = tiny.lora(model, seed=1), tiny.lora(model, seed=2)
    plain, _ = merged(None, style, lcm)
    with_model, _ = merged(model, style, lcm)
    assert plain.keys() == with_model.keys()
    assert all(torch.equal(plain[key], with_model[key]) for key in plain)


def test_a_model_that_a_lora_is_not_for_is_named():
    style = LoraWeights(lora("transformer.transformer_blocks.0.attn.to_q", (16, 16)), name="style.safetensors")
    with pytest.raises(
        ValueError, match=r"style\.safetensors: none of its 1 module has a place in the connected model"
    ):
        merged(tiny.tiny_model(), style, style)


def test_two_names_of_one_weight_in_one_lora_are_refused_by_the_model():
    names = "transformer.stages.0.win", "diffusion_model.stages.0.w.in"
    both = Lora.from_state_dict(lora(names[0], (6, 5)) | lora(names[1], (6, 5)))
    target = Target("diffusion_model.stages.0.w.in.weight")
    with pytest.raises(ValueError, match="are one weight of the connected model"):
        by_target([both], dict.fromkeys(names, target), {target.weight: (6, 5)})
    one, two = (Lora.from_state_dict(lora(name, (6, 5), seed)) for seed, name in enumerate(names))
    with pytest.raises(ValueError, match="nothing here tells"):
        merge([(one, 1.0), (two, 1.0)])
    met = by_target([one, two], dict.fromkeys(names, target), {target.weight: (6, 5)})
    found = merge([(lora, 1.0) for lora in met])
    torch.testing.assert_close(found.delta(names[1]), one.delta(names[0]) + two.delta(names[1]))
    assert list(found.spellings.values()) == [names[1]]


@pytest.mark.parametrize(("name", "first", "second"), PAIRS)
def test_what_a_model_told_is_in_the_file_which_is_made_again_without_the_model(name, first, second, tmp_path, capsys):
    if name not in dits.KNOWN:
        pytest.skip(f"this ComfyUI has no {name}")
    weights = []
    for seed, spelled in enumerate((first, second)):
        save_file(lora(spelled, dits.shape_at(name, spelled), seed), tmp_path / f"{seed}.safetensors")
        one = load(tmp_path / f"{seed}.safetensors")
        weights.append(LoraWeights(one.to_state_dict(), name=one.source, metadata=one.metadata))
    ours, _ = merged(patcher(name), *weights)
    save(to_lora(ours), tmp_path / "merged.safetensors", dtype=torch.float32)
    assert main(["reproduce", str(tmp_path / "merged.safetensors")]) == 0
    assert "is the same, bit for bit" in capsys.readouterr().out


def test_what_a_model_told_is_kept_for_the_names_that_are_used_and_no_more():
    model = names_in(patcher("Flux"))
    one = Lora.from_state_dict(lora("diffusion_model.double_blocks.0.img_attn.qkv", (48, 16)))
    two = Lora.from_state_dict(lora("transformer.transformer_blocks.0.attn.to_k", (16, 16)))
    _, account = merge_with_account([(one, 1.0), (two, 1.0)], model=model)
    weight = "diffusion_model.double_blocks.0.img_attn.qkv.weight"
    assert account.model.shapes == {weight: (48, 16)}
    again = ModelNames.from_dict(json.loads(json.dumps(account.model.to_dict())))
    assert again.targets == account.model.targets
    assert again.shapes == account.model.shapes
    assert Target(weight, Rows(16, 16)) in again.targets.values()
    _, account = merge_with_account([(one, 1.0), (one, 1.0)], model=model)
    assert account.model is None


@pytest.mark.parametrize(
    "notes",
    [{}, [], {"weights": {"w": [4, 2]}, "names": {"a": [1]}, "turned": []},
     {"weights": {"w": [4, 2]}, "names": {"a": [0, 2, 3]}, "turned": []}, {"weights": 3, "names": {}, "turned": []}],
)  # fmt: skip
def test_notes_of_a_model_that_cannot_be_read_are_refused_in_words(notes):
    told = {"version": 2, "inputs": [], "options": {}, "model": notes}
    with pytest.raises(ValueError, match=r"x\.safetensors: what it says of how it was made cannot be read"):
        recipe_of({PROVENANCE_KEY: json.dumps(told)}, "x.safetensors")
