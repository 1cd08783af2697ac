"""Which modules of several LoRAs are the same module."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from ..files.lora import Lora
from ..files.one_naming import Renaming, are_read, family_of_loras, in_own_naming, renamed
from ..files.twice import Named, Pair, pairs_text, slices, twice, undecided
from ..naming import encoders, names, unet
from ..naming.aliases import behind_one_prefix, text_encoder
from ..naming.unet import Layout
from ..updates.layer import shape_of_both
from ..words import many


def unify(loras: Sequence[Lora]) -> list[Lora]:
    """The LoRAs with canonical names that agree with one another.

    Alone, a small LoRA may not show how many residual blocks a level its UNet has; all together know more, and when
    their block namings differ, the candidates are tried in the order of `unet.possible_res_blocks` until the
    weights that meet have the same shapes. Where all use one naming nothing depends on it.
    Raises ValueError if modules that meet have different shapes, if one LoRA has the same module twice, and if two name
    one weight differently, or may do so, as far as can be told: the result would hold it twice.
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
            return _in_one_naming(renamed)
    renamed = [_rename(lora, unet.infer_layout(bodies)) for lora in loras]
    if clashes := _clashes(renamed):
        more = f" ({many(len(clashes) - 1, 'more modules differ', 'more module differs')})" if len(clashes) > 1 else ""
        raise ValueError(f"{clashes[0]}{more}; they were made for different base models, so merge LoRAs of one base.")
    return _in_one_naming(renamed)


def _in_one_naming(loras: list[Lora]) -> list[Lora]:
    """The LoRAs, translated into the naming of their model where they name one weight differently, as a whole and in
    slices, or as ComfyUI does not read it, and all is known.

    Raises ValueError if two still name one weight differently, or may do so.
    """
    loras = _in_one_encoder(loras)
    updates = _updates(loras)
    if twice(updates) or slices(updates) or not are_read(loras):
        if (same := in_own_naming(loras)) is not None and not twice(_updates(same)) and not _clashes(same):
            loras = same
    _check_one_naming(loras)
    return loras


def _in_one_encoder(loras: list[Lora]) -> list[Lora]:
    """The LoRAs with one name for each module of a text encoder, where their names tell that they mean the same one."""
    same = encoders.aligned(spelling for lora in loras for spelling in lora.spellings.values())
    if not same:
        return loras
    made = []
    for lora in loras:
        new = {module: names.canonical(same[s], Layout()) for module, s in lora.spellings.items() if s in same}
        own = {new[module]: same[s] for module, s in lora.spellings.items() if s in same}
        one = renamed(lora, Renaming(new, frozenset()))
        made.append(replace(one, spellings={module: own.get(module, s) for module, s in one.spellings.items()}))
    return made


def _updates(loras: Sequence[Lora]) -> list[Named]:
    return [named for index, lora in enumerate(loras) for named in lora.named(index)]


def _check_one_naming(loras: Sequence[Lora]) -> None:
    updates = _updates(loras)
    sources = [lora.source for lora in loras]
    if pairs := twice(updates):
        names_them = "are, or may be, two spellings of one weight, and a loader would use only one of the two updates"
    elif (pair := undecided(updates)) is not None:
        pairs = [pair]
        names_them = (
            "are names of two kinds, and nothing here tells whether they are of one weight; if they are, a loader would "
            "use only one of the two updates"
        )
    else:
        return
    raise ValueError(
        f"{_sources(loras)} spell their modules differently: {pairs_text(pairs, sources)} {names_them}. Use files of one "
        "spelling (convert one of them), connect the model that they are for to the node, or apply the LoRAs one after the "
        "other, each in a loader of its own."
    )


def fused_with_slices(loras: Sequence[Lora]) -> list[Pair]:
    """Modules of two LoRAs of which one is a slice of the other's weight (q beside qkv): ComfyUI adds up both, exactly,
    but they never meet here."""
    return slices(_updates(loras))


def names_for_draws(loras: Sequence[Lora]) -> dict[str, str]:
    """Module of the model -> the name that its weight has in every spelling of the LoRAs, as far as their family is known: a
    canonical name tells the weights of one merge apart and may be another in the next, of files of other names."""
    family = family_of_loras(loras)
    found = {}
    for one in _updates(loras):
        if text_encoder(one.spelling) is None and not one.is_bias:
            turned = family.turn(one.canonical, one.shape) if family and one.shape else None
            own = turned or (family and family.own(one.canonical)) or one.canonical
            found[one.canonical] = behind_one_prefix(own)
    return found


def _rename(lora: Lora, layout: Layout) -> Lora:
    # Spellings that `tidy` replaced by canonical ones give the same name again: to_ldm leaves ldm names alone.
    new = {old: names.canonical(spelling, layout) for old, spelling in lora.spellings.items()}
    if len(set(new.values())) < len(new):
        raise ValueError(f"{lora.source}: two of its modules are one module beside the other LoRAs' names.")
    return Lora(
        modules={new[module]: layer for module, layer in lora.modules.items()},
        diffs={(new[module], part): diff for (module, part), diff in lora.diffs.items()},
        spellings={new[module]: spelling for module, spelling in lora.spellings.items()},
        metadata=lora.metadata,
        source=lora.source,
        carried={new[module]: update for module, update in lora.carried.items()},
        keys=lora.keys,
    )


def _clashes(loras: Sequence[Lora]) -> list[str]:
    """One sentence for each module whose updates cannot be of the same weight."""
    found: dict[str, str] = {}
    # Module, and weight or bias -> the first LoRA that changes it and the shape there.
    first: dict[tuple[str, bool], tuple[Lora, tuple[int, ...]]] = {}
    for lora in loras:
        for module, is_bias, shape in lora.shapes():
            other, known = first.setdefault((module, is_bias), (lora, shape))
            if shape_of_both(known, shape) is None:
                what = f"{lora.spellings[module]}{' (bias)' if is_bias else ''}"
                found.setdefault(
                    module,
                    f"{what}: {other.source} updates a weight of shape {known}, {lora.source} one of shape {shape}",
                )
    return [found[module] for module in sorted(found)]


def _sources(loras: Sequence[Lora]) -> str:
    return " and ".join(dict.fromkeys(lora.source for lora in loras))
