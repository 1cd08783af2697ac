"""Random and broken LoRA files on the whole way: load, identify, describe, merge, resize, save, load again.

    python tests/soak/fuzz.py --seconds 1800            with --seed, another run
    python tests/soak/fuzz.py --only 4711               one file again, with its traceback

A finding is an exception that is no ValueError and no OSError, a message without the file's name or without end, a hang, a
value that is not finite, a module or key that is lost, a wrong sum, or a round trip that changes something. The number in
its line, with the seed, makes the file again; build/fuzz keeps it. Prints a line for each kind of finding and one of
figures, and exits with 1 if there was a finding.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import logging
import random
import resource
import signal
import sys
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

ROOT = Path(__file__).resolve().parents[2]
if "lcm_kit" not in sys.modules:  # tests/conftest.py does the same
    spec = importlib.util.spec_from_file_location(
        "lcm_kit", ROOT / "__init__.py", submodule_search_locations=[str(ROOT)]
    )
    sys.modules["lcm_kit"] = importlib.util.module_from_spec(spec)

from lcm_kit.lora_merge import METHODS, Lora, describe, describe_merge, load, merge_with_account, resize, save
from lcm_kit.lora_merge.files import load_save
from lcm_kit.lora_merge.files.formats import named_for
from lcm_kit.lora_merge.naming.aliases import text_encoder
from lcm_kit.lora_merge.recognise.identity import identify
from lcm_kit.tests.lora_merge.make import factors, kohya
from lcm_kit.tests.soak.lora_files import MODULES, random_file

SECONDS = 20  # for one file; the usual is some hundredths
LONGEST = 3000
STRENGTHS = [
    (1.0, 1.0),
    (0.8, 1.0),
    (-1.0, 1.0),
    (0.0, 1.0),
    (1.0, 0.0),
    (100.0, -100.0),
    (1e30, 1.0),
    (1e-30, 1.0),
    (0.5, 0.5),
]
CUTS: list[dict[str, Any]] = [
    {}, {}, {}, {"rank": 1}, {"rank": 2}, {"rank": 10_000}, {"keep": 0.9}, {"keep": 1e-6}, {"retain": 0.5}, {"max_mb": 0.001}, {"max_mb": 0.01},
    {"max_mb": 1000.0}, {"rank": 1, "balanced": True}, {"keep": 0.8, "balanced": True}, {"dense": True}, {"dense": True, "rank": 2},
    {"out_dtype": torch.float16}, {"out_dtype": torch.bfloat16, "rank": 3}, {"mu": 1.0, "protect": 0}, {"mu": 2.0, "protect": 1, "keep": 0.9},
    {"mu": 1.0, "protect": "auto"},
]  # fmt: skip
# Relative to the largest entry that the factors can make.
ROUNDING = {torch.float16: 3e-3, torch.bfloat16: 3e-2, torch.float32: 1e-5}


class Finding(Exception):
    """What went wrong with one file: its kind, and the rest."""

    def __init__(self, kind: str, detail: str):
        super().__init__(f"{kind}: {detail}")
        self.kind, self.detail = kind, detail


class Hang(BaseException):
    """Past every `except Exception` on the way."""


@dataclass
class Figures:
    """seen: what became of the files.   findings: kind and place -> the first one's line."""

    files: int = 0
    seen: Counter[str] = field(default_factory=Counter)
    findings: dict[str, str] = field(default_factory=dict)
    wrong: int = 0

    def __str__(self) -> str:
        memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024
        seen = ", ".join(f"{count} {name}" for name, count in sorted(self.seen.items()))
        return f"{self.files} files: {seen}; {self.wrong} findings of {len(self.findings)} kinds; at most {memory} MB"


def good() -> Lora:
    """A sound LoRA that has each module, to merge with."""
    tensors: dict[str, Tensor] = {}
    for number, ((name, *_), out, inputs, kernel) in enumerate(MODULES):
        if number not in (5, 6):  # names of another kind of model; the random files have them
            tensors |= kohya(name, *factors(out, 2, inputs, kernel, seed=100 + number), alpha=1.0)
    return Lora.from_state_dict(tensors, source="good.safetensors")


def try_one(number: str, folder: Path, other: Lora, seen: Counter[str]) -> None:
    """Makes the file of this number in the folder and goes the whole way. Raises Finding, or what the code raised."""
    draw = random.Random(number)
    path = folder / "case.safetensors"
    random_file(path, draw)
    # As a small file, of which all is in memory, and as a large one, whose factors are read when they are needed.
    load_save._STREAMED = draw.choice((0, 1 << 40))
    try:
        lora = load(path)
    except (ValueError, OSError) as error:
        seen["refused"] += 1
        check_message(error, path.name)
        return
    seen["loaded"] += 1
    check_keys(path, lora)
    identify(lora, path)
    describe(lora)
    mine = updates(lora)
    check_finite("loaded", mine)
    first, second = draw.choice(STRENGTHS)
    method = draw.choice(list(METHODS)) if draw.random() < 0.6 else "linear"
    options = draw.choice(CUTS) | {"seed": draw.randrange(100)}
    if draw.random() < 0.4:
        options |= {"leave_out": True}
    inputs = [(lora, first), (other, second)]
    if not METHODS[method].exact_inputs and draw.random() < 0.2:
        inputs.append((other, -0.5 * second))
    made = [] if draw.random() < 0.2 else _merged(inputs, method, options, mine, seen)
    made += _resized(lora, draw, seen)
    for one in made or [lora]:
        check_round_trip(one, folder / "out.safetensors", draw, seen)


