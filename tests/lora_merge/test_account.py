"""The numbers that a merge accounts for, against a count and dense sums by hand."""

import math
from dataclasses import replace
from statistics import median

import pytest
import torch

from lcm_kit.lora_merge import Lora, MergeOptions, merge_with_account
from lcm_kit.lora_merge.metadata.adapter_config import of_peft
from lcm_kit.lora_merge.one_module.protect import protected_of, protecting
from lcm_kit.lora_merge.recognise.base_models import Recognised
from lcm_kit.lora_merge.recognise.catalogue import Published
from lcm_kit.lora_merge.recognise.identity import Identity, Structure
from lcm_kit.tests.lora_merge.make import dense, factors, generator, kohya

# Module -> (out, in) and the (rank, alpha) of each LoRA that has it.
LAYERS = {
    "lora_unet_a": ((9, 8), {0: (2, 4.0), 1: (3, 3.0)}),
    "lora_unet_b": ((8, 7), {0: (4, None)}),
    "lora_unet_c": ((6, 9), {1: (1, 0.5), 2: (2, 2.0)}),
    "lora_unet_d": ((7, 6), {2: (2, 8.0)}),
}
STRENGTHS = (0.7, -1.2, 0.5)


def lora(index, extra=None, metadata=None):
    tensors = {}
    for name, ((out, inputs), owners) in LAYERS.items():
        if index in owners:
            rank, alpha = owners[index]
            tensors |= kohya(name, *factors(out, rank, inputs, seed=10 * index + len(tensors)), alpha)
    return Lora.from_state_dict(tensors | (extra or {}), source=f"lora {index}", metadata=metadata)


def dora(out=5, inputs=6, seed=0):
    parts = kohya("lora_unet_dora", *factors(out, 2, inputs, seed=seed), 1.0)
    return parts | {"lora_unet_dora.dora_scale": torch.ones(out, 1)}


def deltas(one):
    return {
        name: dense(layer.up, layer.down, (layer.rank if layer.alpha is None else layer.alpha) / layer.rank)
        for name, layer in one.modules.items()
    }


def test_what_each_input_has_and_what_became_of_it():
    """Of a DoRA's module: passed through at strength 1, refused where another input changes it too."""
    weights = torch.zeros(5, dtype=torch.float32)
    first = lora(0, dora(), {"sshs_model_hash": "ab" * 32})
    second = lora(1, {"lora_unet_a.diff_b": weights + 1, "lora_unet_norm.w_norm": weights + 2})
    third = lora(2, dora(seed=3))
    _, account = merge_with_account(
        [(first, 1.0), (second, 0.5), (third, 1.0)], leave_out=True, sha256=["12", None], block_strengths="unet=1"
    )
    assert [source.name for source in account.sources] == ["lora 0", "lora 1", "lora 2"]
    assert [source.strength for source in account.sources] == [1.0, 0.5, 1.0]
    assert [source.modules for source in account.sources] == [3, 3, 3]
    assert [source.only_here for source in account.sources] == [1, 1, 1]
    assert [source.diffs for source in account.sources] == [0, 2, 0]
    assert [source.ranks for source in account.sources] == [(2, 4), (1, 3), (2, 2)]
    # No alpha counts as the rank.
    assert [source.alphas for source in account.sources] == [(4.0, 4.0), (0.5, 3.0), (2.0, 8.0)]
    assert [(source.merged, source.passed_through, source.refused) for source in account.sources] == [
        (2, 0, 1), (3, 0, 0), (2, 0, 1)
    ]  # fmt: skip
    assert [source.sha256 for source in account.sources] == ["12", None, None]
    assert [source.weights for source in account.sources] == ["ab" * 32, None, None]
    assert [source.block_strengths for source in account.sources] == ["unet=1.0"] * 3
    assert [source.effect for source in account.sources] == [1.0] * 3
    assert [source.retention for source in account.sources] == [1.0] * 3
    assert (account.modules, account.cut_modules, account.relative_error) == (5, 0, 0.0)
    _, alone = merge_with_account([(first, 1.0), (second, 0.5)])
    assert [(source.merged, source.passed_through, source.refused) for source in alone.sources] == [
        (2, 1, 0), (3, 0, 0)
    ]  # fmt: skip
    assert [source.block_strengths for source in alone.sources] == ["", ""]


