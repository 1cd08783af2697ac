"""What changes the LoRA by its gradients: torch's own optimisers, and an 8-bit one where its package is installed."""

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from .settings import Settings

Made = Callable[[list[nn.Parameter], Settings], torch.optim.Optimizer]

MOMENTUM = 0.9  # of SGD, which asks for no betas


def _adams(kind: str) -> Made:
    def make(factors: list[nn.Parameter], settings: Settings) -> torch.optim.Optimizer:
        own: Callable[..., torch.optim.Optimizer] = getattr(torch.optim, kind)
        # RAdam and NAdam pull weights towards 0 as Adam did, unless told to do it as AdamW does.
        more = {} if kind == "AdamW" else {"decoupled_weight_decay": True}
        return own(factors, lr=settings.learning_rate, betas=settings.betas, weight_decay=settings.weight_decay, **more)

    return make


def _adafactor(factors: list[nn.Parameter], settings: Settings) -> torch.optim.Optimizer:
    """Rows and columns in place of Adam's second mean, no first one: the least memory (Shazeer and Stern 2018)."""
    if not hasattr(torch.optim, "Adafactor"):
        raise ValueError("optimizer adafactor needs torch 2.5 or newer; use adamw.")
    return torch.optim.Adafactor(factors, lr=settings.learning_rate, weight_decay=settings.weight_decay)


def _sgd(factors: list[nn.Parameter], settings: Settings) -> torch.optim.Optimizer:
    return torch.optim.SGD(
        factors, lr=settings.learning_rate, momentum=MOMENTUM, weight_decay=settings.weight_decay, nesterov=True
    )


def _adamw_8bit(factors: list[nn.Parameter], settings: Settings) -> torch.optim.Optimizer:
    """Both means in 8 bits (Dettmers 2022): a quarter of AdamW's memory."""
    try:
        from bitsandbytes.optim import AdamW8bit  # type: ignore[import-not-found]
    except ImportError as error:
        raise ValueError(
            f"optimizer adamw8bit needs the package bitsandbytes: pip install bitsandbytes ({error}); or use adamw."
        ) from error
    made: torch.optim.Optimizer = AdamW8bit(
        factors, lr=settings.learning_rate, betas=settings.betas, weight_decay=settings.weight_decay
    )
    return made


OPTIMIZERS: Mapping[str, Made] = {
    "adamw": _adams("AdamW"),
    "radam": _adams("RAdam"),
    "nadam": _adams("NAdam"),
    "adafactor": _adafactor,
    "sgd": _sgd,
    "adamw8bit": _adamw_8bit,
}


def optimizer_of(factors: Iterable[nn.Parameter], settings: Settings) -> torch.optim.Optimizer:
    """Raises ValueError for one that is not installed."""
    return OPTIMIZERS[settings.optimizer]([*factors], settings)


def check_optimizer(settings: Settings) -> None:
    """Raises ValueError for one that is not installed, before there is anything to change."""
    optimizer_of([nn.Parameter(torch.zeros(()))], settings)


def state_of(
    optimizer: torch.optim.Optimizer, factors: Mapping[str, nn.Parameter]
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """("<part>/<factor>" -> tensor, the same -> plain number) of all it has to remember."""
    tensors, numbers = {}, {}
    for name, factor in factors.items():
        for part, value in optimizer.state.get(factor, {}).items():
            if isinstance(value, Tensor):
                tensors[f"{part}/{name}"] = value
            elif value is not None:
                numbers[f"{part}/{name}"] = value
    return tensors, numbers


def restore(optimizer: torch.optim.Optimizer, factors: Mapping[str, nn.Parameter], kept: Mapping[str, Any]) -> None:
    """What state_of gave, put back. kept: may hold other things than of factors, such as "lora/<factor>"."""
    places = {name: number for number, name in enumerate(factors)}
    state: dict[int, dict[str, Any]] = {}
    for key, value in kept.items():
        part, _, name = key.partition("/")
        if name in places:
            state.setdefault(places[name], {})[part] = value
    optimizer.load_state_dict(optimizer.state_dict() | {"state": state})
