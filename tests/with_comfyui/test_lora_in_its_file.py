"""LORA_MODELs whose tensors stay in their files, in the graph: what other nodes make of them, what lives meanwhile, and files that
do not stay as they were."""

import copy
import gc
import os

import comfy.model_management
import comfy.model_patcher
import comfy.sd
import comfy.utils
import folder_paths
import pytest
import torch
from comfy_extras.nodes_train import LoraModelLoader
from comfy_extras.nodes_train import SaveLoRA as CoresSaveLoRA
from safetensors.torch import load_file, save_file

from lcm_kit.host.lora import files
from lcm_kit.host.lora.mix import NONE
from lcm_kit.host.lora.terms import LoRAInFile
from lcm_kit.host.lora.weights import LoraWeights
from lcm_kit.lora_merge.disk.tensor_file import TensorFile
from lcm_kit.lora_merge.updates.unmade import Unmade
from lcm_kit.nodes.by_step import LoRAByStep
from lcm_kit.nodes.comparing import CompareLoRA
from lcm_kit.nodes.loading import LCMLoader
from lcm_kit.nodes.merging import ResizeLoRA
from lcm_kit.nodes.mix import LoRAMix
from lcm_kit.nodes.sampling import LCMKSampler
from lcm_kit.tests.lora_merge import kinds
from lcm_kit.tests.with_comfyui import tiny
from lcm_kit.tests.with_comfyui.lora_nodes import EXACT, applied, assert_same_weights, by_comfyui, loaded, merged, saved

pytestmark = [
    pytest.mark.usefixtures("no_gradients", "large"),
    pytest.mark.skipif(os.name != "posix", reason="Windows replaces no file that is open, so all is in memory"),
]


@pytest.fixture(scope="module")
def model():
    return tiny.small_model()


@pytest.fixture
def pair(model, put):
    """Names of two files."""
    return (
        put("style.safetensors", tiny.lora(model, endings=tiny.STYLE, rank=3, seed=1, dtype=torch.float16)),
        put("lcm.safetensors", tiny.lora(model, "diffusers PEFT", seed=2)),
    )


def unmade(lora):
    return [key for key, piece in lora.pieces.items() if isinstance(piece, Unmade)]


def exact(pair):
    return merged((loaded(pair[0]), 0.8), (loaded(pair[1]), 1.0))[0]


GIVEN = {
    "a file": lambda pair: loaded(pair[0]),
    "PEFT's": lambda pair: loaded(pair[1]),
    "an exact merge": exact,
    "a merge of a merge": lambda pair: merged((exact(pair), -0.5), (loaded(pair[0]), 1.0))[0],
}


def copied(change):
    """A node of a pack that changes a LORA_MODEL by a loop of its own."""
    return lambda model, lora, folder: change(lora)


def halves(lora):
    result = lora.copy()
    for key in result:
        if key.endswith(".weight"):
            result[key] = result[key] * 0.5
    return result


def cloned_in_place(lora):
    result = copy.deepcopy(lora)
    for tensor in result.values():
        tensor.mul_(0.5)
    return dict(result)


def written(save):
    def work(model, lora, folder):
        save(lora, folder / "saved.safetensors")
        return load_file(folder / "saved.safetensors")

    return work


def by_cores_save(model, lora, folder):
    before = set(os.listdir(folder_paths.get_output_directory()))
    CoresSaveLoRA.execute(lora, "in_its_file")
    (name,) = set(os.listdir(folder_paths.get_output_directory())) - before
    path = os.path.join(folder_paths.get_output_directory(), name)
    tensors = load_file(path)
    os.unlink(path)
    return tensors