def test_what_a_user_should_know_is_accounted_for_input_by_input_and_of_the_whole():
    """Keys without effect, PEFT's ways, licences that differ, slices beside a whole, nobody to protect, what is too small."""
    name, stray = "lora_unet_double_blocks_0_img_attn_qkv", {"a.stray.key": torch.ones(2)}
    said = {"modelspec.license": "MIT", "use_dora": "True"}
    whole = Lora.from_state_dict(kohya(name, *factors(18, 2, 6)) | stray, metadata=said, source="whole")
    part = kohya("transformer.transformer_blocks.0.attn.to_q", *factors(6, 2, 6))
    part["lora_unet_small.diff"] = torch.full((3, 4), 1e-9)
    other = Lora.from_state_dict(part, metadata={"modelspec.license": "other"}, source="part")
    _, account = merge_with_account(
        [(whole, 1.0), (other, 1.0)], method="ties", density=1.0, protect="auto", mu=1.0, out_dtype=torch.float16
    )
    assert [source.unread for source in account.sources] == [("a.stray.key",), ()]
    assert [source.peft for source in account.sources] == [of_peft(said), of_peft({})]
    assert account.sources[0].peft.dora
    assert [note.stated for note in account.notes] == [(("MIT", "whole"), ("other", "part"))]
    assert [(first.owner, second.owner) for first, second in account.fused] == [(0, 1)]
    assert account.protects_nobody
    assert account.too_small == {"lora_unet_small": 1.0}
    assert account.options.mu == 1.0
    _, plain = merge_with_account([(whole, 1.0)])
    assert (plain.notes, plain.fused, plain.protects_nobody, dict(plain.too_small)) == ((), (), False, {})


def test_an_input_of_differences_alone_has_no_ranks():
    one = Lora.from_state_dict({"lora_unet_x.diff": torch.ones(3, 4)}, source="diff")
    _, account = merge_with_account([(one, 1.0)])
    (source,) = account.sources
    assert (source.ranks, source.alphas, source.diffs, source.modules) == (None, None, 1, 1)
    assert account.ranks is None


@pytest.mark.parametrize("rank", [0, 1, 2, 3])
def test_the_error_the_ranks_and_what_is_left_of_each_are_those_of_the_dense_sums(rank):
    loras = [lora(index) for index in range(3)]
    inputs = [*zip(loras, STRENGTHS, strict=True)]
    merged, account = merge_with_account(inputs, rank=rank)
    updates = [deltas(one) for one in loras]
    whole = lost = 0.0
    own, kept = [0.0] * 3, [0.0] * 3
    ranks, cut = [], 0
    for name in LAYERS:
        parts = {i: STRENGTHS[i] * update[name] for i, update in enumerate(updates) if name in update}
        total = sum(parts.values())
        u, s, v = torch.linalg.svd(total, full_matrices=False)
        full = sum(LAYERS[name][1][i][0] for i in parts)
        n = min(full, rank) if rank else full
        u, v = u[:, :n], v[:n]
        whole += float(s.square().sum())
        lost += float(s[n:].square().sum())
        cut += bool(rank and full > rank)
        ranks.append(n)
        for i, part in parts.items():
            own[i] += float(part.square().sum())
            kept[i] += float((u.T @ part @ v.T).square().sum())
    assert account.rank == rank
    assert account.options == MergeOptions(rank=rank)
    assert account.method == "linear"
    assert account.cut_modules == cut
    assert account.relative_error == pytest.approx(math.sqrt(lost / whole), rel=1e-4, abs=1e-6)
    assert account.ranks == (min(ranks), median(ranks), max(ranks))
    for i, source in enumerate(account.sources):
        assert source.retention == pytest.approx(kept[i] / own[i] if rank else 1.0, rel=1e-3)
    assert sorted(layer.rank for layer in merged.modules.values()) == sorted(ranks)


@pytest.mark.parametrize("choices", [{}, {"rank": 1}, {"keep": 0.5}])
def test_a_sum_of_nothing_is_no_error_and_leaves_nothing_of_nothing(choices):
    """0 of 0: no error, and of the inputs nothing that could be left. Beside it one of strength 0."""
    up, down = factors(6, 2, 5)
    zero = Lora.from_state_dict(kohya("lora_unet_x", torch.zeros_like(up), down), source="zero")
    _, account = merge_with_account([(zero, 1.0)], **choices)
    assert account.relative_error == 0.0
    assert account.sources[0].retention == (None if choices else 1.0)
    full = Lora.from_state_dict(kohya("lora_unet_x", up, down), source="full")
    _, account = merge_with_account([(full, 1.0), (full, 0.0)], **choices)
    assert account.sources[1].retention == (None if choices else 1.0)


