"""Cuts of a whole LoRA, protection, strengths by block, workers and dtypes in `merge`, and `resize`."""

import inspect
import itertools
import json
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lcm_kit.lora_merge import (
    Lora,
    describe_merge,
    merge,
    merge_with_account,
    parse_block_strengths,
    resize,
    resize_with_account,
    save,
)
from lcm_kit.lora_merge.merging.budget import numbers_within
from lcm_kit.lora_merge.merging.report import warnings_of
from lcm_kit.lora_merge.metadata.fields import PRESET_KEY
from lcm_kit.lora_merge.one_module.protect import which_protected
from lcm_kit.lora_merge.settings.options import MergeOptions, options_from_dict
from lcm_kit.tests.lora_merge.make import dense, factors, generator, kohya, relative

SHAPES = {
    "lora_unet_input_blocks_1_0_in_layers_2": (16, 8, (3, 3)),
    "lora_unet_input_blocks_2_1_transformer_blocks_0_attn1_to_q": (24, 24, ()),
    "lora_unet_middle_block_1_proj_in": (12, 16, (1, 1)),
    "lora_unet_output_blocks_3_1_transformer_blocks_0_ff_net_2": (20, 30, ()),
    "lora_te1_text_model_encoder_layers_0_mlp_fc1": (18, 14, ()),
}
CONV, DOWN, MIDDLE, UP, TEXT = SHAPES


def lora(seed, rank, alpha=None, *, modules=None, size=1.0, source=None, dtype=torch.float32):
    state = {}
    for number, (module, (out, inputs, kernel)) in enumerate(SHAPES.items()):
        if modules is None or module in modules:
            up, down = factors(out, rank, inputs, kernel, seed=100 * seed + number)
            state |= kohya(module, (up * size).to(dtype), down.to(dtype), alpha)
    return Lora.from_state_dict(state, source=source or f"lora {seed}")


def delta(one, module):
    layer = one.modules[module]
    return dense(layer.up, layer.down, layer.scale).flatten(1)


def exact(module, *inputs):
    return sum(s * delta(one, module) for one, s in inputs if module in one.modules)


def updates(merged):
    return torch.cat([merged.delta(module).double().flatten() for module in SHAPES if module in merged.spellings])


STYLE, LCM = lora(1, 6, 3.0, size=0.4, source="style"), lora(2, 8, 8.0, source="lcm")
INPUTS = [(STYLE, 0.8), (LCM, 1.0)]
WHOLE = {module: exact(module, *INPUTS) for module in SHAPES}
ENERGY = sum(float(update.square().sum()) for update in WHOLE.values())


# ---- the sum


ALPHAS = [None, 1.0, 3.0, 6.0, 8.0]  # missing, 1, r / 2, r, 8 for rank 6


@pytest.mark.parametrize("alpha", ALPHAS)
@pytest.mark.parametrize("strengths", [(0.8, 1.0), (-1.0, 0.5), (1.5, -0.3), (0.0, 1.0)])
def test_fitted_coefficients_are_the_strengths(strengths, alpha):
    """Least squares of the merged update on the two, float64; one-sided modules and text encoders are part of it."""
    first = lora(1, 6, alpha, modules=[CONV, DOWN, MIDDLE, TEXT])
    second = lora(2, 4, 8.0, modules=[CONV, DOWN, UP, TEXT])
    merged = merge(list(zip((first, second), strengths, strict=True)))
    columns = [
        torch.cat([exact(m, (one, 1.0)).flatten() if m in one.modules else torch.zeros(math.prod(SHAPES[m][:2]) *
                   math.prod(SHAPES[m][2])).double() for m in SHAPES])
        for one in (first, second)
    ]  # fmt: skip
    total = torch.cat([merged.delta(module).double().flatten() for module in SHAPES])
    found = torch.linalg.lstsq(torch.stack(columns, dim=1), total[:, None])
    assert found.solution[:, 0].tolist() == pytest.approx(strengths, abs=1e-6)
    rest = total - torch.stack(columns, dim=1) @ found.solution[:, 0]
    assert float(rest.norm() / total.norm()) < 1e-6


