"""LoRAs with the names and shapes of the three official LCM-LoRAs, built from the UNets' own configurations.

diffusers builds the UNets, without memory for their weights, so names and counts here owe nothing to lora_merge/.
"""

import json
from functools import cache

import torch

# As in the configurations that the base models publish; what is not given is diffusers' default, SD1.5's.
_SDXL = {
    "cross_attention_dim": 2048,
    "attention_head_dim": [5, 10, 20],
    "block_out_channels": [320, 640, 1280],
    "down_block_types": ["DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"],
    "up_block_types": ["CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"],
    "transformer_layers_per_block": [1, 2, 10],
    "use_linear_projection": True,
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 256,
    "projection_class_embeddings_input_dim": 2816,
}
CONFIGS = {
    "SD1.5": {"cross_attention_dim": 768},
    "SDXL": _SDXL,
    "SSD-1B": _SDXL
    | {
        "transformer_layers_per_block": [0, 2, 4],
        "reverse_transformer_layers_per_block": [[4, 4, 10], [2, 1, 1], 1],
        "mid_block_type": "UNetMidBlock2D",
    },
}
# The target modules of the released LCM-LoRA training script.
TARGETS = ("to_q", "to_k", "to_v", "to_out.0", "proj_in", "proj_out", "ff.net.0.proj", "ff.net.2", "conv1", "conv2",
           "conv_shortcut", "downsamplers.0.conv", "upsamplers.0.conv", "time_emb_proj")  # fmt: skip
ATTENTION = ("to_q", "to_k", "to_v", "to_out.0")

MODULES = {"SD1.5": 278, "SSD-1B": 423, "SDXL": 788}
PARAMETERS = {"SD1.5": 67_252_224, "SSD-1B": 104_902_656, "SDXL": 196_751_360}


@cache
def unet_weights(base):
    """Name with dots -> shape of every weight with more than one dimension."""
    from diffusers import UNet2DConditionModel

    with torch.device("meta"):
        unet = UNet2DConditionModel.from_config(CONFIGS[base])
    weights = {name: tensor for name, tensor in unet.state_dict().items() if name.endswith(".weight")}
    return {name.removesuffix(".weight"): tuple(tensor.shape) for name, tensor in weights.items() if tensor.ndim > 1}


def lora(base, *, targets=TARGETS, rank=64, alpha=8.0, dtype=torch.float16, make=None, only=lambda name: True):
    """A state dict in the official files' spelling: kohya's, on diffusers module names.

    make: shape -> tensor of a factor. By default all factors are views of one zero, so that a file of 400 MB takes none.
    """
    make = make or (lambda *shape: torch.zeros((), dtype=dtype).expand(shape))
    tensors = {}
    for module, shape in unet_weights(base).items():
        if module.endswith(targets) and only(module):
            name = "lora_unet_" + module.replace(".", "_")
            tensors[f"{name}.alpha"] = torch.tensor(alpha, dtype=dtype)
            tensors[f"{name}.lora_down.weight"] = make(rank, *shape[1:])
            tensors[f"{name}.lora_up.weight"] = make(shape[0], rank, *(1 for _ in shape[2:]))
    return tensors


def write(path, tensors, metadata=None):
    """A safetensors file with alphas as given and factors all zero, as a sparse file: 400 MB in a few kilobytes.

    Returns its size.
    """
    names = {torch.float16: "F16", torch.bfloat16: "BF16", torch.float32: "F32"}
    alphas = sorted((name for name in tensors if name.endswith(".alpha")), key=str)
    order = alphas + [name for name in tensors if not name.endswith(".alpha")]
    header, end = ({"__metadata__": metadata} if metadata else {}), 0
    for name in order:
        size = tensors[name].numel() * tensors[name].element_size()
        header[name] = {
            "dtype": names[tensors[name].dtype],
            "shape": list(tensors[name].shape),
            "data_offsets": [end, end + size],
        }
        end += size
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with open(path, "wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for name in alphas:
            file.write(tensors[name].reshape(1).view(torch.uint8).numpy().tobytes())
        file.truncate(8 + len(text) + end)
    return path.stat().st_size
