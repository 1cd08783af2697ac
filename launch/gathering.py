"""What a run of the command line learns from: captions and pictures, checked, encoded and kept."""

from __future__ import annotations

import argparse
import dataclasses
import logging
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from torch import Tensor
from tqdm import tqdm  # type: ignore[import-untyped]

from ..distillation.kept import Kept
from ..distillation.settings import Settings, Setup
from .data import Picture, captions_of, find_pictures, read_captions
from .latents import broken_pictures, keys_of, latents_of
from .report import Looked, broken_words
from .texts import entries_of, zeros
from .views import View, size_of, views_of

logger = logging.getLogger(__name__)

Sizes = Mapping[Picture, "tuple[int, int] | None"]


@dataclasses.dataclass(frozen=True)
class Texts:
    """What there is to learn, as text. captions: all different ones.   which: of them, the one of each picture.

    pictures: empty where the model makes its own.   shown: prompts of the samples.
    """

    captions: list[str]
    which: list[int]
    pictures: list[Picture]
    shown: list[str]


@dataclasses.dataclass(frozen=True)
class Data:
    """What Work takes.   shown: entries to make samples of.   names: captions of these, or of the pictures if there are none.
    looked: what became of the pictures that were given, None where the model makes its own."""

    latents: list[Tensor]
    conds: list[Any]
    unconds: list[Any]
    prompts: list[tuple[int, int]]
    shown: list[Any]
    names: list[str]
    looked: Looked | None


def texts_asked(options: argparse.Namespace) -> Texts:
    """Raises ValueError or OSError for captions and pictures that are not there or do not go together."""
    captions = None if options.prompts is None else read_captions(options.prompts)
    pictures = find_pictures(options.pictures)
    shown = [] if options.validation is None else read_captions(options.validation)
    if pictures:
        return _texts(captions_of(pictures, captions), pictures, shown)
    assert captions is not None
    return _texts([captions[number % len(captions)] for number in range(options.samples)], pictures, shown)


def _texts(wanted: Sequence[str], pictures: list[Picture], shown: list[str]) -> Texts:
    different = list(dict.fromkeys(wanted))
    places = {caption: place for place, caption in enumerate(different)}
    return Texts(different, [places[caption] for caption in wanted], pictures, shown)


def encoded(clip: Any, text: str) -> Any:
    """The one entry of the CONDITIONING that CLIPTextEncode makes."""
    return clip.encode_from_tokens_scheduled(clip.tokenize(text))[0]


def gathered(
    options: argparse.Namespace,
    setup: Setup,
    settings: Settings,
    texts: Texts,
    model: Any,
    clip: Any,
    vae: Any,
    kept: Kept,
) -> Data:
    """Everything to learn from. What is encoded or made is kept as soon as it is there.

    Raises ValueError for pictures that cannot be read, all of them named before any is encoded.
    """
    from ..host.training.identity import identity_of

    encoder = f"{identity_of(clip.patcher)} {clip.layer_idx}"

    def entries(captions: Sequence[str]) -> list[Any]:
        return entries_of(captions, lambda text: encoded(clip, text), encoder, kept)

    def uncond(conds: Sequence[Any]) -> Any:
        return zeros(conds[0]) if options.zero_negative else entries([options.negative])[0]

    if texts.pictures:
        if vae is None:
            raise ValueError(f"{options.checkpoint} has no VAE to encode pictures with; give one by --vae.")
        sizes = {picture: size_of(picture) for picture in texts.pictures}
        views, keys, texts, looked = _readable(options, setup, settings, texts, sizes, identity_of(vae.patcher), kept)
        conds = entries(texts.captions)
        latents = _of_pictures(model, latents_of(views, keys, vae.encode, kept))
        which = [place for place in texts.which for _ in range(setup.repeats)]
        labels = [view.label(sizes[view.picture] or (0, 0)) for view in views] if _is_labelled(model, setup) else []
        conds, unconds, prompts = _labelled(conds, uncond(conds), which, labels)
    else:
        conds, which, looked = entries(texts.captions), texts.which, None
        conds, unconds, prompts = _labelled(conds, uncond(conds), which, [])
        latents = _of_the_model(setup, settings, model, [(conds[place], unconds[0]) for place in which], kept)
    return Data(
        latents=latents, conds=conds, unconds=unconds, prompts=prompts, shown=entries(texts.shown),
        names=texts.shown or [texts.captions[place] for place in which], looked=looked,
    )  # fmt: skip


