"""Save LoRA: read back by ComfyUI's loader and by ours, its names, and what the file says."""

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

from lcm_kit.nodes.loading import LoadLoRA
from lcm_kit.nodes.merging import SaveLoRA
from lcm_kit.tests.with_comfyui import tiny
from lcm_kit.tests.with_comfyui.lora_nodes import applied, assert_same_weights, by_comfyui, loaded, merged, saved

pytestmark = pytest.mark.usefixtures("no_gradients")


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
    """--disable-mmap, on Windows; elsewhere none is, since who cuts off a mapped file ends the process that has it."""
    from lcm_kit.host.lora import files
    from lcm_kit.lora_merge.disk import tensor_file
    from lcm_kit.lora_merge.files import load_save

    put("style.safetensors", tiny.lora(model))
    mapped = []
    monkeypatch.setattr(
        tensor_file.mmap, "mmap", lambda *_, **__: mapped.append(1) or (_ for _ in ()).throw(OSError("a map"))
    )
    monkeypatch.setattr(tensor_file, "MAPPED_ABOVE", 100)
    monkeypatch.setattr(load_save, "_MAPS", False)
    assert loaded("style.safetensors")
    assert mapped == []
    monkeypatch.setattr(load_save, "_MAPS", True)
    files._cache.clear()
    with pytest.raises(OSError, match="a map"):
        loaded("style.safetensors")
    assert mapped == [1]
    monkeypatch.setattr(comfy.utils, "DISABLE_MMAP", True)
    assert loaded("style.safetensors")
    assert mapped == [1]


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
