"""Plans of runs, remembered: on small latents making one takes as long as the arithmetic of the run itself."""

from collections import OrderedDict
from weakref import WeakKeyDictionary

import comfy.model_sampling as host
import torch

from ...samplers.linear_step import Plan, plan_run
from .tables import boundary_timesteps, forward_process, sigma_table

REMEMBERED = 8
"""Schedules and gammas of each model."""
_PURE = (host.EPS.noise_scaling, host.CONST.noise_scaling)
_plans: "WeakKeyDictionary[torch.nn.Module, OrderedDict[tuple, Plan]]" = WeakKeyDictionary()


def plan_for(model_sampling, sigmas: torch.Tensor, gamma, *, table: torch.Tensor | None, masked: bool) -> Plan:
    """The plan of a run at these levels (steps + 1,).

    gamma: a number, or one for each step.   table: the run's where it is another model's, see sampler.Relay, else None.
    masked: without the boundary scalings. They blend a little of the noisy latent in, 7e-6 at most, and what a mask keeps
    must stay as it is.

    Known by the values of all that it depends on, not by the objects: tables are exchanged and changed in place.
    """

    def made() -> Plan:
        timesteps = None if masked else boundary_timesteps(model_sampling, sigmas)
        forward = forward_process(model_sampling)
        own = sigma_table(model_sampling) if table is None else table
        return plan_run(sigmas, gamma=gamma, timesteps=timesteps, table=own, noise_scaling=forward)

    if not _is_known(model_sampling):
        return made()
    plans = _plans.setdefault(model_sampling, OrderedDict())
    key = (
        tuple(sigmas.tolist()),
        gamma if isinstance(gamma, int | float) else tuple(gamma),
        masked,
        (model_sampling.sigmas.detach().cpu() if table is None else table).numpy().tobytes(),
        # All that core's noise_scaling looks at. Asked of flow models alone, for an attribute that is not there is slow.
        getattr(model_sampling, "noise_scale", 1.0) if isinstance(model_sampling, host.CONST) else 1.0,
    )
    if key not in plans:
        plans[key] = made()
        if len(plans) > REMEMBERED:
            plans.popitem(last=False)
    else:
        plans.move_to_end(key)
    return plans[key]


def _is_known(model_sampling) -> bool:
    """Whether what a plan depends on is core's own; other nodes' processes may look at anything."""
    kind = type(model_sampling)
    timestep = getattr(kind, "timestep", None)
    return getattr(kind, "noise_scaling", None) in _PURE and getattr(timestep, "__module__", "") == host.__name__
