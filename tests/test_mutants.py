"""The small changes of the code that `make mutants` tries: which there are, and who is asked whether they show."""

import ast
import json
import sys

import pytest

from lcm_kit.tests.helpers import ROOT

TOOLS = str(ROOT / "tools")
sys.path.insert(0, TOOLS)  # they import one another by name, as a script does
try:
    import mutant_calls
    import mutants
    import mutations
    from mutant_made import Made
finally:
    sys.path.remove(TOOLS)

KNOWN = json.loads(mutants.KNOWN.read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def made():
    return Made()


def test_every_change_that_is_known_to_make_no_difference_is_one_of_the_source_as_it_stands():
    """A line that was rewritten since takes its reason with it."""
    names = {one.name for file in {key.split()[0] for key in KNOWN} for one in mutations.mutants_of(ROOT / file)}
    assert sorted(KNOWN.keys() - names) == []


def test_every_known_change_has_a_reason_in_words():
    assert [key for key, reason in KNOWN.items() if len(reason.split()) < 4] == []


@pytest.mark.parametrize(
    ("text", "others"),
    [
        ("a < b", ["a <= b"]),
        ("a + b", ["a - b"]),
        ("a and b", ["a or b"]),
        ("not a", ["a"]),
        ("-a", ["a"]),
        ("3", ["4"]),
        ("1e6", ["2000000.0"]),
        ("True", ["False"]),
        ("a if b else c", ["c"]),
        ("a if b else a.to(c)", []),
        ("a if b else c.to(a)", ["c.to(a)"]),
        ("max(a)", ["min(a)"]),
        ("f(a, b=c)", ["f(a)"]),
        ("zip(a, strict=d)", []),
        ("f(a, copy=False)", []),
        ("f(a, copy=True)", ["f(a)"]),
        ("torch.cat(a, dim=1)", ["torch.cat(a)"]),
        ("torch.cat(a, dim=0)", []),
        ("a.sort(dim=-1)", []),
        ("a.sum(dim=0)", ["a.sum()"]),
        ("f'{a}' + b", []),
        ("1 - 1e-9", []),
        ("a < b < c", []),
        ("'text'", []),
    ],
)
def test_what_can_stand_in_the_place_of_an_expression(text, others):
    assert [ast.unparse(one) for one in mutations.changes(ast.parse(text, mode="eval").body)] == others


def test_a_change_is_one_place_of_its_file():
    file = ROOT / "samplers" / "guidance.py"
    before = ast.unparse(ast.parse(file.read_text(encoding="utf-8"))).splitlines()
    found = list(mutations.mutants_of(file))
    assert len({one.name for one in found}) == len(found) > 10
    for one in found:
        after = one.source().splitlines()
        assert sum(a != b for a, b in zip(before, after, strict=True)) == 1


@pytest.mark.parametrize(
    ("file", "table", "user"),
    [
        ("samplers/presets.py", "PRESETS", "samplers/presets.py preset_called"),
        ("lora_merge/recognise/transformers.py", "TRANSFORMERS", "lora_merge/recognise/by_blocks.py base_of"),
        ("lora_merge/recognise/catalogue.py", "PUBLISHED", "lora_merge/recognise/identity.py worth_hashing"),
    ],
)
def test_who_uses_a_table_that_was_made_at_import(made, file, table, user):
    assert f"{file} {table}" in made.made_with(file)
    assert user in made.users(file)


def test_a_table_is_followed_through_other_modules(made):
    assert "lora_merge/naming/families.py FAMILIES" in made.made_with("lora_merge/naming/transformer.py")
    assert "lora_merge/recognise/by_blocks.py _module" in made.users("lora_merge/naming/transformer.py")
    methods = made.users("lora_merge/recognise/base_models.py")
    assert "lora_merge/recognise/base_models.py Base._modules" in methods
    assert "lora_merge/recognise/wrong_base.py _kin" in methods
    assert all(user.startswith("samplers/multistep.py ") for user in made.users("samplers/multistep.py"))


def test_a_change_of_what_runs_at_import_alone_is_tried_by_the_tests_of_its_users(made):
    """Sixty tests of the folder come first in the alphabet and say nothing."""
    file = "lora_merge/recognise/catalogue.py"
    (mutant, *_) = (one for one in mutations.mutants_of(ROOT / file) if one.function == "_wan")
    tests = {
        f"{file} _wan": [mutant_calls.IMPORTED],
        "lora_merge/recognise/identity.py worth_hashing": [mutant_calls.IMPORTED, "tests/z.py::test_size"],
        "lora_merge/recognise/base_models.py kind_of": [f"tests/a.py::test_{number}" for number in range(60)],
    }
    assert mutants.callers_of(mutant, tests, 400, made)[0] == "tests/z.py::test_size"
    assert mutants.callers_of(mutant, {}, 400, made) == []
    assert mutants.files_on(mutant, tests, made) == ["tests/z.py"]


def test_the_files_that_are_most_about_a_table_are_imported_anew(made):
    """Of six whose tests look into it, the four whose tests do least beside that."""
    file = "lora_merge/recognise/catalogue.py"
    (mutant, *_) = (one for one in mutations.mutants_of(ROOT / file) if one.function == "_wan")
    tests = {f"{file} instead": [mutant_calls.IMPORTED, *(f"tests/{letter}.py::test" for letter in "abcdef")]}
    tests |= {f"x.py f{number}": [f"tests/{letter}.py::test" for letter in "abcdef"[number:]] for number in range(6)}
    assert mutants.files_on(mutant, tests, made) == [f"tests/{letter}.py" for letter in "abcd"]
    about = "tests/lora_merge/test_catalogue.py"
    assert about in mutants.files_about(file)
    tests[f"{file} instead"].append(f"{about}::test")
    tests |= {f"y.py f{number}": [f"{about}::test"] for number in range(9)}
    assert mutants.files_on(mutant, tests, made) == [about, *(f"tests/{letter}.py" for letter in "abc")]


def test_tests_that_are_about_a_module_come_first(made):
    """By their file's name, or by what it imports."""
    file = "lora_merge/merging/account.py"
    assert {"tests/lora_merge/test_account.py", "tests/lora_merge/test_merge_words.py"} <= mutants.files_about(file)
    assert "tests/lora_merge/test_signatures.py" in mutants.files_about("lora_merge/merging/merge.py")
    mutant = next(one for one in mutations.mutants_of(ROOT / file) if one.function == "account_of")
    others = [f"tests/lora_merge/test_families.py::test_{number}" for number in range(300)]
    tests = {f"{file} account_of": [*others, "tests/lora_merge/test_account.py::test_sums"]}
    tests[f"{file} account_of"].insert(0, "tests/lora_merge/test_merge_words.py::test_words")
    found = mutants.callers_of(mutant, tests, 100, made)
    assert found[:2] == [
        "tests/lora_merge/test_account.py::test_sums",
        "tests/lora_merge/test_merge_words.py::test_words",
    ]
    assert len(found) == 100


def test_of_many_tests_the_first_and_some_of_the_others_are_tried():
    names = [f"{number}" for number in range(100)]
    assert mutants.some_of(names, 100) == names
    some = mutants.some_of(names, 24)
    assert (len(some), some[:20]) == (24, names[:20])
    assert len(set(some)) == 24
    assert int(some[-1]) > 70


def test_a_sample_has_of_each_wing_its_share():
    every = mutants.all_mutants("samplers") + mutants.all_mutants("lora_merge/methods")
    found = mutants.drawn(every, 60, seed=3)
    assert len({one.name for one in found}) == 60
    in_all = sum(one.file.startswith("samplers") for one in every) / len(every)
    assert abs(sum(one.file.startswith("samplers") for one in found) - 60 * in_all) <= 1
    assert found != mutants.drawn(every, 60, seed=4)
    assert found == mutants.drawn(every, 60, seed=3)


def test_the_interval_of_a_share_is_wilsons():
    """The worked example of Newcombe (Statistics in Medicine 17, 1998): 81 of 263."""
    assert mutants.interval(81, 263) == pytest.approx((0.2553, 0.3662), abs=5e-5)
    low, high = mutants.interval(10, 10)
    assert (round(low, 4), high) == (0.7225, pytest.approx(1))
