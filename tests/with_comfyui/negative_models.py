"""Tiny transformers of ComfyUI's own classes whose text can be followed by a negative one, and some whose cannot."""

from dataclasses import dataclass, field, replace

import comfy.model_patcher
import comfy.nested_tensor
import comfy.supported_models
import torch
from comfy.clip_vision import Output
from comfy.ldm.anima.model import LLMAdapter
from comfy.ops import disable_weight_init

from lcm_kit.tests.with_comfyui import families, tiny
from lcm_kit.tests.with_comfyui.families import _STREAMS, CPU, WIDTH


def randn(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def image_seen(tokens, width, name="penultimate_hidden_states"):
    """What CLIPVisionEncode gives, as far as a model reads it."""
    found = Output()
    found[name] = randn(1, tokens, width, seed=9)
    return found


@dataclass(frozen=True)
class Model(families.Family):
    """width: of its texts.   also: what else the text is made of, input of the conditioning -> shape, tokens as -1."""

    width: int = WIDTH
    also: dict = field(default_factory=dict)
    masked: bool = False  # the model cannot do without the text's mask
    # What the slow reference of the tests has to know, counted by hand.
    picture: int = 16  # tokens
    joint: bool = True
    refiners: int = 0  # calls of attention among the text alone, the first ones
    before: int = 0  # tokens before the text, on its side
    after: int = 0  # and behind it
    multiple: int = 1  # texts are filled up to
    parts: int = 1  # how often the text stands in the sequence
    picture_first: bool = False

    def text(self, seed, tokens=5, images=1, **options):
        """A CONDITIONING."""
        if self.masked:
            options = {"attention_mask": torch.ones(images, tokens, dtype=torch.long)} | options
        others = {name: self._tokens(shape, seed, tokens, images) for name, shape in self.also.items()}
        return [[randn(images, tokens, self.width, seed=seed), {**self.extra, **others, **options}]]

    def _tokens(self, shape, seed, tokens, images):
        return randn(images, *(tokens if n == -1 else n for n in shape), seed=seed + 100)

    def latent(self, batch=1, seed=3):
        if isinstance(self.shape[0], tuple):  # of picture and sound
            parts = [randn(batch, *shape, seed=seed + i) for i, shape in enumerate(self.shape)]
            return {"samples": comfy.nested_tensor.NestedTensor(parts)}
        return {"samples": randn(batch, *self.shape[1:], seed=seed)}


def _known(name, **counted):
    one = families.FAMILIES[name]
    return Model(one.name, one.config, one.shape, one.extra, **counted)


class AnimaModel(Model):
    """Its text goes through an adapter, which has the sizes of the published one whatever the configuration says."""

    def model(self, seed=0):
        config = comfy.supported_models.Anima(self.config | {"dtype": torch.float32})
        config.set_inference_dtype(torch.float32, None)
        model = config.get_model({}, device=CPU)
        model.diffusion_model.llm_adapter = LLMAdapter(
            self.width, self.width, self.width, 1, 2, dtype=torch.float32, operations=disable_weight_init
        )
        tiny.fill(model.diffusion_model, seed)
        return comfy.model_patcher.ModelPatcher(model, load_device=CPU, offload_device=CPU)

    def text(self, seed, tokens=5, images=1, **options):
        made = super().text(seed, tokens, images, **options)
        ids = torch.randint(0, 1000, (tokens,), generator=torch.Generator().manual_seed(seed))
        made[0][1].update(t5xxl_ids=ids, t5xxl_weights=torch.ones(tokens))
        return made


_WAN = {
    "image_model": "wan2.1", "dim": 48, "ffn_dim": 64, "freq_dim": 16, "text_dim": WIDTH, "num_heads": 2,
    "num_layers": 2,
}  # fmt: skip
_VIDEO = (1, 16, 2, 8, 8)
_ACROSS = {"joint": False, "picture": 32}
_COSMOS = {
    "max_img_h": 240, "max_img_w": 240, "max_frames": 128, "in_channels": 16, "out_channels": 16, "patch_spatial": 2,
    "patch_temporal": 1, "model_channels": 32, "num_blocks": 2, "num_heads": 2, "concat_padding_mask": True,
    "crossattn_emb_channels": WIDTH, "pos_emb_cls": "rope3d", "pos_emb_learnable": False,
    "pos_emb_interpolation": "crop", "min_fps": 1, "max_fps": 30, "use_adaln_lora": True, "adaln_lora_dim": 16,
    "rope_h_extrapolation_ratio": 1.0, "rope_w_extrapolation_ratio": 1.0, "rope_t_extrapolation_ratio": 1.0,
    "extra_per_block_abs_pos_emb": False, "rope_enable_fps_modulation": False,
}  # fmt: skip
_CHROMA = ("hidden_size", "mlp_ratio", "num_heads", "axes_dim", "qkv_bias", "vec_in_dim", "context_in_dim")
_LUMINA = families.FAMILIES["Z-Image"].config
_HUNYUAN = families.FAMILIES["HunyuanVideo"]
_FLUX_1, _QWEN = _known("Flux"), _known("Qwen-Image")

MODELS = {
    "Wan T2V": Model("WAN21_T2V", _WAN | {"model_type": "t2v", "in_dim": 16}, _VIDEO, **_ACROSS),
    "Wan I2V": Model(
        "WAN21_I2V", _WAN | {"model_type": "i2v", "in_dim": 36}, _VIDEO, {"clip_vision_output": image_seen(7, 1280)},
        **_ACROSS,
    ),
    "Wan 2.2": Model("WAN22_T2V", _WAN | {"model_type": "t2v", "in_dim": 48, "out_dim": 48}, (1, 48, 2, 8, 8), **_ACROSS),
    "Wan VACE": Model(
        "WAN21_Vace", _WAN | {"model_type": "vace", "vace_layers": 1, "vace_in_dim": 96}, _VIDEO, **_ACROSS
    ),
    "Wan Camera": Model(
        "WAN21_Camera", _WAN | {"model_type": "camera", "in_dim": 32}, _VIDEO,
        {"camera_conditions": randn(1, 24, 2, 64, 64)}, **_ACROSS,
    ),
    "Wan Animate": Model(
        "WAN22_Animate", _WAN | {"model_type": "animate", "in_dim": 36}, _VIDEO,
        {"clip_vision_output": image_seen(7, 1280), "pose_video_latent": randn(1, 16, 1, 8, 8)}, **_ACROSS,
    ),
    "Wan SCAIL": Model("WAN21_SCAIL", _WAN | {"model_type": "scail", "in_dim": 20}, _VIDEO, **_ACROSS),
    "LTXV": _known("LTXV", masked=True, **_ACROSS),
    "LTX-2": Model("LTXAV", {
        "image_model": "ltxav", "in_channels": 128, "audio_in_channels": 128, "cross_attention_dim": 32,
        "audio_cross_attention_dim": 16, "attention_head_dim": 16, "audio_attention_head_dim": 8,
        "num_attention_heads": 2, "audio_num_attention_heads": 2, "caption_channels": 8, "num_layers": 2,
        "connector_attention_head_dim": 4, "connector_num_attention_heads": 2, "connector_num_layers": 1,
    }, ((128, 2, 4, 4), (8, 6, 16)), masked=True, **_ACROSS),
    "Cosmos Predict 2": Model(
        "CosmosT2IPredict2", _COSMOS | {"image_model": "cosmos_predict2"}, (1, 16, 1, 8, 8), joint=False
    ),
    "Anima": AnimaModel("Anima", _COSMOS | {"image_model": "anima"}, (1, 16, 1, 8, 8), joint=False),
    "Flux": _FLUX_1,
    "Flux Kontext": replace(_FLUX_1, extra=_FLUX_1.extra | {"reference_latents": [randn(1, 16, 6, 8)]}, picture=28),
    "Flux.2": Model("Flux2", _STREAMS | {
        "image_model": "flux2", "patch_size": 1, "theta": 2000, "axes_dim": [4, 4, 4, 4], "txt_ids_dims": [3],
        "global_modulation": True, "mlp_silu_act": True, "qkv_bias": False, "ops_bias": False, "vec_in_dim": None,
        "default_ref_method": "index", "ref_index_scale": 10.0, "in_channels": 128, "out_channels": 128,
    }, (1, 128, 4, 4), {"guidance": 3.5, "pooled_output": None}),
    "Chroma": Model("Chroma", {
        "image_model": "chroma", "patch_size": 2, "theta": 10000, "out_dim": 32, "hidden_dim": 32, "n_layers": 2,
        "in_dim": 64, "in_channels": 64, "out_channels": 64, "depth": 1, "depth_single_blocks": 1, "txt_ids_dims": [],
    } | {name: _STREAMS[name] for name in _CHROMA}, (1, 16, 8, 8), {"pooled_output": None}),
    "Qwen-Image": _QWEN,
    "Qwen-Image-Edit": replace(_QWEN, extra={"reference_latents": [randn(1, 16, 1, 6, 8)]}, picture=28),
    "SD3.5 medium": _known("SD3"),
    "HiDream": Model("HiDream", {
        "image_model": "hidream", "patch_size": 2, "in_channels": 16, "out_channels": 16, "num_layers": 1,
        "num_single_layers": 1, "attention_head_dim": 16, "num_attention_heads": 2, "caption_channels": [WIDTH, WIDTH],
        "text_emb_dim": 8, "num_routed_experts": 2, "num_activated_experts": 1, "axes_dims_rope": (4, 6, 6),
        "max_resolution": (8, 8), "llama_layers": [0, 1],
    }, (1, 16, 8, 8), {"pooled_output": torch.zeros(1, 8)}, also={"conditioning_llama3": (2, -1, WIDTH)}, parts=3,
        picture_first=True),
    "Z-Image": _known("Z-Image", refiners=2, multiple=32, picture=32),
    "Lumina 2": Model("Lumina2", {
        name: value for name, value in _LUMINA.items()
        if name not in ("z_image_modulation", "time_scale", "pad_tokens_multiple")
    }, (1, 16, 8, 8), refiners=2),
    "HunyuanVideo": _known("HunyuanVideo", refiners=2),
    "HunyuanVideo 1.5": Model("HunyuanVideo15", _HUNYUAN.config | {
        "vision_in_dim": 8, "use_cond_type_embedding": True, "byt5": True, "vec_in_dim": None, "guidance_embed": False,
        "in_channels": 65, "out_channels": 32,
    }, (1, 32, 1, 8, 8), {
        "conditioning_byt5small": randn(1, 3, 1472), "pooled_output": None,
        "clip_vision_output": image_seen(4, 8, "last_hidden_state"),
    }, refiners=2, before=7),
    "HunyuanImage 2.1": Model("HunyuanImage21", _HUNYUAN.config | {
        "patch_size": [1, 1], "axes_dim": [8, 8], "byt5": True, "vec_in_dim": None, "guidance_embed": False,
        "in_channels": 64, "out_channels": 64,
    }, (1, 64, 4, 4), {"conditioning_byt5small": randn(1, 3, 1472), "pooled_output": None}, refiners=2, after=3),
}  # fmt: skip
MODELS = {name: model for name, model in MODELS.items() if hasattr(comfy.supported_models, model.name)}
