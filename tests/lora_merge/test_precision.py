import logging
import math
from dataclasses import replace

import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st

from lcm_kit.lora_merge import LohaLayer, Lora, LoraLayer, describe_merge, load, merge, merge_with_account, save
from lcm_kit.lora_merge.algebra.precision import all_finite, cast, cast_part, component_maxima, holds, rounding
from lcm_kit.lora_merge.updates.layer import Share
from lcm_kit.lora_merge.updates.side_by_side import side_by_side
from lcm_kit.lora_merge.updates.unmade import Unmade
from lcm_kit.tests.lora_merge import kinds
from lcm_kit.tests.lora_merge.make import dense, factors, kohya, relative

MODULE = "lora_unet_conv_in"


def test_ordinary_values_are_only_rounded():
    up, down = factors(6, 2, 5)
    result = cast(LoraLayer(up, down), torch.float16)
    assert not result.balanced
    assert torch.equal(result.layer.up, up.half())


@pytest.mark.parametrize(("up_size", "down_size"), [(1e7, 1e-6), (1e-7, 1e3), (1e-9, 1e5), (1e6, 1.0)])
@pytest.mark.parametrize("kernel", [(), (3, 3)])
def test_lopsided_factors_are_balanced_and_mean_the_same(up_size, down_size, kernel):
    up, down = factors(6, 4, 5, kernel)
    up, down = up * up_size, down * down_size
    result = cast(LoraLayer(up, down), torch.float16)
    assert result.balanced
    # two factors of 11 bits; without balancing they are infinite or have lost most of their bits
    assert relative(dense(result.layer.up, result.layer.down), dense(up, down)) < 1e-3


def test_each_component_is_balanced_by_itself():
    up, down = factors(6, 2, 5)
    sizes = torch.tensor([1e7, 1.0])
    result = cast(LoraLayer(up * sizes, down / sizes[:, None]), torch.float16)
    assert torch.equal(result.layer.up[:, 1], up[:, 1].half() * (result.layer.up[0, 1] / up[0, 1].half()))
    assert relative(dense(result.layer.up, result.layer.down), dense(up, down)) < 1e-3


@pytest.mark.parametrize(
    ("up", "down", "moved"), [(-14, -14, False), (-13, -14, False), (-15, -13, True), (-11, -15, True)]
)
def test_balanced_is_what_was_multiplied_and_not_what_is_too_small_alike(up, down, moved):
    """Exponents of factors among float16's smallest: half of their distance goes from one to the other, if it is any."""
    layer = LoraLayer(torch.full((3, 2), 2.0**up), torch.full((2, 4), 2.0**down))
    result = cast(layer, torch.float16, into_alpha=False)
    assert result.balanced == moved
    assert torch.equal(result.layer.up, layer.up.half()) != moved
    assert torch.equal(result.layer.up.float() @ result.layer.down.float(), layer.delta())


def test_tucker_layers_are_balanced_as_a_whole():
    up, _ = factors(6, 4, 5, (1, 1), seed=1)
    _, down = factors(6, 3, 5, (1, 1), seed=2)
    _, mid = factors(6, 4, 3, (3, 3), seed=3)
    layer = LoraLayer(up * 1e7, down * 1e-5, mid=mid)
    result = cast(layer, torch.float16)
    assert relative(result.layer.delta(), layer.delta()) < 1e-3


@pytest.mark.parametrize("kind", [kind for kind in kinds.ADDITIVE if kind.startswith("Lo") and kind != "LoRA"])
def test_parts_of_any_kind_are_balanced_and_that_is_told_though_some_stay_as_they_are(kind):
    kernel = (3, 3) if kinds.ADDITIVE[kind][1] else ()
    (layer,) = Lora.from_state_dict(kinds.state_dict(kind, MODULE, kernel=kernel)).modules.values()
    assert not cast(layer, torch.float16).balanced
    (first, large), *_, (last, small) = layer.parts().items()
    moved = layer.with_parts({first: large * 2.0**20, last: small * 2.0**-20})
    result = cast(moved, torch.float16)
    assert result.balanced
    assert result.error == 0.0
    assert relative(result.layer.delta(), layer.delta()) < 2e-3