def _readable(
    options: argparse.Namespace, setup: Setup, settings: Settings, texts: Texts, sizes: Sizes, vae: str, kept: Kept
) -> tuple[list[View], list[str], Texts, Looked]:
    """(views, their keys, texts, what became of all) of the pictures that can be read.

    Raises ValueError that names the others, if they are not to be left out.
    """
    views = views_of(texts.pictures, sizes, setup, settings.seed)
    keys = keys_of(views, vae)
    broken = broken_pictures(views, keys, kept)
    count = len(texts.pictures)
    if broken:
        said = broken_words(broken, count)
        if not options.leave_out_broken or len(broken) == count:
            raise ValueError(f"{said} Mend or remove them, or leave them out by --leave-out-broken.")
        logger.warning("%s They are left out.", said)
        whole = [place for place, picture in enumerate(texts.pictures) if picture not in broken]
        wanted = [texts.captions[texts.which[place]] for place in whole]
        texts = _texts(wanted, [texts.pictures[place] for place in whole], texts.shown)
        rest = [place for place, view in enumerate(views) if view.picture not in broken]
        views, keys = [views[place] for place in rest], [keys[place] for place in rest]
    enlarged = {view.picture for view in views if _is_small(view, sizes)}
    looked = Looked(given=count, broken=broken, enlarged=enlarged, left=len(texts.pictures))
    return views, keys, texts, looked


def _is_small(view: View, sizes: Sizes) -> bool:
    size = sizes[view.picture]
    return size is not None and (size[0] < view.width or size[1] < view.height)


def _is_labelled(model: Any, setup: Setup) -> bool:
    import comfy.model_base  # type: ignore[import-not-found]

    return setup.size_labels and isinstance(model.model, comfy.model_base.SDXL)


def _labelled(
    conds: list[Any], uncond: Any, which: Sequence[int], labels: Sequence[Mapping[str, int]]
) -> tuple[list[Any], list[Any], list[tuple[int, int]]]:
    """(conds, unconds, prompts) in which each picture's prompts carry its label. labels: none at all, or one each."""
    if not labels:
        return conds, [uncond], [(place, 0) for place in which]
    texts = {(place, *label.values()): None for place, label in zip(which, labels, strict=True)}
    nothings = {(*label.values(),): None for label in labels}
    names = [*labels[0]]
    places, no_places = ({key: number for number, key in enumerate(keys)} for keys in (texts, nothings))
    return (
        [[conds[place][0], conds[place][1] | dict(zip(names, values, strict=True))] for place, *values in texts],
        [[uncond[0], uncond[1] | dict(zip(names, values, strict=True))] for values in nothings],
        [
            (places[(place, *label.values())], no_places[(*label.values(),)])
            for place, label in zip(which, labels, strict=True)
        ],
    )


def _of_pictures(model: Any, latents: Sequence[Tensor]) -> list[Tensor]:
    from ..host.training.data import pictures as as_pictures

    found: list[Tensor] = as_pictures(model, [{"samples": one} for one in latents])
    if not found:
        raise ValueError("the VAE makes nothing of these pictures (all latents are 0); is it the one of this model?")
    return found


def _of_the_model(
    setup: Setup, settings: Settings, model: Any, prompts: Sequence[tuple[Any, Any]], kept: Kept
) -> list[Tensor]:
    from ..host.training.run import empty_latent
    from ..host.training.teacher_pictures import teachers_pictures

    empty = empty_latent(model, [], setup.width, setup.height)
    with _one_bar("Making pictures", len(prompts)):
        found: list[Tensor] = teachers_pictures(model, prompts, empty, settings, kept)
    return found


@contextmanager
def _one_bar(title: str, total: int) -> Iterator[None]:
    """ComfyUI's progress as one bar for all, in place of one for every call of a sampler."""
    import comfy.utils  # type: ignore[import-not-found]

    enabled, hook = comfy.utils.PROGRESS_BAR_ENABLED, comfy.utils.PROGRESS_BAR_HOOK
    with tqdm(total=total, desc=title, disable=not enabled) as bar:
        comfy.utils.set_progress_bar_enabled(False)
        comfy.utils.set_progress_bar_global_hook(lambda value, *_, **__: bar.update(value - bar.n))
        try:
            yield
        finally:
            comfy.utils.set_progress_bar_enabled(enabled)
            comfy.utils.set_progress_bar_global_hook(hook)
