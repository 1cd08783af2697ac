"""An existing LoRA as the beginning of a training: what it adds to each layer that is trained."""

from collections.abc import Mapping, Sequence

import torch
from comfy.weight_adapter import LoRAAdapter

from ..lora.fit import fit, weight_of
from ..lora.reports import clash_words
from .report import Lost

Factors = dict[str, tuple[torch.Tensor, torch.Tensor]]
"""Layer -> (up (out, r), down (r, in * kernel)), float32, whose product is all that the LoRA adds there."""


def factors_of(weights: Mapping[str, torch.Tensor], model, layers: Sequence[str], name: str) -> tuple[Factors, Lost]:
    """(factors, what is lost) of a LORA_MODEL in any spelling that ComfyUI loads for this MODEL.

    layers: the trained ones, by their names in the network.   name: of the LoRA, for messages.
    Raises ValueError if it is for another model or no plain LoRA.
    """
    found = fit(weights, model)
    if found.clashing:
        raise ValueError(f"start_from is {name}, which is for another model: {clash_words(found.clashing[0])}.")
    known = {f"diffusion_model.{layer}.weight": layer for layer in layers}
    pieces: dict[str, list[tuple[torch.Tensor, torch.Tensor]]] = {}
    elsewhere = [*found.homeless, *(second for _, second in found.twice)]
    for target, patch in (entry for term in found.patches() for entry in term.items()):
        layer = known.get(weight_of(target))
        if layer is None:
            elsewhere.append(weight_of(target))
        else:
            pieces.setdefault(layer, []).append(_piece(target, patch, model, name))
    if not pieces:
        raise ValueError(
            f"start_from is {name}, which changes none of the layers that are trained; it is for another model."
        )
    lost = Lost(
        name=name, elsewhere=elsewhere, waiting=len(found.waiting), anew=len(layers) - len(pieces), layers=len(layers)
    )
    return {layer: _together(parts) for layer, parts in pieces.items()}, lost


def _piece(target, patch, model, name: str) -> tuple[torch.Tensor, torch.Tensor]:
    if not isinstance(patch, LoRAAdapter) or any(part is not None for part in patch.weights[3:]):
        kind = getattr(patch, "name", "difference")
        raise ValueError(
            f"start_from is {name}, which has more than a plain low-rank update ({kind}) for {weight_of(target)}. Make it "
            "one by Resize LoRA, or begin anew."
        )
    up, down, alpha = patch.weights[:3]
    up, down = up.flatten(1).float(), down.flatten(1).float()
    up = up * (1.0 if alpha is None else float(alpha) / down.shape[0])
    if isinstance(target, str):
        return up, down
    dim, first, length = target[1]  # rows of a weight that the file has in parts, such as q, k and v
    if dim != 0:
        raise ValueError(
            f"start_from is {name}, which changes columns of {weight_of(target)}; that cannot be trained on."
        )
    whole = up.new_zeros(model.model.state_dict()[weight_of(target)].shape[0], up.shape[1])
    whole[first : first + length] = up
    return whole, down


def _together(parts: list[tuple[torch.Tensor, torch.Tensor]]) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.cat([up for up, _ in parts], 1), torch.cat([down for _, down in parts])