def _merged(
    inputs: list[tuple[Lora, float]], method: str, options: dict[str, Any], mine: dict[str, Tensor], seen: Counter[str]
) -> list[Lora]:
    try:
        merged, account = merge_with_account(inputs, method=method, workers=1, **options)
    except ValueError as error:
        seen["merges refused"] += 1
        check_message(error)
        return []
    seen["merged"] += 1
    if len(describe_merge(account, merged)) > 20_000:
        raise Finding("long report", "")
    result = updates(merged)
    check_finite(f"merged by {method} {options}", result)
    if method == "linear" and not {*options} & {"rank", "keep", "retain", "max_mb", "mu", "out_dtype"}:
        check_sum(inputs, mine, merged, result)
    return [merged]


def _resized(lora: Lora, draw: random.Random, seen: Counter[str]) -> list[Lora]:
    if draw.random() < 0.6:
        return []
    cut = draw.choice([{"rank": 1}, {"rank": 3}, {"keep": 0.7}, {"max_mb": 0.002}, {"retain": 0.9}])
    try:
        small = resize(lora, workers=1, **cut)
    except ValueError as error:
        seen["resizes refused"] += 1
        check_message(error)
        return []
    seen["resized"] += 1
    check_finite(f"resized by {cut}", updates(small))
    # By what is meant: a resized LoRA has the model's own names.
    if made_up := [module for module, spelling in small.spellings.items() if _found(lora, spelling) is None]:
        raise Finding("resize makes up modules", str(made_up))
    return [small]


def updates(lora: Lora) -> dict[str, Tensor]:
    """Module -> update of its weight, where it adds up."""
    found = {}
    for module in lora.spellings:
        if module in lora.modules or any((module, part) in lora.diffs for part in ("diff", "w_norm")):
            if module not in lora.carried:
                try:
                    found[module] = lora.delta(module)
                except ValueError as error:  # beyond float32, or read for the first time and no number, in words
                    check_message(error)
    return found


def check_message(error: Exception, name: str = "") -> None:
    text = str(error)
    if name not in text or len(text) > LONGEST or len(text) < 20:
        raise Finding(f"no good message at {place(error)}", f"{len(text)} characters: {text[:200]}")


def check_keys(path: Path, lora: Lora) -> None:
    """Every key of the file is told of."""
    header = path.read_bytes()
    keys = json.loads(header[8 : 8 + int.from_bytes(header[:8], "little")]).keys() - {"__metadata__"}
    told = {*lora.keys.understood, *lora.keys.carried, *lora.keys.unread}
    if keys != told:
        raise Finding("keys not accounted for", str(keys ^ told)[:200])


def check_finite(what: str, found: dict[str, Tensor]) -> None:
    for module, update in found.items():
        if not torch.isfinite(update).all():
            raise Finding(f"not finite, {what.split(' {')[0]}", f"{what}: {module}")


def check_sum(
    inputs: list[tuple[Lora, float]], mine: dict[str, Tensor], merged: Lora, result: dict[str, Tensor]
) -> None:
    """Every module of the exact sum against float64."""
    of_other = {name: delta for name, delta in updates(inputs[1][0]).items()}
    parts: dict[str, list[Tensor]] = {}
    for (lora, strength), deltas in zip(inputs, [mine, of_other, of_other], strict=False):
        for module, delta in deltas.items():
            parts.setdefault(_alike(lora, module, merged), []).append(strength * delta.double())
    for module, terms in parts.items():
        carried = any(module in lora.carried for lora, _ in inputs) or module in merged.carried
        flat = [term.flatten() for term in terms]
        if carried or len({len(term) for term in flat}) != 1:
            continue
        wanted, largest = sum(flat), max(float(term.abs().max()) if len(term) else 0.0 for term in flat)
        if module not in result:
            if largest > 1e-37 and module not in merged.spellings and float(wanted.abs().max()) > 1e-6 * largest:
                raise Finding("module dropped", module)
            continue
        error = float((result[module].double().flatten() - wanted).abs().max()) if len(wanted) else 0.0
        if error > 2e-5 * max(largest, bound(merged, module)) + 1e-37:
            raise Finding("wrong sum", f"{module}: {error:.2e} of {largest:.2e}")


def _alike(lora: Lora, module: str, merged: Lora) -> str:
    """Its name in the merge, which may unify two layouts, and a text encoder's number with its word."""
    if (same := _found(merged, lora.spellings[module])) is not None:
        return same
    encoder = text_encoder(lora.spellings[module])
    bodies = {other: text_encoder(spelling) for other, spelling in merged.spellings.items()}
    alike = [other for other, its in bodies.items() if encoder and its and its[1] == encoder[1]]
    return alike[0] if len(alike) == 1 else module


