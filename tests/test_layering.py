"""Imports point one way: nodes -> host -> samplers, lora_merge, distillation; the cores know no ComfyUI."""

import ast
import sys
from collections import Counter
from collections.abc import Collection, Iterator, Mapping
from fnmatch import fnmatch
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

from lcm_kit.tests.helpers import ROOT, imports_of, is_within

TENSORS = {"torch", "numpy", "safetensors", "tqdm"}
CORES = {".samplers", ".lora_merge", ".distillation"}
HOST = {"comfy", "comfy_api", "comfy_execution", "folder_paths", "latent_preview", "node_helpers", "server"}

# folder -> what its files may import besides the standard library and the folder itself
ALLOWED = {
    "samplers": TENSORS,
    "lora_merge": {*TENSORS, "PIL"},
    # One road for all files: whole or not at all, leftovers tidied, read without being mapped.
    "distillation": {
        *TENSORS,
        "PIL",
        "bitsandbytes",  # an optimiser of it, where it is installed
        ".samplers",
        ".lora_merge.disk",
    },
    "host": {*TENSORS, *HOST, *CORES, "PIL"},
    "nodes": {*CORES, ".host", "comfy_api"},
    "launch": {*TENSORS, *HOST, *CORES, ".host", "PIL", "accelerate"},
}

# The command line of distillation/ is no part of its core: it starts the user's ComfyUI and hands its parts to the
# trainer, as host does in a graph. It stays out of the archive, and nothing else may import it.
COMMAND = ("distillation/__main__.py", "launch/*.py")
ALLOWED_TO_COMMAND = {".launch"}

# Wing of lora_merge -> the wings that its files may import; the files of lora_merge itself may import all of them.
_FLOOR = {"naming", "updates"}
_FILES = {*_FLOOR, "algebra", "disk", "metadata", "files"}
_TOLD = {*_FILES, "methods", "settings"}
_MERGING = {*_TOLD, "recognise", "one_module", "merging"}
WINGS = {
    "naming": set(),
    "updates": set(),
    "methods": set(),
    "disk": set(),
    "algebra": {"updates"},
    "metadata": {"disk"},
    "files": {*_FLOOR, "algebra", "disk", "metadata"},
    "recognise": _FILES,
    "extracting": {*_FILES, "recognise"},
    "settings": {"naming", "files", "methods"},
    "one_module": {*_TOLD, "recognise"},
    "merging": {*_TOLD, "recognise", "one_module"},
    "comparing": _MERGING,
    "cli": {*_MERGING, "extracting", "comparing"},
}

# The same in host, whose own files (page, progress, reports) know none of them.
HOST_WINGS = {
    "door": set(),
    "lora": {"door"},
    "sampling": {"door", "lora"},
    "grid": {"door", "lora", "sampling"},
    "training": {"door", "lora", "sampling"},
}

MAX_LINES, MAX_FILES, MAX_FUNCTION = 350, 12, 40
# What is larger, and why it is not divided.
LONG_FILES: dict[str, str] = {}
LARGE_WINGS = {
    "lora_merge/naming": "a family of models is a file of tables, and knows none of the others",
    "distillation": "one question of a training a file: its loss, its draws, what is kept, how it goes",
    "host/training": "what one training in ComfyUI asks, a question a file",
    "samplers": "one formula or table of the sampling maths a file",
    "host/sampling": "what one run in ComfyUI asks of the maths, a question a file",
    "nodes": "declarations only, a file for the nodes of one subject",
    "host/lora": "what a LORA_MODEL meets in ComfyUI, a file a subject, and the three tools that take several",
}
_OPTIONS = "its signature names every option with type and default, and each is handed on by name"
LONG_FUNCTIONS = {
    **dict.fromkeys(
        (
            f"lora_merge/merging/merge.py {name}"
            for name in ("merge", "merge_with_account", "resize", "resize_with_account")
        ),
        _OPTIONS,
    ),
    "lora_merge/naming/transformer.py transformer": _OPTIONS,
    "nodes/sampling.py execute": _OPTIONS,
    "host/sampling/sampling.py sample": _OPTIONS,
    "lora_merge/comparing/report.py as_json": "one literal, which shows the file as it is",
    "samplers/multistep.py sample_lcm": "the loop of the algorithm, top to bottom as in the paper",
    "samplers/editing.py edit_ddcm": "the loop of the algorithm, top to bottom as in the paper",
}


