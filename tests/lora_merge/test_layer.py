import dataclasses
import math

import pytest
import torch

from lcm_kit.lora_merge import LoraLayer
from lcm_kit.lora_merge.updates.layer import exponent, is_safe, largest, shape_of_both, shaped, unfolded, whole_factors
from lcm_kit.tests.lora_merge.make import dense, factors, relative


def test_delta_is_alpha_over_rank_times_up_down():
    # worked by hand: [[1], [2]] @ [[3, 4]] = [[3, 4], [6, 8]], alpha 1 over rank 1, then alpha 0.5
    up, down = torch.tensor([[1.0], [2.0]]), torch.tensor([[3.0, 4.0]])
    assert LoraLayer(up, down, 1.0).delta().tolist() == [[3, 4], [6, 8]]
    assert LoraLayer(up, down, 0.5).delta().tolist() == [[1.5, 2], [3, 4]]


def test_without_alpha_the_scale_is_one():
    up, down = factors(6, 4, 5)
    assert LoraLayer(up, down).scale == 1.0
    assert LoraLayer(up, down, 4.0).scale == 1.0
    assert LoraLayer(up, down, 1.0).scale == 0.25


@pytest.mark.parametrize("kernel", [(1,), (1, 1), (3, 3), (3, 3, 3)])
def test_delta_of_a_convolution_has_the_shape_of_its_weight(kernel):
    up, down = factors(6, 2, 5, kernel)
    delta = LoraLayer(up, down, 1.0).delta()
    assert delta.shape == (6, 5, *kernel)
    assert relative(delta, dense(up, down, 0.5)) < 1e-6  # float32 rounding


def test_tucker_core_is_what_convolving_down_then_core_then_up_does():
    up, _ = factors(6, 4, 5, (1, 1), seed=1)
    _, down = factors(6, 3, 5, (1, 1), seed=2)
    _, mid = factors(6, 4, 3, (3, 3), seed=3)
    layer = LoraLayer(up, down, alpha=6.0, mid=mid)
    picture = torch.randn(1, 5, 7, 7, generator=torch.Generator().manual_seed(4))
    conv = torch.nn.functional.conv2d
    wanted = 2.0 * conv(conv(conv(picture, down), mid, padding=1), up)  # alpha 6 over down's rank 3
    assert layer.shape == (6, 5, 3, 3)
    assert relative(conv(picture, layer.delta(), padding=1), wanted) < 1e-5  # sums of 45 float32 products


def test_half_precision_is_multiplied_in_float32():
    # 300 * 300 = 90000 is beyond float16, whose largest number is 65504
    layer = LoraLayer(torch.full((1, 1), 300.0).half(), torch.full((1, 1), 300.0).half())
    assert layer.delta().item() == 90000


@pytest.mark.parametrize(
    ("up", "down", "mid", "message"),
    [
        ((320, 64), (32, 768), None, r"up is \(320, 64\) but down is \(32, 768\); ranks 64 and 32 differ"),
        ((320,), (32, 768), None, "at least two dimensions"),
        ((320, 0), (0, 768), None, "none of size 0"),
        ((320, 4, 3, 3), (4, 768, 1, 1), None, "only down may have a kernel"),
        ((320, 4, 3), (4, 768, 3), None, "only down may have a kernel"),
        ((8, 4, 1, 1), (4, 8, 1, 1), (4, 3, 3, 3), "does not fit between"),
    ],
)
def test_shapes_that_do_not_belong_together_are_refused(up, down, mid, message):
    with pytest.raises(ValueError, match=message):
        LoraLayer(torch.zeros(up), torch.zeros(down), mid=None if mid is None else torch.zeros(mid))


def test_alpha_has_to_be_finite():
    with pytest.raises(ValueError, match="alpha is nan"):
        LoraLayer(*factors(2, 1, 2), float("nan"))


def test_a_layer_cannot_be_changed():
    layer = LoraLayer(*factors(2, 1, 2))
    with pytest.raises(dataclasses.FrozenInstanceError):
        layer.alpha = 3.0


