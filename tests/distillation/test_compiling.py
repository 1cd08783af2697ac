"""torch.compile for the calls without a gradient: the same training to rounding, and told where there is no compiler."""

import shutil
from dataclasses import replace

import pytest
import torch
from torch import nn

from lcm_kit.distillation.compiling import check_compile, compiling
from lcm_kit.distillation.trainer import Trainer, adapters_on
from lcm_kit.tests.distillation.toy import SETTINGS, SIZE, TABLE, data

CPU = torch.device("cpu")
WIDTH = 8
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")  # torch of itself, while it compiles
needs_compiler = pytest.mark.skipif(
    not any(map(shutil.which, ("g++", "clang++", "cl"))), reason="torch.compile needs a C++ compiler"
)


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.norm, self.one, self.two = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)

    def forward(self, x, options=None):
        x += self.two(self.one(self.norm(x)).sin())  # as Flux's blocks do
        return x


class Network(nn.Module):
    """Answers (x, sigma) by way of one block."""

    def __init__(self):
        super().__init__()
        self.enter, self.blocks, self.leave = nn.Linear(SIZE, WIDTH), nn.ModuleList([Block()]), nn.Linear(WIDTH, SIZE)
        source = torch.Generator().manual_seed(5)
        for parameter in self.parameters():
            parameter.data = torch.randn(parameter.shape, generator=source) / 3

    def forward(self, x, sigma, cond):
        x = x / (1 + sigma[:, None] ** 2).sqrt()
        return self.leave(self.blocks[0](self.enter(x), options={}))


def trained(*, compile, recompute, seed):
    """(losses, LoRA) of four steps with a moving average as target, whose weights take the place of others in every step."""
    network = Network()
    settings = replace(SETTINGS, steps=4, accumulate=1, average=0.9, seed=seed)
    with compiling(network, compile), adapters_on(network, 2, seed=seed, recompute=recompute) as adapters:
        trainer = Trainer(network, adapters, data, TABLE, settings)
        trainer.run()
        lora = adapters.lora_state_dict()
    assert not any("forward" in vars(module) for module in network.modules())
    return trainer.losses, lora


@pytest.mark.slow
@needs_compiler
def test_compiled_or_not_it_is_the_same_training_to_rounding():
    from torch._dynamo.utils import counters

    counters.clear()
    # A second training of other adapters on the same classes must not run the first one's code.
    for recompute, seed in ((True, 3), (False, 4)):
        (losses, lora), (plain_losses, plain) = (
            trained(compile=compile, recompute=recompute, seed=seed) for compile in (True, False)
        )
        assert losses == pytest.approx(plain_losses, rel=1e-5)
        for key, tensor in plain.items():
            # Adam divides by the size of the gradient, so its rounding counts fully: steps of 0.02.
            torch.testing.assert_close(lora[key], tensor, rtol=1e-3, atol=1e-5, msg=key)
        assert counters["stats"]["unique_graphs"] >= 2, "teacher and student"
        counters.clear()


@needs_compiler
def test_what_cannot_be_compiled_is_computed_as_before():
    class Odd(Block):
        def forward(self, x, options=None):
            torch._dynamo.graph_break()
            return super().forward(x + len(str(x.mean().item())) * 0, options)

    network = Network()
    network.blocks[0] = Odd()
    x, sigma = torch.randn(2, SIZE, generator=torch.Generator().manual_seed(1)), torch.ones(2)
    with torch.no_grad():
        expected = network(x, sigma, None)
        with compiling(network):
            torch.testing.assert_close(network(x, sigma, None), expected)


def test_off_changes_nothing():
    network = Network()
    with compiling(network, False):
        assert not any("forward" in vars(module) for module in network.modules())


def test_without_a_compiler_it_is_refused_in_words():
    from torch._inductor import config

    with config.patch({"cpp.cxx": ("/nowhere/c++",)}):
        with pytest.raises(
            ValueError, match=r"compile is on, but torch .* cannot compile for cpu here .*C\+\+ compiler"
        ):
            check_compile(CPU)
