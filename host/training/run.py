"""A training of a LoRA on a MODEL, from latents and conditionings to its tensors: for the node and the command line."""

import json
import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import comfy.utils
import torch

from ...distillation.adapter import LoraAdapters, check_factors, check_rank, flat_shape
from ...distillation.compiling import compiling
from ...distillation.engine import Alone, Engine
from ...distillation.objective import Batch
from ...distillation.precision import tf32
from ...distillation.settings import Settings
from ...distillation.targets import targets
from ...distillation.trainer import Trainer, adapters_on
from ...distillation.validation import DRAWS
from ...lora_merge import Lora
from ...lora_merge.metadata.fields import ARCHITECTURE, PRESET_KEY
from ...lora_merge.recognise.identity import ARCHITECTURES
from ...samplers.presets import phased
from ..lora.model_base import base_of
from ..lora.weights import named
from ..sampling.tables import is_distilled, trained_sigma_table
from .advice import Advice, advice
from .beginning import factors_of
from .data import Batches, Item, encoded, fingerprint, whole
from .identity import some
from .loan import Denoiser, casting_again, lent
from .report import Account, Lost, Remark, describe, remark_words
from .strip import PICTURES, Strip
from .teacher_pictures import is_flow

logger = logging.getLogger(__name__)

TRAIN_TIMESTEPS = 1000


@dataclass(frozen=True)
class Work:
    """What is learnt, how, and on what.

    latents: (1, ...) each, as the graph has them.   conds, unconds: entries of CONDITIONINGs.   prompts: for each latent,
    which of conds and which of unconds.   table: sigma_table(model).   alpha: 0 takes the rank.
    recompute: gradient checkpointing.   shown: entries to make samples of; none takes those of the first pictures.
    names: what to call these, or the pictures; empty if nothing is known.
    start: the LORA_MODEL to begin with; None begins anew.   own: whether the model made the pictures itself.
    tf32: see distillation.precision.   compile: see distillation.compiling.
    """

    model: Any
    latents: Sequence[torch.Tensor]
    conds: list
    unconds: list
    prompts: Sequence[tuple[int, int]]
    table: torch.Tensor
    settings: Settings
    dtype: torch.dtype
    rank: int
    alpha: float
    recompute: bool
    shown: Sequence = ()
    names: Sequence[str] = ()
    start: Mapping[str, torch.Tensor] | None = None
    own: bool = False
    tf32: bool = False
    compile: bool = False


