"""What a training tells on its way: the validation loss and the table of its losses."""

import dataclasses
import importlib.util
from itertools import pairwise

import pytest
import torch

from lcm_kit.distillation.log import COLUMNS, Table, read_table
from lcm_kit.distillation.objective import Batch, distillation_loss
from lcm_kit.distillation.trainer import Trainer, adapters_on
from lcm_kit.distillation.validation import DRAWS, fixed_draws, validation_loss
from lcm_kit.launch.loggers import TensorBoard, WeightsAndBiases, check_writers
from lcm_kit.tests.distillation.test_trainer import assert_same_lora, trained
from lcm_kit.tests.distillation.toy import SETTINGS, SPREAD, TABLE, Gains, data, denoiser

# With these the LoRA becomes the exact solution, see test_trainer.
LONG = dataclasses.replace(
    SETTINGS, steps=100, batch=16, accumulate=1, learning_rate=0.03, decay=1.0, huber_c=0.1, guidance_max=1.0
)


def picture(number):
    noise = torch.randn(1, 3, generator=torch.Generator().manual_seed(number))
    return Batch(SPREAD * noise, None, None)


def test_the_validation_loss_is_the_mean_loss_of_its_draws_and_changes_nothing():
    network = Gains()
    state = torch.get_rng_state()
    with adapters_on(network, 2, seed=SETTINGS.seed) as adapters:
        trainer = Trainer(denoiser(network), adapters, data, TABLE, SETTINGS)
        trainer.step()
        before = adapters.lora_state_dict()
        expected = sum(
            distillation_loss(
                denoiser(network), adapters, picture(n), fixed_draws(trainer, n, picture(n)), stride=SETTINGS.skip, table=TABLE
            ).item()
            for n in range(DRAWS)
        ) / DRAWS  # fmt: skip
        assert validation_loss(trainer, picture) == pytest.approx(expected, rel=1e-6)
        assert validation_loss(trainer, picture) == validation_loss(trainer, picture)
        assert_same_lora(adapters.lora_state_dict(), before)
    assert torch.equal(torch.get_rng_state(), state)


def test_its_timesteps_are_spread_over_the_trained_ones():
    network = Gains()
    with adapters_on(network, 2) as adapters:
        trainer = Trainer(denoiser(network), adapters, data, TABLE, dataclasses.replace(SETTINGS, skip=20))
        timesteps = [int(fixed_draws(trainer, n, picture(n)).timestep) for n in range(DRAWS)]
    assert timesteps == sorted(set(timesteps))
    assert timesteps[0] < 100
    assert timesteps[-1] > 900
    assert set(timesteps) <= set(trainer.grid)


def test_the_validation_loss_falls_where_the_training_loss_is_noise():
    """Training losses of neighbouring steps differ by more than what was learnt between them; fixed draws do not."""
    network, course = Gains(), []
    with adapters_on(network, 3, seed=SETTINGS.seed) as adapters:
        trainer = Trainer(denoiser(network), adapters, data, TABLE, LONG)
        course.append(validation_loss(trainer, picture))
        trainer.run(callback=lambda done, loss: course.append(validation_loss(trainer, picture)))
    assert course[-1] < 0.1 * course[0]
    jumps, steps = ([abs(one - other) for one, other in pairwise(curve)] for curve in (trainer.losses, course))
    assert sum(steps) < 0.5 * sum(jumps)


def test_a_run_that_is_watched_ends_in_the_same_lora():
    network = Gains()
    with adapters_on(network, 2, seed=SETTINGS.seed) as adapters:
        trainer = Trainer(denoiser(network), adapters, data, TABLE, SETTINGS)
        trainer.run(callback=lambda done, loss: validation_loss(trainer, picture))
        watched = adapters.lora_state_dict()
    assert_same_lora(watched, trained(SETTINGS)[0])


# ---- the table


def test_a_table_has_a_line_for_each_step_and_goes_on_where_the_run_does(tmp_path):
    path = tmp_path / "new" / "run.csv"
    table = Table(path, 0)
    for step in range(1, 6):
        table.write({"step": step, "loss": step / 3} | ({"validation_loss": 0.5} if step == 4 else {}))
    table.close()
    assert path.read_text().splitlines()[0] == ",".join(COLUMNS)
    path.write_text(path.read_text() + "6,0.2")  # a stop within a line
    table = Table(path, 3)
    table.write({"step": 4, "loss": 9.0})
    table.close()
    rows = read_table(path)
    assert [row["step"] for row in rows] == [1, 2, 3, 4]
    assert rows[0]["loss"] == pytest.approx(1 / 3, rel=1e-9)
    assert rows[3] == {"step": 4, "loss": 9.0}


@pytest.mark.parametrize("content", [b"", b"a,b\n1,2\n", b"\xff\xfe\x00"])
def test_another_file_is_not_written_over(content, tmp_path):
    (tmp_path / "a.csv").write_bytes(content)
    with pytest.raises(FileExistsError, match=r"a\.csv: exists already and is no table"):
        Table(tmp_path / "a.csv", 0)
    assert (tmp_path / "a.csv").read_bytes() == content


# ---- other programs


class Recorder:
    """In the place of a package: notes every call."""

    def __init__(self):
        self.calls = []

    def __getattr__(self, name):
        def call(*args, **options):
            self.calls.append((name, args, options))
            return self

        return call


def test_tensorboard_gets_each_number_under_its_name(tmp_path):
    module = Recorder()
    writer = TensorBoard(module, tmp_path)
    writer.write({"step": 7, "loss": 0.5, "validation_loss": 0.25})
    writer.close()
    assert module.calls == [
        ("SummaryWriter", (str(tmp_path / "tensorboard"),), {}),
        ("add_scalar", ("loss", 0.5, 7), {}),
        ("add_scalar", ("validation_loss", 0.25, 7), {}),
        ("close", (), {}),
    ]


def test_weights_and_biases_goes_on_under_the_same_id(tmp_path):
    module = Recorder()
    writer = WeightsAndBiases(module, tmp_path / "lcm.run")
    writer.write({"step": 7, "loss": 0.5})
    writer.close()
    (_, _, options), (_, logged, step), (closed, _, _) = module.calls
    assert (options["id"], options["resume"], options["dir"]) == ("lcm-run", "allow", str(tmp_path / "lcm.run"))
    assert (logged, step, closed) == (({"loss": 0.5},), {"step": 7}, "finish")


@pytest.mark.skipif(importlib.util.find_spec("tensorboard") is not None, reason="tensorboard is installed")
def test_a_logger_that_is_not_installed_is_told_with_its_package():
    with pytest.raises(
        ValueError, match="--log-with tensorboard needs the package tensorboard: pip install tensorboard"
    ):
        check_writers(["tensorboard"])
    check_writers([])
