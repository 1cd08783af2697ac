"""TF32 is switched on where there is one, and off again."""

from contextlib import nullcontext

import pytest
import torch

from lcm_kit.distillation.precision import AMPERE, check_tf32, tf32


def test_a_device_without_it_is_told():
    with pytest.raises(ValueError, match="tf32 is on, but cpu has none; it needs an NVIDIA GPU"):
        check_tf32(torch.device("cpu"))
    with pytest.raises(ValueError, match="tf32 is on"), tf32(True, torch.device("cpu")):
        pytest.fail("it was switched on")


def test_off_changes_nothing():
    before = torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32
    with tf32(False, torch.device("cpu")):
        assert (torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32) == before


@pytest.mark.parametrize(
    ("capability", "cuda", "has_it"),
    [((8, 0), "12.8", True), ((9, 0), "12.8", True), ((7, 5), "12.8", False), ((9, 4), None, False)],
)
def test_nvidias_cards_from_ampere_on_have_it_and_others_not(capability, cuda, has_it, monkeypatch):
    """ROCm calls its devices cuda too, and has no CUDA version."""
    device = torch.device("cuda")
    monkeypatch.setattr(torch.version, "cuda", cuda)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    before = torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)
    with nullcontext() if has_it else pytest.raises(ValueError, match="tf32 is on"), tf32(True, device):
        assert has_it
        assert (torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32) == ("high", True)
    assert (torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32) == (before[0], False)


@pytest.mark.skipif(
    not torch.cuda.is_available() or torch.cuda.get_device_capability() < AMPERE, reason="needs a GPU with TF32"
)
def test_on_it_lasts_as_long_as_it_is_asked_for():
    before = torch.get_float32_matmul_precision()
    with tf32(True, torch.device("cuda")):
        assert torch.get_float32_matmul_precision() == "high"
    assert torch.get_float32_matmul_precision() == before
