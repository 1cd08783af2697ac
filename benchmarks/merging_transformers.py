"""Merging and compacting LoRAs of the size that transformers have: memory against the larger input, and time against the floor.

    .venv/bin/python benchmarks/merging_transformers.py [--pairs "Wan 14B, 64 + 32" ...] [--jobs exact ...]
        [--folder PATH] [--workers N]

With COMFYUI_PATH=.comfyui in front also the rows of the graph: the nodes Load LoRA, Load LoRA, Merge LoRAs (exact or to rank 64), or
Load LoRA and Resize LoRA to half the rank, and then Save LoRA, or Apply LoRA on ComfyUI's own class of the model, which has no
memory for its weights; for each of these the factors are then asked for, as when the model is loaded. All outputs stay, as
ComfyUI keeps them.

LoRAs with the names, spellings and shapes of published ones: lightx2v's for Wan 14B (400 modules, diffusion_model., no alpha)
and Qwen-Image-Lightning (720 modules, bare names, with alpha), in bfloat16 or float16, with falling spectra, are made in a
temporary folder; the largest pair takes 6 GB of disk. Every job runs in a fresh process.
Memory is the most that belongs to the process alone (RssAnon of Linux, every 10 ms), less what it had before the work began:
mapped pages of files, which the system can take back at any time, are not in it, so that a file that is read and not
mapped is. Ratios are to the larger input's file. The floor reads both inputs and writes a file as large as the exact merge.
Prints a Markdown table, as kept in benchmarks/RESULTS.md.
"""

import argparse
import json
import os
import tempfile
import threading
import time
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

from setting import fresh, load_comfyui, load_lcm_kit, markdown

WAN, QWEN = "Wan 2.1/2.2 14B", "Qwen-Image"
# Pair -> base, (rank, dtype) of each input; the style changes what trainers change by default, which is the same modules.
PAIRS: Mapping[str, tuple[str, tuple[int, str], tuple[int, str]]] = {
    "Wan 14B, 64 + 32": (WAN, (64, "bf16"), (32, "fp16")),
    "Wan 14B, 128 + 128": (WAN, (128, "bf16"), (128, "bf16")),
    "Qwen-Image, 64 + 32": (QWEN, (64, "bf16"), (32, "bf16")),
    "Qwen-Image, 64 fp32 + 128": (QWEN, (64, "fp32"), (128, "fp16")),
}
JOBS = ("floor", "exact", "rank 64", "retain 90 %", "compact to half the rank", "graph, save", "graph, apply",
        "graph, rank 64, apply", "graph, compact, apply")  # fmt: skip
GRAPH = "graph, "
# What ComfyUI finds such a model by, in its checkpoint.
CONFIGS: Mapping[str, dict[str, Any]] = {
    WAN: {"image_model": "wan2.1", "model_type": "t2v", "dim": 5120, "ffn_dim": 13824, "num_layers": 40, "num_heads": 40,
          "in_dim": 16, "out_dim": 16, "patch_size": (1, 2, 2), "freq_dim": 256, "window_size": (-1, -1), "qk_norm": True,
          "cross_attn_norm": True, "eps": 1e-6},
    QWEN: {"image_model": "qwen_image", "in_channels": 64, "num_layers": 60},
}  # fmt: skip
CLASSES = {WAN: "WAN21_T2V", QWEN: "QwenImage"}
# What the modules' names have dots for, and underscores.
_WAN_NAMES = {name: name.replace("_attn_", "_attn.").replace("ffn_", "ffn.") for name in (
    *(f"{kind}_attn_{one}" for kind in ("self", "cross") for one in "qkvo"), "ffn_0", "ffn_2")}  # fmt: skip


def names(base: str) -> dict[str, tuple[int, ...]]:
    """Module as the files spell it -> shape of its weight."""
    from lcm_kit.lora_merge.recognise.transformers import BY_NAME

    (stack, blocks), *_ = BY_NAME[base].stacks.items()
    found = {}
    for number, block in enumerate(blocks):
        for module, shape in block.items():
            if base == WAN:
                found[f"diffusion_model.{stack}.{number}.{_WAN_NAMES[module]}"] = shape
            elif "_mod_" not in module:  # Lightning leaves the modulations alone
                dotted = module.replace("_mlp_net_", "_mlp.net.").replace("attn_", "attn.", 1)
                found[f"{stack}.{number}.{dotted.replace('_0_proj', '.0.proj').replace('to_out_0', 'to_out.0')}"] = (
                    shape
                )
    return found


