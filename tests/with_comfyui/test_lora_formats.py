"""Every spelling and every kind of LoRA: file -> Load LoRA -> Apply LoRA -> ComfyUI's patches, with known answers.

The answer is written down here a second time, from the definitions, and core's own loading of the raw file is the third.
"""

import json

import comfy.hooks
import comfy.lora
import comfy.model_patcher
import comfy.sd
import folder_paths
import pytest
import safetensors.torch
import torch

from lcm_kit.lora_merge import Lora, merge, save
from lcm_kit.nodes.loading import ApplyLoRA, LoadLoRA
from lcm_kit.nodes.merging import MergeLoRA
from lcm_kit.tests.lora_merge import kinds
from lcm_kit.tests.with_comfyui import tiny

CLOSE = {"rtol": 1e-5, "atol": 2e-5}  # float32 sums of tens of terms of size 1, in another order
LINEAR = (
    "down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q",
    "input_blocks.1.1.transformer_blocks.0.attn1.to_q",
)
CONV = ("down_blocks.0.resnets.0.conv1", "input_blocks.1.0.in_layers.2")
SHAPES = {LINEAR: (32, 32, ()), CONV: (32, 32, (3, 3))}
CASES = [(kind, LINEAR) for kind, (_, needs_kernel) in kinds.ADDITIVE.items() if not needs_kernel]
CASES += [(kind, CONV) for kind in kinds.ADDITIVE]
# ComfyUI 0.30.0 multiplies GLoRA's a1 and a2 onto a convolution's inputs, so the old layout is for linear ones.
CARRIED = [
    (kind, module) for kind in kinds.CARRIED for module in (LINEAR, CONV) if (kind, module) != ("GLoRA, old", CONV)
]


pytestmark = pytest.mark.usefixtures("no_gradients")


@pytest.fixture(scope="module")
def clip():
    return tiny.tiny_clip()


@pytest.fixture
def loaded(comfy_home, tmp_path, monkeypatch):
    """Tensors -> LORA_MODEL, through a file and the Load LoRA node."""
    monkeypatch.setitem(folder_paths.folder_names_and_paths, "loras", ([str(tmp_path)], {".safetensors"}))
    monkeypatch.setitem(folder_paths.filename_list_cache, "loras", None)
    folder_paths.filename_list_cache.pop("loras")

    def write_and_load(tensors, metadata=None, name="x.safetensors"):
        own = {key: value.contiguous().clone() for key, value in tensors.items()}
        safetensors.torch.save_file(own, tmp_path / name, metadata)
        return LoadLoRA.execute(name).result[0]

    return write_and_load


def applied(model, lora, strength=1.0, clip=None):
    return ApplyLoRA.execute(model, lora, strength, strength, clip).result


def by_core(model, *pairs):
    for tensors, strength in pairs:
        model, _ = comfy.sd.load_lora_for_models(model, None, dict(tensors), strength, 0)
    return model


def weight_of(model, key):
    return comfy.utils.get_attr(model.model, key).detach().clone()


def key_of(module):
    return f"diffusion_model.{module[1]}.weight"


def kohya(module):
    return "lora_unet_" + module[0].replace(".", "_")


def assert_same(model, expected):
    ours, theirs = tiny.patched_weights(model), tiny.patched_weights(expected)
    assert ours.keys() == theirs.keys() != set()
    for key, weight in ours.items():
        torch.testing.assert_close(weight, theirs[key], rtol=0, atol=0, msg=lambda text, key=key: f"{key}: {text}")


# ---- every spelling

