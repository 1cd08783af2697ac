"""The stages of a merge, each by itself."""

import json
from dataclasses import replace

import pytest
import torch

from lcm_kit.lora_merge import Lora, MergeOptions, merge_with_account
from lcm_kit.lora_merge.merging.compute import compute
from lcm_kit.lora_merge.merging.outcome import outcome
from lcm_kit.lora_merge.merging.plan import plan

GENERATOR = torch.Generator().manual_seed(3)


def normal(*shape):
    return torch.randn(shape, generator=GENERATOR)


def lora(source, *modules, dora=(), bias=()):
    state = {}
    for module in modules:
        state |= {f"{module}.lora_up.weight": normal(8, 2), f"{module}.lora_down.weight": normal(2, 8)}
    state |= {f"{module}.dora_scale": normal(1, 8).abs() + 1 for module in dora}
    state |= {f"{module}.diff_b": normal(8) for module in bias}
    return Lora.from_state_dict(state, metadata={"modelspec.author": source}, source=source)


FIRST = lora("first", "lora_unet_a", "lora_unet_b", "lora_unet_d", dora=["lora_unet_d"], bias=["lora_unet_a"])
SECOND = lora("second", "lora_unet_b", "lora_unet_c")
INPUTS = [(FIRST, 1.0), (SECOND, -0.5)]


def test_a_plan_says_what_meets_what():
    planned = plan(INPUTS, MergeOptions(), metadata={"modelspec.title": "both"})
    assert planned.modules == ["lora_unet_a", "lora_unet_b", "lora_unet_c"]
    assert list(planned.passthrough.updates) == ["lora_unet_d"]
    assert planned.strengths.base == (1.0, -0.5)
    assert planned.metadata["modelspec.title"] == "both"
    assert planned.spellings.keys() == {*planned.modules, "lora_unet_d"}
    assert [one.source for one in planned.sharing] == ["first", "second"]
    assert (planned.notes, planned.fused, planned.protects_nobody) == ([], [], False)


def test_a_plan_leaves_out_of_the_sum_who_has_no_part_in_it():
    planned = plan([(FIRST, 1.0), (SECOND, 0.0)], MergeOptions())
    assert [one.source for one in planned.sharing] == ["first"]
    assert planned.metadata["modelspec.author"] == "first"


def test_a_plan_settles_whom_auto_protects():
    planned = plan(INPUTS, MergeOptions(protect="auto", mu=1.0))
    assert planned.options.protect is None
    assert planned.protects_nobody
    assert not plan(INPUTS, MergeOptions(protect="auto")).protects_nobody


@pytest.mark.parametrize(
    ("inputs", "options", "message"),
    [
        ([], {}, "there is nothing to merge"),
        (INPUTS, {"method": "slerp"}, "second: strength is -0.5 at lora_unet_a, but method slerp"),
        ([(FIRST, 0.5), (SECOND, 1.0)], {}, "first has DoRA"),
        ([(FIRST, float("nan"))], {}, "first: strength is nan"),
    ],
)
def test_what_cannot_be_merged_is_refused_before_anything_is_computed(inputs, options, message):
    with pytest.raises(ValueError, match=message):
        plan(inputs, MergeOptions(**options))


@pytest.mark.parametrize("choices", [{}, {"rank": 1}, {"keep": 0.9}, {"method": "ties"}], ids=str)
def test_the_stages_one_after_the_other_are_the_merge(choices):
    planned = plan(INPUTS, MergeOptions(**choices))
    computed = compute(planned, threads=2, device=torch.device("cpu"))
    assert computed.layers.keys() == set(planned.modules)
    assert computed.diffs.keys() == {("lora_unet_a", "diff_b")}
    merged, account = outcome(planned, computed, ["ab"])
    whole, other = merge_with_account(INPUTS, sha256=["ab"], **choices)
    assert account == other
    assert [source.sha256 for source in account.sources] == ["ab", None]
    assert merged.metadata == whole.metadata
    state, expected = merged.to_state_dict(), whole.to_state_dict()
    assert state.keys() == expected.keys()
    assert all(torch.equal(state[key], expected[key]) for key in state)


