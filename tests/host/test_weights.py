"""A LORA_MODEL as text: ComfyUI writes out every input of a node that failed, for its history and for all open pages."""

import time

import torch

from lcm_kit.host.lora.weights import LoraWeights
from lcm_kit.host.page import WORD_JOINER, plain


def test_it_says_what_it_is_and_not_what_is_in_it():
    weights = LoraWeights({f"m{n}.lora_up.weight": torch.ones(64, 8) for n in range(2000)}, name="style.safetensors")
    started = time.process_time()
    assert str(weights) == repr(weights) == "LORA_MODEL 'style.safetensors' of 2000 tensors"
    assert time.process_time() - started < 0.01  # a dict's takes seconds and a million characters


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
