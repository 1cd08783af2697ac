"""Does the LCM-LoRA distilled from the base speed up models it never saw? The embedded base, a fine-tune, two styles.

    COMFYUI_PATH=.comfyui .venv/bin/python benchmarks/universality.py
    .venv/bin/python benchmarks/universality.py --models ink --no-picture
    .venv/bin/python benchmarks/universality.py --models fluent --seeds 3 --rows 'sgm_uniform, . steps$'

Section 3.2 of the LCM-LoRA paper (Luo et al. 2023, arXiv 2311.05556): the LCM-LoRA is added to a fine-tune, and to style
LoRAs, and nothing is trained. Columns: prompted concept named and style seen by a judge that has seen real pictures only,
and the Frechet distance of its features to the model's own pictures with 50 model calls (DPM++ 2M, guidance 3, other noise).
The first row of a model is these pictures with the rows' noise: the floor. The last two columns are differences from the row
of the LCM-LoRA, on the same initial noise, with their standard errors over the seeds (jackknife): what is not well above its
error is none. Prints Markdown, as kept in benchmarks/RESULTS.md, and writes docs/universality.png.

Files that are not in the repository are made once:

    python demo/train/lora.py twemoji --minutes 10
    python demo/train/finetune.py --minutes 10
    python demo/train/classifier.py --minutes 8 --styles noto ink twemoji fluent
    python demo/train/lcm.py --kind ink_fast     the ink style's own acceleration

Rows without their files are left out, and said so. Rows are kept in the work folder and measured again when a model they
depend on has changed: about 20 seconds of one CPU core a row and seed with 50 calls, 2 with 4.
"""

import argparse
import re
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from setting import ROOT, markdown

import classifier
import torch
from common import CHECKPOINT, FINETUNE, LORAS, VAE, WORK, load_state, save_state
from data import COLOUR_NAMES, NAMES, draw, glyphs
from frechet import frechet, jackknife_error, without_each_seed
from judged import Judge
from studio import Studio, Way, core, fingerprint, ours, phased

CFG = 3.0  # of everything without LCM-LoRA
STYLES = ("noto", "ink", "twemoji", "fluent")  # the judge's
KARRAS, UNIFORM = core("dpmpp_2m", "karras"), core("dpmpp_2m", "sgm_uniform")
OWN = "DPM++ 2M karras, 25 steps: its own pictures"
FEW_CALLS, FEW_STEPS, FAST = "DPM++ 2M sgm_uniform, 2 steps", "DPM++ 2M sgm_uniform, 4 steps", "LCM-LoRA, 4 steps"
# As users pick them for few steps: (sampler, its scheduler).
USUAL = [
    ("uni_pc", "sgm_uniform"),
    ("uni_pc", "beta"),
    ("res_multistep", "simple"),
    ("dpmpp_2m", "beta"),
    ("dpmpp_2m", "kl_optimal"),
]
LOWER = (1.5, 2.0, 2.5)  # guidance that few steps may like better
BESIDE_STYLES = (0.7, 0.8, 0.85)  # strengths of the LCM-LoRA; the first of them everywhere
PHASES = 4
OPTIONAL = ("ink_fast",)  # LoRAs whose rows are left out where they are not made
REFERENCE_SEEDS, SEEDS = 0, 1000  # the first of each
SHOWN = ["fox face", "owl", "strawberry", "rocket"]
MADE_BY = {
    LORAS["twemoji"]: "python demo/train/lora.py twemoji --minutes 10",
    FINETUNE: "python demo/train/finetune.py --minutes 10",
    classifier.file_of(STYLES): f"python demo/train/classifier.py --minutes 8 --styles {' '.join(STYLES)}",
}


@dataclass(frozen=True)
class Model:
    """What the LCM-LoRA is added to."""

    name: str
    style: str  # that its pictures should have
    checkpoint: Path = CHECKPOINT
    loras: dict[str, float] = field(default_factory=dict)  # kind -> strength


