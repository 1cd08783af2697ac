"""LoRA Mix: the bits of the nodes that it stands for, and what it says of its rows."""

import itertools

import folder_paths
import pytest
import safetensors.torch
import torch

from lcm_kit.host.lora import files
from lcm_kit.nodes.loading import ApplyLoRA, LoadLoRA
from lcm_kit.nodes.merging import MergeLoRA
from lcm_kit.nodes.mix import LoRAMix
from lcm_kit.tests.helpers import as_read
from lcm_kit.tests.with_comfyui import tiny

pytestmark = pytest.mark.usefixtures("no_gradients")
NAMES = ("lcm", "ink", "paint")
STRENGTHS = (1.0, 0.8, -0.3)


@pytest.fixture(scope="module")
def model():
    return tiny.tiny_model(**tiny.WITH_MIDDLE)  # some block strengths are of the middle


@pytest.fixture(scope="module")
def clip():
    return tiny.tiny_clip()


@pytest.fixture(scope="module", autouse=True)
def folder(comfy_home, tmp_path_factory, model, clip):
    """An LCM-LoRA, a style, one that also changes the text encoder, and one for another model."""
    folder = tmp_path_factory.mktemp("loras")
    contents = {
        "lcm": (tiny.lora(model, seed=1), {"lcm_kit.preset": "LCM"}),
        "ink": (tiny.lora(model, endings=tiny.STYLE, rank=3, seed=2), None),
        "paint": (tiny.lora(model, endings=tiny.STYLE, rank=2, seed=3) | tiny.clip_lora(clip), None),
        "other": (tiny.lora(tiny.tiny_model(), seed=4), {"lcm_kit.preset": "TCD"}),
    }
    for name, (tensors, metadata) in contents.items():
        safetensors.torch.save_file(tensors, folder / f"{name}.safetensors", metadata)
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(folder_paths.folder_names_and_paths, "loras", ([str(folder)], {".safetensors"}))
        folder_paths.filename_list_cache.pop("loras", None)
        yield folder
    folder_paths.filename_list_cache.pop("loras", None)
    files._cache.clear()


def mixed(model, clip=None, **inputs):
    return LoRAMix.execute(model=model, clip=clip, **inputs).result


def patches_of(patcher):
    """weight -> what is added to it, computed in float32 from zero."""
    import comfy.lora

    shapes = patcher.model.state_dict()
    return {
        key: comfy.lora.calculate_weight(patcher.patches[key], torch.zeros(shapes[key].shape), key)
        for key in patcher.patches
    }


def same(first, second):
    return first.keys() == second.keys() and all(torch.equal(first[key], second[key]) for key in first)


@pytest.mark.parametrize("on", [set(some) for k in (1, 2, 3) for some in itertools.combinations(NAMES, k)], ids=sorted)
def test_it_is_the_nodes_that_it_stands_for_to_the_bit(model, clip, on):
    block_strengths = "down=0.5\nlora_2: mid=0.3" if "paint" in on else "down=0.5"
    rows = {"lcm_lora": "lcm.safetensors" if "lcm" in on else "none", "lcm_strength": STRENGTHS[0]}
    for n, name in enumerate(NAMES[1:], start=1):
        rows |= {f"on_{n}": name in on, f"lora_{n}": f"{name}.safetensors", f"strength_{n}": STRENGTHS[n]}
    ours = mixed(model, clip, **rows, block_strengths=block_strengths)

    slots = {}
    for n, (name, strength) in enumerate(zip(NAMES, STRENGTHS, strict=True), start=1):
        loaded = LoadLoRA.execute(f"{name}.safetensors").result[0] if name in on else None
        slots |= {f"lora_{n}": loaded, f"strength_{n}": strength}
    text = block_strengths.replace("lora_2", "lora_3")  # counted from 1 there
    merged = MergeLoRA.execute(method="linear", size="exact", **slots, block_strengths=text).result[0]
    theirs = ApplyLoRA.execute(model, merged, 1.0, 1.0, clip).result
    assert same(ours[2], merged)
    assert same(patches_of(ours[0]), patches_of(theirs[0]))
    assert same(patches_of(ours[1].patcher), patches_of(theirs[1].patcher))
    assert ours[4] == [
        (f"{name}.safetensors", strength, strength)
        for name, strength in zip(NAMES, STRENGTHS, strict=True)
        if name in on
    ]
    assert (ours[3].name if ours[3] else None) == ("LCM" if "lcm" in on else None)


def test_each_row_says_what_it_is(model):
    report = mixed(model, lora_1="ink.safetensors", strength_1=0.8, lora_2="paint.safetensors", on_2=False,
                   lora_3="paint.safetensors", strength_3=0.0)[5]  # fmt: skip
    lines = as_read(report).splitlines()
    assert lines[:6] == [
        "2 LoRAs in one, applied at strength 1.",
        "  lcm_lora: lcm.safetensors * 1: LCM LoRA, ok",
        "  lora_1: ink.safetensors * 0.8: style",
        "  lora_2: paint.safetensors: off",
        "  lora_3: paint.safetensors: off, its strength is 0",
        "  lora_4: none",
    ]
    assert lines[6].startswith("auto: lcm.safetensors is the one for this model among 4 files")


@pytest.mark.parametrize("row", ["lcm_lora", "lora_1", "lora_4"])
def test_a_row_for_another_model_is_refused_by_its_name(model, row):
    with pytest.raises(ValueError, match=f"^LoRA Mix: {row}: other.safetensors does not fit this model"):
        mixed(model, **{"lcm_lora": "none", row: "other.safetensors"})


@pytest.mark.parametrize("row", ["lcm_lora", "lora_1"])
def test_a_file_that_is_not_there_is_told_before_the_run_and_in_it(model, row):
    answer = LoRAMix.validate_inputs(**{row: "lmc.safetensors"})
    assert answer.startswith(f"{row}: 'lmc.safetensors' is not in the loras folder")
    assert "near it: lcm.safetensors" in answer
    with pytest.raises(ValueError, match=rf"^LoRA Mix: {row}: 'lmc\.safetensors' is not in the loras folder"):
        mixed(model, **{row: "lmc.safetensors"})


def test_without_a_row_everything_is_as_it_came(model, clip):
    made = mixed(model, clip, lcm_lora="none", lora_1="ink.safetensors", on_1=False)
    assert made[0] is model
    assert made[1] is clip
    assert (made[2], made[3], made[4]) == (None, None, [])
    assert made[5].startswith("No LoRA is on: model and clip are as they came.")


def test_a_changed_file_is_read_again(folder):
    before = LoRAMix.fingerprint_inputs(lora_1="ink.safetensors", lcm_lora="none", model=None)
    path = folder / "ink.safetensors"
    path.write_bytes(path.read_bytes())
    assert LoRAMix.fingerprint_inputs(lora_1="ink.safetensors", lcm_lora="none", model=None) != before