@pytest.mark.parametrize("kernel", [(), (3, 3)])
def test_the_size_of_a_component_is_its_largest_magnitude_of_either_sign(kernel):
    up, down = factors(6, 4, 5, kernel)
    for sign in (1, -1):
        above, below = (sign * factor.abs() for factor in (up, down))
        assert torch.equal(component_maxima(above, 1), up.abs().flatten(1).amax(dim=0))
        assert torch.equal(component_maxima(below, 0), down.abs().flatten(1).amax(dim=1))
        assert torch.equal(component_maxima(sign * down, 0), down.abs().flatten(1).amax(dim=1))


def test_a_component_that_is_zero_stays_zero():
    up, down = factors(6, 2, 5)
    up[:, 0], down[0] = 0.0, 1e9
    result = cast(LoraLayer(up, down), torch.float16)
    assert torch.isfinite(result.layer.down).all()
    assert relative(dense(result.layer.up, result.layer.down), dense(up, down)) < 1e-3


def test_what_no_balance_saves_is_refused():
    up, down = factors(6, 2, 5)
    with pytest.raises(ValueError, match=f"style: {MODULE}: values are too large for float16; save as float32"):
        Lora.from_state_dict(kohya(MODULE, up * 1e8, down * 1e8), source="style").to_state_dict(torch.float16)


def test_balancing_is_reported(caplog):
    up, down = factors(6, 2, 5)
    lora = Lora.from_state_dict(kohya(MODULE, up * 1e7, down / 1e7), source="style")
    with caplog.at_level(logging.INFO):
        state = lora.to_state_dict(torch.float16)
    assert "style: factors of 1 module balanced" in caplog.text
    assert [record.levelname for record in caplog.records] == ["INFO"]  # nothing is lost
    assert relative(Lora.from_state_dict(state).delta(MODULE), lora.delta(MODULE)) < 1e-3


def test_keeping_the_dtype_keeps_every_bit():
    up, down = factors(6, 2, 5, dtype=torch.float16)
    up = up * 1e-3  # small, but as the file had it
    state = Lora.from_state_dict(kohya(MODULE, up, down)).to_state_dict()
    assert torch.equal(state[f"{MODULE}.lora_up.weight"], up)
    assert torch.equal(state[f"{MODULE}.lora_down.weight"], down)
    kept = cast(LoraLayer(up, down), torch.float16)
    assert (kept.balanced, kept.error) == (False, 0)


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.float8_e5m2])
def test_values_of_eight_bits_are_looked_at_too(dtype):
    assert all_finite([torch.ones(3, 2).to(dtype)])
    assert not all_finite([torch.tensor([1.0, math.nan]).to(dtype)])


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("where", range(0, 30, 7))
def test_one_value_that_is_no_number_is_found_wherever_it_is(value, where):
    """In neighbours of one memory, with a gap between two of them and one that is turned."""
    memory = torch.zeros(40)
    parts = [memory[:4], memory[4:10].view(2, 3), memory[12:12], memory[12:20].view(2, 4).T, memory[20:30]]
    assert all_finite([*parts, torch.ones(3).half(), torch.tensor([1])])
    memory[10:12], memory[30:] = value, value  # of nobody
    assert all_finite(parts)
    memory[where] = value
    assert not all_finite(parts)


@pytest.mark.parametrize("where", [0, 1 << 22, (3 << 22) - 1])
def test_it_is_found_in_large_tensors_that_threads_share_too(where):
    memory = torch.zeros(3 << 22, dtype=torch.float16)
    memory[where] = float("nan")
    assert not all_finite([memory[: 1 << 20], memory[1 << 20 :]])


SMALL = [(1e-6, 2.0), (1e-6, 2e6), (1e-7, 1.0), (1e-12, 2e24), (1e-18, 1e36)]


