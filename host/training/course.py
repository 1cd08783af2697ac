"""A training on its way: what it writes down, shows and keeps, after every step and every `every` steps."""

import logging
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from ...distillation.log import Table, Writer
from ...distillation.trainer import Trainer
from ...distillation.validation import validation_loss
from ...lora_merge import Lora, save
from ...lora_merge.disk.whole import held
from .report import progress_words

if TYPE_CHECKING:
    from .strip import Strip

logger = logging.getLogger(__name__)

RECENT = 20  # steps, over which the time of one is taken


class Course:
    """Watches a Trainer and changes nothing about it.

    strip: takes the samples.   picture: number -> a batch of one, for the validation loss.   every: steps from one
    validation, strip and LoRA file to the next.   save_lora: writes the LoRA as it is now, or None.   table: file for
    the losses, or None.   writers: others that take them.   shown: told (Course, whether there are new samples) after
    each step; what it raises ends the training.
    """

    def __init__(
        self,
        trainer: Trainer,
        strip: "Strip",
        picture: Callable,
        *,
        every: int,
        save_lora: Callable[[], None] | None = None,
        table: Path | None = None,
        writers: Sequence[Writer] = (),
        shown: Callable[["Course", bool], None] = lambda course, new: None,
    ) -> None:
        self.trainer, self.strip, self.picture, self.every, self.save_lora = trainer, strip, picture, every, save_lora
        self.table, self.writers, self.shown = table, [*writers], shown
        self.validation: list[tuple[int, float]] = []
        self._spent: list[float] = []
        self._began = 0.0
        # Steps done at the last look, and in the last LoRA file.
        self._seen = self._filed = -1

    @property
    def seconds_a_step(self) -> float:
        """Mean of the latest steps, without what is shown and written between them; 0 before the first."""
        return sum(self._spent) / max(1, len(self._spent))

    @property
    def words(self) -> str:
        """Where the training is, and how long it will take."""
        trainer = self.trainer
        steps, loss = trainer.settings.steps, trainer.losses[-1]
        return progress_words(trainer.done, steps, loss, self.validation, self.seconds_a_step)

    def run(self, save_to: Path | None) -> None:
        """Trainer.run, watched. Whatever ends it leaves the LoRA of the last sound step as a file.

        Raises ValueError if another process trains under that name.
        """
        main = not self.trainer.engine.process_index
        with _alone(save_to if main else None):
            self._run(save_to, main)

    def _run(self, save_to: Path | None, main: bool) -> None:
        trainer = self.trainer
        trainer.resume(save_to)
        if self.table is not None and main:
            self._open(self.table)
        # A run shorter than one interval has nothing to be compared.
        if trainer.settings.steps >= self.every and trainer.done < trainer.settings.steps:
            self._look(0)
        self._began = time.monotonic()
        try:
            trainer.run(save_to=save_to, save_every=self.every, callback=self._after_step)
        finally:
            for writer in self.writers:
                writer.close()
            if trainer.sound and trainer.done not in (0, self._filed):
                self._keep_lora()
        if main and self._seen != trainer.done:
            self.strip.take()

    def _open(self, path: Path) -> None:
        try:
            table = Table(path, self.trainer.done)
        except FileExistsError:
            raise
        except OSError as error:
            logger.warning("No table of the losses: %s", error)
            return
        self.validation = table.validation
        self.writers.append(table)

    def _after_step(self, done: int, loss: float) -> None:
        self._spent = [*self._spent[1 - RECENT :], time.monotonic() - self._began]
        row = {"step": done, "loss": loss, "learning_rate": self.trainer.settings.rate_at(done - 1)}
        row["seconds"] = self._spent[-1]
        new = done % self.every == 0
        if new:
            self._look(done)
            if self.trainer.sound:
                self._keep_lora()
            if self.validation:
                row["validation_loss"] = self.validation[-1][1]
        for writer in self.writers:
            writer.write(row)
        self.shown(self, new)
        self._began = time.monotonic()

    def _look(self, done: int) -> None:
        """done: finished steps; 0 when the run begins, or goes on."""
        if self.trainer.engine.process_index:
            return
        self._seen = self.trainer.done
        self.strip.take(first=done == 0)
        if self.validation[-1:] != [] and self.validation[-1][0] == self._seen:
            return  # a run that goes on has this one in its table
        self.validation.append((self._seen, validation_loss(self.trainer, self.picture)))
        if done == 0:
            for writer in self.writers:
                writer.write({"step": self._seen, "validation_loss": self.validation[-1][1]})

    def _keep_lora(self) -> None:
        if self.save_lora is None or self.trainer.engine.process_index:
            return
        self._filed = self.trainer.done
        try:
            self.save_lora()
        except (OSError, ValueError) as error:
            logger.warning("No LoRA file of step %d: %s", self.trainer.done, error)


@contextmanager
def _alone(path: Path | None) -> Iterator[None]:
    if path is None:
        yield
        return
    with suppress(OSError):  # what cannot be kept is told by who keeps it
        path.parent.mkdir(parents=True, exist_ok=True)
    with held(path) as free:
        if not free:
            raise ValueError(
                f"{path.name} in {path.parent.name} is being trained by another process just now, and two would write over each "
                "other's steps. Let that one end or stop it, or use another name."
            )
        yield


def write_lora(lora: Lora, path: Path, dtype: torch.dtype = torch.float16) -> None:
    """In place of the one before, in a folder that is made if need be. Raises OSError or ValueError."""
    path.parent.mkdir(parents=True, exist_ok=True)
    save(lora, path, dtype=dtype, overwrite=True)
