"""LoHa, LoKr, DoRA, OFT and all the others beside plain LoRA: read without loss, added exactly, or passed through."""

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

from lcm_kit.lora_merge import (
    LohaLayer,
    LokrLayer,
    Lora,
    account_keys,
    describe,
    describe_merge,
    load,
    merge,
    merge_with_account,
    resize,
    resize_with_account,
    save,
)
from lcm_kit.lora_merge.merging.passthrough import passthrough_of
from lcm_kit.lora_merge.naming.unet import Layout
from lcm_kit.lora_merge.settings.strengths import Strengths
from lcm_kit.lora_merge.updates.build import build
from lcm_kit.tests.lora_merge import kinds
from lcm_kit.tests.lora_merge.make import factors, generator, kohya, relative

LINEAR = "lora_unet_down_blocks_0_attentions_0_proj_in"
CONV = "lora_unet_down_blocks_0_resnets_0_conv1"
CASES = [(kind, ()) for kind, (_, needs_kernel) in kinds.ADDITIVE.items() if not needs_kernel]
CASES += [(kind, (3, 3)) for kind in kinds.ADDITIVE]
CARRIED_CASES = [(kind, kernel) for kind in kinds.CARRIED for kernel in ((), (3, 3))]


def module_of(kernel):
    return CONV if kernel else LINEAR


def lora(kind, kernel=(), *, alpha=None, seed=0, source="LoRA", **shape):
    return Lora.from_state_dict(
        kinds.state_dict(kind, module_of(kernel), kernel=kernel, alpha=alpha, seed=seed, **shape), source=source
    )


# ---- what adds up


@pytest.mark.parametrize("alpha", [None, 1.0, 5.0])
@pytest.mark.parametrize(("kind", "kernel"), CASES)
def test_the_delta_is_the_formula_of_the_kind(kind, kernel, alpha):
    one = lora(kind, kernel, alpha=alpha)
    wanted = kinds.dense(kinds.parts(kind, kernel=kernel), alpha)
    delta = one.delta(module_of(kernel))
    assert delta.shape == (8, 12, *kernel)
    assert relative(delta.flatten(1), wanted) < 1e-6
    assert one.kinds == {kinds.ADDITIVE[kind][0]: 1}


@pytest.mark.parametrize(("kind", "kernel"), CASES)
def test_the_factors_are_exact_and_of_the_promised_rank(kind, kernel):
    layer = next(iter(lora(kind, kernel, alpha=3.0).modules.values()))
    up, down = layer.factors()
    wanted = kinds.dense(kinds.parts(kind, kernel=kernel), 3.0)
    assert up.shape == (8, layer.rank)
    assert down.shape == (layer.rank, wanted.shape[1])
    assert relative(layer.scale * up @ down, wanted) < 1e-6
    assert layer.rank <= min(wanted.shape)


@pytest.mark.parametrize("dtype", [torch.float16, torch.float64])
@pytest.mark.parametrize(("kind", "kernel"), CASES)
def test_stored_factors_are_the_factors_and_as_they_came_where_that_takes_no_arithmetic(kind, kernel, dtype):
    (layer,) = lora(kind, kernel, alpha=3.0, dtype=dtype).modules.values()
    found, wanted = layer.stored_factors(), layer.factors()
    assert {factor.dtype for factor in found} == {dtype if kind == "LoRA" else torch.float32}
    for one, other in zip(found, wanted, strict=True):
        torch.testing.assert_close(one.float(), other, rtol=1e-7, atol=0)


@pytest.mark.parametrize(("kind", "kernel"), CASES)
def test_the_alpha_that_is_written_for_none_is_one_that_means_the_same(kind, kernel):
    (layer,) = lora(kind, kernel).modules.values()
    assert relative(replace(layer, alpha=layer.written_alpha).delta(), layer.delta()) < 1e-7


def test_loha_has_the_product_of_its_ranks():
    g = torch.Generator().manual_seed(1)
    a, b = torch.randn(40, 3, generator=g), torch.randn(3, 50, generator=g)
    c, d = torch.randn(40, 5, generator=g), torch.randn(5, 50, generator=g)
    layer = LohaLayer(a, b, c, d)
    assert layer.rank == 15
    assert torch.linalg.matrix_rank(layer.delta().double(), rtol=1e-6) == 15
    # Worked by hand: rows and columns multiply entry by entry.
    tiny = LohaLayer(
        *(torch.tensor(x) for x in ([[1.0], [2.0]], [[3.0, 4.0]], [[5.0], [6.0]], [[7.0, 8.0]])), alpha=0.5
    )
    assert tiny.delta().tolist() == [[0.5 * 3 * 35, 0.5 * 4 * 40], [0.5 * 6 * 42, 0.5 * 8 * 48]]


