import math

import pytest
import torch

from lcm_kit.lora_merge import Lora, LoraLayer, merge
from lcm_kit.lora_merge.algebra.lowrank import truncated_sum
from lcm_kit.lora_merge.comparing.compare import _in_order, compare
from lcm_kit.lora_merge.comparing.curve import curve_of
from lcm_kit.lora_merge.comparing.own import own_of
from lcm_kit.lora_merge.comparing.verdict import answer, headline, relation
from lcm_kit.lora_merge.one_module.protect import stepping_aside
from lcm_kit.tests.lora_merge.kinds import ADDITIVE, CARRIED, parts
from lcm_kit.tests.lora_merge.make import dense, factors, generator, kohya

ATTENTION = "lora_unet_input_blocks_1_1_transformer_blocks_0_attn1_to_q"
CONVOLUTION = "lora_unet_output_blocks_5_0_in_layers_2"
TEXT = "lora_te1_text_model_encoder_layers_3_mlp_fc1"
SHAPES = {ATTENTION: (24, 20, ()), CONVOLUTION: (16, 6, (3, 3)), TEXT: (30, 12, ())}


def lora(rank=4, alpha=2.0, seed=0, modules=SHAPES, source="LoRA"):
    tensors = {}
    for number, (name, (out, inputs, kernel)) in enumerate(modules.items()):
        up, down = factors(out, rank, inputs, kernel, seed=100 * seed + number)
        tensors |= kohya(name, up, down, alpha)
    return Lora.from_state_dict(tensors, source=source)


def deltas(one):
    """Module -> (out, in * kernel) in float64, from the definition alone."""
    return {
        name: dense(layer.up, layer.down, layer.alpha / layer.rank).flatten(1) for name, layer in one.modules.items()
    }


def the_pair(found):
    assert len(found.whole.pairs) == 1
    return found.whole.pairs[0]


@pytest.mark.parametrize(("sign", "kind"), [(1.0, "alike"), (-1.0, "oppose")])
def test_a_lora_and_itself_have_cosine_1_and_its_negative_minus_1(sign, kind):
    one = lora()
    found = compare([(one, 0.7), (one, sign * 0.5)])
    pair = the_pair(found)
    assert pair.cosine == pytest.approx(sign, abs=1e-6)
    assert (pair.left.share, pair.right.share) == pytest.approx((1, 1), abs=1e-5)
    assert relation(pair).kind == kind
    assert found.growth() == pytest.approx(abs(0.7 + sign * 0.5) / math.hypot(0.7, 0.5), abs=1e-6)
    assert {block.name for block in found.blocks} == {"te1 layers.3", "unet down.0", "unet up.1"}


def test_orthogonal_loras_have_cosine_0_and_share_nothing():
    eye = torch.eye(12)
    first = Lora({"m": LoraLayer(eye[:, :3].clone(), eye[:3].clone())}, source="a")
    second = Lora({"m": LoraLayer(eye[:, 3:5].clone(), eye[3:5].clone())}, source="b")
    pair = the_pair(compare([(first, 1.0), (second, 1.0)]))
    assert (pair.cosine, pair.left.share, pair.right.share) == pytest.approx((0, 0, 0), abs=1e-6)
    assert pair.left.expected_share == 3 / 12  # max(rank) / width
    assert pair.first_inside.share == pytest.approx(0, abs=1e-6)


