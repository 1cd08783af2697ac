"""Sums over the modules of a merge, and what they say of each input, by hand."""

import pytest
import torch

from lcm_kit.lora_merge.algebra.lowrank import Truncated
from lcm_kit.lora_merge.algebra.precision import COARSE
from lcm_kit.lora_merge.one_module.tally import Finished, Tally
from lcm_kit.tests.lora_merge.make import layer


def cut(energy, lost, sources, kept):
    return Truncated(layer(4, 2, 3), energy=energy, lost_energy=lost, source_energy=sources, kept_energy=kept)


def tally(*updates, made, dtype=torch.float64):
    """Of two modules, which each have half of what the updates and the result are. dtype: in which they are multiplied."""
    stack = torch.stack([torch.as_tensor(update, dtype=dtype) for update in (*updates, made)])
    products = (stack @ stack.T).double() / 2
    found = Tally(len(updates))
    for module in ("a", "b"):
        owners = tuple(range(len(updates)))
        found.add(Finished(module=module, owners=owners, products=(products[:-1, :-1], products[:-1, -1])), None)
    return found


def test_everything_is_summed_at_its_input():
    sums = Tally(3)
    sums.add(Finished(module="a", owners=(0, 2), cut=cut(10.0, 1.0, (4.0, 6.0), (3.0, 6.0)), rebalanced=True), 2)
    sums.add(Finished(module="b", owners=(2,), cut=cut(5.0, 0.0, (5.0,), (5.0,)), aside={0: (8.0, 2.0)}), 7)
    sums.add(Finished(module="c", owners=(1,), aside={0: (1.0, 1.0), 1: (3.0, 1.5)}, rebalanced=True), None)
    assert (sums.energy, sums.lost_energy, sums.cut, sums.rebalanced) == (15.0, 1.0, 1, 2)
    assert (sums.source_energy, sums.kept_energy) == ([4.0, 0.0, 11.0], [3.0, 0.0, 11.0])
    assert (sums.before, sums.after) == ([9.0, 3.0, 0.0], [3.0, 1.5, 0.0])
    assert sums.ranks == [2, 7]


def test_products_are_added_where_their_owners_stand():
    sums = Tally(3)
    for module in ("a", "b"):
        products = torch.tensor([[1.0, 2.0], [2.0, 3.0]]).double(), torch.tensor([4.0, 5.0]).double()
        sums.add(Finished(module=module, owners=(0, 2), products=products), None)
    assert sums.gram.tolist() == [[2, 0, 4], [0, 0, 0], [4, 0, 6]]
    assert sums.along.tolist() == [8, 0, 10]


def test_only_what_rounding_changes_visibly_is_named_with_its_largest_error():
    sums = Tally(1)
    for module, error in (("a", COARSE), ("b", 0.1), ("b", 0.3), ("b", 0.2), ("c", 0.0)):
        sums.add(Finished(module=module, owners=(0,), rounding=error), None)
    assert sums.too_small == {"b": 0.3}


@pytest.mark.parametrize("size", [1.0, 1e-5, 1e5])
@pytest.mark.parametrize(
    ("updates", "made", "effects"),
    [
        (([1, 0, 0], [0, 2, 0]), [0.5, 3, 7], [0.5, 1.5]),
        (([1, 1, 0], [0, 1, 0]), [2, 5, 0], [2, 3]),
        # None has nothing to have an effect with.
        (([1, 0, 0], [0, 0, 0]), [0.5, 0, 0], [0.5, None]),
        (([0, 0, 0],), [1, 0, 0], [None]),
        # One direction has the coefficient of the sum, whichever way it points and at whatever length.
        (([1, 2, 0], [1, 2, 0]), [0.8, 1.6, 0], [0.4, 0.4]),
        (([1, 2, 0], [-2, -4, 0]), [0.5, 1, 0], [-0.5, -0.5]),
        # Three in a plane: the smallest coefficients that fit.
        (([1, 0, 0], [0, 1, 0], [1, 1, 0]), [1, 1, 0], [1 / 3, 1 / 3, 2 / 3]),
    ],
)
def test_effects_are_the_coefficients_that_fit_best(updates, made, effects, size):
    """Whatever the size of all together."""
    updates, made = [[size * value for value in update] for update in updates], [size * value for value in made]
    found = tally(*updates, made=made).effects()
    assert [value is None for value in found] == [value is None for value in effects]
    assert [value or 0.0 for value in found] == pytest.approx([value or 0.0 for value in effects], abs=1e-9)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("small", [1e-1, 1e-4, 1e-6])
def test_effects_of_inputs_that_depend_on_one_another_are_no_rounding(small, dtype):
    """Three in a plane, whose products have a direction of rounding, beside one that is far smaller and no rounding."""
    g = torch.Generator().manual_seed(1)
    one, two, other = torch.linalg.qr(torch.randn(500, 3, generator=g, dtype=torch.float64))[0].T
    updates = [one, two, one + two, small * other]
    made = one + two + 0.5 * small * other
    found = tally(*updates, made=made, dtype=dtype).effects()
    assert found == pytest.approx([1 / 3, 1 / 3, 2 / 3, 0.5], abs=1e-2 if dtype == torch.float32 else 1e-6)


def test_effects_of_nothing_are_none():
    assert Tally(2).effects() == [None, None]
    assert tally([0.0, 0.0], [0.0, 0.0], made=[1.0, 0.0]).effects() == [None, None]
