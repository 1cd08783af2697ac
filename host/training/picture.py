"""The course of a training as one picture: the loss, and rows of samples under it."""

import math
from collections.abc import Sequence

from PIL import Image, ImageDraw

WIDTH, HEIGHT, MARGIN, LABEL = 768, 256, 24, 18
INK, PALE, PAPER, RED = (40, 40, 40), (190, 205, 235), (255, 255, 255), (200, 60, 40)


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

    Without losses, an empty frame.
    """
    image = Image.new("RGB", (WIDTH, HEIGHT), PAPER)
    draw = ImageDraw.Draw(image)
    draw.rectangle((MARGIN, MARGIN, WIDTH - MARGIN, HEIGHT - MARGIN), outline=INK)
    logs = [math.log10(max(loss, 1e-12)) for loss in losses]
    if not logs:
        return image
    fixed = [(step, math.log10(max(loss, 1e-12))) for step, loss in validation]
    every = logs + [log for _, log in fixed]
    low, high = min(every), max(every)
    height, width = HEIGHT - 2 * MARGIN, WIDTH - 2 * MARGIN

    def place(step: int, log: float) -> tuple[float, float]:
        across = step / max(1, len(logs) - 1)
        up = (log - low) / (high - low) if high > low else 0.5
        return MARGIN + across * width, HEIGHT - MARGIN - up * height

    for values, colour in ((logs, PALE), ([math.log10(v) for v in smooth([10**log for log in logs])], INK)):
        points = [place(step, log) for step, log in enumerate(values)]
        draw.line(points if len(points) > 1 else points * 2, fill=colour, width=2)
    if fixed:
        points = [place(max(step - 1, 0), log) for step, log in fixed]
        draw.line(points if len(points) > 1 else points * 2, fill=RED, width=3)
        draw.text(
            (WIDTH // 2, 6), f"validation loss {validation[-1][1]:.3g}, at first {validation[0][1]:.3g}", fill=RED
        )
    draw.text((MARGIN, 6), f"loss {losses[-1]:.3g} after {len(losses)} steps", fill=INK)
    draw.text((MARGIN, HEIGHT - MARGIN + 4), f"lowest {min(losses):.3g}, highest {max(losses):.3g}", fill=INK)
    return image


def row(images: Sequence[Image.Image], label: str) -> Image.Image:
    """Images side by side over the whole width, with a line of text above."""
    side = WIDTH // max(1, len(images))
    scaled = [image.convert("RGB").resize((side, max(1, side * image.height // image.width))) for image in images]
    canvas = Image.new("RGB", (WIDTH, LABEL + max((image.height for image in scaled), default=0)), PAPER)
    ImageDraw.Draw(canvas).text((MARGIN, 3), label, fill=INK)
    for place, image in enumerate(scaled):
        canvas.paste(image, (place * side, LABEL))
    return canvas


def named(names: Sequence[str]) -> Image.Image:
    """A line of text with a name over each column of a row of as many images; what does not fit is cut off."""
    canvas, side = Image.new("RGB", (WIDTH, LABEL), PAPER), WIDTH // max(1, len(names))
    for place, name in enumerate(names):
        column = Image.new("RGB", (side, LABEL), PAPER)
        ImageDraw.Draw(column).text((3, 3), name.encode("latin-1", "replace").decode("latin-1"), fill=INK)
        canvas.paste(column, (place * side, 0))
    return canvas


def stacked(pictures: Sequence[Image.Image]) -> Image.Image:
    """Pictures of the same width, one below the other. At least one."""
    canvas = Image.new("RGB", (pictures[0].width, sum(picture.height for picture in pictures)), PAPER)
    top = 0
    for picture in pictures:
        canvas.paste(picture, (0, top))
        top += picture.height
    return canvas
