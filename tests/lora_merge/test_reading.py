import re

import pytest
import torch
from safetensors.torch import save_file

from lcm_kit.lora_merge import Lora, LoraLayer, describe, describe_merge, load, merge, merge_with_account, save
from lcm_kit.lora_merge.comparing.compare import compare
from lcm_kit.lora_merge.files import dialects
from lcm_kit.lora_merge.files.keys import unread_text
from lcm_kit.lora_merge.merging.report import warnings_of
from lcm_kit.lora_merge.recognise.identity import identify
from lcm_kit.tests.lora_merge.make import factors, kohya

MODULE = "lora_unet_mid_block_attentions_0_proj_in"


def plain():
    return kohya(MODULE, *factors(6, 2, 5), alpha=1)


@pytest.mark.parametrize(
    ("key", "name"),
    [
        ("lora_unet_x.hada_w3", "LoHa, LoKr or OFT of another kind"),
        ("lora_unet_x.oft_diag", "LoHa, LoKr or OFT of another kind"),
        ("lora_unet_x.on_input", "IA3"),
        ("unet.x.lora_B.bias", "LoRA with a bias of its own"),
        ("unet.x.lora_B.default.bias", "LoRA with a bias of its own"),
        ("unet.x.lora_embedding_A", "LoRA of an embedding"),
        ("base_model.model.x.modules_to_save.default.weight", "weights that PEFT saves whole"),
        ("diffusion_model.stages.0.diff_m", "difference that is no weight's or bias's"),
        (f"{MODULE}.scalar", "scale that is a tensor of its own"),
        ("emb_params", "unknown"),
        ("something.else", "unknown"),
        ("lora_unet_y.alpha", "scale of nothing"),
        ("lora_unet_y.dora_scale", "scale of nothing"),
    ],
)
def test_what_has_no_effect_in_comfyui_is_listed_and_all_else_is_read(key, name):
    state = plain() | {key: torch.ones(2)[:1]}
    lora = Lora.from_state_dict(state, source="style.safetensors")
    assert lora.keys.unread == (key,)
    assert sorted(lora.keys.understood) == sorted(plain())
    assert f"without effect in ComfyUI: {name} (1 key: {key})" in describe(lora)
    merged, account = merge_with_account([(lora, 0.5)])
    assert set(merged.to_state_dict()) == set(plain())
    warning = f"style.safetensors holds what has no effect in ComfyUI and is left out: {name} (1 key: {key})"
    assert warnings_of(account) == (warning,)
    assert warning in describe_merge(account, merged)
    # Another reader may know it, so that a file that is only saved again keeps it; a scale of nothing nobody can use.
    assert (key in lora.to_state_dict(torch.float16)) is (name != "scale of nothing")


def test_a_difference_of_a_wan_blocks_modulation_is_read_as_one():
    """Both names of it meet, and what is written is the one that ComfyUI has."""
    block = "diffusion_model.blocks.3"
    linear = kohya(f"{block}.self_attn.q", *factors(6, 2, 6))
    first = Lora.from_state_dict(linear | {f"{block}.diff_m": torch.ones(1, 6, 6)})
    second = Lora.from_state_dict(linear | {f"{block}.modulation.diff": torch.full((1, 6, 6), 3.0)})
    assert first.keys.unread == ()
    merged = merge_with_account([(first, 1.0), (second, 0.5)])[0].to_state_dict()
    assert torch.equal(merged[f"{block}.modulation.diff"], torch.full((1, 6, 6), 2.5))
    assert not any("diff_m" in key for key in merged)


def test_one_line_names_all_formats_and_counts():
    keys = [f"lora_unet_{n}.{end}" for n in range(5) for end in ("on_input", "ia3_l")] + ["lora_unet_9.lora_B.bias"]
    state = plain() | dict.fromkeys(keys, torch.ones(2)) | {"lora_unet_9.alpha": torch.tensor(1.0)}
    text = describe(Lora.from_state_dict(state))
    assert re.search(
        r"IA3 \(10 keys: .* and 7 more\); LoRA with a bias of its own \(1 key: .*\); scale of nothing", text
    )


