"""A merge method is a row: its parameters reach options, command line and report from there."""

import json
from dataclasses import replace

import pytest
import torch

from lcm_kit.lora_merge import METHODS, Lora, MergeOptions, describe_merge, load, merge, merge_with_account, save
from lcm_kit.lora_merge.__main__ import main
from lcm_kit.lora_merge.merging.account import Source
from lcm_kit.lora_merge.merging.report import _lost as lost
from lcm_kit.lora_merge.merging.report import warnings_of
from lcm_kit.lora_merge.merging.reproduce import reproduce
from lcm_kit.lora_merge.methods import table
from lcm_kit.lora_merge.methods.table import Method, Parameter, Situation, all_parameters, methods_with
from lcm_kit.lora_merge.settings.options import options_from_dict

GENERATOR = torch.Generator().manual_seed(11)
MODULE = "lora_unet_x"


def lora(source):
    up, down = torch.randn(6, 2, generator=GENERATOR), torch.randn(2, 6, generator=GENERATOR)
    return Lora.from_state_dict({f"{MODULE}.lora_up.weight": up, f"{MODULE}.lora_down.weight": down}, source=source)


INPUTS = [(lora("first"), 1.0), (lora("second"), 0.5)]


def sharpened(deltas, situation):
    return situation.values["sharpness"] * sum(deltas)


ROW = Method(
    combine=sharpened,
    summary="the sum, sharpened",
    source="nowhere",
    parameters={"sharpness": Parameter(default=1.5, low=1.0, high=4.0, meaning="factor, 100 % of it")},
    draws=True,
)


@pytest.fixture
def made_up(monkeypatch):
    """The table with one more row."""
    monkeypatch.setitem(table.METHODS, "made_up", ROW)


@pytest.mark.usefixtures("made_up")
def test_a_new_row_is_an_option_with_its_range_and_default():
    assert MergeOptions(method="made_up").values == {"sharpness": 1.5}
    whole = sum(strength * one.delta(MODULE) for one, strength in INPUTS)
    for given, factor in ({}, 1.5), ({"sharpness": 2.0}, 2.0):
        merged, account = merge_with_account(INPUTS, method="made_up", parameters=given, seed=3)
        torch.testing.assert_close(merged.delta(MODULE), factor * whole)
        assert f"method made_up (sharpness {factor:g}, seed 3)" in describe_merge(account, merged)
        notes = json.loads(merged.metadata["lcm_kit.merge"])["options"]
        assert notes["sharpness"] == factor
        assert options_from_dict(notes) == MergeOptions(method="made_up", parameters={"sharpness": factor}, seed=3)
    with pytest.raises(ValueError, match=r"sharpness is 5, but it has to be within 1 and 4\."):
        merge(INPUTS, method="made_up", parameters={"sharpness": 5})
    with pytest.raises(ValueError, match=r"sharpness is 2, but method ties has no sharpness\. Leave sharpness out\."):
        merge(INPUTS, method="ties", parameters={"sharpness": 2})
    with pytest.raises(
        ValueError, match=r"'sharpnes', which is no parameter of any method \(did you mean 'sharpness'\?\)"
    ):
        merge(INPUTS, method="made_up", parameters={"sharpnes": 2})


@pytest.mark.usefixtures("made_up")
def test_a_new_row_is_a_flag_of_the_command_and_in_its_help(tmp_path, capsys):
    files = [str(tmp_path / f"{one.source}.safetensors") for one, _ in INPUTS]
    for (one, _), file in zip(INPUTS, files, strict=True):
        save(one, file, dtype=torch.float32)
    out = tmp_path / "out.safetensors"
    command = ["merge", files[0], f"{files[1]}:0.5", "-o", str(out), "--dtype", "fp32", "--method", "made_up"]
    assert main([*command, "--sharpness", "3"]) == 0
    assert "method made_up (sharpness 3)" in capsys.readouterr().out
    torch.testing.assert_close(
        load(out).delta(MODULE), 3 * sum(strength * one.delta(MODULE) for one, strength in INPUTS)
    )
    assert reproduce(out).identical
    with pytest.raises(SystemExit):
        main(["merge", "--help"])
    text = " ".join(capsys.readouterr().out.split())
    assert "--sharpness SHARPNESS of made_up, 1 to 4; default: 1.5; factor, 100 % of it" in text
    assert "made_up the sum, sharpened (default: sharpness 1.5)" in text


