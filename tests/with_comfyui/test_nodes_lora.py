"""The LoRA nodes on ComfyUI's own key maps, patches and loaders."""

import hashlib
import logging
import os
import threading
from pathlib import Path

import comfy.sd
import comfy.utils
import folder_paths
import pytest
import safetensors.torch
import torch
from comfy_execution.graph_utils import ExecutionBlocker

from lcm_kit.nodes import NODES
from lcm_kit.nodes.loading import ApplyLoRA, LCMLoader, LoadLoRA
from lcm_kit.nodes.merging import MergeLoRA, SaveLoRA
from lcm_kit.nodes.scheduling import LCMScheduler
from lcm_kit.samplers.presets import PRESETS
from lcm_kit.tests.helpers import as_read
from lcm_kit.tests.with_comfyui import tiny

EXACT = {"rtol": 0, "atol": 2e-6}  # float32 sums of weights of size 1, in another order


pytestmark = pytest.mark.usefixtures("no_gradients")


@pytest.fixture(scope="module")
def model():
    """Nothing here may change it: nodes work on clones."""
    return tiny.tiny_model()


@pytest.fixture
def loras_folder(comfy_home, tmp_path, monkeypatch):
    """An empty folder that ComfyUI takes for its first loras folder, and nothing in memory."""
    from lcm_kit.host.lora import files

    folder = tmp_path / "loras"
    folder.mkdir()
    monkeypatch.setitem(folder_paths.folder_names_and_paths, "loras", ([str(folder)], {".safetensors", ".pt"}))
    monkeypatch.setitem(folder_paths.filename_list_cache, "loras", None)
    folder_paths.filename_list_cache.pop("loras")
    yield folder
    files._cache.clear()


@pytest.fixture
def put(loras_folder):
    def write(name, tensors, metadata=None):
        safetensors.torch.save_file(tensors, loras_folder / name, metadata)
        return name

    return write


def loaded(name):
    return LoadLoRA.execute(name).result[0]


def merged(*pairs, rank=0):
    slots = {f"strength_{n}": 1.0 for n in range(1, 5)}
    for n, (lora, strength) in enumerate(pairs, start=1):
        slots |= {f"lora_{n}": lora, f"strength_{n}": strength}
    size = {"size": "rank", "rank": rank} if rank else "exact"
    return MergeLoRA.execute(method="linear", size=size, **slots).result


def applied(model, lora, clip=None, strength_model=1.0, strength_clip=1.0):
    return ApplyLoRA.execute(model, lora, strength_model, strength_clip, clip).result


def saved(lora, prefix="merged", dtype="fp32", format="kohya", mode="increment"):
    """The path of the file."""
    name = SaveLoRA.execute(lora, prefix, dtype, format, mode).result[0]
    return os.path.join(folder_paths.get_folder_paths("loras")[0], name)


def by_comfyui(model, *pairs):
    """The model after core's own loading of LoRA files, one after another."""
    for tensors, strength in pairs:
        model, _ = comfy.sd.load_lora_for_models(model, None, dict(tensors), strength, 0)
    return model


def assert_same_weights(model, expected):
    ours, theirs = tiny.patched_weights(model), tiny.patched_weights(expected)
    assert ours.keys() == theirs.keys()
    for key, weight in ours.items():
        torch.testing.assert_close(weight, theirs[key], **EXACT, msg=lambda text, key=key: f"{key}: {text}")


# ---- the paper's case


@pytest.mark.parametrize("style", ["kohya", "kohya on ldm", "generic", "generic PEFT"])
@pytest.mark.parametrize("lcm", ["kohya", "kohya on ldm"])
def test_one_merged_lora_patches_as_the_two_do(model, style, lcm):
    style_lora = tiny.lora(model, style, endings=tiny.STYLE, rank=3, alpha=None if "PEFT" in style else 1.5, seed=1)
    lcm_lora = tiny.lora(model, lcm, rank=5, alpha=0.625, seed=2)
    one, report = merged((style_lora, 0.8), (lcm_lora, 1.0))
    assert "Exact" in report
    assert_same_weights(applied(model, one)[0], by_comfyui(model, (style_lora, 0.8), (lcm_lora, 1.0)))


def test_negative_strengths_and_six_loras_in_a_chain_of_merges(model):
    strengths = [1.0, -0.7, 0.3, 0.0, 2.0, -1.0]
    pairs = [(tiny.lora(model, "kohya", rank=2, seed=n), strength) for n, strength in enumerate(strengths)]
    chain = merged((merged(*pairs[:4])[0], 1.0), *pairs[4:])[0]
    assert_same_weights(applied(model, chain)[0], by_comfyui(model, *pairs))


def test_diffusers_attention_names_are_read_where_core_misses_them(model, put):
    """ComfyUI 0.30.0 knows `unet....attn1.processor.to_q`, which today's diffusers does not write."""
    tensors = tiny.lora(model, "diffusers PEFT", alpha=None, seed=3)
    ours = applied(model, loaded(put("peft.safetensors", tensors)))[0]
    expected = by_comfyui(model, (tiny.lora(model, "kohya", alpha=None, seed=3), 1.0))
    assert_same_weights(ours, expected)


def test_a_scale_that_stands_in_metadata_only_is_used(model, put):
    tensors = tiny.lora(model, "generic PEFT", rank=4, alpha=None, seed=3)
    name = put("peft.safetensors", tensors, {"lora_alpha": "2"})
    assert_same_weights(applied(model, loaded(name))[0], by_comfyui(model, (tensors, 0.5)))


