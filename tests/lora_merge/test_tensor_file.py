"""Tensors read from a safetensors file and written to one: what safetensors itself reads and writes."""

import json
import os
import subprocess
import sys
import time
from contextlib import nullcontext

import pytest
import torch
from safetensors.torch import load_file, save_file

from lcm_kit.lora_merge.disk import header as limits
from lcm_kit.lora_merge.disk import tensor_file as module
from lcm_kit.lora_merge.disk.header import MAX_DIMENSIONS, MAX_NAME, MAX_TENSORS
from lcm_kit.lora_merge.disk.json_text import MAX_CONTAINERS
from lcm_kit.lora_merge.disk.tensor_file import read, tensor_file, write
from lcm_kit.lora_merge.files import load_save
from lcm_kit.lora_merge.updates.unmade import Unmade
from lcm_kit.tests.helpers import ROOT

TENSORS = {
    "b": torch.arange(6.0).reshape(2, 3).half(),
    "a": torch.tensor(2.5),
    "é": torch.tensor([[1, -2]], dtype=torch.int64),
    "c": torch.arange(5.0).to(torch.bfloat16),
    "d": torch.tensor([1.0, 2.0, 0.5]).to(torch.float8_e4m3fn),
    "e": torch.tensor([True, False]),
}
NOTES = {"format": "pt", "title": 'a "quoted" name'}


def written(path, tensors=TENSORS, metadata=NOTES):
    with open(path, "wb") as file:
        write(file, tensors, metadata)
    return path


def headed(path, header, data=b""):
    text = json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + data)
    return path


def test_a_header_has_at_most_so_many_tensors_and_objects(tmp_path, monkeypatch):
    """An object for each tensor, one for the metadata, and the header itself."""
    monkeypatch.setattr(limits, "MAX_TENSORS", 3)
    entries = {
        name: {"dtype": "F32", "shape": [1], "data_offsets": [4 * n, 4 * n + 4]} for n, name in enumerate("abcd")
    }
    few = {name: entries[name] for name in "abc"} | {"__metadata__": {"a": "b"}}
    assert [*read(headed(tmp_path / "x", few, bytes(12)))[0]] == ["a", "b", "c"]
    with pytest.raises(ValueError, match="has 4 tensors or more, and no LoRA has more than 3"):
        read(headed(tmp_path / "x", entries, bytes(16)))
    # Without offsets nothing tells until they are read.
    with pytest.raises(ValueError, match="has no dtype, shape and data_offsets in the header"):
        read(headed(tmp_path / "x", {key: {} for key in "abcd"}))
    with pytest.raises(ValueError, match="has 6 tensors or more, and no LoRA has more than 3"):
        read(headed(tmp_path / "x", {key: {} for key in "abcde"}))


def same(found, expected):
    assert set(found) == set(expected)
    for name, tensor in expected.items():
        assert found[name].dtype == tensor.dtype
        assert found[name].shape == tensor.shape
        assert torch.equal(found[name].reshape(-1).view(torch.uint8), tensor.contiguous().reshape(-1).view(torch.uint8))


def test_safetensors_reads_what_is_written(tmp_path):
    same(load_file(written(tmp_path / "x.safetensors")), TENSORS)


@pytest.mark.parametrize("tensors", [{}, {"a": torch.ones(2)}, {"é": torch.ones(2), "b": torch.ones(1)}])
@pytest.mark.parametrize("metadata", [{}, {"a": ""}, {"é": "日本語 \U0001f600"}])
def test_a_header_is_that_of_safetensors_to_the_byte(tmp_path, tensors, metadata):
    """With and without tensors and metadata; in UTF-8, in which other letters are not escaped."""
    save_file(tensors, tmp_path / "theirs", metadata or None)
    assert written(tmp_path / "ours", tensors, metadata).read_bytes() == (tmp_path / "theirs").read_bytes()


def test_what_safetensors_writes_is_read(tmp_path):
    save_file(TENSORS, tmp_path / "x.safetensors", NOTES)
    tensors, metadata = read(tmp_path / "x.safetensors")
    same(tensors, TENSORS)
    assert metadata == NOTES


