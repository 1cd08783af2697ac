"""A MODEL's own table of noise levels, as plain numbers."""

import logging

import comfy.model_sampling as host
import torch

from ...samplers.renoise import NoiseScaling, variance_exploding
from ...samplers.schedule import sigmas_at, table_entries
from ...samplers.times import karras_table

logger = logging.getLogger(__name__)


def is_distilled(model_sampling) -> bool:
    """True for core's ModelSamplingDiscrete "lcm" and its kin: a shortened table, boundary scalings built in."""
    return hasattr(model_sampling, "skip_steps") and len(model_sampling.sigmas) < model_sampling.num_timesteps


def sigma_table(model_sampling) -> torch.Tensor:
    """(levels,) ascending noise levels of evenly spaced times, float32 on the CPU; a thousand times are the timesteps.

    A flow model's are its own, shift and all. A shortened table is filled up by its own interpolation: exact at its
    entries, to float rounding. A model of continuous levels has but a lowest and a highest one; between them lie
    Karras' levels, which consistency models were trained on.
    """
    if is_continuous(model_sampling):
        return karras_table(float(model_sampling.sigma_min), float(model_sampling.sigma_max))
    if is_distilled(model_sampling):
        return model_sampling.sigma(torch.arange(model_sampling.num_timesteps)).detach().float().cpu()
    return model_sampling.sigmas.detach().float().cpu()


def is_flow(model_sampling) -> bool:
    """True for rectified flow (Flux, Wan, Qwen-Image, SD3 and their kin): x = (1 - sigma) x0 + sigma noise."""
    # Core's own tables end at 1 to float32's rounding, on either side of it. Those of CONST models that end higher
    # (image to image) hold no flow's levels.
    return isinstance(model_sampling, host.CONST) and float(model_sampling.sigma_max) < 1.001


def is_continuous(model_sampling) -> bool:
    """True where training had no numbered timesteps but any noise level: EDM, continuous v, Cosmos."""
    return isinstance(model_sampling, host.ModelSamplingContinuousEDM)


def is_cosmos(model_sampling) -> bool:
    """True for NVIDIA's Cosmos: a flow whose levels are told as noise over picture, sigma / (1 - sigma) of the usual."""
    return isinstance(model_sampling, host.ModelSamplingCosmosRFlow)


def time_table(model_sampling) -> torch.Tensor | None:
    """sigma_table of a model that knows every time between its entries; None for one of numbered timesteps."""
    return sigma_table(model_sampling) if is_flow(model_sampling) or is_continuous(model_sampling) else None


def trained_sigma_table(model_sampling) -> torch.Tensor:
    """sigma_table, or a ValueError where training had no timesteps to pick from."""
    if is_continuous(model_sampling):
        raise ValueError(
            "This model was trained on continuous noise levels, not on numbered timesteps, which this needs."
        )
    return sigma_table(model_sampling)


def sigmas_of(model_sampling, timesteps: list[int]) -> torch.Tensor:
    """(steps + 1,) the model's noise levels at these timesteps (0..999, whatever its table's length), and a closing 0.

    Of a shortened table those that it has are taken, and a line in the log says so.
    """
    table = trained_sigma_table(model_sampling)
    entries = table_entries(timesteps, len(table))
    if is_distilled(model_sampling):
        entries = _those_left(entries, model_sampling.skip_steps)
    return sigmas_at(entries, table)


def _those_left(timesteps: list[int], skip: int) -> list[int]:
    """Timesteps of a table that holds every skip-th one, skip - 1 and so on: for one that it lacks the next above.

    The model would be told that one or the one below in any case; a latent of that very level is what it expects.
    """
    left = [t // skip * skip + skip - 1 for t in timesteps]
    if moved := [f"{t} to {there}" for t, there in zip(timesteps, left, strict=True) if t != there]:
        logger.warning(
            "This model has every %dth timestep only (%d, %d, ...), so the run goes from %s. ModelSamplingDiscrete 'lcm' does "
            "that, and so do the lcm schedules of AnimateDiff-Evolved's beta_schedule. LCM Kit needs neither: without it "
            "the timesteps are exact.",
            skip,
            skip - 1,
            2 * skip - 1,
            ", ".join(moved),
        )
    return list(dict.fromkeys(left))


def boundary_timesteps(model_sampling, sigmas: torch.Tensor) -> torch.Tensor | None:
    """(steps,) the training timestep of each noise level but the last, for the boundary scalings.

    None for models without DDPM timesteps, and where model_sampling applies the scalings itself.
    """
    other_units = (host.StableCascadeSampling, host.ModelSamplingDiscreteEDM)
    if not isinstance(model_sampling, host.ModelSamplingDiscrete) or isinstance(model_sampling, other_units):
        return None
    return None if is_distilled(model_sampling) else model_sampling.timestep(sigmas[:-1])


def check_levels(model_sampling, sigmas: torch.Tensor) -> None:
    """Raises ValueError for levels (steps + 1,) above pure noise on a flow model: there is 1 - sigma of the picture in it.

    Other models' levels have no such end, and some nodes go above the table on purpose.
    """
    if len(sigmas) and is_flow(model_sampling) and float(sigmas[0]) > 1.001:
        raise ValueError(
            f"sigmas begin at {float(sigmas[0]):.4g}, but on this model, a flow model, 1 is pure noise and no level is higher. "
            "They were made with another model: connect the model that is sampled to LCM Scheduler too."
        )


def forward_process(model_sampling) -> NoiseScaling:
    """How the model's latents are noised. Core's usual process is ours under its own name, known without asking."""
    if getattr(type(model_sampling), "noise_scaling", None) is host.EPS.noise_scaling:
        return variance_exploding
    return model_sampling.noise_scaling
