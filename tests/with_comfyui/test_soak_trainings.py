"""Distillations that are killed and go on; the long form is tests/soak/trainings.py."""

import os

import pytest

from lcm_kit.tests.soak.trainings import soak


@pytest.mark.slow
@pytest.mark.skipif(os.name != "posix", reason="kill -9")
def test_killed_trainings_end_in_the_same_lora_and_make_nothing_twice(distill_here, tmp_path):
    """What is killed has a process of its own; what nobody stops runs in this one."""

    def finish(command):
        return distill_here(command[command.index("distillation") + 1 :]) == 0

    figures = soak(tmp_path, 3, steps=3, samples=4, finish=finish)
    assert figures.kills == 3
    assert figures.fine, str(figures)
