"""Small LoRAs for the tests: random factors from a seed, state dicts in every spelling, and the plain arithmetic."""

import torch
from safetensors import safe_open

from lcm_kit.lora_merge import LoraLayer


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def factors(out, rank, inputs, kernel=(), *, seed=0, dtype=torch.float32):
    """(up, down) of a layer, entries around 0.1 as in trained LoRAs."""
    g = generator(seed)
    up = torch.randn(out, rank, *(1 for _ in kernel), generator=g)
    down = torch.randn(rank, inputs, *kernel, generator=g)
    return (0.1 * up).to(dtype), (0.1 * down).to(dtype)


def layer(out, rank, inputs, kernel=(), *, alpha=None, seed=0):
    return LoraLayer(*factors(out, rank, inputs, kernel, seed=seed), alpha)


def kohya(module, up, down, alpha=None):
    result = {f"{module}.lora_up.weight": up, f"{module}.lora_down.weight": down}
    if alpha is not None:
        result[f"{module}.alpha"] = torch.tensor(float(alpha))
    return result


def metadata(path):
    with safe_open(path, framework="pt") as file:
        return file.metadata()


def dense(up, down, scale=1.0):
    """The update in float64, by the definition and nothing else."""
    flat = scale * up.double().flatten(1) @ down.double().flatten(1)
    return flat.reshape(up.shape[0], *down.shape[1:])


def relative(value, wanted):
    wanted = wanted.double()
    return float((value.double() - wanted).norm() / wanted.norm())
