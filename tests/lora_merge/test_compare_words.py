"""A comparison's text, table and answer, line by line, from figures written by hand."""

import csv
import io
import json
from dataclasses import replace

import pytest

from lcm_kit.lora_merge.comparing.comparison import Comparison, Group, Input, Measure, Module, Pair, Part
from lcm_kit.lora_merge.comparing.report import as_csv, as_json, as_text
from lcm_kit.lora_merge.comparing.verdict import answer, dependent_blocks, headline, relation
from lcm_kit.lora_merge.metadata.adapter_config import OfPeft


def share(found, expected=0.02, whole=1.0, deviation=0.001):
    return Measure(found * whole, expected * whole, (deviation * whole) ** 2, whole)


def pair(cosine=0.0, deviation=0.001, which=(0, 1), norms=12.0, first=0.02, second=0.02, shared=3):
    return Pair(which=which, shared=shared, dot=cosine * norms, norms=norms, dot_variance=(deviation * norms) ** 2,
                left=share(0.25, 0.125, 4.0), right=share(0.5, 0.0625, 4.0), first_inside=share(first, whole=9.0),
                second_inside=share(second, whole=16.0))  # fmt: skip


def part(**facts):
    return Part(**{"kind": "LoRA", "rank": 4, "effective": 4, "alpha": 2.0, "scale": 0.5, "energy": 9.0,
                   "deficient": False} | facts)  # fmt: skip


def one_input(source="a.safetensors", strength=2.0, **facts):
    return Input(**{"source": source, "strength": strength, "modules": 3, "compared": 3, "only_here": (), "zero": (),
                    "deficient": (), "settings": (("LoRA", 4, 2.0, 0.5, 3),), "biases": 0, "carried": (),
                    "values": 1_250_000} | facts)  # fmt: skip


def group(name="all", energies=(9.0, 16.0), energy=40.0, pairs=None, modules=3):
    return Group(
        name=name, modules=modules, energies=energies, energy=energy, pairs=(pair(),) if pairs is None else pairs
    )


# Norms 2 * 3 and 0.5 * 4; apart, as independent LoRAs, the root of 36 + 4, which is the sum's norm here.
INPUTS = (one_input(), one_input("b.safetensors", -0.5, values=600_000))
MODULE = Module(name="lora_unet_x", block="unet mid", shape=(8, 6), parts=(part(), None), energy=36.0, pairs=())
BOTH = Module(name="lora_unet_y", block="unet out", shape=(4, 5), parts=(part(kind="LoKr", alpha=None, scale=1.0, energy=1.0),
              part(rank=8, effective=3, energy=4.0)), energy=5.0, pairs=(pair(0.25, norms=2.0),))  # fmt: skip


def comparison(**facts):
    return Comparison(**{
        "inputs": INPUTS, "modules": (MODULE, BOTH), "blocks": (group("unet mid"),), "whole": group(),
        "products": ((9.0, 0.0), (0.0, 16.0)), "kept": ((0.0, 30.0, 40.0), (0.0, 27.0, 36.0), (0.0, 0.0, 0.0)),
        "numbers": (0, 500_000, 1_000_000), "leading_energy": 0.5,
    } | facts)  # fmt: skip


def of_one(**facts):
    return comparison(inputs=(one_input(**facts),), whole=group(energies=(9.0,), pairs=()), modules=(MODULE,),
                      blocks=(group("unet down.0", energies=(9.0,), energy=9.0, pairs=(), modules=1),),
                      products=((9.0,),), kept=((0.0, 9.0), (0.0, 9.0)), numbers=(0, 1000))  # fmt: skip


