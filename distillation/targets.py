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

# Transformers call their attention layers by the same names, and more of their blocks is to be changed than these. Some have
# a conv1 and a conv2 as well, in what reads a camera's path or a pose; none has a UNet's way of telling a block the timestep.
_OF_A_RESBLOCK = re.compile(r"(?:.*\.)?(?:in_layers\.2|out_layers\.3|time_emb_proj)")
# Of the layers that an LCM-LoRA changes, the share that may be of a kind no branch fits beside: a mixture of experts has
# a gate in each block. Above it the LoRA would be one by name only.
FEW = 0.1


def adaptable(module: nn.Module) -> bool:
    """Whether a LoRA branch can stand beside the layer: linear, or a plain 2-D convolution.

    Linear is whatever says how wide it is on both sides and holds a matrix: packed and quantised layers of hosts are no
    nn.Linear, and their weight is not stored in the shape it acts in.
    """
    if isinstance(module, nn.Conv2d):
        return module.groups == 1 and module.padding_mode == "zeros"
    if isinstance(module, nn.Linear):
        return True
    wide = all(isinstance(getattr(module, name, None), int) for name in ("in_features", "out_features"))
    return wide and len(getattr(getattr(module, "weight", None), "shape", ())) == 2


def holds_matrix(module: nn.Module) -> bool:
    """Whether the layer has a weight of two dimensions or more, so that it could be changed in low rank."""
    if isinstance(module, nn.Embedding):
        return False
    return adaptable(module) or len(getattr(getattr(module, "weight", None), "shape", ())) > 1


def adapted(name: str, module: nn.Module) -> bool:
    """Whether the LCM-LoRA of the paper has this layer of a Stable Diffusion UNet, in ComfyUI's or diffusers' names.

    278, 423 and 788 modules in SD1.5, SSD-1B and SDXL. Time embedding, label embedding, first and last convolution
    are not among them.
    """
    return adaptable(module) and _NAMED.fullmatch(name) is not None


def repeated(network: nn.Module) -> list[str]:
    """Names of the layers that stand in a list of like blocks (nn.ModuleList), where a transformer has its width."""
    return [name for name, module in _in_lists(network) if adaptable(module)]


def _in_lists(network: nn.Module) -> list[tuple[str, nn.Module]]:
    lists = tuple(
        f"{name}." if name else "" for name, part in network.named_modules() if isinstance(part, nn.ModuleList)
    )
    return [(name, module) for name, module in network.named_modules() if name.startswith(lists)]


def targets(network: nn.Module) -> list[str]:
    """Names of the layers to adapt: the paper's where the network is such a UNet, else every layer of its blocks.

    Raises ValueError if there is none, or if more than a few have to be left out.
    """
    every = list(network.named_modules())
    is_unet = any(_OF_A_RESBLOCK.fullmatch(name) for name, _ in every)
    places = [(name, module) for name, module in every if _NAMED.fullmatch(name)] if is_unet else _in_lists(network)
    wanted = [(name, module) for name, module in places if holds_matrix(module)]
    names = [name for name, module in wanted if adaptable(module)]
    if len(wanted) - len(names) > FEW * len(wanted):
        others = [(name, type(module).__name__) for name, module in wanted if not adaptable(module)]
        kinds = ", ".join(sorted({kind for _, kind in others}))
        raise ValueError(
            f"{len(others)} of the {len(wanted)} layers that an LCM-LoRA changes are of a kind that cannot be trained "
            f"({kinds}; the first: {others[0][0]}), so the LoRA would lack them. Load the model unquantised, and without "
            "nodes that exchange its layers."
        )
    if not names:
        raise ValueError(
            "the network has no layer to adapt: LCM-LoRA adapts the linear and convolution layers of a UNet's blocks, or of "
            "the lists of like blocks of a transformer, and it has neither. It cannot be distilled here."
        )
    return names
