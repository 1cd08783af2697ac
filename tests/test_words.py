"""Numbers in sentences: whatever there may be one of is counted by lora_merge/words.py, so that no report says "1 modules"."""

import ast
import re
from functools import cache

import pytest

from lcm_kit.lora_merge.words import many
from lcm_kit.tests.helpers import ROOT
from lcm_kit.tests.test_layering import shipped_modules

# Folders that know no other, and where what is refused has two numbers that differ, or a number that is too large.
ALONE = {"samplers", "distillation"}
# What is no number there, and numbers that are never 1.
NEVER_ONE = {
    "host/lora/reports.py: {name} names": "a verb",
    "host/lora/stack.py: {number} names": "a verb",
    "lora_merge/merging/by_target.py: {name} is rows": "a verb",
    "host/grid/axes.py: {cells} cells": "more than there may be",
    "host/training/run.py: {phases} phases": "one is left unsaid",
    "lora_merge/algebra/ranks.py: {parameters} numbers": "said of sizes of files",
    "lora_merge/disk/header.py: {count} tensors": "more than there may be",
    "lora_merge/naming/block_lists.py: {values} numbers": "a list of one is no list",
    "lora_merge/recognise/catalogue.py: {steps} steps": "a name",
}
# An s that makes no plural.
_NO_PLURAL = re.compile(r".*(?:ss|us|is|as|'s)|has|does|its|this|less|times")


@pytest.mark.parametrize(
    ("count", "words", "said"),
    [
        (0, ("modules",), "0 modules"),
        (1, ("modules",), "1 module"),
        (2, ("text-encoder modules",), "2 text-encoder modules"),
        (1, ("text-encoder modules",), "1 text-encoder module"),
        (1, ("LoRAs",), "1 LoRA"),
        (1, ("entries", "entry"), "1 entry"),
        (1, ("weights are", "weight is"), "1 weight is"),
        (3, ("weights are", "weight is"), "3 weights are"),
    ],
)
def test_one_is_told_from_many(count, words, said):
    assert many(count, *words) == said


def calls_of_many():
    """The words of every call in the project that writes them out."""
    for file in shipped_modules():
        for node in ast.walk(ast.parse(file.read_text("utf-8"))):
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "many":
                words = [argument.value for argument in node.args[1:] if isinstance(argument, ast.Constant)]
                if words:
                    yield words


def test_all_that_is_counted_has_a_singular():
    """Some plurals are no words with an s behind them."""
    for several, *one in calls_of_many():
        assert many(1, several, *one) != f"1 {several}"
        assert one or re.fullmatch(r"(?:.* )?\w+[^s\W]s", several)
        assert one or not re.search(r"(?:ies|sses|iases|xes|ches)$", several)


@cache
def nouns():
    found = set()
    for several, *one in calls_of_many():
        found |= set(several.split()[-1:]) if not one else set(several.split()) - set(one[0].split())
    return {word for word in found if word.endswith("s") and not _NO_PLURAL.fullmatch(word)}


def counted_by_hand(file):
    """(line, what stands there) of each number that a sentence puts before one of the nouns itself."""
    after = re.compile(rf" (?:[a-z-]+ )?(?:{'|'.join(sorted(nouns()))})\b")
    for node in ast.walk(ast.parse(file.read_text("utf-8"))):
        if isinstance(node, ast.Constant) and isinstance(node.value, str):  # of a line in the log
            yield from (f"%d{match[0]}" for match in re.finditer(rf"(?<=%d){after.pattern}", node.value))
        if not isinstance(node, ast.JoinedStr):
            continue
        for value, text in zip(node.values, node.values[1:], strict=False):
            if not (isinstance(value, ast.FormattedValue) and isinstance(text, ast.Constant)):
                continue
            name = ast.unparse(value.value)
            if (match := after.match(text.value)) and not name.rpartition(".")[2].isupper() and "many(" not in name:
                yield f"{{{name}}}{match[0]}"


def test_no_sentence_counts_by_hand():
    files = [file for file in shipped_modules() if file.relative_to(ROOT).parts[0] not in ALONE]
    found = {f"{file.relative_to(ROOT).as_posix()}: {said}" for file in files for said in counted_by_hand(file)}
    assert found == NEVER_ONE.keys()
