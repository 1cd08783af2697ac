"""LoRA branches beside a network's layers: the same as changed weights, and no trace when off or removed."""

import pytest
import torch
from torch import nn

from lcm_kit.distillation.adapter import Average, LoraAdapters, adapted
from lcm_kit.lora_merge import Lora


class Network(nn.Module):
    """A convolution with stride, a 1x1 convolution and a linear layer, and one that LCM-LoRA leaves alone."""

    def __init__(self):
        super().__init__()
        self.time_embed = nn.Sequential(nn.Linear(4, 4))
        self.middle_block = nn.ModuleList(
            [nn.Conv2d(3, 6, 3, stride=2, padding=1), nn.Conv2d(6, 5, 1), nn.Linear(5, 4)]
        )

    def forward(self, x):
        conv, point, linear = self.middle_block
        return self.time_embed(linear(point(conv(x)).mean((2, 3))))


def network():
    torch.manual_seed(0)
    return Network()


def adapters_of(net, rank=2, alpha=1.0):
    adapters = LoraAdapters(net, rank, alpha, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        for branch in adapters.branches:
            branch.up.normal_(generator=torch.Generator().manual_seed(2))
    return adapters


X = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(3))


def test_a_fresh_adapter_changes_nothing():
    net = network()
    before = net(X)
    LoraAdapters(net, 4, generator=torch.Generator().manual_seed(1))
    assert torch.equal(net(X), before)


def test_a_branch_starts_as_peft_starts_one():
    """down even in +-1 / sqrt(fan in), which is Kaiming's with a = sqrt(5), drawn from the generator alone; up zero."""
    net = nn.ModuleDict({"middle_block": nn.ModuleList([nn.Conv2d(16, 64, 3), nn.Linear(64, 64)])})
    first, second = (LoraAdapters(net, 64, generator=torch.Generator().manual_seed(seed)) for seed in (5, 5))
    assert [tuple(branch.down.shape) for branch in first.branches] == [(64, 16, 3, 3), (64, 64)]
    for branch, again, inputs in zip(first.branches, second.branches, (144, 64), strict=True):
        assert torch.equal(branch.down, again.down)
        scaled = branch.down.detach() * inputs**0.5
        assert 0.99 < float(scaled.max()) <= 1
        assert -1 <= float(scaled.min()) < -0.99
        # 4,096 numbers or more: a mean of 0 and a deviation of 1 / sqrt(3), each to 0.01 or so
        assert abs(float(scaled.mean())) < 0.04
        assert abs(float(scaled.std()) - 3**-0.5) < 0.03
        assert not branch.up.any()


def test_on_the_meta_device_there_are_shapes_alone():
    state = torch.get_rng_state()
    source = torch.Generator().manual_seed(1)
    before = source.get_state()
    adapters = LoraAdapters(network(), 2, generator=source, device=torch.device("meta"))
    assert {parameter.device.type for parameter in adapters.parameters()} == {"meta"}
    assert [tuple(p.shape) for p in adapters.factors().values()][:2] == [(2, 3, 3, 3), (6, 2, 1, 1)]
    assert torch.equal(source.get_state(), before)
    torch.set_rng_state(state)  # network() has set it


def test_what_was_frozen_before_is_frozen_afterwards_and_the_rest_is_not():
    net = network()
    net.middle_block[0].weight.requires_grad_(False)
    adapters = adapters_of(net)
    assert not any(parameter.requires_grad for parameter in net.parameters())
    adapters.remove()
    adapters.remove()
    assert [name for name, p in net.named_parameters() if not p.requires_grad] == ["middle_block.0.weight"]


def test_a_moving_average_by_hand():
    parameter = nn.Parameter(torch.tensor([0.0, 8.0]))
    average, wanted = Average([parameter], 0.2), parameter.detach().double().clone()
    for step in (1, 2, 3, 4):
        parameter.data += step
        rate = {1: 1 / 11, 2: 2 / 12}.get(step, 0.2)  # 3 / 13 and 4 / 14 are more
        wanted = rate * wanted + (1 - rate) * parameter.detach().double()
        average.update(step)
        torch.testing.assert_close(average.values[0].double(), wanted, rtol=1e-6, atol=0)
    own = parameter.detach().clone()
    with average.in_place():
        assert torch.equal(parameter, average.values[0])
    assert torch.equal(parameter, own)


def test_the_branches_do_what_the_exported_lora_does_to_the_weights():
    net = network()
    adapters = adapters_of(net)
    with_branches = net(X).detach()
    lora = Lora.from_state_dict(adapters.lora_state_dict())
    adapters.remove()
    with torch.no_grad():
        for name in adapters.names:
            weight = net.get_submodule(name).weight
            weight += lora.delta(f"lora_unet_{name.replace('.', '_')}").view_as(weight)
    torch.testing.assert_close(net(X), with_branches)


def test_the_teacher_is_bit_equal_to_the_base():
    net = network()
    before = net(X)
    adapters = adapters_of(net)
    assert not torch.equal(net(X), before)
    with adapters.disabled():
        assert torch.equal(net(X), before)
    assert not torch.equal(net(X), before)