# ---- loading


@pytest.mark.parametrize("spelling", ["kohya", "kohya on ldm", "generic", "generic PEFT"])
def test_loaded_and_applied_equals_cores_lora_loader(model, put, spelling):
    tensors = tiny.lora(model, spelling, dtype=torch.float16)
    lora = loaded(put("a.safetensors", tensors))
    assert {tensor.dtype for key, tensor in lora.items() if not key.endswith(".alpha")} == {torch.float16}
    assert_same_weights(applied(model, lora, strength_model=0.7)[0], by_comfyui(model, (tensors, 0.7)))


def test_load_reports_what_is_in_the_file(model, put):
    report = LoadLoRA.execute(put("a.safetensors", tiny.lora(model, rank=4, alpha=2.0))).result[1]
    assert "a.safetensors" in report
    assert str(len(tiny.modules(model))) in report
    assert "rank: 4" in report
    assert "0.5" in report


def test_lcm_loader_applies_and_gives_settings(model, put):
    tensors = tiny.lora(model)
    name = put("a.safetensors", tensors, {"lcm_kit.preset": "LCM"})
    result = LCMLoader.execute(model, name, 1.0, "refuse").result
    assert_same_weights(result[0], by_comfyui(model, (tensors, 1.0)))
    count = len(tiny.modules(model))
    assert result[4:6] == (4, 1.0)
    assert f"{count} of {count} modules applied" in result[6]
    assert set(result[3]) == set(tensors)
    assert model.patches == {}


def test_the_report_says_what_a_lora_is_and_how_to_sample_with_it(model, put):
    name = put("a.safetensors", tiny.lora(model, rank=4, alpha=2.0), {"lcm_kit.preset": "TCD"})
    total, parameters = len(tiny.modules(model)), sum(t.numel() for k, t in tiny.lora(model).items() if "lora_" in k and "alpha" not in k)  # fmt: skip
    assert as_read(LCMLoader.execute(model, name, 0.5, "refuse").result[6]).splitlines() == [
        f"a.safetensors: {total} of {total} modules applied at strength 0.5.",
        "It is: TCD LoRA, likely: by metadata, the file says so.",
        "Made for: not known, this model: of ComfyUI's class TinyConfig.",
        "Settings (TCD): LCM KSampler, 4 steps, cfg 1, gamma 0.3, 50 original steps.",
        f"Rank 4, alpha 2, effective scale 0.5, parameters {parameters:,}.",
    ]


def test_all_three_nodes_say_the_same_about_a_lora(model, put):
    name = put("a.safetensors", tiny.lora(model), {"lcm_kit.preset": "LCM"})
    reports = [
        LCMLoader.execute(model, name, 1.0, "refuse").result[6],
        applied(model, loaded(name))[2],
        LoadLoRA.execute(name).result[1],
    ]
    for words in (
        "It is: LCM LoRA, likely: by metadata",
        "Settings (LCM): LCM KSampler, 4 steps, cfg 1, gamma 1",
        "parameters ",
    ):
        assert all(words in report for report in reports)


@pytest.mark.parametrize(
    ("preset", "settings"),
    [
        ("LCM", (4, 1.0)),
        ("Lightning 8 steps", (8, 1.0)),
        ("Hyper-SD 8 steps CFG", (8, 5.0)),
        ("PCM normal cfg 16 steps", (16, 7.5)),
    ],
)
def test_settings_are_those_of_the_preset(model, put, preset, settings):
    name = put("a.safetensors", tiny.lora(model), {"lcm_kit.preset": preset})
    _, _, chosen, _, steps, cfg, report = LCMLoader.execute(model, name, 1.0, "refuse").result
    assert (steps, cfg) == settings == (chosen.steps, chosen.cfg)
    assert chosen is PRESETS[preset]
    assert f"Settings ({preset}): " in report


@pytest.mark.parametrize(
    ("name", "metadata", "words"),
    [
        ("ink.safetensors", {}, "No acceleration LoRA recognised: no preset, steps or cfg are given."),
        ("ink.safetensors", {"modelspec.title": "Ink"}, "No acceleration LoRA recognised: "),
        ("x-lightning-4steps.safetensors", {}, "Its name says lightning, but it is none of the files known here: no preset"),
        ("a.safetensors", {"lcm_kit.preset": "one nobody knows"},
         "It is one, but its settings (one nobody knows) are none of those known here: no preset"),
    ],
)  # fmt: skip
@pytest.mark.parametrize("strength", [1.0, 0.0])
def test_what_is_not_known_gets_no_settings_and_whoever_asks_for_them_is_told(
    model, put, name, metadata, words, strength
):
    """Never those of another method: such a picture would look like an answer."""
    _, _, chosen, _, steps, cfg, report = LCMLoader.execute(
        model, put(name, style(model), metadata), strength, "refuse"
    ).result
    assert chosen is None
    for blocked, what in ((steps, "steps"), (cfg, "cfg")):
        assert isinstance(blocked, ExecutionBlocker)
        assert blocked.message.startswith(f"LCM-LoRA Loader has no {what} to give: {name} is no acceleration LoRA")
        assert f"Disconnect {what}" in blocked.message
    assert (words in report) is (strength != 0)
    assert "Settings (" not in report


