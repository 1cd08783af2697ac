"""Transformers of ComfyUI's own classes, a block or two each, and the names that ComfyUI knows for their weights."""

from functools import cache
from importlib import import_module
from inspect import signature
from types import SimpleNamespace

import comfy.lora
import comfy.model_base
import comfy.ops
import torch

_FLUX = {
    "in_channels": 4, "out_channels": 4, "vec_in_dim": 8, "context_in_dim": 8, "hidden_size": 16, "mlp_ratio": 4.0,
    "num_heads": 2, "depth": 2, "depth_single_blocks": 2, "axes_dim": [2, 2, 4], "theta": 10000, "patch_size": 1,
    "qkv_bias": True, "guidance_embed": True, "txt_ids_dims": [],
}  # fmt: skip
_HUNYUAN = _FLUX | {
    "theta": 256, "patch_size": [1, 2, 2], "byt5": False, "meanflow": False, "use_cond_type_embedding": False,
    "vision_in_dim": None, "meanflow_sum": False,
}  # fmt: skip
_FLUX_2 = _FLUX | {
    "mlp_ratio": 3.0, "vec_in_dim": None, "qkv_bias": False, "ops_bias": False, "global_modulation": True,
    "mlp_silu_act": True,
}  # fmt: skip
_CHROMA = _FLUX | {"in_dim": 8, "out_dim": 16, "hidden_dim": 16, "n_layers": 2}
_HUNYUAN_1_5 = _HUNYUAN | {
    "vec_in_dim": None, "guidance_embed": False, "depth_single_blocks": 0, "byt5": True, "vision_in_dim": 8,
    "use_cond_type_embedding": True,
}  # fmt: skip
_HUNYUAN_IMAGE = _HUNYUAN | {"vec_in_dim": None, "patch_size": [1, 1], "meanflow": True, "byt5": True}
_COSMOS = {
    "max_img_h": 8, "max_img_w": 8, "max_frames": 1, "in_channels": 4, "out_channels": 4, "patch_spatial": 2,
    "patch_temporal": 1, "model_channels": 32, "num_blocks": 2, "num_heads": 2, "crossattn_emb_channels": 8,
    "pos_emb_cls": "rope3d", "use_adaln_lora": True, "adaln_lora_dim": 8,
}  # fmt: skip
_LUMINA = {
    "patch_size": 2, "in_channels": 4, "dim": 24, "n_layers": 2, "n_refiner_layers": 1, "n_heads": 2, "n_kv_heads": 2,
    "multiple_of": 16, "ffn_dim_multiplier": 1.0, "qk_norm": True, "cap_feat_dim": 8, "axes_dims": [4, 4, 4],
    "axes_lens": [8, 8, 8],
}  # fmt: skip
_SD3 = {
    "depth": 2, "input_size": None, "patch_size": 2, "in_channels": 4, "pos_embed_max_size": 4, "num_patches": 16,
    "adm_in_channels": 8, "context_size": 8,
    "context_embedder_config": {"target": "torch.nn.Linear", "params": {"in_features": 8, "out_features": 128}},
}  # fmt: skip
_HIDREAM = {
    "patch_size": 2, "in_channels": 4, "out_channels": 4, "num_layers": 2, "num_single_layers": 1,
    "attention_head_dim": 8, "num_attention_heads": 2, "caption_channels": [8, 8], "text_emb_dim": 8,
    "num_routed_experts": 2, "num_activated_experts": 1, "axes_dims_rope": (2, 2, 4), "max_resolution": (8, 8),
    "llama_layers": [0, 1],
}  # fmt: skip
_QWEN = {
    "in_channels": 8, "out_channels": 2, "num_layers": 2, "attention_head_dim": 8, "num_attention_heads": 2,
    "joint_attention_dim": 8, "pooled_projection_dim": 8, "axes_dims_rope": (2, 2, 4),
}  # fmt: skip
_LTX = {
    "in_channels": 8, "cross_attention_dim": 16, "attention_head_dim": 8, "num_attention_heads": 2,
    "caption_channels": 8, "num_layers": 2,
}  # fmt: skip
_WAN = {
    "dim": 24, "ffn_dim": 32, "freq_dim": 8, "text_dim": 8, "num_heads": 2, "num_layers": 2, "in_dim": 4, "out_dim": 4,
}  # fmt: skip
_LTX_2 = _LTX | {
    "audio_in_channels": 8, "audio_cross_attention_dim": 16, "audio_attention_head_dim": 8, "audio_num_attention_heads": 2,
    "connector_attention_head_dim": 8, "connector_num_attention_heads": 2,
}  # fmt: skip
_VACE = _WAN | {"vace_layers": 2, "vace_in_dim": 4}
_AURA = {
    "in_channels": 4, "dim": 16, "n_layers": 3, "n_double_layers": 2, "n_heads": 2, "global_conddim": 16,
    "cond_seq_dim": 8, "max_seq": 16,
}  # fmt: skip
_PIXART = {
    "in_channels": 4,
    "hidden_size": 16,
    "depth": 2,
    "num_heads": 2,
    "caption_channels": 8,
    "micro_condition": True,
}
_ACE = {
    "in_channels": 4, "num_layers": 2, "inner_dim": 16, "attention_head_dim": 8, "num_attention_heads": 2,
    "mlp_ratio": 2.0, "out_channels": 4, "speaker_embedding_dim": 8, "text_embedding_dim": 8, "ssl_encoder_depths": [1],
    "ssl_names": ["mert"], "ssl_latent_dims": [8], "lyric_encoder_vocab_size": 8, "lyric_hidden_size": 16,
}  # fmt: skip
_OMNIGEN = {
    "patch_size": 2, "in_channels": 4, "hidden_size": 16, "num_layers": 1, "num_refiner_layers": 1,
    "num_attention_heads": 2, "num_kv_heads": 1, "multiple_of": 16, "axes_dim_rope": (2, 2, 4), "axes_lens": (8, 8, 8),
    "text_feat_dim": 8,
}  # fmt: skip
_HYDIT = {
    "input_size": 8, "in_channels": 4, "hidden_size": 16, "depth": 2, "num_heads": 2, "text_states_dim": 8,
    "text_states_dim_t5": 8,
}  # fmt: skip
_KREA = {"features": 32, "tdim": 16, "txtdim": 16, "heads": 2, "kvheads": 1, "layers": 2, "channels": 4, "txtlayers": 2,
         "txtheads": 2, "txtkvheads": 2}  # fmt: skip
