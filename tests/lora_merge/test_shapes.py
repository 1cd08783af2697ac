"""Parts of one module whose sizes belong together, or do not, against the definitions and nothing else."""

import itertools
import math

import pytest
import torch

from lcm_kit.lora_merge.updates.build import build, idle, ignores_alpha, is_carried, kinds_of, problem
from lcm_kit.lora_merge.updates.layer import Layer
from lcm_kit.lora_merge.updates.weight_dependent import BOFT, GLORA, OFT, Carried
from lcm_kit.tests.lora_merge import kinds
from lcm_kit.tests.lora_merge.make import generator, relative


def named(parts):
    """Parts by the names that the keys' ends stand for."""
    return {end.strip(".").removesuffix(".weight").removeprefix("lora_"): part for end, part in parts.items()}


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=generator(seed))


# Cores of which no two sides are alike; LoRA and LoKr with every size of its own.
CASES = {
    f"{kind}{' of a convolution' if kernel else ''}": named(kinds.parts(kind, 8, 12, kernel))
    for kind, (_, needs) in kinds.ADDITIVE.items()
    for kernel in ([(3, 3)] if needs else [(), (3, 3)])
} | {
    "LoCon, two ranks": {"up": normal(7, 2, 1, 1), "mid": normal(2, 3, 3, 2), "down": normal(3, 5, 1, 1)},
    "LoHa, four ranks": {
        "hada_w1_a": normal(2, 7), "hada_t1": normal(2, 3, 3, 2), "hada_w1_b": normal(3, 5),
        "hada_w2_a": normal(4, 7), "hada_t2": normal(4, 1, 3, 2), "hada_w2_b": normal(1, 5),
    },
    "LoKr, two ranks of a core": {
        "lokr_w1": normal(2, 3), "lokr_w2_a": normal(2, 4), "lokr_t2": normal(2, 3, 3, 2), "lokr_w2_b": normal(3, 5)
    },
    "LoKr, two low ranks": {
        "lokr_w1_a": normal(3, 2), "lokr_w1_b": normal(2, 4), "lokr_w2_a": normal(5, 4), "lokr_w2_b": normal(4, 6)
    },
}  # fmt: skip


def product(a, b, core=None, *, dims=2):
    """(out, in, *kernel) of two factors, or of a core between them; None where sizes do not meet."""
    if core is None:
        return a @ b if a.ndim == b.ndim == dims and a.shape[1] == b.shape[0] else None
    fits = a.ndim == b.ndim == 2 and core.ndim == 4 and (a.shape[0], b.shape[0]) == tuple(core.shape[:2])
    return torch.einsum("ijkl,io,jn->onkl", core, a, b) if fits else None


def defined(parts):
    """The update at scale 1 by the definition of its kind, in float64; None where parts do not belong together."""
    t = {name: part.double() for name, part in parts.items()}
    if any(part.numel() == 0 for part in t.values()):
        return None
    if "up" in t:
        up, down, mid = t["up"], t["down"], t.get("mid")
        if up.ndim < 2 or down.ndim < 2 or up[0, 0].numel() != 1:
            return None
        if mid is None:
            return torch.einsum("or,ri...->oi...", up.flatten(1), down) if up.shape[1] == down.shape[0] else None
        if mid.ndim < 3 or down[0, 0].numel() != 1 or mid.shape[:2] != (up.shape[1], down.shape[0]):
            return None
        return torch.einsum("or,rs...,si->oi...", up.flatten(1), mid, down.flatten(1))
    if "hada_w1_a" in t:
        if ("hada_t1" in t) != ("hada_t2" in t):
            return None
        one, two = (product(t[f"hada_w{n}_a"], t[f"hada_w{n}_b"], t.get(f"hada_t{n}")) for n in (1, 2))
        return None if one is None or two is None or one.shape != two.shape else one * two
    w1 = t.get("lokr_w1") if "lokr_w1" in t else product(t["lokr_w1_a"], t["lokr_w1_b"])
    w2 = t.get("lokr_w2") if "lokr_w2" in t else product(t["lokr_w2_a"], t["lokr_w2_b"], t.get("lokr_t2"))
    if w1 is None or w2 is None or w1.ndim != 2 or w2.ndim not in (2, 4):
        return None
    outer = torch.einsum("ab,cd...->acbd...", w1, w2)
    return outer.reshape(w1.shape[0] * w2.shape[0], w1.shape[1] * w2.shape[1], *w2.shape[2:])


