"""Time and memory to compare two LoRAs, in units of reading both and writing their exact merge.

    .venv/bin/python benchmarks/comparing.py [--rounds 3] [--bases SD1.5 SDXL] [--workers 2]

The LoRAs have the official LCM-LoRAs' names, shapes and sizes (67,252,224 and 196,751,360 values at rank 64) and those of a
rank-32 style on attention, made on the fly with a decaying spectrum. Every measurement is a process of its own, all in
turn; the smallest of all rounds counts. "read, write" copies the two files into one, as large as their exact merge;
"merge" reads them and ends with the merged file on the disk, "compare" with all figures; "report" adds text, JSON and the
picture. Prints Markdown, as kept in benchmarks/RESULTS.md.
"""

import argparse
import json
import os
import tempfile
import time
from pathlib import Path

from setting import fresh, load_lcm_kit, markdown, peak_memory

import torch

STYLE = ("attn", "ff_net", "proj_in", "proj_out")
VALUES = {"SD1.5": 67_252_224, "SDXL": 196_751_360}


def make(folder: Path, base: str) -> None:
    from safetensors.torch import save_file

    from lcm_kit.lora_merge.recognise.base_models import BY_NAME, kind_of

    for name, rank, alpha, kinds in (("lcm", 64, 8.0, ("",)), ("style", 32, 16.0, STYLE)):
        generator = torch.Generator().manual_seed(rank)
        tensors = {}
        for module, shape in BY_NAME[base].modules.items():
            kind = kind_of(module)
            if kind is None or not kind.startswith(kinds):
                continue
            key, ones = f"lora_unet_{module}", (1,) * len(shape[2:])
            falling = 0.92 ** torch.arange(rank).reshape(-1, 1, *ones)
            down = torch.randn(rank, *shape[1:], generator=generator) * falling
            tensors[f"{key}.alpha"] = torch.tensor(alpha, dtype=torch.float16)
            tensors[f"{key}.lora_down.weight"] = (down / 8).half()
            tensors[f"{key}.lora_up.weight"] = (torch.randn(shape[0], rank, *ones, generator=generator) / 8).half()
        if name == "lcm":
            assert sum(t.numel() for key, t in tensors.items() if not key.endswith("alpha")) == VALUES[base]
        save_file(tensors, folder / f"{name}.safetensors")


def measure(which: str, folder: Path, workers: int) -> dict[str, float]:
    """Seconds of wall time and of CPU time from the first byte read, and peak megabytes of the process."""
    load_lcm_kit()
    from safetensors.torch import load_file, save_file

    from lcm_kit.lora_merge import load, merge, save
    from lcm_kit.lora_merge.comparing.compare import compare
    from lcm_kit.lora_merge.comparing.picture import draw
    from lcm_kit.lora_merge.comparing.report import as_json, as_text

    torch.set_num_threads(workers)
    started, spent = time.monotonic(), time.process_time()
    if which == "read, write":  # without a look at what it is; as much is written as an exact merge takes
        tensors = {
            f"{name}.{key}": value
            for name in ("style", "lcm")
            for key, value in load_file(folder / f"{name}.safetensors").items()
        }
        save_file(tensors, folder / "copied.safetensors")
        with open(folder / "copied.safetensors", "rb+") as file:
            os.fsync(file.fileno())
        return _spent(started, spent)
    inputs = [(load(folder / "style.safetensors"), 0.8), (load(folder / "lcm.safetensors"), 1.0)]
    if which == "merge":
        save(merge(inputs, out_dtype=torch.float16), folder / "merged.safetensors", overwrite=True)
    else:
        found = compare(inputs)
        if which == "report":
            as_text(found, 64), as_json(found, 64), draw(found, 64)
    return _spent(started, spent)


def _spent(started: float, spent: float) -> dict[str, float]:
    return {
        "wall": time.monotonic() - started,
        "cpu": time.process_time() - spent,
        "memory": peak_memory() / 1e6,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--bases", nargs="+", choices=VALUES, default=list(VALUES))
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--measure", nargs=2, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.measure:
        print(json.dumps(measure(options.measure[0], Path(options.measure[1]), options.workers)))
        return
    load_lcm_kit()
    print(f"torch {torch.__version__}, {options.workers} workers, smallest of {options.rounds} rounds\n")
    rows = []
    for base in options.bases:
        with tempfile.TemporaryDirectory() as folder:
            make(Path(folder), base)
            best: dict[str, dict[str, float]] = {}
            for _ in range(options.rounds):
                for which in ("read, write", "merge", "compare", "report"):
                    found = fresh(__file__, "--workers", str(options.workers), "--measure", which, folder)
                    known = best.setdefault(which, found)
                    best[which] = {key: min(known[key], value) for key, value in found.items()}
            for which, row in best.items():
                ratio = [row[key] / best["read, write"][key] for key in ("wall", "cpu")]
                cells = [f"{value:.2f}" for value in (row["wall"], row["cpu"], *ratio)]
                rows.append([base, which, *cells[:2], f"{row['memory']:.0f}", *cells[2:]])
    print(markdown(["pair", "what", "wall s", "CPU s", "peak MB", "wall, in reads and writes", "CPU"], rows))


if __name__ == "__main__":
    main()
