"""One weight under two names: what is seen from the names alone, without any model."""

import pytest
import torch

from lcm_kit.lora_merge import Lora, merge, merge_with_account
from lcm_kit.lora_merge.comparing.compare import compare
from lcm_kit.lora_merge.comparing.report import as_text
from lcm_kit.lora_merge.files.twice import Named, slices
from lcm_kit.lora_merge.merging.align import unify
from lcm_kit.lora_merge.merging.report import warnings_of
from lcm_kit.lora_merge.naming import aliases
from lcm_kit.lora_merge.naming.encoders import aligned
from lcm_kit.tests.lora_merge import kinds
from lcm_kit.tests.lora_merge.make import factors, kohya, relative


def one(name, out=6, inputs=5, seed=0, source=None):
    return Lora.from_state_dict(kohya(name, *factors(out, 2, inputs, seed=seed)), source=source or name)


def refused(*loras):
    with pytest.raises(ValueError, match="a loader would use only one of the two updates") as error:
        merge([(lora, 1.0) for lora in loras])
    return str(error.value)


SAME = [
    # prefixes
    ("blocks.3.attn.foo", "transformer.blocks.3.attn.foo"),
    ("blocks.3.attn.foo", "diffusion_model.blocks.3.attn.foo"),
    ("lora_unet_blocks_3_attn_foo", "lycoris_blocks_3_attn_foo"),
    ("diffusion_model.blocks.3.attn.foo", "base_model.model.blocks.3.attn.foo"),
    ("diffusion_model.decoder.layers.3.q_proj", "base_model.model.layers.3.q_proj"),
    ("model.diffusion_model.blocks.3.attn.foo", "lora_transformer_blocks_3_attn_foo"),
    ("lora_prior_unet_down_blocks_1_3_mapper", "diffusion_model.down_blocks.1.3.mapper"),
    # one naming's blocks and the other's
    ("lora_unet_double_blocks_7_txt_mlp_0", "transformer.transformer_blocks.7.ff_context.net.0.proj"),
    ("transformer.transformer_blocks.7.ff.linear_in", "transformer.transformer_blocks.7.ff.net.0.proj"),
    ("lora_unet_final_layer_linear", "transformer.proj_out"),
    # text encoders
    ("lora_te3_encoder_block_0_layer_0_SelfAttention_q", "lora_te2_encoder_block_0_layer_0_SelfAttention_q"),
    ("lora_te_text_model_encoder_layers_0_mlp_fc1", "text_encoders.clip_g.transformer.text_model.encoder.layers.0.mlp.fc1"),
]  # fmt: skip


@pytest.mark.parametrize("swap", [False, True])
@pytest.mark.parametrize("pair", SAME)
def test_two_names_of_one_weight_are_refused_and_both_are_named(pair, swap):
    first, second = pair[::-1] if swap else pair
    message = refused(one(first, source="a.safetensors"), one(second, source="b.safetensors", seed=1))
    assert "a.safetensors and b.safetensors spell their modules differently" in message
    assert f"{first} (a.safetensors)" in message
    assert f"{second} (b.safetensors)" in message
    state = kohya(first, *factors(6, 2, 5)) | kohya(second, *factors(6, 2, 5))
    with pytest.raises(
        ValueError, match=r"style: .*two spellings of one weight, and a loader would use only one"
    ) as error:
        Lora.from_state_dict(state, source="style")
    assert first in str(error.value)
    assert second in str(error.value)


# Of families that the names of the two tell.
MEETING = [
    ("lora_unet_single_blocks_7_modulation_lin", "lora_transformer_single_transformer_blocks_7_norm_linear"),
    ("diffusion_model.joint_blocks.7.context_block.attn.proj", "transformer.transformer_blocks.7.attn.to_add_out"),
    ("diffusion_model.blocks.7.cross_attn.k_img", "transformer.blocks.7.attn2.add_k_proj"),
    ("diffusion_model.blocks.7.self_attn.q_proj", "transformer_blocks.7.attn1.to_q"),
    ("diffusion_model.layers.7.feed_forward.w2", "transformer.layers.7.feed_forward.linear_2"),
    ("diffusion_model.layers.7.attention.out", "lora_unet_layers_7_attention_to_out_0"),
    ("lora_unet_transformer_blocks_7_img_mlp_net_2", "transformer_blocks.7.img_mlp.net.2"),
    ("transformer.double_stream_blocks.7.block.attn1.to_q", "lycoris_double_stream_blocks_7_block_attn1_to_q"),
    ("transformer.double_blocks.7.img_attn_proj", "diffusion_model.double_blocks.7.img_attn.proj"),
]  # fmt: skip


