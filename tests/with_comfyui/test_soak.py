"""Fifteen prompts in one server, some interrupted and some invalid; the long form is tests/soak/prompts.py."""

import sys

import pytest

from lcm_kit.tests.soak.prompts import soak
from lcm_kit.tests.with_comfyui.comfy_server import pack_server


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="memory, files and threads are read from /proc")
def test_a_server_answers_every_prompt_and_keeps_nothing(tmp_path):
    figures = soak(pack_server(tmp_path / "used"), pack_server(tmp_path / "fresh"), 15, compared=3)
    assert not figures.failed
    assert figures.leftovers == 0
    assert figures.alike == figures.compared == 3, str(figures)
    assert figures.outcomes["finished"] >= 11, str(figures)
    # Of memory a run as short as this says nothing.
    last = list(figures.readings.values())[-1]
    assert last.files <= figures.settled.files + 8
    assert last.threads <= figures.settled.threads + 4
