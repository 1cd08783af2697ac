"""The noise levels of LCM Scheduler on ComfyUI's own model_sampling, whatever the length of its table."""

import logging
import math

import comfy.model_base
import comfy.supported_models_base
import pytest
import torch
from comfy.model_base import ModelType

from lcm_kit.nodes.scheduling import LCMPreset, LCMScheduler
from lcm_kit.samplers.presets import PRESETS

STEPPED = [name for name, preset in PRESETS.items() if preset.timesteps]


class Sampled:
    """A MODEL of which nothing but model_sampling is asked: the door wants clone, get_model_object and add_patches."""

    def __init__(self, model_type, settings):
        config = comfy.supported_models_base.BASE({})
        config.sampling_settings = settings
        self.model_sampling = comfy.model_base.model_sampling(config, model_type)

    def clone(self):
        raise NotImplementedError

    add_patches = clone

    def get_model_object(self, name):
        assert name == "model_sampling"
        return self.model_sampling


def shifted(shift, times):
    return [shift * t / (1 + (shift - 1) * t) for t in times]


def published(timesteps):
    """Training timesteps as their authors mean them: a thousandth of the way from clean to noise each."""
    return [(t + 1) / 1000 for t in timesteps]


# Flow models as ComfyUI sets them up -> kind, settings, and the shift of its odds.
FLOWS = {
    "1,000 levels, shift 1": (ModelType.FLOW, {"multiplier": 1.0, "shift": 1.0}, 1.0),
    "1,000 levels, shift 8": (ModelType.FLOW, {"shift": 8.0}, 8.0),
    "10,000 levels, mu 1.15": (ModelType.FLUX, {}, math.exp(1.15)),
    "10,000 levels, mu 2.37": (ModelType.FLUX, {"shift": 2.37}, math.exp(2.37)),
}
EVERY_FLOW = pytest.mark.parametrize("flow", FLOWS)


def sigmas(model, *, steps=4, denoise=1.0, original_steps=50, timesteps="", preset=None):
    given = {} if preset is None else {"preset": LCMPreset.execute(preset, 0).result[0]}
    return LCMScheduler.execute(model, steps, denoise, original_steps, timesteps, **given).result[0]


def warnings_of(caplog):
    return [record.getMessage() for record in caplog.records if record.levelno >= logging.WARNING]


# ---- timesteps are thousandths, whatever the length of the table


@EVERY_FLOW
@pytest.mark.parametrize("name", STEPPED)
def test_a_presets_timesteps_are_thousandths_of_every_table(flow, name):
    kind, settings, shift = FLOWS[flow]
    expected = [*shifted(shift, published(PRESETS[name].timesteps)), 0.0]
    torch.testing.assert_close(sigmas(Sampled(kind, settings), preset=name), torch.tensor(expected), rtol=0, atol=1e-6)


@EVERY_FLOW
@pytest.mark.parametrize("timesteps", [[999, 749, 499, 249], [999, 0], [600, 3, 2, 1]])
def test_typed_timesteps_are_thousandths_of_every_table(flow, timesteps):
    kind, settings, shift = FLOWS[flow]
    found = sigmas(Sampled(kind, settings), timesteps=", ".join(map(str, timesteps)))
    expected = [*shifted(shift, published(timesteps)), 0.0]
    torch.testing.assert_close(found, torch.tensor(expected), rtol=0, atol=1e-6)


def test_stable_cascades_ten_thousand_levels_are_read_in_thousandths():
    model = Sampled(ModelType.STABLE_CASCADE, {"shift": 2.0})
    timesteps = [999, 749, 499, 249]
    expected = [float(model.model_sampling.sigma(torch.tensor(t))) for t in published(timesteps)]
    torch.testing.assert_close(sigmas(model, preset="DMD2"), torch.tensor([*expected, 0.0]), rtol=1e-5, atol=0)


@EVERY_FLOW
@pytest.mark.parametrize("timesteps", ["1000, 499", "9999", "-1"])
def test_a_timestep_beyond_the_thousandths_is_refused_on_every_table(flow, timesteps):
    kind, settings, _ = FLOWS[flow]
    with pytest.raises(ValueError, match="lie outside 0 to 999"):
        sigmas(Sampled(kind, settings), timesteps=timesteps)


@pytest.mark.parametrize("kind", [ModelType.EPS, ModelType.V_PREDICTION])
@pytest.mark.parametrize("name", PRESETS)
def test_a_thousand_levels_are_their_own_timesteps(kind, name):
    model = Sampled(kind, {})
    expected = torch.cat([model.model_sampling.sigmas[PRESETS[name].schedule()], torch.zeros(1)])
    assert torch.equal(sigmas(model, preset=name), expected)
