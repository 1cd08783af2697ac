"""What a model says of names, as far as LoRAs use them."""

import pytest
import torch

from lcm_kit.lora_merge import Lora, merge, merge_with_account
from lcm_kit.lora_merge.merging.by_target import ModelNames, Target, by_target
from lcm_kit.lora_merge.merging.provenance import recipe_of
from lcm_kit.lora_merge.naming.family import Rows
from lcm_kit.tests.lora_merge import kinds
from lcm_kit.tests.lora_merge.make import factors, kohya

WEIGHTS = {f"diffusion_model.{name}.weight": (12, 4) for name in "abc"}
QKV, PROJ, OTHER = WEIGHTS
MODEL = ModelNames(
    {
        "lora_unet_a": Target(QKV),
        "transformer.a_k": Target(QKV, Rows(4, 4)),
        "lora_unet_b": Target(PROJ, turned=True),
        "lora_unet_c": Target(OTHER),
    },
    WEIGHTS,
)


def lora(*modules):
    return Lora.from_state_dict({key: part for m in modules for key, part in kohya(m, *factors(4, 2, 4)).items()})


def test_of_a_model_only_what_the_loras_name_is_kept():
    """A name that the model has not is none of its own, and one that no LoRA has is not asked for."""
    used = MODEL.of([lora("transformer.a_k", "lora_unet_x"), lora("lora_unet_b", "lora_te1_text_model_a")])
    spelled = next(name for name, target in used.targets.items() if target.weight == QKV)
    assert used.targets == {spelled: Target(QKV, Rows(4, 4)), "lora_unet_b": Target(PROJ, turned=True)}
    assert used.shapes == {QKV: (12, 4), PROJ: (12, 4)}
    assert MODEL.of([]).targets == MODEL.of([lora("lora_unet_x")]).shapes == {}


def test_what_a_model_says_comes_back_from_json_as_it_was():
    again = ModelNames.from_dict(MODEL.to_dict())
    assert (again.targets, again.shapes) == (MODEL.targets, MODEL.shapes)
    values = MODEL.to_dict()
    values["names"]["transformer.a_k"] = [0, 9, 4]
    with pytest.raises(ValueError, match=r"transformer\.a_k is rows 9 to 13 of diffusion_model\.a\.weight"):
        ModelNames.from_dict(values)


# ---- weights of a model that no table knows: one fused of three, one whose halves a naming has the other way about

FUSED, HALVES, PLAIN = (f"diffusion_model.stage.0.{name}.weight" for name in ("mix.abc", "gate", "out"))
SHAPES = {FUSED: (12, 5), HALVES: (8, 5), PLAIN: (6, 5)}
TARGETS = {
    "diffusion_model.stage.0.mix.abc": Target(FUSED),
    "net.stage.0.mix.a": Target(FUSED, Rows(0, 4)),
    "net.stage.0.mix.b": Target(FUSED, Rows(4, 5)),
    "net.stage.0.mix.c": Target(FUSED, Rows(9, 3)),
    "other.0.first": Target(FUSED, Rows(0, 4)),
    "diffusion_model.stage.0.gate": Target(HALVES),
    "net.stage.0.gate": Target(HALVES, turned=True),
    "diffusion_model.stage.0.out": Target(PLAIN),
    "net.stage.0.out": Target(PLAIN),
}
WHOLE, GATE, OUT = (weight.removesuffix(".weight") for weight in SHAPES)
OWN = {name: f"lora_unet_{name.removeprefix('diffusion_model.').replace('.', '_')}" for name in (WHOLE, GATE, OUT)}


def of(source, *named, seed=0, alpha=1.0):
    """A LoRA of these (module, number of rows)."""
    tensors = {}
    for number, (module, out) in enumerate(named):
        tensors |= kohya(module, *factors(out, 2, 5, seed=10 * seed + number), alpha)
    return Lora.from_state_dict(tensors, source=source)


def only(lora):
    (module,) = lora.spellings
    return lora.delta(module).double()


def test_slices_become_part_of_a_weight_that_another_lora_has_whole():
    whole = of("whole", (WHOLE, 12), seed=1)
    parts = of("parts", ("net.stage.0.mix.b", 5), ("net.stage.0.mix.c", 3), ("net.stage.0.out", 6), seed=2)
    expected = torch.zeros(12, 5, dtype=torch.float64)
    for rows, name in ((slice(4, 9), "b"), (slice(9, 12), "c")):
        (module,) = (m for m, s in parts.spellings.items() if s.endswith(f"mix_{name}") or s.endswith(f"mix.{name}"))
        expected[rows] = parts.delta(module).double()
    for loras in ([whole, parts], [parts, whole]):
        made = {one.source: one for one in by_target(loras, TARGETS, SHAPES)}
        assert made["whole"].modules.keys() == {OWN[WHOLE]}
        assert made["parts"].modules.keys() == {OWN[WHOLE], OWN[OUT]}
        assert torch.allclose(made["parts"].delta(OWN[WHOLE]).double(), expected, atol=1e-7)
        assert torch.equal(made["whole"].delta(OWN[WHOLE]), only(whole).float())
        assert made["parts"].spellings == {OWN[WHOLE]: WHOLE, OWN[OUT]: OUT}