def style(model):
    """It changes attention alone, as most do."""
    return {key: tensor for key, tensor in tiny.lora(model).items() if "_attn" in key}


def test_an_acceleration_lora_by_its_modules_that_is_not_known_gets_no_settings_either(model, put):
    for node in (
        lambda name: LCMLoader.execute(model, name, 1.0, "refuse").result[6],
        lambda name: LoadLoRA.execute(name).result[1],
    ):
        report = node(put("a.safetensors", tiny.lora(model)))
        assert "It changes what acceleration LoRAs change, but which one it is is not known: no preset" in report
        assert "Settings (" not in report


def test_a_style_lora_in_the_other_nodes_is_not_asked_for_settings(model, put):
    name = put("ink.safetensors", style(model))
    assert "acceleration" not in applied(model, loaded(name))[2]
    assert "acceleration" not in LoadLoRA.execute(name).result[1]


def test_nodes_that_take_a_preset_do_without_where_the_loader_has_none(model, put):
    preset = LCMLoader.execute(model, put("ink.safetensors", style(model)), 1.0, "refuse").result[2]
    assert preset is None
    inputs = {"model": model, "steps": 3, "denoise": 1.0, "original_steps": 50, "timesteps": ""}
    with_none = LCMScheduler.execute(**inputs, preset=preset).result[0]
    assert torch.equal(with_none, LCMScheduler.execute(**inputs).result[0])
    takers = [entry for node in NODES for entry in node.define_schema().inputs if entry.get_io_type() == "LCM_PRESET"]
    assert len(takers) >= 3
    assert all(entry.optional for entry in takers)


@pytest.mark.parametrize("node", ["loader", "apply"])
def test_strength_zero_leaves_the_model(model, put, node):
    name = put("lcm.safetensors", tiny.lora(model))
    if node == "loader":
        changed, *_, report = LCMLoader.execute(model, name, 0.0, "refuse").result
    else:
        changed, _, report = applied(model, loaded(name), strength_model=0.0)
    assert changed is model
    assert "strength is 0" in report


def test_a_file_that_was_overwritten_is_read_again(model, put):
    name = put("a.safetensors", tiny.lora(model, seed=1))
    before, fingerprint = loaded(name), LoadLoRA.fingerprint_inputs(lora_name=name)
    again = loaded(name)
    assert all(again[key] is before[key] for key in before)
    put("a.safetensors", tiny.lora(model, seed=2, rank=5))
    assert LoadLoRA.fingerprint_inputs(lora_name=name) != fingerprint
    assert next(iter(loaded(name).values())).shape != next(iter(before.values())).shape


@pytest.fixture
def reads(monkeypatch):
    """Paths that were read, in order; the reading itself is the real one."""
    from lcm_kit.host.lora import files

    read, seen = files.load, []

    def counting(path, **keywords):
        seen.append(os.path.basename(path))
        return read(path, **keywords)

    monkeypatch.setattr(files, "load", counting)
    return seen


def test_another_strength_does_not_read_the_file_again(model, put, reads):
    name = put("a.safetensors", tiny.lora(model, seed=1))
    for strength in (1.0, 0.5, 0.0, -1.0):
        result = LCMLoader.execute(model, name, strength, "refuse").result
        merged((loaded(name), strength), (loaded(name), 1.0))
        applied(result[0], loaded(name), strength_model=strength)
    assert reads == [name]
    expected = by_comfyui(model, (tiny.lora(model, seed=1), 0.7))
    assert_same_weights(LCMLoader.execute(model, name, 0.7, "refuse").result[0], expected)
    assert reads == [name]


def test_a_changed_strength_looks_up_no_module_again(model, put, monkeypatch):
    from lcm_kit.host.lora import patches

    fit, seen = patches.fit, []

    def counting(*arguments):
        seen.append(arguments)
        return fit(*arguments)

    monkeypatch.setattr(patches, "fit", counting)
    name = put("a.safetensors", tiny.lora(model, seed=1))
    for strength in (1.0, 0.5):
        changed = LCMLoader.execute(model, name, strength, "refuse").result[0]
        assert_same_weights(changed, by_comfyui(model, (tiny.lora(model, seed=1), strength)))
    assert len(seen) == 1
    another = tiny.tiny_model(seed=5)
    changed = LCMLoader.execute(another, name, 1.0, "refuse").result[0]
    assert_same_weights(changed, by_comfyui(another, (tiny.lora(model, seed=1), 1.0)))
    assert len(seen) == 2


def test_a_file_overwritten_in_place_is_read_again_and_the_old_one_forgotten(model, put, reads):
    from lcm_kit.host.lora import files

    name = put("a.safetensors", tiny.lora(model, seed=1))
    loaded(name)
    put(name, tiny.lora(model, seed=2))
    changed = LCMLoader.execute(model, name, 1.0, "refuse").result[0]
    assert_same_weights(changed, by_comfyui(model, (tiny.lora(model, seed=2), 1.0)))
    assert reads == [name, name]
    assert [os.path.basename(key[0]) for key in files._cache].count(name) == 1


