import logging
import math

import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st

from lcm_kit.lora_merge import LohaLayer, Lora, LoraLayer, describe_merge, load, merge, merge_with_account, save
from lcm_kit.lora_merge.algebra.precision import all_finite, cast, cast_part, holds
from lcm_kit.lora_merge.updates.layer import Share
from lcm_kit.lora_merge.updates.side_by_side import side_by_side
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


@given(
    exponents=st.lists(EXPONENTS, min_size=4, max_size=4),
    rows=st.sampled_from([3, 70, 130]),
    place=st.integers(0, 200),
    turned=st.booleans(),
    above=st.sampled_from([1.0, -1.0, 0.25, 4.0]),
    others=st.sampled_from([0.0, 2.0**-12]),
)
@example(exponents=[0, -17, 0, 0], rows=3, place=0, turned=False, above=1.0, others=0.0)
@example(exponents=[0, 0, -17, 0], rows=130, place=0, turned=True, above=-1.0, others=0.0)
def test_float16_holds_a_component_if_its_largest_entry_is_in_the_middle_of_its_range(
    exponents, rows, place, turned, above, others
):
    """Above four times the smallest normal number and below the largest number, wherever in the component it is."""
    up = torch.full((rows, 2), others)
    up[place % rows] = torch.tensor([1.5 * 2.0**e for e in exponents[:2]])
    down = torch.full((2, rows), others)
    down[:, (place // 3) % rows] = torch.tensor([-1.75 * 2.0**e for e in exponents[2:]])
    if turned:
        up, down = down.T.contiguous(), up.T.contiguous()
    layer = side_by_side([Share(up.half(), down.half(), above, 1 / above)], (rows, rows), torch.float16)
    made_up, made_down = layer.up.float().abs().amax(dim=0), layer.down.float().abs().amax(dim=1)
    sizes = torch.cat([made_up, made_down])
    assert holds(layer) == bool(((sizes > 2.0**-12) & (sizes < 65504)).all())


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
