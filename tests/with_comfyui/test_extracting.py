"""Extract LoRA from ComfyUI's own MODELs and CLIPs."""

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import comfy.lora
import comfy.model_management
import comfy.quant_ops
import comfy.sd
import comfy.utils
import pytest
import torch
from safetensors.torch import save_file

from lcm_kit.host.lora.extracting import _clip_names
from lcm_kit.host.lora.weights import to_lora
from lcm_kit.lora_merge import Lora
from lcm_kit.lora_merge.__main__ import main
from lcm_kit.lora_merge.extracting import checkpoints
from lcm_kit.nodes.extracting import ExtractLoRA
from lcm_kit.nodes.loading import ApplyLoRA
from lcm_kit.nodes.sampling import LCMKSampler
from lcm_kit.tests.with_comfyui import dits, tiny
from lcm_kit.tests.with_comfyui.families import FAMILIES

DEMO = Path(__file__).resolve().parents[2] / "demo"


pytestmark = pytest.mark.usefixtures("no_gradients")


def with_lora(model, lora, strength=1.0, clip=None):
    return comfy.sd.load_lora_for_models(model, clip, lora, strength, strength)


def extracted(tuned, base, rank=4, keep=1.0, **clips):
    return ExtractLoRA.execute(tuned, base, rank, keep, **clips).result


def relative_deltas(found, wanted, strength=1.0):
    """Largest relative difference of the updates of any module; the modules have to be the same."""
    found, wanted = to_lora(found), Lora.from_state_dict(wanted)
    assert set(found.modules) == set(wanted.modules)
    worst = 0.0
    for module in wanted.modules:
        goal = strength * wanted.delta(module)
        worst = max(worst, float((found.delta(module).reshape(goal.shape) - goal).norm() / goal.norm()))
    return worst


def snapshot(model):
    return {key: value.clone() for key, value in model.model.state_dict().items()}


@pytest.mark.parametrize("loaded", [False, True])
def test_a_lora_on_a_model_comes_back(loaded):
    base = tiny.tiny_model()
    lora = tiny.lora(base, "kohya on ldm", rank=4)
    tuned, _ = with_lora(base, lora, 0.7)
    before = snapshot(base)
    if loaded:
        # The patched weights stand in the model that both MODELs share; the stored ones are aside.
        comfy.model_management.load_models_gpu([tuned])
        assert not torch.equal(before[next(iter(tuned.patches))], tuned.model.state_dict()[next(iter(tuned.patches))])
    now, on_device = snapshot(base), list(comfy.model_management.current_loaded_models)
    found, report = extracted(tuned, base, rank=4)
    assert relative_deltas(found, lora, 0.7) < 1e-5
    assert "Extracted" in report
    assert "do not differ and are left out" in report
    # Nothing was loaded, unloaded or changed.
    assert comfy.model_management.current_loaded_models == on_device
    assert all(torch.equal(value, now[key]) for key, value in base.model.state_dict().items())
    comfy.model_management.unload_all_models()


def test_two_separate_models_with_patches_on_both():
    base, tuned = tiny.tiny_model(), tiny.tiny_model()
    first, second = tiny.lora(base, "kohya on ldm", seed=1), tiny.lora(base, "kohya on ldm", seed=2)
    tuned, _ = with_lora(*with_lora(tuned, first)[:1], second)
    base, _ = with_lora(base, first)
    assert relative_deltas(extracted(tuned, base)[0], second) < 1e-5


def test_the_extracted_lora_makes_the_tuned_model_at_full_rank():
    """Every weight of another model, biases and norms included."""
    base, tuned = tiny.tiny_model(seed=0), tiny.tiny_model(seed=1)
    found, _ = extracted(tuned, base, rank=4096)
    applied = ApplyLoRA.execute(base, found, 1.0, 1.0).result[0]
    goal = tuned.model.state_dict()
    got = goal | base.model.state_dict() | tiny.patched_weights(applied)
    for key, value in goal.items():
        if key.startswith("diffusion_model."):
            torch.testing.assert_close(got[key], value, rtol=0, atol=2e-5, msg=lambda text, key=key: f"{key}: {text}")


