"""Merge methods against slow versions written from the papers, on whole updates; and in the core space."""

import math
import re

import peft
import pytest
import torch
from peft.utils import merge_utils

from lcm_kit.lora_merge import METHODS, Lora, merge, merge_with_account
from lcm_kit.lora_merge.algebra.core_space import core_space
from lcm_kit.lora_merge.merging.report import warnings_of
from lcm_kit.lora_merge.methods.table import Situation
from lcm_kit.tests.lora_merge.make import dense, factors, generator, kohya, relative

HERE, THERE = "lora_unet_input_blocks_1_1_proj_in", "lora_unet_middle_block_1_proj_in"
WIDE = "lora_unet_input_blocks_1_0_in_layers_2"
SHAPES = {HERE: (16, 12, ()), WIDE: (10, 6, (3, 3))}
STRENGTHS = (0.8, 1.0, -0.5)


def lora(seed, rank, alpha=None, shapes=SHAPES):
    state = {}
    for number, (module, (out, inputs, kernel)) in enumerate(shapes.items()):
        state |= kohya(module, *factors(out, rank, inputs, kernel, seed=100 * seed + number), alpha)
    return Lora.from_state_dict(state, source=f"lora {seed}")


LORAS = [lora(1, 3, 1.0), lora(2, 4), lora(3, 2, 5.0)]
INPUTS = list(zip(LORAS, STRENGTHS, strict=True))


def weighted(module, inputs=INPUTS):
    """strength * delta of each input, float64, (out, in * kernel)."""
    return [s * dense(one.modules[module].up, one.modules[module].down, one.modules[module].scale).flatten(1)
            for one, s in inputs]  # fmt: skip


def draws(module, index, shape, seed=0):
    """The uniform numbers that input `index` gets: a CPU generator seeded by what the docstring of Situation says."""
    situation = Situation(strengths=(1.0,) * 3, inputs=(0, 1, 2), values={}, module=module, seed=seed)
    return torch.rand(shape, generator=situation.generator(index))


# ---- the papers, entry by entry


def entries_kept(delta, share):
    """Flat numbers of the round(share * n) largest entries."""
    flat = [abs(value) for value in delta.flatten().tolist()]
    return sorted(range(len(flat)), key=lambda i: (-flat[i], i))[: round(share * len(flat))]


def trim(delta, share):
    result = torch.zeros_like(delta).flatten()
    for i in entries_kept(delta, share):
        result[i] = delta.flatten()[i]
    return result.reshape(delta.shape)


def elect_and(deltas, mean):
    """At each place: the sign of the sum, then mean or sum of the entries that have it."""
    result = torch.zeros_like(deltas[0]).flatten()
    for i, values in enumerate(zip(*[delta.flatten().tolist() for delta in deltas], strict=True)):
        total = sum(values)
        winners = [value for value in values if value * total > 0]
        if winners:
            result[i] = sum(winners) / (len(winners) if mean else 1)
    return result.reshape(deltas[0].shape)


def ties(deltas, module, density):
    return elect_and([trim(delta, density) for delta in deltas], mean=True)


def magnitude(deltas, module, density):
    return sum(trim(delta, density) for delta in deltas)


def dropped(deltas, module, density):
    if density == 0:
        return [torch.zeros_like(delta) for delta in deltas]
    return [
        torch.where(draws(module, i, delta.shape) < density, delta / density, 0.0) for i, delta in enumerate(deltas)
    ]


def dare(deltas, module, density):
    return sum(dropped(deltas, module, density))


def dare_ties(deltas, module, density):
    return elect_and(dropped(deltas, module, density), mean=False)


def dropped_by_size(deltas, module, density, spread=0.3):
    result = []
    for number, delta in enumerate(deltas):
        u, kept = draws(module, number, delta.shape), torch.zeros_like(delta)
        for row in range(delta.shape[0]):
            order = sorted(range(delta.shape[1]), key=lambda i: abs(float(delta[row, i])))
            for place, i in enumerate(order):
                chance = density + spread * (place / (len(order) - 1) - 0.5)
                chance = density if density in (0, 1) else min(1.0, max(0.0, chance))
                if float(u[row, i]) < chance:
                    kept[row, i] = delta[row, i] / chance
        result.append(kept)
    return result


