"""Edits by prompt on the embedded model: LCM Edit against image to image, by what changed and by what stayed.

    COMFYUI_PATH=.comfyui .venv/bin/python benchmarks/editing.py

Real emoji pictures on a coloured background, and two edits of each: another thing of the same group on the same
background, and another background behind the same thing. Prints a Markdown table, as kept in benchmarks/RESULTS.md, and
writes docs/editing.png, which shows the first six pictures of a shuffled list, not chosen ones. Needs the pictures and
the judge of the demo's training (demo/train/classifier.py). About ten minutes of one CPU core.
"""

import argparse
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from setting import ROOT, markdown

import classifier
import torch
import torch.nn.functional as F
from common import WORK
from data import COLOUR_NAMES, COLOURS, CONCEPTS, NAMES, draw, glyphs
from studio import Studio

KINDS = ("object", "background")
DEFAULTS = {"steps": 4, "denoise": 1.0, "keep": 0.2}
EDITS = [
    *[DEFAULTS | {"keep": 0.0, "steps": steps, "denoise": denoise} for steps in (4, 8, 12) for denoise in (0.6, 0.8, 1.0)],
    *[DEFAULTS | {"steps": steps} for steps in (1, 2, 4, 8, 12)],
    *[DEFAULTS | {"denoise": denoise} for denoise in (0.6, 0.8)],
    *[DEFAULTS | {"keep": keep} for keep in (0.1, 0.3, 0.4)],
    *[DEFAULTS | {"cfg": cfg} for cfg in (1.5, 2.0)],
]  # fmt: skip
REDRAWN = [
    *[{"steps": 4, "denoise": denoise} for denoise in (0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0)],
    *[{"steps": 8, "denoise": denoise} for denoise in (0.3, 0.4, 0.5, 0.6, 0.8, 1.0)],
]
COLUMNS = (
    "way", "steps", "model calls", "denoise", "keep", "cfg", "new object shown", "background kept, dB",
    "new background shown", "object kept, dB",
)  # fmt: skip


@dataclass(frozen=True)
class Scene:
    """n real pictures, two edits of each, and where they must stay as they are."""

    pictures: torch.Tensor  # (n, 3, 64, 64) in 0..1
    background: torch.Tensor  # (n, 1, 64, 64) 1 at least 4 pixels away from the thing, else 0
    kept: dict[str, torch.Tensor]  # kind of edit -> (n, 1, 64, 64), 1 where nothing should change
    captions: dict[str, list[str]]  # "source" or kind of edit -> n prompts
    concept: dict[str, torch.Tensor]  # likewise -> (n,) indices into NAMES
    colour: dict[str, torch.Tensor]  # likewise -> (n,) indices into COLOUR_NAMES


def make_scene(count: int) -> Scene:
    generator = torch.Generator().manual_seed(0)

    def another(concept: int) -> int:
        group = CONCEPTS[NAMES[concept]][1]
        others = [k for k, name in enumerate(NAMES) if CONCEPTS[name][1] == group and k != concept]
        return others[int(torch.randint(len(others), (1,), generator=generator))]

    source = torch.randperm(len(NAMES), generator=generator)[:count]
    other = torch.tensor([another(int(concept)) for concept in source])
    colour = torch.randint(len(COLOUR_NAMES), (count,), generator=generator)
    step = 1 + torch.randint(len(COLOUR_NAMES) - 1, (count,), generator=generator)
    concept = {"source": source, "object": other, "background": source}
    colours = {"source": colour, "object": colour, "background": (colour + step) % len(COLOUR_NAMES)}

    glyph = glyphs("noto", WORK / "data")[source]
    alpha = glyph[:, 3:]
    # The same poses and colours three times: the thing, all white, all black. White less black is how much it covers.
    pictures, white, black = (
        draw(torch.cat([rgb.expand(-1, 3, -1, -1), alpha], 1), colour, torch.Generator().manual_seed(7))
        for rgb in (glyph[:, :3], alpha, torch.zeros_like(alpha))
    )
    cover = (white - black).mean(1, keepdim=True)
    background = (F.max_pool2d(cover, 9, 1, 4) < 0.02).float()
    inside = (-F.max_pool2d(-cover, 5, 1, 2) > 0.98).float()
    return Scene(
        pictures,
        background,
        {"object": background, "background": inside},
        {k: [f"{NAMES[a]} {COLOUR_NAMES[b]} background" for a, b in zip(concept[k], colours[k], strict=True)] for k in concept},
        concept,
        colours,
    )  # fmt: skip


def psnr(pictures: torch.Tensor, truth: torch.Tensor, where: torch.Tensor) -> float:
    """Mean over pictures of the peak signal-to-noise ratio in dB, there; without pictures of less than 30 such pixels."""
    counts = where.sum((1, 2, 3))
    errors = ((pictures - truth).square() * where).sum((1, 2, 3)) / (3 * counts)
    return (-10 * errors[counts >= 30].clamp_min(1e-6).log10()).mean().item()


class Jury:
    """Says of edited pictures how many show the target prompt, and how well the rest was kept."""

    def __init__(self, scene: Scene) -> None:
        self.scene, self.net = scene, classifier.load()
        self.palette = torch.tensor(list(COLOURS.values())) / 255

    def __call__(self, pictures: torch.Tensor, kind: str) -> tuple[float, float]:
        """(share of pictures whose thing, and for new backgrounds whose colour too, is the target's; dB of the rest)"""
        scene = self.scene
        right = self.net(pictures)[0].argmax(1) == scene.concept[kind]
        if kind == "background":
            mean = (pictures * scene.background).sum((2, 3)) / scene.background.sum((2, 3)).clamp_min(1)
            right &= (mean[:, None] - self.palette).square().sum(2).argmin(1) == scene.colour[kind]
        return right.float().mean().item(), psnr(pictures, scene.pictures, scene.kept[kind])