@pytest.mark.parametrize("strengths", [(0.8, 1.0), (-1.5, 0.3)])
def test_every_figure_is_that_of_the_whole_updates_in_float64(strengths):
    loras = [lora(rank=5, alpha=3.0, seed=1), lora(rank=3, alpha=8.0, seed=2, modules=dict(list(SHAPES.items())[:2]))]
    found = compare([*zip(loras, strengths, strict=True)])
    first, second = map(deltas, loras)
    for index, (own, strength) in enumerate(zip((first, second), strengths, strict=True)):
        norm = math.sqrt(sum(float((strength * delta).square().sum()) for delta in own.values()))
        assert found.norm(index) == pytest.approx(norm, rel=1e-6)
    weighted = {name: strengths[0] * delta + strengths[1] * second.get(name, 0) for name, delta in first.items()}
    assert math.sqrt(found.whole.energy) == pytest.approx(
        math.sqrt(sum(float(total.square().sum()) for total in weighted.values())), rel=1e-6
    )
    for module in found.modules:
        if module.name not in second:
            assert module.pairs == ()
            continue
        (pair,) = module.pairs
        a, b = strengths[0] * first[module.name], strengths[1] * second[module.name]
        assert pair.cosine == pytest.approx(float((a * b).sum() / a.norm() / b.norm()), abs=1e-6)
        (ua, sa, va), (ub, sb, vb) = (torch.linalg.svd(x, full_matrices=False) for x in (a, b))
        angles = torch.linalg.svdvals(ua[:, :5].T @ ub[:, :3])  # cosines of the principal angles
        assert pair.left.share == pytest.approx(float(angles.square().mean()), abs=1e-5)
        angles = torch.linalg.svdvals(va[:5] @ vb[:3].T)
        assert pair.right.share == pytest.approx(float(angles.square().mean()), abs=1e-5)
        for inside, (x, s, v) in ((pair.first_inside, (a, sb, vb)), (pair.second_inside, (b, sa, va))):
            held = s.square().cumsum(0) / s.square().sum()
            lead = v[: int((held < 0.5).sum()) + 1]
            assert inside.share == pytest.approx(float((x @ lead.T).square().sum() / x.square().sum()), abs=1e-5)
    dot = sum(float((strengths[0] * first[n] * strengths[1] * second[n]).sum()) for n in second)
    assert the_pair(found).cosine == pytest.approx(dot / found.norm(0) / found.norm(1), abs=1e-6)


def test_the_norm_of_the_sum_follows_the_identity_at_any_strength():
    loras = [lora(seed=1), lora(seed=2), lora(seed=3)]
    found = compare([*zip(loras, (0.8, 1.0, -0.4), strict=True)])
    for strength in (-1.0, 0.0, 0.8, 2.5):
        merged = merge([*zip(loras, (strength, 1.0, -0.4), strict=True)])
        norm = math.sqrt(sum(float(layer.delta().double().square().sum()) for layer in merged.modules.values()))
        assert found.norm_at(0, strength) == pytest.approx(norm, rel=1e-5)
    assert found.norm_at(0, 0.8) == pytest.approx(math.sqrt(found.whole.energy), rel=1e-6)


def test_products_are_summed_in_float64():
    """Many modules of which one is 10^5 times as large: float32 would lose the others."""
    modules = {f"lora_unet_layers_{number}_x": (6, 5, ()) for number in range(40)}
    one = lora(rank=2, modules=modules)
    layers = {
        name: LoraLayer(layer.up, layer.down, 2.0 if number else 2e5)
        for number, (name, layer) in enumerate(one.modules.items())
    }
    found = compare([(Lora(layers, source="a"), 1.0), (Lora(layers, source="b"), -0.5)])
    assert found.products[0][0] == pytest.approx(found.whole.energies[0], rel=1e-14)
    assert found.products[0][1] == pytest.approx(found.whole.pairs[0].dot * -1, rel=1e-14)
    largest = max(module.parts[0].energy for module in found.modules)
    rest = sum(sorted(module.parts[0].energy for module in found.modules)[:-1])
    assert found.products[0][0] - largest == pytest.approx(rest, rel=1e-4)


def test_what_is_inside_is_what_full_protection_takes():
    style, lcm = lora(seed=1), lora(rank=8, seed=2)
    pair = the_pair(compare([(style, 1.0), (lcm, 1.0)]))
    left = 0.0
    for name, layer in style.modules.items():
        moved = stepping_aside([(layer, 1.0), (lcm.modules[name], 1.0)], 1, mu=1e6)[0][0]
        left += float(moved.delta().double().square().sum())
    assert 1 - left / pair.first_inside.whole == pytest.approx(pair.first_inside.share, abs=1e-4)  # mu / (1 + mu)