CONSUMERS = {
    "Load LoRA Model": lambda model, lora, _: tiny.patched_weights(LoraModelLoader.execute(model, lora, 0.7).result[0]),
    "load_lora_for_models": lambda model, lora, _: tiny.patched_weights(
        comfy.sd.load_lora_for_models(model, None, lora, 0.7, 0)[0]
    ),
    "Save LoRA Weights": by_cores_save,
    "save_file": written(save_file),
    "save_torch_file": written(comfy.utils.save_torch_file),
    "a product": copied(lambda lora: {key: tensor * 2 for key, tensor in lora.items()}),
    "a copy": copied(lambda lora: {**lora, "more": torch.ones(1)}),
    "halves": copied(halves),
    "a deep copy": copied(cloned_in_place),
    "a filter": copied(
        lambda lora: comfy.utils.state_dict_prefix_replace(dict(lora), {"lora_": "x_"}, filter_keys=True)
    ),
    "a count": copied(lambda lora: {"": torch.tensor(comfy.utils.calculate_parameters(lora))}),
    "Apply LoRA": lambda model, lora, _: tiny.patched_weights(applied(model, lora)[0]),
    "Resize LoRA": lambda model, lora, _: dict(ResizeLoRA.execute(lora, {"size": "rank", "rank": 2}, "fp16").result[0]),
    "Save LoRA": lambda model, lora, _: load_file(saved(lora)),
    "Merge LoRAs": lambda model, lora, _: dict(merged((lora, 0.5), (lora, 0.25))[0]),
    "Compare LoRAs": lambda model, lora, _: {"": CompareLoRA.execute(lora_1=lora, strength_1=1.0, rank=0).result[0]},
}
OURS = ("Apply LoRA", "Resize LoRA", "Save LoRA", "Merge LoRAs", "Compare LoRAs")


@pytest.mark.parametrize("given", GIVEN)
@pytest.mark.parametrize("consumer", CONSUMERS)
def test_every_node_makes_of_it_what_it_makes_of_the_plain_dict(model, pair, tmp_path, given, consumer):
    lora = GIVEN[given](pair)
    plain = LoraWeights(dict(GIVEN[given](pair)), name=lora.name, metadata=lora.metadata)
    assert len(unmade(lora)) == sum(key.endswith(".weight") for key in lora)
    found, wanted = (CONSUMERS[consumer](model, one, tmp_path) for one in (lora, plain))
    assert found.keys() == wanted.keys() != set()
    # Terms are added one after another, not in one product.
    near = EXACT if consumer == "Apply LoRA" and "merge" in given else {"rtol": 0, "atol": 0}
    for key, tensor in wanted.items():
        torch.testing.assert_close(found[key], tensor, **near)
    # Our own leave it where it is, so that it is in memory for nobody.
    assert bool(unmade(lora)) == (consumer in OURS)


def test_who_applies_it_twice_has_its_tensors_once(model, pair):
    lora = exact(pair)
    other = tiny.small_model(seed=7)
    first, second = (applied(one, lora)[0].patches for one in (model, other))
    assert first.keys() == second.keys() != set()
    for key, entries in first.items():
        for (_, patch, *_), (_, other, *_) in zip(entries, second[key], strict=True):
            assert all(one is two for one, two in zip(patch.weights[:2], other.weights[:2], strict=True))


# ---- what lives: bytes of tensors that Python knows


def living():
    """Bytes of all storages on the CPU."""
    found = {}
    for one in gc.get_objects():
        # By its type: some objects do things when they are asked what they are.
        if issubclass(type(one), torch.Tensor) and one.device.type == "cpu":
            found[one.untyped_storage().data_ptr()] = one.untyped_storage().nbytes()
    return sum(found.values())


ROWS, RANK, MODULES = 1024, 64, 48
FILE = 2 * 2 * ROWS * RANK * MODULES


@pytest.fixture
def sizable(put):
    """Names of two files of 12.6 MB of factors each."""
    names = []
    for seed in range(2):
        g = torch.Generator().manual_seed(seed)
        tensors = {
            f"lora_unet_x_{n}.lora_{part}.weight": (0.1 * torch.randn(*shape, generator=g)).half()
            for n in range(MODULES)
            for part, shape in (("up", (ROWS, RANK)), ("down", (RANK, ROWS)))
        }
        names.append(put(f"{seed}.safetensors", tensors))
    return names


@pytest.fixture
def most(monkeypatch):
    """The most bytes that lived while a file was read."""
    seen, fill, reads = [0], TensorFile.fill, [0]

    def watched(self, name, place):
        reads[0] += 1
        if reads[0] % 7 == 0:
            seen[0] = max(seen[0], living())
        fill(self, name, place)

    monkeypatch.setattr(TensorFile, "fill", watched)
    return seen


def test_load_load_merge_and_save_hold_a_few_pieces_and_no_file(sizable, most):
    gc.collect()
    before = living()
    loras = [loaded(name) for name in sizable]
    both = merged((loras[0], 1.0), (loras[1], 0.8))[0]
    saved(both, dtype="fp16")
    assert len(unmade(both)) == 2 * MODULES
    gc.collect()
    assert living() - before < 0.1 * FILE
    assert 0 < most[0] - before < 0.25 * FILE


