"""What the judge says of pictures drawn in one way: names, styles and features, seed by seed."""

import hashlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import classifier
import torch
from data import NAMES
from studio import Studio, Way


@dataclass(frozen=True)
class Verdict:
    """Of one picture of every concept and seed; n concepts, d features."""

    features: torch.Tensor  # (seeds, n, d)
    right: list[float]  # a seed: share of pictures whose prompted concept was named
    styles: dict[str, list[float]]  # style -> a seed: share of pictures seen as that style

    @property
    def inked(self) -> list[float]:
        return self.styles["ink"]


class Judge:
    """The classifier of these styles. remember: latents seen before are not decoded again, which would spoil a timing."""

    def __init__(self, studio: Studio, remember: bool = False, styles: Sequence[str] = classifier.STYLES) -> None:
        self.studio = studio
        self.net = classifier.load(styles)
        self.remember = remember
        self.seen: dict[str, tuple[torch.Tensor, float, list[float]]] = {}

    @torch.inference_mode()  # as ComfyUI runs its graphs; without it the autoencoder keeps all it computes
    def verdict(self, way: Way, steps: int, seeds: list[int]) -> Verdict:
        """Draws every concept with every seed, and judges."""
        return self.of(self.studio.latents(way, steps, seed) for seed in seeds)

    @torch.inference_mode()
    def of(self, latents: Iterable[torch.Tensor]) -> Verdict:
        """Judges latents (n, 12, 8, 8), one of every concept, for each seed."""
        features, right, styles = zip(*[self._of(each) for each in latents], strict=True)
        by_style = {name: [shares[k] for shares in styles] for k, name in enumerate(self.net.styles)}
        return Verdict(torch.stack(features), list(right), by_style)

    def _of(self, latents: torch.Tensor) -> tuple[torch.Tensor, float, list[float]]:
        key = hashlib.sha256(latents.numpy().tobytes()).hexdigest()
        if key in self.seen:
            return self.seen[key]
        features = self.net.features(self.studio.decoded(latents))
        right = self.net.concept(features).argmax(1) == torch.arange(len(NAMES))
        style = self.net.style(features).argmax(1)
        shares = [(style == k).float().mean().item() for k in range(len(self.net.styles))]
        found = features, right.float().mean().item(), shares
        if self.remember:
            self.seen[key] = found
        return found