@pytest.mark.parametrize("inputs", [1, 2, 3])
@pytest.mark.parametrize("dense", [False, True])
def test_a_curve_ends_with_the_energies_themselves(inputs, dense):
    """In float64, whichever way they were found: of a LoRA beside others, alone, and of a whole difference."""
    one = lora(seed=1)
    if dense:
        diff = torch.randn(24, 20, generator=generator(5))
        one = Lora.from_state_dict({f"{ATTENTION}.diff": diff, **lora(modules={TEXT: SHAPES[TEXT]}).to_state_dict()})
    found = compare([(one, 0.7), (lora(rank=3, seed=2), -1.3), (lora(rank=5, seed=3), 0.4)][:inputs])
    for index, (part, strength) in enumerate(zip(found.kept[1:], (0.7, -1.3, 0.4), strict=False)):
        assert part[-1] == pytest.approx(strength**2 * found.products[index][index], rel=1e-12)
    assert found.kept[0][-1] == pytest.approx(found.whole.energy, rel=1e-12)
    strengths = (0.7, -1.3, 0.4)[:inputs]
    rows = zip(strengths, found.products, strict=True)
    exact = sum(a * b * product for a, row in rows for b, product in zip(strengths, row, strict=True))
    assert found.whole.energy == pytest.approx(exact, rel=1e-6)


@pytest.mark.parametrize("rank", [1, 3, 6, 8, 99])
def test_a_cut_loses_what_truncated_sum_loses(rank):
    inputs = [(lora(rank=4, seed=1), 0.8), (lora(rank=5, seed=2), 1.0)]
    found = compare(inputs)
    energy = lost = 0.0
    whole, kept = [0.0, 0.0], [0.0, 0.0]
    numbers = 0
    for name in SHAPES:
        cut = truncated_sum([(one.modules[name], strength) for one, strength in inputs], rank)
        energy, lost = energy + cut.energy, lost + cut.lost_energy
        numbers += cut.layer.up.numel() + cut.layer.down.numel()
        for index in (0, 1):
            whole[index] += cut.source_energy[index]
            kept[index] += cut.kept_energy[index]
    assert found.error_at(rank) == pytest.approx(math.sqrt(lost / energy), abs=2e-4)  # the root of float32's rounding
    assert found.retention(0, rank) == pytest.approx(kept[0] / whole[0], abs=1e-5)
    assert found.retention(1, rank) == pytest.approx(kept[1] / whole[1], abs=1e-5)
    assert found.megabytes(rank) == numbers * 2 / 1e6
    assert found.full_rank == 9


@pytest.mark.parametrize("kind", ADDITIVE)
def test_every_additive_kind_is_compared_as_its_whole_update(kind):
    kernel = (3, 3) if ADDITIVE[kind][1] else ()
    one = Lora.from_state_dict({f"m{end}": part for end, part in parts(kind, kernel=kernel).items()})
    found = compare([(one, 1.0), (one, 1.0)])
    assert found.norm(0) == pytest.approx(float(one.delta("m").double().norm()), rel=1e-5)
    assert the_pair(found).cosine == pytest.approx(1, abs=1e-5)


@pytest.mark.parametrize("kind", CARRIED)
def test_what_does_not_add_up_is_counted_not_compared(kind):
    tensors = {f"m{end}": part for end, part in parts(kind).items()} | kohya("other", *factors(5, 2, 6))
    (facts,) = compare([(Lora.from_state_dict(tensors), 1.0)]).inputs
    assert (facts.modules, facts.compared, facts.carried) == (2, 1, ((CARRIED[kind], 1),))


def test_whole_weight_and_norm_differences_count():
    g = generator()
    diff, norm = torch.randn(10, 8, generator=g), torch.randn(7, generator=g)
    one = Lora.from_state_dict({"a.diff": diff, "n.w_norm": norm, "a.diff_b": torch.ones(10)})
    found = compare([(one, 2.0)])
    assert found.norm(0) == pytest.approx(2 * math.sqrt(float(diff.square().sum() + norm.square().sum())), rel=1e-6)
    assert found.inputs[0].biases == 1
    assert found.error_at(1) == 0  # a merge cuts no whole differences
    assert found.megabytes() == (80 + 7) * 2 / 1e6


