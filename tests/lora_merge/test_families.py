"""Families of models: what each says of its names, and two namings of one model in a merge."""

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lcm_kit.lora_merge import Lora, merge, merge_with_account
from lcm_kit.lora_merge.comparing.compare import compare
from lcm_kit.lora_merge.comparing.report import as_text
from lcm_kit.lora_merge.files.formats import named_for
from lcm_kit.lora_merge.files.one_naming import can_turn, in_own_naming, split, stacked, turned
from lcm_kit.lora_merge.merging.report import warnings_of
from lcm_kit.lora_merge.naming import flux, hunyuan_video, names, z_image
from lcm_kit.lora_merge.naming.families import (
    FAMILIES,
    TRANSFORMERS,
    family_by_shapes,
    family_by_width,
    family_of,
    readable,
)
from lcm_kit.lora_merge.naming.family import Rows
from lcm_kit.lora_merge.naming.unet import Layout
from lcm_kit.lora_merge.updates.layer import LoraLayer
from lcm_kit.tests.lora_merge import kinds
from lcm_kit.tests.lora_merge.make import factors, kohya, relative

H = 8
# Whole weights and slices of one double and one single block in diffusers' naming: name -> (rows, columns).
DIFFUSERS = {
    **{f"transformer_blocks.3.attn.{x}": (H, H) for x in ("to_q", "to_k", "to_v", "to_out.0")},
    **{f"transformer_blocks.3.attn.{x}": (H, H) for x in ("add_q_proj", "add_k_proj", "add_v_proj", "to_add_out")},
    "transformer_blocks.3.ff.net.0.proj": (4 * H, H),
    "transformer_blocks.3.ff.net.2": (H, 4 * H),
    "transformer_blocks.3.norm1.linear": (6 * H, H),
    **{f"single_transformer_blocks.7.attn.{x}": (H, H) for x in ("to_q", "to_k", "to_v")},
    "single_transformer_blocks.7.proj_mlp": (4 * H, H),
    "single_transformer_blocks.7.proj_out": (H, 5 * H),
}
OWN = {
    "double_blocks.3.img_attn.qkv": (3 * H, H),
    "double_blocks.3.img_attn.proj": (H, H),
    "double_blocks.3.txt_attn.qkv": (3 * H, H),
    "double_blocks.3.txt_attn.proj": (H, H),
    "double_blocks.3.img_mlp.0": (4 * H, H),
    "double_blocks.3.img_mlp.2": (H, 4 * H),
    "double_blocks.3.img_mod.lin": (6 * H, H),
    "single_blocks.7.linear1": (7 * H, H),
    "single_blocks.7.linear2": (H, 5 * H),
}
PARTS = {
    "double_blocks.3.img_attn.qkv": [f"transformer_blocks.3.attn.to_{x}" for x in "qkv"],
    "double_blocks.3.txt_attn.qkv": [f"transformer_blocks.3.attn.add_{x}_proj" for x in "qkv"],
    "single_blocks.7.linear1": [*(f"single_transformer_blocks.7.attn.to_{x}" for x in "qkv"),
                                "single_transformer_blocks.7.proj_mlp"],
    "double_blocks.3.img_attn.proj": ["transformer_blocks.3.attn.to_out.0"],
    "double_blocks.3.txt_attn.proj": ["transformer_blocks.3.attn.to_add_out"],
    "double_blocks.3.img_mlp.0": ["transformer_blocks.3.ff.net.0.proj"],
    "double_blocks.3.img_mlp.2": ["transformer_blocks.3.ff.net.2"],
    "double_blocks.3.img_mod.lin": ["transformer_blocks.3.norm1.linear"],
    "single_blocks.7.linear2": ["single_transformer_blocks.7.proj_out"],
}  # fmt: skip


def lora(shapes, prefix, seed=0, source="LoRA", more=None, alpha=None):
    state = {}
    for number, (name, (out, inputs)) in enumerate(shapes.items()):
        state |= kohya(f"{prefix}{name}", *factors(out, 2 + number % 2, inputs, seed=100 * seed + number), alpha)
    return Lora.from_state_dict(state | (more or {}), source=source)


def whole(other):
    """Own name -> update of a LoRA in diffusers' naming, put together by hand."""
    return {
        own: torch.cat([other.delta(f"transformer.{part}") if f"transformer.{part}" in known(other)
                        else torch.zeros(DIFFUSERS[part]) for part in parts])
        for own, parts in PARTS.items()
    }  # fmt: skip


def known(one):
    return set(one.spellings.values())


def refused(*loras):
    for work in (merge, compare):
        with pytest.raises(ValueError, match="spell their modules differently") as error:
            work([(one, 1.0) for one in loras])
    return str(error.value)


@pytest.mark.parametrize("swap", [False, True])
@pytest.mark.parametrize("alpha", [None, 0.3, -2.0])
@pytest.mark.parametrize("prefix", ["diffusion_model.", "lora_unet_"])
def test_a_split_lora_and_a_fused_one_meet_weight_by_weight(prefix, alpha, swap):
    first = {name if "." in prefix else name.replace(".", "_"): shape for name, shape in OWN.items()}
    own, other = lora(first, prefix, 1), lora(DIFFUSERS, "transformer.", 2, alpha=alpha)
    inputs = [(own, 1.0), (other, 0.8)]
    merged, account = merge_with_account(inputs[::-1] if swap else inputs)
    assert warnings_of(account) == ()
    assert known(merged) == known(own)
    for name, delta in whole(other).items():
        wanted = own.delta(f"diffusion_model.{name}") + 0.8 * delta
        assert relative(merged.delta(f"diffusion_model.{name}"), wanted) < 1e-6
    assert "under two names" not in as_text(compare(inputs))