UNET = {
    "kohya": (lambda d, m: "lora_unet_" + d.replace(".", "_"), ".lora_up.weight", ".lora_down.weight", True),
    "kohya on ldm": (lambda d, m: "lora_unet_" + m.replace(".", "_"), ".lora_up.weight", ".lora_down.weight", True),
    "SimpleTuner": (lambda d, m: "lycoris_" + d.replace(".", "_"), ".lora_up.weight", ".lora_down.weight", True),
    "generic": (lambda d, m: f"diffusion_model.{m}", ".lora_up.weight", ".lora_down.weight", True),
    "generic PEFT": (lambda d, m: f"diffusion_model.{m}", ".lora_B.weight", ".lora_A.weight", True),
    "generic PEFT, named": (lambda d, m: f"diffusion_model.{m}", ".lora_B.default.weight", ".lora_A.default.weight", True),
    "generic, Mochi's": (lambda d, m: f"diffusion_model.{m}", ".lora_B", ".lora_A", True),
    "diffusers processors": (lambda d, m: f"unet.{processor(d)}", "_lora.up.weight", "_lora.down.weight", True),
    "bare processors": (lambda d, m: processor(d), ".lora.up.weight", ".lora.down.weight", True),
    # Core misses the attention layers of these: today's diffusers does not write `processor`.
    "diffusers": (lambda d, m: f"unet.{d}", ".lora.up.weight", ".lora.down.weight", False),
    "diffusers PEFT": (lambda d, m: f"unet.{d}", ".lora_B.weight", ".lora_A.weight", False),
    "PEFT": (lambda d, m: f"base_model.model.{d}", ".lora_B.weight", ".lora_A.weight", False),
    "PEFT in a pipeline": (lambda d, m: f"unet.base_model.model.{d}", ".lora_B.weight", ".lora_A.weight", False),
    "linear layers": (lambda d, m: f"unet.{d}", ".lora_linear_layer.up.weight", ".lora_linear_layer.down.weight", False),
}  # fmt: skip


def processor(diffusers):
    """diffusers' attention processors of 2023: `attn1.processor.to_out`."""
    return diffusers.replace(".to_", ".processor.to_").removesuffix(".0") if ".to_" in diffusers else diffusers


def factors(shape, rank, seed):
    generator = torch.Generator().manual_seed(seed)
    up = torch.randn(shape[0], rank, *(1 for _ in shape[2:]), generator=generator) / 4
    return up, torch.randn(rank, *shape[1:], generator=generator) / 4


@pytest.mark.parametrize(("spelling", "alpha"), [*((name, 1.5) for name in UNET), ("kohya", None), ("PEFT", None)])
def test_every_spelling_of_the_unet_patches_by_the_formula(model, loaded, spelling, alpha):
    name_of, up_end, down_end, core_reads_all = UNET[spelling]
    tensors, wanted = {}, {}
    for seed, (diffusers, ldm, shape) in enumerate(tiny.modules(model)):
        up, down = factors(shape, 3, seed)
        name, key = name_of(diffusers, ldm), f"diffusion_model.{ldm}.weight"
        tensors |= {name + up_end: up, name + down_end: down}
        if alpha is not None:
            tensors[f"{name}.alpha"] = torch.tensor(alpha)
        scale = 0.7 * (1 if alpha is None else alpha / 3)
        wanted[key] = weight_of(model, key) + scale * (up.flatten(1) @ down.flatten(1)).reshape(shape)
    changed = applied(model, loaded(tensors), 0.7)[0]
    weights = tiny.patched_weights(changed)
    assert weights.keys() == wanted.keys()
    for key, weight in weights.items():
        torch.testing.assert_close(weight, wanted[key], **CLOSE, msg=lambda text, key=key: f"{key}: {text}")
    core = tiny.patched_weights(by_core(model, (tensors, 0.7)))
    assert (core.keys() == weights.keys()) is core_reads_all
    assert all(torch.equal(weights[key], weight) for key, weight in core.items())


TEXT = {
    "kohya": ("lora_te_{}", "_", ".lora_up.weight", ".lora_down.weight", True),
    "kohya, of two": ("lora_te1_{}", "_", ".lora_up.weight", ".lora_down.weight", True),
    "diffusers": ("text_encoder.{}", ".", ".lora_linear_layer.up.weight", ".lora_linear_layer.down.weight", True),
    "diffusers PEFT": ("text_encoder.{}", ".", ".lora_B.weight", ".lora_A.weight", True),
    "generic": ("text_encoders.clip_l.transformer.{}", ".", ".lora_up.weight", ".lora_down.weight", True),
    "PEFT": ("text_encoder.base_model.model.{}", ".", ".lora_B.weight", ".lora_A.weight", False),
    "bare": ("{}", ".", ".lora_B.weight", ".lora_A.weight", False),
}


