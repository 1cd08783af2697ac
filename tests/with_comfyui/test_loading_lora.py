"""Load LoRA and LCM-LoRA Loader on ComfyUI's own key maps: what is applied, said, read again and remembered."""

import os

import folder_paths
import pytest
import torch
from comfy_execution.graph_utils import ExecutionBlocker

from lcm_kit.nodes import NODES
from lcm_kit.nodes.loading import LCMLoader, LoadLoRA
from lcm_kit.nodes.scheduling import LCMScheduler
from lcm_kit.samplers.presets import PRESETS
from lcm_kit.tests.helpers import as_read
from lcm_kit.tests.with_comfyui import tiny
from lcm_kit.tests.with_comfyui.lora_nodes import applied, assert_same_weights, by_comfyui, loaded, merged

pytestmark = pytest.mark.usefixtures("no_gradients")


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
        assert "It changes all that acceleration LoRAs change; whether it is one is not known: no preset" in report
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
