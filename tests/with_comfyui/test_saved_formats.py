"""What is saved of a transformer's LoRA, in every format: read whole by ComfyUI, and by diffusers' own classes and
converters, for every model that ComfyUI has."""

import logging
import re
import warnings
from functools import cache
from inspect import signature
from itertools import combinations

import pytest
import torch
from safetensors.torch import save_file

from lcm_kit.lora_merge import Lora, load, save
from lcm_kit.lora_merge.files.formats import named_for
from lcm_kit.tests.helpers import relative
from lcm_kit.tests.with_comfyui import dits
from lcm_kit.tests.with_comfyui.test_one_weight_twice import by_core
from lcm_kit.tests.with_comfyui.test_own_naming import MODEL, family, is_cut, is_tried

# Model -> diffusers' mixin that reads LoRAs for it, and its class of that model.
DIFFUSERS = {
    "Flux": ("Flux", "FluxTransformer2DModel"),
    "Flux 2": ("Flux2", "Flux2Transformer2DModel"),
    "Chroma": ("Flux", "ChromaTransformer2DModel"),
    "Qwen-Image": ("QwenImage", "QwenImageTransformer2DModel"),
    "Z-Image": ("ZImage", "ZImageTransformer2DModel"),
    "Lumina 2": ("Lumina2", "Lumina2Transformer2DModel"),
    "HunyuanVideo": ("HunyuanVideo", "HunyuanVideoTransformer3DModel"),
    "SD3": ("SD3", "SD3Transformer2DModel"),
    "HiDream": ("HiDreamImage", "HiDreamImageTransformer2DModel"),
    "LTX-Video": ("LTXVideo", "LTXVideoTransformer3DModel"),
    "LTX-2": ("LTX2", "LTX2VideoTransformer3DModel"),
    "Wan": ("Wan", "WanTransformer3DModel"),
    "Anima": ("Anima", "CosmosTransformer3DModel"),
    "AuraFlow": ("AuraFlow", "AuraFlowTransformer2DModel"),
    "Krea 2": ("Krea2", "Krea2Transformer2DModel"),
    "Kandinsky 5": ("Kandinsky", "Kandinsky5Transformer3DModel"),
    "Ernie-Image": ("ErnieImage", "ErnieImageTransformer2DModel"),
}
BOTH = [name for name in dits.KNOWN if name in DIFFUSERS]
# Whose converters take the model's own names behind `diffusion_model.`.
CONVERTED = {"Flux 2", "Qwen-Image", "HiDream", "LTX-Video", "LTX-2", "Wan", "Anima", "Krea 2", "Ernie-Image"}
# Whose names that both read go with the true width, or with weights that trainers change alone: see TRUE_WIDTH.
NOT_IN_BOTH = {"HunyuanVideo", "Lumina 2", "Chroma"}
# Models of which ComfyUI has no table of diffusers' names.
NOT_IN_COMFYUI = {"HunyuanVideo", "HunyuanVideo 1.5", "HunyuanImage 2.1", "LTX-Video", "LTX-2", "Wan", "Wan I2V",
                  "Wan VACE", "Wan Animate 2", "Cosmos Predict 2", "Anima", "ACE-Step", "OmniGen 2", "Lumina 2", "Chroma", "Flux 2"}  # fmt: skip
# Models whose names in diffusers are not known here, or that diffusers does not have.
REFUSED = {"HunyuanDiT", "ACE-Step 1.5"}
# The one class whose sizes have no default.
_HIDREAM = {
    "patch_size": 2, "num_layers": 1, "num_single_layers": 1, "attention_head_dim": 8, "num_attention_heads": 2,
    "caption_channels": [8, 8], "text_emb_dim": 8, "num_routed_experts": 2, "num_activated_experts": 1,
    "axes_dims_rope": (4, 2, 2), "max_resolution": (8, 8), "llama_layers": [0, 1],
}  # fmt: skip
FORMATS = ["auto", "kohya", "comfy"]
ours_alone = pytest.mark.slow  # no fact about ComfyUI: once is enough
IN_BLOCK = re.compile(r"(?:blocks|layers|refiner|encoders)\.0\.")


