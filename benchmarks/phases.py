"""What distilling in phases is worth on the embedded model, and what of it is the edges, the solver, the timesteps.

    COMFYUI_PATH=.comfyui .venv/bin/python benchmarks/phases.py
    .venv/bin/python benchmarks/phases.py --models ink --seeds 3 --calls 4 --variants "skip 125" "4 phases"

Each variant is the demo's LCM-LoRA, refined by the same 300 steps on the same pictures (demo/train/lcm.py), with other phases,
skip and timesteps: 4 phases differ from LCM in all three, so each is changed alone. Two of them go on to 600 and 1000 steps.
Rows: 1, 2, 4 and 8 model calls; at the timesteps that fit, with fresh noise between steps (gamma 1) and without (gamma 0).
Differences are from the LoRA that all begin with, at the same calls, on the same initial noise, with standard errors over
seeds; with --against-guided from guided DPM++ 2M of as many steps, which are twice the calls. A row has that LoRA weaker: what
one gains by less of it needs no training; another the demo's file in 4 phases. Prints Markdown.

Trained LoRAs and judged rows are kept in the work folder. About two and a half minutes of one CPU core for 300 steps of a
variant, and two seconds a row and seed; needs what benchmarks/universality.py needs for its models.
"""

import argparse
import shutil
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from setting import DEMO, ROOT, markdown

import torch
from common import LORAS, WORK
from frechet import frechet, jackknife_error, without_each_seed
from studio import Plan, Way
from universality import BY_WORD, CFG, REFERENCE_SEEDS, SEEDS, UNIFORM, Jury, Model, left_out, mean, missing, ways

CALLS = (1, 2, 4, 8)
BEGUN = "as it began: LCM"
EMBEDDED = "embedded, in 4 phases"


@dataclass(frozen=True)
class Variant:
    """options: of the command that refines.   points: timesteps that samplers may visit, evenly spaced.

    after: a variant of the same settings and fewer steps, whose run goes on: without a decay to the bit one run of all steps.
    """

    options: str
    points: int
    after: str = ""


VARIANTS = {
    "300 steps of LCM more": Variant("--phases 1 --skip 200 --original-steps 50", 50),
    "skip 125": Variant("--phases 1 --skip 125 --original-steps 50", 50),
    "8 timesteps": Variant("--phases 1 --skip 200 --original-steps 8", 8),
    "skip 125, 8 timesteps": Variant("--phases 1 --skip 125 --original-steps 8", 8),
    "4 edges, skip 125, 40 timesteps": Variant("--phases 4 --skip 125 --original-steps 40", 40),
    "4 phases": Variant("--phases 4 --skip 125", 8),
    "2 phases": Variant("--phases 2 --skip 125", 8),
    "8 phases": Variant("--phases 8 --skip 125", 8),
    "guidance 2": Variant("--phases 1 --skip 200 --original-steps 50 --guidance-min 2 --guidance-max 2", 50),
}
for first, longer in (("300 steps of LCM more", "{} steps of LCM more"), ("4 phases", "4 phases, {} steps")):
    for steps, after in ((600, first), (1000, longer.format(600))):
        options = f"{VARIANTS[first].options} --steps {steps}"
        VARIANTS[longer.format(steps)] = Variant(options, VARIANTS[first].points, after)


def file_of(name: str) -> Path:
    return WORK / "phases" / f"{''.join(c if c.isalnum() else '_' for c in name)}.safetensors"


def make(name: str) -> None:
    """Refines, if that was not done yet. The pictures that the model makes are those of the first variant."""
    path, folder = file_of(name), file_of(name).with_suffix(".run")
    path.parent.mkdir(exist_ok=True)
    first = file_of(next(iter(VARIANTS))).with_suffix(".run") / "kept"
    if path.exists():
        return
    if (after := VARIANTS[name].after) and not folder.exists():
        make(after)
        shutil.copytree(file_of(after).with_suffix(".run"), folder)
    if first.exists() and not (folder / "kept").exists():
        shutil.copytree(first, folder / "kept")
    script = [sys.executable, DEMO / "train" / "lcm.py", "--kind", "phased", "--output", path, "--resume", folder]
    subprocess.run([*map(str, script), "--steps", "300", *VARIANTS[name].options.split()], cwd=ROOT, check=True)