def test_modules_that_are_zero_deficient_or_alone_are_named():
    up, down = factors(12, 4, 10)
    flat = up.clone()
    flat[:, 3] = flat[:, 0]
    tensors = kohya("zero", torch.zeros_like(up), down) | kohya("deficient", flat, down, 2.0) | kohya("fine", up, down)
    other = Lora.from_state_dict(kohya("fine", *factors(12, 2, 10, seed=5)))
    one, two = compare([(Lora.from_state_dict(tensors), 1.0), (other, 1.0)]).inputs
    assert (one.zero, one.deficient, one.only_here, two.only_here) == (
        ("zero",),
        ("deficient",),
        ("zero", "deficient"),
        (),
    )
    assert one.settings == (("LoRA", 4, None, 1.0, 2), ("LoRA", 4, 2.0, 0.5, 1))
    part = next(
        module.parts[0]
        for module in compare([(Lora.from_state_dict(tensors), 1.0)]).modules
        if module.name == "deficient"
    )
    assert (part.rank, part.effective) == (4, 3)


def thin(rank, effective, out=6, inputs=5, kernel=()):
    """Factors of that rank whose product has a smaller one."""
    up, down = factors(out, rank, inputs, kernel)
    return up[:, [index % effective for index in range(rank)]], down


@pytest.mark.parametrize(
    ("state", "facts"),
    [
        (kohya("m", *factors(6, 4, 5)), ("LoRA", 4, 4, None, 1.0, False)),
        (kohya("m", *thin(4, 3), alpha=2), ("LoRA", 4, 3, 2.0, 0.5, True)),
        (kohya("m", *thin(4, 3, kernel=(3, 3))), ("LoRA", 4, 3, None, 1.0, True)),
        # More ranks than the weight has rows or columns are no fault of the update, of a kernel's columns neither.
        (kohya("m", *factors(4, 6, 9)), ("LoRA", 6, 4, None, 1.0, False)),
        (kohya("m", *factors(9, 6, 4)), ("LoRA", 6, 4, None, 1.0, False)),
        (kohya("m", *factors(40, 12, 1, (3, 3))), ("LoRA", 12, 9, None, 1.0, False)),
        (kohya("m", *thin(6, 3, out=4, inputs=9)), ("LoRA", 6, 3, None, 1.0, True)),
        # Zeros are told as zeros, and of other kinds nobody chose the rank.
        (kohya("m", torch.zeros(6, 4), torch.ones(4, 5)), ("LoRA", 4, 0, None, 1.0, False)),
        ({"m.lokr_w1": torch.ones(2, 2), "m.lokr_w2": torch.eye(3)}, ("LoKr", 6, 3, None, 1.0, False)),
        ({"m.diff": torch.ones(6, 5)}, ("difference", 5, 1, None, 1.0, False)),
        ({"m.diff": torch.randn(4, 2, 3, 3, generator=generator(1))}, ("difference", 4, 4, None, 1.0, False)),
        ({"m.w_norm": torch.ones(7)}, ("difference", 1, 1, None, 1.0, False)),
    ],
)  # fmt: skip
def test_a_part_says_what_its_update_is_and_whether_its_rank_is_smaller_than_somebody_chose(state, facts):
    one = Lora.from_state_dict(state)
    for inputs, index in (([one], 0), ([lora(modules={"n": (3, 3, ())}), one], 1)):
        found = compare([(each, 1.0) for each in inputs])
        part = next(module.parts[index] for module in found.modules if module.name == "m")
        assert (part.kind, part.rank, part.effective, part.alpha, part.scale, part.deficient) == facts
        assert part.energy == pytest.approx(float(one.delta("m").double().square().sum()), rel=1e-5)


