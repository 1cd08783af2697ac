"""MODELs of ComfyUI's own classes for the published bases, at full size and without memory for their weights."""

from functools import cache

import comfy.model_patcher
import comfy.supported_models
import torch

_COMMON = {
    "image_size": 32,
    "in_channels": 4,
    "out_channels": 4,
    "model_channels": 320,
    "num_head_channels": 64,
    "use_linear_in_transformer": True,
    "use_spatial_transformer": True,
    "use_temporal_attention": False,
    "use_temporal_resblock": False,
    "adm_in_channels": None,
    "legacy": False,
    "dtype": torch.float16,
}
_FOUR = {
    "num_res_blocks": [2, 2, 2, 2],
    "channel_mult": [1, 2, 4, 4],
    "transformer_depth": [1, 1, 1, 1, 1, 1, 0, 0],
    "transformer_depth_output": [1, 1, 1, 1, 1, 1, 1, 1, 1, 0, 0, 0],
    "transformer_depth_middle": 1,
}


def _wide(blocks, down, up, middle):
    return {
        "num_res_blocks": [blocks] * 3,
        "channel_mult": [1, 2, 4],
        "context_dim": 2048,
        "adm_in_channels": 2816,
        "num_classes": "sequential",
        "transformer_depth": down,
        "transformer_depth_output": up,
        "transformer_depth_middle": middle,
    }


# Name in lora_merge/recognise/base_models.py -> ComfyUI's class and what it detects in a checkpoint of that base.
CONFIGS = {
    "SD1.5": ("SD15", _FOUR | {"context_dim": 768, "use_linear_in_transformer": False}),
    "SD2": ("SD20", _FOUR | {"context_dim": 1024}),
    "SDXL": ("SDXL", _wide(2, [0, 0, 2, 2, 10, 10], [0, 0, 0, 2, 2, 2, 10, 10, 10], 10)),
    "SSD-1B": ("SSD1B", _wide(2, [0, 0, 2, 2, 4, 4], [0, 0, 0, 1, 1, 2, 10, 4, 4], -1)),
    "Segmind-Vega": ("Segmind_Vega", _wide(2, [0, 0, 1, 1, 2, 2], [0, 0, 0, 1, 1, 1, 2, 2, 2], -1)),
    "KOALA-1B": ("KOALA_1B", _wide(1, [0, 2, 6], [0, 0, 2, 2, 6, 6], 6)),
    "KOALA-700M": ("KOALA_700M", _wide(1, [0, 2, 5], [0, 0, 2, 2, 5, 5], -2)),
}
# One that lora_merge/recognise/base_models.py does not know.
REFINER = _FOUR | {
    "model_channels": 384,
    "context_dim": 1280,
    "adm_in_channels": 2560,
    "num_classes": "sequential",
    "transformer_depth": [0, 0, 4, 4, 4, 4, 0, 0],
    "transformer_depth_output": [0, 0, 0, 4, 4, 4, 4, 4, 4, 0, 0, 0],
    "transformer_depth_middle": 4,
}
OTHERS = {"SDXL Refiner": ("SDXLRefiner", REFINER)}


@cache
def model(base, **changes):
    """A MODEL on the meta device. It can be patched; its weights have shapes only."""
    name, detected = (CONFIGS | OTHERS)[base]
    config = getattr(comfy.supported_models, name)(_COMMON | detected | changes)
    assert config.matches(config.unet_config), "ComfyUI would choose another class"
    config.set_inference_dtype(torch.float16, None)
    unet = config.get_model({}, device=torch.device("meta"))
    cpu = torch.device("cpu")
    return comfy.model_patcher.ModelPatcher(unet, load_device=cpu, offload_device=cpu)
