"""A turbo LoRA for every family of models: what makes the turbo model out of its base, extracted at full rank, put on a
fine-tune of that base by ComfyUI's own loader. The fine-tune has to become the exact sum: its weights + turbo - base."""

import copy

import comfy.lora
import comfy.model_patcher
import comfy.sd
import pytest
import torch
from safetensors.torch import load_file, save_file

from lcm_kit.lora_merge.__main__ import main
from lcm_kit.nodes.extracting import ExtractLoRA
from lcm_kit.tests.with_comfyui import dits
from lcm_kit.tests.with_comfyui.test_one_weight_twice import by_core

MODEL, RANK = "diffusion_model.", 3
# float32's rounding of the weights, in a difference a tenth of their size.
EXACT = 1e-5
LARGE = 100_000

pytestmark = pytest.mark.usefixtures("no_gradients")


def weights(name, seed):
    g = torch.Generator().manual_seed(seed)
    return {key: torch.randn(shape, generator=g) for key, shape in dits.shapes(name).items()}


def turbo_of(base, seed=1):
    """Every matrix but the few large ones changed in some directions, as few-step training does; biases and norms in
    every value."""
    g, made = torch.Generator().manual_seed(seed), {}
    for key, weight in base.items():
        if weight.numel() >= LARGE:
            made[key] = weight
        elif weight.ndim < 2:
            made[key] = weight + 0.1 * torch.randn(weight.shape, generator=g)
        else:
            up, down = torch.randn(len(weight), RANK, generator=g), torch.randn(RANK, weight[0].numel(), generator=g)
            made[key] = weight + 0.1 * (up @ down).reshape(weight.shape)
    return made


def is_of_module(key):
    """Bare parameters, such as Wan's modulations, are not patched by ComfyUI: the report names them."""
    return key.endswith((".weight", ".bias"))


def check(made, base, turbo, tuned):
    for key, weight in tuned.items():
        wanted, change = weight + turbo[key] - base[key], turbo[key] - base[key]
        if is_of_module(key) and weight.numel() < LARGE:
            error = float((made[key] - wanted).norm() / change.norm())
            assert error <= EXACT, (key, error)


@pytest.fixture(scope="module", params=dits.KNOWN)
def models(request):
    name = request.param
    base = weights(name, 0)
    tuned = {
        key: weight + 0.1 * other for (key, weight), other in zip(base.items(), weights(name, 7).values(), strict=True)
    }
    return name, base, turbo_of(base), tuned


def test_the_command_makes_it_of_two_files(models, tmp_path):
    name, base, turbo, tuned = models
    for file, state in (("turbo", turbo), ("base", base)):
        save_file({key.removeprefix(MODEL): value for key, value in state.items()}, tmp_path / f"{file}.safetensors")
    out = tmp_path / "lora.safetensors"
    files = [str(tmp_path / f"{file}.safetensors") for file in ("turbo", "base")]
    assert main(["extract", *files, "-o", str(out), "--rank", "4096", "--dtype", "fp32"]) == 0
    lora, homes = load_file(out), dits.homes(name)
    ends = (
        ".lora_up.weight",
        ".lora_down.weight",
        ".lora_A.weight",
        ".lora_B.weight",
        ".alpha",
        ".diff",
        ".diff_b",
        ".w_norm",
        ".b_norm",
    )
    modules = {next(key.removesuffix(end) for end in ends if key.endswith(end)) for key in lora}
    assert modules <= homes.keys()
    added = by_core(lora, homes, dits.shapes(name))
    made = {key: weight + added[key] if key in added else weight for key, weight in tuned.items()}
    check(made, base, turbo, tuned)


def patcher(name, state):
    model = copy.deepcopy(dits.model(name)).to_empty(device="cpu")
    model.load_state_dict(state)
    cpu = torch.device("cpu")
    return comfy.model_patcher.ModelPatcher(model, load_device=cpu, offload_device=cpu)


def test_the_node_makes_it_of_two_models(models, caplog):
    name, base, turbo, tuned = models
    lora, report = ExtractLoRA.execute(patcher(name, turbo), patcher(name, base), 4096, 1.0).result
    assert "Extracted" in report
    fast, _ = comfy.sd.load_lora_for_models(patcher(name, tuned), None, dict(lora), 1.0, 0.0)
    assert "not loaded" not in caplog.text
    made = {
        key: comfy.lora.calculate_weight(fast.patches[key], weight.clone(), key) if key in fast.patches else weight
        for key, weight in tuned.items()
    }
    check(made, base, turbo, tuned)
