"""Conditionings and latents of the graph as items to train on, and the batches they make."""

import hashlib
import inspect
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import comfy.sampler_helpers
import comfy.samplers
import torch

from ...distillation.draws import DROPPED, ORDER, WHOLE_RUN, generator, shuffled
from ...distillation.objective import Batch
from ...lora_merge.words import many
from ..sampling.latents import fitted

logger = logging.getLogger(__name__)

# What apply_model hands to every network by name.
GIVEN = {"context", "control", "transformer_options"}
# What a conditioning may hold that says more than "this prompt for the whole picture at all times".
UNSUPPORTED = {
    "area": "an area", "mask": "a mask", "control": "a ControlNet", "gligen": "GLIGEN boxes", "hooks": "hooks",
    "start_percent": "a timestep range", "end_percent": "a timestep range", "default": "a default",
}  # fmt: skip


@dataclass(frozen=True)
class Item:
    """latent: (1, ...), as the network sees it, on the CPU.   cond, uncond: name -> comfy.conds object of one row."""

    latent: torch.Tensor
    cond: dict
    uncond: dict


@dataclass(frozen=True)
class Rows:
    """values: arguments of apply_model, one row an image.   parts: what they are, in order: 0 cond, 1 uncond."""

    values: dict
    parts: tuple[int, ...]


def entries(conditionings: Sequence[list], name: str) -> list:
    """All entries of one or many CONDITIONINGs. Raises ValueError for none, and for what training has no place for."""
    found = [entry for conditioning in conditionings for entry in conditioning]
    if not found:
        raise ValueError(f"{name} is empty; connect a CLIP Text Encode.")
    for number, (_, options) in enumerate(found, start=1):
        wrong = sorted({words for key, words in UNSUPPORTED.items() if options.get(key) is not None})
        if options.get("strength", 1.0) != 1.0:
            wrong.append("a strength other than 1")
        if wrong:
            raise ValueError(
                f"{name}, entry {number} of {len(found)}, has {', '.join(wrong)}. The LoRA learns whole pictures from "
                "whole prompts; connect the text encoder directly."
            )
    return found


def encoded(patcher, conditioning: list, like: torch.Tensor, kind: str, known: dict | None = None) -> list[dict]:
    """What apply_model takes for each entry of a CONDITIONING, one row each, on the CPU.

    The model's own extra_conds does it, so SDXL's pooled text and sizes, guidance and the like come along.
    like: (1, ...) latent of the size to train at.   kind: "positive" or "negative".   known: what was encoded before,
    for this call to add to; equal tensors are in memory once, as those of one caption with many size labels.
    Raises ValueError if the network asks for more than these conditionings have.
    """
    known = {} if known is None else known
    device = patcher.load_device
    conds = comfy.sampler_helpers.convert_cond(conditioning)
    like = like.to(device)
    conds = comfy.samplers.encode_model_conds(
        patcher.model.extra_conds, conds, torch.zeros_like(like), device, kind, latent_image=like, denoise_mask=None
    )
    for cond in conds:
        _check_complete(patcher.model, cond["model_conds"], kind)
    return [
        {
            name: _once(moved(value.process_cond(batch_size=1, area=None, device=device), "cpu"), known)
            for name, value in cond["model_conds"].items()
        }
        for cond in conds
    ]


def _check_complete(model, cond: Mapping, kind: str) -> None:
    """Raises ValueError if the network cannot be called without something that the conditioning lacks."""
    parameters = [*inspect.signature(type(model.diffusion_model).forward).parameters.values()][3:]  # self, x, timestep
    asked = [p.name for p in parameters if p.default is p.empty and p.kind is p.POSITIONAL_OR_KEYWORD]
    if missing := [name for name in asked if name not in GIVEN and name not in cond]:
        raise ValueError(
            f"{kind} has no {' and no '.join(missing)}, which this model ({type(model.model_config).__name__}) asks for beside "
            "the text. The text encoder that belongs to the model adds it: choose the model's own type on CLIP Loader, and "
            "connect CLIP Text Encode directly."
        )


def moved(cond, device):
    """A comfy.conds object on another device. Always copied: what the graph holds are inference tensors."""
    value = cond.cond
    if isinstance(value, torch.Tensor):
        return cond._copy_with(value.to(device, copy=True))
    if isinstance(value, list):
        return cond._copy_with(
            [part.to(device, copy=True) if isinstance(part, torch.Tensor) else part for part in value]
        )
    return cond


def _once(cond, known: dict):
    if not isinstance(cond.cond, torch.Tensor):
        return cond
    return cond._copy_with(known.setdefault((type(cond), fingerprint(cond.cond)), cond).cond)


def fingerprint(*parts) -> str:
    """Changes with any tensor or text in `parts`, which may be lists and dicts of such."""
    digest = hashlib.sha256()
    _feed(digest, parts)
    return digest.hexdigest()[:16]


