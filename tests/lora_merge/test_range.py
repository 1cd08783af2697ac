"""Values near the ends of float32's range: every method and every cut makes of them what it makes of ordinary ones."""

import functools
import math
import re
from dataclasses import replace

import pytest
import torch

from lcm_kit.lora_merge import METHODS, Lora, describe, load, merge, merge_with_account, save
from lcm_kit.lora_merge.algebra.lowrank import energy_of
from lcm_kit.lora_merge.comparing.compare import compare
from lcm_kit.lora_merge.recognise.identity import identify
from lcm_kit.tests.lora_merge import kinds
from lcm_kit.tests.lora_merge.make import generator

LINEAR, CONVOLUTION, ALONE = (
    "lora_unet_input_blocks_1_1_proj_in",
    "lora_unet_input_blocks_1_0_in_layers_2",
    "lora_unet_middle_block_1_proj_in",
)
# The powers of two next to 1e-30, 1e-20, 1, 1e18, 1e20, 1e30 and 3e38; and float32's subnormal numbers.
POWERS = [-140, -100, -66, 0, 60, 66, 100, 122]
CUTS = [{}, {"rank": 2}, {"rank": 2, "balanced": True}, {"keep": 0.9}, {"retain": 0.9}, {"max_mb": 0.0066}]
CALLS = [{"method": name} | cut | mu for name in METHODS for cut in CUTS for mu in ({}, {"mu": 1.0, "protect": 1})] + [
    {"method": name, "dense": True} | cut for name in METHODS if METHODS[name].entrywise for cut in ({}, {"rank": 2})
]


def whole_numbers(*shape, seed):
    """Numbers of few bits, so that any power of two of them is exact, among subnormal numbers and in bfloat16 too."""
    return torch.randint(-15, 16, shape, generator=generator(seed)).float() / 16


def lora(seed, *, up=0, down=0, alpha=0, dtype=torch.float32, whole=None, modules=(LINEAR, CONVOLUTION)):
    """Rank 3, its factors and scale multiplied by powers of two."""
    state = {}
    for number, module in enumerate(modules):
        kernel = (3, 3) if module == CONVOLUTION else ()
        ones = (1,) * len(kernel)
        state[f"{module}.lora_up.weight"] = (whole_numbers(12, 3, *ones, seed=seed + number) * 2.0**up).to(dtype)
        state[f"{module}.lora_down.weight"] = (whole_numbers(3, 10, *kernel, seed=seed - number) * 2.0**down).to(dtype)
        state[f"{module}.alpha"] = torch.tensor(2.0 * 2.0**alpha)
    if whole is not None:
        state |= {f"{ALONE}.diff": (whole_numbers(12, 10, seed=seed + 7) * 2.0**whole).to(dtype)}
        state |= {f"{ALONE}.diff_b": (whole_numbers(12, seed=seed + 8) * 2.0**whole).to(dtype)}
    return Lora.from_state_dict(state, source=f"lora {seed}")


def updates(merged):
    """Key -> update in float64, by the definition."""
    found = {
        module: layer.scale * (layer.up.double().flatten(1) @ layer.down.double().flatten(1))
        for module, layer in merged.modules.items()
    }
    return found | {key: diff.double().reshape(diff.shape[0], -1) for key, diff in merged.diffs.items()}


def assert_is(found, wanted, power, tolerance=1e-5):
    assert found.keys() == wanted.keys()
    for key, update in found.items():
        assert torch.isfinite(update).all(), key
        size = float(wanted[key].norm())
        # A whole difference has no alpha: below float32's smallest numbers there is nothing.
        floor = 2.0**-149 * update.numel() * 2.0**-power if update.numel() == wanted[key].numel() else 0
        assert float((update * 2.0**-power - wanted[key]).norm()) <= tolerance * size + floor, key


SPREADS = {
    "in up": lambda power: {"up": power},
    "in down": lambda power: {"down": power},
    "in both": lambda power: {"up": power, "down": power},
    "against one another": lambda power: {"up": max(power, -120), "down": -max(power, -120)},
    "in alpha": lambda power: {"alpha": power},
    "in alpha against up": lambda power: {"up": max(power, -120), "alpha": -max(power, -120)},
}


@functools.cache
def ordinary(number):
    return updates(merge([(lora(1), 0.75), (lora(2), 1.5)], **CALLS[number]))


