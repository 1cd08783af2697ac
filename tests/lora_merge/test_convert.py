"""The command convert, and the modules of one LoRA that another has or has not."""

import pytest
import torch
from safetensors.torch import load_file, save_file

from lcm_kit.lora_merge import Lora, load
from lcm_kit.lora_merge.__main__ import main
from lcm_kit.lora_merge.files.formats import exact_in_peft, named_for
from lcm_kit.lora_merge.files.shared import only
from lcm_kit.lora_merge.merging.merge import merge
from lcm_kit.tests.lora_merge import kinds
from lcm_kit.tests.lora_merge.make import factors, kohya

WIDTH = 6
QKV, PROJ = "lora_unet_double_blocks_0_img_attn_qkv", "lora_unet_double_blocks_0_img_attn_proj"
SINGLE = "lora_unet_single_blocks_0_linear1"
KOHYA = {QKV: 3 * WIDTH, PROJ: WIDTH, SINGLE: 7 * WIDTH}


def flux(alpha=1, dtype=torch.float16):
    state = {}
    for seed, (module, rows) in enumerate(KOHYA.items()):
        state |= kohya(module, *factors(rows, 2, WIDTH, seed=seed), alpha=alpha)
    return {key: tensor if key.endswith("alpha") else tensor.to(dtype) for key, tensor in state.items()}


@pytest.fixture
def file(tmp_path):
    save_file(flux(), tmp_path / "flux.safetensors")
    return tmp_path / "flux.safetensors"


def convert(file, *more):
    out = file.with_name("out.safetensors")
    status = main(["convert", str(file), "-o", str(out), *map(str, more)])
    return status, out


def test_to_diffusers_and_back_is_the_same_file(file):
    status, out = convert(file, "--format", "diffusers")
    assert status == 0
    there = load_file(out)
    name = "transformer.single_transformer_blocks.0.proj_mlp.lora_B.weight"
    assert there[name].shape == (4 * WIDTH, 2)
    assert there[name].dtype == torch.float16
    # alpha 1 of rank 2 is a scale of 1/2, which is exact in a factor.
    up = load_file(file)[f"{SINGLE}.lora_up.weight"]
    assert torch.equal(there[name], up[3 * WIDTH :] * 0.5)
    back = out.with_name("back.safetensors")
    assert main(["convert", str(out), "-o", str(back), "--format", "kohya"]) == 0
    again = load_file(back)
    assert again.keys() == load_file(file).keys()
    for module in KOHYA:
        assert torch.equal(load(back).delta(module), load(file).delta(module))
        assert again[f"{module}.lora_down.weight"].shape == (2, WIDTH)


def test_a_scale_that_is_no_power_of_two_is_kept_in_float32(tmp_path, capsys):
    file = tmp_path / "odd.safetensors"
    save_file(flux(alpha=0.6), file)
    status, out = convert(file, "--format", "comfy")
    assert status == 0
    assert "3 of them as fp32" in capsys.readouterr().out
    assert {tensor.dtype for tensor in load_file(out).values()} == {torch.float32}
    for module in KOHYA:
        wanted = load(file).delta(module)
        assert float((load(out).delta(module) - wanted).abs().max()) <= 2e-7 * float(wanted.abs().max())


@pytest.mark.parametrize("alpha", [-4.0, -2.0, -0.5, 0.25, 8.0])
def test_a_scale_that_is_a_power_of_two_is_exact_whatever_its_sign(alpha):
    """It goes into up as a whole: down keeps its numbers, and up's are multiplied without rounding."""
    state = {key: tensor.float() for key, tensor in flux(alpha=alpha).items()}
    written = Lora.from_state_dict(state).to_state_dict(format="comfy")
    assert len(written) == 2 * len(KOHYA)
    for module in KOHYA:
        assert torch.equal(written[f"{module}.lora_B.weight"], state[f"{module}.lora_up.weight"] * (alpha / 2))
        assert torch.equal(written[f"{module}.lora_A.weight"], state[f"{module}.lora_down.weight"])


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_what_a_factor_would_round_with_its_scale_is_made_float32_whole(dtype):
    """Of rank 2: alpha 1, 2, -4 and 0 are powers of two as scales, or nothing; 3 and -0.7 are none."""
    alphas = {"one": 1.0, "two": 2.0, "none": None, "negative": -4.0, "nothing": 0.0, "odd": 3.0, "less": -0.7}
    state = kinds.state_dict("LoHa", "lora_unet_loha", alpha=3.0, dtype=dtype)
    for name, alpha in alphas.items():
        state |= kohya(f"lora_unet_{name}", *factors(6, 2, 5, dtype=dtype), alpha)
    one = Lora.from_state_dict(state)
    wide, count = exact_in_peft(one)
    assert count == (0 if dtype == torch.float32 else 2)
    assert [*wide.modules] == [*one.modules]
    for module, layer in wide.modules.items():
        wider = module in ("lora_unet_odd", "lora_unet_less")
        assert {part.dtype for part in layer.parts().values()} == {torch.float32 if wider else dtype}, module
        assert torch.equal(wide.delta(module), one.delta(module))


