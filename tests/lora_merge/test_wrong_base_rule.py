"""What is refused as a LoRA for another base model, by counts and names alone."""

import itertools
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lcm_kit.lora_merge.recognise import transformers
from lcm_kit.lora_merge.recognise.base_models import BY_NAME, kind_of, recognise
from lcm_kit.lora_merge.recognise.wrong_base import Counts, are_kin, is_other_base, is_wrong_base
from lcm_kit.tests.lora_merge import full_size

FATES = ("placed", "homeless", "clashing", "twice", "left", "could")
NAMES = st.sampled_from([None, "SD1.5", "SDXL", "SSD-1B"])
COUNTS = st.builds(Counts, **{fate: st.integers(0, 60) for fate in FATES})
CASES = st.fixed_dictionaries(
    {
        "counts": COUNTS,
        "bases": st.lists(NAMES.filter(bool), unique=True).map(tuple),
        "model": NAMES,
        "accelerates": st.booleans(),
        "demand_all": st.booleans(),
    }
)


def wrong(counts, bases=(), model=None, accelerates=True, demand_all=True):
    return is_wrong_base(counts, bases, model, accelerates=accelerates, demand_all=demand_all)


@given(CASES)
def test_whoever_demands_all_refuses_more(case):
    assert wrong(**case | {"demand_all": False}) <= wrong(**case | {"demand_all": True})


@given(CASES, st.sampled_from(["homeless", "clashing", "left"]), st.integers(1, 40))
def test_a_worse_fit_is_never_accepted_where_a_better_one_was_refused(case, fate, more):
    counts = case["counts"]
    assert wrong(**case) <= wrong(**case | {"counts": replace(counts, **{fate: getattr(counts, fate) + more})})


@given(CASES)
def test_a_wrong_shape_or_a_weight_named_twice_is_refused_on_every_base(case):
    for fate in ("clashing", "twice"):
        assert wrong(**case | {"counts": replace(case["counts"], **{fate: 1})})


@given(CASES, st.integers(0, 60), st.integers(0, 60))
def test_a_pruned_model_of_the_right_base_is_not_refused_while_half_fits(case, placed, homeless):
    counts = Counts(placed=placed, homeless=min(homeless, placed), left=case["counts"].left, could=case["counts"].could)
    assert wrong(**case | {"counts": counts, "model": "SDXL", "bases": ("SD2", "SDXL")}) is (placed == 0)


@given(CASES, st.integers(1, 60))
def test_of_another_known_base_only_a_style_that_fits_is_taken_and_only_where_not_all_is_demanded(case, placed):
    case |= {"counts": Counts(placed=placed), "bases": ("SSD-1B",), "model": "SDXL"}
    assert wrong(**case) is (case["accelerates"] or case["demand_all"])


@given(st.lists(NAMES.filter(bool)).map(tuple), NAMES)
def test_a_base_is_another_only_where_both_are_known(bases, model):
    assert is_other_base(bases, model) is (bool(bases) and model is not None and model not in bases)


@pytest.mark.parametrize(
    ("counts", "refused"),
    [
        (Counts(placed=0), True),
        (Counts(placed=1), False),
        (Counts(placed=95, homeless=5), False),
        (Counts(placed=94, homeless=6), True),
        (Counts(placed=100, left=25, could=100), False),
        (Counts(placed=100, left=26, could=100), True),
    ],
)
def test_where_no_base_is_known_a_twentieth_may_lack_and_a_quarter_may_be_left(counts, refused):
    assert wrong(counts) is refused
    assert wrong(counts, accelerates=False) is (refused and not counts.left)
    assert wrong(counts, demand_all=False) is (counts.placed == 0)


@pytest.mark.parametrize(("homeless", "foreign"), [(50, False), (51, True)])
def test_fewer_than_half_with_a_place_is_another_make_of_model(homeless, foreign):
    assert Counts(placed=50, homeless=homeless).foreign is foreign
    assert wrong(Counts(placed=50, homeless=homeless), demand_all=False) is foreign


@pytest.mark.parametrize("lora", full_size.CONFIGS)
@pytest.mark.parametrize("model", full_size.CONFIGS)
def test_the_official_loras_are_taken_by_their_own_base_alone(lora, model):
    """By the shapes that diffusers' UNets have; a plain smaller sister is told by what it leaves."""
    ours = {name.replace(".", "_"): shape for name, shape in full_size.unet_weights(lora).items()}
    ours = {name: shape for name, shape in ours.items() if kind_of(name)}
    theirs = {name: shape for name, shape in BY_NAME[model].modules.items() if kind_of(name)}
    fits = [name for name, shape in ours.items() if theirs.get(name) == shape]
    counts = Counts(
        placed=len(fits),
        homeless=len(ours.keys() - theirs.keys()),
        clashing=len(ours.keys() & theirs.keys()) - len(fits),
        left=len(theirs.keys() - set(fits)),
        could=len(theirs),
    )
    assert wrong(counts, recognise(ours).bases, model) is (lora != model)
    assert wrong(counts) is (lora != model)  # also where neither says what it is for


@pytest.mark.parametrize("fate", ["placed", "homeless", "clashing", "twice"])
def test_a_module_of_any_fate_should_have_had_a_place(fate):
    counts = Counts(placed=3, homeless=3, clashing=3, twice=3)
    assert replace(counts, **{fate: 4}).asked == counts.asked + 1 == 13


def test_a_weight_named_twice_has_a_place():
    assert not Counts(placed=10, twice=40, homeless=50).foreign
    assert Counts(placed=10, twice=40, homeless=51).foreign


def test_kin_are_all_unets_and_the_transformers_of_one_make():
    together = {name: one.kin for name, one in transformers.BY_NAME.items()} | dict.fromkeys(BY_NAME, "UNet")
    assert len(set(together.values())) < len(together)
    for ours, theirs in itertools.product(together, repeat=2):
        assert are_kin([ours], theirs) is (together[ours] == together[theirs])


def test_one_of_several_bases_is_enough_for_kin_and_none_known_is_not():
    transformer = next(iter(transformers.BY_NAME))
    assert are_kin([transformer, "SD1.5"], "SDXL")
    assert not are_kin([], "SDXL")
    assert not are_kin(["SD1.5"], None)
