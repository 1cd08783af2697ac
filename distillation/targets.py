"""Which layers of a network get a LoRA branch: the 14 module types of the published LCM-LoRAs."""

import re

from torch import nn

# The types in the words of the authors' training script (luosiallen/latent-consistency-model,
# train_lcm_distill_lora_sd_wds.py), which are diffusers' names ...
DIFFUSERS_TYPES = (
    "to_q", "to_k", "to_v", "to_out.0", "proj_in", "proj_out", "ff.net.0.proj", "ff.net.2",
    "conv1", "conv2", "conv_shortcut", "downsamplers.0.conv", "upsamplers.0.conv", "time_emb_proj",
)  # fmt: skip
# ... and what the last six are called in checkpoints and in ComfyUI (ldm's names); the first eight are the same.
LDM_TYPES = (
    r"in_layers\.2", r"out_layers\.3", r"skip_connection",
    r"input_blocks\.\d+\.0\.op", r"output_blocks\.\d+\.\d+\.conv", r"emb_layers\.1",
)  # fmt: skip
_NAMED = re.compile(r"(?:.*\.)?(?:" + "|".join([*map(re.escape, DIFFUSERS_TYPES), *LDM_TYPES]) + ")")


def adaptable(module: nn.Module) -> bool:
    """Whether a LoRA branch can stand beside the layer: linear, or a plain 2-D convolution."""
    if isinstance(module, nn.Conv2d):
        return module.groups == 1 and module.padding_mode == "zeros"
    return isinstance(module, nn.Linear)


def adapted(name: str, module: nn.Module) -> bool:
    """Whether the LCM-LoRA of the paper has this layer of a Stable Diffusion UNet, in ComfyUI's or diffusers' names.

    278, 423 and 788 modules in SD1.5, SSD-1B and SDXL. Time embedding, label embedding, first and last convolution
    are not among them.
    """
    return adaptable(module) and _NAMED.fullmatch(name) is not None


def repeated(network: nn.Module) -> list[str]:
    """Names of the layers that stand in a list of like blocks (nn.ModuleList), where a transformer has its width."""
    lists = tuple(
        f"{name}." if name else "" for name, part in network.named_modules() if isinstance(part, nn.ModuleList)
    )
    return [name for name, module in network.named_modules() if adaptable(module) and name.startswith(lists)]


def targets(network: nn.Module) -> list[str]:
    """Names of the layers to adapt: the paper's where the network is such a UNet, else every layer of its blocks.

    Raises ValueError if there is none.
    """
    names = [name for name, module in network.named_modules() if adapted(name, module)] or repeated(network)
    if not names:
        raise ValueError(
            "the network has no layer to adapt. LCM-LoRA adapts the linear and convolution layers in a UNet's blocks; "
            "name the layers yourself for another kind of network."
        )
    return names