def is_command(file: Path, root: Path = ROOT) -> bool:
    return any(fnmatch(file.relative_to(root).as_posix(), pattern) for pattern in COMMAND)


def layer_of(file: Path, root: Path = ROOT) -> str:
    folder = file.relative_to(root).parent.as_posix()
    return max((layer for layer in ALLOWED if folder == layer or folder.startswith(layer + "/")), key=len)


def shipped_modules() -> list[Path]:
    return sorted(
        file
        for folder in ("samplers", "lora_merge", "distillation", "host", "nodes", "launch")
        for file in (ROOT / folder).rglob("*.py")
    )


def offences(file: Path, root: Path = ROOT) -> list[str]:
    layer = layer_of(file, root)
    own = "." + layer.replace("/", ".")
    command = is_command(file, root)
    allowed = ALLOWED[layer] | (ALLOWED_TO_COMMAND if command else set())
    found = []
    for line, name in imports_of(file, root):
        if name.split(".")[0] in sys.stdlib_module_names:
            continue
        if is_within(name, own) and (command or not name.startswith((".launch", ".distillation.__main__"))):
            continue
        if not any(is_within(name, one) for one in allowed):
            found.append(f"{file.relative_to(root)}:{line} imports {name}, which {layer}/ may not")
    return found


def wing_of(file: Path, root: Path = ROOT) -> str:
    """The wing of lora_merge that a file is in; "" for lora_merge's own files and everything else."""
    parts = file.relative_to(root).parts
    return parts[1] if parts[0] == "lora_merge" and len(parts) > 2 else ""


def offences_of_wings(file: Path, root: Path = ROOT) -> list[str]:
    """Imports of a wing's file that its row in WINGS does not name."""
    if not (wing := wing_of(file, root)):
        return []
    # keywords.py is of the standard library alone: what the public functions say of a misspelt option.
    allowed = {f".lora_merge.{one}" for one in ("keywords", "words", wing, *WINGS[wing])}
    return [
        f"{file.relative_to(root)}:{line} imports {name}, which lora_merge/{wing}/ may not"
        for line, name in imports_of(file, root)
        if is_within(name, ".lora_merge") and not any(is_within(name, one) for one in allowed)
    ]


def test_every_layer_has_modules_to_check():
    assert {layer_of(file) for file in shipped_modules()} == set(ALLOWED)


@pytest.mark.parametrize("file", shipped_modules(), ids=lambda file: file.relative_to(ROOT).as_posix())
def test_imports_point_one_way(file):
    assert offences(file) == []


@pytest.mark.parametrize(
    ("folder", "line", "allowed"),
    [
        ("samplers", "from .schedule import lcm_timesteps", True),
        ("samplers", "import comfy.samplers", False),
        ("samplers", "from ..lora_merge import merge", False),
        ("samplers", "def late():\n    import folder_paths", False),
        ("lora_merge", "import torchvision", False),
        ("lora_merge", "from .. import nodes", False),
        ("distillation", "from ..samplers.schedule import lcm_timesteps", True),
        ("distillation", "from ..lora_merge import merge", False),
        ("distillation", "from ..lora_merge.disk import tensor_file", True),
        ("distillation", "from ..lora_merge.disk.whole import write_whole", True),
        ("distillation", "from ..lora_merge.files.load_save import save", False),
        ("distillation", "from ..host.lora import files", False),
        ("host", "import comfy.utils", True),
        ("host/sampling", "from ...samplers.noise import StepNoise", True),
        ("host/lora", "from ...nodes.sampling import LCMKSampler", False),
        ("nodes", "from ..host.lora import files", True),
        ("nodes", "from comfy_api.latest import io", True),
        ("nodes", "import comfy.samplers", False),
        ("nodes", "import samplers", False),
    ],
)
def test_rule_recognises(folder, line, allowed, tmp_path):
    """The rule itself, on a file where the answer is known."""
    file = tmp_path / folder / "module.py"
    file.parent.mkdir(parents=True)
    file.write_text(line)
    assert (offences(file, tmp_path) == []) is allowed