def _feed(digest, part) -> None:
    if isinstance(part, torch.Tensor):
        digest.update(str((part.dtype, tuple(part.shape))).encode())
        digest.update(part.detach().to("cpu", copy=True).contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    elif isinstance(part, dict):
        _feed(digest, sorted(part.items()))
    elif isinstance(part, (list, tuple)):
        for one in part:
            _feed(digest, one)
    elif hasattr(part, "cond"):
        _feed(digest, part.cond)
    else:
        digest.update(repr(part).encode())


def whole(model, latent: dict) -> torch.Tensor:
    """The samples of a LATENT, fit for this MODEL. Raises ValueError for several in one, as of picture and sound."""
    samples = fitted(model, latent)["samples"]
    if samples.is_nested:
        raise ValueError(
            f"latent has {many(len(samples.unbind()), 'parts')} in one, such as picture and sound, and only whole pictures or clips are "
            "learnt. This kind of model cannot be distilled here."
        )
    return samples


def pictures(model, latents: Sequence[dict]) -> list[torch.Tensor]:
    """The pictures of one or many LATENTs, each (1, ...) and as the graph has them. Empty if they are all empty."""
    found = []
    for latent in latents:
        samples = whole(model, latent)
        if "noise_mask" in latent:
            logger.warning("A latent has a noise mask; it is not used, the LoRA learns from whole pictures.")
        found += [sample.float().cpu() for sample in samples.split(1)]
    return found if any(bool(sample.count_nonzero()) for sample in found) else []


def paired(conditioning: list, count: int) -> list[int]:
    """Which entry belongs to each of `count` pictures. Raises ValueError unless there is one for all or one for each."""
    if len(conditioning) == 1:
        return [0] * count
    if len(conditioning) != count:
        raise ValueError(
            f"positive has {many(len(conditioning), 'prompts')}, but there are {many(count, 'pictures')}. Give one prompt for all, or one "
            "for each picture in the same order."
        )
    return list(range(count))


def partners(conditioning: list, unconditional: list, which: list[int]) -> list[int]:
    """Which entry of negative goes with each of these of positive. Raises ValueError unless they are one or as many."""
    if len(unconditional) == 1:
        return [0] * len(which)
    if len(unconditional) != len(conditioning):
        raise ValueError(
            f"negative has {many(len(unconditional), 'prompts')} and positive {len(conditioning)}. Give one negative prompt for "
            "all, or one for each positive in the same order."
        )
    return list(which)


class Batches:
    """A distillation.trainer.Source: goes through all items in a new order each time.

    Items of different size, or whose conditionings cannot be joined, never meet in a batch: each step takes one kind.
    per_step: items that one optimizer step takes.   dropout: share of them that have their uncond for a cond, too.
    Raises ValueError if that is above 0 and they cannot be joined.
    """

    def __init__(
        self, items: Sequence[Item], *, seed: int, per_step: int, device: torch.device, dropout: float = 0.0
    ) -> None:
        self.items, self.seed, self.per_step, self.device, self.dropout = list(items), seed, per_step, device, dropout
        if dropout and not all(comfy.samplers.cond_equal_size(item.cond, item.uncond) for item in self.items):
            raise ValueError(
                f"caption_dropout is {dropout:g}, but a positive prompt is of another length than the negative one, so that "
                "they cannot be in one batch. Set it to 0, or write prompts of the same length."
            )
        self.kinds: list[list[int]] = []
        for number, item in enumerate(self.items):
            for kind in self.kinds:
                if _alike(item, self.items[kind[0]]):
                    kind.append(number)
                    break
            else:
                self.kinds.append([number])

    def __call__(self, step: int, numbers: Sequence[int]) -> Batch:
        indices = self.chosen(step, numbers)
        if not self.dropout:
            return self.batch(indices)
        return self.batch(indices, [self.drops(step, number) for number in numbers])

    def drops(self, step: int, number: int) -> bool:
        """Whether the item for this place of a step is learnt without its prompt."""
        draw = torch.rand((), generator=generator(self.seed, step, number, DROPPED), dtype=torch.float64)
        return float(draw) < self.dropout

    def chosen(self, step: int, numbers: Sequence[int]) -> list[int]:
        """Indices of the items for these places of a step."""
        if len(self.kinds) == 1:
            first = step * self.per_step
            return [shuffled(self.seed, len(self.items), first + number) for number in numbers]
        # A kind as often as it has items.
        place = int(torch.randint(len(self.items), (), generator=generator(self.seed, step, WHOLE_RUN, ORDER)))
        kind = next(kind for kind in self.kinds if (place := place - len(kind)) < 0)
        draws = [
            torch.randint(len(kind), (), generator=generator(self.seed, step, number, ORDER)) for number in numbers
        ]
        return [kind[int(draw)] for draw in draws]

    def batch(self, indices: Sequence[int], dropped: Sequence[bool] = ()) -> Batch:
        """These items, joined, on the device. dropped: which of them are without their prompt; none if not given."""
        items = [self.items[index] for index in indices]
        unconds = [item.uncond for item in items]
        drops = dropped or [False] * len(items)
        conds = [item.uncond if drop else item.cond for item, drop in zip(items, drops, strict=True)]
        both = None
        if comfy.samplers.cond_equal_size(conds[0], unconds[0]):
            both = self._joined([*conds, *unconds], 0, 1)
        z0 = torch.cat([item.latent for item in items]).to(self.device)
        return Batch(z0, self._joined(conds, 0), self._joined(unconds, 1), both)

    def alone(self, likes: Sequence[Item], conds: Sequence[dict]) -> list[Batch]:
        """A batch for each of these conds, with the size and the uncond of the item beside it."""
        return [
            Batch(like.latent.to(self.device), self._joined([cond], 0), self._joined([like.uncond], 1))
            for like, cond in zip(likes, conds, strict=True)
        ]

    def _joined(self, conds: list[dict], *parts: int) -> Rows:
        rows = [{name: moved(value, self.device) for name, value in cond.items()} for cond in conds]
        return Rows(comfy.samplers.cond_cat(rows), parts)


def _alike(one: Item, other: Item) -> bool:
    return (
        one.latent.shape == other.latent.shape
        and comfy.samplers.cond_equal_size(one.cond, other.cond)
        and comfy.samplers.cond_equal_size(one.uncond, other.uncond)
    )
