"""Training runs on the Gaussian toy: what they converge to, that they can be interrupted, and what they refuse."""

import dataclasses
import errno
import importlib.util
import itertools
import math
import os
import re
import stat
import sys
from contextlib import contextmanager, nullcontext
from itertools import pairwise
from types import ModuleType, SimpleNamespace
from typing import get_args

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from lcm_kit.distillation import checkpoint
from lcm_kit.distillation.adapter import Average
from lcm_kit.distillation.draws import draw
from lcm_kit.distillation.engine import Alone
from lcm_kit.distillation.health import Diverged, Health
from lcm_kit.distillation.objective import distillation_loss
from lcm_kit.distillation.optimizers import optimizer_of
from lcm_kit.distillation.settings import Fall, Settings, Setup, skipping_grid
from lcm_kit.distillation.trainer import Trainer, adapters_on
from lcm_kit.host.training.report import rate_words
from lcm_kit.lora_merge.disk import whole
from lcm_kit.samplers.schedule import lcm_timesteps
from lcm_kit.tests.distillation.toy import (
    GRID,
    SIZE,
    SPREAD,
    STRIDE,
    TABLE,
    Gains,
    data,
    denoiser,
    perfect_denoiser,
    perfect_jump,
    width,
)


class Second(Alone):
    """The other one of two processes, whose share is all that is reduced."""

    process_index, num_processes = 1, 2


SHORT = Settings(
    steps=12, batch=4, learning_rate=0.02, warmup=0, guidance_min=1.0, guidance_max=3.0, skip=STRIDE, seed=3
)


class Eight(torch.optim.AdamW):
    """Stands for bitsandbytes' optimiser where it is not installed: it too remembers plain numbers besides its tensors."""

    @torch.no_grad()
    def step(self, closure=None):
        for group in self.param_groups:
            for factor in group["params"]:
                state = self.state[factor]
                state["step"] = state.get("step", 0) + 1
                state["state1"] = state.get("state1", 0) + factor.grad
                factor -= group["lr"] / state["step"] * state["state1"]


@pytest.fixture
def eight_bits(monkeypatch):
    if not importlib.util.find_spec("bitsandbytes"):
        monkeypatch.setitem(sys.modules, "bitsandbytes", ModuleType("bitsandbytes"))
        monkeypatch.setitem(sys.modules, "bitsandbytes.optim", SimpleNamespace(AdamW8bit=Eight))


def trainer_of(adapters, network, settings=SHORT, **options):
    return Trainer(denoiser(network), adapters, data, TABLE, settings, **options)


def trained(settings=SHORT, **options):
    """(LoRA of a whole run, its losses)."""
    network = Gains()
    with adapters_on(network, 2, seed=settings.seed) as adapters:
        trainer = trainer_of(adapters, network, settings, **options)
        trainer.run()
        with trainer.result():
            return adapters.lora_state_dict(), trainer.losses


def assert_same_lora(actual, expected):
    assert actual.keys() == expected.keys()
    for key in expected:
        assert torch.equal(actual[key], expected[key]), key


def test_the_loss_of_a_step_is_that_of_its_settings():
    losses = []
    for options in ({}, {"flow": True}, {"huber_c": None}, {"huber_c": 0.1}, {"weighting": "v"}, {"phases": 5}):
        network, settings = Gains(), dataclasses.replace(SHORT, **{k: v for k, v in options.items() if k != "flow"})
        with adapters_on(network, 2, seed=SHORT.seed) as adapters:
            trainer = trainer_of(adapters, network, settings, flow="flow" in options)
            batch = data(0, range(SHORT.batch))
            draws = draw(SHORT.seed, 0, range(SHORT.batch), batch.z0, trainer.grid, SHORT.cfg)
            wanted = distillation_loss(denoiser(network), adapters, batch, draws, stride=STRIDE, table=TABLE, **options)
            losses.append(trainer.step())
            assert losses[-1] == pytest.approx(wanted.item(), rel=1e-6)
    assert len({*losses}) == len(losses)


def test_processes_exchange_gradients_once_a_step_after_its_last_batch():
    seen = []

    class Engine(Alone):
        @contextmanager
        def no_sync(self, module):
            seen.append("alone")
            yield
            seen.append("end")

        def backward(self, loss):
            seen.append("backward")
            super().backward(loss)

        def reduce(self, tensor, reduction):
            seen.append(reduction)
            return tensor

    network = Gains()
    with adapters_on(network, 2) as adapters:
        trainer = trainer_of(adapters, network, dataclasses.replace(SHORT, accumulate=3), engine=Engine())
        trainer.step()
    assert seen == ["alone", "backward", "end"] * 2 + ["backward", "mean"]


# ---- what it converges to


def test_the_lora_turns_the_teacher_into_the_one_step_solution_of_the_ode():
    network = Gains()
    settings = Settings(
        steps=200,
        batch=32,
        learning_rate=0.03,
        decay=1.0,
        warmup=0,
        guidance_min=1.0,
        guidance_max=1.0,
        skip=STRIDE,
        huber_c=0.1,
        seed=2,
    )
    z0 = SPREAD * torch.randn(256, SIZE, generator=torch.Generator().manual_seed(9))
    noise = torch.randn(256, SIZE, generator=torch.Generator().manual_seed(10))
    with adapters_on(network, SIZE, seed=settings.seed) as adapters:
        trainer = trainer_of(adapters, network, settings)

        def error(point):
            """Root mean square distance of the one-step map from the ODE's end, in units of the data."""
            sigma = TABLE[point].expand(len(z0))
            x = z0 + sigma[:, None] * noise
            # The chain ends at the input in VP scale (c_skip is 1 there), hence the root.
            solution = perfect_jump(x, sigma) / (1 + TABLE[0] ** 2).sqrt()
            with torch.no_grad():
                return float((network(x, sigma) - solution).square().mean().sqrt() / SPREAD)

        before = [error(point) for point in GRID]
        trainer.run()
        after = [error(point) for point in GRID]
        assert max(before) > 0.4
        assert max(after) < 0.01  # 0.002 when written