@settings(deadline=None, max_examples=25)
@given(
    parts=st.sets(st.sampled_from(sorted(DIFFUSERS)), min_size=1),
    mine=st.sets(st.sampled_from(sorted(OWN)), min_size=1),
)
def test_any_part_of_one_lora_and_any_part_of_another_arrive_or_are_refused(parts, mine):
    """Some slices of a weight, some blocks: what is merged adds up, in the names that each weight has."""
    own = lora({name: OWN[name] for name in sorted(mine)}, "diffusion_model.", 1)
    other = lora({name: DIFFUSERS[name] for name in sorted(parts)}, "transformer.", 2)
    try:
        merged = merge([(own, 1.0), (other, 1.0)])
    except ValueError as error:
        assert "spell their modules differently" in str(error)  # noqa: PT017, either is right
        return
    for name, delta in whole(other).items():
        total = torch.zeros(OWN[name])
        for place, update in updates_in(merged, name):
            total[place] += update
        wanted = delta + (own.delta(f"diffusion_model.{name}") if name in mine else 0)
        torch.testing.assert_close(total, wanted, rtol=1e-5, atol=1e-7)


def updates_in(merged, own):
    """(rows, update) of every module of a merged LoRA that is the weight or a slice of it."""
    for spelled in known(merged):
        body = spelled.removeprefix("lora_unet_").removeprefix("diffusion_model.").replace(".", "_")
        if body == own.replace(".", "_"):
            yield slice(None), merged.delta(spelled)
    start = 0
    for part in PARTS[own]:
        rows = DIFFUSERS[part][0]
        for spelled in (f"transformer.{part}", f"lora_transformer_{part.replace('.', '_')}"):
            if spelled in known(merged):
                yield slice(start, start + rows), merged.delta(spelled)
        start += rows


@pytest.mark.parametrize(
    "changed",
    [
        {"transformer.transformer_blocks.3.attn.foo": (H, H)},  # not of the family
        {"transformer.transformer_blocks.54.attn.to_q": (H, H)},  # deeper than Flux and HunyuanVideo
        {"transformer.transformer_blocks.3.img_mlp.net.2": (H, 4 * H)},  # Qwen-Image
        {"transformer.joint_transformer_blocks.0.attn.to_q": (H, H)},  # AuraFlow
    ],
)
def test_a_lora_with_a_name_that_the_family_lacks_is_not_translated(changed):
    more = {}
    for name, (out, inputs) in changed.items():
        more |= kohya(name, *factors(out, 2, inputs))
    text = refused(lora(OWN, "diffusion_model.", 1, "a"), lora(DIFFUSERS, "transformer.", 2, "b", more))
    assert "(a) and transformer." in text


def test_blocks_that_many_models_have_are_not_taken_for_flux():
    """Qwen-Image's attention has these names and, in the real models, the same shapes."""
    attention = {name: shape for name, shape in DIFFUSERS.items() if name.startswith("transformer_blocks.3.attn")}
    refused(lora(OWN, "diffusion_model.", 1), lora(attention, "transformer.", 2))


# Prefixes that tools write before diffusers' names; kohya's is one of the model's own names' alone in all of these.
BEFORE_DIFFUSERS = ["", "transformer.", "base_model.model.", "lycoris_", "lora_transformer_"]
WIDE = [(family.name, width) for family in TRANSFORMERS for width in family.widths]


def queries(prefix, width, source="LoRA"):
    """Attention of the picture alone, which a dozen models have by these names."""
    names = {f"transformer_blocks.3.attn.{x}": (width, width) for x in ("to_q", "to_k", "to_v", "to_out.0")}
    put = {name.replace(".", "_") if prefix.endswith("_") else name: shape for name, shape in names.items()}
    return lora(put, prefix, source=source)


@pytest.mark.parametrize(("first", "second"), list(itertools.permutations(BEFORE_DIFFUSERS, 2)))
def test_two_prefixes_of_a_name_of_many_models_meet_where_its_width_tells_which_these_may_be(first, second):
    """A spelling that each family of this width reads, as far as it reads any of the two; another is refused."""
    for name, width in WIDE:
        one, two = queries(first, width, "a"), queries(second, width, "b")
        asked = [family for family in TRANSFORMERS if family.recognises([*one.spellings, *two.spellings])]
        asked = [family for family in asked if width in family.widths or not family.widths]
        if not any(family.name == name for family in asked) or one.spellings.keys() == two.spellings.keys():
            continue  # of another family, or one name for both prefixes
        both = [(s, t) for s, t in zip(one.spellings.values(), two.spellings.values(), strict=True)]
        may = [
            {s for s in pair if all(family.reads(s) or not any(map(family.reads, pair)) for family in asked)}
            for pair in both
        ]
        if not all(may):
            refused(one, two)
            continue
        merged = merge([(one, 1.0), (two, 0.8)])
        assert len(merged.modules) == len(both)
        for written, allowed in zip(merged.spellings.values(), may, strict=True):
            assert written in allowed, (name, width)


