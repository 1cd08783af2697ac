"""What builds ComfyUI and the table of versions, without the network."""

import importlib.util
import io
import sys
import tarfile
import zipfile

import pytest

from lcm_kit.samplers.presets import PRESETS
from lcm_kit.tests.helpers import ROOT
from lcm_kit.tools.flows.definitions import inputs_of, values_of
from lcm_kit.tools.flows.descriptions import FLOWS
from lcm_kit.tools.flows.flow import Flow
from lcm_kit.tools.flows.layout import place
from lcm_kit.tools.flows.writing import large


def load(name):
    spec = importlib.util.spec_from_file_location(f"lcm_kit_tools_{name}", ROOT / "tools" / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


setup, compatibility, presets = load("setup_comfyui"), load("compatibility"), load("presets")

WANTED = {"main.py": b"1", "comfy/ops.py": b"2"}
UNWANTED = ["pack-1/setup.py", "pack-1/vendor/ToolX/main.py", "pack-1/vendor/Tool/../../../evil", "/evil", "../evil"]


def tar(path, links=()):
    with tarfile.open(path, "w:gz") as archive:
        for name, data in [(f"pack-1/vendor/Tool/{n}", d) for n, d in WANTED.items()] + [(n, b"x") for n in UNWANTED]:
            member = tarfile.TarInfo(name)
            member.size = len(data)
            archive.addfile(member, io.BytesIO(data))
        for name, kind, target in links:
            member = tarfile.TarInfo(f"pack-1/vendor/Tool/{name}")
            member.type, member.linkname = kind, target
            archive.addfile(member)


def wheel(path):
    with zipfile.ZipFile(path, "w") as archive:
        for name, data in [(f"pack-1/vendor/Tool/{n}", d) for n, d in WANTED.items()] + [(n, b"x") for n in UNWANTED]:
            archive.writestr(name, data)


def files_under(folder):
    return {str(file.relative_to(folder)): file.read_bytes() for file in folder.rglob("*") if file.is_file()}


@pytest.mark.parametrize(("make", "name"), [(tar, "pack-1.tar.gz"), (wheel, "pack-1-py3-none-any.whl")])
def test_only_the_wanted_folder_is_taken_out_of_a_package(tmp_path, make, name):
    make(tmp_path / name)
    setup.unpack(tmp_path / name, "pack-1/vendor/Tool", tmp_path / "out" / "tree")
    assert files_under(tmp_path / "out") == {f"tree/{name}": data for name, data in WANTED.items()}


def test_links_and_devices_in_an_archive_are_left_there(tmp_path):
    links = [("a", tarfile.SYMTYPE, "/etc/passwd"), ("b", tarfile.LNKTYPE, "/etc/passwd"), ("c", tarfile.FIFOTYPE, "")]
    tar(tmp_path / "pack-1.tar.gz", links)
    setup.unpack(tmp_path / "pack-1.tar.gz", "pack-1/vendor/Tool", tmp_path / "tree")
    assert files_under(tmp_path / "tree") == WANTED
    assert {path.name for path in (tmp_path / "tree").iterdir()} == {"main.py", "comfy"}


def test_the_demo_needs_comfyui_alone_and_the_tests_its_floor_and_pages_too():
    (tree,) = setup.taken("demo")
    assert tree.folder == ".comfyui"
    everything = {taken.folder: taken for taken in setup.taken("test")}
    assert tree == everything[".comfyui"]
    assert ".comfyui-floor" in everything
    assert [folder for folder in everything if folder.startswith(".frontends/")]
    assert all(len(taken.sha256) == 64 for taken in everything.values())


@pytest.mark.parametrize(
    ("version", "refused"), [("0.16.2", True), ("0.3.75", True), ("0.16.3", False), ("0.30.0", False), ("", False)]
)
def test_an_own_comfyui_older_than_the_floor_is_refused(tmp_path, version, refused):
    (tmp_path / "comfy").mkdir()
    (tmp_path / "main.py").touch()
    (tmp_path / "comfyui_version.py").write_text(f'__version__ = "{version}"\n')
    if refused:
        with pytest.raises(setup.SetupError, match=rf"is ComfyUI {version}, LCM Kit needs 0\.16\.3: update it"):
            setup.check_own_tree(tmp_path)
    else:
        setup.check_own_tree(tmp_path)


def test_the_floor_is_one_number_everywhere():
    floor = ".".join(map(str, setup.COMFYUI_FLOOR))
    assert f'requires-comfyui = ">={floor}"' in (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    assert f"Needs ComfyUI {floor} or newer" in (ROOT / "README.md").read_text(encoding="utf-8")
    assert f"needs ComfyUI {floor} or newer" in (ROOT / "docs" / "compatibility.md").read_text(encoding="utf-8")


def row(version, note="nothing"):
    return [version, *["x"] * (len(compatibility.COLUMNS) - 2), note]


def test_a_row_of_the_table_is_replaced_and_rows_stand_in_the_order_of_versions():
    text = (ROOT / "docs" / "compatibility.md").read_text(encoding="utf-8")
    for version in ("99.10.0", "99.9.0", "99.10.0"):
        text = compatibility.with_row(text, row(version, "new" if "99.10.0" in text else "old"))
    versions = [compatibility.first_cell(line) for line in text.splitlines() if line.startswith("| 9")]
    assert versions == ["99.9.0", "99.10.0"]
    assert "| old |" not in text
    assert compatibility.with_row(text, row("99.10.0", "new")) == text


def test_the_outcome_of_tests_is_counted_by_what_they_are_about(tmp_path):
    report = tmp_path / "report.xml"
    report.write_text(
        """<testsuites><testsuite>
        <testcase classname="tests.with_comfyui.test_startup" name="a"/>
        <testcase classname="tests.with_comfyui.test_browser" name="b"><skipped/></testcase>
        <testcase classname="tests.with_comfyui.test_browser" name="c"/>
        <testcase classname="tests.with_comfyui.test_distilling" name="d"><failure/></testcase>
        <testcase classname="tests.with_comfyui.test_distilling" name="e"/>
        <testcase classname="" name="tests.with_comfyui.test_limits"><error/></testcase>
        </testsuite></testsuites>"""
    )
    found = compatibility.outcomes(report)
    assert {column: str(outcome) for column, outcome in found.items()} == {
        "starts": "all 1",
        "nodes": "0 of 1",
        "in the page": "all 1, 1 skipped",
        "distils": "1 of 2",
    }
    assert found["distils"].failed == ["test_distilling::d"]


def test_the_page_of_presets_is_made_from_the_table_as_it_stands():
    """If this fails: make presets."""
    assert presets.document(PRESETS) == presets.DOCUMENT.read_text(encoding="utf-8")
    text = presets.HELP_PAGE.read_text(encoding="utf-8")
    assert presets.help_page(text, PRESETS) == text


def test_the_page_of_presets_shows_all_that_a_preset_says():
    text = presets.document(PRESETS)
    for preset in PRESETS.values():
        (row,) = [line for line in text.splitlines() if line.startswith(f"| {preset.name} |")]
        shown = [cell.strip().strip("*") for cell in row.strip("|").split(" | ")]
        assert len(shown) == len(presets.HEADER)
        assert shown[:4] == [preset.name, preset.models, str(preset.steps), f"{preset.cfg:g}"]
        assert shown[-2:] == [preset.source, preset.date]
        assert f"{preset.sampler} | " in row
        assert preset.remark in row
        assert all(f" {value:.6g} " in f"{shown[5]} " for value in preset.sigmas or preset.timesteps)


METHODS = {  # a node as /object_info has it, with a list whose choices bring fields of their own
    "input": {
        "required": {"lora": ["LORA_MODEL", {}], "file": [["a", "b"]]},
        "optional": {
            "method": [
                "COMFY_DYNAMICCOMBO_V3",
                {
                    "options": [
                        {"key": "linear", "inputs": {}},
                        {"key": "ties", "inputs": {"required": {"density": ["FLOAT", {"default": 0.2}]}}},
                    ]
                },
            ],
            "seed": ["INT", {"default": 3}],
        },
    }
}


@pytest.fixture
def node():
    """A function that makes one node with the inputs of METHODS."""

    def make(**inputs):
        flow = Flow("1 Test", "")
        with flow.group("group"):
            lora = flow.add("Load")["LORA"]
            return flow.add("Merge", **{"lora": lora, **inputs})

    return make


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ({}, {"file": "a", "method": "linear", "seed": 3}),
        ({"file": "b", "method": "ties"}, {"file": "b", "method": "ties", "method.density": 0.2, "seed": 3}),
        ({"method": "ties", "method.density": 0.5}, {"file": "a", "method": "ties", "method.density": 0.5, "seed": 3}),
    ],
)
def test_fields_of_a_workflow_stand_in_the_order_of_the_page(node, given, expected):
    made = node(**given)
    assert list(values_of(made, inputs_of(METHODS, made.inputs)).items()) == list(expected.items())


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"stregnth": 1.0}, "Merge has no input stregnth; it has file, lora, method, seed"),
        ({"method.density": 0.5}, "Merge has no input method.density"),
        ({"lora": None}, "Merge: lora is not connected"),
    ],
)
def test_a_description_that_does_not_fit_the_node_is_refused_by_name(node, given, message):
    made = node(**given)
    with pytest.raises(ValueError, match=message):
        values_of(made, inputs_of(METHODS, made.inputs))


@pytest.mark.parametrize("height", [20, 90, 700])
@pytest.mark.parametrize("flow", FLOWS, ids=lambda flow: flow.name)
def test_nodes_and_note_of_a_workflow_lie_apart_whatever_their_size(flow, height):
    sizes = {node: (200 + 31 * node.id, height + 17 * (node.id % 5)) for node in flow.nodes}
    placed = place(flow, flow.note, sizes, set(flow.nodes[::3]))
    boxes = [*placed.nodes.values(), placed.note]
    for number, box in enumerate(boxes):
        for other in boxes[:number]:
            beside = box.x >= other.x + other.width or other.x >= box.x + box.width
            below = box.y - 30 >= other.y + other.height or other.y - 30 >= box.y + box.height  # their titles
            assert beside or below


def test_a_note_is_written_in_the_larger_letters_of_headings():
    note = "## Title\n1. one,\n   wrapped\n2. two\n\nA line\nand its end.\n- item"
    assert large(note) == "# Title\n## 1 · one, wrapped\n## 2 · two\n\n## A line and its end.\n## • item"