@pytest.mark.parametrize("alpha", ALPHAS)
def test_a_float16_merge_of_float16_files_is_within_its_rounding(alpha):
    """One factor of the style is rounded, none of the LoRA at strength 1 whose alpha / rank is a power of two."""
    style = lora(1, 6, alpha, modules=[CONV, DOWN, MIDDLE, TEXT], dtype=torch.float16)
    lcm = lora(2, 4, 8.0, dtype=torch.float16)
    merged = merge([(style, 0.8), (lcm, 1.0)], out_dtype=torch.float16)
    total = torch.cat([exact(module, (style, 0.8), (lcm, 1.0)).flatten() for module in SHAPES])
    assert relative(torch.cat([merged.delta(module).flatten() for module in SHAPES]), total) < 2e-4
    assert relative(merged.delta(UP), delta(lcm, UP)) < 1e-7


strength = st.floats(-2, 2).map(lambda x: round(x, 3))


@settings(max_examples=20, deadline=None)
@given(strength, strength, strength, strength)
def test_the_sum_is_linear_commutative_and_associative(a, b, c, factor):
    x, y, z = (lora(seed, seed + 1, 2.0) for seed in (1, 2, 3))
    size = sum(float(updates(merge([(one, s)])).norm()) for one, s in ((x, a), (y, b), (z, c))) + 1e-9
    at_once = updates(merge([(x, a), (y, b), (z, c)]))
    for other in (
        updates(merge([(z, c), (x, a), (y, b)])),
        updates(merge([(merge([(x, a), (y, b)]), 1.0), (z, c)])),
        updates(merge([(x, a), (merge([(y, b), (z, c)]), 1.0)])),
    ):
        assert float((at_once - other).norm()) < 1e-6 * size
    scaled = updates(merge([(x, factor * a), (y, factor * b), (z, factor * c)]))
    assert float((scaled - factor * at_once).norm()) < 2e-6 * size * max(1.0, abs(factor))


# ---- cuts


@settings(max_examples=15, deadline=None)
@given(st.integers(1, 8), st.integers(0, 10**6))
def test_a_lora_of_rank_k_in_more_ranks_is_resized_to_k_without_loss(rank, seed):
    g = generator(seed)
    state = {}
    for module, (out, inputs, kernel) in SHAPES.items():
        up, down = factors(out, rank, inputs, kernel, seed=seed % 1000)
        mix = torch.randn(rank, 12, generator=g)
        wide = torch.einsum("or,rw->ow", up.flatten(1), mix)
        back = torch.einsum("wr,r...->w...", torch.linalg.pinv(mix), down)
        state |= kohya(module, wide.reshape(out, 12, *(1 for _ in kernel)), back, 12.0)
    large = Lora.from_state_dict(state)
    small, account = resize_with_account(large, rank=rank)
    assert {layer.rank for layer in small.modules.values()} == {rank}
    assert relative(updates(small), updates(large)) < 1e-5  # float32 QR and SVD
    assert account.relative_error < 1e-5


@pytest.mark.parametrize("balanced", [False, True])
@pytest.mark.parametrize("aim", [{"keep": 0.9}, {"retain": 0.8}, {"rank": 5}])
def test_error_and_retention_of_the_account_are_those_of_the_dense_updates(aim, balanced):
    merged, account = merge_with_account(INPUTS, **aim, balanced=balanced)
    lost = sum(float((merged.delta(m).double().flatten(1) - WHOLE[m]).square().sum()) for m in SHAPES)
    assert account.relative_error == pytest.approx(math.sqrt(lost / ENERGY), rel=1e-4)
    for index, (one, s) in enumerate(INPUTS):
        kept = whole = 0.0
        for module in SHAPES:
            update, rank = s * delta(one, module), merged.modules[module].rank
            u, _, vh = torch.linalg.svd(merged.delta(module).double().flatten(1), full_matrices=False)
            kept += float((u[:, :rank].T @ update @ vh[:rank].T).square().sum())
            whole += float(update.square().sum())
        assert account.sources[index].retention == pytest.approx(kept / whole, rel=1e-3)


def test_keep_and_retain_are_reached():
    _, account = merge_with_account(INPUTS, keep=0.95)
    assert 1 - account.relative_error**2 >= 0.95 - 1e-6
    _, account = merge_with_account(INPUTS, retain=0.9)
    assert min(source.retention for source in account.sources) >= 0.9 - 1e-6