def test_an_average_of_the_lora_can_be_target_and_result():
    settings = dataclasses.replace(SHORT, steps=60, average=0.9, average_target=True)
    network = Gains()
    with adapters_on(network, 2) as adapters:
        trainer = trainer_of(adapters, network, settings)
        trainer.run()
        last = adapters.lora_state_dict()
        with trainer.result():
            mean = adapters.lora_state_dict()
        assert_same_lora(adapters.lora_state_dict(), last)
    up = next(key for key in last if "lora_up" in key and last[key].abs().max() > 0)
    assert not torch.equal(mean[up], last[up])
    assert (mean[up] - last[up]).norm() < last[up].norm()


def test_the_average_as_target_changes_what_is_learned():
    """In step 1 average and LoRA are the same; from step 2 on the target is another network."""
    settings = dataclasses.replace(SHORT, average=0.9)
    (_, as_target), (_, as_result) = (
        trained(dataclasses.replace(settings, average_target=target)) for target in (True, False)
    )
    assert as_target[0] == as_result[0]
    assert all(one != other for one, other in zip(as_target[1:], as_result[1:], strict=True))


def test_the_average_forgets_its_start_and_follows():
    parameter = nn.Parameter(torch.tensor([1.0]))
    average = Average([parameter], 0.5)
    with torch.no_grad():
        parameter.copy_(torch.tensor([3.0]))
    average.update(1)  # 1 / 11 of the old
    assert average.values[0].item() == pytest.approx(1 / 11 + 3 * 10 / 11)
    average.update(1000)  # half of the old
    assert average.values[0].item() == pytest.approx((1 / 11 + 3 * 10 / 11 + 3) / 2)


# ---- interrupted and resumed


@pytest.mark.parametrize("stop", [1, 5, 11])
@pytest.mark.parametrize(
    "change",
    [
        {},
        {"average": 0.9, "average_target": True, "decay": 0.5, "accumulate": 2},
        {"scale_loss": True},
        *({"optimizer": name, "weight_decay": 0.01} for name in ("radam", "nadam", "adafactor", "sgd")),
        {"optimizer": "adamw8bit"},
    ],
)
@pytest.mark.usefixtures("eight_bits")
def test_an_interrupted_and_resumed_run_is_the_uninterrupted_one(tmp_path, stop, change):
    settings = dataclasses.replace(SHORT, warmup=3, **change)
    expected, losses = trained(settings)
    path = tmp_path / "run.safetensors"

    class Stop(BaseException):
        """Like an interrupt, not an ordinary error."""

    def interrupt(done, loss):
        if done == stop:
            raise Stop

    network = Gains()
    before = network(torch.ones(1, SIZE), TABLE[99:100]).detach()
    with pytest.raises(Stop), adapters_on(network, 2, seed=settings.seed) as adapters:
        trainer_of(adapters, network, settings).run(save_to=path, save_every=4, callback=interrupt)
    assert torch.equal(network(torch.ones(1, SIZE), TABLE[99:100]), before)

    # Elsewhere, later: another network object, and whatever torch has drawn meanwhile.
    torch.rand(7)
    network = Gains()
    with adapters_on(network, 2, seed=999) as adapters:
        trainer = trainer_of(adapters, network, settings)
        trainer.run(save_to=path)
        with trainer.result():
            assert_same_lora(adapters.lora_state_dict(), expected)
    assert trainer.losses == losses
    assert [file.name for file in tmp_path.iterdir()] == ["run.safetensors"]


@pytest.mark.parametrize("call", [2, 6])
def test_an_error_within_a_step_loses_that_step_only(tmp_path, call):
    expected, _ = trained()
    path = tmp_path / "run.safetensors"
    calls = []

    def flaky(step, items):
        calls.append(step)
        if len(calls) == call:
            raise RuntimeError("out of memory")
        return data(step, items)

    network = Gains()
    with adapters_on(network, 2, seed=SHORT.seed) as adapters:
        trainer = Trainer(denoiser(network), adapters, flaky, TABLE, SHORT)
        with pytest.raises(RuntimeError, match="out of memory"):
            trainer.run(save_to=path)
        assert trainer.done == call - 1
        assert path.exists() is (call > 1)
        trainer.run(save_to=path)
        assert_same_lora(adapters.lora_state_dict(), expected)


def test_a_finished_run_is_read_back_and_a_longer_one_goes_on(tmp_path, caplog):
    path = tmp_path / "run.safetensors"
    loras, written = [], []
    for steps in (12, 12, 20):
        network = Gains()
        with adapters_on(network, 2, seed=SHORT.seed) as adapters:
            trainer = trainer_of(adapters, network, dataclasses.replace(SHORT, steps=steps))
            trainer.run(save_to=path)
            assert trainer.done == steps == len(trainer.losses)
            loras.append(adapters.lora_state_dict())
            written.append(path.stat().st_ino)
    assert caplog.text == ""
    assert written[0] == written[1] != written[2]  # with nothing new it is not written again
    assert_same_lora(loras[1], loras[0])
    assert_same_lora(loras[2], trained(dataclasses.replace(SHORT, steps=20))[0])


