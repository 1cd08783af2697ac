"""Memory and speed of a training step of Distill LCM-LoRA, against ComfyUI's own TrainLoraNode on the same model.

    COMFYUI_PATH=.comfyui .venv/bin/python benchmarks/distilling.py [--models embedded half sd15] [--rounds 2] [--sizes]

With --sizes nothing is computed: PyTorch's fake tensors have sizes only, and what lives of them at the same time is counted
exactly, for the steps without the node around them. "embedded" is read from a file and cannot be had so. A kernel's scratch
memory, the allocator and the process are not in it.

Without it: same network, rank, batch, latents, fp32 and gradient checkpointing; each measurement is a process of its own,
with one thread, in turn; the least of all rounds counts. Time is processor time, the first step left out. "half" is SD1.5's
UNet at half its width, "sd15" the whole one, which takes long on a CPU.

The two do not compute the same: TrainLoraNode takes one pass forward and one backward for a picture; a distillation step
takes three more forward, the teacher with and without the prompt and the target. "one pass" is our network and LoRA with
TrainLoraNode's loss, so that the passes compare. TrainLoraNode adapts every layer, biases too; Distill LCM-LoRA the
paper's. Prints Markdown, as kept in benchmarks/RESULTS.md.
"""

import argparse
import json
import sys
import tempfile
import time
from collections.abc import Callable
from typing import Any

from setting import ROOT, fresh, load_comfyui, markdown, peak_memory

import torch

# model -> (rank, batch, latent's side)
MODELS = {"embedded": (64, 8, 8), "sd15": (64, 2, 32), "half": (64, 2, 32)}
KINDS = ("core", "ours", "one pass", "inference")
STEPS = 3  # the first is not counted
SD15 = {
    "image_size": 32,
    "in_channels": 4,
    "out_channels": 4,
    "model_channels": 320,
    "num_res_blocks": [2, 2, 2, 2],
    "channel_mult": [1, 2, 4, 4],
    "transformer_depth": [1, 1, 1, 1, 1, 1, 0, 0],
    "transformer_depth_output": [1, 1, 1, 1, 1, 1, 1, 1, 1, 0, 0, 0],
    "transformer_depth_middle": 1,
    "context_dim": 768,
    "num_heads": 8,
    "use_linear_in_transformer": False,
    "use_spatial_transformer": True,
    "use_temporal_attention": False,
    "adm_in_channels": None,
    "dtype": torch.float32,
}
# What is freed goes back to the system at once, so that the process is as large as what it holds.
TIGHT = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536", "MALLOC_ARENA_MAX": "1"}


def model_of(name: str, device: str = "cpu"):
    """A MODEL in fp32, computed on `device`, "cuda" for ComfyUI's own choice. Random weights for all but the embedded one: neither memory nor speed depends on them."""
    import comfy.model_management
    import comfy.model_patcher
    import comfy.sd
    import comfy.supported_models

    if name == "embedded":
        from tiny_emoji.model import TinyEmoji

        comfy.supported_models.models.insert(0, TinyEmoji)
        file = ROOT / "demo" / "models" / "checkpoints" / "tiny_emoji.safetensors"
        return comfy.sd.load_checkpoint_guess_config(
            str(file), output_vae=False, output_clip=False, model_options={"dtype": torch.float32}
        )[0]
    config = comfy.supported_models.SD15(SD15 | ({"model_channels": 160} if name == "half" else {}))
    config.set_inference_dtype(torch.float32, None)
    cpu = torch.device("cpu")
    model = config.get_model({}, device=cpu)
    with torch.no_grad():
        for parameter in model.diffusion_model.parameters():
            parameter.normal_(std=0.02)
    # Not torch.device("cuda"), which ComfyUI would take for another one than the cuda:0 of its tensors.
    where = comfy.model_management.get_torch_device() if device == "cuda" else torch.device(device)
    return comfy.model_patcher.ModelPatcher(model, where, cpu)


class Watch:
    """Time of each step by a clock, processor time by default, and the largest memory since the first one's end."""

    def __init__(
        self, clock: Callable[[], float] = time.process_time, peak: Callable[..., float] = peak_memory
    ) -> None:
        self.times: list[float] = []
        self.clock, self.peak = clock, peak
        self.last = clock()

    def step_begins(self) -> None:
        self.last = self.clock()

    def step_done(self) -> None:
        now = self.clock()
        self.times.append(now - self.last)
        if len(self.times) == 1:
            self.peak(reset=True)
        self.last = self.clock()


