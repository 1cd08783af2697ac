"""What all benchmarks stand on: imports of ComfyUI and LCM Kit, fresh processes, peak memory, Markdown tables.

Importing it makes the folders of the benchmarks and of the demo's training importable.
"""

import json
import os
import resource
import subprocess
import sys
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
DEMO = ROOT / "demo"
for folder in (ROOT / "benchmarks", DEMO / "train", DEMO):
    if str(folder) not in sys.path:
        sys.path.append(str(folder))

from common import comfyui_path, load_lcm_kit  # noqa: E402

__all__ = [
    "DEMO",
    "ROOT",
    "comfyui_path",
    "embedded",
    "fresh",
    "load_comfyui",
    "load_lcm_kit",
    "markdown",
    "peak_memory",
]


def load_comfyui(*, home: str | None = None, cpu: bool | None = None) -> None:
    """ComfyUI, the demo's model and LCM Kit, importable; done before anything of ComfyUI is touched.

    home: ComfyUI's base directory, its own if None.   cpu: None means where there is no GPU.
    """
    import torch

    sys.path.insert(0, comfyui_path())
    from comfy.cli_args import args

    args.cpu = not torch.cuda.is_available() if cpu is None else cpu
    if home is not None:
        args.base_directory = home
    load_lcm_kit()


def embedded():
    """(model with its LCM-LoRA, clip, vae) through ComfyUI's own loaders."""
    import comfy.sd
    import comfy.utils

    models = DEMO / "models"
    model, clip, *_ = comfy.sd.load_checkpoint_guess_config(
        str(models / "checkpoints" / "tiny_emoji.safetensors"), output_vae=False
    )
    lora = comfy.utils.load_torch_file(str(models / "loras" / "tiny_emoji_lcm_lora.safetensors"))
    model, _ = comfy.sd.load_lora_for_models(model, None, lora, 1.0, 0.0)
    return model, clip, comfy.sd.VAE(sd=comfy.utils.load_torch_file(str(models / "vae" / "tiny_emoji_vae.safetensors")))


def fresh(file: str, *arguments: str, python: str | None = None, environment: Mapping[str, str] | None = None) -> Any:
    """What `file` prints as its last line, JSON, in a process of its own.

    python: another interpreter.   environment: variables beside this process's.
    Raises RuntimeError with the end of its errors if it fails.
    """
    done = subprocess.run(
        [python or sys.executable, file, *arguments],
        capture_output=True,
        text=True,
        env=os.environ | (environment or {}),
    )
    if done.returncode:
        raise RuntimeError(f"{' '.join([file, *arguments])} failed: {done.stderr[-2000:]}")
    return json.loads(done.stdout.splitlines()[-1])


def peak_memory(*, reset: bool = False) -> float:
    """Largest resident memory of this process in bytes, since the last reset where the system can do that.

    Linux tells it of the process alone; elsewhere it begins with the parent's memory at the time of the fork.
    """
    status = Path("/proc/self/status")
    if reset and status.exists():
        Path("/proc/self/clear_refs").write_text("5")
    if status.exists():
        lines = status.read_text().splitlines()
        return 1024.0 * int(next(line for line in lines if line.startswith("VmHWM:")).split()[1])
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1.0 if sys.platform == "darwin" else 1024.0)


def markdown(columns: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    """A Markdown table; numbers stand as they are given."""
    from tabulate import tabulate  # which pandas.DataFrame.to_markdown needs too, and calls for just this

    return tabulate([list(map(str, row)) for row in rows], list(columns), tablefmt="github", disable_numparse=True)
