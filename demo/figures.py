"""The demo's figures: what to make for each, and how it is drawn."""

from __future__ import annotations

from collections.abc import Sequence

import prompts
import sheet
from album import Album, Made
from graphs import LCM, PHASED, STYLED_BASELINE, STYLED_LCM, Shot, Way
from PIL import Image

GRID = [[Shot(prompt, seed=1, steps=4) for prompt in line] for line in prompts.GRID]
STEPS = (2, 4, 8, 16, 32)
FIGURE_SEEDS = (1, 2)
FIGURE = {prompt: [[Shot(prompt, seed, n) for seed in FIGURE_SEEDS] for n in STEPS] for prompt in prompts.FIGURE}
SEEDS = range(1, 9)


def everything() -> list[tuple[Way, list[Shot]]]:
    """The pictures that draw_grid and draw_figure need."""
    grid = [shot for line in GRID for shot in line]
    figure = [shot for columns in FIGURE.values() for cell in columns for shot in cell]
    return [(LCM, grid), (STYLED_LCM, [*grid, *figure]), (STYLED_BASELINE, figure), (PHASED, GRID[0])]


def of_prompt(prompt: str) -> list[tuple[Way, list[Shot]]]:
    """The pictures that draw_prompt needs."""
    shots = [Shot(prompt, seed, steps=4) for seed in SEEDS]
    return [(LCM, shots), (STYLED_LCM, shots), (PHASED, shots)]


def draw_grid(album: Album) -> Image.Image:
    """Every prompt without and with the style, one below the other; last, the first line in 4 phases."""
    rows = []
    for line in GRID:
        rows.append(_row(album, LCM, line))
        rows.append(_row(album, STYLED_LCM, line, captions=[shot.prompt for shot in line]))
    rows.append(_row(album, PHASED, GRID[0], captions=[shot.prompt for shot in GRID[0]]))
    return sheet.draw(rows)


def draw_figure(album: Album) -> Image.Image:
    """For each prompt a row of each way; a column is a number of steps and holds every seed."""
    rows = []
    for prompt, columns in FIGURE.items():
        for way in (STYLED_BASELINE, STYLED_LCM):
            cells = [sheet.side_by_side([_large(album[way, shot]) for shot in cell]) for cell in columns]
            above = [f"{n} steps, {n * way.calls_per_step} model calls" for n in STEPS]
            rows.append(sheet.Row(cells, f"{prompt}\n\n{_label(way)}", above=above))
    return sheet.draw(rows)


def draw_prompt(album: Album, prompt: str) -> Image.Image:
    """Eight pictures of the user's words: without and with the style, and in 4 phases."""
    ways = of_prompt(prompt)
    above = [f"seed {shot.seed}" for shot in ways[0][1]]
    rows = [_row(album, way, shots, above=() if number else above) for number, (way, shots) in enumerate(ways)]
    return sheet.draw(rows, prompt)


def draw_thumbnail(album: Album, *, styled: bool) -> Image.Image:
    """Four pictures of the grid on a square, for the template browser."""
    corners = [GRID[0][0], GRID[0][1], GRID[2][3], GRID[2][4]]
    tiles = [sheet.enlarge(album[STYLED_LCM if styled else LCM, shot].picture, 4) for shot in corners]
    side = tiles[0].width
    square = Image.new("RGB", (2 * side, 2 * side))
    for i, tile in enumerate(tiles):
        square.paste(tile, (i % 2 * side, i // 2 * side))
    return square


def _large(made: Made) -> Image.Image:
    return sheet.enlarge(made.picture, 2)


def _row(album: Album, way: Way, shots: Sequence[Shot], **text: Sequence[str]) -> sheet.Row:
    return sheet.Row([_large(album[way, shot]) for shot in shots], _label(way), **text)


def _label(way: Way) -> str:
    return way.name.replace(" + ", " +\n").replace(", ", ",\n")
