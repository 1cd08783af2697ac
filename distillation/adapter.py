"""Trainable LoRA branches beside the layers of a frozen network, switched on and off without a second copy of it."""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .targets import adapted as adapted
from .targets import targets


class LoraBranch(nn.Module):
    """alpha / rank * up(down(x)) beside one linear or convolution layer (Hu et al. 2021, equation 3).

    down: (rank, in) or (rank, in, kh, kw) like the layer's kernel; up: (out, rank) or (out, rank, 1, 1). float32.
    device: where they are, None for the layer's.
    """

    def __init__(
        self,
        layer: nn.Module,
        rank: int,
        alpha: float,
        generator: torch.Generator,
        device: torch.device | None = None,
    ) -> None:
        super().__init__()
        self.conv = (layer.stride, layer.padding, layer.dilation) if isinstance(layer, nn.Conv2d) else None
        out_features, in_shape = _shape(layer)
        device = device or _device(layer)
        self.alpha = alpha
        self.rank = rank
        if device.type == "meta":  # only sizes are asked for, so nothing is drawn
            down = torch.empty(rank, *in_shape, device=device)
        else:
            # Kaiming-uniform with a = sqrt(5), the usual LoRA start: 1 / sqrt(fan_in). Drawn on the CPU: the same on
            # every device. up = 0: the student starts as the teacher.
            bound = in_shape.numel() ** -0.5
            down = ((torch.rand(rank, *in_shape, generator=generator) * 2 - 1) * bound).to(device)
        self.down = nn.Parameter(down)
        ones = (1,) * (len(in_shape) - 1)
        self.up = nn.Parameter(torch.zeros(out_features, rank, *ones, device=device))

    def forward(self, x: Tensor) -> Tensor:
        down, up = self.down.to(x.dtype), self.up.to(x.dtype)
        if self.conv is None:
            y = F.linear(F.linear(x, down), up)
        else:
            stride, padding, dilation = self.conv
            y = F.conv2d(F.conv2d(x, down, None, stride, padding, dilation), up)
        return y * (self.alpha / self.rank)


def _shape(layer: nn.Module) -> tuple[int, torch.Size]:
    """(out, shape of one output's weights) that the layer acts in; a packed weight is stored in another."""
    if isinstance(layer, nn.Conv2d):
        return layer.weight.shape[0], layer.weight.shape[1:]
    return int(layer.out_features), torch.Size([int(layer.in_features)])  # type: ignore[arg-type]


def _device(layer: nn.Module) -> torch.device:
    weight = layer.weight
    assert isinstance(weight, Tensor)
    return weight.device


def _full_rank(layer: nn.Module) -> int:
    """The rank above which an update of the layer's weight has nothing to gain."""
    out, inputs = _shape(layer)
    return min(out, inputs.numel())


def check_rank(layers: Sequence[nn.Module], rank: int) -> None:
    """Raises ValueError for a rank below 1 or above what any of these layers can use."""
    if rank < 1:
        raise ValueError(f"rank is {rank}; a LoRA has at least rank 1. LCM-LoRA uses 64.")
    widest = max(map(_full_rank, layers))
    if rank > widest:
        raise ValueError(
            f"rank is {rank}, but the largest layer of this network is {widest} wide, and beyond that a rank adds "
            f"nothing. Use at most {widest}; LCM-LoRA uses 64."
        )


def check_factors(
    factors: Mapping[str, tuple[Tensor, Tensor]], shapes: Mapping[str, tuple[int, int]], rank: int, name: str
) -> None:
    """Raises ValueError if a LoRA of this rank cannot begin with these. shapes: (out, in * kernel) of each layer."""
    for layer, (up, down) in factors.items():
        if up.shape[1] > rank:
            raise ValueError(
                f"start_from is {name}, of rank {up.shape[1]} ({layer}), and rank is {rank}. Set rank to "
                f"{max(up.shape[1] for up, _ in factors.values())}, or make the LoRA smaller by Resize LoRA."
            )
        if (there := (up.shape[0], down.shape[1])) != shapes[layer] or up.shape[1] != down.shape[0]:
            raise ValueError(f"start_from is {name}, which has {layer} as {there}, and here it is {shapes[layer]}.")


def flat_shape(layer: nn.Module) -> tuple[int, int]:
    """(out, in * kernel) of a layer's weight, as a matrix."""
    out, inputs = _shape(layer)
    return out, inputs.numel()