MODELS = [
    Model("the base", "noto"),
    Model("fine-tune on Fluent 3D", "fluent", FINETUNE),
    Model("base + ink LoRA", "ink", loras={"ink": 1.0}),
    Model("base + Twemoji LoRA", "twemoji", loras={"twemoji": 1.0}),
    Model("fine-tune + ink LoRA", "ink", FINETUNE, {"ink": 1.0}),
]

BY_WORD = dict(zip(["base", "fluent", "ink", "twemoji", "fluent-ink"], MODELS, strict=True))


def ways(model: Model) -> list[tuple[Way, int]]:
    """The rows of a model: a way, and its steps. Those whose files are not there are left out."""
    style = model.loras
    rows = [
        (Way(OWN, KARRAS, style, CFG), 25),
        (Way("DPM++ 2M karras, 4 steps", KARRAS, style, CFG), 4),
        (Way(FEW_STEPS, UNIFORM, style, CFG), 4),
        *((Way(f"{name} {scheduler}, 4 steps", core(name, scheduler), style, CFG), 4) for name, scheduler in USUAL),
        *((Way(f"{FEW_STEPS}, guidance {cfg:g}", UNIFORM, style, cfg), 4) for cfg in LOWER),
        (Way(FEW_CALLS, UNIFORM, style, CFG), 2),
        *((Way(f"{FEW_CALLS}, guidance {cfg:g}", UNIFORM, style, cfg), 2) for cfg in LOWER),
        (Way("LCM Kit's sampler without an LCM-LoRA, 4 steps", ours(), style), 4),
        (Way(FAST, ours(), {**style, "lcm": 1.0}), 4),
    ]
    if style:  # the paper's strengths of a style and the LCM-LoRA
        weaker = {kind: 0.8 * strength for kind, strength in style.items()}
        rows.append((Way(f"{FAST}, style 0.8", ours(), {**weaker, "lcm": 1.0}), 4))
    for strength in BESIDE_STYLES if style else BESIDE_STYLES[:1]:
        rows.append((Way(f"{FAST}, LCM-LoRA {strength:g}", ours(), {**style, "lcm": strength}), 4))
    in_phases = Way(f"LCM-LoRA in {PHASES} phases, {PHASES} steps", phased(PHASES), {**style, "phased": 1.0})
    rows.append((in_phases, PHASES))
    if model.checkpoint == CHECKPOINT and "ink" in style:
        rows.append((Way(f"the style's own, {PHASES} steps", phased(PHASES), {**style, "ink_fast": 1.0}), PHASES))
    absent = {kind for kind in OPTIONAL if not LORAS[kind].exists()}
    return [(way, steps) for way, steps in rows if absent.isdisjoint(way.loras)]


class Jury:
    """Judges rows, and keeps what it found in the work folder until a file that they depend on changes."""

    def __init__(self) -> None:
        self._judges: dict[Path, Judge] = {}

    def judge(self, checkpoint: Path) -> Judge:
        if checkpoint not in self._judges:
            self._judges[checkpoint] = Judge(Studio(checkpoint), styles=STYLES)
        return self._judges[checkpoint]

    def row(self, model: Model, way: Way, steps: int, seeds: Sequence[int]) -> dict:
        """features (seeds, n, d), latents (seeds * n, 12, 8, 8), and seed by seed the shares of right names and of each style."""
        strengths = "-".join(f"{kind}{strength:g}" for kind, strength in way.loras.items())
        files = [model.checkpoint, *(LORAS[kind] for kind in way.loras)]
        each = []
        for seed in seeds:

            def drawn(studio: Studio, seed: int = seed) -> torch.Tensor:
                return studio.latents(way, steps, seed)

            name = f"{way.name}-{strengths}-{way.cfg:g}-{seed}"
            each.append(self._kept(files, name, model.checkpoint, drawn))
        return {
            "features": torch.stack([one["features"] for one in each]),
            "latents": torch.cat([one["latents"] for one in each]),
            "right": [one["right"] for one in each],
            "styles": {style: [one["styles"][style] for one in each] for style in STYLES},
        }

    def real(self, style: str) -> dict:
        """The same of real pictures that went through the autoencoder: what a perfect model could reach."""

        def encoded(studio: Studio) -> torch.Tensor:
            colour = torch.arange(len(NAMES)) % len(COLOUR_NAMES)
            pictures = draw(glyphs(style, WORK / "data"), colour, torch.Generator().manual_seed(23))
            return studio.vae.encode(pictures.movedim(1, -1))

        return self._kept([], f"real {style}", CHECKPOINT, encoded)

    def _kept(self, files: list[Path], name: str, checkpoint: Path, latents: Callable[[Studio], torch.Tensor]) -> dict:
        """What is found of one picture of every concept."""
        made_of = fingerprint(VAE, classifier.file_of(STYLES), *files)
        path = WORK / "universality" / f"{made_of}-{''.join(c if c.isalnum() else '_' for c in name)}.pt"
        if (state := load_state(path)) is None:
            judge = self.judge(checkpoint)
            with torch.inference_mode():
                made = latents(judge.studio)
            seen = judge.of([made])
            shares = {style: share for style, (share,) in seen.styles.items()}
            state = {"features": seen.features[0], "right": seen.right[0], "styles": shares, "latents": made}
            save_state(path, state)
        return state