def test_what_was_asked_for_lives_once_and_no_longer_than_who_asked(sizable):
    gc.collect()
    loras = [loaded(name) for name in sizable]
    both = merged((loras[0], 1.0), (loras[1], 0.8))[0]
    before = living()
    result = sum(both.pieces[key].nbytes for key in unmade(both))
    taken = [list(lora.values()) for lora in (both, loras[0], loaded(sizable[0]))]
    # The result; and what is in two LORA_MODELs of one file.
    assert living() - before == pytest.approx(result + FILE, rel=0.01)
    del taken, both, loras
    gc.collect()
    assert living() - before < 0.1 * FILE  # memory that serves the next piece


def test_a_model_with_a_merge_has_nothing_of_it_in_memory_but_what_is_asked_for_again(model, put):
    """Then it has each file once, as that has it."""
    rank = 256
    names = [put(f"{n}.safetensors", tiny.lora(model, rank=rank, seed=n, dtype=torch.float16)) for n in range(2)]
    size = sum(os.path.getsize(folder_paths.get_full_path("loras", name)) for name in names)
    applied(model, exact(names))
    gc.collect()
    before = living()  # with what the parts of ComfyUI and of LCM Kit remember
    lora = exact(names)
    done = applied(model, lora)[0]
    gc.collect()
    assert living() - before < 0.1 * size
    comfy.model_management.load_models_gpu([done])  # as a run patches it
    done.detach()
    gc.collect()
    assert living() - before < 0.1 * size
    tiny.patched_weights(done)
    gc.collect()
    assert living() - before == pytest.approx(size, rel=0.1)
    del done
    gc.collect()
    assert living() - before < 0.1 * size


# ---- files that are applied at once


def by_the_loader(model, names):
    """The first is a stack's."""
    stack = [(names[0], 0.5, 0.5)]
    return LCMLoader.execute(model, names[1], 1.0, "refuse", lora_stack=stack).result[0]


def by_the_mix(model, names):
    rows = {f"lora_{n}": NONE for n in range(1, 5)} | {"lora_1": names[0]}
    rows |= {f"strength_{n}": 0.5 for n in range(1, 5)} | {f"on_{n}": True for n in range(1, 5)}
    given = {"lcm_lora": names[1], "lcm_strength": 1.0, "block_strengths": "", "wrong_base": "refuse"}
    return LoRAMix.execute(model=model, **given, **rows).result[0]


AT_ONCE = {"loader and stack": by_the_loader, "mix": by_the_mix}


@pytest.mark.parametrize("node", AT_ONCE)
def test_who_applies_a_file_leaves_it_where_it_is_and_patches_as_cores_loader(model, put, node):
    rank = 256
    tensors = [tiny.lora(model, rank=rank, seed=n, dtype=torch.float16) for n in range(2)]
    names = [put(f"{n}.safetensors", one) for n, one in enumerate(tensors)]
    size = sum(os.path.getsize(folder_paths.get_full_path("loras", name)) for name in names)
    AT_ONCE[node](model, names)
    files._cache.clear()
    gc.collect()
    before = living()  # with what the parts of ComfyUI and of LCM Kit remember
    done = AT_ONCE[node](model, names)
    gc.collect()
    assert living() - before < 0.1 * size
    patches = [patch for entries in done.patches.values() for _, patch, *_ in entries]
    assert {type(patch) for patch in patches} == {LoRAInFile}
    pairs = [(tensors[0], 0.5), (tensors[1], 1.0)]
    stacked = by_comfyui(model, *(pairs if node == "loader and stack" else reversed(pairs)))
    ours, theirs = tiny.patched_weights(done), tiny.patched_weights(stacked)
    assert ours.keys() == theirs.keys() != set()
    assert all(torch.equal(ours[key], theirs[key]) for key in ours)


def by_load_and_apply(model, names):
    return applied(applied(model, loaded(names[0]))[0], loaded(names[1]))[0]


def picture(model, positive):
    settings = {"seed": 5, "steps": 2, "cfg": 1.0, "denoise": 1.0, "gamma": 1.0, "cfg_steps": -1, "original_steps": 50}
    result = LCMKSampler.execute(model=model, positive=positive, latent_image=tiny.latent(), **settings)
    return result[0]["samples"]


def of_hooks(model, names):
    positive = tiny.cond(1)
    for name in names:
        positive = LoRAByStep.execute(model=model, lora=loaded(name), positive=positive, strengths="1, 0.5").result[0]
    return picture(model, positive)