@pytest.mark.parametrize("spelling", TEXT)
def test_every_spelling_of_the_text_encoder_patches_by_the_formula(model, clip, loaded, spelling):
    prefix, separator, up_end, down_end, core_reads = TEXT[spelling]
    tensors, wanted = {}, {}
    for seed, (key, weight) in enumerate(clip.cond_stage_model.state_dict().items()):
        if not key.endswith(("_proj.weight", "fc1.weight", "fc2.weight")) or "encoder.layers" not in key:
            continue
        up, down = factors(weight.shape, 2, seed)
        body = key.removeprefix("clip_l.transformer.").removesuffix(".weight").replace(".", separator)
        tensors |= {prefix.format(body) + up_end: up, prefix.format(body) + down_end: down}
        wanted[key] = weight.float() + 0.5 * up @ down
    changed = applied(model, loaded(tensors), 0.5, clip)[1]
    weights = tiny.patched_weights(changed.patcher)
    assert weights.keys() == wanted.keys()
    assert len(wanted) == 12
    for key, weight in weights.items():
        torch.testing.assert_close(weight, wanted[key].to(weight.dtype), rtol=2e-3, atol=2e-3)  # a CLIP is float16
    core = tiny.patched_weights(comfy.sd.load_lora_for_models(model, clip, dict(tensors), 0.5, 0.5)[1].patcher)
    assert bool(core) is core_reads
    assert all(torch.equal(weights[key], weight) for key, weight in core.items())


@pytest.mark.parametrize(("extra", "scale"), [({}, 2.0), ({"unet.use_rslora": True}, 4.0)])
def test_alpha_that_is_in_the_metadata_only_is_honoured(model, loaded, extra, scale):
    """8 / 4, and 8 / sqrt(4) for rank-stabilised LoRA; core would patch at 1."""
    up, down = factors((32, 32), 4, 0)
    tensors = {f"unet.{LINEAR[0]}.lora_B.weight": up, f"unet.{LINEAR[0]}.lora_A.weight": down}
    lora = loaded(tensors, {"lora_adapter_metadata": json.dumps({"unet.lora_alpha": 8, "unet.r": 4} | extra)})
    assert lora[f"{kohya(LINEAR)}.alpha"].item() == 4 * scale
    weight = tiny.patched_weights(applied(model, lora)[0])[key_of(LINEAR)]
    torch.testing.assert_close(weight, weight_of(model, key_of(LINEAR)) + scale * up @ down, **CLOSE)
    written_out = {f"{kohya(LINEAR)}.lora_up.weight": up, f"{kohya(LINEAR)}.lora_down.weight": down,
                   f"{kohya(LINEAR)}.alpha": torch.tensor(4 * scale)}  # fmt: skip
    assert_same(applied(model, lora)[0], by_core(model, (written_out, 1.0)))


# ---- every kind


def state(kind, module, **options):
    out, inputs, kernel = SHAPES[module]
    return kinds.state_dict(kind, kohya(module), out, inputs, kernel, **options)


@pytest.mark.parametrize("alpha", [None, 1.5])
@pytest.mark.parametrize(("kind", "module"), CASES)
def test_every_additive_kind_patches_by_its_formula(model, loaded, kind, module, alpha):
    tensors = state(kind, module, alpha=alpha)
    changed = applied(model, loaded(tensors), -0.6)[0]
    out, inputs, kernel = SHAPES[module]
    delta = kinds.dense(kinds.parts(kind, out, inputs, kernel), alpha).float().reshape(out, inputs, *kernel)
    weight = tiny.patched_weights(changed)[key_of(module)]
    torch.testing.assert_close(weight, weight_of(model, key_of(module)) - 0.6 * delta, **CLOSE)
    assert_same(changed, by_core(model, (for_core(tensors), -0.6)))


