"""A LORA_MODEL as text: ComfyUI writes out every input of a node that failed, for its history and for all open pages."""

import torch

from lcm_kit.host.lora.weights import LoraWeights
from lcm_kit.host.page import WORD_JOINER, plain


def test_it_says_what_it_is_and_not_what_is_in_it():
    class Tensor(torch.Tensor):
        def __repr__(self):
            raise AssertionError("a value is written out, of millions")

    ones = torch.ones(64, 8).as_subclass(Tensor)
    weights = LoraWeights({f"m{n}.lora_up.weight": ones for n in range(2000)}, name="style.safetensors")
    assert str(weights) == repr(weights) == "LORA_MODEL 'style.safetensors' of 2000 tensors"


def test_a_name_is_one_short_line_without_markup():
    text = str(LoraWeights({}, name="<img src=x onerror=alert(1)>\n\x1b[31m" + "n" * 10_000))
    assert len(text) < 300
    assert plain(text) == text
    assert "\n" not in text
    assert text.replace(WORD_JOINER, "").startswith("LORA_MODEL '<img src=x onerror=alert(1)>\\n\\x1b[31mnn")


def test_it_is_still_the_dict_that_it_was():
    tensors = {"a": torch.ones(1)}
    assert LoraWeights(tensors, name="x") == tensors
    assert dict(LoraWeights(tensors, name="x")) == tensors
