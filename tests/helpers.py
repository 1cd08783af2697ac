"""What several test files share; import it as `lcm_kit.tests.helpers`."""

import ast
from collections.abc import Iterator
from pathlib import Path

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
