"""TF32: float32 products with 10 bits of mantissa, on GPUs that have them, several times as fast."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch

AMPERE = (8, 0)  # the first with TF32


def check_tf32(device: torch.device) -> None:
    """Raises ValueError if the device has none."""
    if device.type != "cuda" or torch.version.cuda is None or torch.cuda.get_device_capability(device) < AMPERE:
        raise ValueError(f"tf32 is on, but {device} has none; it needs an NVIDIA GPU of 2020 or later. Switch it off.")


@contextmanager
def tf32(active: bool, device: torch.device) -> Iterator[None]:
    """Within it float32 matrix products and convolutions on the device may be TF32; False changes nothing.

    Raises ValueError where the device has no TF32.
    """
    if not active:
        yield
        return
    check_tf32(device)
    precision, convolutions = torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32
    torch.set_float32_matmul_precision("high")
    torch.backends.cudnn.allow_tf32 = True
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(precision)
        torch.backends.cudnn.allow_tf32 = convolutions