@pytest.mark.parametrize("in_diffusers_names", ["tuned", "base"])
def test_files_in_the_names_of_diffusers_and_of_ldm_meet(in_diffusers_names, tmp_path, capsys):
    """As the UNet of a full LCM, in a folder of diffusers, and the checkpoint that it was made from."""
    models = {"base": tiny.tiny_model(seed=0), "tuned": tiny.tiny_model(seed=1)}
    states = {name: model.model.diffusion_model.state_dict() for name, model in models.items()}
    theirs = comfy.utils.unet_to_diffusers(models["base"].model.model_config.unet_config)
    theirs = {ldm: diffusers for diffusers, ldm in theirs.items()}
    for name, state in states.items():
        if name == in_diffusers_names:
            written = {theirs[key]: value for key, value in state.items()}
            written["time_embedding.cond_proj.weight"] = torch.ones(32, 16)
        else:
            written = {f"model.diffusion_model.{key}": value for key, value in state.items()}
            written["first_stage_model.decoder.conv_in.weight"] = torch.ones(2, 2)
        save_file({key: value.contiguous() for key, value in written.items()}, tmp_path / f"{name}.safetensors")
    output = tmp_path / "lora.safetensors"
    words = [str(tmp_path / f"{name}.safetensors") for name in ("tuned", "base")]
    assert main(["extract", *words, "-o", str(output), "--rank", "4096", "--dtype", "fp32"]) == 0
    assert "1 weight is in one file only" in (said := capsys.readouterr().out)
    assert "cond_proj" in said
    applied, _ = with_lora(models["base"], comfy.utils.load_torch_file(str(output)))
    got = states["base"] | {
        key.removeprefix("diffusion_model."): value for key, value in tiny.patched_weights(applied).items()
    }
    for key, value in states["tuned"].items():
        torch.testing.assert_close(got[key], value, rtol=0, atol=2e-5, msg=lambda text, key=key: f"{key}: {text}")


@pytest.mark.parametrize("order", [1, -1])
def test_a_model_that_is_told_its_guidance_meets_one_that_is_not(order):
    """Flux dev and schnell. Of so small a model guidance_in is more than a tenth of the weights."""
    dev = FAMILIES["Flux"]
    schnell = replace(dev, config=dev.config | {"guidance_embed": False, "depth": 0})
    pair = [replace(dev, config=dev.config | {"depth": 0}).model(seed=1), schnell.model(seed=0)]
    keys = [{key for key in model.model.state_dict() if key.startswith("diffusion_model.")} for model in pair]
    assert len(keys[0] - keys[1]) > 0.1 * len(keys[0])
    found, _ = extracted(*pair[::order], rank=4096)
    assert not any("guidance_in" in key for key in found)
    module = "diffusion_model.img_in.weight"
    wanted = [model.model.state_dict()[module] for model in pair[::order]]
    lora = to_lora(found)
    assert torch.allclose(lora.delta(lora.find("diffusion_model.img_in")), wanted[0] - wanted[1], atol=2e-5)


def test_the_text_encoder_is_taken_if_it_is_connected():
    base, clip = tiny.tiny_model(), tiny.tiny_clip()
    lora, text = tiny.lora(base, "kohya on ldm"), tiny.clip_lora(clip, rank=4)
    tuned, tuned_clip = with_lora(base, lora | text, 1.0, clip)
    found, _ = extracted(tuned, base, clip_tuned=tuned_clip, clip_base=clip)
    assert relative_deltas(found, lora | text) < 1e-5
    assert all(key.startswith(("lora_unet_", "lora_te_")) for key in found)
    with pytest.raises(ValueError, match="Only one CLIP is connected"):
        extracted(tuned, base, clip_tuned=tuned_clip)