def test_two_loras_in_full():
    found = comparison(inputs=(INPUTS[0], replace(INPUTS[1], unread=("stray",), peft=OfPeft(config="used"))))
    assert as_text(found, 1).split("\n") == [
        "Will they fight? No fight: they are independent, and their sum does what each of them does.",
        "  a and b: independent, cosine +0.000 (by chance up to 0.01).",
        "",
        "Inputs, norms with alpha and strength:",
        "  a * 2: norm 6, 3 modules, 0 only here, 2.5 MB in float16",
        "    LoRA rank 4 alpha 2 (scale 0.5): 3",
        "  b * -0.5: norm 2, 3 modules, 0 only here, 1.2 MB in float16",
        "    LoRA rank 4 alpha 2 (scale 0.5): 3",
        "  a is 3 times as strong as b.",
        "",
        "Norm of the sum: 6.325, 1.000 times what independent LoRAs give.",
        "",
        "Each two together (chance in brackets; leading directions hold 50 % of a LoRA's energy):",
        "  a and b: 3 modules shared, cosine +0.0000 (0 +- 0.0010)",
        "    same outputs 25.0 % (12.5 %), same inputs 50.0 % (6.2 %)",
        "    of a in the leading inputs of b: 2.0 % (2.0 %); of b in those of a: 2.0 % (2.0 %)",
        "",
        "Blocks (norms in the order of the inputs; sum/apart is 1 for independent LoRAs):",
        "  block    modules    norm 1    norm 2 sum/apart  cosine 1-2",
        "  unet mid       3         6         2     1.000      +0.000",
        "",
        "Of the merge: rank 2 is exact, 2.0 MB in float16. Cut to a smaller rank:",
        "    rank     error        MB   keeps of 1   keeps of 2",
        "       1       0.5       1.0       75.0 %            -  <- this rank",
        "",
        "Note: b.safetensors holds what has no effect in ComfyUI and is left out: unknown (1 key: stray).",
        "Note: b.safetensors: its scale is that of adapter_config.json beside it.",
    ]


def test_one_lora_in_full():
    assert as_text(of_one(), 1).split("\n") == [
        "Will they fight? One LoRA alone has nobody to fight with.",
        "",
        "Inputs, norms with alpha and strength:",
        "  a * 2: norm 6, 3 modules, 2.5 MB in float16",
        "    LoRA rank 4 alpha 2 (scale 0.5): 3",
        "",
        "Blocks (norms in the order of the inputs; sum/apart is 1 for independent LoRAs):",
        "  block       modules    norm 1 sum/apart",
        "  unet down.0       1         6     0.500",
        "",
        "Of the merge: rank 1 is exact, 0.0 MB in float16. Cut to a smaller rank:",
        "    rank     error        MB   keeps of 1",
    ]


def test_nothing_to_compare_has_no_tables():
    found = comparison(inputs=(one_input(settings=(), compared=0),), blocks=(), modules=(), kept=((0.0,), (0.0,)), numbers=(0,),
                       whole=group(energies=(0.0,), energy=0.0, pairs=(), modules=0))  # fmt: skip
    assert as_text(found).split("\n")[2:] == [
        "Inputs, norms with alpha and strength:",
        "  a * 2: norm 0, 3 modules, 2.5 MB in float16",
        "    nothing that can be compared",
    ]


@pytest.mark.parametrize("count", [1, 4, 5, 9])
def test_four_settings_are_told_and_the_others_counted(count):
    settings = tuple(("LoRA", rank, None if rank % 2 else rank / 2, 1.0, 2) for rank in range(1, count + 1))
    told = next(line for line in as_text(of_one(settings=settings)).split("\n") if "rank 1 alpha" in line)
    shown = [
        f"LoRA rank {rank} alpha {'none' if rank % 2 else f'{rank // 2}'} (scale 1): 2"
        for rank in range(1, min(count, 4) + 1)
    ]
    assert told == "    " + "; ".join(shown + ([f"{count - 4} other setting{'s' * (count > 5)}"] if count > 4 else []))