def test_flux_attention_meets_behind_any_two_prefixes():
    """SD3 reads no bare name and ACE-Step no other, and none of their models is as wide."""
    for first, second in itertools.permutations(BEFORE_DIFFUSERS, 2):
        assert len(merge([(queries(first, 3072), 1.0), (queries(second, 3072), 1.0)]).modules) == 4
    # A width that no family is known to have tells nothing.
    refused(queries("", 24, "a"), queries("transformer.", 24, "b"))


@pytest.mark.parametrize("prefix", ["transformer.", "", "base_model.model.", "lycoris_"])
def test_the_models_own_names_are_its_own_whatever_stands_before_them(prefix):
    """HunyuanVideo's first trainers wrote `transformer.double_blocks`, PEFT writes its own prefix."""
    names = {name.replace(".", "_") if prefix.endswith("_") else name: shape for name, shape in OWN.items()}
    own, other = lora(OWN, "diffusion_model.", 1), lora(names, prefix, 2)
    merged = merge([(other, 1.0), (own, 0.8)])
    assert known(merged) == known(own)
    for name in OWN:
        spelled = prefix + (name.replace(".", "_") if prefix.endswith("_") else name)
        wanted = other.delta(next(m for m in other.modules if m.endswith(name.replace(".", "_")))) + 0.8 * own.delta(
            f"diffusion_model.{name}"
        )
        assert relative(merged.delta(f"diffusion_model.{name}"), wanted) < 1e-6, spelled


def test_slices_that_are_no_plain_lora_stay_slices():
    fused, part = "double_blocks.3.img_attn.qkv", "transformer_blocks.3.attn.to_q"
    own = lora(OWN, "diffusion_model.", 1)
    rest = {name: shape for name, shape in DIFFUSERS.items() if name != part}
    g = torch.Generator().manual_seed(0)
    diff = torch.randn(H, H, generator=g)
    other = lora(rest, "transformer.", 2, more={f"transformer.{part}.diff": diff})
    merged = merge([(own, 1.0), (other, 1.0)])
    name = f"lora_transformer_{part.replace('.', '_')}"
    assert merged.spellings[name] in (name, f"transformer.{part}")
    assert torch.equal(merged.delta(name), diff)
    expected = own.delta(f"diffusion_model.{fused}").clone()
    expected[H:] += torch.cat([other.delta(f"transformer.{p}") for p in PARTS[fused][1:]])
    assert relative(merged.delta(f"diffusion_model.{fused}"), expected) < 1e-6


def test_a_text_encoder_beside_it_changes_nothing():
    encoder = "lora_te1_text_model_encoder_layers_0_mlp_fc1"
    own = lora(OWN, "diffusion_model.", 1, more=kohya(encoder, *factors(6, 2, 5)))
    other = lora(DIFFUSERS, "transformer.", 2)
    text = Lora.from_state_dict(kohya(encoder, *factors(6, 2, 5, seed=9)))
    merged = merge([(own, 1.0), (text, 1.0), (other, 1.0)])
    assert relative(merged.delta(encoder), own.delta(encoder) + text.delta(encoder)) < 1e-6
    assert len(merged.modules) == len(OWN) + 1


def test_what_needs_no_translation_is_as_it_was():
    """Alone, with its like, or with nothing in common: every name stays as it came."""
    other = lora(DIFFUSERS, "transformer.", 2)
    assert known(merge([(other, 1.0)])) == known(merge([(other, 1.0), (other, 0.5)])) == known(other)
    apart = lora({"single_blocks.8.linear2": (H, 5 * H)}, "diffusion_model.", 1)
    assert known(merge([(other, 1.0), (apart, 1.0)])) == known(other) | known(apart)


# ---- what each family says


def canonical(spelled):
    return names.canonical(names.kohya_name(spelled), Layout())


@pytest.mark.parametrize("fused", [name for name, parts in PARTS.items() if len(parts) > 1])
@pytest.mark.parametrize("mlp", [0, 1, 4, 6])
def test_slices_fill_the_rows_of_a_fused_weight(fused, mlp):
    shape = (3 * H + mlp * H * ("linear1" in fused), H)
    parts = [part for part in PARTS[fused] if mlp or "mlp" not in part]
    own = canonical(f"diffusion_model.{fused}")
    found = [flux.FAMILY.rows(canonical(f"transformer.{part}"), own, shape) for part in parts]
    assert [rows.start for rows in found] == [0, *itertools.accumulate(rows.length for rows in found[:-1])]
    assert found[-1].start + found[-1].length == shape[0]
    assert flux.FAMILY.rows(canonical(f"transformer.{parts[0]}"), own, (2 * H, H)) is None
    assert flux.FAMILY.rows(canonical("transformer.transformer_blocks.4.attn.to_q"), own, shape) is None


@pytest.mark.parametrize(
    "prefix", ["transformer.", "lycoris_", "lora_transformer_", "", "lora_unet_", "base_model.model."]
)
def test_one_weight_has_one_name_whatever_stands_before_it(prefix):
    for own, parts in PARTS.items():
        for part in parts:
            spelled = part.replace(".", "_") if prefix.endswith("_") else part
            wanted = (
                f"lora_unet_{own.replace('.', '_')}"
                if len(parts) == 1
                else f"lora_transformer_{part.replace('.', '_')}"
            )
            assert flux.FAMILY.own(canonical(prefix + spelled)) == wanted
            assert flux.FAMILY.own(wanted) == wanted


