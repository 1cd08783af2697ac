"""A LORA_MODEL: the plain dict that it is for everybody, whatever of it still lies in a file, and as text (ComfyUI writes out every
input of a node that failed, for its history and for all open pages)."""

import copy
import gc
import operator
import os
import pickle
from collections import ChainMap, OrderedDict
from types import MappingProxyType

import numpy as np
import pytest
import torch
from safetensors.torch import load, load_file, save, save_file

from lcm_kit.host.lora.identity import KnownWeights
from lcm_kit.host.lora.weights import LoraWeights, from_lora, to_lora
from lcm_kit.host.page import WORD_JOINER, plain
from lcm_kit.lora_merge import load as load_lora
from lcm_kit.lora_merge import merge
from lcm_kit.lora_merge.files import load_save
from lcm_kit.lora_merge.recognise.identity import identify
from lcm_kit.lora_merge.updates.unmade import Unmade

ONLY_POSIX = pytest.mark.skipif(os.name != "posix", reason="Windows replaces no file that is open, so all is in memory")
A, B = "lora_unet_a.lora_up.weight", "lora_unet_b.lora_down.weight"
NONE = "lora_unet_c.lora_up.weight"


def state(rank=3, seed=0):
    g = torch.Generator().manual_seed(seed)
    tensors = {}
    for module in "ab":
        tensors[f"lora_unet_{module}.lora_up.weight"] = torch.randn(6, rank, generator=g).half()
        tensors[f"lora_unet_{module}.lora_down.weight"] = torch.randn(rank, 5, generator=g).half()
        tensors[f"lora_unet_{module}.alpha"] = torch.tensor(2.0)
    return tensors


def of_file(folder, name="x", **options):
    """A LORA_MODEL as Load LoRA gives it."""
    path = folder / f"{name}.safetensors"
    save_file(state(**options), path)
    lora = load_lora(path)
    known = KnownWeights(from_lora(lora).pieces, name=path.name, metadata={}, identity=identify(lora))
    return known.again()


def of_merge(folder):
    loras = [to_lora(of_file(folder, name, rank=2, seed=n)) for n, name in enumerate("yz")]
    return from_lora(merge([(loras[0], 0.8), (loras[1], -1.0)]))


def of_another(folder):
    """Somebody else's dict under a name of ours."""
    return LoraWeights(state(), name="x")


GIVEN = {"a file": of_file, "an exact merge": of_merge, "another node": of_another}


@pytest.fixture(autouse=True)
def large(monkeypatch):
    """Every file is a large one."""
    monkeypatch.setattr(load_save, "_STREAMED", 0)


def unmade(weights):
    return [key for key, piece in weights.pieces.items() if isinstance(piece, Unmade)]


def no_error(work):
    """What a call gives, or the class of the error that it ends with."""
    try:
        return work()
    except Exception as error:
        return type(error)


def pattern(d):
    match d:
        case {"lora_unet_a.lora_up.weight": one}:
            return one
    return None


def in_place(d):
    for value in d.values():
        value.mul_(2)


def first_in_place(d):
    for value in d.values():
        value.add_(1)
        break


def one_by_one(d):
    for key in d:
        d[key] = d[key] * 2


def removed(d):
    del d[A]


def joined(d):
    d |= {NONE: torch.ones(2)}
    return d


def hashed(d):
    return hash(d)


def called(**named):
    return named


