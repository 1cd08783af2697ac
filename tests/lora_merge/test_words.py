"""Names of modules in a sentence."""

import pytest

from lcm_kit.lora_merge.words import counted


@pytest.mark.parametrize(
    ("modules", "said"),
    [
        ([], []),
        (["norm"], ["norm"]),
        (["blocks.3.q"], ["blocks.3.q"]),
        (["blocks.4.q", "blocks.3.q"], ["blocks.3-4.q"]),
        (["blocks.0.q", "blocks.7.q", "blocks.1.q", "blocks.2.q", "blocks.0.k"], ["blocks.0-2,7.q", "blocks.0.k"]),
        (["a_1_b", "norm", "a_10_b", "a_11_b", "a_3_b"], ["a_1,3,10-11_b", "norm"]),
    ],
)
def test_modules_of_one_place_in_several_blocks_are_named_once(modules, said):
    assert counted(modules) == said
