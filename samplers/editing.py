"""Editing a picture by two prompts without inverting it: the loop of DDCM, two predictions a step."""

import math
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor
from tqdm.auto import trange as tqdm_trange  # type: ignore[import-untyped, unused-ignore]

from .noise import level_numbers
from .renoise import NoiseScaling, signal_and_noise, variance_exploding

Denoiser = Callable[[Tensor, Tensor], Tensor]
"""(x, sigma (batch,)) -> the denoised x0 in the shape of x, for one prompt."""


@torch.no_grad()
def edit_ddcm(
    source: Denoiser,
    target: Denoiser,
    latent: Tensor,
    sigmas: Tensor,
    *,
    noise: Callable[[int, Tensor], Tensor],
    keep: float = 0.0,
    callback: Callable[[dict[str, Any]], object] | None = None,
    disable: bool | None = None,
    table: Tensor | None = None,
    noise_scaling: NoiseScaling = variance_exploding,
    trange: Callable[..., Iterable[int]] = tqdm_trange,
) -> Tensor:
    """The latent, changed from what the source prompt says to what the target prompt says; shape, dtype as given.

    Implements the denoising diffusion consistent model with virtual inversion of Xu et al. 2024 (InfEdit, arXiv
    2312.04965), without its attention control. Since the picture z0 is known, no
    inversion has to find a noise for it. In each step z0 and the edited latent y get the same fresh noise e,

        z = a * z0 + b * e        x = a * y + b * e        (a, b) = (1, sigma) in the variance-exploding process

    and what the model gets wrong about the first is taken off the second. The paper writes this in the noise: eps_x +
    (e - eps_z) is used in place of eps_x. With D = (x - b * eps) / a the noise levels cancel, and it is

        y = z0 + D(x; target) - D(z; source)

    for any prediction type and any linear forward process. Equal prompts therefore return z0 to the bit.
    Departures: the paper's first latent is drawn, which leaves e a little off unit variance; here e is. LCM's boundary
    scalings are left out, as in its published code: their share is below 7e-6 on the usual schedules. In place of the paper's
    attention control, `keep` can undo small changes.

    source, target: the model under each prompt; called once a step, source first. In the first step both get the same
    tensor values. Guidance, if any, is theirs.
    latent: (batch, channels, ...), the picture z0; any number of dimensions.
    sigmas: (steps + 1,) noise levels, all but the last above 0, the last one 0. The first sets how much may change.
    noise: noise(level, like) gives standard normal noise like `like` for a step's level, called by its number
    (noise.level_numbers, noise.StepNoise).
    keep: [0, 0.5], size of a change below which a position keeps the picture, see changed_share. 0: the paper's own.
    callback: called after each model call with a dict: x (what the model saw), i (call, 0 to 2 * steps - 1), sigma,
    sigma_hat, denoised (the edited latent so far: z0 until the target's first call). The tensors are never changed.
    disable: progress bar off (True), on (False), or on in a terminal only (None), as in tqdm.
    table: ascending sigmas of all training timesteps, by which levels are numbered if it is given.
    noise_scaling: forward process of the model, for flow models; see renoise.NoiseScaling.
    trange: makes the progress bar, trange(calls, disable=disable).

    Works in float32 or the wider dtype of the latent; the models and the callback get tensors in its dtype, but sigma
    in float32. Raises ValueError before the first model call if an argument breaks these rules.
    """
    sigmas = sigmas.to(torch.float32)
    _check_levels(sigmas)
    if not 0.0 <= keep <= 0.5:  # also catches NaN
        raise ValueError(f"keep is {keep}; it must be from 0 (every change is made) to 0.5 (only the largest are).")
    scales, numbers = signal_and_noise(sigmas.cpu(), noise_scaling), level_numbers(sigmas, table)
    sigmas = sigmas.to(latent.device)
    levels, per_image = sigmas.unbind(), sigmas[:, None].expand(-1, latent.shape[0]).contiguous().unbind()

    wide = torch.promote_types(latent.dtype, torch.float32)
    picture = latent.to(wide)
    edited, of_source, fresh = picture, picture, picture
    size = picture.new_zeros(())
    for call in trange(2 * (len(levels) - 1), disable=disable):
        step, is_target = divmod(call, 2)
        signal, spread = scales[step]
        if is_target:
            x = (signal * edited + spread * fresh).to(latent.dtype)
            # The difference first: it is exactly 0 for equal predictions.
            change = target(x, per_image[step]).to(wide) - of_source
            if keep > 0:
                size = size + change.square().mean(dim=1, keepdim=True).sqrt()
                change = change * changed_share(size, keep)
            edited = picture + change
        else:
            fresh = noise(numbers[step], picture)
            x = (signal * picture + spread * fresh).to(latent.dtype)
            of_source = source(x, per_image[step]).to(wide)
        if callback is not None:
            level = levels[step]
            callback({"x": x, "i": call, "sigma": level, "sigma_hat": level, "denoised": edited.to(latent.dtype)})
    return edited.to(latent.dtype, copy=edited is picture)


def changed_share(size: Tensor, keep: float) -> Tensor:
    """How much of its change each position makes: in [0, 1], in the shape of size.

    size: (batch, 1, ...), how far the two predictions differ there, summed over the steps so far, not negative.
    keep: (0, 0.5], in shares of the largest size in the same image. Up to keep nothing is changed, from 2 * keep all,
    and linearly between. Sums over steps, because one step's difference is noisy; images do not look at each other.
    """
    largest = size.flatten(1).amax(dim=1).reshape(-1, *[1] * (size.ndim - 1))
    # Where nothing differs anywhere the share means nothing; it must not be 0 / 0.
    return (size / largest.clamp_min(torch.finfo(size.dtype).tiny) / keep - 1.0).clamp(0.0, 1.0)


def _check_levels(sigmas: Tensor) -> None:
    if sigmas.ndim != 1 or len(sigmas) == 0:
        raise ValueError(f"sigmas has shape {tuple(sigmas.shape)}; it must be (steps + 1,).")
    levels = sigmas.tolist()
    if not all(math.isfinite(level) and level > 0 for level in levels[:-1]) or levels[-1] != 0:
        raise ValueError(
            f"sigmas are {levels}; all must be finite and above 0 and the last one 0: an edit ends in a picture, not "
            "in a noisy latent for a next sampler."
        )