@pytest.mark.parametrize("swap", [False, True])
@pytest.mark.parametrize("pair", MEETING)
def test_two_names_of_one_weight_meet_where_the_family_is_known(pair, swap):
    loras = [one(name, seed=seed) for seed, name in enumerate(pair[::-1] if swap else pair)]
    merged = merge([(lora, strength) for lora, strength in zip(loras, (1.0, 0.8), strict=True)])
    (name,) = merged.modules
    first, second = (lora.delta(next(iter(lora.modules))) for lora in loras)
    assert relative(merged.delta(name), first + 0.8 * second) < 1e-6
    with pytest.raises(ValueError, match="two spellings of one"):
        Lora.from_state_dict(kohya(pair[0], *factors(6, 2, 5)) | kohya(pair[1], *factors(6, 2, 5)))


ENCODERS = [
    ("lora_te2_encoder_block_0_layer_0_SelfAttention_q", "text_encoders.t5xxl.transformer.encoder.block.0.layer.0.SelfAttention.q"),
    ("lora_te_layers_0_self_attn_q_proj", "text_encoders.qwen3_06b.transformer.model.layers.0.self_attn.q_proj"),
    ("text_encoders.transformer.model.layers.0.mlp.up_proj", "text_encoders.llama.transformer.model.layers.0.mlp.up_proj"),
    ("lora_te1_encoder_layer_0_attention_self_query", "text_encoders.hydit_clip.transformer.bert.encoder.layer.0.attention.self.query"),
]  # fmt: skip


@pytest.mark.parametrize("swap", [False, True])
@pytest.mark.parametrize(("first", "second"), ENCODERS)
def test_a_text_encoder_by_number_and_by_word_is_one(first, second, swap):
    """Written by ComfyUI's word, which every version reads."""
    pair = (second, first) if swap else (first, second)
    loras = [one(name, seed=seed) for seed, name in enumerate(pair)]
    merged = merge([(lora, strength) for lora, strength in zip(loras, (1.0, 0.8), strict=True)])
    assert list(merged.spellings.values()) == [second]
    assert relative(merged.delta(second), loras[0].delta(pair[0]) + 0.8 * loras[1].delta(pair[1])) < 1e-6


def test_a_word_beside_two_numbers_tells_nothing():
    body = "encoder_block_0_layer_0_SelfAttention_q"
    names = (
        f"lora_te2_{body}",
        f"lora_te3_{body}",
        "text_encoders.t5xxl.transformer.encoder.block.0.layer.0.SelfAttention.q",
    )
    assert "two spellings of one weight" in refused(*(one(name) for name in names))
    assert "two spellings of one weight" in refused(*(one(name) for name in names[:2]))
    assert not aligned(names)
    assert not aligned(names[:2])


@pytest.mark.parametrize("number", ["lora_te2_", "lora_te_"])
def test_two_words_are_two_encoders_and_a_number_beside_them_is_of_neither(number):
    body = "encoder.block.0.layer.0.SelfAttention.q"
    words = [f"text_encoders.{word}.transformer.{body}" for word in ("t5xxl", "umt5xxl")]
    other = number + body.replace(".", "_")
    assert not aligned(words)
    assert not aligned([*words, other])
    for word in words:
        assert aligned([other, word]) == {other: word, word: word}


