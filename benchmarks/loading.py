"""Time and memory to load, recognise and apply an SDXL LCM-LoRA, against ComfyUI's own LoraLoader on the same file.

    COMFYUI_PATH=.comfyui .venv/bin/python benchmarks/loading.py [--rounds 5]

The file has the official one's names, shapes and size (196,751,360 values in float16), made on the fly; the model is
ComfyUI's SDXL class without memory for its weights. Every measurement is a process of its own, both in turn; the smallest
of all rounds counts. "node" is the node alone: core's maps the file, LCM Kit's hashes it, both read its factors later; "hash known"
is that where the server has hashed the file before. Garbage collections count where they fall; "collecting" is the CPU of
those. "patched" goes on until every changed weight is computed, as before the first picture; LCM Kit looks at every value there.
Prints Markdown, as kept in benchmarks/RESULTS.md.
"""

import argparse
import gc
import json
import math
import tempfile
import time
from pathlib import Path

from setting import fresh, load_comfyui, markdown, peak_memory

import torch

KNOWN = "LCM Kit, hash known"
LORA = "pytorch_lora_weights.safetensors"
SDXL = {
    "image_size": 32,
    "in_channels": 4,
    "out_channels": 4,
    "model_channels": 320,
    "num_res_blocks": [2, 2, 2],
    "channel_mult": [1, 2, 4],
    "transformer_depth": [0, 0, 2, 2, 10, 10],
    "transformer_depth_output": [0, 0, 0, 2, 2, 2, 10, 10, 10],
    "transformer_depth_middle": 10,
    "context_dim": 2048,
    "adm_in_channels": 2816,
    "num_classes": "sequential",
    "num_head_channels": 64,
    "use_linear_in_transformer": True,
    "use_spatial_transformer": True,
    "use_temporal_attention": False,
    "use_temporal_resblock": False,
    "legacy": False,
    "dtype": torch.float16,
}


class Collecting:
    """CPU time of this process's garbage collections, in seconds, from now on."""

    def __init__(self) -> None:
        self.seconds = 0.0
        gc.callbacks.append(self._look)

    def _look(self, phase: str, _: dict[str, int]) -> None:
        # Minus when it began, plus when it ended.
        self.seconds += time.process_time() * (-1 if phase == "start" else 1)


def make(path: Path) -> None:
    """The official file's names and shapes with small random values."""
    from safetensors.torch import save_file

    from lcm_kit.lora_merge.recognise.base_models import BY_NAME, kind_of

    generator, tensors = torch.Generator().manual_seed(0), {}
    for module, shape in BY_NAME["SDXL"].modules.items():
        if kind_of(module) is None:
            continue
        name, ones = f"lora_unet_{module}", (1,) * len(shape[2:])
        tensors[f"{name}.alpha"] = torch.tensor(8.0, dtype=torch.float16)
        tensors[f"{name}.lora_down.weight"] = torch.randn(64, *shape[1:], generator=generator).half() / 64
        tensors[f"{name}.lora_up.weight"] = torch.randn(shape[0], 64, *ones, generator=generator).half() / 64
    assert sum(t.numel() for name, t in tensors.items() if "lora_" in name[-20:]) == 196_751_360
    save_file(tensors, path)


def measure(which: str, folder: str) -> dict[str, float]:
    """Seconds of wall time and of CPU time, and megabytes beyond what ComfyUI with a model holds."""
    load_comfyui()
    from comfy.cli_args import args

    args.cpu = True
    args.base_directory = folder
    import comfy.lora
    import comfy.model_patcher
    import comfy.supported_models
    import nodes

    config = comfy.supported_models.SDXL(SDXL)
    config.set_inference_dtype(torch.float16, None)
    cpu = torch.device("cpu")
    model = comfy.model_patcher.ModelPatcher(config.get_model({}, device=torch.device("meta")), cpu, cpu)
    if which == "core":
        loader = nodes.LoraLoader()

        def load(strength):
            return loader.load_lora(model, None, LORA, strength, 0)[0]
    else:
        from lcm_kit.lora_merge.disk.digests import sha256_of
        from lcm_kit.nodes.loading import LCMLoader

        # What a server before has hashed is kept for the next one.
        (Path(folder) / "user" / "lcm_kit" / "sha256.json").unlink(missing_ok=True)
        if which == KNOWN:
            sha256_of(Path(folder) / "models" / "loras" / LORA)

        def load(strength):
            return LCMLoader.execute(model, LORA, strength, "refuse").result[0]

    found: dict[str, float] = {}
    collecting = Collecting()
    with torch.inference_mode():
        before = peak_memory(reset=True)
        start, cpu_start = time.perf_counter(), time.process_time()
        patched = load(1.0)
        found["node"], found["node, CPU"] = time.perf_counter() - start, time.process_time() - cpu_start
        found["collecting, CPU"] = collecting.seconds
        found["memory after node"] = (peak_memory() - before) / 1e6
        again = time.perf_counter()
        load(0.8)
        found["node again"] = time.perf_counter() - again
        if which == KNOWN:
            return found
        # One weight at a time, float32 as ComfyUI does it on the way to the device.
        rest, cpu_rest = time.perf_counter(), time.process_time()
        for key, patches in patched.patches.items():
            shape = comfy.utils.get_attr(model.model, key).shape
            comfy.lora.calculate_weight(patches, torch.zeros(shape), key)
        found["patched"] = found["node"] + time.perf_counter() - rest
        found["patched, CPU"] = found["node, CPU"] + time.process_time() - cpu_rest
        found["memory after patching"] = (peak_memory() - before) / 1e6
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--measure", nargs=2, metavar=("WHICH", "FOLDER"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.measure:
        print(json.dumps(measure(*options.measure)))
        return
    load_comfyui()
    results: dict[str, list[dict[str, float]]] = {"core": [], "LCM Kit": [], KNOWN: []}
    with tempfile.TemporaryDirectory() as folder:
        loras = Path(folder) / "models" / "loras"
        loras.mkdir(parents=True)
        make(loras / LORA)
        size = (loras / LORA).stat().st_size / 1e6
        for _ in range(options.rounds):
            for which, found in results.items():
                found.append(fresh(__file__, "--measure", which, folder))
    rows = []
    for what in results["core"][0]:
        core, ours, *known = (min(found.get(what, math.nan) for found in results[which]) for which in results)
        unit = "MB" if "memory" in what else "s"
        cells = [f"{value:.3g} {unit}" for value in (core, ours, *known)]
        rows.append([what, *cells, *(f"{value / core:.2f}" for value in (ours, *known))])
    print(
        markdown([f"the smallest of {options.rounds}", "core LoraLoader", *list(results)[1:], "ratio", "ratio"], rows)
    )
    memory = min(found["memory after node"] for found in results["LCM Kit"])
    print(f"\nThe file has {size:.1f} MB; LCM Kit's peak memory is {memory / size:.2f} times that.")


if __name__ == "__main__":
    main()
