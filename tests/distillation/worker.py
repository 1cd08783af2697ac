"""One process of a training of the Gaussian toy under torchrun: worker.py FILE CHECKPOINT.

Trains half the steps, then the rest from the checkpoint, and writes the LoRA to FILE. `accelerate` shares the gradients; it is given to the trainer as it is.
"""

import dataclasses
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import conftest  # noqa: F401  (makes this repository importable as lcm_kit)
import torch
from accelerate import Accelerator
from safetensors.torch import save_file

from lcm_kit.distillation.trainer import Trainer, adapters_on
from lcm_kit.tests.distillation.toy import SETTINGS, TABLE, Gains, data, denoiser


def main() -> None:
    file, kept = sys.argv[1:]
    torch.set_num_threads(1)
    accelerator = Accelerator(cpu=True)
    for steps in (SETTINGS.steps // 2, SETTINGS.steps):
        settings = dataclasses.replace(SETTINGS, steps=steps, batch=SETTINGS.batch // accelerator.num_processes)
        network = Gains()
        with adapters_on(network, 2, seed=settings.seed) as adapters:
            trainer = Trainer(denoiser(network), adapters, data, TABLE, settings, engine=accelerator)
            trainer.run(save_to=Path(kept), save_every=2)
            factors = {name: factor.detach().clone() for name, factor in adapters.factors().items()}
        accelerator.wait_for_everyone()  # the checkpoint is written by the first process alone
    # Every process must have the same, and the loss of all its images.
    means = torch.cat([torch.cat([f.flatten() for f in factors.values()]), torch.tensor(trainer.losses)])
    assert torch.equal(accelerator.reduce(means.clone(), "mean"), means), "the processes differ"
    if accelerator.is_main_process:
        save_file(
            factors | {"losses": torch.tensor(trainer.losses)}, file, {"processes": str(accelerator.num_processes)}
        )
    accelerator.wait_for_everyone()
    accelerator.end_training()
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main()
