"""Networks that write into their own tensors get the gradient of the same networks that do not."""

import copy

import pytest
import torch
from torch import nn

from lcm_kit.distillation.adapter import LoraAdapters
from lcm_kit.distillation.inplace import Keeping
from lcm_kit.distillation.recompute import blocks, recomputing
from lcm_kit.distillation.trainer import adapters_on
from lcm_kit.tests.distillation.live_memory import LiveMemory

WIDTH = 6


def add(inplace, x, y):
    """x + y, in a new tensor or in that of x."""
    if inplace:
        x += y
        return x
    return x + y


class Block(nn.Module):
    """Two layers. `write` says in which way it writes; False computes the same without writing."""

    def __init__(self, body):
        super().__init__()
        self.norm, self.one, self.two = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)
        self.body, self.inplace = body, True

    def forward(self, x, *, other, options=None):
        return self.body(self, x, other, self.inplace, options or {})


def after_a_norm(block, x, other, inplace, options):
    """Flux: what the norm has kept."""
    x = add(inplace, x, block.one(block.norm(x)))
    return add(inplace, x, block.two(block.norm(x)))


def after_the_layer(block, x, other, inplace, options):
    """What the branch beside a layer has kept."""
    return block.two(add(inplace, x, block.one(x)))


def into_a_slice(block, x, other, inplace, options):
    y = block.one(x).sin()
    if inplace:
        x[:, 1:3] += y[:, 1:3]
        x[0] *= 2.0
    else:
        x = torch.cat([x[:, :1], x[:, 1:3] + y[:, 1:3], x[:, 3:]], 1)
        x = torch.cat([x[:1] * 2.0, x[1:]])
    return block.two(x)


def into_a_result(block, x, other, inplace, options):
    """sigmoid keeps what it returned."""
    gate = block.one(x).sigmoid()
    gate = gate.mul_(2.0) if inplace else gate * 2.0
    return block.two(gate * x)


def into_both_inputs(block, x, other, inplace, options):
    """The one that comes by keyword too."""
    other = add(inplace, other, block.one(block.norm(other)))
    x = add(inplace, x, block.two(other * x))
    return add(inplace, x, other)


def with_an_out_argument(block, x, other, inplace, options):
    y = block.one(x)
    z = y.square()
    if inplace:
        with torch.no_grad():
            torch.mul(y.detach(), 0.5, out=y.detach())
        return block.two(z)
    return block.two(z)


def with_an_out_argument_right_behind(block, x, other, inplace, options):
    y = block.one(x)
    z = y.square()
    if inplace:
        with torch.no_grad():
            torch.sin(other.detach(), out=y.detach())
    return block.two(z)


def into_a_list_of_tensors(block, x, other, inplace, options):
    y, z = block.one(x), block.two(other)
    product = y * z
    if inplace:
        with torch.no_grad():
            torch._foreach_mul_([y.detach(), z.detach()], 0.5)
    return product


def by_the_options(block, x, other, inplace, options):
    """The caller changes this dict from block to block."""
    return block.two(x + options["number"] * block.one(x))


BODIES = [
    after_a_norm, after_the_layer, into_a_slice, into_a_result, into_both_inputs, with_an_out_argument,
    with_an_out_argument_right_behind, into_a_list_of_tensors, by_the_options,
]  # fmt: skip


class Network(nn.Module):
    """A caller that writes as well: into what it has given to a block, and into what it got from one."""

    def __init__(self, body):
        super().__init__()
        self.entry = nn.Linear(WIDTH, WIDTH)
        self.blocks = nn.ModuleList(Block(body) for _ in range(3))

    def forward(self, x):
        inplace = self.blocks[0].inplace
        x, other, options = self.entry(x), self.entry(x).cos(), {}
        for number, block in enumerate(self.blocks):
            options["number"] = number + 1.0
            y = block(x, other=other if inplace else other.clone(), options=options)
            if self.blocks[0].body is by_the_options:  # into what a block was given
                x = add(inplace, x, y)
            else:  # into what it returned
                x = add(inplace, y, y.sin())
        return x.square()


