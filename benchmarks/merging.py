"""Merging full-size LoRAs: time, memory and error, against reading and writing alone and against other tools.

    .venv/bin/python benchmarks/merging.py [--bases SD1.5 SDXL] [--only ROW ...] [--peft-svd all]
        [--kohya PATH/sd-scripts] [--merger PATH/pack ...]

LoRAs with the names and shapes of the LCM-LoRAs for SD1.5 (67,252,224 numbers) and SDXL (196,751,360), rank 64, and an
attention-only style of rank 32, with falling spectra, are made in a temporary folder. Every job runs in a fresh process,
`--repeat` times in turn with the floor, and the least wall and processor time count, since other work on the machine only adds;
what takes minutes runs once. "in pairs" is the smallest and the largest of the ratios of a run's CPU to that of the floor just
before it. Imports do not count, garbage collections do.
The floor reads both inputs and writes a file as large as the exact merge, fsync included, as `save` does.
The error is that of the written file against 0.8 * style + LCM, all modules together, float64 on the factors.
--only runs the rows with these names, `*` for any letters: --only "LCM Kit, rank 64" "kohya*". The floor always runs.
--peft-svd adds PEFT's svd (full_matrices=False), of all modules, or of one of each shape times their number: minutes.
--kohya adds the merge scripts of a checkout of kohya's sd-scripts, run by --kohya-python: its requirements have to be there.
--merger adds packs of ComfyUI nodes, of which it knows LoRA Power-Merger (larsupb), LoRA Optimizer (ethanfel) and LoRA-Merger
(laksjdjf), run by --merger-python in the ComfyUI at COMFYUI_PATH.
Rows with svd take 10 to 30 minutes for SD1.5, kohya's needs 7 GB; take them with --workers 1 and `--only "*svd*" "*rank 64"`.
Prints Markdown tables, as kept in benchmarks/RESULTS.md.
"""

import argparse
import json
import re
import resource
import shutil
import subprocess
import sys
import tempfile
import time
from fnmatch import fnmatchcase
from pathlib import Path

from setting import ROOT, comfyui_path, load_lcm_kit, markdown, peak_memory

import merging_peers as peers
from merging_pair import PARAMETERS, STRENGTHS, error_of, modules_of, write, write_pair

RANK = "LCM Kit, rank 64"
OURS = {
    "exact": {},
    "rank 64": {"rank": 64},
    "rank 64, balanced": {"rank": 64, "balanced": True},
    "retain 90 %": {"retain": 0.9},
    "keep 90 %": {"keep": 0.9},
    "half the size": {},  # max_mb, filled in by the size of the inputs
    "ties": {"method": "ties"},
    "dare": {"method": "dare"},
    "tsv": {"method": "tsv"},
    "mu 1": {"mu": 1.0, "protect": 1},
}


# ---- jobs, each in a process of its own: import what they need, and return the work to be timed


def floor(folder, out, _):
    """Reads both inputs, and writes as much as the exact merge takes."""
    import torch
    from safetensors.torch import load_file

    def work():
        lcm, style = (load_file(folder / f"{name}.safetensors") for name in ("lcm", "style"))
        result = {}
        for key, tensor in lcm.items():
            if key in style and not key.endswith(".alpha"):
                along = 1 if ".lora_up." in key else 0
                result[key] = torch.cat([tensor, style[key]], dim=along)
            else:
                result[key] = tensor.clone()  # read it: the file is only mapped so far
        write(result, out)

    return work


def hashed(folder, out, _):
    """sha256 of both inputs: what the command adds, and of as many bytes as the exact merge writes, whose file states its hash."""
    from lcm_kit.lora_merge.disk.digests import sha256_of

    def work():
        for name in STRENGTHS:
            sha256_of(folder / f"{name}.safetensors")

    return work


def ours(folder, out, options):
    import torch

    from lcm_kit.lora_merge import load, merge, save

    choices = dict(OURS[options["name"]])
    if options["name"] == "half the size":
        choices["max_mb"] = sum((folder / f"{name}.safetensors").stat().st_size for name in STRENGTHS) / 2e6

    def work():
        inputs = [(load(folder / f"{name}.safetensors"), strength) for name, strength in STRENGTHS.items()]
        save(merge(inputs, workers=options["workers"], out_dtype=torch.float16, **choices), out)

    return work


