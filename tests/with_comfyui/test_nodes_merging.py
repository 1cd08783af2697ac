"""Merge LoRAs with all its widgets, and Resize LoRA, on the real ComfyUI."""

import hashlib
import json
import os
import re

import comfy.model_management
import comfy.sd
import comfy.utils
import folder_paths
import pytest
import safetensors.torch
import torch

from lcm_kit.host.lora.identity import KnownWeights
from lcm_kit.host.lora.weights import LoraWeights, to_lora
from lcm_kit.lora_merge import METHODS, load, merge, resize
from lcm_kit.lora_merge.merging.reproduce import reproduce
from lcm_kit.lora_merge.methods.table import Method, Parameter
from lcm_kit.lora_merge.recognise.catalogue import Published
from lcm_kit.lora_merge.recognise.identity import identify
from lcm_kit.nodes.loading import ApplyLoRA, LoadLoRA
from lcm_kit.nodes.merging import MergeLoRA, ResizeLoRA, SaveLoRA
from lcm_kit.tests.with_comfyui import tiny

FEW = re.compile("down_blocks_0_(attentions|resnets)_0")
EXACT = {"rtol": 0, "atol": 2e-6}  # float32 sums of weights of size 1, in another order


pytestmark = pytest.mark.usefixtures("no_gradients")


def saved(lora, name, dtype="fp32"):
    """The path of the file."""
    file = SaveLoRA.execute(lora, name, dtype, "kohya", "increment").result[0]
    return os.path.join(folder_paths.get_folder_paths("loras")[0], file)


@pytest.fixture(scope="module")
def clip():
    return tiny.tiny_clip()


@pytest.fixture(scope="module")
def pair(model):
    """A style and an LCM-LoRA of few modules, some of them in both."""
    style, lcm = tiny.lora(model, endings=tiny.STYLE, rank=3, seed=1), tiny.lora(model, seed=2)
    return tuple({key: tensor for key, tensor in one.items() if FEW.search(key)} for one in (style, lcm))


@pytest.fixture
def loras_folder(comfy_home, tmp_path, monkeypatch):
    from lcm_kit.host.lora import files

    folder = tmp_path / "loras"
    folder.mkdir()
    monkeypatch.setitem(folder_paths.folder_names_and_paths, "loras", ([str(folder)], {".safetensors"}))
    folder_paths.filename_list_cache.pop("loras", None)
    yield folder
    files._cache.clear()


def merged(*pairs, method="linear", size="exact", **more):
    """method and size by name; what belongs to one of them goes into it, as ComfyUI hands it to the node."""
    slots = {f"strength_{n}": 1.0 for n in range(1, 5)}
    for n, (lora, strength) in enumerate(pairs, start=1):
        slots |= {f"lora_{n}": lora, f"strength_{n}": strength}
    choices = {}
    for entry in MergeLoRA.define_schema().inputs:
        if entry.id in ("method", "size"):
            key = {"method": method, "size": size}[entry.id]
            names = [one.id for one in next(option for option in entry.options if option.key == key).inputs]
            choices[entry.id] = {entry.id: key} | {name: more.pop(name) for name in names if name in more}
    return MergeLoRA.execute(**choices, **slots, **more).result


def same(first, second):
    """But for alphas, which a LORA_MODEL has in float64 where float32 would round them."""

    def equal(one, other):
        wide = one.dtype == torch.float64 and one.ndim == 0
        return torch.equal(one.float() if wide else one, other)

    return first.keys() == second.keys() and all(equal(first[key], second[key]) for key in first)


@pytest.mark.parametrize("method", METHODS)
def test_each_method_is_that_of_lora_merge(pair, method):
    row = METHODS[method]
    given = {"density": 0.6} if "density" in row.parameters else {}
    ours, text = merged((pair[0], 0.8), (pair[1], 1.0), method=method, **given, **({"seed": 5} if row.draws else {}))
    inputs = [(to_lora(pair[0]), 0.8), (to_lora(pair[1]), 1.0)]
    wanted = merge(inputs, method=method, **given, seed=5)
    assert same(ours, wanted.to_state_dict())
    assert f"Merged 2 LoRAs, method {method}" in text


