"""The emoji pictures that the demo's models learn from, and their captions.

Openly licensed sets, fetched from the npm registry: Noto Color Emoji (the base), Fluent Emoji High Contrast (the "ink"
style), and two that only measurements use, Twemoji and Fluent Emoji 3D. Every picture is one of `CONCEPTS` in a random
pose on a random background colour, so one caption stands for very many pictures: a set with one picture per caption would
make every few-step solver look as good as fifty steps.
"""

import io
import json
import subprocess
import tarfile
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image

SIZE = 64  # pixels, the side of a training picture
CHANNELS = 12  # of a latent; each of its 8 x 8 positions stands for 8 x 8 pixels

# name -> (emoji, group). The name is the caption; the group is a caption that many concepts share.
CONCEPTS: dict[str, tuple[str, str]] = {
    **{
        name: (emoji, "animal")
        for emoji, name in [
            ("🐱", "cat face"), ("🐶", "dog face"), ("🐭", "mouse face"), ("🐰", "rabbit face"), ("🦊", "fox face"),
            ("🐻", "bear face"), ("🐼", "panda face"), ("🐨", "koala face"), ("🐯", "tiger face"),
            ("🦁", "lion face"), ("🐮", "cow face"), ("🐷", "pig face"), ("🐸", "frog face"), ("🐵", "monkey face"),
            ("🐧", "penguin"), ("🐦", "bird"), ("🦉", "owl"), ("🦄", "unicorn face"), ("🐝", "bee"),
            ("🐞", "ladybug"), ("🦋", "butterfly"), ("🐌", "snail"), ("🐙", "octopus"), ("🐳", "whale"),
            ("🦀", "crab"), ("🐢", "turtle"), ("🐍", "snake"), ("🐘", "elephant"), ("🦖", "dinosaur"),
        ]
    },
    **{
        name: (emoji, "smiley")
        for emoji, name in [
            ("😀", "grinning smiley"), ("😂", "laughing smiley"), ("😍", "smiley with heart eyes"),
            ("😎", "smiley with sunglasses"), ("😢", "crying smiley"), ("😡", "angry smiley"), ("🤖", "robot"),
            ("👻", "ghost"), ("💀", "skull"), ("👽", "alien"), ("🎃", "pumpkin"),
        ]
    },
    **{
        name: (emoji, "sky")
        for emoji, name in [
            ("⭐", "star"), ("🌙", "moon"), ("☀️", "sun"), ("☁️", "cloud"), ("🌈", "rainbow"), ("⚡", "lightning"),
            ("❄️", "snowflake"), ("🔥", "fire"), ("💧", "drop of water"), ("🌍", "earth"),
        ]
    },
    **{
        name: (emoji, "plant")
        for emoji, name in [
            ("🌸", "blossom"), ("🌹", "rose"), ("🌻", "sunflower"), ("🌷", "tulip"), ("🌵", "cactus"),
            ("🌲", "tree"), ("🍀", "clover"), ("🍁", "maple leaf"), ("🍄", "mushroom"),
        ]
    },
    **{
        name: (emoji, "food")
        for emoji, name in [
            ("🍎", "apple"), ("🍊", "orange fruit"), ("🍋", "lemon"), ("🍌", "banana"), ("🍉", "watermelon"),
            ("🍇", "grapes"), ("🍓", "strawberry"), ("🍒", "cherries"), ("🍍", "pineapple"), ("🥕", "carrot"),
            ("🍆", "eggplant"), ("🥑", "avocado"), ("🧀", "cheese"), ("🍔", "hamburger"), ("🍟", "fries"),
            ("🍕", "pizza"), ("🍩", "donut"), ("🍪", "cookie"), ("🎂", "birthday cake"), ("🍦", "ice cream"),
            ("☕", "cup of coffee"),
        ]
    },
    **{
        name: (emoji, "object")
        for emoji, name in [
            ("❤️", "red heart"), ("💙", "blue heart"), ("💔", "broken heart"), ("🚗", "car"), ("🚌", "bus"),
            ("🚀", "rocket"), ("✈️", "airplane"), ("⛵", "sailboat"), ("🏠", "house"), ("🎈", "balloon"),
            ("🎁", "gift"), ("⚽", "soccer ball"), ("🏀", "basketball"), ("🎸", "guitar"), ("🔔", "bell"),
            ("💡", "light bulb"), ("🔑", "key"), ("⏰", "alarm clock"), ("📷", "camera"), ("☂️", "umbrella"),
            ("👑", "crown"), ("💎", "diamond"), ("⚓", "anchor"),
        ]
    },
}  # fmt: skip
NAMES = list(CONCEPTS)
GROUPS = sorted({group for _, group in CONCEPTS.values()})

# Background colours: sRGB, 0..255. No black: the ink style draws in black.
COLOURS = {
    "white": (250, 250, 250), "gray": (158, 162, 168), "red": (226, 96, 92), "orange": (246, 170, 90),
    "yellow": (250, 226, 110), "green": (136, 200, 130), "blue": (120, 180, 236), "purple": (176, 140, 216),
    "pink": (248, 178, 204),
}  # fmt: skip
COLOUR_NAMES = list(COLOURS)

