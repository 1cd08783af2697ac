"""Normalised attention guidance (NAG): a negative prompt inside cross-attention, at one model call a step."""

import math

import torch
from torch import Tensor


def normalized_attention_guidance(
    z_positive: Tensor, z_negative: Tensor, *, scale: float, tau: float, alpha: float
) -> Tensor:
    """Cross-attention output that leads away from a negative prompt: (..., channels), dtype and device of z_positive.

    Chen et al. 2025, Normalized Attention Guidance (arXiv 2505.21179), as in the authors' published code:
        z_guided = scale * z_positive - (scale - 1) * z_negative            extrapolate
        z_guided = z_guided * min(1, tau * |z_positive| / |z_guided|)       limit, |.| the L1 norm of a token
        result   = alpha * z_guided + (1 - alpha) * z_positive              blend

    z_positive, z_negative: (..., channels), attention of the same queries to the positive and the negative prompt,
    heads side by side, before the output projection. Shapes that broadcast to z_positive's are taken.
    scale: 1 or more. 1 is off, exactly. It counts as CFG does; some accounts write z_positive + phi * (z_positive -
    z_negative), where phi = scale - 1.
    tau: 1 or more, how many times longer than its z_positive a token may get. Below 1 would weaken the prompt itself.
    alpha: [0, 1]. 0 is off, exactly; 1 returns the extrapolation.

    Works in float32 or the wider dtype of z_positive. Where z_negative equals z_positive so does the result, exactly.
    A token of zeros stays zeros.
    Raises ValueError if scale, tau or alpha are outside their range.
    """
    check_attention_guidance(scale=scale, tau=tau, alpha=alpha)
    if scale == 1.0 or alpha == 0.0:
        return z_positive
    wide = torch.promote_types(z_positive.dtype, torch.float32)
    positive, negative = z_positive.to(wide), z_negative.to(wide)
    # lerp(a, b, w) is b - (b - a) * (1 - w) for w >= 0.5: with a == b it is b to the bit, which w * b - (w - 1) * a
    # is not.
    guided = torch.lerp(negative, positive, scale)
    limit = tau * positive.abs().sum(dim=-1, keepdim=True)
    length = guided.abs().sum(dim=-1, keepdim=True)
    guided = guided * (limit / length.clamp_min(torch.finfo(wide).tiny)).clamp_max(1.0)
    return torch.lerp(positive, guided, alpha).to(z_positive.dtype)


def check_attention_guidance(*, scale: float, tau: float, alpha: float) -> None:
    """Raises ValueError, naming the value and the rule, if a parameter of normalized_attention_guidance is wrong."""
    if not (math.isfinite(scale) and scale >= 1.0):
        raise ValueError(
            f"scale is {scale:g}; it must be 1 (off) or more. Below 1 the negative prompt would be asked for; exchange "
            "the two prompts for that."
        )
    if not (math.isfinite(tau) and tau >= 1.0):
        raise ValueError(
            f"tau is {tau:g}; it must be 1 or more, 2.5 is usual. Below 1 it would weaken the positive prompt; lower "
            "alpha for less effect."
        )
    if not 0.0 <= alpha <= 1.0:
        raise ValueError(f"alpha is {alpha:g}; it must be from 0 (off) to 1 (all of the guided attention).")
