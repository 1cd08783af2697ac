"""The course of a training as numbers: a table in a file, and whatever else takes numbers by name and step."""

import csv
import io
import logging
import math
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Protocol

from ..lora_merge.disk.whole import is_plain_file, write_whole

logger = logging.getLogger(__name__)

COLUMNS = "step", "loss", "learning_rate", "seconds", "validation_loss"


class Writer(Protocol):
    """Takes what is known of a step: column -> number."""

    def write(self, row: Mapping[str, float]) -> None: ...
    def close(self) -> None: ...


class Table:
    """A .csv file with a line for each step. A run that goes on keeps the lines up to there.

    done: finished steps.   validation: (step, validation loss) of the lines that were there.   Raises FileExistsError for a file of that name that is no such table.
    """

    def __init__(self, path: Path, done: int) -> None:
        rows = [row for row in read_table(path) if row["step"] <= done] if path.exists() else []
        self.validation = [(int(row["step"]), row["validation_loss"]) for row in rows if "validation_loss" in row]
        text = io.StringIO()
        lines = csv.writer(text, lineterminator="\n")
        lines.writerow(COLUMNS)
        lines.writerows([_said(row, name) for name in COLUMNS] for row in rows)
        path.parent.mkdir(parents=True, exist_ok=True)
        write_whole(path, lambda file: file.write(text.getvalue().encode()), lambda path: None)
        self._file = open(path, "a", encoding="utf-8", newline="")
        self._lines = csv.writer(self._file, lineterminator="\n")

    def write(self, row: Mapping[str, float]) -> None:
        if self._file.closed:
            return
        try:
            self._lines.writerow([_said(row, name) for name in COLUMNS])
            self._file.flush()
        except OSError as error:
            logger.warning("%s gets no more lines: %s", self._file.name, error.strerror)
            with suppress(OSError):
                self._file.close()

    def close(self) -> None:
        with suppress(OSError):
            self._file.close()


def read_table(path: Path) -> list[dict[str, float]]:
    """Its lines; one that a stop has cut is left out. Raises FileExistsError for what is no such table."""
    lines: list[list[str]] = []
    try:
        if is_plain_file(path):
            with open(path, encoding="utf-8", newline="") as file:
                lines = [*csv.reader(file)]
    except (UnicodeDecodeError, csv.Error):
        pass
    if not lines or lines[0] != [*COLUMNS]:
        raise FileExistsError(f"{path}: exists already and is no table of a training. Remove it, or use another name.")
    rows = []
    for line in lines[1:]:
        try:
            found = {name: float(text) for name, text in zip(COLUMNS, line, strict=True) if text}
        except ValueError:
            continue
        if "step" in found:
            rows.append(found)
    return rows


def _said(row: Mapping[str, float], name: str) -> str:
    value = row.get(name, math.nan)
    return "" if math.isnan(value) else f"{value:.10g}"