PACKAGES = {
    "noto": "emoji-datasource-google@16.0.0",
    "ink": "@iconify-json/fluent-emoji-high-contrast@1.2.6",
    "twemoji": "emoji-datasource-twitter@16.0.0",
    "fluent": "@lobehub/fluent-emoji-3d@1.1.0",
}


def vocabulary() -> list[str]:
    """All words of all captions, sorted."""
    words = {w for name in NAMES for w in name.split()} | set(GROUPS) | set(COLOURS) | {"background"}
    return sorted(words)


def fetch(kind: str, cache: Path) -> Path:
    """Folder of the unpacked npm package of one set; downloaded once into `cache` (needs npm)."""
    folder = cache / kind
    if not folder.exists():
        cache.mkdir(parents=True, exist_ok=True)
        printed = subprocess.run(
            ["npm", "pack", "--silent", PACKAGES[kind]], cwd=cache, check=True, capture_output=True, text=True
        ).stdout
        with tarfile.open(cache / printed.split()[-1]) as archive:
            archive.extractall(cache / f"{kind}.part", filter="data")
        (cache / f"{kind}.part" / "package").rename(folder)
    return folder


def glyphs(kind: str, cache: Path) -> torch.Tensor:
    """One picture per concept, premultiplied RGBA float32 in 0..1: (len(NAMES), 4, 64, 64). kind: one of `PACKAGES`."""
    folder = fetch(kind, cache)
    codes = ["-".join(f"{ord(c):04x}" for c in emoji) for emoji, _ in CONCEPTS.values()]
    if kind == "ink":
        pictures = _svg_icons(folder, codes)
    else:
        place = {"noto": "img/google/64/{}.png", "twemoji": "img/twitter/64/{}.png", "fluent": "assets/{}.webp"}[kind]
        pictures = [Image.open(folder / place.format(code)) for code in codes]
    return torch.stack([_premultiplied(picture) for picture in pictures])


def _svg_icons(folder: Path, codes: list[str]) -> list[Image.Image]:
    import resvg_py  # a wheel from PyPI; only the training needs it

    file_names = json.loads((folder / "chars.json").read_text())
    icons = json.loads((folder / "icons.json").read_text())["icons"]
    pictures = []
    for code in codes:
        body = icons[file_names.get(code) or file_names[code.removesuffix("-fe0f")]]["body"]
        svg = f'<svg xmlns="http://www.w3.org/2000/svg" width="64" height="64" viewBox="0 0 32 32">{body}</svg>'
        pictures.append(Image.open(io.BytesIO(bytes(resvg_py.svg_to_bytes(svg_string=svg)))))
    return pictures


def _premultiplied(picture: Image.Image) -> torch.Tensor:
    rgba = torch.from_numpy(np.array(picture.convert("RGBA"))).permute(2, 0, 1).float() / 255
    rgba = torch.cat([rgba[:3] * rgba[3:], rgba[3:]])
    # The mean of whole blocks, after premultiplying: transparent pixels have a colour too, which must not bleed in.
    return F.avg_pool2d(rgba, picture.width // SIZE)


def draw(glyph: torch.Tensor, colour: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """Pictures (b, 3, 64, 64) in 0..1: each glyph (b, 4, h, w) in a random pose on its background colour.

    colour: (b,) indices into COLOUR_NAMES. Pose: mirrored or not, turned up to 15 degrees, 0.72 to 0.96 of the
    frame, moved up to 3 pixels; the background colour varies by up to 5 %.
    """
    b = len(glyph)

    def uniform(low: float, high: float, *shape: int) -> torch.Tensor:
        return torch.rand(b, *shape, generator=generator) * (high - low) + low

    angle = uniform(-15, 15) * torch.pi / 180
    scale = uniform(0.72, 0.96)
    mirror = torch.where(torch.rand(b, generator=generator) < 0.5, -1.0, 1.0)
    cos, sin = angle.cos() / scale, angle.sin() / scale
    theta = torch.stack([
        torch.stack([cos * mirror, -sin * mirror, uniform(-0.1, 0.1)], dim=1),
        torch.stack([sin, cos, uniform(-0.1, 0.1)], dim=1),
    ], dim=1)  # fmt: skip
    grid = F.affine_grid(theta, [b, 4, SIZE, SIZE], align_corners=False)
    rgba = F.grid_sample(glyph, grid, mode="bilinear", padding_mode="zeros", align_corners=False)
    ground = torch.tensor(list(COLOURS.values()), dtype=torch.float32)[colour] / 255
    ground = (ground + uniform(-0.05, 0.05, 3)).clamp(0, 1)[:, :, None, None]
    return (rgba[:, :3] + (1 - rgba[:, 3:]) * ground).clamp(0, 1)


def caption(concept: int, colour: int, generator: torch.Generator) -> str:
    """A caption that is true of the picture, with words left out: most name the thing, half the colour."""
    draw_ = torch.rand(2, generator=generator)
    what = NAMES[concept] if draw_[0] < 0.85 else CONCEPTS[NAMES[concept]][1] if draw_[0] < 0.95 else ""
    ground = f"{COLOUR_NAMES[colour]} background" if draw_[1] < 0.5 else ""
    return " ".join(part for part in (what, ground) if part)
