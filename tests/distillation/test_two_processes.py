"""Data parallel training with `accelerate` and torchrun: two processes on the CPU (gloo) train what one trains."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import safetensors.torch
import torch

from lcm_kit.distillation.trainer import Trainer, adapters_on
from lcm_kit.tests.distillation.toy import SETTINGS, TABLE, Gains, data, denoiser

pytest.importorskip("accelerate", reason="the engine for several processes: pip install -r tools/requirements.txt")
WORKER = Path(__file__).with_name("worker.py")


def alone():
    """What worker.py trains, in this process and without accelerate."""
    network = Gains()
    with adapters_on(network, 2, seed=SETTINGS.seed) as adapters:
        trainer = Trainer(denoiser(network), adapters, data, TABLE, SETTINGS)
        trainer.run()
        factors = {name: factor.detach().clone() for name, factor in adapters.factors().items()}
    return factors | {"losses": torch.tensor(trainer.losses)}


def run(processes, *arguments):
    launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"]
    # A process that is aborted says where each of its threads was. torchrun's own summary comes last and is long.
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONFAULTHANDLER": "1"}
    done = subprocess.run(
        [sys.executable, *launcher, str(WORKER), *map(str, arguments)],
        capture_output=True, text=True, timeout=240, env=environment, stdin=subprocess.DEVNULL,
    )  # fmt: skip
    assert done.returncode == 0, f"{done.stdout[-5000:]}\n{done.stderr[-30_000:]}"


def test_two_processes_train_what_one_trains_and_resume(tmp_path):
    expected, two = alone(), tmp_path / "two.safetensors"
    run(2, two, tmp_path / "kept.safetensors")  # stops half-way and goes on; each process has half the batch
    with safetensors.safe_open(two, "pt") as file:
        assert file.metadata() == {"processes": "2"}
    actual = safetensors.torch.load_file(two)
    assert actual.keys() == expected.keys()
    assert any(tensor.abs().max() > 0 for name, tensor in expected.items() if name.endswith(".up"))
    for name, tensor in expected.items():
        torch.testing.assert_close(actual[name], tensor, rtol=1e-4, atol=1e-5, msg=name)  # sums in another order