@pytest.mark.parametrize("power", POWERS)
@pytest.mark.parametrize("spread", SPREADS)
def test_a_power_of_two_in_the_inputs_is_one_in_the_result(power, spread):
    """Every method is homogeneous: of inputs times 2 ** k it makes 2 ** k times the result. Or it says that it cannot."""
    by = SPREADS[spread](power)
    total = sum(by.values())
    scaled, beside = lora(1, **by), lora(2, **by)
    # A seventh of the calls, another one each time.
    for number in range((POWERS.index(power) + 3 * list(SPREADS).index(spread)) % 7, len(CALLS), 7):
        try:
            found = updates(merge([(scaled, 0.75), (beside, 1.5)], **CALLS[number]))
        except ValueError as error:
            said = str(error)
        else:
            assert total < 132
            assert_is(found, ordinary(number), total)
            continue
        # Single entries are up to 8 times 2 ** total.
        assert total > 120
        assert re.search(r"lora_unet_input_blocks_1_\d_\w+: the update .*float32", said)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("power", POWERS)
def test_beside_an_ordinary_lora_the_sum_is_the_sum(power, dtype):
    large, other = lora(1, up=power, dtype=dtype), lora(2, dtype=dtype)
    wanted = {module: 0.75 * update + 1.5 * updates(other)[module] for module, update in updates(large).items()}
    for cut in ({}, {"rank": 6}, {"keep": 1.0}, {"max_mb": 1.0}, {"out_dtype": torch.bfloat16}):
        tolerance = 2e-2 if "out_dtype" in cut else 1e-5  # of bfloat16's eight bits
        merged, account = merge_with_account([(large, 0.75), (other, 1.5)], **cut)
        assert_is(updates(merged), wanted, 0, tolerance)
        shares = [source.retention for source in account.sources if source.retention is not None]
        assert all(0 <= share <= 1 for share in shares)
        assert "keep" in cut or shares == pytest.approx([1.0] * len(shares), abs=1e-4), cut


@pytest.mark.parametrize("strengths", [(1e30, 1e30), (1e-30, 1e-30), (1e37, 1.0), (1.0, 1e-300), (1e-300, 1e-300)])
def test_strengths_may_be_of_any_size(strengths):
    """Methods are homogeneous in the strengths too; a mean, whose strengths are weights, does not change with all of them."""
    largest = max(strengths)
    shares = [strength / largest for strength in strengths]
    for number, call in enumerate(CALLS):
        if number % 7 == 0:
            wanted = updates(merge([(lora(1), shares[0]), (lora(2), shares[1])], **call))
            found = updates(merge([(lora(1), strengths[0]), (lora(2), strengths[1])], **call))
            scale = 1.0 if METHODS[call["method"]].averages else largest
            if scale > 1e-40:  # float32 has no smaller numbers
                assert_is({key: update / scale for key, update in found.items()}, wanted, 0)


@pytest.mark.parametrize("power", POWERS)
def test_whole_differences_too(power):
    for method in METHODS:
        plain = updates(merge([(lora(1, whole=0), 0.75), (lora(2, whole=0), 1.5)], method=method))
        found = updates(merge([(lora(1, whole=power), 0.75), (lora(2, whole=power), 1.5)], method=method))
        for key in ((ALONE, "diff"), (ALONE, "diff_b")):
            floor = 2.0**-149 * 12 * 10
            error = float((found[key] - plain[key] * 2.0**power).norm())
            assert error <= 1e-5 * 2.0**power * float(plain[key].norm()) + floor, (method, key)


@pytest.mark.parametrize("dense", [False, True])
@pytest.mark.parametrize("cut", [{"rank": 2}, {"keep": 0.9}])
@pytest.mark.parametrize("method", [name for name in METHODS if not METHODS[name].exact_inputs])
def test_what_a_merge_says_of_itself_is_the_same_at_any_size(method, cut, dense):
    """Two modules of which one is beyond the middle of the range and the other is not: energies of both are added up."""
    if dense and (not METHODS[method].entrywise or "keep" in cut):
        return
    accounts = []
    for power in (0, 38, 60):
        loras = [
            Lora(
                lora(seed, up=power + 4, modules=(LINEAR,)).modules
                | lora(seed, up=power, modules=(CONVOLUTION,)).modules,
                source=f"{seed}",
            )
            for seed in (1, 2)
        ]
        call = {"method": method, "protect": 1, "mu": 1.0, "dense": dense} | cut
        accounts.append(merge_with_account([(loras[0], 0.75), (loras[1], 1.5)], **call)[1])
    first, *others = accounts
    for other in others:
        assert other.ranks == first.ranks
        assert other.relative_error == pytest.approx(first.relative_error, rel=1e-3, abs=1e-6)
        for one, same in zip(first.sources, other.sources, strict=True):
            for name in ("retention", "effect", "stepped_aside"):
                assert getattr(same, name) == pytest.approx(getattr(one, name), rel=1e-3, abs=1e-6), name


