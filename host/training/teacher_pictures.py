"""Data without pictures: the MODEL's own, made by ComfyUI's sampler, once."""

from collections.abc import Callable, Sequence

import comfy.model_management
import comfy.model_sampling
import comfy.sample
import comfy.utils
import torch

from ...distillation.draws import SAMPLES, generator
from ...distillation.kept import Kept, key_of
from ...distillation.settings import Settings
from ...lora_merge.words import many
from ..page import show
from ..progress import Progress
from .data import encoded, fingerprint
from .identity import identity_of
from .prompts import chunks, joined

STEPS = 25

# The last pictures of a training that keeps nothing: another learning rate must not cost them again.
_memory = Kept()


def is_flow(model) -> bool:
    """Whether the MODEL's noisy latents are (1 - sigma) * z0 + sigma * noise."""
    return isinstance(model.get_model_object("model_sampling"), comfy.model_sampling.CONST)


def teachers_pictures(
    model, prompts: Sequence[tuple], empty: torch.Tensor, settings: Settings, kept: Kept | None
) -> list[torch.Tensor]:
    """One (1, ...) latent for each prompt, as the graph has latents, on the CPU.

    prompts: (entry of positive, entry of negative) for each.   empty: (1, ...) zeros.   settings: batch, seed and cfg,
    of whose range the middle is used.   kept: where each is looked for and left as soon as it is made; None for memory,
    which has those of the last call.
    """
    cfg = sum(settings.cfg) / 2
    sampler, scheduler = ("euler", "simple") if is_flow(model) else ("dpmpp_2m", "sgm_uniform")
    table = model.get_model_object("model_sampling").sigmas
    made_by = identity_of(model), fingerprint(table), STEPS, sampler, scheduler, cfg, settings.seed, [*empty.shape]
    known: dict[int, str] = {}
    for pair in prompts:
        if id(pair[0]) not in known or id(pair[1]) not in known:
            known |= {id(entry): fingerprint(entry) for entry in pair}
    # The number of a picture is that of its noise.
    keys = [key_of(*made_by, known[id(one)], known[id(two)], number) for number, (one, two) in enumerate(prompts)]
    if kept is None:
        kept = _memory
        if not all(key in kept for key in keys):
            kept.clear()

    def made(numbers: list[int]) -> list[torch.Tensor]:
        noise = torch.cat([
            torch.randn(empty.shape, generator=generator(settings.seed, 0, number, SAMPLES)) for number in numbers
        ])  # fmt: skip
        positive, negative = (joined([prompts[number][side] for number in numbers]) for side in (0, 1))
        latents = comfy.sample.sample(
            model, noise, STEPS, cfg, sampler, scheduler, [positive], [negative], torch.zeros_like(noise),
            disable_pbar=not comfy.utils.PROGRESS_BAR_ENABLED, seed=settings.seed,
        )  # fmt: skip
        return [one.float().cpu() for one in latents.split(1)]

    if not all(key in kept for key in keys):
        comfy.model_management.load_models_gpu(
            [model]
        )  # as the sampler would; some make conditionings with their weights
        for entry, kind in zip(prompts[0], ("positive", "negative"), strict=True):
            encoded(model, [entry], empty, kind)  # raises for what the sampler would call a TypeError
        _make(chunks(model, prompts, empty, settings.batch), keys, made, kept)
    found = kept.get(keys)
    return [found[key]["latent"] for key in keys]


def _make(
    places: list[list[int]], keys: list[str], made: Callable[[list[int]], list[torch.Tensor]], kept: Kept
) -> None:
    progress, done = Progress(), 0
    for chunk in places:
        if missing := [number for number in chunk if keys[number] not in kept]:
            latents = made(missing)
            kept.add({keys[number]: {"latent": latent} for number, latent in zip(missing, latents, strict=True)})
        done += len(chunk)
        progress(done, len(keys))
        show(f"the model has made {done} of {many(len(keys), 'pictures')} to learn from")
