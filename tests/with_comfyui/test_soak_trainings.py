"""Distillations that are killed and go on; the long form is tests/soak/trainings.py."""

import os

import pytest

from lcm_kit.tests.soak.trainings import soak


@pytest.mark.slow
@pytest.mark.skipif(os.name != "posix", reason="kill -9")
def test_killed_trainings_end_in_the_same_lora_and_make_nothing_twice(tmp_path):
    figures = soak(tmp_path, 3)
    assert figures.kills == 3
    assert figures.fine, str(figures)