def test_shared_out_ranks_of_the_same_size_make_a_smaller_error_than_one_rank():
    # Modules of different strength, as trained ones are.
    uneven = [(merge([(one, s)], block_strengths="conv=2, attention=0.3, ff=0.5, te=0.2"), 1.0) for one, s in INPUTS]
    uniform, account = merge_with_account(uneven, rank=4)
    numbers = uniform.parameters
    sizes = (numbers * 2e-6 + 0.007 + step * 1e-4 for step in range(60, -60, -1))
    shared, better = next(
        found for mb in sizes if (found := merge_with_account(uneven, max_mb=mb))[0].parameters <= numbers
    )
    assert numbers * 0.9 < shared.parameters
    assert better.relative_error < 0.9 * account.relative_error


@pytest.mark.parametrize(("dtype", "size"), [(torch.float16, 9000), (torch.float32, 14000)])
def test_the_file_is_within_the_size(tmp_path, dtype, size):
    extra = Lora.from_state_dict({"lora_unet_conv_in.diff_b": torch.ones(8)}, source="bias")
    small = merge([*INPUTS, (extra, 1.0)], max_mb=size / 1e6, out_dtype=dtype)
    save(small, tmp_path / "small.safetensors", dtype=dtype)
    assert any(layer.rank < 14 for layer in small.modules.values())
    assert 0.6 * size < (tmp_path / "small.safetensors").stat().st_size <= size


def test_a_balanced_cut_keeps_more_of_the_weak_input():
    faint = lora(3, 6, size=0.05)
    plain, balanced = (
        merge_with_account([(faint, 1.0), (LCM, 1.0)], rank=8, balanced=choice)[1] for choice in (False, True)
    )
    assert balanced.sources[0].retention > 2 * plain.sources[0].retention
    shared = [
        merge_with_account([(faint, 1.0), (LCM, 1.0)], max_mb=0.01, balanced=choice)[1] for choice in (False, True)
    ]
    assert shared[1].sources[0].retention > 2 * shared[0].sources[0].retention


@pytest.mark.parametrize("balanced", [False, True])
def test_a_size_with_room_for_all_loses_nothing(balanced):
    """One of the modules is smaller than the ranks together."""
    inputs = [(lora(3, 6, size=0.05), 1.0), (LCM, 1.0)]
    whole = merge(inputs)
    cut = merge(inputs, max_mb=0.02, balanced=balanced)
    assert any(cut.modules[name].rank < layer.rank for name, layer in whole.modules.items())
    for name, layer in whole.modules.items():
        torch.testing.assert_close(cut.delta(name), layer.delta(), rtol=0, atol=1e-6)


@pytest.mark.parametrize("method", ["ties", "slerp", "tsv", "dare"])
def test_what_a_method_made_is_cut_to_the_best_of_the_rank(method):
    whole = merge(INPUTS, method=method)
    cut, account = merge_with_account(INPUTS, method=method, rank=3)
    lost = energy = 0.0
    for module in SHAPES:
        update = whole.delta(module).double().flatten(1)
        spectrum = torch.linalg.svdvals(update)
        lost += float(spectrum[3:].square().sum())
        energy += float(update.square().sum())
        best = float(spectrum[3:].norm() / spectrum.norm())
        assert relative(cut.delta(module).flatten(1), update) == pytest.approx(best, rel=1e-4)
    assert account.relative_error == pytest.approx(math.sqrt(lost / energy), rel=1e-4)
    assert all(0 < source.retention < 1 for source in account.sources)


def test_a_dense_method_is_cut_to_the_best_of_the_rank():
    whole = merge(INPUTS, method="ties", dense=True)
    assert {part for _, part in whole.diffs} == {"diff"}
    cut, account = merge_with_account(INPUTS, method="ties", dense=True, rank=3)
    for module in SHAPES:
        update = whole.delta(module).double().flatten(1)
        spectrum = torch.linalg.svdvals(update)
        best = float(spectrum[3:].norm() / spectrum.norm())
        assert relative(cut.delta(module).flatten(1), update) == pytest.approx(best, rel=1e-4)
    assert account.cut_modules == 5


def test_resize_keeps_what_the_file_says_of_itself():
    one = Lora(LCM.modules, spellings=LCM.spellings, metadata={"ss_tag": "cat", "lora_alpha": "2"}, source="lcm")
    small = resize(one, rank=2)
    assert small.metadata["ss_tag"] == "cat"
    assert small.source == "lcm"
    assert json.loads(small.metadata["lcm_kit.merge"])["options"]["rank"] == 2
    with pytest.raises(ValueError, match="how small the result is to be"):
        resize(one)


