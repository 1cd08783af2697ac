"""What people see of the functions they call: every option by name, and an answer to a slip of the pen."""

import inspect
from dataclasses import fields

import pytest
import torch

from lcm_kit.lora_merge import Lora, MergeOptions, load, merge, merge_with_account, resize, resize_with_account, save
from lcm_kit.lora_merge.comparing.compare import compare
from lcm_kit.lora_merge.extracting.extract import extract
from lcm_kit.lora_merge.merging import merge as merging
from lcm_kit.lora_merge.merging.reproduce import reproduce

FOUR = (merge, merge_with_account, resize, resize_with_account)
NAMED = (*FOUR, compare, extract, load, save, reproduce)
LORA = Lora.from_state_dict(
    {"lora_unet_x.lora_up.weight": torch.ones(4, 2), "lora_unet_x.lora_down.weight": torch.ones(2, 4)}
)


def options_of(function):
    return list(inspect.signature(function).parameters.values())[1:]


def name_of(function):
    return function.__name__


@pytest.mark.parametrize("function", FOUR, ids=name_of)
def test_every_option_has_a_name_a_type_and_a_default(function):
    for option in options_of(function):
        assert option.kind is option.KEYWORD_ONLY
        assert option.annotation not in (option.empty, "Any")
        assert option.default is not option.empty
    assert options_of(function) == options_of(merge)


@pytest.mark.parametrize("function", [compare, extract, load, save, reproduce], ids=name_of)
def test_no_function_hides_what_it_takes(function):
    assert all(option.kind is not option.VAR_KEYWORD for option in options_of(function))


def test_the_options_of_a_merge_are_those_of_its_record():
    known = {option.name: option.default for option in options_of(merge)}
    recorded = inspect.signature(MergeOptions).parameters.values()
    # A mapping as a default is one for all, so that a call has None for it.
    same = {option.name: option.default for option in recorded if option.name != "parameters"}
    assert same.items() <= known.items()
    assert {field.name for field in fields(MergeOptions)} <= known.keys()


@pytest.mark.parametrize(
    ("outer", "inner"), [(merge, "merge_with_account"), (resize, "resize_with_account")], ids=["merge", "resize"]
)
def test_every_option_is_handed_on(outer, inner, monkeypatch):
    seen = {}
    monkeypatch.setattr(merging, inner, lambda first, **options: (seen.update(options), options))
    given = {option.name: object() for option in options_of(outer)}
    outer([], **given)
    assert seen == given


def test_a_resize_hands_every_option_on(monkeypatch):
    seen = {}

    def recorder(inputs, **options):
        seen.update(options)
        return LORA, None

    monkeypatch.setattr(merging, "merge_with_account", recorder)
    given = {option.name: object() for option in options_of(resize)} | {"rank": 1, "metadata": {"a": "b"}}
    given |= dict.fromkeys(("keep", "retain", "max_mb"))
    resize_with_account(LORA, **given)
    assert seen == given


@pytest.mark.parametrize("function", NAMED, ids=name_of)
def test_a_wrong_name_is_refused_by_the_function_that_was_called(function):
    for option in options_of(function):
        if option.kind is not option.KEYWORD_ONLY:
            continue
        slip = option.name[:-1] if len(option.name) > 3 else option.name + "s"
        with pytest.raises(
            TypeError, match=rf"^{function.__name__}\(\) takes no '{slip}' \(did you mean '{option.name}'\?"
        ):
            function(None, **{slip: 1})


def test_all_wrong_names_are_named_and_what_there_is():
    with pytest.raises(
        TypeError, match=r"^merge\(\) takes no 'densty' \(did you mean 'density'\?\), no 'xyzxyz'\. It takes"
    ) as error:
        merge([(LORA, 1.0)], densty=0.5, xyzxyz=1)
    assert "method, rank, keep" in str(error.value)
    with pytest.raises(TypeError, match=r"^resize\(\) takes no 'kep' \(did you mean 'keep'\?\)"):
        resize(LORA, kep=0.5)
