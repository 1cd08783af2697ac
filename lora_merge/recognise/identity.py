"""What a LoRA is: which published file, for which base model, with which sampling settings, and how surely.

A published file is known by its sha256, a re-saved or renamed one by its structure (the modules it touches, rank, alpha,
number of parameters), and what a file says about itself is believed last.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal, TypeVar, get_args

from ..disk.digests import sha256_of
from ..files.lora import Lora
from ..metadata.about import merged_inputs
from ..metadata.fields import ARCHITECTURE, MERGED_FROM, OURS, PRESET_KEY, PROVENANCE_KEY
from ..naming import names
from . import by_blocks
from .base_models import Recognised, Shape, recognise
from .catalogue import PUBLISHED, Expert, Published

Number = TypeVar("Number", int, float)
How = Literal["sha256", "structure", "metadata", "unknown"]
# The surest first.
WAYS: tuple[How, ...] = get_args(How)

# Not inside a longer word.
_WORDS = tuple(
    (re.compile(rf"(?<![a-z]){word}(?![a-z])", re.I), preset)
    for word, preset in (("lcm", "LCM"), ("tcd", "TCD"), ("dmd2?", "DMD2"))
)
# What people who make or rename such files call them. Says that a file may be one, and nothing of its settings.
_LOOKS = re.compile(
    r"(?<![a-z])(lightx2v|lightning|hyper(?=[-_ ]?(?:sd|flux))|turbo|causvid|accvid(?:eo)?|fastwan|self[-_ ]?forcing"
    r"|(?:cfg[-_ ]?)?(?:step[-_ ]?)?distill(?:ed|ation)?|lcm|tcd|pcm|dmd2?|\d{1,2}[-_ ]?steps?)(?![a-z])",
    re.I,
)
# Names of the halves of a model in two: with the word noise, in capitals, or at the end. Elsewhere, as in low_poly and
# high_quality, the words mean something else.
_NOISE = re.compile(r"(?i:(?<![a-z])(high|low)[-_ ]?noise)|(?<=[a-z\d])(High|Low)Noise")
_CAPITALS = re.compile(r"(?<![A-Za-z])(HIGH|LOW)(?![A-Za-z])")
_LAST = re.compile(r"(?:(?<![A-Za-z])(high|low)|(?<=[a-z\d])(High|Low)|(?<![A-Za-z])(High|Low))$")
# What may follow them. A name comes with a file, so there is one way only to read it: a number, or letters behind a kind of
# number (q8_0, fp8_e4m3fn), are taken whole, by looking ahead and then at what was found.
_BEHIND = re.compile(
    r"(?:[-_. ](?:v?(?=(?P<number>\d[\d.]*(?=[-_. ]|$)))(?P=number)|(?=(?P<kind>(?:q|b?fp?)\d\w*))(?P=kind)"
    r"|e\d+|rank[-_]?\d+|r\d+|epoch\d*|steps?\d*|loras?|scaled|comfyui|(?![qf])[a-z]\d_k(?:_[sml])?))+$",
    re.I,
)
# No file is called so long, and a title that is says nothing in its thousandth word.
_LONGEST_NAME = 255
_LONGEST_LIST = 16 * _LONGEST_NAME
_OF_TWO_EXPERTS = "Wan 2.1/2.2 14B"
# As kohya's trainers write it. SD2 is two of them, which no module tells apart.
ARCHITECTURES = {"SD1.5": "stable-diffusion-v1/lora", "SDXL": "stable-diffusion-xl-v1-base/lora"}
_VERSIONS = {"sd_v1": "SD1.5", "sdxl_base_v1-0": "SDXL"}
_BASE_WORDS = (
    (re.compile(r"sdxl|stable-diffusion-xl", re.I), "SDXL"),
    (re.compile(r"sd_v2|stable-diffusion-v2", re.I), "SD2"),
    (re.compile(r"sd_v1|stable-diffusion-v1", re.I), "SD1.5"),
)


@dataclass(frozen=True)
class Structure:
    """The countable facts of a LoRA. Pairs are the smallest and the largest of all modules, None without modules.

    alphas: None also where no module states one, which means scale 1.   recognised: what its modules say of the base.
    """

    modules: int
    ranks: tuple[int, int] | None
    alphas: tuple[float, float] | None
    scales: tuple[float, float] | None
    parameters: int
    recognised: Recognised

    @property
    def accelerates(self) -> bool:
        """Whether it touches what acceleration LoRAs touch and style LoRAs do not: timestep projections."""
        return {"time_emb_proj", "conv1", "attn2_to_k"} <= self.recognised.kinds


@dataclass(frozen=True)
class Half:
    """expert: which half of a model in two.   source: where that stands: "sha256", "file name", or a field of the metadata."""

    expert: Expert
    source: str


@dataclass(frozen=True)
class Identity:
    """kind: what to call it.   bases: names of the bases it can be for, () if unknown.
    how: the way its kind was recognised.   preset: name of its sampling settings, None if unknown.
    published: the catalogue's row.   structure: its counts.
    expert: of a model in two halves the one that it is for, and from what that is known; None where nothing says.
    looks_like: of a file that is not known, the word in its name that acceleration LoRAs are called by.
    """

    kind: str
    bases: tuple[str, ...]
    how: How
    preset: str | None
    published: Published | None
    structure: Structure
    expert: Half | None = None
    looks_like: str | None = None


def structure_of(lora: Lora) -> Structure:
    """The counts of a LoRA, without looking at its values."""
    layers = list(lora.modules.values())
    alphas = [layer.alpha for layer in layers if layer.alpha is not None]
    shapes = {module: layer.shape for module, layer in lora.modules.items()}
    shapes |= {module: carried.shape for module, carried in lora.carried.items() if carried.shape is not None}
    return Structure(
        modules=len(lora.spellings),
        ranks=_span([layer.rank for layer in layers]),
        alphas=_span(alphas),
        scales=_span([layer.scale for layer in layers]),
        parameters=lora.parameters,
        recognised=_recognised(lora, shapes),
    )


def architecture_of(lora: Lora) -> str | None:
    """The ModelSpec's name of what the LoRA is for, None where its modules and kohya's note of the base leave that open."""
    bases = structure_of(lora).recognised.bases
    if len(bases) == 1:
        return ARCHITECTURES.get(bases[0])
    noted = _VERSIONS.get(lora.metadata.get("ss_base_model_version", ""))
    return ARCHITECTURES[noted] if noted and (noted in bases or not bases) else None


def identify(
    lora: Lora,
    path: str | os.PathLike[str] | None = None,
    *,
    catalogue: Sequence[Published] = PUBLISHED,
    digest: Callable[[str | os.PathLike[str]], str] | None = None,
) -> Identity:
    """What a LoRA is. path: the file it came from, if there is one; it is hashed only if a published file can be it.

    digest: sha256 of a file, `sha256_of` if None.   Raises OSError if the file cannot be read.
    """
    structure = structure_of(lora)
    entry, how = _published(lora, path, structure, catalogue, digest or sha256_of)
    if entry is not None:
        return Identity(
            kind=entry.name,
            bases=(entry.base,),
            how=how,
            preset=entry.preset,
            published=entry,
            structure=structure,
            expert=Half(entry.expert, "sha256") if entry.expert and how == "sha256" else None,
        )
    named = _preset_by_metadata(lora.metadata)
    bases = _bases_by_metadata(structure.recognised.bases, lora.metadata)
    if named is not None:
        kind = f"{named} LoRA" if PROVENANCE_KEY not in lora.metadata else f"merge with {named} in it"
    else:
        kind = "LoRA"
    return Identity(
        kind=kind,
        bases=bases,
        how="unknown" if named is None else "metadata",
        preset=named,
        published=None,
        structure=structure,
        expert=_expert(lora) if _OF_TWO_EXPERTS in bases else None,
        looks_like=_looks_like(lora),
    )


def half_by_name(name: str) -> Expert | None:
    """Which half of a model in two a file's name or title says; None if it says neither, or both."""
    stem = re.sub(r"\.(?:safetensors|sft|gguf|pt|ckpt)$", "", name[:_LONGEST_NAME], flags=re.I)
    for text, pattern in ((stem, _NOISE), (stem, _CAPITALS), (_BEHIND.sub("", stem), _LAST)):
        found = {next(filter(None, match.groups())).lower() for match in pattern.finditer(text)}
        if found:
            return None if len(found) > 1 else "high" if "high" in found else "low"
    return None


