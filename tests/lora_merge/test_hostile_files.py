"""Files from anybody: each is refused in words, in bounded time and memory, and nothing in it is run."""

import hashlib
import json
import os
import pickle
import struct
import sys
import threading
import time
import tracemalloc
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from lcm_kit.lora_merge import Lora, load
from lcm_kit.lora_merge.__main__ import main
from lcm_kit.lora_merge.disk import digests, header
from lcm_kit.lora_merge.disk.digests import sha256_of
from lcm_kit.lora_merge.disk.header import MAX_HEADER
from lcm_kit.lora_merge.disk.json_text import MAX_CHARACTERS
from lcm_kit.tests.lora_merge.make import factors, kohya

MODULE = "lora_unet_mid_block_attentions_0_proj_in"
UP, DOWN = f"{MODULE}.lora_up.weight", f"{MODULE}.lora_down.weight"


@pytest.fixture
def write(tmp_path):
    """Header (a dict, or bytes as they are), data -> path. length: what the file says about its header."""

    def put(content, data=b"", *, length=None):
        text = content if isinstance(content, bytes) else json.dumps(content).encode()
        path = tmp_path / "style.safetensors"
        path.write_bytes(struct.pack("<Q", len(text) if length is None else length) + text + data)
        return path

    return put


def entry(dtype="F32", shape=(2, 3), begin=0, end=24):
    return {"dtype": dtype, "shape": list(shape), "data_offsets": [begin, end]}


def refused(path, message):
    with pytest.raises(ValueError, match=f"style.safetensors: {message}"):
        load(path)


@pytest.mark.parametrize(
    ("content", "size", "message"),
    [
        ({UP: entry(), DOWN: entry()}, 24, f"is damaged: {DOWN} and {UP} share bytes 0 to 24"),
        ({UP: entry(), DOWN: entry(begin=20, end=44)}, 44, f"is damaged: {UP} and {DOWN} share bytes 20 to 24"),
        ({UP: entry(), DOWN: entry(begin=30, end=54)}, 54, f"is damaged: bytes 24 to 30, before {DOWN}, belong to no"),
        ({UP: entry(begin=24, end=0)}, 24, "is damaged: .* is F32 of shape .* 24 bytes, but has -24"),
        ({UP: entry()}, 20, "is cut off: "),
        ({UP: entry()}, 30, "is damaged: 6 bytes at its end belong to no tensor"),
        ({UP: entry("F16")}, 24, r"is damaged: .* is F16 of shape \(2, 3\), 12 bytes, but has 24"),
        ({UP: entry("F17")}, 24, "has .* in dtype F17"),
        ({UP: entry("F4", (8, 6))}, 24, "has .* in dtype F4"),
        ({UP: entry(["F32"])}, 24, "has .* in dtype"),
        ({UP: entry(shape=(2, 0), end=0)}, 0, "incomplete or contradictory: .* but no down"),
        ({UP: entry(shape=(-2, -3))}, 24, r"is damaged: .* has shape \[-2, -3\]"),
        ({UP: entry(shape=(2.5, 3))}, 24, r"is damaged: .* has shape \[2.5, 3\]"),
        ({UP: entry(shape=(1 << 62, 1 << 62))}, 24, "is damaged: .* bytes, but has 24"),
        ({UP: entry(shape=(1 << 70,))}, 24, "is damaged: .* has shape"),
        ({UP: entry(shape=(1,) * 5000)}, 24, "is damaged: .* has shape"),
        ({UP: {"dtype": "F32", "shape": [2, 3]}}, 24, "is not a safetensors file: .* no dtype, shape and data_offsets"),
        ({UP: 5}, 24, "is not a safetensors file"),
        ({UP: entry() | {"data_offsets": [0, 8, 24]}}, 24, "is damaged: .* data_offsets"),
        ({"x" * 501: entry()}, 24, "has a tensor named 'xxx.*501 characters"),
        ({"": entry()}, 24, "has a tensor named ''"),
        ({"\x1b[31mred": entry()}, 24, r"has a tensor named '\\x1b\[31mred'"),
        ({UP: entry(), "__metadata__": {"a": {"b": 1}}}, 24, "is damaged"),
        (b'{"a": {"dtype"', 0, "is not a safetensors file"),
        (b'{"a":' * 50_000, 0, "is not a safetensors file"),
        (b'{"a": "\xff\xfe"}', 0, "is not a safetensors file"),
        (b'{"a": ' + b"9" * 10_000 + b"}", 0, "is not a safetensors file"),
    ],
)
def test_a_header_that_does_not_hold_is_refused(write, content, size, message):
    refused(write(content, bytes(size)), message)