def test_diffusers_format_has_no_place_for_what_nobody_reads():
    lora = Lora.from_state_dict(plain() | {"something.else": torch.ones(2)})
    assert all(key.startswith("unet.") for key in lora.to_state_dict(format="diffusers"))


@pytest.mark.parametrize("alpha", [None, 1.0])
def test_a_lora_of_rank_0_is_listed_and_all_else_is_read(tmp_path, alpha):
    """ComfyUI adds zeros for it, or stops where it divides alpha by 0."""
    empty = kohya("lora_unet_conv_out", torch.ones(6, 0), torch.ones(0, 5), alpha)
    save_file(plain() | empty, tmp_path / "x.safetensors")
    for lora in (load(tmp_path / "x.safetensors"), Lora.from_state_dict(plain() | empty)):
        assert sorted(lora.keys.unread) == sorted(empty)
        assert set(lora.to_state_dict()) == set(plain())
        assert set(merge([(lora, 1.0)]).modules) == set(lora.modules)


@pytest.mark.parametrize("value", [float("inf"), float("nan")])
@pytest.mark.parametrize(
    ("rest", "kind"),
    [
        ({"lokr_w1": torch.ones(2, 2), "lokr_w2": torch.ones(3, 4)}, "LoKr"),
        ({"diff": torch.ones(6, 8)}, "difference"),
        ({"set_weight": torch.ones(6, 8)}, "replaced weight"),
    ],
)
def test_an_alpha_that_has_no_effect_may_be_anything(rest, kind, value):
    state = {f"{MODULE}.{part}": tensor for part, tensor in rest.items()}
    lora = Lora.from_state_dict(state | {f"{MODULE}.alpha": torch.tensor(value)})
    assert (lora.kinds, lora.keys.unread) == ({kind: 1}, (f"{MODULE}.alpha",))
    written = lora.to_state_dict()
    assert all(torch.equal(written[key], tensor) for key, tensor in state.items())
    assert all(tensor.isfinite().all() for tensor in written.values())
    with pytest.raises(ValueError, match=r"NaN or infinite values in .*alpha"):
        Lora.from_state_dict(plain() | {f"{MODULE}.alpha": torch.tensor(value)})


@pytest.mark.parametrize("part", ["diff", "diff_b", "w_norm", "set_weight"])
def test_a_number_without_dimensions_is_read_saved_merged_and_compared(tmp_path, part):
    key = f"lora_unet_conv_in.{part}"
    lora = Lora.from_state_dict(plain() | {key: torch.tensor(0.5)})
    assert lora.to_state_dict()[key] == 0.5
    save(lora, tmp_path / "x.safetensors", dtype=torch.float32)
    again = load(tmp_path / "x.safetensors")
    identify(again)
    assert "conv_in" in " ".join(again.to_state_dict())
    merged = merge([(again, 1.0), (Lora.from_state_dict(plain()), 0.5)]).to_state_dict()
    assert merged[key] == 0.5
    compare([(again, 1.0), (again, 0.5)])
    if part != "set_weight":
        assert merge([(again, 1.0), (again, 0.5)]).to_state_dict()[key] == 0.75
        other = Lora.from_state_dict({key: torch.ones(3)})
        with pytest.raises(ValueError, match=r"conv_in.*shape \(\), .* one of shape \(3,\)"):
            merge([(again, 1.0), (other, 1.0)])


def test_a_dora_scale_without_dimensions_is_damage():
    with pytest.raises(ValueError, match="dora_scale is a single number"):
        Lora.from_state_dict(plain() | {f"{MODULE}.dora_scale": torch.tensor(1.0)})


def control():
    """Flux Tools' LoRA: bare names, biases of its own, norms that are replaced, a wider input layer."""
    state = {f"img_in.lora_{ab}.weight": t for ab, t in zip("BA", factors(6, 2, 8), strict=True)}
    state |= {
        f"double_blocks.0.img_attn.qkv.lora_{ab}.weight": t for ab, t in zip("BA", factors(18, 2, 6), strict=True)
    }
    biases = {
        f"{name}.lora_B.bias": torch.ones(rows) for name, rows in (("img_in", 6), ("double_blocks.0.img_attn.qkv", 18))
    }
    return state | biases | {"single_blocks.0.norm.key_norm.scale": torch.ones(3)}


