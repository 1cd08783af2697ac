"""What a training tells on its way: the validation loss and the table of its losses."""

import dataclasses
import importlib.util
import re
from contextlib import nullcontext
from itertools import pairwise
from types import SimpleNamespace

import pytest
import torch

from lcm_kit.distillation.health import Diverged
from lcm_kit.distillation.log import COLUMNS, Table, read_table
from lcm_kit.distillation.objective import Batch, distillation_loss
from lcm_kit.distillation.trainer import Trainer, adapters_on
from lcm_kit.distillation.validation import DRAWS, fixed_draws, validation_loss
from lcm_kit.host.training.course import Course
from lcm_kit.host.training.report import clock, validation_words
from lcm_kit.launch.loggers import TensorBoard, WeightsAndBiases, check_writers
from lcm_kit.lora_merge.disk.whole import held
from lcm_kit.tests.distillation.test_trainer import assert_same_lora, hopeless_after, trained
from lcm_kit.tests.distillation.toy import SETTINGS, SPREAD, TABLE, Gains, data, denoiser

# With these the LoRA becomes the exact solution, see test_trainer.
LONG = dataclasses.replace(
    SETTINGS, steps=100, batch=16, accumulate=1, learning_rate=0.03, decay=1.0, huber_c=0.1, guidance_max=1.0
)


def picture(number):
    noise = torch.randn(1, 3, generator=torch.Generator().manual_seed(number))
    return Batch(SPREAD * noise, None, None)


def test_two_runs_under_one_name_do_not_write_over_each_other(tmp_path):
    kept = tmp_path / "run" / "run.safetensors"
    kept.parent.mkdir()
    network = Gains()
    with adapters_on(network, 2, seed=SETTINGS.seed) as adapters:
        trainer = Trainer(denoiser(network), adapters, data, TABLE, SETTINGS)
        course = Course(trainer, None, picture, every=1000)
        with (
            held(kept),
            pytest.raises(ValueError, match=r"run\.safetensors in run is being trained by another process just now"),
        ):
            course.run(kept)
        assert trainer.done == 0
    assert not [*kept.parent.iterdir()]


