"""Bases, branches and halves of transformers, against ComfyUI's own classes at full size."""

import re

import comfy.model_detection
import pytest
import torch
from comfy.lora import model_lora_keys_unet

from lcm_kit.host.lora import patches
from lcm_kit.host.lora.model_base import base_of
from lcm_kit.host.lora.weights import LoraWeights
from lcm_kit.lora_merge import Lora
from lcm_kit.lora_merge.recognise.by_blocks import recognise
from lcm_kit.lora_merge.recognise.identity import identify
from lcm_kit.lora_merge.recognise.transformers import BY_NAME, TRANSFORMERS
from lcm_kit.lora_merge.recognise.wrong_base import are_kin
from lcm_kit.tests.with_comfyui import full_dits
from lcm_kit.tests.with_comfyui.families import FAMILIES
from lcm_kit.tests.with_comfyui.full_dits import KNOWN, MODELS, linears

pytestmark = pytest.mark.usefixtures("no_gradients")
ATTENTION = ("img_attn", "txt_attn", "self_attn", "cross_attn", "attn", "attention", "attn1", "attn2")


def load(model, tensors, *, name="a.safetensors", metadata=None, demand_all=True, **options):
    weights = LoraWeights(tensors, name=name, metadata=metadata)
    return patches.apply(model, None, weights, 1.0, 1.0, demand_all=demand_all, **options)


# ---- which base


@pytest.mark.parametrize("name", KNOWN)
def test_the_models_are_what_comfyui_detects(name):
    """So that the tests below are about real models."""
    model = full_dits.model(name)
    found = comfy.model_detection.model_config_from_unet(model.model.state_dict(), "diffusion_model.")
    assert type(found) is type(model.model.model_config)


@pytest.mark.parametrize("name", KNOWN)
def test_a_model_is_known_by_its_blocks_and_every_module_of_them(name):
    wanted, config, _, branches = MODELS[name]
    found, base = base_of(full_dits.model(name)), BY_NAME[wanted]
    assert (found.base, found.config) == (wanted, config)
    shapes = {
        key[len("diffusion_model.") : -len(".weight")].replace(".", "_"): tuple(weight.shape)
        for key, weight in full_dits.model(name).model.state_dict().items()
        if key.endswith(".weight") and weight.ndim > 1
    }
    assert {module: shapes.get(module) for module in base.modules} == base.modules
    assert sorted({base.branch(module) for module in found.modules} - {None}) == branches
    # Whatever its width is, a model of these blocks can have these branches.
    assert found.make.branches.keys() == base.branches.keys()


def test_every_base_is_one_of_these_models():
    known = {MODELS[name][0] for name in KNOWN}
    assert known <= BY_NAME.keys()
    assert {base.name for base in TRANSFORMERS} == {base for base, *_ in MODELS.values()}


@pytest.mark.parametrize("name", KNOWN)
@pytest.mark.parametrize("which", ["all", "attention", "every block but the first"])
def test_a_lora_of_a_model_is_for_its_base(name, which):
    """As the model's trainers write it; also where it changes a part of it. Others that it fits are its kin, or hold all
    of these modules too."""
    only = {
        "all": lambda layer: True,
        "attention": lambda layer: any(part in ATTENTION for part in layer.split(".")),
        "every block but the first": lambda layer: (
            ".0." not in layer or any(number in layer for number in (".1.", ".2."))
        ),
    }[which]
    shapes = linears(full_dits.model(name), only)
    wanted = MODELS[name][0]
    found = identify(Lora.from_state_dict(full_dits.lora(shapes)))
    assert wanted in found.bases
    for other in set(found.bases) - {wanted}:
        theirs = BY_NAME[other].modules
        mine = [layer.replace(".", "_") for layer in shapes if layer.replace(".", "_") in BY_NAME[wanted].modules]
        same = sum(theirs.get(layer) == BY_NAME[wanted].modules[layer] for layer in mine)
        assert same >= 0.95 * len(mine)
    assert set(found.structure.recognised.branches) <= set(MODELS[name][3])