def measure(kind: str, name: str, home: str) -> dict[str, float]:
    """Seconds of the fastest step, and bytes beyond those of a process that has loaded everything but the model."""
    load_comfyui(home=home, cpu=True)
    import comfy_extras.nodes_train  # noqa: F401

    from lcm_kit.host.training import distilling  # noqa: F401

    torch.set_num_threads(1)
    torch.manual_seed(0)
    before = peak_memory(reset=True)
    watch = Watch()
    found = work(kind, name, watch)
    found["memory"] = watch_peak(watch) - before
    found["seconds"] = min(watch.times[1:])
    return found


def sizes(kind: str, name: str, home: str) -> dict[str, float]:
    """Bytes of all tensors that live at once, at most, from building the model on; of tensors without contents."""
    load_comfyui(home=home, cpu=True)
    from torch._subclasses.fake_tensor import FakeTensorMode

    from lcm_kit.tests.distillation.live_memory import LiveMemory

    class Counted(LiveMemory):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            # A loss, a drawn timestep: any number does.
            if function is torch.ops.aten._local_scalar_dense.default:
                return 1
            return super().__torch_dispatch__(function, types, args, kwargs)

    # Everything is on the CPU and in fp32 already, and PyTorch cannot exchange the parameters of modules for fake ones.
    torch.nn.Module.to = lambda module, *_, **__: module
    with FakeTensorMode(allow_non_fake_inputs=True), Counted() as memory:
        found = work("our passes" if kind == "ours" else kind, name, Watch())
    found["memory"] = float(memory.peak)
    return found


def work(
    kind: str, name: str, watch: Watch, *, device: str = "cpu", steps: int = STEPS, **options: Any
) -> dict[str, float]:
    """So many steps of one kind on a fresh model; the bytes of its network, and how many numbers are trained.

    options: inputs of TrainLoraNode or of Distill LCM-LoRA that are not as in the tables of the CPU.
    """
    import comfy.sample
    import comfy_extras.nodes_train as core

    from lcm_kit.host.training import distilling

    rank, batch, side = MODELS[name]
    model = model_of(name, device)
    network = model.model.diffusion_model
    latents = torch.randn(batch, model.model.latent_format.latent_channels, side, side)
    context = model.model.model_config.unet_config["context_dim"]
    positive, negative = ([[torch.randn(1, 77, context), {}]] for _ in range(2))
    found = {"network": float(sum(p.numel() * p.element_size() for p in network.parameters()))}
    watch.step_begins()
    if kind == "core":
        with_hook(watch)
        schema = core.TrainLoraNode.define_schema()
        defaults = {entry.id: entry.default for entry in schema.inputs if getattr(entry, "default", None) is not None}
        settings = {
            **defaults, "batch_size": batch, "steps": steps, "grad_accumulation_steps": 1, "learning_rate": 1e-4, "rank": rank,
            "optimizer": "AdamW", "loss_function": "MSE", "seed": 0, "training_dtype": "fp32", "lora_dtype": "fp32",
            "algorithm": "LoRA", "gradient_checkpointing": True, "existing_lora": "[None]", **options,
        }  # fmt: skip
        given = [{"samples": latent} for latent in latents.split(1)]
        lora = core.TrainLoraNode.execute(
            [model], given, [positive], **{key: [value] for key, value in settings.items()}
        ).result[[output.io_type for output in schema.outputs].index("LORA_MODEL")]
        found["LoRA"] = float(sum(tensor.numel() for tensor in lora.values()))
    elif kind == "ours":
        with_timed_steps(watch)
        settings = {
            "steps": steps, "batch": batch, "accumulate": 1, "rank": rank, "alpha": 0, "learning_rate": 1e-4,
            "guidance_min": 8.5, "guidance_max": 8.5, "skip": 20, "seed": 0, "samples": 1, "width": 64, "height": 64,
            "dtype": "fp32", "gradient_checkpointing": True, "resume": "", **options,
        }  # fmt: skip
        lora = distilling.distil(model, [positive], [negative], [{"samples": latents}], None, **settings)[0]
        found["LoRA"] = float(sum(tensor.numel() for key, tensor in lora.items() if not key.endswith("alpha")))
    elif kind in ("one pass", "our passes"):
        found["LoRA"] = float(passes(kind, model, latents, positive, negative, rank, watch))
    else:
        for _ in range(2):
            comfy.sample.sample(
                model, torch.randn_like(latents), 1, 8.5, "euler", "simple", positive, negative,
                torch.zeros_like(latents), disable_pbar=True, seed=0,
            )  # fmt: skip
            watch.step_done()
    return found