def test_a_name_that_stands_there_twice_is_refused(write):
    """JSON readers keep the last one, so two programs could see two files."""
    one = json.dumps(entry()).encode()
    refused(write(b'{"a":' + one + b',"a":' + one + b"}", bytes(24)), "has 'a' twice in its header")
    twice = b'{"a":{"dtype":"F16","dtype":"F32","shape":[2,3],"data_offsets":[0,24]}}'
    refused(write(twice, bytes(24)), "has 'dtype' twice")


@pytest.mark.parametrize("length", [1 << 40, 1 << 63, (1 << 64) - 1, MAX_HEADER + 1, 1000])
def test_an_absurd_header_length_allocates_nothing(write, length):
    path = write({UP: entry()}, bytes(24), length=length)
    tracemalloc.start()
    refused(path, r"(claims a header of \d+ bytes|is cut off within its first \d+ bytes)")
    assert tracemalloc.get_traced_memory()[1] < 1_000_000
    tracemalloc.stop()


@pytest.mark.parametrize("cut", [0, 3, 8, 9, 60, 200, -1])
def test_a_truncated_file_is_refused(tmp_path, cut):
    path = tmp_path / "style.safetensors"
    save_file(kohya(MODULE, *factors(6, 2, 5), alpha=1), path)
    path.write_bytes(path.read_bytes()[:cut])
    refused(path, "is (empty|not a safetensors file|cut off)")


def many(count, end="s"):
    text = b",".join(
        f'"m{n}.diff":{{"dtype":"F16","shape":[1],"data_offset{end}":[{2 * n},{2 * n + 2}]}}'.encode()
        for n in range(count)
    )
    return b"{" + text + b"}"


@pytest.mark.parametrize("length_of_name", [1, 30])
def test_a_million_tensors_are_refused_before_they_cost_anything(write, length_of_name):
    one = b'"%s":{"dtype":"F16","shape":[1],"data_offsets":[0,2]}' % (b"m" * length_of_name)
    path = write(b"{" + b",".join([one] * 1_000_000) + b"}", bytes(2))
    tracemalloc.start()
    start = time.process_time()
    refused(path, r"(claims a header of \d+ bytes|has 1000000 tensors or more, and no LoRA has more than 100000)")
    assert time.process_time() - start < 2.0  # 0.1 s; safetensors takes 4 s and load, unbounded, minutes
    assert tracemalloc.get_traced_memory()[1] < 1.1 * MAX_HEADER
    tracemalloc.stop()


def test_many_tensors_in_disguise_are_refused_half_way(write, monkeypatch):
    """The same header for a JSON reader, with no "data_offsets" in its bytes to count."""
    monkeypatch.setattr(header, "MAX_TENSORS", 1000)
    refused(write(many(9000, end="\\u0073"), bytes(18_000)), "has 1003 tensors or more")


def test_the_limit_is_the_limit(write, monkeypatch):
    monkeypatch.setattr(header, "MAX_TENSORS", 1000)
    refused(write(many(1001), bytes(2002)), "has 1001 tensors")
    assert len(load(write(many(1000), bytes(2000))).diffs) == 1000


class Bomb:
    def __reduce__(self):
        return (exec, ("import sys; sys.lcm_kit_bomb = True",))


@pytest.mark.parametrize("protocol", [0, 2, 4])
def test_a_pickle_under_another_name_is_not_run(tmp_path, protocol):
    path = tmp_path / "style.safetensors"
    path.write_bytes(pickle.dumps(Bomb(), protocol))
    refused(path, "is (a pickle|not a safetensors file)")
    torch.save({"x": torch.ones(2)}, path)
    refused(path, "is a pickle")
    assert not hasattr(sys, "lcm_kit_bomb")


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize(
    "key", [UP, f"{MODULE}.alpha", f"{MODULE}.diff_b", "lora_unet_x.hada_w1_b", "lora_unet_y.oft_blocks"]
)
def test_values_that_are_no_numbers_are_named(tmp_path, key, value):
    state = kohya(MODULE, *factors(6, 2, 5), alpha=1) | {f"{MODULE}.diff_b": torch.ones(6)}
    state |= {f"lora_unet_x.hada_w{n}_{ab}": torch.ones(3, 3) for n in (1, 2) for ab in "ab"}
    state |= {"lora_unet_y.oft_blocks": torch.ones(2, 3, 3)}
    state[key] = state[key].clone()
    state[key].view(-1)[-1] = value
    save_file(state, tmp_path / "style.safetensors")
    refused(tmp_path / "style.safetensors", f"NaN or infinite values in {key}")


