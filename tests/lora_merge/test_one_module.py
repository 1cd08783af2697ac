"""One weight of a merge: what a method makes of it, and what is said of that, beside the plain sum."""

import pytest
import torch

from lcm_kit.lora_merge import METHODS, Lora, MergeOptions, merge, merge_with_account, resize_with_account
from lcm_kit.lora_merge.algebra.precision import COARSE
from lcm_kit.lora_merge.merging.plan import plan
from lcm_kit.lora_merge.one_module.module import ModuleMerger
from lcm_kit.tests.lora_merge import kinds
from lcm_kit.tests.lora_merge.make import factors, generator, kohya, relative

SHARED, ALONE, CONV, WHOLE, NORM = (
    "lora_unet_input_blocks_1_1_proj_in",
    "lora_unet_middle_block_1_proj_in",
    "lora_unet_input_blocks_1_0_in_layers_2",
    "lora_unet_output_blocks_3_1_proj_in",
    "lora_unet_output_blocks_3_1_norm",
)


def lora(seed, modules, *, size=1.0, whole=False):
    state = {}
    for number, module in enumerate(modules):
        kernel = (3, 3) if module == CONV else ()
        up, down = factors(12, 3 + seed, 10, kernel, seed=10 * seed + number)
        state |= kohya(module, size * up, down, alpha=2.0)
    if whole:
        g = generator(seed)
        state |= {
            f"{WHOLE}.diff": 0.05 * size * torch.randn(12, 10, generator=g),
            f"{NORM}.w_norm": size * torch.ones(12),
        }
    return Lora.from_state_dict(state, source=f"{seed}")


INPUTS = [(lora(1, (SHARED, CONV), size=0.3, whole=True), 0.75), (lora(2, (SHARED, ALONE, CONV), whole=True), -1.5)]
CUTS = [{}, {"rank": 3}, {"rank": 5, "balanced": True}, {"keep": 0.9}, {"retain": 0.8}, {"retain": 0.6, "balanced": True},
        {"keep": 0.9, "balanced": True}]  # fmt: skip
ROOMS = [{}, {"protect": 0, "mu": 0.0}, {"protect": 0, "mu": 1.0}, {"protect": 1, "mu": 3.0}]


@pytest.mark.parametrize("dense", [False, True])
@pytest.mark.parametrize("room", ROOMS)
@pytest.mark.parametrize("cut", CUTS)
def test_a_method_that_takes_nothing_away_is_the_sum_in_all_that_it_says(cut, room, dense):
    """Magnitude pruning of density 1: on its way through cores or whole updates, with cuts and with room for one input."""
    if dense and {"keep", "retain", "balanced"} & cut.keys():
        return
    wanted, of_sum = merge_with_account(INPUTS, **cut, **room)
    found, of_method = merge_with_account(INPUTS, method="magnitude", density=1.0, dense=dense, **cut, **room)
    assert found.spellings == wanted.spellings
    for module in wanted.spellings:
        assert relative(found.delta(module), wanted.delta(module)) < 1e-5, module
    if cut and not dense:
        assert of_method.ranks == of_sum.ranks
    if cut:
        assert of_method.relative_error == pytest.approx(of_sum.relative_error, rel=1e-4)
        assert of_method.cut_modules == of_sum.cut_modules > 0
    for one, other in zip(of_method.sources, of_sum.sources, strict=True):
        assert one.stepped_aside == (other.stepped_aside and pytest.approx(other.stepped_aside, rel=1e-5))
        assert not cut or one.retention == pytest.approx(other.retention, rel=1e-4)
        # Of what made room less arrives; the account is of what was merged.
        assert one.effect == pytest.approx(1.0, abs=1e-5)


