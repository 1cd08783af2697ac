"""The report of a merge, line by line, from numbers written by hand."""

import itertools
import json
from dataclasses import fields, replace

import pytest
import torch

from lcm_kit.lora_merge import LohaLayer, Lora, LoraLayer, MergeOptions, describe, describe_merge, merge
from lcm_kit.lora_merge.files.twice import Named
from lcm_kit.lora_merge.merging.account import Account, Source
from lcm_kit.lora_merge.merging.report import _scaled_protection, describe_provenance, warnings_of
from lcm_kit.lora_merge.metadata.adapter_config import OfPeft
from lcm_kit.lora_merge.metadata.inherit import Cut, TooLong
from lcm_kit.tests.lora_merge.make import factors, kohya


def source(name="a", **facts):
    return Source(**{"name": name, "strength": 0.5, "modules": 5, "only_here": 2, "diffs": 0, "ranks": (4, 8),
                     "alphas": (2.0, 8.0), "retention": 1.0, "merged": 5} | facts)  # fmt: skip


def account(*sources, **facts):
    options = facts.pop("options", {})
    return Account(
        **{
            "sources": sources or (source(), source("b")),
            "method": options.get("method", "linear"),
            "rank": options.get("rank", 0),
            "modules": 7,
            "cut_modules": 0,
            "relative_error": 0.0,
            "options": MergeOptions(**options),
        }
        | facts
    )


MERGED = Lora(
    {"m": LoraLayer(torch.ones(4, 2), torch.ones(2, 6)), "n": LoraLayer(torch.ones(4, 3), torch.ones(3, 6))}, source="x"
)


def lines(one, merged=MERGED):
    return describe_merge(one, merged).split("\n")


def test_an_exact_merge_in_full():
    assert lines(account()) == [
        "Merged 2 LoRAs, method linear:",
        "  a * 0.5: 5 modules, 3 shared, 2 only here, rank 4 to 8, alpha 2 to 8",
        "  b * 0.5: 5 modules, 3 shared, 2 only here, rank 4 to 8, alpha 2 to 8",
        "Result: 2 modules, rank 2 to 3, 0.0 MB in float16",
        "Exact: no module was cut.",
    ]


@pytest.mark.parametrize(
    ("facts", "said"),
    [
        ({"ranks": None, "alphas": None}, "5 modules, 3 shared, 2 only here"),
        ({"alphas": None}, "5 modules, 3 shared, 2 only here"),
        ({"ranks": (4, 4), "alphas": (1.0, 1.0)}, "5 modules, 3 shared, 2 only here, rank 4, alpha 1"),
        ({"diffs": 3, "ranks": None}, "5 modules, 3 shared, 2 only here, 3 weight or bias differences"),
        ({"merged": 3, "refused": 2, "ranks": None}, "2 only here, 3 merged, 2 refused and left out"),
        ({"merged": 4, "passed_through": 1, "ranks": None}, "4 merged, 1 passed through as it is"),
        ({"block_strengths": "down=0.5", "ranks": None}, "2 only here, times down=0.5"),
        ({"protected": True, "ranks": None}, "2 only here, protected"),
    ],
)
def test_what_became_of_an_input(facts, said):
    line = lines(account(source(**facts), source("b")))[1]
    assert line.startswith("  a * 0.5: 5 modules")
    assert line.endswith(said)


def test_one_lora_shares_nothing_with_anybody():
    first, second, *_ = lines(account(source(only_here=5, ranks=None)))
    assert (first, second) == ("Made from one LoRA:", "  a * 0.5: 5 modules")
    assert not any(line.startswith("Note:") for line in lines(account(source(only_here=5))))


def test_inputs_that_share_nothing_and_those_without_strength_are_noted():
    apart = lines(account(source(only_here=5), source("b", only_here=5)))
    assert "Note: the inputs share no module. They may be made for different base models." in apart
    together = lines(account(source(only_here=5), source("b", only_here=4)))
    assert not any(line.startswith("Note:") for line in together)
    assert "Note: an input of strength 0 adds nothing." in lines(account(source(strength=0.0), source("b")))


@pytest.mark.parametrize(
    ("options", "head"),
    [
        ({"method": "ties", "density": 0.3}, "method ties (density 0.3):"),
        ({"method": "dare", "seed": 7}, "method dare (density 0.9, seed 7):"),
        ({"method": "dare", "seed": 0}, "method dare (density 0.9):"),
        ({"method": "ties", "seed": 7}, "method ties (density 0.2):"),
        ({"method": "magnitude", "dense": True}, "method magnitude (density 0.5, on whole updates):"),
        ({"method": "tsv", "dense": True}, "method tsv:"),
    ],
)
def test_the_choices_that_count_are_told(options, head):
    assert lines(account(options=options))[0].endswith(head)