def della(deltas, module, density):
    return sum(dropped_by_size(deltas, module, density))


def della_ties(deltas, module, density):
    return elect_and(dropped_by_size(deltas, module, density), mean=False)


def breadcrumbs(deltas, module, density, outliers=0.01):
    if density == 1:
        return sum(deltas)
    total = 0
    for delta in deltas:
        cut = round(outliers * delta.numel())
        order = entries_kept(delta, 1.0)[cut : cut + round(density * delta.numel())]
        kept = torch.zeros_like(delta).flatten()
        kept[order] = delta.flatten()[order]
        total = total + kept.reshape(delta.shape)
    return total


PAPERS = {f.__name__: f for f in (ties, magnitude, dare, dare_ties, della, della_ties, breadcrumbs)}


@pytest.mark.parametrize("density", [0.0, 0.4, None, 1.0])
@pytest.mark.parametrize("method", PAPERS)
def test_on_whole_updates_each_method_is_its_paper(method, density):
    if method.startswith("della") and density is None:
        # The order of two entries of a row that float32 cannot tell apart would change which of them is kept.
        assert len({round(float(v), 9) for v in weighted(HERE)[0].flatten()}) == weighted(HERE)[0].numel()
    merged = merge(INPUTS, method=method, density=density, dense=True)
    value = METHODS[method].parameters["density"].default if density is None else density
    for module in SHAPES:
        wanted = PAPERS[method](weighted(module), module, value)
        got = merged.delta(module).double().flatten(1)
        assert (got - wanted).abs().max() < 1e-5 * max(1.0, float(wanted.abs().max()))


def test_defaults_are_those_of_the_table():
    defaults = {
        name: {key: parameter.default for key, parameter in method.parameters.items()}
        for name, method in METHODS.items()
    }
    assert defaults == {
        "linear": {},
        "average": {},
        "ties": {"density": 0.2},
        "dare": {"density": 0.9},
        "dare_ties": {"density": 0.9},
        "della": {"density": 0.9, "spread": 0.3},
        "della_ties": {"density": 0.9, "spread": 0.3},
        "magnitude": {"density": 0.5},
        "breadcrumbs": {"density": 0.9, "outliers": 0.01},
        "slerp": {},
        "tsv": {},
    }


# ---- PEFT's functions on dense tensors, where the definitions agree


# PEFT rounds density * n down: densities that make it whole for both shapes.
@pytest.mark.parametrize("density", [0.25, 0.5])
@pytest.mark.parametrize(("method", "theirs"), [("magnitude", merge_utils.magnitude_prune), ("ties", merge_utils.ties)])
def test_agreement_with_peft(method, theirs, density):
    shapes = {HERE: (16, 12, ()), WIDE: (8, 4, (3, 3))}
    # PEFT elects signs before it multiplies by the strengths; with one strength for all it is the same.
    inputs = [(lora(seed, 3, shapes=shapes), 0.7) for seed in (1, 2, 3)]
    merged = merge(inputs, method=method, density=density, dense=True)
    for module in shapes:
        deltas = [delta.float() for delta in weighted(module, [(one, 1.0) for one, _ in inputs])]
        wanted = theirs(deltas, torch.full((3,), 0.7), density)
        torch.testing.assert_close(merged.delta(module).flatten(1), wanted, rtol=0, atol=1e-5)


def test_agreement_with_peft_on_dare(monkeypatch):
    # The same entries dropped: its bernoulli gets our draws.
    module, numbers = HERE, iter(range(3))
    monkeypatch.setattr(
        torch, "bernoulli", lambda chances: (draws(module, next(numbers), chances.shape) < chances).to(chances.dtype)
    )
    wanted = merge_utils.dare_linear([delta.float() for delta in weighted(module)], torch.ones(3), 0.5)
    merged = merge(INPUTS, method="dare", density=0.5, dense=True)
    torch.testing.assert_close(merged.delta(module), wanted, rtol=0, atol=1e-5)


# ---- in the core space


