"""LORA_MODELs in their files as ComfyUI's patches: an exact merge as its inputs, factors read when a weight is patched."""

import copy
import os
import pickle
from itertools import chain

import comfy.lora
import comfy.model_management
import comfy.model_patcher
import comfy.sd
import pytest
import torch
from comfy.weight_adapter import LoRAAdapter
from safetensors.torch import load_file

from lcm_kit.host.lora.fit import fit
from lcm_kit.host.lora.terms import LoRAInFile
from lcm_kit.nodes.by_step import LoRAByStep
from lcm_kit.nodes.merging import MergeLoRA
from lcm_kit.tests.helpers import relative
from lcm_kit.tests.with_comfyui import dits, tiny
from lcm_kit.tests.with_comfyui.lora_nodes import applied, by_comfyui, loaded, merged, saved
from lcm_kit.tests.with_comfyui.test_methods_and_spellings import OWN
from lcm_kit.tests.with_comfyui.test_one_weight_twice import by_core
from lcm_kit.tests.with_comfyui.test_own_naming import spellings

pytestmark = [
    pytest.mark.usefixtures("no_gradients", "large"),
    pytest.mark.skipif(os.name != "posix", reason="Windows replaces no file that is open, so all is in memory"),
]
HALF, BRAIN, FULL = torch.float16, torch.bfloat16, torch.float32


@pytest.fixture
def tensors(model):
    """Of three LoRAs: a style's attention; a whole one; one without alpha in another spelling."""
    return (
        tiny.lora(model, endings=tiny.STYLE, rank=3, alpha=1.5, seed=1, dtype=HALF),
        tiny.lora(model, rank=5, seed=2, dtype=BRAIN),
        tiny.lora(model, "generic PEFT", alpha=None, seed=3),
    )


@pytest.fixture
def names(put, tensors):
    return [put(f"{n}.safetensors", one) for n, one in enumerate(tensors)]


def equal(model, expected):
    """Whether two MODELs have the same bits in all weights that have patches."""
    ours, theirs = tiny.patched_weights(model), tiny.patched_weights(expected)
    return ours.keys() == theirs.keys() != set() and all(torch.equal(ours[key], theirs[key]) for key in ours)


STRENGTHS = [(1.0, 1.0, 1.0), (0.8, -0.6, 0.3), (-1.5, 0.7, 0.0), (0.0, 1e-3, 4.0)]


@pytest.mark.parametrize("strengths", STRENGTHS)
def test_a_merge_patches_bit_for_bit_as_cores_loaders_one_after_another(model, names, tensors, strengths):
    one = merged(*zip(map(loaded, names), strengths, strict=True))[0]
    stacked = by_comfyui(model, *zip(tensors, strengths, strict=True))
    assert equal(applied(model, one)[0], stacked)
    # Strength there is strength of each.
    halves = by_comfyui(model, *((tensor, 0.5 * strength) for tensor, strength in zip(tensors, strengths, strict=True)))
    assert equal(applied(model, one, strength_model=0.5)[0], halves)


def test_a_merge_of_a_merge_patches_as_all_of_them(model, names, tensors):
    first = merged((loaded(names[0]), 0.5), (loaded(names[1]), -2.0))[0]
    one = merged((first, 0.25), (loaded(names[2]), 1.0), (loaded(names[0]), 1.0))[0]
    stacked = by_comfyui(model, (tensors[0], 0.125), (tensors[1], -0.5), (tensors[2], 1.0), (tensors[0], 1.0))
    assert equal(applied(model, one)[0], stacked)


def test_strengths_of_blocks_are_strengths_of_terms(model, names, tensors):
    slots = {"lora_1": loaded(names[0]), "lora_2": loaded(names[1]), "strength_1": 1.0, "strength_2": 0.5}
    one = MergeLoRA.execute(method="linear", size="exact", block_strengths="2: down=0.5", **slots).result[0]
    inputs = {key: tensor for key, tensor in tensors[1].items() if key.startswith("lora_unet_down_blocks")}
    others = {key: tensor for key, tensor in tensors[1].items() if key not in inputs}
    assert inputs
    assert others
    stacked = by_comfyui(model, (tensors[0], 1.0), (inputs, 0.25), (others, 0.5))
    assert equal(applied(model, one)[0], stacked)


def test_each_patch_is_cores_own_with_the_files_factors(model, names, tensors):
    """What looks into patches finds nothing else than after core's loaders."""
    done = applied(model, merged((loaded(names[0]), 0.8), (loaded(names[1]), 1.0))[0])[0]
    stacked = by_comfyui(model, (tensors[0], 1.0), (tensors[1], 1.0))
    assert done.patches.keys() == stacked.patches.keys()
    for key, entries in done.patches.items():
        for (strength, patch, *others), (_, theirs, *same) in zip(entries, stacked.patches[key], strict=True):
            assert isinstance(patch, LoRAAdapter)
            assert (strength, patch.name, others) == (1.0, "lora", same)
            for one, two in zip(patch.weights[:2], theirs.weights[:2], strict=True):
                assert one.dtype == two.dtype
                assert torch.equal(one, two)
            assert patch.weights[3:] == theirs.weights[3:] == (None, None, None)


def test_a_copy_of_a_patch_is_cores_own(model, names):
    patches = applied(model, loaded(names[0]))[0].patches
    patch = next(iter(patches.values()))[0][1]
    assert type(patch) is LoRAInFile
    for copied in (copy.deepcopy(patch), pickle.loads(pickle.dumps(patch)), copy.copy(patch)):
        assert type(copied) is LoRAAdapter
        assert all(torch.equal(a, b) for a, b in zip(copied.weights[:2], patch.weights[:2], strict=True))
    patch.weights = tuple(2 * part if isinstance(part, torch.Tensor) else part for part in patch.weights)
    assert torch.equal(patch.weights[0], 2 * copied.weights[0])