# Of modules that several families call so, and how many of the two spellings ComfyUI reads in each of them.
IN_ALL = [
    ("transformer.transformer_blocks.7.attn.to_add_out", "transformer_blocks.7.attn.to_add_out", 1),
    ("lycoris_transformer_blocks_7_attn_to_add_out", "transformer_blocks.7.attn.to_add_out", 1),
    ("transformer.transformer_blocks.7.attn.to_add_out", "lycoris_transformer_blocks_7_attn_to_add_out", 2),
]


@pytest.mark.parametrize("swap", [False, True])
@pytest.mark.parametrize(("first", "second", "read"), IN_ALL)
def test_names_that_differ_by_prefix_meet_where_one_is_read_in_every_family(first, second, read, swap):
    pair = (second, first) if swap else (first, second)
    loras = [one(name, seed=seed) for seed, name in enumerate(pair)]
    merged = merge([(lora, strength) for lora, strength in zip(loras, (1.0, 0.8), strict=True)])
    assert list(merged.spellings.values()) == [first if read == 1 else pair[0]]
    total = loras[0].delta(pair[0]) + 0.8 * loras[1].delta(pair[1])
    assert relative(merged.delta(first), total) < 1e-6


OTHERS = [
    ("lora_unet_double_blocks_7_img_attn_proj", "transformer.transformer_blocks.7.attn.to_add_out"),
    ("lora_unet_double_blocks_7_img_attn_proj", "transformer.transformer_blocks.8.attn.to_out.0"),
    ("lora_unet_double_blocks_7_img_attn_proj", "transformer.single_transformer_blocks.7.proj_out"),
    ("lora_unet_double_blocks_7_img_attn_proj", "lora_te1_text_model_encoder_layers_7_mlp_fc1"),
    ("transformer_blocks.7.attn.to_q", "diffusion_model.transformer_blocks.7.attn.to_k"),
    ("lora_te1_text_model_encoder_layers_0_mlp_fc1", "lora_te2_text_model_encoder_layers_0_mlp_fc1"),
    ("lora_te1_text_model_encoder_layers_0_mlp_fc1", "text_encoders.clip_g.transformer.text_model.encoder.layers.0.mlp.fc1"),
    ("text_encoders.t5xxl.transformer.shared", "text_encoders.umt5xxl.transformer.shared"),
    ("lora_unet_input_blocks_1_1_proj_in", "transformer.transformer_blocks.7.attn.to_q"),
]  # fmt: skip


@pytest.mark.parametrize("pair", OTHERS)
def test_names_of_two_weights_are_merged(pair):
    loras = [one(name, seed=seed) for seed, name in enumerate(pair)]
    merged = merge([(lora, 1.0) for lora in loras])
    assert len(merged.modules) == 2
    for lora in loras:
        name = next(iter(lora.modules))
        assert relative(merged.delta(name), lora.delta(name)) < 1e-6
    assert len(Lora.from_state_dict(merged.to_state_dict()).modules) == 2


@pytest.mark.parametrize(
    ("values", "meet"), [((6,), True), ((30,), True), ((7,), False), ((5,), False), ((6, 5), True), ((5, 6), False)]
)
@pytest.mark.parametrize("swap", [False, True])
def test_a_vector_may_be_of_a_matrix_by_its_rows_or_by_all_its_values(values, meet, swap):
    """Names of two kinds of which nothing is known: whether they can be one weight is told by the shapes alone."""
    odd = one("diffusion_model.stages.0.mixer.win", 6, 5)
    vector = Lora.from_state_dict({"transformer.decoder_stack.0.gate.w.diff": torch.ones(values)}, source="other")
    pair = (vector, odd) if swap else (odd, vector)
    if meet:
        assert "nothing here tells whether they are of one weight" in refused(*pair)
    else:
        assert len(merge([(lora, 1.0) for lora in pair]).spellings) == 2


def test_names_of_one_weight_whose_shapes_differ_are_of_two_models():
    pair = one("lora_unet_double_blocks_7_img_attn_proj"), one("transformer.transformer_blocks.7.attn.to_out.0", out=8)
    assert len(merge([(lora, 1.0) for lora in pair]).modules) == 2


