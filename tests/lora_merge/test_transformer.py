"""What a family says of its names, of tables small enough to be read: one stack of two kinds of modules, and the rest."""

import pytest

from lcm_kit.lora_merge.naming.family import Rows
from lcm_kit.lora_merge.naming.tables import Fused, Stack
from lcm_kit.lora_merge.naming.transformer import transformer

W = 6
STACK = Stack(
    own="blocks",
    theirs="layers",
    depth=3,
    whole={"mlp.up": "ff.a ~ff.b", "mlp.down": "", "ada.lin": "ada.linear", "attn.kv": ""},
    same="norm",
    fused={"attn.qkv": Fused(("q k v", "~x.q ~x.k ~x.v"), "wrr", share=2, pieces={"attn.kv": (1, 2)})},
    parameters={"gate": "their_gate"},
    also={"mlp.down": "mlp.old"},
    turned_last="ada.lin",
)
FAMILY = transformer(
    "Toy",
    stacks=[STACK],
    outside={"img.in": "x_in.proj", "out.lin": "proj_out", "token": "token"},
    turned={"out.ada": "norm_out.linear"},
    parameters=("token",),
    own_read_as=("lycoris_", "own."),
    own_read_lately=("base.",),
    theirs_read_as=("transformer.", "their_"),
    ratios={"img.in": 2.0},
    width=7,
    saved="diffusers",
    saved_fused="kohya",
)
OWN, THEIRS = "lora_unet_", "lora_transformer_"
# Own name with its number -> every other name of the same weight.
WHOLE = {
    "blocks.2.mlp.up": ["layers.2.ff.a", "layers.2.ff.b"],
    "blocks.2.mlp.down": ["blocks.2.mlp.old"],
    "blocks.2.ada.lin": ["layers.2.ada.linear"],
    "blocks.2.norm": ["layers.2.norm"],
    "blocks.2.gate": ["layers.2.their_gate"],
    "blocks.2.attn.qkv": [],
    "img.in": ["x_in.proj"],
    "out.lin": ["proj_out"],
    "token": ["token"],
}
SLICES = {f"layers.2.{name}": number for names in ("qkv", ("x.q", "x.k", "x.v")) for number, name in enumerate(names)}
FUSED = f"{OWN}blocks_2_attn_qkv"


def flat(name):
    return name.replace(".", "_")


@pytest.mark.parametrize("prefix", [OWN, THEIRS, "lora_prior_unet_", "model_diffusion_model_", ""])
@pytest.mark.parametrize("own", WHOLE)
def test_each_name_of_a_weight_means_its_own_one(own, prefix):
    for name in (own, *WHOLE[own]):
        assert FAMILY.own(prefix + flat(name)) == OWN + flat(own)
        assert FAMILY.fused(prefix + flat(name)) == frozenset()
    assert FAMILY.own(f"{prefix}{flat(own)}_bias") == f"{OWN}{flat(own)}_bias"
    assert FAMILY.dots(OWN + flat(own)) == own
    assert FAMILY.slice_name(OWN + flat(own)) is None


@pytest.mark.parametrize("name", SLICES)
def test_a_slice_is_of_its_fused_weight_and_stays_diffusers(name):
    """Rows of a weight of W columns: W for q, and halves of the rest for k and v."""
    module = THEIRS + flat(name)
    assert FAMILY.own(OWN + flat(name)) == module
    assert FAMILY.fused(module) == {FUSED}
    assert FAMILY.dots(module) is None
    start, length = [(0, W), (W, 4), (W + 4, 4)][SLICES[name]]
    assert FAMILY.rows(module, FUSED, (W + 8, W)) == Rows(start, length)
    assert FAMILY.rows(module, FUSED, (W + 7, W)) is None
    assert FAMILY.rows(module, FUSED, (W + 8,)) is None
    assert FAMILY.rows(module, f"{OWN}blocks_1_attn_qkv", (W + 8, W)) is None
    assert FAMILY.rows(module, f"{OWN}blocks_2_norm", (W + 8, W)) is None
    # q tells its width alone, and every k and v is 2 widths here; k and v have as many rows as they have.
    whole = (W + 2 * 2 * W, W) if SLICES[name] == 0 else (W + 2 * 5, W)
    assert FAMILY.whole_shape(FUSED, {module: (W if SLICES[name] == 0 else 5, W)}) == whole
    read = not name.startswith("layers.2.x.")
    assert FAMILY.slice_name(module) == (f"transformer.{name}" if read else None)