@pytest.mark.parametrize("size", [1.0, 1e-3])
def test_what_stepped_aside_is_measured_against_what_it_was(size):
    """mu / (1 + mu) is taken of the part that lies in the other's direction: of rank 1, all that it reads there."""
    g = generator(1)
    first, second = torch.randn(6, 1, generator=g), torch.randn(6, 1, generator=g)
    reads = size * torch.randn(1, 5, generator=g)
    mine, theirs = (
        Lora.from_state_dict(kohya("lora_unet_x", up, reads), source=name) for up, name in ((first, "a"), (second, "b"))
    )
    _, account = merge_with_account([(mine, 1.0), (theirs, 1.0)], protect=1, mu=3.0)
    assert account.sources[0].stepped_aside == pytest.approx((1 - 3 / 4) ** 2, rel=1e-4)
    assert [source.protected for source in account.sources] == [False, True]
    assert account.sources[1].stepped_aside == 1.0
    nothing = Lora.from_state_dict(kohya("lora_unet_x", torch.zeros_like(first), reads), source="0")
    _, account = merge_with_account([(nothing, 1.0), (theirs, 1.0)], protect=1, mu=3.0)
    assert account.sources[0].stepped_aside == 1.0


def test_a_method_that_is_no_sum_leaves_open_what_is_left_of_each_until_a_cut():
    inputs = [(lora(0), 1.0), (lora(1), 1.0)]
    _, account = merge_with_account(inputs, method="ties", density=1.0)
    assert [source.retention for source in account.sources] == [None, None]
    _, cut = merge_with_account(inputs, method="ties", density=1.0, rank=1)
    assert all(0 < source.retention < 1 for source in cut.sources)
    _, mean = merge_with_account(inputs, method="average", rank=0)
    assert [(source.retention, source.effect) for source in mean.sources] == [(1.0, 1.0)] * 2


def test_factors_that_were_balanced_for_float16_are_counted():
    up, down = factors(6, 2, 5)
    one = Lora.from_state_dict(kohya("lora_unet_x", up * 1e6, down * 1e-6) | kohya("lora_unet_y", up, down), source="a")
    _, account = merge_with_account([(one, 1.0)], out_dtype=torch.float16)
    assert account.rebalanced == 1


# ---- whom the others step aside for

NOTHING = Structure(
    modules=1, ranks=None, alphas=None, scales=None, parameters=1, recognised=Recognised((), False, frozenset())
)
FULL = replace(NOTHING, recognised=Recognised((), True, frozenset({"time_emb_proj", "conv1", "attn2_to_k"})))
ROW = Published("Test", base="SD1.5", preset="LCM", sha256="0" * 64, repository="a/b")
STYLE = Identity(kind="LoRA", bases=(), how="unknown", preset=None, published=None, structure=NOTHING)
SAYS = replace(STYLE, preset="LCM", how="metadata")
COVERS = replace(SAYS, structure=FULL)
FILE = replace(SAYS, published=ROW, how="sha256")
FILE_THAT_COVERS = replace(FILE, structure=FULL)


@pytest.mark.parametrize(
    ("identities", "strengths", "found"),
    [
        ([], [], None),
        ([STYLE, None], [1.0, 1.0], None),
        ([STYLE, SAYS], [1.0, 1.0], 1),
        ([SAYS, SAYS], [1.0, 1.0], 0),
        # A published file goes before one that says so only, and so does one that covers what they cover, alone or both.
        ([SAYS, FILE], [1.0, 1.0], 1),
        ([SAYS, COVERS], [1.0, 1.0], 1),
        ([SAYS, FILE_THAT_COVERS], [1.0, 1.0], 1),
        ([FILE, COVERS, FILE_THAT_COVERS], [1.0, 1.0, 1.0], 0),
        ([COVERS, FILE], [1.0, -0.5], 0),
        # What covers without a preset is no acceleration LoRA that is known.
        ([replace(STYLE, structure=FULL), SAYS], [1.0, 1.0], 1),
        ([FILE, SAYS], [0.0, 1.0], 1),
        ([None, SAYS], [1.0, 0.0], None),
        ([None, FILE], [1.0, -1.0], 1),
    ],
)
def test_the_first_of_the_surest_acceleration_loras_with_a_strength_is_protected(identities, strengths, found):
    assert protected_of(identities, strengths) == found
    labels = [str(number) for number in range(1, len(identities) + 1)]
    if found is None:
        assert protecting("auto", labels, lambda: identities, strengths) == "auto"
    else:
        assert protecting("auto", labels, lambda: identities, strengths) == found


def test_identities_are_asked_for_only_where_auto_is():
    def never():
        raise AssertionError("asked")

    assert protecting("none", ["1", "2"], never, [1.0, 1.0]) is None
    assert protecting("2", ["1", "2"], never, [1.0, 1.0]) == 1
    assert protecting("lora_1", ["1", "2"], never, [1.0, 1.0]) == 0
