"""kill -9 of whole distillations at random moments, also while captions, pictures and the model's own pictures are made.

    COMFYUI_PATH=... python tests/soak/trainings.py [COUNT [SEED]]      50 kills if not given
Runs `python -m distillation` on the embedded model, from captions alone and from pictures in turn, kills it, starts the same
command again, and so on; then lets it finish. Prints one line and exits with 1 if the LoRA differs in a bit from that of a
run that nobody stopped, or if anything that was kept is made a second time.
"""

import os
import random
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file

ROOT = Path(__file__).resolve().parents[2]
MODELS = ROOT / "demo" / "models"
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1"}
PICTURES, SAMPLES, STEPS = 20, 8, 6
WORDS = ["cat face", "rocket", "red apple", "tree", "sun", "dog face"]


@dataclass
class Figures:
    """kills: how many.   stages: what there was when they came.   different: LoRAs unlike the uninterrupted ones.
    twice: things made a second time that were kept already.   failed: runs that did not go on."""

    kills: int = 0
    stages: dict[str, int] = field(default_factory=dict)
    different: int = 0
    twice: int = 0
    failed: int = 0

    @property
    def fine(self) -> bool:
        return not (self.different or self.twice or self.failed)

    def __str__(self) -> str:
        stages = ", ".join(f"{count} {stage}" for stage, count in sorted(self.stages.items()))
        return (
            f"{self.kills} kills ({stages}), {self.different} LoRAs different, {self.twice} made twice, "
            f"{self.failed} runs that did not go on"
        )


def command(kind: str, data: Path, output: Path, steps: int, samples: int) -> list[str]:
    learn = {
        "captions": ["--prompts", data / "captions.txt", "--samples", samples],
        "pictures": ["--prompts", data / "captions.txt", "--pictures", data / "pictures"],
    }[kind]
    return [sys.executable, "-m", "distillation", *map(str, [
        "--checkpoint", MODELS / "checkpoints" / "tiny_emoji.safetensors", "--vae", MODELS / "vae" / "tiny_emoji_vae.safetensors",
        "--custom-nodes", ROOT / "demo" / "tiny_emoji", "--comfyui", os.environ["COMFYUI_PATH"], "--cpu", "--rank", 2, "--skip",
        200, "--guidance-min", 3, "--guidance-max", 3, "--width", 64, "--height", 64, "--save-dtype", "fp32", "--batch", 2,
        "--steps", steps, "--save-every", 1, *learn, "-o", output, "--overwrite",
    ])]  # fmt: skip


def make_data(folder: Path) -> None:
    (folder / "pictures").mkdir()
    for number in range(PICTURES):
        Image.linear_gradient("L").rotate(18 * number).resize((64, 64)).save(folder / "pictures" / f"{number:02}.png")
    captions = [f"{WORDS[number % len(WORDS)]} {number}" for number in range(PICTURES)]
    (folder / "captions.txt").write_text("\n".join(captions))


def shards(run: Path) -> dict[str, tuple[int, int]]:
    """Shard -> what changes when it is written again."""
    return {file.name: (file.stat().st_ino, file.stat().st_mtime_ns) for file in run.glob("kept/*.safetensors")}


def stage(run: Path) -> str:
    return "training" if (run / "run.safetensors").exists() else "making data" if shards(run) else "before anything"


def doubled(run: Path) -> int:
    """Keys that lie in more than one shard."""
    keys: list[str] = []
    for file in run.glob("kept/*.safetensors"):
        with safe_open(file, "pt") as opened:
            keys += {name.split("/")[0] for name in opened.keys()}
    return len(keys) - len(set(keys))


def waited(process: subprocess.Popen, run: Path, draw: random.Random, seconds: float) -> None:
    """Until a random moment of what a run does: by the clock, or some shards or a checkpoint further than now."""
    if draw.random() < 0.2:
        time.sleep(draw.uniform(0, seconds))
        return
    before, steps, more = len(shards(run)), stage(run) == "training", draw.randint(1, 3)
    while process.poll() is None and not steps and len(shards(run)) < before + more and stage(run) != "training":
        time.sleep(0.002)
    if steps:
        changed = (run / "run.safetensors").stat().st_mtime_ns
        while process.poll() is None and (run / "run.safetensors").stat().st_mtime_ns == changed:
            time.sleep(0.002)
    time.sleep(draw.uniform(0, 0.1))


def soak(
    folder: Path,
    count: int,
    seed: int = 1,
    steps: int = STEPS,
    samples: int = SAMPLES,
    finish: Callable[[list[str]], bool] | None = None,
) -> Figures:
    """finish: runs a command that nobody stops and says whether it ended well; a process of its own if not given."""
    finish = finish or _finish
    figures, draw = Figures(), random.Random(seed)
    make_data(folder)
    expected, seconds, number = {}, {}, 0
    kinds = ["captions", "pictures"]
    while figures.kills < count:
        kind = kinds[number % 2]
        if kind not in expected:
            started = time.monotonic()
            finish(command(kind, folder, folder / f"{kind}.safetensors", steps, samples))
            seconds[kind] = time.monotonic() - started
            expected[kind] = load_file(folder / f"{kind}.safetensors")
        output = folder / f"{number}.safetensors"
        run, number = output.with_suffix(".run"), number + 1
        for _ in range(min(draw.randint(2, 6), count - figures.kills)):
            known = shards(run)
            process = subprocess.Popen(
                command(kind, folder, output, steps, samples), cwd=ROOT, env=ENVIRONMENT, stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL, start_new_session=True,
            )  # fmt: skip
            try:
                waited(process, run, draw, seconds[kind])
            finally:
                process.kill()
                process.wait()
            figures.failed += process.returncode not in (0, -9)
            figures.kills += 1
            figures.stages[stage(run)] = figures.stages.get(stage(run), 0) + 1
            figures.twice += sum(shards(run).get(name) != place for name, place in known.items())
        known = shards(run)
        figures.failed += not finish(command(kind, folder, output, steps, samples))
        figures.twice += sum(shards(run).get(name) != place for name, place in known.items()) + doubled(run)
        if output.exists():
            actual = load_file(output)
            figures.different += any(not actual[key].equal(tensor) for key, tensor in expected[kind].items())
    return figures


def _finish(arguments: list[str]) -> bool:
    return not subprocess.run(
        arguments, cwd=ROOT, env=ENVIRONMENT, capture_output=True, stdin=subprocess.DEVNULL
    ).returncode


def main() -> int:
    count, seed = (int(text) for text in (sys.argv[1:] + ["50", "1"][len(sys.argv) - 1 :]))
    with tempfile.TemporaryDirectory() as folder:
        figures = soak(Path(folder), count, seed)
    print(f"trainings: {figures}")
    return int(not figures.fine)


if __name__ == "__main__":
    sys.exit(main())
