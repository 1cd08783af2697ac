"""The real ComfyUI with this pack and the demo's models, and what its log says about the pack."""

import os
import re
from pathlib import Path

from lcm_kit.demo.comfyui_server import ComfyUIServer
from lcm_kit.tests.helpers import ROOT

PACK = "lcm-kit"  # the folder name that the registry gives it
MODELS = [folder for folder in [ROOT / "demo" / "models"] if folder.is_dir()]
PACKS = {PACK: ROOT} | {folder.name: folder for folder in [ROOT / "demo" / "tiny_emoji"] if folder.is_dir()}


def comfyui() -> Path:
    return Path(os.environ["COMFYUI_PATH"]).expanduser().resolve()


def pack_server(home: Path, **options) -> ComfyUIServer:
    """Not started yet. Previews are on, so that tests can see them."""
    options.setdefault("arguments", ["--preview-method", "latent2rgb"])
    return ComfyUIServer(comfyui(), home, packs=PACKS, models=MODELS, **options)


def import_times(log: str) -> dict[str, tuple[float, bool]]:
    """Pack name -> (seconds, imported), from the list that ComfyUI logs at start-up; seconds have one decimal there."""
    rows = re.findall(r"^ *(\d+\.\d) seconds( \(IMPORT FAILED\))?: (.+)$", log, re.MULTILINE)
    return {Path(path).name: (float(seconds), not failed) for seconds, failed, path in rows}
