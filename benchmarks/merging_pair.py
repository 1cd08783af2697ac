"""The LoRAs that merging.py merges, and how far a merged file is from their exact sum."""

PARAMETERS = {"SD1.5": 67_252_224, "SDXL": 196_751_360}
STRENGTHS = {"style": 0.8, "lcm": 1.0}
KINDS_OF_STYLE = {f"attn{n}_to_{what}" for n in (1, 2) for what in ("q", "k", "v", "out_0")}


def write_pair(folder, base):
    """lcm.safetensors, rank 64 on all modules, and style.safetensors, rank 32 on the attention; kohya names, float16."""
    import torch
    from safetensors.torch import save_file

    from lcm_kit.lora_merge.recognise.base_models import BY_NAME, kind_of

    def lora(rank, alpha, decay, keep, seed):
        g = torch.Generator().manual_seed(seed)
        tensors = {}
        # Half of a falling spectrum in each factor.
        fall = decay ** (torch.arange(rank) / 2)
        for name, (out, inside, *kernel) in BY_NAME[base].modules.items():
            if not keep(kind_of(name)):
                continue
            up = torch.randn(out, rank, *(1 for _ in kernel), generator=g) * out**-0.5
            down = torch.randn(rank, inside, *kernel, generator=g) * inside**-0.5
            up = up * fall.reshape(1, -1, *(1 for _ in kernel))
            down = down * fall.reshape(-1, 1, *(1 for _ in kernel))
            tensors[f"lora_unet_{name}.alpha"] = torch.tensor(alpha)
            tensors[f"lora_unet_{name}.lora_up.weight"] = up.half()
            tensors[f"lora_unet_{name}.lora_down.weight"] = down.half()
        return tensors

    lcm = lora(64, 8.0, 0.97, lambda kind: kind is not None, 1)
    count = sum(tensor.numel() for key, tensor in lcm.items() if not key.endswith(".alpha"))
    assert count == PARAMETERS[base], count
    save_file(lcm, folder / "lcm.safetensors")
    save_file(lora(32, 2.0, 0.95, KINDS_OF_STYLE.__contains__, 2), folder / "style.safetensors")


def write(tensors, out):
    """Writes a file to the disk and not only to the page cache, as `lora_merge.save` does."""
    import os

    from safetensors.torch import save_file

    save_file(tensors, out)
    with open(out, "rb+") as file:
        os.fsync(file.fileno())


def modules_of(keys):
    return dict.fromkeys(key.partition(".")[0] for key in keys)


def error_of(out, folder, only=None):
    """Relative Frobenius distance of a written file from the exact sum; what the file lacks counts as zero.

    out: in any spelling that lora_merge reads. only: modules that count, all by default.
    """
    import torch
    from safetensors.torch import load_file

    from lcm_kit.lora_merge import load

    made = load(out)
    pair = {name: load_file(folder / f"{name}.safetensors") for name in STRENGTHS}

    def of_pair(name, module):
        state = pair[name]
        up, down = (state[f"{module}.lora_{part}.weight"].double().flatten(1) for part in ("up", "down"))
        return up * (STRENGTHS[name] * float(state[f"{module}.alpha"]) / up.shape[1]), down

    def of_made(module):
        layer = made.modules[made.find(module)]
        up, down = (factor.double() for factor in layer.factors())
        return up * -layer.scale, down

    def energy(terms):
        up, down = torch.cat([up for up, _ in terms], dim=1), torch.cat([down for _, down in terms], dim=0)
        # float64 Gram matrices: good to 1e-8 of the norm, where the smallest error here is 1e-5.
        return float(((up.T @ up) * (down @ down.T)).sum())

    lost = whole = 0.0
    for module in only or modules_of(pair["lcm"]):
        exact = [of_pair(name, module) for name in STRENGTHS if f"{module}.alpha" in pair[name]]
        try:
            lost += energy([*exact, of_made(module)])
        except KeyError:
            lost += energy(exact)
        whole += energy(exact)
    return (lost / whole) ** 0.5
