"""The number that tells a fully distilled LCM how strong its guidance should be."""

import torch
from torch import Tensor


def guidance_embedding(w: float | Tensor, dim: int = 256) -> Tensor:
    """Embedding of guidance weights, float32 on the CPU: (dim,) for a number, (b, dim) for (b,) of them.

    w: the guidance weight of the paper, which is the usual CFG scale minus 1 (CFG 8 is w = 7); any finite numbers.
    dim: length of the embedding, at least 4; 256 in the released models (`time_cond_proj_dim` of their UNets).

    sin(1000 w f_i) for all i, then cos(1000 w f_i), with f_i = 10000^(-i / (h - 1)), i = 0 .. h - 1, h = dim // 2, and a
    closing zero where dim is odd: w-conditioning of latent consistency models (Luo et al. 2023, arXiv 2310.04378,
    section 4.2), after Meng et al. 2023 (arXiv 2210.03142). A UNet projects it and adds it to its timestep embedding.
    Raises ValueError for a w that is not finite or a dim below 4.
    """
    if dim < 4:
        raise ValueError(f"dim is {dim}; a guidance embedding has at least 4 entries, and 256 in the released LCMs.")
    weights = torch.as_tensor(w, dtype=torch.float32, device="cpu")
    if not weights.isfinite().all():
        raise ValueError(f"w is {w}; a guidance weight must be finite. It is the CFG scale minus 1, usually 2 to 12.")
    half = dim // 2
    # float32 in exactly this order, not float64: the angles reach 14 000, where float32 errors move a sine by 1e-4, and
    # the models were trained with these.
    rate = torch.log(torch.tensor(10000.0)) / (half - 1)
    frequencies = torch.exp(torch.arange(half, dtype=torch.float32) * -rate)
    angles = (1000.0 * weights)[..., None] * frequencies
    embedding = torch.cat([angles.sin(), angles.cos()], dim=-1)
    return torch.nn.functional.pad(embedding, (0, dim - 2 * half))