def test_fewer_steps_than_there_are_already_are_told(tmp_path, caplog):
    path = tmp_path / "run.safetensors"
    for steps in (3, 2):
        network = Gains()
        with adapters_on(network, 2, seed=SHORT.seed) as adapters:
            trainer = trainer_of(adapters, network, dataclasses.replace(SHORT, steps=steps))
            trainer.run(save_to=path)
            assert trainer.done == 3
    assert "run.safetensors has been trained for 3 steps already, and steps is 2: the LoRA is that of 3." in caplog.text


def test_a_checkpoint_of_another_run_is_refused_by_name(tmp_path):
    path = tmp_path / "run.safetensors"
    network = Gains()
    with adapters_on(network, 2) as adapters:
        trainer_of(adapters, network, identity={"model": "a"}).run(save_to=path)
        other = trainer_of(adapters, network, dataclasses.replace(SHORT, skip=50, seed=4), identity={"model": "b"})
        with pytest.raises(ValueError, match=r"seed: 3, now 4; skip: 200, now 50; model: a, now b"):
            other.load(path)
        # What may be set anew after a divergence, where there was none.
        with pytest.raises(ValueError, match=r"learning_rate: 0\.02, now 0\.001\)"):
            trainer_of(adapters, network, dataclasses.replace(SHORT, learning_rate=1e-3), identity={"model": "a"}).load(
                path
            )
    network = Gains()
    with adapters_on(network, 3) as adapters, pytest.raises(ValueError, match="is the checkpoint of another") as told:
        trainer_of(adapters, network, identity={"model": "a"}).load(path)
    # Three of the twelve that differ are enough to know by.
    assert re.findall(r"blocks\.\d\.\w+: (\[\d, \d\], now \[\d, \d\])", str(told.value)) == [
        "[2, 3], now [3, 3]",
        "[3, 2], now [3, 3]",
        "[2, 3], now [3, 3]",
    ]


def test_a_damaged_checkpoint_is_named(tmp_path):
    path = tmp_path / "run.safetensors"
    path.write_bytes(b"nothing of the kind")
    network = Gains()
    with adapters_on(network, 2) as adapters, pytest.raises(ValueError, match="not a training checkpoint"):
        trainer_of(adapters, network).load(path)
    with adapters_on(network, 2) as adapters, pytest.raises(FileExistsError, match="is no checkpoint of LCM Kit"):
        trainer_of(adapters, network).run(save_to=path)


@pytest.mark.parametrize("facts", ["[" * 100_000, "[1]", "5", "{", "null"])
def test_facts_that_cannot_be_read_are_named(tmp_path, facts):
    path = tmp_path / "run.safetensors"
    save_file({"a": torch.ones(2)}, path, {checkpoint.FACTS: facts})
    with pytest.raises(ValueError, match=r"run\.safetensors: is not a training checkpoint"):
        checkpoint.read(path)


def test_a_checkpoint_is_written_into_a_folder_that_is_not_there_yet(tmp_path):
    path = tmp_path / "runs" / "today" / "run.safetensors"
    for done in (1, 2):
        checkpoint.write(path, {"a": torch.ones(2)}, {"done": done})
        assert checkpoint.read(path)[1] == {"done": done}


def test_a_failed_write_leaves_the_old_checkpoint(tmp_path, monkeypatch):
    path = tmp_path / "run.safetensors"
    checkpoint.write(path, {"a": torch.ones(2)}, {"done": 1})
    monkeypatch.setattr(whole.os, "replace", _full_disk)
    with pytest.raises(OSError, match=r"run\.safetensors: could not be written .*; is the disk full\?"):
        checkpoint.write(path, {"a": torch.zeros(2)}, {"done": 2})
    tensors, facts = checkpoint.read(path)
    assert facts == {"done": 1}
    assert torch.equal(tensors["a"], torch.ones(2))
    assert list(tmp_path.iterdir()) == [path]


def _full_disk(*_):
    raise OSError(errno.ENOSPC, "No space left on device")


@pytest.mark.skipif(os.name != "posix", reason="permissions of POSIX")
def test_a_checkpoint_is_as_readable_as_any_other_file(tmp_path):
    (tmp_path / "other").touch()
    checkpoint.write(tmp_path / "run.safetensors", {"a": torch.ones(2)}, {"done": 1})
    assert len({stat.S_IMODE(file.stat().st_mode) for file in tmp_path.iterdir()}) == 1


def test_what_is_no_checkpoint_is_never_replaced(tmp_path):
    """A distilled LoRA has the same note as a checkpoint, among others."""
    path = tmp_path / "run.safetensors"
    for notes in ({}, {"lcm_kit.distillation": "{}", "ss_network_module": "networks.lora"}):
        save_file({"a": torch.ones(2)}, path, notes)
        before = path.read_bytes()
        with pytest.raises(FileExistsError, match="is no checkpoint of LCM Kit"):
            checkpoint.write(path, {"a": torch.zeros(2)}, {"done": 2})
        network = Gains()
        with adapters_on(network, 2) as adapters, pytest.raises(FileExistsError, match="is no checkpoint of LCM Kit"):
            trainer_of(adapters, network).run(save_to=path)
        assert path.read_bytes() == before