@pytest.mark.parametrize(("size", "alpha"), SMALL)
@pytest.mark.parametrize("kind", kinds.ADDITIVE)
def test_factors_too_small_for_float16_take_powers_of_two_from_alpha(kind, size, alpha, caplog, tmp_path):
    _, needs_kernel = kinds.ADDITIVE[kind]
    tensors = kinds.parts(kind, kernel=(3, 3) if needs_kernel else ())
    few = list(tensors)[:2]
    tensors = {end: part * (size if end in few else 1.0) for end, part in tensors.items()}
    module = "lora_unet_input_blocks_1_0_in_layers_2" if needs_kernel else MODULE
    state = {f"{module}{end}": part for end, part in tensors.items()} | {f"{module}.alpha": torch.tensor(alpha)}
    lora = Lora.from_state_dict(state, source="style")
    exact = kinds.dense(tensors, alpha)
    with caplog.at_level(logging.INFO):
        save(lora, tmp_path / "x.safetensors")
    (again,) = load(tmp_path / "x.safetensors").modules.values()
    error = relative(again.delta_in(torch.float64).flatten(1), exact)
    levels = {record.levelname for record in caplog.records}
    if "WARNING" in levels:
        # Two whole matrices of a LoKr: alpha has no effect there.
        assert kind in ("LoKr, both whole", "LoKr, second flattened")
        assert f"change by up to {100 * error:.3g} %" in caplog.text
    else:
        assert error < 2e-3
    (merged,) = merge([(lora, 1.0)], out_dtype=torch.float16).modules.values()
    # As LoRA factors, where the kind has no alpha.
    assert relative(merged.delta_in(torch.float64).flatten(1), exact) < 2e-3


@pytest.mark.parametrize("part", ["diff", "diff_b", "w_norm"])
def test_differences_too_small_for_float16_are_named_with_their_error(part, caplog, tmp_path):
    diff = torch.tensor([1.0, -0.6, 0.3]) * 1e-7
    diff = diff.reshape(1, 3) if part == "diff" else diff
    lora = Lora.from_state_dict({f"{MODULE}.{part}": diff}, source="style")
    save(lora, tmp_path / "x.safetensors")
    error = relative(next(iter(load(tmp_path / "x.safetensors").diffs.values())), diff)
    assert error > 0.1
    assert (
        f"float16 has no numbers small enough for 1 module: their updates change by up to {100 * error:.3g} % ({MODULE})"
        in caplog.text
    )
    assert "Save as bfloat16 or float32" in caplog.text
    merged, account = merge_with_account([(lora, 1.0)], out_dtype=torch.float16)
    assert f"change by up to {100 * error:.3g} %" in describe_merge(account, merged)
    caplog.clear()
    save(lora, tmp_path / "x.safetensors", dtype=torch.bfloat16, overwrite=True)
    assert not caplog.records


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_without_alpha_the_loss_is_told(dtype, caplog):
    up, down = factors(6, 2, 5)
    size = 1e-6 if dtype == torch.float16 else 1e-39
    lora = Lora.from_state_dict(kohya(MODULE, up * size, down * size), source="style")
    state = lora.to_state_dict(dtype, format="diffusers")
    found = [state[f"unet.conv_in.lora_{part}.weight"].double() for part in "BA"]
    error = relative(found[0] @ found[1], dense(up * size, down * size))
    assert (
        f"style: {str(dtype)[6:]} has no numbers small enough for 1 module: their updates change by up to {100 * error:.3g} %"
        in caplog.text
    )


def test_a_part_has_memory_of_its_own_unless_told():
    part = torch.ones(3)
    for dtype in (None, torch.float32):
        assert cast_part(part, dtype).data_ptr() != part.data_ptr()
        assert cast_part(part, dtype, copy=False).data_ptr() == part.data_ptr()
    turned = torch.ones(3, 2).T
    for dtype in (None, torch.float32, torch.float16):
        assert all(cast_part(turned, dtype, copy=copy).is_contiguous() for copy in (True, False))


