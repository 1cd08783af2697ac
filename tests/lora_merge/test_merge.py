import json

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lcm_kit.lora_merge import Lora, describe, describe_merge, merge, merge_with_account
from lcm_kit.tests.lora_merge.make import dense, factors, kohya, relative

SHAPES = {
    "lora_unet_down_blocks_0_attentions_0_proj_in": (16, 12, (1, 1)),
    "lora_unet_down_blocks_0_attentions_1_transformer_blocks_0_attn1_to_q": (16, 12, ()),
    "lora_unet_down_blocks_0_resnets_0_conv1": (16, 12, (3, 3)),
    "lora_unet_up_blocks_0_attentions_2_proj_out": (16, 12, ()),
    "lora_te_text_model_encoder_layers_0_mlp_fc1": (9, 7, ()),
}
LDM = {
    "lora_unet_input_blocks_1_1_proj_in": (16, 12, ()),
    "lora_unet_input_blocks_2_1_transformer_blocks_0_attn1_to_q": (16, 12, ()),
    "lora_unet_input_blocks_1_0_in_layers_2": (16, 12, (3, 3)),
    "lora_unet_middle_block_1_proj_in": (16, 16, ()),
}


def lora(shapes, rank, alpha=None, *, seed=0, source="LoRA", dtype=torch.float32):
    state = {}
    for number, (module, (out, inputs, kernel)) in enumerate(shapes.items()):
        state |= kohya(module, *factors(out, rank, inputs, kernel, seed=100 * seed + number, dtype=dtype), alpha)
    return Lora.from_state_dict(state, source=source)


def wanted(module, *inputs):
    """Sum of strength * delta in float64, with a missing module adding nothing."""
    total = 0.0
    for one, strength in inputs:
        if module in one.modules:
            layer = one.modules[module]
            total = total + strength * dense(layer.up, layer.down, layer.scale).flatten(1)
    return total


def assert_is_sum(merged, *inputs, tolerance=1e-6):
    modules = {module for one, _ in inputs for module in one.modules}
    assert set(merged.modules) == modules
    for module in modules:
        assert relative(merged.delta(module).flatten(1), wanted(module, *inputs)) < tolerance, module


def test_every_module_of_the_merge_is_the_sum():
    style, lcm = lora(SHAPES, 4, 2.0, seed=1), lora(LDM, 8, 8.0, seed=2)
    merged = merge([(style, 0.8), (lcm, 1.0)])
    assert_is_sum(merged, (style, 0.8), (lcm, 1.0))
    assert len(merged.modules) == 6  # three meet, two only in the style, one only in the LCM-LoRA
    assert merged.modules["lora_unet_input_blocks_1_1_proj_in"].rank == 12
    assert merged.modules["lora_unet_middle_block_1_proj_in"].rank == 8


@settings(max_examples=25, deadline=None)
@given(
    st.lists(st.tuples(st.integers(1, 6), st.sampled_from([None, 1.0, 3.0]), st.floats(-3, 3)), min_size=1, max_size=4)
)
def test_any_number_of_loras(inputs):
    loras = [
        (lora(LDM if seed % 2 else SHAPES, rank, alpha, seed=seed), strength)
        for seed, (rank, alpha, strength) in enumerate(inputs)
    ]
    merged = merge(loras)
    for module in {module for one, _ in loras for module in one.modules}:
        size = sum(abs(s) * float(wanted(module, (one, 1.0)).norm()) for one, s in loras if module in one.modules)
        error = float((merged.delta(module).double().flatten(1) - wanted(module, *loras)).norm())
        assert error <= 1e-6 * size + 1e-36  # float32 has nothing finer near zero


def test_merge_of_one_lora_with_weight_one_is_that_lora():
    style = lora(SHAPES, 4, 2.0)
    assert_is_sum(merge([(style, 1.0)]), (style, 1.0))


def test_merging_in_steps_is_merging_at_once():
    a, b, c = lora(SHAPES, 4, 2.0, seed=1), lora(LDM, 8, seed=2), lora(SHAPES, 2, 1.0, seed=3)
    stepped = merge([(merge([(a, 1.0), (b, -2.0)]), 0.5), (c, 1.0)])
    assert_is_sum(stepped, (a, 0.5), (b, -1.0), (c, 1.0), tolerance=2e-6)  # two roundings


def test_inputs_are_left_alone():
    style, lcm = lora(SHAPES, 4, 2.0, seed=1), lora(LDM, 8, seed=2)
    before = [layer.up.clone() for one in (style, lcm) for layer in one.modules.values()]
    merged = merge([(style, 0.8), (lcm, -1.0)], rank=4)
    for layer in merged.modules.values():
        layer.up.zero_()
    after = [layer.up for one in (style, lcm) for layer in one.modules.values()]
    assert all(torch.equal(x, y) for x, y in zip(before, after, strict=True))


