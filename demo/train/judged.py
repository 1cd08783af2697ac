"""What the judge says of pictures drawn in one way: names, styles and features, seed by seed."""

import hashlib
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
    inked: list[float]  # a seed: share of pictures seen as ink


class Judge:
    """The classifier. remember: the same latents are not decoded and judged twice, which would spoil a timing."""

    def __init__(self, studio: Studio, remember: bool = False) -> None:
        self.studio = studio
        self.net = classifier.load()
        self.remember = remember
        self.seen: dict[str, tuple[torch.Tensor, float, float]] = {}

    @torch.inference_mode()  # as ComfyUI runs its graphs; without it the autoencoder keeps all it computes
    def verdict(self, way: Way, steps: int, seeds: list[int]) -> Verdict:
        """Draws every concept with every seed, and judges."""
        judged = [self._of(self.studio.latents(way, steps, seed)) for seed in seeds]
        features, right, inked = zip(*judged, strict=True)
        return Verdict(torch.stack(features), list(right), list(inked))

    def _of(self, latents: torch.Tensor) -> tuple[torch.Tensor, float, float]:
        key = hashlib.sha256(latents.numpy().tobytes()).hexdigest()
        if key in self.seen:
            return self.seen[key]
        features = self.net.features(self.studio.decoded(latents))
        right = self.net.concept(features).argmax(1) == torch.arange(len(NAMES))
        inked = self.net.style(features).argmax(1) == classifier.STYLES.index("ink")
        found = features, right.float().mean().item(), inked.float().mean().item()
        if self.remember:
            self.seen[key] = found
        return found
