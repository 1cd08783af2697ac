"""What the documents quote of the program is what the program says, and their links lead somewhere."""

import ast
import re

import pytest

from lcm_kit.tests.helpers import ROOT

SHIPPED = ("samplers", "lora_merge", "host", "nodes", "distillation")
HELP = ROOT / "web" / "docs"
PAGES = sorted(
    [
        *ROOT.glob("*.md"),
        *(ROOT / "docs").glob("*.md"),
        *HELP.rglob("*.md"),
        *(ROOT / "demo").glob("*.md"),
        *(ROOT / "benchmarks").glob("*.md"),
    ]
)


@pytest.fixture(scope="module")
def said() -> list[str]:
    """Every text of the shipped code, what it fills in later written as …"""
    texts = []
    for file in (file for folder in SHIPPED for file in (ROOT / folder).rglob("*.py")):
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if isinstance(node, ast.JoinedStr):
                texts.append("".join(v.value if isinstance(v, ast.Constant) else "…" for v in node.values))
            elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                texts.append(node.value)
    return texts


def test_messages_under_troubleshooting_are_what_the_nodes_say(said):
    text = (ROOT / "docs" / "troubleshooting.md").read_text(encoding="utf-8")
    messages = re.findall(r"^\| \*(.+?)\* \|", text.partition("## Messages")[2].partition("\n## ")[0], re.MULTILINE)
    assert len(messages) > 5
    gone = [
        piece
        for message in messages
        for piece in (piece.strip() for piece in message.split("…"))
        if piece and not any(piece in one for one in said)
    ]
    assert gone == []


def test_workflows_are_named_by_their_numbers():
    """docs/nodes.md sends the reader to workflows by number."""
    there = {path.name.partition(" ")[0] for path in (ROOT / "example_workflows").glob("*.json")}
    rows = re.findall(r"^\|.*\| ([\d, ]+) \|$", (ROOT / "docs" / "nodes.md").read_text(encoding="utf-8"), re.MULTILINE)
    named = {number for row in rows for number in re.findall(r"\d+", row)}
    assert named
    assert named <= there


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(ROOT).as_posix())
def test_links_within_the_repository_lead_somewhere(page):
    targets = re.findall(r"\]\(([^)#\s]+)", page.read_text(encoding="utf-8"))
    local = [target for target in targets if not re.match(r"\w+:", target)]
    # ComfyUI's page takes what a help page links to from the folder of them all, whatever its language.
    base = HELP if HELP in page.parents else page.parent
    assert [target for target in local if not (base / target).exists()] == []