def worth_hashing(size: int, catalogue: Sequence[Published] = PUBLISHED) -> bool:
    """Whether a published file has this size; then its hash can be computed while the file is read."""
    return any(entry.may_have(size) for entry in catalogue)


def _published(
    lora: Lora,
    path: str | os.PathLike[str] | None,
    structure: Structure,
    catalogue: Sequence[Published],
    digest: Callable[[str | os.PathLike[str]], str],
) -> tuple[Published | None, How]:
    """The catalogue's row of a LoRA, and how it was found."""
    ours = any(key.startswith(OURS) for key in lora.metadata)
    if path is not None and not ours and _may_be_published(os.stat(path).st_size, structure, catalogue):
        value = digest(path)
        for entry in catalogue:
            if entry.sha256 == value:
                return entry, "sha256"
    named = _preset_by_metadata(lora.metadata)
    for entry in catalogue:
        # A LoRA of another method can be of the same shape; then its own words say more.
        if _has_structure_of(entry, structure) and named in (None, entry.preset):
            return entry, "structure"
    return None, "unknown"


def _may_be_published(size: int, structure: Structure, catalogue: Sequence[Published]) -> bool:
    """Whether a file may be a published one, by its size, or by its structure where nobody states the size."""
    for entry in catalogue:
        may = entry.may_have(size)
        if may or (may is None and structure.accelerates and entry.base in structure.recognised.bases):
            return True
    return False