def command(folder, out, options):
    """What a user types, after its imports: the inputs hashed for the provenance, the report made."""
    import contextlib
    import io

    import lcm_kit.lora_merge.cli.merge  # noqa: F401  main imports it when it is called
    from lcm_kit.lora_merge.__main__ import main

    def work():
        with contextlib.redirect_stdout(io.StringIO()):
            assert main([*_typed(folder, out), "--workers", str(options["workers"])]) == 0

    return work


def whole_command(folder, out, options):
    """The same in a process of its own, the interpreter's start and its imports included."""

    def work():
        arguments = [*_typed(folder, out), "--workers", str(options["workers"])]
        subprocess.run([sys.executable, "-m", "lora_merge", *arguments], cwd=ROOT, capture_output=True, check=True)

    return work


def _typed(folder, out):
    return [
        "merge",
        *(f"{folder / name}.safetensors:{strength}" for name, strength in STRENGTHS.items()),
        "-o",
        str(out),
    ]


def compared(folder, out, options):
    from lcm_kit.lora_merge import load
    from lcm_kit.lora_merge.comparing.compare import compare

    def work():
        compare([(load(folder / f"{name}.safetensors"), strength) for name, strength in STRENGTHS.items()])

    return work


JOBS = {
    "floor": floor,
    "hashed": hashed,
    "ours": ours,
    "command": command,
    "whole": whole_command,
    "compare": compared,
} | peers.JOBS


def job(name, folder, out, options):
    """Runs in the fresh process."""
    import safetensors.torch  # noqa: F401
    import torch

    torch.set_num_threads(options["workers"])
    work = JOBS[name](folder, out, options)
    wall, cpu = time.perf_counter(), processor_time()
    facts = work()
    result = {"wall": time.perf_counter() - wall, "cpu": processor_time() - cpu, "facts": facts}
    print(json.dumps(result | {"rss": peak_memory() / 1e9}))


def processor_time():
    """Of this process and of those that it has waited for."""
    children = resource.getrusage(resource.RUSAGE_CHILDREN)
    return time.process_time() + children.ru_utime + children.ru_stime


# ---- the table


def run(name, folder, out, options):
    """What a job says of itself, run in a fresh process; the last line of its error, and where, if there is one."""
    out.unlink(missing_ok=True)
    python = options.get("python") or sys.executable
    command = [python, __file__, "--job", name, str(folder), str(out), json.dumps(options)]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        message = (done.stderr.strip().splitlines() or ["no message"])[-1]
        places = re.findall(r'File "(.+)", line (\d+)', done.stderr)
        inside = [f"{Path(file).name}:{line}" for file, line in places if file.startswith(options.get("path", "/"))]
        return {"trouble": f"{message} ({inside[-1]})" if inside else message}
    return json.loads(done.stdout.splitlines()[-1])


def least(runs):
    """The least times and the largest memory of several runs."""
    if troubled := [found for found in runs if "trouble" in found]:
        return troubled[0]
    return (
        runs[0]
        | {key: min(found[key] for found in runs) for key in ("wall", "cpu")}
        | {"rss": max(found["rss"] for found in runs)}
    )


def spread(runs, floors):
    """The ratios of each run's processor time to that of the floor run beside it, the smallest and the largest."""
    ratios = [found["cpu"] / floor["cpu"] for found, floor in zip(runs, floors, strict=True)]
    return f"{min(ratios):.2f} to {max(ratios):.2f}"


def chosen(base, arguments):
    """(words, job, options) of each row that was asked for."""
    rows = [(f"LCM Kit, {name}", "ours", {"name": name}) for name in OURS]
    rows[:0] = [("sha256 of both inputs", "hashed", {})]
    rows[2:2] = [
        ("LCM Kit, exact, command after import", "command", {}),
        ("LCM Kit, exact, command whole", "whole", {}),
    ]
    rows += [("LCM Kit, compare", "compare", {}), *peers.rows(arguments)]
    common = {"workers": arguments.workers, "base": base, "comfyui": arguments.comfyui}
    found = [
        (words, name, common | options)
        for words, name, options in rows
        if any(fnmatchcase(words, pattern) for pattern in arguments.only)
    ]
    if not found:
        raise SystemExit(f"no row is named so; there are: {'; '.join(words for words, _, _ in rows)}")
    return found