RUNS = {
    name: lambda model, names, node=node: picture(node(model, names), tiny.cond(1)) for name, node in AT_ONCE.items()
}
RUNS |= {
    "Load and Apply": lambda model, names: picture(by_load_and_apply(model, names), tiny.cond(1)),
    "hooks": of_hooks,
}


@pytest.mark.parametrize("run", RUNS)
@pytest.mark.parametrize("broken", range(2))
@pytest.mark.parametrize("value", [float("nan"), float("-inf")])
def test_a_value_that_is_no_number_stops_the_run_with_its_file_and_key_and_leaves_the_model(put, run, broken, value):
    model, names = tiny.tiny_model(), []
    before = {key: weight.clone() for key, weight in model.model.state_dict().items()}
    plain = picture(model, tiny.cond(1))
    for n in range(2):
        tensors = tiny.lora(model, seed=n, dtype=torch.float16)
        if n == broken:
            wanted = [key for key in tensors if key.endswith(".weight")][7]
            tensors[wanted].view(-1)[-1] = value
        names.append(put(f"{n}.safetensors", tensors))
    for _ in range(2):  # whoever presses the button again is told again
        with pytest.raises(ValueError, match=rf"{broken}\.safetensors: NaN or infinite values in {wanted}") as failure:
            RUNS[run](model, names)
        assert "/" not in str(failure.value)
    assert torch.equal(picture(model, tiny.cond(1)), plain)
    assert all(torch.equal(weight, before[key]) for key, weight in model.model.state_dict().items())


@pytest.mark.parametrize("kind", ["LoHa", "LoKr, both whole"])
def test_two_models_share_no_patch_that_one_of_them_may_change(model, put, kind):
    """Bypass moves an adapter's tensors and notes its module in it."""
    _, layer, (rows, columns) = next(one for one in tiny.modules(model, (".time_emb_proj",)))
    tensors = kinds.state_dict(kind, f"lora_unet_{layer.replace('.', '_')}", rows, columns)
    lora = loaded(put("x.safetensors", tensors))
    first, second = (applied(model, lora)[0].patches for _ in range(2))
    assert first.keys() == second.keys() != set()
    for key, ((_, one, *_),) in first.items():
        ((_, other, *_),) = second[key]
        assert one is not other
        assert all(a is b for a, b in zip(one.weights, other.weights, strict=True))


# ---- files that do not stay as they were


CHANGES = {
    "cut off": lambda path: os.truncate(path, 700),
    "emptied": lambda path: path.write_bytes(b""),
    "written to": lambda path: (path.write_bytes(path.read_bytes()[::-1]), os.utime(path, (5, 5))),
}


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("given", GIVEN)
def test_a_file_that_was_changed_stops_every_node_in_words(model, pair, tmp_path, loras_folder, given, change):
    lora = GIVEN[given](pair)
    for name in pair:
        CHANGES[change](loras_folder / name)
    for consumer, work in CONSUMERS.items():
        with pytest.raises(ValueError, match=r"\.safetensors: was changed by another program") as failure:
            work(model, lora, tmp_path)
        if consumer in OURS and consumer != "Merge LoRAs":  # which reads nothing: that is somebody else here
            assert str(loras_folder) not in str(failure.value)
    assert sorted(path.name for path in loras_folder.iterdir()) == sorted(pair)


def test_a_file_written_anew_is_read_anew_and_one_replaced_lives_on(model, pair, put):
    old = loaded(pair[0])
    tensors = load_file(folder_paths.get_full_path("loras", pair[0]))
    put("new.safetensors", tiny.lora(model, endings=tiny.STYLE, seed=9))
    path = folder_paths.get_full_path("loras", pair[0])
    os.replace(folder_paths.get_full_path("loras", "new.safetensors"), path)
    assert_same_weights(applied(model, loaded(pair[0]))[0], by_comfyui(model, (load_file(path), 1.0)))
    assert_same_weights(applied(model, old)[0], by_comfyui(model, (tensors, 1.0)))


@pytest.mark.parametrize("given", GIVEN)
def test_going_through_every_output_for_models_makes_nothing(pair, given):
    """ComfyUI 0.30 does, with each output of each node that another takes."""
    tracker = getattr(comfy.model_patcher, "PromptModelTracker", None)
    if tracker is None:
        pytest.skip("this ComfyUI does not")
    lora = GIVEN[given](pair)
    before = unmade(lora)
    assert before
    tracker().add([lora, {"inside": [lora]}])
    assert unmade(lora) == before