def uso():
    """USO's LoRA, told by the last blocks of Flux."""
    shapes = {
        "double_blocks.0.processor.qkv_lora1": (18, 6), "double_blocks.0.processor.proj_lora2": (6, 6),
        "double_blocks.18.processor.qkv_lora2": (18, 6), "single_blocks.37.processor.qkv_lora": (18, 6),
        "single_blocks.37.processor.proj_lora": (6, 30),
    }  # fmt: skip
    return {
        f"{name}.{end}.weight": tensor
        for name, (out, inputs) in shapes.items()
        for end, tensor in zip(("up", "down"), factors(out, 2, inputs), strict=True)
    }


def test_a_control_lora_is_read_as_comfyui_converts_it():
    lora = Lora.from_state_dict(control())
    written = lora.to_state_dict()
    assert lora.keys.unread == ()
    assert sorted(lora.keys.understood + lora.keys.carried) == sorted(control())
    assert lora.kinds == {"LoRA": 1, "resized weight": 1, "replaced weight": 1}
    assert written["diffusion_model.img_in.reshape_weight"].tolist() == [6, 8]
    assert torch.equal(written["diffusion_model.img_in.diff_b"], torch.ones(6))
    assert torch.equal(written["diffusion_model.single_blocks.0.norm.key_norm.set_weight"], torch.ones(3))
    again = Lora.from_state_dict(written)
    assert again.to_state_dict().keys() == written.keys()


def test_a_uso_lora_is_read_as_comfyui_converts_it():
    lora = Lora.from_state_dict(uso())
    assert sorted(lora.keys.understood) == sorted(uso())
    assert set(lora.spellings.values()) == {
        "diffusion_model.double_blocks.0.img_attn.qkv",
        "diffusion_model.double_blocks.0.txt_attn.proj",
        "diffusion_model.double_blocks.18.txt_attn.qkv",
        "diffusion_model.single_blocks.37.linear1_qkv",
        "diffusion_model.single_blocks.37.linear2",
    }


@pytest.mark.parametrize("dialect", [control, uso])
def test_a_dialect_is_told_by_all_of_its_marks_together(dialect):
    """A file that lacks one of them has the spelling that it seems to have."""
    state = dialect()
    marks = [key for key in state if all(key == value for key, value in dialects.renamed(without(state, key)).items())]
    assert len(marks) == (3 if dialect is control else 2)
    found = dialects.renamed(state)
    assert found.keys() == state.keys()
    assert all(name.startswith("diffusion_model.") for name in found.values())
    assert len({*found.values()}) == len(state)
    for mark in marks:
        assert dialects.added(without(state, mark)) == {}
    assert [*dialects.added(state)] == ([dialects.RESHAPED] if dialect is control else [])


def without(state, key):
    return {other: tensor for other, tensor in state.items() if other != key}


@pytest.mark.parametrize(
    ("down", "up", "shape"),
    [((2, 8), (6, 2), [6, 8]), ((2, 8, 1, 1), (6, 2, 1, 1), [6, 8]), ((2,), (6, 2), None), ((2, 8), (6,), None),
     ((), (), None)],
)  # fmt: skip
def test_a_control_lora_says_how_wide_its_input_layer_is_where_its_factors_are_matrices(down, up, shape):
    state = control() | {"img_in.lora_A.weight": torch.ones(down), "img_in.lora_B.weight": torch.ones(up)}
    found = dialects.added(state)
    assert {key: tensor.tolist() for key, tensor in found.items()} == ({dialects.RESHAPED: shape} if shape else {})


