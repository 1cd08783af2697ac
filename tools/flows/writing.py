"""Descriptions as the files that ComfyUI's page opens, and as the prompts that it sends to the server."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from itertools import count
from pathlib import Path
from typing import Any

from ...demo.comfyui_server import ComfyUIServer
from . import embedded, packs
from .definitions import CONTROL, Input, inputs_of, values_of
from .descriptions import FLOWS
from .files import ModelFile
from .flow import Flow, Node, Output
from .layout import PICTURE, ROW, TEXT, WIDGET, WIDTH, Box, place

ROOT = Path(__file__).resolve().parents[2]
FOLDER, DEMO = ROOT / "example_workflows", ROOT / "demo" / "workflow.json"
OWN = "LCMKit"
_PICTURES = {"SaveImage", "PreviewImage", "LoadImage", "SaveVideo"}
_BLUE, _BROWN, _DARK_BROWN = "#3f789e", "#653", "#432"
_TITLE, _MARK = "## ", re.compile(r"## |- |\d+\. ")  # what a line of a note begins with
_BYPASS = 4  # mode of a node that is switched off
_MISSING = 40  # pixels that the page adds to a node as long as it does not know its pack
_OPTIONAL = 7  # the page's shape of a socket that need not be connected


def texts(server: ComfyUIServer) -> dict[Path, str]:
    """File -> its text, for every workflow. server: a running one, with this pack."""
    known = json.loads(server.request("/object_info")) | packs.nodes()
    comfyui = json.loads(server.request("/system_stats"))["system"]["comfyui_version"]
    found = re.search(r'^version = "(.+)"$', (ROOT / "pyproject.toml").read_text(encoding="utf-8"), re.MULTILINE)
    own, homes = ("lcm-kit", found[1]), packs.homes()
    homes = {id: own if id.startswith(OWN) else homes.get(id, ("comfy-core", comfyui)) for id in known}
    (demo,) = embedded.FLOWS
    files = {DEMO: demo} | {FOLDER / f"{flow.name}.json": flow for flow in FLOWS}
    return {path: Document(flow, known, homes).text() for path, flow in files.items()}


def prompt(flow: Flow, known: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """The workflow in API format: what the page sends when it is run as it comes. known: /object_info."""
    made = {}
    for node in (node for node in flow.nodes if not node.bypassed):
        inputs = values_of(node, inputs_of(known[node.type], node.inputs))
        links = {name: value for name, value in node.inputs.items() if isinstance(value, Output)}
        inputs |= {name: [str(link.node.id), index_of(link, known)] for name, link in links.items()}
        made[str(node.id)] = {"class_type": node.type, "inputs": inputs}
    return made


def index_of(link: Output, known: Mapping[str, Any]) -> int:
    names = known[link.node.type]["output_name"]
    if link.name not in names:
        raise ValueError(f"{link.node.type} has no output {link.name}; it has {', '.join(names)}")
    return names.index(link.name)


class Document:
    """One workflow on its way into a file. homes: node id -> name and version of its pack."""

    def __init__(self, flow: Flow, known: Mapping[str, Any], homes: Mapping[str, tuple[str, str]]):
        self.flow, self.known, self.homes = flow, known, homes
        self.inputs = {node: inputs_of(known[node.type], node.inputs) for node in flow.nodes}
        self.values = {node: values_of(node, self.inputs[node]) for node in flow.nodes}
        self.links: list[list[Any]] = []
        # Pictures to compare come from equal noise; a single one may change at every run.
        seeds = [given for inputs in self.inputs.values() for given in inputs if given.options.get(CONTROL)]
        self.after = "fixed" if len(seeds) > 1 else "randomize"

    def text(self) -> str:
        sizes = {node: self._size(node) for node in self.flow.nodes}
        placed = place(self.flow, large(self.flow.note), sizes, set(filter(self._grows, self.flow.nodes)))
        self._link()
        nodes = [self._node(node, placed.nodes[node]) for node in self.flow.nodes]
        nodes.append(self._note(placed.note, len(nodes) + 1))
        numbered = zip(count(1), self.flow.groups, placed.groups, strict=False)
        document = {
            "last_node_id": len(nodes),
            "last_link_id": len(self.links),
            "nodes": nodes,
            "links": self.links,
            "groups": [
                {"id": i, "title": group.title, "bounding": _corners(box), "color": _BLUE, "font_size": 24}
                for i, group, box in numbered
            ],
            "config": {},
            "extra": {},
            "version": 0.4,
        }
        return json.dumps(document, indent=1, ensure_ascii=False) + "\n"

    def _grows(self, node: Node) -> bool:
        """Whether it shows a report when it has run, or previews, as samplers do."""
        known = self.known[node.type]
        return "report" in known["output_name"] or any("latent_image" in inputs for inputs in known["input"].values())

    def _link(self) -> None:
        for node in self.flow.nodes:
            slots = [given.name for given in self._slots(node)]
            for name, value in node.inputs.items():
                if isinstance(value, Output):
                    index = index_of(value, self.known)
                    kind = self.known[value.node.type]["output"][index]
                    number = len(self.links) + 1
                    self.links.append([number, value.node.id, index, node.id, slots.index(name), kind])

    def _slots(self, node: Node) -> list[Input]:
        return [g for g in self.inputs[node] if not g.widget or isinstance(node.inputs.get(g.name), Output)]

    def _size(self, node: Node) -> tuple[float, float]:
        rows = max(sum(not g.widget for g in self.inputs[node]), len(self.known[node.type]["output"]))
        widgets = [given for given in self.inputs[node] if given.widget]
        if len(folded := [given for given in widgets if self._folded(node, given)]) > 1:
            widgets = [given for given in widgets if given not in folded]
            rows += 1  # the button that shows them
        fields = len(widgets) + sum(bool(g.options.get(CONTROL)) + bool(g.options.get("image_upload")) for g in widgets)
        high = TEXT * sum(bool(given.options.get("multiline")) for given in widgets)
        high += _MISSING * (node.type in packs.homes())
        picture = node.type in _PICTURES
        return PICTURE if picture else WIDTH, 16 + ROW * rows + WIDGET * fields + high + (PICTURE - 110) * picture

    def _folded(self, node: Node, given: Input) -> bool:
        """Whether the page folds this field of ours away: web/advanced.js, and Nodes 2.0."""
        return (
            node.type.startswith(OWN)
            and bool(given.options.get("advanced"))
            and not isinstance(node.inputs.get(given.name), Output)
            and self.values[node][given.name] == given.default
        )

    def _node(self, node: Node, box: Box) -> dict[str, Any]:
        into = {(link[3], link[4]): link[0] for link in self.links}
        inputs = []
        for index, given in enumerate(self._slots(node)):
            slot = {"name": given.name, "type": given.kind, "link": into.get((node.id, index))}
            slot |= {"widget": {"name": given.name}} if given.widget else {}
            inputs.append(slot | ({} if given.required or given.widget else {"shape": _OPTIONAL}))
        entry, own = self.known[node.type], node.type.startswith(OWN)
        outputs = [
            {"name": name, "type": kind, "links": [link[0] for link in self.links if link[1:3] == [node.id, index]]}
            for index, (name, kind) in enumerate(zip(entry["output_name"], entry["output"], strict=True))
        ]
        if entry["output_node"] and not own:  # newer versions of ComfyUI hand on what they saved
            outputs = [slot for slot in outputs if slot["links"]]
        pack, version = self.homes[node.type]
        properties: dict[str, Any] = {"cnr_id": pack, "ver": version, "Node name for S&R": node.type}
        files = [value for value in self.values[node].values() if isinstance(value, ModelFile)]
        if files:
            properties["models"] = [{"name": str(f), "url": f.url, "directory": f.directory} for f in files]
        made = {"id": node.id, "type": node.type, "pos": [box.x, box.y], "size": [box.width, box.height], "flags": {}}
        made |= {
            "order": node.id - 1,
            "mode": _BYPASS if node.bypassed else 0,
            "inputs": inputs,
            "outputs": outputs,
            "properties": properties,
        }
        made["widgets_values"] = self._widgets(node)
        # A node's name may hold words that it is found by, in brackets; on the graph it goes without.
        short = entry["display_name"].partition(" (")[0] if own else entry["display_name"]
        title = node.title or short
        return made | ({"title": title} if title != entry["display_name"] else {})

    def _widgets(self, node: Node) -> list[Any]:
        """In the page's order. Of ComfyUI's own nodes without optional defaults at the end: older versions lack some."""
        widgets = [given for given in self.inputs[node] if given.widget]
        if not node.type.startswith(OWN):
            while widgets and not widgets[-1].required and widgets[-1].name not in node.inputs:
                widgets.pop()
        values = []
        for given in widgets:
            values.append(self.values[node][given.name])
            values += [self.after] if given.options.get(CONTROL) else []
        return values

    def _note(self, box: Box, id: int) -> dict[str, Any]:
        made = {"id": id, "type": "MarkdownNote", "title": self.flow.name, "pos": [box.x, box.y]}
        made |= {"size": [box.width, box.height], "flags": {}, "order": id - 1, "mode": 0, "inputs": [], "outputs": []}
        made |= {"properties": {}, "widgets_values": [large(self.flow.note)], "color": _DARK_BROWN, "bgcolor": _BROWN}
        return made


def large(note: str) -> str:
    """The same Markdown in the page's larger letters, which only headings have: small ones are lost on a whole graph."""
    lines: list[str] = []
    for line in note.splitlines():
        wrapped = line and lines and lines[-1] and not lines[-1].startswith(_TITLE) and not _MARK.match(line)
        if wrapped:
            lines[-1] += " " + line.strip()
        else:
            lines.append(line)
    return "\n".join(line and _larger(line) for line in lines)


def _larger(line: str) -> str:
    if line.startswith(_TITLE):
        return "# " + line.removeprefix(_TITLE)
    # An item of a list would stand below its number, so number and bullet become part of the heading.
    return "## " + re.sub("^- ", "• ", re.sub(r"^(\d+)\. ", r"\1 · ", line))


def _corners(box: Box) -> list[float]:
    return [box.x, box.y, box.width, box.height]
