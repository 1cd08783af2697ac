"""Every text of every node in every language: whole and of today."""

import asyncio

import pytest

from lcm_kit.nodes import LCMKitExtension
from lcm_kit.tests.helpers import ROOT
from lcm_kit.tools.locales import (
    LANGUAGES,
    NODE_LIST,
    NUMBERS,
    as_text,
    english,
    file_of,
    node_list,
    table_of,
    texts,
    translated,
)

HELP = ROOT / "web" / "docs" / "LCMKitKSampler"


@pytest.fixture(scope="module")
def names():
    """Node id -> its English texts."""
    nodes = asyncio.run(LCMKitExtension().get_node_list())
    return {node.GET_SCHEMA().node_id: english(node.GET_NODE_INFO_V1()) for node in nodes}


@pytest.mark.parametrize("language", LANGUAGES)
def test_every_text_is_translated_and_none_that_is_gone(names, language):
    wanted, table = set(texts(names)), table_of(language)
    assert sorted(wanted - set(table)) == [], f"tools/translations/{language}.json lacks these"
    assert sorted(set(table) - wanted) == [], f"tools/translations/{language}.json has these, which no node says"
    assert all(text.strip() for text in table.values())


@pytest.mark.parametrize("language", LANGUAGES)
def test_numbers_are_the_same_in_every_language(language):
    def numbers(text):  # a comma is the decimal point of some languages, and none stands inside our numbers
        return sorted(NUMBERS.findall(text))

    moved = {text: told for text, told in table_of(language).items() if numbers(text) != numbers(told)}
    assert moved == {}


@pytest.mark.parametrize("language", LANGUAGES)
def test_the_file_is_the_table_at_the_pages_places(names, language):
    assert file_of(language).read_text(encoding="utf-8") == as_text(translated(names, table_of(language))), (
        "run `make locales`"
    )


def test_manager_finds_every_node_in_the_list(names):
    assert NODE_LIST.parent == ROOT  # where its scanner looks
    assert NODE_LIST.read_text(encoding="utf-8") == as_text(node_list(names)), "run `make locales`"


@pytest.mark.parametrize("language", LANGUAGES)
def test_the_first_help_page_speaks_it_too(language):
    """Its rows are the English page's, input by input."""

    def rows(path):
        lines = path.read_text(encoding="utf-8").splitlines()
        return [line.split("|")[1].strip() for line in lines if line.startswith("| `")]

    assert rows(HELP / f"{language}.md") == rows(HELP.with_suffix(".md"))