@pytest.mark.parametrize(
    ("key", "name"),
    [
        ("diffusion_model.blocks.3.diff_m", "diffusion_model.blocks.3.modulation.diff"),
        ("diffusion_model.head.diff_m", "diffusion_model.head.modulation.diff"),
        ("diffusion_model.blocks.3.norm.diff_m", "diffusion_model.blocks.3.norm.diff_m"),
        ("diffusion_model.overhead.diff_m", "diffusion_model.overhead.diff_m"),
        ("diffusion_model.blocks.3", "diffusion_model.blocks.3"),
        ("diffusion_model.blocks.3.diff", "diffusion_model.blocks.3.diff"),
        ("head", "head"),
    ],
)
def test_a_modulation_is_that_of_a_block_or_of_the_head(key, name):
    assert dialects.renamed({key: torch.ones(1)}) == {key: name}


@pytest.mark.parametrize("state", [{}, {"model.diffusion_model.conv_in.weight": torch.ones(2, 2)}])
def test_a_file_without_lora_says_so(state):
    with pytest.raises(ValueError, match="no LoRA in it"):
        Lora.from_state_dict(state)


@pytest.mark.parametrize("known", ["lora_unet_x.on_input", "lora_unet_x.alpha"])
def test_where_one_key_is_of_a_known_format_the_file_is_no_checkpoint(known):
    """Whichever comes first; a stray key beside it is counted."""
    stray = {"model.conv_in.weight": torch.ones(2, 2)}
    with pytest.raises(ValueError, match="it may be a checkpoint or an empty file"):
        Lora.from_state_dict(stray)
    for state in (stray | {known: torch.ones(1)}, {known: torch.ones(1)} | stray):
        with pytest.raises(
            ValueError, match=r"no LoRA in it that ComfyUI's loader would apply, only .*unknown \(1 key"
        ):
            Lora.from_state_dict(state)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda state: state.pop(f"{MODULE}.lora_up.weight"), "but no up"),
        (lambda state: state.pop(f"{MODULE}.lora_down.weight"), "but no down"),
        (lambda state: state.update({f"{MODULE}.diff": torch.ones(6, 5)}), "another update of its weight"),
        (lambda state: state.update({f"{MODULE}.lora_B.weight": torch.ones(6, 2)}), "are the same thing"),
        (lambda state: state.update({f"{MODULE}.lora_up.weight": torch.ones(6, 3)}), "ranks 3 and 2 differ"),
        (lambda state: state.update({f"{MODULE}.alpha": torch.ones(2)}), "it has to be one number"),
        (lambda state: state.update({f"{MODULE}.lora_up.weight": torch.ones(6, 2, dtype=torch.int8)}), "int8.*not floating|not floating.*int8"),
    ],
)  # fmt: skip
def test_incomplete_or_contradictory_files_are_refused(change, message):
    state = plain()
    change(state)
    with pytest.raises(ValueError, match=message):
        Lora.from_state_dict(state)


def test_a_tensor_without_values_is_damage():
    with pytest.raises(ValueError, match=rf"1 tensor has no values, {MODULE}.lora_up.weight"):
        Lora.from_state_dict(plain() | {f"{MODULE}.lora_up.weight": torch.ones(6, 0)})


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_values_that_are_no_numbers_are_refused(value, dtype):
    up, down = factors(6, 2, 500, dtype=dtype)
    down[1, 313] = value
    with pytest.raises(ValueError, match=rf"broken: NaN or infinite values in {MODULE}.lora_down.weight"):
        Lora.from_state_dict(kohya(MODULE, up, down), source="broken")


def in_trouble(count, change):
    state = {}
    for number in range(count):
        module = f"lora_unet_thing_{number}"
        state |= kohya(module, *factors(6, 2, 5)) | {f"{module}.{part}": one for part, one in change.items()}
        state = {key: tensor for key, tensor in state.items() if tensor is not None}
    return state


def said_of(state):
    with pytest.raises(ValueError, match=r"^style: ") as error:
        Lora.from_state_dict(state, source="style")
    return str(error.value)


