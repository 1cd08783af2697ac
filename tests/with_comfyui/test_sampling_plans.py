"""Remembered plans of runs: never those of another run, and never many."""

import gc

import pytest
import torch
from comfy.model_base import ModelType

from lcm_kit.host.sampling.plans import REMEMBERED, _plans, plan_for
from lcm_kit.host.sampling.tables import boundary_timesteps, forward_process, sigma_table
from lcm_kit.samplers.linear_step import plan_run
from lcm_kit.tests.with_comfyui import tiny
from lcm_kit.tests.with_comfyui.sampled import ksampler, picture, scheduled

pytestmark = pytest.mark.usefixtures("no_gradients")


def remembered(model, sigmas, gamma=0.4, masked=False, table=None):
    return plan_for(model.get_model_object("model_sampling"), sigmas, gamma, table=table, masked=masked)


def afresh(model, sigmas, gamma=0.4, masked=False, table=None):
    sampling = model.get_model_object("model_sampling")
    return plan_run(
        sigmas,
        gamma=gamma,
        timesteps=None if masked else boundary_timesteps(sampling, sigmas),
        table=sigma_table(sampling) if table is None else table,
        noise_scaling=forward_process(sampling),
    )


@pytest.mark.parametrize("model_type", [ModelType.EPS, ModelType.V_PREDICTION, ModelType.FLOW, ModelType.EDM])
def test_a_remembered_plan_is_the_one_made_afresh(model_type):
    model = tiny.small_model(model_type)
    if model_type == ModelType.EDM:
        sigmas = torch.tensor([14.0, 5.0, 1.0, 0.0])
    else:
        sigmas = scheduled(model)
    other_table = sigma_table(model.get_model_object("model_sampling"))[::2]
    runs = [
        {"sigmas": levels, "gamma": gamma, "masked": masked, "table": table}
        for levels in (sigmas, sigmas[:2], sigmas[1:])
        for gamma in (0.4, 1.0, (0.0, 1.0)[: len(levels) - 1])
        for masked in (False, True)
        for table in (None, other_table)
    ]
    for _ in range(2):
        for run in runs:
            assert remembered(model, **run) == remembered(model, **run) == afresh(model, **run)


def test_a_schedule_that_is_run_again_is_not_planned_again_and_few_are_kept():
    model = tiny.small_model()
    sigmas = scheduled(model)
    assert remembered(model, sigmas) is remembered(model, sigmas.clone())
    for step in range(3 * REMEMBERED):
        remembered(model, sigmas, gamma=step / 100)
    assert len(_plans[model.get_model_object("model_sampling")]) == REMEMBERED


def test_a_table_that_is_changed_in_place_has_another_plan():
    model = tiny.small_model()
    sigmas, sampling = scheduled(model), model.get_model_object("model_sampling")
    before = remembered(model, sigmas)
    sampling.set_sigmas(sampling.sigmas * 2)
    assert remembered(model, sigmas) == afresh(model, sigmas) != before


def test_a_flow_model_whose_noise_is_scaled_otherwise_has_another_plan():
    model = tiny.small_model(ModelType.FLOW)
    sigmas, before = scheduled(model), remembered(model, scheduled(model))
    model.get_model_object("model_sampling").noise_scale = 2.0
    assert remembered(model, sigmas) == afresh(model, sigmas)
    assert remembered(model, sigmas) is not before


def test_a_process_of_another_node_is_asked_every_time():
    model = tiny.small_model()
    sampling = model.get_model_object("model_sampling")
    scale = [1.0]

    class Other(type(sampling)):
        def noise_scaling(self, sigma, noise, latent_image, max_denoise=False):
            return latent_image + scale[0] * sigma * noise

    sampling.__class__ = Other
    sigmas = scheduled(model)
    plain = remembered(model, sigmas)
    scale[0] = 3.0
    assert remembered(model, sigmas) == afresh(model, sigmas) != plain


def test_plans_go_with_their_model():
    model = tiny.small_model()
    ksampler(model, picture())
    count = len(_plans)
    del model
    gc.collect()
    assert len(_plans) < count
