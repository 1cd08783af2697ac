"""Merging full-size LoRAs: time, memory and error, against reading and writing alone and against other tools.

    .venv/bin/python benchmarks/merging.py [--bases SD1.5 SDXL] [--svd] [--kohya PATH/sd-scripts]

LoRAs with the names and shapes of the LCM-LoRAs for SD1.5 (67,252,224 numbers) and SDXL (196,751,360), rank 64, and an
attention-only style of rank 32, with falling spectra, are made in a temporary folder. Every job runs in a fresh process,
`--repeat` times in turn with the floor, and the least wall and processor time count, since other work on the machine only adds.
The floor reads both inputs and writes a file as large as the exact merge, fsync included, as `save` does.
The error is that of the written file against 0.8 * style + LCM, all modules together, float64 on the factors.
--svd adds PEFT's svd (full_matrices=False), one module of each shape, times the number of such modules: minutes.
--kohya runs the merge scripts of a checkout of kohya's sd-scripts in this Python: its requirements have to be there.
Prints Markdown tables, as kept in benchmarks/RESULTS.md.
"""

import argparse
import json
import resource
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

STRENGTH = 0.8
PARAMETERS = {"SD1.5": 67_252_224, "SDXL": 196_751_360}
KINDS_OF_STYLE = {f"attn{n}_to_{what}" for n in (1, 2) for what in ("q", "k", "v", "out_0")}
OURS = {
    "exact": {},
    "rank 64": {"rank": 64},
    "rank 64, balanced": {"rank": 64, "balanced": True},
    "retain 90 %": {"retain": 0.9},
    "half the size": {},  # max_mb, filled in by the size of the inputs
    "ties": {"method": "ties"},
    "dare": {"method": "dare"},
    "tsv": {"method": "tsv"},
    "mu 1": {"mu": 1.0, "protect": 1},
}


# ---- the LoRAs


def write_inputs(folder, base):
    import torch
    from lora_merge.bases import BY_NAME, kind_of
    from safetensors.torch import save_file

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


# ---- jobs, each in a process of its own: () -> path of what it wrote, or None


def floor(folder, out, _):
    """Reads both inputs, and writes as much as the exact merge takes."""
    import torch
    from safetensors.torch import load_file

    read = [load_file(folder / f"{name}.safetensors") for name in ("lcm", "style")]
    style = {key: tensor for key, tensor in read[1].items()}
    result = {}
    for key, tensor in read[0].items():
        if key in style and not key.endswith(".alpha"):
            along = 1 if ".lora_up." in key else 0
            result[key] = torch.cat([tensor, style[key]], dim=along)
        else:
            result[key] = tensor.clone()  # read it: the file is only mapped so far
    write(result, out)


def write(tensors, out):
    import os

    from safetensors.torch import save_file

    save_file(tensors, out)
    with open(out, "rb+") as file:
        os.fsync(file.fileno())


def ours(folder, out, options):
    import torch
    from lora_merge import load, merge, save

    inputs = [(load(folder / "style.safetensors"), STRENGTH), (load(folder / "lcm.safetensors"), 1.0)]
    choices = dict(OURS[options["name"]])
    if options["name"] == "half the size":
        choices["max_mb"] = sum((folder / f"{name}.safetensors").stat().st_size for name in ("lcm", "style")) / 2e6
    save(merge(inputs, workers=options["workers"], out_dtype=torch.float16, **choices), out)


def compared(folder, out, options):
    from lora_merge import load
    from lora_merge.compare import compare

    compare([(load(folder / "style.safetensors"), STRENGTH), (load(folder / "lcm.safetensors"), 1.0)])


def peft(folder, out, options):
    """Both as adapters of one model of empty weights, then add_weighted_adapter; loading and saving count as well.

    svd: each module of another shape in a model of its own, and its seconds times the number of such modules.
    """
    from safetensors.torch import load_file

    files = {name: load_file(folder / f"{name}.safetensors") for name in ("style", "lcm")}
    kinds = _kinds(files)
    if options["method"] == "cat":
        modules = [module for alike in kinds.values() for module in alike]
        result, _ = _by_peft(files, modules, combination_type="cat")
        write(result, out)
        return None
    result, wall, cpu = {}, 0.0, 0.0
    for alike in kinds.values():
        merged, seconds = _by_peft(files, alike[:1], combination_type="svd", svd_rank=64, svd_full_matrices=False)
        result |= merged
        wall, cpu = wall + len(alike) * seconds[0], cpu + len(alike) * seconds[1]
    write(result, out)
    return {"wall": wall, "cpu": cpu, "done": len(kinds), "of": sum(map(len, kinds.values()))}


def _plain(module):
    # PEFT passes over modules with lora_ in their name.
    return module.removeprefix("lora_unet_")


