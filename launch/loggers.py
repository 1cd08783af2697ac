"""Programs that draw the losses of a training, if the user has them: TensorBoard and Weights & Biases."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ..distillation.log import Writer

# Name -> (module, package to install).
LOGGERS = {"tensorboard": ("torch.utils.tensorboard", "tensorboard"), "wandb": ("wandb", "wandb")}


def check_writers(names: Sequence[str]) -> None:
    """Raises ValueError for one that is not installed."""
    for name in names:
        _module(name)


def writers(names: Sequence[str], folder: Path) -> list[Writer]:
    """folder: of the run; each makes one of its own in it. Raises ValueError for one that is not installed."""
    makers: dict[str, Callable[[Any, Path], Writer]] = {"tensorboard": TensorBoard, "wandb": WeightsAndBiases}
    return [makers[name](_module(name), folder) for name in names]


def _module(name: str) -> Any:
    module, package = LOGGERS[name]
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise ValueError(f"--log-with {name} needs the package {package}: pip install {package} ({error}).") from error


class TensorBoard:
    """tensorboard --logdir FOLDER/tensorboard"""

    def __init__(self, module: Any, folder: Path) -> None:
        self._writer = module.SummaryWriter(str(folder / "tensorboard"))

    def write(self, row: Mapping[str, float]) -> None:
        for name, value in row.items():
            if name != "step":
                self._writer.add_scalar(name, value, int(row["step"]))

    def close(self) -> None:
        self._writer.close()


class WeightsAndBiases:
    """A run of its own, resumed under the same id; WANDB_MODE=offline keeps it on this machine."""

    def __init__(self, module: Any, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self._run = module.init(
            project="lcm-kit",
            name=folder.stem,
            id=folder.resolve().name.replace(".", "-"),
            resume="allow",
            dir=str(folder),
        )

    def write(self, row: Mapping[str, float]) -> None:
        self._run.log({name: value for name, value in row.items() if name != "step"}, step=int(row["step"]))

    def close(self) -> None:
        self._run.finish()
