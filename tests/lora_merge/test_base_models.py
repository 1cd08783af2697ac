"""Base models known by module names and shapes, against the UNets that diffusers builds."""

import pytest

from lcm_kit.lora_merge.recognise.base_models import BASES, BY_NAME, Base, Recognised, base_of, kind_of, recognise
from lcm_kit.tests.lora_merge import full_size
from lcm_kit.tests.lora_merge.full_size import ATTENTION, TARGETS


def underscored(base, targets=("",), only=lambda name: True):
    weights = full_size.unet_weights(base)
    return {n.replace(".", "_"): shape for n, shape in weights.items() if n.endswith(targets) and only(n)}


@pytest.mark.parametrize("base", full_size.CONFIGS)
def test_names_and_shapes_are_those_of_the_unet(base):
    assert BY_NAME[base].modules == underscored(base)


@pytest.mark.parametrize("base", BASES, ids=lambda base: base.name)
def test_both_namings_name_the_same_modules(base):
    assert sorted(base.modules.values()) == sorted(base.ldm_modules.values())
    assert {kind_of(name) for name in base.modules} == {kind_of(name) for name in base.ldm_modules}


@pytest.mark.parametrize("deepest", [(1, 1, 1), (0, 0, 0), (1, 1, 0), (0, 0, 1), (0, 1, 0), (1, 0, 1)])
def test_an_upsampler_follows_what_its_last_block_has(deepest):
    """Of output block 2: 0 is the residual block, 1 the attention if there is one, and the upsampler is the next."""
    base = Base("x", 8, True, (4, 8), down=((0, 0), (1, 1)), up=(deepest, (0, 0, 0)), middle=0)
    assert [name for name in base.ldm_modules if kind_of(name) == "upsamplers_0_conv"] == [
        f"output_blocks_2_{1 + deepest[-1]}_conv"
    ]


@pytest.mark.parametrize("base", full_size.CONFIGS)
def test_the_targets_of_lcm_loras_are_the_known_kinds(base):
    names = underscored(base)
    wanted = underscored(base, TARGETS)
    assert {name for name in names if kind_of(name)} == set(wanted)
    assert len(wanted) == full_size.MODULES[base]


def test_no_base_is_taken_for_another():
    for base in BASES:
        assert base_of(base.modules) == base_of(base.ldm_modules) == base.name
        assert recognise(base.modules).bases == recognise(base.ldm_modules).bases == (base.name,)


def test_all_of_ssd_1bs_modules_are_in_sdxl_but_it_is_not_sdxl():
    modules = underscored("SSD-1B", TARGETS)
    assert all(BY_NAME["SDXL"].shape(name) == shape for name, shape in modules.items())
    found = recognise(modules)
    assert found.bases == ("SSD-1B",)
    assert found.complete


@pytest.mark.parametrize(("count", "complete"), [(140, True), (133, True), (132, False)])
def test_a_lora_is_complete_that_covers_nineteen_twentieths_of_a_base_in_its_kinds(count, complete):
    """SDXL has 70 layers of self-attention, with queries and keys."""
    modules = dict(list(underscored("SDXL", ("attn1.to_q", "attn1.to_k")).items())[:count])
    assert len(modules) == count
    found = recognise(modules)
    assert (found.bases, found.complete) == (("SDXL",), complete)


@pytest.mark.parametrize(("count", "bases"), [(19, ("SDXL",)), (18, ())])
def test_a_lora_may_be_for_a_base_that_has_nineteen_twentieths_of_its_modules(count, bases):
    """Twenty of SDXL's deepest blocks, which no smaller base has, some of them under no name of it."""
    deep = underscored("SDXL", ATTENTION, lambda name: "down_blocks.2.attentions.0.transformer_blocks.9" in name)
    deep |= underscored("SDXL", ATTENTION, lambda name: "down_blocks.2.attentions.1.transformer_blocks.9" in name)
    deep |= underscored("SDXL", ATTENTION, lambda name: "down_blocks.2.attentions.0.transformer_blocks.8" in name)
    names = sorted(deep)[:20]
    modules = {(name if at < count else f"elsewhere_{at}"): deep[name] for at, name in enumerate(names)}
    assert len(modules) == 20
    assert recognise(modules).bases == bases


@pytest.mark.parametrize("base", full_size.CONFIGS)
def test_attention_alone_tells_the_base(base):
    assert recognise(underscored(base, ATTENTION)).bases == (base,)


def test_self_attention_alone_leaves_two_bases():
    """SD1.5 and SD2 differ in what cross-attention reads and in the projections."""
    found = recognise(underscored("SD1.5", ATTENTION, lambda name: "attn1" in name))
    assert found.bases == ("SD1.5", "SD2")


def test_a_few_blocks_leave_every_base_that_has_them():
    found = recognise(
        underscored("SDXL", ATTENTION, lambda name: "up_blocks.1.attentions.0.transformer_blocks.0" in name)
    )
    assert set(found.bases) >= {"SDXL", "SSD-1B", "Segmind-Vega"}
    assert not found.complete
    deep = recognise(
        underscored("SDXL", ATTENTION, lambda name: "down_blocks.2.attentions.0.transformer_blocks.9" in name)
    )
    assert deep.bases == ("SDXL",)


def test_a_convolution_written_as_a_matrix_is_still_one_and_a_matrix_is_no_convolution():
    flat = {name: (shape[0], *shape[1:2]) if shape[2:] == (1, 1) else shape
            for name, shape in underscored("SD1.5", TARGETS).items()}  # fmt: skip
    assert recognise(flat).bases == ("SD1.5",)
    projections = underscored("SD1.5", ("proj_in", "proj_out"))
    assert recognise(projections).bases == ("SD1.5",)


def test_modules_of_no_known_base():
    assert recognise({}) == Recognised((), False, frozenset())
    assert recognise({"double_blocks_0_img_attn_qkv": (9216, 3072)}).bases == ()
    assert recognise({"down_blocks_0_attentions_0_proj_in": (7, 7)}).bases == ()


def test_a_pruned_model_is_its_base_until_a_tenth_is_missing():
    modules = dict(BY_NAME["SDXL"].modules)
    names = sorted(modules)
    for name in names[:70]:
        del modules[name]
    assert base_of(modules) == "SDXL"
    for name in names[70:120]:
        del modules[name]
    assert base_of(modules) is None


def test_an_inpainting_model_is_its_base():
    assert base_of({**BY_NAME["SD1.5"].modules, "conv_in": (320, 9, 3, 3)}) == "SD1.5"


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("input_blocks_1_0_emb_layers_1", "time_emb_proj"),
        ("down_blocks_0_resnets_0_time_emb_proj", "time_emb_proj"),
        ("input_blocks_3_0_op", "downsamplers_0_conv"),
        ("output_blocks_2_1_conv", "upsamplers_0_conv"),
        ("middle_block_1_transformer_blocks_0_attn2_to_k", "attn2_to_k"),
        ("time_embed_0", None),
        ("conv_in", None),
    ],
)
def test_kinds_of_modules_in_both_namings(name, kind):
    assert kind_of(name) == kind