def test_a_new_row_in_the_table_of_methods_is_a_choice_and_its_parameter_an_input(pair, monkeypatch):
    row = Method(
        combine=lambda deltas, situation: situation.values["sharpness"] * sum(deltas),
        summary="the sum, sharpened",
        source="nowhere",
        parameters={"sharpness": Parameter(default=1.5, low=1.0, high=4.0, meaning="factor on the sum")},
    )
    before = method_options()
    monkeypatch.setitem(METHODS, "made_up", row)
    (last,) = method_options().pop("made_up")
    assert {key: option for key, option in method_options().items() if key != "made_up"}.keys() == before.keys()
    assert (last.id, last.default, last.min, last.max) == ("sharpness", 1.5, 1.0, 4.0)
    assert last.tooltip == "Factor on the sum."
    inputs = [(to_lora(one), 1.0) for one in pair]
    for given, factor in ({}, 1.5), ({"sharpness": 3.0}, 3.0):
        ours, text = merged((pair[0], 1.0), (pair[1], 1.0), method="made_up", **given)
        assert same(ours, merge(inputs, method="made_up", parameters={"sharpness": factor}).to_state_dict())
        assert f"method made_up (sharpness {factor:g})" in text
    with pytest.raises(ValueError, match=r"Merge LoRAs: method\.sharpness is 5"):
        merged((pair[0], 1.0), (pair[1], 1.0), method="made_up", sharpness=5.0)


def method_options():
    (choice,) = (entry for entry in MergeLoRA.define_schema().inputs if entry.id == "method")
    return {option.key: option.inputs for option in choice.options}


@pytest.mark.parametrize("method", METHODS)
def test_a_method_shows_its_own_numbers_and_starts_with_those_of_the_table(pair, method):
    row = METHODS[method]
    own = {entry.id: entry for entry in method_options()[method]}
    assert {name: own[name].default for name in row.parameters} == {n: p.default for n, p in row.parameters.items()}
    assert own.keys() - row.parameters.keys() == {
        *(["seed"] if row.draws else []),
        *(["dense"] if row.entrywise else []),
    }
    # An API client may leave all of them out.
    ours, _ = merged((pair[0], 0.8), (pair[1], 1.0), method=method)
    assert same(ours, merge([(to_lora(pair[0]), 0.8), (to_lora(pair[1]), 1.0)], method=method).to_state_dict())


def test_a_file_of_the_merge_equals_the_patch_in_the_graph_and_two_of_cores_loaders(model, clip, loras_folder):
    """Also for text-encoder modules, in float32."""
    from nodes import LoraLoader

    loras = [tiny.lora(model, endings=tiny.STYLE, rank=3, seed=1) | tiny.clip_lora(clip), tiny.lora(model, seed=2)]
    one, _ = merged((loras[0], 0.8), (loras[1], -0.6))
    in_graph = ApplyLoRA.execute(model, one, 1.0, 1.0, clip).result
    path = saved(one, "merged", dtype="fp32")
    from_file = LoraLoader().load_lora(model, clip, os.path.relpath(path, loras_folder), 1.0, 1.0)
    stacked = model, clip
    for tensors, strength in zip(loras, (0.8, -0.6), strict=True):
        stacked = comfy.sd.load_lora_for_models(*stacked, dict(tensors), strength, strength)
    for other in (from_file, stacked):
        ours, theirs = tiny.patched_weights(in_graph[0]), tiny.patched_weights(other[0])
        for key, weight in ours.items():
            torch.testing.assert_close(weight, theirs[key], **EXACT)
        assert in_graph[1].patcher.patches.keys() == other[1].patcher.patches.keys() != set()
        for key in in_graph[1].patcher.patches:
            weight = torch.zeros(comfy.utils.get_attr(clip.cond_stage_model, key).shape)
            first, second = (
                comfy.lora.calculate_weight(one.patcher.patches[key], weight.clone(), key)
                for one in (in_graph[1], other[1])
            )
            torch.testing.assert_close(first, second, **EXACT)


@pytest.mark.parametrize(
    ("widgets", "keywords"),
    [
        ({"size": "rank", "rank": 2}, {"rank": 2}),
        ({"size": "keep", "keep": 0.9, "balanced": True}, {"keep": 0.9, "balanced": True}),
        ({"size": "retain", "retain": 0.9}, {"retain": 0.9}),
        ({"size": "file size", "max_mb": 0.2}, {"max_mb": 0.2}),
        ({"mu": 1.0, "protect": "lora_2"}, {"mu": 1.0, "protect": 1}),
        ({"mu": 1.0, "protect": "lora_1"}, {"mu": 1.0, "protect": 0}),
        (
            {"block_strengths": "attention=0.5\nlora_2: down=2"},
            {"block_strengths": ["attention=0.5", "attention=0.5, down=2"]},
        ),
        ({"method": "della", "density": 0.5, "spread": 0.1}, {"method": "della", "density": 0.5, "spread": 0.1}),
        ({"method": "ties", "density": 0.3, "dense": True}, {"method": "ties", "density": 0.3, "dense": True}),
    ],
)
def test_each_widget_reaches_the_merge(pair, widgets, keywords):
    ours, _ = merged((pair[0], 0.8), (pair[1], 1.0), **widgets)
    wanted = merge([(to_lora(pair[0]), 0.8), (to_lora(pair[1]), 1.0)], **keywords)
    assert same(ours, wanted.to_state_dict())