def test_loha_of_too_many_ranks_has_the_rank_of_the_weight():
    g = torch.Generator().manual_seed(1)
    layer = LohaLayer(*(torch.randn(*shape, generator=g) for shape in ((6, 4), (4, 9), (6, 4), (4, 9))))
    up, down = layer.factors()
    assert (layer.rank, up.shape, down.shape) == (6, (6, 6), (6, 9))
    assert relative(up @ down, layer.delta()) < 1e-6


@pytest.mark.parametrize(
    ("kind", "rank"),
    [
        ("LoKr, both whole", 2 * 2),  # 4 x 2 and 2 x 6: the shorter sides
        ("LoKr, second low-rank", 2 * 1),
        ("LoKr, first low-rank", 1 * 2),
        ("LoKr, both low-rank", 1),
    ],
)
def test_lokr_has_the_product_of_its_smallest_ranks(kind, rank):
    one = lora(kind)
    assert one.modules[one.find(LINEAR)].rank == rank
    assert torch.linalg.matrix_rank(one.delta(LINEAR).double(), rtol=1e-6) == rank


def test_lokr_by_hand():
    w1, w2 = torch.tensor([[1.0, 2.0], [3.0, 4.0]]), torch.tensor([[0.0, 5.0]])
    assert LokrLayer(w1, w2, alpha=100.0).delta().tolist() == [[0, 5, 0, 10], [0, 15, 0, 20]]  # alpha without effect
    low = LokrLayer(w1, alpha=3.0, w2_a=torch.ones(1, 2), w2_b=torch.tensor([[0.0, 2.0], [0.0, 3.0]]))
    assert low.delta().tolist() == [[0, 7.5, 0, 15], [0, 22.5, 0, 30]]  # 3 / 2 of it


LORA = {".lora_up.weight": "up", ".lora_down.weight": "down", ".lora_mid.weight": "mid"}


def misshapen(part, more):
    """The part one longer and empty along each dimension; with a dimension more and one less."""
    for axis in range(part.ndim):
        yield torch.cat([part, part.narrow(axis, 0, 1)], axis)
        yield part.narrow(axis, 0, 0)
    if more:
        yield part[..., None]
        yield part[0]


@pytest.mark.parametrize(("kind", "kernel"), CASES)
def test_parts_that_do_not_fit_together_are_refused_by_name_and_what_fits_is_the_formula(kind, kernel):
    tensors = kinds.parts(kind, kernel=kernel)
    for end, part in tensors.items():
        for other in misshapen(part, more=end not in LORA):
            state = tensors | {end: other}
            name = LORA.get(end, end[1:])
            try:
                made = build({LORA.get(key, key[1:]): tensor for key, tensor in state.items()}, None)
            except ValueError as error:
                # Of what is no pair by itself the products differ.
                assert name in str(error) or "the two products are" in str(error)  # noqa: PT017, either is right
            else:
                assert other.numel()
                assert relative(made.delta().flatten(1), kinds.dense(state)) < 1e-6


@pytest.mark.parametrize("alpha", [None, 0.5])
@pytest.mark.parametrize(("kind", "kernel"), [pair for pair in CASES if pair[0].startswith("LoKr")])
def test_a_lokr_without_its_core_is_the_same_update_and_without_one_it_is_itself(kind, kernel, alpha):
    (one,) = lora(kind, kernel, alpha=alpha).modules.values()
    made = one.without_core()
    assert made.t2 is None
    assert (made is one) == (one.t2 is None)
    assert made.shape == one.shape
    assert relative(made.delta(), one.delta()) < 1e-6