@pytest.mark.usefixtures("made_up")
def test_other_methods_say_nothing_of_a_new_row():
    merged, account = merge_with_account(INPUTS)
    assert "sharpness" not in describe_merge(account, merged)
    assert merged.delta(MODULE).equal(merge(INPUTS).delta(MODULE))


@pytest.mark.parametrize("name", all_parameters())
def test_no_parameter_has_the_name_of_another_option(name):
    options = set(MergeOptions().to_dict()) - set(all_parameters())
    assert name.isidentifier()
    assert name not in {
        *options,
        "parameters",
        "output",
        "format",
        "dtype",
        "device",
        "workers",
        "block_strengths",
        "loras",
    }


@pytest.mark.parametrize("method", METHODS)
def test_a_default_is_within_its_range_and_the_row_accepts_its_defaults(method):
    for name, parameter in METHODS[method].parameters.items():
        assert parameter.low <= parameter.default <= parameter.high
        assert parameter.neutral is None or parameter.low <= parameter.neutral <= parameter.high, name
    MergeOptions(method=method).check(2)


@pytest.mark.parametrize("method", METHODS)
def test_a_method_draws_exactly_if_the_table_says_so(method):
    deltas = [merge(INPUTS, method=method, seed=seed, parameters=_half(method)).delta(MODULE) for seed in range(4)]
    assert any(not torch.equal(deltas[0], other) for other in deltas[1:]) is METHODS[method].draws


def _half(method):
    return {"density": 0.5} if "density" in METHODS[method].parameters else {}


@pytest.mark.parametrize("neutral", [False, True])
@pytest.mark.parametrize("name", [name for name, method in METHODS.items() if method.combine])
def test_what_changes_an_update_alone_and_what_makes_the_plain_sum_are_what_the_table_says(name, neutral):
    method = METHODS[name]
    values = {key: parameter.default for key, parameter in method.parameters.items()}
    if neutral:
        values |= {key: p.neutral for key, p in method.parameters.items() if p.neutral is not None}
    deltas = [torch.randn(12, 9, generator=torch.Generator().manual_seed(seed)) for seed in (1, 2)]

    def made(*some):
        strengths, inputs = tuple(1.0 for _ in some), tuple(range(len(some)))
        situation = Situation(strengths=strengths, inputs=inputs, values=values, module="x", seed=5)
        return method.combine(some, situation)

    def is_as(found, wanted):
        return torch.allclose(found, wanted, rtol=1e-4, atol=1e-4)

    assert method.changes_one(values) != is_as(made(deltas[0]), deltas[0])
    assert method.is_sum(values) == is_as(made(*deltas), deltas[0] + deltas[1])


@pytest.mark.parametrize(
    ("density", "outliers", "fine"),
    [
        (0.9, 0.1, True),
        (0.7, 0.3 + 1e-12, True),
        (0.7, 0.31, False),
        (0.9, 0.9, False),
        (0.1, 0.9, True),
        (1.0, 0.5, True),
    ],
)
def test_shares_of_the_same_entries_add_up_to_the_whole_at_most(density, outliers, fine):
    """But for density 1, which keeps all."""
    said = METHODS["breadcrumbs"].refuses({"density": density, "outliers": outliers})
    assert (said is None) == fine
    assert fine or said.startswith(f"density {density:g} and outliers {outliers:g} add up to more than 1: ")


def test_the_methods_that_have_a_parameter_are_named_where_they_are_few(monkeypatch):
    assert methods_with("outliers") == "breadcrumbs"
    assert methods_with("spread") == "della and della_ties"
    assert methods_with("density") == "methods that have it"
    monkeypatch.setattr(table, "_NAMED", 1)
    assert methods_with("outliers") == "breadcrumbs"
    assert methods_with("spread") == "methods that have it"


@pytest.mark.parametrize("power", [-60, -20, 20, 60])
def test_slerp_of_the_same_updates_does_not_depend_on_the_size_of_both_strengths(power):
    """With the strengths multiplied in, they count by their ratio."""
    deltas = [torch.randn(5, 4, generator=torch.Generator().manual_seed(seed)) for seed in (1, 2)]
    usual, other = (
        METHODS["slerp"].combine(
            deltas, Situation(strengths=(0.75 * by, 2.0 * by), inputs=(0, 1), values={}, module="x", seed=0)
        )
        for by in (1.0, 2.0**power)
    )
    torch.testing.assert_close(other, usual)