def test_auto_protects_a_lora_that_only_its_files_hash_tells(pair, tmp_path):
    """Those for transformers look like any other; a changed one is known no more."""
    style, lcm = pair
    path = tmp_path / "renamed.safetensors"
    safetensors.torch.save_file(lcm, path)
    entry = Published(
        "Test", "SDXL", "three", hashlib.sha256(path.read_bytes()).hexdigest(), "a/b", about=path.stat().st_size
    )
    known = KnownWeights(lcm, name=path.name, metadata={}, identity=identify(load(path), path, catalogue=[entry]))
    assert known.identity.how == "sha256"
    auto, named, plain = (
        merged((style, 1.0), (known, 1.0), protect=protect, mu=mu)[0]
        for protect, mu in (("auto", 1.0), ("lora_2", 1.0), ("none", 0.0))
    )
    assert same(auto, named)
    assert not same(auto, plain)
    changed = known.again()
    changed[next(iter(changed))] = torch.zeros_like(next(iter(changed.values())))
    report = merged((style, 1.0), (changed, 1.0), protect="auto", mu=1.0)[1]
    assert "no input is recognised as an acceleration LoRA" in report


def test_protect_counts_slots_and_not_connected_loras(pair):
    one, none, other = (pair[0], 1.0), (None, 1.0), (pair[1], 1.0)
    both = [(to_lora(pair[0]), 1.0), (to_lora(pair[1]), 1.0)]
    ours, _ = merged(one, none, none, other, protect="lora_4", mu=1.0)
    assert same(ours, merge(both, protect=1, mu=1.0).to_state_dict())
    with pytest.raises(ValueError, match=r"'lora_9: down=0' is for LoRA 9; there are 1, 4"):
        merged(one, none, none, other, block_strengths="lora_9: down=0")


STRENGTHS = (0.8, 1.0, -0.5, 2.0)
ON = [[n for n in range(4) if bits >> n & 1] for bits in range(1, 16)]


@pytest.mark.parametrize("on", ON, ids=str)
def test_what_is_switched_off_leaves_a_merge_of_the_rest(model, on):
    """Whichever of four it is, also where protect and block strengths are for it; the rest keep their strengths."""
    loras = [
        LoraWeights(tiny.lora(model, rank=n + 1, endings=tiny.STYLE, seed=n), name=f"{n}.safetensors") for n in range(4)
    ]
    pairs = [(loras[n] if n in on else None, STRENGTHS[n]) for n in range(4)]
    ours, text = merged(*pairs, protect="lora_3", mu=0.5, block_strengths="lora_2: down=0.5\nup=0.7")
    wanted = merge(
        [(to_lora(loras[n]), STRENGTHS[n]) for n in on],
        protect=on.index(2) if 2 in on else None,
        mu=0.5 if 2 in on else 0.0,
        block_strengths=["down=0.5, up=0.7" if n == 1 else "up=0.7" for n in on],
    )
    assert same(ours, wanted.to_state_dict())
    assert all((f"{n}.safetensors * {STRENGTHS[n]:g}: " in text) == (n in on) for n in range(4))
    assert ("block strengths 'lora_2: down=0.5' are for a LoRA that is not connected" in text) == (1 not in on)
    assert ("lora_3 is not connected, so that no LoRA is protected" in text) == (2 not in on)
    assert ("One LoRA is connected: the result is" in text) == (len(on) == 1)


@pytest.mark.parametrize("method", METHODS)
def test_one_lora_left_is_its_strength_times_itself_by_every_method(pair, method):
    """But of a mean, where the strength is its weight: that of one is itself."""
    strength = 1.0 if METHODS[method].averages else 0.7
    ours, text = merged((None, 1.0), (pair[1], 0.7), method=method)
    found, given = LoraWeights(ours, name="x"), LoraWeights(pair[1], name="y")
    found, given = to_lora(found), to_lora(given)
    assert found.modules.keys() == given.modules.keys()
    for module in given.modules:
        torch.testing.assert_close(found.delta(module), strength * given.delta(module))
    assert ("Note: One LoRA is connected: the result is lora_2 * 0.7" in text) == (strength != 1)
    assert (f"method {method} has nothing to merge" in text) == (method not in ("linear", "average"))