_KANDINSKY = {"in_visual_dim": 4, "out_visual_dim": 4, "in_text_dim": 8, "in_text_dim2": 8, "time_dim": 8,
              "model_dim": 16, "ff_dim": 16, "visual_embed_dim": 9, "num_text_blocks": 1, "num_visual_blocks": 1,
              "axes_dims": (2, 2, 4)}  # fmt: skip
_ERNIE = {"hidden_size": 16, "num_attention_heads": 2, "num_layers": 1, "ffn_hidden_size": 16, "in_channels": 4,
          "out_channels": 4, "text_in_dim": 8, "rope_axes_dim": (2, 2, 4)}  # fmt: skip
_ACE15 = {"in_channels": 12, "hidden_size": 16, "text_hidden_dim": 8, "timbre_hidden_dim": 4,
          "audio_acoustic_hidden_dim": 4, "num_dit_layers": 1, "num_lyric_layers": 1, "num_timbre_layers": 1,
          "num_tokenizer_layers": 1, "num_heads": 2, "num_kv_heads": 1, "head_dim": 8, "intermediate_size": 16,
          "fsq_dim": 16, "encoder_hidden_size": 16, "encoder_intermediate_size": 16, "encoder_num_heads": 2}  # fmt: skip

# Name -> class in comfy.model_base, module and class in comfy.ldm, configuration, and the class of the latter if it is one.
MODELS = {
    "Flux": ("Flux", "flux.model", "Flux", _FLUX, "FluxParams"),
    "Flux 2": ("Flux2", "flux.model", "Flux", _FLUX_2, "FluxParams"),
    "Chroma": ("Chroma", "chroma.model", "Chroma", _CHROMA, "ChromaParams"),
    "Qwen-Image": ("QwenImage", "qwen_image.model", "QwenImageTransformer2DModel", _QWEN, None),
    "Z-Image": ("Lumina2", "lumina.model", "NextDiT", _LUMINA | {"z_image_modulation": True}, None),
    "Lumina 2": ("Lumina2", "lumina.model", "NextDiT", _LUMINA | {"n_kv_heads": 1}, None),
    "HunyuanVideo": ("HunyuanVideo", "hunyuan_video.model", "HunyuanVideo", _HUNYUAN, "HunyuanVideoParams"),
    "HunyuanVideo 1.5": ("HunyuanVideo15", "hunyuan_video.model", "HunyuanVideo", _HUNYUAN_1_5, "HunyuanVideoParams"),
    "HunyuanImage 2.1": ("HunyuanImage21", "hunyuan_video.model", "HunyuanVideo", _HUNYUAN_IMAGE, "HunyuanVideoParams"),
    "Cosmos Predict 2": ("CosmosPredict2", "cosmos.predict2", "MiniTrainDIT", _COSMOS, None),
    "Anima": ("Anima", "anima.model", "Anima", _COSMOS, None),
    "SD3": ("SD3", "modules.diffusionmodules.mmdit", "MMDiT", _SD3, None),
    "SD3.5 medium": ("SD3", "modules.diffusionmodules.mmdit", "MMDiT", _SD3 | {"x_block_self_attn_layers": [0], "qk_norm": "rms"}, None),
    "HiDream": ("HiDream", "hidream.model", "HiDreamImageTransformer2DModel", _HIDREAM, None),
    "LTX-Video": ("LTXV", "lightricks.model", "LTXVModel", _LTX, None),
    "LTX-2": ("LTXAV", "lightricks.av_model", "LTXAVModel", _LTX_2, None),
    "Wan VACE": ("WAN21_Vace", "wan.model", "VaceWanModel", _VACE, None),
    "Wan": ("WAN21", "wan.model", "WanModel", _WAN, None),
    "Wan I2V": ("WAN21", "wan.model", "WanModel", _WAN | {"model_type": "i2v"}, None),
    "Wan Animate 2": ("WAN_Animate2", "wan.model_animate2", "WanAnimate2Model", _WAN | {"model_type": "animate2"}, None),
    "AuraFlow": ("AuraFlow", "aura.mmdit", "MMDiT", _AURA, None),
    "PixArt": ("PixArt", "pixart.pixartms", "PixArtMS", _PIXART, None),
    "HunyuanDiT": ("HunyuanDiT", "hydit.models", "HunYuanDiT", _HYDIT, None),
    "ACE-Step": ("ACEStep", "ace.model", "ACEStepTransformer2DModel", _ACE, None),
    "OmniGen 2": ("Omnigen2", "omnigen.omnigen2", "OmniGen2Transformer2DModel", _OMNIGEN, None),
    "Krea 2": ("Krea2", "krea2.model", "SingleStreamDiT", _KREA, None),
    "Kandinsky 5": ("Kandinsky5", "kandinsky5.model", "Kandinsky5", _KANDINSKY, None),
    "Ernie-Image": ("ErnieImage", "ernie.model", "ErnieImageModel", _ERNIE, None),
    "ACE-Step 1.5": ("ACEStep15", "ace.ace_step15", "AceStepConditionGenerationModel", _ACE15, None),
}  # fmt: skip
KNOWN = [name for name, (base, *_) in MODELS.items() if hasattr(comfy.model_base, base)]