# ---- the protected one


def test_protection_with_mu_zero_is_the_sum_and_mu_makes_room_where_the_protected_one_is_strong():
    same = merge(INPUTS, protect=1)
    assert all(torch.equal(same.modules[m].up, merge(INPUTS).modules[m].up) for m in SHAPES)
    merged, account = merge_with_account(INPUTS, protect=1, mu=1.0)
    before = after = 0.0
    for module in SHAPES:
        style, lcm = 0.8 * delta(STYLE, module), delta(LCM, module)
        _, s, vh = torch.linalg.svd(lcm)
        held = s.square().cumsum(0) / s.square().sum()
        v = vh[: int((held < 0.5).sum()) + 1]
        wanted = lcm + style - 0.5 * style @ v.T @ v
        assert relative(merged.delta(module).flatten(1), wanted) < 1e-5
        before += float(style.square().sum())
        after += float((wanted - lcm).square().sum())
    assert account.sources[0].stepped_aside == pytest.approx(after / before, rel=1e-4)
    assert account.sources[1].stepped_aside == 1
    assert [source.protected for source in account.sources] == [False, True]
    assert "Made room for lcm, mu 1: style keeps" in describe_merge(account, merged)


def test_auto_protects_the_acceleration_lora_and_says_when_there_is_none():
    named = Lora(LCM.modules, spellings=LCM.spellings, metadata={PRESET_KEY: "LCM"}, source="fast")
    _, account = merge_with_account([(STYLE, 1.0), (named, 1.0)], protect="auto", mu=0.5)
    assert [source.protected for source in account.sources] == [False, True]
    merged, account = merge_with_account([(STYLE, 1.0), (LCM, 1.0)], protect="auto", mu=0.5)
    assert not any(source.protected for source in account.sources)
    assert "Warning: no input is recognised as an acceleration LoRA" in describe_merge(account, merged)


def test_a_method_that_scales_the_protected_one_down_warns():
    merged, account = merge_with_account(INPUTS, method="ties", protect=1, density=0.02)
    assert account.sources[1].effect < 0.99
    assert "Warning: method ties scales down what it merges" in describe_merge(account, merged)
    for method in ("linear", "slerp"):
        assert not warnings_of(merge_with_account(INPUTS, method=method, protect=1)[1])


def test_protection_reaches_whole_weight_differences():
    full = Lora.from_state_dict({f"{DOWN}.diff": torch.randn(24, 24, generator=generator(1))}, source="full")
    merged = merge([(full, 1.0), (LCM, 1.0)], protect=1, mu=1e9)
    _, s, vh = torch.linalg.svd(delta(LCM, DOWN))
    v = vh[: int((s.square().cumsum(0) / s.square().sum() < 0.5).sum()) + 1]
    moved = merged.delta(DOWN).double() - delta(LCM, DOWN)
    assert float((moved @ v.T).abs().max()) < 1e-4


# ---- strengths by block


def test_block_strengths_multiply_the_strength_of_their_modules():
    blocks = "down=0.5, te=0, conv=2, *ff_net*=-1"
    factor = {CONV: 0.5 * 2, DOWN: 0.5, MIDDLE: 1.0, UP: -1.0, TEXT: 0.0}
    for chosen in (blocks, parse_block_strengths(blocks), [None, blocks]):
        merged, account = merge_with_account(INPUTS, block_strengths=chosen)
        first = 1 if isinstance(chosen, list) else None
        for module in SHAPES:
            wanted = (0.8 * (first or factor[module])) * delta(STYLE, module) + factor[module] * delta(LCM, module)
            assert float((merged.delta(module).flatten(1) - wanted).norm()) <= 1e-6 * float(wanted.norm())
    assert account.sources[0].block_strengths == ""
    assert parse_block_strengths(account.sources[1].block_strengths) == parse_block_strengths(blocks)