def test_what_does_nothing_or_is_not_compared_is_counted():
    facts = {
        "zero": ("z1", "z2"),
        "deficient": ("d",),
        "carried": (("DoRA", 2), ("OFT", 1)),
        "biases": 3,
        "only_here": ("z1",),
    }
    lines = as_text(comparison(inputs=(one_input(**facts), INPUTS[1]))).split("\n")
    assert "  a * 2: norm 6, 3 modules, 1 only here, 2.5 MB in float16" in lines
    assert "    2 modules are zero and do nothing (first: z1)" in lines
    assert "    1 module has a smaller rank than factors (first: d)" in lines
    assert "    not compared: 2 modules of kind DoRA, 1 module of kind OFT, 3 bias differences" in lines


def test_which_of_two_is_the_stronger_is_said_where_both_do_something():
    weak = comparison(inputs=(INPUTS[1], INPUTS[0]), whole=group(energies=(16.0, 9.0)))
    assert "  a is 3 times as strong as b." in as_text(weak)
    silent = comparison(inputs=(replace(INPUTS[0], strength=0.0), INPUTS[1]))
    assert "times as strong" not in as_text(silent)
    three = comparison(inputs=(*INPUTS, one_input("c")), whole=group(energies=(9.0, 16.0, 1.0)),
                       blocks=(), kept=((0.0, 1.0),) * 4, products=())  # fmt: skip
    assert "times as strong" not in as_text(three)


def test_of_many_pairs_three_have_a_column_and_a_block_without_one_a_dash():
    pairs = tuple(pair(which=which) for which in ((0, 1), (0, 2), (0, 3), (1, 2)))
    inputs = tuple(one_input(name) for name in "abcd")
    energies = (9.0, 16.0, 9.0, 9.0)
    found = comparison(inputs=inputs, whole=group(energies=energies, pairs=pairs),
                       blocks=(group("in", energies, pairs=pairs[1:3]),), kept=((0.0, 1.0),) * 5, products=())  # fmt: skip
    table = as_text(found).split("Blocks (")[1].split("\n\n")[0].split("\n")
    assert (
        table[1]
        == "  block modules    norm 1    norm 2    norm 3    norm 4 sum/apart  cosine 1-2  cosine 1-3  cosine 1-4"
    )
    assert (
        table[2]
        == "  in          3         6         8         6         6     0.482           -      +0.000      +0.000"
    )


@pytest.mark.parametrize("full", [1, 2, 4, 5, 300])
def test_ranks_below_the_exact_one_are_in_the_table_of_cuts(full):
    kept = tuple(float(rank) for rank in range(full + 1))
    found = comparison(kept=(kept, kept, kept), numbers=tuple(10**6 * rank for rank in range(full + 1)))
    rows = as_text(found, 3).split("Cut to a smaller rank:\n")[1].split("\n")[1:]
    assert [int(row.split()[0]) for row in rows] == [r for r in (3, 4, 8, 16, 32, 64, 128, 256) if r < full]
    assert [("<- this rank" in row) for row in rows] == [r == 3 for r in (3, 4, 8, 16, 32, 64, 128, 256) if r < full]
    for row in rows:
        rank = int(row.split()[0])
        assert row.split()[1:4] == [f"{(1 - rank / full) ** 0.5:.3g}", f"{2 * rank:.1f}", f"{100 * rank / full:.1f}"]
    empty = comparison(kept=((0.0,) * (full + 1),) * 3)
    assert "Cut to" not in as_text(empty)


def test_every_figure_of_a_module_is_in_its_row():
    rows = list(csv.reader(io.StringIO(as_csv(comparison()))))
    head, first, second = rows
    figures = ["norm", "kind", "rank", "effective_rank", "alpha", "scale"]
    measures = ["left", "left_chance", "right", "right_chance", "first_inside", "first_inside_chance", "second_inside",
                "second_inside_chance"]  # fmt: skip
    assert head == [
        "module", "block", "out", "in", "norm_of_sum", *(f"{name}_1" for name in figures), *(f"{name}_2" for name in figures),
        "cosine_1_2", "cosine_chance_1_2", *(f"{name}_1_2" for name in measures),
    ]  # fmt: skip
    assert first == ["lora_unet_x", "unet mid", "8", "6", "6.0", "6.0", "LoRA", "4", "4", "2.0", "0.5", *[""] * 16]
    assert second[:11] == ["lora_unet_y", "unet out", "4", "5", f"{5**0.5}", "2.0", "LoKr", "4", "4", "", "1.0"]
    assert second[11:17] == ["1.0", "LoRA", "8", "3", "2.0", "0.5"]
    assert [float(value) for value in second[17:]] == pytest.approx(
        [0.25, 0.001, 0.25, 0.125, 0.5, 0.0625, 0.02, 0.02, 0.02, 0.02]
    )


