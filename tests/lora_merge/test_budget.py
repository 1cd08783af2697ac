"""What a file's size leaves for factors, part by part: each by what it takes off the others being the same."""

import math
from types import SimpleNamespace

import pytest
import torch

from lcm_kit.lora_merge import Lora, MergeOptions
from lcm_kit.lora_merge.merging.budget import numbers_within

# Diffusers has a name for it, and so long a one that its header is the longer one.
KNOWN = "lora_unet_down_blocks_123_attentions_123_transformer_blocks_123_attn2_to_out_0"
UNKNOWN = "x" * len(KNOWN)


def room(modules=(), *, loras=(), passed=None, biases=None, notes=0, dtype=torch.float16, max_mb=1.0):
    passed, biases = passed or {}, biases or {}
    spellings = {name: name for name in (*modules, *passed, *(module for module, _ in biases))}
    options = MergeOptions(max_mb=max_mb, out_dtype=dtype)
    return numbers_within(options, loras, modules, passed, spellings, biases, notes)


# What the header says of a module with a name of one letter, in numbers of 2 bytes.
ONE = room() - room("m")
KOHYAS = room() - room([UNKNOWN])


def carried(parameters):
    return SimpleNamespace(parameters=parameters)


def whole(source="a", **sizes):
    diffs = {(module, "diff"): torch.zeros(size) for module, size in sizes.items()}
    return Lora({}, diffs | {("a", "diff_b"): torch.zeros(9)}, source=source)


def test_modules_notes_and_names_of_inputs_take_their_bytes():
    assert room("mno") == room() - 3 * ONE
    assert room("m", notes=100) == room("m") - 50
    one, other = Lora({}, source="a"), Lora({}, source="abcde")
    assert room(loras=[one]) - room(loras=[other]) == 8 * 4 // 2
    assert room() - room(loras=[one, other]) == 2 * (room() - room(loras=[one])) + 8 * 4 // 2
    assert room(max_mb=2.0) - room(max_mb=1.0) == 500_000


def test_what_is_not_cut_takes_all_of_its_numbers():
    def biases(*sizes):
        return {(letter, "diff_b"): torch.zeros(size) for letter, size in zip("bcd", sizes, strict=False)}

    assert room("m", biases=biases(10)) == room("m") - ONE - 10
    assert room("m", biases=biases(10, 6)) == room("m") - 2 * ONE - 16
    assert room("m", passed={"p": carried(12), "q": carried(8)}) == room("m") - 2 * ONE - 20
    plain = room("m", loras=[Lora({}, source="a")] * 2)
    # Of a weight that several inputs change there is one difference, and biases are counted where they are added up.
    assert room("m", loras=[whole(w=(3, 4)), whole(w=(3, 4))]) == plain - 12
    assert room("m", loras=[whole(w=(3, 4)), whole(v=(2, 5))]) == plain - 22
    assert (
        room("m", loras=[whole(w=(3, 4)), whole()], biases=biases(10), passed={"p": carried(8)}) == plain - 2 * ONE - 30
    )


def test_numbers_are_of_the_size_of_their_dtype_and_of_two_bytes_unless_told():
    assert room("m", dtype=None) == room("m") == room("m", dtype=torch.bfloat16)
    assert room("m", dtype=torch.float32) == room("m") // 2


@pytest.mark.parametrize(
    ("modules", "more", "diffusers"),
    [
        ([KNOWN], {}, True),
        ([KNOWN, "m"], {}, False),
        ([KNOWN], {"passed": {"p": carried(0)}}, False),
        ([KNOWN], {"biases": {("b", "diff_b"): torch.zeros(0)}}, False),
        ([KNOWN], {"loras": [whole(w=(0, 4))]}, False),
    ],
)
def test_the_longer_header_counts_where_the_file_may_be_diffusers(modules, more, diffusers):
    """Which has two tensors a module, and writes each name three times more, with its rank and its alpha."""
    loras = [Lora({}, source="a")] if "loras" in more else []
    others = len(modules) - 1 + len(more.get("passed", ())) + len(more.get("biases", ()))
    taken = room(loras=loras) - room(modules, **more) - others * ONE
    dotted = "unet.down_blocks.123.attentions.123.transformer_blocks.123.attn2.to_out.0"
    numbers = '":{"dtype":"BF16","shape":[99999,99999,9,9],"data_offsets":[9999999999,9999999999]},'
    tensors = 2 * len(f'"{dotted}.lora_A.weight{numbers}')
    config = len(rf"\"{dotted}\", \"{dotted}\": 99999, \"{dotted}\": 99999, ")
    assert taken == (math.ceil((tensors + config) / 2) if diffusers else KOHYAS)
    assert tensors + config > 2 * KOHYAS


def test_no_room_is_none():
    """At the very size of all else there is nothing for factors."""
    least = 1.0 - 2 * room("m") / 1e6
    assert room("m", max_mb=least + 2e-6 + 1e-9) == 1
    for size in (least, least - 0.0005):
        with pytest.raises(ValueError, match=f"max_mb is {size:g}, but what is not cut .* takes 0.00 MB"):
            room("m", max_mb=size)
