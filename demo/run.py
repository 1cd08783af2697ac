"""Pictures in 4 steps with the embedded tiny model, made by ComfyUI's own server.

    python demo/run.py                          a prompt grid and the paper's Figure 3
    python demo/run.py --prompt "cat face"      your own words, eight seeds

COMFYUI_PATH names the ComfyUI folder (default .comfyui, which `make setup` builds); run it with ComfyUI's Python.
Pictures and the server's log go to demo/output.
"""

from __future__ import annotations

import argparse
import os
import shutil
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import figures
import prompts
from album import Album, make, table
from comfyui_client import Client, ExecutionFailed, PromptRejected
from comfyui_server import ComfyUIServer, ServerError
from graphs import TINY, strength_by_steps
from PIL import Image

DEMO = Path(__file__).resolve().parent
ROOT = DEMO.parent
MODELS = DEMO / "models"
SHEET = "strength_by_steps.png"
THUMBNAILS = {
    "1 First picture with an LCM-LoRA": False,
    "2 Style LoRA and LCM-LoRA": True,
}  # workflow -> with the style


class DemoError(RuntimeError):
    """One line for the user: what is wrong and the way out."""


def words_of(prompt: str) -> str:
    """The prompt; says which of its words have no effect. Raises DemoError if that is all of them."""
    known, unknown = prompts.split(prompt)
    if not known:
        raise DemoError(
            f'the tiny model knows no word of "{prompt}"; try {", ".join(prompts.EXAMPLES)}, or other words of '
            f"{os.path.relpath(prompts.VOCABULARY)}"
        )
    if unknown:
        print(f"not known to the tiny model, left out: {', '.join(unknown)}")
    return prompt


def comfyui() -> Path:
    path = Path(os.environ.get("COMFYUI_PATH") or ROOT / ".comfyui").expanduser()
    if not (path / "main.py").is_file():
        raise DemoError(f"there is no ComfyUI in {path}: run `make demo`, or set COMFYUI_PATH to the folder of main.py")
    return path


def check_models() -> None:
    loras = [f"loras/{name}" for name in (TINY.style, TINY.lcm, TINY.phased)]
    needed = [f"checkpoints/{TINY.checkpoint}", f"vae/{TINY.vae}", *loras]
    missing = [file for file in needed if not (MODELS / file).is_file()]
    if missing:
        raise DemoError(f"demo/models lacks {', '.join(missing)}: `git checkout demo/models` brings back what it held")


@contextmanager
def server_and_client(output: Path) -> Iterator[tuple[ComfyUIServer, Client]]:
    """A ComfyUI with this pack and the tiny model; what fails in a node is raised with the log's end."""
    start = time.monotonic()
    print("starting ComfyUI ...", end=" ", flush=True)
    packs = {"lcm-kit": ROOT, "tiny_emoji": DEMO / "tiny_emoji"}
    with ComfyUIServer(comfyui(), output / "comfyui", packs=packs, models=[MODELS]) as server:
        print(f"{time.monotonic() - start:.1f} s")
        try:
            with Client(server) as client:
                yield server, client
        except (ExecutionFailed, PromptRejected) as error:
            raise server.failure(str(error)) from error


def run(prompt: str | None, output: Path) -> Album:
    """Makes the pictures, writes the figures into `output` and tells what was made."""
    with server_and_client(output) as (server, client):
        album = make(client, figures.of_prompt(prompt) if prompt else figures.everything())
        sheet = None if prompt else client.images(client.run(strength_by_steps(TINY, "cat face", 5)))[0]
    print(f"\n{table(album)}\n")
    drawn = (
        {"prompt": figures.draw_prompt(album, prompt)}
        if prompt
        else {"grid": figures.draw_grid(album), "figure3": figures.draw_figure(album)}
    )
    for name, picture in drawn.items():
        picture.save(output / f"{name}.png")
        print(f"{name:8}  {os.path.relpath(output / name)}.png")
    if sheet is not None:
        (output / SHEET).write_bytes(sheet)
        print(f"{'sheet':8}  {os.path.relpath(output / SHEET)}")
    print(f"{'log':8}  {os.path.relpath(server.log)}")
    return album


def update_repository(album: Album, output: Path) -> None:
    """Renews the pictures that the repository carries: the README's, and those of the template browser."""
    docs = ROOT / "docs"
    docs.mkdir(exist_ok=True)
    figures.draw_grid(album).save(docs / "demo_grid.png", optimize=True)
    figures.draw_figure(album).save(docs / "demo_figure3.png", optimize=True)
    for workflow, styled in THUMBNAILS.items():
        figures.draw_thumbnail(album, styled=styled).save(ROOT / "example_workflows" / f"{workflow}.jpg", quality=85)
    Image.open(output / SHEET).save(docs / SHEET, optimize=True)  # without the graph that is in it
    for name in ("screenshot.png", "loader.png"):
        screenshot = output / name
        if screenshot.exists():
            shutil.copyfile(screenshot, docs / name)
        else:
            print(f"{os.path.relpath(screenshot)} is not there, docs/{name} stays: `make integration` takes it")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    what = parser.add_mutually_exclusive_group()
    what.add_argument("--prompt", help="draw these words instead of the grid")
    what.add_argument("--update-readme", action="store_true", help="also renew docs/*.png and example_workflows/*.jpg")
    parser.add_argument("--output", type=Path, default=DEMO / "output", help="folder for pictures and log")
    options = parser.parse_args()
    output = options.output.resolve()
    try:
        prompt = None if options.prompt is None else words_of(options.prompt)
        check_models()
        album = run(prompt, output)
        if options.update_readme:
            update_repository(album, output)
    except (DemoError, ServerError) as error:
        print(f"demo: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("\ndemo: stopped", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
