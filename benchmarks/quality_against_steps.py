"""How good the pictures of the embedded model are, by sampler and number of steps.

    COMFYUI_PATH=.comfyui .venv/bin/python benchmarks/quality_against_steps.py
    .venv/bin/python benchmarks/quality_against_steps.py --plot-only

Two numbers a way and step count: how often a judge that has seen real pictures only names the prompted concept
(score), and the Frechet distance of its features to those of the teacher's samples. Every row draws the same concepts
from the same initial noise. The first row is the teacher itself with that noise: the floor of the distance.

Keeps what it has measured in benchmarks/quality_against_steps.json after every row, so it can be stopped, and draws
docs/quality_against_steps.png from it. A row is measured again when the models it depends on have changed.
Needs the judge: python demo/train/classifier.py. About an hour of one CPU core, all told.
"""

import argparse
import json
import re
from pathlib import Path

from setting import ROOT

import classifier
import torch
from against_core import with_schedule
from common import CHECKPOINT, LORAS, VAE, WORK, load_state, save_state
from data import NAMES
from frechet import frechet, without_each_seed
from judged import Judge, Verdict
from quality_table import tables
from studio import TEACHER_CFG, TEACHER_STEPS, Studio, Way, core, fingerprint, ours, teacher
from tqdm import tqdm

RESULTS = ROOT / "benchmarks" / "quality_against_steps.json"
PLOT = ROOT / "docs" / "quality_against_steps.png"
ALL = (1, 2, 3, 4, 6, 8, 16, 32)
FEW = (1, 2, 3, 4, 6, 8)
MIXED = (3, 4, 6, 8)  # with fewer steps there is one re-noising, and nothing to mix
ORDER = {3: 1, 6: 1, 16: 2, 32: 3}  # what is measured after the rest: the gaps, and what takes longest
LCM = {"lcm": 1.0}
# Core's samplers seed their step noise with the run's seed. On a GPU that is other noise than the initial one, which
# comes from the CPU; on a CPU it begins with the initial noise itself. Most users have a GPU, so other noise it is.
AS_ON_A_GPU = 500_000


def core_lcm_schedule(model):
    """The schedule of core's ModelSamplingDiscrete "lcm". The node's own would take v-prediction for epsilon."""
    from comfy_extras.nodes_model_advanced import ModelSamplingDiscrete

    (patched,) = ModelSamplingDiscrete().patch(model, "lcm", False)
    schedule = type(patched.get_model_object("model_sampling")).__mro__[1]
    model = model.clone()
    model.add_object_patch("model_sampling", with_schedule(model, schedule))
    return model