def missing(models: Sequence[Model]) -> str:
    """What is not there yet and how to make it, or nothing."""
    needed = {classifier.file_of(STYLES), *(model.checkpoint for model in models)}
    needed |= {LORAS[kind] for model in models for kind in model.loras}
    absent = [f"  {path}: run {command}" for path, command in MADE_BY.items() if path in needed and not path.exists()]
    return "\n".join(["These files are not in the repository and have not been made yet:", *absent]) if absent else ""


def mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)


def left_out(values: Sequence[float]) -> list[float]:
    """The mean without each of them."""
    return [mean([*values[:k], *values[k + 1 :]]) for k in range(len(values))]


def paired(found: Sequence[float], base: Sequence[float], difference: float, digits: int) -> str:
    """A difference and its standard error. found, base: both sides with one seed left out, the same one."""
    error = jackknife_error([a - b for a, b in zip(found, base, strict=True)])
    return f"{difference:+.{digits}f} ± {error:.{digits}f}"


def table(jury: Jury, models: Sequence[Model], seeds: int, wanted: str = "") -> None:
    """wanted: an expression that rows' names match, beside the two that all are compared with."""
    rows = []
    for model in models:
        each = [row for row in ways(model) if row[0].name in (OWN, FAST) or re.search(wanted, row[0].name)]
        own, own_steps = each[0]
        reference = jury.row(model, own, own_steps, [REFERENCE_SEEDS + k for k in range(seeds)])["features"].flatten(
            0, 1
        )
        seen = {way.name: jury.row(model, way, steps, [SEEDS + k for k in range(seeds)]) for way, steps in each}
        distances = {name: frechet(row["features"].flatten(0, 1), reference) for name, row in seen.items()}
        without = (
            {name: without_each_seed(row["features"], reference) for name, row in seen.items()} if seeds > 1 else {}
        )
        for way, steps in each:
            row, base = seen[way.name], seen[FAST]
            cells = [
                f"{mean(row['right']):.1%}",
                f"{mean(row['styles'][model.style]):.1%}",
                f"{distances[way.name]:.1f}",
            ]
            if without and way.name != FAST:
                names = 100 * (mean(row["right"]) - mean(base["right"]))
                by_seed = [[100 * share for share in left_out(one["right"])] for one in (row, base)]
                cells.append(paired(*by_seed, names, 1))
                cells.append(paired(without[way.name], without[FAST], distances[way.name] - distances[FAST], 1))
            rows.append([model.name, way.name, way.calls(steps), *cells, *[""] * (5 - len(cells))])
            print(*rows[-1], sep=", ", file=sys.stderr, flush=True)
    columns = [
        "model", "pictures by", "model calls", "names the prompt", "style seen", "Frechet to its own pictures",
        "names less LCM-LoRA's", "Frechet less LCM-LoRA's",
    ]  # fmt: skip
    print(markdown(columns, rows), "\n")
    for style in STYLES:
        found = jury.real(style)
        print(
            f"Real {style} pictures through the autoencoder: named {found['right']:.1%}, style {found['styles'][style]:.1%}."
        )


