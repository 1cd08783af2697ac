"""Updates of slices of a fused weight, of every kind, in models where ComfyUI has no names for the slices: against what
ComfyUI's own adapters make of each slice by itself."""

import comfy.lora
import pytest
import torch

from lcm_kit.lora_merge import Lora, load, merge, save
from lcm_kit.lora_merge.naming import families
from lcm_kit.tests.with_comfyui import dits
from lcm_kit.tests.with_comfyui.test_own_naming import family, is_tried, own_name

RANK = 2


def cut(name):
    """Weight -> {diffusers' name of a slice: (first row, rows)}, of the weights whose slices ComfyUI has no names for."""
    known, found = dits.homes(name), {}
    for weight, shape in dits.shapes(name).items():
        parts = family(name).parts(family(name).own(own_name(weight)), shape) if is_tried(weight, shape) else ()
        if len(parts) > 1 and not any(
            f"{prefix}{part}" in known for part, _ in parts for prefix in ("transformer.", "")
        ):
            found[weight] = {f"transformer.{part}": (rows[0].start, rows[0].length) for part, rows in parts}
    return found


def numbers(*shape, seed):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def of_lora(name, rows, columns, seed):
    return {
        f"{name}.lora_up.weight": numbers(rows, RANK, seed=seed),
        f"{name}.lora_down.weight": numbers(RANK, columns, seed=seed + 1),
        f"{name}.alpha": torch.tensor(1.5),
    }


def of_loha(name, rows, columns, seed):
    sizes = {"w1_a": (rows, RANK), "w1_b": (RANK, columns), "w2_a": (rows, RANK), "w2_b": (RANK, columns)}
    parts = {f"{name}.hada_{end}": numbers(*size, seed=seed + n) for n, (end, size) in enumerate(sizes.items())}
    return parts | {f"{name}.alpha": torch.tensor(1.5)}


def of_lokr(name, rows, columns, seed):
    first = (2, 2)
    return {
        f"{name}.lokr_w1": numbers(*first, seed=seed),
        f"{name}.lokr_w2_a": numbers(rows // 2, RANK, seed=seed + 1),
        f"{name}.lokr_w2_b": numbers(RANK, columns // 2, seed=seed + 2),
        f"{name}.alpha": torch.tensor(1.5),
    }


def of_dora(name, rows, columns, seed):
    scale = 1 + numbers(rows, 1, seed=seed + 2).abs()
    return of_lora(name, rows, columns, seed) | {f"{name}.dora_scale": scale}


def of_difference(name, rows, columns, seed):
    return {f"{name}.diff": numbers(rows, columns, seed=seed), f"{name}.diff_b": numbers(rows, seed=seed + 1)}


def of_dora_columns(name, rows, columns, seed):
    scale = 1 + numbers(1, columns, seed=seed + 2).abs()
    return of_lora(name, rows, columns, seed) | {f"{name}.dora_scale": scale}


KINDS = {"LoRA": of_lora, "LoHa": of_loha, "LoKr": of_lokr, "DoRA": of_dora, "difference": of_difference}
CUT = [name for name in dits.KNOWN if cut(name)]


def state_of(name, kind):
    state, known = {}, dits.shapes(name)
    for number, (weight, parts) in enumerate(cut(name).items()):
        columns = dits.shapes(name)[weight][1]
        for place, (part, (_, rows)) in enumerate(parts.items()):
            state |= kind(part, rows, columns, seed=100 * number + 10 * place)
            if weight.replace(".weight", ".bias") not in known:
                state.pop(f"{part}.diff_b", None)
    return told(name, state)


def told(name, state):
    """The LoRA with one more module where diffusers' names alone are another model's, too: OmniGen 2's are Lumina 2's."""
    if families.family_of([Lora.from_state_dict(state).spellings]) is not None:
        return state
    return state | of_lora(
        "diffusion_model.cap_embedder.1", *dits.shapes(name)["diffusion_model.cap_embedder.1.weight"], 7
    )


def base(name, weight):
    bias = weight.replace(".weight", ".bias")
    shapes = dits.shapes(name)
    return {key: numbers(*shapes[key], seed=len(key)) for key in (weight, bias) if key in shapes}


def tuned(state, homes, weights):
    """The weights with the LoRA on them, by ComfyUI; every key has to be read."""
    patches = comfy.lora.load_lora(dict(state), dict(homes), log_missing=False)
    made = {key: weight.clone() for key, weight in weights.items()}
    for target, patch in patches.items():
        weight, part = dits.target_of(target)
        assert part is None
        if weight not in made:
            continue  # of told
        made[weight] = comfy.lora.calculate_weight([(1.0, patch, 1.0, None, None)], made[weight], weight)
    return made, patches


def slice_by_slice(name, state):
    """Weight -> as it should be: each slice of it is a weight of its own to ComfyUI."""
    found = {}
    for weight, parts in cut(name).items():
        whole = base(name, weight)
        for part, (first, rows) in parts.items():
            own = {key: value[first : first + rows].clone() for key, value in whole.items()}
            made, patches = tuned({k: v for k, v in state.items() if k.startswith(f"{part}.")}, {part: weight}, own)
            assert patches
            for key, value in made.items():
                whole[key][first : first + rows] = value
        found |= whole
    return found


def test_there_are_such_models():
    assert {"HunyuanVideo", "Lumina 2"} <= {*CUT}


@pytest.mark.parametrize("format", ["auto", "comfy", "kohya"])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", CUT)
def test_they_become_part_of_the_fused_weight_in_a_saved_file(name, kind, format, tmp_path):
    state = state_of(name, KINDS[kind])
    save(Lora.from_state_dict(state), tmp_path / "saved.safetensors", dtype=torch.float32, format=format)
    check(name, state, load(tmp_path / "saved.safetensors").to_state_dict())


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", CUT)
def test_so_they_do_in_a_merge(name, kind):
    """In the graph nothing is saved: ComfyUI gets the tensors."""
    state = state_of(name, KINDS[kind])
    check(name, state, merge([(Lora.from_state_dict(state), 1.0)]).to_state_dict())


def check(name, state, written):
    wanted, homes = slice_by_slice(name, state), dits.homes(name)
    weights = {key: value for weight in cut(name) for key, value in base(name, weight).items()}
    missing = {key for key in written if not any(key.startswith(f"{known}.") for known in homes)}
    assert not missing
    made, _ = tuned(written, homes, weights)
    assert made.keys() == wanted.keys()
    for key, value in wanted.items():
        assert float((made[key] - value).norm() / (weights[key] - value).norm().clamp(min=1e-9)) <= 1e-5, key


@pytest.mark.parametrize("name", CUT)
def test_a_dora_that_scales_the_columns_depends_on_the_whole_weight_and_is_refused_by_name(name, tmp_path):
    state = state_of(name, of_dora_columns)
    for format in ("auto", "comfy", "kohya"):
        with pytest.raises(ValueError, match=r"are slices of weights that .* has in one piece .*: they are DoRA"):
            save(Lora.from_state_dict(state), tmp_path / "saved.safetensors", format=format)
    assert not (tmp_path / "saved.safetensors").exists()


@pytest.mark.parametrize("name", CUT)
def test_a_dora_that_lacks_a_slice_is_refused(name, tmp_path):
    """The scale of the other rows would have to be that of the model's own weight."""
    parts = next(iter(cut(name).values()))
    state = {key: value for key, value in state_of(name, of_dora).items() if not key.startswith(f"{[*parts][-1]}.")}
    with pytest.raises(ValueError, match="they are DoRA"):
        save(Lora.from_state_dict(state), tmp_path / "saved.safetensors")