def deterministic_first(steps: int) -> list[float]:
    """gamma of each step: Euler's method for the first half, LCM for the rest."""
    return [0.0] * (steps // 2) + [1.0] * (steps - steps // 2)


def random_first(steps: int) -> list[float]:
    """gamma of each step: LCM for the first half, Euler's method for the rest."""
    return [1.0] * (steps // 2) + [0.0] * (steps - steps // 2)


def core_lcm(scheduler: str, prepare=None) -> Way:
    """Core's lcm sampler with the LCM-LoRA."""
    name = f"core lcm, {'LCM schedule + ' * (prepare is not None)}{scheduler}"
    plan = core("lcm", scheduler, prepare) if prepare else core("lcm", scheduler)
    return Way(name, plan, LCM, step_seed_offset=AS_ON_A_GPU)


def ancestral(scheduler: str, cfg: float) -> Way:
    return Way(
        f"Euler ancestral, {scheduler}", core("euler_ancestral", scheduler), cfg=cfg, step_seed_offset=AS_ON_A_GPU
    )


def ways(cfg: float) -> list[tuple[Way, tuple[int, ...]]]:
    """All compared ways and their numbers of steps."""
    return [
        (teacher(cfg), (TEACHER_STEPS,)),
        (Way("LCM Kit", ours(), LCM), ALL),
        (Way("LCM Kit, gamma 0", ours(0.0), LCM), ALL),
        (Way("LCM Kit, gamma 0.3", ours(0.3), LCM), ALL),
        (Way("LCM Kit, gamma 0.7", ours(0.7), LCM), ALL),
        (core_lcm("sgm_uniform"), ALL),
        (core_lcm("simple"), ALL),
        (core_lcm("simple", core_lcm_schedule), ALL),
        (core_lcm("sgm_uniform", core_lcm_schedule), ALL),
        (Way("DDIM, sgm_uniform", core("ddim", "sgm_uniform"), cfg=cfg), ALL),  # Euler on sgm_uniform is the same
        (Way("DPM++ 2M, karras", core("dpmpp_2m", "karras"), cfg=cfg), ALL),
        (Way("DPM++ 2M, sgm_uniform", core("dpmpp_2m", "sgm_uniform"), cfg=cfg), ALL),
        (ancestral("normal", cfg), FEW),
        (ancestral("sgm_uniform", cfg), ALL),
        (Way("Euler, normal", core("euler", "normal"), cfg=cfg), FEW),
        (Way("LCM Kit, original_steps 100", ours(original_steps=100), LCM), FEW),
        (Way("LCM Kit, gamma 0 then 1", ours(deterministic_first), LCM), MIXED),
        (Way("LCM Kit, gamma 1 then 0", ours(random_first), LCM), MIXED),
        (Way("core lcm, sgm_uniform, initial noise again", core("lcm", "sgm_uniform"), LCM), (2, 4, 8)),
    ]


def made_of(way: Way, seeds: int) -> str:
    """Short name of everything a row depends on but the code: models, judge, guidance, seeds."""
    files = [CHECKPOINT, VAE, classifier.PATH, *(LORAS[kind] for kind in sorted(way.loras))]
    return f"{fingerprint(*files)}-cfg{way.cfg:g}-seeds{seeds}"


def teacher_features(judge: Judge, cfg: float, seeds: int) -> torch.Tensor:
    """(pictures, d) features of the teacher's samples, from other noise than the rows'; kept in the work folder."""
    path = WORK / f"teacher_{made_of(teacher(cfg), seeds)}.pt"
    state = load_state(path)
    if state is None:
        state = {"features": judge.verdict(teacher(cfg), TEACHER_STEPS, list(range(seeds))).features}
        save_state(path, state)
    return state["features"].flatten(0, 1)


def row(way: Way, steps: int, seeds: int, seen: Verdict, reference: torch.Tensor) -> dict:
    """What is kept of one way and step count; lists go by seed."""
    return {
        "way": way.name,
        "steps": steps,
        "calls": way.calls(steps),
        "score": sum(seen.right) / seeds,
        "score_by_seed": [round(share, 6) for share in seen.right],
        "frechet": round(frechet(seen.features.flatten(0, 1), reference), 4),
        "frechet_without_seed": [round(value, 4) for value in without_each_seed(seen.features, reference)],
        "made_of": made_of(way, seeds),
    }


def keep(path: Path, results: dict) -> None:
    """Write the results, one line a row. A stop in the middle leaves the old file."""
    head = json.dumps({key: value for key, value in results.items() if key != "rows"}, indent=1)
    rows = ",\n  ".join(json.dumps(row) for row in results["rows"])
    part = path.with_suffix(".part")
    part.write_text(head.removesuffix("\n}") + ',\n "rows": [\n  ' + rows + "\n ]\n}\n")
    part.replace(path)


def up_to_date(args: argparse.Namespace) -> dict[tuple[str, int], dict]:
    """Kept rows by way and steps, without those whose models have changed since.

    Raises ValueError if they are of other seeds or guidance: such rows cannot stand in one table.
    """
    if not args.results.exists():
        return {}
    results = json.loads(args.results.read_text())
    if (results["seeds"], results["guidance"]) != (args.seeds, args.cfg):
        raise ValueError(
            f"{args.results} is of {results['seeds']} seeds and guidance {results['guidance']:g}, and {args.seeds} and "
            f"{args.cfg:g} were asked for. Name another file with --results, or measure all anew with --again."
        )
    now = {way.name: made_of(way, args.seeds) for way, _ in ways(args.cfg)}
    return {(r["way"], r["steps"]): r for r in results["rows"] if now.get(r["way"]) == r["made_of"]}


def measure(args: argparse.Namespace) -> None:
    """Measure the rows that are missing or out of date."""
    plan = [(way, n) for way, steps in ways(args.cfg) for n in steps if not args.steps or n in args.steps]
    plan = [(way, n) for way, n in plan if re.search(args.only, way.name)]
    plan.sort(key=lambda run: ORDER.get(run[1], 0))
    known = {} if args.again and not args.only and not args.steps else up_to_date(args)
    if not args.again:
        plan = [(way, n) for way, n in plan if (way.name, n) not in known]
    if not plan:
        return

    judge = Judge(Studio(), remember=True)
    reference = teacher_features(judge, args.cfg, args.seeds)
    order = {way.name: k for k, (way, _) in enumerate(ways(args.cfg))}
    for way, steps in (bar := tqdm(plan, mininterval=10)):
        bar.set_postfix_str(f"{way.name}, {steps}")
        seen = judge.verdict(way, steps, [1000 + seed for seed in range(args.seeds)])
        known[way.name, steps] = row(way, steps, args.seeds, seen, reference)
        rows = sorted(known.values(), key=lambda r: (order[r["way"]], r["steps"]))
        keep(
            args.results,
            {
                "guidance": args.cfg, "seeds": args.seeds, "pictures": args.seeds * len(NAMES),
                "features": reference.shape[1], "rows": rows,
            },
        )  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=3, help="pictures of every concept, for each row")
    parser.add_argument(
        "--cfg", type=float, default=TEACHER_CFG, help="guidance of the teacher and the ways without LoRA"
    )
    parser.add_argument("--only", default="", help="measure the ways whose name matches this expression")
    parser.add_argument("--steps", type=int, nargs="*", help="measure these numbers of steps only")
    parser.add_argument("--again", action="store_true", help="measure rows that are there already")
    parser.add_argument("--plot-only", action="store_true", help="only draw the plot")
    parser.add_argument("--results", type=Path, default=RESULTS)
    parser.add_argument("--plot", type=Path, default=PLOT)
    args = parser.parse_args()
    if not args.plot_only:
        measure(args)
    from quality_plot import draw

    results = json.loads(args.results.read_text())
    print(tables(results))
    draw(results, args.plot)


if __name__ == "__main__":
    main()
