"""Ranks over modules: the best error for a size, and the smallest size for an aim."""

import itertools

import pytest
import torch

from lcm_kit.lora_merge import LoraLayer
from lcm_kit.lora_merge.algebra.lowrank import directions
from lcm_kit.lora_merge.algebra.ranks import alike, allocate
from lcm_kit.tests.lora_merge.make import factors


def found(seed, out, inside, ranks=(4, 3), strengths=(1.0, 0.5)):
    layers = [LoraLayer(*factors(out, rank, inside, seed=seed + i)) for i, rank in enumerate(ranks)]
    return directions(list(zip(layers, strengths, strict=True)))


MODULES = {"small": found(1, 10, 8), "wide": found(5, 10, 60), "strong": found(9, 12, 12, strengths=(4.0, 1.0))}
PROSPECTS = {name: module.prospect() for name, module in MODULES.items()}
FULL = dict.fromkeys(PROSPECTS, 7)


def energy_kept(ranks):
    return sum(float(PROSPECTS[name].kept[0, rank]) for name, rank in ranks.items())


def size(ranks):
    return sum(PROSPECTS[name].cost * rank for name, rank in ranks.items())


@pytest.mark.parametrize("budget", [130, 200, 300, 500, 700])
def test_no_other_ranks_of_that_size_or_less_keep_more(budget):
    """Against every choice there is. The greedy order may leave one rank's room unused, hence the allowance."""
    ranks = allocate(PROSPECTS, parameters=budget)
    assert size(ranks) <= budget
    choices = (dict(zip(PROSPECTS, choice, strict=True)) for choice in itertools.product(range(1, 8), repeat=3))
    reached = [energy_kept(choice) for choice in choices if size(choice) <= size(ranks)]
    largest_gain = max(float(p.kept[0].diff().max()) for p in PROSPECTS.values())
    assert energy_kept(ranks) >= max(reached) - 0.05 * largest_gain


@pytest.mark.parametrize("rank", [1, 2, 4, 6, 7])
def test_at_the_size_of_a_common_rank_the_error_is_not_larger(rank):
    uniform = dict.fromkeys(PROSPECTS, rank)
    assert energy_kept(allocate(PROSPECTS, parameters=size(uniform))) >= energy_kept(uniform) * (1 - 1e-9)


def test_a_size_is_used_to_its_last_number():
    """112 numbers are one rank in each module; then the next rank in order, for what it costs."""
    ones = dict.fromkeys(PROSPECTS, 1)
    assert allocate(PROSPECTS, parameters=112) == ones
    (first,) = [
        name
        for name, rank in allocate(PROSPECTS, keep=1e-9 + energy_kept(ones) / energy_kept(FULL)).items()
        if rank > 1
    ]
    assert allocate(PROSPECTS, parameters=112 + PROSPECTS[first].cost) == ones | {first: 2}
    assert allocate(PROSPECTS, parameters=112 + PROSPECTS[first].cost - 1)[first] == 1
    assert allocate(PROSPECTS, parameters=size(FULL)) == FULL
    assert allocate(PROSPECTS, parameters=size(FULL) - 1) != FULL


@pytest.mark.parametrize("keep", [*(n / 40 for n in range(1, 40)), 0.9999, 1.0])
def test_the_ranks_for_an_aim_are_the_first_in_their_order_that_reach_it(keep):
    """Handed out one after the other, as sizes would have it: one fewer does not reach it. A module of rank 1 has no part."""
    prospects = {f"{rank}": found(rank, 9, 7 + rank, (rank,), (1.0,)).prospect() for rank in (1, 4, 6)}
    whole = sum(float(one.kept[0, -1]) for one in prospects.values())

    def kept(ranks):
        return sum(float(prospects[name].kept[0, rank]) for name, rank in ranks.items())

    sizes = sorted({sum(p.cost for p in prospects.values()) + extra for extra in range(0, 120)})
    chain = [ranks for room in sizes for ranks in [allocate(prospects, parameters=room)]]
    found_ranks = allocate(prospects, keep=keep)
    assert kept(found_ranks) >= keep * whole * (1 - 1e-8)
    assert found_ranks["1"] == 1
    fewer = [ranks for ranks in chain if sum(ranks.values()) < sum(found_ranks.values())]
    assert all(kept(ranks) < keep * whole for ranks in fewer)


