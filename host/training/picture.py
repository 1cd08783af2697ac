"""The course of a training as one picture: the loss, and rows of samples under it."""

import math
from collections.abc import Sequence

from PIL import Image

from ...lora_merge.comparing.canvas import INK, PAPER, Axes, Canvas

WIDTH, HEIGHT, MARGIN, LABEL = 768, 256, 24, 18
STEPS = (190, 205, 235)


def smooth(values: Sequence[float], share: float = 0.02) -> list[float]:
    """A running mean over about `share` of the values, weighted towards the newest."""
    keep = 1 - 1 / max(1.0, share * len(values))
    result: list[float] = []
    mean = weight = 0.0
    for value in values:
        mean, weight = keep * mean + (1 - keep) * value, keep * weight + (1 - keep)
        result.append(mean / weight)  # divided, or the first ones would be pulled to 0
    return result


def loss_curve(losses: Sequence[float]) -> Image.Image:
    """Loss over steps, logarithmic: each step pale, their running mean dark. Without losses, empty axes."""
    curves = [_logs(losses), _logs(smooth(losses))]
    low, high = (min(curves[0].values()), max(curves[0].values())) if curves[0] else (-1.0, 0.0)
    flat = 0.0 if high > low else 0.1
    canvas = Canvas(WIDTH, HEIGHT)
    axes = Axes(
        canvas,
        (MARGIN, 8, WIDTH - MARGIN, HEIGHT - 4),
        (1, max(len(losses), 2)),
        (low - flat, high + flat),
        title=f"loss {losses[-1]:.3g} after {len(losses)} steps" if losses else "no loss",
        across="step",
        up=f"each step, and their running mean; lowest {min(losses):.3g}, highest {max(losses):.3g}" if losses else "",
        tell=lambda log: f"{10**log:.2g}",
    )
    for curve, colour in zip(curves, (STEPS, INK), strict=True):
        points = list(curve.items())
        # One step is drawn as a line too.
        axes.curve(points if len(points) != 1 else [*points, (points[0][0] + 1, points[0][1])], colour)
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


def stacked(pictures: Sequence[Image.Image]) -> Image.Image:
    """Pictures of the same width, one below the other. At least one."""
    canvas = Image.new("RGB", (pictures[0].width, sum(picture.height for picture in pictures)), PAPER)
    top = 0
    for picture in pictures:
        canvas.paste(picture, (0, top))
        top += picture.height
    return canvas
