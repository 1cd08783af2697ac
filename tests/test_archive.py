"""The archive that the ComfyUI Registry would get: git's files minus .comfyignore, complete and free of what its
scanners hide a version for (network, processes, environment, eval, pickle, JavaScript but one readable script)."""

import ast
import io
import re
import zipfile
from fnmatch import fnmatch
from pathlib import Path

import pytest

from lcm_kit.tests.helpers import ROOT, imports_of, is_within, published_files

tomllib = pytest.importorskip("tomllib", reason="reading pyproject.toml needs Python 3.11")

NEEDED = (
    "__init__.py",
    "LICENSE",
    "NOTICE",
    "README.md",
    "pyproject.toml",
    "requirements.txt",
    "example_workflows/*.json",
    "web/docs/*.md",
    "web/report.js",
    "node_list.json",
    *(f"locales/{language}/nodeDefs.json" for language in ("zh", "ja", "ko", "fr", "de", "es", "ru")),
)
KEPT_OUT = ("tests", "demo", "benchmarks", "tools", ".ci", ".github")
SUFFIXES = {".py", ".md", ".json", ".toml", ".txt", ".jpg", ".png", ".webp", ""}
SCRIPTS = {Path("web/report.js"), Path("web/nodes.js"), Path("web/advanced.js")}
MEGABYTES = 3

MODULES = {
    "network": "aiohttp ftplib http httpx huggingface_hub requests smtplib socket socketserver ssl urllib urllib3 "
    "webbrowser websocket websockets xmlrpc",
    "processes": "multiprocessing pty subprocess",
    "unsafe files": "dill joblib marshal pickle shelve",
    "native code": "cffi ctypes",
}
CALLS = re.compile(
    r"(builtins\.)?(eval|exec|compile|__import__)|os\.(system|popen|spawn\w*|exec\w*|getenv|putenv)|(torch|np|numpy)\.load"
    r"|importlib\.import_module"
)
# Scanners read text, comments too.
# What makes markup or code out of text, talks to somebody, or keeps something.
WORDS_OF_SCRIPTS = re.compile(
    r"(inner|outer)HTML|insertAdjacent|createContextualFragment|DOMParser|srcdoc|document\.write|\beval\b|\bFunction\("
    r"|\bimport\(|fetch|XMLHttpRequest|WebSocket|EventSource|sendBeacon|Worker|postMessage|https?:|//\w+\.|javascript:"
    r"|cookie|(local|session)Storage|indexedDB|set(Timeout|Interval)\([\"'`]|atob|fromCharCode|\\[xu][0-9a-fA-F]{2}"
)
WORDS = re.compile(r"os\.environ|subprocess|(?<![\w.])(eval|exec)\(|b64decode|torch\.load")


@pytest.fixture(scope="module")
def archive() -> list[Path]:
    return published_files()


@pytest.fixture(scope="module")
def code(archive) -> list[Path]:
    return [path for path in archive if path.suffix == ".py"]


def test_archive_is_complete(archive):
    packages = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["packages"]
    # The command line of the distillation comes with a clone only.
    packages.remove("lcm_kit.launch")
    modules = ["/".join([*package.split(".")[1:], "__init__.py"]) for package in packages]
    missing = [
        pattern
        for pattern in (*NEEDED, *modules)
        if not any(fnmatch(path.as_posix(), pattern) and path.parent == Path(pattern).parent for path in archive)
    ]
    assert missing == []


def test_archive_holds_every_module_of_the_nodes_and_of_the_two_libraries(archive):
    wanted = [file for folder in ("nodes", "samplers", "lora_merge") for file in (ROOT / folder).rglob("*.py")]
    assert wanted
    assert [str(file) for file in wanted if file.relative_to(ROOT) not in archive] == []


def test_archive_leaves_out_what_only_a_clone_needs(archive):
    assert [str(path) for path in archive if path.parts[0] in KEPT_OUT] == []


def test_archive_holds_only_plain_files_of_known_kinds(archive):
    assert [str(path) for path in archive if path.suffix not in SUFFIXES and path not in SCRIPTS] == []
    assert [str(path) for path in archive if (ROOT / path).is_symlink()] == []


def test_the_page_scripts_are_few_short_and_readable(archive):
    assert {path for path in archive if path.suffix in (".js", ".mjs", ".ts", ".html", ".css", ".svg")} == SCRIPTS
    for path in SCRIPTS:
        lines = (ROOT / path).read_text(encoding="ascii").splitlines()
        assert len(lines) < 200, path
        assert max(map(len, lines)) <= 120, path  # nothing minified


def test_page_scripts_set_text_only_and_talk_to_nobody():
    found = []
    for path in SCRIPTS:
        text = (ROOT / path).read_text(encoding="ascii")
        found += [f"{path}: {match.group()}" for match in WORDS_OF_SCRIPTS.finditer(text)]
        assert re.findall(r"""\bfrom\s+["'](.*?)["']""", text) == ["../../scripts/app.js"], "the page's own door only"
        assert text.count("import") == 1
    assert found == []


@pytest.mark.parametrize(
    "line",
    [
        "element.innerHTML = text;",
        "element.insertAdjacentHTML('beforeend', text);",
        "document.write(text);",
        "eval(text);",
        "new Function('x', text)();",
        "fetch('/history');",
        "await import('./other.js');",
        'import { app } from "https://example.org/app.js";',
    ],
)
def test_rule_for_page_scripts_recognises(line):
    assert WORDS_OF_SCRIPTS.search(line)


def test_archive_is_small(archive):
    packed = io.BytesIO()
    with zipfile.ZipFile(packed, "w", zipfile.ZIP_DEFLATED) as file:
        for path in archive:
            file.write(ROOT / path, path)
    largest = sorted(archive, key=lambda path: (ROOT / path).stat().st_size, reverse=True)[:3]
    assert len(packed.getvalue()) < MEGABYTES * 1e6, f"the largest are {largest}"


def test_code_imports_nothing_that_scanners_report(code):
    banned = {module: kind for kind, modules in MODULES.items() for module in modules.split()}
    found = [
        f"{path}:{line} imports {name} ({kind})"
        for path in code
        for line, name in imports_of(ROOT / path)
        for module, kind in banned.items()
        if is_within(name, module)
    ]
    assert found == []


def test_code_calls_nothing_that_scanners_report(code):
    found = []
    for path in code:
        for node in ast.walk(ast.parse((ROOT / path).read_text(encoding="utf-8"))):
            name = ast.unparse(node.func) if isinstance(node, ast.Call) else ""
            if CALLS.fullmatch(name):
                found.append(f"{path}:{node.lineno} calls {name}")
            if isinstance(node, ast.Attribute) and ast.unparse(node) == "os.environ":
                found.append(f"{path}:{node.lineno} reads os.environ")
    assert found == []


def test_text_has_no_word_that_scanners_report(archive):
    found = []
    for path in archive:
        if path.suffix in (".py", ".json", ".md", ".toml", ".txt"):
            for number, line in enumerate((ROOT / path).read_text(encoding="utf-8").splitlines(), start=1):
                found += [f"{path}:{number} {match.group()}" for match in WORDS.finditer(line)]
    assert found == []


def test_requirements_ask_for_nothing():
    """ComfyUI brings everything; a torch here would let pip replace the user's CUDA build."""
    lines = (ROOT / "requirements.txt").read_text().splitlines()
    assert [line for line in lines if line.strip() and not line.startswith("#")] == []
    assert tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["dependencies"] == []