@pytest.mark.parametrize(
    ("first", "second", "common"),
    [
        ((8, 4), (8, 4), (8, 4)),
        ((8, 4), (8, 4, 1, 1), (8, 4, 1, 1)),
        ((8, 36, 1, 1), (8, 4, 3, 3), (8, 4, 3, 3)),
        ((8, 12, 1, 1), (8, 4, 3), (8, 4, 3)),
        ((8, 4), (8, 5), None),
        ((8, 4), (4, 8), None),
        ((8, 4), (8, 4, 3, 3), None),
    ],
)
def test_shapes_of_one_weight_meet(first, second, common):
    assert shape_of_both(first, second) == common
    assert shape_of_both(second, first) == common


def sized(first, second, *, middle=None, dtype=torch.float32):
    """A layer without alpha whose parts' largest entries are 0.75 times these powers of two, None: zeros."""
    up, down, mid = (
        None if shape is None else torch.full(shape, 0.0 if power is None else 0.75 * 2.0**power, dtype=dtype)
        for shape, power in (((3, 2), first), ((2, 4), second), ((2, 2, 1) if middle is not None else None, middle))
    )
    return LoraLayer(up, down, mid=mid)


@pytest.mark.parametrize(
    ("powers", "strength", "safe"),
    [
        # A part keeps within 2**100 and its inverse, and so does the product of the two.
        ((100, 0), 0, True),
        ((101, -10), 0, False),
        ((-100, 0), 0, True),
        ((-101, 10), 0, False),
        ((60, 40), 0, True),
        ((60, 41), 0, False),
        ((-60, -40), 0, True),
        ((-60, -41), 0, False),
        # With the strength 2**110, the strength itself 2**100.
        ((60, 40), 10, True),
        ((60, 40), 11, False),
        ((-60, -40), -10, True),
        ((-60, -40), -11, False),
        ((0, 0), 100, True),
        ((0, -50), 101, False),
        # Half of the strength goes into each factor.
        ((100, -100), 20, True),
        ((100, -100), 21, False),
        ((100, -100), -20, True),
        ((100, -100), -21, False),
        # Zeros are no danger beside what is none.
        ((None, 100), 100, True),
        ((None, 101), 0, False),
        ((None, 0), 101, False),
        ((60, 40), None, True),
        ((60, 41), None, False),
    ],
)
def test_what_float32_bears_is_told_from_the_largest_entries(powers, strength, safe):
    number = 0.0 if strength is None else 0.75 * 2.0**strength
    assert is_safe(sized(*powers), number) == safe
    assert is_safe(sized(*reversed(powers)), -number) == safe
    whole = LoraLayer(sized(*powers).up, sized(*powers).down, 2 * number)
    assert is_safe(whole) == safe  # the scale counts as the strength does


def test_three_parts_are_multiplied_with_one_another_and_bear_less():
    assert is_safe(sized(12, 12, middle=12), 0.75)
    assert not is_safe(sized(12, 12, middle=13), 0.75)
    assert not is_safe(sized(37, -20, middle=0), 0.75)
    assert is_safe(sized(-36, 0, middle=0), 0.75)
    assert not is_safe(sized(-37, 0, middle=0), 0.75)


def test_float16_need_not_be_looked_at_where_no_number_of_it_is_a_danger():
    """It holds 2**-24 to 2**16, so that the strength alone decides, and the answer is the same."""
    for strength in range(-150, 150, 3):
        for powers in ((15, 15), (-22, -22), (0, 0), (15, -22), (15, 15, 15), (-20, -20, -20), (0, 0, 0)):
            number, sizes = 0.75 * 2.0**strength, {"middle": powers[2]} if len(powers) > 2 else {}
            of_half, of_full = (sized(*powers[:2], **sizes, dtype=dtype) for dtype in (torch.float16, torch.float32))
            assert is_safe(of_half, number) == is_safe(of_full, number), (powers, strength)


def test_narrower_bounds_can_be_asked_for():
    bounds = {"part": 50, "low": -56, "high": 40}
    assert is_safe(sized(40, 0), 0.75, **bounds)
    assert not is_safe(sized(41, 0), 0.75, **bounds)
    assert is_safe(sized(50, -30), 0.75, **bounds)
    assert not is_safe(sized(51, -30), 0.75, **bounds)
    assert is_safe(sized(-30, -20), 0.75 * 2.0**-6, **bounds)
    assert not is_safe(sized(-30, -20), 0.75 * 2.0**-7, **bounds)
    assert not is_safe(sized(0, 0, dtype=torch.float16), 0.75 * 2.0**41, **bounds)