@pytest.mark.parametrize("alpha", [None, 3.0])
def test_a_lokr_with_a_core_beside_a_low_rank_matrix_is_the_formula_too(alpha):
    core = kinds.parts("LoKr with a core", kernel=(3, 3))
    core.pop(".lokr_w1")
    both = core | {end: part for end, part in kinds.parts("LoKr, first low-rank").items() if "w1" in end}
    layer = build({end[1:]: part for end, part in both.items()}, alpha)
    wanted = kinds.dense(both, alpha)
    up, down = layer.factors()
    assert layer.shape == (8, 12, 3, 3)
    assert relative(layer.delta().flatten(1), wanted) < 1e-6
    assert relative(layer.scale * up @ down, wanted) < 1e-6
    assert up.shape[1] == layer.rank == 2  # 1 of the first, 2 of the core
    assert relative(layer.without_core().delta().flatten(1), wanted) < 1e-6


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({".hada_w2_b": torch.ones(3, 12)}, r"hada_w2_a is \(8, 2\), hada_w2_b \(3, 12\); their ranks differ"),
        ({".hada_w1_b": torch.ones(3, 12)}, r"hada_w1_a is \(8, 2\), hada_w1_b \(3, 12\); their ranks differ"),
        ({".hada_w2_b": torch.ones(2, 11)}, r"the two products are \(8, 12\) and \(8, 11\)"),
        ({".hada_w1_a": torch.ones(8, 2, 1)}, "hada_w1_a is .* needs 2 dimensions"),
        ({".hada_t1": torch.ones(2, 2, 3, 3)}, "hada_t1 and hada_t2 belong together"),
        ({".alpha": torch.tensor(float("nan"))}, "NaN"),
    ],
)
def test_loha_that_does_not_fit_together_is_refused(change, message):
    state = kinds.state_dict("LoHa", LINEAR) | {f"{LINEAR}{end}": value for end, value in change.items()}
    with pytest.raises(ValueError, match=message):
        Lora.from_state_dict(state)


@pytest.mark.parametrize("kind", ["GLoRA", "GLoRA, old"])
@pytest.mark.parametrize("part", ["a1", "a2", "b1", "b2"])
@pytest.mark.parametrize("axis", [0, 1])
def test_glora_that_fits_no_weight_is_refused(kind, part, axis):
    """ComfyUI leaves the weight as it is then, with a line in its log."""
    state = kinds.state_dict(kind, LINEAR)
    key = f"{LINEAR}.{part}.weight"
    longer = torch.cat([state[key], state[key].narrow(axis, 0, 1)], dim=axis)
    of_rows = (part, axis) == (("b1" if kind == "GLoRA" else "b2"), 0)  # of these there may be any number
    if of_rows:
        assert Lora.from_state_dict(state | {key: longer}).carried
        return
    with pytest.raises(ValueError, match=r"a1 is .*, b2 .*; their ranks or widths differ"):
        Lora.from_state_dict(state | {key: longer})


@pytest.mark.parametrize(
    ("kind", "gone", "message"),
    [
        ("LoKr, both whole", ".lokr_w1", "needs either lokr_w1 or both lokr_w1_a and lokr_w1_b"),
        ("LoKr, second low-rank", ".lokr_w2_b", "needs either lokr_w2 or both"),
        ("LoHa", ".hada_w2_a", "but no hada_w2_a"),
        ("GLoRA", ".b1.weight", "but no b1"),
        ("OFT with rescale", ".oft_blocks", "but no oft_blocks"),
        ("DoRA, rows", ".lora_up.weight", "but no up"),
    ],
)
def test_a_missing_part_is_named(kind, gone, message):
    state = kinds.state_dict(kind, LINEAR)
    del state[LINEAR + gone]
    with pytest.raises(ValueError, match=message):
        Lora.from_state_dict(state)


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ({".hada_w1_a": torch.ones(2, 2)}, "LoRA and LoHa at once"),
        ({".oft_blocks": torch.ones(2, 2, 2)}, "LoRA and OFT at once"),
        ({".diff": torch.ones(8, 12)}, "another update of its weight"),
    ],
)
def test_two_kinds_in_one_module_are_a_contradiction(more, message):
    state = kinds.state_dict("LoRA", LINEAR) | {LINEAR + end: value for end, value in more.items()}
    with pytest.raises(ValueError, match=message):
        Lora.from_state_dict(state)


def test_a_scale_alone_is_no_lora():
    with pytest.raises(ValueError, match=rf"no LoRA in it .* only scale of nothing \(1 key: {LINEAR}.dora_scale\)"):
        Lora.from_state_dict({f"{LINEAR}.dora_scale": torch.ones(8, 1)})


# ---- arithmetic


