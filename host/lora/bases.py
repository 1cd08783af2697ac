"""Which base model a MODEL is, and which of its weights a LoRA leaves alone."""

from dataclasses import dataclass

from ...lora_merge.recognise import base_models as bases
from .fit import Fit, weight_of

PREFIX, SUFFIX = "diffusion_model.", ".weight"
# ComfyUI's class of a model's configuration -> its base, for weights that are stored packed and show no shape.
_BY_CONFIG = {
    "SD15": "SD1.5",
    "SD20": "SD2",
    "SDXL": "SDXL",
    "SSD1B": "SSD-1B",
    "Segmind_Vega": "Segmind-Vega",
    "KOALA_1B": "KOALA-1B",
    "KOALA_700M": "KOALA-700M",
}


@dataclass(frozen=True)
class ModelBase:
    """base: name of a base in lora_merge/recognise/base_models.py, None for any other model.   config: ComfyUI's class for it.
    modules: the UNet's modules that are no norms, under ldm names, underscored.   weights: all of its weights' keys.
    """

    base: str | None
    config: str
    modules: frozenset[str]
    weights: frozenset[str]

    @property
    def words(self) -> str:
        return self.base or f"of ComfyUI's class {self.config}"


def base_of(model) -> ModelBase:
    """By the shapes of its weights, so that a pruned or inpainting model is still the base it was made from."""
    config = type(model.model.model_config)
    shapes, packed = {}, False
    state = model.model.state_dict()
    for key, weight in state.items():
        if key.startswith(PREFIX) and key.endswith(SUFFIX) and weight.ndim > 1:
            shapes[key[len(PREFIX) : -len(SUFFIX)].replace(".", "_")] = tuple(weight.shape)
            packed = packed or not weight.is_floating_point()
    base = bases.base_of(shapes)
    if base is None and packed:
        base = next((_BY_CONFIG[parent.__name__] for parent in config.__mro__ if parent.__name__ in _BY_CONFIG), None)
    return ModelBase(base, config.__name__, frozenset(shapes), frozenset(state))


def uncovered(found: Fit, model_base: ModelBase, kinds: frozenset[str]) -> tuple[list[str], int]:
    """(modules of the model that the LoRA does not change, number of modules it could), in the kinds that it is for.

    This is the only trace of a LoRA for a smaller sister of the model: everything in it fits.
    """
    covered = {
        weight_of(target).removeprefix(PREFIX).removesuffix(SUFFIX).replace(".", "_") for target in found.patches
    }
    wanted = [module for module in model_base.modules if bases.kind_of(module) in kinds]
    return sorted(module for module in wanted if module not in covered), len(wanted)
