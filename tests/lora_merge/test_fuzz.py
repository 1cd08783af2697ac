"""Some hundred random and broken files on the whole way; the long form is tests/soak/fuzz.py."""

import logging
from random import Random

import pytest

from lcm_kit.lora_merge.files import load_save
from lcm_kit.tests.soak.fuzz import fuzz
from lcm_kit.tests.soak.lora_files import random_file


@pytest.fixture(autouse=True)
def quiet(monkeypatch):
    """Warnings about what float16 cannot hold, thousands of them; and what is a large file is as it was afterwards."""
    monkeypatch.setattr(load_save, "_STREAMED", load_save._STREAMED)
    logging.disable(logging.CRITICAL)
    yield
    logging.disable(logging.NOTSET)


def test_every_file_is_read_rightly_or_refused_in_words(tmp_path):
    figures = fuzz((f"short/{number}" for number in range(400)), tmp_path)
    assert not figures.findings, "\n".join(figures.findings.values())
    # Else nothing was tried.
    for step in ("refused", "loaded", "merged", "merges refused", "resized", "round trips", "saves refused"):
        assert figures.seen[step] >= 20, str(figures)


def test_the_same_number_makes_the_same_file(tmp_path):

    for number in range(50):
        contents = []
        for name in ("first", "second"):
            random_file(tmp_path / name, Random(f"{number}"))
            contents.append((tmp_path / name).read_bytes())
        assert contents[0] == contents[1]