@pytest.mark.parametrize("density", [0.0, 0.4, None, 1.0])
@pytest.mark.parametrize("method", PAPERS)
def test_in_the_core_space_each_method_is_its_paper_on_the_coordinates(method, density):
    merged = merge(INPUTS, method=method, density=density)
    value = METHODS[method].parameters["density"].default if density is None else density
    for module in SHAPES:
        space = core_space([(one.modules[module], strength) for one, strength in INPUTS])
        wanted = space.left @ PAPERS[method](space.cores, module, value).float() @ space.right
        got = merged.delta(module).flatten(1)
        assert (got - wanted).abs().max() < 1e-5 * max(1.0, float(wanted.abs().max()))


def steep(seed, modules=6, size=96, rank=16):
    """A LoRA whose updates have their energy in a few directions, as trained ones."""
    state, g = {}, generator(seed)
    for number in range(modules):
        up = torch.linalg.qr(torch.randn(size, rank, generator=g))[0] * 0.7 ** torch.arange(rank)
        state |= kohya(f"lora_unet_block_{number}", up, torch.linalg.qr(torch.randn(size, rank, generator=g))[0].T)
    return Lora.from_state_dict(state)


@pytest.mark.parametrize("dense", [False, True])
@pytest.mark.parametrize("method", METHODS)
def test_no_default_removes_an_update_or_does_nothing(method, dense):
    inputs = [(steep(1), 0.8), (steep(2), 1.0)]
    merged, account = merge_with_account(inputs, method=method, dense=dense)
    assert all(0.5 < source.effect < 1.5 for source in account.sources)
    if method != "linear":
        total = merge(inputs)
        ours, plain = (torch.cat([one.delta(m).flatten() for m in total.modules]) for one in (merged, total))
        assert relative(ours, plain) > 0.05


@pytest.mark.parametrize("method", PAPERS)
def test_in_the_core_space_a_method_leaves_as_much_as_on_whole_weights(method):
    inputs = [(steep(1), 0.8), (steep(2), 1.0)]
    core, whole = (
        [source.effect for source in merge_with_account(inputs, method=method, dense=dense)[1].sources]
        for dense in (False, True)
    )
    assert core == pytest.approx(whole, abs=0.1)


@pytest.mark.parametrize("method", [name for name, row in METHODS.items() if not (row.exact_inputs or row.averages)])
def test_a_density_of_one_without_election_is_the_sum(method):
    merged = merge(INPUTS, method=method, density=1.0)
    if method in ("linear", "dare", "della", "magnitude", "breadcrumbs"):
        for module in SHAPES:
            assert relative(merged.delta(module).flatten(1), sum(weighted(module))) < 1e-5
    assert all(layer.rank <= 9 for layer in merged.modules.values())


@pytest.mark.parametrize("method", [name for name, method in METHODS.items() if "density" in method.parameters])
def test_a_density_of_zero_is_nothing(method):
    merged = merge(INPUTS, method=method, density=0.0)
    assert all(not merged.delta(module).any() for module in SHAPES)


@pytest.mark.parametrize("method", METHODS)
def test_the_result_of_each_method_does_not_depend_on_the_factors(method):
    """The same update split otherwise gives the same merge, in the core space too: methods work on updates."""
    state = LORAS[0].to_state_dict()
    other = Lora.from_state_dict(
        {key: value * (4 if "up" in key else 0.25 if "down" in key else 1) for key, value in state.items()}
    )
    first = merge([(LORAS[0], 0.8), (LORAS[1], 1.0)], method=method, seed=3)
    second = merge([(other, 0.8), (LORAS[1], 1.0)], method=method, seed=3)
    for module in SHAPES:
        torch.testing.assert_close(first.delta(module), second.delta(module), rtol=0, atol=1e-5)


@pytest.mark.parametrize("method", METHODS)
def test_one_lora_with_nothing_to_prune_is_itself(method):
    if METHODS[method].exact_inputs or METHODS[method].averages:
        return
    merged = merge([(LORAS[0], -0.5)], method=method, density=1.0)
    for module in SHAPES:
        assert relative(merged.delta(module).flatten(1), weighted(module, [(LORAS[0], -0.5)])[0]) < 1e-5