def _has_structure_of(entry: Published, structure: Structure) -> bool:
    if entry.modules is None or entry.rank is None or entry.alpha is None:
        return False
    return (
        entry.modules == structure.modules
        and (entry.rank, entry.rank) == structure.ranks
        and (entry.alpha, entry.alpha) == structure.alphas
        and entry.parameters == structure.parameters
        and entry.base in structure.recognised.bases
    )


def _recognised(lora: Lora, shapes: Mapping[str, Shape]) -> Recognised:
    """shapes: canonical name -> shape."""
    found = recognise(_unet({lora.spellings[module]: shape for module, shape in shapes.items()}))
    if found.bases:
        return found
    blocks = by_blocks.recognise(shapes)
    return replace(found, bases=blocks.bases, branches=blocks.branches)


def _unet(shapes: Mapping[str, Shape]) -> dict[str, Shape]:
    bodies = zip(names.unet_bodies(shapes), (s for n, s in shapes.items() if n.startswith("lora_unet_")), strict=True)
    return dict(bodies)


def _bases_by_metadata(bases: tuple[str, ...], metadata: Mapping[str, str]) -> tuple[str, ...]:
    """What the modules leave open may be settled by what the file says."""
    for key in ("ss_base_model_version", ARCHITECTURE):
        for pattern, base in _BASE_WORDS:
            if pattern.search(metadata.get(key, "")) and (base in bases or not bases):
                return (base,)
    return bases


def _preset_by_metadata(metadata: Mapping[str, str]) -> str | None:
    if preset := metadata.get(PRESET_KEY):
        return preset
    words = [metadata.get("modelspec.title", ""), metadata.get("ss_output_name", "")]
    try:
        inputs = merged_inputs(metadata)
    except ValueError:
        inputs = []  # somebody else's notes under our key
    words += [name for name, strength in inputs if strength != 0] or [metadata.get(MERGED_FROM, "")]
    words = [word[:_LONGEST_LIST] for word in words]
    for pattern, preset in _WORDS:
        if any(pattern.search(word) for word in words):
            return preset
    return None


def _names(lora: Lora) -> list[tuple[str, str]]:
    """(what a LoRA is called, where that stands)."""
    found = [(lora.metadata.get(key, ""), key) for key in ("modelspec.title", "ss_output_name")]
    return [(name[:_LONGEST_NAME], where) for name, where in [(lora.source, "file name"), *found]]


def _expert(lora: Lora) -> Half | None:
    for name, source in _names(lora):
        if (half := half_by_name(name)) is not None:
            return Half(half, source)
    return None


def _looks_like(lora: Lora) -> str | None:
    found = (_LOOKS.search(name) for name, _ in _names(lora))
    return next((match[1] for match in found if match), None)


def _span(values: Sequence[Number]) -> tuple[Number, Number] | None:
    return (min(values), max(values)) if values else None