def test_several_slices_in_one_module_are_rows_of_the_weight_too():
    piece = f"{OWN}blocks_2_attn_kv"
    assert FAMILY.fused(piece) == {FUSED}
    assert FAMILY.rows(piece, FUSED, (W + 8, W)) == Rows(W, 8)
    # Of two slices at once nothing tells where one ends.
    assert FAMILY.whole_shape(FUSED, {piece: (8, W)}) is None
    assert FAMILY.whole_shape(FUSED, {}) is None
    assert FAMILY.whole_shape(f"{OWN}blocks_2_norm", {f"{THEIRS}layers_2_q": (W, W)}) is None
    two = {f"{THEIRS}layers_2_q": (W, W), f"{THEIRS}layers_2_v": (5, W)}
    assert FAMILY.whole_shape(FUSED, two) == (W + 10, W)


def test_a_slice_may_be_of_two_fused_weights_of_which_one_is_part_of_the_other():
    """As q of Flux's single blocks, whose linear1 some files have without its MLP."""
    fused = {"qk": Fused(("q k",), "ww"), "qkm": Fused(("q k m",), "wwr", pieces={"qk": (0, 2)})}
    one = transformer("Two", stacks=[Stack(own="blocks", theirs="layers", fused=fused)], outside={})
    small, large = f"{OWN}blocks_0_qk", f"{OWN}blocks_0_qkm"
    assert [one.fused(f"{THEIRS}layers_0_{x}") for x in "qkm"] == [{small, large}, {small, large}, {large}]
    assert one.fused(small) == {large}
    for whole, rows in ((small, 2 * W), (large, 3 * W)):
        assert one.rows(f"{THEIRS}layers_0_k", whole, (rows, W)) == Rows(W, W)


def test_diffusers_has_for_each_weight_the_first_of_its_names():
    def parts(own, rows=4, columns=W):
        return [
            (name, [(one.start, one.length) for one in rows]) for name, rows in FAMILY.parts(OWN + own, (rows, columns))
        ]

    assert parts("blocks_2_mlp_up") == [("layers.2.ff.a", [(0, 4)])]
    assert parts("blocks_2_mlp_down") == [("blocks.2.mlp.old", [(0, 4)])]
    assert parts("img_in") == [("x_in.proj", [(0, 4)])]
    assert parts("blocks_2_attn_qkv", W + 8) == [
        ("layers.2.q", [(0, W)]), ("layers.2.k", [(W, 4)]), ("layers.2.v", [(W + 4, 4)])
    ]  # fmt: skip
    assert parts("blocks_2_attn_qkv", W + 7) == []
    # The two halves of this one stand the other way about, and of the last block's where it has twice its columns.
    assert parts("out_ada") == [("norm_out.linear", [(2, 2), (0, 2)])]
    assert parts("blocks_2_ada_lin", 2 * W) == [("layers.2.ada.linear", [(W, W), (0, W)])]
    assert parts("blocks_2_ada_lin", 3 * W) == [("layers.2.ada.linear", [(0, 3 * W)])]
    assert FAMILY.parts(f"{THEIRS}layers_2_q", (W, W)) == FAMILY.parts(f"{OWN}strange", (W, W)) == ()


def test_halves_are_turned_where_diffusers_names_them_and_there_are_two():
    assert FAMILY.turn(f"{THEIRS}norm_out_linear", (4, W)) == f"{OWN}out_ada"
    assert FAMILY.turn(f"{THEIRS}norm_out_linear", (5, W)) is None
    assert FAMILY.turn(f"{OWN}out_ada", (4, W)) is None
    assert FAMILY.turn(f"{THEIRS}layers_2_ada_linear", (2 * W, W)) == f"{OWN}blocks_2_ada_lin"
    assert FAMILY.turn(f"{THEIRS}layers_2_ada_linear", (4 * W, W)) is None
    assert FAMILY.turn(f"{OWN}blocks_2_ada_lin", (2 * W, W)) is None
    assert FAMILY.turn(f"{THEIRS}layers_2_ff_a", (2 * W, W)) is None


@pytest.mark.parametrize(
    ("names", "known"),
    [
        (["blocks_2_mlp_up"], True),
        (["blocks_3_mlp_up"], False),
        (["x_in_proj", "proj_out", "out_lin_bias"], True),
        (["layers_2_q", "blocks_0_norm_bias", "norm_out_linear"], True),
        (["blocks_2_mlp_up", "strange"], False),
        (["blocks_2_strange_bias"], False),
        ([], False),
    ],
)
def test_a_lora_is_of_the_family_if_all_names_are_and_no_block_is_too_deep(names, known):
    assert FAMILY.recognises([THEIRS + name for name in names]) is known
    # Behind kohya's prefix trainers write the model's own names alone.
    own = all(name.startswith("blocks_2_mlp") for name in names)
    assert FAMILY.recognises([OWN + name for name in names]) is (known and own)
    assert not FAMILY.recognises([f"lora_te1_{name}" for name in names])


