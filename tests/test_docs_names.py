"""What the documents name is there: headings that links lead to, nodes, fields, commands with their options, make's targets."""

import json
import re
import shlex
from collections.abc import Iterator
from functools import cache
from itertools import product
from pathlib import Path

import pytest

from lcm_kit.launch.options import parsed as parsed_distillation
from lcm_kit.lora_merge.__main__ import _COMMANDS as COMMANDS
from lcm_kit.lora_merge.__main__ import _parser as lora_merge_parser
from lcm_kit.tests.helpers import ROOT
from lcm_kit.tests.test_docs import PAGES

# Sections whose names are those of other projects.
OF_OTHERS = {
    "docs/distilling.md": ("Beside other trainers",),
    "docs/neighbours.md": ("For authors of packs that save settings with a picture",),
}
# What begins as a name of ours does and is another: the pack itself, and nodes of ComfyUI's own.
OTHER_NAMES = {"LCM Kit", "Load Checkpoint", "Load Diffusion Model", "Load Image", "Save Image", "Apply ControlNet"}

# What was, may be called by the name that it had.
OF_TODAY = [page for page in PAGES if page.name != "CHANGELOG.md"]

every_page = pytest.mark.parametrize("page", OF_TODAY, ids=lambda page: page.relative_to(ROOT).as_posix())


def _text(page: Path) -> str:
    return page.read_text(encoding="utf-8")


def _prose(page: Path) -> str:
    """Without what is set as code in lines of its own."""
    return re.sub(r"^```.*?^```$", "", _text(page), flags=re.DOTALL | re.MULTILINE)


def _ours(page: Path) -> str:
    """Prose without the sections about other projects."""
    text = _prose(page)
    for heading in OF_OTHERS.get(page.relative_to(ROOT).as_posix(), ()):
        before, found, after = text.partition(f"## {heading}\n")
        assert found, heading
        text = before + "".join(re.split(r"^(?=## )", after, maxsplit=1, flags=re.MULTILINE)[1:])
    return text


def _anchors(page: Path) -> set[str]:
    """As GitHub makes them of headings: lower case, punctuation gone, blanks as hyphens."""
    headings = re.findall(r"^#+ (.+)$", _prose(page), re.MULTILINE)
    plain = (re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", heading).lower() for heading in headings)
    return {re.sub(r"[^\w\- ]", "", heading).replace(" ", "-") for heading in plain}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(ROOT).as_posix())
def test_links_to_headings_lead_to_one(page):
    targets = re.findall(r"\]\(([^)#\s:]*)#([^)\s]+)\)", _prose(page))
    assert [f"{file}#{at}" for file, at in targets if at not in _anchors(page.parent / file if file else page)] == []


@cache
def _nodes() -> set[str]:
    """Display names, which node_list.json begins with (a test beside ComfyUI holds it to the nodes)."""
    return {text.partition(":")[0] for text in json.loads(_text(ROOT / "node_list.json")).values()}


def _looks_like_a_node(words: str) -> bool:
    """Begins as one of ours does, of two words or more, each with a capital or one of the small ones that ours have."""
    first, *more = words.split()
    begins = {name.split()[0] for name in _nodes()}
    return first in begins and bool(more) and all(word[0].isupper() or word in ("for", "any", "by") for word in more)


@every_page
def test_nodes_are_called_by_their_names(page):
    """In bold or italics, with or without what the name has in brackets."""
    known = {name.partition(" (")[0] for name in _nodes()} | OTHER_NAMES
    set_apart = re.findall(r"\*\*([^*\n]+?)\*\*|(?<!\*)\*([^*\n]+?)\*(?!\*)", _ours(page))
    names = {(bold or italic).partition(" (")[0].strip() for bold, italic in set_apart}
    assert [name for name in sorted(names) if name and _looks_like_a_node(name) and name not in known] == []


@cache
def _words_of_the_code() -> set[str]:
    shipped = (
        "samplers",
        "lora_merge",
        "host",
        "nodes",
        "distillation",
        "launch",
        "web",
        "demo",
        "benchmarks",
        "tools",
    )
    files = [file for folder in shipped for file in (ROOT / folder).rglob("*") if file.suffix in (".py", ".js")]
    return {word for file in files for word in re.findall(r"\w+", _text(file))}


