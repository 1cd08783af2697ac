"""The user's ComfyUI without its server: found, made importable, and asked for models."""

from __future__ import annotations

import asyncio
import importlib
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]


def find(given: Path | None) -> Path:
    """ComfyUI's folder. Raises ValueError if there is none."""
    for name, path in (
        ("--comfyui", given),
        ("COMFYUI_PATH", Path(os.environ["COMFYUI_PATH"]) if os.environ.get("COMFYUI_PATH") else None),
        ("", ROOT.parents[1] if ROOT.parent.name == "custom_nodes" else None),
    ):
        if path is None:
            continue
        path = path.expanduser().resolve()
        if (path / "comfy" / "sd.py").is_file():
            return path
        if name:
            raise ValueError(f"{name} is {path}, where there is no ComfyUI (no comfy/sd.py).")
    raise ValueError("no ComfyUI: say where yours is by --comfyui FOLDER or the environment variable COMFYUI_PATH.")


def prepare(folder: Path, *, cpu: bool, packs: Sequence[Path] = ()) -> None:
    """Make ComfyUI importable and load node packs as its server does. Raises ValueError for a pack that fails."""
    for pack in packs:
        if not pack.is_dir():
            raise ValueError(f"--custom-nodes is {pack}, which is no folder.")
    # First: a clone of ours on the path has a folder called nodes, too.
    sys.path.insert(0, str(folder))
    from comfy.cli_args import args  # type: ignore[import-not-found]

    if cpu:
        args.cpu = True  # before anything of ComfyUI asks for a device
    if not packs:
        return
    nodes = importlib.import_module("nodes")  # not our own, which type checkers would find
    for pack in packs:
        if not asyncio.run(nodes.load_custom_node(str(pack.resolve()))):
            raise ValueError(f"--custom-nodes: {pack} could not be loaded; ComfyUI's messages above say why.")


def path_of(kind: str, name: str) -> str:
    """A file: a path, or a name in ComfyUI's folders of that kind ("checkpoints"). Raises FileNotFoundError."""
    import folder_paths  # type: ignore[import-not-found]

    if Path(name).is_file():
        return str(Path(name).resolve())
    found = folder_paths.get_full_path(kind, name)
    if found is None:
        raise FileNotFoundError(
            f"{name} is no file, nor in ComfyUI's {kind} ({', '.join(folder_paths.get_folder_paths(kind))})."
        )
    return str(found)


def load(checkpoint: str, vae: str | None, loras: Sequence[str]) -> tuple[Any, Any, Any]:
    """(MODEL, CLIP, VAE) by ComfyUI's own loaders; VAE is None where there is none. Raises ValueError or OSError."""
    import comfy.sd  # type: ignore[import-not-found]
    import comfy.utils  # type: ignore[import-not-found]
    import folder_paths

    paths = [path_of("checkpoints", checkpoint)] + ([path_of("vae", vae)] if vae else [])
    strengths = [_strength(text) for text in loras]
    lora_paths = [path_of("loras", name) for name, _ in strengths]
    try:
        model, clip, own = comfy.sd.load_checkpoint_guess_config(
            paths[0], output_vae=vae is None, embedding_directory=folder_paths.get_folder_paths("embeddings")
        )[:3]
    except Exception as error:
        # Every kind of error, with several lines: it is whatever the file's contents lead to.
        raise ValueError(f"{checkpoint} could not be loaded by ComfyUI ({str(error).splitlines()[0]}).") from error
    if model is None or clip is None:
        raise ValueError(f"{checkpoint} has no {'text encoder' if model else 'model'}; take a whole checkpoint.")
    if vae is not None:
        own = comfy.sd.VAE(sd=comfy.utils.load_torch_file(paths[1]))
    if own is not None:
        try:
            own.throw_exception_if_invalid()
        except RuntimeError:
            own = None
    for path, (name, strength) in zip(lora_paths, strengths, strict=True):
        before = _patches(model)
        model, clip = comfy.sd.load_lora_for_models(
            model, clip, comfy.utils.load_torch_file(path, safe_load=True), strength, strength
        )
        if _patches(model) == before:
            raise ValueError(f"--lora {name} changes nothing in {checkpoint}; it is for another kind of model.")
    return model, clip, own


def lora_weights(name: str) -> Any:
    """The LORA_MODEL in a file, as Load LoRA gives it. Raises ValueError or OSError."""
    from ..host.lora.weights import from_lora
    from ..lora_merge import load as load_lora

    return from_lora(load_lora(path_of("loras", name)))


def _patches(model: Any) -> int:
    return sum(map(len, model.patches.values()))


def _strength(text: str) -> tuple[str, float]:
    name, colon, strength = text.rpartition(":")
    try:
        # A colon of Windows is followed by no number.
        return (name, float(strength)) if colon else (text, 1.0)
    except ValueError:
        return text, 1.0