@cache
def weights(name, blocks):
    """Weight -> shape of the matrices that are tried. blocks: only those in blocks, which trainers change."""
    return {
        weight: shape
        for weight, shape in dits.shapes(name).items()
        # LTX-2's connectors are a model of their own in diffusers.
        if is_tried(weight, shape) and "_connector." not in weight and (not blocks or IN_BLOCK.search(weight))
    }


def of_model(name, blocks=False, alpha=0.6):
    """A LoRA of rank 2 of every such weight, in the model's own names."""
    g, state = torch.Generator().manual_seed(1), {}
    for weight, shape in weights(name, blocks).items():
        module = weight.removesuffix(".weight")
        up, down = torch.randn(shape[0], 2, generator=g), torch.randn(2, *shape[1:], generator=g)
        state[f"{module}.lora_up.weight"] = up.reshape(*up.shape, *(1 for _ in shape[2:]))
        state[f"{module}.lora_down.weight"] = down
        state[f"{module}.alpha"] = torch.tensor(alpha)
    return state


def written(state, format):
    lora, written_in = named_for(Lora.from_state_dict(state), format)
    return lora.to_state_dict(format=written_in)


def core(name, state):
    """Weight -> what ComfyUI adds to it; every key has to be read."""
    read = by_core(state, dits.homes(name), dits.shapes(name))
    modules = {re.sub(r"\.(?:lora_(?:up|down|A|B)\.weight|alpha)$", "", key) for key in state}
    known = dits.homes(name)
    assert all(module in known for module in modules), sorted(modules - known.keys())[:3]
    return read


def alike(found, wanted, bound):
    assert found.keys() == wanted.keys()
    for key in wanted:
        error = relative(found[key], wanted[key])
        assert error <= bound, (key, error)


def deltas(state):
    """Module -> update, of a file in PEFT's keys."""
    found = {}
    for key, down in state.items():
        if key.endswith(".lora_A.weight"):
            up = state[key.replace(".lora_A.", ".lora_B.")]
            update = (up.double().flatten(1) @ down.double().flatten(1)).reshape(up.shape[0], *down.shape[1:])
            found[key.removesuffix(".lora_A.weight")] = update
    return found


def by_diffusers(name, state, tmp_path):
    return of_diffusers(name, state, tmp_path, deltas)


def of_diffusers(name, state, tmp_path, of):
    from diffusers.loaders import lora_pipeline

    mixin = getattr(lora_pipeline, f"{DIFFUSERS[name][0]}LoraLoaderMixin")
    save_file({key: tensor.contiguous() for key, tensor in state.items()}, tmp_path / "lora.safetensors")
    found = mixin.lora_state_dict(str(tmp_path / "lora.safetensors"))
    return of(found[0] if isinstance(found, tuple) else found)


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("name", dits.KNOWN)
def test_comfyui_reads_all_of_it(name, format):
    state = of_model(name)
    alike(core(name, written(state, format)), core(name, state), 1e-6)


def slices(name):
    """(weight, prefix) -> {first row: ComfyUI's name of that slice}, of all fused weights that it has names of slices for."""
    found = {}
    for spelled, home in dits.homes(name).items():
        (weight, part), shape = dits.target_of(home), dits.shape_at(name, spelled)
        if part is not None and shape and is_tried(weight, dits.shapes(name)[weight]) and is_cut(name, weight):
            prefix = re.match(r"transformer\.|lycoris_|lora_transformer_|diffusion_model\.|", spelled)[0]
            found.setdefault((weight, prefix), {}).setdefault(part[1], spelled)
    return found


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("name", [name for name in dits.KNOWN if slices(name)])
def test_comfyui_reads_all_of_a_lora_of_some_slices(name, format):
    """Each choice of the slices of one weight: what is left of it has names of its own in some models, or none."""
    for spelled in slices(name).values():
        # Every choice in one of the formats, one slice alone in all.
        choices = [some for count in range(1, len(spelled) + 1) for some in combinations(spelled.values(), count)]
        for place, chosen in enumerate(choices):
            if len(chosen) > 1 and FORMATS[place % len(FORMATS)] != format:
                continue
            state = {}
            for number, module in enumerate(chosen):
                up, down = (torch.randn(size, generator=torch.Generator().manual_seed(number)) for size in
                            ((dits.shape_at(name, module)[0], 2), (2, *dits.shape_at(name, module)[1:])))  # fmt: skip
                state |= {f"{module}.lora_up.weight": up, f"{module}.lora_down.weight": down}
            alike(core(name, written(state, format)), core(name, state), 1e-6)


