"""The real ComfyUI with this pack and the demo's models, and what its log says about the pack."""

import os
import re
from collections.abc import Mapping
from pathlib import Path

from lcm_kit.demo.comfyui_server import ComfyUIServer
from lcm_kit.tests.helpers import ROOT

LEVEL = r"(?:\x1b\[\d+m)*(?:\[\w+\])?(?:\x1b\[\d+m)*"  # "[INFO]", coloured, before a line of newer logs
PACK = "lcm-kit"  # the folder name that the registry gives it
MODELS = [folder for folder in [ROOT / "demo" / "models"] if folder.is_dir()]
FRONTENDS = ROOT / ".frontends"  # version -> page, by `make setup`
PACKS = {PACK: ROOT} | {folder.name: folder for folder in [ROOT / "demo" / "tiny_emoji"] if folder.is_dir()}


def comfyui() -> Path:
    return Path(os.environ["COMFYUI_PATH"]).expanduser().resolve()


def pack_server(home: Path, others: Mapping[str, Path] | None = None, **options) -> ComfyUIServer:
    """Not started yet. others: packs beside this one, see ComfyUIServer. Previews are on, so that tests can see them, and the page is this ComfyUI's own.

    FRONTEND_PATH names the folder of another page (the `static` of a comfyui-frontend-package).
    """
    page = ["--front-end-root", os.environ["FRONTEND_PATH"]] if os.environ.get("FRONTEND_PATH") else own_page(comfyui())
    options.setdefault("arguments", ["--preview-method", "latent2rgb", *page])
    return ComfyUIServer(comfyui(), home, packs=PACKS | dict(others or {}), models=MODELS, **options)


def own_page(tree: Path) -> list[str]:
    """main.py's options for the page that the tree's requirements name; none if `make setup` did not fetch that one:
    then the installed package is it, or as good as it gets."""
    folder = FRONTENDS / page_version(tree)
    return ["--front-end-root", str(folder)] if (folder / "index.html").is_file() else []


def page_version(tree: Path) -> str:
    """Version of comfyui-frontend-package that the tree's requirements name, or "" if they name none."""
    file = tree / "requirements.txt"
    wanted = re.search(r"^comfyui-frontend-package==(\S+)", file.read_text() if file.exists() else "", re.MULTILINE)
    return wanted.group(1) if wanted else ""


def newest_page() -> list[str]:
    """main.py's options for the newest page that `make setup` fetched; none if it fetched none."""
    pages = sorted(FRONTENDS.glob("*/index.html"), key=lambda file: [int(n) for n in file.parent.name.split(".")])
    return ["--front-end-root", str(pages[-1].parent)] if pages else []


def import_times(log: str) -> dict[str, tuple[float, bool]]:
    """Pack name -> (seconds, imported), from the list that ComfyUI logs at start-up; seconds have one decimal there."""
    rows = re.findall(rf"^{LEVEL} *(\d+\.\d) seconds( \(IMPORT FAILED\))?: (.+)$", log, re.MULTILINE)
    return {Path(path).name: (float(seconds), not failed) for seconds, failed, path in rows}