@pytest.mark.parametrize("diff", [torch.eye(6, 5), torch.zeros(6, 5)])
def test_beside_a_whole_difference_nobody_chose_the_rank(diff):
    up, down = thin(4, 3)
    both = Lora({"m": LoraLayer(up, down)}, diffs={("m", "diff"): diff})
    (part,) = compare([(both, 1.0)]).modules[0].parts
    assert not part.deficient
    assert part.energy == pytest.approx(float((up @ down + diff).square().sum()), rel=1e-5)


def test_blocks_of_a_comparison_come_in_the_order_of_the_way_through_the_model():
    names = [
        f"lora_unet_{name}"
        for name in ("output_blocks_5_0_in_layers_2", "middle_block_1_proj_in", "input_blocks_1_0_in_layers_2", "input_blocks_0_0")
    ] + [TEXT.replace("layers_3", f"layers_{number}") for number in (10, 9)]  # fmt: skip
    found = compare([(lora(modules=dict.fromkeys(names, (6, 5, ()))), 1.0)])
    wanted = ["te1 layers.9", "te1 layers.10", "unet in", "unet down.0", "unet mid", "unet up.1"]
    assert [block.name for block in found.blocks] == wanted


def test_the_numbers_of_a_whole_weight_are_counted_beyond_what_float32_counts():
    one = own_of(*torch.ones(2, 1, 1, dtype=torch.float64), 0.95, is_triangle=True, alone=True)
    assert curve_of({0: one}, (1.0,), (4097, 4097), 0, True).numbers.tolist() == [4097**2]


@pytest.mark.parametrize("ranks", [(1, 1), (4, 2), (16, 40)])
@pytest.mark.parametrize("shape", [(2, 3), (7, 90), (40, 40), (300, 5), (120, 200)])
def test_independent_loras_are_called_independent_at_any_shape(shape, ranks):
    """Also where narrow layers and high ranks overlap of necessity, or small ones align by chance."""
    rows, columns = shape
    for seed in range(20):
        g = generator(seed)
        pair = [
            Lora({"m": LoraLayer(torch.randn(rows, rank, generator=g), torch.randn(rank, columns, generator=g))})
            for rank in ranks
        ]
        found = compare([(pair[0], 1.0), (pair[1], -2.0)])
        assert relation(the_pair(found)).kind == "independent"


def test_the_expectations_are_the_means_of_independent_loras():
    """And the deviations are theirs: cosine and overlaps of many random pairs."""
    rows, columns, ranks, draws = 30, 24, (6, 4), 300
    figures = []
    for seed in range(draws):
        g = generator(seed)
        pair = [
            Lora({"m": LoraLayer(torch.randn(rows, rank, generator=g), torch.randn(rank, columns, generator=g))})
            for rank in ranks
        ]
        figures.append(the_pair(compare([(one, 1.0) for one in pair], workers=1)))
    for name in ("left", "right"):
        shares = torch.tensor([getattr(one, name).share for one in figures])
        measure = getattr(figures[0], name)
        assert float(shares.mean()) == pytest.approx(measure.expected_share, abs=4 * measure.deviation / draws**0.5)
        assert float(shares.std()) == pytest.approx(measure.deviation, rel=0.2)  # 300 draws tell it to 4 %
    cosines = torch.tensor([one.cosine for one in figures])
    assert abs(float(cosines.mean())) < 4 * figures[0].cosine_deviation / draws**0.5
    assert float(cosines.std()) == pytest.approx(figures[0].cosine_deviation, rel=0.2)
    excesses = torch.tensor([one.second_inside.excess for one in figures])
    assert abs(float(excesses.mean())) < 4 * float(excesses.std()) / draws**0.5
    assert float(excesses.std()) <= figures[0].second_inside.deviation  # assumes rank 1, the most that it can be


def test_a_fight_in_one_block_is_found_there():
    first = lora(rank=4, seed=1)
    second = lora(rank=4, seed=2)
    against = {
        **second.modules,
        CONVOLUTION: LoraLayer(-first.modules[CONVOLUTION].up, first.modules[CONVOLUTION].down, 0.2),
    }
    found = compare([(first, 1.0), (Lora(against, source="b.safetensors"), 1.0)])
    assert relation(the_pair(found)).kind == "independent"
    assert headline(found).startswith("They fight in places")
    assert "unet up.1 (cosine -1.00)" in "\n".join(answer(found))


