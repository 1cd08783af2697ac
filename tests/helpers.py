"""What several test files share; import it as `lcm_kit.tests.helpers`."""

import ast
from collections.abc import Iterator
from pathlib import Path

from markdown_it import MarkdownIt

ROOT = Path(__file__).resolve().parents[1]


def imports_of(file: Path, root: Path = ROOT) -> Iterator[tuple[int, str]]:
    """Every import in a Python file as (line, dotted name); relative ones as "." + the path from `root`.

    `from ..host import files` in nodes/loading.py gives ".host.files", `import torch` gives "torch". A name
    imported from a module counts as part of the path, whether it is a module or not: prefixes are what to compare.
    """
    package = file.relative_to(root).parent.parts
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"), str(file))):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            above = node.level - 1
            if above > len(package):
                raise ImportError(f"{file}:{node.lineno} imports from above the pack")
            base = [*package[: len(package) - above]] if node.level else []
            path = [*base, *(node.module.split(".") if node.module else [])]
            for alias in node.names:
                yield node.lineno, ("." if node.level else "") + ".".join([*path, alias.name])


def relative(a, b) -> float:
    """Largest deviation of a from b, as a share of b's largest number; tensors of one shape."""
    return float((a - b).abs().max() / b.abs().max())


def is_within(name: str, prefix: str) -> bool:
    """Whether a dotted name is `prefix` or lies under it: "torch.nn" within "torch", "torchvision" not."""
    return name == prefix or name.startswith(prefix + ".")


def as_read(report: str) -> str:
    """A report that a node handed out as its reader sees it, without what keeps its lines and gaps in Markdown."""
    return report.replace("  \n", "\n").replace("\u00a0", " ").replace("\u2060", "")


def lines_in_markdown(text: str) -> list[str]:
    """The lines of `text` as Markdown with tables (GitHub's) draws them, by another project's renderer."""
    blocks = MarkdownIt("gfm-like", {"linkify": False}).parse(text)
    drawn = []
    for block in blocks:
        if block.children is None:
            drawn += [block.content] if block.content else []
            continue
        line = ""
        for part in block.children:
            if part.type == "hardbreak":
                drawn.append(line)
                line = ""
            else:
                line += " " if part.type == "softbreak" else part.content
        drawn.append(line)
    return drawn