def test_neighbours_of_another_dtype_are_looked_at_in_their_own():
    """Infinity in float16, 0x7C00, is a tiny number as the lower half of a float32."""
    memory = torch.zeros(16)
    whole, half = memory[:2], memory.view(torch.float16)[2:6]
    half[2] = math.inf
    assert bool(memory.isfinite().all())
    assert not all_finite([whole, half])


@pytest.mark.parametrize("dead", ["up", "down"])
def test_what_stands_beside_a_factor_of_zeros_is_zero_after_a_balance(dead):
    """1e30 in a component that is 0 must not become infinity, and nothing may be divided by it."""
    parts = {"up": torch.full((4, 2), 1e6), "down": torch.full((2, 3), 1e-5)}
    for name, part in parts.items():
        part.movedim(0, 1 if name == "up" else 0)[1] = 0.0 if name == dead else 1e30
    result = cast(LoraLayer(**parts), torch.float16)
    assert result.balanced
    up, down = result.layer.up.float(), result.layer.down.float()
    assert not up[:, 1].any()
    assert not down[1].any()
    torch.testing.assert_close(up @ down, torch.full((4, 3), 10.0), rtol=2e-3, atol=0)


@pytest.mark.parametrize("dead", ["hada_w1_a", "hada_w2_b"])
def test_a_product_with_a_part_of_zeros_is_zero_and_nothing_is_balanced(dead):
    """0 has no power of two to be balanced by, and what stands beside it may be of any size."""
    parts = {"hada_w1_a": (4, 2), "hada_w1_b": (2, 3), "hada_w2_a": (4, 2), "hada_w2_b": (2, 3)}
    sizes = {name: 0.0 if name == dead else 1e-9 if name == "hada_w1_b" else 1e6 for name in parts}
    layer = LohaLayer(**{name[5:]: torch.full(shape, sizes[name]) for name, shape in parts.items()}, alpha=2.0)
    for into_alpha in (True, False):
        result = cast(layer, torch.float16, into_alpha=into_alpha)
        assert not any(part.any() for part in result.layer.parts().values())
        assert (result.balanced, result.error, result.layer.alpha) == (False, 0.0, 2.0)


EXPONENTS = st.sampled_from([-24, -17, -13, -12, -11, -10, 0, 14, 15])


def unmade(tensor):
    return Unmade(tensor.dtype, tensor.shape, lambda place: place.copy_(tensor), tensor.device)


