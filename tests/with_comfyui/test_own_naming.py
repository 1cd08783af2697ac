"""Flux LoRAs in different namings meet in one merge: against ComfyUI's own key map and what it adds to each weight."""

import re
from itertools import permutations

import pytest
import torch

from lcm_kit.lora_merge import Lora, merge
from lcm_kit.lora_merge.files.load_save import load, save
from lcm_kit.lora_merge.naming import families, flux, names
from lcm_kit.lora_merge.naming.family import Rows
from lcm_kit.lora_merge.naming.unet import Layout
from lcm_kit.tests.with_comfyui import dits
from lcm_kit.tests.with_comfyui.test_one_weight_twice import by_core, lora, naming

MODEL = "Flux"


def canonical(spelled):
    return names.canonical(names.spelling(spelled), Layout())


def namings():
    """(prefix, own or not) -> {(weight, rows): name} of all matrices but the one that is halved in another order."""
    found = {}
    for spelled, home in dits.homes(MODEL).items():
        shape = dits.shape_at(MODEL, spelled)
        if shape is not None and len(shape) == 2 and not (isinstance(home, tuple) and len(home) > 2):
            # linear1 as a whole is Flux 2's name, beside which no file has slices.
            if "final_layer.adaLN" not in dits.target_of(home)[0] and "qkv_mlp_proj" not in spelled:
                found.setdefault(naming(spelled, home), {}).setdefault(dits.target_of(home), spelled)
    whole = {key: those for key, those in found.items() if len(those) > 10}
    assert {own for _, own in whole} == {True, False}
    assert len(whole) >= 5
    return whole


NAMINGS = namings()


def whole_lora(key, seed, keep=lambda weight: True):
    """A LoRA of every matrix in one naming."""
    state = {}
    for number, ((weight, _), spelled) in enumerate(NAMINGS[key].items()):
        if keep(weight):
            state |= lora(spelled, dits.shape_at(MODEL, spelled), 1000 * seed + number)
    return state


@pytest.mark.parametrize(("first", "second"), [*permutations(NAMINGS, 2)])
def test_two_namings_are_merged_into_what_the_two_loras_add_one_after_the_other(first, second, tmp_path):
    homes, weights = dits.homes(MODEL), dits.shapes(MODEL)
    states = [whole_lora(first, 1), whole_lora(second, 2)]
    inputs = [(Lora.from_state_dict(state), strength) for state, strength in zip(states, (1.0, 0.8), strict=True)]
    save(merge(inputs), tmp_path / "merged.safetensors", dtype=torch.float32)
    written = load(tmp_path / "merged.safetensors").to_state_dict()
    modules = {re.sub(r"\.(?:lora_(?:up|down)\.weight|alpha)$", "", key) for key in written}
    assert modules <= homes.keys()
    targets = [dits.target_of(homes[module]) for module in modules]
    assert len(set(targets)) == len(targets)
    ours, one, two = (by_core(state, homes, weights) for state in (written, *states))
    assert ours.keys() == one.keys() | two.keys()
    for key, value in ours.items():
        torch.testing.assert_close(value, one[key] + 0.8 * two[key], rtol=1e-5, atol=1e-5)
    if first[1] != second[1]:
        assert {target[1] for target in targets} == {None}  # no slice is left


@pytest.mark.parametrize("options", [{"method": "ties", "density": 0.5}, {"rank": 3}, {"method": "tsv", "rank": 4}])
def test_every_method_sees_the_same_weights_whatever_their_names(options):
    """Beside a LoRA in the model's own names: one in diffusers', and the same one as ComfyUI adds it, of whole weights."""
    homes, weights = dits.homes(MODEL), dits.shapes(MODEL)
    own, other = ("lora_unet_", True), ("transformer.", False)
    fixed = Lora.from_state_dict(whole_lora(own, 1))
    state = whole_lora(other, 2)
    whole = Lora.from_state_dict({
        f"{NAMINGS[own][weight, None]}.lora_{part}.weight": tensor
        for weight, delta in by_core(state, homes, weights).items()
        for part, tensor in zip(("up", "down"), factors_of(delta), strict=True)
    })  # fmt: skip
    made = [
        by_core(merge([(fixed, 1.0), (one, 0.8)], **options).to_state_dict(), homes, weights)
        for one in (Lora.from_state_dict(state), whole)
    ]
    assert made[0].keys() == made[1].keys()
    for key, value in made[0].items():
        torch.testing.assert_close(value, made[1][key], rtol=1e-3, atol=1e-3)


def factors_of(delta):
    u, s, v = torch.linalg.svd(delta.double(), full_matrices=False)
    rank = int((s > 1e-6 * s[0]).sum())
    return (u[:, :rank] * s[:rank]).float(), v[:rank].float()


def test_the_tables_say_what_comfyuis_key_map_says():
    """Own name and rows of every name that it knows in diffusers' naming, and nothing of a weight that it turns round."""
    own = {dits.target_of(dits.homes(MODEL)[s])[0]: canonical(s) for s in NAMINGS["lora_unet_", True].values()}
    checked = set()
    for spelled, home in dits.homes(MODEL).items():
        (weight, part), name = dits.target_of(home), canonical(spelled)
        if not spelled.startswith("transformer.") or weight not in own or len(dits.shapes(MODEL)[weight]) != 2:
            continue
        checked.add((weight, part))
        if part is None:
            assert flux.FAMILY.own(name) == own[weight]
        else:
            assert flux.FAMILY.own(name) == name
            assert own[weight] in flux.FAMILY.fused(name)
            assert flux.FAMILY.rows(name, own[weight], dits.shapes(MODEL)[weight]) == Rows(*part[1:])
    assert len(checked) > 50
    assert {weight for weight, _ in checked} == own.keys()
    assert flux.FAMILY.own("lora_transformer_norm_out_linear") is None


def test_a_weight_that_diffusers_holds_the_other_way_about_is_refused_still():
    shape = dits.shapes(MODEL)["diffusion_model.final_layer.adaLN_modulation.1.weight"]
    own = whole_lora(("lora_unet_", True), 1) | lora("lora_unet_final_layer_adaLN_modulation_1", shape)
    other = whole_lora(("transformer.", False), 2) | lora("transformer.norm_out.linear", shape)
    with pytest.raises(ValueError, match="two spellings of one weight"):
        merge([(Lora.from_state_dict(own), 1.0), (Lora.from_state_dict(other), 1.0)])


OTHERS = [name for name in dits.KNOWN if name != MODEL]


@pytest.mark.parametrize("name", OTHERS)
def test_no_other_model_is_taken_for_flux_by_the_names_of_its_diffusers_lora(name):
    """Its own names may be the family's (HunyuanVideo has the same blocks), and mean the same weights then."""
    groups = {}
    for spelled, home in dits.homes(name).items():
        if dits.shape_at(name, spelled) is not None:
            groups.setdefault(naming(spelled, home), []).append(canonical(spelled))
    for (_, own), found in groups.items():
        blocks = [one for one in found if re.search(r"(?<!refiner_)blocks_\d", one)]
        for those in (found, blocks, [one for one in blocks if "attn" in one]):
            if not own or "HunyuanVideo" not in name:
                assert families.family_of([those]) is None or not those