def resized(parts, name, shape):
    return parts | {name: normal(*shape, seed=9) if 0 not in shape else torch.zeros(shape)}


def changes(parts):
    """The same parts with one size of one of them changed, or one dimension more or less."""
    for name, part in parts.items():
        shape = tuple(part.shape)
        for place, size in enumerate(shape):
            for other in {size + 1, size - 1, 0, 1} - {size}:
                yield resized(parts, name, (*shape[:place], other, *shape[place + 1 :]))
        yield resized(parts, name, shape[:-1])
        yield resized(parts, name, (*shape, 1))
        yield resized(parts, name, (*shape, 2))


@pytest.mark.parametrize("case", CASES)
def test_parts_make_an_update_where_the_definition_does_and_no_other(case):
    """Each size one more, one less, none, one: accepted with the update that it defines, or refused."""
    found = {True: 0, False: 0}
    for parts in [CASES[case], *changes(CASES[case])]:
        wanted = defined(parts)
        found[wanted is not None] += 1
        if wanted is None:
            with pytest.raises(ValueError, match=r"\(|needs|belong"):
                build(parts, 2.0)
            continue
        layer = build(parts, 2.0)
        shapes = {name: tuple(part.shape) for name, part in parts.items()}
        assert layer.shape == tuple(wanted.shape), shapes
        assert layer.parameters == sum(part.numel() for part in parts.values())
        assert relative(layer.delta().double(), layer.scale * wanted) < 1e-5, shapes
        up, down = layer.factors(torch.float64)
        assert up.shape == (wanted.shape[0], layer.rank), shapes
        assert relative(up @ down, wanted.flatten(1)) < 1e-9, shapes
    assert found[True] > 0
    assert found[False] > 3