@pytest.mark.parametrize("strengths", [(2.0**130, 1.0), (1.0, 2.0**130), (2.0**-130, 1.0), (1.0, 2.0**-130)])
def test_slerp_of_strengths_that_are_far_apart_is_the_stronger_update(strengths):
    """Beyond float32's own range between them: of the other one not a digit is left."""
    updates = [torch.randn(5, 4, generator=torch.Generator().manual_seed(seed)).double() for seed in (1, 2)]
    deltas = [(update * strength / max(strengths)).float() for update, strength in zip(updates, strengths, strict=True)]
    situation = Situation(strengths=strengths, inputs=(0, 1), values={}, module="x", seed=0)
    torch.testing.assert_close(METHODS["slerp"].combine(deltas, situation), deltas[strengths.index(max(strengths))])


@pytest.mark.parametrize("method", METHODS)
def test_the_report_names_the_seed_of_methods_that_draw(method):
    merged, account = merge_with_account(INPUTS, method=method, seed=9)
    assert ("seed 9" in describe_merge(account, merged)) is METHODS[method].draws


def test_a_parameter_by_name_and_in_the_mapping_is_the_same():
    by_name, in_mapping = MergeOptions(method="della", density=0.5), MergeOptions("della", parameters={"density": 0.5})
    assert by_name == in_mapping
    assert hash(by_name) == hash(in_mapping)
    assert (by_name.density, by_name.spread) == (0.5, None)
    assert replace(by_name, seed=4).values == by_name.values == {"density": 0.5, "spread": 0.3}
    assert MergeOptions(density=0.5, parameters={"density": 0.5}).parameters == {"density": 0.5}
    with pytest.raises(ValueError, match=r"density is given twice, as 0\.5 and in parameters as 0\.6"):
        merge(INPUTS, method="ties", density=0.5, parameters={"density": 0.6})


def test_what_was_handed_in_stays_as_it_is():
    given = {"density": None, "spread": 0.2}
    options = MergeOptions("della", density=0.5, parameters=given)
    assert given == {"density": None, "spread": 0.2}
    given["spread"] = 0.9
    assert options.values == {"density": 0.5, "spread": 0.2}


@pytest.mark.parametrize("name", ["parameters", "densty", "__class__"])
def test_notes_with_unknown_options_are_refused(name):
    with pytest.raises(ValueError, match=rf"unknown options \({name}\)"):
        options_from_dict({"method": "linear", name: {}})


@pytest.mark.parametrize(
    ("density", "hint"),
    [
        (0.01, "Choose a higher density, or another method such as linear."),
        (1.0, "this is the plain sum. Choose a lower density."),
    ],
)
def test_a_hint_says_which_way_to_go(density, hint):
    _, account = merge_with_account(INPUTS, method="magnitude", density=density)
    assert any(one.endswith(hint) for one in warnings_of(account))


@pytest.mark.parametrize(("share", "warned"), [(0.49, True), (0.5, False), (0.51, False), (None, False)])
def test_less_than_half_is_lost_and_half_is_not(share, warned):
    """Of what the method made, and of what the cut left; where there is no cut nothing is lost in one."""

    def words(**facts):
        options = MergeOptions("ties", rank=facts.pop("rank", 0))
        faint = Source(**{"name": "faint", "strength": 1.0, "modules": 1, "only_here": 1, "diffs": 0, "ranks": (2, 2),
                          "alphas": (2.0, 2.0), "retention": None} | facts)  # fmt: skip
        return lost([faint], options)

    assert [text.startswith("method ties leaves about 49 % of faint") for text in words(effect=share)] == [
        True
    ] * warned
    cut = words(retention=share, rank=4)
    assert [text.startswith("the cut leaves 49 % of the energy of faint") for text in cut] == [True] * warned
    assert words(retention=share) == []