@pytest.mark.parametrize("keep", [0.1, 0.5, 0.9, 0.99])
def test_the_energy_aim_is_reached_and_one_rank_less_misses_it(keep):
    ranks = allocate(PROSPECTS, keep=keep)
    whole = energy_kept(FULL)
    assert energy_kept(ranks) >= keep * whole * (1 - 1e-6)
    smaller = [ranks | {name: rank - 1} for name, rank in ranks.items() if rank > 1]
    assert not smaller or min(energy_kept(choice) for choice in smaller) < keep * whole


@pytest.mark.parametrize("retain", [0.3, 0.7, 0.95])
def test_every_source_retains_its_share(retain):
    ranks = allocate(PROSPECTS, retain=retain)
    for source in (1, 2):
        kept = sum(float(PROSPECTS[name].kept[source, rank]) for name, rank in ranks.items())
        assert kept >= retain * sum(float(p.kept[source, -1]) for p in PROSPECTS.values()) * (1 - 1e-6)
    assert size(ranks) < size(FULL)


@pytest.mark.parametrize("aim", ["keep", "retain"])
def test_everything_is_kept_at_one(aim):
    assert energy_kept(allocate(PROSPECTS, **{aim: 1.0})) == pytest.approx(energy_kept(FULL), rel=1e-6)


def test_no_modules_need_no_ranks():
    assert allocate({}, keep=0.5) == alike({}) == {}


@pytest.mark.parametrize(
    ("aims", "message"),
    [
        ({}, "exactly one of keep, retain and parameters; there are 0"),
        ({"keep": 0.5, "parameters": 9}, "there are 2"),
        ({"keep": 0.0}, "keep is 0.0; it is a share"),
        ({"retain": 1.5}, "retain is 1.5; it is a share"),
        ({"parameters": 111}, r"allows 111 numbers, but one rank in each of the 3 modules takes 112 \(0.0 MB"),
    ],
)
def test_aims_that_cannot_be_met_are_refused(aims, message):
    with pytest.raises(ValueError, match=message):
        allocate(PROSPECTS, **aims)


def test_ranks_do_not_depend_on_threads():
    before = torch.get_num_threads()
    try:
        results = []
        for threads in (1, 2):
            torch.set_num_threads(threads)
            results.append(allocate({name: module.prospect() for name, module in MODULES.items()}, keep=0.8))
    finally:
        torch.set_num_threads(before)
    assert results[0] == results[1]


def test_of_equal_spectra_the_cheaper_module_gets_its_ranks_first():
    """The same update, in the second module between ten times as many inputs: a rank is worth the same and costs more."""
    up, down = factors(12, 4, 12, seed=40)
    padded = torch.cat([down, torch.zeros(4, 108)], dim=1)
    narrow, wide = (directions([(LoraLayer(up, one), 1.0)]).prospect() for one in (down, padded))
    torch.testing.assert_close(narrow.kept, wide.kept)
    # Room for the narrow one's four ranks, or for a second one of the wide module.
    budget = wide.cost + 4 * narrow.cost + wide.cost - 1
    assert allocate({"wide": wide, "narrow": narrow}, parameters=budget) == {"wide": 1, "narrow": 4}


def test_each_source_has_one_whole_to_share_out_over_all_ranks_of_all_modules():
    shared_out = alike(PROSPECTS)
    assert {name: tuple(p.priority.shape) for name, p in shared_out.items()} == {name: (7,) for name in PROSPECTS}
    assert sum(float(p.priority.sum()) for p in shared_out.values()) == pytest.approx(2)


@pytest.mark.parametrize("share", [0.3, 0.7, 0.95, 1.0])
def test_what_a_lone_source_retains_is_what_the_sum_keeps(share):
    alone = {str(seed): found(seed, 10, 8, (5,), (1.0,)).prospect() for seed in range(3)}
    assert allocate(alone, retain=share) == allocate(alone, keep=share)