# Name of the method -> ways to ask for it. Each runs on the plain dict and on ours.
WAYS = {
    "__getitem__": [lambda d: d[A], lambda d: d[NONE], operator.itemgetter(B, A), pattern,
                    lambda d: [d[key] for key in d], lambda d: MappingProxyType(d)[B], lambda d: ChainMap({}, d)[A],
                    lambda d: d[A] is d[A], lambda d: d[[]]],
    "__setitem__": [lambda d: operator.setitem(d, A, torch.ones(1)), lambda d: operator.setitem(d, NONE, torch.ones(1)),
                    one_by_one],
    "__delitem__": [removed, lambda d: operator.delitem(d, NONE)],
    "__contains__": [lambda d: A in d, lambda d: NONE in d, lambda d: [] in d],
    "__len__": [len, bool],
    "__iter__": [list, tuple, sorted, set, max, dict, lambda d: {**d}, OrderedDict,
                 lambda d: called(**d), lambda d: {"first": 1} | dict(d), lambda d: list(zip(d, d.values(), strict=True))],
    "__reversed__": [lambda d: list(reversed(d))],
    "keys": [lambda d: list(d.keys()), lambda d: d.keys() & {A}, lambda d: d.keys() == state().keys(),
             lambda d: list(reversed(d.keys()))],
    "values": [lambda d: list(d.values()), lambda d: len(d.values()), lambda d: list(reversed(d.values())), in_place,
               first_in_place, lambda d: d.values().mapping[A]],
    "items": [lambda d: list(d.items()), lambda d: list(reversed(d.items())), lambda d: d.items().mapping[A],
              lambda d: {key: value.clone() for key, value in d.items()}, lambda d: max(d.items())[0],
              lambda d: len({value.data_ptr() for _, value in d.items()})],
    "get": [lambda d: d.get(A), lambda d: d.get(NONE), lambda d: d.get(NONE, 7), lambda d: d.get(A, default=7),
            lambda d: list(map(d.get, (A, NONE, B)))],
    "setdefault": [lambda d: d.setdefault(A), lambda d: d.setdefault(A, 7), lambda d: d.setdefault(NONE, 7)],
    "pop": [lambda d: d.pop(A), lambda d: d.pop(NONE), lambda d: d.pop(NONE, 7), lambda d: d.pop(A, 7),
            lambda d: [d.pop(key) for key in list(d)], lambda d: d.pop(A, 1, 2)],
    "popitem": [lambda d: d.popitem(), lambda d: [d.popitem() for _ in range(len(d))],
                lambda d: [d.popitem() for _ in range(len(d) + 1)]],
    "clear": [lambda d: d.clear(), lambda d: (d.clear(), d.popitem())],
    "update": [lambda d: d.update({A: 7}), lambda d: d.update([(NONE, 7)], more=8), lambda d: d.update(d)],
    "copy": [lambda d: d.copy(), lambda d: type(d.copy()), lambda d: d.copy().clear(), copy.copy, copy.deepcopy,
             lambda d: in_place(copy.deepcopy(d)), lambda d: in_place(d.copy())],
    "__or__": [lambda d: d | {NONE: 7}, lambda d: d | d, lambda d: type(d | {}), lambda d: d | 7],
    "__ror__": [lambda d: {A: 7, NONE: 8} | d, lambda d: dict.__ror__(d, {NONE: 8})],
    "__ior__": [joined],
    "__eq__": [lambda d: d == dict(d), lambda d: dict(d) == d, lambda d: d == d, lambda d: d == {}, lambda d: d == 7,
               lambda d: [d].index(d)],
    "__ne__": [lambda d: d != dict(d), lambda d: dict(d) != d, lambda d: d != {}],
    "__lt__": [lambda d: d < d],
    "__le__": [lambda d: d <= d],
    "__gt__": [lambda d: d > d],
    "__ge__": [lambda d: d >= d],
    "__hash__": [hashed],
    "__class_getitem__": [lambda d: type(d)[str, torch.Tensor].__args__],
    "__reduce_ex__": [lambda d: dict(pickle.loads(pickle.dumps(d))),
                      *(lambda d, n=n: dict(pickle.loads(pickle.dumps(d, n))) for n in range(pickle.HIGHEST_PROTOCOL + 1))],
    "__reduce__": [lambda d: dict(pickle.loads(pickle.dumps([d, d]))[1])],
    "__class__": [lambda d: isinstance(d, dict)],
    "safetensors": [lambda d: dict(sorted(load(save(d)).items())), lambda d: len(save(dict(d)))],
}  # fmt: skip
# What says how it looks, what it weighs, and how it came to be.
OF_ITS_OWN = {
    "__repr__",
    "__str__",
    "__format__",
    "__sizeof__",
    "__init__",
    "__new__",
    "__doc__",
    "__dir__",
    "fromkeys",
}
OF_ITS_OWN |= {
    "__getattribute__",
    "__setattr__",
    "__delattr__",
    "__getstate__",
    "__init_subclass__",
    "__subclasshook__",
}
CASES = [pytest.param(way, id=f"{name} {n}") for name, ways in WAYS.items() for n, way in enumerate(ways)]


def test_all_that_a_dict_can_do_is_tried():
    assert set(dir(dict)) - OF_ITS_OWN <= WAYS.keys()


