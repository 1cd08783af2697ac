"""What a CPU cannot show: training in bf16, fp16 and TF32, sampling and merging on CUDA, ComfyUI with its dynamic VRAM.

    make gpu                                          writes benchmarks/gpu.md with the card's name
    .venv/bin/python benchmarks/on_gpu.py --rehearse   the same rows on the CPU with the embedded model, into no file

Without a CUDA GPU that torch can use it says so in one line and ends well. Every row is a process of its own. Times are of the wall, after the card has
finished; memory is the most that torch had allocated on the card. SD 1.5's UNet has random weights: neither time nor memory
depends on them, and nothing has to be downloaded. The pictures and LoRAs that are compared are those of the demo.
"""

import argparse
import json
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from setting import DEMO, ROOT, comfyui_path, fresh, load_comfyui, load_lcm_kit, markdown

import distilling
import torch

TABLE = ROOT / "benchmarks" / "gpu.md"
# SD 1.5's UNet as it is trained on a card: 4 pictures of 512 x 512.
SD15 = "sd15 at 512 x 512"
distilling.MODELS[SD15] = (64, 4, 64)
FP32, BF16 = {"training_dtype": "fp32", "lora_dtype": "fp32"}, {"training_dtype": "bf16", "lora_dtype": "fp32"}
# row -> (who trains, its inputs)
TRAININGS: dict[str, tuple[str, dict[str, Any]]] = {
    "Distill LCM-LoRA, fp32": ("ours", {"dtype": "fp32"}),
    "Distill LCM-LoRA, fp32 with TF32": ("ours", {"dtype": "fp32", "tf32": True}),
    "Distill LCM-LoRA, bf16": ("ours", {"dtype": "bf16"}),
    "Distill LCM-LoRA, fp16": ("ours", {"dtype": "fp16"}),
    "Distill LCM-LoRA, bf16, no checkpointing": ("ours", {"dtype": "bf16", "gradient_checkpointing": False}),
    "Distill LCM-LoRA, bf16, compiled": ("ours", {"dtype": "bf16", "compile": True}),
    "TrainLoraNode, fp32": ("core", FP32),
    "TrainLoraNode, bf16": ("core", BF16),
    "TrainLoraNode, bf16, bypass_mode": ("core", BF16 | {"bypass_mode": True}),
}
# Rows that would take a CPU half an hour.
NOT_ON_A_CPU = {"fp16": "no fp16 on a CPU: minutes a step", "compiled": "not on a CPU: minutes of compiling"}
DYNAMIC = "DynamicVRAM support detected and enabled"  # in ComfyUI's log
SAMPLERS = ("LCM Kit", "core lcm")
RUNS = 20


def synchronized() -> float:
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter()


def allocated(*, reset: bool = False) -> float:
    """Largest memory of the card in bytes since the last reset; 0 on a CPU."""
    if not torch.cuda.is_available():
        return 0.0
    most = float(torch.cuda.max_memory_allocated())
    if reset:
        torch.cuda.reset_peak_memory_stats()
    return most


def device() -> str:
    return "cuda" if torch.cuda.is_available() else "cpu"


# ---- the rows, each in a process of its own


def training(row: str, model: str, home: str) -> dict[str, float]:
    """Pictures a second and memory of one way to train."""
    load_comfyui(home=home)
    import comfy_extras.nodes_train  # noqa: F401

    kind, options = TRAININGS[row]
    torch.manual_seed(0)
    watch = distilling.Watch(synchronized, allocated)
    distilling.work(kind, model, watch, device=device(), steps=6 if device() == "cuda" else 2, **options)
    return {"seconds": min(watch.times[1:]), "memory": distilling.watch_peak(watch)}


