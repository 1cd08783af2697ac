"""Which base model a MODEL is, and which of its weights a LoRA leaves alone."""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property

from ...lora_merge.naming import names
from ...lora_merge.naming.unet import Layout
from ...lora_merge.recognise import base_models, by_blocks
from ...lora_merge.recognise.catalogue import Expert
from ...lora_merge.recognise.identity import half_by_name
from ...lora_merge.recognise.transformers import Transformer
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
    """base: name of a base in lora_merge/recognise/base_models.py or transformers.py, None for any other model.
    config: ComfyUI's class for it.   weights: all of its weights' keys.
    modules: of the diffusion model, those that are no norms, under ComfyUI's names, underscored.
    file: the name of the file that ComfyUI read it from, "" where it does not say.
    """

    base: str | None
    config: str
    modules: frozenset[str]
    weights: frozenset[str]
    file: str = ""

    @cached_property
    def make(self) -> Transformer | None:
        """A transformer whose blocks are made like this model's."""
        return by_blocks.make_of(self.modules)

    @cached_property
    def expert(self) -> Expert | None:
        """Which half of a model in two its file's name says; nothing in the weights tells."""
        return half_by_name(self.file)

    def lacking_branch(self, module: str) -> str | None:
        """The branch of such models that a LoRA's module is of, if this model has nothing of that branch."""
        if self.make is None or not self.make.branches:
            return None
        branch = self.make.branch(by_blocks.body_of(names.canonical(names.kohya_name(module), Layout())))
        if branch is None or any(self.make.branches[branch].fullmatch(mine) for mine in self.modules):
            return None
        return branch

    @property
    def words(self) -> str:
        return self.base or f"of ComfyUI's class {self.config}"


def base_of(model, state: Mapping | None = None) -> ModelBase:
    """What a MODEL is, by the shapes of its weights, so that a pruned or inpainting model is still the base it was made from.

    state: of the model, where somebody has asked for it already.
    """
    config = type(model.model.model_config)
    shapes, packed = {}, set()
    state = model.model.state_dict() if state is None else state
    for key, weight in state.items():
        if key.startswith(PREFIX) and key.endswith(SUFFIX) and weight.ndim > 1:
            name = key[len(PREFIX) : -len(SUFFIX)].replace(".", "_")
            shapes[name] = tuple(weight.shape)
            if not weight.is_floating_point():
                packed.add(name)
    base = base_models.base_of(shapes)
    if base is None and packed:
        base = next((_BY_CONFIG[parent.__name__] for parent in config.__mro__ if parent.__name__ in _BY_CONFIG), None)
    if base is None:
        found = by_blocks.base_of({name: None if name in packed else shape for name, shape in shapes.items()})
        base = found.name if found else None
    return ModelBase(
        base=base, config=config.__name__, modules=frozenset(shapes), weights=frozenset(state), file=_file_of(model)
    )


def _file_of(model) -> str:
    """ComfyUI keeps with a MODEL how to load it again; the first thing it needs for that is the file."""
    how = getattr(model, "cached_patcher_init", None)
    try:
        path = how[1][0]
    except (IndexError, TypeError):
        return ""
    return re.split(r"[/\\]", path)[-1] if isinstance(path, str) else ""


def uncovered(found: Fit, model_base: ModelBase, kinds: frozenset[str]) -> tuple[list[str], int]:
    """(modules that the LoRA leaves unchanged, how many it could change), among the kinds of modules that it targets.

    This is the only trace of a LoRA for a smaller sister of the model: everything in it fits.
    """
    covered = {
        weight_of(target).removeprefix(PREFIX).removesuffix(SUFFIX).replace(".", "_") for target in found.targets
    }
    wanted = [module for module in model_base.modules if base_models.kind_of(module) in kinds]
    return sorted(module for module in wanted if module not in covered), len(wanted)