def test_a_merge_on_a_model_adds_slices_and_wholes_up():
    whole, parts = of("whole", (WHOLE, 12), seed=1), of("parts", ("net.stage.0.mix.a", 4), seed=2)
    merged, account = merge_with_account([(whole, 0.5), (parts, -2.0)], model=ModelNames(TARGETS, SHAPES))
    total = 0.5 * only(whole)
    total[:4] += -2.0 * only(parts)
    assert torch.allclose(only(merged), total, atol=1e-6)
    assert len(account.model.targets) == 2
    told = recipe_of(merged.metadata, "merged").model
    assert (told.targets, told.shapes) == (account.model.targets, account.model.shapes)
    assert account.model.shapes == {FUSED: (12, 5)}
    # Where nothing had to be changed nothing is said of the model.
    same, account = merge_with_account([(whole, 1.0), (whole, 1.0)], model=ModelNames(TARGETS, SHAPES))
    assert account.model is None
    assert recipe_of(same.metadata, "merged").model is None


def test_two_names_of_one_slice_are_the_first_ones():
    one, two = of("one", ("net.stage.0.mix.a", 4), seed=1), of("two", ("other.0.first", 4), seed=2)
    for loras in ([one, two], [two, one]):
        made = by_target(loras, TARGETS, SHAPES)
        assert {next(iter(each.spellings)) for each in made} == set(loras[0].spellings)
        assert {next(iter(each.spellings.values())) for each in made} == set(loras[0].spellings.values())
        assert [torch.equal(only(a), only(b)) for a, b in zip(made, loras, strict=True)] == [True, True]


def test_halves_change_places_where_a_name_has_them_the_other_way_about():
    own, theirs = of("own", (GATE, 8), seed=1), of("theirs", ("net.stage.0.gate", 8), seed=2)
    first, second = by_target([own, theirs], TARGETS, SHAPES)
    assert first.spellings == second.spellings == {OWN[GATE]: GATE}
    assert torch.equal(only(first), only(own))
    assert torch.equal(only(second), torch.cat([only(theirs)[4:], only(theirs)[:4]]))
    # Of an update whose rows do not stand in one matrix the name stays.
    loha = Lora.from_state_dict(kinds.state_dict("LoHa", "net.stage.0.gate", 8, 5), source="loha")
    _, kept = by_target([own, loha], TARGETS, SHAPES)
    assert kept.spellings == loha.spellings
    assert torch.equal(only(kept), only(loha))


def test_where_names_tell_what_meets_nothing_is_changed():
    loras = [of("a", (WHOLE, 12)), of("b", (GATE, 8), (WHOLE, 12))]
    assert all(one is other for one, other in zip(by_target(loras, TARGETS, SHAPES), loras, strict=True))
    alone = [of("c", ("net.stage.0.mix.a", 4), ("net.stage.0.mix.b", 5))]
    assert by_target(alone, TARGETS, SHAPES)[0] is alone[0]


def test_what_the_model_has_no_place_for_keeps_its_name():
    one = of("one", (OUT, 6), ("net.elsewhere", 6), ("lora_te1_text_model_encoder_layers_0_mlp_fc1", 6), seed=1)
    two = of("two", ("net.stage.0.out", 6), seed=2)
    made, other = by_target([one, two], TARGETS, SHAPES)
    assert made.spellings == {**one.spellings, OWN[OUT]: OUT}
    assert len(made.spellings) == 3
    assert other.spellings == {OWN[OUT]: OUT}


def test_a_lora_without_any_place_in_the_model_is_refused_and_one_of_text_alone_is_not():
    lost = of("lost", ("net.elsewhere", 6), ("net.nowhere", 6))
    with pytest.raises(
        ValueError, match=r"^lost: none of its 2 modules has a place .* \(the first is net[._]elsewhere\)"
    ):
        by_target([of("a", (OUT, 6)), lost], TARGETS, SHAPES)
    text = of("text", ("lora_te1_text_model_encoder_layers_0_mlp_fc1", 6))
    assert by_target([of("a", (OUT, 6)), text], TARGETS, SHAPES)[1] is text


def test_one_weight_twice_in_one_lora_is_refused_by_both_names():
    double = of("double", (WHOLE, 12), (OUT, 6), ("net.stage.0.out", 6), (GATE, 8))
    with pytest.raises(ValueError, match=r"^double: \S+out and net[._]stage[._]0[._]out are one weight"):
        by_target([double, of("b", (OUT, 6))], TARGETS, SHAPES)


@pytest.mark.parametrize("how", ["LoHa", "too few rows", "huge"])
def test_a_slice_that_cannot_be_put_in_stays_a_slice(how):
    """LoHa would become a LoRA of a high rank; an update beyond float32 would become infinite."""
    name = "net.stage.0.mix.a"
    if how == "LoHa":
        part = Lora.from_state_dict(kinds.state_dict("LoHa", name, 4, 5), source="part")
    elif how == "too few rows":
        part = of("part", (name, 3))
    else:
        part = Lora.from_state_dict(kohya(name, *(1e25 * one for one in factors(4, 2, 5))), source="part")
    _, made = by_target([of("whole", (WHOLE, 12)), part], TARGETS, SHAPES)
    assert len(made.modules) == 1
    assert made.modules.keys() == part.modules.keys()
    assert OWN[WHOLE] not in made.spellings


def test_a_model_says_nothing_of_loras_of_text():
    text = of("text", ("lora_te1_text_model_encoder_layers_0_mlp_fc1", 6))
    merged = merge([(text, 2.0)], model=ModelNames(TARGETS, SHAPES))
    assert torch.allclose(only(merged), 2 * only(text), atol=1e-7)