@pytest.mark.parametrize("name", [name for name in dits.KNOWN if name not in NOT_IN_COMFYUI | REFUSED])
def test_comfyui_reads_diffusers_names_where_it_has_a_table(name):
    state = of_model(name)
    alike(core(name, written(state, "diffusers")), core(name, state), 1e-6)


@ours_alone
@pytest.mark.parametrize("name", BOTH)
def test_diffusers_names_are_those_of_its_model(name):
    """Its own class on the meta device: names, and the shapes of ours as far as sizes are not told by a configuration."""
    diffusers = pytest.importorskip("diffusers")
    cls = getattr(diffusers, DIFFUSERS[name][1])
    # Two blocks of each kind, whose last may be another: the first is what is asked for. All other sizes are its own.
    blocks = {size: 2 for size in signature(cls).parameters if re.fullmatch(r"(num|n)_(\w+_)?(layers|blocks)", size)}
    with torch.device("meta"), warnings.catch_warnings(action="ignore"):
        model = cls(**blocks | (_HIDREAM if name == "HiDream" else {}))
    theirs = {key.removesuffix(".weight") for key in model.state_dict()}
    ours = {module.removeprefix("transformer.") for module in deltas(written(of_model(name, blocks=True), "diffusers"))}
    assert ours
    assert ours <= theirs, sorted(ours - theirs)[:5]


@ours_alone
@pytest.mark.parametrize("name", [name for name in BOTH if name in CONVERTED])
def test_diffusers_own_converter_makes_the_same_of_comfyuis_names(name, tmp_path):
    pytest.importorskip("diffusers")
    state = of_model(name, blocks=True)
    alike(by_diffusers(name, written(state, "comfy"), tmp_path), deltas(written(state, "diffusers")), 1e-6)


@pytest.mark.parametrize("name", [name for name in BOTH if name not in NOT_IN_BOTH])
def test_a_file_that_is_saved_without_a_wish_is_read_by_both(name, tmp_path):
    pytest.importorskip("diffusers")
    state = of_model(name, blocks=True)
    if family(name).saved == "diffusers":
        state = written(state, "diffusers")
    save(Lora.from_state_dict(state), tmp_path / "saved.safetensors", dtype=torch.float32)
    kept = load(tmp_path / "saved.safetensors")
    assert kept.kinds.keys() == {"LoRA"}
    saved = written(state, "auto")
    alike(core(name, saved), core(name, state), 1e-6)
    alike(by_diffusers(name, saved, tmp_path), deltas(written(state, "diffusers")), 1e-6)


# Weights in blocks that trainers change, at the true width, which diffusers' converters have in their code.
_STREAMS = {
    "double_blocks.0.img_attn.qkv": (3, 1), "double_blocks.0.img_attn.proj": (1, 1), "double_blocks.0.txt_attn.qkv": (3, 1),
    "double_blocks.0.txt_attn.proj": (1, 1), "double_blocks.0.img_mlp.0": (4, 1), "double_blocks.0.txt_mlp.2": (1, 4),
    "single_blocks.0.linear1": (7, 1), "single_blocks.0.linear2": (1, 5),
}  # fmt: skip
_MODULATIONS = {"double_blocks.0.img_mod.lin": (6, 1), "single_blocks.0.modulation.lin": (3, 1)}
_FFN = {"feed_forward.w1": (4, 1), "feed_forward.w2": (1, 4), "feed_forward.w3": (4, 1)}
_LUMINA = {"attention.qkv": (5 / 3, 1), "attention.out": (1, 1)} | _FFN
# Model -> (prefix of what is written, width, {weight in own names: (rows, columns) in widths}).
TRUE_WIDTH = {
    "Flux": ("lora_unet_", 3072, _STREAMS | _MODULATIONS),
    "Chroma": ("lora_unet_", 3072, _STREAMS),
    # Of blocks that Flux, whose names are the same, has not: so does every whole LoRA of it.
    "HunyuanVideo": (
        "diffusion_model.", 3072,
        {own.replace(".0.", ".19.", 1): shape for own, shape in (_STREAMS | _MODULATIONS).items()},
    ),
    "Lumina 2": (
        "diffusion_model.", 2304,
        {f"{stack}.0.{own}": shape for stack in ("layers", "noise_refiner", "context_refiner") for own, shape in _LUMINA.items()}
        | {f"{stack}.0.adaLN_modulation.1": (4, 4 / 9) for stack in ("layers", "noise_refiner")},
    ),
}  # fmt: skip


