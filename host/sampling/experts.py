"""One run with two models, the second for the lower noise levels (Wan 2.2's experts, SDXL's base and refiner)."""

import torch

WAN_BOUNDARY = 0.875
"""Of Wan 2.2 for text to video, in its published configuration; 0.9 for image to video."""


def staged(model, experts, sigmas: torch.Tensor) -> list[tuple]:
    """[(MODEL, levels)] of a run: of one model, or of two, the second of which starts where the first ends.

    experts: (MODEL for the low levels, boundary) or None.   sigmas: (steps + 1,) all levels.
    A MODEL that has no step to do is left out. Raises ValueError for two models that cannot share a latent.
    """
    if experts is None or len(sigmas) < 2:
        return [(model, sigmas)]
    low, boundary = experts
    _check_kin(model, low)
    high_steps = steps_above(model.get_model_object("model_sampling"), sigmas, boundary)
    parts = [(model, sigmas[: high_steps + 1]), (low, sigmas[high_steps:])]
    return [(patcher, levels) for patcher, levels in parts if len(levels) > 1]


def steps_above(model_sampling, sigmas: torch.Tensor, boundary: float) -> int:
    """How many steps, from the first, start at or above the boundary.

    boundary: [0, 1], a share of the highest time that the model can be told: sigma itself for a flow model, timestep /
    999 for Stable Diffusion. Wan 2.2 takes its first expert for times of 0.875 and more (text to video) or 0.9.
    """
    # A number: the model's own levels may be on another device than the schedule.
    highest = float(model_sampling.timestep(model_sampling.sigma_max))
    # 1e-6: float32 of a level that is the boundary itself.
    return int((model_sampling.timestep(sigmas[:-1]) / highest >= boundary - 1e-6).sum())


def _check_kin(high, low) -> None:
    """Raises ValueError unless the one can go on with the noisy latent of the other."""
    for name, kind in (("latent_format", "kind of latent"), ("model_sampling", "way to add noise")):
        first, second = (_kind(patcher.get_model_object(name)) for patcher in (high, low))
        if first is not second:
            raise ValueError(
                f"model and model_low have not the same {kind} ({first.__name__} and {second.__name__}), so the one cannot "
                "go on where the other stops. Connect the two experts of one model, or leave model_low empty."
            )


def _kind(part) -> type:
    """The class of a latent format; for a model_sampling the one of its bases that says how noise is added."""
    return next((base for base in type(part).__mro__ if "noise_scaling" in vars(base)), type(part))