def with_hook(watch: Watch) -> None:
    """TrainLoraNode tells the progress bar of every step."""
    import comfy.utils

    comfy.utils.PROGRESS_BAR_ENABLED = False
    comfy.utils.PROGRESS_THROTTLE_MIN_INTERVAL = comfy.utils.PROGRESS_THROTTLE_MIN_PERCENT = 0  # every step is told

    def hook(*_, **__) -> None:
        watch.step_done()
        watch.memory = watch.peak()

    comfy.utils.set_progress_bar_global_hook(hook)


def with_timed_steps(watch: Watch) -> None:
    """The trainer's step itself: with a progress hook the node would draw previews, which is not the training."""
    import comfy.utils

    from lcm_kit.distillation.trainer import Trainer

    comfy.utils.PROGRESS_BAR_ENABLED = False
    step = Trainer.step

    def timed(trainer):
        watch.step_begins()
        loss = step(trainer)
        watch.step_done()
        watch.memory = watch.peak()
        return loss

    Trainer.step = timed


def watch_peak(watch: Watch) -> float:
    return getattr(watch, "memory", None) or watch.peak()


def passes(kind: str, model, latents, positive, negative, rank: int, watch: Watch) -> int:
    """Steps without the node around them; returns how many numbers are trained.

    "one pass": what TrainLoraNode computes, with our branches: one pass forward, its loss, one backward, AdamW.
    """
    from lcm_kit.distillation.settings import Settings
    from lcm_kit.distillation.trainer import Trainer, adapters_on
    from lcm_kit.host.training.data import Batches
    from lcm_kit.host.training.loan import Denoiser, lent
    from lcm_kit.host.training.run import items_of, sigma_table

    count, table = len(latents), sigma_table(model)
    with lent(model, torch.float32) as patcher:
        network, device = patcher.model.diffusion_model, patcher.load_device
        items = items_of(patcher, latents.split(1), positive, negative, [(0, 0)] * count)
        batches = Batches(items, seed=0, per_step=count, device=device)
        denoise = Denoiser(patcher)
        with adapters_on(network, rank, recompute=True) as adapters:
            if kind == "our passes":
                trainer = Trainer(denoise, adapters, batches, table, Settings(steps=STEPS, batch=count))
                step = trainer.step
            else:
                optimizer = torch.optim.AdamW(adapters.parameters(), lr=1e-4)
                batch = batches.batch(range(count))

                def step() -> None:
                    sigma = torch.full((count,), 2.0)
                    x = batch.z0 + sigma.view(-1, 1, 1, 1) * torch.randn_like(batch.z0)
                    (denoise(x, sigma, batch.cond) - batch.z0).square().mean().backward()
                    optimizer.step()
                    optimizer.zero_grad()

            watch.step_begins()
            for _ in range(STEPS):
                step()
                watch.step_done()
                watch.memory = watch.peak()
            return sum(parameter.numel() for parameter in adapters.parameters())