def test_what_the_page_asks_before_a_run_reads_no_file(model, put, monkeypatch, reads):
    """ComfyUI calls it for every prompt that is queued."""
    from lcm_kit.host.lora import files
    from lcm_kit.lora_merge.recognise import identity

    def never(path):
        raise AssertionError("hashed")

    monkeypatch.setattr(identity, "sha256_of", never)
    monkeypatch.setattr(files, "sha256_of", never)
    name = put("a.safetensors", tiny.lora(model))
    for node in (LoadLoRA, LCMLoader):
        assert node.fingerprint_inputs(lora_name=name) == node.fingerprint_inputs(lora_name=name)
        assert node.validate_inputs(lora_name=name) is True
    assert reads == []


def test_a_lora_that_was_changed_on_the_way_is_applied_as_it_is_now(model, put):
    name = put("a.safetensors", tiny.lora(model, seed=1))
    applied(model, loaded(name))
    lora = loaded(name)
    for key in [key for key in lora if "attn1" in key]:
        del lora[key]
    changed = applied(model, lora)[0]
    assert_same_weights(changed, by_comfyui(model, (lora, 1.0)))
    assert len(changed.patches) < len(tiny.modules(model))


def test_what_a_later_node_does_to_a_lora_does_not_reach_the_cache(model, put):
    name = put("a.safetensors", tiny.lora(model))
    loaded(name).clear()
    assert len(loaded(name)) > 0


def test_the_cache_forgets_the_oldest_beyond_its_size(model, put, monkeypatch):
    from lcm_kit.host.lora import files

    names = [put(f"{n}.safetensors", tiny.lora(model, rank=1, seed=n)) for n in range(3)]
    monkeypatch.setattr(files, "CACHE_BYTES", 1)
    for name in names:
        loaded(name)
    assert [key[0] for key in files._cache] == [folder_paths.get_full_path("loras", names[-1])]


def test_only_safetensors_are_offered(model, put, loras_folder):
    put("a.safetensors", tiny.lora(model, rank=1))
    (loras_folder / "b.pt").write_bytes(b"\x80")
    assert LoadLoRA.define_schema().inputs[0].options == ["a.safetensors"]


# ---- a stack of LoRAs from another pack


def test_a_lora_stack_is_applied_before_the_lcm_lora(model, put):
    clip = tiny.tiny_clip()
    style = tiny.lora(model, endings=tiny.STYLE, seed=1) | tiny.clip_lora(clip)
    other, lcm = tiny.lora(model, rank=2, seed=2), tiny.lora(model, seed=3)
    put("style.safetensors", style)
    put("other.safetensors", other)
    stack = [("style.safetensors", 0.8, 0.5), ("other.safetensors", -0.3, 0.0), ("None", 1.0, 1.0)]
    result = LCMLoader.execute(model, put("lcm.safetensors", lcm), 1.0, "refuse", clip, stack).result
    assert_same_weights(result[0], by_comfyui(model, (style, 0.8), (other, -0.3), (lcm, 1.0)))
    _, expected_clip = comfy.sd.load_lora_for_models(model, clip, dict(style), 0.8, 0.5)
    assert_same_weights(result[1].patcher, expected_clip.patcher)
    assert result[6].startswith("lcm.safetensors: ")
    lines = as_read(result[6]).splitlines()
    assert any(line.startswith("style.safetensors: ") and "strength 0.8 (text encoder 0.5)" in line for line in lines)
    assert any(line.startswith("other.safetensors: ") for line in lines)


@pytest.mark.parametrize("stack", [None, [], (), [["None", 1, 1], (None, 1.0, 1.0)]])
def test_an_empty_stack_changes_nothing(model, put, stack):
    lcm = tiny.lora(model)
    result = LCMLoader.execute(model, put("lcm.safetensors", lcm), 1.0, "refuse", None, stack).result
    assert_same_weights(result[0], by_comfyui(model, (lcm, 1.0)))


@pytest.mark.parametrize(
    ("stack", "message"),
    [
        (
            "style.safetensors",
            r"lora_stack is 'style\.safetensors', but .* a LORA_STACK, a list of \(file name .*stacker node",
        ),
        ({"a": 1}, r"lora_stack is a dict of 1 entry, but"),
        ([("style.safetensors", 1.0)], r"entry 1 is \('style\.safetensors', 1\.0\), but a LORA_STACK is a list of"),
        (["style.safetensors"], r"entry 1 is 'style\.safetensors', but"),
        ([("lcm.safetensors", 1.0, 1.0), (7, 1.0, 1.0)], r"entry 2 names its file by 7, but"),
        (
            [("style.safetensors", "much", 1.0)],
            r"entry 1 \('style\.safetensors'\) has strengths \['much', 1\.0\], .*finite numbers",
        ),
        ([("style.safetensors", float("nan"), 1.0)], r"has strengths \[nan, 1\.0\]"),
        ([("style.safetensors", 1.0, float("inf"))], r"has strengths \[1\.0, inf\]"),
        (
            [("gone.safetensors", 1.0, 1.0)],
            r"lora_stack: 'gone\.safetensors' is not in the loras folder.*extra_model_paths\.yaml",
        ),
        ([("/gone/there.safetensors", 1.0, 1.0)], r"lora_stack: '/gone/there\.safetensors' is not in the loras folder"),
    ],
)
def test_a_wrong_stack_is_named(model, put, stack, message):
    name = put("lcm.safetensors", tiny.lora(model))
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        LCMLoader.execute(model, name, 1.0, "refuse", None, stack)
    assert model.patches == {}