@pytest.mark.parametrize(
    ("file", "line", "allowed"),
    [
        ("launch/comfyui.py", "import comfy.sd", True),
        ("launch/run.py", "from ..host.training import run", True),
        ("launch/run.py", "from ..nodes import distilling", False),
        ("launch/run.py", "import torchvision", False),
        ("distillation/__main__.py", "from ..launch.run import run", True),
        ("distillation/__main__.py", "from ..host.training import run", False),
        ("distillation/trainer.py", "from ..launch.data import Picture", False),
        ("distillation/trainer.py", "import accelerate", False),
        ("host/training/run.py", "from ...launch import run", False),
    ],
)
def test_rule_knows_the_command_line_of_distillation(file, line, allowed, tmp_path):
    path = tmp_path / file
    path.parent.mkdir(parents=True)
    path.write_text(line)
    assert (offences(path, tmp_path) == []) is allowed


def test_every_wing_has_a_rule_and_modules_to_check():
    assert {wing_of(file) for file in shipped_modules()} - {""} == set(WINGS)
    assert {folder.parent.name for folder in (ROOT / "host").glob("*/__init__.py")} == set(HOST_WINGS)


@pytest.mark.parametrize("wings", [WINGS, HOST_WINGS], ids=["lora_merge", "host"])
def test_no_wing_is_above_itself(wings):
    """The rules alone allow no circle: some order of the wings has every arrow pointing back."""
    rest = dict(wings)
    while rest:
        lowest = [wing for wing, below in rest.items() if not below & rest.keys()]
        assert lowest, f"a circle among {sorted(rest)}"
        for wing in lowest:
            del rest[wing]


@pytest.mark.parametrize("wing", WINGS)
def test_imports_point_down_in_lora_merge(wing):
    files = [file for file in shipped_modules() if wing_of(file) == wing]
    assert [offence for file in files for offence in offences_of_wings(file)] == []


@pytest.mark.parametrize("wing", ["", *HOST_WINGS])
def test_imports_point_down_in_host(wing):
    files = sorted((ROOT / "host" / wing).rglob("*.py") if wing else (ROOT / "host").glob("*.py"))
    assert files
    allowed = [
        ".host.page",
        ".host.progress",
        ".host.reports",
        *(f".host.{one}" for one in (wing, *HOST_WINGS.get(wing, ())) if one),
    ]
    found = [(file.name, name) for file in files for _, name in imports_of(file) if is_within(name, ".host")]
    assert [one for one in found if not any(is_within(one[1], known) for known in allowed)] == []


def module_of(name: str, modules: Collection[str]) -> str | None:
    """The module that an imported name is, or is from: ".host.lora.fit.Fit" is from ".host.lora.fit"."""
    while name.count(".") > 1 and name not in modules:
        name = name.rpartition(".")[0]
    return name if name in modules else None