def test_kohyas_format_keeps_every_number(file):
    _, out = convert(file, "--format", "kohya")
    before, after = load_file(file), load_file(out)
    assert all(torch.equal(after[key], before[key]) for key in before)


@pytest.mark.parametrize(("which", "kept"), [("shared", {QKV}), ("unique", {PROJ, SINGLE})])
def test_only_the_modules_that_another_has_or_has_not(file, which, kept):
    other = file.with_name("other.safetensors")
    state = {}
    for name in ("transformer_blocks.0.attn.to_q", "single_transformer_blocks.0.norm.linear"):
        up, down = factors(WIDTH, 2, WIDTH)
        state |= {f"transformer.{name}.lora_B.weight": up, f"transformer.{name}.lora_A.weight": down}
    save_file(state, other)
    status, out = convert(file, "--format", "kohya", "--only", which, "--against", other)
    assert status == 0
    assert {key.split(".")[0] for key in load_file(out)} == kept
    for module in kept:
        assert torch.equal(load(out).delta(module), load(file).delta(module))


def test_shared_and_unique_are_the_whole(file):
    one, other = load(file), load(file)
    other = type(other)(modules={PROJ: other.modules[PROJ]}, spellings=other.spellings)
    parts = [only(one, other, which) for which in ("shared", "unique")]
    whole = merge([(part, 1.0) for part in parts])
    assert whole.modules.keys() == one.modules.keys()
    for module in KOHYA:
        torch.testing.assert_close(whole.delta(module), one.delta(module), rtol=1e-6, atol=1e-7)
    with pytest.raises(ValueError, match="nothing is left"):
        only(one, one, "unique")


@pytest.mark.parametrize("which", ["shared", "unique"])
def test_of_every_kind_of_update_only_those_of_the_kept_modules_are_left(which):
    """Low-rank, whole, of a bias, dependent on the weight; and no key that nobody reads."""
    state = flux(dtype=torch.float32) | {f"{QKV}.diff_b": torch.ones(3 * WIDTH), f"{PROJ}.diff_b": torch.ones(WIDTH)}
    state |= {f"lora_unet_img_in.{part}": torch.ones(WIDTH) for part in ("diff", "diff_b")}
    state |= {f"{PROJ}.dora_scale": torch.ones(WIDTH, 1), "a.stray.key": torch.ones(3)}
    one = Lora.from_state_dict(state)
    other = Lora.from_state_dict(
        {key: part for key, part in state.items() if key.startswith((PROJ, "lora_unet_img_in"))}
    )
    kept = {PROJ, "lora_unet_img_in"} if which == "shared" else {QKV, SINGLE}
    found = only(one, other, which).to_state_dict()
    assert found.keys() == {key for key in one.to_state_dict() if key.split(".")[0] in kept}
    assert all(torch.equal(tensor, one.to_state_dict()[key]) for key, tensor in found.items())


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--only", "shared"], "--only and --against go together"),
        (["--against", "x.safetensors"], "--only and --against go together"),
        (["--meta", "nonsense"], "--meta"),
    ],
)
def test_what_is_asked_wrongly_is_said_and_nothing_is_written(file, more, message, capsys):
    status, out = convert(file, *more)
    assert status == 2
    assert message in capsys.readouterr().err
    assert not out.exists()


# Two models whose names in diffusers are the same: grouped attention, 3 rows of q to 1 of k and of v.
@pytest.mark.parametrize(
    ("width", "own"),
    [
        (2304, {"attention.qkv": (3840, 2304), "attention.out": (2304, 2304)}),  # Lumina 2, fused in ComfyUI
        (2520, {"attn.to_q": (2520, 2520), "attn.to_k": (840, 2520), "attn.to_v": (840, 2520),
                "attn.to_out.0": (2520, 2520)}),  # OmniGen 2, as in diffusers
    ],
)  # fmt: skip
def test_names_of_two_models_are_told_apart_by_their_width(tmp_path, width, own):
    file, state = tmp_path / "attention.safetensors", {}
    for seed, name in enumerate(("to_q", "to_k", "to_v", "to_out.0")):
        rows = width if name in ("to_q", "to_out.0") else width // 3
        up, down = factors(rows, 1, width, seed=seed)
        module = f"transformer.layers.0.attn.{name}"
        state |= {f"{module}.lora_B.weight": up, f"{module}.lora_A.weight": down}
    save_file(state, file)
    status, out = convert(file)
    assert status == 0
    lora = load(out)
    assert {name: lora.modules[module].shape for module, name in lora.spellings.items()} == {
        f"diffusion_model.layers.0.{name}": shape for name, shape in own.items()
    }
    back = out.with_name("back.safetensors")
    assert main(["convert", str(out), "-o", str(back), "--format", "diffusers"]) == 0
    again = load_file(back)
    assert again.keys() == state.keys()
    assert all(torch.equal(again[key], state[key]) for key in state)


