"""Places the groups of a workflow in columns from left to right, and its note above or beside them, all in view."""

from __future__ import annotations

from dataclasses import dataclass

from .flow import Flow, Node

TITLE = 30  # pixels of a node above its position
ROW, WIDGET, TEXT = 20, 24, 110  # heights of a socket, of a field, of a field of several lines
WIDTH, PICTURE = 340, 400
_GAP, _MARGIN, _HEAD = 24, 12, 44
_GROWTH = 230  # free below a node whose report or preview appears when it runs
_VIEW = (1560, 780)  # what the page leaves of a usual screen
_LINE, _BETWEEN, _CHARACTER = 22, 12, 8  # of the note: heights, width of a letter
_NOTE = (1080, 440)  # its widths above the graph and beside it


@dataclass(frozen=True)
class Box:
    """Pixels; y grows downwards."""

    x: float
    y: float
    width: float
    height: float

    def moved(self, x: float, y: float) -> Box:
        return Box(self.x + x, self.y + y, self.width, self.height)


@dataclass(frozen=True)
class Placed:
    nodes: dict[Node, Box]
    groups: list[Box]
    note: Box


def place(flow: Flow, text: str, sizes: dict[Node, tuple[float, float]], growing: set[Node]) -> Placed:
    """text: of the note.   sizes: width and height of every node without its title.   growing: nodes that grow when they have run."""
    nodes, groups = _columns(flow, sizes, growing)
    right = max(box.x + box.width for box in groups)
    bottom = max(box.y + box.height for box in groups)
    above, beside = (_note(text, width) for width in _NOTE)
    high = (max(right, above.width), above.height + _GAP + _HEAD + bottom)
    wide = (beside.width + 2 * _GAP + right, max(bottom, beside.height))
    if _scale(*high) >= _scale(*wide):
        note, shift = above, (0.0, above.height + _GAP)
    else:
        note, shift = beside, (beside.width + 2 * _GAP, 0.0)
    return Placed({node: box.moved(*shift) for node, box in nodes.items()}, [box.moved(*shift) for box in groups], note)


def _columns(
    flow: Flow, sizes: dict[Node, tuple[float, float]], growing: set[Node]
) -> tuple[dict[Node, Box], list[Box]]:
    nodes, groups = {}, []
    x = right = bottom = 0.0
    for group in flow.groups:
        if not group.below:
            x, bottom = right, 0.0
        top = bottom
        y = top + _HEAD + TITLE
        width = max(sizes[node][0] for node in group.nodes)
        for node in group.nodes:
            nodes[node] = Box(x + _MARGIN, y, width, sizes[node][1])
            y += sizes[node][1] + _GAP + TITLE + (_GROWTH if node in growing else 0)
        groups.append(Box(x, top, width + 2 * _MARGIN, y - TITLE - _GAP + _MARGIN - top))
        right = max(right, x + width + 2 * _MARGIN + _GAP)
        bottom = y - TITLE - _GAP + _MARGIN + _GAP
    return nodes, groups


def _note(text: str, width: float) -> Box:
    lines = [1 + len(line) * _CHARACTER // int(width - 40) for line in text.splitlines() if line]
    return Box(0, 0, width, 60 + _LINE * sum(lines) + _BETWEEN * len(lines))


def _scale(width: float, height: float) -> float:
    return min(_VIEW[0] / width, _VIEW[1] / height)
