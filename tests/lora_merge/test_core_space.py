"""The core space loses nothing, and does not depend on order or on how an update is split into factors."""

import pytest
import torch

from lcm_kit.lora_merge.algebra.core_space import core_space
from lcm_kit.lora_merge.methods.consensus import disjoint, orthogonalised, slerp
from lcm_kit.lora_merge.one_module.protect import dense_stepping_aside, leading_inputs, stepping_aside
from lcm_kit.lora_merge.updates.layer import LoraLayer


def layer(out=24, inside=20, rank=4, seed=0, alpha=2.0, kernel=()):
    generator = torch.Generator().manual_seed(seed)
    up = torch.randn(out, rank, *(1 for _ in kernel), generator=generator)
    return LoraLayer(up, torch.randn(rank, inside, *kernel, generator=generator), alpha=alpha)


TERMS = [(layer(seed=1), 0.8), (layer(rank=6, seed=2, alpha=None), -1.0), (layer(rank=3, seed=3), 0.5)]


def full(space, core):
    return (space.left @ core @ space.right).reshape(space.shape)


@pytest.mark.parametrize("kernel", [(), (3, 3)])
def test_coordinates_lose_nothing(kernel):
    terms = [(layer(seed=1, kernel=kernel), 0.8), (layer(rank=6, seed=2, kernel=kernel), -1.0)]
    space = core_space(terms)
    for (update, strength), core in zip(terms, space.cores, strict=True):
        delta = strength * update.delta()
        torch.testing.assert_close(full(space, core), delta, rtol=0, atol=1e-5 * float(delta.abs().max()))
        assert core.norm().item() == pytest.approx(delta.norm().item(), rel=1e-5)


def steep(out=96, inside=80, rank=16, seed=0):
    """An update whose energy is in a few directions, as trained LoRAs have it."""
    generator = torch.Generator().manual_seed(seed)
    up = torch.linalg.qr(torch.randn(out, rank, generator=generator))[0] * 0.6 ** torch.arange(rank)
    return LoraLayer(up, torch.linalg.qr(torch.randn(inside, rank, generator=generator))[0].T.contiguous())


def held_by_the_largest(delta, shares=(0.01, 0.1, 0.5)):
    energy = delta.square().flatten().sort(descending=True).values.cumsum(0)
    return [float(energy[round(share * len(energy)) - 1] / energy[-1]) for share in shares]


def test_the_largest_entries_of_a_core_hold_as_much_as_those_of_the_whole_update():
    terms = [(steep(seed=1), 0.8), (steep(seed=2), 1.0)]
    space = core_space(terms)
    for (update, _), core in zip(terms, space.cores, strict=True):
        assert held_by_the_largest(core) == pytest.approx(held_by_the_largest(update.delta()), abs=0.1)
        # Along its singular vectors one entry of a hundred would be nearly all of it.
        assert held_by_the_largest(torch.diag(torch.linalg.svdvals(core)))[0] > 0.99


def test_the_axes_depend_on_the_spans_alone():
    """Other factors of the same updates, in another order, with a direction that no update has: the same coordinates."""
    first, second = (steep(rank=5, seed=seed) for seed in (1, 2))
    mix = torch.randn(5, 5, generator=torch.Generator().manual_seed(3))
    other = LoraLayer(
        torch.cat([first.up @ mix, torch.ones(96, 1)], dim=1),
        torch.cat([torch.linalg.solve(mix, first.down), torch.zeros(1, 80)]),
    )
    space, again = core_space([(first, 1.0), (second, 0.5)]), core_space([(second, 0.5), (other, 1.0)])
    assert again.left.shape == space.left.shape == (96, 10)
    torch.testing.assert_close(again.left, space.left, rtol=0, atol=1e-4)
    torch.testing.assert_close(again.right, space.right, rtol=0, atol=1e-4)
    torch.testing.assert_close(again.cores[1], space.cores[0], rtol=0, atol=1e-4)


def test_updates_in_the_same_directions_share_their_axes():
    update = steep(rank=4)
    space = core_space([(update, 1.0), (update, -0.5)])
    assert [tuple(core.shape) for core in space.cores] == [(4, 4)] * 2
    torch.testing.assert_close(space.cores[1], -0.5 * space.cores[0], rtol=0, atol=1e-6)


