"""LoRAs of one transformer in different namings meet in one merge: against ComfyUI's own key map and what it adds to each
weight, for every model that it has and every pair of spellings, those that ComfyUI reads and those that only we read."""

import re
import zlib
from functools import cache
from itertools import combinations

import comfy.model_base
import pytest
import torch

from lcm_kit.lora_merge import Lora, merge
from lcm_kit.lora_merge.files.load_save import load, save
from lcm_kit.lora_merge.naming import families, flux, names, z_image
from lcm_kit.lora_merge.naming.family import Rows
from lcm_kit.lora_merge.naming.unet import Layout
from lcm_kit.tests.helpers import relative
from lcm_kit.tests.with_comfyui import dits
from lcm_kit.tests.with_comfyui.test_one_weight_twice import by_core, lora, naming

MODEL = "diffusion_model."
# Families whose names ComfyUI's key map gives to all models of one class.
RELATIVES = ((flux.FAMILY, flux.FLUX_2, flux.CHROMA), (z_image.Z_IMAGE, z_image.LUMINA_2))
# Prefixes that tools write before names of a model, whether ComfyUI reads them there or not.
PREFIXES = ("", "diffusion_model.", "transformer.", "base_model.model.", "lora_unet_", "lora_unet__", "lycoris_",
            "lora_transformer_")  # fmt: skip


def canonical(spelled):
    return names.canonical(names.kohya_name(spelled), Layout())


def own_name(weight):
    return canonical(weight.removesuffix(".weight"))


@cache
def family(name):
    found = families.family_of([[own_name(weight) for weight in dits.shapes(name) if not weight.endswith(".bias")]])
    assert found is not None, f"{name} is of no family that we know"
    return found


# Classes of comfy.model_base whose models are not tried here, and why.
OTHERS = {
    "UNets of Stable Diffusion, whose names have a test of their own": "BaseModel SD21UNCLIP SDXLRefiner SDXL SVD_img2vid SV3D_u "
    "SV3D_p Stable_Zero123 SD_X4Upscaler SD15_instructpix2pix SDXL_instructpix2pix Lotus IP2P",
    "UNets of Stable Cascade": "StableCascade_C StableCascade_B",
    "names of the class that it is made of": "LongCatImage HunyuanVideoI2V HunyuanVideoSkyreelsI2V HunyuanVideo15_SR_Distilled "
    "HunyuanImage21Refiner ZImagePixelSpace WAN21_CausalAR WAN22 WAN21_FlowRVS Kandinsky5Image",
    "of Wan with modules of its own: refused beside another prefix": "WAN21_Camera WAN21_HuMo WAN22_Animate WAN22_S2V WAN21_SCAIL "
    "WAN21_SCAIL2 WAN22_WanDancer",
    "one naming only, ComfyUI's own: refused beside another prefix": "StableAudio1 StableAudio3 SeedVR2 Lens GenmoMochi CosmosVideo "
    "PixelDiTT2I PiD MiniMaxH3 MiniMaxMusic3 HiDreamO1 ChromaRadiance Boogu MageFlow JoyImage Ideogram4 CogVideoX",
    "makes or reads no pictures": "Hunyuan3Dv2 Hunyuan3Dv2_1 TripoSplat RT_DETR_v4 DepthAnything3 SAM3",
}  # fmt: skip


def test_every_model_of_comfyui_is_tried_or_named():
    """One that ComfyUI gains fails here until its names are looked at."""
    classes = {
        name for name, one in vars(comfy.model_base).items()
        if isinstance(one, type) and issubclass(one, comfy.model_base.BaseModel)
    }  # fmt: skip
    named = {name for text in OTHERS.values() for name in text.split()} | {base for base, *_ in dits.MODELS.values()}
    assert classes - named == set()
    assert {base for base, *_ in dits.MODELS.values()}.isdisjoint(name for t in OTHERS.values() for name in t.split())


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
    checked = 0
    for spelled, home in dits.homes(name).items():
        (weight, part), said = dits.target_of(home), canonical(spelled)
        tables = knowing(name, said)
        if (shape := dits.shapes(name).get(weight)) is None or weight.endswith(".bias"):
            continue
        own, turns = tables.own(own_name(weight)), isinstance(home, tuple) and len(home) > 2
        checked += 1
        if turns:
            assert tables.turn(said, shape) == own
        elif part is None:
            assert tables.own(said) == own
            assert tables.turn(said, shape) is None
        elif "linear1_qkv" not in spelled and is_cut(name, weight):
            assert tables.own(said).startswith("lora_transformer_")
            assert own in tables.fused(said)
        if part is not None:
            assert not is_cut(name, weight) or tables.rows(said, own, shape) == Rows(*part[1:])
        assert any(one.reads(spelled) for one in related(name)) or not in_every_version(name, spelled)
    assert checked > 50