@pytest.mark.parametrize("power", [-40, -2, 0, 2, 40])
def test_small_entries_of_whole_updates_of_ordinary_size_are_kept(power):
    """float32's smallest numbers beside ordinary ones are lost where an update is divided by anything."""
    diff = torch.tensor([[2.0**power, 2.0**-149], [-(2.0**-140), 0.0]])
    one = Lora.from_state_dict({f"{ALONE}.diff": diff})
    for method in ("ties", "magnitude", "breadcrumbs"):
        options = {"outliers": 0.0} if method == "breadcrumbs" else {}
        merged = merge([(one, 1.0)], method=method, density=1.0, **options)
        assert torch.equal(merged.diffs[ALONE, "diff"], diff), method


@pytest.mark.parametrize("part", ["diff", "diff_b"])
@pytest.mark.parametrize("method", ["linear", "magnitude"])
def test_a_difference_beyond_float32_is_refused_by_name(part, method):
    large = Lora.from_state_dict({f"{ALONE}.{part}": torch.full((12, 10) if part == "diff" else (12,), 3e38)})
    with pytest.raises(ValueError, match=rf"{ALONE}.*beyond float32, which ends at 3.4e\+38. Lower"):
        merge([(large, 1.0), (large, 1.0)], method=method, density=1.0)
    # And what only passes beyond on its way is right.
    merged = merge([(large, 2.0), (large, -1.5)])
    assert torch.allclose(merged.diffs[ALONE, part], torch.tensor(1.5e38))