def test_every_format_has_names_of_its_own():
    one = Lora.from_state_dict(flux())
    double, single = "transformer.transformer_blocks.0.attn.", "transformer.single_transformer_blocks.0."
    for format, names in {
        "kohya": {*KOHYA},
        "comfy": {f"diffusion_model.{x}" for x in ("double_blocks.0.img_attn.qkv", "double_blocks.0.img_attn.proj",
                                                   "single_blocks.0.linear1")},
        "diffusers": {f"{double}to_{x}" for x in ("q", "k", "v", "out.0")}
        | {f"{single}{x}" for x in ("attn.to_q", "attn.to_k", "attn.to_v", "proj_mlp")},
    }.items():  # fmt: skip
        named, written_in = named_for(one, format)
        assert set(named.spellings.values()) == names
        assert written_in == format


def flux_of(*parts):
    """A LoRA of some of: a weight that diffusers has whole, one that it has in slices, slices, other kinds and differences."""
    state, name = {}, "lora_unet_double_blocks_0_{}".format
    for part in parts:
        if part == "whole":
            state |= kohya(PROJ, *factors(WIDTH, 2, WIDTH), 1.0)
        elif part == "fused":
            state |= kohya(QKV, *factors(3 * WIDTH, 2, WIDTH, seed=1), 1.0)
        elif part == "slice":
            state |= kohya("transformer.transformer_blocks.0.attn.to_q", *factors(WIDTH, 2, WIDTH, seed=2), 1.0)
        elif part == "text":
            state |= kohya("lora_te1_text_model_encoder_layers_0_mlp_fc1", *factors(5, 2, 4), 1.0)
        elif part == "bias":
            state[f"{PROJ}.diff_b"] = torch.ones(WIDTH)
        elif part == "core":
            state |= kinds.state_dict("LoCon with a core", name("img_mlp_0"), 8, 12, (1, 1))
        else:
            state |= kinds.state_dict(part, name("img_mlp_0"), 4 * WIDTH, WIDTH)
    return Lora.from_state_dict(state, source="here")


@pytest.mark.parametrize(
    ("parts", "format"),
    [
        (("whole",), "diffusers"),
        (("whole", "text"), "diffusers"),
        # In slices a fused weight takes more numbers.
        (("fused",), "kohya"),
        (("whole", "fused"), "kohya"),
        (("slice",), "diffusers"),
        (("whole", "slice"), "diffusers"),
        # diffusers' format holds plain LoRA alone.
        (("whole", "bias"), "kohya"),
        (("whole", "LoHa"), "kohya"),
        (("whole", "LoKr, both whole"), "kohya"),
        (("whole", "core"), "kohya"),
        (("whole", "DoRA, rows"), "kohya"),
        (("whole", "OFT"), "kohya"),
    ],
)
def test_unless_told_a_file_of_flux_is_for_both_readers_where_that_costs_nothing(parts, format):
    one = flux_of(*parts)
    named, written_in = named_for(one, "auto")
    assert written_in == format
    starts = {"diffusers": ("transformer.", "lora_te"), "kohya": ("lora_unet_", "lora_te", "diffusion_model.")}[format]
    assert all(name.startswith(starts) for name in named.spellings.values())
    assert named.parameters == one.parameters
    assert len(named.spellings) == len(one.spellings)


def test_slices_that_a_fused_weight_leaves_as_they_are_are_not_written_for_diffusers():
    """Rows of zeros: what was a LoRA of some slices became one of the whole weight. Of one that changes nothing all are."""
    up, down = factors(3 * WIDTH, 2, WIDTH)
    up[WIDTH : 2 * WIDTH] = 0
    for factor, slices in ((up, "qv"), (torch.zeros_like(up), "qkv")):
        named, _ = named_for(Lora.from_state_dict(kohya(QKV, factor, down)), "diffusers")
        assert {*named.spellings.values()} == {f"transformer.transformer_blocks.0.attn.to_{x}" for x in slices}
        assert all(torch.equal(layer.down, down) for layer in named.modules.values())