def test_two_kinds_of_numbers_are_written_byte_for_byte_as_safetensors_does(tmp_path):
    """All that a LoRA has, as a rule; the order of others is free."""
    tensors = {key: TENSORS[key] for key in "ba"} | {"zz": torch.ones(3).half()}
    save_file(tensors, tmp_path / "theirs.safetensors", {"format": "pt"})
    ours = written(tmp_path / "ours.safetensors", tensors, {"format": "pt"})
    assert ours.read_bytes() == (tmp_path / "theirs.safetensors").read_bytes()


@pytest.mark.parametrize("hashed", [False, True])
@pytest.mark.parametrize("before", [b"", b"seven b"])
def test_writing_ends_at_the_end_of_the_file_and_begins_where_the_file_stands(tmp_path, hashed, before):
    """Also where the hashes are put in afterwards: what is written next comes behind."""
    path = tmp_path / "x"
    with open(path, "w+b") as file:
        file.write(before)
        write(file, TENSORS, NOTES, hashed=hashed)
        end = file.tell()
        file.write(b"more")
    data = path.read_bytes()
    assert (data[: len(before)], data[end:]) == (before, b"more")
    (tmp_path / "y.safetensors").write_bytes(data[len(before) : end])
    same(load_file(tmp_path / "y.safetensors"), TENSORS)
    found = read(tmp_path / "y.safetensors")[1]
    assert found.items() >= NOTES.items()
    assert len(found) == len(NOTES) + (3 if hashed else 0)


def test_tensors_with_gaps_and_tensors_in_one_memory_are_written_whole(tmp_path):
    whole = torch.arange(12.0).reshape(3, 4)
    tensors = {"columns": whole[:, 1:3], "turned": whole.T, "again": whole, "none": whole[:0]}
    same(load_file(written(tmp_path / "x.safetensors", tensors)), tensors)


def test_a_tensor_that_begins_at_an_odd_byte_is_read(tmp_path):
    """Allowed by the format, and what some writers make where float32 stands behind float16."""
    half, single = torch.arange(3.0).half(), torch.arange(2.0)
    entries = {
        "half": {"dtype": "F16", "shape": [3], "data_offsets": [0, 6]},
        "single": {"dtype": "F32", "shape": [2], "data_offsets": [6, 14]},
    }
    header = json.dumps(entries).encode()
    header += b" " * (1 - len(header) % 2)  # so that the data begin at an odd byte
    data = half.numpy().tobytes() + single.numpy().tobytes()
    (tmp_path / "x.safetensors").write_bytes(len(header).to_bytes(8, "little") + header + data)
    assert len(header) % 2 == 1
    same(read(tmp_path / "x.safetensors")[0], {"half": half, "single": single})


def test_writing_into_a_tensor_leaves_the_file_alone(tmp_path):
    path = written(tmp_path / "x.safetensors")
    before = path.read_bytes()
    tensors, _ = read(path)
    tensors["b"].fill_(7)
    assert path.read_bytes() == before
    assert torch.equal(tensors["b"], torch.full((2, 3), 7.0).half())


@pytest.mark.parametrize("above", [1 << 30, 0])
def test_a_large_file_is_mapped_unless_that_is_forbidden(tmp_path, monkeypatch, above):
    path, maps = written(tmp_path / "x.safetensors"), []
    monkeypatch.setattr(module, "MAPPED_ABOVE", above)
    monkeypatch.setattr(module.mmap, "mmap", lambda *a, mmap=module.mmap.mmap, **k: maps.append(a) or mmap(*a, **k))
    same(read(path, mapping=False)[0], TENSORS)
    assert maps == []
    same(read(path)[0], TENSORS)
    assert len(maps) == (0 if above else 1)


@pytest.mark.parametrize("mapped", [False, True])
@pytest.mark.parametrize("spaces", range(8))
def test_numbers_may_begin_at_any_byte(tmp_path, monkeypatch, spaces, mapped):
    """Of a file that is mapped, too, where memory begins with the header."""
    monkeypatch.setattr(module, "MAPPED_ABOVE", 0 if mapped else 1 << 30)
    tensors = {"a": torch.tensor([7], dtype=torch.uint8), "b": torch.tensor([1.5, -2.0]), "c": torch.arange(3.0).half()}
    entries = {
        "a": {"dtype": "U8", "shape": [1], "data_offsets": [0, 1]},
        "b": {"dtype": "F32", "shape": [2], "data_offsets": [1, 9]},
        "c": {"dtype": "F16", "shape": [3], "data_offsets": [9, 15]},
    }
    header = json.dumps(entries).encode() + b" " * spaces
    data = b"".join(tensor.numpy().tobytes() for tensor in tensors.values())
    (tmp_path / "x.safetensors").write_bytes(len(header).to_bytes(8, "little") + header + data)
    same(read(tmp_path / "x.safetensors")[0], tensors)
    with tensor_file(tmp_path / "x.safetensors") as file:
        same({name: file.tensor(name) for name in file.header.entries}, tensors)
        same(file.tensors(lambda name: name != "b"), {name: tensors[name] for name in "ac"})
        same(file.tensors(lambda name: name != "a"), {name: tensors[name] for name in "bc"})