def gradients(network, checkpointing):
    adapters = LoraAdapters(network, 2, generator=torch.Generator().manual_seed(1))
    for branch in adapters.branches:
        branch.up.data.normal_(generator=torch.Generator().manual_seed(2))
    x = torch.randn(4, WIDTH, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    with recomputing(network, checkpointing):
        output = network(x.clone())
        output.mean().backward()
    return output, {name: factor.grad for name, factor in adapters.factors().items()}


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("body", BODIES, ids=lambda body: body.__name__)
def test_the_gradient_is_that_of_the_network_that_does_not_write(body, checkpointing):
    torch.manual_seed(0)
    writing = Network(body).double()
    plain = copy.deepcopy(writing)
    for block in plain.blocks:
        block.inplace = False
    # into_both_inputs hands its changed `other` on; without writing the next block would get the old one.
    if body is into_both_inputs:
        plain = handing_on(plain)
    expected_output, expected = gradients(plain, False)
    output, actual = gradients(writing, checkpointing)
    torch.testing.assert_close(output, expected_output, rtol=0, atol=0)
    assert actual.keys() == expected.keys()
    for name, gradient in expected.items():
        assert gradient.norm() > 0, name
        torch.testing.assert_close(actual[name], gradient, rtol=1e-12, atol=1e-15, msg=name)


def handing_on(network):
    """The network with `other` as each block leaves it."""

    def forward(x):
        x, other = network.entry(x), network.entry(x).cos()
        for block in network.blocks:
            other = other + block.one(block.norm(other))
            y = x + block.two(other * x) + other
            x = y + y.sin()
        return x.square()

    network.forward = forward
    return network


def test_a_network_that_does_not_write_copies_nothing(monkeypatch):
    network = nn.Sequential(nn.ModuleList([nn.Linear(WIDTH, WIDTH)])[0], nn.LayerNorm(WIDTH))
    copies = []
    monkeypatch.setattr(torch.Tensor, "clone", lambda *args, **kwargs: copies.append(args))
    with recomputing(network):
        network(torch.ones(2, WIDTH, requires_grad=True)).sum().backward()
    assert copies == []


def test_blocks_compute_a_second_time_only_as_far_as_they_have_to():
    torch.manual_seed(0)
    network = Network(after_a_norm)
    calls = []
    hooks = [block.register_forward_pre_hook(lambda *_: calls.append("whole")) for block in network.blocks]
    ends = [block.two.register_forward_hook(lambda *_: calls.append("end")) for block in network.blocks]
    with adapters_on(network, 1, recompute=True):
        network(torch.randn(2, WIDTH)).sum().backward()
    # The first pass in whole; the second one stops where nothing more is kept: in the branch beside the last layer.
    assert calls.count("whole") == 3
    assert calls.count("end") == 3 + 3
    for hook in (*hooks, *ends):
        hook.remove()
    assert len(blocks(network)) == 3


@pytest.mark.parametrize("checkpointing", [False, True])
def test_what_was_kept_is_given_free_by_the_backward_pass(checkpointing):
    network = Network(after_a_norm)
    with adapters_on(network, 2, recompute=checkpointing):
        output = network(torch.randn(2, WIDTH))
        kept = output.grad_fn
        output.sum().backward()
        with pytest.raises(RuntimeError, match="backward through the graph a second time"):
            output.sum().backward()
        assert kept is not None


def test_without_gradients_nothing_is_kept(monkeypatch):
    network, kept = Network(after_a_norm), []
    keep = Keeping.keep
    monkeypatch.setattr(Keeping, "keep", lambda *args: kept.append(args) or keep(*args))
    with adapters_on(network, 2, recompute=True):
        network(torch.randn(2, WIDTH))
        assert kept
        kept.clear()
        with torch.no_grad():
            assert not network(torch.randn(2, WIDTH)).requires_grad
            network.blocks[0](torch.randn(2, WIDTH), other=torch.randn(2, WIDTH), options={"number": 1.0})
    assert kept == []


def test_what_is_kept_is_the_memory_without_its_gradient():
    """Else a result that its own gradient needs would hold itself."""
    x = torch.ones(3, requires_grad=True)
    y = x.exp()
    kept = Keeping().keep(y).tensor
    assert kept.grad_fn is None
    assert not kept.requires_grad
    assert kept.data_ptr() == y.data_ptr()


def test_nothing_is_computed_again_unless_told():
    network = Network(after_a_norm)
    with adapters_on(network, 2):
        assert [module for module in network.modules() if "forward" in vars(module)] == [network]


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("function", [torch.exp, torch.sigmoid, torch.tanh, torch.sin])
def test_nothing_is_left_of_a_pass_once_it_is_over(function, checkpointing):
    """exp keeps its own result, which must not come to hold itself."""
    network = Network(lambda block, x, other, inplace, options: block.two(function(block.one(x))))
    with adapters_on(network, 2, recompute=checkpointing), LiveMemory() as memory:
        for _ in range(2):
            network(torch.randn(2, WIDTH)).sum().backward()
            after = memory.now
        network(torch.randn(2, WIDTH)).sum().backward()
        assert memory.now == after