@pytest.mark.parametrize("count", [1, 2, 3, 4, 7])
@pytest.mark.parametrize(
    ("change", "key"),
    [
        ({"lora_up.weight": None}, ""),
        ({"lora_A.weight": torch.ones(2, 5)}, ".lora_down.weight"),
        ({"lora_down.weight": torch.full((2, 5), torch.nan)}, ".lora_down.weight"),
    ],
)
def test_of_many_that_are_wrong_three_are_named_and_the_others_counted(change, key, count):
    text = said_of(in_trouble(count, change))
    assert [f"lora_unet_thing_{number}{key}" in text for number in range(count)] == [n < 3 for n in range(count)]
    assert (f"and {count - 3} more" in text) == (count > 3)
    assert (" more" in text) == (count > 3)


@pytest.mark.parametrize("count", [1, 2, 3, 4, 7])
def test_of_many_keys_without_effect_three_are_named_and_the_others_counted(count):
    for end in ("on_input", "scalar", "alpha"):
        text = unread_text(f"lora_unet_thing_{number}.{end}" for number in range(count))
        assert [f"thing_{number}.{end}" in text for number in range(count)] == [n < 3 for n in range(count)]
        assert f"({count} key{'' if count == 1 else 's'}: " in text
        assert text.endswith(f", and {count - 3} more)" if count > 3 else f"thing_{count - 1}.{end})")


@pytest.mark.parametrize("count", [1, 2, 3, 4, 7])
def test_of_many_weights_with_two_names_three_pairs_are_named_and_the_others_counted(count):
    state = {}
    for number in range(count):
        for name in (f"blocks.{number}.attn.foo", f"transformer.blocks.{number}.attn.foo"):
            state |= kohya(name, *factors(6, 2, 5))
    text = said_of(state)
    assert text.count(" and transformer.blocks.") == min(count, 3)
    pairs = "pair" if count == 4 else "pairs"
    assert (f", and {count - 3} {pairs} more" in text) == (count > 3)
    assert (" more" in text) == (count > 3)


@pytest.mark.parametrize("count", [1, 2, 5])
def test_of_many_modules_of_another_shape_one_is_named_and_the_others_counted(count):
    names = [f"lora_unet_blocks_{number}_attn_foo" for number in range(count)]
    first, second = (
        Lora.from_state_dict(
            {k: t for name in names for k, t in kohya(name, *factors(out, 2, 5)).items()}, source=source
        )
        for out, source in ((6, "one"), (7, "two"))
    )
    more = {1: "", 2: " (1 more module differs)"}.get(count, f" ({count - 1} more modules differ)")
    said = f"{names[0]}: one updates a weight of shape (6, 5), two one of shape (7, 5){more}; they were made for"
    with pytest.raises(ValueError, match=f"^{re.escape(said)}"):
        merge([(first, 1.0), (second, 1.0)])


@pytest.mark.parametrize("count", [1, 2, 3, 4, 7])
def test_of_many_that_a_loader_would_read_otherwise_three_are_named_and_the_others_counted(tmp_path, count):
    """The alpha of a module that is called `.lora` reads as that of the module before it."""
    modules = {f"lora_unet_thing_{number}.lora": LoraLayer(*factors(6, 2, 5)) for number in range(count)}
    kept = {"lora_unet_whole": LoraLayer(*factors(6, 2, 5))}
    with pytest.raises(
        ValueError, match=r"^here: cannot be saved, since a loader would read something else: "
    ) as error:
        save(Lora(modules | kept, source="here"), tmp_path / "x.safetensors", format="kohya")
    text = str(error.value)
    assert text.count(".lora.alpha would not be read") == min(count, 3)
    assert (f", and {count - 3} more. Rename" in text) == (count > 3)
    assert (" more" in text) == (count > 3)
    assert list(tmp_path.iterdir()) == []


def test_two_spellings_of_one_module_in_one_file_are_refused():
    state = plain() | kohya("lora_unet_middle_block_1_proj_in", *factors(6, 2, 5))
    with pytest.raises(ValueError, match="two spellings of one module"):
        Lora.from_state_dict(state)


