"""Where a training in the graph is kept, under a name, so that a stop loses nothing."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import folder_paths

from ...distillation.kept import Kept
from ...lora_merge.disk.file_names import name_trouble
from ..door.rules import shown
from .data import fingerprint
from .identity import identity_of
from .report import OnDisk

AUTO = "auto"
LONGEST = ".safetensors"  # of the endings behind the name of a run


@dataclass(frozen=True)
class Places:
    """checkpoint, table: of this training.   lora: the LoRA so far, where Load LoRA lists it.   pictures: folder of all
    that models have made themselves, found again by whatever training needs the same."""

    checkpoint: Path
    table: Path
    lora: Path
    pictures: Path

    def on_disk(self, own: Kept | None) -> OnDisk:
        """What there is on disk now. own: pictures that the model has made, None if it made none."""
        output, loras = (Path(folder) for folder in (folder_paths.get_output_directory(), _loras()))
        checkpoint = self.checkpoint.relative_to(output).as_posix()
        pictures = self.pictures.relative_to(output).as_posix()
        return OnDisk(
            checkpoint=(checkpoint, self.checkpoint.stat().st_size) if self.checkpoint.is_file() else None,
            table=self.table.name,
            lora=self.lora.relative_to(loras).as_posix() if self.lora.is_file() else None,
            pictures=None if own is None else (pictures, len(own), own.size),
        )


def check_name(name: str) -> None:
    """Raises ValueError for a name that is no plain file name; it may be empty."""
    trouble = name.strip() and (name_trouble(name) or name_trouble(f"{name}{LONGEST}"))
    if trouble or name.startswith("."):
        raise ValueError(
            f"resume is {shown(name)}, and it {trouble or 'begins with a dot, which hides files'}; write a plain name such "
            "as my-lcm, without folders, auto for one that is made of the inputs, or leave it empty."
        )


def places_of(name: str, model, made_of: Sequence[Any]) -> Places | None:
    """The files of a training of that name; None for no name. AUTO is a name of its own for each MODEL and `made_of`."""
    if not name.strip():
        return None
    if name.strip().lower() == AUTO:
        name = f"{AUTO}-{type(model.model.model_config).__name__}-{fingerprint(identity_of(model), made_of)[:8]}"
    folder = Path(folder_paths.get_output_directory()) / "LCMKit" / "distilling"
    return Places(
        checkpoint=folder / f"{name}.safetensors",
        table=folder / f"{name}.csv",
        lora=Path(_loras()) / "LCMKit" / f"{name}.safetensors",
        pictures=folder / "pictures",
    )


def _loras() -> str:
    return folder_paths.get_folder_paths("loras")[0]