@pytest.mark.parametrize("stopped", [False, True])
def test_a_training_goes_on_when_its_checkpoint_cannot_be_written(tmp_path, monkeypatch, caplog, stopped):
    network, path = Gains(), tmp_path / "run.safetensors"

    def stop(done, loss):
        if stopped and done == 7:
            raise KeyboardInterrupt

    with adapters_on(network, 2, seed=SHORT.seed) as adapters:
        trainer = trainer_of(adapters, network)
        with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt) if stopped else nullcontext():
            patch.setattr(whole.os, "link", _full_disk)
            patch.setattr(whole.os, "replace", _full_disk)
            trainer.run(save_to=path, save_every=5, callback=stop)
        lora = adapters.lora_state_dict()
    assert "No checkpoint of step 5" in caplog.text
    assert list(tmp_path.iterdir()) == []
    if not stopped:
        assert_same_lora(lora, trained()[0])


# ---- batches, gradients, what is left alone


def test_a_step_of_one_batch_is_a_step_of_two_half_batches():
    whole, _ = trained(dataclasses.replace(SHORT, steps=3))
    halves, _ = trained(dataclasses.replace(SHORT, steps=3, batch=2, accumulate=2))
    for key in whole:
        torch.testing.assert_close(halves[key], whole[key])


def test_pictures_of_another_training_are_no_checkpoint(tmp_path):
    path = tmp_path / "a.latents.safetensors"
    checkpoint.write(path, {"latents": torch.zeros(1, 4, 8, 8)}, {"prompts": "", "shape": [1], "cfg": 1, "seed": 0})
    network = Gains()
    with adapters_on(network, 2) as adapters:
        with pytest.raises(ValueError, match=r"a\.latents\.safetensors is no checkpoint .*lacks done.*another name"):
            trainer_of(adapters, network).load(path)


def test_a_run_does_not_touch_the_global_generator():
    torch.manual_seed(5)
    before = torch.get_rng_state()
    Gains()
    after_network = torch.get_rng_state()
    torch.set_rng_state(before)
    trained(dataclasses.replace(SHORT, steps=2))
    assert torch.equal(torch.get_rng_state(), after_network)


def test_only_the_lora_is_trained_and_the_weights_stay():
    network = Gains()
    before = {name: tensor.clone() for name, tensor in network.state_dict().items()}
    places = [p.data_ptr() for p in network.parameters()]
    with adapters_on(network, 2) as adapters:
        trainer = trainer_of(adapters, network)
        trainer.step()
        assert {id(p) for group in trainer.optimizer.param_groups for p in group["params"]} == {
            id(p) for p in adapters.parameters()
        }
        assert all(p.grad is None for p in network.parameters())
        assert len(adapters.factors()) == 2 * len(adapters.names)
    assert [p.data_ptr() for p in network.parameters()] == places
    assert all(p.requires_grad for p in network.parameters())
    for name, tensor in network.state_dict().items():
        assert torch.equal(tensor, before[name]), name


def test_scaling_the_loss_up_for_float16_is_undone_exactly():
    assert_same_lora(trained(dataclasses.replace(SHORT, scale_loss=True))[0], trained()[0])  # by a power of two
    network = Gains()
    with adapters_on(network, 2) as adapters:
        for scaled in (True, False):
            settings = dataclasses.replace(SHORT, scale_loss=scaled)
            assert trainer_of(adapters, network, settings).scaler.is_enabled() is scaled


def test_gradients_are_clipped():
    network = Gains()
    with adapters_on(network, 2) as adapters:
        trainer = trainer_of(adapters, network, dataclasses.replace(SHORT, clip=1e-3))
        trainer.step()
        norm = torch.stack([p.grad.norm() for p in adapters.parameters() if p.grad is not None]).norm()
        assert norm.item() == pytest.approx(1e-3, rel=1e-4)


def test_the_learning_rate_rises_and_falls():
    settings = Settings(steps=100, learning_rate=1.0, warmup=10, decay=0.2)
    assert [settings.rate_at(step) for step in (0, 4, 9, 50, 79, 90, 99)] == pytest.approx(
        [0.1, 0.5, 1.0, 1.0, 1.0, 0.5, 0.05]
    )


@pytest.mark.parametrize(
    ("shape", "fall"),
    [
        ("linear", lambda x: x),
        ("cosine", lambda x: (1 - math.cos(math.pi * x)) / 2),
        ("sqrt", lambda x: 1 - (1 - x) ** 0.5),
    ],
)
def test_every_fall_begins_at_the_rate_and_ends_near_nothing(shape, fall):
    settings = Settings(steps=100, learning_rate=1.0, warmup=10, decay=0.5, decay_shape=shape)
    rates = [settings.rate_at(step) for step in range(100)]
    assert rates[:10] == pytest.approx([(step + 1) / 10 for step in range(10)])
    assert rates[9:51] == [1.0] * 42
    assert rates[50:] == pytest.approx([fall((100 - step) / 50) for step in range(50, 100)])
    assert all(one >= other for one, other in pairwise(rates[9:]))
    assert dataclasses.replace(settings, decay=0.0).rate_at(99) == 1.0