@given(
    exponents=st.lists(EXPONENTS, min_size=4, max_size=4),
    rows=st.sampled_from([1, 3, 70, 130]),
    place=st.integers(0, 200),
    turned=st.booleans(),
    above=st.sampled_from([1.0, -1.0, 0.25, 4.0]),
    others=st.sampled_from([0.0, 2.0**-12]),
    form=st.sampled_from([torch.Tensor.clone, unmade]),
)
@example(exponents=[0, -17, 0, 0], rows=3, place=0, turned=False, above=1.0, others=0.0, form=torch.Tensor.clone)
@example(exponents=[0, 0, -17, 0], rows=130, place=0, turned=True, above=-1.0, others=0.0, form=torch.Tensor.clone)
@example(exponents=[0, -17, 0, 0], rows=1, place=0, turned=False, above=1.0, others=0.0, form=unmade)
@example(exponents=[0, -11, 0, 0], rows=3, place=0, turned=False, above=0.25, others=0.0, form=torch.Tensor.clone)
@example(exponents=[14, 14, 0, 0], rows=3, place=0, turned=False, above=4.0, others=0.0, form=torch.Tensor.clone)
def test_float16_holds_a_component_if_its_largest_entry_is_in_the_middle_of_its_range(
    exponents, rows, place, turned, above, others, form
):
    """Above four times the smallest normal number and below the largest number, wherever in the component it is. What keeps
    its numbers has lost nothing."""
    up = torch.full((rows, 2), others)
    up[place % rows] = torch.tensor([1.5 * 2.0**e for e in exponents[:2]])
    down = torch.full((2, rows), others)
    down[:, (place // 3) % rows] = torch.tensor([-1.75 * 2.0**e for e in exponents[2:]])
    if turned:
        up, down = down.T.contiguous(), up.T.contiguous()
    share = Share(form(up.half()), form(down.half()), above, 1 / above)
    layer = side_by_side([share], (rows, rows), torch.float16)
    made_up, made_down = layer.up.float().abs().amax(dim=0), layer.down.float().abs().amax(dim=1)
    sizes = torch.cat([made_up, made_down])
    assert holds(layer) == (above == 1 or bool(((sizes > 2.0**-12) & (sizes < 65504)).all()))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("side", ["up", "down"])
def test_wider_dtypes_hold_what_is_finite_and_not_all_near_their_subnormal_numbers(dtype, side):
    def of(size, beside=0.0):
        parts = {"up": torch.ones(3, 2), "down": torch.ones(2, 3)}
        parts[side] = torch.tensor([[size, beside, 0.0], [beside, size, 0.0]])
        parts[side] = parts[side].T.contiguous() if side == "up" else parts[side]
        return LoraLayer(**parts).in_dtype(dtype)

    assert holds(of(1.0))
    assert holds(of(1e30))
    assert holds(of(2.0**-99))
    assert holds(of(2.0**-99, 2.0**-120))
    assert not holds(of(2.0**-100))
    assert not holds(of(0.0))
    assert not holds(of(math.inf))
    assert not holds(of(math.inf, 1.0))
    ones = Share(torch.ones(3, 2), torch.ones(2, 3))
    small = replace(ones, **{side: of(2.0**-120).parts()[side]})
    assert holds(side_by_side([ones, small], (3, 3), dtype))
    # Rounded up, the largest numbers of float32 are infinite in bfloat16.
    large = replace(ones, **{side: torch.full_like(getattr(ones, side), torch.finfo(torch.float32).max)})
    assert holds(side_by_side([large], (3, 3), dtype)) == (dtype == torch.float32)


@pytest.mark.parametrize("kind", kinds.ADDITIVE)
@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_value_that_is_no_number_is_refused_whichever_part_it_is_in(kind, value):
    kernel = (3, 3) if kinds.ADDITIVE[kind][1] else ()
    (sound,) = Lora.from_state_dict(kinds.state_dict(kind, MODULE, kernel=kernel)).modules.values()
    for name, part in sound.parts().items():
        layer = sound.with_parts({name: part.clone().index_fill(0, torch.tensor(0), value)})
        with pytest.raises(ValueError, match=r"values are too large for float16; save as float32 or bfloat16$"):
            cast(layer, torch.float16)
        with pytest.raises(ValueError, match=r"values are too large for bfloat16; save as float32$"):
            cast(layer, torch.bfloat16)


@pytest.mark.parametrize("side", ["up", "down"])
def test_a_component_that_one_factor_makes_small_and_the_other_large_is_balanced(side):
    """Whichever of the two has it among its smallest numbers, and however large their other components are."""
    small, large = torch.tensor([1.0, 2.0**-20]), torch.tensor([1.0, 2.0**10])
    up, down = factors(6, 2, 5)
    by_up, by_down = (small, large) if side == "up" else (large, small)
    layer = LoraLayer(up * by_up, down * by_down[:, None])
    result = cast(layer, torch.float16)
    assert result.balanced
    for component in range(2):
        part, exact = (one[:, component : component + 1].double() @ other[component : component + 1].double()
                       for one, other in ((result.layer.up, result.layer.down), (layer.up, layer.down)))  # fmt: skip
        assert relative(part, exact) < 1e-3


@pytest.mark.parametrize(("up", "down"), [(-140, 120), (120, -140), (-149, 127), (100, -99), (-90, 70)])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_factors_at_the_two_ends_of_float32_are_balanced_exactly(up, down, dtype):
    """What the one is multiplied by may be beyond float32 itself."""
    layer = LoraLayer(torch.full((3, 2), 2.0**up), torch.full((2, 4), 2.0**down))
    result = cast(layer, dtype, into_alpha=False)
    assert result.layer.up.dtype == dtype
    assert torch.equal(result.layer.up.double() @ result.layer.down.double(), layer.delta_in(torch.float64))


def test_what_is_at_the_bounds_of_float16_stays_as_it_is():
    layer = LoraLayer(torch.full((3, 2), 65504.0), torch.full((2, 4), 2.0**-12))
    result = cast(layer, torch.float16)
    assert (result.balanced, result.error) == (False, 0.0)
    assert torch.equal(result.layer.up, layer.up.half())
    assert torch.equal(result.layer.down, layer.down.half())


@pytest.mark.parametrize(
    ("power", "alpha", "fits"), [(-60, 0, True), (-61, 0, False), (-40, -40, True), (-40, -41, False)]
)
def test_alpha_takes_powers_of_two_down_to_the_smallest_that_it_may_have(power, alpha, fits):
    """2**-120: further down float16 has no number for it, and what is lost is told."""
    layer = LoraLayer(torch.full((3, 2), 0.75 * 2.0**power), torch.full((2, 4), 0.75 * 2.0**power), 0.75 * 2.0**alpha)
    result = cast(layer, torch.float16)
    wanted = layer.delta_in(torch.float64)
    assert result.balanced == fits
    assert (result.layer.alpha != layer.alpha) == fits
    assert result.error == pytest.approx(relative(result.layer.delta_in(torch.float64), wanted), abs=1e-9)
    assert result.error == (0.0 if fits else 1.0)


def test_of_an_update_that_is_zero_nothing_can_be_lost_though_no_part_of_it_is():
    """Two matrices with one entry each, in different places, entry by entry: all four parts too small for float16."""
    one, other = (1e-30 * torch.eye(3)[:, place : place + 1] for place in (0, 1))
    layer = LohaLayer(w1_a=one, w1_b=one.T.clone(), w2_a=other, w2_b=other.T.clone(), alpha=1.0)
    assert not layer.delta_in(torch.float64).any()
    assert cast(layer, torch.float16, into_alpha=False).error == 0.0


def test_what_rounding_has_made_of_a_tensor_is_told_where_it_cost_more_than_the_dtypes_own_bits():
    fine, small = torch.tensor([1.0, 1e-7, 0.3]), torch.tensor([1e-7, 0.6e-7, 0.0])
    for part in (fine, torch.zeros(3), torch.tensor([1, 2, 3]), small.half()):
        assert rounding(part, part.half()) == 0.0
    assert rounding(fine.double(), fine.bfloat16()) == 0.0
    assert rounding(small, small.half()) == pytest.approx(relative(small.half(), small))
    assert rounding(small, small.half()) > 0.01
    assert rounding(small, small.bfloat16()) == 0.0


def test_numbers_that_are_no_floats_stay_what_they_are():
    whole = torch.tensor([1, 2**40])
    assert torch.equal(cast_part(whole, torch.float16), whole)
    assert cast_part(whole, torch.float16).dtype == torch.int64


def test_neighbours_by_their_places_alone_are_looked_at_each_in_its_own_memory():
    """The second begins, in its memory, where the first ends in another."""
    first, second = torch.zeros(8), torch.zeros(8)
    for one, other in ((first, second), (second, first)):
        pieces = [one[:4], other[4:]]
        assert all_finite(pieces)
        other[5] = math.nan
        assert not all_finite(pieces)
        other[5] = 0.0


def test_a_tensor_with_gaps_is_looked_at_where_its_values_are():
    whole = torch.zeros(4, 10)
    whole[3, 9] = math.nan
    assert not all_finite([whole[:, 9:]])
    assert all_finite([whole[:, :9]])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_one_share_near_the_subnormal_numbers_is_held_beside_one_that_is_not(dtype):
    """What it has lost is nothing beside the other."""
    ones = torch.ones(3, 1), torch.ones(1, 3)
    shares = [Share(*ones, 2.0**power, 1.0) for power in (-110, -1)]
    assert holds(side_by_side(shares, (3, 3), dtype))
    assert not holds(side_by_side(shares[:1], (3, 3), dtype))