def test_a_block_strength_decides_whether_a_dora_passes_through():
    dora = kohya(MIDDLE, *factors(12, 2, 16)) | {f"{MIDDLE}.dora_scale": torch.ones(12, 1)}
    one = Lora.from_state_dict(dora, source="dora")
    other = lora(2, 4, modules=[DOWN])
    assert MIDDLE in merge([(one, 0.5), (other, 1.0)], block_strengths=["mid=2", None]).carried
    assert MIDDLE not in merge([(one, 0.5), (other, 1.0)], block_strengths=["mid=0", None]).spellings
    with pytest.raises(ValueError, match="do not add up"):
        merge([(one, 1.0), (other, 1.0)], block_strengths=["mid=2", None])


@pytest.mark.parametrize("count", [1, 3, 4, 7])
def test_of_many_that_do_not_add_up_the_first_three_are_named_and_the_others_counted(count):
    named = [f"lora_unet_input_blocks_4_1_transformer_blocks_{number}_attn1_to_q" for number in range(count)]
    state = {}
    for name in named:
        state |= kohya(name, *factors(12, 2, 16)) | {f"{name}.dora_scale": torch.ones(12, 1)}
    with pytest.raises(ValueError, match=rf"dora has DoRA \({count} modules?: ") as error:
        merge([(Lora.from_state_dict(state, source="dora"), 0.5), (lora(2, 4, modules=[DOWN]), 1.0)])
    assert [name in str(error.value) for name in named] == [number < 3 for number in range(count)]
    assert (f", and {count - 3} more)" in str(error.value)) == (count > 3)
    assert (" more)" in str(error.value)) == (count > 3)


# ---- workers, dtypes, provenance


@pytest.mark.parametrize(
    "choices",
    [{}, {"rank": 4}, {"keep": 0.9}, {"method": "dare_ties"}, {"method": "tsv", "rank": 5}, {"mu": 1.0, "protect": 0}],
)
def test_any_number_of_workers_gives_the_same_bits(choices):
    threads = torch.get_num_threads()
    results = [merge_with_account(INPUTS, workers=workers, **choices) for workers in (1, 2, 4)]
    first, account = results[0]
    for merged, other in results[1:]:
        assert other == account
        assert list(merged.modules) == list(first.modules)
        for module, layer in merged.modules.items():
            assert torch.equal(layer.up, first.modules[module].up)
            assert torch.equal(layer.down, first.modules[module].down)
    assert torch.get_num_threads() == threads


def test_progress_counts_both_passes_and_errors_stop_all_workers():
    seen = []
    merge(INPUTS, keep=0.9, workers=2, progress=lambda done, total: seen.append((done, total)))
    assert seen == [(number, 10) for number in range(1, 11)]

    def stop(done, total):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        merge(INPUTS, workers=2, progress=stop)
    huge = Lora.from_state_dict(kohya(DOWN, 1e30 * torch.ones(4, 1), 1e5 * torch.ones(1, 4)))
    with pytest.raises(ValueError, match=f"{DOWN}: values are too large for float16"):
        merge([(huge, 1.0)], out_dtype=torch.float16, workers=2)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_the_result_comes_in_the_dtype_asked_for_and_is_what_saving_makes_of_it(dtype):
    half = lora(4, 3, 2.0, dtype=torch.float16)
    direct, later = merge([(half, 0.7), (LCM, 1.0)], out_dtype=dtype), merge([(half, 0.7), (LCM, 1.0)])
    first, second = direct.to_state_dict(dtype), later.to_state_dict(dtype)
    assert {tensor.dtype for key, tensor in direct.to_state_dict().items() if not key.endswith("alpha")} == {dtype}
    assert first.keys() == second.keys()
    assert all(torch.equal(first[key], second[key]) for key in first)


def test_balanced_factors_are_reported():
    large = Lora.from_state_dict(kohya(DOWN, 1e6 * torch.ones(4, 1), 1e-5 * torch.ones(1, 4)), source="large")
    merged, account = merge_with_account([(large, 1.0)], out_dtype=torch.float16)
    assert account.rebalanced == 1
    assert "Factors of 1 module balanced to fit float16" in describe_merge(account, merged)
    assert relative(merged.delta(DOWN), large.delta(DOWN)) < 1e-3  # float16