def test_a_stack_may_name_a_file_by_its_path(model, put, tmp_path):
    """As Lora-Manager does for a folder that ComfyUI does not know."""
    style, lcm = tiny.lora(model, endings=tiny.STYLE, seed=1), tiny.lora(model, seed=3)
    path = tmp_path / "style.safetensors"
    safetensors.torch.save_file(style, path)
    result = LCMLoader.execute(
        model, put("lcm.safetensors", lcm), 1.0, "refuse", None, [(str(path), 0.8, 0.5)]
    ).result  # fmt: skip
    assert_same_weights(result[0], by_comfyui(model, (style, 0.8), (lcm, 1.0)))
    assert any(line.startswith("style.safetensors: ") for line in result[6].splitlines())
    assert str(tmp_path) not in result[6]
    pickle = tmp_path / "style.pt"
    pickle.write_bytes(path.read_bytes())
    with pytest.raises(ValueError, match=r"lora_stack: .* is not in the loras folder"):
        LCMLoader.execute(model, "lcm.safetensors", 1.0, "refuse", None, [(str(pickle), 1.0, 1.0)])


def test_a_stacked_lora_for_another_base_is_refused(model, wide, put):
    put("wide.safetensors", tiny.lora(wide))
    with pytest.raises(ValueError, match=r"wide\.safetensors does not fit this model"):
        LCMLoader.execute(model, put("lcm.safetensors", tiny.lora(model)), 1.0, "refuse", None, [("wide.safetensors", 1.0, 1.0)])  # fmt: skip


# ---- bad files


def test_a_missing_file_is_named(loras_folder):
    with pytest.raises(ValueError, match=r"lora_name: 'gone\.safetensors' is not in the loras folder.*press R"):
        loaded("gone.safetensors")


def test_a_truncated_file_is_named(model, put, loras_folder):
    name = put("cut.safetensors", tiny.lora(model))
    path = loras_folder / name
    path.write_bytes(path.read_bytes()[:-1000])
    for node in (lambda: loaded(name), lambda: LCMLoader.execute(model, name, 1.0, "refuse")):
        with pytest.raises(ValueError, match=r"cut\.safetensors: is cut off: .*download it again"):
            node()


# ---- wrong base


@pytest.fixture(scope="module")
def wide():
    """Another base: the same module names, wider context."""
    return tiny.tiny_model(context_dim=24)


@pytest.fixture(scope="module")
def deep():
    """Another base: more transformer blocks, so more modules."""
    return tiny.tiny_model(transformer_depth=[1, 1, 3, 3], transformer_depth_output=[1, 1, 1, 3, 3, 3])


def test_another_shape_is_refused_with_counts(model, wide, put):
    total = len(tiny.modules(model))
    wrong = sum(name.endswith(("attn2.to_k", "attn2.to_v")) for name, _, _ in tiny.modules(model))
    name = put("wide.safetensors", tiny.lora(wide))
    message = rf"wide\.safetensors does not fit this model \(TinyConfig\): of its {total} modules {total - wrong} fit, "
    message += rf"{wrong} have another shape .*\(\d+, 24\) on a weight of \(\d+, 16\)\).*made for another base model"
    with pytest.raises(ValueError, match=message):
        LCMLoader.execute(model, name, 1.0, "refuse")
    with pytest.raises(ValueError, match=message):
        applied(model, loaded(name))


def test_modules_without_a_place_are_refused_by_the_lcm_loader(model, deep, put):
    extra = len(tiny.modules(deep)) - len(tiny.modules(model))
    name = put("deep.safetensors", tiny.lora(deep))
    with pytest.raises(ValueError, match=rf"modules {len(tiny.modules(model))} fit, {extra} have no place"):
        LCMLoader.execute(model, name, 1.0, "refuse")


def test_a_lora_that_leaves_much_of_the_model_alone_is_refused_by_the_lcm_loader(model, deep, put):
    """As SSD-1B's on SDXL, on models that have no name: everything in it fits."""
    name = put("shallow.safetensors", tiny.lora(model))
    few, all_of_them = len(tiny.modules(model)), len(tiny.modules(deep))
    message = (
        rf"of its {few} modules {few} fit, {all_of_them - few} of the model's {all_of_them} modules of these kinds"
    )
    with pytest.raises(ValueError, match=message):
        LCMLoader.execute(deep, name, 1.0, "refuse")
    assert "pictures may be spoilt" in LCMLoader.execute(deep, name, 1.0, "warn").result[6]
    # not by the node for any LoRA: nobody says that a style has to cover the model
    assert len(applied(deep, loaded(name))[0].patches) == few


def test_apply_can_be_told_to_apply_what_fits(model, wide):
    fitting = {k: v for k, v in tiny.lora(wide).items() if "attn2_to_k" not in k and "attn2_to_v" not in k}
    changed, _, report = ApplyLoRA.execute(model, tiny.lora(wide), 1.0, 1.0, wrong_base="warn").result
    assert_same_weights(changed, by_comfyui(model, (fitting, 1.0)))
    assert "have another shape than this model's weights" in report


def test_warn_applies_what_fits_and_says_what_does_not(model, wide, put, caplog):
    caplog.set_level(logging.WARNING)
    result = LCMLoader.execute(model, put("wide.safetensors", tiny.lora(wide, seed=4)), 1.0, "warn").result
    assert "have another shape than this model's weights" in result[6]
    assert "have another shape than this model's weights" in caplog.text
    fitting = {
        key: value
        for key, value in tiny.lora(wide, seed=4).items()
        if "attn2_to_k" not in key and "attn2_to_v" not in key
    }
    assert_same_weights(result[0], by_comfyui(model, (fitting, 1.0)))
    assert "ERROR lora" not in caplog.text