def test_the_unet_and_text_encoders_of_two_files_are_merged():
    """Also where every file has a naming of its own."""
    names = "diffusion_model.blocks.0.ffn.0", "text_encoders.umt5xxl.transformer.shared", "bundle_emb.hat.clip_l"
    loras = [one(name) for name in names[:2]]
    loras.append(Lora.from_state_dict({names[2]: torch.ones(2, 4)}))
    assert len(merge([(lora, 1.0) for lora in loras]).spellings) == 3


@pytest.mark.parametrize(("first", "second"), [("diff_b", "bias.diff"), ("lora_up.weight", None)])
def test_a_bias_is_a_weight_of_its_own(first, second):
    name = "diffusion_model.double_blocks.0.img_attn.proj"
    lora = Lora.from_state_dict(
        {f"lora_unet_double_blocks_0_img_attn_proj.{'diff_b' if second else 'diff'}": torch.ones(6)}
    )
    other = Lora.from_state_dict({f"{name}.bias.diff": torch.ones(6)})
    if second:
        assert f"{name}.bias" in refused(lora, other)
    else:
        assert len(merge([(lora, 1.0), (other, 1.0)]).diffs) == 2


def test_prefixes_of_which_one_family_reads_one_and_one_the_other_are_refused():
    """SD3's slice is read behind `transformer.`, ACE-Step's own name without."""
    pair = "transformer_blocks.7.attn.to_q", "transformer.transformer_blocks.7.attn.to_q"
    assert "two spellings of one weight" in refused(*(one(name) for name in pair))


def test_namings_of_which_nothing_is_known_are_refused_unless_they_are_one():
    odd, other = one("diffusion_model.stages.0.mixer.win"), one("transformer.decoder_stack.0.gate.w")
    assert "nothing here tells whether they are of one weight" in refused(odd, other)
    # The same naming behind two prefixes: bodies are compared letter by letter.
    more = Lora.from_state_dict(
        kohya("transformer.stages.1.mixer.win", *factors(6, 2, 5))
        | kohya("transformer.stages.1.mixer.out", *factors(6, 2, 5))
    )
    assert len(merge([(odd, 1.0), (more, 1.0)]).modules) == 3
    # No two shapes can be of one weight.
    assert len(merge([(odd, 1.0), (one("transformer.decoder_stack.0.gate.w", out=7), 1.0)]).modules) == 2


@pytest.mark.parametrize("swap", [False, True])
@pytest.mark.parametrize("pair", MEETING + ENCODERS + [names[:2] for names in IN_ALL])
def test_unified_loras_have_one_name_for_one_weight(pair, swap):
    """What each says of itself and its values stay."""
    loras = [one(name, seed=seed, source=f"{seed}") for seed, name in enumerate(pair[::-1] if swap else pair)]
    first, second = unify(loras)
    assert first.spellings.keys() == second.spellings.keys()
    assert len(first.spellings) == 1
    for before, after in zip(loras, (first, second), strict=True):
        assert (after.source, after.metadata, after.keys) == (before.source, before.metadata, before.keys)
        (old,), (new,) = before.modules.values(), after.modules.values()
        assert torch.equal(old.delta(), new.delta())


@pytest.mark.parametrize("pair", OTHERS)
def test_unified_loras_of_two_weights_have_the_names_that_they_had(pair):
    loras = [one(name, seed=seed) for seed, name in enumerate(pair)]
    assert [unified.spellings for unified in unify(loras)] == [lora.spellings for lora in loras]


def test_what_is_unified_alone_is_what_it_was():
    state = kohya("lora_unet_down_blocks_0_attentions_0_proj_in", *factors(6, 2, 5), 2.0)
    for number, kind in enumerate((*kinds.ADDITIVE, *kinds.CARRIED)):
        kernel = (3, 3) if kinds.ADDITIVE.get(kind, ("", False))[1] else ()
        state |= kinds.state_dict(kind, f"lora_unet_thing_{number}", kernel=kernel, alpha=2.0)
    state |= {"lora_unet_a.diff": torch.ones(3, 4), "lora_unet_a.diff_b": torch.ones(3), "a.stray": torch.ones(2)}
    before = Lora.from_state_dict(state, metadata={"a": "b"}, source="all")
    (after,) = unify([before])
    for field in ("modules", "diffs", "carried", "spellings", "metadata", "source", "keys"):
        mine, theirs = getattr(after, field), getattr(before, field)
        if field in ("modules", "diffs", "carried"):
            assert mine.keys() == theirs.keys()
            assert all(mine[name] is theirs[name] for name in mine)
        else:
            assert mine == theirs