@pytest.mark.parametrize(("kind", "module"), CASES)
def test_our_delta_is_what_comfyuis_own_adapter_adds(kind, module):
    tensors = state(kind, module, alpha=1.5)
    adapter = comfy.lora.load_lora(for_core(tensors), {kohya(module): "weight"})["weight"]
    out, inputs, kernel = SHAPES[module]
    nothing = torch.zeros(out, inputs, *kernel)
    added = adapter.calculate_weight(nothing, "weight", 1.0, 1.0, None, lambda delta: delta)
    assert adapter.name == kinds.ADDITIVE[kind][0].lower()
    lora = Lora.from_state_dict(tensors)
    torch.testing.assert_close(lora.delta(kohya(module)), added, **CLOSE)
    layer = next(iter(lora.modules.values()))
    up, down = layer.factors()
    torch.testing.assert_close((layer.scale * up @ down).reshape(added.shape), added, **CLOSE)


@pytest.mark.parametrize("strength", [0.7, -0.5, 1.0])
@pytest.mark.parametrize("alpha", [None, 1.5])
@pytest.mark.parametrize(("kind", "module"), [case for case in CASES if kinds.ADDITIVE[case[0]][0] != "LoRA"])
def test_core_loads_a_merged_loha_or_lokr_with_the_update_that_it_had(kind, module, alpha, strength, tmp_path):
    """One that no other input touches stays what it is, also in the file."""
    out, inputs, kernel = SHAPES[module]
    merged = merge([(Lora.from_state_dict(state(kind, module, alpha=alpha)), strength)])
    save(merged, tmp_path / "x.safetensors", dtype=torch.float32)
    tensors = comfy.utils.load_torch_file(str(tmp_path / "x.safetensors"))
    adapter = comfy.lora.load_lora(tensors, {kohya(module): "weight"})["weight"]
    assert adapter.name == kinds.ADDITIVE[kind][0].lower()
    added = adapter.calculate_weight(torch.zeros(out, inputs, *kernel), "weight", 1.0, 1.0, None, lambda delta: delta)
    exact = strength * kinds.dense(kinds.parts(kind, out, inputs, kernel), alpha).float()
    torch.testing.assert_close(added, exact.reshape(added.shape), **CLOSE)


def for_core(tensors):
    """The file as core can multiply it: torch.kron of torch 2.11 stops at ComfyUI 0.30.0's product with a Tucker core."""
    tensors = dict(tensors)
    for key in [key for key in tensors if key.endswith(".lokr_t2")]:
        name = key.removesuffix(".lokr_t2")
        core, a, b = tensors.pop(key), tensors.pop(f"{name}.lokr_w2_a"), tensors.pop(f"{name}.lokr_w2_b")
        scale = tensors.pop(f"{name}.alpha").item() / b.shape[0] if f"{name}.alpha" in tensors else 1
        tensors[f"{name}.lokr_w2"] = scale * torch.einsum("ijkl,io,jn->onkl", core, a, b).contiguous()
    return tensors