def sampling(_: str, model: str, home: str) -> dict[str, float]:
    """Milliseconds of a whole run of 4 steps by both samplers, alternately, and how far the pictures are apart."""
    load_comfyui(home=home)
    import comfy.sample
    import comfy.samplers

    from lcm_kit.host.sampling.sampling import lcm_sampler
    from lcm_kit.host.sampling.schedules import lcm_sigmas

    _rank, _batch, side = distilling.MODELS[model]
    patcher = distilling.model_of(model, device())
    channels, context = (
        patcher.model.latent_format.latent_channels,
        patcher.model.model_config.unet_config["context_dim"],
    )
    prompt = [[torch.randn(1, 77, context, generator=torch.Generator().manual_seed(1)), {}]]
    latent = torch.zeros(1, channels, side, side)
    noise = comfy.sample.prepare_noise(latent, 1)
    sigmas = lcm_sigmas(patcher, steps=4, denoise=1.0, original_steps=50)
    samplers = {
        "LCM Kit": lcm_sampler(gamma=1.0, seed=-1, batch_indices=[0]),
        "core lcm": comfy.samplers.sampler_object("lcm"),
    }

    @torch.inference_mode()  # as ComfyUI's executor
    def run(name: str) -> torch.Tensor:
        given = patcher, noise, 1.0, samplers[name], sigmas, prompt, prompt, latent
        return comfy.sample.sample_custom(*given, disable_pbar=True, seed=1)

    times = {name: [] for name in SAMPLERS}
    pictures = {name: run(name) for name in SAMPLERS}
    for _ in range(RUNS):
        for name in SAMPLERS:
            start = synchronized()
            again = run(name)
            times[name].append(synchronized() - start)
            pictures[name + " again"] = again
    repeats = float((pictures["LCM Kit again"] - pictures["LCM Kit"]).abs().max())
    return {f"{name}, ms": 1000 * min(values) for name, values in times.items()} | {"two runs differ by": repeats}


def noise(_: str, model: str, home: str) -> dict[str, float]:
    """Largest difference of a 4-step run's noise on the card and on the CPU: a network that returns its input shows it alone."""
    load_comfyui(home=home)
    from sampling_overhead import ready_model, stand_in

    from lcm_kit.host.sampling.sampling import lcm_sampler
    from lcm_kit.host.sampling.schedules import lcm_sigmas

    shape = (2, 4, 64, 64)
    patcher = stand_in(shape, "EPS")
    answer, start = (torch.randn(shape, generator=torch.Generator().manual_seed(n)) for n in range(2))
    sigmas = lcm_sigmas(patcher, steps=4, denoise=1.0, original_steps=50)[:-1]  # ends with noise in it
    made = []
    for where in ("cpu", device()):
        patcher.model.to(where)  # its noise levels lie where it computes
        guider = ready_model(patcher, answer.to(where))
        sampler = lcm_sampler(gamma=1.0, seed=-1, batch_indices=[0, 1])
        given = {"model_options": {}, "seed": 1}, None, start.to(where), torch.zeros(shape, device=where), None
        made.append(sampler.sample(guider, sigmas.to(where), *given, disable_pbar=True).cpu())
    return {"difference": float((made[0] - made[1]).abs().max())}


def merging(_: str, model: str, home: str) -> dict[str, float]:
    """Seconds of the whole command on either device, and how far the two results are apart."""
    load_lcm_kit()
    from merging_pair import error_of, write_pair

    folder = Path(home)
    if model == "embedded":
        files = [str(path) for path in sorted((DEMO / "models" / "loras").glob("*.safetensors"))[:2]]
    else:
        write_pair(folder, "SDXL")
        files = [str(folder / f"{name}.safetensors") for name in ("style", "lcm")]
    found = {}
    for where in dict.fromkeys(["cpu", device()]):
        out = folder / f"{where}.safetensors"
        command = [sys.executable, "-m", "lora_merge", "merge", f"{files[0]}:0.8", files[1], "-o", str(out)]
        start = time.perf_counter()
        subprocess.run([*command, "--retain", "0.9", "--device", where], cwd=ROOT, check=True, capture_output=True)
        found[f"{where}, s"] = time.perf_counter() - start
        if model != "embedded":
            found[f"{where}, error"] = error_of(out, folder)
    return found


def server(row: str, _: str, home: str) -> dict[str, Any]:
    """The demo's workflow and two steps of training in ComfyUI's own server: seconds of a second run, its picture's hash."""
    import hashlib

    from comfyui_client import Client
    from comfyui_server import ComfyUIServer
    from graphs import TINY, Shot, lcm_only

    options = ["--disable-dynamic-vram"] if row == "without dynamic VRAM" else []
    packs = {"lcm-kit": ROOT, "tiny_emoji": DEMO / "tiny_emoji"}
    models = [DEMO / "models"]
    with (
        ComfyUIServer(
            comfyui_path(), home, packs=packs, models=models, arguments=options, cpu=device() == "cpu"
        ) as running,
        Client(running) as client,
    ):
        for seed in (2, 1):
            start = time.perf_counter()
            (picture,) = client.images(client.run(lcm_only(TINY, Shot("cat face", seed, 4))))
            seconds = time.perf_counter() - start
        start = time.perf_counter()
        client.run(two_steps())
        trained = time.perf_counter() - start
        dynamic = DYNAMIC in running.log_text()
    return {
        "seconds": seconds, "picture": hashlib.sha256(picture).hexdigest()[:12], "seconds of two training steps": trained,
        "dynamic VRAM": "on" if dynamic else "off",
    }  # fmt: skip