@pytest.mark.parametrize("rank", [0, 64])
@pytest.mark.parametrize(("kind", "kernel"), CASES)
def test_every_kind_that_adds_up_enters_a_merge_exactly(kind, kernel, rank):
    module = module_of(kernel)
    plain = Lora.from_state_dict(kohya(module, *factors(8, 4, 12, kernel, seed=7), alpha=2.0))
    merged, account = merge_with_account([(lora(kind, kernel, alpha=3.0), -0.7), (plain, 1.0)], rank=rank)
    wanted = -0.7 * kinds.dense(kinds.parts(kind, kernel=kernel), 3.0) + plain.delta(module).double().flatten(1)
    assert relative(merged.delta(module).flatten(1), wanted) < 2e-6
    assert merged.kinds == {"LoRA": 1}
    assert [(s.merged, s.passed_through, s.refused) for s in account.sources] == [(1, 0, 0), (1, 0, 0)]
    assert merged.delta(module).shape == (8, 12, *kernel)


def test_loha_can_be_cut_to_a_smaller_rank():
    exact = merge([(lora("LoHa", (3, 3)), 1.0)])
    cut, account = merge_with_account([(lora("LoHa", (3, 3)), 1.0)], rank=2)
    assert cut.modules[cut.find(CONV)].rank == 2
    s = torch.linalg.svdvals(exact.delta(CONV).double().flatten(1))
    best = float(s[2:].norm() / s.norm())
    assert account.relative_error == pytest.approx(best, rel=1e-4)


@pytest.mark.parametrize("order", [1, -1])
@pytest.mark.parametrize("other", ["LoRA", "LoHa", "LoKr, second low-rank", "difference"])
def test_a_whole_weight_meets_any_other_kind(other, order):
    full = Lora.from_state_dict({f"{CONV}.diff": torch.full((8, 12, 3, 3), 0.5), f"{CONV}.diff_b": torch.ones(8)})
    if other == "difference":
        second = Lora.from_state_dict({f"{CONV}.diff": torch.full((8, 12, 3, 3), 2.0)})
    else:
        second = lora(other, (3, 3), alpha=1.0)
    merged, account = merge_with_account([(full, 2.0), (second, -1.0)][::order], rank=1)
    assert list(merged.diffs) == [(merged.find(CONV), "diff"), (merged.find(CONV), "diff_b")]
    wanted = 2.0 * 0.5 - second.delta(CONV).double()
    assert relative(merged.delta(CONV), wanted) < 1e-6
    assert torch.equal(merged.diffs[merged.find(CONV), "diff_b"], torch.full((8,), 2.0))
    assert account.modules == 1
    assert set(merged.to_state_dict()) == {f"{CONV}.diff", f"{CONV}.diff_b"}


def test_norms_stay_norms_among_themselves():
    norm = "lora_unet_down_blocks_0_attentions_0_norm"
    one = Lora.from_state_dict({f"{norm}.w_norm": torch.ones(8), f"{norm}.b_norm": torch.ones(8)})
    merged = merge([(one, 1.0), (one, 2.0)])
    assert {key: value.tolist() for key, value in merged.to_state_dict().items()} == {
        f"{norm}.w_norm": [3.0] * 8,
        f"{norm}.b_norm": [3.0] * 8,
    }
    other = Lora.from_state_dict({f"{norm}.diff": torch.ones(8)})
    # ComfyUI reads a b_norm beside a w_norm only.
    assert set(merge([(one, 1.0), (other, 1.0)]).to_state_dict()) == {f"{norm}.diff", f"{norm}.diff_b"}


def test_a_lone_b_norm_is_a_bias_difference():
    one = Lora.from_state_dict({f"{LINEAR}.b_norm": torch.ones(8)})
    assert set(one.to_state_dict()) == {f"{LINEAR}.diff_b"}


def test_an_alpha_beside_a_whole_difference_changes_nothing():
    one = Lora.from_state_dict({f"{CONV}.diff": torch.ones(8, 12, 3, 3), f"{CONV}.alpha": torch.tensor(4.0)})
    assert set(one.to_state_dict()) == {f"{CONV}.diff"}
    assert one.parameters == 8 * 12 * 3 * 3
    assert one.keys.unread == (f"{CONV}.alpha",)
    assert torch.equal(one.delta(CONV), torch.ones(8, 12, 3, 3))


# ---- what does not add up