def test_all_figures_are_in_the_json():
    inputs = (replace(INPUTS[0], peft=OfPeft(dora=True)), INPUTS[1])
    told = json.loads(as_json(comparison(inputs=inputs), 1))
    assert (told["version"], told["rank"], len(told["notes"]), told["leading_energy"]) == (1, 1, 1, 0.5)
    assert told["notes"][0].startswith("a.safetensors: its DoRA was trained by PEFT")
    assert json.loads(as_json(comparison()))["rank"] is None
    assert told["answer"] == answer(comparison())
    assert told["inputs"][1] == {
        "label": "b", "source": "b.safetensors", "strength": -0.5, "norm": 2.0, "modules": 3, "compared": 3, "only_here": [],
        "zero": [], "rank_deficient": [], "biases": 0, "not_additive": {}, "values": 600_000,
        "settings": [{"kind": "LoRA", "rank": 4, "alpha": 2.0, "scale": 0.5, "modules": 3}],
    }  # fmt: skip
    assert told["whole"] | {"pairs": None} == {
        "name": "all", "modules": 3, "norms": [6.0, 2.0], "norm_of_sum": 40**0.5, "growth": pytest.approx(1), "pairs": None
    }  # fmt: skip
    figures = {"cosine": 0.0, "cosine_chance": pytest.approx(0.001), "left": 0.25, "left_chance": 0.125, "right": 0.5,
               "right_chance": 0.0625, "first_inside": pytest.approx(0.02), "first_inside_chance": pytest.approx(0.02),
               "second_inside": pytest.approx(0.02), "second_inside_chance": pytest.approx(0.02)}  # fmt: skip
    assert told["whole"]["pairs"] == [{"inputs": [1, 2], "shared": 3, "relation": "independent", **figures}]
    assert [block["name"] for block in told["blocks"]] == ["unet mid"]
    first, second = told["modules"]
    assert first == {
        "module": "lora_unet_x", "block": "unet mid", "shape": [8, 6], "norm_of_sum": 6.0, "pairs": [],
        "inputs": [{"norm": 6.0, "kind": "LoRA", "rank": 4, "effective_rank": 4, "alpha": 2.0, "scale": 0.5}, None],
    }  # fmt: skip
    assert second["pairs"] == [{"inputs": [1, 2], **figures, "cosine": 0.25}]
    assert told["cut"] == {
        "rank": [0, 1, 2], "error": [1.0, 0.5, 0.0], "megabytes_float16": [0.0, 1.0, 2.0],
        "kept": [[0.0, 0.75, 1.0], [None, None, None]],
    }  # fmt: skip


# ---- the answer


@pytest.mark.parametrize(
    ("cosine", "deviation", "first", "second", "kind", "degree"),
    [
        (0.1, 0.001, 0.02, 0.02, "alike", 0.1),  # what matters: a tenth
        (-0.1, 0.001, 0.02, 0.02, "oppose", -0.1),
        (0.0999, 0.001, 0.02, 0.02, "independent", 0.0999),
        (0.2, 0.0199, 0.02, 0.02, "alike", 0.2),  # beyond ten deviations of chance
        (0.2, 0.0201, 0.02, 0.02, "independent", 0.2),
        (-0.2, 0.0201, 0.02, 0.02, "independent", -0.2),
        (0.0, 0.001, 0.13, 0.02, "crowd", 0.11),  # of all of one's energy, above what falls there by chance
        (0.0, 0.001, 0.02, 0.13, "crowd", 0.11),
        (0.0, 0.001, 0.14, 0.53, "crowd", 0.51),
        (0.0, 0.001, 0.119, 0.119, "independent", 0.0),
        (0.3, 0.001, 0.5, 0.5, "alike", 0.3),
    ],
)
def test_what_stands_out_matters_and_is_no_chance(cosine, deviation, first, second, kind, degree):
    found = relation(pair(cosine, deviation, first=first, second=second))
    assert (found.kind, found.degree) == (kind, pytest.approx(degree))