def same(ours, theirs):
    if isinstance(theirs, torch.Tensor):
        return isinstance(ours, torch.Tensor) and ours.dtype == theirs.dtype and torch.equal(ours, theirs)
    if isinstance(theirs, dict):
        return list(ours) == list(theirs) and all(same(ours[key], theirs[key]) for key in theirs)
    if isinstance(theirs, list | tuple):
        return len(ours) == len(theirs) and all(map(same, ours, theirs))
    return type(ours) is type(theirs) and ours == theirs


@pytest.mark.parametrize("given", GIVEN)
@pytest.mark.parametrize("way", CASES)
def test_it_does_what_a_plain_dict_does(tmp_path, given, way):
    ours, theirs = GIVEN[given](tmp_path), dict(GIVEN[given](tmp_path))
    found, wanted = no_error(lambda: way(ours)), no_error(lambda: way(theirs))
    assert same(found, wanted), (found, wanted)
    # And is what that is afterwards.
    assert list(ours) == list(theirs)
    assert same(dict(ours), theirs)
    assert unmade(ours) == []


@pytest.mark.parametrize("given", GIVEN)
def test_safetensors_writes_it(tmp_path, given):
    """It refuses tensors of one address, which tensors that come and go may have."""
    weights = GIVEN[given](tmp_path)
    save_file(weights, tmp_path / "saved.safetensors")
    written = load_file(tmp_path / "saved.safetensors")
    assert same(dict(sorted(written.items())), dict(sorted(weights.items())))


@ONLY_POSIX
@pytest.mark.parametrize("given", ["a file", "an exact merge"])
def test_it_asks_for_nothing_before_it_is_asked(tmp_path, given):
    weights = GIVEN[given](tmp_path)
    factors = [key for key in weights if not key.endswith(".alpha")]
    assert len(factors) == 4
    assert (len(weights), A in weights, str(weights)[:10]) == (6, True, "LORA_MODEL")
    to_lora(weights)
    assert unmade(weights) == factors
    assert weights.get(B) is weights[B]
    assert unmade(weights) == [key for key in factors if key != B]


@ONLY_POSIX
def test_what_was_made_is_shared_and_goes_with_the_last_who_has_it(tmp_path):
    first = of_file(tmp_path)
    second = first.again()
    assert first[A] is second[A]
    where = first[A].data_ptr()
    piece = first.original[A]
    assert piece.shared().data_ptr() == where
    assert first.untouched
    assert second.untouched
    del first[A]
    assert not first.untouched
    assert piece.gave(second[A])
    second.clear()
    gc.collect()
    assert not piece.gave(None)
    assert piece._given is None


@ONLY_POSIX
def test_what_somebody_else_put_there_is_told_from_what_was_made(tmp_path):
    weights = of_file(tmp_path)
    list(weights.values())
    assert weights.untouched
    weights[A] = weights[A].clone()
    assert not weights.untouched


@ONLY_POSIX
@pytest.mark.parametrize("way", ["values", "items", "copy", "popitem"])
@pytest.mark.parametrize("given", ["a file", "an exact merge"])
def test_a_file_that_was_changed_is_an_error_in_words_and_no_numbers(tmp_path, given, way):
    weights = GIVEN[given](tmp_path)
    for path in tmp_path.iterdir():
        os.truncate(path, 100)
    ask_way = getattr(weights, way) if way != "values" else lambda: [one + 1 for one in weights.values()]
    for ask in (lambda: weights[A], lambda: weights.get(B), lambda: dict(weights), ask_way):
        if way == "popitem" and ask == getattr(weights, way):
            weights.pop("lora_unet_b.alpha")  # which was read at once
        with pytest.raises(ValueError, match=r"\.safetensors: was changed by another program"):
            ask()


@ONLY_POSIX
def test_what_others_may_write_into_is_added_up_at_once(tmp_path):
    tensors = state(seed=1)
    merged = from_lora(merge([(to_lora(of_file(tmp_path)), 1.0), (to_lora(LoraWeights(tensors, name="x")), 0.5)]))
    assert unmade(merged) == []
    wanted = {key: tensor.clone() for key, tensor in merged.items()}
    for tensor in tensors.values():
        tensor.zero_()
    assert same(dict(merged), wanted)


def test_it_says_what_it_is_and_not_what_is_in_it():
    class Tensor(torch.Tensor):
        def __repr__(self):
            raise AssertionError("a value is written out, of millions")

    ones = torch.ones(64, 8).as_subclass(Tensor)
    weights = LoraWeights({f"m{n}.lora_up.weight": ones for n in range(2000)}, name="style.safetensors")
    assert str(weights) == repr(weights) == "LORA_MODEL 'style.safetensors' of 2000 tensors"


