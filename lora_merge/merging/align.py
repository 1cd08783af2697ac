"""Which modules of several LoRAs are the same module."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from ..files.keys import BIAS_PARTS
from ..files.lora import Lora
from ..naming import names, unet
from ..naming.unet import Layout
from ..updates.layer import meeting_shape


def unify(loras: Sequence[Lora]) -> list[Lora]:
    """The LoRAs with canonical names that agree with one another.

    Alone, a small LoRA may not show how many residual blocks a level its UNet has; all together know more, and when
    their block namings differ, the candidates are tried in the order of `unet.possible_res_blocks` until the
    weights that meet have the same shapes. Where all use one naming nothing depends on it.
    Raises ValueError if modules that meet have different shapes, or one LoRA has the same module twice.
    """
    bodies = names.unet_bodies(name for lora in loras for name in lora.spellings.values())
    mixed = any(map(unet.is_diffusers, bodies)) and any(map(unet.is_ldm, bodies))
    candidates = unet.possible_res_blocks(bodies)
    if mixed and not candidates:
        raise ValueError(
            f"{_sources(loras)}: their block names cannot belong to one UNet; they were made for different base models."
        )
    for res_blocks in candidates if mixed else candidates[:1]:
        renamed = [_rename(lora, unet.infer_layout(bodies, res_blocks)) for lora in loras]
        if not _clashes(renamed):
            return renamed
    renamed = [_rename(lora, unet.infer_layout(bodies)) for lora in loras]
    if clashes := _clashes(renamed):
        more = f" ({len(clashes) - 1} more modules differ)" if len(clashes) > 1 else ""
        raise ValueError(f"{clashes[0]}{more}; they were made for different base models, so merge LoRAs of one base.")
    return renamed


def _rename(lora: Lora, layout: Layout) -> Lora:
    # Spellings that `tidy` replaced by canonical ones give the same name again: to_ldm leaves ldm names alone.
    new = {old: names.canonical(spelling, layout) for old, spelling in lora.spellings.items()}
    if len(set(new.values())) < len(new):
        raise ValueError(f"{lora.source}: two of its modules are one module beside the other LoRAs' names.")
    return Lora(
        {new[module]: layer for module, layer in lora.modules.items()},
        {(new[module], part): diff for (module, part), diff in lora.diffs.items()},
        {new[module]: spelling for module, spelling in lora.spellings.items()},
        lora.metadata,
        lora.source,
        {new[module]: update for module, update in lora.carried.items()},
        lora.keys,
    )


def _clashes(loras: Sequence[Lora]) -> list[str]:
    """One sentence for each module whose updates cannot be of the same weight."""
    found: dict[str, str] = {}
    # Module, and weight or bias -> the first LoRA that changes it and the shape there.
    first: dict[tuple[str, bool], tuple[Lora, tuple[int, ...]]] = {}
    for lora in loras:
        for module, is_bias, shape in _shapes(lora):
            other, known = first.setdefault((module, is_bias), (lora, shape))
            if meeting_shape(known, shape) is None:
                what = f"{lora.spellings[module]}{' (bias)' if is_bias else ''}"
                found.setdefault(
                    module,
                    f"{what}: {other.source} updates a weight of shape {known}, {lora.source} one of shape {shape}",
                )
    return [found[module] for module in sorted(found)]


def _shapes(lora: Lora) -> Iterator[tuple[str, bool, tuple[int, ...]]]:
    """(module, whether it is the bias, shape) of every update that adds up."""
    for module, layer in lora.modules.items():
        yield module, False, layer.shape
    for (module, part), diff in lora.diffs.items():
        yield module, part in BIAS_PARTS, tuple(diff.shape)


def _sources(loras: Sequence[Lora]) -> str:
    return " and ".join(dict.fromkeys(lora.source for lora in loras))