def test_the_effect_of_each_input_is_told_where_a_method_chose():
    said = lines(account(source(effect=0.425), source("b", effect=None), options={"method": "ties"}))
    at = said.index("Effect of each input in the result, 100 % being strength * LoRA as it is:")
    assert said[at + 1 : at + 4] == ["  a: 42.5 %", "  b: no update", "No module was cut."]
    assert not any("Effect" in line for line in lines(account()))


def test_who_made_room_for_whom():
    sources = source(stepped_aside=0.25), source("b", protected=True), source("c", stepped_aside=1.0)
    said = lines(account(*sources, options={"protect": 1, "mu": 2.0}))
    room = "Made room for b, mu 2: a keeps 25.0 % of its energy there, c keeps 100.0 % of its energy there."
    assert said[-2:] == [room, "No module was cut."]
    assert not any("room" in line for line in lines(account(*sources, options={"protect": 1, "mu": 0.0})))


@pytest.mark.parametrize(
    ("options", "how"),
    [
        ({"rank": 4}, "to rank 4 in 3 of 7 modules; relative error 0.123"),
        ({"keep": 0.9}, "to keep 90 % of the energy in 3 of 7 modules;"),
        ({"retain": 0.75}, "so that each input keeps 75 % of its energy in 3 of 7 modules;"),
        ({"max_mb": 20.5}, "to 20.5 MB in 3 of 7 modules;"),
        ({"rank": 4, "balanced": True}, "to rank 4 in 3 of 7 modules, every input counting alike;"),
    ],
)
def test_a_cut_says_how_much_is_left_of_each(options, how):
    sources = source(retention=0.5), source("b", retention=None)
    said = lines(account(*sources, options=options, cut_modules=3, relative_error=0.12345))
    (cut,) = [line for line in said if line.startswith("Cut ")]
    assert cut.startswith(f"Cut {how}")
    assert cut.endswith("Left of each input's energy:")
    assert said[said.index(cut) + 1 :] == ["  a: 50.0 %", "  b: nothing was there"]
    assert "Exact: no module was cut." not in said


def test_the_median_rank_is_told_where_ranks_were_shared_out():
    shared = {"options": {"keep": 0.9}, "cut_modules": 1}
    assert ", rank 2 to 3 (median 2.5), " in describe_merge(account(ranks=(2, 2.5, 3), **shared), MERGED)
    for other in ({"ranks": (3, 3, 3), **shared}, {"ranks": (2, 2.5, 3), "options": {"rank": 3}, "cut_modules": 1}):
        assert "median" not in describe_merge(account(**other), MERGED)


PART = (
    Named(owner=0, canonical="qkv", spelling="qkv", is_bias=False, shape=(6, 2)),
    Named(owner=1, canonical="q", spelling="q", is_bias=False, shape=(2, 2)),
)


@pytest.mark.parametrize(
    ("facts", "warning"),
    [
        ({"notes": (Cut(tags=9, kept=4),)}, "of 9 tags in ss_tag_frequency the 4 most frequent are kept, since"),
        ({"notes": (TooLong("a", "description", 7),)}, "a: its metadata description is left out, because it has 7"),
        ({"unread": ("stray",)}, "a holds what has no effect in ComfyUI and is left out: unknown (1 key: stray)"),
        ({"peft": OfPeft(config="used")}, "a: its scale is that of adapter_config.json beside it"),
        ({"peft": OfPeft(changed_base="olora")}, "a: it was trained with init_lora_weights 'olora', which changes"),
        ({"fused": (PART,)}, "a weight as a whole and a slice of it do not meet here, each goes its own way: qkv (a) and q (b)"),
        ({"protects_nobody": True}, "no input is recognised as an acceleration LoRA, so no LoRA is protected and mu"),
        ({"too_small": {"x": 0.25}, "out": torch.float16}, "float16 has no numbers small enough for 1 module: their"),
        ({"effect": 0.25, "options": {"method": "ties"}}, "method ties leaves about 25 % of a. Choose a higher density"),
        ({"retention": 0.25, "options": {"rank": 1}}, "the cut leaves 25 % of the energy of a. Choose a higher rank"),
        ({"options": {"method": "dare", "density": 1.0}}, "density is 1, at which method dare prunes nothing: this is"),
    ],
)  # fmt: skip
def test_each_fact_that_the_user_should_know_is_a_warning_with_one_full_stop(facts, warning):
    """And nothing else of the account is, which says the rest in lines of its own."""
    facts = dict(facts)
    options = facts.pop("options", {}) | ({"out_dtype": facts.pop("out")} if "out" in facts else {})
    own = {name: facts.pop(name) for name in [*facts] if name in {one.name for one in fields(Source)}}
    found = account(source(**own), source("b"), options=options, **facts)
    (said,) = [line for line in lines(found) if line.startswith("Warning: ")]
    assert said.startswith(f"Warning: {warning}")
    assert said.endswith(".")
    assert not said.endswith("..")
    assert not warnings_of(account(options={"method": options.get("method", "linear")}))