def test_dare_keeps_the_expectation():
    """The mean over many seeds is the sum: the rescale is 1 / density."""
    runs = 150
    mean = sum(merge(INPUTS[:2], method="dare", density=0.5, seed=seed).delta(HERE) for seed in range(runs)) / runs
    wanted = sum(weighted(HERE, INPUTS[:2]))
    # Each entry of a core has variance (1 / 0.5 - 1) * value^2; the mean of 150 runs has 1 / sqrt(150) of that deviation.
    spread = math.sqrt(sum(float(delta.square().sum()) for delta in weighted(HERE, INPUTS[:2])) / runs)
    assert float((mean.double() - wanted).norm()) < 1.5 * spread


def test_seeds_differ_and_draws_depend_on_the_module_and_the_input_only():
    def update(inputs, seed=0):
        return merge(inputs, method="dare", density=0.5, seed=seed).delta(HERE)

    assert torch.equal(update(INPUTS), update(INPUTS))
    assert not torch.allclose(update(INPUTS, 0), update(INPUTS, 1))
    # Modules in another order, and one more of them, change nothing for this one.
    backwards = [(lora(n, rank, alpha, dict(reversed([*SHAPES.items(), (THERE, (5, 5, ()))]))), s)
                 for (n, rank, alpha), s in zip(((1, 3, 1.0), (2, 4, None), (3, 2, 5.0)), STRENGTHS, strict=True)]  # fmt: skip
    same = [(Lora({HERE: one.modules[HERE]}), s) for one, s in INPUTS]
    mixed = [(Lora({**other.modules, HERE: one.modules[HERE]}), s) for (one, s), (other, _) in zip(INPUTS, backwards, strict=True)]  # fmt: skip
    assert torch.equal(update(same), update(INPUTS))
    assert torch.equal(update(mixed), update(INPUTS))
    draws_of = {float(draws(module, index, (1,))) for module in (HERE, WIDE) for index in range(3)}
    assert len(draws_of) == 6
    before = torch.random.get_rng_state()
    update(INPUTS)
    assert torch.equal(before, torch.random.get_rng_state())


# ---- SLERP and TSV-M


def arc(first, second, t):
    """Shoemake's formula."""
    a, b = first.flatten(), second.flatten()
    angle = math.acos(float(a @ b / (a.norm() * b.norm())))
    return (math.sin((1 - t) * angle) * first + math.sin(t * angle) * second) / math.sin(angle)


def test_slerp_is_the_arc_between_the_two_at_the_ratio_of_the_strengths():
    inputs = [(LORAS[0], 0.5), (LORAS[1], 1.5)]
    merged = merge(inputs, method="slerp")
    for module in SHAPES:
        first, second = weighted(module, [(LORAS[0], 1.0), (LORAS[1], 1.0)])
        assert relative(merged.delta(module).flatten(1), 2.0 * arc(first, second, 0.75)) < 1e-5


@pytest.mark.parametrize("strengths", [(0.0, 0.7), (0.7, 0.0)])
def test_slerp_at_its_ends_is_one_of_the_two(strengths):
    merged = merge(list(zip(LORAS, strengths, strict=False)), method="slerp")
    for module in SHAPES:
        wanted = sum(weighted(module, list(zip(LORAS, strengths, strict=False))))
        assert relative(merged.delta(module).flatten(1), wanted) < 1e-5


def test_a_module_of_one_lora_alone_stays_as_it_is_in_slerp_and_tsv():
    one = lora(5, 3, shapes={HERE: (16, 12, ()), THERE: (5, 5, ())})
    for method in ("slerp", "tsv"):
        merged = merge([(one, 0.6), (LORAS[1], 1.0)], method=method)
        assert relative(merged.delta(THERE), weighted(THERE, [(one, 0.6)])[0]) < 1e-6
        assert relative(merged.delta(WIDE).flatten(1), weighted(WIDE, [(LORAS[1], 1.0)])[0]) < 1e-6