def test_a_few_modules_without_a_place_are_named_by_apply(model, caplog):
    lora = tiny.lora(model)
    stray = {key.replace("lora_unet_mid_block_attentions_0_proj_in", "lora_unet_stray"): lora[key] for key in lora}
    report = applied(model, stray)[2]
    total = len(tiny.modules(model))
    assert f"{total - 1} of {total} modules applied" in report
    assert "1 have no place in this model: lora_unet_stray." in report
    assert "lora_unet_stray" in caplog.text


def test_a_lora_for_something_else_is_refused_by_apply(model):
    lora = {
        "transformer.blocks.0.attn.lora_up.weight": torch.ones(8, 1),
        "transformer.blocks.0.attn.lora_down.weight": torch.ones(1, 8),
    }
    with pytest.raises(
        ValueError, match=r"of its 1 modules 0 fit, 1 have no place in it .*transformer\.blocks\.0\.attn"
    ):
        applied(model, lora)


@pytest.mark.parametrize(("module", "has_bias"), [("to_q", False), ("to_out.0", True)])
def test_a_bias_that_the_model_lacks_has_no_place(model, module, has_bias):
    name = f"diffusion_model.input_blocks.1.1.transformer_blocks.0.attn1.{module}"
    lora = tiny.lora(model, "generic") | {f"{name}.diff_b": torch.ones(32)}
    changed, _, report = applied(model, lora)
    assert (f"1 have no place in this model: {name}." in report) is not has_bias
    assert (f"{name}.bias" in changed.patches) is has_bias


def test_one_weight_named_by_two_modules_is_refused(model):
    lora = tiny.lora(model, "kohya") | tiny.lora(model, "kohya on ldm")
    with pytest.raises(ValueError, match=r"names a weight twice: .* and .*, and \d+ pairs more"):
        applied(model, lora)


# ---- text encoder


def test_text_encoder_modules_need_a_clip_and_say_so(model):
    clip = tiny.tiny_clip()
    lora = tiny.lora(model, endings=tiny.STYLE) | tiny.clip_lora(clip)
    without, _, report = applied(model, lora)
    assert "8 text-encoder modules not applied: no CLIP is connected" in report
    changed, changed_clip, report = applied(model, lora, clip, strength_model=0.5, strength_clip=2.0)
    assert "not applied" not in report
    expected, expected_clip = comfy.sd.load_lora_for_models(model, clip, dict(lora), 0.5, 2.0)
    assert_same_weights(changed, expected)
    assert_same_weights(changed_clip.patcher, expected_clip.patcher)
    assert len(changed_clip.patcher.patches) == 8
    assert clip.patcher.patches == {}
    assert without.patches.keys() == changed.patches.keys()


def test_a_lora_for_the_text_encoder_alone_asks_for_a_clip(model):
    with pytest.raises(ValueError, match=r"changes the text encoder only \(8 modules\)\. Connect a CLIP"):
        applied(model, tiny.clip_lora(tiny.tiny_clip()))


def test_a_lora_without_text_encoder_passes_the_clip_through(model):
    clip = tiny.tiny_clip()
    assert applied(model, tiny.lora(model), clip)[1] is clip


# ---- saving


@pytest.mark.parametrize("spelling", ["kohya", "kohya on ldm", "generic PEFT"])
def test_the_saved_merge_loads_in_cores_loader_without_a_missing_key(model, loras_folder, spelling, caplog):
    one, _ = merged(
        (tiny.lora(model, spelling, alpha=None, endings=tiny.STYLE, seed=1), 0.8), (tiny.lora(model, seed=2), 1.0)
    )
    path = saved(one)
    caplog.set_level(logging.DEBUG)
    from nodes import LoraLoaderModelOnly

    (core,) = LoraLoaderModelOnly().load_lora_model_only(model, os.path.relpath(path, loras_folder), 1.0)
    assert "lora key not loaded" not in caplog.text
    assert "NOT LOADED" not in caplog.text
    assert_same_weights(core, applied(model, one)[0])


def test_a_saved_lora_is_read_back_the_same_in_both_formats(model, loras_folder):
    lora = tiny.lora(model, alpha=1.0)
    for format in ("kohya", "diffusers"):
        path = saved(lora, prefix=format, format=format)
        assert_same_weights(applied(model, loaded(os.path.basename(path)))[0], by_comfyui(model, (lora, 1.0)))


@pytest.mark.parametrize(
    ("dtype", "expected"), [("fp16", torch.float16), ("bf16", torch.bfloat16), ("fp32", torch.float32)]
)
def test_the_dtype_is_the_files(model, loras_folder, dtype, expected):
    tensors = safetensors.torch.load_file(saved(tiny.lora(model, rank=1), dtype=dtype))
    assert {tensor.dtype for key, tensor in tensors.items() if not key.endswith(".alpha")} == {expected}


def test_increment_never_overwrites(model, loras_folder):
    lora = tiny.lora(model, rank=1)
    paths = [os.path.relpath(saved(lora, "made/fast"), loras_folder) for _ in range(2)]
    assert paths == [os.path.join("made", "fast_00001_.safetensors"), os.path.join("made", "fast_00002_.safetensors")]


