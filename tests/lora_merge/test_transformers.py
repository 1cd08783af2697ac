"""Bases of transformers by names and shapes, against the models that diffusers builds, and each against all others."""

import warnings
from functools import cache

import pytest
import torch

from lcm_kit.lora_merge.naming.family import numbered
from lcm_kit.lora_merge.recognise.by_blocks import base_of, make_of, recognise
from lcm_kit.lora_merge.recognise.transformers import BY_NAME, TRANSFORMERS, _table
from lcm_kit.lora_merge.recognise.wrong_base import Counts, are_kin, is_other_base, is_wrong_base

NAMES = [base.name for base in TRANSFORMERS]


def modules_of(base, only=lambda name: True):
    return {f"lora_unet_{name}": shape for name, shape in BY_NAME[base].modules.items() if only(name)}


def inside(one, other):
    """Whether nearly all that one base has is in the other too, and no stack of that is deeper."""
    mine, theirs = BY_NAME[one], BY_NAME[other]
    same = sum(theirs.modules.get(name) == shape for name, shape in mine.modules.items()) >= 0.95 * len(mine.modules)
    return same and all(
        len(theirs.stacks[name]) == len(mine.stacks[name]) for name in mine.stacks if name in theirs.stacks
    )


@pytest.mark.parametrize("name", NAMES)
def test_a_base_is_itself_and_no_other(name):
    base = BY_NAME[name]
    assert base_of(base.modules).name == name
    # Packed, where a shape is one of bytes: nothing but the names tells.
    alike = [other.name for other in TRANSFORMERS if other.modules.keys() == base.modules.keys()]
    packed = base_of(dict.fromkeys(base.modules))
    assert (packed.name if packed else None) == (name if alike == [name] else None)
    assert not is_other_base(recognise(modules_of(name)).bases, packed.name if packed else None)
    assert make_of(base.modules).branches == base.branches
    found = recognise(modules_of(name)).bases
    assert name in found
    assert all(inside(name, other) for other in found)


