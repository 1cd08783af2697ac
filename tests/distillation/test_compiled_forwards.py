"""Which forwards are replaced while calls are compiled, and which of them is called. torch.compile is stood in for, so that no
compiler is needed."""

import re
from contextlib import suppress

import pytest
import torch
from torch import nn

from lcm_kit.distillation.compiling import VARIANTS, check_compile, compiling
from lcm_kit.distillation.recompute import blocks

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")  # torch of itself, as it imports its compiler


class Pair(nn.Module):
    def __init__(self):
        super().__init__()
        self.one, self.two = nn.Linear(3, 3), nn.Linear(3, 3)

    def forward(self, x):
        return self.two(self.one(x))


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


def test_calls_without_a_gradient_are_the_compiled_ones(monkeypatch):
    monkeypatch.setattr(torch, "compile", lambda forward: lambda x: -forward(x))
    network, x = nn.ModuleList([Pair()]), torch.ones(2, 3)
    pair = network[0]
    plain = pair(x).detach()
    with compiling(network):
        assert torch.equal(pair(x), plain)
        with torch.no_grad():
            assert torch.equal(pair(x), -plain)


def test_a_block_may_have_many_shapes_and_what_cannot_be_compiled_is_computed_as_before():
    from torch._dynamo import config

    def limits():
        return config.suppress_errors, config.recompile_limit, config.accumulated_recompile_limit

    before = limits()
    with compiling(nn.ModuleList([Pair()])):
        assert limits() == (True, VARIANTS, VARIANTS)
    assert limits() == before


@pytest.mark.parametrize(("device", "needs"), [("cpu", "a C++ compiler"), ("meta", "Triton and a C compiler")])
def test_what_is_tried_is_on_the_device_and_what_that_needs_is_told(device, needs, monkeypatch):
    """meta stands for a GPU."""

    def compile(function):
        def refused(x):
            raise RuntimeError(f"nothing to compile with on {x.device}")

        return refused

    monkeypatch.setattr(torch, "compile", compile)
    said = f"cannot compile for {device} here (nothing to compile with on {device}). It needs {needs}"
    with pytest.raises(ValueError, match=re.escape(said)):
        check_compile(torch.device(device))