@pytest.mark.parametrize("power", [-30, -10, 10, 30])
def test_the_size_of_the_updates_changes_no_axis_and_no_rank(power):
    """With directions that no update has among the factors', which are left over from rounding."""
    update = steep(rank=4)
    doubled = LoraLayer(torch.cat([update.up, update.up], 1), torch.cat([update.down, update.down]))
    space, other = (core_space([(doubled, 2.0**by), (steep(rank=3, seed=1), 2.0**by)]) for by in (0, power))
    assert other.left.shape == space.left.shape == (96, 7)
    assert space.layer(space.cores[0]).rank == other.layer(other.cores[0]).rank == 4
    torch.testing.assert_close(other.left, space.left, rtol=0, atol=1e-5)
    torch.testing.assert_close(other.right, space.right, rtol=0, atol=1e-5)
    torch.testing.assert_close(other.cores[0] / 2.0**power, space.cores[0], rtol=0, atol=1e-5)


@pytest.mark.parametrize("second", [0.0, 1e-3])
def test_a_weak_direction_has_its_axis_and_what_rounding_has_left_none(second):
    strong, weak = layer(rank=1, seed=1), layer(rank=1, seed=2)
    factors = (torch.cat([strong.up, second * weak.up], 1), torch.cat([strong.down, weak.down]))
    doubled = LoraLayer(*(torch.cat([one, one], dim) for one, dim in zip(factors, (1, 0), strict=True)))
    for terms in ([(doubled, 1.0)], [(strong, 1.0), (doubled, 0.5)]):
        space = core_space(terms)
        assert space.left.shape[1] == space.right.shape[0] == (2 if second else 1)
    assert core_space([(strong, 1.0)]).cores[0].shape == (1, 1)


def test_updates_that_are_zero_have_a_space_too():
    nothing = LoraLayer(torch.zeros(6, 2), torch.ones(2, 5))
    space = core_space([(nothing, 1.0), (steep(6, 5, 2), 0.0)])
    assert [core.tolist() for core in space.cores] == [[[0.0]], [[0.0]]]
    assert not space.layer(space.cores[0]).delta().any()


def test_the_layer_of_a_core_is_that_core_and_its_rank_is_the_cores_own():
    space = core_space(TERMS)
    total = sum(space.cores)
    built = space.layer(total)
    assert built.rank == 13
    torch.testing.assert_close(built.delta(), full(space, total), rtol=0, atol=1e-4)
    assert space.layer(space.cores[0]).rank == 4
    assert space.layer(torch.zeros_like(total)).rank == 1
    best = torch.linalg.svdvals(total)[5:].norm()
    assert (space.layer(total, rank=5).delta() - full(space, total)).norm().item() == pytest.approx(
        best.item(), rel=1e-4
    )


def test_a_method_on_entries_does_not_depend_on_order_or_factors():
    """TIES in the core space: reordered inputs, and factors rescaled against each other, give the same update."""

    def merged(terms):
        space = core_space(terms)
        return full(space, disjoint(space.cores, mean=True))

    first, second, third = TERMS
    rescaled = LoraLayer(first[0].up * 10, first[0].down / 10, alpha=first[0].alpha)
    torch.testing.assert_close(merged([third, second, first]), merged(TERMS), rtol=0, atol=1e-3)
    torch.testing.assert_close(merged([(rescaled, 0.8), second, third]), merged(TERMS), rtol=0, atol=1e-3)


def test_methods_of_norms_and_angles_are_those_of_the_full_matrices():
    space = core_space(TERMS[:2])
    deltas = [strength * update.delta() for update, strength in TERMS[:2]]
    torch.testing.assert_close(full(space, slerp(*space.cores, 0.3)), slerp(*deltas, 0.3), rtol=0, atol=1e-4)


def test_tsv_merge_in_the_core_is_that_of_the_full_matrices():
    space = core_space(TERMS)
    theirs = orthogonalised([strength * update.delta() for update, strength in TERMS])
    torch.testing.assert_close(full(space, orthogonalised(space.cores)), theirs, rtol=0, atol=1e-3)


# ---- protection


def test_mu_zero_leaves_every_term_as_it_is():
    assert stepping_aside(TERMS, 1, 0.0) == TERMS