def formula(kind, tensors, weight, alpha):
    """The weight with an update that depends on it, at strength 1, as ComfyUI 0.30.0 defines the kinds."""
    t = {end: tensor.double() for end, tensor in tensors.items()}
    w = weight.double()
    if kind == "set_weight":
        return t[".set_weight"]
    if kind.startswith("DoRA"):
        moved = w + kinds.dense(tensors, alpha).reshape(w.shape)
        if kind == "DoRA, columns":
            norm = moved.transpose(0, 1).flatten(1).norm(dim=1).reshape(1, -1, *(1 for _ in w.shape[2:]))
        else:
            norm = w.flatten(1).norm(dim=1).reshape(-1, *(1 for _ in w.shape[1:]))
        return moved * t[".dora_scale"].reshape(norm.shape) / norm
    if kind == "GLoRA":
        product = torch.einsum("oi...,ij->oj...", w, t[".a1.weight"] @ t[".a2.weight"])
        return w + alpha / 2 * (product + (t[".b1.weight"] @ t[".b2.weight"]).reshape(w.shape))
    if kind == "GLoRA, old":
        return w + alpha / 2 * (t[".b2.weight"] @ t[".b1.weight"] + w @ t[".a2.weight"] @ t[".a1.weight"])
    blocks = t[".oft_blocks"]
    skew = blocks - blocks.transpose(-1, -2)
    skew = skew * min(1.0, alpha / float(skew.norm()))
    eye = torch.eye(blocks.shape[-1], dtype=torch.float64)
    rotations = (eye + skew) @ torch.linalg.inv(eye - skew)
    flat = w.flatten(1)
    if kind != "BOFT":
        return (torch.block_diag(*rotations).T @ flat).reshape(w.shape)
    rows = torch.arange(flat.shape[0])
    for level, turn in enumerate(rotations):
        # Butterfly: rows that lie 2**level * (size / 2) apart are turned together.
        reach = 2**level * (blocks.shape[-1] // 2)
        order = rows.reshape(-1, 2, reach).transpose(1, 2).reshape(-1)
        turned = torch.zeros_like(flat)
        turned[order] = torch.block_diag(*turn) @ flat[order]
        flat = turned
    return flat.reshape(w.shape)


@pytest.mark.parametrize(("kind", "module"), CARRIED)
def test_every_kind_that_depends_on_the_weight_patches_by_its_formula(model, loaded, kind, module):
    tensors = state(kind, module, alpha=1.5)
    changed = applied(model, loaded(tensors))[0]
    weight, before = tiny.patched_weights(changed)[key_of(module)], weight_of(model, key_of(module))
    out, inputs, kernel = SHAPES[module]
    wanted = formula(kind, kinds.parts(kind, out, inputs, kernel), before, 1.5)
    torch.testing.assert_close(weight.double(), wanted, **CLOSE)
    assert not torch.allclose(weight, before, atol=0.01)
    assert_same(changed, by_core(model, (tensors, 1.0)))
    assert_same(applied(model, loaded(tensors), 0.7)[0], by_core(model, (tensors, 0.7)))


def test_boft_without_alpha_turns_the_weight_where_core_stops(model, loaded, caplog):
    tensors = state("BOFT", LINEAR)
    before = weight_of(model, key_of(LINEAR))
    weight = tiny.patched_weights(applied(model, loaded(tensors))[0])[key_of(LINEAR)]
    torch.testing.assert_close(weight.T @ weight, before.T @ before, rtol=1e-4, atol=1e-4)  # a rotation
    assert not torch.allclose(weight, before, atol=0.01)


def test_a_weight_that_the_lora_enlarges_is_enlarged(model, loaded):
    """Flux's control LoRAs widen the input; ComfyUI pads the weight with zeros."""
    tensors = kinds.state_dict("LoRA", kohya(LINEAR), 32, 40, alpha=1.5)
    tensors[f"{kohya(LINEAR)}.reshape_weight"] = torch.tensor([32, 40])
    changed = applied(model, loaded(tensors))[0]
    assert tiny.patched_weights(changed)[key_of(LINEAR)].shape == (32, 40)
    assert_same(changed, by_core(model, (tensors, 1.0)))


def test_pefts_magnitude_is_applied_as_dora(model, loaded):
    up, down = factors((32, 32), 2, 0)
    magnitude = 1 + torch.arange(32.0) / 32
    name = f"unet.{LINEAR[0]}"
    tensors = {f"{name}.lora_B.weight": up, f"{name}.lora_A.weight": down, f"{name}.lora_magnitude_vector": magnitude}
    weight = tiny.patched_weights(applied(model, loaded(tensors))[0])[key_of(LINEAR)]
    before = weight_of(model, key_of(LINEAR))
    wanted = (before + up @ down) * (magnitude / before.norm(dim=1))[:, None]
    torch.testing.assert_close(weight, wanted, **CLOSE)


# ---- differences


@pytest.mark.parametrize("shape", [(32, 32), (32, 32, 1, 1)])
def test_a_whole_weight_is_added_also_where_core_leaves_it_out(model, loaded, shape):
    """Core adds a difference only if it has the very shape of the weight."""
    diff = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    changed = applied(model, loaded({f"{kohya(LINEAR)}.diff": diff}), 0.5)[0]
    wanted = weight_of(model, key_of(LINEAR)) + 0.5 * diff.reshape(32, 32)
    torch.testing.assert_close(tiny.patched_weights(changed)[key_of(LINEAR)], wanted, **CLOSE)


def test_biases_and_norms_are_added(model, loaded):
    norm, conv = "lora_unet_input_blocks_1_1_norm", kohya(CONV)
    g = torch.Generator().manual_seed(0)
    tensors = {f"{norm}.w_norm": torch.randn(32, generator=g), f"{norm}.b_norm": torch.randn(32, generator=g),
               f"{conv}.diff_b": torch.randn(32, generator=g), f"{conv}.diff": torch.randn(32, 32, 3, 3, generator=g),
               "lora_unet_input_blocks_4_1_norm.b_norm": torch.randn(64, generator=g)}  # fmt: skip
    changed = applied(model, loaded(tensors), 2.0)[0]
    targets = {
        "diffusion_model.input_blocks.1.1.norm.weight": f"{norm}.w_norm",
        "diffusion_model.input_blocks.1.1.norm.bias": f"{norm}.b_norm",
        "diffusion_model.input_blocks.1.0.in_layers.2.bias": f"{conv}.diff_b",
        "diffusion_model.input_blocks.1.0.in_layers.2.weight": f"{conv}.diff",
        "diffusion_model.input_blocks.4.1.norm.bias": "lora_unet_input_blocks_4_1_norm.b_norm",
    }
    weights = tiny.patched_weights(changed)
    assert weights.keys() == targets.keys()
    for target, key in targets.items():
        torch.testing.assert_close(weights[target], weight_of(model, target) + 2 * tensors[key], **CLOSE)
    alone = {key: value for key, value in tensors.items() if "blocks_4" not in key}  # core reads no lone b_norm
    assert_same(applied(model, loaded(alone), 2.0)[0], by_core(model, (alone, 2.0)))


@pytest.mark.parametrize(
    ("kind", "module"),
    [("LoHa", LINEAR), ("LoKr, both whole", CONV), ("OFT", LINEAR), ("DoRA, rows", CONV), ("GLoRA", LINEAR)],
)
def test_every_kind_of_another_shape_is_refused(model, loaded, kind, module):
    out, inputs, kernel = SHAPES[module]
    tensors = kinds.state_dict(kind, kohya(module), out + 4, inputs, kernel)
    with pytest.raises(ValueError, match="does not fit"):
        applied(model, loaded(tensors))


# ---- merging


@pytest.mark.parametrize(("kind", "module"), CASES)
def test_a_merge_patches_as_the_two_loras_do(model, loaded, kind, module):
    style, lcm = state(kind, module, alpha=1.5), tiny.lora(model, seed=3)
    slots = {f"strength_{n}": 1.0 for n in range(3, 5)}
    merged = MergeLoRA.execute(method="linear", size="exact", lora_1=loaded(style), strength_1=0.8,
                               lora_2=lcm, strength_2=1.0, **slots).result[0]  # fmt: skip
    ours = tiny.patched_weights(applied(model, merged)[0])
    theirs = tiny.patched_weights(by_core(model, (for_core(style), 0.8), (lcm, 1.0)))
    assert ours.keys() == theirs.keys()
    for key, weight in ours.items():
        torch.testing.assert_close(weight, theirs[key], **CLOSE)


@pytest.mark.parametrize("order", [1, -1])
@pytest.mark.parametrize("kind", ["DoRA, columns", "OFT", "LoHa"])
def test_the_order_of_loras_in_the_graph_is_kept(model, loaded, kind, order):
    tensors = [(state(kind, LINEAR, alpha=1.5), 0.7), (tiny.lora(model, seed=3), 1.0)][::order]
    ours = model
    for number, (lora, strength) in enumerate(tensors):
        ours = applied(ours, loaded(lora, name=f"{number}.safetensors"), strength)[0]
    assert_same(ours, by_core(model, *tensors))


# ---- the ways in which ComfyUI computes weights


def everything():
    """One file with several kinds, on two modules, for the ways that follow."""
    return state("LoKr, second low-rank", CONV, alpha=1.5) | state("DoRA, rows", LINEAR, alpha=1.5)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float8_e4m3fn])
