"""kill -9 at random moments: of the writer alone, of whole merges, of trainings' checkpoints.

    python tests/soak/kills.py [COUNT [KIND]]   so many of each, 200 if not given; writer, merges or checkpoints alone
Prints one line and exits with 1 if a file was torn or lost, or if something is left after the next good run.
"""

import hashlib
import os
import random
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
LORAS = ROOT / "demo" / "models" / "loras"
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1"}


@dataclass
class Figures:
    """kills: how many.   during: of these, while a file was being written.   torn, lost: files after a kill that are
    neither the old nor the new one, or not there.   leftovers: temporary files after all kills.   left: of these, after
    the next good run."""

    kills: int = 0
    during: int = 0
    torn: int = 0
    lost: int = 0
    leftovers: int = 0
    left: int = 0

    @property
    def fine(self) -> bool:
        return not (self.torn or self.lost or self.left)

    def __str__(self) -> str:
        return (
            f"{self.kills} kills ({self.during} during a write), {self.torn} torn, {self.lost} lost, {self.leftovers} "
            f"leftovers, {self.left} after the next run"
        )


def killed(command: Sequence[str], wait: Callable[[subprocess.Popen], None], cwd: Path = ROOT) -> None:
    """Starts the command and ends it with SIGKILL when `wait` returns."""
    process = subprocess.Popen(
        command, cwd=cwd, env=ENVIRONMENT, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, start_new_session=True
    )
    try:
        wait(process)
    finally:
        process.kill()
        process.wait()
        process.stdout.close()


def temporary(folder: Path) -> list[Path]:
    return list(folder.glob(".*.tmp"))


def of_the_writer(folder: Path, count: int, draw: random.Random) -> Figures:
    """The writer is killed at a random moment of its fifth write or so."""
    figures, path = Figures(), folder / "out.bin"

    def wait(process):
        process.stdout.readline()
        time.sleep(draw.uniform(0, 0.06))

    for _ in range(count):
        before = set(temporary(folder))
        killed([sys.executable, str(ROOT / "tests/soak/writer.py"), str(path)], wait)
        figures.kills += 1
        figures.during += bool(set(temporary(folder)) - before)
        if not path.exists():
            figures.lost += 1
        else:
            content = path.read_bytes()
            figures.torn += len(content) != 4_000_000 or len(set(content)) != 1
    figures.leftovers = len(temporary(folder))
    killed([sys.executable, str(ROOT / "tests/soak/writer.py"), str(path)], lambda process: process.stdout.readline())
    # That one was killed, too: at most its own file is there.
    figures.left = max(0, len(temporary(folder)) - 1)
    return figures


def of_merges(folder: Path, count: int, draw: random.Random) -> Figures:
    """`python -m lora_merge merge` over an existing output, killed anywhere or while the new file is being written."""
    figures, path = Figures(), folder / "out.safetensors"

    def command(strength):
        inputs = [f"{LORAS / 'tiny_emoji_ink_lora.safetensors'}:{strength}", LORAS / "tiny_emoji_lcm_lora.safetensors"]
        options = ["-o", path, "--overwrite", "--dtype", "fp32", "--workers", "1"]
        return [sys.executable, "-m", "lora_merge", "merge", *map(str, inputs), *map(str, options)]

    whole, seconds = {}, 0.0
    for strength in (0.5, 0.7):
        started = time.monotonic()
        subprocess.run(command(strength), cwd=ROOT, env=ENVIRONMENT, check=True, capture_output=True)
        seconds = max(seconds, time.monotonic() - started)
        whole[_digest(path)] = strength
    for number in range(count):
        before = set(temporary(folder))

        def wait(process, anywhere=number % 2 == 0, before=before):
            if anywhere:
                time.sleep(draw.uniform(0, seconds))
                return
            while process.poll() is None and not set(temporary(folder)) - before:
                time.sleep(0.0005)
            time.sleep(draw.uniform(0, 0.04))

        current = whole[_digest(path)] if path.exists() and _digest(path) in whole else 0.7
        killed(command(0.5 if current == 0.7 else 0.7), wait)
        figures.kills += 1
        figures.during += bool(set(temporary(folder)) - before)
        if not path.exists():
            figures.lost += 1
        else:
            figures.torn += _digest(path) not in whole
    figures.leftovers = len(temporary(folder))
    subprocess.run(command(0.5), cwd=ROOT, env=ENVIRONMENT, check=True, capture_output=True)
    figures.left = len(temporary(folder))
    return figures


_TRAINING = """
import importlib.util, itertools, sys
from pathlib import Path
root = Path(sys.argv[1])
spec = importlib.util.spec_from_file_location("lcm_kit", root / "__init__.py", submodule_search_locations=[str(root)])
sys.modules["lcm_kit"] = importlib.util.module_from_spec(spec)
import torch
from lcm_kit.distillation import checkpoint
path = Path(sys.argv[2])
for number in itertools.count(checkpoint.read(path)[1]["done"] + 1 if path.exists() else 1):
    checkpoint.write(path, {f"lora/{n}": torch.full((64, 4096), float(number)) for n in range(4)}, {"done": number})
    print(number, flush=True)
    if len(sys.argv) > 3:
        break
"""


def of_checkpoints(folder: Path, count: int, draw: random.Random) -> Figures:
    """A training's checkpoint, written without a pause and read by the next process, which stops at one that is torn."""
    figures, path = Figures(), folder / "run.safetensors"
    command, done = [sys.executable, "-c", _TRAINING, str(ROOT), str(path)], 0

    def wait(process):
        nonlocal done
        line = process.stdout.readline()
        figures.torn += not line  # it could not go on
        figures.lost += bool(line) and int(line) <= done
        done = int(line or done)
        time.sleep(draw.uniform(0, 0.1))

    for _ in range(count):
        before = set(temporary(folder))
        killed(command, wait)
        figures.kills += 1
        figures.during += bool(set(temporary(folder)) - before)
    figures.leftovers = len(temporary(folder))
    subprocess.run([*command, "once"], cwd=ROOT, env=ENVIRONMENT, check=True, capture_output=True)
    figures.left = len(temporary(folder))
    return figures


KINDS = {"writer": of_the_writer, "merges": of_merges, "checkpoints": of_checkpoints}


def _digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def main() -> int:
    count = int(sys.argv[1]) if len(sys.argv) > 1 else 200
    found, wanted = {}, sys.argv[2:] or list(KINDS)
    for name, kind in KINDS.items():
        if name not in wanted:
            continue
        with tempfile.TemporaryDirectory() as folder:
            found[name] = kind(Path(folder), count, random.Random(1))
    print("kills: " + "; ".join(f"{name} {figures}" for name, figures in found.items()))
    return int(not all(figures.fine for figures in found.values()))


if __name__ == "__main__":
    sys.exit(main())
