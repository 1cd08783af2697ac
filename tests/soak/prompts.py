"""Many prompts in one real server: merges, pictures, saves; every tenth interrupted, every tenth invalid.

    COMFYUI_PATH=... python tests/soak/prompts.py [COUNT]           500 if not given
Prints one line: what became of the prompts, how the server's memory, threads, open files and temporary files went, and how
many of ten results a fresh server makes bit for bit alike. Exits with 1 if a sound prompt failed, if something grew or was
left, or if a result differs.
"""

import importlib.util
import io
import os
import random
import sys
import tempfile
import threading
import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

from PIL import Image

ROOT = Path(__file__).resolve().parents[2]
if "lcm_kit" not in sys.modules:  # tests/conftest.py does the same
    spec = importlib.util.spec_from_file_location(
        "lcm_kit", ROOT / "__init__.py", submodule_search_locations=[str(ROOT)]
    )
    sys.modules["lcm_kit"] = importlib.util.module_from_spec(spec)

from lcm_kit.demo import graphs
from lcm_kit.demo.comfyui_client import Client, PromptRejected
from lcm_kit.demo.comfyui_server import ComfyUIServer

FILES = graphs.TINY
METHODS = ["linear", "ties", "dare", "della", "tsv", "magnitude"]
# Each way of making a prompt wrong: input of a node of this class -> a value that it refuses.
INVALID = [
    ("LCMKitMergeLoRA", "method", "nonsense"), ("LCMKitMergeLoRA", "block_strengths", "/(a+)+!/=1"), ("LCMKitMergeLoRA", "block_strengths", "nowhere=1"),
    ("LCMKitLoadLoRA", "lora_name", "none.safetensors"), ("LCMKitKSampler", "steps", -1), ("LCMKitKSampler", "gammas", "x"),
    ("LCMKitKSampler", "model", None), ("LCMKitApplyLoRA", "lora", 5),
]  # fmt: skip
COMPARED = 10
# Growth per prompt that a run of hundreds tells from noise: an allocator's pages come and go by some MB.
MB_PER_PROMPT = 0.1


@dataclass
class Reading:
    """Of the server's process, at one moment."""

    megabytes: float
    files: int
    threads: int