def test_crowding_is_told_from_cancelling():
    """The second acts on the first's leading inputs and writes elsewhere."""
    g = generator(3)
    down = torch.randn(2, 60, generator=g)
    first = Lora({"m": LoraLayer(torch.randn(50, 2, generator=g), down)}, source="lcm.safetensors")
    second = Lora({"m": LoraLayer(torch.randn(50, 2, generator=g), down + 0.1)}, source="style.safetensors")
    found = compare([(first, 1.0), (second, 1.0)])
    assert relation(the_pair(found)).kind == "crowd"
    assert headline(found).startswith("They do not cancel, but they crowd")


def test_strength_0_and_separate_modules_are_no_fight():
    one, other = lora(seed=1, source="a"), lora(seed=2, source="b", modules={"elsewhere": (5, 5, ())})
    assert "change different modules" in "\n".join(answer(compare([(one, 1.0), (other, 1.0)])))
    silent = compare([(one, 0.0), (lora(seed=2, source="b"), 1.0)])
    assert "a adds nothing" in "\n".join(answer(silent))
    assert silent.retention(0, 2) is None
    assert silent.full_rank == 4  # what has no strength takes no rank


def test_workers_change_nothing_and_the_progress_counts_modules():
    inputs = [(lora(seed=1), 0.8), (lora(seed=2), 1.0)]
    seen = []
    assert compare(inputs, workers=1) == compare(inputs, workers=3, progress=lambda *step: seen.append(step))
    assert seen == [(1, 3), (2, 3), (3, 3)]


def test_stopping_in_the_progress_stops():
    def stop(done, total):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        compare([(lora(), 1.0)], progress=stop)


def test_bad_input_is_refused():
    with pytest.raises(ValueError, match="at least one LoRA"):
        compare([])
    with pytest.raises(ValueError, match=r"strength is nan, but it has to be a finite number"):
        compare([(lora(), float("nan"))])
    with pytest.raises(ValueError, match="energy is 0"):
        compare([(lora(), 1.0)], energy=0)
    with pytest.raises(ValueError, match="different base models"):
        compare([(lora(), 1.0), (lora(modules={ATTENTION: (24, 21, ())}), 1.0)])


@pytest.mark.parametrize("strength", [0.5, -3.0])
def test_a_cut_of_a_module_keeps_its_largest_singular_values_at_its_strength(strength):
    """A module that one LoRA has alone: the energy at rank r is strength^2 times the sum of the r largest squares."""
    one = lora(modules={ATTENTION: SHAPES[ATTENTION]})
    found = compare([(one, strength), (lora(modules={TEXT: SHAPES[TEXT]}, seed=1, rank=1), 0.0)])
    values = strength**2 * torch.linalg.svdvals(deltas(one)[ATTENTION]).square()
    wanted = [float(values[:rank].sum()) for rank in range(5)]
    assert found.kept[0] == pytest.approx(wanted, rel=1e-6, abs=1e-9)
    assert found.kept[1] == pytest.approx(wanted, rel=1e-6, abs=1e-9)


def test_one_weight_for_all_of_attention_beside_its_parts_is_counted():
    whole = kohya("lora_unet_double_blocks_0_img_attn_qkv", *factors(48, 2, 16), alpha=2)
    parts = {}
    for number, part in enumerate(("to_q", "to_k", "to_v")):
        parts |= kohya(f"transformer.transformer_blocks.0.attn.{part}", *factors(16, 2, 16, seed=number), alpha=2)
    both = [(Lora.from_state_dict(one), 1.0) for one in (whole, parts)]
    assert [part.spelling for _, part in compare(both).fused] == [
        f"transformer.transformer_blocks.0.attn.to_{x}" for x in "qkv"
    ]
    assert compare(both[:1]).fused == ()


