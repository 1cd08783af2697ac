"""A workflow in small, for the template browser: its groups, nodes and links, those of LCM Kit in another colour."""

from __future__ import annotations

import io
from collections.abc import Mapping
from typing import Any

from PIL import Image, ImageDraw, ImageFont

WIDTH, HEIGHT = 480, 320
EDGE, TITLE = 16, 30  # pixels around the graph; height of a node's title on the page, which stands above its place
FINE = 3  # drawn so much larger and scaled down
GROUND, GROUP, NODE, OWN, NOTE = (32, 32, 36), (45, 66, 84), (72, 74, 80), (214, 120, 60), (120, 96, 60)
LINK, INK = (150, 156, 170), (235, 236, 240)
KINDS = {"MODEL": (178, 157, 219), "LATENT": (255, 156, 249), "IMAGE": (100, 181, 246), "CONDITIONING": (255, 169, 49)}
OURS = "LCMKit"


def draw(workflow: Mapping[str, Any]) -> bytes:
    """JPEG of a workflow in the page's own format."""
    boxes = {node["id"]: (*node["pos"], *node["size"]) for node in workflow["nodes"]}
    outer = [box for box in boxes.values()] + [tuple(group["bounding"]) for group in workflow["groups"]]
    left, top = min(box[0] for box in outer), min(box[1] for box in outer) - TITLE
    wide, high = max(box[0] + box[2] for box in outer) - left, max(box[1] + box[3] for box in outer) - top
    scale = FINE * min((WIDTH - 2 * EDGE) / wide, (HEIGHT - 2 * EDGE) / high)
    across, down = (FINE * WIDTH - wide * scale) / 2, (FINE * HEIGHT - high * scale) / 2

    def at(x: float, y: float) -> tuple[float, float]:
        return across + (x - left) * scale, down + (y - top) * scale

    sheet = Image.new("RGB", (FINE * WIDTH, FINE * HEIGHT), GROUND)
    pen = ImageDraw.Draw(sheet)
    for group in workflow["groups"]:
        x, y, width, height = group["bounding"]
        pen.rounded_rectangle([*at(x, y), *at(x + width, y + height)], 6 * FINE, fill=GROUP)
    for _, source, output, target, place, kind in workflow["links"]:
        x, y, width, _ = boxes[source]
        begin = at(x + width, y + 14 + 20 * output)
        end = at(boxes[target][0], boxes[target][1] + 14 + 20 * place)
        middle = (begin[0] + end[0]) / 2
        pen.line([begin, (middle, begin[1]), (middle, end[1]), end], fill=KINDS.get(kind, LINK), width=FINE)
    font = ImageFont.load_default(max(9 * FINE, 22 * scale))
    for node in workflow["nodes"]:
        x, y, width, height = boxes[node["id"]]
        own, note = node["type"].startswith(OURS), node["type"] == "MarkdownNote"
        colour = OWN if own else NOTE if note else NODE
        pen.rounded_rectangle([*at(x, y - TITLE), *at(x + width, y + height)], 4 * FINE, fill=colour)
        room = width * scale - 6 * FINE
        words = _fitting(_name(node), font, room)
        pen.text((at(x, y)[0] + 3 * FINE, at(x, y - TITLE)[1] + FINE), words, fill=INK, font=font)
    small = sheet.resize((WIDTH, HEIGHT), Image.Resampling.LANCZOS)
    file = io.BytesIO()
    small.save(file, "JPEG", quality=82, optimize=True)
    return file.getvalue()


def _name(node: Mapping[str, Any]) -> str:
    return node.get("title") or node["type"].removeprefix(OURS)


def _fitting(words: str, font: ImageFont.ImageFont, room: float) -> str:
    while words and font.getlength(words) > room:
        words = words[:-1]
    return words
