"""Which forwards are replaced while calls are compiled. Nothing is called here, so that no compiler is needed."""

from contextlib import suppress

import pytest
from torch import nn

from lcm_kit.distillation.compiling import compiling
from lcm_kit.distillation.recompute import blocks

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")  # torch of itself, as it imports its compiler


def replaced(network):
    return [module for module in network.modules() if "forward" in vars(module)]


@pytest.mark.parametrize("active", [True, False])
def test_the_blocks_and_they_alone_have_another_forward_within_it(active):
    network = nn.ModuleDict({"enter": nn.Linear(3, 4), "block": nn.TransformerEncoderLayer(4, 2)})
    with compiling(network, active):
        assert replaced(network) == (blocks(network) if active else [])
    assert blocks(network)
    assert replaced(network) == []


def test_an_error_within_it_leaves_nothing_behind():
    network = nn.ModuleList([nn.TransformerEncoderLayer(4, 2)])
    with suppress(KeyError), compiling(network):
        assert replaced(network) == blocks(network)
        raise KeyError
    assert replaced(network) == []
