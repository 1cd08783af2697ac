"""Tensors mapped from a safetensors file and written to one: what safetensors itself reads and writes."""

import json

import torch
from safetensors.torch import load_file, save_file

from lcm_kit.lora_merge.files.tensor_file import mapped, write

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


def same(found, expected):
    assert set(found) == set(expected)
    for name, tensor in expected.items():
        assert found[name].dtype == tensor.dtype
        assert found[name].shape == tensor.shape
        assert torch.equal(found[name].reshape(-1).view(torch.uint8), tensor.contiguous().reshape(-1).view(torch.uint8))


def test_safetensors_reads_what_is_written(tmp_path):
    same(load_file(written(tmp_path / "x.safetensors")), TENSORS)


def test_what_safetensors_writes_is_mapped(tmp_path):
    save_file(TENSORS, tmp_path / "x.safetensors", NOTES)
    tensors, metadata = mapped(tmp_path / "x.safetensors")
    same(tensors, TENSORS)
    assert metadata == NOTES


def test_two_kinds_of_numbers_are_written_byte_for_byte_as_safetensors_does(tmp_path):
    """All that a LoRA has, as a rule; the order of others is free."""
    tensors = {key: TENSORS[key] for key in "ba"} | {"zz": torch.ones(3).half()}
    save_file(tensors, tmp_path / "theirs.safetensors", {"format": "pt"})
    ours = written(tmp_path / "ours.safetensors", tensors, {"format": "pt"})
    assert ours.read_bytes() == (tmp_path / "theirs.safetensors").read_bytes()


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
    same(mapped(tmp_path / "x.safetensors")[0], {"half": half, "single": single})


def test_writing_into_a_mapped_tensor_leaves_the_file_alone(tmp_path):
    path = written(tmp_path / "x.safetensors")
    before = path.read_bytes()
    tensors, _ = mapped(path)
    tensors["b"].fill_(7)
    assert path.read_bytes() == before
    assert torch.equal(tensors["b"], torch.full((2, 3), 7.0).half())