@dataclass
class Figures:
    """failed: sound prompts that did not end well, and wrong ones that did.   readings: prompt -> Reading."""

    outcomes: Counter = field(default_factory=Counter)
    failed: list[str] = field(default_factory=list)
    readings: dict[int, Reading] = field(default_factory=dict)
    leftovers: int = 0
    alike: int = 0
    compared: int = 0
    seconds: float = 0.0

    @property
    def slope(self) -> float:
        """MB per prompt, least squares over the later two thirds: the models are loaded in the first."""
        points = [(n, reading.megabytes) for n, reading in self.readings.items()]
        points = points[len(points) // 3 :]
        if len(points) < 2:
            return 0.0
        x, y = (sum(values) / len(points) for values in zip(*points, strict=True))
        return sum((a - x) * (b - y) for a, b in points) / sum((a - x) ** 2 for a, _ in points)

    @property
    def fine(self) -> bool:
        first, last = self.settled, list(self.readings.values())[-1]
        return (
            not self.failed
            and self.alike == self.compared
            and not self.leftovers
            and self.slope < MB_PER_PROMPT
            and last.files <= first.files + 8
            and last.threads <= first.threads + 4
        )

    @property
    def settled(self) -> Reading:
        readings = list(self.readings.values())
        return readings[len(readings) // 3]

    def __str__(self) -> str:
        first, last = self.settled, list(self.readings.values())[-1]
        outcomes = ", ".join(f"{count} {name}" for name, count in sorted(self.outcomes.items()))
        return (
            f"{sum(self.outcomes.values())} prompts in {self.seconds:.0f} s: {outcomes}; memory {first.megabytes:.0f} -> "
            f"{last.megabytes:.0f} MB, {self.slope:+.3f} MB a prompt; open files {first.files} -> {last.files}, threads {first.threads} -> "
            f"{last.threads}; {self.leftovers} temporary files left; {self.alike} of {self.compared} results bit-equal to a "
            f"fresh server's; {len(self.failed)} wrong {self.failed[:2] or ''}"
        )


def prompt(number: int) -> graphs.Graph:
    """The workflow of this number: two LoRAs merged by some method and cut, saved, applied, one picture of few steps."""
    draw = random.Random(number)
    graph = graphs.style_in_few_steps(
        FILES, graphs.Shot(draw.choice(["cat face", "owl", "red heart"]), number, draw.randint(1, 4))
    )
    merge = named(graph, "LCMKitMergeLoRA")
    merge |= {"method": draw.choice(METHODS), "size": draw.choice(["exact", "exact", "rank"])}
    rank, density = 4, draw.choice([0.5, 0.9])
    # What an option has not is dropped by ComfyUI.
    merge |= {"size.rank": rank, "method.density": density, "method.seed": number}
    merge |= {"strength_1": draw.choice([0.5, 0.8]), "block_strengths": draw.choice(["", "down=0.5"])}
    named(graph, "SaveImage")["filename_prefix"] = f"soak_{number}"
    if number % 4 == 0 and not is_invalid(number):  # ComfyUI runs what is left of a workflow with one wrong output
        link = named(graph, "LCMKitApplyLoRA")["lora"]
        graph.add(
            "LCMKitSaveLoRA",
            lora=link,
            filename_prefix="soak",
            dtype="fp16",
            format="kohya",
            output_name_mode="overwrite",
        )
    return graph


def is_invalid(number: int) -> bool:
    return number % 10 == 4


def named(graph: graphs.Graph, kind: str) -> dict:
    """The inputs of the first node of this class."""
    return next(node["inputs"] for node in graph.values() if node["class_type"] == kind)


def run(client: Client, number: int, figures: Figures) -> None:
    """Posts a prompt and follows it to its end."""
    graph = prompt(number)
    invalid, interrupted = is_invalid(number), number % 10 == 9
    if invalid:
        kind, name, value = INVALID[number // 10 % len(INVALID)]
        named(graph, kind)[name] = value
    try:
        prompt_id = client.submit(graph)
    except PromptRejected as error:
        figures.outcomes["rejected"] += 1
        if not invalid:
            figures.failed.append(f"{number}: {error}")
        return
    if interrupted:
        threading.Timer(random.Random(-number).uniform(0, 0.8), client.interrupt).start()
    kinds = {event.kind: event for event in client.follow(prompt_id)}
    if "execution_error" in kinds:
        figures.outcomes["refused by a node"] += 1
        said = kinds["execution_error"].data["exception_message"].strip()
        if not invalid or "LCM" not in kinds["execution_error"].data["node_type"] or len(said) < 30:
            figures.failed.append(f"{number}: {said}")
    elif "execution_interrupted" in kinds:
        figures.outcomes["interrupted"] += 1
    else:
        figures.outcomes["finished"] += 1
        if invalid:
            figures.failed.append(f"{number}: {INVALID[number // 10 % len(INVALID)]} was taken")


def read(pid: int) -> Reading:
    """From /proc, so on Linux only."""
    status = Path(f"/proc/{pid}/status").read_text()
    values = dict(line.split(":\t", 1) for line in status.splitlines() if ":\t" in line)
    return Reading(int(values["VmRSS"].split()[0]) / 1024, len(os.listdir(f"/proc/{pid}/fd")), int(values["Threads"]))


def picture(client: Client, number: int) -> list[bytes]:
    """Values of the pictures of a sound prompt, made now. Not the files, which hold notes of the run, too."""
    graph = prompt(number)
    named(graph, "SaveImage")["filename_prefix"] = "soak_compared"
    return [Image.open(io.BytesIO(file)).tobytes() for file in client.images(client.run(graph))]


def soak(used: ComfyUIServer, fresh: ComfyUIServer, count: int, compared: int = COMPARED) -> Figures:
    """Runs the prompts in one server and some again in a fresh one. Both start and stop here."""
    figures, started = Figures(), time.monotonic()
    again = [n for n in range(count) if n % 10 not in (4, 9)][:: max(1, count * 8 // 10 // compared)][:compared]
    with used, Client(used) as client:
        for number in range(count):
            run(client, number, figures)
            if number % max(1, count // 50) == 0 or number == count - 1:
                figures.readings[number] = read(used.process.pid)
                if sys.stderr.isatty() or number % 100 == 0:
                    print(figures, file=sys.stderr, flush=True)
        figures.seconds = time.monotonic() - started
        time.sleep(1)  # an interrupt that came late
        first = [picture(client, number) for number in reversed(again)][::-1]
        figures.leftovers = len(list(used.home.glob("models/**/.*.tmp")) + list(used.output.rglob(".*.tmp")))
    with fresh, Client(fresh) as client:
        second = [picture(client, number) for number in again]
    figures.compared = len(again)
    figures.alike = sum(a == b and bool(a) for a, b in zip(first, second, strict=True))
    return figures


def main() -> int:
    from lcm_kit.tests.with_comfyui.comfy_server import pack_server

    count = int(sys.argv[1]) if len(sys.argv) > 1 else 500
    with tempfile.TemporaryDirectory() as home:
        figures = soak(pack_server(Path(home, "used")), pack_server(Path(home, "fresh")), count)
    print(f"prompts: {figures}")
    return int(not figures.fine)


if __name__ == "__main__":
    sys.exit(main())
