"""The demo's models in ComfyUI, and the ways of drawing with them that are compared.

Everything runs through ComfyUI's own loaders, samplers and schedulers, and through LCM Kit's host road: the same
functions that its nodes call.
"""

import functools
import hashlib
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from common import CHECKPOINT, DEMO, LORAS, VAE, load_comfy, load_lcm_kit
from data import NAMES

# (a ComfyUI model, steps) -> (the model to sample, SAMPLER, SIGMAS)
Plan = Callable[[Any, int], tuple[Any, Any, torch.Tensor]]


@dataclass(frozen=True)
class Way:
    """One way of making pictures: what samples, with which LoRAs, at which guidance."""

    name: str
    plan: Plan
    loras: dict[str, float] = field(default_factory=dict)  # kind -> strength
    cfg: float = 1.0
    step_seed_offset: int = 0  # added to the run's seed for the noise of the steps

    def calls(self, steps: int) -> int:
        """Model calls for one picture; guidance takes two a step."""
        return steps * (1 if self.cfg == 1 else 2)


def ours(gamma: float | Callable[[int], list[float]] = 1.0, original_steps: int = 50) -> Plan:
    """LCM Kit. gamma: one number, or a function from steps to one number a step."""

    def plan(model, steps):
        from lcm_kit.host.sampling import sampling, schedules

        sigmas = schedules.lcm_sigmas(model, steps=steps, denoise=1.0, original_steps=original_steps)
        each = gamma(steps) if callable(gamma) else gamma
        return model, sampling.lcm_sampler(gamma=each, seed=-1), sigmas

    return plan


def phased(phases: int) -> Plan:
    """LCM Kit with a LoRA of so many phases: from edge to edge, without noise in between."""

    def plan(model, steps):
        from lcm_kit.host.sampling import sampling, schedules
        from lcm_kit.samplers.presets import phased

        preset = phased(phases).with_steps(steps)
        sigmas = schedules.lcm_sigmas(model, steps=steps, denoise=1.0, original_steps=50, preset=preset)
        return model, sampling.lcm_sampler(gamma=preset.gamma, seed=-1), sigmas

    return plan


def core(sampler: str, scheduler: str, prepare: Callable[[Any], Any] = lambda model: model) -> Plan:
    """ComfyUI's own sampler and scheduler by name. prepare: patches the model first."""

    def plan(model, steps):
        import comfy.samplers

        model = prepare(model)
        sampling = model.get_model_object("model_sampling")
        sigmas = comfy.samplers.calculate_sigmas(sampling, scheduler, steps)
        return model, comfy.samplers.sampler_object(sampler), sigmas

    return plan


TEACHER_CFG = 3.0
TEACHER_STEPS = 50


def teacher(cfg: float = TEACHER_CFG) -> Way:
    """What the LCM-LoRA was distilled from, with as many steps as change anything."""
    return Way("teacher, other noise", core("ddim", "ddim_uniform"), cfg=cfg)


class Studio:
    """The demo's models in ComfyUI, ready to draw one picture of each concept in any of the compared ways.

    checkpoint: the demo's base, or another of its kind. LoRAs are those of common.LORAS that are there.
    """

    def __init__(self, checkpoint: Path = CHECKPOINT) -> None:
        load_comfy()
        load_lcm_kit()
        sys.path.insert(0, str(DEMO))
        import comfy.sd
        import comfy.supported_models
        import comfy.utils
        from tiny_emoji.model import TinyEmoji

        if TinyEmoji not in comfy.supported_models.models:
            comfy.supported_models.models.insert(0, TinyEmoji)
        self.model, self.clip, *_ = comfy.sd.load_checkpoint_guess_config(str(checkpoint), output_vae=False)
        self.vae = comfy.sd.VAE(sd=comfy.utils.load_torch_file(str(VAE)))
        self.vae.first_stage_model.to(memory_format=torch.channels_last)  # a quarter faster on a CPU
        self.loras = {k: comfy.utils.load_torch_file(str(path)) for k, path in LORAS.items() if path.exists()}
        self.positive = [[torch.cat([self.encode(name)[0][0] for name in NAMES]), {}]]
        self.negative = self.encode("")

    def encode(self, text: str):
        return self.clip.encode_from_tokens_scheduled(self.clip.tokenize(text))

    def patched(self, **strengths: float):
        """The model with LoRAs at the given strengths, by ComfyUI's own loader."""
        import comfy.sd

        model = self.model
        for kind, strength in strengths.items():
            model, _ = comfy.sd.load_lora_for_models(model, None, self.loras[kind], strength, 0.0)
        return model

    def latents(self, way: Way, steps: int, seed: int) -> torch.Tensor:
        """One latent of every concept, (n, 12, 8, 8). The same seed is the same initial noise in every way."""
        return self.sampled(self.patched(**way.loras), way, steps, seed)

    def sampled(self, model: Any, way: Way, steps: int, seed: int, first: int = len(NAMES)) -> torch.Tensor:
        """The same of the first concepts, (first, 12, 8, 8), with a model that has the way's LoRAs on it already."""
        import comfy.sample

        model, sampler, sigmas = way.plan(model, steps)
        latent = torch.zeros(first, 12, 8, 8)
        positive = [[self.positive[0][0][:first], {}]]
        noise = comfy.sample.prepare_noise(latent, seed)
        return comfy.sample.sample_custom(
            model, noise, way.cfg, sampler, sigmas, positive, self.negative, latent,
            disable_pbar=True, seed=seed + way.step_seed_offset,
        )  # fmt: skip

    def decoded(self, latents: torch.Tensor) -> torch.Tensor:
        """Pictures (n, 3, 64, 64) in 0..1."""
        # A few at a time: faster on a CPU, because the activations stay in its cache.
        pictures = torch.cat([self.vae.decode(few) for few in latents.split(8)])
        return pictures.movedim(-1, 1).clamp(0, 1)


def fingerprint(*paths: Path) -> str:
    """Short name of the content of files, in this order."""
    return hashlib.sha256(b"".join(_digest(path) for path in paths)).hexdigest()[:16]


@functools.cache
def _digest(path: Path) -> bytes:
    return hashlib.sha256(path.read_bytes()).digest()