def test_energy_that_chance_could_have_put_there_is_no_crowd():
    for deviation, kind in ((0.0105, "crowd"), (0.0115, "independent")):
        one = replace(pair(), first_inside=share(0.13, 0.02, 9.0, deviation))
        assert relation(one).kind == kind


def block(name, cosine=0.0, crowd=0.02, energies=(4.0, 4.0), which=(0, 1)):
    return group(name, energies, pairs=(pair(cosine, first=crowd, which=which),))


@pytest.mark.parametrize(
    ("energies", "counts"),
    [((0.09, 0.0), True), ((0.0899, 0.1599), False), ((0.0, 0.16), True), ((0.0, 0.0), False)],
)
def test_a_block_with_less_than_a_hundredth_of_both_decides_nothing(energies, counts):
    found = comparison(blocks=(block("x", -0.5, energies=energies),))
    assert bool(dependent_blocks(found, (0, 1))) == counts


def test_blocks_come_by_kind_and_by_how_strong_it_is():
    blocks = [block("c1", crowd=0.2), block("a1", 0.3), block("o1", -0.2), block("n"), block("a2", 0.6), block("o2", -0.9),
              block("c2", crowd=0.5)]  # fmt: skip
    found = dependent_blocks(comparison(blocks=tuple(blocks)), (0, 1))
    assert [one.name for one, _ in found] == ["o2", "o1", "a2", "a1", "c2", "c1"]


HEADLINES = [
    ({"whole": group(pairs=(pair(-0.5),))}, "They fight: what one adds another takes away in part."),
    ({"whole": group(pairs=(pair(0.5),))}, "They double up: in part"),
    ({"blocks": (block("x", -0.5), block("y", 0.5))}, "They fight in places, and are independent on the whole."),
    ({"whole": group(pairs=(pair(first=0.5),)), "blocks": (block("x", -0.5),)}, "They fight in places"),
    ({"whole": group(pairs=(pair(first=0.5),)), "blocks": (block("x", 0.5),)}, "They do not cancel, but they crowd"),
    ({"blocks": (block("x", 0.5), block("y", crowd=0.5))}, "They double up in places"),
    ({"blocks": (block("x", crowd=0.5),)}, "No fight; but in places one acts where the other is strongest."),
    ({}, "No fight: they are independent"),
    ({"whole": group(pairs=())}, "Nothing to fight: no two of these LoRAs change the same modules."),
    ({"whole": group(pairs=()), "fused": 1}, "Not known: they change the same weights under two names"),
    (
        {"whole": group(pairs=(pair(-0.5),)), "inputs": (INPUTS[0], replace(INPUTS[1], strength=0.0))},
        "Nothing to fight",
    ),
]


@pytest.mark.parametrize(("facts", "begins"), HEADLINES)
def test_the_first_line_is_the_worst_that_is_there(facts, begins):
    found = comparison(**facts)
    assert headline(found).startswith(begins)
    assert answer(found)[0] == headline(found)