def times(studio: Studio, pictures: int = 16, rounds: int = 3) -> None:
    """CPU time of a picture of the base, each way in turn, the least of some rounds."""
    compared = [run for run in ways(MODELS[0]) if run[0].name in (OWN, FEW_STEPS, FAST)]
    models = {way.name: studio.patched(**way.loras) for way, _ in compared}
    least = {way.name: float("inf") for way, _ in compared}
    decoder = float("inf")
    with torch.inference_mode():
        for _ in range(rounds):
            for way, steps in compared:
                model = models[way.name]
                studio.sampled(model, way, 1, SEEDS, first=1)  # the weights are patched once, not for each picture
                start = time.process_time()
                latents = studio.sampled(model, way, steps, SEEDS, first=pictures)
                least[way.name] = min(least[way.name], time.process_time() - start)
            start = time.process_time()
            studio.decoded(latents)
            decoder = min(decoder, time.process_time() - start)
    rows = []
    for way, steps in compared:
        own, this = least[OWN], least[way.name]
        cells = (
            this / pictures * 1e3,
            own / this,
            (this + decoder) / pictures * 1e3,
            (own + decoder) / (this + decoder),
        )
        rows.append([way.name, way.calls(steps), *(f"{cell:.1f}" for cell in cells)])
    columns = [
        "base, CPU time of a picture",
        "model calls",
        "sampling, ms",
        "own / this",
        "with decoder, ms",
        "own / this",
    ]
    print(f"\n{markdown(columns, rows)}")


def picture(jury: Jury, models: Sequence[Model], seeds: int, path: Path) -> None:
    """A row a model, a column a way, the same noise in all of them."""
    import sheet
    from torchvision.transforms.functional import to_pil_image

    titles = {
        OWN: "without LCM-LoRA: 25 steps, 50 calls", FEW_STEPS: "without: 4 steps, 8 calls",
        FEW_CALLS: "without: 2 steps, 4 calls", FAST: "with the LCM-LoRA: 4 steps, 4 calls",
    }  # fmt: skip
    shown = [NAMES.index(name) for name in SHOWN]
    rows = []
    for model in models:
        by_name = {way.name: (way, steps) for way, steps in ways(model)}
        cells = []
        for name in titles:
            latents = jury.row(model, *by_name[name], [SEEDS + k for k in range(seeds)])["latents"][shown]
            with torch.inference_mode():
                decoded = jury.judge(CHECKPOINT).studio.decoded(latents)
            cells.append(sheet.side_by_side([to_pil_image(one) for one in decoded]))
        label = model.name.replace(" + ", "\n+ ").replace(" on ", "\non ")
        first, last = model is models[0], model is models[-1]
        captions = [", ".join(SHOWN)] * len(titles) if last else ()
        rows.append(sheet.Row(cells, label, captions, above=[*titles.values()] if first else ()))
    sheet.draw(rows).save(path)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=5, help="pictures of every concept, for each row")
    parser.add_argument("--models", nargs="+", choices=list(BY_WORD), default=list(BY_WORD), help="which of them")
    parser.add_argument("--rows", default="", help="only rows whose name matches, and the two to compare")
    parser.add_argument("--no-picture", action="store_true", help="print the table alone")
    parser.add_argument("--picture", type=Path, default=ROOT / "docs" / "universality.png")
    args = parser.parse_args()
    models = [BY_WORD[word] for word in args.models]
    if text := missing(models):
        sys.exit(text)
    for kind in OPTIONAL:
        if not LORAS[kind].exists():
            print(
                f"Its rows are left out: {LORAS[kind]}; made by python demo/train/lcm.py --kind {kind}", file=sys.stderr
            )
    torch.set_grad_enabled(False)
    jury = Jury()
    table(jury, models, args.seeds, args.rows)
    if not args.no_picture:
        times(jury.judge(CHECKPOINT).studio)
        picture(jury, models, args.seeds, args.picture)


if __name__ == "__main__":
    main()