@pytest.mark.parametrize(("kind", "kernel"), CARRIED_CASES)
def test_what_depends_on_the_weight_is_kept_as_it_came(kind, kernel):
    state = kinds.state_dict(kind, module_of(kernel), kernel=kernel, alpha=3.0)
    one = Lora.from_state_dict(state, source="style")
    assert one.kinds == {kinds.CARRIED[kind]: 1}
    again = one.to_state_dict()
    assert set(again) == set(state)
    assert all(torch.equal(again[key], state[key]) for key in state)
    assert one.parameters == sum(part.numel() for key, part in state.items() if not key.endswith("alpha"))
    with pytest.raises(ValueError, match=rf"style: .* is {kinds.CARRIED[kind]}, whose update depends on the weight"):
        one.delta(module_of(kernel))
    assert "1 of them depends on the weight it changes" in describe(one)


@pytest.mark.parametrize("kind", kinds.CARRIED)
def test_what_depends_on_the_weight_passes_through_alone_at_strength_one(kind):
    one, other = lora(kind, alpha=3.0, source="style"), lora("LoRA", (3, 3), source="lcm")
    merged, account = merge_with_account([(one, 1.0), (other, 0.5)])
    state, came = merged.to_state_dict(), one.to_state_dict()
    assert all(torch.equal(state[key], came[key]) for key in came)
    assert relative(merged.delta(CONV), 0.5 * other.delta(CONV).double()) < 1e-6
    assert [(s.modules, s.merged, s.passed_through, s.refused) for s in account.sources] == [(1, 0, 1, 0), (1, 1, 0, 0)]
    assert "1 passed through as it is" in describe_merge(account, merged)


@pytest.mark.parametrize("kind", kinds.CARRIED)
def test_what_depends_on_the_weight_is_refused_by_name_otherwise(kind):
    one = lora(kind, source="style")
    message = rf"style has {kinds.CARRIED[kind]} \(1 module: {LINEAR}\).*only at strength 1"
    for inputs in ([(one, 0.8)], [(one, 1.0), (lora("LoRA"), 1.0)], [(lora("LoHa"), 1.0), (one, 1.0)]):
        with pytest.raises(ValueError, match=message):
            merge(inputs)
    both = Lora.from_state_dict({f"{LINEAR}.diff": torch.ones(8, 12)})
    with pytest.raises(ValueError, match=message):
        merge([(both, 1.0), (one, 1.0)])


def test_refused_modules_can_be_left_out_and_are_counted():
    state = kinds.state_dict("DoRA, rows", LINEAR) | kinds.state_dict("LoRA", CONV, kernel=(3, 3))
    style, lcm = Lora.from_state_dict(state, source="style"), lora("LoRA", seed=5)
    merged, account = merge_with_account([(style, 0.5), (lcm, 1.0)], leave_out=True)
    assert [(s.modules, s.merged, s.passed_through, s.refused) for s in account.sources] == [(2, 1, 0, 1), (1, 1, 0, 0)]
    assert relative(merged.delta(LINEAR), lcm.delta(LINEAR)) < 1e-6
    assert not merged.carried
    assert "1 merged, 1 refused and left out" in describe_merge(account, merged)


@pytest.mark.parametrize("beside", [None, "LoRA", "diff", "diff_b", "DoRA, rows"])
@pytest.mark.parametrize("other", [0.0, 1.0, -0.5])
@pytest.mark.parametrize("strength", [0.0, 0.5, 1.0])
def test_one_passes_through_at_strength_one_where_nobody_else_changes_that_weight(strength, other, beside):
    """By the rule: at 1 alone it passes, at 0 it falls away, else it is refused. A bias is another thing than a weight."""
    state = {} if beside is None else {f"{LINEAR}.{beside}": torch.ones(8, 12) if beside == "diff" else torch.ones(8)}
    if beside in ("LoRA", "DoRA, rows"):
        state = kinds.state_dict(beside, LINEAR)
    state |= kinds.state_dict("OFT", CONV, kernel=(3, 3))
    first = Lora.from_state_dict(kinds.state_dict("OFT", LINEAR) | kinds.state_dict("LoRA", "lora_unet_conv_out"))
    second = Lora.from_state_dict(state)
    found = passthrough_of([first, second], Strengths([strength, other], [None, None], Layout()))
    linear, conv = first.find(LINEAR), second.find(CONV)
    met = beside not in (None, "diff_b")
    passed, refused = {}, {0: [], 1: []}
    if strength == 1 and not (met and other):
        passed[linear] = 0
    elif strength:
        refused[0].append(linear)
    if beside == "DoRA, rows" and other == 1 and not strength:
        passed[linear] = 1
    elif beside == "DoRA, rows" and other:
        refused[1].append(linear)
    if other == 1:
        passed[conv] = 1
    elif other:
        refused[1].append(conv)
    assert found.sources == passed
    assert {index: sorted(those) for index, those in found.refused.items()} == {
        index: sorted(those) for index, those in refused.items() if those
    }
    for index, one in enumerate((first, second)):
        mine = [module for module, source in passed.items() if source == index]
        assert (found.passed_from(index), found.refused_from(index)) == (len(mine), len(refused[index]))
        assert all(found.updates[module] is one.carried[module] for module in mine)
    assert found.updates.keys() == passed.keys()


