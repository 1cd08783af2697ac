"""MODELs of ComfyUI's own transformer classes at full size, without memory for their weights."""

import inspect
from functools import cache

import comfy.model_patcher
import comfy.supported_models
import torch
from comfy.ldm.chroma.model import ChromaParams
from comfy.ldm.flux.model import FluxParams
from comfy.ldm.hunyuan_video.model import HunyuanVideoParams
from comfy.ldm.lightricks.av_model import LTXAVModel

CPU = torch.device("cpu")


def _known(config, params):
    """Older classes lack some of the sizes."""
    fields = inspect.signature(params).parameters
    return {name: value for name, value in config.items() if name in fields or name == "image_model"}


def _streams(hidden, double, single, **others):
    return {"hidden_size": hidden, "depth": double, "depth_single_blocks": single, "axes_dim": [16, 56, 56],
            "num_heads": hidden // 128, "mlp_ratio": 4.0, "qkv_bias": True} | others  # fmt: skip


def _flux1(**others):
    sizes = _streams(3072, 19, 38, image_model="flux", patch_size=2, in_channels=16, out_channels=16, vec_in_dim=768,
                     context_in_dim=4096, theta=10000, guidance_embed=True, txt_ids_dims=[])  # fmt: skip
    return _known(sizes | others, FluxParams)


def _flux2(hidden, double, single, context, guidance=False):
    return _known(
        _streams(hidden, double, single, image_model="flux2", patch_size=1, in_channels=128, out_channels=128,
                 vec_in_dim=None, context_in_dim=context, mlp_ratio=3.0, axes_dim=[32] * 4, theta=2000, qkv_bias=False,
                 ops_bias=False, global_modulation=True, mlp_silu_act=True, guidance_embed=guidance, txt_ids_dims=[3]),
        FluxParams,
    )  # fmt: skip


def _chroma():
    own = {"in_channels": 64, "out_channels": 64, "in_dim": 64, "out_dim": 3072, "hidden_dim": 5120, "n_layers": 5}
    return _known(_flux1() | own | {"image_model": "chroma", "vec_in_dim": None}, ChromaParams)


def _hunyuan(hidden, double, single, **others):
    sizes = _streams(hidden, double, single, image_model="hunyuan_video", in_channels=16, out_channels=16,
                     patch_size=[1, 2, 2], vec_in_dim=768, context_in_dim=4096, theta=256, guidance_embed=True,
                     meanflow=False, byt5=False, use_cond_type_embedding=False, vision_in_dim=None,
                     meanflow_sum=False)  # fmt: skip
    return _known(sizes | others, HunyuanVideoParams)


def _wan(dim, ffn, layers, kind="t2v", in_dim=16, out_dim=16, **others):
    return {"image_model": "wan2.1", "model_type": kind, "dim": dim, "ffn_dim": ffn, "num_layers": layers,
            "num_heads": dim // 128, "in_dim": in_dim, "out_dim": out_dim, "patch_size": (1, 2, 2), "freq_dim": 256,
            "window_size": (-1, -1), "qk_norm": True, "cross_attn_norm": True, "eps": 1e-6} | others  # fmt: skip


def _lumina(dim, layers, heads, kv, caption, ratio, **others):
    return {"image_model": "lumina2", "patch_size": 2, "in_channels": 16, "dim": dim, "cap_feat_dim": caption,
            "n_layers": layers, "qk_norm": True, "n_heads": heads, "n_kv_heads": kv, "axes_lens": [1536, 512, 512],
            "rope_theta": 256.0, "ffn_dim_multiplier": ratio} | others  # fmt: skip


def _sd3(depth, attn2=0):
    reads = {"target": "torch.nn.Linear", "params": {"in_features": 4096, "out_features": 64 * depth}}
    return {"in_channels": 16, "out_channels": 16, "patch_size": 2, "depth": depth, "input_size": None,
            "adm_in_channels": 2048, "context_embedder_config": reads, "num_patches": 36864, "pos_embed_max_size": 192,
            "pos_embed_scaling_factor": None, "x_block_self_attn_layers": list(range(attn2)), "qk_norm": "rms"}  # fmt: skip


def _ltx(name, heads_of, layers):
    return {"image_model": name, "num_layers": layers, "attention_head_dim": heads_of,
            "cross_attention_dim": 32 * heads_of}  # fmt: skip


def _cosmos(name, channels, blocks):
    ratios = {f"rope_{side}_extrapolation_ratio": 1.0 for side in "hwt"}
    ratios |= {f"extra_{side}_extrapolation_ratio": 1.0 for side in "hwt"}
    return {"image_model": name, "max_img_h": 240, "max_img_w": 240, "max_frames": 128, "in_channels": 16,
            "out_channels": 16, "patch_spatial": 2, "patch_temporal": 1, "model_channels": channels,
            "concat_padding_mask": True, "crossattn_emb_channels": 1024, "pos_emb_cls": "rope3d",
            "pos_emb_learnable": True, "pos_emb_interpolation": "crop", "min_fps": 1, "max_fps": 30,
            "use_adaln_lora": True, "adaln_lora_dim": 256, "num_blocks": blocks, "num_heads": channels // 128,
            "extra_per_block_abs_pos_emb": False, "rope_enable_fps_modulation": False} | ratios  # fmt: skip


_HIDREAM = {"image_model": "hidream", "attention_head_dim": 128, "axes_dims_rope": [64, 32, 32],
            "caption_channels": [4096, 4096], "max_resolution": [128, 128], "in_channels": 16, "out_channels": 16,
            "llama_layers": [*range(32), *[31] * 16], "num_attention_heads": 20, "num_routed_experts": 4,
            "num_activated_experts": 2, "num_layers": 16, "num_single_layers": 32, "patch_size": 2,
            "text_emb_dim": 2048}  # fmt: skip
_HV15 = {"vec_in_dim": None, "context_in_dim": 3584, "byt5": True, "guidance_embed": False, "in_channels": 65,
         "out_channels": 32, "patch_size": [1, 1, 1], "use_cond_type_embedding": True, "vision_in_dim": 1152,
         "meanflow_sum": True}  # fmt: skip
_HI21 = {"vec_in_dim": None, "context_in_dim": 3584, "byt5": True, "guidance_embed": False, "in_channels": 64,
         "out_channels": 64, "patch_size": [1, 1], "axes_dim": [64, 64]}  # fmt: skip
_14B = (5120, 13824, 40)
WAN = "Wan 2.1/2.2 14B"

# What it is -> (base in lora_merge/recognise/transformers.py, ComfyUI's class, what it detects, branches of that base).
MODELS = {
    "Flux.1 dev": ("Flux.1", "Flux", _flux1(), ["guidance input"]),
    "Flux.1 schnell": ("Flux.1", "FluxSchnell", _flux1(guidance_embed=False), []),
    "Chroma": ("Chroma", "Chroma", _chroma(), []),
    "Flux.2 dev": ("Flux.2 dev", "Flux2", _flux2(6144, 8, 48, 15360, True), ["guidance input"]),
    "Flux.2 Klein 9B": ("Flux.2 Klein 9B", "Flux2", _flux2(4096, 8, 24, 12288), []),
    "Flux.2 Klein 4B": ("Flux.2 Klein 4B", "Flux2", _flux2(3072, 5, 20, 7680), []),
    "HunyuanVideo": ("HunyuanVideo", "HunyuanVideo", _hunyuan(3072, 20, 40), ["guidance input", "pooled text input"]),
    "HunyuanVideo 1.5": ("HunyuanVideo 1.5", "HunyuanVideo15", _hunyuan(2048, 54, 0, **_HV15),
                         ["glyph input", "vision input"]),
    "HunyuanImage 2.1": ("HunyuanImage 2.1", "HunyuanImage21", _hunyuan(3584, 20, 40, **_HI21), ["glyph input"]),
    "Qwen-Image": ("Qwen-Image", "QwenImage", {"image_model": "qwen_image", "in_channels": 64, "num_layers": 60}, []),
    "Wan 2.1 T2V 1.3B": ("Wan 2.1 1.3B", "WAN21_T2V", _wan(1536, 8960, 30), []),
    "Wan 2.2 TI2V 5B": ("Wan 2.2 5B", "WAN22_T2V", _wan(3072, 14336, 30, in_dim=48, out_dim=48), []),
    "Wan 2.1 and 2.2 T2V 14B": (WAN, "WAN21_T2V", _wan(*_14B), []),
    "Wan 2.1 I2V 14B": (WAN, "WAN21_I2V", _wan(*_14B, "i2v", 36), ["image branch"]),
    "Wan 2.2 I2V 14B": (WAN, "WAN21_T2V", _wan(*_14B, in_dim=36), []),
    "Wan 2.1 VACE 14B": (WAN, "WAN21_Vace", _wan(*_14B, "vace", vace_layers=8, vace_in_dim=96), ["VACE blocks"]),
    "Wan 2.1 VACE 1.3B": ("Wan 2.1 1.3B", "WAN21_Vace",
                          _wan(1536, 8960, 30, "vace", vace_layers=15, vace_in_dim=96), ["VACE blocks"]),
    "Wan 2.2 Animate 14B": (WAN, "WAN22_Animate", _wan(*_14B, "animate", 36), ["image branch", "pose and face branch"]),
    "Wan 2.2 S2V 14B": (WAN, "WAN22_S2V", _wan(*_14B, "s2v"), ["audio branch"]),
    "Wan 2.1 camera 14B": (WAN, "WAN21_Camera", _wan(*_14B, "camera", 32), ["camera adapter", "image branch"]),
    "HuMo 14B": (WAN, "WAN21_HuMo", _wan(*_14B, "humo", 36), ["audio branch"]),
    "Wan 2.1 Fun 14B": (WAN, "WAN21_FunControl2V", _wan(*_14B, "i2v", 48, in_dim_ref_conv=16),
                        ["image branch", "reference input"]),
    "Z-Image": ("Z-Image", "ZImage", _lumina(3840, 30, 30, 30, 2560, 8 / 3, axes_dims=[32, 48, 48], time_scale=1000.0,
                z_image_modulation=True, pad_tokens_multiple=32), []),
    "Lumina 2": ("Lumina 2", "Lumina2", _lumina(2304, 26, 24, 8, 2304, 4.0, axes_dims=[32, 32, 32]), []),
    "SD3 medium": ("SD3 medium", "SD3", _sd3(24), []),
    "SD3.5 medium": ("SD3.5 medium", "SD3", _sd3(24, 13), []),
    "SD3.5 large": ("SD3.5 large", "SD3", _sd3(38), []),
    "LTX-Video 2B": ("LTX-Video 2B", "LTXV", _ltx("ltxv", 64, 28), []),
    "LTX-Video 13B": ("LTX-Video 13B", "LTXV", _ltx("ltxv", 128, 48), []),
    "LTX-2": ("LTX-2", "LTXAV", _ltx("ltxav", 128, 48), []),
    "HiDream-I1": ("HiDream-I1", "HiDream", _HIDREAM, []),
    "Cosmos-Predict2 2B": ("Cosmos-Predict2 2B", "CosmosT2IPredict2", _cosmos("cosmos_predict2", 2048, 28), []),
    "Cosmos-Predict2 14B": ("Cosmos-Predict2 14B", "CosmosT2IPredict2", _cosmos("cosmos_predict2", 5120, 36), []),
    "Anima": ("Anima", "Anima", _cosmos("anima", 2048, 28), []),
}  # fmt: skip
if "apply_gated_attention" in inspect.signature(LTXAVModel).parameters:
    gated = _ltx("ltxav", 128, 48) | {"apply_gated_attention": True, "cross_attention_adaln": True}
    MODELS["LTX-2.3"] = ("LTX-2", "LTXAV", gated, ["attention gates"])
KNOWN = [name for name, (_, config, *_) in MODELS.items() if hasattr(comfy.supported_models, config)]


@cache
def model(name, layers=None):
    """A MODEL on the meta device; its weights have shapes only. layers: of a Wan model, fewer than it has."""
    _, cls, detected, _ = MODELS[name]
    detected = dict(detected)
    if layers:
        detected |= {"num_layers": layers, **({"vace_layers": 1} if "vace_layers" in detected else {})}
    config = getattr(comfy.supported_models, cls)(detected)
    for key, value in (getattr(config, "unet_extra_config", None) or {}).items():
        config.unet_config.setdefault(key, value)
    config.set_inference_dtype(torch.float16, None)
    dit = config.get_model({}, device=torch.device("meta"))
    return comfy.model_patcher.ModelPatcher(dit, load_device=CPU, offload_device=CPU)


def linears(patcher, only=lambda name: True):
    """ComfyUI's name of every linear layer of the diffusion model, with dots -> shape of its weight."""
    found = {}
    for key, weight in patcher.model.state_dict().items():
        name = key.removeprefix("diffusion_model.").removesuffix(".weight")
        if key.startswith("diffusion_model.") and key.endswith(".weight") and weight.ndim == 2 and only(name):
            found[name] = tuple(weight.shape)
    return found


def lora(shapes, rank=2, prefix="diffusion_model."):
    """A LoRA file's tensors for these layers, all views of one zero."""
    zero = torch.zeros((), dtype=torch.float16)
    tensors = {}
    for name, (out, into) in shapes.items():
        tensors[f"{prefix}{name}.lora_down.weight"] = zero.expand(rank, into)
        tensors[f"{prefix}{name}.lora_up.weight"] = zero.expand(out, rank)
    return tensors