def test_updates_of_one_weight_and_its_bias_meet_by_their_shapes_each():
    """A bias has the rows of its weight, and is another thing."""
    name = "lora_unet_blocks_0_attn_foo"
    first = Lora.from_state_dict(kohya(name, *factors(6, 2, 5)) | {f"{name}.diff_b": torch.ones(6)}, source="one")
    for change, said in (
        ({f"{name}.diff": torch.ones(6, 5), f"{name}.diff_b": torch.ones(6)}, None),
        (
            {f"{name}.diff": torch.ones(6, 4), f"{name}.diff_b": torch.ones(6)},
            rf"^{name}: one updates .* \(6, 5\), two .* \(6, 4\)",
        ),
        (
            {f"{name}.diff": torch.ones(6, 5), f"{name}.diff_b": torch.ones(7)},
            rf"^{name} \(bias\): one updates .* \(6,\), two .* \(7,\)",
        ),
    ):
        second = Lora.from_state_dict(change, source="two")
        if said is None:
            assert [one.spellings for one in unify([first, second])] == [first.spellings, second.spellings]
        else:
            with pytest.raises(ValueError, match=said):
                unify([first, second])


KNOWN = ("lora_unet_double_blocks_7_img_attn_proj", "diffusion_model.layers.7.feed_forward.w2")


@pytest.mark.parametrize("swap", [False, True])
@pytest.mark.parametrize("beside", [False, True])
@pytest.mark.parametrize("known", KNOWN)
def test_names_that_are_known_and_names_that_are_not_are_refused_together(known, beside, swap):
    """One unknown name is enough: which weight it is nothing tells. With a known name of its own LoRA beside it, or none."""
    odd = kohya("transformer.decoder_stack.0.gate.w", *factors(6, 2, 5))
    if beside:
        odd |= kohya("transformer.transformer_blocks.3.attn.add_q_proj", *factors(8, 2, 5))
    pair = [one(known), Lora.from_state_dict(odd, source="other")]
    said = refused(*(pair[::-1] if swap else pair))
    assert "nothing here tells whether they are of one weight" in said
    assert f"{known} ({known})" in said
    assert "transformer.decoder_stack.0.gate.w (other)" in said


def test_a_bias_and_a_weight_are_not_one_whatever_they_are_called():
    odd = one("diffusion_model.stages.0.mixer.win", 6, 5)
    for part, refuses in (("diff", True), ("diff_b", False)):
        other = Lora.from_state_dict({f"transformer.decoder_stack.0.gate.w.{part}": torch.ones(6)}, source="other")
        if refuses:
            refused(odd, other)
        else:
            assert len(merge([(odd, 1.0), (other, 1.0)]).spellings) == 2


WHOLES = [None, (), (18,), (18, 5), (18, 5, 1, 1), (6, 5), (18, 4)]


@pytest.mark.parametrize("whole", WHOLES)
@pytest.mark.parametrize("part", [None, (), (6,), (6, 5), (6, 5, 1, 1), (6, 2, 2), (18, 5), (30, 5)])
def test_a_slice_is_of_a_weight_of_more_rows_and_as_many_columns(whole, part):
    """As far as shapes tell: a bias, or an update that tells its rows alone, has no columns; None and () tell nothing."""
    found = slices(
        [
            Named(0, "lora_unet_double_blocks_0_img_attn_qkv", "a", False, whole),
            Named(1, "lora_transformer_transformer_blocks_0_attn_to_q", "b", False, part),
        ]
    )
    fits = not whole or not part or whole[0] > part[0]
    if whole and part and len(whole) > 1 and len(part) > 1:
        fits = fits and torch.Size(whole[1:]).numel() == torch.Size(part[1:]).numel()
    assert [(first.owner, second.owner) for first, second in found] == ([(0, 1)] if fits else [])