def _kinds(files):
    """(shape of the weight, whether both LoRAs have it) -> the modules that are so."""
    kinds = {}
    for key, up in files["lcm"].items():
        module, _, part = key.partition(".")
        if part == "lora_up.weight":
            shape = (up.shape[0], *files["lcm"][f"{module}.lora_down.weight"].shape[1:])
            kinds.setdefault((shape, key in files["style"]), []).append(module)
    return kinds


_SHARED = "shared"


def _by_peft(files, modules, **how):
    """(kohya tensors of what add_weighted_adapter makes of these modules, its (wall, CPU) seconds)."""
    import peft as library
    import torch

    model = torch.nn.Module()
    for module in modules:
        out, inside, *kernel = (
            files["lcm"][f"{module}.lora_up.weight"].shape[:1] + files["lcm"][f"{module}.lora_down.weight"].shape[1:]
        )
        with torch.device("meta"):
            layer = torch.nn.Conv2d(inside, out, kernel) if kernel else torch.nn.Linear(inside, out)
        # Weights that take no memory: nothing here is run.
        layer.weight = torch.nn.Parameter(torch.zeros(()).expand(layer.weight.shape), requires_grad=False)
        layer.bias = None
        model.add_module(_plain(module), layer)
    # Both adapters need a module; with one adapter alone PEFT would take another road than for a whole model.
    model.add_module(_SHARED, torch.nn.Linear(96, 96, bias=False))
    wrapped = None
    for name in files:
        here = [module for module in modules if f"{module}.alpha" in files[name]]
        some = next(key.partition(".")[0] for key in files[name])
        rank, alpha = files[name][f"{some}.lora_up.weight"].shape[1], float(files[name][f"{some}.alpha"])
        targets = [_SHARED, *map(_plain, here)]
        config = library.LoraConfig(r=rank, lora_alpha=alpha, target_modules=targets)
        if wrapped is None:
            wrapped = library.get_peft_model(model, config, adapter_name=name)
        else:
            wrapped.add_adapter(name, config)
        for module in here:
            layer = getattr(model, _plain(module))
            layer.lora_A[name].weight.data = files[name][f"{module}.lora_down.weight"].float()
            layer.lora_B[name].weight.data = files[name][f"{module}.lora_up.weight"].float()
    strengths = [STRENGTH if name == "style" else 1.0 for name in files]
    wall, cpu = time.perf_counter(), time.process_time()
    wrapped.add_weighted_adapter(list(files), strengths, "merged", **how)
    seconds = time.perf_counter() - wall, time.process_time() - cpu
    result = {}
    for module in modules:
        layer = getattr(model, _plain(module))
        down, up = layer.lora_A["merged"].weight.data, layer.lora_B["merged"].weight.data * layer.scaling["merged"]
        result[f"{module}.lora_down.weight"] = down.half().contiguous()
        result[f"{module}.lora_up.weight"] = up.half().contiguous()
        result[f"{module}.alpha"] = torch.tensor(float(down.shape[0]))
    return result, seconds


def kohya(folder, out, options):
    """networks/sdxl_merge_lora.py --concat or networks/svd_merge_lora.py of a checkout."""
    script = "sdxl_merge_lora.py" if options["method"] == "concat" else "svd_merge_lora.py"
    more = ["--concat", "--shuffle"] if options["method"] == "concat" else ["--new_rank", "64", "--new_conv_rank", "64"]
    command = [sys.executable, str(Path(options["path"]) / "networks" / script), "--save_to", str(out)]
    command += ["--models", str(folder / "style.safetensors"), str(folder / "lcm.safetensors")]
    command += ["--ratios", str(STRENGTH), "1.0", "--save_precision", "fp16", *more]
    subprocess.run(command, check=True, cwd=options["path"], stdout=subprocess.DEVNULL)


JOBS = {"floor": floor, "ours": ours, "compare": compared, "peft": peft, "kohya": kohya}


def job(name, folder, out, options):
    """Runs in the fresh process; imports that every job needs anyway are not counted."""
    import lora_merge
    import safetensors.torch  # noqa: F401
    import torch

    assert lora_merge
    torch.set_num_threads(options["workers"])
    if name == "peft":
        import peft as library

        assert library
    wall, cpu = time.perf_counter(), _cpu()
    facts = JOBS[name](folder, out, options)
    result = {"wall": time.perf_counter() - wall, "cpu": _cpu() - cpu, "facts": facts}
    print(json.dumps(result | {"rss": _peak()}))


def _peak():
    """Peak memory in GB, of this process or of a child."""
    # ru_maxrss begins with the parent's memory at the time of the fork.
    lines = Path("/proc/self/status").read_text().splitlines()
    own = next(int(line.split()[1]) for line in lines if line.startswith("VmHWM"))
    children = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss
    return max(own, children) * 1024 / 1e9


def _cpu():
    return sum(sum(resource.getrusage(who)[:2]) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))


# ---- the table


