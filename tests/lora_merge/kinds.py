"""Every kind of update that files hold, as the keys of one module, and the plain arithmetic of those that add up."""

import torch

from lcm_kit.tests.lora_merge.make import generator

# In the order of the ranks used: (kind as Lora.kinds calls it, whether it needs a convolution).
ADDITIVE = {
    "LoRA": ("LoRA", False),
    "LoCon with a core": ("LoRA", True),
    "LoHa": ("LoHa", False),
    "LoHa of two ranks": ("LoHa", False),
    "LoHa with cores": ("LoHa", True),
    "LoKr, both whole": ("LoKr", False),
    "LoKr, second low-rank": ("LoKr", False),
    "LoKr, first low-rank": ("LoKr", False),
    "LoKr, both low-rank": ("LoKr", False),
    "LoKr, second flattened": ("LoKr", True),
    "LoKr with a core": ("LoKr", True),
}
CARRIED = {
    "DoRA, rows": "DoRA",
    "DoRA, columns": "DoRA",
    "DoRA on LoHa": "DoRA",
    "DoRA on LoKr": "DoRA",
    "OFT": "OFT",
    "OFT with rescale": "OFT",
    "BOFT": "BOFT",
    "GLoRA": "GLoRA",
    "GLoRA, old": "GLoRA",
    "set_weight": "replaced weight",
}


def parts(kind, out=8, inputs=12, kernel=(), *, seed=0, dtype=torch.float32):  # noqa: C901, a branch a kind
    """End of the key -> tensor, without alpha. out and inputs divide by 4."""
    g = generator(seed)

    def normal(*shape):
        return (0.3 * torch.randn(*shape, generator=g)).to(dtype)

    ones, flat = (1,) * len(kernel), inputs * torch.Size(kernel).numel()
    if kind == "LoRA":
        return {".lora_up.weight": normal(out, 3, *ones), ".lora_down.weight": normal(3, inputs, *kernel)}
    if kind == "LoCon with a core":
        return {
            ".lora_up.weight": normal(out, 3, *ones),
            ".lora_down.weight": normal(3, inputs, *ones),
            ".lora_mid.weight": normal(3, 3, *kernel),
        }
    if kind.startswith("LoHa"):
        if kind == "LoHa with cores":
            found = {f".hada_w{n}_a": normal(2, out) for n in (1, 2)}
            found |= {f".hada_w{n}_b": normal(2, inputs) for n in (1, 2)}
            return found | {f".hada_t{n}": normal(2, 2, *kernel) for n in (1, 2)}
        second = 3 if kind == "LoHa of two ranks" else 2
        return {
            ".hada_w1_a": normal(out, 2),
            ".hada_w1_b": normal(2, flat),
            ".hada_w2_a": normal(out, second),
            ".hada_w2_b": normal(second, flat),
        }
    if kind.startswith("LoKr"):
        low_first = kind in ("LoKr, first low-rank", "LoKr, both low-rank")
        found = {".lokr_w1_a": normal(4, 1), ".lokr_w1_b": normal(1, 2)} if low_first else {".lokr_w1": normal(4, 2)}
        if kind == "LoKr with a core":
            core = {
                ".lokr_w2_a": normal(2, out // 4),
                ".lokr_w2_b": normal(2, inputs // 2),
                ".lokr_t2": normal(2, 2, *kernel),
            }
            return found | core
        if kind in ("LoKr, second low-rank", "LoKr, both low-rank"):
            return found | {".lokr_w2_a": normal(out // 4, 1), ".lokr_w2_b": normal(1, flat // 2)}
        if kind == "LoKr, second flattened":
            return found | {".lokr_w2": normal(out // 4, flat // 2)}
        return found | {".lokr_w2": normal(out // 4, inputs // 2, *kernel)}
    if kind.startswith("DoRA"):
        base = {"DoRA on LoHa": "LoHa", "DoRA on LoKr": "LoKr, second low-rank"}.get(kind, "LoRA")
        scale_shape = (1, inputs, *ones) if kind == "DoRA, columns" else (out, 1, *ones)
        return parts(base, out, inputs, kernel, seed=seed, dtype=dtype) | {".dora_scale": 1 + normal(*scale_shape)}
    if kind.startswith("OFT"):
        return {".oft_blocks": normal(4, out // 4, out // 4)} | (
            {".rescale": 1 + normal(out, 1)} if "rescale" in kind else {}
        )
    if kind == "BOFT":
        return {".oft_blocks": normal(2, out // 4, 4, 4)}
    if kind == "GLoRA":
        shapes = {"a1": (inputs, 2), "a2": (2, inputs), "b1": (out, 2), "b2": (2, flat)}
        return {f".{name}.weight": normal(*shape) for name, shape in shapes.items()}
    if kind == "GLoRA, old":
        shapes = {"a1": (2, flat), "a2": (flat, 2), "b1": (2, flat), "b2": (out, 2)}
        return {f".{name}.weight": normal(*shape) for name, shape in shapes.items()}
    if kind == "set_weight":
        return {".set_weight": normal(out, inputs, *kernel)}
    raise KeyError(kind)


def state_dict(kind, module, out=8, inputs=12, kernel=(), *, alpha=None, seed=0, dtype=torch.float32):
    found = {f"{module}{end}": part for end, part in parts(kind, out, inputs, kernel, seed=seed, dtype=dtype).items()}
    return found if alpha is None else found | {f"{module}.alpha": torch.tensor(float(alpha))}


def dense(tensors, alpha=None):
    """The update of `parts` of a kind that adds up, in float64, (out, in * kernel), by the definitions and nothing else."""
    t = {end: tensor.double() for end, tensor in tensors.items()}
    if ".lora_up.weight" in t:
        up, down = t[".lora_up.weight"].flatten(1), t[".lora_down.weight"]
        dim = down.shape[0]
        if ".lora_mid.weight" in t:
            down = torch.einsum("ij...,jn->in...", t[".lora_mid.weight"], down.flatten(1))
        product = up @ down.flatten(1)
    elif ".hada_w1_a" in t:
        dim = t[".hada_w1_b"].shape[0]
        product = torch.ones(())
        for n in (1, 2):
            a, b, core = t[f".hada_w{n}_a"], t[f".hada_w{n}_b"], t.get(f".hada_t{n}")
            product = product * (a @ b if core is None else torch.einsum("ijkl,io,jn->onkl", core, a, b).flatten(1))
    else:
        w1 = t[".lokr_w1"] if ".lokr_w1" in t else t[".lokr_w1_a"] @ t[".lokr_w1_b"]
        dim = None if ".lokr_w1" in t else t[".lokr_w1_b"].shape[0]
        if ".lokr_w2" in t:
            w2 = t[".lokr_w2"]
        else:
            a, b, core = t[".lokr_w2_a"], t[".lokr_w2_b"], t.get(".lokr_t2")
            w2 = a @ b if core is None else torch.einsum("ijkl,io,jn->onkl", core, a, b)
            dim = b.shape[0]
        w2 = w2.flatten(2) if w2.dim() > 2 else w2[..., None]
        # The weight's entry at row o1 * O2 + o2, column i1 * I2 + i2 is w1[o1, i1] * w2[o2, i2].
        product = torch.einsum("ab,cdk->acbdk", w1, w2).reshape(w1.shape[0] * w2.shape[0], -1)
    return product * (1 if alpha is None or dim is None else alpha / dim)