def test_tsv_keeps_orthogonal_updates_and_their_singular_values():
    eye = torch.eye(8)
    state = [kohya(HERE, eye[:, a:b], eye[a:b], None) for a, b in ((0, 2), (3, 6))]
    inputs = [(Lora.from_state_dict(one), strength) for one, strength in zip(state, (2.0, -1.0), strict=True)]
    wanted = 2 * eye[:, :2] @ eye[:2] - eye[:, 3:6] @ eye[3:6]
    torch.testing.assert_close(merge(inputs, method="tsv").delta(HERE), wanted, rtol=0, atol=1e-5)
    # Equal updates would fall on one direction in the sum; TSV-M keeps two, each of its own size.
    g = generator(1)
    same = Lora.from_state_dict(kohya(HERE, torch.randn(8, 1, generator=g), torch.randn(1, 8, generator=g)))
    size = float(same.delta(HERE).norm())
    values = torch.linalg.svdvals(merge([(same, 1.0), (same, 1.0)], method="tsv").delta(HERE))
    assert float(values.sum()) <= 2 * size * (1 + 1e-4)


# ---- what they say


def warnings(**options):
    return warnings_of(merge_with_account([(steep(1), 0.8), (steep(2), 1.0)], protect=None, **options)[1])


@pytest.mark.parametrize("dense", [False, True])
@pytest.mark.parametrize("method", METHODS)
def test_defaults_warn_of_nothing(method, dense):
    assert warnings(method=method, dense=dense) == ()


@pytest.mark.parametrize("method", PAPERS)
def test_what_loses_half_of_a_lora_says_so(method):
    notes = warnings(method=method, density=0.0)
    assert len(notes) == 2
    assert all(f"method {method} leaves about 0 % of " in note and "higher density" in note for note in notes)


def test_a_method_that_prunes_nothing_says_so():
    sums = [name for name in PAPERS if warnings(method=name, density=1.0)]
    assert sums == ["magnitude", "dare", "della", "breadcrumbs"]
    assert "density is 1, at which method dare prunes nothing" in warnings(method="dare", density=1.0)[0]


def test_a_cut_that_loses_half_of_a_lora_says_so():
    weak, strong = steep(1), steep(2)
    notes = warnings_of(merge_with_account([(weak, 0.1), (strong, 1.0)], rank=4, protect=None)[1])
    assert len(notes) == 1
    assert re.match(r"the cut leaves [0-4]?\d % of the energy of ", notes[0])
    assert warnings_of(merge_with_account([(weak, 0.1), (strong, 1.0)], retain=0.9, protect=None)[1]) == ()


def test_the_effect_is_the_fitted_coefficient():
    for method in ("linear", "ties", "magnitude"):
        merged, account = merge_with_account(INPUTS, method=method, density=None if method == "linear" else 0.3)
        flat = [torch.cat([weighted(module)[i].flatten() for module in SHAPES]) for i in range(3)]
        total = torch.cat([merged.delta(module).double().flatten() for module in SHAPES])
        wanted = torch.linalg.lstsq(torch.stack(flat, dim=1), total[:, None]).solution[:, 0]
        assert [source.effect for source in account.sources] == pytest.approx(wanted.tolist(), abs=1e-4)


@pytest.mark.parametrize("method", ["slerp", "tsv", "ties"])
def test_modules_of_one_input_alone_count_in_its_effect(method):
    """Whether the method changes what is alone or leaves it: the coefficients fit all modules together."""
    inputs = [(lora(5, 3, shapes={HERE: (16, 12, ()), THERE: (20, 20, ())}), 0.6), (LORAS[1], 1.0)]
    merged, account = merge_with_account(inputs, method=method)
    flat, total = [[], []], []
    for module in (HERE, THERE, WIDE):
        delta = merged.delta(module).double()
        total.append(delta.flatten())
        for index, (one, strength) in enumerate(inputs):
            has = module in one.modules
            flat[index].append(weighted(module, [(one, strength)])[0].flatten() if has else 0 * total[-1])
    columns = torch.stack([torch.cat(one) for one in flat], dim=1)
    wanted = torch.linalg.lstsq(columns, torch.cat(total)[:, None]).solution[:, 0]
    assert [source.effect for source in account.sources] == pytest.approx(wanted.tolist(), abs=1e-4)