def test_a_name_is_one_short_line_without_markup():
    text = str(LoraWeights({}, name="<img src=x onerror=alert(1)>\n\x1b[31m" + "n" * 10_000))
    assert len(text) < 300
    assert plain(text) == text
    assert "\n" not in text
    assert text.replace(WORD_JOINER, "").startswith("LORA_MODEL '<img src=x onerror=alert(1)>\\n\\x1b[31mnn")


def test_it_is_still_the_dict_that_it_was():
    tensors = {"a": torch.ones(1)}
    assert LoraWeights(tensors, name="x") == tensors
    assert dict(LoraWeights(tensors, name="x")) == tensors


USES = {
    "an operation": lambda one: one * 2 + 1,
    "another way about": lambda one: 1 - one,
    "in place": lambda one: one.mul_(3),
    "a part": lambda one: one[:, :1],
    "a part written": lambda one: operator.setitem(one, 0, 7.0),
    "a product": lambda one: one.float().T @ one.float(),
    "a number": lambda one: float(one.sum()),
    "compared": lambda one: torch.equal(one, one.clone()),
    "numpy": lambda one: torch.from_numpy(one.numpy()),
    "an array": lambda one: torch.from_numpy(np.asarray(one)),
    "a list": lambda one: one.tolist(),
    "a copy": lambda one: copy.deepcopy(one),
    "pickled": lambda one: pickle.loads(pickle.dumps(one)),
    "moved": lambda one: one.to(torch.float32),
    "joined": lambda one: torch.cat([one, one]),
    "memory": lambda one: one.untyped_storage().nbytes(),
    "a parameter": lambda one: torch.nn.Parameter(one.detach().clone()).data,
}


@ONLY_POSIX
@pytest.mark.parametrize("use", USES)
@pytest.mark.parametrize("given", ["a file", "an exact merge"])
def test_a_value_is_made_when_it_is_used_and_is_the_tensor_then(tmp_path, given, use):
    weights, plain_dict = GIVEN[given](tmp_path), GIVEN[given](tmp_path).copy()
    before = unmade(weights)
    values = list(weights.values())
    assert [(v.shape, v.dtype, v.device, v.ndim, v.numel(), v.is_contiguous()) for v in values] == [
        (v.shape, v.dtype, v.device, v.ndim, v.numel(), v.is_contiguous()) for v in plain_dict.values()
    ]
    assert all(isinstance(value, torch.Tensor) for value in values)
    assert unmade(weights) == before
    found, wanted = USES[use](values[0]), USES[use](next(iter(plain_dict.values())))
    if isinstance(wanted, torch.Tensor):
        assert torch.equal(found, wanted)
    else:
        assert found == wanted
    assert unmade(weights) == before[1:]
    assert torch.equal(weights[before[0]], plain_dict[before[0]])
    assert values[0].data_ptr() == weights[before[0]].data_ptr()


@ONLY_POSIX
@pytest.mark.parametrize("given", ["a file", "an exact merge"])
def test_saved_as_values_by_name_it_is_what_it_is(tmp_path, given):
    weights = GIVEN[given](tmp_path)
    save_file(dict(zip(weights, weights.values(), strict=True)), tmp_path / "again.safetensors")
    found, wanted = load_file(tmp_path / "again.safetensors"), weights.copy()
    assert found.keys() == wanted.keys()
    assert all(torch.equal(found[key], wanted[key]) for key in wanted)


@ONLY_POSIX
@pytest.mark.parametrize("given", ["a file", "an exact merge"])
@pytest.mark.parametrize(
    "change", [lambda d, key: d.update({key: torch.zeros(1)}), lambda d, key: d.clear(), lambda d, key: d[key]]
)
def test_a_value_is_what_it_was_when_it_was_asked_for_whatever_becomes_of_the_dict(tmp_path, given, change):
    weights, plain_dict = GIVEN[given](tmp_path), GIVEN[given](tmp_path).copy()
    for dictionary in (weights, plain_dict):
        first = next(iter(dictionary))
        values = list(dictionary.values())
        change(dictionary, first)
        values[0].add_(1)
        dictionary["what came of it"] = values[0] * 2
    assert weights.keys() == plain_dict.keys()
    assert all(torch.equal(weights[key], plain_dict[key]) for key in plain_dict)