@pytest.mark.parametrize("method", METHODS)
def test_no_hint_names_a_parameter_that_the_method_has_not(method):
    faint = Source(
        name="faint",
        strength=1.0,
        modules=1,
        only_here=1,
        diffs=0,
        ranks=(2, 2),
        alphas=(2.0, 2.0),
        retention=None,
        effect=0.1,
    )
    (text,) = lost([faint], MergeOptions(method=method))
    assert ("density" in text) is ("density" in METHODS[method].parameters)


def test_what_keeps_a_protected_lora_is_what_the_table_says():
    _, account = merge_with_account(INPUTS, method="ties", protect=0, density=0.02)
    (text,) = [one for one in warnings_of(account) if "which is protected" in one]
    keeping = text.split("protected. ")[1].removesuffix(" keep it.").replace(" and ", ", ").split(", ")
    assert keeping == [name for name, method in METHODS.items() if not method.scales_down]


@pytest.mark.parametrize("method", METHODS)
def test_both_ends_of_a_parameters_range_are_in_it_and_what_lies_beyond_is_not(method):
    for name, parameter in METHODS[method].parameters.items():
        for end, way in ((parameter.low, -1), (parameter.high, 1)):
            for value, within in ((end, True), (end + way * 1e-6, False)):
                options, said = MergeOptions(method, parameters={name: value}), ""
                try:
                    options.check(METHODS[method].exact_inputs or 2)
                except ValueError as error:
                    said = str(error)
                assert ("has to be within" in said) != within, (name, value, said)


@pytest.mark.parametrize(
    ("options", "inputs", "fine"),
    [
        ({"keep": 1.0}, 1, True), ({"keep": 1.0 + 1e-9}, 1, False), ({"retain": 1e-9}, 1, True), ({"retain": 0.0}, 1, False),
        ({"rank": 1}, 1, True), ({"rank": -1}, 1, False), ({"seed": 0}, 1, True), ({"max_mb": 1e-9}, 1, True),
        ({"max_mb": float("nan")}, 1, False), ({"protect": 1, "mu": 1e-9}, 2, True), ({"protect": 2}, 2, False),
        ({"protect": -1}, 2, False), ({"protect": True}, 2, True), ({"protect": "auto", "mu": 2.0}, 1, True),
        ({"mu": -1e-9, "protect": 0}, 1, False), ({"method": "slerp"}, 2, True), ({"method": "slerp"}, 1, False),
        ({"method": "linear", "density": 1.0}, 2, True), ({"method": "linear", "density": 0.999}, 2, False), ({}, 0, False),
        ({"method": "ties", "dense": True, "rank": 4}, 2, True), ({"method": "tsv", "dense": True, "keep": 0.5}, 2, True),
        ({"method": "tsv", "dense": True, "rank": 4, "balanced": True}, 2, True), ({"rank": 4, "balanced": True}, 1, True),
        ({"out_dtype": torch.bfloat16}, 1, True), ({"out_dtype": torch.float64}, 1, False),
    ],
)  # fmt: skip
def test_what_is_at_the_ends_of_the_other_options_is_taken_and_beyond_refused(options, inputs, fine):
    given = MergeOptions(**options)
    if fine:
        given.check(inputs)
    else:
        with pytest.raises(
            ValueError, match=r"has to be|must be|share of the energy|nothing to merge|numbered|takes|keeps every"
        ):
            given.check(inputs)


@pytest.mark.parametrize(
    ("name", "values"),
    [
        ("method", [5, None, True]),
        ("rank", ["4", True, 4.0, None]),
        ("seed", ["4", False, 4.5]),
        ("balanced", [1, "True", None]),
        ("dense", [0, "no"]),
        ("leave_out", [1, []]),
        *((name, ["0.5", [0.5], {}, True]) for name in ("keep", "retain", "max_mb", "mu", "density", "spread")),
        ("out_dtype", ["float64", 16, True]),
    ],
)
def test_notes_whose_values_are_of_another_kind_are_refused(name, values):
    for value in values:
        with pytest.raises(ValueError, match=rf"{name} is .*, (which is no|but it has to be one of)"):
            options_from_dict({"method": "linear", name: value})
    fine = {"method": "ties", "rank": 4, "seed": 2, "balanced": True, "dense": False, "leave_out": True, "keep": None, "density": 0.5,
            "mu": 0, "out_dtype": "bfloat16"}  # fmt: skip
    assert options_from_dict(fine).to_dict().items() >= fine.items()
