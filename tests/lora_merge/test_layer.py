import dataclasses

import pytest
import torch

from lcm_kit.lora_merge import LoraLayer
from lcm_kit.lora_merge.updates.layer import shape_of_both
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
        ((8, 4), (8, 5), None),
        ((8, 4), (4, 8), None),
        ((8, 4), (8, 4, 3, 3), None),
    ],
)
def test_shapes_of_one_weight_meet(first, second, common):
    assert shape_of_both(first, second) == common
    assert shape_of_both(second, first) == common