class LoraAdapters(nn.Module):
    """One LoraBranch for each chosen layer of `network`, added to the layer's output by a forward hook.

    network: any module; frozen while the branches are on it, its weights are never touched.
    rank, alpha: the scale is alpha / rank; alpha None means rank, so 1.
    choose: chooses layers by (name, module); None takes `targets`, the paper's.
    device: where the network computes, if its weights may be kept elsewhere.
    Beside the layers and not in the weights: W + up @ down would be built anew, at the size of W, in every call.
    `remove()` takes everything off again. Raises ValueError for a rank below 1 or above what any layer can use, for an
    alpha that is not a finite number above 0, or if no layer is chosen.
    """

    def __init__(
        self,
        network: nn.Module,
        rank: int,
        alpha: float | None = None,
        *,
        generator: torch.Generator,
        choose: Callable[[str, nn.Module], bool] | None = None,
        device: torch.device | None = None,
    ) -> None:
        super().__init__()
        named = dict(network.named_modules())
        self.names = targets(network) if choose is None else [n for n, module in named.items() if choose(n, module)]
        if not self.names:
            raise ValueError("the network has no layer to adapt; LCM-LoRA adapts linear and convolution layers.")
        check_rank([named[name] for name in self.names], rank)
        if alpha is not None and not 0 < alpha < math.inf:
            raise ValueError(f"alpha is {alpha}; it has to be a finite number above 0. Leave it out to take the rank.")
        self.enabled = True
        self.rank = rank
        scale = float(rank if alpha is None else alpha)
        self.branches = nn.ModuleList(LoraBranch(named[name], rank, scale, generator, device) for name in self.names)
        # A list in a list: nn.Module would take the network for a part of this module, and train and save it.
        self._network = [network]
        self._trainable = [name for name, parameter in network.named_parameters() if parameter.requires_grad]
        network.requires_grad_(False)
        self._hooks = [
            named[name].register_forward_hook(self._hook(branch))
            for name, branch in zip(self.names, self.branches, strict=True)
        ]

    def _hook(self, branch: nn.Module) -> Callable[[nn.Module, tuple[Tensor, ...], Tensor], Tensor]:
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

    @torch.no_grad()
    def start_from(self, factors: Mapping[str, tuple[Tensor, Tensor]], name: str = "the LoRA") -> None:
        """Begin where another LoRA ended; layers that are not in it stay as they are.

        factors: layer -> (up (out, r), down (r, in * kernel)), whose product is the whole update; r up to the rank here.
        What is left of the rank adds nothing at first.   name: for messages.
        Raises ValueError for a layer of a higher rank or another shape; then nothing is changed.
        """
        branches = dict(self._pairs())
        shapes = {layer: (branch.up.shape[0], branch.down[0].numel()) for layer, branch in branches.items()}
        check_factors(factors, shapes, self.rank, name)
        for layer, (up, down) in factors.items():
            branch, rank = branches[layer], up.shape[1]
            branch.up.zero_()
            branch.up[:, :rank] = (up * (branch.rank / branch.alpha)).view_as(branch.up[:, :rank])
            branch.down[:rank] = down.view_as(branch.down[:rank])

    def remove(self) -> None:
        """Take the branches off the network, which is then as it was given. May be called again."""
        for hook in self._hooks:
            hook.remove()
        for network in self._network:
            parameters = dict(network.named_parameters())
            for name in self._trainable:
                parameters[name].requires_grad_(True)
        self._hooks, self._network = [], []

    def factors(self) -> dict[str, nn.Parameter]:
        """The trained parameters by name, "<layer>.down" and "<layer>.up", in the order of the network's layers."""
        found = {}
        for name, branch in self._pairs():
            found[f"{name}.down"], found[f"{name}.up"] = branch.down, branch.up
        return found

    def lora_state_dict(
        self, prefix: str = "lora_unet_", *, spelling: Mapping[str, str] | None = None
    ) -> dict[str, Tensor]:
        """The LoRA in kohya's keys, alpha always among them, float32 on the CPU.

        spelling: layer -> the name to write, dots allowed; layers that are not in it keep their own.
        """
        state = {}
        for name, branch in self._pairs():
            key = prefix + (spelling or {}).get(name, name).replace(".", "_")
            state[f"{key}.lora_up.weight"] = branch.up.detach().float().cpu().clone()
            state[f"{key}.lora_down.weight"] = branch.down.detach().float().cpu().clone()
            state[f"{key}.alpha"] = torch.tensor(branch.alpha)
        return state

    def _pairs(self) -> Iterator[tuple[str, LoraBranch]]:
        for name, branch in zip(self.names, self.branches, strict=True):
            assert isinstance(branch, LoraBranch)
            yield name, branch


class Average:
    """A moving average of parameters, theta_minus <- mu theta_minus + (1 - mu) theta (Algorithm 1's last line).

    rate: mu in [0, 1). In the first steps it is shorter, step / (step + 10), so that the start is soon forgotten.
    """

    def __init__(self, parameters: Sequence[nn.Parameter], rate: float) -> None:
        self.parameters = list(parameters)
        self.rate = rate
        self.values = [parameter.detach().clone() for parameter in self.parameters]

    @torch.no_grad()
    def update(self, step: int) -> None:
        """After optimizer step number `step`, 1, 2, ..."""
        rate = min(self.rate, step / (step + 10))
        for value, parameter in zip(self.values, self.parameters, strict=True):
            value.lerp_(parameter, 1 - rate)

    @contextmanager
    def in_place(self) -> Iterator[None]:
        """Within it the parameters have the averaged values. Not to be used around what needs a gradient."""
        before = [parameter.data for parameter in self.parameters]
        try:
            for parameter, value in zip(self.parameters, self.values, strict=True):
                parameter.data = value
            yield
        finally:
            for parameter, value in zip(self.parameters, before, strict=True):
                parameter.data = value
