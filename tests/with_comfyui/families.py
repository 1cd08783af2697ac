"""Tiny models of ComfyUI's own transformer classes, with seeded random weights."""

import inspect
from dataclasses import dataclass, field

import comfy.model_patcher
import comfy.supported_models
import torch
from comfy.ldm.flux.model import FluxParams

from lcm_kit.tests.with_comfyui import tiny

WIDTH = 16
CPU = torch.device("cpu")
_FLUX = {"txt_ids_dims": []} if "txt_ids_dims" in inspect.signature(FluxParams).parameters else {}
_STREAMS = {"hidden_size": 32, "mlp_ratio": 2.0, "num_heads": 2, "depth": 1, "depth_single_blocks": 1, "axes_dim": [4, 6, 6],
            "qkv_bias": True, "guidance_embed": True, "in_channels": 16, "out_channels": 16, "vec_in_dim": 8,
            "context_in_dim": WIDTH}  # fmt: skip


@dataclass(frozen=True)
class Family:
    """config: of the class `name` in ComfyUI's supported models.   shape: of a latent.   extra: beside the text."""

    name: str
    config: dict
    shape: tuple[int, ...]
    extra: dict = field(default_factory=dict)

    def model(self, seed=0):
        config = getattr(comfy.supported_models, self.name)(self.config | {"dtype": torch.float32})
        config.set_inference_dtype(torch.float32, None)
        model = config.get_model({}, device=CPU)
        tiny.fill(model.diffusion_model, seed)
        return comfy.model_patcher.ModelPatcher(model, load_device=CPU, offload_device=CPU)

    def cond(self, seed):
        """A CONDITIONING."""
        text = torch.randn(1, 5, WIDTH, generator=torch.Generator().manual_seed(seed))
        return [[4 * text if seed == 1 else text, dict(self.extra)]]

    def latent(self, batch=2, seed=3):
        shape = (batch, *self.shape[1:])
        return {"samples": torch.randn(shape, generator=torch.Generator().manual_seed(seed))}

    def empty(self):
        """An empty LATENT of that size."""
        return {"samples": torch.zeros(self.shape)}


FAMILIES = {
    "Wan": Family("WAN21_T2V", {
        "image_model": "wan2.1", "model_type": "t2v", "dim": 48, "ffn_dim": 64, "freq_dim": 16, "text_dim": WIDTH,
        "num_heads": 2, "num_layers": 1,
    }, (1, 16, 1, 8, 8)),
    "Flux": Family("Flux", {"image_model": "flux", "patch_size": 2, "theta": 10000} | _STREAMS | _FLUX, (1, 16, 8, 8),
                   {"pooled_output": torch.zeros(1, 8), "guidance": 3.5}),
    "Qwen-Image": Family("QwenImage", {
        "image_model": "qwen_image", "in_channels": 64, "num_layers": 1, "num_attention_heads": 2,
        "attention_head_dim": 16, "joint_attention_dim": WIDTH, "axes_dims_rope": (4, 6, 6),
    }, (1, 16, 1, 8, 8)),
    "Z-Image": Family("ZImage", {
        "image_model": "lumina2", "patch_size": 2, "in_channels": 16, "dim": 256, "cap_feat_dim": WIDTH, "n_layers": 1,
        "qk_norm": True, "n_heads": 2, "n_kv_heads": 2, "axes_dims": [32, 48, 48], "axes_lens": [64, 64, 64],
        "rope_theta": 256.0, "ffn_dim_multiplier": 2.0, "z_image_modulation": True, "time_scale": 1000.0,
        "pad_tokens_multiple": 32,
    }, (1, 16, 8, 8)),
    "LTXV": Family("LTXV", {
        "image_model": "ltxv", "in_channels": 128, "out_channels": 128, "num_layers": 1, "num_attention_heads": 2,
        "attention_head_dim": 32, "cross_attention_dim": 64, "caption_channels": WIDTH,
    }, (1, 128, 2, 4, 4), {"attention_mask": torch.ones(1, 5, dtype=torch.long)}),
    "HunyuanVideo": Family("HunyuanVideo", {
        "image_model": "hunyuan_video", "patch_size": [1, 2, 2], "theta": 256, "byt5": False, "meanflow": False,
        "meanflow_sum": False, "use_cond_type_embedding": False, "vision_in_dim": None,
    } | _STREAMS, (1, 16, 1, 8, 8), {"pooled_output": torch.zeros(1, 8), "guidance": 6.0}),
    "SD3": Family("SD3", {
        "in_channels": 16, "patch_size": 2, "depth": 1, "input_size": None, "adm_in_channels": 8, "qk_norm": "rms",
        "context_embedder_config": {"target": "torch.nn.Linear", "params": {"in_features": WIDTH, "out_features": 64}},
        "pos_embed_max_size": 16, "pos_embed_scaling_factor": None, "x_block_self_attn_layers": [0],
    }, (1, 16, 8, 8), {"pooled_output": torch.zeros(1, 8)}),
}  # fmt: skip
