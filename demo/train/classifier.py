"""Train the judge: a small network that names the concept and the style of a picture. It sees real pictures only.

    python demo/train/classifier.py --minutes 6
    python demo/train/classifier.py --minutes 12 --styles noto ink twemoji fluent

Its features are also the space of the Frechet distance. Judges of other styles are other networks, in files of their own:
what one of them says cannot be compared with what another says. Kept in the work folder, not shipped.
"""

import argparse
import time
from collections.abc import Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
from common import WORK, load_state, save_state
from data import COLOUR_NAMES, NAMES, PACKAGES, draw, glyphs
from torch import nn
from tqdm import tqdm

STYLES = ("noto", "ink")  # of the demo's own models, and of the judge that knows no others
PATH = WORK / "classifier.pt"


class Classifier(nn.Module):
    """Pictures (b, 3, 64, 64) in 0..1 -> features (b, 384); `concept` and `style` read classes off them.

    styles: names of the styles it tells apart, kinds of `glyphs`.
    """

    def __init__(self, styles: Sequence[str] = STYLES) -> None:
        super().__init__()
        self.styles = tuple(styles)
        layers: list[nn.Module] = []
        for into, out in ((3, 32), (32, 64), (64, 128), (128, 192)):
            layers += [nn.Conv2d(into, out, 3, stride=2, padding=1), nn.GroupNorm(8, out), nn.SiLU()]
            if into > 3:
                layers += [nn.Conv2d(out, out, 3, padding=1), nn.GroupNorm(8, out), nn.SiLU()]
        self.body = nn.Sequential(*layers)
        self.concept = nn.Linear(192 * 2, len(NAMES))
        self.style = nn.Linear(192 * 2, len(self.styles))

    def features(self, x: torch.Tensor) -> torch.Tensor:
        """(b, 384): mean and maximum over positions."""
        y = self.body(x * 2 - 1)
        return torch.cat([y.mean((2, 3)), y.amax((2, 3))], dim=1)

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        y = self.features(x)
        return self.concept(y), self.style(y)


def batch(sets: torch.Tensor, size: int, generator: torch.Generator):
    """(pictures, concept, style): real pictures of all sets (styles, n, 4, h, w), a third of them a little blurred."""
    concept = torch.randint(len(NAMES), (size,), generator=generator)
    style = torch.randint(len(sets), (size,), generator=generator)
    x = draw(sets[style, concept], torch.randint(len(COLOUR_NAMES), (size,), generator=generator), generator)
    blurred = F.interpolate(F.avg_pool2d(x, 2), scale_factor=2, mode="bilinear")
    blur = (torch.rand(size, generator=generator) < 0.33)[:, None, None, None]
    return torch.where(blur, blurred, x), concept, style


def file_of(styles: Sequence[str]) -> Path:
    """Where the judge of these styles is kept."""
    return PATH if tuple(styles) == STYLES else WORK / f"classifier_{'_'.join(styles)}.pt"


def load(styles: Sequence[str] = STYLES) -> Classifier:
    """The trained judge of these styles. Raises FileNotFoundError before it is trained."""
    path = file_of(styles)
    state = load_state(path)
    if state is None:
        option = "" if path == PATH else f" --styles {' '.join(styles)}"
        raise FileNotFoundError(f"{path} is missing; run python demo/train/classifier.py{option} first.")
    net = Classifier(styles).eval().requires_grad_(False)
    net.load_state_dict(state["model"])
    return net


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=6)
    parser.add_argument("--batch", type=int, default=96)
    parser.add_argument(
        "--styles", nargs="+", choices=list(PACKAGES), default=STYLES, help="what it learns to tell apart"
    )
    args = parser.parse_args()

    sets = torch.stack([glyphs(kind, WORK / "data") for kind in args.styles])
    torch.manual_seed(0)
    net = Classifier(args.styles).to(memory_format=torch.channels_last)
    optimizer = torch.optim.AdamW(net.parameters(), lr=2e-3, weight_decay=0.02)
    generator = torch.Generator().manual_seed(0)
    start, seconds, step = time.thread_time(), args.minutes * 60, 0  # of computing, not of waiting
    with tqdm(total=round(seconds), unit="s", mininterval=5) as bar:
        while (elapsed := time.thread_time() - start) < seconds:
            for group in optimizer.param_groups:
                group["lr"] = 2e-3 * min(1.0, (step + 1) / 30, max((1 - elapsed / seconds) / 0.6, 0.01))
            x, concept, style = batch(sets, args.batch, generator)
            with torch.autocast("cpu", dtype=torch.bfloat16):
                by_concept, by_style = net(x.contiguous(memory_format=torch.channels_last))
            loss = F.cross_entropy(by_concept.float(), concept) + F.cross_entropy(by_style.float(), style)
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            optimizer.step()
            step += 1
            bar.n = round(elapsed)
            bar.set_postfix(step=step, loss=f"{loss.item():.3f}")
    net.eval()
    x, concept, style = batch(sets, 1030, torch.Generator().manual_seed(99))
    with torch.no_grad():
        by_concept, by_style = net(x)
    held_out = (
        (by_concept.argmax(1) == concept).float().mean().item(),
        (by_style.argmax(1) == style).float().mean().item(),
    )
    print(f"unseen poses of real pictures: concept {held_out[0]:.1%}, style {held_out[1]:.1%} right")
    save_state(
        file_of(args.styles),
        {"model": net.state_dict(), "concept_accuracy": held_out[0], "style_accuracy": held_out[1]},
    )


if __name__ == "__main__":
    main()
