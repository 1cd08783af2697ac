"""What ComfyUI patches a model by where a LORA_MODEL lies in files: sums as their terms, and factors read while a weight is patched."""

import copy
from collections.abc import Mapping

import torch
from comfy.weight_adapter import LoRAAdapter, WeightAdapterBase

from ...lora_merge.files.lora import Pieces
from ...lora_merge.updates.side_by_side import shares_of
from ...lora_merge.updates.unmade import Unmade
from ..door.paths import without_folders
from ..page import plain

# Parts beside which a LoRA is more than the product of its factors.
_MORE = {"mid", "dora_scale", "magnitude", "reshape_weight"}


def terms(lora: Pieces, modules: Mapping[str, Mapping[str, str]]) -> list[Pieces]:
    """LORA_MODELs that add up to one: an exact sum of LoRAs is these LoRAs, with strength and scale as their alpha.

    modules: module -> part -> key.
    So ComfyUI adds what it would add if each had a loader of its own, in that order, and the factors of the sum, which are
    float32, are never made.
    """
    result: list[Pieces] = [dict(lora)]
    for module, parts in modules.items():
        if not {"up", "down"} <= parts.keys() or parts.keys() & _MORE:
            continue
        up, down = lora[parts["up"]], lora[parts["down"]]
        shares = shares_of(up, down)
        if shares[0].up is up:
            continue
        scale = float(lora[parts["alpha"]]) / down.shape[0] if "alpha" in parts else 1.0
        result += [{} for _ in shares[len(result) :]]
        for term, share in zip(result, shares, strict=False):
            alpha = torch.tensor(scale * share.above * share.below * share.rank, dtype=torch.float64)
            keys = parts["up"], parts["down"], parts.get("alpha", f"{module}.alpha")
            term |= zip(keys, (share.up, share.down, alpha), strict=True)
    return result


class LoRAInFile(LoRAAdapter):
    """ComfyUI's own adapter of a plain LoRA, with factors that are read when they are asked for.

    A model that is patched whole asks once, and nobody has them afterwards. Who asks again will do so at every step, as
    weights that are patched on their way to the GPU do, and finds them in memory from then on.
    Asking raises ValueError where the file is not what it was; ComfyUI then puts all weights back.
    """

    _asked = False

    @property
    def weights(self) -> tuple:
        try:
            made = tuple(part.shared() if isinstance(part, Unmade) else part for part in self._parts)
        except ValueError as error:
            # It ends another pack's node as a rule, which shows it as it comes.
            raise ValueError(plain(without_folders(f"A LoRA on the MODEL: {error}"))) from None
        if self._asked:
            self._parts = made
        self._asked = True
        return made

    @weights.setter
    def weights(self, parts: tuple) -> None:
        self._parts = parts

    def __reduce__(self):
        """A copy is core's own, with all in memory."""
        return LoRAAdapter, (self.loaded_keys, self.weights)


def for_one_model(patch):
    """One of ComfyUI's patches for one MODEL alone, which may move its tensors and note things in it; a LoRA with factors
    that are not read yet in a form that ComfyUI can take."""
    if isinstance(patch, LoRAAdapter) and any(isinstance(part, Unmade) for part in patch.weights):
        return LoRAInFile(patch.loaded_keys, patch.weights)
    return copy.copy(patch) if isinstance(patch, WeightAdapterBase) else patch
