"""Where the demo's training keeps its files, and how it loads ComfyUI."""

import importlib.util
import os
import sys
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).resolve().parents[2]
DEMO = ROOT / "demo"
MODELS = DEMO / "models"
WORK = ROOT / ".work"  # data, checkpoints, latents; ignored by git

CHECKPOINT = MODELS / "checkpoints" / "tiny_emoji.safetensors"
VAE = MODELS / "vae" / "tiny_emoji_vae.safetensors"
LORAS = {kind: MODELS / "loras" / f"tiny_emoji_{kind}_lora.safetensors" for kind in ("lcm", "phased", "ink")}
# Only measured, not shipped. ink_fast: the ink style's own acceleration.
LORAS |= {kind: WORK / f"tiny_emoji_{kind}_lora.safetensors" for kind in ("ink_fast", "twemoji")}
FINETUNE = WORK / "tiny_emoji_fluent.safetensors"


def comfyui_path() -> str:
    """The folder of ComfyUI: COMFYUI_PATH, or the project's own copy."""
    return os.environ.get("COMFYUI_PATH", str(ROOT / ".comfyui"))


def load_comfy() -> None:
    """Make ComfyUI importable, on the CPU when there is no GPU."""
    path = comfyui_path()
    if path not in sys.path:
        sys.path.insert(0, path)
        from comfy.cli_args import args

        args.cpu = not torch.cuda.is_available()


def load_state(path: Path) -> dict[str, Any] | None:
    """A training checkpoint, or None where there is none yet. Tensors and numbers only."""
    return torch.load(path, weights_only=True) if path.exists() else None


def save_state(path: Path, state: dict[str, Any]) -> None:
    """Write a checkpoint so that a stop in the middle leaves the old one."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_suffix(".part")
    torch.save(state, part)
    part.replace(path)


def load_lcm_kit() -> None:
    """Make this repository importable as `lcm_kit`, whatever its folder is called, as ComfyUI does."""
    if "lcm_kit" not in sys.modules:
        spec = importlib.util.spec_from_file_location(
            "lcm_kit", ROOT / "__init__.py", submodule_search_locations=[str(ROOT)]
        )
        if spec is None or spec.loader is None:
            raise ImportError(f"{ROOT / '__init__.py'} cannot be imported; is this the root of LCM Kit?")
        sys.modules["lcm_kit"] = module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