def test_rebalanced_modules_are_counted():
    assert lines(account(rebalanced=3))[-1] == (
        "Factors of 3 modules balanced to fit float16; their updates are the same."
    )
    assert not any("balanced" in line for line in lines(account()))


def hollow(out, inputs, kernel=()):
    """A LoHa without numbers, of rank 8 twice: as LoRA it needs 64."""
    columns = inputs * torch.Size(kernel).numel()
    a, b = torch.empty(out, 8, device="meta"), torch.empty(8, columns, device="meta")
    return LohaLayer(a, b, a, b, unfold=kernel)


def test_what_stays_another_kind_is_told_with_both_sizes():
    merged = Lora({"m": hollow(4000, 3000), "n": hollow(1000, 500, (3, 3)), "o": MERGED.modules["m"]})
    # 2 * 8 * (4000 + 3000) + 2 * 8 * (1000 + 4500) numbers, and 64 * 7000 + 64 * 5500.
    assert "2 modules that no other input changes stay LoHa: 0.4 MB in float16, as LoRA 1.6 MB." in lines(
        account(), merged
    )
    assert not any("stay" in line for line in lines(account()))


def test_a_mean_is_told_with_what_its_weights_add_up_to():
    said = lines(account(source(strength=0.5), source("b", strength=1.25), options={"method": "average"}))
    assert "The mean of the LoRAs: each strength is a weight, divided by their sum, 1.75." in said


@pytest.mark.parametrize(
    ("effect", "percent"), [(None, "0"), (0.0, "0"), (0.5, "50"), (0.989, "99"), (0.99, None), (1.0, None)]
)
def test_a_protected_one_that_is_scaled_down_is_told_below_ninety_nine_hundredths(effect, percent):
    for protected, method in itertools.product((True, False), ("ties", "linear")):
        found = _scaled_protection([source(effect=effect, protected=protected)], MergeOptions(method))
        if protected and method == "ties" and percent:
            assert f"about {percent} % is left of a, which is protected." in found[0]
        else:
            assert found == []


def test_every_module_belongs_to_a_part_of_the_model():
    names = [
        "lora_unet_a",
        "lora_transformer_a",
        "lora_te1_a",
        "lora_te2_a",
        "lora_te_a",
        "lora_prior_te_a",
        "a_other1_b",
    ]
    one = Lora({name: MERGED.modules["m"] for name in names}, source="x")
    assert describe(one).split("\n")[1] == (
        "  modules: 7 (diffusion model 2, other 3, text encoder 1 1, text encoder 2 1)"
    )


def test_a_lora_in_a_few_lines():
    tensors = kohya("lora_unet_input_blocks_1_1_proj_in", *factors(400, 4, 300), 2.0)
    tensors |= kohya("lora_unet_middle_block_1_proj_in", *factors(400, 8, 300), 8.0)
    tensors |= kohya("lora_te1_text_model_encoder_layers_0_mlp_fc1", *factors(400, 4, 300))
    tensors |= kohya("lora_te2_text_model_encoder_layers_0_mlp_fc1", *factors(400, 4, 300))
    lora = Lora.from_state_dict(tensors | {"lora_unet_middle_block_1_proj_in.diff_b": torch.ones(400)}, source="x")
    assert describe(lora).split("\n") == [
        "x",
        "  modules: 4 (diffusion model 2, text encoder 1 1, text encoder 2 1)",
        "  rank: 4 to 8, scale (alpha / rank): 0.5 to 1",
        "  weight and bias differences: 1",
        "  size: 0.0 MB in float16",
    ]


@pytest.mark.parametrize(("count", "more"), [(1, []), (50, []), (51, ["    and 1 more"]), (70, ["    and 20 more"])])
def test_of_many_inputs_the_first_fifty_are_named_and_the_others_counted(count, more):
    merged = merge([(Lora.from_state_dict(kohya("lora_unet_conv_in", *factors(4, 1, 4)), source="a"), 0.5)])
    recipe = json.loads(merged.metadata["lcm_kit.merge"])
    recipe["inputs"] = [recipe["inputs"][0] | {"strength": number} for number in range(count)]
    told = describe_provenance(replace(merged, metadata={"lcm_kit.merge": json.dumps(recipe)}))
    assert told[0] == "  made from: the exact sum"
    assert told[1 : 1 + min(count, 50)] == [f"    a * {number}, sha256 unknown" for number in range(min(count, 50))]
    assert told[1 + min(count, 50) :] == more


def test_the_block_strengths_and_the_hash_of_an_input_are_told():
    one = Lora.from_state_dict(kohya("lora_unet_middle_block_1_proj_in", *factors(4, 1, 4)), source="a")
    merged = merge([(one, 0.5)], block_strengths="mid=0.5", sha256=["ab" * 32])
    assert describe_provenance(merged) == [
        "  made from: the exact sum",
        f"    a * 0.5, times mid=0.5, sha256 {'ab' * 32}",
    ]
