"""Whether a LoRA was made for another base model than the one it is put on, from names and counts alone."""

from collections.abc import Collection
from dataclasses import dataclass

from . import base_models, transformers

# Where the base is not known: what a model may lack of the modules that an acceleration LoRA changes.
FEW = 0.05
# An acceleration LoRA changes all modules of its kinds; one that leaves more than this share is for a smaller model.
LEFT = 0.25
# Of the modules, at least this share has a place in any model of the same make.
PLACED = 0.5


@dataclass(frozen=True, kw_only=True)
class Counts:
    """How many modules of a LoRA have which fate on a model, and how many modules of the model it leaves alone.

    placed: they fit.   homeless: the model has none of that name.   clashing: it has one of another shape.
    Those of a branch that this model as a whole is made without are none of these: they say nothing of its base.
    twice: pairs that are one weight of the model.
    left, could: modules of the model that the LoRA does not change, and all of them, in the kinds that it is for.
    """

    placed: int
    homeless: int = 0
    clashing: int = 0
    twice: int = 0
    left: int = 0
    could: int = 0

    @property
    def asked(self) -> int:
        """Modules that should have had a place."""
        return self.placed + self.homeless + self.clashing + self.twice

    @property
    def foreign(self) -> bool:
        """A wrong shape anywhere, or fewer than half of the modules with a place: made for another make of model."""
        return self.clashing > 0 or self.placed + self.twice < PLACED * max(self.asked, 1)


def is_other_base(bases: Collection[str], model: str | None) -> bool:
    """Whether a model's base is known to be none of those that the LoRA can be for.

    bases: names as in base_models or transformers, none where it is not known.   model: such a name, or None.
    """
    return bool(bases) and model is not None and model not in bases


def are_kin(bases: Collection[str], model: str | None) -> bool:
    """Whether a model is made like one of these bases, so that what fits of a LoRA can work on it: all UNets are, but
    blocks of one name and width can stand in transformers that have nothing else in common.
    """
    return any(_kin(base) == _kin(model) for base in bases)


def _kin(name: str | None) -> str | None:
    if name in base_models.BY_NAME:
        return "UNet"
    transformer = transformers.BY_NAME.get(name or "")
    return transformer.kin if transformer else name


def is_wrong_base(
    counts: Counts, bases: Collection[str], model: str | None, *, accelerates: bool, demand_all: bool
) -> bool:
    """Whether the LoRA was made for another model, or names a weight twice.

    A style LoRA that is for a sister of the model (are_kin) and fits in most of its modules works after a fashion. A model
    of the right base may be pruned.

    bases, model: see is_other_base.   accelerates: whether the LoRA is of the kind that makes few-step models.
    demand_all: nearly every module needs a place, and a LoRA that accelerates has to cover the model.
    """
    if counts.foreign or counts.twice:
        return True
    if is_other_base(bases, model) and (accelerates or demand_all or not are_kin(bases, model)):
        return True
    if model in bases or not demand_all:
        return False
    lacking = counts.asked - counts.placed
    return lacking > FEW * counts.asked or (accelerates and counts.left > LEFT * counts.could)