@pytest.mark.parametrize("kernel", [(), (3, 3)])
def test_the_others_lose_half_along_the_protected_directions_at_mu_one(kernel):
    terms = [(layer(seed=1, kernel=kernel), 0.8), (layer(rank=6, seed=2, kernel=kernel), 1.0)]
    aside = stepping_aside(terms, 1, 1.0, energy=1.0)
    assert aside[1] == terms[1]
    before, after = (t[0][0].delta().reshape(24, -1) for t in (terms, aside))
    _, _, vh = torch.linalg.svd(terms[1][0].delta().reshape(24, -1), full_matrices=False)
    v = vh[:6]
    torch.testing.assert_close(after @ v.T, 0.5 * before @ v.T, rtol=0, atol=1e-4)
    rest = torch.eye(v.shape[1]) - v.T @ v
    torch.testing.assert_close(after @ rest, before @ rest, rtol=0, atol=1e-4)
    assert aside[0][1] == 0.8
    assert aside[0][0].rank == terms[0][0].rank
    assert (aside[0][0].up.shape, aside[0][0].down.shape) == (terms[0][0].up.shape, terms[0][0].down.shape)


def test_a_large_mu_clears_the_protected_directions():
    aside = stepping_aside(TERMS[:2], 1, 1e9, energy=1.0)
    directions = leading_inputs(TERMS[1][0].factors(), 1.0)
    assert (aside[0][0].delta() @ directions.T).abs().max() < 1e-4


@pytest.mark.parametrize("kernel", [(), (3, 3)])
@pytest.mark.parametrize("mu", [0.0, 0.3, 1.0, 4.0])
def test_whole_updates_step_aside_as_their_factors_do(mu, kernel):
    terms = [(layer(seed=seed, kernel=kernel), 1.0) for seed in (1, 2, 3)]
    whole = dense_stepping_aside([update.delta() for update, _ in terms], 1, mu)
    for (update, _), moved in zip(stepping_aside(terms, 1, mu), whole, strict=True):
        torch.testing.assert_close(moved, update.delta(), rtol=0, atol=1e-4)


def test_energy_chooses_as_few_directions_as_hold_it():
    update = LoraLayer(torch.eye(5, 3), torch.diag(torch.tensor([3.0, 2.0, 1.0])))  # energies 9, 4, 1 of 14
    factors = update.factors()
    assert [len(leading_inputs(factors, energy)) for energy in (0.5, 9 / 14, 0.65, 13 / 14, 0.99, 1.0)] == [
        1,
        1,
        2,
        2,
        3,
        3,
    ]
    torch.testing.assert_close(leading_inputs(factors, 0.5).abs(), torch.tensor([[1.0, 0.0, 0.0]]))


NOTHING = {
    "strength": (TERMS[1][0], 0.0),
    "alpha": (layer(rank=6, seed=2, alpha=0.0), 1.0),
    "up": (LoraLayer(torch.zeros(24, 6), TERMS[1][0].down), 1.0),
    "down": (LoraLayer(TERMS[1][0].up, torch.zeros(6, 20)), 1.0),
}


@pytest.mark.parametrize("zero", NOTHING)
def test_a_protected_update_of_zeros_asks_for_no_room(zero):
    """As modules that were never trained are: their ups are zeros, and their downs would still point somewhere."""
    terms = [TERMS[0], NOTHING[zero], TERMS[2]]
    whole = [strength * update.delta() for update, strength in terms]
    for (update, strength), moved in zip(stepping_aside(terms, 1, 1.0), whole, strict=True):
        assert torch.equal(strength * update.delta(), moved)
    assert all(map(torch.equal, dense_stepping_aside(whole, 1, 1.0), whole))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((-1.0,), "mu is -1"),
        ((float("nan"),), "mu is nan"),
        ((1.0, 0.0), "energy is 0"),
        ((1.0, 1.5), "energy is 1.5"),
        ((1.0, float("nan")), "energy is nan"),
    ],
)
def test_protection_out_of_range_is_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        stepping_aside(TERMS, 0, *arguments)


@pytest.mark.parametrize("size", [2, 5])
def test_the_axes_of_all_directions_are_the_same_for_everybody_and_for_ever(size):
    """Where the spans are the whole space, the axes are the polar factors of torch's first normal numbers from seed 0."""
    g = torch.Generator().manual_seed(7)
    up, down = torch.randn(size, size, generator=g), torch.randn(size, size, generator=g)
    space = core_space([(LoraLayer(up, down), 1.0)])
    draws = torch.Generator().manual_seed(0)
    for axes in (space.left, space.right.T):
        u, _, vh = torch.linalg.svd(torch.randn(size, size, generator=draws))
        torch.testing.assert_close(axes, u @ vh, rtol=0, atol=1e-4)
