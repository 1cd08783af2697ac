"""Other tools that merge LoRAs, for merging.py: PEFT, kohya's sd-scripts, and packs of ComfyUI nodes.

sd-scripts and packs are checkouts of whoever runs the benchmark, and run as they are. Each job here imports its tool and
returns the work to be timed: from the two files to the merged one. sd-scripts and the packs leave the merged file in the
page cache, the others fsync it.
"""

import importlib
import subprocess
import sys
import time
from pathlib import Path

from setting import load_lcm_kit

from merging_pair import STRENGTHS, write

RANK = 64

# ---- which there are


def rows(arguments):
    """(words, job, options) for what the command line asks for. once: takes minutes; full_svd: the slow road to a rank."""
    found = [("PEFT cat", "peft", {"method": "cat"})]
    if arguments.peft_svd:
        options = {"method": f"svd of {arguments.peft_svd}", "once": True, "full_svd": True}
        found.append((f"PEFT svd, rank {RANK}", "peft", options))
    if arguments.kohya:
        common = {"path": arguments.kohya, "python": arguments.kohya_python}
        found += [(f"kohya {method}", "kohya", common | {"method": method}) for method in ("merge", "concat")]
        found.append((f"kohya svd, rank {RANK}", "kohya", common | {"method": "svd", "once": True, "full_svd": True}))
    for path in arguments.merger:
        pack = _pack(path)
        common = {"path": path, "python": arguments.merger_python, "pack": pack}
        for mode, more in PACKS[pack]["modes"].items():
            found.append((f"{pack} {mode}", "comfyui", common | {"mode": mode} | more))
    return found


def versions(arguments):
    """What was measured, in words."""
    from importlib.metadata import version

    found = [f"{name} {version(name)}" for name in ("torch", "peft")]
    for name, path in [("sd-scripts", arguments.kohya), *((_pack(path), path) for path in arguments.merger)]:
        if path:
            log = subprocess.run(["git", "-C", path, "log", "-1", "--format=%h of %cs"], capture_output=True, text=True)
            found.append(f"{name} {log.stdout.strip() or 'of unknown version'}")
    return ", ".join(found)


# ---- PEFT


def peft(folder, out, options):
    """Both as adapters of one model of empty weights, then add_weighted_adapter; loading and saving count as well.

    svd of shapes: each module of another shape in a model of its own, and its seconds times the number of such modules.
    """
    import peft as library
    from safetensors.torch import load_file

    assert library
    how = {"combination_type": "svd", "svd_rank": RANK, "svd_full_matrices": False}

    def work():
        files = {name: load_file(folder / f"{name}.safetensors") for name in STRENGTHS}
        kinds = _kinds(files)
        modules = [module for alike in kinds.values() for module in alike]
        if options["method"] != "svd of shapes":
            result, _ = _by_peft(files, modules, **(how if "svd" in options["method"] else {"combination_type": "cat"}))
            write(result, out)
            return None
        result, wall, cpu = {}, 0.0, 0.0
        for alike in kinds.values():
            merged, seconds = _by_peft(files, alike[:1], **how)
            result |= merged
            wall, cpu = wall + len(alike) * seconds[0], cpu + len(alike) * seconds[1]
        write(result, out)
        return {"wall": wall, "cpu": cpu, "done": len(kinds), "of": len(modules)}

    return work


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
    wall, cpu = time.perf_counter(), time.process_time()
    wrapped.add_weighted_adapter(list(files), [STRENGTHS[name] for name in files], "merged", **how)
    seconds = time.perf_counter() - wall, time.process_time() - cpu
    result = {}
    for module in modules:
        layer = getattr(model, _plain(module))
        down, up = layer.lora_A["merged"].weight.data, layer.lora_B["merged"].weight.data * layer.scaling["merged"]
        result[f"{module}.lora_down.weight"] = down.half().contiguous()
        result[f"{module}.lora_up.weight"] = up.half().contiguous()
        result[f"{module}.alpha"] = torch.tensor(float(down.shape[0]))
    return result, seconds


# ---- kohya's sd-scripts


def kohya(folder, out, options):
    """networks/merge_lora.py or networks/svd_merge_lora.py of a checkout, called as from their command line."""
    root = Path(options["path"])
    # Its own folder first, as for `python networks/...`; the root, since its requirements install it with `-e .`.
    sys.path[:0] = [str(root / "networks"), str(root)]
    script = importlib.import_module("svd_merge_lora" if options["method"] == "svd" else "merge_lora")
    command = ["--save_to", str(out), "--save_precision", "fp16"]
    command += ["--models", *(str(folder / f"{name}.safetensors") for name in STRENGTHS)]
    command += ["--ratios", *map(str, STRENGTHS.values())]
    command += {"merge": [], "concat": ["--concat"], "svd": ["--new_rank", str(RANK)]}[options["method"]]
    return lambda: script.merge(script.setup_parser().parse_args(command))