@pytest.mark.parametrize("in_place", [True, False])
def test_a_disk_that_hands_over_a_few_bytes_at_a_time_is_read_to_the_end(tmp_path, monkeypatch, in_place):
    """As network drives do."""
    monkeypatch.setattr(module, "IN_PLACE", in_place and module.IN_PLACE)
    real = module._read_at
    monkeypatch.setattr(module, "_read_at", lambda file, place, begin: real(file, place[:5], begin))
    path = written(tmp_path / "x.safetensors")
    same(read(path)[0], TENSORS)
    with tensor_file(path) as file:
        same({name: file.tensor(name) for name in reversed(file.header.entries)}, TENSORS)


def test_tensors_are_read_one_at_a_time(tmp_path):
    with tensor_file(written(tmp_path / "x.safetensors")) as file:
        same({name: file.tensor(name) for name in reversed(file.header.entries)}, TENSORS)


CHANGES = {
    "cut off": lambda path: os.truncate(path, 100),
    "longer": lambda path: path.write_bytes(path.read_bytes() + b"more"),
    "rewritten": lambda path: (path.write_bytes(path.read_bytes()[::-1]), os.utime(path, (5, 5))),
    "emptied": lambda path: path.write_bytes(b""),
}


@pytest.mark.parametrize("change", CHANGES)
def test_a_file_that_is_changed_while_it_is_read_is_an_error_in_words(tmp_path, monkeypatch, change):
    path = written(tmp_path / "x.safetensors")
    with tensor_file(path) as file:
        CHANGES[change](path)
        with pytest.raises(ValueError, match=r"x\.safetensors: was changed by another program while it was read"):
            file.tensor("c")
    path = written(tmp_path / "y.safetensors")
    bytes_at = module._bytes_at
    monkeypatch.setattr(module, "_bytes_at", lambda *a: (CHANGES[change](path) and None) or bytes_at(*a))
    with pytest.raises(ValueError, match=r"y\.safetensors: was changed by another program while it was read"):
        read(path)


def test_a_file_that_is_replaced_by_another_is_read_to_its_end(tmp_path):
    """As an editor or `save` does it: the old one lives on for whoever has it open."""
    path = written(tmp_path / "x.safetensors")
    with tensor_file(path) as file:
        os.replace(written(tmp_path / "new.safetensors", {"c": torch.ones(1)}), path)
        same({name: file.tensor(name) for name in file.header.entries}, TENSORS)


TRUNCATED = """
import os, sys
from lora_merge import load, merge, save
from safetensors.torch import save_file
import torch
path, out = sys.argv[1:]
shapes = {"up": (256, 64), "down": (64, 256)}
tensors = {f"lora_unet_mid_block_{n}.lora_{p}.weight": torch.ones(shapes[p]) for n in range(4) for p in shapes}
for change in (lambda: os.truncate(path, 1000), lambda: open(path, "wb").close(), lambda: os.unlink(path)):
    save_file(tensors, path)
    lora = load(path)
    expected = merge([(lora, 0.5)]).to_state_dict()
    change()
    merged = merge([(lora, 0.5)])
    assert all(tensor.equal(expected[key]) for key, tensor in merged.to_state_dict().items())
    save(merged, out, overwrite=True)
    print("right")
"""