def test_exact_name_refuses_an_existing_file_and_overwrite_replaces_it(model, loras_folder):
    first, second = tiny.lora(model, rank=1), tiny.lora(model, rank=2)
    path = saved(first, "fast.safetensors", mode="exact name")
    assert path == str(loras_folder / "fast.safetensors")
    with pytest.raises(FileExistsError, match=r"fast\.safetensors: exists already"):
        saved(second, "fast", mode="exact name")
    assert len(safetensors.torch.load_file(path)) == len(first)
    saved(second, "fast", mode="overwrite")
    assert {t.shape[1] for k, t in safetensors.torch.load_file(path).items() if "lora_up" in k} == {2}
    assert os.listdir(loras_folder) == ["fast.safetensors"]


@pytest.mark.parametrize(
    "prefix", ["../out", "/tmp/out", "a/../../out", "..\\out", "C:\\out" if os.name == "nt" else "a/../../../etc/out"]
)
def test_a_name_outside_the_loras_folder_is_refused(model, loras_folder, prefix):
    with pytest.raises(ValueError, match=r"filename_prefix is .* lies outside the loras folder"):
        saved(tiny.lora(model, rank=1), prefix)


@pytest.mark.parametrize("prefix", ["", "  ", "folder/", "..", ".safetensors"])
def test_a_name_without_a_name_is_refused(model, loras_folder, prefix):
    with pytest.raises(ValueError, match=r"names no file"):
        saved(tiny.lora(model, rank=1), prefix)
    assert os.listdir(loras_folder) == []


def test_overwrite_replaces_what_the_pack_wrote_and_overwrite_any_whatever_is_there(model, loras_folder):
    lora, path = tiny.lora(model, rank=1), loras_folder / "users_own.safetensors"
    safetensors.torch.save_file(tiny.lora(model, rank=2), path, {"ss_output_name": "users_own"})
    theirs = path.read_bytes()
    with pytest.raises(
        FileExistsError, match=r"users_own\.safetensors: exists already and does not say .*overwrite_any"
    ):
        saved(lora, "users_own", mode="overwrite")
    assert path.read_bytes() == theirs
    saved(lora, "users_own", mode="overwrite_any")
    assert len(safetensors.torch.load_file(path)) == len(lora)
    saved(lora, "users_own", mode="overwrite")
    # A LoRA that came from a file of somebody else and was only saved is ours now, too.
    saved(loaded("users_own.safetensors"), "again", mode="exact name")
    saved(lora, "again", mode="overwrite")
    assert sorted(os.listdir(loras_folder)) == ["again.safetensors", "users_own.safetensors"]


HOSTILE_NAMES = [
    "x\nY", "x\0", "x\x1b[31m", "a:b", "C:\\x", "con", "aux/x", "NUL", "com1", "q?", "s*", "<x>", "p|q", 'd"q', "r\u202eL",
    "dot.", "space ", "folder /x", "\ud800", "e\u0301", "é", "n" * 228, "n" * 236, "n" * 243, "n" * 255, "n" * 5000,
    "/".join("d" * 2000), "/".join(["d" * 200] * 5), "y.SAFETENSORS", "%date:yyyy%", "100%", "../x", "a/../b", "./c", "a//d",
    "/abs", "\\\\server\\share", "-rf", "~", "$HOME", "{x}", "'q'", "a;b", "日本", "z.safetensors.safetensors", "..x",
]  # fmt: skip


@pytest.mark.parametrize("mode", ["increment", "exact name", "overwrite", "overwrite_any"])
def test_any_name_is_saved_and_read_back_or_refused_in_words(model, loras_folder, mode):
    lora = {key: one for key, one in tiny.lora(model, rank=1).items() if "down_blocks_0_attentions_0_proj_in" in key}
    count = 0
    for prefix in HOSTILE_NAMES:
        try:
            path = saved(lora, prefix, mode=mode)
        except ValueError as error:
            said = str(error)
        else:
            said, count = None, count + 1
            name = os.path.relpath(path, loras_folder)
            assert name.split(os.sep)[0] != ".."
            assert name in folder_paths.get_filename_list("loras")
            assert set(loaded(name)) == set(lora)
        # The page is shown < with a joiner behind it, so that it is no markup.
        assert said is None or said.replace("\u2060", "").isprintable(), prefix
        assert said is None or said.startswith("Save LoRA: filename_prefix is "), prefix
        assert str(loras_folder) not in str(said)
        files = [file for _, _, found in os.walk(loras_folder) for file in found]
        assert len(files) == count, prefix


def test_twenty_saves_by_increment_two_at_a_time_are_twenty_files(model, loras_folder):
    lora, gate, trouble = tiny.lora(model, rank=1), threading.Barrier(2), []

    def save_ten():
        for number in range(10):
            gate.wait()
            try:
                saved(lora, f"race{number}")
            except Exception as error:
                trouble.append(error)

    both = [threading.Thread(target=save_ten) for _ in range(2)]
    for thread in both:
        thread.start()
    for thread in both:
        thread.join()
    assert trouble == []
    assert sorted(os.listdir(loras_folder)) == [f"race{n}_0000{one}_.safetensors" for n in range(10) for one in (1, 2)]


