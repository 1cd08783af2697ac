"""LoRAs of one transformer in different namings meet in one merge: against ComfyUI's own key map and what it adds to each
weight, for every model that it has and every pair of spellings, those that ComfyUI reads and those that only we read."""

import re
from functools import cache
from itertools import permutations

import pytest
import torch

from lcm_kit.lora_merge import Lora, merge
from lcm_kit.lora_merge.files.load_save import load, save
from lcm_kit.lora_merge.naming import families, names
from lcm_kit.lora_merge.naming.family import Rows
from lcm_kit.lora_merge.naming.unet import Layout
from lcm_kit.tests.with_comfyui import dits
from lcm_kit.tests.with_comfyui.test_one_weight_twice import by_core, lora, naming

MODEL = "diffusion_model."
# Prefixes that tools write before names of a model, whether ComfyUI reads them there or not.
PREFIXES = ("", "diffusion_model.", "transformer.", "base_model.model.", "lora_unet_", "lora_unet__", "lycoris_",
            "lora_transformer_")  # fmt: skip


def canonical(spelled):
    return names.canonical(names.spelling(spelled), Layout())


def own_name(weight):
    return canonical(weight.removesuffix(".weight"))


@cache
def family(name):
    found = families.family_of([[own_name(weight) for weight in dits.shapes(name) if not weight.endswith(".bias")]])
    assert found is not None, f"{name} is of no family that we know"
    return found


@pytest.mark.parametrize("name", dits.KNOWN)
def test_every_weight_of_a_model_is_in_its_familys_tables(name):
    """By the dots that it has, so that a file that lost them gets them back."""
    for weight, shape in dits.shapes(name).items():
        if not weight.endswith(".bias"):
            own = family(name).own(own_name(weight))
            assert f"{MODEL}{family(name).dots(own)}" == weight.removesuffix(".weight")
            assert own.removeprefix("lora_unet_") == weight.removesuffix(".weight").removeprefix(MODEL).replace(
                ".", "_"
            )
            assert family(name).reads(weight.removesuffix(".weight"))
            parts = family(name).parts(own, shape)
            rows = sorted((one.start, one.start + one.length) for _, rows in parts for one in rows)
            assert not rows or [0, *(end for _, end in rows)] == [*(start for start, _ in rows), shape[0]]


@pytest.mark.parametrize("name", dits.KNOWN)
def test_the_tables_say_what_comfyuis_key_map_says(name):
    """Own name, rows and order of halves of every name that it knows: a name of a kind that is new to us fails here."""
    tables, checked = family(name), 0
    for spelled, home in dits.homes(name).items():
        (weight, part), said = dits.target_of(home), canonical(spelled)
        if (shape := dits.shapes(name).get(weight)) is None or weight.endswith(".bias"):
            continue
        own, turns = tables.own(own_name(weight)), isinstance(home, tuple) and len(home) > 2
        checked += 1
        if turns:
            assert tables.turn(said, shape) == own
        elif part is None:
            assert tables.own(said) == own
            assert tables.turn(said, shape) is None
        elif "linear1_qkv" not in spelled:
            assert tables.own(said).startswith("lora_transformer_")
            assert own in tables.fused(said)
        if part is not None:
            grouped = name == "Lumina 2" and dits.shapes(name)[weight][0] != 3 * shape[1]
            assert grouped or tables.rows(said, own, shape) == Rows(*part[1:])
        assert tables.reads(spelled) or not in_every_version(name, spelled)
    assert checked > 50


def in_every_version(name, spelled):
    """Whether ComfyUI 0.16 reads the name, too, as far as it has the model."""
    bare = not spelled.startswith((MODEL, "lora_unet_"))
    return not (bare and name in ("LTX-Video", "Ernie-Image"))


# ---- pairs of spellings


def is_tried(weight, shape):
    """Matrices of the first block of each kind, but for the few that are large."""
    block = re.search(r"blocks\.(\d+)\.|layers\.(\d+)\.|encoders\.(\d+)\.", weight)
    first = block is None or "0" in block.groups()
    return first and len(shape) > 1 and weight.endswith(".weight") and torch.Size(shape).numel() < 100_000


@cache
def spellings(name):
    """(prefix, own or diffusers') -> {(weight, first row, rows, turned): name} of all matrices of the first blocks."""
    found = {}
    for spelled, home in dits.homes(name).items():
        (weight, part), shape = dits.target_of(home), dits.shape_at(name, spelled)
        if shape is not None and is_tried(weight, shape) and "linear1_qkv" not in spelled:
            turns = isinstance(home, tuple) and len(home) > 2
            rows = (0, shape[0]) if part is None else tuple(part[1:])
            found.setdefault(naming(spelled, home), {}).setdefault((weight, *rows, turns), spelled)
    found = {key: of_one_naming(those) for key, those in found.items() if len(those) > 6}
    for key, those in added(name).items():
        found.setdefault(key, those)
    return found


