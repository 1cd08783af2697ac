"""Mistakes that LoRA mergers in use make, each measured on them; none of them here.

Method: fit the merged update as c_a * delta_a + c_b * delta_b by least squares. Right is c = the strengths and nothing left over.
"""

import pytest
import torch

from lcm_kit.lora_merge import Lora, merge
from lcm_kit.tests.lora_merge.make import dense, factors, kohya

MODULE = "lora_unet_down_blocks_0_attentions_0_proj_in"


def single(rank, alpha, *, seed, kernel=(), module=MODULE):
    return Lora.from_state_dict(kohya(module, *factors(12, rank, 10, kernel, seed=seed), alpha))


def coefficients(*inputs, **options):
    """(fitted coefficient of each source, relative residual)."""
    delta = merge(list(inputs), **options).delta(MODULE).double().flatten()
    columns = []
    for lora, _ in inputs:
        layer = next(iter(lora.modules.values()))
        columns.append(dense(layer.up, layer.down, layer.scale).flatten())
    basis = torch.stack(columns, dim=1)
    fit = torch.linalg.lstsq(basis, delta[:, None]).solution[:, 0]
    return fit.tolist(), float((basis @ fit - delta).norm() / delta.norm())


def test_strength_counts_once_and_not_on_both_factors():
    for strength in (0.5, 0.25, 3.0):
        fit, residual = coefficients((single(4, 4.0, seed=1), strength))
        assert fit == pytest.approx([strength], rel=1e-6)
        assert residual < 1e-6


def test_a_negative_strength_stays_negative():
    fit, _ = coefficients((single(4, 4.0, seed=1), -1.0))
    assert fit == pytest.approx([-1.0], rel=1e-6)
    fit, _ = coefficients((single(4, 4.0, seed=1), 1.0), (single(4, 4.0, seed=2), -0.5))
    assert fit == pytest.approx([1.0, -0.5], rel=1e-6)


def test_products_do_not_cross():
    # (u1 + u2)(d1 + d2) would leave u1 d2 + u2 d1 over: residual 0.7
    _, residual = coefficients((single(4, 4.0, seed=1), 1.0), (single(4, 4.0, seed=2), 0.8))
    assert residual < 1e-6


@pytest.mark.parametrize("second_alpha", [None, 1.0, 2.0, 4.0, 8.0])
@pytest.mark.parametrize("first_alpha", [None, 1.0, 4.0, 8.0])
def test_every_alpha_counts_with_its_own_rank(first_alpha, second_alpha):
    fit, residual = coefficients((single(8, first_alpha, seed=1), 1.0), (single(4, second_alpha, seed=2), 0.8))
    assert fit == pytest.approx([1.0, 0.8], rel=1e-6)
    assert residual < 1e-6


def test_alpha_one_is_not_taken_for_alpha_of_the_rank():
    lora = single(32, 1.0, seed=1)
    assert merge([(lora, 1.0)]).delta(MODULE).norm() == pytest.approx(float(lora.delta(MODULE).norm()), rel=1e-5)
    assert next(iter(lora.modules.values())).scale == 1 / 32


def test_strengths_are_not_averaged():
    fit, _ = coefficients((single(4, 4.0, seed=1), 1.0), (single(4, 4.0, seed=2), 1.0))
    assert fit == pytest.approx([1.0, 1.0], rel=1e-6)


def test_the_same_lora_in_halves_is_that_lora():
    lora = single(4, 2.0, seed=1)
    merged = merge([(lora, 0.5), (lora, 0.5)])
    torch.testing.assert_close(merged.delta(MODULE), lora.delta(MODULE), rtol=1e-5, atol=1e-8)


def test_convolutions_of_different_rank_merge():
    for options in ({}, {"rank": 12}):
        fit, residual = coefficients(
            (single(8, 8.0, seed=1, kernel=(3, 3)), 1.0), (single(4, 1.0, seed=2, kernel=(3, 3)), 0.7), **options
        )
        assert fit == pytest.approx([1.0, 0.7], rel=1e-5)
        assert residual < 1e-5


def test_a_three_by_three_convolution_keeps_its_kernel():
    lora = single(8, 8.0, seed=1, kernel=(3, 3))
    for options in ({}, {"rank": 2}):
        assert merge([(lora, 1.0)], **options).modules["lora_unet_input_blocks_1_1_proj_in"].down.shape[1:] == (
            10,
            3,
            3,
        )


def test_one_by_one_convolution_and_linear_do_not_broadcast():
    merged = merge([(single(4, 4.0, seed=1, kernel=(1, 1)), 1.0), (single(4, 4.0, seed=2), 1.0)], rank=4)
    layer = next(iter(merged.modules.values()))
    assert layer.up.shape == (12, 4, 1, 1)
    assert layer.down.shape == (4, 10, 1, 1)


@pytest.mark.parametrize(
    "other",
    [
        "lora_unet_input_blocks_1_1_proj_in",
        "diffusion_model.input_blocks.1.1.proj_in",
        "unet.down_blocks.0.attentions.0.proj_in",
    ],
)
def test_one_module_under_two_names_is_one_module(other):
    first, second = single(4, 4.0, seed=1), single(4, 4.0, seed=2, module=other)
    merged = merge([(first, 1.0), (second, 0.8)])
    assert len(merged.modules) == 1
    assert len(merged.to_state_dict()) == 3
    fit, residual = coefficients((first, 1.0), (second, 0.8))
    assert fit == pytest.approx([1.0, 0.8], rel=1e-6)
    assert residual < 1e-6


def test_peft_names_beside_kohya_names_are_not_dropped():
    up, down = factors(9, 2, 7, seed=3)
    name = "base_model.model.mid_block.attentions.0.proj_in"
    peft = Lora.from_state_dict({f"{name}.lora_B.weight": up, f"{name}.lora_A.weight": down})
    for order in ([(single(4, 4.0, seed=1), 1.0), (peft, 1.0)], [(peft, 1.0), (single(4, 4.0, seed=1), 1.0)]):
        assert len(merge(order).modules) == 2


def test_truncation_of_what_needs_none_has_no_error():
    # a clamp at a quantile, as in the SVD scripts in use, costs 7 to 46 % here
    lora = single(4, 4.0, seed=1)
    fit, residual = coefficients((lora, 1.0), rank=4)
    assert fit == pytest.approx([1.0], rel=1e-6)
    assert residual < 1e-6


def test_a_saved_merge_says_its_alpha():
    # readers differ in what they assume without alpha: scale 1, or alpha 1
    state = merge([(single(4, None, seed=1), 1.0), (single(2, None, seed=2), 1.0)]).to_state_dict(torch.float16)
    assert state[f"{MODULE}.alpha"].item() == 6


def test_loras_of_two_base_models_are_not_padded_to_fit():
    small = Lora.from_state_dict(kohya(MODULE, *factors(12, 4, 8)), source="sd15")
    large = Lora.from_state_dict(kohya(MODULE, *factors(12, 4, 10)), source="sdxl")
    with pytest.raises(ValueError, match="different base models"):
        merge([(small, 1.0), (large, 1.0)])
