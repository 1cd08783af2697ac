"""A merge by any method, cut or not, is the same whatever the LoRAs call their weights: whole ones and slices included."""

import zlib

import pytest
import torch

from lcm_kit.lora_merge import METHODS, Lora, merge
from lcm_kit.lora_merge.files.one_naming import family_of_loras
from lcm_kit.tests.helpers import relative
from lcm_kit.tests.with_comfyui import dits
from lcm_kit.tests.with_comfyui.test_one_weight_twice import by_core
from lcm_kit.tests.with_comfyui.test_own_naming import MODEL, spellings

OWN = (MODEL, True)
ours_alone = pytest.mark.slow  # no fact about ComfyUI: once is enough
# One that looks at entries, one that draws, one at singular values, and a cut.
WAYS = {"ties": {"method": "ties"}, "dare": {"method": "dare", "seed": 3}, "tsv": {"method": "tsv"}, "cut": {"rank": 2}}

# Diffusers' names of some of its weights are another family's, and models as small as these have no width to tell it by.
ALIKE = {"Lumina 2"}
# Every method that draws, on cores and on whole updates.
DRAWS = [
    {"method": name, "dense": dense, "seed": 3}
    for name, method in METHODS.items()
    if method.draws
    for dense in (False, True)
]


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


@ours_alone
@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("name", dits.KNOWN)
def test_a_merge_does_not_depend_on_what_the_loras_call_their_weights(name, way):
    whole, wanted, tried = held(name, OWN), {}, 0
    # Every other spelling: those between are merged in the next of these ways, and in this one on the next model.
    turn = (list(WAYS).index(way) + dits.KNOWN.index(name)) % 2
    others = [key for key in read_by_core(name) if key != OWN]
    for key in others[turn::2] or others:
        weights = tuple(sorted(whole & held(name, key)))
        if not weights:
            continue
        if weights not in wanted:
            wanted[weights] = added(name, OWN, weights, way)
        found = added(name, key, weights, way)
        assert wanted[weights].keys() == found.keys() == {*weights}
        assert max(relative(found[weight], wanted[weights][weight]) for weight in weights) < 1e-4
        tried += 1
    assert tried


def added(name, key, weights, way):
    """Weight -> what ComfyUI adds to it, of a merge of a LoRA in a spelling and one in the model's own."""
    pair = [(spelled(name, key, weights, 1), 1.0), (spelled(name, OWN, weights, 2), 0.8)]
    return by_core(merge(pair, **WAYS[way]).to_state_dict(), dits.homes(name), dits.shapes(name))


def in_one_piece(name, key):
    """Weight -> (its name in a spelling, whether that has its halves the other way about), of those that it has whole."""
    return {
        weight: (module, turned)
        for (weight, _, rows, turned), module in spellings(name)[key].items()
        if rows == dits.shapes(name)[weight][0]
    }


@ours_alone
@pytest.mark.parametrize("name", dits.KNOWN)
def test_a_draw_does_not_depend_on_what_the_loras_call_their_weights(name):
    """The same bits where both files spell a weight alike, in whichever way, and where they spell it in two ways. But for
    what both have with its halves the other way about: entries that are drawn have other places in it.
    """
    tried, wanted, family = 0, {}, dits.KNOWN.index(name)
    # Every other spelling, those between on the next model.
    for number, key in enumerate([key for key in spellings(name) if key != OWN][family % 2 :: 2]):
        theirs = in_one_piece(name, key)
        weights = tuple(sorted(in_one_piece(name, OWN).keys() & theirs))
        # Every draw with files that are alike and with unlike ones, these the one way about in one round and the other in the
        # next, and on the next two models.
        rounds, place = divmod(number, len(DRAWS))
        for pair in ((key, key), (key, OWN) if (rounds + family // 2) % 2 else (OWN, key)):
            options = DRAWS[place]
            if pair == (key, key) and family_of_loras([piece_by_piece(name, key, weights, 0)]) is None:
                assert name in ALIKE
                continue
            if (weights, place) not in wanted:
                wanted[weights, place] = drawn(name, (OWN, OWN), weights, options)
            found = drawn(name, pair, weights, options)
            for weight, one, other in zip(weights, found, wanted[weights, place], strict=True):
                if pair != (key, key) or not theirs[weight][1]:
                    assert torch.equal(one, other), (pair, weight, options)
                    tried += 1
    assert tried > 50


def drawn(name, keys, weights, options):
    """The updates of a merge of two LoRAs, one in each spelling, in the order of the weights."""
    loras = [piece_by_piece(name, key, weights, seed) for seed, key in enumerate(keys)]
    merged = merge([(loras[0], 1.0), (loras[1], 0.8)], **options)
    return [merged.delta(module) for module in merged.spellings]


def piece_by_piece(name, key, weights, seed):
    state = {}
    for number, weight in enumerate(weights):
        module, turned = in_one_piece(name, key)[weight]
        shape = dits.shapes(name)[weight]
        generator = torch.Generator().manual_seed(1000 * seed + number)
        up, down = torch.randn(shape[0], 2, generator=generator), torch.randn(2, *shape[1:], generator=generator)
        up = torch.cat(up.chunk(2)[::-1]) if turned else up
        state |= {
            f"{module}.lora_up.weight": up.reshape(*up.shape, *(1,) * len(shape[2:])),
            f"{module}.lora_down.weight": down,
        }
    return Lora.from_state_dict(state)