def test_gradients_reach_the_lora_only():
    net = network()
    adapters = adapters_of(net)
    net(X).square().mean().backward()
    assert all(p.grad is not None for p in adapters.parameters())
    assert all(p.grad is None for p in net.parameters())


def test_the_layers_that_lcm_lora_leaves_alone_are_left_alone():
    adapters = adapters_of(network())
    assert adapters.names == ["middle_block.0", "middle_block.1", "middle_block.2"]
    assert not adapted("input_blocks.0.0", nn.Conv2d(4, 4, 3))
    assert not adapted("middle_block.0", nn.GroupNorm(1, 4))


def test_rank_0_is_refused():
    with pytest.raises(ValueError, match="rank is 0; a LoRA has at least rank 1"):
        LoraAdapters(network(), 0, generator=torch.Generator())


def test_rank_1_is_the_smallest():
    adapters = LoraAdapters(network(), 1, generator=torch.Generator().manual_seed(0))
    other = other_lora(adapters, 1)
    adapters.start_from(other)
    for name, branch in zip(adapters.names, adapters.branches, strict=True):
        torch.testing.assert_close(branch.up.flatten(1) @ branch.down.flatten(1), other[name][0] @ other[name][1])
    adapters.remove()


def test_a_rank_above_all_widths_is_refused_before_anything_is_made():
    net = network()
    widest = max(min(net.get_submodule(name).weight.flatten(1).shape) for name in adapters_of(network()).names)
    LoraAdapters(net, widest, generator=torch.Generator()).remove()
    with pytest.raises(ValueError, match=f"rank is {widest + 1}, but the largest layer .* is {widest} wide"):
        LoraAdapters(net, widest + 1, generator=torch.Generator())
    assert all(parameter.requires_grad for parameter in net.parameters())


@pytest.mark.parametrize("alpha", [float("nan"), float("inf"), -1.0, 0.0])
def test_an_alpha_that_scales_nothing_sensible_is_refused(alpha):
    with pytest.raises(ValueError, match=r"alpha is .* finite number above 0"):
        LoraAdapters(network(), 2, alpha, generator=torch.Generator())


def test_a_network_without_layers_to_adapt_is_refused():
    with pytest.raises(ValueError, match="no layer to adapt"):
        LoraAdapters(nn.Sequential(nn.ReLU()), 4, generator=torch.Generator())


# ---- beginning with another LoRA


def other_lora(adapters, rank, seed=5):
    """Layer -> (up, down) of that rank, of the shapes that the adapters have."""
    source = torch.Generator().manual_seed(seed)
    return {
        name: (
            torch.randn(branch.up.shape[0], rank, generator=source),
            torch.randn(rank, branch.down[0].numel(), generator=source),
        )
        for name, branch in zip(adapters.names, adapters.branches, strict=True)
    }


@pytest.mark.parametrize(("own", "rank", "alpha"), [(4, 4, None), (4, 4, 1.0), (4, 3, 6.0), (4, 1, None), (1, 1, 2.0)])
def test_a_lora_of_this_rank_or_less_is_begun_with_exactly(own, rank, alpha):
    net = network()
    adapters = LoraAdapters(net, own, alpha, generator=torch.Generator().manual_seed(0))
    fresh = adapters.lora_state_dict()
    other = other_lora(adapters, rank)
    adapters.start_from(other)
    for name, branch in zip(adapters.names, adapters.branches, strict=True):
        delta = branch.up.flatten(1) @ branch.down.flatten(1) * (branch.alpha / branch.rank)
        torch.testing.assert_close(delta, other[name][0] @ other[name][1])
        assert not branch.up[:, rank:].any()
        # What is left of the rank can still be learnt: it has a gradient.
        assert torch.equal(branch.down[rank:], fresh[f"lora_unet_{name.replace('.', '_')}.lora_down.weight"][rank:])
    adapters.remove()


def test_layers_that_another_lora_lacks_stay_as_they_are():
    adapters = LoraAdapters(network(), 4, generator=torch.Generator().manual_seed(0))
    before = adapters.lora_state_dict()
    first, *rest = adapters.names
    adapters.start_from({first: other_lora(adapters, 2)[first]})
    after = adapters.lora_state_dict()
    changed = {key.split(".")[0] for key in after if not torch.equal(after[key], before[key])}
    assert changed == {f"lora_unet_{first.replace('.', '_')}"}
    assert rest


def test_a_lora_of_a_higher_rank_or_another_shape_is_refused_and_changes_nothing():
    adapters = LoraAdapters(network(), 2, generator=torch.Generator().manual_seed(0))
    before = adapters.lora_state_dict()
    with pytest.raises(ValueError, match=r"start_from is x, of rank 3 \(.*\), and rank is 2\. Set rank to 3, or make"):
        adapters.start_from(other_lora(adapters, 3), "x")
    wrong = other_lora(adapters, 2)
    last = adapters.names[-1]
    wrong[last] = wrong[last][0], torch.ones(2, 7)
    with pytest.raises(ValueError, match=f"start_from is x, which has {last} as"):
        adapters.start_from(wrong, "x")
    after = adapters.lora_state_dict()
    assert all(torch.equal(after[key], before[key]) for key in before)