@pytest.mark.parametrize("name", NAMES)
def test_a_pruned_model_is_its_base_until_a_tenth_is_missing(name):
    modules = dict(BY_NAME[name].modules)
    names = sorted(modules)
    for one in names[: len(names) // 11]:
        del modules[one]
    assert base_of(modules).name == name
    for one in names[: len(names) // 5]:
        modules.pop(one, None)
    assert base_of(modules) is None or base_of(modules).name != name


@pytest.mark.parametrize("name", NAMES)
def test_what_stands_outside_of_a_bases_blocks_says_nothing_of_a_model(name):
    base = BY_NAME[name]
    outside = {f"{place}_{number}": (7, 7) for place in ("img_in", "elsewhere") for number in range(len(base.modules))}
    assert base_of(base.modules | outside) is base
    assert make_of([*base.modules, *outside]).branches == base.branches


def test_a_model_that_has_just_nine_tenths_of_a_base_is_that_base_or_its_make():
    for base in TRANSFORMERS:
        left = sorted(base.modules)[len(base.modules) // 10 :]
        if len(base.modules) % 10 == 0:
            assert base_of({name: base.modules[name] for name in left}) is base
            assert base_of({name: base.modules[name] for name in left[1:]}) is not base
    wan = BY_NAME["Wan 2.1/2.2 14B"]  # ten modules a block
    without = [name for name in wan.modules if not name.endswith("_ffn_0")]
    assert make_of(without).kin.startswith("Wan")
    assert make_of([name for name in without if not name.endswith("_ffn_2")]) is None


@cache
def bases_of(lora):
    """The bases of a LoRA of every module of one."""
    return recognise(modules_of(lora)).bases


def counts_on(lora, model):
    """What becomes of a LoRA of every module of one base on a model of another."""
    mine, theirs = BY_NAME[lora].modules, BY_NAME[model].modules
    fits = sum(theirs.get(name) == shape for name, shape in mine.items())
    there = len(mine.keys() & theirs.keys())
    return Counts(placed=fits, homeless=len(mine) - there, clashing=there - fits)


@pytest.mark.parametrize("lora", NAMES)
@pytest.mark.parametrize("model", NAMES)
def test_a_lora_is_taken_by_the_models_of_its_base_alone(lora, model):
    """Every pair. It may be for another base as well where that one holds all that it changes."""
    bases, counts = bases_of(lora), counts_on(lora, model)
    taken = model in bases
    assert taken is (lora == model or inside(lora, model))
    assert is_wrong_base(counts, bases, model, accelerates=False, demand_all=True) is not taken
    if not taken and not are_kin(bases, model):
        assert is_wrong_base(counts, bases, model, accelerates=False, demand_all=False)


def test_hunyuan_video_and_flux_have_blocks_of_one_shape_and_are_told_by_their_number():
    """38 of Flux' blocks' shapes, 19 + 38 of HunyuanVideo's 20 + 40: by counts alone nearly all of it fits."""
    counts = counts_on("Flux.1", "HunyuanVideo")
    assert counts.placed == counts.asked
    assert recognise(modules_of("Flux.1")).bases == ("Flux.1",)
    # Some blocks in the middle are those of both.
    few = modules_of("Flux.1", lambda name: name.split("_")[2] in ("7", "12"))
    assert set(recognise(few).bases) >= {"Flux.1", "HunyuanVideo"}
    assert not is_other_base(recognise(few).bases, "HunyuanVideo")


def ends_of(modules):
    """Stack -> number of the last block."""
    found = {}
    for name in modules:
        stack, number = numbered(name.removeprefix("lora_unet_"))
        found[stack] = max(found.get(stack, 0), int(number))
    return found


def fit(base, module):
    return base.modules.get(module.removeprefix("lora_unet_"))


@pytest.mark.parametrize("name", [base.name for base in TRANSFORMERS if len(base.stacks) > 1])
def test_those_bases_go_first_of_which_it_changes_the_last_block_of_each_stack_that_it_changes(name):
    """Of one stack all but the last block, of the others all; against a count by hand over all bases."""
    for stack, blocks in BY_NAME[name].stacks.items():
        last = f"{stack}_{len(blocks) - 1}_"
        modules = modules_of(name, lambda one, last=last: not one.startswith(last))
        fits = {base: [one for one, shape in modules.items() if fit(base, one) == shape] for base in TRANSFORMERS}
        possible = [base for base, ones in fits.items() if len(ones) >= 0.95 * len(modules)]
        whole = [b for b in possible if all(n == len(b.stacks[s]) - 1 for s, n in ends_of(fits[b]).items())]
        assert recognise(modules).bases == tuple(base.name for base in whole or possible), stack


def test_what_says_nothing_of_a_transformer():
    assert recognise({}).bases == ()
    assert recognise({"lora_te1_text_model_encoder_layers_0_self_attn_q_proj": (768, 768)}).bases == ()
    assert recognise({"lora_unet_img_in": (3072, 64)}).bases == ()
    assert recognise({"lora_unet_blocks_0_self_attn_q": (7, 7)}).bases == ()
    assert base_of({"img_in": (3072, 64)}) is None
    assert make_of([]) is None
    assert make_of(["down_blocks_0_attentions_0_proj_in"]) is None


@pytest.mark.parametrize(
    ("base", "module", "branch"),
    [
        ("Wan 2.1/2.2 14B", "blocks_0_cross_attn_k_img", "image branch"),
        ("Wan 2.1/2.2 14B", "blocks_39_cross_attn_norm_k_img", "image branch"),
        ("Wan 2.1/2.2 14B", "img_emb_proj_1", "image branch"),
        ("Wan 2.1/2.2 14B", "vace_blocks_0_self_attn_q", "VACE blocks"),
        ("Wan 2.1/2.2 14B", "vace_patch_embedding", "VACE blocks"),
        ("Wan 2.1/2.2 14B", "blocks_0_cross_attn_k", None),
        ("Flux.1", "guidance_in_in_layer", "guidance input"),
        ("LTX-2", "transformer_blocks_3_attn1_to_gate_logits", "attention gates"),
        ("Qwen-Image", "blocks_0_cross_attn_k_img", None),
    ],
)
def test_branches(base, module, branch):
    assert BY_NAME[base].branch(module) == branch
    assert module not in BY_NAME[base].modules or branch is None


def test_an_image_branch_beside_the_rest_says_nothing_against_a_base():
    modules = modules_of("Wan 2.1/2.2 14B")
    modules |= {f"lora_unet_blocks_{n}_cross_attn_{kind}_img": (5120, 5120) for n in range(40) for kind in "kv"}
    found = recognise(modules)
    assert (found.bases, found.branches) == (("Wan 2.1/2.2 14B",), ("image branch",))


# Class in diffusers -> base. Its defaults are the published model, or these are.
DIFFUSERS = {
    "FluxTransformer2DModel": ("Flux.1", {"guidance_embeds": True}),
    "Flux2Transformer2DModel": ("Flux.2 dev", {}),
    "ChromaTransformer2DModel": ("Chroma", {}),
    "QwenImageTransformer2DModel": ("Qwen-Image", {}),
    "LTXVideoTransformer3DModel": ("LTX-Video 2B", {}),
    "LTX2VideoTransformer3DModel": ("LTX-2", {}),
}
SIZES = {
    "Flux2Transformer2DModel": {
        "Flux.2 Klein 9B": {"num_layers": 8, "num_single_layers": 24, "num_attention_heads": 32, "joint_attention_dim": 12288},
        "Flux.2 Klein 4B": {"num_layers": 5, "num_single_layers": 20, "num_attention_heads": 24, "joint_attention_dim": 7680},
    },
}  # fmt: skip
CASES = [(cls, base, options) for cls, (base, options) in DIFFUSERS.items()]
CASES += [(cls, base, options) for cls, bases in SIZES.items() for base, options in bases.items()]


@pytest.mark.parametrize(("cls", "base", "options"), CASES, ids=lambda value: value if isinstance(value, str) else "")
def test_a_lora_on_diffusers_own_model_is_for_the_base(cls, base, options):
    """Names of PEFT files, where one fused weight of the model is three or four layers, at the size that diffusers has."""
    import diffusers

    with torch.device("meta"), warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        model = getattr(diffusers, cls)(**options)
    kinds = ("attn", "ff", "norm1", "norm.linear", "proj_mlp", "proj_out", "mlp", "mod")
    modules = {
        f"lora_transformer_{name.replace('.', '_')}": tuple(layer.weight.shape)
        for name, layer in model.named_modules()
        if isinstance(layer, torch.nn.Linear) and "blocks." in name and any(kind in name for kind in kinds)
    }
    found = recognise(modules).bases
    assert base in found
    assert all(inside(base, other) for other in found)


def test_slices_have_the_rows_that_the_fused_weight_gives_them():
    qkv = {"lora_transformer_single_transformer_blocks_37_attn_to_q": (3072, 3072),
           "lora_transformer_transformer_blocks_18_attn_to_q": (3072, 3072)}  # fmt: skip
    assert "Flux.1" in recognise(qkv).bases
    wide = dict.fromkeys(qkv, (9216, 3072))
    assert "Flux.1" not in recognise(wide).bases


def _hidream(w):
    experts = 4 * w + 3 * 3584 * w + 4 * 3 * 6912 * w
    double, single = 8 * w**2 + 12 * w**2 + 3 * 6912 * w + experts, 4 * w**2 + 6 * w**2 + experts
    return 16 * double + 32 * single + 49 * 4096 * w


def _cosmos(w, depth):
    return depth * (14 * w**2 + 2 * 1024 * w + 3 * (256 + 768) * w) + 4 * w**2


# Base -> billions of parameters in its name or its paper, and the numbers in its blocks by hand: depth times what a block
# has. A double block of Flux has 3 + 1 + 4 + 4 widths squared and 6 of modulation for each of two streams, a single one
# 3 + 4 + 1 + 4 and 3; those of Flux 2 have 3 + 1 + 6 + 3 and 3 + 6 + 1 + 3, and none of modulation.
PUBLISHED = {
    "Flux.1": (12, (19 * 36 + 38 * 15) * 3072**2),
    "Chroma": (8.9, (19 * 24 + 38 * 12) * 3072**2 + 5 * 2 * 5120**2),
    "Flux.2 dev": (32, (8 * 26 + 48 * 13) * 6144**2),
    "Flux.2 Klein 9B": (9, (8 * 26 + 24 * 13) * 4096**2),
    "Flux.2 Klein 4B": (4, (5 * 26 + 20 * 13) * 3072**2),
    "HunyuanVideo": (13, (20 * 36 + 40 * 15 + 2 * 14) * 3072**2),
    "HunyuanVideo 1.5": (8.3, (54 * 36 + 2 * 14) * 2048**2),
    "HunyuanImage 2.1": (17, (20 * 36 + 40 * 15 + 2 * 14) * 3584**2),
    "Qwen-Image": (20, 60 * (8 + 2 * 14) * 3072**2),
    "Wan 2.1 1.3B": (1.3, 30 * (8 * 1536**2 + 2 * 1536 * 8960)),
    "Wan 2.2 5B": (5, 30 * (8 * 3072**2 + 2 * 3072 * 14336)),
    "Wan 2.1/2.2 14B": (14, 40 * (8 * 5120**2 + 2 * 5120 * 13824)),
    "Z-Image": (6, 34 * (4 * 3840**2 + 3 * 3840 * 10240) + 32 * 4 * 3840 * 256),
    "Lumina 2": (2.6, 30 * (3840 * 2304 + 2304**2 + 3 * 2304 * 9216) + 28 * 4 * 2304 * 1024),
    "SD3 medium": (2, (24 * 18 + 23 * 18 + 5) * 1536**2),
    "SD3.5 medium": (2.3, (24 * 18 + 23 * 18 + 5 + 13 * 7) * 1536**2),
    "SD3.5 large": (8, (38 * 18 + 37 * 18 + 5) * 2432**2),
    "LTX-Video 2B": (2, 28 * 16 * 2048**2),
    "LTX-Video 13B": (13, 48 * 16 * 4096**2),
    "LTX-2": (19, 48 * (64 + 16 + 6 + 6) * 2048**2),
    "HiDream-I1": (17, _hidream(2560)),
    "Cosmos-Predict2 2B": (2, _cosmos(2048, 28)),
    "Cosmos-Predict2 14B": (14, _cosmos(5120, 36)),
    "Anima": (2, _cosmos(2048, 28) + 6 * (8 + 8) * 1024**2),
}


@pytest.mark.parametrize("name", NAMES)
def test_the_blocks_of_a_base_have_the_numbers_that_it_was_published_with(name):
    billions, by_hand = PUBLISHED[name]
    made = {base.name: base for base in _table()}[name]
    assert made.modules == BY_NAME[name].modules
    found = sum(out * inputs for out, inputs in made.modules.values())
    assert found == by_hand
    assert found / 1e9 == pytest.approx(billions, rel=0.1)


def test_kin_are_the_bases_whose_loras_work_on_one_another_after_a_fashion():
    kin = {}
    for base in TRANSFORMERS:
        kin.setdefault(base.kin, set()).add(base.name)
    assert {name: bases for name, bases in kin.items() if bases != {name}} == {
        "Flux.1": {"Flux.1", "Chroma"},
        "SD3": {"SD3 medium", "SD3.5 medium"},
        "Cosmos-Predict2 2B": {"Cosmos-Predict2 2B", "Anima"},
    }
