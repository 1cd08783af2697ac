"""The LoRA nodes as functions, and ComfyUI's own loading beside them."""

import os

import comfy.sd
import comfy.utils
import folder_paths
import torch

from lcm_kit.nodes.loading import ApplyLoRA, LoadLoRA
from lcm_kit.nodes.merging import MergeLoRA, SaveLoRA
from lcm_kit.tests.with_comfyui import tiny

EXACT = {"rtol": 0, "atol": 2e-6}  # float32 sums of weights of size 1, in another order


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