def test_small_weights_are_patched_as_core_patches_them(loaded, dtype):
    """Half precision and fp8, rounded by ComfyUI with a seed for each weight: the same to the last bit."""
    results = []
    for way in ("ours", "core"):
        model = tiny.tiny_model()
        for key in (key_of(LINEAR), key_of(CONV)):
            comfy.utils.set_attr_param(model.model, key, weight_of(model, key).to(dtype))
        changed = applied(model, loaded(everything()), 0.7)[0] if way == "ours" else by_core(model, (everything(), 0.7))
        for key in (key_of(LINEAR), key_of(CONV)):
            changed.patch_weight_to_device(key)
        results.append([weight_of(changed, key).float() for key in (key_of(LINEAR), key_of(CONV))])
    assert all(torch.equal(ours, theirs) for ours, theirs in zip(*results, strict=True))


def test_weights_that_are_patched_when_they_are_used_give_the_same_picture(loaded):
    """What ComfyUI does in low memory: weights stay as they are, and each layer patches a copy as it runs."""
    pictures = []
    for memory in (64, 1e12):
        changed = applied(tiny.tiny_model(), loaded(everything()), 0.7)[0]
        changed.load(torch.device("cpu"), lowvram_model_memory=memory)
        unet = changed.model.diffusion_model
        assert bool(unet.get_submodule(CONV[1]).weight_function) is (memory == 64)
        x = tiny.latent(seed=1)["samples"]
        pictures.append(unet(x, torch.tensor([500.0]), context=tiny.cond()[0][0]))
    torch.testing.assert_close(*pictures, rtol=1e-4, atol=1e-4)
    plain = tiny.tiny_model().model.diffusion_model(x, torch.tensor([500.0]), context=tiny.cond()[0][0])
    assert not torch.allclose(plain, pictures[0], atol=0.01)


