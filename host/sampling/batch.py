"""Which image of a batch each image is, for samplers: ComfyUI hands them no batch index, but the noise made by it."""

from functools import lru_cache

import torch

HEAD = 16
"""Numbers of an image that it is known by: another image has them with a probability of 1e-30."""
SEARCHED_IMAGES, SEARCHED_NUMBERS = 1024, 2**24
"""Of a seed, before noise is taken to come from elsewhere; a tenth of a second at most."""


def indices_by_noise(noise: torch.Tensor | None, latent: torch.Tensor, seed: int | None) -> list[int]:
    """(b,) the batch indices whose initial noise core draws with this seed; where that is no answer, 0, 1, 2, ...

    noise: (b, ...) the initial noise, in whatever precision it once was; zeros where the latent comes with its noise;
    None if it is not known.   latent: (b, ...) before noise was added.   seed: of the noise, None if not known.

    Images of equal noise (or without it, of equal latents) have equal indices. Noise that is not core's has no index:
    neither that of another source, nor that of images of a batch whose size is no multiple of 16, which core draws
    differently together and alone.
    """
    if noise is None or not noise.numel():
        return list(range(len(latent)))
    heads = _heads(noise)
    if not heads.any() and not noise.any():
        heads = _heads(latent)
    elif seed is not None and (found := _found(heads, seed, noise[0].numel())):
        return found
    return [next(i for i, other in enumerate(heads) if torch.equal(head, other)) for head in heads]


def _heads(images: torch.Tensor) -> torch.Tensor:
    return images.flatten(1)[:, :HEAD].float().cpu()


def _found(heads: torch.Tensor, seed: int, size: int) -> list[int] | None:
    """The index of each image, or None unless all are found."""
    drawn, indices = _drawn(seed, size), [-1] * len(heads)
    for index in range(max(len(heads), min(SEARCHED_IMAGES, SEARCHED_NUMBERS // max(size, 1)))):
        # As wide as bfloat16 rounds.
        alike = torch.isclose(heads, drawn.head(index), rtol=2.0**-7, atol=1e-3).all(dim=1).tolist()
        indices = [index if match else before for match, before in zip(alike, indices, strict=True)]
        if -1 not in indices:
            return indices
    return None


class _Drawn:
    """The first numbers of each image that core draws with a seed, as far as they were asked for."""

    def __init__(self, seed: int, size: int) -> None:
        self.generator, self.size = torch.Generator().manual_seed(seed), size
        self.heads: list[torch.Tensor] = []

    def head(self, index: int) -> torch.Tensor:
        while len(self.heads) <= index:
            if self.heads:  # on to the next image
                torch.randn(self.size, generator=self.generator)
            state = self.generator.get_state()
            # From 32 on the first 16 are those of any longer draw: torch makes them in blocks of 16, the last one apart.
            self.heads.append(torch.randn(min(self.size, 2 * HEAD), generator=self.generator)[:HEAD])
            self.generator.set_state(state)
        return self.heads[index]


@lru_cache(maxsize=8)
def _drawn(seed: int, size: int) -> _Drawn:
    """Kept for the other stages and the next run of a seed."""
    return _Drawn(seed, size)