OWN = {"adamw": torch.optim.AdamW, "radam": torch.optim.RAdam, "nadam": torch.optim.NAdam, "adafactor": torch.optim.Adafactor,
       "sgd": torch.optim.SGD}  # fmt: skip


@pytest.mark.parametrize("name", OWN)
def test_an_optimizer_is_torchs_own_and_pulls_weights_towards_nothing_apart_from_the_gradient(name):
    """Without a gradient a step leaves 1 - rate * decay of a weight: Loshchilov and Hutter 2019, algorithm 2."""
    settings = dataclasses.replace(SHORT, optimizer=name, learning_rate=0.1, weight_decay=0.5)
    factor = nn.Parameter(torch.tensor([[2.0, 4.0]]))
    optimizer = optimizer_of([factor], settings)
    assert type(optimizer) is OWN[name]
    factor.grad = torch.zeros_like(factor)
    optimizer.step()
    # SGD's decay is a gradient: with Nesterov's momentum its first step is 1.9 as long.
    torch.testing.assert_close(factor.detach(), torch.tensor([[2.0, 4.0]]) * (1 - 0.05 * (1.9 if name == "sgd" else 1)))


@pytest.mark.parametrize("name", ["adamw", "radam", "nadam", "adamw8bit"])
@pytest.mark.usefixtures("eight_bits")
def test_the_adams_have_the_betas_and_the_rate_that_are_set(name):
    settings = dataclasses.replace(SHORT, optimizer=name, learning_rate=0.1, weight_decay=0.5, betas=(0.7, 0.8))
    (group,) = optimizer_of([nn.Parameter(torch.ones(1))], settings).param_groups
    assert (group["lr"], group["weight_decay"], tuple(group["betas"])) == (0.1, 0.5, (0.7, 0.8))


@pytest.mark.parametrize("name", OWN)
def test_every_optimizer_learns(name):
    """A fifth of the way from the teacher to the solution of the ODE, or more, in 60 steps."""
    settings = dataclasses.replace(
        SHORT, steps=60, batch=16, decay=1.0, optimizer=name, huber_c=0.1, guidance_max=1.0,
        learning_rate={"sgd": 0.3, "adafactor": 0.1}.get(name, 0.03),
    )  # fmt: skip
    network, sigma = Gains(), TABLE[GRID[-1]].expand(64)
    x = sigma[:, None] * torch.randn(64, SIZE, generator=torch.Generator().manual_seed(9))

    def error():
        with torch.no_grad():
            return float((network(x, sigma) - perfect_jump(x, sigma)).square().mean().sqrt())

    with adapters_on(network, SIZE, seed=settings.seed) as adapters:
        before = error()
        trainer_of(adapters, network, settings).run()
        assert error() < 0.8 * before


@pytest.mark.skipif(importlib.util.find_spec("bitsandbytes") is not None, reason="bitsandbytes is installed")
def test_an_optimizer_that_is_not_installed_is_told_with_its_package():
    network = Gains()
    with adapters_on(network, 2) as adapters:
        with pytest.raises(
            ValueError, match="optimizer adamw8bit needs the package bitsandbytes: pip install bitsandbytes"
        ):
            trainer_of(adapters, network, dataclasses.replace(SHORT, optimizer="adamw8bit"))


def test_a_loss_that_is_no_number_ends_the_run():
    network = Gains()
    with adapters_on(network, 2) as adapters:
        trainer = Trainer(lambda x, s, c: network(x, s) * torch.nan, adapters, data, TABLE, SHORT)
        with pytest.raises(FloatingPointError, match=r"loss of step 1 is nan\. Lower learning_rate"):
            trainer.step()
        assert trainer.done == 0


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"steps": 0}, "steps is 0; it has to be a whole number, at least 1"),
        ({"learning_rate": 0.0}, "learning_rate is 0.0; it has to be a finite number, above 0. The default is 0.0001"),
        ({"guidance_min": 3.0, "guidance_max": 2.0}, "guidance_min is 3.0 and guidance_max is 2.0"),
        (
            {"guidance_min": math.nan, "guidance_max": 2.0},
            "guidance_min is nan; it has to be a finite number, at least 1",
        ),
        ({"guidance_min": 2.0, "guidance_max": math.inf}, "guidance_max is inf"),
        ({"guidance_min": -3.0, "guidance_max": 2.0}, "guidance_min is -3"),
        ({"learning_rate": math.inf}, "learning_rate is inf.*default is 0.0001"),
        ({"learning_rate": math.nan}, "learning_rate is nan"),
        ({"warmup": -5}, "warmup is -5; it has to be a whole number, at least 0"),
        ({"huber_c": math.nan}, "huber_c is nan"),
        ({"huber_c": -0.1}, "huber_c is -0.1"),
        ({"weight_decay": math.nan}, "weight_decay is nan"),
        ({"betas": (0.9, math.nan)}, "betas: the second is nan"),
        ({"betas": (1.0, 0.9)}, r"betas are \(1.0, 0.9\)"),
        ({"clip": math.nan}, "clip is nan"),
        ({"clip": 0.0}, "clip is 0.0; it has to be above 0"),
        ({"decay": math.nan}, "decay is nan"),
        ({"average": math.nan}, "average is nan"),
        ({"original_steps": -1}, "original_steps is -1"),
        ({"average": 1.0}, "average is 1.0"),
        ({"optimizer": "lion"}, "optimizer is 'lion'; it has to be one of adamw, radam"),
        ({"decay_shape": "step"}, "decay_shape is 'step'; it has to be one of linear, cosine, sqrt"),
        ({"weighting": "eps"}, "weighting is 'eps'; it has to be one of x0, v"),
    ],
)
def test_settings_that_make_no_sense_are_refused(wrong, message):
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(SHORT, **wrong)


