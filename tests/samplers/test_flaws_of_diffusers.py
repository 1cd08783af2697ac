"""Where diffusers' LCMScheduler is wrong: each test shows what it does, then what we do. A test that fails after an
upgrade of diffusers is good news: the flaw is gone.
"""

import logging

import pytest
import torch

from lcm_kit.samplers.schedule import custom_timesteps, lcm_timesteps, off_grid, sigmas_at
from lcm_kit.tests.samplers.parity import SEED, TABLE, difference, drawn, run_ours, scheduler_of, started
from lcm_kit.tests.samplers.toy import alphas_cumprod, step_generator, toy_network

TOLERANCE = 1e-4  # as in test_parity_with_diffusers.py


@pytest.fixture
def scheduler():
    return scheduler_of("LCMScheduler", "epsilon")


@pytest.fixture
def warned():
    """What diffusers warns of, one message an entry. Its loggers do not hand on to the root, where caplog listens."""
    messages = []
    handler = logging.Handler(logging.WARNING)
    handler.emit = lambda record: messages.append(record.getMessage())
    logger = logging.getLogger("diffusers.schedulers.scheduling_lcm")
    logger.addHandler(handler)
    yield messages
    logger.removeHandler(handler)


def test_it_adds_noise_after_the_last_of_shortened_custom_timesteps(scheduler):
    """set_timesteps cuts the list but still counts the steps it had before, so no step is the last one."""
    listed, strength = [999, 749, 499, 249], 0.5
    scheduler.set_timesteps(timesteps=listed, strength=strength)
    timesteps = custom_timesteps(listed, strength=strength)
    assert timesteps == scheduler.timesteps.tolist() == [499, 249]

    x_vp, x = started(scheduler, TABLE[499], drawn(33))
    for step, timestep in enumerate(scheduler.timesteps):
        noise = step_generator(SEED, step)
        state = scheduler.step(toy_network(x_vp, int(timestep)), timestep, x_vp, generator=noise)
        x_vp = state.prev_sample
    noise = torch.randn(x.shape, generator=step_generator(SEED, 1))
    abar = alphas_cumprod()[249]
    assert difference(x_vp, abar.sqrt() * state.denoised + (1 - abar).sqrt() * noise) <= 1e-6
    assert difference(x_vp, state.denoised) > 1

    ours = run_ours("epsilon", x, sigmas_at(timesteps, TABLE), timesteps=timesteps)
    assert difference(ours[-1], state.denoised) <= TOLERANCE


def test_it_calls_trained_timesteps_untrained_when_the_strength_is_below_one(scheduler, warned):
    """Its grid is cut first, and the steps that the strength drops are looked up too."""
    listed = [999, 759, 499, 259]
    scheduler.set_timesteps(timesteps=listed, strength=0.5)
    assert scheduler.timesteps.tolist() == [499, 259]
    assert len(warned) == 1
    assert "not on the original training/distillation timestep schedule: [759]." in warned[0]
    assert off_grid(custom_timesteps(listed, strength=0.5)) == off_grid(listed) == {}


def test_it_never_looks_up_the_first_of_custom_timesteps(scheduler, warned):
    scheduler.set_timesteps(timesteps=[985, 759, 499, 259])
    assert [message for message in warned if "distillation" in message] == []
    assert off_grid([985, 759, 499, 259]) == {985: 979}


def test_it_loses_a_timestep_to_float_rounding_at_strength_058(scheduler):
    """50 * 0.58 is 28.999999999999996, cut to 28."""
    scheduler.set_timesteps(4, strength=0.58)
    assert scheduler.timesteps.tolist() == lcm_timesteps(4, strength=0.56) == [559, 419, 279, 139]
    assert lcm_timesteps(4, strength=0.58)[0] == 579

    scheduler.set_timesteps(timesteps=list(range(999, 0, -10)), strength=0.29)
    assert len(scheduler.timesteps) == 28  # of 100: 28.999999999999996 again
    assert len(custom_timesteps(range(999, 0, -10), strength=0.29)) == 29


def test_it_takes_custom_timesteps_below_zero(scheduler):
    """alphas_cumprod[-1] is the noisiest level: nothing says so."""
    scheduler.set_timesteps(timesteps=[999, -1])
    assert scheduler.timesteps.tolist() == [999, -1]
    with pytest.raises(ValueError, match=r"timesteps -1 lie outside 0 to 999.* The nearest: 0\."):
        custom_timesteps([999, -1])
