"""What names stand for in a connected MODEL, for LoRAs of a model whose names nothing else here knows."""

import comfy.lora

from ...lora_merge import Lora
from ...lora_merge.merging.by_target import ModelNames, Target, by_target
from ...lora_merge.naming.family import Rows


def names_in(model) -> ModelNames | None:
    """What ComfyUI's own key map says of a MODEL's names; None without a MODEL."""
    if model is None:
        return None
    weights = model.model.state_dict()
    targets = {
        name: target
        for name, home in comfy.lora.model_lora_keys_unet(model.model, {}).items()
        if (target := target_of(home)).weight in weights
    }
    return ModelNames(targets, {name: tuple(weight.shape) for name, weight in weights.items()})


def aligned_in(loras: list[Lora], model) -> list[Lora]:
    """The LoRAs with one name for each weight of the MODEL, by ComfyUI's own key map; as they are without a MODEL.

    Raises ValueError for a LoRA that has no place in the model.
    """
    names = names_in(model)
    return loras if names is None else by_target(loras, names.targets, names.shapes)


def target_of(home) -> Target:
    """A place in ComfyUI's key map: a weight, or (weight, (dimension, first row, rows) or None[, function])."""
    if isinstance(home, str):
        return Target(home)
    rows = None if home[1] is None else Rows(home[1][1], home[1][2])
    # The one function there is swaps the two halves.
    return Target(home[0], rows, len(home) > 2)
