"""Which layers are adapted, in either naming, and where a network has none of those names."""

import pytest
import torch
from torch import nn

from lcm_kit.distillation.adapter import LoraAdapters
from lcm_kit.distillation.targets import adapted, repeated, targets

LINEAR, CONV = nn.Linear(2, 2), nn.Conv2d(2, 2, 3)
BLOCK = "input_blocks.4.1.transformer_blocks.0"


@pytest.mark.parametrize(
    "name",
    [
        f"{BLOCK}.attn1.to_q", f"{BLOCK}.attn2.to_k", f"{BLOCK}.attn2.to_v", f"{BLOCK}.attn1.to_out.0",
        f"{BLOCK}.ff.net.0.proj", f"{BLOCK}.ff.net.2", "input_blocks.1.1.proj_in", "middle_block.1.proj_out",
        "input_blocks.4.0.in_layers.2", "output_blocks.4.0.out_layers.3", "output_blocks.4.0.skip_connection",
        "input_blocks.4.0.emb_layers.1", "input_blocks.3.0.op", "output_blocks.2.1.conv", "output_blocks.5.2.conv",
        "down_blocks.0.resnets.0.conv1", "up_blocks.1.resnets.0.conv2", "up_blocks.1.resnets.0.conv_shortcut",
        "mid_block.resnets.0.time_emb_proj", "down_blocks.0.downsamplers.0.conv", "up_blocks.0.upsamplers.0.conv",
    ],
)  # fmt: skip
def test_the_fourteen_types_are_adapted_in_both_namings(name):
    assert adapted(name, CONV)
    assert adapted(name, LINEAR)


@pytest.mark.parametrize(
    "name",
    [
        "time_embed.0", "time_embed.2", "label_emb.0.0", "input_blocks.0.0", "out.2", "conv_in", "conv_out",
        "time_embedding.linear_1", "add_embedding.linear_1", "my_to_q", f"{BLOCK}.attn1.to_out.1",
    ],
)  # fmt: skip
def test_the_ends_and_the_embeddings_are_not(name):
    assert not adapted(name, CONV)


def test_only_layers_that_a_branch_fits_are_adapted():
    name = f"{BLOCK}.attn1.to_q"
    assert not adapted(name, nn.LayerNorm(2))
    assert not adapted(name, nn.Identity())
    assert not adapted(name, nn.Conv2d(2, 2, 1, groups=2))
    assert not adapted(name, nn.Conv2d(2, 2, 3, padding=1, padding_mode="circular"))
    assert adapted(name, ForeignLinear(2, 2))
    for unknown in ("in_features", "out_features"):
        layer = ForeignLinear(2, 2)
        setattr(layer, unknown, None)
        assert not adapted(name, layer)


class Transformer(nn.Module):
    """Named like no UNet: an embedding, two like blocks, an exit."""

    def __init__(self):
        super().__init__()
        self.img_in = nn.Linear(2, 2)
        self.double_blocks = nn.ModuleList(
            nn.ModuleDict({"qkv": nn.Linear(2, 6), "norm": nn.LayerNorm(2)}) for _ in "ab"
        )
        self.final = nn.Linear(2, 2)


def test_another_network_is_adapted_in_its_repeated_blocks():
    assert targets(Transformer()) == ["double_blocks.0.qkv", "double_blocks.1.qkv"] == repeated(Transformer())


def test_a_network_with_nothing_to_adapt_is_refused():
    with pytest.raises(ValueError, match="no layer to adapt"):
        targets(nn.Sequential(nn.Linear(2, 2)))