@pytest.mark.parametrize("dtype", [torch.int8, torch.uint8, torch.bool, torch.int64])
def test_weights_that_are_no_floats_are_named(tmp_path, dtype):
    state = kohya(MODULE, *factors(6, 2, 5)) | {UP: torch.ones(6, 2, dtype=dtype)}
    save_file(state, tmp_path / "style.safetensors")
    refused(tmp_path / "style.safetensors", f"1 weight is not floating point, {UP}")


@pytest.mark.parametrize("dtype", [torch.uint16, torch.int64, torch.bool, torch.float64])
def test_an_alpha_may_be_any_number(tmp_path, dtype):
    save_file(
        kohya(MODULE, *factors(6, 2, 5)) | {f"{MODULE}.alpha": torch.ones((), dtype=dtype)}, tmp_path / "x.safetensors"
    )
    assert next(iter(load(tmp_path / "x.safetensors").modules.values())).alpha == 1


def test_block_numbers_that_nobody_can_count_to_are_only_names():
    """A loop over the levels that a name claims would not end."""
    state = {}
    for number in (10**9, 10**30):
        for name in (f"down_blocks_{number}_attentions_0_proj_in", f"input_blocks_{number}_1_proj_in"):
            state |= kohya(f"lora_unet_{name}", *factors(6, 2, 5))
    state |= kohya("lora_unet_up_blocks_1_attentions_0_proj_in", *factors(6, 2, 5))
    assert len(Lora.from_state_dict(state).modules) == 5


@pytest.mark.parametrize(
    "pattern",
    ["(a+)+(?=x)", r"(a)+\1", "a" * 300 + "*", "[", "(?P<x", "*"],
)
def test_patterns_that_take_for_ever_or_are_none_are_refused(pattern):
    module = "base_model.model." + "a" * 60 + ".to_q"
    up, down = factors(6, 2, 5)
    metadata = {"lora_alpha": "2", "alpha_pattern": json.dumps({pattern: 1})}
    start = time.process_time()
    with pytest.raises(ValueError, match=r"alpha_pattern in the metadata is .*(too involved|no regular expression)"):
        Lora.from_state_dict({f"{module}.lora_B.weight": up, f"{module}.lora_A.weight": down}, metadata=metadata)
    assert time.process_time() - start < 1


@pytest.mark.parametrize(
    "pattern", ["to_q", "attn1.to_q", r"attn\d\.to_q", "attn[12].to_(q|k)", "(a|b|attn1).to_q", ".*to_q"]
)
def test_ordinary_patterns_still_count(pattern):
    name = "base_model.model.mid_block.attn1.to_q"
    up, down = factors(6, 2, 5)
    metadata = {"lora_alpha": "2", "alpha_pattern": json.dumps({pattern: 1})}
    lora = Lora.from_state_dict({f"{name}.lora_B.weight": up, f"{name}.lora_A.weight": down}, metadata=metadata)
    assert next(iter(lora.modules.values())).alpha == 1


@pytest.mark.parametrize(
    ("metadata", "message"),
    [
        ({"lora_adapter_metadata": "[" * 100_000}, "is not JSON"),
        ({"lora_adapter_metadata": "[1]"}, "is list, but it has to be a JSON object"),
        ({"lora_adapter_metadata": json.dumps({"unet.lora_alpha": 1, "unet.alpha_pattern": [1]})}, "alpha_pattern"),
        ({"lora_adapter_metadata": json.dumps({"unet.lora_alpha": "1e999"})}, "alpha is inf"),
        ({"lora_adapter_metadata": json.dumps({"unet.lora_alpha": [1]})}, "it has to be a number"),
        ({"lora_adapter_metadata": '{"unet.lora_alpha": ' + "9" * 400 + "}"}, "a number of 400 digits"),
    ],
)
def test_metadata_that_makes_no_sense_is_an_error_in_words(metadata, message):
    up, down = factors(6, 2, 5)
    state = {"unet.conv_in.lora_B.weight": up, "unet.conv_in.lora_A.weight": down}
    with pytest.raises(ValueError, match=message):
        Lora.from_state_dict(state, metadata=metadata)


def test_a_config_beside_the_file_that_is_no_object_is_named(tmp_path):
    up, down = factors(6, 2, 5)
    save_file(
        {"base_model.model.x.lora_B.weight": up, "base_model.model.x.lora_A.weight": down},
        tmp_path / "adapter_model.safetensors",
    )
    for text in ("[1]", "[" * 100_000, "5"):
        (tmp_path / "adapter_config.json").write_text(text)
        with pytest.raises(ValueError, match=r"adapter_config\.json: not JSON"):
            load(tmp_path / "adapter_model.safetensors")


