"""Prompts of several pictures as one CONDITIONING, so that they are sampled together."""

from collections.abc import Sequence

import comfy.model_management
import comfy.sampler_helpers
import comfy.samplers
import torch


def chunks(model, prompts: Sequence[tuple], empty: torch.Tensor, size: int) -> list[list[int]]:
    """Places of prompts that may be sampled together, at most `size` of them each; all places once.

    prompts: (entry of positive, entry of negative) for each picture.   empty: (1, ...) latent of the size.
    """
    groups: dict[tuple, list[int]] = {}
    for place, pair in enumerate(prompts):
        groups.setdefault(tuple(map(_kind, pair)), []).append(place)
    found: list[list[int]] = []
    for places in groups.values():
        for alike in _joinable(model, prompts, places, empty):
            found += [alike[first : first + size] for first in range(0, len(alike), size)]
    return sorted(found)


def joined(entries: Sequence) -> list:
    """One entry for as many pictures as there are entries, which are of one kind."""
    if all(entry is entries[0] for entry in entries):
        return entries[0]
    options = entries[0][1]
    rows = [entry[1] for entry in entries]
    more = {
        name: torch.cat([row[name] for row in rows])
        for name, value in options.items()
        if isinstance(value, torch.Tensor)
    }
    return [torch.cat([entry[0] for entry in entries]), options | more]


def _kind(entry) -> tuple:
    """Equal for entries that may become one: the same sizes, and nothing but rows to tell them apart."""
    tensor, options = entry
    kinds = [("", tuple(tensor.shape), tensor.dtype)]
    for name, value in sorted(options.items()):
        if isinstance(value, torch.Tensor):
            kinds.append((name, tuple(value.shape), value.dtype))
        elif isinstance(value, (str, int, float, bool, type(None))):
            kinds.append((name, repr(value)))
        else:
            return ("alone", id(entry))
    one_row = all(kind[1][:1] == (1,) for kind in kinds if len(kind) == 3)
    return tuple(kinds) if one_row else ("alone", id(entry))


def _joinable(model, prompts: Sequence[tuple], places: list[int], empty: torch.Tensor) -> list[list[int]]:
    """These places as they are if the model makes of two joined prompts what it makes of each, else prompt by prompt.

    Some count the words of all rows together, for one.
    """
    apart: dict[tuple, list[int]] = {}
    for place in places:
        apart.setdefault(tuple(map(id, prompts[place])), []).append(place)
    if len(apart) == 1:
        return [places]
    two = [prompts[alike[0]] for alike in apart.values()][:2]
    comfy.model_management.load_models_gpu([model])
    for pair, kind in zip(zip(*two, strict=True), ("positive", "negative"), strict=True):
        together = _encoded(model, joined(pair), empty, kind, 2)
        single = [_encoded(model, entry, empty, kind, 1) for entry in pair]
        if together.keys() != single[0].keys() or not all(
            _same(value.cond, [one[name].cond for one in single]) for name, value in together.items()
        ):
            return [*apart.values()]
    return [places]


def _encoded(model, entry, empty: torch.Tensor, kind: str, count: int) -> dict:
    device = model.load_device
    like = empty.to(device).repeat(count, *[1] * (empty.ndim - 1))
    conds = comfy.samplers.encode_model_conds(
        model.model.extra_conds, comfy.sampler_helpers.convert_cond([entry]), like, device, kind, latent_image=like,
        denoise_mask=None,
    )  # fmt: skip
    return {
        name: value.process_cond(batch_size=count, area=None, device=device)
        for name, value in conds[0]["model_conds"].items()
    }


def _same(together, single: list) -> bool:
    if isinstance(together, torch.Tensor):
        return all(one.shape[1:] == together.shape[1:] for one in single) and torch.equal(together, torch.cat(single))
    if isinstance(together, list):
        return all(_same(part, list(parts)) for part, *parts in zip(together, *single, strict=True))
    return all(one == together for one in single)