def error_of(out, folder, only=None):
    """Relative Frobenius distance of a written file from the exact sum. only: modules that count, all by default."""
    import torch
    from safetensors.torch import load_file

    made, style, lcm = (load_file(path) for path in (out, folder / "style.safetensors", folder / "lcm.safetensors"))

    def factors(state, module, strength):
        up, down = (state[f"{module}.lora_{part}.weight"].double().flatten(1) for part in ("up", "down"))
        return up * (strength * float(state[f"{module}.alpha"]) / up.shape[1]), down

    def energy(terms):
        up, down = torch.cat([up for up, _ in terms], dim=1), torch.cat([down for _, down in terms], dim=0)
        # float64 Gram matrices: good to 1e-8 of the norm, where the smallest error here is 1e-5.
        return float(((up.T @ up) * (down @ down.T)).sum())

    lost = whole = 0.0
    for module in only or modules_of(made):
        exact = [factors(lcm, module, 1.0)]
        if f"{module}.alpha" in style:
            exact.append(factors(style, module, STRENGTH))
        up, down = factors(made, module, 1.0)
        lost += energy([*exact, (-up, down)])
        whole += energy(exact)
    return (lost / whole) ** 0.5


def modules_of(keys):
    return dict.fromkeys(key.partition(".")[0] for key in keys)


def run(name, folder, out, options):
    """What a job says of itself, run in a fresh process; the last line of its error if there is one."""
    out.unlink(missing_ok=True)
    command = [sys.executable, __file__, "--job", name, str(folder), str(out), json.dumps(options)]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        return {"trouble": (done.stderr.strip().splitlines() or ["no message"])[-1]}
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


def table(base, arguments):
    from safetensors import safe_open

    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        write_inputs(folder, base)
        out = folder / "out.safetensors"
        common = {"workers": arguments.workers}
        jobs = [(f"LCM Kit, {name}", "ours", common | {"name": name}) for name in OURS]
        jobs.append(("LCM Kit, compare", "compare", common))
        jobs.append(("PEFT cat", "peft", common | {"method": "cat"}))
        if arguments.kohya:
            jobs += [(f"kohya {method}", "kohya", common | {"method": method, "path": arguments.kohya})
                     for method in ("concat", "svd")]  # fmt: skip
        if arguments.svd:
            jobs.append(("PEFT svd, rank 64", "peft", common | {"method": "svd"}))
        print(f"\n{base}: {PARAMETERS[base]:,} numbers in the LCM-LoRA, {arguments.workers} threads.\n")
        print("| job | wall, s | CPU, s | wall / floor | CPU / floor | peak memory, GB | error |")
        print("| --- | --- | --- | --- | --- | --- | --- |")
        floors, rows = [], []
        for words, name, options in jobs:
            slow = name == "kohya" or (name == "peft" and options["method"] == "svd")
            runs = []
            for _ in range(1 if slow else arguments.repeat):
                # In turn, so that both see the same load of the machine.
                floors.append(run("floor", folder, out, common))
                runs.append(run(name, folder, out, options))
            found = least(runs)
            error = error_of(out, folder) if out.exists() and "trouble" not in found else None
            if words == "LCM Kit, rank 64":
                shutil.copy(out, folder / "of rank 64.safetensors")
            elif found.get("facts"):
                with safe_open(out, framework="pt") as file:
                    only = modules_of(file.keys())
                found |= {"ours": error_of(folder / "of rank 64.safetensors", folder, only)}
            rows.append((words, found | {"error": error}))
            print(f"{words}: done", file=sys.stderr)
        base_line = least(floors)
        for words, found in [("read and write only", base_line | {"error": None}), *rows]:
            print(row(words, found, base_line), flush=True)


def row(words, found, base_line):
    if "trouble" in found:
        return f"| {words} | - | - | - | - | - | {found['trouble']} |"
    error = "" if found["error"] is None else f"{found['error']:.2g}"
    if facts := found["facts"]:
        words += f" (from {facts['done']} of {facts['of']} modules)"
        found |= {"wall": facts["wall"], "cpu": facts["cpu"]}
        error += f" of these, where LCM Kit's is {found['ours']:.2g}"
    ratios = [f"{found[key] / base_line[key]:.2f}" for key in ("wall", "cpu")]
    return (
        f"| {words} | {found['wall']:.2f} | {found['cpu']:.2f} | {' | '.join(ratios)} | {found['rss']:.2f} | {error} |"
    )


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--bases", nargs="+", choices=PARAMETERS, default=list(PARAMETERS))
    parser.add_argument("--repeat", type=int, default=3)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--svd", action="store_true", help="PEFT's svd too, extrapolated: minutes")
    parser.add_argument("--kohya", metavar="PATH", help="a checkout of kohya-ss/sd-scripts")
    parser.add_argument("--job", nargs=4, metavar=("NAME", "FOLDER", "OUT", "OPTIONS"), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.job:
        name, folder, out, options = arguments.job
        job(name, Path(folder), Path(out), json.loads(options))
    else:
        for base in arguments.bases:
            table(base, arguments)


if __name__ == "__main__":
    main()