@pytest.mark.parametrize("dtype", [HALF, BRAIN, FULL])
def test_weights_patched_on_their_way_to_the_gpu_are_those_of_cores_loaders(model, names, tensors, dtype):
    """Where ComfyUI computes in the weight's dtype; at every step, and from factors that it has brought there before."""
    done = applied(model, merged((loaded(names[0]), 0.8), (loaded(names[1]), -1.0))[0])[0]
    stacked = by_comfyui(model, (tensors[0], 0.8), (tensors[1], -1.0))
    for key in done.patches:
        weight = comfy.utils.get_attr(model.model, key).detach().to(dtype)
        ours, theirs = (comfy.model_patcher.LowVramPatch(key, one.patches) for one in (done, stacked))
        wanted = theirs(weight.clone())
        assert all(torch.equal(ours(weight.clone()), wanted) for _ in range(3))
        if hasattr(ours, "prepare"):  # ComfyUI 0.16 does not prepare
            place = torch.empty(ours.memory_required(), dtype=torch.uint8)
            ours.prepare(place, None)
            place[:] = place.clone()
            assert torch.equal(ours(weight.clone()), wanted)


def test_a_file_changed_before_the_model_is_loaded_stops_it_in_words_and_leaves_its_weights(names, loras_folder):
    model = tiny.tiny_model()
    before = {key: weight.clone() for key, weight in model.model.state_dict().items()}
    first, second = map(loaded, names[:2])
    done = applied(model, merged((first, 1.0), (second, 1.0))[0])[0]
    os.truncate(loras_folder / names[0], 700)
    with pytest.raises(ValueError, match=r"^A LoRA on the MODEL: loras/0\.safetensors: was changed by another program"):
        comfy.model_management.load_models_gpu([done])
    assert all(torch.equal(weight, before[key]) for key, weight in model.model.state_dict().items())
    again = applied(model, second)[0]
    wanted = tiny.patched_weights(again)
    comfy.model_management.load_models_gpu([again])
    assert all(torch.equal(comfy.utils.get_attr(model.model, key), weight) for key, weight in wanted.items())
    again.detach()


def test_hooks_of_a_merge_are_a_hook_for_each_term(model, names, tensors):
    one = merged((loaded(names[0]), 0.8), (loaded(names[1]), 1.0))[0]
    hooks = LoRAByStep.execute(model=model, lora=one, positive=tiny.cond(1), strengths="1, 0.5").result[2]
    assert len(hooks.hooks) == 2
    stacked = by_comfyui(model, (tensors[0], 0.8), (tensors[1], 1.0))
    weights = {key: comfy.utils.get_attr(model.model, key).detach().clone() for key in stacked.patches}
    for key, weight in weights.items():
        entries = [(1.0, hook.weights[key], 1.0, None, None) for hook in hooks.hooks if key in hook.weights]
        wanted = comfy.lora.calculate_weight(stacked.patches[key], weight.clone(), key)
        assert torch.equal(comfy.lora.calculate_weight(entries, weight.clone(), key), wanted)
    assert len({hook.hook_keyframe for hook in hooks.hooks}) == 1


# ---- every family


def of_family(name, key, rank, dtype, seed, alpha):
    """A LoRA of all that a spelling names, in one dtype."""
    g, found = torch.Generator().manual_seed(seed), {}
    for (weight, _, rows, _), module in spellings(name)[key].items():
        shape = dits.shapes(name)[weight]
        up, down = (
            torch.randn(rows, rank, *(1,) * len(shape[2:]), generator=g),
            torch.randn(rank, *shape[1:], generator=g),
        )
        found |= {f"{module}.lora_up.weight": up.to(dtype), f"{module}.lora_down.weight": down.to(dtype)}
        found |= {f"{module}.alpha": torch.tensor(alpha)}
    return found


@pytest.mark.parametrize("name", dits.KNOWN)
def test_merged_in_the_graph_it_is_its_file_applied_and_two_loaders_of_core(name, put):
    """Of every spelling that ComfyUI reads beside the model's own: whole weights meet whole ones, and slices."""
    homes, shapes, cpu = dits.homes(name), dits.shapes(name), torch.device("cpu")
    model = comfy.model_patcher.ModelPatcher(dits.model(name), load_device=cpu, offload_device=cpu)
    read = [key for key, those in spellings(name).items() if homes.keys() >= set(those.values())]
    assert OWN in read
    for key in read:
        pair = of_family(name, OWN, 2, BRAIN, 1, 1.0), of_family(name, key, 3, HALF, 2, 1.5)
        one = merged(
            *((loaded(put(f"{n}.safetensors", lora)), s) for n, lora, s in zip("ab", pair, (1.0, -0.8), strict=True))
        )[0]
        stacked = [by_core(lora, homes, shapes) for lora in pair]
        from_file = by_core(load_file(saved(one, "merged", format="auto", mode="overwrite")), homes, shapes)
        ours = {}
        for target, patch in chain.from_iterable(term.items() for term in fit(one, model).patches()):
            weight, part = dits.target_of(target)
            turn = target[2] if isinstance(target, tuple) and len(target) > 2 else None
            ours.setdefault(weight, []).append((1.0, patch, 1.0, part, turn))
        assert ours.keys() == from_file.keys() == stacked[0].keys() | stacked[1].keys()
        for weight, entries in ours.items():
            found = comfy.lora.calculate_weight(entries, torch.zeros(shapes[weight]), weight)
            both = stacked[0].get(weight, 0) - 0.8 * stacked[1].get(weight, 0)
            assert relative(found, both) < 1e-5
            assert relative(from_file[weight], both) < 1e-5