def test_nothing_is_left_out_unless_that_is_asked_for():
    one = Lora.from_state_dict(kinds.state_dict("DoRA, rows", LINEAR) | kinds.state_dict("LoRA", CONV, kernel=(3, 3)))
    for call in (merge, merge_with_account):
        with pytest.raises(ValueError, match="only at strength 1"):
            call([(one, 0.5)])
    for call in (resize, resize_with_account):
        with pytest.raises(ValueError, match="only at strength 1"):
            call(one, rank=1, block_strengths="unet=0.5")
    assert not resize(one, rank=1, block_strengths="unet=0.5", leave_out=True).carried


def test_strength_zero_leaves_nothing_of_it():
    style, lcm = lora("OFT"), lora("LoRA")
    merged, account = merge_with_account([(style, 0.0), (lcm, 1.0)])
    assert not merged.carried
    assert relative(merged.delta(LINEAR), lcm.delta(LINEAR)) < 1e-6
    assert account.sources[0].refused == 0
    merged = merge([(style, 1.0), (lcm, 0.0)])
    assert set(merged.carried) == {merged.find(LINEAR)}
    assert not merged.modules


def test_a_bias_beside_dora_still_adds_up():
    one = Lora.from_state_dict(kinds.state_dict("DoRA, rows", LINEAR) | {f"{LINEAR}.diff_b": torch.ones(8)})
    bias = Lora.from_state_dict({f"{LINEAR}.diff_b": torch.ones(8)})
    state = merge([(one, 1.0), (bias, 3.0)]).to_state_dict()
    assert torch.equal(state[f"{LINEAR}.diff_b"], torch.full((8,), 4.0))
    assert f"{LINEAR}.dora_scale" in state


def test_pefts_magnitude_is_dora_along_the_rows():
    up, down = factors(8, 2, 12)
    name = "unet.down_blocks.0.attentions.0.proj_in"
    for key in ("lora_magnitude_vector", "lora_magnitude_vector.weight", "lora_magnitude_vector.default.weight"):
        state = {f"{name}.lora_B.weight": up, f"{name}.lora_A.weight": down, f"{name}.{key}": torch.arange(8.0)}
        written = Lora.from_state_dict(state, metadata={"lora_alpha": "4"}).to_state_dict()
        assert torch.equal(written[f"{LINEAR}.dora_scale"], torch.arange(8.0)[:, None])
        assert written[f"{LINEAR}.alpha"].item() == 4


def test_boft_without_alpha_is_written_with_none_to_constrain_it():
    """ComfyUI 0.30.0 compares its alpha with 0, and None stops it."""
    assert lora("BOFT").to_state_dict()[f"{LINEAR}.alpha"].item() == 0
    assert f"{LINEAR}.alpha" not in lora("OFT").to_state_dict()


def test_a_lora_that_enlarges_its_weight_is_kept_with_the_size_it_asks_for():
    state = kinds.state_dict("LoRA", LINEAR, alpha=3.0) | {f"{LINEAR}.reshape_weight": torch.tensor([8, 12])}
    one = Lora.from_state_dict(state)
    assert one.kinds == {"resized weight": 1}
    written = one.to_state_dict(torch.float16)
    assert set(written) == set(state)
    assert torch.equal(written[f"{LINEAR}.reshape_weight"], torch.tensor([8, 12]))
    other = Lora.from_state_dict(kinds.state_dict("LoHa", LINEAR) | {f"{LINEAR}.reshape_weight": torch.tensor([8, 12])})
    assert (other.kinds, other.keys.unread) == ({"LoHa": 1}, (f"{LINEAR}.reshape_weight",))
    with pytest.raises(ValueError, match=r"reshape_weight is \(\), but it is a list of sizes"):
        Lora.from_state_dict(state | {f"{LINEAR}.reshape_weight": torch.tensor(8)})