def test_equal_naming_is_kept_and_mixed_naming_becomes_ldm():
    style, other, lcm = lora(SHAPES, 4, seed=1), lora(SHAPES, 2, seed=3), lora(LDM, 8, seed=2)
    kept = merge([(style, 1.0), (other, 1.0)])
    assert {key.partition(".")[0] for key in kept.to_state_dict()} == set(SHAPES)
    mixed = merge([(style, 1.0), (lcm, 1.0)])
    names = {key.partition(".")[0] for key in mixed.to_state_dict()}
    assert not any("_blocks_0_attentions" in name for name in names)
    assert "lora_unet_input_blocks_1_1_proj_in" in names


def one_module(module, out=8, inputs=6, *, seed=0, source="LoRA"):
    return lora({module: (out, inputs, ())}, 2, seed=seed, source=source)


def test_a_small_lora_follows_the_layout_that_the_others_show():
    # alone, level 1 of a UNet with one residual block a level would be read as input block 4; the other shows it is 3
    small = one_module("lora_unet_down_blocks_1_attentions_0_proj_in")
    large = lora(
        {f"lora_unet_input_blocks_{n}_1_proj_in": (8, 6, ()) for n in (3, 5)}
        | {"lora_unet_input_blocks_2_0_op": (4, 6, (3, 3)), "lora_unet_input_blocks_4_0_op": (4, 6, (3, 3))},
        2,
        seed=1,
    )
    merged = merge([(small, 1.0), (large, 1.0)])
    assert set(merged.modules) == set(large.modules)
    assert merged.modules["lora_unet_input_blocks_3_1_proj_in"].rank == 4


def test_shapes_decide_where_names_leave_a_choice():
    # up_blocks_1_attentions_0 is output block 3 with two residual blocks a level, 2 with one: widths tell
    small = one_module("lora_unet_up_blocks_1_attentions_0_proj_in", out=8)
    large = lora(
        {"lora_unet_output_blocks_2_1_proj_in": (8, 6, ()), "lora_unet_output_blocks_3_1_proj_in": (4, 3, ())},
        2,
        seed=1,
    )
    assert set(merge([(small, 1.0), (large, 1.0)]).modules) == set(large.modules)


def test_different_base_models_are_told_apart():
    sd15 = one_module("lora_unet_mid_block_attentions_0_transformer_blocks_0_attn2_to_k", 8, 6, source="a.safetensors")
    sd2 = one_module("lora_unet_mid_block_attentions_0_transformer_blocks_0_attn2_to_k", 8, 9, source="b.safetensors")
    with pytest.raises(
        ValueError,
        match=r"lora_unet_mid_block.*a.safetensors updates a weight of shape \(8, 6\), b.safetensors one of shape "
        r"\(8, 9\); they were made for different base models",
    ):
        merge([(sd15, 1.0), (sd2, 1.0)])


def test_names_of_two_unets_do_not_mix():
    # three residual blocks on the way down in one, a downsampler after two in the other
    one = one_module("lora_unet_down_blocks_0_attentions_2_proj_in", source="a")
    other = one_module("lora_unet_input_blocks_3_0_op", source="b")
    with pytest.raises(ValueError, match="a and b: their block names cannot belong to one UNet"):
        merge([(one, 1.0), (other, 1.0)])


@pytest.mark.parametrize(
    ("keywords", "message"),
    [
        ({"method": "median"}, "method is 'median', but it has to be one of: linear"),
        ({"rank": -1}, "rank is -1"),
    ],
)
def test_unknown_options_are_refused(keywords, message):
    with pytest.raises(ValueError, match=message):
        merge([(lora(SHAPES, 2), 1.0)], **keywords)


def test_nothing_and_no_number_are_refused():
    with pytest.raises(ValueError, match="nothing to merge"):
        merge([])
    with pytest.raises(ValueError, match="style: strength is inf"):
        merge([(lora(SHAPES, 2, source="style"), float("inf"))])


def test_strength_zero_keeps_the_modules_and_adds_nothing():
    style, lcm = lora(SHAPES, 4, 2.0, seed=1), lora(LDM, 8, seed=2)
    merged = merge([(style, 0.0), (lcm, 1.0)])
    assert set(merged.modules) == set(style.modules) | set(lcm.modules)
    for module in merged.modules:
        if module in lcm.modules:
            assert relative(merged.delta(module).flatten(1), wanted(module, (lcm, 1.0))) < 1e-6
        else:
            assert not merged.delta(module).any()


def test_differences_add_up_like_everything_else():
    bias = "lora_unet_conv_in.diff_b"
    a = Lora.from_state_dict({bias: torch.tensor([1.0, 2.0]), "lora_unet_conv_out.diff": torch.ones(2, 2)})
    b = Lora.from_state_dict({bias: torch.tensor([10.0, 10.0])})
    state = merge([(a, 2.0), (b, -0.1)]).to_state_dict()
    torch.testing.assert_close(state[bias], torch.tensor([1.0, 3.0]))
    assert torch.equal(state["lora_unet_conv_out.diff"], torch.full((2, 2), 2.0))


