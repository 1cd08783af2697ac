"""Measure the demo's models: does the judge name the prompted thing, and how far are the samples from the teacher's?

    python demo/train/evaluate.py --seeds 3

Everything runs through ComfyUI's own loaders and samplers and LCM Kit's sampler. Writes demo/evaluation.json and
prints the tables of demo/MODEL_CARD.md. Way by way: model calls, steps, prompted concept named (score), style seen,
Frechet distance of the judge's features to the teacher's samples of other noise.
"""

import argparse
import json
import time

from common import DEMO
from data import NAMES
from frechet import frechet
from judged import Judge
from studio import Studio, Way, core, ours
from tqdm import tqdm

TEACHER_CFG = 3.0
TEACHER_STEPS = 50


def teacher(cfg: float = TEACHER_CFG) -> Way:
    return Way("teacher, other noise", core("ddim", "ddim_uniform"), cfg=cfg)


def ways(cfg: float) -> list[tuple[Way, tuple[int, ...]]]:
    """The rows of the table: a way, and the numbers of steps it is measured at."""
    lcm, ink, dpm = {"lcm": 1.0}, {"ink": 0.8}, core("dpmpp_2m", "karras")
    return [
        (teacher(cfg), (TEACHER_STEPS,)),
        (Way("LCM-LoRA, LCM Kit", ours(), lcm), (1, 2, 4, 8)),
        (Way("no LoRA, LCM Kit", ours()), (4,)),
        (Way("DPM++ 2M karras", dpm, cfg=cfg), (1, 2, 4, 8)),
        (Way("DPM++ 2M sgm_uniform", core("dpmpp_2m", "sgm_uniform"), cfg=cfg), (2, 4, 8)),
        (Way("DDIM", core("ddim", "sgm_uniform"), cfg=cfg), (2, 4, 8)),
        (Way("Euler", core("euler", "normal"), cfg=cfg), (2, 4, 8)),
        (Way("ink, DPM++ 2M karras", dpm, {"ink": 1.0}, cfg), (25,)),
        (Way("0.8 ink + LCM-LoRA, LCM Kit", ours(), ink | lcm), (4,)),
        (Way("0.8 ink, DPM++ 2M karras", dpm, ink, cfg), (4,)),
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--cfg", type=float, default=TEACHER_CFG, help="guidance of the teacher and the baselines")
    args = parser.parse_args()

    studio = Studio()
    judge = Judge(studio)
    reference = judge.verdict(teacher(args.cfg), TEACHER_STEPS, list(range(args.seeds))).features.flatten(0, 1)
    runs = [(way, n) for way, steps in ways(args.cfg) for n in steps if set(way.loras) <= set(studio.loras)]
    rows = []
    for way, steps in tqdm(runs):
        begin = time.monotonic()
        seen = judge.verdict(way, steps, [1000 + seed for seed in range(args.seeds)])
        seconds = (time.monotonic() - begin) / args.seeds / len(NAMES)
        right, inked = seen.right, seen.inked
        rows.append({
            "name": way.name, "steps": steps, "calls": way.calls(steps),
            "score": sum(right) / len(right), "score_low": min(right), "score_high": max(right),
            "ink": sum(inked) / len(inked), "frechet": frechet(seen.features.flatten(0, 1), reference),
            "seconds": seconds,
        })  # fmt: skip
    (DEMO / "evaluation.json").write_text(
        json.dumps({"cfg": args.cfg, "seeds": args.seeds, "pictures": args.seeds * len(NAMES), "rows": rows}, indent=1)
        + "\n"
    )
    print("| way | steps | model calls | names the prompt | style ink | Frechet to teacher | ms a picture |")
    print("| --- | --- | --- | --- | --- | --- | --- |")
    for r in rows:
        print(
            f"| {r['name']} | {r['steps']} | {r['calls']} | {r['score']:.1%} ({r['score_low']:.0%} to "
            f"{r['score_high']:.0%}) | {r['ink']:.1%} | {r['frechet']:.3f} | {r['seconds'] * 1000:.1f} |"
        )


if __name__ == "__main__":
    main()