def test_bundled_embeddings_ride_along():
    state = kinds.state_dict("LoRA", LINEAR, alpha=3.0) | {"bundle_emb.hat.string_to_param.*": torch.ones(2, 4)}
    one = Lora.from_state_dict(state)
    assert set(one.to_state_dict()) == set(state)
    assert set(merge([(one, 1.0), (lora("LoRA"), 1.0)]).to_state_dict()) == set(state)


# ---- every key is accounted for


def every_kind():
    state, number = {}, 0
    for kind, kernel in CASES + CARRIED_CASES:
        name = f"lora_unet_{'input' if kernel else 'output'}_thing_{number}"
        state |= kinds.state_dict(kind, name, kernel=kernel, alpha=2.0)
        number += 1
    state |= {
        "lora_unet_a.diff": torch.ones(3, 3),
        "lora_unet_b.w_norm": torch.ones(3),
        "lora_unet_b.b_norm": torch.ones(3),
    }
    return state | {"bundle_emb.hat.clip_l": torch.ones(2, 4), "lora_unet_a.diff_b": torch.ones(3)}


def test_the_three_counts_sum_to_the_file():
    state = every_kind()
    one = Lora.from_state_dict(state)
    assert sorted(one.keys.understood + one.keys.carried) == sorted(state)
    assert one.keys.unread == ()
    assert set(one.to_state_dict()) == set(state)
    stray = {"lora_unet_a.on_input": torch.ones(2), "x.lora_B.bias": torch.ones(2), "what": torch.ones(2)}
    account = account_keys(state | stray)
    assert account.unread == tuple(stray)
    assert len(account.understood) + len(account.carried) + len(account.unread) == len(state) + len(stray)
    assert "bundle_emb.hat.clip_l" in account.carried
    assert "lora_unet_a.diff_b" in account.understood


@given(st.lists(st.text(st.sampled_from("ablor_.wd128mixeigt"), max_size=30), unique=True))
def test_no_key_is_lost_whatever_it_is(names):
    account = account_keys(names)
    assert sorted(account.understood + account.carried + account.unread) == sorted(names)


def test_a_key_whose_module_does_not_add_up_is_carried():
    state = kinds.state_dict("DoRA, rows", LINEAR, alpha=1.0) | kinds.state_dict("LoRA", CONV, alpha=1.0)
    account = account_keys(state)
    assert all(key.startswith(LINEAR) for key in account.carried)
    assert all(key.startswith(CONV) for key in account.understood)
    assert len(account.carried) == 4


# ---- saving


@settings(max_examples=30, deadline=None)
@given(
    st.lists(
        st.tuples(
            st.sampled_from(CASES + CARRIED_CASES),
            st.sampled_from([None, 0.5, 3.0]),
            st.sampled_from([torch.float32, torch.float16, torch.bfloat16]),
        ),
        min_size=1,
        max_size=5,
    )
)
def test_saving_and_loading_is_the_identity_in_kohya_format(tmp_path_factory, modules):
    state = {}
    for number, ((kind, kernel), alpha, dtype) in enumerate(modules):
        state |= kinds.state_dict(
            kind, f"lora_unet_thing_{number}", kernel=kernel, alpha=alpha, seed=number, dtype=dtype
        )
    one = Lora.from_state_dict(state)
    path = tmp_path_factory.mktemp("kinds") / "x.safetensors"
    save_file(one.to_state_dict(), path)
    again = load(path)
    assert again.kinds == one.kinds
    assert again.keys.unread == ()
    first, second = one.to_state_dict(), again.to_state_dict()
    assert first.keys() == second.keys() >= state.keys()
    assert all(torch.equal(first[key], second[key]) and first[key].dtype == second[key].dtype for key in first)
    assert all(torch.equal(first[key], state[key]) for key in state)
    for module, layer in one.modules.items():
        assert torch.equal(again.modules[module].delta(), layer.delta())


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize(("kind", "kernel"), CASES + CARRIED_CASES)
def test_every_kind_is_saved_in_every_dtype(tmp_path, kind, kernel, dtype):
    one = lora(kind, kernel, alpha=3.0)
    save(one, tmp_path / "x.safetensors", dtype=dtype)
    again = load(tmp_path / "x.safetensors")
    wanted = one.to_state_dict(dtype)
    assert {key: value.dtype for key, value in again.to_state_dict().items()} == {k: v.dtype for k, v in wanted.items()}
    assert all(torch.equal(value, wanted[key]) for key, value in again.to_state_dict().items())