ODD = ["3", None, True, 1.5, math.nan, math.inf, -math.inf, -1e9, [], (1.0,), (1.0, 2.0, 3.0), {}, object(), 2 + 1j]


def said_of(owner, one, value):
    """What is said against a value of a field by itself, as the range of its field has it; "" if nothing is."""
    given = (value, 0.5) if one.name == "betas" else value
    beside = {"guidance_min": 1.0} if one.name == "guidance_max" else {}
    try:
        owner(**beside | {one.name: given})
    except ValueError as error:
        return str(error) if "it has to be a whole number" in str(error) or "a finite number" in str(error) else ""
    return ""


@pytest.mark.parametrize("owner", [Settings, Setup])
def test_both_ends_of_a_range_are_in_it_and_what_lies_beyond_is_refused_with_the_range(owner):
    ranges = 0
    for one in dataclasses.fields(owner):
        low, high, above = (one.metadata.get(key) for key in ("low", "high", "above"))
        whole = one.type is int
        step = 1 if whole else 1e-6
        name = "betas: the first" if one.name == "betas" else one.name
        default = "" if one.name == "betas" else f" The default is {one.default:g}." if low is not None else ""
        among = (
            f", from {low:g} to {high:g}" if high is not None else f", {'above' if above else 'at least'} {low or 0:g}"
        )
        for end, way in ((low, -1), (high, 1)):
            if end is not None:
                ranges += 1
                assert bool(said_of(owner, one, end)) == above
                beyond = end + way * step
                assert said_of(owner, one, beyond) == (
                    f"{name} is {beyond!r}; it has to be a {'whole' if whole else 'finite'} number{among}.{default}"
                )
    assert ranges > (15 if owner is Settings else 0)


def test_sides_that_no_latent_has_are_refused_with_the_next_ones():
    for side, near in ((3, "8"), (20, "16 or 24"), (511, "504 or 512"), (1001, "1000 or 1008")):
        for name in ("width", "height"):
            with pytest.raises(ValueError, match=rf"^{name} is {side}; it has to be a multiple of 8, use {near}\.$"):
                Setup(**{name: side})


def test_what_the_average_is_compared_with_is_a_fact_of_the_run_where_there_is_one():
    def kept(**options):
        return dataclasses.replace(SHORT, **options).kept()

    assert kept(average=0.5) != kept(average=0.5, average_target=False)
    assert kept() == kept(average_target=False)


@pytest.mark.parametrize("owner", [Settings, Setup])
def test_a_value_of_any_kind_is_right_or_refused_by_name(owner):
    """Through the class, which no command line and no node stands before."""
    for one in dataclasses.fields(owner):
        for value in ODD:
            said = ""
            try:
                owner(**{one.name: value})
            except ValueError as error:
                said = str(error)
            if said:
                assert one.name in said, (one.name, value, said)
                assert re.search("has to be|have to be|the lower end. Exchange them", said), said
                continue
            kinds = (int,) if one.type is int else (bool,) if one.type is bool else (int, float)
            is_none = value is None and one.name == "huber_c"
            assert is_none or type(value) in kinds, (one.name, value)
            assert is_none or math.isfinite(value) or one.name == "clip", (one.name, value)


@pytest.mark.parametrize(("skip", "points"), [(20, 50), (1, 1000), (10, 100), (30, 33), (333, 3), (1000, 1)])
def test_the_grid_is_that_of_the_samplers(skip, points):
    assert skipping_grid(skip, 1000) == lcm_timesteps(points, original_steps=points)[::-1]


