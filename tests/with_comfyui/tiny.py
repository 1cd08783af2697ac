"""A real ComfyUI model, small enough for tests: UNetModel, BaseModel and ModelPatcher with seeded random weights,
a CLIP beside it, and LoRAs for both in the spellings that files come in.
"""

import json
from functools import partial
from types import SimpleNamespace

import comfy.conds
import comfy.latent_formats
import comfy.lora
import comfy.model_base
import comfy.model_patcher
import comfy.nested_tensor
import comfy.quant_ops
import comfy.sd
import comfy.sd1_clip
import comfy.supported_models
import comfy.supported_models_base
import comfy.utils
import torch
from comfy.model_base import ModelType

CONTEXT = 16

TWO_LEVELS = {
    "image_size": 32,
    "in_channels": 4,
    "out_channels": 4,
    "model_channels": 32,
    "num_res_blocks": [2, 2],
    "channel_mult": [1, 2],
    "transformer_depth": [1, 1, 1, 1],
    "transformer_depth_output": [1, 1, 1, 1, 1, 1],
    "transformer_depth_middle": 1,
    "context_dim": CONTEXT,
    "num_heads": -1,
    "num_head_channels": 16,
    "use_linear_in_transformer": True,
    "use_spatial_transformer": True,
    "use_temporal_attention": False,
    "adm_in_channels": None,
    "dtype": torch.float32,
}

# Half the work of TWO_LEVELS.
WITH_MIDDLE = {
    "num_res_blocks": [1, 1],
    "transformer_depth": [0, 1],
    "transformer_depth_output": [0, 0, 1, 1],
}

# A sixth of it: one level, one block of attention, no middle.
SMALL = {
    "channel_mult": [1],
    "num_res_blocks": [1],
    "transformer_depth": [1],
    "transformer_depth_output": [0, 0],
    "transformer_depth_middle": -2,
}


class TinyLatent(comfy.latent_formats.LatentFormat):
    """A scale that is not 1, so that a forgotten process_latent_in or _out shows."""

    scale_factor = 0.5
    latent_channels = 4


class TinyConfig(comfy.supported_models_base.BASE):
    latent_format = TinyLatent

    def inpaint_model(self):
        return False


def tiny_model(model_type=ModelType.EPS, *, seed=0, sampling_settings=None, **unet_config):
    """A MODEL on the CPU. sampling_settings: as in ComfyUI's supported_models, for example {"zsnr": True}."""
    config = TinyConfig(TWO_LEVELS)
    config.unet_config = TWO_LEVELS | unet_config
    config.sampling_settings = sampling_settings or {}
    model = comfy.model_base.BaseModel(config, model_type=model_type, device=torch.device("cpu"))
    fill(model.diffusion_model, seed)
    cpu = torch.device("cpu")
    return comfy.model_patcher.ModelPatcher(model, load_device=cpu, offload_device=cpu)


def small_model(model_type=ModelType.EPS, **options):
    """The same with the fewest blocks, for what holds of any network with cross-attention: how it is sampled.

    What patches a UNet's levels or its middle takes `WITH_MIDDLE`.
    """
    return tiny_model(model_type, **SMALL | options)


# Formats of ComfyUI's quantised checkpoints -> largest number of theirs, dtype they are stored in.
QUANTISED = {"float8_e4m3fn": (448, torch.float8_e4m3fn), "int8_tensorwise": (127, torch.int8)}


def quantised_formats():
    """Of those, what this ComfyUI reads: int8 came after 0.16."""
    return [name for name in QUANTISED if name in comfy.quant_ops.QUANT_ALGOS]


def quantised_state(state, name):
    """A checkpoint's state dict with every matrix in that format, as files hold it."""
    largest, dtype = QUANTISED[name]
    made = dict(state)
    for key, weight in state.items():
        if key.endswith("weight") and weight.ndim == 2:
            scale = weight.abs().max() / largest
            scaled = weight / scale
            made[key] = (scaled if dtype.is_floating_point else scaled.round()).to(dtype)
            made[f"{key}_scale"] = scale
            text = list(json.dumps({"format": name}).encode())
            made[f"{key.removesuffix('weight')}comfy_quant"] = torch.tensor(text, dtype=torch.uint8)
    return made


def quantised_model(name, model=None):
    """The MODEL (default tiny_model()) as ComfyUI loads it from a checkpoint quantised in that format."""
    model = model or tiny_model()
    source, config = model.model, _config(model)
    config.quant_config, config.manual_cast_dtype = {"mixed_ops": True}, torch.float32
    made = comfy.model_base.BaseModel(config, device=torch.device("cpu"))
    state = {key: value.clone() for key, value in source.diffusion_model.state_dict().items()}
    missing, unexpected = made.diffusion_model.load_state_dict(quantised_state(state, name), strict=False)
    assert not missing
    assert not unexpected
    cpu = torch.device("cpu")
    return comfy.model_patcher.ModelPatcher(made, load_device=cpu, offload_device=cpu)