KEY = "diffusion_model.middle_block.1.transformer_blocks.0.attn1.to_q"
NAME = "lora_unet_middle_block_1_transformer_blocks_0_attn1_to_q"


@pytest.mark.parametrize("name", tiny.quantised_formats())
def test_quantised_weights_are_read_through_comfyui_s_own_conversion(name):
    base = tiny.tiny_model()
    small = tiny.quantised_model(name, base)
    layer = comfy.utils.get_attr(small.model, KEY)
    assert isinstance(layer.weight, comfy.quant_ops.QuantizedTensor)
    lora = tiny.lora(base, "kohya on ldm", endings=tiny.STYLE)
    assert relative_deltas(extracted(with_lora(small, lora)[0], small)[0], lora) < 1e-5
    # Against the unquantised model the rounding is the difference.
    rounding = layer.weight.dequantize() - comfy.utils.get_attr(base.model, f"{KEY}.weight")
    delta = to_lora(extracted(small, base, rank=4096)[0]).delta(NAME)
    assert float((delta - rounding).norm() / rounding.norm()) < 1e-5


def test_weights_that_cannot_be_read_are_refused_with_their_number():
    """As a pack's own format has them: bytes, and nothing of ComfyUI's to make numbers of them."""
    base, packed = (tiny.tiny_model(**tiny.WITH_MIDDLE) for _ in range(2))
    for place in ("to_q", "to_k", "to_v"):
        layer = comfy.utils.get_attr(packed.model, KEY.replace("to_q", place))
        layer.weight = torch.nn.Parameter(torch.zeros(64, 40, dtype=torch.uint8), requires_grad=False)
    for pair in ((packed, base), (base, packed)):
        with pytest.raises(
            ValueError, match=r"3 of the \d+ weights of one model .* torch\.uint8\); load .*unquantised"
        ):
            extracted(*pair)


class LlamaLike(torch.nn.Module):
    """A text encoder whose weights are called as those of Qwen and the like are, in ComfyUI."""

    def __init__(self, wrapper):
        super().__init__()
        layer = torch.nn.ModuleDict({"self_attn": torch.nn.ModuleDict({"q_proj": torch.nn.Linear(4, 4)})})
        model = torch.nn.ModuleDict({"model": torch.nn.ModuleDict({"layers": torch.nn.ModuleList([layer])})})
        self.add_module(wrapper, torch.nn.ModuleDict({"transformer": model}))


@pytest.mark.parametrize("wrapper", ["qwen3_4b", "qwen25_7b", "gemma2_2b"])
def test_names_of_text_encoders_are_those_that_old_and_new_comfyuis_read(wrapper):
    """A newer one calls this lora_te_layers_0_self_attn_q_proj, which 0.16 does not know."""
    key = f"{wrapper}.transformer.model.layers.0.self_attn.q_proj.weight"
    names = _clip_names(SimpleNamespace(cond_stage_model=LlamaLike(wrapper)))
    assert names == {key: f"text_encoders.{key.removesuffix('.weight')}"}
    clip = tiny.tiny_clip()
    assert all(name.startswith("lora_te_text_model_") for key, name in _clip_names(clip).items() if "self_attn" in key)


def test_other_models_keep_comfyui_s_own_names():
    base = tiny.tiny_video_model()
    tuned = tiny.tiny_video_model(seed=1)
    found, _ = extracted(tuned, base, rank=4096)
    applied = ApplyLoRA.execute(base, found, 1.0, 1.0).result[0]
    got = tiny.patched_weights(applied)
    goal = tuned.model.state_dict()
    assert len(got) > 20
    for key, value in got.items():
        torch.testing.assert_close(value, goal[key], rtol=0, atol=2e-5)