def plan(points: int, gamma: float) -> Plan:
    """Steps evenly from a grid of so many points; of 8 and 40 they are the edges of 1, 2, 4 or 8 phases."""

    def plan(model, steps):
        from lcm_kit.host.sampling import sampling, schedules

        sigmas = schedules.lcm_sigmas(model, steps=steps, denoise=1.0, original_steps=points)
        return model, sampling.lcm_sampler(gamma=gamma, seed=-1), sigmas

    return plan


def compared(model: Model, calls: int, args: argparse.Namespace) -> Iterator[tuple[str, str, Way]]:
    """(LoRA, gamma, way) of each row of so many calls. The first is what the others are compared with."""
    if args.against_guided:
        name = f"DPM++ 2M sgm_uniform, {calls} steps"
        yield f"none: {name}, guidance {CFG:g}, twice the calls", "", Way(name, UNIFORM, model.loras, CFG)
    loras = {BEGUN: ("lcm", 1.0, 50)} | {f"as it began, at strength {s:g}": ("lcm", s, 50) for s in args.strengths}
    loras[EMBEDDED] = ("phased", 1.0, 8)
    loras |= {name: (name, 1.0, VARIANTS[name].points) for name in args.variants}
    for name, (kind, strength, points) in loras.items():
        for gamma in args.gammas if calls > 1 else (1.0,):
            way = Way(f"{name}, gamma {gamma:g}, {calls}", plan(points, gamma), {**model.loras, kind: strength})
            yield name, f"{gamma:g}", way


def table(jury: Jury, model: Model, args: argparse.Namespace) -> list[list[object]]:
    (own, own_steps), seeds = ways(model)[0], args.seeds
    reference = jury.row(model, own, own_steps, [REFERENCE_SEEDS + k for k in range(seeds)])["features"].flatten(0, 1)
    rows, first = [], {}
    for calls in args.calls:
        for name, gamma, way in compared(model, calls, args):
            seen = jury.row(model, way, calls, [SEEDS + k for k in range(seeds)])
            distance = frechet(seen["features"].flatten(0, 1), reference)
            found = {
                "names": (100 * mean(seen["right"]), [100 * share for share in left_out(seen["right"])]),
                "distance": (distance, without_each_seed(seen["features"], reference)),
            }
            first.setdefault(calls, found)
            cells = [difference(found[column], first[calls][column]) for column in found]
            rows.append([model.name, calls, name, gamma, f"{found['names'][0]:.1f}", f"{distance:.1f}", *cells])
            print(*rows[-1], sep=", ", file=sys.stderr, flush=True)
    return rows


def difference(found: tuple[float, list[float]], first: tuple[float, list[float]]) -> str:
    """Of two values, each beside its values with one seed left out; nothing for one and the same."""
    if found is first:
        return ""
    error = jackknife_error([a - b for a, b in zip(found[1], first[1], strict=True)])
    return f"{found[0] - first[0]:+.1f} ± {error:.1f}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=5, help="pictures of every concept, for each row; 2 at least")
    parser.add_argument("--models", nargs="+", choices=list(BY_WORD), default=["base"], help="of universality.py")
    parser.add_argument("--variants", nargs="*", choices=list(VARIANTS), default=list(VARIANTS), help="which of them")
    parser.add_argument("--calls", nargs="+", type=int, choices=CALLS, default=CALLS, help="of a picture")
    parser.add_argument("--gammas", nargs="+", type=float, default=[1.0, 0.0], help="shares of new noise between steps")
    parser.add_argument(
        "--strengths", nargs="*", type=float, default=[0.7], help="of rows of the LoRA that all begin with"
    )
    parser.add_argument(
        "--against-guided", action="store_true",
        help="compare with DPM++ 2M on sgm_uniform without a LoRA, as many steps at twice the calls",
    )  # fmt: skip
    args = parser.parse_args()
    models = [BY_WORD[word] for word in args.models]
    if text := missing(models):
        sys.exit(text)
    for name in args.variants:
        make(name)
        LORAS[name] = file_of(name)
    torch.set_grad_enabled(False)
    jury = Jury()
    columns = [
        "model", "calls", "LoRA", "gamma", "names, %", "Frechet", "names less the first's", "Frechet less the first's",
    ]  # fmt: skip
    print(markdown(columns, [row for model in models for row in table(jury, model, args)]))


if __name__ == "__main__":
    main()