def test_exponents_and_largest_entries():
    assert [exponent(number) for number in (1.0, 0.75, -0.75, 0.5, 2.0, 2.0**-140)] == [1, 0, 0, 0, 2, -139]
    assert [exponent(number) for number in (0.0, math.inf, -math.inf, math.nan)] == [-math.inf, *[math.inf] * 3]
    assert largest(torch.zeros(0, 3)) == 0
    for dtype in (torch.float8_e4m3fn, torch.float16, torch.float64, torch.int8):
        assert largest(torch.tensor([[1, -3], [2, 0]]).to(dtype)) == 3
        assert largest(torch.tensor([-1, 2]).to(dtype)) == 2


@pytest.mark.parametrize("shape", [(2, 5), (5, 2), (3, 3)])
@pytest.mark.parametrize("dtype", [torch.float16, torch.float64])
def test_a_matrix_is_itself_times_one_on_its_shorter_side(shape, dtype):
    matrix = torch.arange(shape[0] * shape[1]).reshape(shape).to(dtype)
    up, down = whole_factors(matrix)
    assert up.dtype == down.dtype == dtype
    assert (up.shape, down.shape) == ((shape[0], min(shape)), (min(shape), shape[1]))
    assert torch.equal(up.double() @ down.double(), matrix.double())
    assert {factor.device.type for factor in whole_factors(matrix.to("meta"))} == {"meta"}


@pytest.mark.parametrize("shape", [(4, 6), (4, 2, 3), (4, 6, 1, 1), (4, 2, 3, 1)])
def test_matrices_for_a_weight_are_its_update_with_an_alpha_that_scales_by_one(shape):
    """The alpha is their rank: readers that take another scale where there is none do no harm."""
    up, down = factors(4, 3, 6)
    layer = shaped(up, down, shape)
    assert (layer.shape, layer.alpha, layer.scale) == (shape, 3.0, 1.0)
    assert layer.up.ndim == layer.down.ndim == len(shape)
    assert torch.equal(layer.delta(), (up @ down).reshape(shape))


@pytest.mark.parametrize(
    ("shape", "kernel", "found"),
    [
        ((8, 36), (3, 3), (8, 4, 3, 3)),
        ((8, 36), (), (8, 36)),
        ((8, 35), (3, 3), (8, 35)),
        ((8, 4, 3, 3), (3, 3), (8, 4, 3, 3)),
        ((8, 6), (3,), (8, 2, 3)),
    ],
)
def test_a_flattened_kernel_is_unfolded_where_it_divides(shape, kernel, found):
    assert unfolded(shape, kernel) == found


def test_what_float32_cannot_hold_is_refused_and_what_it_just_holds_is_not():
    def layer(size):
        return LoraLayer(torch.full((1, 1), 2.0**70), torch.full((1, 1), size))

    assert float(layer(2.0**57).delta()) == 2.0**127
    assert float(layer(2.0**-149).delta()) == 2.0**-79
    largest = torch.finfo(torch.float32).max
    assert float(LoraLayer(torch.full((1, 1), largest), torch.ones(1, 1)).delta()) == largest
    with pytest.raises(ValueError, match=r"the update reaches 3\.4e\+38, and float32 ends at"):
        layer(2.0**58).delta()


def test_without_alpha_what_is_written_is_what_means_the_same():
    up, down = factors(4, 3, 5)
    assert (LoraLayer(up, down).scale, LoraLayer(up, down).written_alpha) == (1.0, 3.0)
    assert (LoraLayer(up, down, 1.5).scale, LoraLayer(up, down, 1.5).written_alpha) == (0.5, 1.5)
    assert LoraLayer(up, down, 0.0).scale == 0
    assert LoraLayer(up, down).parameters == 27
    tucker = LoraLayer(torch.ones(4, 3, 1, 1), torch.ones(2, 5, 1, 1), 3.0, mid=torch.ones(3, 2, 3, 3))
    assert (tucker.dim, tucker.rank, tucker.scale, tucker.shape, tucker.kernel) == (2, 3, 1.5, (4, 5, 3, 3), (3, 3))
    assert tucker.parameters == 12 + 10 + 54