def test_a_file_that_is_cut_off_after_it_was_loaded_ends_no_process(tmp_path):
    """In a process of its own: a page that is not there any more is a SIGBUS, which nothing catches."""
    command = [sys.executable, "-c", TRUNCATED, tmp_path / "x.safetensors", tmp_path / "out.safetensors"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (0, "right\n" * 3), done.stderr


@pytest.mark.parametrize("metadata", [{}, {"é": "x"}])
def test_a_header_may_be_as_long_as_is_said_where_it_is_read_and_where_it_is_written(tmp_path, monkeypatch, metadata):
    path = tmp_path / "x.safetensors"
    with open(path, "wb") as file:
        write(file, TENSORS, metadata, hashed=True)
    length = int.from_bytes(path.read_bytes()[:8], "little")
    monkeypatch.setattr(limits, "MAX_HEADER", length)
    same(read(path)[0], TENSORS)
    with open(tmp_path / "y.safetensors", "wb") as file:
        write(file, TENSORS, metadata, hashed=True)
    assert (tmp_path / "y.safetensors").read_bytes() == path.read_bytes()
    monkeypatch.setattr(limits, "MAX_HEADER", length - 1)
    with pytest.raises(ValueError, match=f"claims a header of {length} bytes"):
        read(path)
    with (
        open(tmp_path / "z.safetensors", "wb") as file,
        pytest.raises(ValueError, match=r"bytes of header, and the most are"),
    ):
        write(file, TENSORS, metadata, hashed=True)


def test_a_tensor_may_have_as_long_a_name_and_as_many_dimensions_as_is_said(tmp_path):
    tensors = {"a" * MAX_NAME: torch.ones((1,) * MAX_DIMENSIONS), "b": torch.ones((1,) * (MAX_DIMENSIONS - 1))}
    same(read(written(tmp_path / "x.safetensors", tensors))[0], tensors)
    for wrong, said in (
        ({"a" * (MAX_NAME + 1): torch.ones(1)}, rf"{MAX_NAME + 1} characters; names have 1 to {MAX_NAME}"),
        ({"a": torch.ones((1,) * (MAX_DIMENSIONS + 1))}, "a has shape"),
    ):
        with pytest.raises(ValueError, match=said):
            read(written(tmp_path / "x.safetensors", wrong))


class Slow:
    """A file on a disk that takes its time."""

    def __init__(self, file):
        self.file = file

    def write(self, data):
        time.sleep(0.003)
        return self.file.write(data)

    def __getattr__(self, name):
        return getattr(self.file, name)


def test_what_is_made_ahead_of_a_slow_disk_stands_in_the_file_as_it_was_made(tmp_path, monkeypatch):
    """In memory that is used again: not before it is written."""
    monkeypatch.setattr(module, "_BATCH", 1)
    tensors = {f"{n:02}": torch.full((3,), float(n)) for n in range(24)}
    later = {
        name: Unmade(dtype=one.dtype, shape=one.shape, write=lambda place, one=one: place.copy_(one), device=one.device)
        for name, one in tensors.items()
    }
    with open(tmp_path / "x.safetensors", "wb") as file:
        write(Slow(file), later, {}, hashed=True, ahead=load_save._ahead)
    same(read(tmp_path / "x.safetensors")[0], tensors)


UNREADABLE = {
    "an ordinary one": ({"a": torch.ones(2)}, {"title": "ä [{"}),
    "without metadata": ({"a": torch.ones(2)}, {}),
    "a long name": ({"a" * (MAX_NAME + 1): torch.ones(2)}, {}),
    "an empty name": ({"": torch.ones(2)}, {}),
    "a name with a line break": ({"a\nb": torch.ones(2)}, {}),
    "a name with a quote": ({'a"b': torch.ones(2)}, {}),
    "many dimensions": ({"a": torch.ones((1,) * (MAX_DIMENSIONS + 1))}, {}),
    "too many brackets": ({"a": torch.ones(2)}, {"title": "[" * (MAX_CONTAINERS + 1)}),
    "what looks like offsets": ({"a": torch.ones(2)}, {"title": '"data_offsets"' * (MAX_TENSORS + 1)}),
}


@pytest.mark.parametrize("what", UNREADABLE)
def test_what_is_refused_before_it_is_written_is_what_nobody_could_read(tmp_path, what):
    tensors, metadata = UNREADABLE[what]
    path, hashed = tmp_path / "unchecked.safetensors", tmp_path / "hashed.safetensors"
    with path.open("wb") as file:
        write(file, tensors, metadata)
    try:
        read(path)
        readable = True
    except ValueError:
        readable = False
    with hashed.open("wb") as file, nullcontext() if readable else pytest.raises(ValueError, match="nobody could read"):
        write(file, tensors, metadata, hashed=True)
    assert (hashed.stat().st_size > 0) is readable
