"""What a merge does with updates that do not add up: passes them through where nothing happens to them, or refuses."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from ..files.keys import BIAS_PARTS
from ..files.lora import Lora
from ..settings.strengths import Strengths
from ..updates.weight_dependent import Carried
from ..words import many

_SHOWN = 3


@dataclass(frozen=True)
class Passthrough:
    """sources: module -> index of the one input it is passed through from. updates: module -> that update.
    refused: index of an input -> its modules that can be neither added nor passed through.
    """

    sources: dict[str, int] = field(default_factory=dict)
    updates: dict[str, Carried] = field(default_factory=dict)
    refused: Mapping[int, tuple[str, ...]] = field(default_factory=dict)

    def passed_from(self, index: int) -> int:
        """Number of modules passed through from an input."""
        return sum(source == index for source in self.sources.values())

    def refused_from(self, index: int) -> int:
        return len(self.refused.get(index, ()))


def passthrough_of(loras: Sequence[Lora], strengths: Strengths) -> Passthrough:
    """Which updates that depend on the weight go through a merge; the LoRAs have canonical names that agree.

    One goes through as it is if its strength there is 1 and no other input of a strength other than 0 changes that
    weight. At strength 0 it falls away, like everything else of that input.
    """
    sources: dict[str, int] = {}
    refused: dict[int, list[str]] = {}
    changed = [_weights(lora) for lora in loras] if any(lora.carried for lora in loras) else []
    for index, lora in enumerate(loras):
        for module in lora.carried:
            at = strengths.at(module)
            owners = {other for other, weights in enumerate(changed) if at[other] and module in weights}
            if at[index] == 1 and owners == {index}:
                sources[module] = index
            elif at[index]:
                refused.setdefault(index, []).append(module)
    updates = {module: loras[index].carried[module] for module, index in sources.items()}
    return Passthrough(sources, updates, {index: tuple(modules) for index, modules in refused.items()})


def refusal(loras: Sequence[Lora], passthrough: Passthrough) -> str:
    """One message for all modules that do not add up, by input and kind."""
    texts = []
    for index, modules in passthrough.refused.items():
        lora = loras[index]
        kinds: dict[str, list[str]] = {}
        for module in modules:
            kinds.setdefault(lora.carried[module].kind, []).append(lora.spellings[module])
        for kind, names in sorted(kinds.items()):
            more = f", and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
            texts.append(f"{lora.source} has {kind} ({many(len(names), 'modules')}: {', '.join(names[:_SHOWN])}{more})")
    return (
        f"these updates depend on the weight they change and do not add up: {'; '.join(texts)}. They pass through a merge "
        "only at strength 1 and where no other input changes the same weight; use that LoRA in a LoRA loader of its own."
    )


def _weights(lora: Lora) -> set[str]:
    """Modules whose weight the LoRA changes, not their bias alone."""
    return {*lora.modules, *lora.carried, *(module for module, part in lora.diffs if part not in BIAS_PARTS)}