def _found(lora: Lora, spelling: str) -> str | None:
    try:
        return lora.find(spelling)
    except KeyError:
        return None


def check_round_trip(lora: Lora, path: Path, draw: random.Random, seen: Counter[str]) -> None:
    dtype, format = draw.choice(list(ROUNDING)), draw.choice(["kohya", "kohya", "diffusers"])
    path.unlink(missing_ok=True)
    try:
        save(lora, path, dtype=dtype, format=format)
    except (ValueError, OSError) as error:
        seen["saves refused"] += 1
        check_message(error)
        if path.exists():
            raise Finding("a refused save leaves a file", str(error)[:100]) from error
        return
    seen["round trips"] += 1
    again = load(path)
    lora = named_for(lora, format)[0]  # transformers get the names of the format
    meant = {_found(again, spelling) for spelling in lora.spellings.values()}
    if len(again.spellings) != len(lora.spellings) or (format == "kohya" and again.spellings.keys() != meant):
        raise Finding(
            f"modules after a round trip as {format}", str(again.spellings.keys() ^ lora.spellings.keys())[:200]
        )
    for module, update in updates(lora).items():
        got = again.delta(again.find(lora.spellings[module]) if format == "kohya" else _diffusers(lora, again, module))
        largest = max(float(update.abs().max()) if update.numel() else 0.0, bound(lora, module))
        error = float((got.double().flatten() - update.double().flatten()).abs().max()) if update.numel() else 0.0
        if not error <= ROUNDING[dtype] * largest + TINY[dtype]:
            raise Finding(f"values after a round trip as {format}", f"{module} {dtype}: {error:.2e} of {largest:.2e}")


# What is too small for float16 is said in a warning; bfloat16 and float32 end at about the same number.
TINY = {torch.float16: 1e-7, torch.bfloat16: 1e-37, torch.float32: 1e-37}


def _diffusers(lora: Lora, again: Lora, module: str) -> str:
    return again.find(lora.diffusers_spellings()[module])


def bound(lora: Lora, module: str) -> float:
    """The largest entry of |up| |down|: what rounding is relative to where the sum cancels."""
    layer = lora.modules.get(module)
    if layer is None or not layer.parameters:
        return 0.0
    up, down = layer.factors()
    return abs(layer.scale) * float((up.double().abs() @ down.double().abs()).max())


def place(error: BaseException) -> str:
    """The innermost places of ours, without line numbers of the fuzzer."""
    frames = [
        frame
        for frame in traceback.extract_tb(error.__traceback__)
        if "lora_merge" in frame.filename and "/tests/" not in frame.filename
    ]
    return " < ".join(f"{Path(frame.filename).name}:{frame.lineno}" for frame in frames[::-1][:3])


@contextmanager
def time_limit(seconds: int) -> Iterator[None]:
    """Raises Hang after so many seconds; no limit where there are no such signals."""
    if not hasattr(signal, "SIGALRM"):
        yield
        return

    def rang(*_: object) -> None:
        raise Hang

    before = signal.signal(signal.SIGALRM, rang)
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


def fuzz(numbers: Iterable[str], folder: Path, keep: Path | None = None) -> Figures:
    """Tries the files of these numbers. keep: a folder for those that show something."""
    figures, other = Figures(), good()
    for number in numbers:
        figures.files += 1
        try:
            with time_limit(SECONDS):
                try_one(number, folder, other, figures.seen)
            continue
        except Finding as finding:
            kind, detail = finding.kind, finding.detail
        except Hang as error:
            kind, detail = f"hang at {place(error)}", ""
        except Exception as error:
            kind, detail = f"{type(error).__name__} at {place(error)}", str(error)[:200]
        figures.wrong += 1
        if kind not in figures.findings:
            figures.findings[kind] = f"{kind} | {detail} | number {number}"
            if keep is not None:
                keep.mkdir(parents=True, exist_ok=True)
                (keep / f"{number.replace('/', '-')}.safetensors").write_bytes(
                    (folder / "case.safetensors").read_bytes()
                )
    return figures


def until(seconds: float, seed: str) -> Iterator[str]:
    end, number = time.monotonic() + seconds, 0
    while time.monotonic() < end:
        yield f"{seed}/{number}"
        number += 1


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=1800)
    parser.add_argument("--seed", default="1")
    parser.add_argument("--only", help="SEED/NUMBER of a finding")
    options = parser.parse_args()
    torch.set_num_threads(1)
    logging.disable(logging.CRITICAL)
    with tempfile.TemporaryDirectory() as folder:
        if options.only:
            try_one(options.only, Path(folder), good(), Counter())
            return 0
        figures = fuzz(until(options.seconds, options.seed), Path(folder), ROOT / "build" / "fuzz")
    for line in figures.findings.values():
        print(line)
    print(f"fuzz: seed {options.seed}, {options.seconds:g} s, {figures}")
    return int(figures.wrong > 0)


if __name__ == "__main__":
    sys.exit(main())
