"""Noise for the steps of a stochastic sampler that depends on seed, batch index and noise level, and on nothing else."""

from collections.abc import Sequence
from functools import lru_cache

import torch
from torch import Tensor

_MASK = (1 << 64) - 1
# Keeps this stream apart from other uses of the same seed. ASCII "LCM step".
_STREAM = 0x4C434D2073746570
# Relative distance below which a level is a table's entry: some float32 rounding, and less than any two entries differ.
_SAME_LEVEL = 1e-5


def level_numbers(sigmas: Tensor, table: Tensor | None = None) -> list[int]:
    """What tells the noise of one level from that of another: (n,) integers for (n,) sigmas, from 0 to 2^31.

    table: ascending sigmas of all T training timesteps. A level that is its entry t, but for rounding, has the number
    (t + 1) / T in millionths, so equal times of tables of different lengths are the same level. Any other level, and
    every one without a table, has the bits of its float32 sigma.

    A number belongs to the level alone, not to its place in a run: whoever stops at a level and goes on from it meets
    the numbers of the undivided run, and no two levels of a run share theirs. Level 0 has no noise; its number is 0.
    """
    levels = sigmas.detach().cpu().float().contiguous()
    numbers: list[int] = levels.view(torch.int32).tolist()
    if table is None or not len(levels):
        return numbers
    entries = table.detach().cpu().float().contiguous()
    above = torch.searchsorted(entries, levels).clamp_max(len(entries) - 1)
    candidates = torch.stack([(above - 1).clamp_min(0), above])
    distances = (entries[candidates] - levels).abs()
    nearest = distances.argmin(dim=0)
    on_table = (distances.amin(dim=0) <= _SAME_LEVEL * levels).tolist()
    indices = candidates.gather(0, nearest[None])[0].tolist()
    return [
        round((index + 1) / len(entries) * 1e6) if found and number else number
        for number, index, found in zip(numbers, indices, on_table, strict=True)
    ]


class StepNoise:
    """Standard normal noise per (seed, batch index, level). Call it as noise(level, like), level from level_numbers.

    seed: any integer, taken modulo 2^64.
    batch_indices: for each image of the batch, its index in the batch it came from (ComfyUI's "batch_index");
    None means 0, 1, 2, ...

    Each image draws from a generator of its own, on the CPU, in float32. Hence an image has bit-identical noise
    alone, in any batch, on any device and however often it is asked for; torch's global generator is not touched.
    The noise is not that of torch.manual_seed(seed), which hosts use for the initial latent: re-noising a latent with
    the noise it began with would bring back the very pattern the model has just removed.

    Torch seeds its CPU generator with 32 bits, so two streams agree by chance with probability 2^-32.
    """

    hands_over = True
    """Each call returns a new tensor that the caller may overwrite."""

    def __init__(self, seed: int, batch_indices: Sequence[int] | None = None) -> None:
        self.seed = seed
        self.batch_indices = None if batch_indices is None else tuple(batch_indices)
        # Seeded anew for every image, so it remembers nothing; making one each time would cost as much as seeding it.
        self._generator = torch.Generator()

    def __call__(self, level: int, like: Tensor) -> Tensor:
        """Noise of the level with this number: shape, dtype and device of `like`.

        like: (batch, ...), any number of further dimensions.
        Raises ValueError if the batch is not as long as batch_indices.
        """
        indices = range(like.shape[0]) if self.batch_indices is None else self.batch_indices
        if len(indices) != like.shape[0]:
            raise ValueError(
                f"the latent holds {like.shape[0]} images but batch_indices has {len(indices)} entries "
                f"{list(indices)}; give one index per image, or none to count from 0."
            )
        # Asked first, and made of it: for a small latent a conversion to what it is already costs more than the question,
        # and so does naming dtype and device to torch.
        alike = like.dtype == torch.float32 and like.device.type == "cpu"
        noise = like.new_empty(like.shape) if alike else torch.empty(like.shape, dtype=torch.float32, device="cpu")
        images = noise.unbind() if len(indices) > 1 else (noise,)
        for image, index in zip(images, indices, strict=False):  # an empty batch has no first image
            image.normal_(generator=self._generator.manual_seed(stream_seed(self.seed, index, level)))
        return noise if alike else noise.to(device=like.device, dtype=like.dtype)


def stream_seed(seed: int, batch_index: int, level: int) -> int:
    """64-bit seed of the noise stream of one image at one level; integers are taken modulo 2^64.

    With two of the three fixed it is a bijection of the third. A plain sum would not do: image 1 of seed 42 would be
    image 0 of seed 43.
    """
    return _splitmix64(_image_stream(seed, batch_index) ^ (level & _MASK))


@lru_cache(maxsize=1024)
def _image_stream(seed: int, batch_index: int) -> int:
    """What all levels of an image have in common, kept for the next one."""
    return _splitmix64(_splitmix64(_STREAM ^ (seed & _MASK)) ^ (batch_index & _MASK))


def _splitmix64(state: int) -> int:
    """Output of the SplitMix64 generator for a 64-bit state (Steele, Lea, Flood 2014, OOPSLA): a bijective mix."""
    z = (state + 0x9E3779B97F4A7C15) & _MASK
    z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & _MASK
    z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & _MASK
    return z ^ (z >> 31)