def at_true_width(name):
    _, width, weights = TRUE_WIDTH[name]
    state, g = {}, torch.Generator().manual_seed(2)
    for module, (rows, columns) in weights.items():
        state[f"{MODEL}{module}.lora_B.weight"] = torch.randn(round(rows * width), 2, generator=g)
        state[f"{MODEL}{module}.lora_A.weight"] = torch.randn(2, round(columns * width), generator=g)
    return state


def products(state):
    """Module -> its update times one vector: the whole matrices are large."""
    found = {}
    for key, down in state.items():
        if key.endswith(".lora_A.weight"):
            x = torch.randn(down.shape[1], generator=torch.Generator().manual_seed(3), dtype=torch.float64)
            up = state[key.replace(".lora_A.", ".lora_B.")]
            found[key.removesuffix(".lora_A.weight")] = up.double() @ (down.double() @ x)
    return found


@pytest.mark.parametrize("name", TRUE_WIDTH)
def test_fused_weights_are_saved_in_names_that_both_read(name, tmp_path):
    pytest.importorskip("diffusers")
    if name not in dits.KNOWN:
        pytest.skip(f"this ComfyUI has no {name}")
    state = at_true_width(name)
    saved = written(state, "auto")
    assert all(key.startswith(TRUE_WIDTH[name][0]) for key in saved)
    alike(of_diffusers(name, saved, tmp_path, products), products(written(state, "diffusers")), 1e-6)
    # ComfyUI takes the same names at any width.
    modules = {re.sub(r"\.(?:lora_(?:up|down|A|B)\.weight|alpha)$", "", key) for key in saved}
    assert {module.replace(".19.", ".0.") for module in modules} <= dits.homes(name).keys()
    again = Lora.from_state_dict(saved)
    assert {again.find(f"{MODEL}{module}") for module in TRUE_WIDTH[name][2]} == {*again.modules}


@ours_alone
@pytest.mark.parametrize("name", [name for name in dits.KNOWN if name not in REFUSED])
@pytest.mark.parametrize("way", [("comfy", "kohya"), ("diffusers", "comfy"), ("diffusers", "kohya")])
def test_there_and_back_is_what_it_was(name, way):
    """Bit for bit where the scale is a power of two, at the rank that it had: slices of one update share their down."""
    state = of_model(name, alpha=0.5)
    first = written(state, way[0])
    back = written(first, way[1])
    again = written(back, way[0])
    assert again.keys() == first.keys()
    assert all(torch.equal(again[key], first[key]) for key in first)


@pytest.mark.parametrize("name", sorted(REFUSED & {*dits.KNOWN}))
def test_what_diffusers_has_no_name_for_is_refused_by_name(name):
    with pytest.raises(ValueError, match=r"diffusers has no name for \d+ of its modules"):
        written(of_model(name), "diffusers")


def test_names_that_are_two_families_are_refused_for_diffusers_and_kept_for_comfyui(caplog):
    state = {
        "diffusion_model.double_blocks.0.img_attn.proj.lora_up.weight": torch.ones(8, 2),
        "diffusion_model.double_blocks.0.img_attn.proj.lora_down.weight": torch.ones(2, 8),
    }
    with caplog.at_level(logging.WARNING):
        assert written(state, "kohya")


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("name", [name for name in ("Flux 2", "Lumina 2") if name in dits.KNOWN])
def test_no_saved_name_is_one_that_comfyui_cuts_into_the_wrong_rows(name, format):
    """Its key map has Flux 1's rows for Flux 2, and thirds of the grouped attention of Lumina 2."""
    state = of_model(name)
    wrong = {spelled for spelled, home in dits.homes(name).items() if dits.target_of(home)[1] is not None}
    assert wrong
    for given in (state, written(state, "kohya"), *([written(state, "diffusers")] if name == "Flux 2" else [])):
        modules = {re.sub(r"\.(?:lora_(?:up|down|A|B)\.weight|alpha)$", "", key) for key in written(given, format)}
        assert modules
        assert modules.isdisjoint(wrong)