@pytest.mark.parametrize(
    "options",
    [
        {"huber_c": 0.001, "weighting": "x0"},
        {"huber_c": None, "weighting": "v"},
        {"huber_c": 0.1, "flow": True},
        {"huber_c": 0.1, "phases": 5},
    ],
)
def test_the_validation_loss_is_the_mean_loss_of_its_draws_and_changes_nothing(options):
    network = Gains()
    state = torch.get_rng_state()
    settings = {name: value for name, value in options.items() if name != "flow"}
    with adapters_on(network, 2, seed=SETTINGS.seed) as adapters:
        trainer = Trainer(
            denoiser(network), adapters, data, TABLE, dataclasses.replace(SETTINGS, **settings), flow="flow" in options
        )
        trainer.step()
        before = adapters.lora_state_dict()
        expected = sum(
            distillation_loss(
                denoiser(network), adapters, picture(n), fixed_draws(trainer, n, picture(n)), stride=SETTINGS.skip, table=TABLE,
                **options,
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
    # The middles of eighths of the 50 timesteps 19, 39, ..., 999: numbers 3, 9, 15, 21, 28, 34, 40 and 46 of them.
    assert timesteps == [79, 199, 319, 439, 579, 699, 819, 939]


def test_its_guidance_is_in_the_middle_and_its_noise_another_for_each_draw():
    network = Gains()
    with adapters_on(network, 2) as adapters:
        trainer = Trainer(
            denoiser(network), adapters, data, TABLE, dataclasses.replace(SETTINGS, guidance_min=2.0, guidance_max=5.0)
        )
        draws = [fixed_draws(trainer, n, Batch(torch.zeros(1, 4, 3).double(), None, None)) for n in range(DRAWS)]
    assert all(one.cfg.tolist() == [3.5] for one in draws)
    assert all(one.noise.shape == (1, 4, 3) and one.noise.dtype == torch.float64 for one in draws)
    assert len({one.noise.sum().item() for one in draws}) == DRAWS
    assert 0.7 < torch.stack([one.noise for one in draws]).std() < 1.3  # 96 normal numbers: 1 and 0.07


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
    path = tmp_path / "runs" / "new" / "run.csv"
    table = Table(path, 0)
    for step in range(1, 6):
        table.write({"step": step, "loss": step / 3} | ({"validation_loss": 0.5} if step == 4 else {}))
    table.close()
    assert path.read_text().splitlines()[0] == ",".join(COLUMNS)
    path.write_text(path.read_text() + "6,0.2")  # a stop within a line
    table = Table(path, 3)
    table.write({"step": 4, "loss": 9.0})
    table.close()
    assert b"\r" not in path.read_bytes()  # lines that are read again and new ones end alike
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


# ---- the course


class Samples:
    """In the place of a Strip: when they were taken."""

    def __init__(self):
        self.taken = []

    def take(self, *, first=False):
        self.taken.append(first)


class Stop(BaseException):
    """Like an interrupt, not an ordinary error."""


def course_of(trainer, every, **options):
    return Course(trainer, Samples(), picture, every=every, **options)


@pytest.mark.parametrize("stop", [None, 5, 8])
def test_whatever_ends_a_training_the_lora_of_its_last_step_is_a_file(stop, tmp_path):
    network, filed = Gains(), []
    settings = dataclasses.replace(SETTINGS, steps=10)

    def stopped(course, new):
        if trainer.done == stop:
            raise Stop

    with adapters_on(network, 2, seed=settings.seed) as adapters:
        trainer = Trainer(denoiser(network), adapters, data, TABLE, settings)
        course = course_of(
            trainer, 4, save_lora=lambda: filed.append(trainer.done), shown=stopped, table=tmp_path / "a.csv"
        )
        with pytest.raises(Stop) if stop else nullcontext():
            course.run(tmp_path / "run.safetensors")
    assert filed == {None: [4, 8, 10], 5: [4, 5], 8: [4, 8]}[stop]
    rows = read_table(tmp_path / "a.csv")
    assert [row["step"] for row in rows] == list(range((stop or 10) + 1))
    assert [int(row["step"]) for row in rows if "validation_loss" in row] == [0, 4, 8][: 2 if stop == 5 else 3]
    assert course.strip.taken[0] is True
    assert len(course.strip.taken) == {None: 4, 5: 2, 8: 3}[stop]


def test_after_a_divergence_the_lora_from_before_stays(tmp_path):
    network, filed = Gains(), []
    with adapters_on(network, 2, seed=SETTINGS.seed) as adapters:
        trainer = Trainer(
            denoiser(network), adapters, hopeless_after(6, network, []), TABLE, dataclasses.replace(SETTINGS, steps=10)
        )
        with pytest.raises(Diverged):
            course_of(trainer, 4, save_lora=lambda: filed.append(trainer.done)).run(tmp_path / "run.safetensors")
    assert filed == [4]


def test_a_lora_that_cannot_be_written_is_told_and_the_training_goes_on(caplog):
    def full():
        raise OSError("the disk is full")

    network = Gains()
    with adapters_on(network, 2, seed=SETTINGS.seed) as adapters:
        trainer = Trainer(denoiser(network), adapters, data, TABLE, SETTINGS)
        course_of(trainer, 4, save_lora=full).run(None)
        assert trainer.done == SETTINGS.steps
        assert_same_lora(adapters.lora_state_dict(), trained(SETTINGS)[0])
    assert "No LoRA file of step 4: the disk is full" in caplog.text


def test_a_short_run_is_looked_at_once(tmp_path):
    network = Gains()
    with adapters_on(network, 2, seed=SETTINGS.seed) as adapters:
        course = course_of(Trainer(denoiser(network), adapters, data, TABLE, SETTINGS), 100)
        course.run(None)
    assert course.strip.taken == [False]
    assert course.validation == []


def test_the_seconds_of_a_step_are_without_what_is_shown(monkeypatch):
    now, network, said = [0.0], Gains(), []
    monkeypatch.setattr("lcm_kit.host.training.course.time", SimpleNamespace(monotonic=lambda: now[0]))

    def slow(course, new):
        now[0] += 1000
        said.append(course.words)

    def loaded(*which):
        now[0] += 1 / SETTINGS.accumulate
        return data(*which)

    with adapters_on(network, 2, seed=SETTINGS.seed) as adapters:
        course = course_of(Trainer(denoiser(network), adapters, loaded, TABLE, SETTINGS), 100, shown=slow)
        course.run(None)
    assert course.seconds_a_step == pytest.approx(1)
    assert re.fullmatch(r"step 3 of 6, loss \S+; 1 seconds a step, 0:03 left", said[2])
    assert [clock(seconds) for seconds in (4.6, 65, 3600 * 2 + 3 * 60 + 4)] == ["0:05", "1:05", "2:03:04"]


def test_the_validation_loss_is_told_and_whether_it_has_risen():
    assert validation_words([]) == validation_words([(0, 0.5)]) == []
    (falling,), (risen,) = (
        validation_words([(0, 0.5), (10, 0.25)]),
        validation_words([(5, 0.5), (10, 0.25), (20, 0.375)]),
    )
    assert falling == (
        "Validation loss, always of the same pictures and noise: 0.5 at step 0, 0.25 at the end; lowest 0.25 at step 10."
    )
    assert risen.startswith(
        "Validation loss, always of the same pictures and noise: 0.5 at step 5, 0.375 at the end; lowest 0.25 at"
    )
    assert "at step 10. It has risen since: a lower learning_rate" in risen


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