@pytest.mark.parametrize("total", [500, 2000])
def test_a_model_of_other_timesteps_is_trained_on_its_own_grid(total):
    """All points, those of original_steps, and those that each phase visits, or as many more."""

    def grid(**options):
        return dataclasses.replace(SHORT, **options).grid(total)

    def every(k):
        return [*range(k - 1, total, k)]

    assert grid(skip=20, original_steps=0) == every(20)
    assert grid(skip=20, original_steps=100) == every(total // 100)
    assert grid(skip=25, original_steps=0, phases=4) == every(25)
    assert grid(skip=25, original_steps=total // 5, phases=4) == every(5)


def test_more_timesteps_may_be_trained_than_the_solver_visits():
    settings = dataclasses.replace(SHORT, skip=200, original_steps=50)
    assert settings.grid(1000) == lcm_timesteps(50)[::-1]
    assert dataclasses.replace(settings, original_steps=0).grid(1000) == [199, 399, 599, 799, 999]
    with pytest.raises(ValueError, match="original_steps is -1"):
        dataclasses.replace(settings, original_steps=-1).grid(1000)


@pytest.mark.parametrize(("skip", "use"), [(300, "333 or 250"), (600, "1000 or 500"), (1001, "1000")])
def test_a_skip_that_no_sampler_has_is_refused_with_the_next_ones(skip, use):
    with pytest.raises(ValueError, match=f"skip is {skip}, .* use {use}"):
        skipping_grid(skip, 1000)


def test_the_toy_is_what_it_says():
    """Its teacher's DDIM steps stay on the ODE, and its denoiser is the mean of the data given x."""
    sigma, below = TABLE[GRID[3]], TABLE[GRID[2]]
    network = Gains()
    x = width(sigma) * torch.ones(1, SIZE)
    stepped = x + (below - sigma) * (x - network(x, sigma[None])) / sigma
    torch.testing.assert_close(stepped, width(below) * torch.ones(1, SIZE))
    generator = torch.Generator().manual_seed(0)
    z0 = SPREAD * torch.randn(200_000, 1, generator=generator)
    noisy = z0 + 0.7 * torch.randn(200_000, 1, generator=generator)
    slope = (z0 * noisy).mean() / noisy.square().mean()  # of the best linear guess
    assert slope == pytest.approx(perfect_denoiser(torch.ones(1, 1), torch.tensor([0.7])).item(), abs=0.005)


# ---- divergence


def test_what_diverges_is_noticed_long_before_it_is_no_number():
    """At a rate of 10 the losses go to the thousands, where the data has a spread of 0.5."""
    with pytest.raises(Diverged, match=r"the loss of step \d+ is .* over 1000 times the data's spread. Lower learning"):
        trained(dataclasses.replace(SHORT, steps=200, learning_rate=10.0), spread=SPREAD)


@pytest.mark.parametrize("huber_c", [0.001, None])
def test_ten_steps_far_off_are_a_divergence_and_nine_are_none(huber_c):
    health = Health(dataclasses.replace(SHORT, huber_c=huber_c), 0.5)
    far = 11 * 0.5 if huber_c else (11 * 0.5) ** 2
    near = 9 * 0.5 if huber_c else (9 * 0.5) ** 2
    health.check(100, [near] * 100)
    health.check(9, [far] * 9)
    health.check(19, [far] * 9 + [near] + [far] * 9)
    with pytest.raises(Diverged, match=r"10 steps, up to step 12, .* over 10 times the data's spread"):
        health.check(12, [near] * 2 + [far] * 10)
    assert health.sound(near)
    assert not health.sound(far)


def test_what_is_at_a_bound_is_no_divergence_yet_and_what_may_help_is_told():
    for settings, more in ((SHORT, ""), (dataclasses.replace(SHORT, scale_loss=True), ", or train in bf16 or fp32")):
        health = Health(settings, 2.0)
        assert health.sound(10.0 * 2)
        health.check(1, [1000.0 * 2])
        with pytest.raises(Diverged, match=rf"Lower learning_rate \(now 0\.02\){more}\.$"):
            health.check(1, [1000.1 * 2])


@pytest.mark.parametrize("spread", [None, 2.0])
def test_a_training_is_sound_until_a_loss_is_astray_by_the_spread_of_the_data(spread):
    """And not in the middle of an update. The spread is 1 unless told."""
    network = Gains()
    with adapters_on(network, 2) as adapters:
        trainer = trainer_of(adapters, network, **({} if spread is None else {"spread": spread}))
        assert trainer.sound
        for loss, sound in ((9.9, True), (10.1, False), (0.1, True)):
            trainer.losses.append(loss * (spread or 1.0))
            assert trainer.sound is sound

        def fails(*_, **__):
            raise RuntimeError

        trainer.optimizer.step = fails
        with pytest.raises(RuntimeError):
            trainer.step()
        assert not trainer.sound


def test_half_an_update_is_not_kept(tmp_path):
    path, network = tmp_path / "run.safetensors", Gains()
    with adapters_on(network, 2) as adapters:
        trainer = trainer_of(adapters, network)
        update = trainer.optimizer.step

        def fails_in_step_4(*_, **__):
            if trainer.done == 3:
                raise RuntimeError
            update()

        trainer.optimizer.step = fails_in_step_4
        with pytest.raises(RuntimeError):
            trainer.run(save_to=path, save_every=2)
    assert checkpoint.read(path)[1]["done"] == 2


def hopeless_after(step, network, calls):
    """A source whose data blows up from `step` on, unless the learning rate is low."""

    def source(number, items):
        batch = data(number, items)
        calls.append(number)
        return dataclasses.replace(batch, z0=batch.z0 * (torch.inf if number >= step else 1))

    return source


@pytest.mark.parametrize("save_every", [1, 4, 100])
def test_a_divergence_leaves_the_last_sound_checkpoint_and_a_lower_rate_goes_on(tmp_path, save_every, caplog):
    """The advice works under the same name, and the sound steps are not made again."""
    path, fatal, calls = tmp_path / "run.safetensors", 6, []
    network = Gains()
    with adapters_on(network, 2, seed=SHORT.seed) as adapters:
        trainer = Trainer(denoiser(network), adapters, hopeless_after(fatal, network, calls), TABLE, SHORT)
        with pytest.raises(Diverged, match=r"loss of step 7 is nan\. Lower learning_rate \(now 0\.02\)\.") as told:
            trainer.run(save_to=path, save_every=save_every)
    kept = (fatal - 1) // save_every * save_every
    if save_every > fatal:
        assert not path.exists()
        assert str(told.value).endswith("(now 0.02).")
        assert told.value.kept == 0
    else:
        assert f"It then goes on from step {kept}, the last one that run.safetensors keeps." in str(told.value)
        assert told.value.kept == kept
        tensors, facts = checkpoint.read(path)
        assert facts["done"] == kept == len(tensors["losses"])
        assert facts["diverged"] == fatal + 1
        assert all(tensor.isfinite().all() for tensor in tensors.values())

    network, calls = Gains(), []
    with adapters_on(network, 2, seed=SHORT.seed) as adapters:
        lower = dataclasses.replace(SHORT, learning_rate=0.001, warmup=2)
        trainer = Trainer(denoiser(network), adapters, hopeless_after(99, network, calls), TABLE, lower)
        trainer.run(save_to=path)
    assert calls == list(range(0 if save_every > fatal else kept, SHORT.steps))
    assert ("goes on from step" in caplog.text) == (save_every < fatal)
    assert "diverged" not in checkpoint.read(path)[1]


def test_after_a_divergence_the_data_and_the_guidance_stay_what_they_were(tmp_path):
    path, network = tmp_path / "run.safetensors", Gains()
    with adapters_on(network, 2, seed=SHORT.seed) as adapters:
        trainer = Trainer(denoiser(network), adapters, hopeless_after(6, network, []), TABLE, SHORT)
        with pytest.raises(Diverged):
            trainer.run(save_to=path, save_every=2)
        for change in ({"skip": 100}, {"guidance_max": 4.0}, {"learning_rate": 1e-3, "seed": 5}):
            other = trainer_of(adapters, network, dataclasses.replace(SHORT, **change))
            with pytest.raises(ValueError, match="is the checkpoint of another training"):
                other.load(path)


def test_a_kept_state_that_leads_astray_at_once_is_told_to_be_past_help(tmp_path):
    path, network = tmp_path / "run.safetensors", Gains()
    with adapters_on(network, 2, seed=SHORT.seed) as adapters:
        trainer_of(adapters, network, dataclasses.replace(SHORT, steps=3)).run(save_to=path)
        trainer = Trainer(denoiser(network), adapters, hopeless_after(3, network, []), TABLE, SHORT)
        with pytest.raises(
            Diverged, match=r"run\.safetensors keeps is past help: remove that file, or use another name"
        ) as told:
            trainer.run(save_to=path)
    assert told.value.kept == 0


def test_a_learning_rate_that_is_never_reached_is_told():
    assert rate_words(Settings(steps=100, warmup=20)) == []
    assert rate_words(Settings(steps=20, warmup=20)) == []
    assert rate_words(Settings(steps=100, warmup=20, decay=0.5)) == []
    (said,) = rate_words(Settings(steps=100, warmup=500))
    assert said == (
        "learning_rate 0.0001 is never reached, only 2e-05: warmup is 500 of 100 steps. Set warmup to 10 or less, or train longer."
    )
    assert rate_words(Settings(steps=100, decay=1.0)) == []
    # It has risen to more than half where it begins to fall, and then falls for longer than it would have risen.
    assert rate_words(Settings(steps=100, warmup=90, decay=0.5)) == []
    assert rate_words(Settings(steps=100, warmup=80, decay=1.0)) == []
    assert "and decay 1." in rate_words(Settings(steps=100, warmup=300, decay=1.0))[0]


@pytest.mark.parametrize("shape", get_args(Fall))
@pytest.mark.parametrize("steps", [1, 7, 100])
def test_the_rate_that_is_told_is_the_highest_of_all_steps_and_the_advice_holds(steps, shape):
    for warmup, decay in itertools.product([0, 1, 3, 45, 50, 99, 500], [0.0, 0.1, 0.5, 1.0]):
        settings = Settings(steps=steps, warmup=warmup, decay=decay, decay_shape=shape)
        rates = [settings.rate_at(step) for step in range(steps)]
        assert settings.highest_rate == max(rates), settings
        hints = rate_words(settings)
        assert bool(hints) == (max(rates) < settings.learning_rate / 2), settings
        if hints:
            assert f"only {max(rates):.2g}:" in hints[0]
            (advised,) = re.findall(r"Set warmup to (\d+)", hints[0])
            assert rate_words(dataclasses.replace(settings, warmup=int(advised))) == [], settings


def test_solver_steps_that_end_between_trained_timesteps_are_refused():
    with pytest.raises(ValueError, match="original_steps is 50 and skip is 1: a solver step ends between two trained"):
        Settings(original_steps=50, skip=1).grid(1000)
    for points, skip in ((8, 125), (50, 20), (33, 30), (50, 200), (3, 333)):
        Settings(original_steps=points, skip=skip).grid(1000)


@pytest.mark.parametrize("stop", [None, 3])
def test_only_the_first_of_several_processes_writes_and_each_has_pictures_of_its_own(tmp_path, stop):
    """Whether the run ends or breaks off. Step by step the second process takes what the first leaves."""

    def interrupt(done, loss):
        if done == stop:
            raise KeyboardInterrupt

    for engine in (Alone(), Second()):
        network, path, drawn = Gains(), tmp_path / f"{engine.process_index}.safetensors", []

        def noted(step, items, drawn=drawn):
            drawn.append([*items])
            return data(step, items)

        with adapters_on(network, 2, seed=3) as adapters:
            trainer = Trainer(denoiser(network), adapters, noted, TABLE, SHORT, engine=engine)
            with pytest.raises(KeyboardInterrupt) if stop else nullcontext():
                trainer.run(save_to=path, save_every=2, callback=interrupt)
        assert path.exists() == (engine.process_index == 0)
        share = [*range(engine.process_index * SHORT.batch, (engine.process_index + 1) * SHORT.batch)]
        assert drawn == [share] * (stop or SHORT.steps)