@pytest.mark.parametrize("count", [1, 3, 4])
@pytest.mark.parametrize(
    ("kind", "why"),
    [("DoRA, columns", "they are DoRA."), ("DoRA on LoHa", "they are DoRA."), ("DoRA on LoKr", "they are DoRA."),
     ("OFT", "they are OFT."), ("BOFT", "they are BOFT."), ("LoHa", None), ("diff", None),
     ("diff_b", "the other slices do not tell where they lie in it.")],
)  # fmt: skip
def test_slices_that_no_loader_knows_and_that_cannot_be_put_together_are_refused_for_their_kind(kind, why, count):
    """Of HunyuanVideo, whose slices ComfyUI has no names for; LoHa and differences become rows of the whole weight."""
    state = kohya("transformer.x_embedder.proj", *factors(WIDTH * 2, 2, 4))
    state |= kohya("transformer.single_transformer_blocks.39.proj_out", *factors(WIDTH * 2, 2, 10 * WIDTH))
    names = [f"transformer.transformer_blocks.{number}.attn.to_q" for number in range(count)]
    for name in names:
        if kind == "diff":
            state[f"{name}.diff"] = torch.ones(2 * WIDTH, 2 * WIDTH)
        elif kind == "diff_b":
            state[f"{name}.diff_b"] = torch.ones(2 * WIDTH)
        else:
            state |= kinds.state_dict(kind, name, 2 * WIDTH, 2 * WIDTH)
    one = Lora.from_state_dict(state, source="here")
    if why is None:
        named, _ = named_for(one, "comfy")
        wholes = {f"diffusion_model.double_blocks.{number}.img_attn.qkv" for number in range(count)}
        assert wholes < {*named.spellings.values()}
        return
    with pytest.raises(ValueError, match=f"^here: {count} of its modules ") as error:
        named_for(one, "comfy")
    assert why.split(".")[0] in str(error.value)
    assert [f"blocks.{number}.attn.to_q" in str(error.value) for number in range(count)] == [
        n < 3 for n in range(count)
    ]


HUNYUAN = {  # own name -> Tencent's, which both read
    "double_blocks.19.img_attn.qkv": "double_blocks.19.img_attn_qkv",
    "double_blocks.19.img_attn.proj": "double_blocks.19.img_attn_proj",
    "double_blocks.19.txt_mlp.0": "double_blocks.19.txt_mlp.fc1",
    "single_blocks.39.linear2": "single_blocks.39.linear2",
}


@pytest.mark.parametrize(
    ("left_out", "more", "common"),
    [
        (None, {}, True),
        ("double_blocks.19.txt_mlp.0", {}, True),
        # By qkv's name diffusers knows what the file is.
        ("double_blocks.19.img_attn.qkv", {}, False),
        (None, {"diffusion_model.img_in.proj": "LoRA"}, False),
        (None, {"diffusion_model.double_blocks.18.img_attn.proj": "LoHa"}, False),
        (None, {"diffusion_model.double_blocks.18.img_attn.proj": "OFT"}, False),
        (None, {"lora_te1_text_model_encoder_layers_0_mlp_fc1": "LoRA"}, True),
    ],
)
def test_hunyuan_video_is_written_in_names_that_both_readers_know_where_all_have_one(left_out, more, common):
    width = 2 * WIDTH
    shapes = {"qkv": (3 * width, width), "proj": (width, width), "0": (4 * width, width), "linear2": (width, 5 * width)}
    state = {}
    own = [name for name in HUNYUAN if name != left_out]
    for seed, name in enumerate(own):
        out, inputs = shapes[name.rpartition(".")[2]]
        state |= kohya(f"diffusion_model.{name}", *factors(out, 2, inputs, seed=seed), 1.0)
    for name, kind in more.items():
        state |= kinds.state_dict(kind, name, width, width)
    one = Lora.from_state_dict(state)
    named, written_in = named_for(one, "auto")
    assert written_in == "comfy"
    wanted = {f"diffusion_model.{HUNYUAN[name] if common else name}" for name in own}
    assert wanted <= {*named.spellings.values()}
    assert len(named.spellings) == len(one.spellings)


@pytest.mark.parametrize("kind", ["LoHa", "DoRA, columns", "OFT"])
def test_slices_that_comfyui_reads_stay_what_they_are(kind):
    name = "transformer.transformer_blocks.0.attn.to_q"
    state = kohya(PROJ, *factors(WIDTH * 2, 2, WIDTH * 2)) | kinds.state_dict(kind, name, 2 * WIDTH, 2 * WIDTH)
    for format in ("kohya", "comfy", "auto"):
        named, _ = named_for(Lora.from_state_dict(state), format)
        assert name in named.spellings.values()
        assert len(named.spellings) == 2
