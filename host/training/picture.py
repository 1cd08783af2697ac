"""The course of a training as one picture: the loss, and rows of samples under it."""

import math
from collections.abc import Sequence

from PIL import Image

from ...lora_merge.comparing.canvas import INK, PAPER, Axes, Canvas
from ...lora_merge.words import many

WIDTH, HEIGHT, MARGIN, LABEL = 768, 256, 24, 18
STEPS, RED = (190, 205, 235), (200, 60, 40)


def smooth(values: Sequence[float], share: float = 0.02) -> list[float]:
    """A running mean over about `share` of the values, weighted towards the newest."""
    keep = 1 - 1 / max(1.0, share * len(values))
    result: list[float] = []
    mean = weight = 0.0
    for value in values:
        mean, weight = keep * mean + (1 - keep) * value, keep * weight + (1 - keep)
        result.append(mean / weight)  # divided, or the first ones would be pulled to 0
    return result


def loss_curve(losses: Sequence[float], validation: Sequence[tuple[int, float]] = ()) -> Image.Image:
    """Loss over steps, logarithmic: each step pale, their running mean dark, (step, validation loss) red.

    Without losses, empty axes.
    """
    fixed = {step: math.log10(max(loss, 1e-12)) for step, loss in validation if math.isfinite(loss)}
    curves = [(_logs(losses), STEPS, 2), (_logs(smooth(losses)), INK, 2), (fixed, RED, 3)]
    every = [*curves[0][0].values(), *fixed.values()]
    low, high = (min(every), max(every)) if every else (-1.0, 0.0)
    flat = 0.0 if high > low else 0.1
    axes = Axes(
        canvas := Canvas(WIDTH, HEIGHT),
        (MARGIN, 8, WIDTH - MARGIN, HEIGHT - 4),
        (min([1, *fixed]), max(len(losses), 2)),
        (low - flat, high + flat),
        title=f"loss {losses[-1]:.3g} after {many(len(losses), 'steps')}" if losses else "no loss",
        across="step",
        up=f"each step, and their running mean; lowest {min(losses):.3g}, highest {max(losses):.3g}" if losses else "",
        tell=lambda log: f"{10**log:.2g}",
    )
    for curve, colour, width in curves:
        points = list(curve.items())
        # One step is drawn as a line too.
        axes.curve(points if len(points) != 1 else [*points, (points[0][0] + 1, points[0][1])], colour, width)
    if fixed:
        words = f"validation loss {validation[-1][1]:.3g}, at first {validation[0][1]:.3g}"
        canvas.text((WIDTH - MARGIN, 8), words, 13, RED, anchor="ra")
    return canvas.image()


def _logs(losses: Sequence[float]) -> dict[int, float]:
    """Step from 1 on -> log10 of its loss; without steps whose loss is no number."""
    return {step: math.log10(max(loss, 1e-12)) for step, loss in enumerate(losses, start=1) if math.isfinite(loss)}


def row(images: Sequence[Image.Image], label: str) -> Image.Image:
    """Images side by side over the whole width, with a line of text above."""
    side = WIDTH // max(1, len(images))
    scaled = [image.convert("RGB").resize((side, max(1, side * image.height // image.width))) for image in images]
    head = Canvas(WIDTH, LABEL)
    head.text((MARGIN, 2), label, 12)
    picture = Image.new("RGB", (WIDTH, LABEL + max((image.height for image in scaled), default=0)), PAPER)
    picture.paste(head.image(), (0, 0))
    for place, image in enumerate(scaled):
        picture.paste(image, (place * side, LABEL))
    return picture


def named(names: Sequence[str]) -> Image.Image:
    """A line of text with a name over each column of a row of as many images; of a longer one the middle is left out."""
    canvas, side = Canvas(WIDTH, LABEL), WIDTH // max(1, len(names))
    for place, name in enumerate(names):
        text = name.encode("latin-1", "replace").decode("latin-1")
        canvas.text((place * side + 3, 2), text.replace("\n", " "), 12, width=side - 6)
    return canvas.image()


def stacked(pictures: Sequence[Image.Image]) -> Image.Image:
    """Pictures of the same width, one below the other. At least one."""
    canvas = Image.new("RGB", (pictures[0].width, sum(picture.height for picture in pictures)), PAPER)
    top = 0
    for picture in pictures:
        canvas.paste(picture, (0, top))
        top += picture.height
    return canvas