@every_page
def test_fields_and_values_are_words_of_the_code(page):
    """A word with an underscore that is set as code: an input (`strength_4` is numbered by its node), a value, a setting."""
    quoted = {re.sub(r"_\d+$", "", word) for word in re.findall(r"`([a-z]+(?:_[a-z0-9]+)+)`", _ours(page))}
    assert sorted(quoted - _words_of_the_code()) == []


def _commands(page: Path) -> Iterator[list[str]]:
    """What a reader would type: lines in code, joined where they go on, and code within a line."""
    text = _text(page).replace("\\\n", " ")
    blocks = re.findall(r"^```\w*\n(.*?)^```$", text, re.DOTALL | re.MULTILINE)
    lines = [line for block in blocks for line in block.splitlines()]
    lines += re.findall(r"^    (\S.*)$", text, re.MULTILINE)
    lines += re.findall(r"`([^`\n]+)`", re.sub(r"^```.*?^```$", "", text, flags=re.DOTALL | re.MULTILINE))
    for line in lines:
        if re.search(r"(?<![\w/])(python|torchrun|make) ", line):
            yield shlex.split(line, comments=True)


def _after(words: list[str], *those: str) -> list[str] | None:
    places = [at for at in range(len(words)) if tuple(words[at : at + len(those)]) == those]
    return words[places[0] + len(those) :] if places else None


def _each_choice(words: list[str]) -> list[list[str]]:
    """`--format kohya|comfy` stands for two commands."""
    return [list(one) for one in product(*(word.split("|") for word in words))]


def _parse(words: list[str]) -> None:
    """Raises SystemExit as argparse does. A command with nothing behind it is named, not shown."""
    merge, distil = _after(words, "-m", "lora_merge"), _after(words, "-m", "distillation")
    if merge and merge != ["--help"]:
        assert merge[0] in COMMANDS, merge[0]
        if len(merge) > 1:
            lora_merge_parser(merge).parse_args(merge)
    elif distil:
        parsed_distillation(distil)


@every_page
def test_commands_take_what_is_shown(page, capsys):
    """By their own parsers."""
    wrong = []
    for words in (one for command in _commands(page) for one in _each_choice(command)):
        try:
            _parse(words)
        except SystemExit:
            wrong.append(f"{' '.join(words)}: {capsys.readouterr().err.splitlines()[-1]}")
    assert wrong == []


@every_page
def test_scripts_are_there_with_the_options_shown(page):
    wrong = []
    for words in _commands(page):
        scripts = [word for word in words if re.fullmatch(r"(benchmarks|demo|tools|tests)/[\w/]+\.py", word)]
        for script in scripts:
            file = ROOT / script
            options = [word.partition("=")[0] for word in _after(words, script) or [] if word.startswith("--")]
            code = _text(file) if file.exists() else ""
            wrong += [] if code else [script]
            wrong += [f"{script} {option}" for option in options if code and f'"{option}"' not in code]
    assert wrong == []


@every_page
def test_targets_and_variables_of_make_are_there(page):
    makefile = _text(ROOT / "Makefile")
    wrong = []
    for words in _commands(page):
        target, *more = _after(words, "make") or [None]
        if words[:1] == ["make"] and target and not re.search(rf"^{re.escape(target)}:", makefile, re.MULTILINE):
            wrong.append(f"make {target}")
        wrong += [word for word in more if "=" in word and f"$({word.partition('=')[0]}" not in makefile]
    assert wrong == []


@every_page
def test_workflows_are_called_by_their_names(page):
    """In italics, "Templates → lcm-kit → 7 First picture SDXL" or the last part alone."""
    there = {file.stem for file in (ROOT / "example_workflows").glob("*.json")}
    named = [text.rpartition("→")[2].strip() for text in re.findall(r"(?<!\*)\*([^*\n]+)\*(?!\*)", _prose(page))]
    assert [text for text in named if re.match(r"\d+ [A-Z]\w+ ", text) and text not in there] == []