def test_of_no_known_family_there_is_no_own_naming():
    one = Lora.from_state_dict(kohya("diffusion_model.stages.0.mixer.win", *factors(6, 2, 5)))
    for loras in ([one], [one, one]):
        assert in_own_naming(loras) is None


def test_stacked_slices_do_not_mix():
    g = torch.Generator().manual_seed(0)
    layers = [
        LoraLayer(torch.randn(3, r, generator=g), torch.randn(r, 5, generator=g), alpha)
        for r, alpha in ((2, 1.0), (1, -4.0))
    ]
    made = stacked([(Rows(6, 3), layers[0]), (Rows(0, 3), layers[1])], (9, 5))
    assert made.rank == 3
    wanted = torch.cat([layers[1].delta(), torch.zeros(3, 5), layers[0].delta()])
    torch.testing.assert_close(made.delta(), wanted)


@pytest.mark.parametrize("second", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("first", [torch.float16, torch.bfloat16, torch.float32])
def test_stacked_slices_have_their_own_dtype_where_it_holds_them(first, second):
    """A scale of 1/2 is exact in any of them, one of 0.3 in float32 alone."""
    for alpha, exact in ((1.0, True), (0.6, False)):
        layers = [LoraLayer(*factors(3, 2, 5, seed=n, dtype=dtype), alpha) for n, dtype in enumerate((first, second))]
        made = stacked([(Rows(0, 3), layers[0]), (Rows(3, 3), layers[1])], (6, 5))
        wanted = first if exact and first == second else torch.float32
        assert {made.up.dtype, made.down.dtype} == {wanted}
        assert torch.equal(made.delta(), torch.cat([layer.delta() for layer in layers])) or not exact
        assert relative(made.delta(), torch.cat([layer.delta() for layer in layers])) < 1e-6


RECOGNISED = {
    "text encoder": ["lora_te1_text_model_encoder_layers_0_mlp_fc1"],
    "Stable Diffusion UNet": ["lora_unet_input_blocks_1_1_proj_in"],
    "Flux": ["lora_unet_double_blocks_0_img_mod_lin", "lora_unet_img_in"],
    "Flux 2": ["lora_unet_double_blocks_0_img_attn_proj", "lora_unet_double_stream_modulation_img_lin"],
    "Chroma": ["lora_unet_double_blocks_0_img_attn_proj", "lora_unet_distilled_guidance_layer_layers_0_in_layer"],
    "HunyuanVideo": ["lora_unet_double_blocks_0_img_attn_proj", "lora_unet_img_in_proj"],
    "Qwen-Image": ["lora_unet_transformer_blocks_0_img_mlp_net_2"],
    "Z-Image": ["lora_unet_layers_0_attention_to_q"],
    "Lumina 2": ["lora_transformer_layers_0_norm1_linear", "lora_unet_layers_0_attention_qkv"],
    "Wan": ["lora_unet_blocks_0_self_attn_o"],
    "Stable Diffusion 3": ["lora_unet_joint_blocks_0_x_block_attn_qkv"],
    "LTX": ["lora_unet_transformer_blocks_0_attn1_to_q", "lora_unet_patchify_proj"],
    "HiDream": ["lora_unet_double_stream_blocks_0_block_attn1_to_q"],
    "Cosmos Predict 2": ["lora_unet_blocks_0_self_attn_q_proj"],
    "Krea 2": ["lora_unet_blocks_0_attn_wq"],
    "AuraFlow": ["lora_unet_double_layers_0_attn_w1q"],
    "PixArt": ["lora_unet_blocks_0_cross_attn_kv_linear"],
    "OmniGen 2": ["lora_unet_layers_0_attn_to_q"],
    "Kandinsky 5": ["lora_unet_visual_transformer_blocks_0_self_attention_to_query"],
    "Ernie-Image": ["lora_unet_layers_0_self_attention_to_q"],
    "Hunyuan-DiT": ["lora_unet_blocks_0_attn1_Wqkv"],
    "ACE-Step": ["lora_unet_transformer_blocks_0_ff_point_conv_conv"],
    "ACE-Step 1.5": ["lora_unet_decoder_layers_0_self_attn_q_proj"],
}


@pytest.mark.parametrize("family", FAMILIES, ids=lambda family: family.name)
def test_a_family_recognises_its_own_names_and_no_others(family):
    """And answers None to all other names, so that the next one is asked."""
    for name, modules in RECOGNISED.items():
        assert family.recognises(modules) is (name == family.name)
    strange = "lora_unet_stages_0_mixer_win"
    for said in (family.canonical, family.place, family.twin):
        assert said(strange, Layout()) is None
    for said in (family.path, family.own, family.kernel, family.dots, family.slice_name):
        assert said(strange) is None
    assert family.fused(strange) == frozenset()
    assert family.parts(strange, (6, 6)) == ()
    assert family.tidy({strange: strange}) == {strange: strange}
    assert family.recognises([]) is False


def test_loras_of_two_families_have_none_in_common():
    assert family_of([]) is None
    assert family_of([RECOGNISED["Flux"], RECOGNISED["Stable Diffusion UNet"]]) is None
    assert family_of([RECOGNISED["Flux"], RECOGNISED["HunyuanVideo"]]) is None
    assert family_of([RECOGNISED["Flux"], RECOGNISED["Flux"]]) is flux.FAMILY


def test_a_unets_modules_are_no_transformers():
    """Ernie-Image has a timestep embedding of the same name, in diffusers' spelling."""
    one = Lora.from_state_dict(kohya("diffusion_model.time_embed.0", *factors(6, 2, 5)))
    assert known(merge([(one, 1.0)])) == known(one) == {"lora_unet_time_embed_0"}
    assert family_of([one.modules]) is None


def test_a_name_that_unets_have_too_is_a_transformers_beside_its_own():
    """Ernie-Image's timestep embedding. A LoRA of such names alone may be for either, whatever the others are for."""
    shared, own = {"lora_unet_time_embedding_linear_1": (16, 8)}, {"lora_unet_layers_0_mlp_up_proj": (32, 8)}
    assert family_by_shapes(shared | own).name == family_of([shared | own]).name == "Ernie-Image"
    assert family_by_shapes(shared) is None
    for loras in ([shared], [shared, own], [own, shared | own, shared]):
        assert family_of(loras) is None


def test_names_that_mean_other_weights_in_other_families_tell_none():
    """A whole weight in Cosmos Predict 2, a slice in PixArt, ComfyUI's own name in LTX."""
    assert family_of([["lora_transformer_transformer_blocks_0_attn1_to_q"]]) is None
    assert family_of([["lora_transformer_transformer_blocks_0_attn1_to_q"], RECOGNISED["PixArt"]]).name == "PixArt"
    assert family_of([["lora_transformer_transformer_blocks_0_attn1_to_q", "lora_unet_patchify_proj"]]).name == "LTX"


def test_models_of_like_names_are_told_by_their_shapes():
    """Flux 1 and 2 have one name for linear1; diffusers has slices of the one and the whole of the other."""
    for rows, columns, wanted in ((7 * H, H, flux.FAMILY), (9 * H, H, flux.FLUX_2)):
        found = family_by_shapes({"lora_unet_single_blocks_0_linear1": (rows, columns)})
        assert found.parts("lora_unet_single_blocks_0_linear1", (rows, columns)) == wanted.parts(
            "lora_unet_single_blocks_0_linear1", (rows, columns)
        )
        assert len(found.parts("lora_unet_single_blocks_0_linear1", (rows, columns))) == (4 if rows == 7 * H else 1)
    assert family_by_shapes({"lora_unet_single_blocks_0_linear2": (H, 4 * H)}).name == "Flux 2"
    assert family_by_shapes({"lora_unet_stages_0_mixer_win": (H, H)}) is None


def test_names_of_two_families_are_told_by_the_columns_of_attention():
    """Grouped attention of Lumina 2, 2304 wide, and of OmniGen 2, 2520: to_k has a third of the rows, and all columns."""

    def slices(width):
        return {f"lora_transformer_layers_0_attn_{x}": (width // n, width) for x, n in (("to_q", 1), ("to_k", 3))}

    assert family_of([slices(2304)]) is None
    for width, name in ((2304, "Lumina 2"), (2520, "OmniGen 2")):
        assert family_by_width([slices(width)]).name == family_by_width([slices(width)] * 2).name == name
    assert family_by_width([slices(2304), slices(2520)]) is None
    assert family_by_width([slices(2400)]) is None
    assert family_by_width([]) is None


@pytest.mark.parametrize(("own", "theirs", "depth"), [("double_blocks.{}.img_attn.proj", "transformer_blocks.{}.attn.to_out.0", 54),
                                                      ("single_blocks.{}.linear2", "single_transformer_blocks.{}.proj_out", 40)])  # fmt: skip
def test_hunyuan_video_has_fluxs_blocks_and_more_of_them_and_comfyui_reads_none_of_diffusers_names(own, theirs, depth):
    """54 double blocks are HunyuanVideo 1.5's, 40 single ones HunyuanVideo 1's."""
    family = hunyuan_video.FAMILY
    for spelled in (f"diffusion_model.{own}", f"transformer.{theirs}"):
        assert [family.recognises([canonical(spelled.format(number))]) for number in (0, depth - 1, depth)] == [
            True,
            True,
            False,
        ]
    assert family.reads(f"diffusion_model.{own.format(0)}")
    for name in (theirs, "transformer_blocks.{}.attn.to_q", "single_transformer_blocks.{}.proj_mlp"):
        assert not any(family.reads(f"{prefix}{name.format(0)}") for prefix in ("transformer.", "diffusion_model.", ""))
        assert family.slice_name(canonical(f"transformer.{name.format(0)}")) is None


TENCENTS = {
    "double_blocks.20.img_attn.qkv": "double_blocks.20.img_attn_qkv",
    "double_blocks.20.txt_attn.qkv": "double_blocks.20.txt_attn_qkv",
    "double_blocks.20.img_attn.proj": "double_blocks.20.img_attn_proj",
    "double_blocks.20.txt_mlp.0": "double_blocks.20.txt_mlp.fc1",
    "double_blocks.20.img_mlp.2": "double_blocks.20.img_mlp.fc2",
    "double_blocks.20.txt_mod.lin": "double_blocks.20.txt_mod.linear",
    "single_blocks.20.linear1": "single_blocks.20.linear1",
    "single_blocks.20.linear2": "single_blocks.20.linear2",
    "single_blocks.20.modulation.lin": "single_blocks.20.modulation.linear",
}
# Names that ComfyUI and diffusers have each for itself.
APART = ["double_blocks.20.img_attn.norm.query_norm", "single_blocks.20.norm.key_norm", "img_in.proj", "final_layer.linear",
         "txt_in.individual_token_refiner.blocks.0.mlp.0", "time_in.in_layer"]  # fmt: skip


def test_what_comfyui_and_diffusers_both_read_of_hunyuan_video_are_tencents_names_of_blocks():
    family = hunyuan_video.FAMILY
    for own, both in (TENCENTS | dict.fromkeys(APART)).items():
        assert family.common(canonical(f"diffusion_model.{own}")) == both
        # diffusers knows by the picture's attention whose names these are.
        assert both is None or family.tells_diffusers(both) == both.endswith("img_attn_qkv")
    assert family.common("lora_unet_strange") is None
    assert family.common("lora_unet_x_double_blocks_20_img_attn_qkv") is None


@pytest.mark.parametrize("more", [*APART[3:], None])
@pytest.mark.parametrize("without", [None, "double_blocks.20.img_attn.qkv", "single_blocks.20.linear1"])
def test_a_lora_for_hunyuan_video_is_written_so_that_both_read_it_where_all_of_it_can_be(more, without):
    names = [own for own in (*TENCENTS, more) if own not in (without, None)]
    shapes = {"mlp.0": (4 * H, H), "mlp.2": (H, 4 * H), "linear1": (7 * H, H), "linear2": (H, 5 * H)}
    one = lora(
        {own: next((s for end, s in shapes.items() if own.endswith(end)), (H, H)) for own in names}, "diffusion_model."
    )
    written, format = named_for(one, "auto")
    both = more is None and without != "double_blocks.20.img_attn.qkv"
    assert format == "comfy"
    assert {*written.spellings.values()} == {f"diffusion_model.{TENCENTS[own] if both else own}" for own in names}


def test_a_slice_of_hunyuan_video_tells_the_whole_since_its_mlp_is_four_widths():
    for part, rows in (("attn.to_v", H), ("proj_mlp", 4 * H)):
        slices = {canonical(f"transformer.single_transformer_blocks.3.{part}"): (rows, H)}
        assert hunyuan_video.FAMILY.whole_shape("lora_unet_single_blocks_3_linear1", slices) == (7 * H, H)


def test_biases_of_slices_stand_in_their_rows_of_the_fused_bias():
    """A bias has rows and no columns."""
    name = "transformer.single_transformer_blocks.3"
    g = torch.Generator().manual_seed(0)
    # The first is what tells it from Flux.
    state, biases = kohya("transformer.x_embedder.proj", *factors(H, 2, 4, seed=6)), {}
    for number, (part, rows) in enumerate((("attn.to_q", H), ("attn.to_v", H), ("proj_mlp", 4 * H))):
        biases[part] = torch.randn(rows, generator=g)
        state |= kohya(f"{name}.{part}", *factors(rows, 2, H, seed=number))
        state[f"{name}.{part}.diff_b"] = biases[part]
    merged = merge([(Lora.from_state_dict(state), 1.0)])
    whole = merged.find("diffusion_model.single_blocks.3.linear1")
    wanted = torch.cat([biases["attn.to_q"], torch.zeros(H), biases["attn.to_v"], biases["proj_mlp"]])
    assert {key: diff.tolist() for key, diff in merged.diffs.items()} == {(whole, "diff_b"): wanted.tolist()}
    assert {*merged.modules} == {whole, merged.find("diffusion_model.img_in.proj")}


@pytest.mark.parametrize("dtypes", [(torch.float16,) * 2, (torch.bfloat16,) * 2, (torch.float16, torch.float32)])
@pytest.mark.parametrize("part", ["diff", "diff_b"])
def test_differences_of_slices_stand_in_their_rows_in_the_dtype_that_all_have(part, dtypes):
    name, g = "transformer.single_transformer_blocks.39.attn.to_{}".format, torch.Generator().manual_seed(0)
    state = kohya("transformer.x_embedder.proj", *factors(H, 2, 4))
    wanted = torch.zeros(7 * H, H) if part == "diff" else torch.zeros(7 * H)
    for x, start, dtype in zip("qv", (0, 2 * H), dtypes, strict=True):
        own = torch.randn(wanted[:H].shape, generator=g).to(dtype)
        state[f"{name(x)}.{part}"] = own
        wanted[start : start + H] = own
        if part == "diff_b":
            state |= kohya(name(x), *factors(H, 2, H, seed=start))
    (named,) = in_own_naming([Lora.from_state_dict(state)])
    found = named.diffs["lora_unet_single_blocks_39_linear1", part]
    assert found.dtype == (dtypes[0] if len({*dtypes}) == 1 else torch.float32)
    assert torch.equal(found.float(), wanted)


# ---- the way back


@pytest.mark.parametrize("own", [name for name in OWN if len(PARTS[name]) > 1 or "linear1" not in name])
def test_a_weight_split_into_diffusers_parts_is_the_same_update(own):
    g = torch.Generator().manual_seed(0)
    layer = LoraLayer(torch.randn(OWN[own][0], 3, generator=g), torch.randn(3, OWN[own][1], generator=g), 1.5)
    found = split(layer, flux.FAMILY.parts(canonical(f"diffusion_model.{own}"), layer.shape))
    assert [*found] == PARTS[own]
    assert torch.equal(torch.cat([part.delta() for part in found.values()]), layer.delta())
    assert {part.rank for part in found.values()} == {3}
    assert flux.FAMILY.dots(canonical(f"lora_unet_{own.replace('.', '_')}")) == own


def test_a_weight_whose_halves_are_turned_is_turned_both_ways():
    layer = LoraLayer(torch.arange(12.0).reshape(6, 2), torch.eye(2))
    own = "lora_unet_final_layer_adaLN_modulation_1"
    ((name, part),) = split(layer, flux.FAMILY.parts(own, layer.shape)).items()
    assert name == "norm_out.linear"
    assert torch.equal(part.delta(), torch.cat([layer.delta()[3:], layer.delta()[:3]]))
    assert flux.FAMILY.turn(canonical(f"transformer.{name}"), layer.shape) == own
    assert torch.equal(turned(part.up), layer.up)


@pytest.mark.parametrize(("rows", "slices"), [((2304, 768, 768), 3840), ((768, 768, 768), 2304)])
def test_grouped_attention_is_told_by_its_shape(rows, slices):
    """Lumina 2: 2304 rows of queries and 768 of keys and of values; with as many of each it is Z-Image's."""
    width, whole = rows[0], "lora_unet_layers_0_attention_qkv"
    for family, part in ((z_image.LUMINA_2, "attn.to_"), (z_image.Z_IMAGE, "attention.to_")):
        parts = [canonical(f"transformer.layers.0.{part}{x}") for x in "qkv"]
        found = [family.rows(part, whole, (slices, width)) for part in parts]
        assert [(one.start, one.length) for one in found] == [
            *zip(itertools.accumulate((0, *rows)), rows, strict=False)
        ]
        assert family.whole_shape(whole, {parts[1]: (rows[1], width)}) == (slices, width)
        assert family.whole_shape(whole, {parts[0]: (rows[0], width)}) is None


def test_a_file_of_slices_that_comfyui_has_no_name_for_is_written_whole():
    """diffusers' HunyuanVideo and Lumina 2, alone: what is not named is as it was."""
    state = {}
    for part in ("to_q", "to_v"):
        state |= kohya(f"transformer.single_transformer_blocks.39.attn.{part}", *factors(H, 2, H, seed=len(part)))
    state |= kohya("transformer.transformer_blocks.19.attn.to_out.0", *factors(H, 2, H, seed=5))
    state |= kohya("transformer.x_embedder.proj", *factors(H, 2, 4, seed=6))
    one = Lora.from_state_dict(state)
    merged = merge([(one, 1.0)])
    assert known(merged) == {
        f"diffusion_model.{name}"
        for name in ("single_blocks.39.linear1", "double_blocks.19.img_attn.proj", "img_in.proj")
    }
    delta = merged.delta("diffusion_model.single_blocks.39.linear1")
    assert delta.shape == (7 * H, H)
    for number, part in enumerate(("to_q", "to_k", "to_v")):
        name = f"transformer.single_transformer_blocks.39.attn.{part}"
        wanted = one.delta(name) if part != "to_k" else torch.zeros(H, H)
        torch.testing.assert_close(delta[number * H : (number + 1) * H], wanted)
    assert not delta[3 * H :].any()


# ---- what the namings say of blocks, widths, halves and DoRA


@pytest.mark.parametrize(
    ("family", "module", "depth"),
    [
        ("Flux", "double_blocks_{}_img_attn_proj", 19),
        ("Flux 2", "double_blocks_{}_img_attn_proj", 8),
        ("Flux 2", "single_blocks_{}_linear2", 48),
        ("HunyuanVideo", "double_blocks_{}_img_attn_proj", 54),
        ("Qwen-Image", "transformer_blocks_{}_img_mlp_net_2", 60),
        ("Stable Diffusion 3", "joint_blocks_{}_x_block_attn_qkv", 38),
    ],
)
def test_a_block_beyond_the_last_one_is_not_of_the_family(family, module, depth):
    """depth: of the deepest model of the family, as published."""
    (named,) = (one for one in FAMILIES if one.name == family)
    known = [named.recognises([f"lora_unet_{module.format(number)}"]) for number in (0, depth - 1, depth, 10 * depth)]
    assert known == [True, True, False, False]


def test_a_width_tells_the_family_of_loras_that_all_have_it():
    def attention(width):
        # What does not read the stream has other columns.
        return {"lora_transformer_layers_0_feed_forward_linear_2": (width, 4 * width)} | {
            f"lora_transformer_layers_0_attn_to_{x}": (rows, width) for x, rows in (("q", width), ("k", width // 3))
        }

    assert family_by_width([attention(2304), attention(2304)]).name == "Lumina 2"
    assert family_by_width([attention(2520)]).name == "OmniGen 2"
    assert family_by_width([attention(2304), attention(999)]) is None
    assert family_by_width([attention(2304), attention(2520)]) is None
    assert family_by_width([attention(999)]) is family_by_width([]) is None


@pytest.mark.parametrize("kind", [*kinds.ADDITIVE, *kinds.CARRIED])
def test_only_plain_factors_and_differences_have_rows_that_can_change_places(kind):
    kernel = (3, 3) if kind in kinds.ADDITIVE and kinds.ADDITIVE[kind][1] else ()
    state = kinds.state_dict(kind, "m", kernel=kernel)
    assert can_turn(Lora.from_state_dict(state), "m") is (kind == "LoRA")
    assert can_turn(Lora.from_state_dict(state | {"x.diff_b": torch.ones(8)}), "x")


def test_halves_that_diffusers_has_the_other_way_about_come_into_their_own_order():
    name, own = "transformer.norm_out.linear", "lora_unet_final_layer_adaLN_modulation_1"
    rest = lora(DIFFUSERS, "transformer.").to_state_dict()
    bias = torch.arange(2.0 * H)
    for state in (kohya(name, *factors(2 * H, 2, H)), {f"{name}.diff": torch.arange(2.0 * H * H).reshape(2 * H, H)}):
        one = Lora.from_state_dict(rest | state | {f"{name}.diff_b": bias})
        (named,) = in_own_naming([one])
        assert torch.equal(named.delta(own), turned(one.delta(name)))
        assert torch.equal(named.diffs[own, "diff_b"], turned(bias))


@pytest.mark.parametrize(("slices", "scale"), [("qkv", "rows"), ("qk", "rows"), ("qkv", "columns"), ("qkv", "flat")])
def test_dora_of_slices_is_one_of_the_whole_weight_where_every_row_has_its_scale(slices, scale):
    """Of HunyuanVideo, whose slices ComfyUI has no names for. A row's norm is its own, whatever other rows there are."""
    name, whole = "transformer.transformer_blocks.19.attn.to_{}".format, "lora_unet_double_blocks_19_img_attn_qkv"
    state = kohya("transformer.x_embedder.proj", *factors(H, 2, 4))
    state |= kohya("transformer.single_transformer_blocks.39.proj_out", *factors(H, 2, 5 * H))
    scales = {x: 1.0 + torch.rand(H, generator=torch.Generator().manual_seed(ord(x))) for x in slices}
    shape = {"rows": (H, 1), "columns": (1, H), "flat": (H,)}[scale]
    for x in slices:
        state |= kohya(name(x), *factors(H, 2, H, seed=ord(x)), alpha=1)
        state[f"{name(x)}.dora_scale"] = scales[x].reshape(shape)
    (named,) = in_own_naming([Lora.from_state_dict(state)])
    if (slices, scale) != ("qkv", "rows"):
        assert named.carried.keys() == {f"lora_{name(x).replace('.', '_')}" for x in slices}
        return
    ((module, found),) = named.carried.items()
    assert (module, found.kind, found.shape, found.alpha) == (whole, "DoRA", (3 * H, H), None)
    wanted = torch.cat([0.5 * up @ down for up, down in (factors(H, 2, H, seed=ord(x)) for x in slices)])
    torch.testing.assert_close(found.parts["up"] @ found.parts["down"], wanted)
    assert torch.equal(found.parts["dora_scale"], torch.cat([*scales.values()])[:, None])


@pytest.mark.parametrize("alpha", [None, 1.5])
def test_a_part_of_zeros_and_one_with_a_core_stay_layers_of_the_same_update(alpha):
    """Ranks that a part does not use are left out of it; one is a layer with none, and a core goes with all of them."""
    g = torch.Generator().manual_seed(0)
    up, down = torch.randn(6, 3, generator=g), torch.randn(3, 5, generator=g)
    up[:3] = 0
    up[3:, 1] = 0
    parts = [(name, (Rows(3 * number, 3),)) for number, name in enumerate(("none", "some"))]
    found = split(LoraLayer(up, down, alpha), parts)
    assert [layer.rank for layer in found.values()] == [3, 2]
    torch.testing.assert_close(
        torch.cat([layer.delta() for layer in found.values()]), LoraLayer(up, down, alpha).delta()
    )
    mid = torch.randn(3, 3, 2, 2, generator=g)
    tucker = LoraLayer(up[..., None, None], down[..., None, None], alpha, mid)
    found = split(tucker, parts)
    assert [layer.rank for layer in found.values()] == [3, 3]
    torch.testing.assert_close(torch.cat([layer.delta() for layer in found.values()]), tucker.delta())


def test_where_one_name_is_not_read_all_are_written_anew():
    """Z-Image: musubi's `lora_unet_` names are read by nothing but LCM Kit."""
    bodies = [f"layers.{n}.attention.to_{part}" for n in range(4) for part in "qk"]
    read = {canonical(f"transformer.{body}"): f"transformer.{body}" for body in bodies}
    musubi = {canonical(f"transformer.{body}"): f"lora_unet_{body.replace('.', '_')}" for body in bodies[2:5]}
    family = family_of([read])
    assert [all(map(family.reads, spelled.values())) for spelled in (read, musubi)] == [True, False]
    assert readable(read) == read
    anew = readable(read | musubi)
    assert anew.keys() == read.keys()
    assert all(name.startswith("diffusion_model.") and family.reads(name) for name in anew.values())