def dequantised(model):
    """A tiny MODEL whose weights are the numbers that a quantised one's stand for."""
    cpu = torch.device("cpu")
    made = comfy.model_patcher.ModelPatcher(comfy.model_base.BaseModel(_config(model), device=cpu), cpu, cpu)
    for name, parameter in model.model.diffusion_model.named_parameters():
        value = parameter.dequantize() if isinstance(parameter, comfy.quant_ops.QuantizedTensor) else parameter
        made.model.diffusion_model.get_parameter(name).data.copy_(value)
    return made


def _config(model):
    config = TinyConfig(model.model.model_config.unet_config)
    config.unet_config, config.sampling_settings = model.model.model_config.unet_config, {}
    return config


def tiny_video_model(*, seed=0):
    """A MODEL of Wan's architecture: a flow model whose latents are (b, 16, frames, h, w), with Wan's own scaling."""
    config = comfy.supported_models.WAN21_T2V(
        {
            "image_model": "wan2.1",
            "model_type": "t2v",
            "dim": 48,
            "ffn_dim": 64,
            "freq_dim": 16,
            "text_dim": CONTEXT,
            "num_heads": 2,
            "num_layers": 1,
            "dtype": torch.float32,
        }
    )
    cpu = torch.device("cpu")
    model = config.get_model({}, device=cpu)
    fill(model.diffusion_model, seed)
    return comfy.model_patcher.ModelPatcher(model, load_device=cpu, offload_device=cpu)


class Pair(torch.nn.Module):
    """A network of two latents at once, as of picture and sound: a UNet, and a line that hears the picture's mean."""

    def __init__(self, unet):
        super().__init__()
        self.unet, self.dtype = unet, unet.dtype

    def forward(self, x, timesteps, context=None, **others):
        picture, sound = x
        output = self.unet(picture, timesteps, context=context)
        return [output, 0.5 * sound + 0.1 * output.mean((1, 2, 3), keepdim=True).flatten(1)[:, :, None]]


class PairModel(comfy.model_base.BaseModel):
    def extra_conds(self, **kwargs):
        return super().extra_conds(**kwargs) | {"latent_shapes": comfy.conds.CONDConstant(kwargs["latent_shapes"])}


def pair_model():
    """A MODEL of nested latents, a picture (b, 4, h, w) and a sound (b, 3, length)."""
    inner = small_model(ModelType.FLOW)
    model = PairModel(inner.model.model_config, model_type=ModelType.FLOW, device=torch.device("cpu"))
    model.diffusion_model = Pair(inner.model.diffusion_model)
    cpu = torch.device("cpu")
    return comfy.model_patcher.ModelPatcher(model, load_device=cpu, offload_device=cpu)


@torch.no_grad()
def fill(module, seed):
    """Weights of a plausible size: ComfyUI's layers leave them uninitialised. Its output has a spread of about 1."""
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in module.named_parameters():
        parameter.copy_(torch.randn(parameter.shape, generator=generator))
        if parameter.ndim > 1:
            parameter.mul_(parameter[0].numel() ** -0.5)
        else:
            parameter.mul_(0.1).add_(float(name.endswith("weight")))


def tiny_clip(*, words=False, width=32):
    """A CLIP of two layers. Without words only its weights are of use."""
    config = {
        "num_hidden_layers": 2,
        "hidden_size": width,
        "num_attention_heads": 2,
        "intermediate_size": 64,
        "hidden_act": "quick_gelu",
        "max_position_embeddings": 77,
        "eos_token_id": 49407,
    }
    encoder = partial(comfy.sd1_clip.SDClipModel, textmodel_json_config=config)
    target = comfy.supported_models_base.ClipTarget(
        comfy.sd1_clip.SD1Tokenizer if words else lambda **nothing: None,
        partial(comfy.sd1_clip.SD1ClipModel, clip_model=encoder),
    )
    clip = comfy.sd.CLIP(target)
    fill(clip.cond_stage_model, seed=0)
    return clip


def cond(seed=0, tokens=5):
    """A CONDITIONING."""
    return [[torch.randn(1, tokens, CONTEXT, generator=torch.Generator().manual_seed(seed)), {}]]


def latent(batch=1, height=8, width=8, seed=None):
    """A LATENT, empty unless there is a seed."""
    shape = (batch, 4, height, width)
    if seed is None:
        return {"samples": torch.zeros(shape)}
    return {"samples": torch.randn(shape, generator=torch.Generator().manual_seed(seed))}


