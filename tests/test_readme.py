"""What the README counts and names is what the tables of the code hold."""

import json
import re

import pytest

from lcm_kit.lora_merge.__main__ import _COMMANDS as COMMANDS
from lcm_kit.lora_merge.files.formats import SAVE_FORMATS
from lcm_kit.lora_merge.methods.table import METHODS
from lcm_kit.lora_merge.naming.families import TRANSFORMERS as FAMILIES
from lcm_kit.lora_merge.recognise.base_models import BASES
from lcm_kit.lora_merge.recognise.catalogue import PUBLISHED
from lcm_kit.lora_merge.recognise.transformers import TRANSFORMERS
from lcm_kit.lora_merge.updates import weight_dependent
from lcm_kit.lora_merge.updates.build import ADDITIVE
from lcm_kit.samplers.presets import PRESETS
from lcm_kit.tests.helpers import ROOT

README = " ".join((ROOT / "README.md").read_text(encoding="utf-8").split())
WORKFLOWS = sorted((ROOT / "example_workflows").glob("*.json"))
WORDS = dict(enumerate("zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen sixteen "
                       "seventeen eighteen nineteen twenty".split()))  # fmt: skip
WORDS |= {20 + n: f"twenty-{WORDS[n]}" for n in range(1, 10)}


@pytest.mark.parametrize(
    "sentence",
    [
        f"few-step settings of published models by name, with sources | {len(PRESETS)} |",
        f"[{WORDS[len(FAMILIES)]} families of transformers](docs/models.md)",
        f"fused and separate q, k, v meet, whatever the spelling | {len(FAMILIES)} families |",
        f"{len(BASES)} bases of Stable Diffusion and {len(TRANSFORMERS)} of transformers are told apart",
        f"{WORDS[len(WORKFLOWS) - 2].capitalize()} more show",
    ],
)
def test_what_is_counted(sentence):
    assert sentence in README


def test_every_node_is_in_the_table():
    """node_list.json is held to the nodes' own names by a test beside ComfyUI."""
    names = [
        text.partition(":")[0] for text in json.loads((ROOT / "node_list.json").read_text(encoding="utf-8")).values()
    ]
    table = README.partition("## Nodes")[2].partition("Every input has a tooltip")[0]
    assert sorted(re.findall(r"\| \*\*(.+?)\*\* \|", table)) == sorted(names)


def test_the_presets_that_the_node_is_named_after_are_there():
    row = re.search(r"noise levels for ([\w, -]+?), and for the few-step versions of ([\w, .-]+?) and others", README)
    for named in (text for group in row.groups() for text in group.split(", ")):
        assert any(named.lower() in f"{preset.name} {preset.models}".lower() for preset in PRESETS.values()), named


def test_the_published_files_that_are_known():
    named = re.search(r"knows published files by their hash \((.+?)\)", README)[1]
    known = " ".join(f"{published.name} {published.preset}" for published in PUBLISHED)
    for name in re.split(r"[,;] ", named):
        assert all(word in known for word in name.replace("distilled", "").split()), name


def test_the_kinds_of_updates_that_are_read():
    named = re.search(r"loader applies is read: ([\w, ]+?), differences", README)[1].split(", ")
    kinds = {*ADDITIVE, weight_dependent.DORA, weight_dependent.OFT, weight_dependent.BOFT, weight_dependent.GLORA}
    assert {*named} - {"LoCon"} == {kind.split()[0] for kind in kinds}  # LoCon is LoRA on convolutions


def test_commands_formats_and_methods_are_those_of_the_command_line():
    commands = {*re.findall(r"python -m lora_merge (\w+)", README)}
    commands |= {*re.findall(r"`(\w+)`", re.search(r"(`resize`.+?) are there too", README)[1])}
    assert commands == {*COMMANDS}
    assert {*re.findall(r"--format (\w+)", README)} <= {*SAVE_FORMATS}
    assert {*re.findall(r"--method (\w+)", README)} <= {*METHODS}
    row = re.search(r"\| ([A-Z, ]+) \| yes \| \| yes \| yes", README)[1]
    listed = re.search(r"says what every input lost. ([\w, -]+?) and others are there", README)[1]
    known = "".join(METHODS).replace("_", "")
    for method in (*row.split(", "), *listed.split(", ")):
        assert method.lower().removesuffix("-m") in known, method