def test_the_file_says_all_that_was_asked_for():
    merged, account = merge_with_account(
        INPUTS, method="della", spread=0.2, retain=0.9, seed=5, block_strengths=["down=0.5", None], sha256=["ab", None]
    )
    notes = json.loads(merged.metadata["lcm_kit.merge"])
    assert [entry["sha256"] for entry in notes["inputs"]] == ["ab", None]
    assert notes["inputs"][0]["block_strengths"] == "down=0.5"
    assert notes["options"]["density"] == 0.9  # the default, so that another default later changes nothing
    assert options_from_dict(notes["options"]) == MergeOptions(
        method="della", density=0.9, spread=0.2, retain=0.9, seed=5
    )
    text = describe_merge(account, merged)
    assert "method della (density 0.9, spread 0.2, seed 5)" in text
    assert "times down=0.5" in text
    assert "Cut so that each input keeps 90 % of its energy" in text


GIVEN = [
    {"method": "ties"},
    {"rank": 4},
    {"keep": 0.9},
    {"retain": 0.9},
    {"max_mb": 0.05},
    {"rank": 4, "balanced": True},
    {"method": "ties", "density": 0.3},
    {"method": "della", "spread": 0.05},
    {"method": "breadcrumbs", "outliers": 0.05},
    {"method": "della", "parameters": {"spread": 0.05}},
    {"seed": 5},
    {"method": "ties", "dense": True},
    {"protect": 1},
    {"protect": 1, "mu": 0.5},
    {"leave_out": True},
    {"out_dtype": torch.bfloat16},
]


@pytest.mark.parametrize("given", GIVEN, ids=lambda given: " ".join(map(str, given)))
def test_every_option_is_passed_on_as_it_was_given(given):
    wanted = MergeOptions(**given)
    assert wanted != MergeOptions(**dict([*given.items()][:-1]))
    assert merge_with_account(INPUTS, **given)[1].options == wanted
    notes = json.loads(merge(INPUTS, **given).metadata["lcm_kit.merge"])
    assert notes["options"] == wanted.to_dict()


def test_there_is_an_example_of_every_option():
    parameters = inspect.signature(MergeOptions).parameters
    assert {name for given in GIVEN for name in given} == parameters.keys()
    for function in (merge, merge_with_account):
        assert parameters.keys() <= inspect.signature(function).parameters.keys()


# ---- what is refused


@pytest.mark.parametrize(
    ("choices", "message"),
    [
        ({"rank": 4, "keep": 0.9}, "rank and keep are given"),
        ({"keep": 0.9, "max_mb": 1.0}, "keep and max_mb are given"),
        ({"keep": 0.0}, "keep is 0; it is a share"),
        ({"retain": 1.5}, "retain is 1.5; it is a share"),
        ({"max_mb": 0.0}, "max_mb is 0, but it has to be above 0"),
        ({"max_mb": 0.001}, "max_mb is 0.001, but what is not cut"),
        ({"balanced": True}, "nothing is cut"),
        ({"density": 0.5}, "density is 0.5, but method linear keeps every LoRA whole. Set density to 1"),
        ({"method": "slerp", "density": 0.5}, "method slerp keeps every LoRA whole"),
        ({"method": "ties", "density": 1.5}, "density is 1.5, but it has to be within 0 and 1"),
        ({"method": "ties", "spread": 0.5}, "method ties has no spread. Leave spread out"),
        ({"method": "breadcrumbs", "density": 0.995}, "add up to more than 1"),
        ({"method": "ties", "dense": True, "keep": 0.9}, "dense and keep do not go together"),
        ({"method": "ties", "dense": True, "rank": 4, "balanced": True}, "dense and balanced"),
        ({"seed": -1}, "seed is -1"),
        ({"mu": 1.0}, "no LoRA is protected"),
        ({"mu": -1.0, "protect": 0}, "mu is -1"),
        ({"mu": math.inf, "protect": 0}, "mu is inf"),
        ({"protect": 2}, "protect is 2, but the inputs are numbered from 0 to 1"),
        ({"protect": "lcm"}, "protect is 'lcm'"),
        ({"out_dtype": torch.int8}, "out_dtype is torch.int8"),
        ({"block_strengths": ["down=1"]}, "block strengths for 1 input, but 2 inputs"),
        ({"block_strengths": "sideways=1"}, "sideways is no place in"),
    ],
)
def test_options_out_of_range_and_contradictions_are_refused(choices, message):
    with pytest.raises(ValueError, match=message):
        merge(INPUTS, **choices)