class Editor:
    """The two ways through the functions that the nodes call."""

    def __init__(self, studio: Studio, scene: Scene) -> None:
        self.studio, self.model = studio, studio.patched(lcm=1.0)
        self.latents = studio.vae.encode(scene.pictures.movedim(1, -1))
        self.conds = {
            kind: [[torch.cat([studio.encode(text)[0][0] for text in texts]), {}]]
            for kind, texts in scene.captions.items()
        }

    def edited(self, kind: str, seed: int = 0, **settings) -> torch.Tensor:
        from lcm_kit.host.sampling.editing import edit

        return self.studio.decoded(
            edit(
                self.model, self.conds["source"], self.conds[kind], {"samples": self.latents}, seed=seed,
                **{"cfg": 1.0, "original_steps": 50} | settings,
            )["samples"]
        )  # fmt: skip

    def redrawn(self, kind: str, seed: int = 0, **settings) -> torch.Tensor:
        from lcm_kit.host.sampling.sampling import sample

        return self.studio.decoded(
            sample(
                self.model, self.conds[kind], None, {"samples": self.latents}, seed=seed,
                cfg=1.0, gamma=1.0, cfg_steps=-1, original_steps=50, **settings,
            )["samples"]
        )  # fmt: skip


def measure(make: Callable[..., torch.Tensor], jury: Jury, **settings) -> dict[str, tuple[float, float]]:
    return {kind: jury(make(kind, **settings), kind) for kind in KINDS}


def rows(editor: Editor, jury: Jury) -> Iterator[tuple[str, dict, dict]]:
    """(way, settings, kind -> (score, dB))"""
    for settings in EDITS:
        yield "LCM Edit", settings, measure(editor.edited, jury, **settings)
    for settings in REDRAWN:
        yield "image to image", settings, measure(editor.redrawn, jury, **settings)


def table_row(way: str, settings: dict, found: dict[str, tuple[float, float]]) -> list[object]:
    calls = settings["steps"] * (1 if way != "LCM Edit" else 3 if settings.get("cfg", 1) != 1 else 2)
    shown = [settings["steps"], calls, settings["denoise"], settings.get("keep", ""), settings.get("cfg", 1.0)]
    return [way, *shown, *(text for score, decibel in found.values() for text in (f"{score:.0%}", f"{decibel:.1f}"))]


def equal_score(found: list[tuple[str, dict, dict]], kind: str, steps: int) -> dict:
    """Settings of image to image at the lowest denoise that shows the target as often as LCM Edit's defaults do."""
    (wanted,) = {results[kind][0] for way, settings, results in found if way == "LCM Edit" and settings == DEFAULTS}
    redrawn = [(s, r[kind][0]) for way, s, r in found if way == "image to image" and s["steps"] == steps]
    enough = [settings for settings, score in redrawn if score >= wanted]
    return enough[0] if enough else max(redrawn, key=lambda pair: pair[1])[0]


def figure(editor: Editor, scene: Scene, plain: dict[str, dict], each: int) -> None:
    """docs/editing.png: source, our edit, image to image; `each` pictures of both kinds.

    plain: kind of edit -> settings of image to image.
    """
    import sheet
    from torchvision.transforms.functional import to_pil_image

    def images(pictures: torch.Tensor) -> list:
        return [sheet.enlarge(to_pil_image(picture), 2) for picture in pictures[:each]]

    def words(kind: str) -> list[str]:
        return [text.replace(" background", "") for text in scene.captions[kind][:each]]

    denoise = ", ".join(f"{plain[kind]['denoise']:g}" for kind in KINDS)
    lines = {
        "source": [scene.pictures, scene.pictures],
        "LCM Edit\n4 steps": [editor.edited(kind, **DEFAULTS) for kind in KINDS],
        f"image to image\n4 steps, denoise\n{denoise}": [editor.redrawn(kind, **plain[kind]) for kind in KINDS],
    }
    captions = [words("source") * 2, words("object") + words("background"), [""] * 2 * each]
    drawn = [
        sheet.Row([image for part in parts for image in images(part)], label, caption)
        for (label, parts), caption in zip(lines.items(), captions, strict=True)
    ]
    sheet.draw(
        drawn, "Left: another thing on the same background. Right: another background behind the same thing."
    ).save(ROOT / "docs" / "editing.png", optimize=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pictures", type=int, default=48)
    parser.add_argument(
        "--denoise", type=float, nargs=2, metavar=KINDS,
        help="draw the picture with image to image at these, and measure nothing: needs no judge",
    )  # fmt: skip
    args = parser.parse_args()
    torch.set_grad_enabled(False)

    studio = Studio()
    scene = make_scene(args.pictures)
    editor = Editor(studio, scene)
    if args.denoise:
        steps = DEFAULTS["steps"]
        plain = {kind: {"steps": steps, "denoise": one} for kind, one in zip(KINDS, args.denoise, strict=True)}
        figure(editor, scene, plain, 6)
        return
    jury = Jury(scene)
    ceiling = studio.decoded(editor.latents)
    print(f"{args.pictures} pictures, two edits of each. Kept, in dB, of the autoencoder alone: "
          + ", ".join(f"{psnr(ceiling, scene.pictures, scene.kept[kind]):.1f} ({kind} edits)" for kind in KINDS) + ".\n")  # fmt: skip
    found = list(rows(editor, jury))
    print(markdown(COLUMNS, [table_row(*row) for row in found]))
    figure(editor, scene, {kind: equal_score(found, kind, DEFAULTS["steps"]) for kind in KINDS}, 6)


if __name__ == "__main__":
    main()