def table(base, arguments):
    jobs = chosen(base, arguments)
    print(f"\n{base}: {PARAMETERS[base]:,} numbers in the LCM-LoRA; threads: {arguments.workers}.")
    print(f"{time.strftime('%Y-%m-%d')}: {peers.versions(arguments)}.\n")
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        write_pair(folder, base)
        out = folder / "out.safetensors"
        floors, rows = [], {}
        for words, name, options in jobs:
            runs = []
            for _ in range(1 if options.get("once") else arguments.repeat):
                # In turn, so that both see the same load of the machine.
                floors.append(run("floor", folder, out, options | {"python": None}))
                runs.append(run(name, folder, out, options))
            found = rows[words] = least(runs)
            if "trouble" not in found:
                found["pairs"] = spread(runs, floors[-len(runs) :])
                measure_error(words, found, out, folder)
            print(f"{words}: {found}", file=sys.stderr)
    base_line = least(floors)
    cells = (row(words, found, base_line) for words, found in {"read and write only": base_line, **rows}.items())
    columns = ["job", "wall, s", "CPU, s", "wall / floor", "CPU / floor", "in pairs", "peak memory, GB", "error"]
    print(markdown(columns, cells), "\n")
    for words, _, options in jobs:
        if options.get("full_svd") and "cpu" in rows[words] and "cpu" in rows.get(RANK, {}):
            print(f"{words} takes {rows[words]['cpu'] / rows[RANK]['cpu']:.0f} times the CPU time of {RANK}.")


def measure_error(words, found, out, folder):
    """Adds the error of what was written; of an extrapolated job, also LCM Kit's on the same modules."""
    from safetensors import safe_open

    of_rank = folder / "of rank 64.safetensors"
    if not out.exists():
        return
    if words == RANK:
        shutil.copy(out, of_rank)
    only = None
    if found["facts"]:
        found |= {key: found["facts"][key] for key in ("wall", "cpu")}
        with safe_open(out, framework="pt") as file:
            only = modules_of(file.keys())
        if of_rank.exists():
            found["ours"] = error_of(of_rank, folder, only)
    found["error"] = error_of(out, folder, only)


def row(words, found, base_line):
    if "trouble" in found:
        return [words, *"------", found["trouble"]]
    error = f"{found['error']:.2g}" if "error" in found else ""
    if facts := found["facts"]:
        words += f" (from {facts['done']} of {facts['of']} modules)"
        error += " of these" + (f", where LCM Kit's is {found['ours']:.2g}" if "ours" in found else "")
    ratios = [f"{found[key] / base_line[key]:.2f}" for key in ("wall", "cpu")]
    seconds = [f"{found[key]:.2f}" for key in ("wall", "cpu")]
    return [words, *seconds, *ratios, found.get("pairs", ""), f"{found['rss']:.2f}", error]


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--bases", nargs="+", choices=PARAMETERS, default=list(PARAMETERS))
    parser.add_argument("--only", nargs="+", metavar="ROW", default=["*"], help="rows by name, * for any letters")
    parser.add_argument("--repeat", type=int, default=3)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--peft-svd", choices=["all", "shapes"], help="PEFT's svd too, the second extrapolated")
    parser.add_argument("--kohya", metavar="PATH", help="a checkout of kohya-ss/sd-scripts")
    parser.add_argument("--kohya-python", metavar="PYTHON", help="with its requirements; this one by default")
    parser.add_argument("--merger", metavar="PATH", nargs="+", default=[], help="checkouts of ComfyUI packs")
    parser.add_argument("--merger-python", metavar="PYTHON", help="with ComfyUI's and theirs; this one by default")
    parser.add_argument("--job", nargs=4, metavar=("NAME", "FOLDER", "OUT", "OPTIONS"), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    # Absolute, since a pack or sd-scripts may import by it from elsewhere.
    arguments.kohya = arguments.kohya and str(Path(arguments.kohya).resolve())
    arguments.merger = [str(Path(path).resolve()) for path in arguments.merger]
    arguments.comfyui = comfyui_path()
    load_lcm_kit()
    if arguments.job:
        name, folder, out, options = arguments.job
        job(name, Path(folder), Path(out), json.loads(options))
    else:
        for base in arguments.bases:
            table(base, arguments)


if __name__ == "__main__":
    main()