def of_one_naming(those):
    """Without the names that another version has for a weight whose slices are named, too."""
    sliced = {weight for weight, first, *_ in those if first}
    return {
        target: spelled for target, spelled in those.items()
        if target[0] not in sliced or target[1] or any(end in spelled for end in ("to_q", "add_q_proj", "to_k"))
    }  # fmt: skip


def added(name):
    """The same for spellings that the key map lacks: own names and diffusers' behind every prefix."""
    found = {}
    for weight, shape in dits.shapes(name).items():
        if not is_tried(weight, shape):
            continue
        own = family(name).own(own_name(weight))
        dots = family(name).dots(own)
        theirs = family(name).parts(own, shape)
        for prefix in PREFIXES:
            put = "_" if prefix.endswith("_") else "."
            found.setdefault((prefix, True), {})[weight, 0, shape[0], False] = prefix + dots.replace(".", put)
            for part, rows in theirs if prefix not in ("diffusion_model.", "lora_unet_", "lora_unet__") else ():
                length = sum(one.length for one in rows)
                found.setdefault((prefix, False), {})[
                    weight, rows[-1].start if len(rows) == 1 else 0, length, len(rows) > 1
                ] = prefix + part.replace(".", put)
    return found


def state_of(name, key, seed):
    state = {}
    for number, ((weight, _, rows, _), spelled) in enumerate(spellings(name)[key].items()):
        shape = (rows, *dits.shapes(name)[weight][1:])
        state |= lora(spelled, shape, 1000 * seed + number)
    return state


def by_hand(name, key, state):
    """Weight -> what the LoRA adds to it, from what each name stands for."""
    found = {}
    for (weight, first, rows, turned), spelled in spellings(name)[key].items():
        shape = dits.shapes(name)[weight]
        up, down = (state[f"{spelled}.lora_{part}.weight"] for part in ("up", "down"))
        delta = (up.flatten(1) @ down.flatten(1)).reshape(rows, *shape[1:])
        if turned:
            delta = torch.cat(delta.chunk(2)[::-1])
        found.setdefault(weight, torch.zeros(shape))[first : first + rows] += delta
    return found


def apart(name):
    """Pairs of spellings whose names differ."""
    return [(one, two) for one, two in permutations(spellings(name), 2)]


@pytest.mark.parametrize("name", dits.KNOWN)
def test_comfyui_reads_the_spellings_as_we_say(name):
    for key in spellings(name):
        state = state_of(name, key, 1)
        known = {k: v for k, v in state.items() if module_of(k) in dits.homes(name)}
        if len(known) < len(state):
            continue  # one that ComfyUI does not read
        ours, theirs = by_hand(name, key, state), by_core(state, dits.homes(name), dits.shapes(name))
        assert ours.keys() == theirs.keys()
        for weight, delta in theirs.items():
            torch.testing.assert_close(ours[weight], delta, rtol=1e-5, atol=1e-5)


def module_of(key):
    return re.sub(r"\.(?:lora_(?:up|down)\.weight|alpha)$", "", key)


@pytest.mark.parametrize("name", dits.KNOWN)
def test_every_pair_of_spellings_is_merged_into_what_the_two_loras_add_one_after_the_other(name):
    """An acceleration LoRA at 1.0 and a style at 0.8; ComfyUI reads every key of the result."""
    states = {key: (state_of(name, key, 1), state_of(name, key, 2)) for key in spellings(name)}
    deltas = {key: tuple(by_hand(name, key, state) for state in pair) for key, pair in states.items()}
    loras = {key: tuple(map(Lora.from_state_dict, pair)) for key, pair in states.items()}
    for first, second in permutations(states, 2):
        written = merge([(loras[first][0], 1.0), (loras[second][1], 0.8)]).to_state_dict()
        compare(name, written, deltas[first][0], deltas[second][1])


def compare(name, written, one, two):
    homes = dits.homes(name)
    modules = {module_of(key) for key in written}
    assert modules <= homes.keys()
    assert len({str(dits.target_of(homes[module])) for module in modules}) == len(modules)
    ours = by_core(written, homes, dits.shapes(name))
    assert ours.keys() == one.keys() | two.keys()
    for weight, delta in ours.items():
        wanted = one.get(weight, 0) + 0.8 * two.get(weight, torch.zeros(1))
        assert float((delta - wanted).abs().max() / wanted.abs().max()) <= 1e-5, weight


@pytest.mark.parametrize("name", dits.KNOWN)
def test_a_lora_alone_is_written_as_comfyui_reads_it(name, tmp_path):
    """Also in a spelling that it does not read, if that is known here."""
    for key in spellings(name):
        state = state_of(name, key, 1)
        save(
            merge([(Lora.from_state_dict(state), 1.0)]),
            tmp_path / "one.safetensors",
            dtype=torch.float32,
            overwrite=True,
        )
        written, delta = load(tmp_path / "one.safetensors").to_state_dict(), by_hand(name, key, state)
        compare(name, written, delta, {})
