"""Draws docs/icon.png and docs/banner.png, which the ComfyUI Registry shows: a picture that comes out of noise in four steps.

make brand
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont

DOCS = Path(__file__).resolve().parents[1] / "docs"
STEPS = 4
SIGMAS = (1.0, 0.55, 0.25, 0.0)  # shares of noise, first step to last
ICON = 400  # pixels; the registry asks for a square of at most 400
BANNER = (1680, 720)  # 21 : 9
FINE = 4  # drawn this much larger and scaled down
GROUND = np.array([22, 24, 34], dtype=np.float32)
WARM, COLD = np.array([255, 176, 66], dtype=np.float32), np.array([214, 62, 122], dtype=np.float32)


def landscape(height: int, width: int) -> np.ndarray:
    """(height, width, 3) in 0..255: a sun over hills, all by formula."""
    y, x = np.mgrid[0:height, 0:width].astype(np.float32)
    x, y = x / width, y / height
    sky = WARM * (1 - y[..., None]) * 0.75 + COLD * y[..., None] * 0.9 + GROUND * 0.2
    sun = np.hypot(x - 0.66, (y - 0.42) * height / width) < 0.19
    sky[sun] = WARM * 0.55 + 255 * 0.45
    far = y > 0.62 + 0.06 * np.sin(7 * x + 0.6)
    near = y > 0.78 + 0.05 * np.sin(5 * x + 2.4)
    sky[far] = COLD * 0.45 + GROUND * 0.55
    sky[near] = COLD * 0.2 + GROUND * 1.1
    return sky


def steps(height: int, width: int, grain: int) -> np.ndarray:
    """The landscape in STEPS upright bands, each with less noise than the one before. grain: pixels of a grain of noise."""
    clean = landscape(height, width)
    generator = np.random.default_rng(4)
    grains = generator.standard_normal((height // grain + 1, width // grain + 1, 3)).astype(np.float32)
    noise = 128 + 58 * grains.repeat(grain, axis=0).repeat(grain, axis=1)[:height, :width]
    band = np.minimum((np.arange(width) * STEPS) // width, STEPS - 1)
    share = np.array(SIGMAS, dtype=np.float32)[band][None, :, None]
    mixed = np.sqrt(1 - share**2) * clean + share * noise
    edges = np.flatnonzero(np.diff(band))
    for edge in edges:  # a thin line between two steps
        mixed[:, max(edge - grain // 4, 0) : edge + grain // 4 + 1] = GROUND
    return np.clip(mixed, 0, 255)


def rounded(pixels: np.ndarray, radius: int) -> Image.Image:
    """The picture with round corners, transparent outside."""
    picture = Image.fromarray(pixels.astype(np.uint8)).convert("RGBA")
    mask = Image.new("L", picture.size, 0)
    ImageDraw.Draw(mask).rounded_rectangle((0, 0, picture.width - 1, picture.height - 1), radius, fill=255)
    picture.putalpha(mask)
    return picture


def icon() -> Image.Image:
    size = ICON * FINE
    return rounded(steps(size, size, grain=12 * FINE), 64 * FINE).resize((ICON, ICON), Image.Resampling.LANCZOS)


def banner() -> Image.Image:
    height = BANNER[1]
    sheet = Image.new("RGB", BANNER, tuple(int(v) for v in GROUND))
    side = height - 2 * 90
    picture = rounded(steps(side * 2, side * 2, grain=30), 120).resize((side, side), Image.Resampling.LANCZOS)
    sheet.paste(picture, (90, 90), picture)
    draw = ImageDraw.Draw(sheet)
    left = 90 + side + 90
    lines = [("LCM Kit", 150, (255, 255, 255)), ("pictures in 4 steps", 64, tuple(int(v) for v in WARM))]
    lines += [
        ("LCM sampling and LoRA arithmetic", 44, (200, 202, 212)),
        ("for ComfyUI, exact and explained", 44, (200, 202, 212)),
    ]
    top = 150
    for text, size, colour in lines:
        draw.text((left, top), text, fill=colour, font=ImageFont.load_default(size))
        top += int(size * 1.45)
    return sheet


def main() -> None:
    icon().save(DOCS / "icon.png", optimize=True)
    banner().save(DOCS / "banner.png", optimize=True)
    print("docs/icon.png, docs/banner.png")


if __name__ == "__main__":
    main()
