"""Which modules of several LoRAs are the same module."""

from __future__ import annotations

from collections.abc import Sequence

from . import names, unet
from .layer import meeting_shape
from .lora import Lora
from .unet import Layout


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
    )


def _clashes(loras: Sequence[Lora]) -> list[str]:
    """One sentence for each module whose updates cannot be of the same weight."""
    found: dict[str, str] = {}
    first: dict[str, Lora] = {}
    for lora in loras:
        for module, layer in lora.modules.items():
            other = first.setdefault(module, lora)
            if meeting_shape(other.modules[module].shape, layer.shape) is None:
                found.setdefault(
                    module,
                    f"{lora.spellings[module]}: {other.source} updates a weight of shape "
                    f"{other.modules[module].shape}, {lora.source} one of shape {layer.shape}",
                )
    dense: dict[tuple[str, str], Lora] = {}
    for lora in loras:
        for key, diff in lora.diffs.items():
            known = dense.setdefault(key, lora)
            if known.diffs[key].shape != diff.shape:
                found.setdefault(
                    key[0],
                    f"{lora.spellings[key[0]]}.{key[1]}: {known.source} has shape {tuple(known.diffs[key].shape)}, "
                    f"{lora.source} {tuple(diff.shape)}",
                )
    return [found[module] for module in sorted(found)]


def _sources(loras: Sequence[Lora]) -> str:
    return " and ".join(dict.fromkeys(lora.source for lora in loras))