def test_slerp_takes_two_loras_and_no_negative_strength():
    with pytest.raises(ValueError, match="method slerp takes 2 LoRAs, but there are 3"):
        merge([*INPUTS, (LCM, 1.0)], method="slerp")
    with pytest.raises(ValueError, match=r"strength is -0\.5 at .*, but method slerp"):
        merge([(STYLE, -0.5), (LCM, 1.0)], method="slerp")
    with pytest.raises(ValueError, match=rf"strength is -0\.8 at {TEXT}"):
        merge(INPUTS, method="slerp", block_strengths=["te=-1", None])


def test_a_misspelt_option_is_no_option():
    with pytest.raises(TypeError, match="ranks"):
        merge(INPUTS, ranks=4)


def test_balanced_hands_out_ranks_by_what_every_input_keeps():
    """Against every choice of ranks: of a strong and a weak LoRA in modules of their own the shares kept add up to the most."""
    strong = lora(1, 6, size=4.0, modules=[CONV, DOWN, MIDDLE], source="strong")
    weak = lora(2, 6, size=0.25, modules=[UP, TEXT], source="weak")
    inputs, modules = [strong, weak], [*strong.modules, *weak.modules]
    spellings = dict(strong.spellings) | weak.spellings
    # Room for some 900 numbers of 1,476.
    room = numbers_within(MergeOptions(max_mb=1.0), inputs, modules, {}, spellings, {}, 0)
    merged, account = merge_with_account(
        [(one, 1.0) for one in inputs], max_mb=1.0 - 2 * (room - 900) / 1e6, balanced=True
    )
    numbers = sum(layer.up.numel() + layer.down.numel() for layer in merged.modules.values())
    assert 700 < numbers <= 900
    shares, costs = [], []
    for one in inputs:
        whole = sum(delta(one, module).square().sum() for module in one.modules)
        for module in one.modules:
            squares = torch.linalg.svdvals(delta(one, module)).square() / whole
            shares.append(squares[:6].cumsum(0).tolist())
            costs.append(sum(delta(one, module).shape))
    choices = (ranks for ranks in itertools.product(range(6), repeat=5))
    fitting = (r for r in choices if sum((rank + 1) * cost for rank, cost in zip(r, costs, strict=True)) <= numbers)
    best = max(sum(share[rank] for share, rank in zip(shares, ranks, strict=True)) for ranks in fitting)
    # The last rank may find no room in a greedy choice.
    assert sum(source.retention for source in account.sources) > best - 0.03


@pytest.mark.parametrize(
    ("text", "labels", "protected"),
    [
        ("auto", ["1", "2"], "auto"),
        ("none", ["1", "2"], None),
        ("2", ["1", "2"], 1),
        ("lora_5", ["1", "5"], 1),
        ("02", ["1", "2"], 1),
    ],
)
def test_the_protected_one_is_named_as_people_number_the_loras(text, labels, protected):
    assert which_protected(text, labels) == protected


@pytest.mark.parametrize("text", ["0", "3", "-1", "lora_3", "lora_", "", "lcm", "1.0", "Auto"])
def test_a_number_that_no_lora_has_is_refused_with_those_there_are(text):
    with pytest.raises(ValueError, match=rf"protect is {text}, but the LoRAs are numbered 1, 2\. Choose one of these"):
        which_protected(text, ["1", "2"])


@pytest.mark.parametrize("strength", [1e-4, 1.0, 1e4])
def test_the_relative_error_of_a_cut_is_that_at_any_strength(strength):
    one = Lora.from_state_dict(kohya(MIDDLE, *factors(12, 6, 16, seed=1)))
    wanted = torch.linalg.svdvals(one.delta(MIDDLE).double()).square()
    account = merge_with_account([(one, strength)], rank=2)[1]
    assert account.relative_error == pytest.approx(math.sqrt(float(wanted[2:].sum() / wanted.sum())), rel=1e-4)


def test_a_bias_that_the_dtype_rounds_away_is_named_by_its_module():
    one = Lora.from_state_dict({f"{MIDDLE}.diff_b": torch.full((12,), 1e-9)} | kohya(UP, *factors(20, 2, 30)))
    (said,) = (
        line for line in warnings_of(merge_with_account([(one, 1.0)], out_dtype=torch.float16)[1]) if MIDDLE in line
    )
    assert "diff_b" not in said