def test_packed_weights_tell_the_base_by_their_names():
    """Of a quantised file: the shapes are of bytes. Where two bases have the same names it may be either, and is neither."""
    for name in ("Wan 2.1 T2V 1.3B", "Wan 2.1 I2V 14B", "Flux.1 dev", "Qwen-Image"):
        if name not in KNOWN:
            continue
        model = full_dits.model.__wrapped__(name)
        for key, weight in list(model.model.named_parameters()):
            if key.endswith(".weight") and weight.ndim == 2 and "patch_embedding" not in key:
                module = model.model.get_submodule(key.removesuffix(".weight"))
                bytes_of = torch.empty(weight.numel() // 2, 1, dtype=torch.uint8, device="meta")
                module.weight = torch.nn.Parameter(bytes_of, requires_grad=False)
        wanted = BY_NAME[MODELS[name][0]]
        alike = [base for base in BY_NAME.values() if base.modules.keys() == wanted.modules.keys()]
        found = base_of(model)
        assert found.base == (wanted.name if alike == [wanted] else None)
        assert found.make.stacks.keys() == wanted.stacks.keys()


# ---- really another base


def by_names(lora, model):
    """Whether any module of a LoRA for one model has a place of its shape in another, told from ComfyUI's classes alone."""
    mine, theirs = linears(full_dits.model(lora)), linears(full_dits.model(model))
    return {layer for layer, shape in mine.items() if theirs.get(layer) == shape}


PAIRS = [
    ("Wan 2.1 and 2.2 T2V 14B", "Wan 2.1 T2V 1.3B"),
    ("Wan 2.1 T2V 1.3B", "Wan 2.2 I2V 14B"),
    ("Wan 2.2 TI2V 5B", "Wan 2.1 and 2.2 T2V 14B"),
    ("Qwen-Image", "Wan 2.1 and 2.2 T2V 14B"),
    ("Wan 2.1 I2V 14B", "Qwen-Image"),
    ("HunyuanVideo", "Flux.1 dev"),
    ("Flux.1 dev", "HunyuanVideo"),
    ("Flux.1 dev", "Chroma"),
    ("Flux.2 Klein 4B", "Flux.2 Klein 9B"),
    ("Flux.2 Klein 4B", "Flux.1 dev"),
    ("Z-Image", "Lumina 2"),
    ("LTX-Video 13B", "LTX-Video 2B"),
    ("LTX-2", "LTX-Video 13B"),
    ("SD3 medium", "SD3.5 large"),
    ("Cosmos-Predict2 14B", "Anima"),
    ("HiDream-I1", "Z-Image"),
]


@pytest.mark.parametrize(("lora", "model"), PAIRS)
def test_a_lora_of_another_base_is_refused_by_name(lora, model):
    if {lora, model} - set(KNOWN):
        pytest.skip("not in this ComfyUI")
    tensors = full_dits.lora(linears(full_dits.model(lora)))
    with pytest.raises(ValueError, match="does not fit this model") as error:
        load(full_dits.model(model), tensors)
    mine, theirs = MODELS[lora][0], MODELS[model][0]
    assert re.search(
        f"it is a LoRA for {re.escape(mine)}( or [^,]*)?, and the model is {re.escape(theirs)}\\.", str(error.value)
    )
    fits = len(by_names(lora, model))
    assert f" modules {fits} fit" in str(error.value)
    # A style LoRA of a kin model is let through where most of it fits; every other is refused there too.
    if not are_kin([mine], theirs):
        with pytest.raises(ValueError, match="does not fit this model"):
            load(full_dits.model(model), tensors, demand_all=False)


def test_a_style_of_flux_on_chroma_is_applied_where_it_fits_and_said():
    style = full_dits.lora(
        linears(
            full_dits.model("Flux.1 dev"), lambda layer: "_attn." in layer or "linear" in layer or "img_mod" in layer
        )
    )
    report = load(full_dits.model("Chroma"), style, demand_all=False).report
    assert "153 of 172 modules applied" in report
    assert "Made for: Flux.1, this model: Chroma." in report
    assert "19 have no place in this model: diffusion_model.double_blocks.0-18.img_mod.lin." in report


# ---- a branch that a model is made without


def lightx2v(name, **extra):
    """What such files hold: all linear layers, differences of norms, biases and modulations."""
    model = full_dits.model(name, layers=3)
    tensors = full_dits.lora(linears(model, lambda layer: layer != "head.head"), rank=4)
    for key, weight in model.model.state_dict().items():
        body = key.removeprefix("diffusion_model.")
        if body.endswith(".bias") and "head" not in body and "patch" not in body:
            tensors[f"{key.removesuffix('.bias')}.diff_b"] = torch.zeros(weight.shape)
        elif body.endswith(".weight") and weight.ndim == 1:
            tensors[f"{key.removesuffix('.weight')}.diff"] = torch.zeros(weight.shape)
        elif body.endswith(".modulation") and body.startswith("blocks"):
            tensors[key.replace(".modulation", ".diff_m")] = torch.zeros(weight.shape)
    return {**tensors, **extra}


@pytest.mark.parametrize("lora", ["Wan 2.1 I2V 14B", "Wan 2.1 and 2.2 T2V 14B", "Wan 2.1 VACE 14B"])
@pytest.mark.parametrize("model", ["Wan 2.1 I2V 14B", "Wan 2.1 and 2.2 T2V 14B", "Wan 2.2 I2V 14B", "Wan 2.1 VACE 14B"])
def test_a_branch_that_only_the_lora_has_is_left_out_and_named_once(lora, model):
    tensors, patcher = lightx2v(lora), full_dits.model(model, layers=3)
    done = load(patcher, tensors)
    have = {branch for branch in MODELS[model][3]}
    lines = [line for line in done.report.splitlines() if "made without" in line]
    assert [line.split(" belong to the ")[1].split(",")[0] for line in lines] == [
        branch for branch in MODELS[lora][3] if branch not in have
    ]
    assert "Warning" not in done.report
    # The others are those that have no home in this model, as ComfyUI's own key map decides, each once.
    homes, state = model_lora_keys_unet(patcher.model, {}), patcher.model.state_dict()
    modules = {
        re.sub(r"\.(lora_(up|down)\.weight|diff(_b)?)$", "", key).replace(".diff_m", ".modulation") for key in tensors
    }
    assert sorted(expanded(lines)) == sorted(module for module in modules if homes.get(module) not in state)


def expanded(lines):
    """Every module that these lines name, "blocks.0-2.k" as three."""
    for line in lines:
        for name in line.split(" left out: ")[1].rstrip(".").split(", "):
            match = re.fullmatch(r"(.+?[._])(\d+(?:[-,]\d+)*)([._].+)", name)
            for part in match[2].split(",") if match else ():
                first, _, last = part.partition("-")
                yield from (f"{match[1]}{n}{match[3]}" for n in range(int(first), int(last or first) + 1))
            if match is None:
                yield name


def test_a_difference_of_a_modulation_changes_it():
    """diff_m, a name that ComfyUI has no place for."""
    model = FAMILIES["Wan"].model()
    key = "diffusion_model.blocks.0.modulation"
    change = torch.randn(model.model.state_dict()[key].shape, generator=torch.Generator().manual_seed(0))
    tensors = {"diffusion_model.blocks.0.diff_m": change}
    tensors |= full_dits.lora(linears(model, lambda layer: layer.endswith("self_attn.q")))
    done = load(model, tensors)
    assert "2 of 2 modules applied" in done.report
    value = done.model.object_patches[key]
    torch.testing.assert_close(value, model.model.state_dict()[key] + change)


def test_a_lora_of_the_absent_branch_alone_is_refused():
    only = full_dits.lora(linears(full_dits.model("Wan 2.1 I2V 14B", layers=2), lambda layer: "_img" in layer))
    with pytest.raises(ValueError, match="nothing but the image branch, which this model is made without"):
        load(full_dits.model("Wan 2.1 and 2.2 T2V 14B", layers=2), only)


def test_modules_of_a_branch_that_the_model_has_must_fit():
    """A model with that branch in some blocks only is no model without it."""
    shapes = linears(full_dits.model("Wan 2.1 I2V 14B", layers=2))
    wide = {layer: (shape[0], 2 * shape[1]) if "k_img" in layer else shape for layer, shape in shapes.items()}
    with pytest.raises(ValueError, match="have another shape"):
        load(full_dits.model("Wan 2.1 I2V 14B", layers=2), full_dits.lora(wide))
    more = full_dits.lora(shapes) | full_dits.lora({f"blocks.{n}.cross_attn.k_img": (5120, 5120) for n in range(2, 9)})
    with pytest.raises(ValueError, match="7 have no place in it"):
        load(full_dits.model("Wan 2.1 I2V 14B", layers=2), more)


# ---- two halves


def of_file(model, path):
    patcher = model.clone()
    patcher.cached_patcher_init = (lambda *_: None, (path, {}))
    return patcher


@pytest.mark.parametrize(
    ("lora", "file", "words"),
    [
        ("style_high_noise.safetensors", "/m/wan2.2_t2v_high_noise_14B.safetensors", "this model is that half by its file name"),
        ("style_high_noise.safetensors", "/m/wan2.2_t2v_low_noise_14B.safetensors", "Warning: It is for the high-noise half"),
        ("Style-LOW.safetensors", "C:\\m\\Wan2_2-T2V-A14B_HIGH_fp8.safetensors", "Warning: It is for the low-noise half"),
        ("style_low.safetensors", "", "Nothing says which half this model is: see that it is the low-noise one"),
        ("style_low.safetensors", "/m/wan14B.safetensors", "Nothing says which half this model is (wan14B.safetensors)"),
    ],
)  # fmt: skip
def test_swapped_halves_are_a_remark_and_no_refusal(lora, file, words):
    name = "Wan 2.1 and 2.2 T2V 14B"
    tensors = full_dits.lora(linears(full_dits.model(name), lambda layer: "self_attn" in layer))
    model = of_file(full_dits.model(name), file) if file else full_dits.model(name)
    done = load(model, tensors, name=lora)
    assert "160 of 160 modules applied" in done.report
    (line,) = (line for line in done.report.splitlines() if "-noise half" in line)
    assert words in line
    assert "by its file name" in line


def test_a_lora_that_says_nothing_of_halves_gets_no_remark():
    name = "Wan 2.1 and 2.2 T2V 14B"
    tensors = full_dits.lora(linears(full_dits.model(name), lambda layer: "self_attn" in layer))
    assert "half" not in load(full_dits.model(name), tensors, name="highlights.safetensors").report
    flux = full_dits.lora(linears(full_dits.model("Flux.1 dev"), lambda layer: "_attn." in layer))
    assert "half" not in load(full_dits.model("Flux.1 dev"), flux, name="style_high.safetensors").report


def test_recognition_asks_for_names_and_shapes_together():
    """Qwen-Image's and Flux' blocks have one name in diffusers, and layers of one shape."""
    qwen = {f"lora_transformer_transformer_blocks_{n}_attn_to_q": (3072, 3072) for n in range(60)}
    assert recognise(qwen).bases == ("Qwen-Image",)
    flux = {f"lora_transformer_transformer_blocks_{n}_attn_to_q": (3072, 3072) for n in range(19)}
    flux |= {f"lora_transformer_single_transformer_blocks_{n}_attn_to_q": (3072, 3072) for n in range(38)}
    assert "Flux.1" in recognise(flux).bases
    assert "Qwen-Image" not in recognise(flux).bases