@pytest.mark.parametrize("rank", [0, 1])
def test_the_outcome_holds_what_was_computed_and_what_passed_through_and_says_of_what_it_is(rank):
    planned = plan(INPUTS, MergeOptions(rank=rank), metadata={"modelspec.title": "both"})
    computed = compute(planned, threads=1, device=torch.device("cpu"))
    merged, account = outcome(planned, computed)
    assert all(merged.modules[name] is layer for name, layer in computed.layers.items())
    assert (merged.modules.keys(), merged.diffs.keys()) == (computed.layers.keys(), {("lora_unet_a", "diff_b")})
    assert merged.diffs["lora_unet_a", "diff_b"] is computed.diffs["lora_unet_a", "diff_b"]
    assert merged.carried == {"lora_unet_d": FIRST.carried["lora_unet_d"]}
    assert merged.spellings == {name: name for name in ("lora_unet_a", "lora_unet_b", "lora_unet_c", "lora_unet_d")}
    assert merged.source == "first * 1 + second * -0.5"
    assert (merged.metadata["modelspec.title"], merged.metadata["modelspec.merged_from"]) == ("both", "first, second")
    said = json.loads(merged.metadata["lcm_kit.merge"])
    assert [entry["name"] for entry in said["inputs"]] == ["first", "second"]
    assert (said["rank"], said["relative_error"]) == (account.rank, account.relative_error)
    assert [source.sha256 for source in account.sources] == [None, None]


def test_a_bias_is_a_norms_where_its_weight_is_a_norms_everywhere():
    """A column is a vector too: of a LoRA on it the whole weight is changed, and the bias beside it is no norm's."""
    norm = Lora.from_state_dict({"lora_unet_x.w_norm": normal(8), "lora_unet_x.b_norm": normal(8)}, source="norm")
    column = {"lora_unet_x.lora_up.weight": normal(8, 2), "lora_unet_x.lora_down.weight": normal(2, 1)}
    other = Lora.from_state_dict(column, source="column")
    for inputs, parts in (([norm], {"w_norm", "b_norm"}), ([norm, norm], {"w_norm", "b_norm"}),
                          ([norm, other], {"diff", "diff_b"}), ([other, norm], {"diff", "diff_b"})):  # fmt: skip
        planned = plan([(one, 1.0) for one in inputs], MergeOptions())
        computed = compute(planned, threads=1, device=torch.device("cpu"))
        assert {part for _, part in computed.diffs} == parts


def test_of_a_sum_of_nothing_all_inputs_are_named():
    for strengths, named in (((0.0, 0.0), "first, second"), ((0.0, 2.0), "second"), ((1.0, 0.0), "first")):
        planned = plan([(FIRST, strengths[0]), (SECOND, strengths[1])], MergeOptions())
        merged, _ = outcome(planned, compute(planned, threads=1, device=torch.device("cpu")))
        assert merged.metadata["modelspec.merged_from"] == named


@pytest.mark.parametrize(
    ("options", "meet"),
    [({}, False), ({"method": "ties"}, True), ({"method": "average"}, False), ({"mu": 1.0, "protect": 0}, True), ({"rank": 2}, False)],
)  # fmt: skip
def test_a_weight_beside_its_slices_counts_where_the_method_looks_at_both(options, meet):
    """Names of attention that several models have, so that the slices stay slices: q, k and v of one weight. A sum is the
    same either way; what compares updates, or makes room among them, sees two weights."""
    whole = lora("whole", "lora_unet_double_blocks_0_img_attn_qkv")
    whole = Lora(
        {name: replace(layer, up=normal(24, 2)) for name, layer in whole.modules.items()},
        spellings=whole.spellings, source="whole",
    )  # fmt: skip
    slices = lora("slices", *(f"transformer.transformer_blocks.0.attn.to_{part}" for part in "qkv"))
    found = plan([(whole, 1.0), (slices, 1.0)], MergeOptions(**options)).fused
    assert [first.canonical for first, _ in found] == ["lora_unet_double_blocks_0_img_attn_qkv"] * (3 if meet else 0)
    assert plan([(whole, 1.0), (whole, 1.0)], MergeOptions(**options)).fused == []