def test_blocks_come_in_the_order_of_the_way_through_the_model():
    wanted = [
        "te1 layers.3", "te1 layers.10", "te2 layers.0", "te3 layers.0", "unet in", "unet down.0", "unet down.2",
        "unet mid", "unet up.1", "unet up.10", "unet out", "unet double", "unet double.2", "unet double.10", "unet single.1",
        "a part of its own",
    ]  # fmt: skip
    assert sorted(sorted(wanted), key=_in_order) == wanted
    assert sorted(reversed(wanted), key=_in_order) == wanted


def test_a_group_is_the_sum_of_its_modules():
    inputs = [(lora(rank=5, seed=1), 0.5), (lora(rank=3, seed=2, modules=dict(list(SHAPES.items())[:2])), -2.0)]
    found = compare(inputs)
    assert (found.whole.modules, [block.modules for block in found.blocks]) == (3, [1, 1, 1])
    pair = the_pair(found)
    parts = [one for module in found.modules for one in module.pairs]
    assert (pair.which, pair.shared, len(parts)) == ((0, 1), 2, 2)
    assert pair.dot == pytest.approx(sum(one.dot for one in parts))
    first, second = (deltas(one) for one, _ in inputs)
    energies = [{name: float(delta.square().sum()) for name, delta in own.items()} for own in (first, second)]
    # Independent: <A, B>^2 is |A|^2 |B|^2 by the number of entries on average, and those of modules add up.
    variance = sum(energies[0][name] * energies[1][name] / first[name].numel() for name in second)
    assert pair.dot_variance == pytest.approx(variance, rel=1e-5)
    assert pair.norms == pytest.approx(math.sqrt(sum(energies[0].values()) * sum(energies[1].values())), rel=1e-5)
    assert [sum(own.values()) for own in energies] == pytest.approx(found.whole.energies, rel=1e-5)
    # Of all of its energy, in modules that the other lacks too.
    assert pair.first_inside.whole == pytest.approx(sum(energies[0].values()), rel=1e-5)
    assert pair.second_inside.whole == pytest.approx(sum(energies[1].values()), rel=1e-5)
    assert pair.left.whole == pytest.approx(sum(one.left.whole for one in parts)) == 6
    for i in (0, 1):
        for j in (0, 1):
            dot = sum(float(((first, second)[i][name] * (first, second)[j][name]).sum()) for name in second)
            dot += energies[0][TEXT] if i == j == 0 else 0
            assert found.products[i][j] == pytest.approx(dot, rel=1e-5)


def test_what_is_zero_is_in_no_pair_and_what_has_no_strength_takes_no_room():
    up, down = factors(12, 4, 10)
    zero = Lora.from_state_dict(kohya("m", torch.zeros_like(up), down))
    other = Lora.from_state_dict(kohya("m", up, down))
    assert compare([(zero, 1.0), (other, 1.0)]).whole.pairs == ()
    assert compare([(other, 1.0), (zero, 1.0)]).whole.pairs == ()
    # 4 + 4 directions of 12 + 10 numbers; only 10 fit, and one at strength 0 is not in the file.
    assert compare([(other, 1.0), (other, 1.0)]).megabytes() == 8 * 22 * 2 / 1e6
    assert compare([(other, 1.0), (other, 0.0)]).megabytes() == 4 * 22 * 2 / 1e6


def test_what_is_inside_is_a_share_of_all_of_a_lora_whichever_comes_first():
    names = [*SHAPES.items()]
    loras = [lora(seed=1, modules=dict(names[:2])), lora(seed=2, modules=dict(names[1:]))]
    for inputs in (loras, loras[::-1]):
        pair = the_pair(compare([(one, 1.0) for one in inputs]))
        for measure, one in zip((pair.first_inside, pair.second_inside), inputs, strict=True):
            assert measure.whole == pytest.approx(sum(float(d.square().sum()) for d in deltas(one).values()), rel=1e-5)