def nested(*tensors):
    """A LATENT of several tensors, as of picture and sound."""
    return {"samples": comfy.nested_tensor.NestedTensor(tensors)}


# How files spell a module: (diffusers name, ldm name) -> name of the module, and of its factors.
SPELLINGS = {
    "kohya": lambda diffusers, ldm: (
        f"lora_unet_{diffusers.replace('.', '_')}",
        ".lora_up.weight",
        ".lora_down.weight",
    ),
    "kohya on ldm": lambda diffusers, ldm: (
        f"lora_unet_{ldm.replace('.', '_')}",
        ".lora_up.weight",
        ".lora_down.weight",
    ),
    "generic": lambda diffusers, ldm: (f"diffusion_model.{ldm}", ".lora_up.weight", ".lora_down.weight"),
    "generic PEFT": lambda diffusers, ldm: (f"diffusion_model.{ldm}", ".lora_B.weight", ".lora_A.weight"),
    "diffusers PEFT": lambda diffusers, ldm: (f"unet.{diffusers}", ".lora_B.weight", ".lora_A.weight"),
}

STYLE = (".to_q", ".to_k", ".to_v", ".to_out.0")
LCM = (*STYLE, ".proj_in", ".proj_out", ".ff.net.0.proj", ".ff.net.2", ".conv1", ".conv2", ".conv_shortcut",
       ".downsamplers.0.conv", ".upsamplers.0.conv", ".time_emb_proj")  # fmt: skip


def modules(model, endings=LCM):
    """(diffusers name, ldm name, shape of the weight) of the UNet's modules whose diffusers name ends so."""
    state = model.model.diffusion_model.state_dict()
    names = comfy.utils.unet_to_diffusers(model.model.model_config.unet_config)
    found = [(k.removesuffix(".weight"), names[k].removesuffix(".weight")) for k in names if k.endswith(".weight")]
    # ComfyUI's table also names layers that some block sizes do not have
    found = [(diffusers, ldm) for diffusers, ldm in found if f"{ldm}.weight" in state and diffusers.endswith(endings)]
    return sorted((diffusers, ldm, tuple(state[f"{ldm}.weight"].shape)) for diffusers, ldm in found)


def lora(model, spelling="kohya", *, endings=LCM, rank=4, alpha=2.0, seed=0, dtype=torch.float32):
    """A LoRA's state dict. The same seed gives the same update in every spelling. alpha None writes none."""
    generator = torch.Generator().manual_seed(seed)
    tensors = {}
    for diffusers, ldm, shape in modules(model, endings):
        name, up, down = SPELLINGS[spelling](diffusers, ldm)
        ones = (1,) * len(shape[2:])
        tensors[name + up] = torch.randn(shape[0], rank, *ones, generator=generator).to(dtype) / 4
        tensors[name + down] = torch.randn(rank, *shape[1:], generator=generator).to(dtype) / 4
        if alpha is not None:
            tensors[f"{name}.alpha"] = torch.tensor(alpha)
    return tensors


def clip_lora(clip, *, rank=2, seed=0):
    """A LoRA's state dict for the attention of a CLIP, in kohya's names."""
    generator = torch.Generator().manual_seed(seed)
    tensors = {}
    for key, weight in clip.cond_stage_model.state_dict().items():
        if key.endswith("_proj.weight") and "encoder.layers" in key:
            name = "lora_te_" + key.removeprefix("clip_l.transformer.").removesuffix(".weight").replace(".", "_")
            tensors[f"{name}.lora_up.weight"] = torch.randn(weight.shape[0], rank, generator=generator)
            tensors[f"{name}.lora_down.weight"] = torch.randn(rank, weight.shape[1], generator=generator)
            tensors[f"{name}.alpha"] = torch.tensor(float(rank))
    return tensors


@torch.no_grad()
def patched_weights(model):
    """Every weight that has a patch, as ComfyUI computes it, without changing the model (a MODEL or CLIP.patcher)."""
    weights = {}
    for key, patches in model.patches.items():
        weight = comfy.utils.get_attr(model.model, key).detach().clone()
        weights[key] = comfy.lora.calculate_weight(patches, weight, key)
    return weights


def count_calls(model):
    """A clone of the MODEL that counts UNet evaluations, one for each conditioning, in `.calls`."""
    model, seen = model.clone(), SimpleNamespace(calls=0, conds=[])

    def wrapper(apply_model, args):
        seen.calls += len(args["cond_or_uncond"])
        seen.conds.append(sorted(args["cond_or_uncond"]))
        return apply_model(args["input"], args["timestep"], **args["c"])

    model.set_model_unet_function_wrapper(wrapper)
    return model, seen