READ = {
    "diffusion_model.blocks.2.mlp.up": True,
    "diffusion_model.blocks.2.mlp.up.bias": True,
    "diffusion_model.img.in": True,
    "diffusion_model.token": True,
    "diffusion_model.blocks.2.gate": True,
    "lora_unet_blocks_2_mlp_up": True,
    "lora_unet_img_in": True,
    "lora_unet_token": False,  # no module's weight: with dots alone
    "lora_unet_blocks_2_gate": False,
    "lycoris_blocks_2_mlp_up": True,
    "lycoris_blocks_2_gate": False,
    "own.blocks.2.mlp.up": True,
    "own.token": False,
    "blocks.2.mlp.up": False,
    "lora_unet_blocks.2.mlp.up": False,
    "diffusion_model.blocks_2_mlp_up": False,
    "transformer.layers.2.ff.a": True,
    "transformer.layers.2.ff.b": False,
    "transformer.layers.2.q": True,
    "transformer.layers.2.x.q": False,
    "transformer.norm_out.linear": True,
    "transformer.proj_out": True,
    "their_layers_2_ff_a": True,
    "their_proj_out": True,
    "their_layers.2.ff.a": False,
    "diffusion_model.layers.2.ff.a": False,
    "lora_unet_layers_2_ff_a": False,
    "transformer.blocks.2.mlp.up": False,
    "base.blocks.2.mlp.up": False,
    "strange": False,
}


@pytest.mark.parametrize("spelling", READ)
def test_what_comfyui_reads(spelling):
    assert FAMILY.reads(spelling) is READ[spelling]


def test_newer_versions_read_own_names_behind_more_prefixes():
    assert FAMILY.reads_lately("base.blocks.2.mlp.up")
    assert not FAMILY.reads_lately("base.layers.2.ff.a")
    assert not FAMILY.reads_lately("other.blocks.2.mlp.up")
    assert not FAMILY.reads_lately("blocks.2.mlp.up")


def test_a_shape_has_the_ratio_that_tells_the_family():
    assert FAMILY.suits(f"{OWN}img_in", (12, 6))
    assert FAMILY.suits(f"{OWN}img_in", (4, 2, 1, 1))
    assert not FAMILY.suits(f"{OWN}img_in", (12, 5))
    assert not FAMILY.suits(f"{OWN}img_in", (2004, 1000))
    assert FAMILY.suits(f"{OWN}img_in", (2001, 1000))
    assert FAMILY.suits(f"{OWN}blocks_2_norm", (12, 5))
    assert FAMILY.suits(f"{OWN}strange", (12, 5))


def test_facts_of_the_family_are_kept():
    assert (FAMILY.name, FAMILY.width, FAMILY.saved, FAMILY.saved_fused, FAMILY.sure) == (
        "Toy",
        7,
        "diffusers",
        "kohya",
        False,
    )
    plain = transformer("Plain", stacks=[Stack(own="a")], outside={}, theirs_behind_kohya=True, sure=True)
    assert (plain.width, plain.saved, plain.saved_fused, plain.sure) == (0, "comfy", "comfy", True)


def test_behind_kohyas_prefix_some_families_have_diffusers_names_too():
    one = transformer("One", stacks=[STACK], outside={}, theirs_behind_kohya=True)
    assert one.recognises([f"{OWN}layers_2_ff_a"])
    assert not FAMILY.recognises([f"{OWN}layers_2_ff_a"])
    assert one.recognises([f"{THEIRS}layers_2_ff_a"])


def test_every_name_is_listed_with_what_it_means():
    found = {key: (own, fused) for key, own, fused in FAMILY.templates()}
    assert found["blocks", "mlp_up"] == found["layers", "ff_a"] == ("blocks.{}.mlp.up", ())
    assert found["layers", "q"] == ("", ("blocks.{}.attn.qkv",))
    assert found["", "x_in_proj"] == ("img.in", ())
    assert found["", "norm_out_linear"] == ("out.ada", ())


def test_one_name_of_two_weights_is_a_mistake_of_the_table():
    with pytest.raises(ValueError, match=r"layers\.\{\}\.a is blocks\.\{\}\.x and blocks\.\{\}\.y"):
        transformer("Wrong", stacks=[Stack(own="blocks", theirs="layers", whole={"x": "a", "y": "a"})], outside={})
    sliced = Stack(own="blocks", theirs="layers", whole={"x": "a"}, fused={"z": Fused(("a b",), "rr")})
    with pytest.raises(ValueError, match=r"layers\.\{\}\.a is blocks\.\{\}\.x and a slice"):
        transformer("Wrong", stacks=[sliced], outside={})