def test_a_dense_and_a_low_rank_update_of_one_weight_are_one_dense_update():
    dense_one = Lora.from_state_dict({"lora_unet_conv_in.diff": torch.ones(8, 6)}, source="full")
    factored = one_module("lora_unet_conv_in", source="lora")
    for order in ([(dense_one, 2.0), (factored, -1.0)], [(factored, -1.0), (dense_one, 2.0)]):
        state = merge(order).to_state_dict()
        assert set(state) == {"lora_unet_conv_in.diff"}
        torch.testing.assert_close(state["lora_unet_conv_in.diff"], 2 - factored.delta("lora_unet_conv_in"))
    for other in ({"lora_unet_conv_in.diff": torch.ones(8, 5)}, kohya("lora_unet_conv_in", *factors(8, 2, 5))):
        with pytest.raises(ValueError, match="different base models"):
            merge([(dense_one, 1.0), (Lora.from_state_dict(other, source="b"), 1.0)])


def test_a_smaller_rank_keeps_what_fits_exact_and_tells_the_error():
    style, lcm = lora(SHAPES, 4, 2.0, seed=1, source="style"), lora(LDM, 6, seed=2, source="lcm")
    merged, account = merge_with_account([(style, 0.8), (lcm, 1.0)], rank=6)
    assert all(layer.rank <= 6 for layer in merged.modules.values())
    only_lcm = "lora_unet_middle_block_1_proj_in"
    assert relative(merged.delta(only_lcm), wanted(only_lcm, (lcm, 1.0))) < 1e-6
    lost = whole = 0.0
    for module in merged.modules:
        exact = wanted(module, (style, 0.8), (lcm, 1.0))
        lost += float((merged.delta(module).double().flatten(1) - exact).square().sum())
        whole += float(exact.square().sum())
    assert account.relative_error == pytest.approx((lost / whole) ** 0.5, rel=1e-3)
    assert account.cut_modules == 3
    assert 0 < account.sources[0].retention < account.sources[1].retention < 1
    note = json.loads(merged.metadata["lcm_kit.merge"])
    assert note["rank"] == 6
    assert note["relative_error"] == pytest.approx(account.relative_error)
    assert [source["name"] for source in note["inputs"]] == ["style", "lcm"]
    assert [source["strength"] for source in note["inputs"]] == [0.8, 1.0]


def test_the_report_tells_what_met_and_what_was_lost():
    style, lcm = lora(SHAPES, 4, 2.0, seed=1, source="style"), lora(LDM, 6, seed=2, source="lcm")
    merged, account = merge_with_account([(style, 0.8), (lcm, 1.0)])
    text = describe_merge(account, merged)
    assert "style * 0.8: 5 modules, 3 shared, 2 only here, rank 4, alpha 2" in text
    assert "lcm * 1: 4 modules, 3 shared, 1 only here, rank 6, alpha 6" in text
    assert "Result: 6 modules, rank 4 to 10" in text
    assert "Exact" in text
    cut, account = merge_with_account([(style, 0.8), (lcm, 1.0)], rank=6)
    text = describe_merge(account, cut)
    assert "Cut to rank 6 in 3 of 6 modules; relative error 0." in text
    assert "style: " in text
    alien, account = merge_with_account([(style, 0.8), (one_module("lora_unet_double_blocks_0_x"), 1.0)])
    assert "share no module" in describe_merge(account, alien)


def test_one_lora_is_described():
    text = describe(lora(SHAPES, 4, 2.0, source="style"))
    assert "modules: 5 (diffusion model 4, text encoder 1 1)" in text
    assert "rank: 4, scale (alpha / rank): 0.5" in text


def test_facts_about_the_base_model_survive_if_nobody_disagrees():
    a, b = (lora(SHAPES, 2, seed=seed) for seed in (1, 2))
    facts = {"ss_base_model_version": "sd_v1", "ss_v2": "False", "lora_alpha": "9"}
    a = Lora(a.modules, a.diffs, a.spellings, facts)
    b = Lora(b.modules, b.diffs, b.spellings, {"ss_v2": "True"})
    merged = merge([(a, 1.0), (b, 1.0)])
    assert merged.metadata["ss_base_model_version"] == "sd_v1"
    assert "ss_v2" not in merged.metadata
    assert "lora_alpha" not in merged.metadata  # it is in the factors now


def test_progress_counts_modules_and_can_stop_the_merge():
    seen = []
    merge([(lora(SHAPES, 2), 1.0)], progress=lambda done, total: seen.append((done, total)))
    assert seen == [(number, 5) for number in range(1, 6)]

    def stop(done, total):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        merge([(lora(SHAPES, 2), 1.0)], progress=stop)
