"""All that is known of a LoRA and a MODEL before anything is patched."""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property

from ...lora_merge.recognise.identity import Identity
from ...lora_merge.recognise.wrong_base import Counts, is_other_base, is_wrong_base
from .fit import Fit
from .model_base import ModelBase


@dataclass(frozen=True, kw_only=True)
class Case:
    """name: of the LoRA.   identity: what it is, None for one that lora_merge cannot read.
    found: where its modules belong.   model: what the MODEL is.
    left, could: modules of the model that the LoRA leaves alone, and all of them, in the kinds that it is for.
    """

    name: str
    identity: Identity | None
    found: Fit
    model: ModelBase
    left: tuple[str, ...]
    could: int

    @property
    def bases(self) -> tuple[str, ...]:
        """Names of the bases that the LoRA can be for, () if unknown."""
        return self.identity.bases if self.identity else ()

    @property
    def accelerates(self) -> bool:
        """Whether its structure says so. That of a LoRA for a transformer does not: styles change the same modules."""
        return self.identity is not None and self.identity.structure.accelerates

    @cached_property
    def absent(self) -> Mapping[str, tuple[str, ...]]:
        """Branch that the model as a whole is made without -> modules of the LoRA that belong to it."""
        found: dict[str, list[str]] = {}
        for module in self.found.homeless:
            if (branch := self.model.lacking_branch(module)) is not None:
                found.setdefault(branch, []).append(module)
        return {branch: tuple(modules) for branch, modules in found.items()}

    @cached_property
    def homeless(self) -> tuple[str, ...]:
        """Modules that have no place in the model, and should have one."""
        absent = {module for modules in self.absent.values() for module in modules}
        return tuple(module for module in self.found.homeless if module not in absent)

    @property
    def other_base(self) -> bool:
        """Both bases are known, and the model's is none that the LoRA can be for."""
        return is_other_base(self.bases, self.model.base)

    @property
    def counts(self) -> Counts:
        found = self.found
        return Counts(
            placed=len(found.placed),
            homeless=len(self.homeless),
            clashing=len(found.clashing),
            twice=len(found.twice),
            left=len(self.left),
            could=self.could,
        )

    def wrong(self, demand_all: bool) -> bool:
        """Whether the LoRA was made for another model, or names a weight twice; see is_wrong_base."""
        return is_wrong_base(
            self.counts, self.bases, self.model.base, accelerates=self.accelerates, demand_all=demand_all
        )