def measured(kind: str, name: str, home: str, more: dict[str, str], *, sizes: bool = False) -> dict[str, float]:
    print(f"measuring {kind} on {name} ...", file=sys.stderr, flush=True)
    arguments = ["--measure", kind, name, home, *(["--sizes"] if sizes else [])]
    return fresh(__file__, *arguments, environment={"OMP_NUM_THREADS": "1"} | more)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", choices=MODELS, default=["embedded", "half"])
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--sizes", action="store_true", help="count tensors in place of measuring a process")
    parser.add_argument("--measure", nargs=3, metavar=("KIND", "MODEL", "HOME"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.measure:
        print(json.dumps((sizes if options.sizes else measure)(*options.measure)))
        return
    if options.sizes and "embedded" in options.models:
        parser.error(
            "--sizes needs --models half sd15; embedded is read from a file, which has no tensors without contents"
        )
    with tempfile.TemporaryDirectory() as home:
        for name in options.models:
            if options.sizes:
                print(
                    sizes_table(name, {kind: measured(kind, name, home, {}, sizes=True) for kind in KINDS}), flush=True
                )
                continue
            memory = {kind: measured(kind, name, home, TIGHT) for kind in KINDS}
            seconds = {kind: float("inf") for kind in KINDS}
            for _ in range(options.rounds):
                for kind in KINDS[:3]:
                    seconds[kind] = min(seconds[kind], measured(kind, name, home, {})["seconds"])
            print(table(name, memory, seconds), flush=True)


def table(name: str, memory: dict[str, dict[str, float]], seconds: dict[str, float]) -> str:
    rank, batch, side = MODELS[name]
    network = memory["ours"]["network"]
    core = memory["core"]["memory"]
    state = 16 * memory["ours"]["LoRA"]  # fp32: the weights, their gradients, Adam's two means
    rows = []
    peaks = [memory[kind]["memory"] for kind in KINDS[:3]]
    rates = [batch / seconds[kind] for kind in KINDS[:3]]
    for what, (theirs, ours, single), form in (("peak memory, MB", [p / 1e6 for p in peaks], ".0f"),
                                                ("pictures a second", rates, ".3g")):  # fmt: skip
        numbers = (
            f"{theirs:{form}}",
            f"{ours:{form}}",
            f"{ours / theirs:.2f}",
            f"{single:{form}}",
            f"{single / theirs:.2f}",
        )
        rows.append([what, *numbers])
    forwards = [1, 4, 1]
    passes = [rate * count for rate, count in zip(rates, forwards, strict=True)]
    # Teacher with and without the prompt, target and student; what gradient checkpointing repeats is not counted.
    core_passes, ours_passes, single_passes = passes
    rows.append(
        ["forward passes a second", f"{core_passes:.3g}", f"{ours_passes:.3g}", f"{ours_passes / core_passes:.2f}",
         f"{single_passes:.3g}", f"{single_passes / core_passes:.2f}"]
    )  # fmt: skip
    trained = [memory[kind]["LoRA"] for kind in ("core", "ours")]
    rows.append(["trained numbers", *(f"{count:,.0f}" for count in trained), f"{trained[1] / trained[0]:.2f}", "", ""])
    extra = memory["ours"]["memory"] - memory["inference"]["memory"]
    lines = [
        f"{name}: {network / 1e6:.0f} MB of weights, rank {rank}, batch {batch}, latents {side} x {side}",
        "",
        markdown(["", "TrainLoraNode", "Distill LCM-LoRA", "ratio", "one pass", "ratio"], rows),
        "",
        f"Inference of that batch with guidance: {memory['inference']['memory'] / 1e6:.0f} MB at its peak. Distilling adds "
        f"{extra / 1e6:.0f} MB, {extra / network:.2f} networks; {state / 1e6:.0f} MB of them are the LoRA with gradients and "
        f"Adam's means, the rest is {(extra - state) / network:.2f} networks. TrainLoraNode adds "
        f"{(core - memory['inference']['memory']) / network:.2f} networks.",
        "",
    ]
    return "\n".join(lines)


def sizes_table(name: str, found: dict[str, dict[str, float]]) -> str:
    rank, batch, side = MODELS[name]
    network, base = found["ours"]["network"], found["inference"]["memory"]
    lines = [
        f"{name}: {network / 1e6:.0f} MB of weights, rank {rank}, batch {batch}, latents {side} x {side}; tensors at the peak, MB",
        "",
    ]
    rows = []
    for kind, title in zip(KINDS, ("TrainLoraNode", "Distill LCM-LoRA", "one pass", "inference"), strict=True):
        state, extra = 16 * found[kind].get("LoRA", 0.0), found[kind]["memory"] - base
        row = [f"{value / 1e6:.0f}" for value in (found[kind]["memory"], extra, state)]
        rows.append([title, *row, f"{(extra - state) / network:.2f}"])
    columns = ["", "all", "beyond inference", "of them LoRA, gradients, Adam's means", "the rest, in networks"]
    lines.append(markdown(columns, rows))
    ratio = found["ours"]["memory"] / found["core"]["memory"]
    return "\n".join([*lines, "", f"Distill LCM-LoRA to TrainLoraNode: {ratio:.2f}.", ""])


if __name__ == "__main__":
    main()
