"""Trainable LoRA branches beside the layers of a frozen network, switched on and off without a second copy of it."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
import torch.nn.functional as F
from torch import Tensor, nn

# The layers that the published LCM-LoRAs leave alone (latent-consistency/lcm-lora-sdv1-5), in ComfyUI's names.
NOT_ADAPTED = ("time_embed.", "label_emb.", "input_blocks.0.0", "out.2")


def adapted(name: str, module: nn.Module) -> bool:
    """Whether the LCM-LoRA of the paper has this layer: every linear and convolution but time embedding, in and out.

    On ComfyUI's UNets this gives the 278, 423 and 788 modules of SD1.5, SSD-1B and SDXL.
    """
    return isinstance(module, nn.Linear | nn.Conv2d) and not name.startswith(NOT_ADAPTED)


class LoraBranch(nn.Module):
    """alpha / rank * up(down(x)) beside one linear or convolution layer (Hu et al. 2021, equation 3).

    down: (rank, in) or (rank, in, kh, kw) like the layer's kernel; up: (out, rank) or (out, rank, 1, 1). float32.
    """

    def __init__(self, layer: nn.Module, rank: int, alpha: float, generator: torch.Generator) -> None:
        super().__init__()
        assert isinstance(layer, nn.Linear | nn.Conv2d)
        self.conv = (layer.stride, layer.padding, layer.dilation) if isinstance(layer, nn.Conv2d) else None
        out_features, in_shape = layer.weight.shape[0], layer.weight.shape[1:]
        self.alpha = alpha
        self.rank = rank
        # Kaiming-uniform with a = sqrt(5), the usual LoRA start: 1 / sqrt(fan_in). up = 0: the student starts as
        # the teacher.
        bound = in_shape.numel() ** -0.5
        down = (torch.rand(rank, *in_shape, generator=generator) * 2 - 1) * bound
        self.down = nn.Parameter(down.to(layer.weight.device))
        ones = (1,) * (len(in_shape) - 1)
        self.up = nn.Parameter(torch.zeros(out_features, rank, *ones, device=layer.weight.device))

    def forward(self, x: Tensor) -> Tensor:
        down, up = self.down.to(x.dtype), self.up.to(x.dtype)
        if self.conv is None:
            y = F.linear(F.linear(x, down), up)
        else:
            stride, padding, dilation = self.conv
            y = F.conv2d(F.conv2d(x, down, None, stride, padding, dilation), up)
        return y * (self.alpha / self.rank)


class LoraAdapters(nn.Module):
    """One LoraBranch for each chosen layer of `network`, added to the layer's output by a forward hook.

    network: any module; its own parameters are frozen here and stay as they were.
    rank, alpha: the scale is alpha / rank.   choose: chooses layers by (name, module).
    Beside the layers and not in the weights: W + up @ down would be built anew, at the size of W, in every call.
    `remove()` takes the hooks off again. Raises ValueError if no layer is chosen.
    """

    def __init__(
        self,
        network: nn.Module,
        rank: int,
        alpha: float | None = None,
        *,
        generator: torch.Generator,
        choose: Callable[[str, nn.Module], bool] = adapted,
    ) -> None:
        super().__init__()
        if rank < 1:
            raise ValueError(f"rank is {rank}; a LoRA has at least rank 1. LCM-LoRA uses 64.")
        network.requires_grad_(False)
        self.enabled = True
        self.names: list[str] = []
        branches = []
        self._hooks = []
        for name, module in network.named_modules():
            if choose(name, module):
                branch = LoraBranch(module, rank, float(rank if alpha is None else alpha), generator)
                self.names.append(name)
                branches.append(branch)
                self._hooks.append(module.register_forward_hook(self._hook(branch)))
        if not branches:
            raise ValueError("the network has no layer to adapt; LCM-LoRA adapts linear and convolution layers.")
        self.branches = nn.ModuleList(branches)

    def _hook(self, branch: LoraBranch) -> Callable[[nn.Module, tuple[Tensor, ...], Tensor], Tensor]:
        def add(module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> Tensor:
            return output + branch(args[0]) if self.enabled else output

        return add

    @contextmanager
    def disabled(self) -> Iterator[None]:
        """Within it the network is the unadapted one: the teacher."""
        before, self.enabled = self.enabled, False
        try:
            yield
        finally:
            self.enabled = before

    def remove(self) -> None:
        """Take the branches off the network, which is then as it was given."""
        for hook in self._hooks:
            hook.remove()

    def lora_state_dict(self, prefix: str = "lora_unet_") -> dict[str, Tensor]:
        """The LoRA in kohya's keys, alpha always among them, float32 on the CPU."""
        state = {}
        for name, branch in zip(self.names, self.branches, strict=True):
            assert isinstance(branch, LoraBranch)
            key = prefix + name.replace(".", "_")
            state[f"{key}.lora_up.weight"] = branch.up.detach().float().cpu().clone()
            state[f"{key}.lora_down.weight"] = branch.down.detach().float().cpu().clone()
            state[f"{key}.alpha"] = torch.tensor(branch.alpha)
        return state
