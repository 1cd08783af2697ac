"""What a merge keeps of style and prompt, by strength, method, protection and rank, on the embedded model at 4 steps.

    COMFYUI_PATH=.comfyui .venv/bin/python benchmarks/merge_quality.py

The style LoRA and the LCM-LoRA are merged by lora_merge and applied by ComfyUI's own loader; LCM Kit samples 4 steps at
cfg 1. Columns: prompted concept named, style seen (both by a judge that has seen real pictures only), and the Frechet
distance of the judge's features to the style LoRA's own pictures (strength 1, DPM++ 2M, 25 steps, guidance 3). Prints
Markdown, as kept in benchmarks/RESULTS.md, and writes docs/merge_methods.png: the first concepts, one row a method.
Needs the judge: python demo/train/classifier.py. About ten minutes of one CPU core.
"""

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "demo" / "train"))

import torch
from common import DEMO, ROOT, load_lcm_kit
from data import NAMES
from frechet import frechet
from judged import Judge
from studio import LORAS, Studio, Way, core, ours

STEPS, CFG = 4, 3.0
STYLE, LCM = 0.8, 1.0  # the paper's strengths (Luo et al. 2023, arXiv 2311.05556, section 3.2)
LINEAR = f"linear, {STYLE:g} + {LCM:g}"
# name -> (strength of the style, options of lora_merge.merge)
MERGES: dict[str, tuple[float, dict]] = {
    **{f"linear, {s:g} + 1": (s, {}) for s in (0.2, 0.4, 0.6, STYLE, 1.0, 1.2)},
    **{f"LCM protected, mu {mu:g}": (STYLE, {"mu": mu, "protect": 1}) for mu in (0.5, 1.0, 3.0)},
    **{f"style protected, mu {mu:g}": (STYLE, {"mu": mu, "protect": 0}) for mu in (1.0,)},
    **{f"rank {r}": (STYLE, {"rank": r}) for r in (4, 8, 16, 32)},
    **{f"rank {r}, balanced": (STYLE, {"rank": r, "balanced": True}) for r in (4, 8, 16, 32)},
    **{
        name: (STYLE, {"method": name})
        for name in ("ties", "dare", "dare_ties", "della", "magnitude", "breadcrumbs", "slerp", "tsv")
    },
    **{f"{name}, density 0.9": (STYLE, {"method": name, "density": 0.9}) for name in ("ties", "dare", "dare_ties")},
}
SHOWN = [LINEAR, "LCM protected, mu 1", "rank 8", "rank 8, balanced", "ties", "dare", "magnitude", "slerp", "tsv"]
PICTURES = 14


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=2)
    parser.add_argument("--picture", type=Path, default=ROOT / "docs" / "merge_methods.png")
    args = parser.parse_args()
    torch.set_grad_enabled(False)
    studio = Studio()
    load_lcm_kit()
    from lcm_kit.lora_merge import load, merge

    style, lcm = load(LORAS["ink"]), load(LORAS["lcm"])
    judge = Judge(studio)
    seeds = list(range(args.seeds))
    alone = Way("the style LoRA alone, 1, DPM++ 2M, 50 model calls", core("dpmpp_2m", "karras"), {"ink": 1.0}, CFG)
    reference = judge.verdict(alone, 25, [1000 + seed for seed in seeds]).features.flatten(0, 1)

    print("| merge | names the prompt | style seen | Frechet to the style's own pictures |")
    print("| --- | --- | --- | --- |")
    shown = {}
    for name, (strength, options) in [(alone.name, (0.0, {})), *MERGES.items()]:
        way, steps = alone, 25
        if name != alone.name:
            merged = merge([(style, strength), (lcm, LCM)], **options)
            studio.loras[name] = merged.to_state_dict()
            way, steps = Way(name, ours(), {name: 1.0}), STEPS
        seen = judge.verdict(way, steps, seeds)
        right, inked = (sum(values) / len(values) for values in (seen.right, seen.inked))
        distance = frechet(seen.features.flatten(0, 1), reference)
        print(f"| {name} | {right:.1%} | {inked:.1%} | {distance:.0f} |", flush=True)
        if name in SHOWN:
            shown[name] = studio.decoded(studio.latents(way, steps, 0)[:PICTURES])
    draw(shown, args.picture)


def draw(shown: dict[str, torch.Tensor], path: Path) -> None:
    sys.path.insert(0, str(DEMO))
    import sheet
    from torchvision.transforms.functional import to_pil_image

    rows = [
        sheet.Row([to_pil_image(picture) for picture in pictures], name, NAMES[:PICTURES] if last else ())
        for name, pictures in shown.items()
        for last in [name == list(shown)[-1]]
    ]
    sheet.draw(rows).save(path)


if __name__ == "__main__":
    main()