def test_differences_of_weights_norms_and_biases_are_kept():
    state = plain() | {
        "lora_unet_mid_block_attentions_0_norm.w_norm": torch.ones(5),
        "lora_unet_mid_block_attentions_0_norm.b_norm": torch.ones(5),
        "lora_unet_conv_in.diff": torch.ones(3, 4, 3, 3),
        f"{MODULE}.diff_b": torch.ones(6),
    }
    lora = Lora.from_state_dict(state)
    assert set(lora.to_state_dict()) == set(state)
    assert torch.equal(lora.delta("lora_unet_conv_in"), torch.ones(3, 4, 3, 3))
    assert torch.equal(lora.delta("lora_unet_mid_block_attentions_0_norm"), torch.ones(5))


def test_eight_bit_floats_are_read():
    up, down = factors(6, 2, 5)
    up8, down8 = up.to(torch.float8_e4m3fn), down.to(torch.float8_e4m3fn)
    lora = Lora.from_state_dict(kohya(MODULE, up8, down8))
    assert torch.equal(lora.delta(MODULE), up8.float() @ down8.float())


@pytest.mark.parametrize("dtype", [torch.int8, torch.uint8, torch.int32, torch.int64, torch.float32])
def test_a_shape_and_an_alpha_may_be_numbers_of_any_kind_and_a_shape_stays_what_it_is(dtype):
    """Whole numbers of a byte are no floats of 8 bits, and no loader makes a weight of 6.0 rows."""
    size = torch.tensor([6, 5], dtype=dtype)
    state = plain() | {f"{MODULE}.reshape_weight": size, f"{MODULE}.alpha": torch.tensor(3, dtype=dtype)}
    lora = Lora.from_state_dict(state)
    written = lora.to_state_dict()
    assert written[f"{MODULE}.reshape_weight"].dtype == dtype
    assert torch.equal(written[f"{MODULE}.reshape_weight"], size)
    assert written[f"{MODULE}.alpha"] == 3


def test_a_factor_that_is_one_number_is_damage_also_where_its_rank_would_tell_the_scale():
    state = plain() | {f"{MODULE}.lora_down.weight": torch.tensor(1.0)}
    del state[f"{MODULE}.alpha"]
    with pytest.raises(ValueError, match=rf"{MODULE}: .*The file may be damaged"):
        Lora.from_state_dict(state, metadata={"lora_alpha": "2", "use_rslora": "True"})


def test_delta_of_an_unknown_module_is_an_error():
    lora = Lora.from_state_dict(plain(), source="style")
    with pytest.raises(KeyError, match="style has no module 'lora_unet_conv_in'"):
        lora.delta("lora_unet_conv_in")
    with pytest.raises(KeyError, match="changes the bias"):
        Lora.from_state_dict({"lora_unet_conv_in.diff_b": torch.ones(3)}).delta("lora_unet_conv_in")


def test_nothing_can_be_put_into_a_lora():
    lora = Lora.from_state_dict(plain())
    with pytest.raises(TypeError):
        lora.modules["x"] = lora.modules
    with pytest.raises(TypeError):
        lora.metadata["x"] = "y"


def test_writing_into_a_state_dict_leaves_the_lora_alone():
    state = plain()
    lora = Lora.from_state_dict(state)
    before = lora.delta(MODULE)
    for tensor in lora.to_state_dict().values():
        tensor.zero_()
    assert torch.equal(lora.delta(MODULE), before)


def test_a_state_dict_can_share_what_needs_no_conversion():
    state = plain()
    lora = Lora.from_state_dict(state)
    shared = lora.to_state_dict(copy=False)
    assert shared[f"{MODULE}.lora_up.weight"].data_ptr() == state[f"{MODULE}.lora_up.weight"].data_ptr()
    half = lora.to_state_dict(torch.float16, copy=False)
    assert torch.equal(half[f"{MODULE}.lora_up.weight"], state[f"{MODULE}.lora_up.weight"].half())


def test_trainable_tensors_come_out_as_plain_ones():
    up, down = factors(6, 2, 5)
    lora = Lora.from_state_dict(kohya(MODULE, torch.nn.Parameter(up), torch.nn.Parameter(down)))
    assert not any(tensor.requires_grad for tensor in lora.to_state_dict().values())
