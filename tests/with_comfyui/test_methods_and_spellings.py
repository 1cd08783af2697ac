"""A merge by any method, cut or not, is the same whatever the LoRAs call their weights: whole ones and slices included."""

import zlib

import pytest
import torch

from lcm_kit.lora_merge import Lora, merge
from lcm_kit.tests.helpers import relative
from lcm_kit.tests.with_comfyui import dits
from lcm_kit.tests.with_comfyui.test_one_weight_twice import by_core
from lcm_kit.tests.with_comfyui.test_own_naming import MODEL, spellings

OWN = (MODEL, True)
# One that looks at entries, one that draws, one at singular values, and a cut.
WAYS = {"ties": {"method": "ties"}, "dare": {"method": "dare", "seed": 3}, "tsv": {"method": "tsv"}, "cut": {"rank": 2}}

# Its own names are a UNet's, too. The draw is one of a module's name: here there are two names, and another draw.
DRAWN_OTHERWISE = {("Ernie-Image", "dare"): "time_embedding"}


def read_by_core(name):
    return [key for key, those in spellings(name).items() if dits.homes(name).keys() >= set(those.values())]


def held(name, key):
    """Weights of which a spelling has all rows."""
    rows = {}
    for weight, _, length, _ in spellings(name)[key]:
        rows[weight] = rows.get(weight, 0) + length
    return {weight for weight, count in rows.items() if count == dits.shapes(name)[weight][0]}


def spelled(name, key, weights, seed):
    """One LoRA of these weights, whatever its spelling: a slice has the rows of the whole weight's up."""
    state = {}
    for (weight, first, rows, turned), module in spellings(name)[key].items():
        if weight in weights:
            shape = dits.shapes(name)[weight]
            generator = torch.Generator().manual_seed(seed + zlib.crc32(weight.encode()))
            up, down = torch.randn(shape[0], 2, generator=generator), torch.randn(2, *shape[1:], generator=generator)
            up = up[first : first + rows]
            up = torch.cat(up.chunk(2)[::-1]) if turned else up
            state |= {
                f"{module}.lora_up.weight": up.reshape(*up.shape, *(1,) * len(shape[2:])),
                f"{module}.lora_down.weight": down,
            }
    return Lora.from_state_dict(state)


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("name", dits.KNOWN)
def test_a_merge_does_not_depend_on_what_the_loras_call_their_weights(name, way):
    whole, tried = held(name, OWN), 0
    for key in (key for key in read_by_core(name) if key != OWN):
        weights = sorted(whole & held(name, key))
        if other := DRAWN_OTHERWISE.get((name, way)):
            weights = [weight for weight in weights if other not in weight]
        if not weights:
            continue
        style = spelled(name, OWN, weights, 2)
        wanted, found = (
            by_core(
                merge([(spelled(name, one, weights, 1), 1.0), (style, 0.8)], **WAYS[way]).to_state_dict(),
                dits.homes(name),
                dits.shapes(name),
            )
            for one in (OWN, key)
        )
        assert wanted.keys() == found.keys() == {*weights}
        assert max(relative(found[weight], wanted[weight]) for weight in weights) < 1e-4
        tried += 1
    assert tried