@pytest.mark.parametrize("case", CASES)
def test_alpha_is_divided_by_the_rank_that_comfyui_takes_or_has_no_effect(case):
    """The last size before the update's columns: of down, of w1_b, of w2_b, else of w1_b."""
    parts = CASES[case]
    by = next((parts[n].shape[0] for n in ("down", "hada_w1_b", "lokr_w2_b", "lokr_w1_b") if n in parts), None)
    one, three = build(parts, 1.0).delta(), build(parts, 3.0).delta()
    assert ignores_alpha(parts) == (by is None)
    assert torch.allclose(three, one if by is None else 3 * one, rtol=1e-6)
    assert torch.allclose(build(parts, None).delta(), one if by is None else by * one, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("case", CASES)
def test_one_part_less_is_another_kind_or_named(case):
    parts = CASES[case]
    (kind,) = kinds_of(parts)
    assert problem({name: f"m.{name}" for name in parts}) is None
    for gone in parts:
        left = {name: part for name, part in parts.items() if name != gone}
        told = problem({name: f"m.{name}" for name in left})
        if told is not None:
            assert told.startswith("has m.")
            assert told.endswith(f" but no {gone}")
            continue
        assert kind == "LoKr" or gone in ("mid", "hada_t1", "hada_t2")
        try:
            whole = defined(left)
        except KeyError:
            whole = None
        if whole is None:
            with pytest.raises((ValueError, KeyError)):
                build(left, 1.0)
        else:
            assert build(left, 1.0).shape == tuple(whole.shape)


ALL = {**{kind: named(kinds.parts(kind, kernel=(3, 3))) for kind in (*kinds.ADDITIVE, *kinds.CARRIED)}}


@pytest.mark.parametrize("first", ALL)
def test_parts_of_two_kinds_or_of_a_whole_weight_beside_one_are_a_contradiction(first):
    parts = {name: f"m.{name}" for name in ALL[first]}
    assert problem(parts) is None
    for second, others in ALL.items():
        kinds_here = kinds_of(parts), kinds_of(others)
        if kinds_here[0] != kinds_here[1]:
            both = parts | {name: f"m.{name}" for name in others}
            assert problem(both) == f"has {kinds_here[0][0]} and {kinds_here[1][0]} at once", second
    for part in ("diff", "w_norm"):
        assert problem(parts | {part: f"m.{part}"}) == f"has both m.{part} and another update of its weight"
    assert problem({"diff": "m.diff", "w_norm": "m.w_norm"}) == "has both m.diff and another update of its weight"
    assert problem({"diff_b": "m.diff_b", "b_norm": "m.b_norm"}) == "has both m.diff_b and m.b_norm"
    assert problem(parts | {"dora_scale": "m.d", "magnitude": "m.m"}) == "has both m.d and m.m"
    assert problem(parts | {"diff_b": "m.diff_b"}) is None


@pytest.mark.parametrize("kind", ALL)
def test_what_depends_on_the_weight_is_carried_with_the_shape_of_the_weight(kind):
    parts = ALL[kind]
    made = build(parts, 2.0)
    assert is_carried(parts) == (kind in kinds.CARRIED) == isinstance(made, Carried)
    if kind in kinds.ADDITIVE:
        assert isinstance(made, Layer)
        assert made.shape[0] == 8
        return
    assert made.kind == kinds.CARRIED[kind]
    assert made.parts.keys() == parts.keys()
    assert made.alpha == 2.0
    # What the module has beside it stands elsewhere.
    beside = {"alpha": torch.tensor(2.0), "diff_b": torch.ones(8), "b_norm": torch.ones(8)}
    assert build(parts | beside, 2.0).parts.keys() == parts.keys()
    flat = kind == "DoRA on LoHa" or kind.startswith("DoRA on LoKr") or kind.startswith("GLoRA")
    # Of OFT and BOFT the rows alone are known.
    rows_only = kind.startswith(("OFT", "BOFT"))
    assert made.shape == ((8,) if rows_only else (8, 12 * 9) if flat else (8, 12, 3, 3))


@pytest.mark.parametrize("kernel", [(), (3,), (3, 3)])
def test_pefts_magnitude_is_the_scale_of_each_row_and_has_one_number_for_each(kernel):
    ones = (1,) * len(kernel)
    parts = {"up": normal(8, 3, *ones), "down": normal(3, 12, *kernel)}
    for shape in ((8,), (8, 1, *ones), (1, 8, *ones)):
        made = build(parts | {"magnitude": torch.arange(8.0).reshape(shape)}, 2.0)
        assert (made.kind, made.shape, made.parts.keys()) == ("DoRA", (8, 12, *kernel), {"up", "down", "dora_scale"})
        assert torch.equal(made.parts["dora_scale"], torch.arange(8.0).reshape(8, 1, *ones))
    for rows in (1, 7, 12):
        with pytest.raises(ValueError, match=rf"lora_magnitude_vector is \({rows},\), but the weight has 8 rows"):
            build(parts | {"magnitude": torch.ones(rows)}, 2.0)
    with pytest.raises(ValueError, match="dora_scale is a single number"):
        build(parts | {"dora_scale": torch.tensor(1.0)}, 2.0)
    assert build(parts | {"dora_scale": torch.ones(8)}, 2.0).kind == "DoRA"


@pytest.mark.parametrize("sizes", [[8, 12], [[8, 12]], 8])
def test_the_sizes_of_a_resized_weight_are_a_list(sizes):
    parts = {"up": normal(8, 3), "down": normal(3, 12), "reshape_weight": torch.tensor(sizes)}
    if torch.tensor(sizes).ndim == 1:
        assert (build(parts, 2.0).kind, build(parts, 2.0).parts.keys()) == ("resized weight", parts.keys())
    else:
        with pytest.raises(ValueError, match=r"reshape_weight is .*, but it is a list of sizes"):
            build(parts, 2.0)


@pytest.mark.parametrize("scale", ["alpha", "dora_scale", "magnitude", "reshape_weight"])
def test_a_scale_of_nothing_and_one_that_the_kind_has_not_are_idle(scale):
    assert idle({scale}) == idle({scale, "diff"}) == {scale}
    for kind, parts in ALL.items():
        unread = {
            "alpha": False,
            "dora_scale": False,
            "magnitude": kinds_of(parts)[0] not in ("LoRA", "LoHa", "LoKr"),
            "reshape_weight": kinds_of(parts)[0] != "LoRA",
        }[scale]
        assert (scale in idle({*parts, scale})) == unread, kind
    assert ignores_alpha({"alpha", "diff"})
    assert ignores_alpha({"alpha", "set_weight"})
    assert not ignores_alpha({"alpha", "oft_blocks"})


# ---- the shape of the weight that a GLoRA is for, in both of LyCORIS' orders


def glora(out, inputs, rank, kernel=(), old=False):
    """A = a1 a2 acts on the weight's input side, (in, in); B = b1 b2 is (out, in * kernel). Old: each the other way about,
    and A acts on all of a flattened row, (in * kernel, in * kernel)."""
    shapes = {"a1": (inputs, rank), "a2": (rank, inputs), "b1": (out, rank), "b2": (rank, inputs, *kernel)}
    if old:
        row = inputs * math.prod(kernel)
        shapes = {"a1": (rank, row), "a2": (row, rank), "b1": (rank, inputs, *kernel), "b2": (out, rank)}
    return {name: normal(*shape) for name, shape in shapes.items()}


@pytest.mark.parametrize("old", [False, True])
@pytest.mark.parametrize("kernel", [(), (3, 3)])
def test_the_weight_of_a_glora_is_told_from_its_parts(old, kernel):
    for out, inputs, rank in itertools.product((2, 5, 7), (2, 5, 6), (1, 2, 3)):
        made = build(glora(out, inputs, rank, kernel, old), 1.0)
        if min(out, inputs) > rank:  # as every low rank is
            assert (made.kind, made.shape) == (GLORA, (out, inputs, *kernel)), (out, inputs, rank)
        else:
            assert (out, inputs, *kernel) <= made.shape


@pytest.mark.parametrize("old", [False, True])
def test_a_glora_whose_ranks_differ_is_refused(old):
    parts = glora(5, 6, 2, old=old)
    axis = {"a1": 1, "a2": 0, "b1": 1, "b2": 0}
    for name, part in parts.items():
        shape = list(part.shape)
        shape[1 - axis[name] if old else axis[name]] += 2
        with pytest.raises(ValueError, match=r"a1 is .* their ranks or widths differ"):
            build(parts | {name: normal(*shape)}, 1.0)
        with pytest.raises(ValueError, match=r"a1 is .* their ranks or widths differ"):
            build(parts | {name: normal(4)}, 1.0)


@pytest.mark.parametrize(
    ("shape", "kind"),
    [
        ((3, 4, 4), OFT),
        ((2, 3, 4, 4), BOFT),
        ((3, 4, 5), None),
        ((4, 4), None),
        ((1, 2, 3, 4, 4), None),
        ((3, 5, 4), None),
    ],
)
def test_blocks_of_oft_are_square_and_stand_for_rows(shape, kind):
    if kind is None:
        with pytest.raises(ValueError, match=r"oft_blocks is \("):
            build({"oft_blocks": normal(*shape)}, None)
    else:
        made = build({"oft_blocks": normal(*shape)}, None)
        assert (made.kind, made.shape, made.alpha) == (kind, (12,), None)