# Kind of input -> (its state dict, its strength, what is to be said of it). All are of the same module.
SILENT = {
    "off": (kohya(ATTENTION, *factors(8, 2, 6)), 0.0, "{} adds nothing, its strength is 0"),
    "zeros": (kohya(ATTENTION, torch.zeros(8, 2), torch.ones(2, 6)), 1.0, "{} adds nothing, its updates are zeros"),
    "scaled away": (kohya(ATTENTION, *factors(8, 2, 6), alpha=0), 1.0, "{} adds nothing, its updates are zeros"),
    "biases": ({f"{ATTENTION}.diff_b": torch.ones(8)}, 1.0, "nothing of {} can be compared"),
    "DoRA": (
        kohya(ATTENTION, *factors(8, 2, 6)) | {f"{ATTENTION}.dora_scale": torch.ones(8, 1)},
        1.0,
        "nothing of {} can be compared",
    ),
}
LOUD = (kohya(ATTENTION, *factors(8, 2, 6, seed=1)), 1.0, "")


@pytest.mark.parametrize("second", [*SILENT, "loud"])
@pytest.mark.parametrize("first", SILENT)
def test_of_each_silent_lora_it_is_said_why_it_is(first, second):
    two = {"a": SILENT[first], "b": SILENT.get(second, LOUD)}
    found = compare([(Lora.from_state_dict(state, source=name), s) for name, (state, s, _) in two.items()])
    head, sentence = answer(found)
    said = ", and ".join(words.format(name) for name, (*_, words) in two.items() if words)
    assert sentence == f"a and b: {said}."
    if "can be compared" in said:
        assert head == "Not known: nothing of one of these LoRAs can be compared."
    elif second == "loud":
        assert head == "Nothing to fight: no two of these LoRAs change the same modules."
    else:
        assert head == "Nothing to fight: none of these LoRAs adds anything."


@pytest.mark.parametrize("alone", [False, True])
@pytest.mark.parametrize("size", [1.0, 2.0**-30, 2.0**30])
def test_what_counts_as_a_direction_does_not_depend_on_the_size_of_the_update(size, alone):
    """Singular values from 1 to 1e-5 count, one of 1e-7 beside 1 is rounding."""
    values = torch.tensor([1.0, 0.3, 1e-3, 1e-5, 1e-7], dtype=torch.float64)
    up, _ = torch.linalg.qr(torch.randn(9, 5, generator=generator(1), dtype=torch.float64))
    down, _ = torch.linalg.qr(torch.randn(7, 5, generator=generator(2), dtype=torch.float64))
    one = own_of(up * values * size, down, 0.95, is_triangle=False, alone=alone)
    assert one.effective == 4
    assert one.leading == 2  # 1 / 1.09 is less than 0.95 of the energy
    assert one.energy == pytest.approx(size**2 * float(values.square().sum()))
    assert own_of(up * values * size, down, 1.0, is_triangle=False, alone=alone).leading == 3


@pytest.mark.parametrize("shape", [(7, 5), (5, 5), (4, 6)])
def test_a_triangle_needs_no_decomposition_to_be_the_same_update(shape):
    """The first of several updates in their common space, zeros below; also of more ranks than the space has dimensions."""
    up = torch.randn(9, shape[1], generator=generator(1), dtype=torch.float64)
    down = torch.randn(shape, generator=generator(2), dtype=torch.float64).triu()
    one, other = (own_of(up, down, 0.5, is_triangle=choice, alone=False) for choice in (True, False))
    u, s, v = (part[..., : min(shape)] for part in torch.svd(up @ down.T))
    for own in (one, other):
        assert (own.effective, own.leading) == (min(shape), other.leading)
        torch.testing.assert_close(own.values, s.square(), rtol=0, atol=1e-12 * float(s[0]) ** 2)
        for found, expected in ((own.left, u), (own.right, v)):
            torch.testing.assert_close((found.T @ expected).abs(), torch.eye(len(s)).double(), rtol=0, atol=1e-8)
    assert one.dot(other) == pytest.approx(one.energy)
    assert one.inside(other) == pytest.approx(float(s[: other.leading].square().sum()))