def test_models_of_two_families_or_equal_ones_are_refused():
    base = tiny.tiny_model()
    with pytest.raises(ValueError, match=r"model_tuned .* and model_base .* are not of one family: .* another shape"):
        extracted(tiny.tiny_model(model_channels=64), base)
    with pytest.raises(ValueError, match=r"are not of one family: .* have the same name"):
        extracted(tiny.tiny_video_model(), base)
    with pytest.raises(ValueError, match="do not differ, so there is nothing to extract"):
        extracted(base.clone(), base)


def test_the_stop_button_stops():
    base = tiny.tiny_model()
    comfy.model_management.interrupt_current_processing(True)
    with pytest.raises(comfy.model_management.InterruptProcessingException):
        extracted(with_lora(base, tiny.lora(base))[0], base)


def test_the_acceleration_of_the_embedded_model_makes_the_same_picture(tiny_emoji):
    model, clip = tiny_emoji
    lcm = comfy.utils.load_torch_file(str(DEMO / "models" / "loras" / "tiny_emoji_lcm_lora.safetensors"))
    tuned, _ = with_lora(model, lcm)
    found, _ = extracted(tuned, model, rank=32)
    assert relative_deltas(found, lcm) < 1e-4  # of weights many times larger than the update
    prompt = [[clip.encode_from_tokens(clip.tokenize("cat face")), {}]]

    def picture(one):
        settings = {"seed": 3, "steps": 4, "cfg": 1.0, "denoise": 1.0, "gamma": 1.0, "cfg_steps": -1}
        empty = {"samples": torch.zeros(1, 4, 8, 8)}
        sampled = LCMKSampler.execute(model=one, positive=prompt, latent_image=empty, original_steps=50, **settings)
        return sampled.result[0]["samples"]

    by_file, by_extraction = picture(tuned), picture(ApplyLoRA.execute(model, found, 1.0, 1.0).result[0])
    apart = float((by_file - picture(model)).norm() / by_file.norm())
    assert float((by_extraction - by_file).norm() / by_file.norm()) < 1e-3
    assert apart > 0.05  # the acceleration does something


# ---- the command's names, for every model


@pytest.mark.parametrize("name", dits.KNOWN)
def test_the_command_names_the_weights_of_every_model_as_comfyui_knows_them(name):
    """A file of the diffusion model alone, in ComfyUI's own layout."""
    homes = dits.homes(name)
    keys = {key.removeprefix("diffusion_model."): key for key in dits.shapes(name)}
    prefix = checkpoints.prefix_of(keys)
    for key, weight in keys.items():
        ((spelled, rows),) = checkpoints.named_rows(key, prefix)
        module, _, part = spelled.rpartition(".")
        assert rows == (0.0, 1.0)
        if part == "weight":
            assert homes[module] == weight
        elif part == "bias" and f"{key.removesuffix('bias')}weight" in keys:
            assert homes[module] == f"{weight.removesuffix('bias')}weight"


DIFFUSERS = {
    "Flux": comfy.utils.flux_to_diffusers,
    "SD3": comfy.utils.mmdit_to_diffusers,
    "AuraFlow": comfy.utils.auraflow_to_diffusers,
    "PixArt": comfy.utils.pixart_to_diffusers,
    "Z-Image": comfy.utils.z_image_to_diffusers,
}


@pytest.mark.parametrize("name", DIFFUSERS)
def test_the_command_names_diffusers_weights_as_comfyui_knows_them(name):
    homes = dits.homes(name)
    table = DIFFUSERS[name](dits.model(name).model_config.unet_config, output_prefix="diffusion_model.")
    prefix = checkpoints.prefix_of(table)
    weights = [key for key in table if key.endswith(".weight")]
    assert len(weights) > 20
    for key in weights:
        ((spelled, _),) = checkpoints.named_rows(key, prefix)
        assert dits.target_of(homes[spelled.removesuffix(".weight")])[0] == dits.target_of(table[key])[0]