@pytest.mark.parametrize("ours_first", [True, False])
def test_hooks_and_our_patches_work_side_by_side(loaded, ours_first):
    """A LoRA that a hook switches on for one prompt, on a model that has ours, and ours as the hook's own weights."""
    other = tiny.lora(tiny.tiny_model(), endings=tiny.STYLE, seed=5)
    results = []
    for way in ("ours", "core"):
        model = tiny.tiny_model()
        base, hooked = (everything(), other) if ours_first else (other, everything())
        lora = loaded(base) if way == "ours" else base
        model = applied(model, lora, 0.7)[0] if way == "ours" else by_core(model, (base, 0.7))
        in_hook = dict(loaded(hooked, name="hook.safetensors")) if way == "ours" else hooked
        model, _, hooks = comfy.hooks.load_hook_lora_for_models(model, None, in_hook, 0.5, 0.0)
        model.patch_model(torch.device("cpu"))
        model.patch_hooks(hooks)
        results.append([weight_of(model, key) for key in (key_of(LINEAR), key_of(CONV))])
        model.unpatch_hooks()
        results[-1] += [weight_of(model, key) for key in (key_of(LINEAR), key_of(CONV))]
    assert all(torch.equal(ours, theirs) for ours, theirs in zip(*results, strict=True))
    assert not torch.equal(results[0][0], results[0][2])


def test_other_bases_go_by_the_names_they_came_with(loaded):
    """Flux's fused weight and its parts are known to ComfyUI by their dots only."""
    part, whole = "diffusion_model.single_blocks.0.linear1_qkv", "lora_unet_single_blocks_0_linear1"
    tensors = kinds.state_dict("LoRA", part, alpha=1.5) | kinds.state_dict("LoHa", whole, alpha=1.5)
    tensors |= kinds.state_dict("LoRA", "transformer.single_transformer_blocks.0.attn.to_q", alpha=1.5)
    lora = loaded(tensors)
    assert set(lora) == set(tensors)
    target = "diffusion_model.single_blocks.0.linear1.weight"
    patches = comfy.lora.load_lora(dict(lora), {part: (target, (0, 0, 8)), whole: target})
    assert set(patches) == {(target, (0, 0, 8)), target}