@cache
@torch.no_grad()  # or what is moved to the meta device there would be a result, which cannot be copied
def model(name):
    """The model on the meta device: what of it counts is the names and shapes of its weights."""
    base, module, cls, config, params = MODELS[name]
    module = import_module(f"comfy.ldm.{module}")
    dtype = {"dtype": torch.float32, "device": "cpu", "operations": comfy.ops.disable_weight_init}
    # Older classes lack some of the sizes.
    fields = signature(getattr(module, params or cls)).parameters
    every = any(field.kind is field.VAR_KEYWORD for field in fields.values())
    own = {key: value for key, value in config.items() if every or key in fields}
    dit = getattr(module, cls)(**own, **dtype)
    base = getattr(comfy.model_base, base)
    found = base.__new__(base)
    torch.nn.Module.__init__(found)
    found.diffusion_model = dit.to("meta")
    found.model_config = SimpleNamespace(unet_config=config)
    return found


@cache
def homes(name):
    """ComfyUI's name for a weight -> the weight, or (weight, part of it)."""
    return comfy.lora.model_lora_keys_unet(model(name), {})


@cache
def shapes(name):
    """Weight -> its shape."""
    return {key: tuple(weight.shape) for key, weight in model(name).state_dict().items()}


def target_of(home):
    """(weight, part of it or None)."""
    return (home, None) if isinstance(home, str) else (home[0], home[1])


def shape_at(name, spelled):
    """Shape of what a name stands for; None where this very model has no such weight."""
    weight, part = target_of(homes(name)[spelled])
    shape = shapes(name).get(weight)
    if shape is None or part is None:
        return shape
    if part[1] + part[2] > shape[part[0]]:
        return None  # a slice of Z-Image, which has the key map's names in common with Lumina 2
    shape = list(shape)
    shape[part[0]] = part[2]
    return tuple(shape)
