"""LoRA arithmetic: tau' = lambda_1 tau_1 + lambda_2 tau_2 + ..., exact, from file to file.

    style, lcm = load("style.safetensors"), load("lcm.safetensors")
    save(merge([(style, 0.8), (lcm, 1.0)]), "fast-style.safetensors")
    save(resize(lcm, keep=0.99), "small-lcm.safetensors")

Data takes one road: file or state dict -> Lora (layers under canonical module names) -> arithmetic -> Lora -> file or
state dict. Pure torch and safetensors; ComfyUI is not needed.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .api import *  # noqa: F403


def __getattr__(name: str) -> Any:
    # Not before somebody asks: torch takes seconds to import, and `python -m lora_merge --help` needs none of it.
    api = import_module(".api", __name__) if name == "__all__" or not name.startswith("__") else None
    if api is None or name not in {"__all__", *api.__all__}:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(api, name)


def __dir__() -> list[str]:
    return sorted({*globals(), *import_module(".api", __name__).__all__})
