"""What a merge keeps of style and prompt, by strength, method, protection and rank, on the embedded model at 4 steps.

    COMFYUI_PATH=.comfyui .venv/bin/python benchmarks/merge_quality.py
    COMFYUI_PATH=.comfyui .venv/bin/python benchmarks/merge_quality.py --only "dare|ties" --seeds 1

The style LoRA and the LCM-LoRA are merged by lora_merge and applied by ComfyUI's own loader; LCM Kit samples 4 steps at
cfg 1. Columns: prompted concept named, style seen (both by a judge that has seen real pictures only), and the Frechet
distance of the judge's features to the style LoRA's own pictures (strength 1, DPM++ 2M, 25 steps, guidance 3); effect
is what the merge says a method leaves of style and LCM-LoRA. Methods work in the core space, "on whole weights" as in their
papers. Prints Markdown, as kept in benchmarks/RESULTS.md, and, of all rows, writes docs/merge_methods.png: the first
concepts, one row a method. The style's own pictures are kept in the work folder until its models change.
Needs the judge: python demo/train/classifier.py. Prints the CPU time it took.
"""

import argparse
import re
import time
from dataclasses import asdict
from pathlib import Path

from setting import ROOT

import classifier
import torch
from common import CHECKPOINT, LORAS, VAE, WORK, load_lcm_kit, load_state, save_state
from data import NAMES
from frechet import frechet
from judged import Judge, Verdict
from studio import Studio, Way, core, fingerprint, ours

STEPS, CFG = 4, 3.0
STYLE, LCM = 0.8, 1.0  # the paper's strengths (Luo et al. 2023, arXiv 2311.05556, section 3.2)
LINEAR = f"linear, {STYLE:g} + {LCM:g}"
ALONE = Way("the style LoRA alone, 1, DPM++ 2M, 50 model calls", core("dpmpp_2m", "karras"), {"ink": 1.0}, CFG)
ALONE_STEPS = 25
ENTRYWISE = ("ties", "dare", "dare_ties", "della", "della_ties", "magnitude", "breadcrumbs")
# name -> (strength of the style, options of lora_merge.merge)
MERGES: dict[str, tuple[float, dict]] = {
    **{f"linear, {s:g} + 1": (s, {}) for s in (0.2, 0.4, 0.6, STYLE, 1.0, 1.2)},
    **{f"LCM protected, mu {mu:g}": (STYLE, {"mu": mu, "protect": 1}) for mu in (0.5, 1.0, 3.0)},
    **{f"style protected, mu {mu:g}": (STYLE, {"mu": mu, "protect": 0}) for mu in (1.0,)},
    **{f"rank {r}": (STYLE, {"rank": r}) for r in (4, 8, 16, 32)},
    **{f"rank {r}, balanced": (STYLE, {"rank": r, "balanced": True}) for r in (4, 8, 16, 32)},
    **{name: (STYLE, {"method": name}) for name in (*ENTRYWISE, "slerp", "tsv")},
    **{f"{name} on whole weights": (STYLE, {"method": name, "dense": True}) for name in ENTRYWISE},
    "ties, density 0.9": (STYLE, {"method": "ties", "density": 0.9}),
    **{
        f"{name}, density 0.5{' on whole weights' * dense}": (STYLE, {"method": name, "density": 0.5, "dense": dense})
        for name in ("dare", "dare_ties")
        for dense in (False, True)
    },
}
SHOWN = [
    LINEAR,
    "LCM protected, mu 1",
    "rank 8",
    "rank 8, balanced",
    "ties",
    "dare",
    "magnitude",
    "breadcrumbs",
    "slerp",
    "tsv",
]
PICTURES = 14


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=2)
    parser.add_argument(
        "--only", default="", metavar="EXPRESSION", help="measure the rows whose name matches, no picture"
    )
    parser.add_argument("--picture", type=Path, default=ROOT / "docs" / "merge_methods.png")
    args = parser.parse_args()
    torch.set_grad_enabled(False)
    judge = Judge(Studio())
    load_lcm_kit()
    from lcm_kit.lora_merge import load, merge_with_account

    style, lcm = load(LORAS["ink"]), load(LORAS["lcm"])
    reference = alone(judge, 1000, args.seeds).features.flatten(0, 1)

    print("| merge | names the prompt | style seen | Frechet to the style's own pictures | effect, style and LCM |")
    print("| --- | --- | --- | --- | --- |")
    if re.search(args.only, ALONE.name):
        print_row(ALONE.name, alone(judge, 0, args.seeds), reference, "")
    shown = {}
    for name, (strength, options) in MERGES.items():
        if not re.search(args.only, name):
            continue
        merged, account = merge_with_account([(style, strength), (lcm, LCM)], **options)
        judge.studio.loras[name] = merged.to_state_dict()
        way = Way(name, ours(), {name: 1.0})
        latents = [judge.studio.latents(way, STEPS, seed) for seed in range(args.seeds)]
        effects = " and ".join(f"{source.effect:.2f}" for source in account.sources) if "method" in options else ""
        print_row(name, judge.of(latents), reference, effects)
        if name in SHOWN:
            shown[name] = judge.studio.decoded(latents[0][:PICTURES])
        del judge.studio.loras[name]
    print(f"\n{time.process_time():.0f} s of CPU time")
    if not args.only:
        draw(shown, args.picture)


def alone(judge: Judge, first_seed: int, seeds: int) -> Verdict:
    """Of the style LoRA's own pictures; kept in the work folder, they take as long as all merges together."""
    made_of = fingerprint(CHECKPOINT, VAE, classifier.PATH, LORAS["ink"])
    path = WORK / f"style_{made_of}-seeds{first_seed}+{seeds}.pt"
    state = load_state(path)
    if state is None:
        state = asdict(judge.verdict(ALONE, ALONE_STEPS, list(range(first_seed, first_seed + seeds))))
        save_state(path, state)
    return Verdict(**state)


def print_row(name: str, seen: Verdict, reference: torch.Tensor, effects: str) -> None:
    right, inked = (sum(values) / len(values) for values in (seen.right, seen.inked))
    distance = frechet(seen.features.flatten(0, 1), reference)
    print(f"| {name} | {right:.1%} | {inked:.1%} | {distance:.0f} | {effects} |", flush=True)


def draw(shown: dict[str, torch.Tensor], path: Path) -> None:
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
