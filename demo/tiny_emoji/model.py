"""The tiny model as ComfyUI sees it: which UNet, which latent, which text encoder."""

import json
from pathlib import Path

import comfy.latent_formats
import comfy.model_base
import comfy.sd1_clip
import comfy.supported_models_base
import torch

from .text import CONTEXT_DIM, MAX_WORDS, TextTransformer, WordTokenizer

# What UNetModel needs to be built from nothing; from a file ComfyUI finds all of it by itself.
UNET = {
    "use_checkpoint": False,
    "image_size": 32,
    "use_spatial_transformer": True,
    "legacy": False,
    "adm_in_channels": None,
    "in_channels": 12,
    "out_channels": 12,
    "model_channels": 64,
    "num_res_blocks": [2, 2],
    "transformer_depth": [1, 1, 1, 1],
    "transformer_depth_output": [1, 1, 1, 1, 1, 1],
    "channel_mult": [1, 2],
    "transformer_depth_middle": 1,
    "use_linear_in_transformer": True,
    "context_dim": CONTEXT_DIM,
    "use_temporal_attention": False,
}


class TinyLatent(comfy.latent_formats.LatentFormat):
    """Twelve channels of about unit variance. The preview factors are a least-squares fit made at training time."""

    latent_channels = UNET["in_channels"]

    def __init__(self):
        fit = json.loads((Path(__file__).parent / "latent_preview.json").read_text())
        self.latent_rgb_factors = fit["factors"]
        self.latent_rgb_factors_bias = fit["bias"]


class Tokenizer(comfy.sd1_clip.SDTokenizer):
    def __init__(self, embedding_directory=None, tokenizer_data=None):
        super().__init__(
            tokenizer_path="",
            max_length=MAX_WORDS,
            embedding_directory=embedding_directory,
            embedding_size=CONTEXT_DIM,
            embedding_key="clip_tiny",
            tokenizer_class=WordTokenizer,
            tokenizer_data=tokenizer_data or {},
        )


class TinyTokenizer(comfy.sd1_clip.SD1Tokenizer):
    def __init__(self, embedding_directory=None, tokenizer_data=None):
        super().__init__(embedding_directory, tokenizer_data or {}, clip_name="tiny", tokenizer=Tokenizer)


class TextModel(comfy.sd1_clip.SDClipModel):
    def __init__(self, device="cpu", dtype=None, model_options=None):
        super().__init__(
            device=device,
            max_length=MAX_WORDS,
            textmodel_json_config={},
            dtype=dtype,
            model_class=TextTransformer,
            special_tokens=WordTokenizer.SPECIAL,
            return_projected_pooled=False,
            model_options=model_options or {},
        )


class TinyClip(comfy.sd1_clip.SD1ClipModel):
    def __init__(self, device="cpu", dtype=None, model_options=None):
        super().__init__(device, dtype, model_options or {}, clip_name="tiny", clip_model=TextModel)


class TinyEmoji(comfy.supported_models_base.BASE):
    """v-prediction UNet of 64 and 128 channels on 8 x 8 x 12 latents, text by cross-attention."""

    unet_config = {key: UNET[key] for key in ("model_channels", "context_dim", "use_linear_in_transformer")}
    unet_extra_config = {"num_heads": -1, "num_head_channels": 32}
    latent_format = TinyLatent
    supported_inference_dtypes = [torch.float32]  # 27 MB; nothing is gained by fewer bits

    def inpaint_model(self):
        return False  # ComfyUI's default takes every model of more than four channels for one

    def model_type(self, state_dict, prefix=""):
        return comfy.model_base.ModelType.V_PREDICTION

    def clip_target(self, state_dict=None):
        return comfy.supported_models_base.ClipTarget(TinyTokenizer, TinyClip)
