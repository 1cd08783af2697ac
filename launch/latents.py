"""Pictures on disk as latents: checked before anything is encoded, encoded once, kept as they are made."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor
from tqdm import tqdm  # type: ignore[import-untyped]

from ..distillation.kept import Kept, key_of
from .data import Picture
from .pixels import check, content_of
from .views import View

# Pictures handed to the VAE; ComfyUI makes that as few as fit. Not --batch: latents differ with it in their last digits.
AT_ONCE = 8

Encode = Callable[[Tensor], Tensor]
"""(n, height, width, 3) in [0, 1] -> (n, ...) latents, as the graph has them."""


def keys_of(views: Sequence[View], vae: str) -> list[str]:
    """Under which name each view's latent is kept: made of the picture's bytes, not of its name. vae: its identity."""
    contents: dict[Picture, str] = {}
    for view in views:
        if view.picture not in contents:
            contents[view.picture] = _digest(view.picture)
    return [key_of("latent", vae, contents[v.picture], v.width, v.height, v.across, v.down, v.mirrored) for v in views]


def _digest(picture: Picture) -> str:
    try:
        return hashlib.sha256(content_of(picture)).hexdigest()
    except OSError:
        return ""  # the check says why


def broken_pictures(views: Sequence[View], keys: Sequence[str], kept: Kept) -> dict[Picture, str]:
    """Picture -> why it cannot be read, of those that are to be encoded still."""
    ahead = dict.fromkeys(view.picture for view, key in zip(views, keys, strict=True) if key not in kept)
    bar = tqdm(ahead, desc="Checking pictures", leave=False, disable=not ahead)
    return {picture: reason for picture in bar if (reason := check(picture))}


def latents_of(views: Sequence[View], keys: Sequence[str], encode: Encode, kept: Kept) -> list[Tensor]:
    """One (1, ...) latent for each view. Each chunk that is encoded is kept before the next one is begun."""
    with tqdm(total=len(views), desc="Encoding pictures") as bar:
        for chunk in _chunks(views):
            if missing := [place for place in dict.fromkeys(chunk) if keys[place] not in kept]:
                latents = encode(torch.stack([views[place].pixels() for place in missing])).float().cpu()
                kept.add({keys[p]: {"latent": one} for p, one in zip(missing, torch.split(latents, 1), strict=True)})
            bar.update(len(chunk))
    found = kept.get(keys)
    return [found[key]["latent"] for key in keys]


def _chunks(views: Sequence[View]) -> Iterator[list[int]]:
    """Places of views of one size, AT_ONCE together. The same for the same views, however far a run came before."""
    sizes: dict[tuple[int, int], list[int]] = {}
    for place, view in enumerate(views):
        sizes.setdefault((view.width, view.height), []).append(place)
    for places in sizes.values():
        yield from (places[first : first + AT_ONCE] for first in range(0, len(places), AT_ONCE))