def test_no_message_tells_where_the_loras_folder_is(model, loras_folder):
    (loras_folder / "cut.safetensors").write_bytes(b"{}")
    (loras_folder / "file").touch()
    for attempt in (
        lambda: loaded("nowhere.safetensors"),
        lambda: loaded("cut.safetensors"),
        lambda: saved(tiny.lora(model, rank=1), "cut", mode="exact name"),
        lambda: saved(tiny.lora(model, rank=1), "cut", mode="overwrite"),
        lambda: saved(tiny.lora(model, rank=1), "../out"),
        lambda: saved(tiny.lora(model, rank=1), "file/x"),
    ):
        with pytest.raises((OSError, ValueError)) as failure:
            attempt()
        assert str(loras_folder) not in str(failure.value)
        assert str(loras_folder.parent) not in str(failure.value)


def test_core_can_forbid_files_to_be_mapped(loras_folder, put, model, monkeypatch):
    """--disable-mmap; a small file is never mapped."""
    from lcm_kit.host.lora import files
    from lcm_kit.lora_merge.disk import tensor_file

    put("style.safetensors", tiny.lora(model))
    mapped = []
    monkeypatch.setattr(
        tensor_file.mmap, "mmap", lambda *_, **__: mapped.append(1) or (_ for _ in ()).throw(OSError("a map"))
    )
    # Small for a server, large for a command.
    monkeypatch.setattr(tensor_file, "MAPPED_ABOVE", 100)
    assert loaded("style.safetensors")
    assert mapped == []
    monkeypatch.setattr(files, "SERVER_MAPPED_ABOVE", 100)
    files._cache.clear()
    with pytest.raises(OSError, match="a map"):
        loaded("style.safetensors")
    assert mapped == [1]
    monkeypatch.setattr(comfy.utils, "DISABLE_MMAP", True)
    assert loaded("style.safetensors")
    assert mapped == [1]


# ---- merging


def test_a_smaller_rank_is_reported_with_its_error(model):
    one, report = merged((tiny.lora(model, rank=4, seed=1), 1.0), (tiny.lora(model, rank=4, seed=2), 1.0), rank=6)
    assert "relative error" in report
    assert {t.shape[1] for k, t in one.items() if "lora_up" in k} == {6}


def test_empty_slots_are_left_out(model):
    pairs = [(tiny.lora(model, rank=1, seed=1), 1.0), (tiny.lora(model, rank=1, seed=2), 1.0)]
    expected = merged(*pairs)[0]
    again = merged(*pairs, (None, 5.0))[0]
    assert all(torch.equal(again[key], expected[key]) for key in expected)


def test_inputs_are_not_changed(model):
    lora = tiny.lora(model)
    before = {key: value.clone() for key, value in lora.items()}
    one, _ = merged((lora, 2.0), (lora, -1.0))
    applied(model, one)
    assert all(torch.equal(lora[key], before[key]) for key in before)


def test_loras_for_different_bases_do_not_merge(model, wide):
    with pytest.raises(ValueError, match="lora_2"):
        merged((tiny.lora(model), 1.0), (tiny.lora(wide), 1.0))


def test_a_merge_works_in_cores_own_lora_nodes(model):
    """LORA_MODEL is core's socket, so its nodes take what ours make."""
    from comfy_extras.nodes_train import LoraModelLoader

    one, _ = merged((tiny.lora(model, seed=1), 0.5), (tiny.lora(model, "generic", seed=2), 1.0))
    assert_same_weights(LoraModelLoader.execute(model, one, 1.0).result[0], applied(model, one)[0])


# ---- what a file says about itself


def notes_of(path):
    with safetensors.safe_open(path, framework="pt") as file:
        return file.metadata()


def test_a_saved_lora_says_what_the_node_was_told(model, put):
    lora = loaded(put("a.safetensors", tiny.lora(model), {"modelspec.author": "Ann", "sshs_model_hash": "1" * 64}))
    name = SaveLoRA.execute(
        lora, "named", "fp16", "kohya", "increment", title=" Ink ", trigger_words="ink, brush"
    ).result[0]
    path = folder_paths.get_full_path("loras", name)
    notes = notes_of(path)
    assert notes["modelspec.title"] == "Ink"
    assert notes["modelspec.author"] == "Ann"
    assert notes["modelspec.trigger_phrase"] == "ink, brush"
    data = Path(path).read_bytes()
    body = data[8 + int.from_bytes(data[:8], "little") :]
    assert notes["sshs_model_hash"] == hashlib.sha256(body).hexdigest()
    assert "trigger words: ink, brush" in LoadLoRA.execute("named_00001_.safetensors").result[1]


def test_metadata_that_cannot_be_read_costs_a_sentence(model, put):
    name = put("deep.safetensors", tiny.lora(model), {"lcm_kit.merge": "[" * 100_000})
    sentence = "Its metadata lcm_kit.merge is left aside, because it cannot be read: nested deeper than 100."
    lora, report = LoadLoRA.execute(name).result
    assert report.count(sentence) == 1
    assert applied(model, lora)[2].count(sentence) == 1
    both, report = merged((lora, 1.0), (lora, 0.5))
    assert report.count(f"Warning: deep.safetensors: {sentence[0].lower()}{sentence[1:]}") == 1
    assert notes_of(saved(both))["modelspec.merged_from"] == "deep.safetensors, deep.safetensors"