def test_slices_are_of_another_lora_of_the_model_and_of_a_weight_or_a_bias_alike():
    whole, part = "lora_unet_double_blocks_0_img_attn_qkv", "lora_transformer_transformer_blocks_0_attn_to_q"

    def pairs(*updates):
        named = [Named(owner, name, spelling, is_bias, None) for owner, name, spelling, is_bias in updates]
        return len(slices(named))

    assert pairs((0, whole, "x", False), (1, part, "y", False)) == 1
    assert pairs((0, part, "x", False), (1, whole, "y", False)) == 1
    assert pairs((0, whole, "x", True), (1, part, "y", True)) == 1
    assert pairs((0, whole, "x", True), (1, part, "y", False)) == 0
    assert pairs((0, whole, "x", False), (0, part, "y", False)) == 0
    assert pairs((0, whole, "lora_te1_x", False), (1, part, "y", False)) == 0
    assert pairs((0, whole, "x", False), (1, part, "lora_te1_y", False)) == 0
    assert pairs((0, whole, "x", False), (1, whole, "y", False), (2, part, "z", False)) == 2


def test_a_fused_weight_and_its_slices_are_added_up_exactly_and_named_where_they_would_have_to_meet():
    fused = one("lora_unet_double_blocks_0_img_attn_qkv", out=18, source="kohya")
    part = one("transformer.transformer_blocks.0.attn.to_q", seed=1, source="diffusers")
    merged, account = merge_with_account([(fused, 0.8), (part, 1.0)])
    assert warnings_of(account) == ()
    assert (
        relative(merged.delta("lora_unet_double_blocks_0_img_attn_qkv"), 0.8 * fused.delta(next(iter(fused.modules))))
        < 1e-6
    )
    pair = "lora_unet_double_blocks_0_img_attn_qkv (kohya) and transformer.transformer_blocks.0.attn.to_q (diffusers)"
    note = f"a weight as a whole and a slice of it do not meet here, each goes its own way: {pair}"
    for more in ({"method": "ties"}, {"mu": 1.0, "protect": 0}):
        assert note in warnings_of(merge_with_account([(fused, 0.8), (part, 1.0)], **more)[1])
    text = as_text(compare([(fused, 1.0), (part, 1.0)]))
    assert f"Note: {note}." in text
    assert "Nothing to fight" not in text
    assert "Not known: they change the same weights under two names, as a whole and in slices." in text
    assert "Nothing to fight" in as_text(
        compare([(part, 1.0), (one("transformer.transformer_blocks.1.attn.to_q"), 1.0)])
    )


@pytest.mark.parametrize("swap", [False, True])
def test_a_slice_is_written_with_the_dots_by_which_comfyui_knows_it(swap):
    names = "lora_unet_layers_0_attention_to_q", "diffusion_model.layers.0.attention.to_q"
    pair = [(one(name), 1.0) for name in (names[::-1] if swap else names)]
    assert list(merge(pair).spellings.values()) == [names[1]]
    own = "lora_unet_blocks_0_self_attn_q", "diffusion_model.blocks.0.self_attn.q"
    pair = [(one(name), 1.0) for name in (own[::-1] if swap else own)]
    assert list(merge(pair).spellings.values()) == [own[swap]]


@pytest.mark.parametrize("number", [0, 10, 123])
def test_tables_hold_for_every_block(number):
    assert f"double_blocks_{number}_img_attn_proj" in aliases.sites(
        f"lora_transformer_transformer_blocks_{number}_attn_to_out_0"
    )
    assert aliases.slices_of(f"lora_transformer_single_transformer_blocks_{number}_proj_mlp") == {
        f"single_blocks_{number}_linear1"
    }
    assert aliases.is_known(f"lora_unet_joint_blocks_{number}_x_block_attn_qkv")
