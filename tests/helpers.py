"""What several test files share; import it as `lcm_kit.tests.helpers`."""

import ast
import shutil
import subprocess
from collections.abc import Hashable, Iterator, Mapping, Sequence
from pathlib import Path

import pytest

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


def each_value(cases: Sequence[Mapping[str, Hashable]]) -> list[int]:
    """Places of cases among which each value of each parameter is: those with the most new values first.

    cases: parameter -> value, of each case of one test. Of all combinations of 3 and 20 values 20 are left.
    """
    seen: set[tuple[str, Hashable]] = set()
    kept = [place for place, case in enumerate(cases) if not case]
    for enough in range(max(map(len, cases), default=0), 0, -1):
        for place, case in enumerate(cases):
            if len(new := case.items() - seen) >= enough:
                kept.append(place)
                seen |= new
    return sorted(kept)


def relative(a, b) -> float:
    """Largest deviation of a from b, as a share of b's largest number; tensors of one shape."""
    return float((a - b).abs().max() / b.abs().max())


def is_within(name: str, prefix: str) -> bool:
    """Whether a dotted name is `prefix` or lies under it: "torch.nn" within "torch", "torchvision" not."""
    return name == prefix or name.startswith(prefix + ".")


def published_files() -> list[Path]:
    """Paths from the root of what the registry would get: git's files minus .comfyignore, uncommitted ones included."""
    if shutil.which("git") is None or not (ROOT / ".git").exists():
        pytest.skip("the archive is what git tracks: needs git and a clone, not an unpacked folder")
    ignore = f"--exclude-from={ROOT / '.comfyignore'}"
    kept_out = set(_git("ls-files", "--cached", "--ignored", ignore))
    names = {name for name in _git("ls-files", "--cached") if name not in kept_out}
    names |= set(_git("ls-files", "--others", "--exclude-standard", ignore))
    return sorted(Path(name) for name in names if (ROOT / name).exists())


def _git(*arguments: str) -> list[str]:
    command = ["git", "-C", str(ROOT), *arguments, "-z"]
    done = subprocess.run(command, capture_output=True, text=True, stdin=subprocess.DEVNULL)
    assert done.returncode == 0, done.stderr
    return [name for name in done.stdout.split("\0") if name]


def as_read(report: str) -> str:
    """A report that a node handed out as its reader sees it, without what keeps its lines and gaps in Markdown."""
    return report.replace("  \n", "\n").replace("\u00a0", " ").replace("\u2060", "")


def lines_in_markdown(text: str) -> list[str]:
    """The lines of `text` as Markdown with tables (GitHub's) draws them, by another project's renderer."""
    from markdown_it import MarkdownIt

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
