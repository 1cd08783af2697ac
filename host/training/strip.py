"""Sample strips of a LoRA that is being trained: a few pictures in 4 steps, or one a phase, always of the same noise."""

from collections.abc import Sequence

import latent_preview
import numpy as np
import torch
from PIL import Image

from ...distillation.draws import SAMPLES, WHOLE_RUN, generator
from ...distillation.objective import Batch
from ...distillation.phases import edge_timesteps
from ...distillation.trainer import Trainer
from ...lora_merge.words import many
from ...samplers.multistep import sample_lcm
from ...samplers.noise import StepNoise
from ...samplers.schedule import lcm_timesteps, sigmas_at
from .picture import WIDTH, loss_curve, named, row, stacked

PICTURES, STEPS = 4, 4
ROWS = 4  # of samples, in the final picture


class Strip:
    """patcher: the lent MODEL.   vae: decodes if there is one; else `rough` does, ComfyUI's preview, or None.

    batch: some of what is learnt from.   shown: batches of one, whose prompts samples are made of; None takes those of
    `batch`.   names: what the samples are called, empty if that is not known.   begun: whether the training began with
    another LoRA.
    """

    def __init__(
        self, patcher, denoise, batch: Batch, shown: Sequence[Batch] | None, trainer: Trainer, vae, rough, *,
        names: Sequence[str] = (), begun: bool = False,
    ) -> None:  # fmt: skip
        self.model, self.denoise, self.trainer, self.vae = patcher.model, denoise, trainer, vae
        self.batch, self.groups = batch, [batch] if shown is None else [*shown][:PICTURES]
        self.rough, self.names, self.begun = rough, names, begun
        # (steps done, latents): of step 0, and of some on the way.
        self.course: list[tuple[int, torch.Tensor]] = []

    @torch.no_grad()
    def take(self, *, first: bool = False) -> None:
        """Samples of the LoRA as it is now.   first: without it, too, if the training is on its way already."""
        done = self.trainer.done
        if self.rough is None and self.vae is None:
            return
        if first and done and not self.begun:
            with self.trainer.adapters.disabled():
                self.course.append((0, self._samples().cpu()))
        self.course = [pair for pair in self.course if pair[0] != done]
        with self.trainer.result():
            self.course.append((done, self._samples().cpu()))
        if len(self.course) > 2 * ROWS:  # the first one and the latest stay
            del self.course[1:-1:2]

    def preview(self, validation: Sequence[tuple[int, float]] = ()):
        """What ComfyUI's progress bar takes for a picture: the curve, the first samples and the latest."""
        return "JPEG", self._drawn(self._first_and_last(), self._rough, validation), WIDTH

    def roughly(self) -> Image.Image | None:
        """The latest samples as ComfyUI's preview has them; None where there are none, or no colours for them."""
        done, latents = self.course[-1] if self.course else (0, torch.empty(0))
        images = self._rough(latents)
        rows = [named(self.names)] if self.names and images else []
        return stacked([*rows, row(images, self._label(done))]) if images else None

    def picture(self, validation: Sequence[tuple[int, float]] = ()) -> torch.Tensor:
        """IMAGE (1, height, width, 3): the loss, what was learnt from, and what the LoRA makes in 4 steps on the way."""
        whole = self._drawn(self._spread(), self._decoded, validation)
        return torch.from_numpy(np.asarray(whole).astype(np.float32) / 255)[None]

    def _first_and_last(self) -> list[tuple[int, torch.Tensor]]:
        return self.course[:1] + self.course[1:][-1:]

    def _spread(self) -> list[tuple[int, torch.Tensor]]:
        """ROWS of the course at most, the first and the last among them."""
        last = len(self.course) - 1
        places = sorted({round(number * last / (ROWS - 1)) for number in range(ROWS)})
        return [self.course[place] for place in places] if self.course else []

    @property
    def timesteps(self) -> list[int]:
        """That samples are made at."""
        trained, points = len(self.trainer.table), len(self.trainer.grid)
        if (phases := self.trainer.settings.phases) > 1:
            return [*edge_timesteps(phases, trained)]
        return lcm_timesteps(min(STEPS, points), original_steps=points, train_timesteps=trained)

    def _label(self, done: int) -> str:
        when = f"after {many(done, 'training steps')}" if done else "before the training"
        return f"in {many(len(self.timesteps), 'steps')} at cfg 1, {when}"

    def _drawn(self, course, decode, validation) -> Image.Image:
        rows = [loss_curve(self.trainer.losses, validation)]
        shown = [(self.batch.z0.cpu(), "trained on"), *((latents, self._label(done)) for done, latents in course)]
        for latents, label in shown:
            images = decode(latents)
            rows += [row(images, label)] if images else []
        if self.names and len(rows) > 2:
            rows.insert(2, named(self.names))  # over the samples
        return stacked(rows)

    def _samples(self) -> torch.Tensor:
        return torch.cat([self._sampled(batch, number) for number, batch in enumerate(self.groups)])

    def _sampled(self, batch, first: int) -> torch.Tensor:
        """first: number of the first one, of which its noise is made."""
        table, settings, z0 = self.trainer.table, self.trainer.settings, batch.z0
        timesteps = self.timesteps
        sigmas = sigmas_at(timesteps, table)
        noise = torch.stack([
            torch.randn(z0.shape[1:], generator=generator(settings.seed, WHOLE_RUN, number, SAMPLES))
            for number in range(first, first + len(z0))
        ]).to(z0)  # fmt: skip
        sampling = self.model.model_sampling
        x = sampling.noise_scaling(sigmas[:1].to(z0), noise, torch.zeros_like(z0), not self.trainer.flow)
        return sample_lcm(
            lambda x, sigma: self.denoise(x, sigma, batch.cond), x, sigmas, disable=True,
            noise=StepNoise(settings.seed), gamma=1.0 if settings.phases == 1 else 0.0, timesteps=None if self.trainer.flow else torch.tensor(timesteps),
            table=table, noise_scaling=sampling.noise_scaling,
        )  # fmt: skip

    def _decoded(self, latents: torch.Tensor) -> list[Image.Image]:
        if self.vae is None:
            return self._rough(latents)
        images = self.vae.decode(self.model.process_latent_out(latents))
        images = images.reshape(-1, *images.shape[-3:])  # frames of a video follow each other
        return [Image.fromarray((image * 255).clamp(0, 255).byte().cpu().numpy()) for image in images[: 2 * PICTURES]]

    def _rough(self, latents: torch.Tensor) -> list[Image.Image]:
        if self.rough is None:
            return []
        parts = latents.float().cpu().split(1) if len(latents) else []
        return [self.rough.decode_latent_to_preview(latent) for latent in parts]


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