def write(path: Path, base: str, rank: int, dtype: str, seed: int) -> int:
    """Bytes of a new LoRA file. Norms fall by 3 % from one direction to the next."""
    import torch
    from safetensors.torch import save_file

    kind = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}[dtype]
    generator, tensors = torch.Generator().manual_seed(seed), {}
    fall = 0.97 ** (torch.arange(rank) / 2)
    for name, (out, into) in names(base).items():
        up = torch.randn(out, rank, generator=generator) * out**-0.5 * fall
        down = torch.randn(rank, into, generator=generator) * into**-0.5 * fall[:, None]
        tensors[f"{name}.lora_up.weight"], tensors[f"{name}.lora_down.weight"] = up.to(kind), down.to(kind)
        if base == QWEN:
            tensors[f"{name}.alpha"] = torch.tensor(float(rank))
    save_file(tensors, path)
    return path.stat().st_size


# ---- jobs, each in a process of its own


def floor(folder: Path, out: Path) -> None:
    import torch
    from safetensors.torch import load_file, save_file

    one, two = (load_file(folder / f"{name}.safetensors") for name in ("one", "two"))
    result = {}
    for key, tensor in one.items():
        along = 1 if ".lora_up." in key else 0
        result[key] = tensor if key.endswith(".alpha") else torch.cat([tensor, two[key].to(tensor.dtype)], dim=along)
    save_file(result, out)
    with open(out, "rb+") as file:
        os.fsync(file.fileno())