def test_one_lora_left_is_cut_as_it_is_asked(pair):
    ours, _ = merged((pair[1], 0.7), method="ties", size="rank", rank=2)
    assert same(ours, merge([(to_lora(pair[1]), 0.7)], rank=2).to_state_dict())


def test_no_lora_left_is_one_clear_message():
    with pytest.raises(
        ValueError, match=r"^Merge LoRAs: No LoRA is connected, or all are switched off\. Connect one to lora_1"
    ):
        merged((None, 1.0), (None, 0.5))


@pytest.mark.parametrize("input", ["method", "size"])
def test_a_choice_that_the_host_left_out_is_asked_for(pair, input):
    """ComfyUI calls the node without a choice that is misspelt or missing."""
    given = {"method": {"method": "linear"}, "size": {"size": "exact"}, "lora_1": pair[0]}
    del given[input]
    with pytest.raises(ValueError, match=rf"^Merge LoRAs: {input} is missing or unknown\. Choose one of "):
        MergeLoRA.execute(**given)


def test_the_bar_moves_and_an_interrupt_ends_the_merge(pair, monkeypatch):
    seen = []
    monkeypatch.setattr(comfy.utils, "PROGRESS_BAR_HOOK", lambda done, total, preview, **_: seen.append((done, total)))
    merged((pair[0], 0.8), (pair[1], 1.0))
    assert seen[-1][0] == seen[-1][1] == len(to_lora(pair[1]).modules)
    comfy.model_management.interrupt_current_processing(True)
    with pytest.raises(comfy.model_management.InterruptProcessingException):
        merged((pair[0], 0.8), (pair[1], 1.0))
    comfy.model_management.interrupt_current_processing(False)


def test_a_merge_of_files_names_their_hashes_and_is_made_again_from_its_file(pair, loras_folder):
    (loras_folder / "more").mkdir()
    for name, tensors in (("style", pair[0]), ("more/lcm", pair[1])):
        safetensors.torch.save_file(tensors, loras_folder / f"{name}.safetensors")
    names = ("style.safetensors", os.path.join("more", "lcm.safetensors"))
    inputs = [LoadLoRA.execute(name).result[0] for name in names]
    one, _ = merged((inputs[0], 0.8), (inputs[1], 1.0), size="keep", keep=0.95)
    notes = json.loads(one.metadata["lcm_kit.merge"])
    hashes = [hashlib.sha256((loras_folder / name).read_bytes()).hexdigest() for name in names]
    assert [entry["sha256"] for entry in notes["inputs"]] == hashes
    path = saved(one, "merged", dtype="fp16")
    assert reproduce(path).identical
    # What was changed on the way is not that file.
    inputs[0][next(iter(inputs[0]))] = next(iter(inputs[0].values())) * 2
    notes = json.loads(merged((inputs[0], 0.8), (inputs[1], 1.0))[0].metadata["lcm_kit.merge"])
    assert [entry["sha256"] for entry in notes["inputs"]] == [None, hashes[1]]


@pytest.mark.parametrize(
    ("size", "keywords"),
    [
        ({"size": "rank", "rank": 2}, {"rank": 2}),
        ({"size": "keep", "keep": 0.9}, {"keep": 0.9}),
    ],
)
@pytest.mark.parametrize(("dtype", "of"), [("fp16", torch.float16), ("fp32", torch.float32)])
def test_resize_is_that_of_lora_merge_in_the_dtype(pair, size, keywords, dtype, of):
    small, text = ResizeLoRA.execute(pair[1], size, dtype).result
    assert same(small, resize(to_lora(pair[1]), **keywords, out_dtype=of).to_state_dict())
    assert {tensor.dtype for key, tensor in small.items() if not key.endswith("alpha")} == {of}
    assert "Left of each input's energy" in text


def test_resize_to_a_size_gives_a_file_of_that_size(pair, loras_folder):
    small = ResizeLoRA.execute(pair[1], {"size": "file size", "max_mb": 0.03}, "fp16").result[0]
    path = saved(small, "small", dtype="fp16")
    assert os.path.getsize(path) <= 30_000
    assert len(load(path).modules) == len(to_lora(pair[1]).modules)


def test_resize_wants_to_be_told_what_makes_it_small(pair):
    with pytest.raises(ValueError, match=r"size is missing or unknown\. Choose one of rank, keep, file size"):
        ResizeLoRA.execute(pair[1], dtype="fp16")
