"""`auto` in the LCM-LoRA Loader, on the official LCM-LoRAs at full size in ComfyUI's own model classes."""

import os

import folder_paths
import pytest
import safetensors.torch
import torch

from lcm_kit.host.lora import auto, files
from lcm_kit.lora_merge import Lora, merge, save
from lcm_kit.lora_merge.files.load_save import outline
from lcm_kit.lora_merge.recognise.catalogue import instead
from lcm_kit.lora_merge.recognise.identity import identify
from lcm_kit.nodes.loading import LCMLoader
from lcm_kit.tests.lora_merge import full_size
from lcm_kit.tests.with_comfyui import bases, tiny

pytestmark = pytest.mark.usefixtures("no_gradients")
NAMES = tuple(full_size.CONFIGS)


def in_folder(patch, folder):
    patch.setitem(folder_paths.folder_names_and_paths, "loras", ([str(folder)], {".safetensors"}))
    folder_paths.filename_list_cache.pop("loras", None)


@pytest.fixture(scope="module")
def three(tmp_path_factory):
    """A folder with the three official LCM-LoRAs under names that say nothing."""
    folder = tmp_path_factory.mktemp("loras")
    for number, base in enumerate(NAMES):
        full_size.write(folder / f"{number}.safetensors", full_size.lora(base))
    yield folder
    files._cache.clear()


@pytest.fixture
def official(three, monkeypatch):
    in_folder(monkeypatch, three)
    yield three
    folder_paths.filename_list_cache.pop("loras", None)


@pytest.fixture
def loras(comfy_home, tmp_path, monkeypatch):
    in_folder(monkeypatch, tmp_path)
    yield tmp_path
    folder_paths.filename_list_cache.pop("loras", None)
    files._cache.clear()


def put(folder, name, tensors, **metadata):
    safetensors.torch.save_file(tensors, folder / name, metadata or None)
    folder_paths.filename_list_cache.pop("loras", None)


def load(model):
    return LCMLoader.execute(model, "auto", 1.0, "refuse").result


@pytest.mark.parametrize("base", NAMES)
def test_it_finds_the_file_for_the_model_whatever_it_is_called(official, base):
    model = bases.model(base)
    changed, _, preset, lora, *_, report = load(model)
    name = f"{NAMES.index(base)}.safetensors"
    by_name = LCMLoader.execute(model, name, 1.0, "refuse").result
    assert changed.patches.keys() == by_name[0].patches.keys()
    assert (lora.name, preset.name) == (name, "LCM")
    assert f"auto: {name} is the one for this model among 3 files, very likely: by structure" in report


@pytest.mark.parametrize("base", NAMES)
def test_where_it_is_not_there_the_file_to_get_is_named_with_link_and_size(loras, base):
    for number, other in enumerate(name for name in NAMES if name != base):
        full_size.write(loras / f"{number}.safetensors", full_size.lora(other, rank=2))
    published = instead(base, "LCM")
    with pytest.raises(ValueError, match=r"^LCM-LoRA Loader: auto finds no acceleration LoRA for this model") as error:
        load(bases.model(base))
    text = str(error.value)
    assert f"({base})" in text
    assert f"Get LCM-LoRA {base}: {published.link}, the file {published.file}" in text
    assert (f"{published.bytes / 1e6:.0f} MB" in text) if published.bytes else (" MB" not in text)


def test_on_a_model_of_no_known_base_it_is_the_one_that_fits_and_is_said_to_be_one(loras):
    model = tiny.small_model()
    put(loras, "a_style_on_all_layers.safetensors", tiny.lora(model, seed=1))
    with pytest.raises(
        ValueError, match=r"Of what fits \(a_style_on_all_layers\.safetensors\) nothing says that it is one"
    ):
        load(model)
    put(loras, "another_model.safetensors", tiny.lora(tiny.tiny_model(), seed=1), **{"lcm_kit.preset": "LCM"})
    with pytest.raises(ValueError, match="LCM Kit knows of none for such models: choose a file by name"):
        load(model)
    put(loras, "x.safetensors", tiny.lora(model, seed=2), **{"lcm_kit.preset": "TCD"})
    assert load(model)[3].name == "x.safetensors"
    put(loras, "y.safetensors", tiny.lora(model, seed=3), **{"lcm_kit.preset": "LCM"})
    _, _, preset, lora, *_, report = load(model)
    assert (lora.name, preset.name) == ("y.safetensors", "LCM")
    assert "Others that fit, to be chosen by name: x.safetensors (TCD LoRA)." in report


def test_a_merge_with_a_style_and_a_broken_file_are_none_of_them(loras):
    model = tiny.small_model()
    lcm = Lora.from_state_dict(tiny.lora(model), metadata={"lcm_kit.preset": "LCM"}, source="lcm.safetensors")
    style = Lora.from_state_dict(tiny.lora(model, endings=tiny.STYLE, seed=1), source="style.safetensors")
    save(merge([(style, 0.8), (lcm, 1.0)]), loras / "merged.safetensors")
    (loras / "broken.safetensors").write_bytes(b"no LoRA")
    with pytest.raises(ValueError, match="auto finds no acceleration LoRA"):
        load(model)
    save(lcm, loras / "z.safetensors")
    folder_paths.filename_list_cache.pop("loras", None)
    assert load(model)[3].name == "z.safetensors"


def test_files_are_looked_at_once_while_they_stay_as_they_are(loras, monkeypatch):
    model, looked = tiny.small_model(), []
    true = auto.outline
    monkeypatch.setattr(auto, "outline", lambda path: looked.append(os.path.basename(path)) or true(path))
    for name in ("a", "b"):
        put(loras, f"{name}.safetensors", tiny.lora(model), **{"lcm_kit.preset": "LCM"})
    before = LCMLoader.fingerprint_inputs("auto")
    for _ in range(2):
        load(model)
    assert looked == ["a.safetensors", "b.safetensors"]
    put(loras, "b.safetensors", tiny.lora(model, rank=3, seed=1), **{"lcm_kit.preset": "LCM"})
    assert LCMLoader.fingerprint_inputs("auto") != before
    load(model)
    assert looked[2:] == ["b.safetensors"]


def test_too_many_new_files_are_left_for_the_next_run(loras, monkeypatch):
    model = tiny.small_model()
    put(loras, "a.safetensors", tiny.lora(model), **{"lcm_kit.preset": "LCM"})
    monkeypatch.setattr(auto, "SECONDS", -1.0)
    with pytest.raises(ValueError, match="1 file is not looked at yet, for there are many: run again to go on"):
        load(model)


@pytest.mark.parametrize("base", NAMES)
def test_an_outline_says_what_the_whole_file_is_without_its_values(official, base):
    path = official / f"{NAMES.index(base)}.safetensors"
    hollow = outline(path)
    whole = files.read_file(str(path))
    assert identify(hollow, path) == whole.identity
    assert {t.is_meta for key, t in hollow.to_state_dict(copy=False).items() if not key.endswith("alpha")} == {True}
    with pytest.raises((NotImplementedError, RuntimeError)):
        torch.stack([layer.up.sum() for layer in list(hollow.modules.values())[:2]]).item()


def test_where_a_base_has_no_lcm_lora_a_file_of_another_method_is_named():
    assert auto._to_get("SDXL").preset == "LCM"
    assert auto._to_get("Qwen-Image").base == "Qwen-Image"
    assert auto._to_get("of nobody") is auto._to_get(None) is None