# ---- packs of ComfyUI nodes


def comfyui(folder, out, options):
    """The nodes of a pack, loaded by the real ComfyUI and called as it calls them, on a MODEL without weights."""
    sys.path.insert(0, options["comfyui"])
    from comfy.cli_args import args

    args.cpu = True
    args.base_directory = str(folder)
    import asyncio

    import folder_paths
    import nodes
    import torch

    # Both where the LoRAs are and where the packs' own save nodes write to.
    folder_paths.add_model_folder_path("loras", str(folder), is_default=True)
    if not asyncio.run(nodes.load_custom_node(options["path"])):
        raise RuntimeError(f"ComfyUI could not load {options['path']}; its requirements have to be in this Python")

    def node(name, **inputs):
        kind = nodes.NODE_CLASS_MAPPINGS[name]
        result = getattr(kind(), kind.FUNCTION)(**inputs)
        return result.get("result") if isinstance(result, dict) else result

    model = _model(options["base"])

    def work():
        with torch.inference_mode():
            PACKS[options["pack"]]["merge"](node, model, options["mode"], out)

    return work


def _model(base):
    load_lcm_kit()
    from lcm_kit.tests.with_comfyui.bases import model

    return model(base)


def _power_merger(node, model, mode, out):
    """The LCM-LoRA first, since the pack takes rank and alpha from the first. No CLIP: these LoRAs have none."""
    chosen = {
        f"lora_{other}": {"on": True, "lora": f"{other}.safetensors", "strength": STRENGTHS[other]}
        for other in reversed(STRENGTHS)
    }
    stack, strengths = node("PM LoRA Power Stacker", model=model, clip=None, **chosen)
    how = mode.partition(", ")[2] or "rSVD"
    (parts,) = node("PM LoRA Stack Decompose", key_dicts=stack, decomposition_method=how, svd_rank=-1, device="cpu")
    # A sum and not an average.
    (method,) = node("PM Linear (Mergekit)", normalize=False)
    merged, _ = node(
        "PM LoRA Merger (Mergekit)", method=method, components=parts, strengths=strengths, lambda_=1.0,
        spectral_norm_scale=0.0, merge_clip=True, device="cpu", dtype="float32",
    )  # fmt: skip
    node("PM LoRA Save", model=model, lora=merged, file_name=out.stem, extension="safetensors")


def _optimizer(node, model, mode, out):
    """ "additive" is its exact mode, and the strengths are kept as they are; saved with the sum of the ranks, its default."""
    stack = None
    for other, strength in STRENGTHS.items():
        chosen = {
            "lora_name": f"{other}.safetensors",
            "strength": strength,
            "conflict_mode": "all",
            "key_filter": "all",
        }
        (stack,) = node("LoRAStack", **chosen, lora_stack=stack)
    exact = {"optimization_mode": "additive", "auto_strength": "disabled"} if mode == "additive" else {}
    merged = node("LoRAOptimizer", model=model, lora_stack=stack, output_strength=1.0, svd_device="cpu", **exact)
    node(
        "SaveMergedLoRA", lora_data=merged[4], save_folder=str(out.parent), filename=out.stem, save_rank=0,
        bake_strength=True,
    )  # fmt: skip


def _lora_merger(node, model, mode, out):
    both = [
        node("LoraLoaderWeightOnly", lora_name=f"{other}.safetensors", strength_model=s, strength_clip=s, lbw="")[0]
        for other, s in STRENGTHS.items()
    ]
    (merged,) = node(
        "LoraMerge", lora_1=both[0], lora_2=both[1], mode=mode.partition(",")[0], rank=RANK, threshold=1.0,
        device="cpu", dtype="float16" if mode == "concat" else "float32",
    )  # fmt: skip
    node("LoraSave", lora=merged, file_name=out.stem, extension="safetensors")


# Name -> a file that tells the pack, what merges with its nodes, and its modes with their options.
PACKS = {
    "LoRA Power-Merger": {
        "file": "src/lora_mergekit_merge.py",
        "merge": _power_merger,
        "modes": {"linear": {}, "linear, SVD": {"once": True}},
    },
    "LoRA Optimizer": {
        "file": "lora_optimizer.py",
        "merge": _optimizer,
        "modes": {"additive": {"once": True}, "default": {"once": True}},
    },
    "LoRA-Merger": {
        "file": "lora_merge.py",
        "merge": _lora_merger,
        "modes": {"add": {}, "concat": {}, f"svd, rank {RANK}": {"once": True, "full_svd": True}},
    },
}


def _pack(path):
    for name, pack in PACKS.items():
        if (Path(path) / pack["file"]).is_file():
            return name
    raise SystemExit(f"{path} is no pack that this benchmark knows: {', '.join(PACKS)}")


JOBS = {"peft": peft, "kohya": kohya, "comfyui": comfyui}
