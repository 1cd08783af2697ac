"""Whose memory the tensors of a LoRA are, and a file's outline, which has none of them, beside the file itself."""

import pytest
import torch

from lcm_kit.lora_merge import Lora, load, save
from lcm_kit.lora_merge.files.load_save import outline
from lcm_kit.tests.lora_merge import kinds
from lcm_kit.tests.lora_merge.make import factors, kohya

PLAIN = kohya("lora_unet_middle_block_1_proj_in", *factors(8, 3, 12), alpha=3.0)
CONVOLUTION = kohya("lora_unet_input_blocks_1_0_in_layers_2", *factors(8, 3, 12, (3, 3)), alpha=2.0)


def every_kind():
    state = dict(PLAIN) | CONVOLUTION
    for number, kind in enumerate((*kinds.ADDITIVE, *kinds.CARRIED)):
        kernel = (3, 3) if kinds.ADDITIVE.get(kind, ("", False))[1] else ()
        state |= kinds.state_dict(kind, f"lora_unet_thing_{number}", kernel=kernel, alpha=2.0)
    return state | {
        "lora_unet_a.diff": torch.ones(3, 4), "lora_unet_a.diff_b": torch.ones(3), "lora_unet_b.w_norm": torch.ones(9),
        "lora_unet_b.b_norm": torch.ones(9), "a.stray.key": torch.ones(12),
    }  # fmt: skip


def copies(tensors):
    return {key: tensor.clone() for key, tensor in tensors.items()}


def same(first, second):
    return first.keys() == second.keys() and all(torch.equal(tensor, second[key]) for key, tensor in first.items())


def memory(tensors):
    return {tensor.data_ptr() for tensor in tensors.values() if tensor.numel() > 1}


@pytest.mark.parametrize("dtype", [None, torch.float32])
@pytest.mark.parametrize(("state", "format"), [(every_kind, "kohya"), (every_kind, "comfy"), (lambda: dict(PLAIN) | CONVOLUTION, "diffusers")],
                         ids=["kohya", "comfy", "diffusers"])  # fmt: skip
def test_who_gets_a_state_dict_may_write_into_it(state, format, dtype):
    given = state()
    one = Lora.from_state_dict(given)
    before, own = copies(given), copies(one.to_state_dict(format=format))
    taken = one.to_state_dict(dtype, format=format)
    assert memory(taken).isdisjoint(memory(given))
    assert len(memory(taken)) == sum(tensor.numel() > 1 for tensor in taken.values())
    for tensor in taken.values():
        tensor.fill_(7)
    assert same(given, before)
    assert same(one.to_state_dict(format=format), own)


@pytest.mark.parametrize("dtype", [None, torch.float32])
def test_without_copies_what_needs_no_conversion_is_the_loras_own(dtype):
    given = every_kind()
    one = Lora.from_state_dict(given)
    shared = one.to_state_dict(dtype, copy=False)
    assert same(shared, one.to_state_dict(dtype))
    assert memory(shared) == memory(given)
    # A conversion makes another tensor either way; a key that nobody reads stays as it came.
    kept = memory(one.to_state_dict(torch.float16, copy=False)) & memory(given)
    assert kept == {given["a.stray.key"].data_ptr()}


def test_a_delta_is_a_tensor_of_its_own():
    given = every_kind()
    one = Lora.from_state_dict(given)
    before = copies(given)
    for module in [*one.modules, "lora_unet_a", "lora_unet_b"]:
        delta = one.delta(module)
        assert delta.dtype == torch.float32
        delta.fill_(7)
    assert same(given, before)


def facts(lora):
    return {
        "spellings": dict(lora.spellings), "kinds": lora.kinds, "metadata": dict(lora.metadata), "source": lora.source,
        "shapes": list(lora.shapes()), "values": lora.parameters, "keys": lora.keys,
        "alphas": {name: (layer.alpha, layer.scale, layer.rank) for name, layer in lora.modules.items()},
        "carried": {name: (one.kind, one.alpha, one.shape, one.parts.keys()) for name, one in lora.carried.items()},
    }  # fmt: skip


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_an_outline_says_what_the_file_says_and_holds_small_tensors_alone(tmp_path, dtype):
    """Up to 8 values, as scales and shapes have: a bias of 3, and not one of 9."""
    save(Lora.from_state_dict(every_kind(), metadata={"modelspec.title": "x"}), tmp_path / "x.safetensors", dtype=dtype)
    whole, found = load(tmp_path / "x.safetensors"), outline(tmp_path / "x.safetensors")
    assert facts(found) == facts(whole)
    pairs = [(one, found.diffs[key]) for key, one in whole.diffs.items()]
    pairs += [
        (part, found.modules[name].parts()[key])
        for name, one in whole.modules.items()
        for key, part in one.parts().items()
    ]
    pairs += [
        (part, found.carried[name].parts[key]) for name, one in whole.carried.items() for key, part in one.parts.items()
    ]
    sizes = {True: set(), False: set()}
    for tensor, outlined in pairs:
        assert (outlined.shape, outlined.dtype) == (tensor.shape, tensor.dtype)
        sizes[outlined.device.type == "meta"].add(tensor.numel())
        assert outlined.device.type == "meta" or torch.equal(outlined, tensor)
    assert max(sizes[False]) <= 8 < min(sizes[True])
    assert 8 in sizes[False]