class Training:
    """`trainer` is ready to run, on the lent MODEL.   remarks: for the report."""

    def __init__(
        self, work: Work, patcher, batches: Batches, trainer: Trainer, denoise: Denoiser, remarks: Sequence[Remark] = ()
    ) -> None:
        self.work, self.patcher, self.batches, self.trainer, self.denoise = work, patcher, batches, trainer, denoise
        self.remarks = remarks

    def strip(self, vae, rough) -> Strip:
        """Sample strips of this training. vae: decodes them, or None.   rough: see strip.rough_previewer."""
        kind = max(self.batches.kinds, key=len)  # the commonest size
        shown = None
        if self.work.shown:
            shown = encoded(self.patcher, self.work.shown, self.batches.items[kind[0]].latent, "positive")
        names = self.work.names if shown or not self.work.names else [self.work.names[place] for place in kind]
        return Strip(
            self.patcher, self.denoise, self.batches.batch(kind[:PICTURES]),
            self.batches.alone([self.batches.items[kind[0]]] * len(shown), shown) if shown else None,
            self.trainer, vae, rough, names=names[:PICTURES], begun=self.work.start is not None,
        )  # fmt: skip

    def picture(self, number: int) -> Batch:
        """A batch of one picture, for draw `number` of the validation loss: of all that is learnt from, evenly."""
        return self.batches.batch([number * len(self.batches.items) // DRAWS])

    def lora(self, name: str, **more) -> Lora:
        """The LoRA as it is now, to be saved. more: see metadata."""
        return Lora.from_state_dict(self.tensors(), metadata=self.metadata(**more), source=name)

    def tensors(self) -> dict[str, torch.Tensor]:
        """The LoRA as it is now, in the keys of the published LCM-LoRAs where the model has such."""
        with self.trainer.result() as adapters:
            return adapters.lora_state_dict(spelling=_published_names(self.patcher.model))

    def metadata(self, **more) -> dict[str, str]:
        """For the LoRA's file: how it was made. more: facts to add."""
        facts = {
            "settings": self.trainer.settings.kept(),
            "steps": self.trainer.done,
            "model": type(self.work.model.model.model_config).__name__,
        }
        architecture = ARCHITECTURES.get(base_of(self.work.model).base or "")
        known = {ARCHITECTURE: architecture} if architecture else {}
        if (phases := self.trainer.settings.phases) > 1:
            known[PRESET_KEY] = phased(phases).name
        title = "LCM-LoRA" if phases == 1 else f"LCM-LoRA in {phases} phases"
        return known | {"modelspec.title": title, "lcm_kit.distillation": json.dumps(facts | more, sort_keys=True)}

    def report(
        self, tensors: Mapping[str, torch.Tensor], seconds: float, validation: Sequence[tuple[int, float]]
    ) -> list[str]:
        """Lines for the user. tensors: the LoRA.   seconds: it took.   validation: see Course."""
        account = Account(
            settings=self.trainer.settings, done=self.trainer.done, losses=self.trainer.losses, validation=validation,
            pictures=len(self.work.latents), own=self.work.own, dtype=str(self.work.dtype).split(".")[-1],
            modules=sum(key.endswith(".alpha") for key in tensors),
            parameters=sum(tensor.numel() for key, tensor in tensors.items() if not key.endswith(".alpha")),
            still=unchanged(tensors), seconds=seconds, remarks=self.remarks,
        )  # fmt: skip
        return describe(account)


def unchanged(tensors: Mapping[str, torch.Tensor]) -> list[str]:
    """Modules of a LoRA, in kohya's keys, that add nothing."""
    end = ".lora_up.weight"
    return [key.removesuffix(end) for key, up in tensors.items() if key.endswith(end) and not up.count_nonzero()]


def advice_for(model, settings: Settings, pictures: int, own: bool) -> list[Advice]:
    """See advice.advice."""
    return advice(settings, pictures, own, type(model.model.model_config).__name__ if is_flow(model) else None)


@contextmanager
def training(
    work: Work,
    *,
    engine: Engine | None = None,
    facts: Mapping[str, Any] | None = None,
    check: Callable[[dict[str, Any]], None] = lambda facts: None,
) -> Iterator[Training]:
    """Within it the MODEL is lent and carries adapters; afterwards it is as before, whatever happens.

    engine: joins processes, None for one alone.   facts: what a resumed run must share beyond MODEL, data and rank.
    check: is told all of those before the processes meet; what it raises ends the training.
    """
    settings, engine = work.settings, engine or Alone()
    # The executor's inference mode allows no gradients.
    with torch.inference_mode(False), torch.enable_grad(), lent(work.model, work.dtype) as patcher:
        device, network = patcher.load_device, patcher.model.diffusion_model
        items = items_of(patcher, work.latents, work.conds, work.unconds, work.prompts)
        per_step = settings.batch * settings.accumulate * engine.num_processes
        batches = Batches(items, seed=settings.seed, per_step=per_step, device=device, dropout=settings.caption_dropout)
        with tf32(work.tf32, device), casting_again(network, not work.recompute), compiling(network, work.compile), adapters_on(
            network, work.rank, work.alpha or None, seed=settings.seed, recompute=work.recompute, device=device
        ) as adapters:  # fmt: skip
            identity = {
                "model": _fingerprint_of_weights(network),
                "data": fingerprint([[item.latent, item.cond, item.uncond] for item in items]),
                "rank": work.rank,
                "alpha": work.alpha or work.rank,
            } | dict(facts or {})  # fmt: skip
            remarks: list[Remark] = [*advice_for(work.model, settings, len(items), work.own)]
            if work.start is not None:
                identity["start"], lost = _begin(work.start, patcher, adapters)
                remarks.append(lost)
            said = [words for remark in remarks for words in remark_words(remark)]
            for words in said if engine.process_index == 0 else ():
                logger.warning("%s", words)
            check(identity)
            trainer = Trainer(
                (denoise := Denoiser(patcher)), adapters, batches, work.table.to(device), settings,
                flow=is_flow(work.model), identity=identity, engine=engine, spread=_spread(items),
            )  # fmt: skip
            yield Training(work, patcher, batches, trainer, denoise, remarks)


def check_lora(model, rank: int, start: Mapping[str, torch.Tensor] | None) -> None:
    """Raises ValueError for a LoRA that this MODEL cannot have, or a beginning that it cannot take.

    `training` would say the same, but only when all pictures are made or encoded.
    """
    network = model.model.diffusion_model
    layers = {name: network.get_submodule(name) for name in targets(network)}
    check_rank([*layers.values()], rank)
    if start is not None:
        lora = named(start)
        factors, _ = factors_of(lora, model, [*layers], lora.name)
        check_factors(factors, {name: flat_shape(layer) for name, layer in layers.items()}, rank, lora.name)


def _begin(start: Mapping[str, torch.Tensor], patcher, adapters: LoraAdapters) -> tuple[str, Lost]:
    """Begins with a LORA_MODEL; returns (what tells it from another, what of it is lost)."""
    lora = named(start)
    factors, lost = factors_of(lora, patcher, adapters.names, lora.name)
    adapters.start_from(factors, lora.name)
    return fingerprint(factors), lost


def sigma_table(model) -> torch.Tensor:
    """(1000,) ascending sigmas of the training timesteps. Raises ValueError for models without such timesteps."""
    sampling = model.get_model_object("model_sampling")
    if is_distilled(sampling):
        raise ValueError(
            "ModelSamplingDiscrete 'lcm' is on this model, which is for sampling with a finished LCM-LoRA. Remove that "
            "node for distilling."
        )
    table = trained_sigma_table(sampling)
    # Flux' table has ten entries to a timestep.
    step = max(1, len(table) // TRAIN_TIMESTEPS)
    return table[step - 1 :: step].clone()


def empty_latent(model, latents: Sequence[dict], width: int, height: int) -> torch.Tensor:
    """(1, ...) zeros of the size to train at: of an empty latent that is connected, or of width and height in pixels."""
    if not latents:  # as ComfyUI's Empty Latent Image has it
        latents = [{"samples": torch.zeros(1, 4, height // 8, width // 8), "downscale_ratio_spacial": 8}]
    return whole(model, latents[0] | {"samples": torch.zeros_like(latents[0]["samples"][:1])})


def items_of(patcher, latents, conds: list, unconds: list, prompts: Sequence[tuple[int, int]]) -> list[Item]:
    """Latents in the network's scale beside their encoded conditionings, each encoded once for each size. See Work."""
    known: dict[torch.Size, tuple[list[dict], list[dict]]] = {}
    tensors: dict = {}
    items = []
    for latent, (cond, uncond) in zip(latents, prompts, strict=True):
        # Cloned: the graph's tensors were made in inference mode.
        latent = patcher.model.process_latent_in(latent.clone())
        if latent.shape not in known:
            known[latent.shape] = (
                encoded(patcher, conds, latent, "positive", tensors),
                encoded(patcher, unconds, latent, "negative", tensors),
            )
        encoded_conds, encoded_unconds = known[latent.shape]
        items.append(Item(latent, encoded_conds[cond], encoded_unconds[uncond]))
    return items


def _spread(items: Sequence[Item]) -> float:
    """Root mean square of all latents."""
    return float(torch.stack([item.latent.float().square().mean() for item in items]).mean().sqrt())


def _fingerprint_of_weights(network: torch.nn.Module) -> str:
    """Changes with any weight as it is used, with patches: a LoRA may change any of them, and any part of one."""
    return fingerprint([[name, tuple(weight.shape), some(weight)] for name, weight in network.named_parameters()])


def _published_names(model) -> dict[str, str]:
    """Layer -> the diffusers name that the published LCM-LoRAs spell; empty for networks that have none."""
    table = comfy.utils.unet_to_diffusers(model.model_config.unet_config)
    return {
        ldm.removesuffix(".weight"): diffusers.removesuffix(".weight")
        for diffusers, ldm in table.items()
        if diffusers.endswith(".weight")
    }
