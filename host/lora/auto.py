"""Which file of the loras folder makes few steps possible on a model, whatever it is called."""

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import comfy.model_management
import folder_paths

from ...lora_merge import Lora
from ...lora_merge.files.load_save import outline
from ...lora_merge.metadata.about import merged_inputs
from ...lora_merge.recognise.catalogue import PUBLISHED, Published, instead
from ...lora_merge.recognise.identity import WAYS, Identity, identify
from ...lora_merge.recognise.wrong_base import is_other_base
from . import files
from .identity import KnownWeights
from .model_base import base_of
from .patches import case_of
from .reports import chosen_lines, none_found
from .weights import from_lora

AUTO = "auto"
# Of looking at files that were not seen before: what is left then is looked at by the next run.
SECONDS = 60.0
MANY = 4096
_PREFERRED = "LCM"  # the node's name
_seen: dict[tuple, "Candidate | None"] = {}


@dataclass(frozen=True, kw_only=True)
class Candidate:
    """A file that makes few-step models, by its header alone.

    name: in the loras folder.   lora: without its values.   sure: whether something says that it is one; a LoRA that only
    covers what they cover may be a style that was trained on all layers.
    """

    name: str
    lora: Lora
    identity: Identity

    @property
    def sure(self) -> bool:
        return self.identity.preset is not None

    def of_other_half(self, half: str | None) -> bool:
        """Whether it is for the other half of a model in two (Wan 2.2), as far as both are known."""
        own = self.identity.expert
        return own is not None and half is not None and own.expert != half

    @property
    def order(self) -> tuple:
        """The surest first, LCM before other presets, then by name, so that one folder gives one answer."""
        return WAYS.index(self.identity.how), self.identity.preset != _PREFERRED, self.name


def known(lora_name: object) -> bool | str:
    """files.known, for a choice that may be `auto`."""
    return True if lora_name == AUTO else files.known(lora_name)


def fingerprint(lora_name: object) -> tuple:
    """files.fingerprint; for `auto` that of all files, any of which may be the one."""
    if lora_name != AUTO:
        return files.fingerprint(lora_name)
    return (AUTO, *(files.fingerprint(name) for name in files.lora_names()))


def choose(lora_name: str, model) -> tuple[str, list[str]]:
    """(name of the file, lines for the report): of `auto` the one for this model; any other name is as it was chosen.

    Raises ValueError where there is none, saying which file to get and where.
    """
    if lora_name != AUTO:
        return lora_name, []
    names = files.lora_names()
    best, *others = find(model, names)
    return best.name, chosen_lines(best.name, best.identity, len(names), {one.name: one.identity for one in others})


def find(model, names: Sequence[str]) -> list[Candidate]:
    """The acceleration LoRAs for a model among these files, the surest first. Raises ValueError as `choose` does."""
    base = base_of(model)
    looked = list(_look(names))
    candidates = sorted((one for one in looked if one is not None), key=lambda one: one.order)
    near = [
        one
        for one in candidates
        if not is_other_base(one.identity.bases, base.base) and not one.of_other_half(base.expert) and _fits(one, model)
    ]
    fitting = [one for one in near if one.sure]
    if not fitting:
        left = len(names) - len(looked)
        raise ValueError(none_found(base.words, _to_get(base.base), [one.name for one in near], left))
    return fitting


def _look(names: Sequence[str]) -> Iterator[Candidate | None]:
    """What each file is; remembered while it stays as it is. Ends before its time where there are too many new ones."""
    end = time.monotonic() + SECONDS
    for name in names:
        path = folder_paths.get_full_path("loras", name)
        if path is None:
            yield None
            continue
        try:
            key = files.fingerprint(name)
        except OSError:
            yield None  # gone meanwhile
            continue
        if key not in _seen:
            comfy.model_management.throw_exception_if_processing_interrupted()
            if time.monotonic() > end:
                return
            while len(_seen) >= MANY:
                _seen.pop(next(iter(_seen)))
            _seen[key] = _candidate(name, path)
        yield _seen[key]


def _candidate(name: str, path: str) -> Candidate | None:
    """None for a file that does not make few-step models, or cannot be read: whoever chooses that one is told why."""
    try:
        lora = outline(path)
        identity = identify(lora, path)
        several = len([strength for _, strength in merged_inputs(lora.metadata) if strength]) > 1
    except (ValueError, OSError):
        return None
    if several or not (identity.preset or identity.structure.accelerates):
        return None
    return Candidate(name=name, lora=lora, identity=identity)


def _fits(candidate: Candidate, model) -> bool:
    weights = from_lora(candidate.lora)
    known = KnownWeights(weights.pieces, name=candidate.name, metadata=weights.metadata, identity=candidate.identity)
    return not case_of(known, candidate.identity, model, None).wrong(demand_all=True)


def _to_get(base: str | None) -> Published | None:
    """The published file for a base: its LCM-LoRA, or the first of another method where there is none."""
    if base is None:
        return None
    return instead(base, _PREFERRED) or next((entry for entry in PUBLISHED if entry.base == base), None)
