"""What Limit Denoised does at cfg above 1: the embedded model with its LCM-LoRA, 4 steps, LCM Kit's sampler.

    COMFYUI_PATH=.comfyui .venv/bin/python benchmarks/limit_denoised.py

Prints a Markdown table, cfg across and quantile down: how often the judge names the prompted concept, and the Frechet
distance of its features to those of the teacher's samples, as in quality_against_steps.py. Every cell draws the same
concepts from the same noise. Draws docs/limit_denoised.png, some of the same pictures.
Needs the judge: python demo/train/classifier.py. About a quarter of an hour of one CPU core.
"""

import argparse

from setting import ROOT, markdown

import torch
from data import NAMES
from frechet import frechet
from judged import Judge
from PIL import Image
from quality_against_steps import teacher_features
from sheet import Row, draw, enlarge, side_by_side
from studio import TEACHER_CFG, Studio, Way, ours
from tqdm import tqdm

CFGS = (1.0, 1.5, 2.0, 3.0, 4.0)
OFF = 1.0
QUANTILES = (OFF, 0.99, 0.95, 0.9, 0.8)
STEPS = 4
SHOWN = ("cat face", "ladybug", "rocket")
PICTURE = ROOT / "docs" / "limit_denoised.png"


def limited(quantile: float, cfg: float) -> Way:
    """The LCM-LoRA at this cfg, limited as the node does it."""

    def plan(model, steps):
        from lcm_kit.host.sampling.limits import with_limit

        return ours()(with_limit(model, quantile), steps)

    return Way(f"quantile {quantile:g}", plan, {"lcm": 1.0}, cfg)


def pictures(studio: Studio, quantile: float, cfg: float, seed: int) -> Image.Image:
    """The shown concepts beside one another."""
    latents = studio.latents(limited(quantile, cfg), STEPS, seed)
    shown = studio.decoded(latents[[NAMES.index(name) for name in SHOWN]])
    bytes_ = (shown * 255).round().to(torch.uint8).permute(0, 2, 3, 1).numpy()
    return side_by_side([enlarge(Image.fromarray(each), 1) for each in bytes_])


def table(cells: dict[tuple[float, float], tuple[float, float]]) -> str:
    """Score and Frechet distance of every (quantile, cfg), as Markdown."""
    rows = []
    for quantile in QUANTILES:
        row = [f"{score:.1%}, {distance:.3f}" for score, distance in (cells[quantile, cfg] for cfg in CFGS)]
        rows.append(["off" if quantile == OFF else f"{quantile:g}", *row])
    return markdown(["quantile", *(f"cfg {cfg:g}" for cfg in CFGS)], rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=3, help="pictures of every concept, for each cell")
    parser.add_argument("--shown", type=float, default=0.95, help="quantile of the lower row of the picture")
    parser.add_argument("--picture-only", action="store_true", help="draw the picture and measure nothing")
    args = parser.parse_args()

    torch.set_grad_enabled(False)
    studio = Studio()
    rows = [
        Row(
            [pictures(studio, quantile, cfg, seed=1000) for cfg in CFGS],
            label,
            above=[f"cfg {cfg:g}" for cfg in CFGS] if quantile == OFF else (),
        )
        for quantile, label in ((OFF, "off"), (args.shown, f"quantile\n{args.shown:g}"))
    ]
    draw(rows).save(PICTURE)
    if args.picture_only:
        return

    judge = Judge(studio)
    reference = teacher_features(judge, TEACHER_CFG, args.seeds)
    cells = {}
    for quantile, cfg in tqdm([(quantile, cfg) for quantile in QUANTILES for cfg in CFGS]):
        if cfg == 1.0 and quantile != OFF:  # bit by bit the same pictures
            cells[quantile, cfg] = cells[OFF, cfg]
            continue
        seen = judge.verdict(limited(quantile, cfg), STEPS, [1000 + seed for seed in range(args.seeds)])
        distance = frechet(seen.features.flatten(0, 1), reference)
        cells[quantile, cfg] = sum(seen.right) / args.seeds, distance
    print(f"{args.seeds * len(NAMES)} pictures a cell, {STEPS} steps: concept named, Frechet distance to the teacher\n")
    print(table(cells))


if __name__ == "__main__":
    main()