class ForeignLinear(nn.Module):
    """A quantised layer of a host: no nn.Linear, and its weight is packed two to a byte."""

    def __init__(self, width_in, width_out):
        super().__init__()
        self.in_features, self.out_features = width_in, width_out
        self.register_buffer("weight", torch.zeros(width_out, width_in // 2, dtype=torch.uint8))


class Gate(nn.Module):
    """A matrix that no branch stands beside."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(2, 4))


def blocks_of(*layers):
    return nn.ModuleDict({"blocks": nn.ModuleList([nn.ModuleList(layers), nn.ModuleList(layers[:1])])})


@pytest.mark.parametrize(("others", "fine"), [(9, True), (8, False)])
def test_a_tenth_of_the_layers_may_be_of_a_kind_that_no_branch_fits_beside(others, fine):
    network = nn.ModuleDict({"blocks": nn.ModuleList([*(nn.Linear(4, 4) for _ in range(others)), Gate()])})
    if fine:
        assert len(targets(network)) == others
    else:
        with pytest.raises(ValueError, match=rf"1 of the {others + 1} layers"):
            targets(network)


def test_layers_of_a_host_s_own_classes_are_adapted():
    network = blocks_of(ForeignLinear(4, 6), nn.Linear(4, 4), nn.Embedding(3, 4), nn.LayerNorm(4))
    assert targets(network) == ["blocks.0.0", "blocks.0.1"]
    adapters = LoraAdapters(network, 2, generator=torch.Generator(), device=torch.device("cpu"))
    assert [tuple(branch.down.shape) for branch in adapters.branches] == [(2, 4), (2, 4)]
    assert [tuple(branch.up.shape) for branch in adapters.branches] == [(6, 2), (4, 2)]


def test_a_transformer_is_adapted_whole_though_its_attention_has_a_unet_s_names():
    block = nn.ModuleDict(
        {"attn": nn.ModuleDict({"to_q": nn.Linear(2, 2), "add_q_proj": nn.Linear(2, 2)}), "mlp": LINEAR}
    )
    network = nn.ModuleDict({"transformer_blocks": nn.ModuleList([block]), "proj_out": nn.Linear(2, 2)})
    inside = "transformer_blocks.0"
    assert targets(network) == [f"{inside}.attn.to_q", f"{inside}.attn.add_q_proj", f"{inside}.mlp"]


def test_a_transformer_with_an_encoder_of_its_own_is_adapted_whole():
    """Wan's camera adapter has residual blocks of conv1 and conv2, as a UNet has, beside the transformer."""
    block = nn.ModuleDict({"self_attn": nn.ModuleDict({"q": nn.Linear(2, 2)}), "ffn": LINEAR})
    residual = nn.ModuleDict({"conv1": nn.Conv2d(2, 2, 3), "conv2": nn.Conv2d(2, 2, 3)})
    network = nn.ModuleDict(
        {
            "blocks": nn.ModuleList([block]),
            "control_adapter": nn.ModuleDict({"residual_blocks": nn.Sequential(residual)}),
        }
    )
    assert targets(network) == ["blocks.0.self_attn.q", "blocks.0.ffn"]


def test_a_resblock_of_either_naming_makes_it_a_unet():
    """Only the fourteen types are taken then, not what else stands in its lists."""
    ldm = {"in_layers": nn.ModuleList([nn.GroupNorm(1, 2), nn.SiLU(), nn.Conv2d(2, 2, 3)])}
    diffusers = {"conv1": nn.Conv2d(2, 2, 3), "time_emb_proj": nn.Linear(2, 2)}
    for names in (ldm, diffusers):
        network = nn.ModuleDict({"blocks": nn.ModuleList([nn.ModuleDict(names | {"other": nn.Linear(2, 2)})])})
        assert {name.rpartition("blocks.0.")[2] for name in targets(network)} == set(dict(nn.ModuleDict(names).named_modules())) & {
            "in_layers.2", "conv1", "time_emb_proj",
        }  # fmt: skip


@pytest.mark.parametrize("kind", [Gate, lambda: nn.Conv2d(4, 4, 1, groups=2), lambda: nn.Conv1d(4, 4, 1)])
def test_a_network_of_which_much_cannot_be_trained_is_refused_with_the_count(kind):
    few = blocks_of(*[nn.Linear(4, 4) for _ in range(20)], kind())
    assert len(targets(few)) == 20
    with pytest.raises(ValueError, match=r"3 of the 5 layers .* cannot be trained \((Gate|Conv2d|Conv1d); the first: "):
        targets(blocks_of(nn.Linear(4, 4), nn.Linear(4, 4), kind(), kind(), kind()))
    with pytest.raises(ValueError, match="1 of the 1 layers"):
        targets(blocks_of(kind()))


def test_of_a_unet_the_first_convolution_and_the_time_embedding_of_a_block_list_are_left_alone():
    """They stand in the same lists as the blocks, and no published LCM-LoRA has them."""
    block = {"in_layers": nn.ModuleList([nn.GroupNorm(1, 2), nn.SiLU(), nn.Conv2d(2, 2, 3)]), "emb_layers": nn.ModuleList(
        [nn.SiLU(), nn.Linear(2, 2)]), "time": nn.Linear(2, 2)}  # fmt: skip
    inputs = nn.ModuleList([nn.ModuleList([nn.Conv2d(2, 2, 3)]), nn.ModuleDict(block)])
    assert targets(nn.ModuleDict({"input_blocks": inputs})) == [
        "input_blocks.1.in_layers.2",
        "input_blocks.1.emb_layers.1",
    ]


def test_a_unet_with_exchanged_layers_is_refused_with_the_count():
    """A node that makes tiles pads the convolutions in a circle: an LCM-LoRA without them would be one by name only."""
    layers = {"in_layers": nn.ModuleList([nn.GroupNorm(1, 2), nn.SiLU(), nn.Conv2d(2, 2, 3, padding_mode="circular")])}
    network = nn.ModuleDict({"input_blocks": nn.ModuleList([nn.ModuleDict(layers | {"to_q": nn.Linear(2, 2)})])})
    with pytest.raises(ValueError, match=r"1 of the 2 layers .*\(Conv2d; the first: input_blocks\.0\.in_layers\.2\)"):
        targets(network)