@pytest.mark.parametrize("letters", [3_000_000, MAX_CHARACTERS + 1])
def test_a_long_header_of_metadata_is_fine(tmp_path, letters):
    """More than JSON within it may have: a header has several texts."""
    save_file(kohya(MODULE, *factors(6, 2, 5)), tmp_path / "x.safetensors", {"ss_tag_frequency": "x" * letters})
    assert len(load(tmp_path / "x.safetensors").modules) == 1


def fifo(path):
    os.mkfifo(path)


def sparse(path):
    """Terabytes that are on no disk, behind a header that does not hold."""
    with open(path, "wb") as file:
        file.write(struct.pack("<Q", 1000) + b"{")
        file.truncate(1 << 42)


NO_FILES = {
    "a pipe": fifo,
    "a folder": Path.mkdir,
    "a device that gives zeros": lambda path: path.symlink_to("/dev/zero"),
    "a device that gives nothing": lambda path: path.symlink_to("/dev/null"),
    "what the system makes up": lambda path: path.symlink_to("/proc/self/environ"),
    "what the system has not said yet": lambda path: path.symlink_to("/proc/kmsg"),
    "a link to itself": lambda path: path.symlink_to(path),
    "a link to nowhere": lambda path: path.symlink_to("nowhere"),
    "a link to a folder": lambda path: path.symlink_to("."),
    "terabytes": sparse,
}
COMMANDS = {
    "info": ["info", "{bad}"],
    "merge": ["merge", "{bad}", "{good}", "-o", "{out}"],
    "merge, second": ["merge", "{good}", "{bad}", "-o", "{out}"],
    "resize": ["resize", "{bad}", "-o", "{out}", "--rank", "1"],
    "convert": ["convert", "{bad}", "-o", "{out}", "--format", "comfy"],
    "compare": ["compare", "{good}", "{bad}"],
    "extract": ["extract", "{bad}", "{good}", "-o", "{out}"],
    "reproduce": ["reproduce", "{bad}"],
}


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="pipes and devices of POSIX")
@pytest.mark.parametrize("what", NO_FILES)
@pytest.mark.parametrize("command", COMMANDS)
def test_no_command_waits_at_what_is_no_file(tmp_path, capsys, what, command):
    good, bad, out = (tmp_path / f"{name}.safetensors" for name in ("good", "bad", "out"))
    save_file(kohya(MODULE, *factors(6, 2, 5), alpha=1), good)
    NO_FILES[what](bad)
    arguments = [one.format(good=good, bad=bad, out=out) for one in COMMANDS[command]]
    status = []
    # A thread that waits for ever ends with the process, and this test now.
    working = threading.Thread(target=lambda: status.append(main(arguments)), daemon=True)
    working.start()
    working.join(30)
    if what == "a pipe":
        os.close(os.open(bad, os.O_RDWR | os.O_NONBLOCK))  # lets go whoever waits there
    assert status == [2]
    assert "bad.safetensors" in capsys.readouterr().err
    assert not out.exists()


def test_a_hash_that_nobody_waits_for_any_more_is_given_up(tmp_path, monkeypatch):
    monkeypatch.setattr(digests, "_BLOCK", 1 << 20)
    path = tmp_path / "x"
    path.write_bytes(bytes(3 << 20))
    asked = []
    with pytest.raises(InterruptedError, match="x: nobody waits"):
        sha256_of(path, lambda: bool(asked) or asked.append(True))
    assert sha256_of(path) == hashlib.sha256(bytes(3 << 20)).hexdigest()


@pytest.mark.parametrize("letter", ["\x1b", "\0", "\r", "\x07", "\x9b", "\u202e", "\u2028"])
def test_nothing_in_a_file_reaches_the_terminal_unseen(write, capsys, letter):
    where = [
        {UP: entry(dtype=f"F{letter}[31m")},
        {UP: entry(), "__metadata__": {"ss_network_module": f"a{letter}b", "modelspec.title": f"a{letter}b"}},
        {f"a{letter}b": entry()},
        {UP: {**entry(), "shape": [f"a{letter}b"]}},
    ]
    for content in where:
        assert main(["info", str(write(content, bytes(24)))]) == 2
        said = capsys.readouterr()
        assert letter not in said.out + said.err
        assert "style.safetensors" in said.err
