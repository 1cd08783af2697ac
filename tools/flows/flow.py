"""A workflow as a person would describe it: nodes, their inputs by name, links by the output's name, groups and a note."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class Output:
    """An output of a node, by its name."""

    node: Node
    name: str


@dataclass(eq=False)
class Node:
    """inputs: values and Outputs by the input's name; what is not given has ComfyUI's default.

    bypassed: there, and switched off until somebody presses Ctrl+B on it.
    """

    id: int
    type: str
    title: str
    inputs: dict[str, Any]
    bypassed: bool = False

    def __getitem__(self, output: str) -> Output:
        return Output(self, output)


@dataclass
class Group:
    """A frame around nodes that stand one below the other. below: under the group before, else right of it."""

    title: str
    below: bool
    nodes: list[Node] = field(default_factory=list)


class Flow:
    """name: the file's, which ComfyUI shows as title.   note: Markdown, shown above the graph."""

    def __init__(self, name: str, note: str):
        self.name, self.note = name, note
        self.groups: list[Group] = []

    @property
    def nodes(self) -> list[Node]:
        """In the order of their ids, from 1."""
        return [node for group in self.groups for node in group.nodes]

    @contextmanager
    def group(self, title: str, *, below: bool = False) -> Iterator[None]:
        """Nodes added inside stand in this group."""
        self.groups.append(Group(title, below))
        yield

    def add(self, type: str, title: str = "", /, *, bypassed: bool = False, **inputs: Any) -> Node:
        """A node below those of its group; title: instead of ComfyUI's own."""
        node = Node(len(self.nodes) + 1, type, title, inputs, bypassed)
        self.groups[-1].nodes.append(node)
        return node