def ours(folder: Path, out: Path, name: str, workers: int) -> None:
    import torch

    from lcm_kit.lora_merge import load, merge, save

    first = load(folder / "one.safetensors")
    options: dict[str, Any] = {
        "exact": {},
        "rank 64": {"rank": 64},
        "retain 90 %": {"retain": 0.9},
        "compact to half the rank": {"rank": max(layer.rank for layer in first.modules.values()) // 2},
    }[name]
    inputs = [(first, 1.0)] if name.startswith("compact") else [(first, 1.0), (load(folder / "two.safetensors"), 0.8)]
    save(merge(inputs, workers=workers, out_dtype=torch.bfloat16, **options), out, dtype=torch.bfloat16)


def model_of(base: str):
    """ComfyUI's MODEL, on the device "meta"."""
    import comfy.model_patcher
    import comfy.supported_models
    import torch

    config = getattr(comfy.supported_models, CLASSES[base])(dict(CONFIGS[base]))
    config.set_inference_dtype(torch.bfloat16, None)
    cpu = torch.device("cpu")
    return comfy.model_patcher.ModelPatcher(config.get_model({}, "", device=torch.device("meta")), cpu, cpu)


def in_graph(then: str, base: str) -> Callable[[], None]:
    """The nodes one after another; their outputs stay until the process ends."""
    import torch

    from lcm_kit.nodes.loading import ApplyLoRA, LoadLoRA
    from lcm_kit.nodes.merging import MergeLoRA, ResizeLoRA, SaveLoRA

    model = model_of(base) if then.endswith("apply") else None
    outputs = []

    def made() -> tuple:
        if then.startswith("compact"):
            whole = LoadLoRA.execute("one.safetensors").result
            outputs.append(whole)
            rank = next(piece.shape[0] for key, piece in whole[0].pieces.items() if ".lora_down." in key) // 2
            return ResizeLoRA.execute(whole[0], {"size": "rank", "rank": rank}, "bf16").result
        outputs.extend(LoadLoRA.execute(f"{name}.safetensors").result for name in ("one", "two"))
        slots = {"lora_1": outputs[0][0], "strength_1": 1.0, "lora_2": outputs[1][0], "strength_2": 0.8}
        size = {"size": "rank", "rank": 64} if then.startswith("rank") else {"size": "exact"}
        return MergeLoRA.execute(method={"method": "linear"}, size=size, **slots).result

    @torch.inference_mode()
    def run() -> None:
        outputs.append(made())
        if then == "save":
            outputs.append(SaveLoRA.execute(outputs[-1][0], "out", "bf16", "auto", "exact name").result)
        else:
            outputs.append(ApplyLoRA.execute(model, outputs[-1][0], 1.0, 1.0).result)
            patches = outputs[-1][0].patches
            assert len(patches) == len(names(base))
            for entries in patches.values():
                assert all(entry[1].weights[0].numel() for entry in entries)

    return run


def own_memory() -> float:
    """Bytes that belong to this process alone and to no file."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024.0 * int(next(line for line in lines if line.startswith("RssAnon:")).split()[1])


def watched(work: Callable[[], None]) -> dict[str, float]:
    """Seconds of a piece of work, and the most memory that it took beyond what there was before."""
    before, most, done = own_memory(), 0.0, threading.Event()

    def watch() -> None:
        nonlocal most
        while not done.wait(0.01):
            most = max(most, own_memory())

    watcher = threading.Thread(target=watch)
    watcher.start()
    wall, cpu = time.perf_counter(), time.process_time()
    work()
    found = {"wall": time.perf_counter() - wall, "cpu": time.process_time() - cpu}
    done.set()
    watcher.join()
    return found | {"memory": most - before}


def job(name: str, base: str, folder: Path, workers: int) -> None:
    """Runs in the fresh process."""
    if name.startswith(GRAPH):
        load_comfyui(home=str(folder.parents[1]), cpu=True)
    else:
        load_lcm_kit()
    import safetensors.torch  # noqa: F401
    import torch

    import lcm_kit.lora_merge  # noqa: F401

    torch.set_num_threads(workers)
    out = folder / "out.safetensors"
    out.unlink(missing_ok=True)
    if name.startswith(GRAPH):
        work = in_graph(name.removeprefix(GRAPH), base)
    elif name == "floor":
        work = partial(floor, folder, out)
    else:
        work = partial(ours, folder, out, name, workers)
    result = watched(work)
    print(json.dumps(result | {"bytes": out.stat().st_size if out.exists() else 0}))


# ---- the table


def rows(name: str, arguments: argparse.Namespace) -> list[list[str]]:
    base, first, second = PAIRS[name]
    with tempfile.TemporaryDirectory(dir=arguments.folder) as scratch:
        folder = Path(scratch) / "models" / "loras"  # as in a ComfyUI
        folder.mkdir(parents=True)
        sizes = [write(folder / f"{file}.safetensors", base, *one, seed) for seed, (file, one) in
                 enumerate((("one", first), ("two", second)))]  # fmt: skip
        larger, found = max(sizes), []
        for words in dict.fromkeys(("floor", *arguments.jobs)):
            told = fresh(
                __file__, "--job", words, "--pairs", name, "--folder", str(folder), "--workers", str(arguments.workers)
            )
            floored = told if words == "floor" else floored  # noqa: F821, the first one is
            found.append([
                name, f"{sizes[0] / 1e6:.0f} + {sizes[1] / 1e6:.0f}", words, f"{told['memory'] / larger:.2f}",
                f"{told['bytes'] / 1e6:.0f}", f"{told['wall']:.1f}", f"{told['cpu']:.1f}",
                f"{told['cpu'] / floored['cpu']:.1f}",
            ])  # fmt: skip
        return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--pairs", nargs="+", choices=list(PAIRS), default=list(PAIRS))
    parser.add_argument(
        "--jobs",
        nargs="+",
        choices=JOBS,
        default=[name for name in JOBS if os.environ.get("COMFYUI_PATH") or not name.startswith(GRAPH)],
    )
    parser.add_argument("--folder", help="where the files are made; the system's folder for temporary ones by default")
    parser.add_argument("--workers", type=int, default=os.cpu_count())
    parser.add_argument("--job", choices=JOBS, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.job:
        job(arguments.job, PAIRS[arguments.pairs[0]][0], Path(arguments.folder), arguments.workers)
        return
    load_lcm_kit()
    columns = ["pair", "inputs, MB", "job", "memory / larger input", "result, MB", "seconds", "CPU, s", "CPU / floor's"]
    print(markdown(columns, [row for name in arguments.pairs for row in rows(name, arguments)]))


if __name__ == "__main__":
    main()