def test_no_modules_import_one_another():
    """Not even for annotations alone, whose imports nothing runs."""
    files = {
        "." + ".".join(file.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"): file
        for file in shipped_modules()
    }
    graph = {
        module: {module_of(name, files) for _, name in imports_of(file)} - {None, module}
        for module, file in files.items()
    }
    assert sum(map(len, graph.values())) > 500
    TopologicalSorter(graph).prepare()  # raises CycleError, which names them


@pytest.mark.parametrize(
    ("wing", "line", "allowed"),
    [
        ("naming", "from . import unet", True),
        ("naming", "from ..files.keys import parse", False),
        ("updates", "from ..files.keys import DIFF_PARTS", False),
        ("updates", "def late():\n    from ..algebra import sums", False),
        ("algebra", "from ..updates.layer import Layer", True),
        ("algebra", "from ..naming import names", False),
        ("disk", "from ..files.lora import Lora", False),
        ("disk", "from ..metadata.fields import OURS", False),
        ("metadata", "from ..disk import json_text", True),
        ("metadata", "from ..files.lora import Lora", False),
        ("files", "from ..merging.merge import merge", False),
        ("settings", "from ..merging.plan import Plan", False),
        ("one_module", "from ..settings.strengths import Strengths", True),
        ("one_module", "from ..merging.plan import Plan", False),
        ("merging", "from ..methods.table import METHODS", True),
        ("merging", "from .. import Lora", False),
        ("merging", "from ..comparing.compare import compare", False),
        ("extracting", "from ..merging.merge import resize", False),
        ("comparing", "from ..settings.strengths import strengths_of", True),
        ("cli", "from ..comparing import report", True),
        ("merging", "import torch", True),
    ],
)
def test_rule_of_wings_recognises(wing, line, allowed, tmp_path):
    file = tmp_path / "lora_merge" / wing / "module.py"
    file.parent.mkdir(parents=True)
    file.write_text(line)
    assert (offences_of_wings(file, tmp_path) == []) is allowed


def test_no_file_is_long_and_no_wing_is_crowded():
    """Without being named above with a reason; and what is named is so."""
    files = shipped_modules()
    long = {
        file.relative_to(ROOT).as_posix() for file in files if len(file.read_text("utf-8").splitlines()) > MAX_LINES
    }
    assert long == LONG_FILES.keys()
    counts = Counter(file.relative_to(ROOT).parent.as_posix() for file in files if file.name != "__init__.py")
    assert {folder for folder, count in counts.items() if count > MAX_FILES} == LARGE_WINGS.keys()


def function_lines(file: Path) -> Iterator[tuple[str, int]]:
    """(name, number of lines) of every function in a file, its docstring and decorators apart."""
    for node in ast.walk(ast.parse(file.read_text("utf-8"))):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            first = node.body[0]
            says = ast.get_docstring(node, clean=False) is not None
            yield node.name, node.end_lineno - node.lineno + 1 - says * (first.end_lineno - first.lineno + 1)


def test_no_function_is_long():
    """Without being named above with a reason; and what is named is so. A node's inputs are a list, however many there are."""
    every = {
        (f"{file.relative_to(ROOT).as_posix()} {name}", lines)
        for file in shipped_modules()
        for name, lines in function_lines(file)
        if not (layer_of(file) == "nodes" and name == "define_schema")
    }
    assert {name for name, lines in every if lines > MAX_FUNCTION} == LONG_FUNCTIONS.keys()


def test_lines_of_functions_are_counted_without_what_explains_them(tmp_path):
    file = tmp_path / "module.py"
    file.write_text(
        '@a\n@b\ndef f(\n    x,\n):\n    """One.\n\n    Three."""\n    # four\n    return x\n\n\nasync def g(): ...\n'
    )
    assert list(function_lines(file)) == [("f", 5), ("g", 1)]


MAX_POSITIONAL_FIELDS = 4


def fields_of_records(file: Path) -> dict[str, int]:
    """Name of every dataclass and NamedTuple of a file -> number of its own fields."""
    found = {}
    for node in ast.walk(ast.parse(file.read_text("utf-8"))):
        if isinstance(node, ast.ClassDef):
            marks = [ast.unparse(one.func if isinstance(one, ast.Call) else one) for one in node.decorator_list]
            marks += [ast.unparse(base) for base in node.bases]
            if {mark.rpartition(".")[2] for mark in marks} & {"dataclass", "NamedTuple"}:
                notes = [ast.unparse(one.annotation) for one in node.body if isinstance(one, ast.AnnAssign)]
                found[node.name] = len([note for note in notes if "ClassVar" not in note])
    return found


def names_to_build(file: Path, records: Mapping[str, int], root: Path = ROOT) -> dict[str, int]:
    """What a file calls to build a record (`Base`, `base_models.Base`) -> number of its fields.

    records: dotted path of a class (".lora_merge.recognise.base_models.Base") -> number of its fields.
    """
    own = "." + ".".join(file.relative_to(root).with_suffix("").parts)
    paths = {name: f"{own}.{name}" for name in fields_of_records(file)} | {
        name.rpartition(".")[2]: name for _, name in imports_of(file, root) if name.startswith(".")
    }
    direct = {name: records[path] for name, path in paths.items() if path in records}
    through = {
        f"{name}.{record.removeprefix(f'{path}.')}": fields
        for name, path in paths.items()
        for record, fields in records.items()
        if record.rpartition(".")[0] == path
    }
    return direct | through


def built_by_position(file: Path, records: Mapping[str, int], root: Path = ROOT) -> list[str]:
    """Calls that give a large record more than its first field by position; that one is often what the others are of."""
    names = names_to_build(file, records, root)
    return [
        f"{file.relative_to(root).as_posix()}:{node.lineno} {name}"
        for node in ast.walk(ast.parse(file.read_text("utf-8")))
        if isinstance(node, ast.Call)
        and names.get(name := ast.unparse(node.func), 0) > MAX_POSITIONAL_FIELDS
        and (len(node.args) > 1 or any(isinstance(one, ast.Starred) for one in node.args))
    ]


@pytest.fixture(scope="module")
def records():
    return {
        ".".join(["", *file.relative_to(ROOT).with_suffix("").parts, name]): fields
        for file in shipped_modules()
        for name, fields in fields_of_records(file).items()
    }


def test_large_records_are_built_by_keyword(records):
    assert len([fields for fields in records.values() if fields > MAX_POSITIONAL_FIELDS]) > 30
    assert [call for file in shipped_modules() for call in built_by_position(file, records)] == []


@pytest.mark.parametrize(
    ("line", "allowed"),
    [
        ("Large(1, b=2, c=3, d=4, e=5)", True),
        ("Large(1, 2, c=3, d=4, e=5)", False),
        ("Large(*five)", False),
        ("Large(**five)", True),
        ("Small(1, 2, 3, 4)", True),
        ("other.Foreign(1, 2, 3, 4, 5)", False),
        ("Foreign(1, 2, 3, 4, 5)", True),
    ],
)
def test_rule_of_records_recognises(line, allowed, tmp_path):
    file = tmp_path / "module.py"
    large = "".join(f"    {name}: int\n" for name in "abcde")
    file.write_text(
        f"from . import other\n@dataclass(frozen=True)\nclass Large:\n    kind: ClassVar[str] = 'x'\n{large}"
        f"class Small(NamedTuple):\n{large.replace('    e: int', '')}\n{line}\n"
    )
    known = {".module.Large": fields_of_records(file)["Large"], ".module.Small": 4, ".other.Foreign": 5}
    assert fields_of_records(file) == {"Large": 5, "Small": 4}
    assert (built_by_position(file, known, tmp_path) == []) is allowed


def test_the_command_line_of_distillation_stays_out_of_the_archive():
    kept_out = (ROOT / ".comfyignore").read_text().splitlines()
    assert {"/distillation/__main__.py", "/launch/"} <= set(kept_out)
    assert len([file for file in shipped_modules() if is_command(file)]) > 2


def test_importing_the_pack_does_nothing():
    """pytest, setuptools and ComfyUI all import the root; what it needs it imports when ComfyUI asks for the nodes."""
    root = ast.parse((ROOT / "__init__.py").read_text())
    documentation, *rest = root.body
    assert isinstance(documentation, ast.Expr)
    assert isinstance(documentation.value, ast.Constant)
    assert [ast.unparse(node) for node in rest if isinstance(node, ast.Import | ast.ImportFrom)] == ["import logging"]
    others = [node for node in rest if not isinstance(node, ast.Import | ast.ImportFrom)]
    assert [(type(node), node.name) for node in others] == [(ast.AsyncFunctionDef, "comfy_entrypoint")]
