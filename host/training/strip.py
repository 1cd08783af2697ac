"""Sample strips of a LoRA that is being trained: a few pictures in 4 steps, always of the same noise."""

import latent_preview
import numpy as np
import torch
from PIL import Image

from ...distillation.draws import SAMPLES, WHOLE_RUN, generator
from ...distillation.trainer import Trainer
from ...samplers.multistep import sample_lcm
from ...samplers.noise import StepNoise
from ...samplers.schedule import lcm_timesteps, sigmas_at
from .data import Batches
from .picture import loss_curve, row, stacked

PICTURES, STEPS = 4, 4


class Strip:
    """patcher: the lent MODEL.   vae: decodes if there is one; else `rough` does, ComfyUI's preview, or None."""

    def __init__(self, patcher, denoise, batches: Batches, trainer: Trainer, vae, rough) -> None:
        self.model, self.denoise, self.trainer, self.vae = patcher.model, denoise, trainer, vae
        kind = max(batches.kinds, key=len)  # the commonest size
        self.batch = batches.batch(kind[:PICTURES])
        self.rough = rough

    @torch.no_grad()
    def preview(self):
        """What ComfyUI's progress bar takes for a picture, or None where nothing can be shown."""
        images = self._images(self._samples(), self.rough)
        picture = row(images, f"{STEPS} steps, after {self.trainer.done}") if images else None
        return None if picture is None else ("JPEG", picture, latent_preview.MAX_PREVIEW_RESOLUTION)

    @torch.no_grad()
    def last(self) -> torch.Tensor:
        """Latents of the finished LoRA, as the network sees them, on the CPU."""
        with self.trainer.result():
            return self._samples().cpu()

    def picture(self, last: torch.Tensor | None) -> torch.Tensor:
        """IMAGE (1, height, width, 3): the loss, what was learnt from, and what the LoRA makes in 4 steps."""
        rows = [loss_curve(self.trainer.losses)]
        for latents, label in ((self.batch.z0.cpu(), "trained on"), (last, f"the LoRA in {STEPS} steps, cfg 1")):
            images = [] if latents is None else self._decoded(latents)
            rows += [row(images, label)] if images else []
        return torch.from_numpy(np.asarray(stacked(rows)).astype(np.float32) / 255)[None]

    def _samples(self) -> torch.Tensor:
        table, settings, z0 = self.trainer.table, self.trainer.settings, self.batch.z0
        points = len(self.trainer.grid)
        timesteps = lcm_timesteps(min(STEPS, points), original_steps=points, train_timesteps=len(table))
        sigmas = sigmas_at(timesteps, table)
        noise = torch.stack([
            torch.randn(z0.shape[1:], generator=generator(settings.seed, WHOLE_RUN, number, SAMPLES))
            for number in range(len(z0))
        ]).to(z0)  # fmt: skip
        sampling = self.model.model_sampling
        x = sampling.noise_scaling(sigmas[:1].to(z0), noise, torch.zeros_like(z0), not self.trainer.flow)
        return sample_lcm(
            lambda x, sigma: self.denoise(x, sigma, self.batch.cond), x, sigmas, disable=True,
            noise=StepNoise(settings.seed), timesteps=None if self.trainer.flow else torch.tensor(timesteps),
            table=table, noise_scaling=sampling.noise_scaling,
        )  # fmt: skip

    def _decoded(self, latents: torch.Tensor) -> list[Image.Image]:
        if self.vae is None:
            return self._images(latents, self.rough)
        images = self.vae.decode(self.model.process_latent_out(latents))
        images = images.reshape(-1, *images.shape[-3:])  # frames of a video follow each other
        return [Image.fromarray((image * 255).clamp(0, 255).byte().cpu().numpy()) for image in images[: 2 * PICTURES]]

    def _images(self, latents: torch.Tensor, previewer) -> list[Image.Image]:
        if previewer is None:
            return []
        return [previewer.decode_latent_to_preview(latent) for latent in latents.float().cpu().split(1)]


def rough_previewer(latent_format):
    """Core's linear preview, also where the user has previews switched off; None for latents it has no colours for.

    Made before the pictures to learn from: those take long, and would be lost if it did not work.
    """
    if latent_format.latent_rgb_factors is None:
        return None
    return latent_preview.Latent2RGBPreviewer(
        latent_format.latent_rgb_factors,
        latent_format.latent_rgb_factors_bias,
        latent_format.latent_rgb_factors_reshape,
    )