def two_steps() -> Any:
    """A workflow that trains an LCM-LoRA on two pictures of the embedded model, and keeps nothing."""
    from graphs import TINY, Graph, load

    graph = Graph()
    loaded = load(graph, TINY)
    positive, negative = (graph.add("CLIPTextEncode", clip=loaded.clip, text=text) for text in ("cat face", ""))
    node = graph.add(
        "LCMKitDistill", model=loaded.model, positive=[positive, 0], negative=[negative, 0], steps=2, batch=2, accumulate=1,
        rank=8, alpha=0.0, learning_rate=1e-4, guidance_min=3.0, guidance_max=3.0, skip=20, seed=1, samples=2, width=64,
        height=64, dtype="auto", gradient_checkpointing=True, resume="",
    )  # fmt: skip
    graph.add("PreviewImage", images=[node, 1])
    return graph


# ---- the table

ROWS: dict[str, tuple[Callable[[str, str, str], dict[str, Any]], list[str]]] = {
    "training": (training, list(TRAININGS)),
    "sampling": (sampling, ["4 steps"]),
    "noise": (noise, ["4 steps"]),
    "merging": (merging, ["retain 0.9"]),
    "server": (server, ["with dynamic VRAM", "without dynamic VRAM"]),
}


def measured(part: str, row: str, model: str) -> dict[str, Any]:
    """The row's numbers, or why there are none: one row that fails leaves the others."""
    for word, reason in NOT_ON_A_CPU.items():
        if word in row and device() == "cpu":
            return {"failed": reason}
    print(f"{part}: {row} ...", file=sys.stderr, flush=True)
    with tempfile.TemporaryDirectory() as home:
        try:
            return fresh(__file__, "--measure", part, row, model, home)
        except (RuntimeError, ValueError, IndexError) as error:  # of the row, or of what it printed
            return {"failed": str(error).strip().splitlines()[-1][:200]}


def document(model: str, card: Callable[[], str]) -> str:
    """All rows as Markdown. card: asked last, as this process would hold memory of it from then on."""
    import datetime

    found = {part: {row: measured(part, row, model) for row in rows} for part, (_, rows) in ROWS.items()}
    rank, batch, side = distilling.MODELS[model]
    trained = [
        [row, "-", "-", own["failed"]]
        if "failed" in own
        else [row, f"{batch / own['seconds']:.2f}", f"{own['memory'] / 1e9:.2f}", ""]
        for row, own in found["training"].items()
    ]
    others = [
        [part, row, ", ".join(f"{name}: {_short(value)}" for name, value in own.items())]
        for part in ("sampling", "noise", "merging", "server")
        for row, own in found[part].items()
    ]
    heading = f"# On a GPU\n\n{card()}, torch {torch.__version__}, CUDA {torch.version.cuda}, {datetime.date.today()}. `make gpu`.\n"
    what = f"Training {model}, rank {rank}, batch {batch}, latents {side} x {side}; least of 5 steps:"
    first = markdown(["", "pictures a second", "peak memory, GB", ""], trained)
    return "\n".join([heading, what, "", first, "", markdown(["part", "row", "measured"], others), ""])


def no_gpu() -> str:
    """Why there is nothing to do, in one line."""
    if shutil.which("nvidia-smi") is None:
        return "No CUDA GPU here, so there is nothing that the CPU's benchmarks do not show."
    built = (
        f"for CUDA {torch.version.cuda}, which its driver may be too old for" if torch.version.cuda else "without CUDA"
    )
    return (
        f"There is an NVIDIA driver here, but torch {torch.__version__} is built {built}. Install a torch that fits the driver (such "
        "as +cu128), or name your ComfyUI and its Python: make gpu COMFYUI_PATH=... PYTHON=..."
    )


def _short(value: Any) -> str:
    return f"{value:.3g}" if isinstance(value, float) else str(value)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--rehearse", action="store_true", help="on the CPU, with the embedded model, to try this script"
    )
    parser.add_argument("--measure", nargs=4, metavar=("PART", "ROW", "MODEL", "HOME"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.measure:
        part, *rest = options.measure
        print(json.dumps(ROWS[part][0](*rest)))
    elif options.rehearse:
        print(document("embedded", lambda: "rehearsal on a CPU: the numbers mean nothing"))
    elif not torch.cuda.is_available():
        print(no_gpu())
    else:
        TABLE.write_text(document(SD15, torch.cuda.get_device_name), encoding="utf-8")
        print(f"{TABLE.relative_to(ROOT)} is written")


if __name__ == "__main__":
    main()