@pytest.mark.parametrize(
    ("facts", "line"),
    [
        ({"whole": group(pairs=(pair(-0.5),))}, "a and b: opposed, cosine -0.500 (by chance up to 0.01). Part of one undoes the other; "
         "lower one, or keep it out of the blocks below."),
        ({"whole": group(pairs=(pair(0.5, 0.002),))}, "a and b: alike, cosine +0.500 (by chance up to 0.02). They add up to more than "
         "either was meant to be; lower their strengths."),
        ({"whole": group(pairs=(pair(0.05),))}, "a and b: nearly independent, cosine +0.050 (by chance up to 0.01), which changes the sum "
         "little."),
        ({"whole": group(pairs=(pair(0.005),))}, "a and b: independent, cosine +0.005 (by chance up to 0.01)."),
        ({"whole": group(pairs=())}, "a and b: they change different modules, so neither touches what the other does there."),
        ({"whole": group(pairs=(pair(first=0.52),))}, "a and b: no cancelling, cosine +0.000 (by chance up to 0.01), but 52 % of a lies where "
         "b is strongest (2 % by chance). Protecting the one (mu) makes room."),
        ({"whole": group(pairs=(pair(first=0.52, second=0.3),))}, "a and b: no cancelling, cosine +0.000 (by chance up to 0.01), but 52 % of "
         "a lies where b is strongest (2 % by chance) and 30 % of b lies where a is strongest (2 % by chance). Protecting the one "
         "(mu) makes room."),
        ({"inputs": (INPUTS[0], replace(INPUTS[1], strength=0.0))}, "a and b: b adds nothing, its strength is 0."),
        ({"whole": group(energies=(0.0, 0.0))}, "a and b: a adds nothing, its updates are zeros, and b adds nothing, its updates are zeros."),
    ],
)  # fmt: skip
def test_every_two_have_their_sentence(facts, line):
    assert answer(comparison(**({"blocks": ()} | facts)))[1:] == [line]


@pytest.mark.parametrize(
    ("strange", "calm", "where"),
    [
        (1, 3, " Where: b0 (cosine -0.50)."),
        (5, 3, " Where: b0 (cosine -0.50), b1 (cosine -0.50), b2 (cosine -0.50), b3 (cosine -0.50), b4 (cosine -0.50)."),
        (6, 3, ", b4 (cosine -0.50), and 1 more block."),
        (9, 1, " Where: nearly everywhere, most in b0 (cosine -0.50), b1 (cosine -0.50), b2 (cosine -0.50), b3 (cosine -0.50), b4 (cosine -0.50)."),
        (8, 2, ", b4 (cosine -0.50), and 3 more blocks."),
    ],
)  # fmt: skip
def test_five_blocks_are_named_and_where_it_is_nearly_everywhere_that_is_said(strange, calm, where):
    """More than four fifths of the blocks that both change; one that they do not share does not count."""
    blocks = [block(f"b{n}", -0.5) for n in range(strange)] + [block(f"c{n}") for n in range(calm)]
    blocks.append(group("apart", pairs=()))
    (_, line) = answer(comparison(whole=group(pairs=(pair(-0.5),)), blocks=tuple(blocks)))
    assert line.endswith(where)
    (_, crowded) = answer(comparison(blocks=(block("x", crowd=0.52),)))
    assert crowded.endswith(". Where: x (crowded, 50 % above chance).")


@pytest.mark.parametrize("count", [3, 4])
def test_pairs_that_are_calm_come_last_and_many_of_them_in_one_line(count):
    which = [(i, j) for i in range(count) for j in range(i + 1, count)]
    names = "abcd"[:count]
    whole = group(energies=(9.0,) * count, pairs=tuple(pair(-0.5 if w == (1, 2) else 0.0, which=w) for w in which))
    found = comparison(
        inputs=tuple(map(one_input, names)), whole=whole, blocks=(), products=(), kept=((0.0,),) * (count + 1)
    )
    lines = answer(found)
    assert lines[1].startswith("b and c: opposed")
    assert [line.split(":")[0] for line in lines[2:]] == (
        ["a and b", "a and c"] if count == 3 else ["a and b", "a and c", "a and d", "b and d", "c and d"]
    )
    quiet = replace(whole, pairs=tuple(pair(which=w) for w in which))
    lines = answer(replace(found, whole=quiet))
    assert len(lines) == (4 if count == 3 else 2)
    if count == 4:
        assert lines[1] == "The other 6 pairs: independent."