@pytest.mark.parametrize("power", [-100, -66, 66, 100])
@pytest.mark.parametrize("kind", kinds.ADDITIVE)
def test_every_kind_has_its_update_and_its_energy_at_any_size(kind, power):
    _, convolution = kinds.ADDITIVE[kind]
    tensors = kinds.parts(kind, kernel=(3, 3) if convolution else ())
    first, second, *rest = tensors
    small = power + 40 * (1 if power < 0 else -1)
    tensors = tensors | {first: tensors[first] * 2.0**power, second: tensors[second] * 2.0**-small}
    tensors |= {end: tensors[end] * 2.0 ** (power // 2) for end in rest}
    total = power - small + (power // 2) * len(rest)
    exact = kinds.dense(tensors)
    one = Lora.from_state_dict(
        {f"{CONVOLUTION if convolution else LINEAR}{end}": part for end, part in tensors.items()}
    )
    ((module, layer),) = one.modules.items()
    assert energy_of((layer, 0.5)) == pytest.approx(float((0.5 * exact).square().sum()), rel=1e-4)
    if not -126 < total < 120:
        if total > 130:
            with pytest.raises(ValueError, match="float32 ends at"):
                layer.delta()
        return
    assert float((layer.delta().double().flatten(1) - exact).norm()) <= 1e-5 * float(exact.norm())
    other = lora(3, modules=(module,), up=0)
    if layer.shape == next(iter(other.modules.values())).shape:
        merged = merge([(one, 0.5), (other, 1.0)])
        assert_is(updates(merged), {module: 0.5 * exact + updates(other)[module]}, 0)
    # Alone it is what it is; with a cut it becomes LoRA.
    cut = merge([(one, 0.5)], rank=layer.rank, method="tsv")
    assert float((cut.delta(module).double().flatten(1) - 0.5 * exact).norm()) <= 1e-5 * float(exact.norm())


@pytest.mark.parametrize("power", [-140, -60, 60, 120])
def test_what_a_merge_of_them_saves_is_what_it_says(tmp_path, power):
    for number, call in enumerate(CALLS):
        if number % 11 == 0:
            merged = merge([(lora(1, up=power), 0.75), (lora(2), 0.5)], **call)
            save(merged, tmp_path / "x.safetensors", dtype=torch.float32, overwrite=True)
            assert_is(updates(load(tmp_path / "x.safetensors")), updates(merged), 0, 1e-7)


@pytest.mark.parametrize("power", POWERS)
def test_every_figure_of_a_comparison_is_a_number(power):
    found = compare([(lora(1, up=power, down=min(power, 100)), 1.0), (lora(2), 1.0)])
    assert all(math.isfinite(energy) for row in found.products for energy in row)


def test_what_is_beyond_all_comparison_is_refused_by_name():
    with pytest.raises(ValueError, match=f"{LINEAR}: the squares of its updates are beyond float64"):
        compare([(lora(1, up=127, down=127, alpha=20, modules=(LINEAR,)), 1.0), (lora(2), 1.0)])


@pytest.mark.parametrize("part", ["diff", "w_norm", "diff_b", "b_norm", "set_weight"])
def test_a_weight_that_is_one_number_is_merged_compared_and_saved(part, tmp_path):
    """A tensor without dimensions, under the name of a module of a UNet."""
    state = {f"{LINEAR}.{part}": torch.tensor(2.0)} | lora(1, modules=(CONVOLUTION,)).to_state_dict()
    one = Lora.from_state_dict(state, source="one")
    assert describe(one)
    assert identify(one)
    assert compare([(one, 1.0)])
    save(one, tmp_path / "x.safetensors")
    if part == "set_weight":
        assert merge([(one, 1.0)]).carried.keys() == {LINEAR}
        return
    for options in ({}, {"method": "ties", "keep": 0.9}, {"rank": 1}, {"max_mb": 1.0}, {"method": "slerp"}):
        (diff,) = merge([(one, 0.5), (one, 1.0)], **options).diffs.values()
        assert diff.shape == ()
        assert float(diff) == 3.0
    other = torch.ones((3,) if part in ("diff_b", "b_norm") else (3, 3))
    larger = Lora.from_state_dict({f"{LINEAR}.{part}": other}, source="other")
    with pytest.raises(ValueError, match=r"shape \(\), other one of shape \(3"):
        merge([(one, 1.0), (larger, 1.0)])


DTYPES = [torch.float8_e4m3fn, torch.float8_e5m2, torch.float16, torch.bfloat16, torch.float32, torch.float64]


@pytest.mark.parametrize("second", DTYPES)
@pytest.mark.parametrize("first", DTYPES)
def test_inputs_of_any_two_dtypes_are_read_as_their_numbers(first, second):
    pair = [(lora(1, dtype=first), 0.75), (lora(2, dtype=second), 1.5)]
    one, other = (updates(each) for each, _ in pair)
    wanted = {module: 0.75 * one[module] + 1.5 * other[module] for module in one}
    for options in ({}, {"rank": 6}, {"method": "magnitude", "density": 1.0}):
        assert_is(updates(merge(pair, **options)), wanted, 0)


@pytest.mark.parametrize("method", METHODS)
def test_an_alpha_of_zero_adds_nothing_and_one_that_is_no_number_is_refused(method):
    nothing = lora(1)
    nothing = Lora({name: replace(layer, alpha=0.0) for name, layer in nothing.modules.items()}, source="nothing")
    found = updates(merge([(nothing, 1.0), (lora(2), 1.5)], method=method, density=1.0))
    # Between nothing and an update slerp is the straight line; of a mean, nothing is a part like any other.
    strength = 1.5 / 2.5 if METHODS[method].averages else 1.5
    assert_is(found, updates(merge([(lora(2), strength)])), 0)
    for alpha in (math.nan, math.inf, -math.inf):
        state = lora(1).to_state_dict() | {f"{LINEAR}.alpha": torch.tensor(alpha)}
        with pytest.raises(ValueError, match=f"NaN or infinite values in {LINEAR}.alpha"):
            Lora.from_state_dict(state)


@pytest.mark.parametrize("kind", kinds.ADDITIVE)
@pytest.mark.parametrize("power", [60, 80, 100, 120])
def test_an_alpha_of_zero_makes_zeros_of_numbers_of_any_size(kind, power):
    tensors = kinds.parts(kind, kernel=(3, 3) if kinds.ADDITIVE[kind][1] else ())
    state = {f"{LINEAR}{end}": tensor * 2.0**power for end, tensor in tensors.items()}
    layer = Lora.from_state_dict(state | {f"{LINEAR}.alpha": torch.zeros(())}).modules[LINEAR]
    # LoKr of two whole matrices has no rank, and so no alpha.
    if layer.scale == 0:
        assert torch.equal(layer.delta(), torch.zeros(layer.shape))