@pytest.mark.parametrize("balanced", [False, True])
@pytest.mark.parametrize("method", ["linear", "ties"])
def test_a_module_that_was_looked_at_before_is_finished_to_the_same_bits(method, balanced):
    """And what it would keep is told of the sum and of every input, in energies: nothing of one that does not have it."""
    made = plan(INPUTS, MergeOptions(method=method, keep=0.9, balanced=balanced))

    def merger():
        return ModuleMerger(made.loras, made.strengths, made.options, made.whole, torch.device("cpu"))

    for module in (SHARED, ALONE, CONV):
        looked = merger()
        prospect = looked.prospect(module)
        owners = [index for index, one in enumerate(made.loras) if module in one.modules]
        assert prospect.kept.shape[0] == 3
        assert [bool(row.any()) for row in prospect.kept[1:]] == [index in owners for index in range(2)]
        assert torch.all(prospect.kept.diff(dim=1) >= -1e-6 * prospect.kept.max())
        for rank in (1, 3, 5):
            one, other = looked.finish(module, rank), merger().finish(module, rank)
            assert all(map(torch.equal, one.layer.parts().values(), other.layer.parts().values()))
            kept = [one.cut.energy - one.cut.lost_energy, *one.cut.kept_energy]
            assert prospect.kept[[0, *(1 + index for index in owners)], rank].tolist() == pytest.approx(kept, rel=1e-4)


@pytest.mark.parametrize("power", [-60, 0, 60])
@pytest.mark.parametrize("cut", [{}, {"rank": 2}])
def test_of_an_update_that_is_alone_all_arrives_at_any_size(power, cut):
    one = lora(1, (ALONE, CONV))
    sized = Lora({module: layer.with_parts({"up": layer.up * 2.0**power}) for module, layer in one.modules.items()})
    for method in ("magnitude", "dare"):
        merged, account = merge_with_account([(sized, 0.5)], method=method, density=1.0, **cut)
        assert account.sources[0].effect == pytest.approx(1.0, abs=1e-5)
        if not cut:
            for module in one.modules:
                assert relative(merged.delta(module) * 2.0**-power, 0.5 * one.delta(module)) < 1e-6


@pytest.mark.parametrize("method", METHODS)
def test_of_zeros_zeros_are_made(method):
    """Of whole weights and of low-rank ones, alone and beside one another."""
    up, down = factors(12, 3, 10)
    state = {f"{WHOLE}.diff": torch.zeros(12, 10), f"{NORM}.w_norm": torch.zeros(12)}
    zeros = Lora.from_state_dict(state | kohya(SHARED, torch.zeros_like(up), down))
    for inputs in ([(zeros, 1.0), (zeros, 0.5)], [(zeros, 1.0)] * (1 if method != "slerp" else 2)):
        merged = merge(inputs, method=method)
        assert not any(merged.delta(module).any() for module in (WHOLE, SHARED))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, None])
@pytest.mark.parametrize("options", [{}, {"rank": 3}, {"method": "magnitude"}, {"method": "magnitude", "dense": True}])
def test_all_of_a_result_is_in_the_dtype_asked_for(options, dtype):
    merged = merge(INPUTS, out_dtype=dtype, **options)
    assert merged.modules.keys() | {module for module, _ in merged.diffs} == merged.spellings.keys()
    assert {dtype for layer in merged.modules.values() for dtype in layer.dtypes} <= {dtype or torch.float32}
    assert {diff.dtype for diff in merged.diffs.values()} == {dtype or torch.float32}
    plain = merge(INPUTS, **options)
    for module in merged.spellings:
        assert relative(merged.delta(module), plain.delta(module)) < 1e-2  # bfloat16 has eight bits


def test_a_whole_difference_that_the_dtype_rounds_away_is_named_by_its_module():
    small = Lora.from_state_dict({f"{WHOLE}.diff": torch.full((12, 10), 1e-8), f"{SHARED}.diff": torch.ones(12, 10)})
    merged, account = merge_with_account([(small, 1.0)], out_dtype=torch.float16)
    assert account.too_small.keys() == {merged.find(WHOLE)}
    assert account.too_small[merged.find(WHOLE)] > COARSE


@pytest.mark.parametrize("kind", ["LoHa", "LoKr, both whole", "LoKr, second low-rank"])
def test_a_kind_that_stays_is_whole_in_the_account_of_a_cut(kind):
    one = Lora.from_state_dict(kinds.state_dict(kind, SHARED, alpha=3.0), source="one")
    kept, account = resize_with_account(one, rank=8)
    assert kept.kinds == one.kinds
    assert (account.relative_error, account.cut_modules, account.sources[0].retention) == (0, 0, 1)
    _, account = merge_with_account([(one, 0.5), (lora(1, (ALONE,)), 1.0)], rank=8)
    assert [source.retention for source in account.sources] == [1, pytest.approx(1)]
