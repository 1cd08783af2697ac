"""Which values each kind of link takes. Models are known by their real classes in with_comfyui/test_door.py."""

import pytest
import torch

from lcm_kit.host.door.links import KINDS
from lcm_kit.samplers.presets import PRESETS

PICTURES = torch.zeros(2, 4, 8, 8)
GOOD = {
    "CONDITIONING": [[[torch.zeros(1, 7, 16), {}]], [(None, {"pooled_output": None}), [torch.zeros(1), {}]]],
    "LATENT": [{"samples": PICTURES}, {"samples": torch.zeros(1, 16, 3, 8, 8), "noise_mask": torch.ones(1, 8, 8)}],
    "LORA_MODEL": [{"a.lora_up.weight": torch.zeros(2, 1)}],
    "LORA_STACK": [[], [("style.safetensors", 1.0, 1.0)], ()],
    "LCM_PRESET": [PRESETS["LCM"]],
    "SIGMAS": [torch.linspace(1, 0, 5)],
    "IMAGE": [torch.zeros(1, 8, 8, 3)],
}
NEVER = ["x", "", b"x", 5, 0.5, float("nan"), True, None, object(), {}, {"samples": None}, {1: torch.zeros(1)}]


@pytest.mark.parametrize("kind", GOOD)
def test_a_kind_takes_its_own_values_and_those_of_no_other(kind):
    for name, values in GOOD.items():
        for value in values:
            if name == "LORA_STACK" and kind == "CONDITIONING" and not value:
                continue  # empty lists look alike, and a CONDITIONING may not be empty
            fits = KINDS[kind].fits(value)
            # What is in a stack is looked at where it is read.
            assert fits == (name == kind) or (kind == "LORA_STACK" and name == "CONDITIONING")


class Nested(tuple):
    """As ComfyUI's nested tensors: several at once."""

    is_nested = True

    def unbind(self):
        return tuple(self)


@pytest.mark.parametrize(
    ("samples", "mask", "fits"),
    [
        (Nested([PICTURES, torch.zeros(2, 3, 5)]), torch.ones(1, 8, 8), True),
        (Nested([PICTURES, torch.zeros(2, 3, 5)]), Nested([torch.ones(1, 1, 8, 8), torch.zeros(1, 1, 5)]), True),
        (Nested([PICTURES, torch.zeros(2, 3, 5)]), Nested([torch.ones(1, 1, 8, 8), "x"]), False),
        (Nested([PICTURES, torch.zeros(0, 3, 5)]), torch.ones(1, 8, 8), False),
    ],
)
def test_several_latents_at_once_may_have_a_mask_each(samples, mask, fits):
    assert KINDS["LATENT"].fits({"samples": samples, "noise_mask": mask}) is fits


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("value", NEVER, ids=lambda value: repr(value)[:20])
def test_no_kind_takes_what_is_none(kind, value):
    assert not KINDS[kind].fits(value)


@pytest.mark.parametrize(
    ("kind", "value"),
    [
        ("CONDITIONING", []),
        ("CONDITIONING", [torch.zeros(1)]),
        ("CONDITIONING", [[torch.zeros(1)]]),
        ("CONDITIONING", [[torch.zeros(1), None]]),
        ("CONDITIONING", [["cat", {}]]),
        ("LATENT", {"samples": torch.zeros(4, 8)}),
        ("LATENT", {"samples": torch.zeros(0, 4, 8, 8)}),
        ("LATENT", {"samples": PICTURES, "noise_mask": "x"}),
        ("LATENT", PICTURES),
        ("LORA_MODEL", {"a": 1.0}),
        ("LORA_MODEL", {"samples": PICTURES}),
        ("SIGMAS", torch.zeros(2, 2)),
        ("SIGMAS", torch.zeros(2, dtype=torch.long)),
        ("IMAGE", torch.zeros(8, 8, 3)),
    ],
)
def test_values_that_only_look_like_their_kind_are_told_apart(kind, value):
    assert not KINDS[kind].fits(value)


def test_every_kind_says_what_it_is_and_where_to_get_it():
    for kind in KINDS.values():
        assert kind.words
        assert kind.source
