"""Draws the plot of quality_against_steps.py from what it has measured. Needs matplotlib, which only benchmarks use."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import matplotlib
import numpy as np

matplotlib.use("Agg")
import setting  # noqa: F401

import matplotlib.pyplot as plt
from frechet import jackknife_error
from scipy.stats import sem

# Okabe and Ito's palette, told apart with any colour vision; its yellow is too faint for lines on white.
BLACK, BLUE, ORANGE, GREEN, RED, PINK, SKY = "#000000 #0072b2 #e69f00 #009e73 #d55e00 #cc79a7 #56b4e9".split()
GRAY = "#666666"

Value = Callable[[dict], tuple[float, float]]  # a row -> (what is plotted, its error)


@dataclass(frozen=True)
class Line:
    """One way in the plot. Every line has a marker of its own too, so that colour is not needed."""

    way: str
    label: str
    colour: str
    marker: str
    style: str = "-"


SAMPLERS = [
    Line("LCM Kit", "LCM Kit (LCM-LoRA)", BLUE, "o"),
    Line("core lcm, sgm_uniform", "core lcm, sgm_uniform (LCM-LoRA)", SKY, "s"),
    Line("DDIM, sgm_uniform", "DDIM, sgm_uniform", GREEN, "^", "--"),
    Line("DPM++ 2M, sgm_uniform", "DPM++ 2M, sgm_uniform", ORANGE, "D", "--"),
    Line("DPM++ 2M, karras", "DPM++ 2M, karras", RED, "v", "--"),
    Line("Euler ancestral, sgm_uniform", "Euler ancestral, sgm_uniform", PINK, "P", "--"),
]
SETTINGS = [
    Line("LCM Kit", "gamma 1 (LCM)", BLUE, "o"),
    Line("LCM Kit, gamma 0.7", "gamma 0.7", GREEN, "^"),
    Line("LCM Kit, gamma 0.3", "gamma 0.3", ORANGE, "D"),
    Line("LCM Kit, gamma 0", "gamma 0 (Euler, DDIM)", RED, "v"),
    Line("LCM Kit, gamma 0 then 1", "gamma 0, second half 1", PINK, "P", ":"),
    Line("LCM Kit, gamma 1 then 0", "gamma 1, second half 0", BLACK, "X", ":"),
    Line("core lcm, sgm_uniform", "core lcm, sgm_uniform", SKY, "s", "--"),
]


@dataclass(frozen=True)
class Row:
    """Two panels, score and distance, with the range of values that each shows."""

    title: str
    axis: str  # "steps" or "calls"
    lines: list[Line]
    scores: tuple[float, float]
    distances: tuple[float, float]


ROWS = [
    Row("Samplers, at equal steps", "steps", SAMPLERS, (5, 100.4), (20, 140)),
    Row("Samplers, at equal model calls (guidance takes two a step)", "calls", SAMPLERS, (5, 100.4), (20, 140)),
    Row("Settings of LCM Kit, with the LCM-LoRA (closer up)", "steps", SETTINGS, (92.5, 100.2), (20, 60)),
]
SCORES = [10, 50, 70, 80, 90, 94, 96, 98, 100]  # the ticks
DISTANCES = [20, 25, 30, 40, 50, 60, 80, 100, 120]
STEPS = {"steps": [1, 2, 3, 4, 6, 8, 16, 32], "calls": [1, 2, 4, 8, 16, 32, 64]}


def draw(results: dict, path: Path) -> None:
    """Write the plot of results, the JSON of quality_against_steps.py, as a PNG."""
    plt.rcParams.update({"font.size": 11, "axes.spines.top": False, "axes.spines.right": False})
    rows = results["rows"]
    figure, panels = plt.subplots(len(ROWS), 2, figsize=(13.0, 13.5), facecolor="white", layout="constrained")
    for row, (left, right) in zip(ROWS, panels, strict=True):
        for panel, value in ((left, _score), (right, _frechet)):
            for line in row.lines:
                _line(panel, rows, line, row.axis, value)
            _axes(panel, row.axis)
        left.set_title(row.title, loc="left", fontweight="bold", pad=14)
        left.set_ylabel("names the prompted concept, %\n(higher is better; scale stretched near 100)")
        left.set_yscale("function", functions=(_stretched, _squeezed))
        left.set_yticks([tick for tick in SCORES if row.scores[0] <= tick <= row.scores[1]])
        left.set_ylim(*row.scores)
        right.set_ylabel("Frechet distance to the teacher\n(lower is better)")
        right.set_yscale("log")
        right.set_yticks([tick for tick in DISTANCES if row.distances[0] <= tick <= row.distances[1]])
        right.yaxis.set_major_formatter("{x:g}")
        right.yaxis.set_minor_locator(matplotlib.ticker.NullLocator())
        right.set_ylim(*row.distances)
        _floor(right, rows)
        _labels(right, rows, row.lines, row.axis)
    figure.supxlabel(_note(results), fontsize=10, color=GRAY, x=0.01, ha="left")
    figure.savefig(path, dpi=110)
    plt.close(figure)


def _stretched(percent):
    """A scale on which 98 and 96 are well apart, and 10 has room too: the logarithm of what is missing to 105."""
    return -np.log(np.maximum(105 - percent, 1e-3))


def _squeezed(height):
    return 105 - np.exp(-height)


def _note(results: dict) -> str:
    return (
        f"Embedded model. {results['pictures']} pictures a point ({results['seeds']} seeds of every concept), "
        f"{results['features']} features; bars: standard error over seeds. Without LoRA (dashed): guidance "
        f"{results['guidance']:g}."
    )


def _score(row: dict) -> tuple[float, float]:
    """Percent, and its standard error over seeds."""
    return 100 * row["score"], 100 * float(sem(row["score_by_seed"]))


def _frechet(row: dict) -> tuple[float, float]:
    return row["frechet"], jackknife_error(row["frechet_without_seed"])


def _points(rows: list[dict], line: Line) -> list[dict]:
    return sorted((row for row in rows if row["way"] == line.way), key=lambda row: row["steps"])


def _line(panel, rows: list[dict], line: Line, axis: str, value: Value) -> None:
    points = _points(rows, line)
    at, values = [row[axis] for row in points], [value(row) for row in points]
    middles, errors = zip(*values, strict=True) if values else ((), ())
    panel.errorbar(at, middles, yerr=errors, color=line.colour, linestyle="", elinewidth=1.2, capsize=2, alpha=0.5)
    panel.plot(
        at, middles, color=line.colour, marker=line.marker, linestyle=line.style, markersize=6.5, linewidth=1.8,
        markeredgecolor="white", markeredgewidth=0.6,
    )  # fmt: skip


def _axes(panel, axis: str) -> None:
    panel.set_xscale("log")
    panel.set_xticks(STEPS[axis], [str(tick) for tick in STEPS[axis]])
    panel.xaxis.set_minor_locator(matplotlib.ticker.NullLocator())
    panel.set_xlabel("steps" if axis == "steps" else "model calls")
    panel.grid(axis="y", color="#e4e4e4", linewidth=0.8)
    panel.set_axisbelow(True)


def _floor(panel, rows: list[dict]) -> None:
    for row in rows:
        if row["way"].startswith("teacher"):
            panel.axhline(row["frechet"], color=GRAY, linewidth=1.2, linestyle=(0, (5, 3)), zorder=1)
            panel.annotate(
                "floor: the teacher against itself, other noise", (0.01, row["frechet"]),
                xycoords=("axes fraction", "data"), xytext=(0, -4), textcoords="offset points", va="top",
                color=GRAY, fontsize=9.5,
            )  # fmt: skip


def _labels(panel, rows: list[dict], lines: list[Line], axis: str) -> None:
    """Each line's name right of the panel, at the height where the line ends; moved apart where they would touch."""
    ends = [(line, points[-1]) for line in lines if (points := _points(rows, line))]
    ends.sort(key=lambda end: end[1]["frechet"])
    gap = 0.062  # height of a line of text, as a share of the panel
    places = []
    for _, point in ends:
        height = panel.transAxes.inverted().transform(panel.transData.transform((1, point["frechet"])))[1]
        places.append(max(height, places[-1] + gap) if places else height)
    for (line, point), place in zip(ends, places, strict=True):
        # The text is dark, as the palette's light colours are read badly; a marker in front carries the colour.
        panel.annotate(
            "", (point[axis], point["frechet"]), xytext=(1.08, place), textcoords="axes fraction", annotation_clip=False,
            arrowprops={"arrowstyle": "-", "color": line.colour, "linewidth": 0.8, "alpha": 0.6, "shrinkB": 4},
        )  # fmt: skip
        panel.plot(
            [1.08],
            [place],
            transform=panel.transAxes,
            clip_on=False,
            color=line.colour,
            marker=line.marker,
            markersize=7,
        )
        panel.text(1.105, place, line.label, transform=panel.transAxes, va="center", color="#222222", fontsize=10.5)
