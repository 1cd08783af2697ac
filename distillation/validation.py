"""A loss that can be compared from step to step: of the same pictures, timesteps, guidance and noise every time.

The loss of a training step is of what that step has drawn, and differs far more by that than by what was learnt.
"""

from collections.abc import Callable

import torch

from .draws import VALIDATION, WHOLE_RUN, generator
from .objective import Batch, Draws, distillation_loss
from .trainer import Trainer

DRAWS = 8


def fixed_draws(trainer: Trainer, number: int, batch: Batch) -> Draws:
    """Draw `number` of DRAWS, for a batch of one: timesteps spread over all that are trained, guidance in the middle."""
    grid, (low, high) = trainer.grid, trainer.settings.cfg
    timestep = grid[(2 * number + 1) * len(grid) // (2 * DRAWS)]
    source = generator(trainer.settings.seed, WHOLE_RUN, number, VALIDATION)
    noise = torch.randn(batch.z0.shape[1:], generator=source)[None].to(batch.z0)
    return Draws(torch.tensor([timestep]), torch.full((1,), (low + high) / 2).to(batch.z0), noise)


@torch.no_grad()
def validation_loss(trainer: Trainer, picture: Callable[[int], Batch]) -> float:
    """Mean distance of the finished LoRA, as it is now, to its target. Changes nothing, draws nothing.

    picture: number -> a batch of that one picture, for 0 to DRAWS - 1.
    """
    settings, total = trainer.settings, 0.0
    with trainer.result():
        for number in range(DRAWS):
            batch = picture(number)
            loss = distillation_loss(
                trainer.denoise, trainer.adapters, batch, fixed_draws(trainer, number, batch), stride=settings.skip,
                table=trainer.table, huber_c=settings.huber_c, weighting=settings.weighting, flow=trainer.flow,
                phases=settings.phases,
            )  # fmt: skip
            total += float(loss)
    return total / DRAWS