def test_whole_weight_differences_are_merged_by_the_method_and_norms_are_added():
    full = torch.randn(6, 5, generator=generator(1))
    norm = "lora_unet_input_blocks_1_0_in_layers_0"
    first = Lora.from_state_dict(
        {f"{HERE}.diff": full, f"{norm}.w_norm": torch.ones(4), f"{norm}.b_norm": torch.ones(4)}
    )
    second = Lora.from_state_dict(kohya(HERE, *factors(6, 2, 5)) | {f"{norm}.w_norm": torch.ones(4)})
    merged = merge([(first, 1.0), (second, 0.5)], method="ties", density=0.4)
    wanted = ties([full.double(), 0.5 * second.delta(HERE).double()], HERE, 0.4)
    torch.testing.assert_close(merged.delta(HERE).double(), wanted, rtol=0, atol=1e-6)
    state = merged.to_state_dict()
    assert torch.equal(state[f"{norm}.w_norm"], torch.full((4,), 1.5))
    assert torch.equal(state[f"{norm}.b_norm"], torch.ones(4))


def test_the_sum_is_that_of_pefts_cat():
    class Model(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.linear, self.conv = torch.nn.Linear(12, 16, bias=False), torch.nn.Conv2d(6, 10, 3, bias=False)

    names = {"linear": HERE, "conv": WIDE}
    model = None
    for number, one in enumerate(LORAS[:2]):
        layer = one.modules[HERE]
        config = peft.LoraConfig(r=layer.rank, lora_alpha=layer.written_alpha, target_modules=["linear", "conv"])
        if model is None:
            model = peft.get_peft_model(Model(), config, adapter_name="0")
        else:
            model.add_adapter(str(number), config)
        for name, module in names.items():
            target = getattr(model.base_model.model, name)
            target.lora_A[str(number)].weight.data = one.modules[module].down.clone()
            target.lora_B[str(number)].weight.data = one.modules[module].up.clone()
    model.add_weighted_adapter(["0", "1"], [0.8, -0.5], "merged", combination_type="cat")
    merged = merge([(LORAS[0], 0.8), (LORAS[1], -0.5)])
    for name, module in names.items():
        theirs = getattr(model.base_model.model, name).get_delta_weight("merged").detach()
        torch.testing.assert_close(merged.delta(module), theirs, rtol=0, atol=1e-6)


SEVERAL = [
    (name, strengths)
    for name, row in METHODS.items()
    for strengths in ((1.0, 1.0), (1.0, 0.5), (1.0, -0.5), (0.3, 0.3, 0.3))
    if row.combine is not None
    if not row.exact_inputs or (len(strengths) == row.exact_inputs and min(strengths) > 0)
]


@pytest.mark.parametrize(("method", "strengths"), SEVERAL)
def test_a_lora_given_several_times_has_one_effect(method, strengths):
    """Which of them is how strong in the result cannot be told: all have the coefficient of their sum."""
    merged, account = merge_with_account([(LORAS[0], strength) for strength in strengths], method=method, seed=3)
    made, given = (torch.cat([lora.delta(m).flatten() for m in LORAS[0].modules]) for lora in (merged, LORAS[0]))
    wanted = float(made.dot(given) / (sum(strengths) * given.square().sum()))
    # The products are float32's.
    assert [source.effect for source in account.sources] == pytest.approx([wanted] * len(strengths), abs=1e-4)


@pytest.mark.parametrize("method", ["magnitude", "ties", "tsv", "dare"])
def test_effects_of_inputs_that_depend_on_one_another_are_the_smallest_that_fit(method):
    """With a + b beside a and b, (1, 1, -1) changes no fit, so that the smallest coefficients have no part of it."""
    a, b = LORAS[:2]
    inputs = [(a, 1.0), (b, 1.0), (merge([(a, 1.0), (b, 1.0)]), 1.0)]
    effects = [source.effect for source in merge_with_account(inputs, method=method, seed=3)[1].sources]
    assert effects[0] + effects[1] - effects[2] == pytest.approx(0.0, abs=1e-3)