@settings(max_examples=20, deadline=None)
@given(
    st.lists(
        st.tuples(st.sampled_from([(), (1, 1), (3, 3)]), st.sampled_from([None, -1.0, 0.5, 3.0]), st.integers(1, 5)),
        min_size=1,
        max_size=5,
    )
)
def test_saving_and_loading_in_diffusers_format_keeps_every_update(tmp_path_factory, modules):
    state = {}
    for number, (kernel, alpha, rank) in enumerate(modules):
        state |= kohya(
            f"lora_unet_down_blocks_{number}_resnets_0_conv1", *factors(8, rank, 12, kernel, seed=number), alpha
        )
    one = Lora.from_state_dict(state)
    path = tmp_path_factory.mktemp("kinds") / "x.safetensors"
    save(one, path, dtype=torch.float32, format="diffusers")
    again = load(path)
    assert set(again.modules) == set(one.modules)
    for module, layer in one.modules.items():
        assert again.modules[module].shape == layer.shape
        assert relative(again.modules[module].delta(), layer.delta()) < 1e-6
    once = again.to_state_dict(format="diffusers")
    save(again, path, dtype=torch.float32, format="diffusers", overwrite=True)
    twice = load(path).to_state_dict(format="diffusers")
    assert all(torch.equal(twice[key], once[key]) for key in once)


@pytest.mark.parametrize(("kind", "kernel"), CARRIED_CASES)
def test_diffusers_format_names_the_kinds_it_has_no_place_for(tmp_path, kind, kernel):
    name = kinds.CARRIED[kind]
    with pytest.raises(
        ValueError, match=rf"style: diffusers format holds plain LoRA only, and this has {name} \(1 modul"
    ):
        save(lora(kind, kernel, source="style"), tmp_path / "x.safetensors", format="diffusers")
    assert list(tmp_path.iterdir()) == []


def test_other_tools_are_told_the_kind(tmp_path):
    from safetensors import safe_open

    save(lora("LoHa", (3, 3), alpha=1.0), tmp_path / "x.safetensors")
    with safe_open(tmp_path / "x.safetensors", framework="pt") as file:
        notes = file.metadata()
    assert notes["ss_network_module"] == "lycoris.kohya"
    assert '"algo": "loha"' in notes["ss_network_args"]
    assert (notes["ss_network_dim"], notes["ss_network_alpha"]) == ("2", "1")


def test_values_too_large_for_float16_are_an_error_in_every_kind(tmp_path):
    huge = Lora.from_state_dict({key: 1e6 * value for key, value in kinds.state_dict("LoHa", LINEAR).items()})
    with pytest.raises(ValueError, match=rf"{LINEAR}: values are too large for float16"):
        save(huge, tmp_path / "x.safetensors")
    save(huge, tmp_path / "x.safetensors", dtype=torch.float32)


def test_lokr_divides_alpha_by_the_rank_of_its_second_matrix():
    """LyCORIS and ComfyUI: with both matrices low-rank the second one's rank counts, here 2 and not 1."""
    g = generator(3)
    one_a, one_b, two_a, two_b = (torch.randn(*s, generator=g) for s in ((2, 1), (1, 3), (4, 2), (2, 5)))
    layer = LokrLayer(w1_a=one_a, w1_b=one_b, w2_a=two_a, w2_b=two_b, alpha=3.0)
    wanted = 3.0 / 2 * torch.kron(one_a @ one_b, two_a @ two_b)
    torch.testing.assert_close(layer.delta(), wanted)
    up, down = layer.factors()
    torch.testing.assert_close(layer.scale * up @ down, wanted)
    only_first = LokrLayer(w1_a=two_a, w1_b=two_b, w2=one_a @ one_b, alpha=3.0)
    torch.testing.assert_close(only_first.delta(), 3.0 / 2 * torch.kron(two_a @ two_b, one_a @ one_b))


@pytest.mark.parametrize("number", [1, 2])
def test_lokr_whose_ranks_differ_is_refused_by_the_name_of_the_matrix(number):
    wrong = {f"w{number}_a": torch.ones(4, 1), f"w{number}_b": torch.ones(2, 3)}
    with pytest.raises(
        ValueError, match=rf"lokr_w{number}_a is \(4, 1\), lokr_w{number}_b \(2, 3\); their ranks differ"
    ):
        LokrLayer(**{f"w{3 - number}": torch.ones(2, 2)}, **wrong)