def knowing(name, said):
    """The model's family; where its key map has names of its relatives, too, the one of these that has the name."""
    known = [one for one in related(name) if one.recognises([said])]
    return family(name) if family(name) in known or not known else known[0]


def related(name):
    return next((those for those in RELATIVES if family(name) in those), (family(name),))


def in_every_version(name, spelled):
    """Whether ComfyUI 0.16 reads the name, too, as far as it has the model."""
    bare = not spelled.startswith((MODEL, "lora_unet_"))
    return not (bare and name in ("LTX-Video", "LTX-2", "Ernie-Image"))


# ---- pairs of spellings


def is_cut(name, weight):
    """Whether a weight is in slices in any file: ComfyUI's key map has Flux 1's slices for Flux 2, and Z-Image's for the
    grouped attention of Lumina 2, which they do not fit."""
    return not (name == "Flux 2" and "linear1" in weight) and name != "Lumina 2"


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
        # linear1_qkv is a name beside that of linear1.
        if shape is not None and is_tried(weight, shape) and "linear1_qkv" not in spelled:
            if not family(name).recognises([canonical(spelled)]):
                continue
            turns = isinstance(home, tuple) and len(home) > 2
            if part is not None and not is_cut(name, weight):
                continue
            rows = (0, shape[0]) if part is None else tuple(part[1:])
            found.setdefault(naming(spelled, home), {}).setdefault((weight, *rows, turns), spelled)
    found = {key: those for key, those in found.items() if len(those) > 6}
    for key, those in added(name).items():
        found.setdefault(key, those)
    return found


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


# In `make test` each pair is tried on every third model, and each spelling of a model with a third of its others.
@pytest.mark.parametrize("thirds", [1, pytest.param(3, marks=pytest.mark.rare)])
@pytest.mark.parametrize("name", dits.KNOWN)
def test_every_pair_of_spellings_is_merged_into_what_the_two_loras_add_one_after_the_other(name, thirds):
    """An acceleration LoRA at 1.0 and a style at 0.8, one of them at least in a spelling that ComfyUI reads, which reads
    every key of the result. Each pair in one order, so that every spelling is the first of about half of its pairs, and
    the model's own beside each other one in both.
    """
    read = {key for key, those in spellings(name).items() if dits.homes(name).keys() >= set(those.values())}
    assert len(read) >= 2
    assert (MODEL, True) in spellings(name)
    states = {key: (state_of(name, key, 1), state_of(name, key, 2)) for key in spellings(name)}
    deltas = {key: tuple(by_hand(name, key, state) for state in pair) for key, pair in states.items()}
    loras = {key: tuple(map(Lora.from_state_dict, pair)) for key, pair in states.items()}
    for first, second in in_turns(list(states), (MODEL, True)):
        turn = dits.KNOWN.index(name) + zlib.crc32(repr(sorted((first, second))).encode())
        if not {first, second} & read or (turn % 3 >= thirds and (MODEL, True) not in (first, second)):
            continue
        written = merge([(loras[first][0], 1.0), (loras[second][1], 0.8)]).to_state_dict()
        compare(name, written, deltas[first][0], deltas[second][1])


def in_turns(keys, always):
    """Every pair once, now the one in front, now the other; those with `always` in both orders."""
    for (a, first), (b, second) in combinations(enumerate(keys), 2):
        pair = (first, second) if (a + b) % 2 else (second, first)
        yield from (pair, pair[::-1]) if always in pair else (pair,)


def compare(name, written, one, two):
    homes = dits.homes(name)
    modules = {module_of(key) for key in written}
    assert modules <= homes.keys()
    assert len({str(dits.target_of(homes[module])) for module in modules}) == len(modules)
    ours = by_core(written, homes, dits.shapes(name))
    assert ours.keys() == one.keys() | two.keys()
    for weight, delta in ours.items():
        wanted = one.get(weight, 0) + 0.8 * two.get(weight, torch.zeros(1))
        assert relative(delta, wanted) <= 1e-5, weight


@pytest.mark.parametrize("name", dits.KNOWN)
def test_a_lora_alone_is_written_as_comfyui_reads_it(name, tmp_path):
    """Also in a spelling that it does not read, if that is known here."""
    for key in spellings(name):
        state = state_of(name, key, 1)
        if families.family_of([map(canonical, spellings(name)[key].values())]) is None:
            assert name == "Lumina 2", key  # OmniGen 2 has all of diffusers' names for it, too
            continue
        save(
            merge([(Lora.from_state_dict(state), 1.0)]),
            tmp_path / "one.safetensors",
            dtype=torch.float32,
            overwrite=True,
        )
        written, delta = load(tmp_path / "one.safetensors").to_state_dict(), by_hand(name, key, state)
        compare(name, written, delta, {})
