"""A writer that is killed leaves an old or a new file, whole, and nothing for ever.

The long form, with whole merges and trainings, is tests/soak/kills.py.
"""

import os
import random

import pytest

from lcm_kit.tests.soak.kills import of_the_writer


@pytest.mark.skipif(os.name != "posix", reason="Windows keeps a leftover for a day")
def test_nothing_is_torn_and_nothing_is_left(tmp_path):
    figures = of_the_writer(tmp_path, 15, random.Random(7))
    assert figures.kills == 15
    assert figures.fine, str(figures)
