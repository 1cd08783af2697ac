"""What is refused names the file that it is about, which people look for, and the module as that file spells it."""

import pytest
import torch

from lcm_kit.lora_merge import METHODS, Lora, merge, resize
from lcm_kit.lora_merge.comparing.compare import compare
from lcm_kit.lora_merge.extracting.extract import extract
from lcm_kit.lora_merge.one_module.fault import in_words
from lcm_kit.tests.lora_merge.make import factors, kohya

MODULE = "lora_unet_mid_block_attentions_0_proj_in"
NAMES = ("first.safetensors", "second.safetensors", "third.safetensors")
MOST = 3e38  # float32 ends at 3.4e38


def usual(name, seed):
    return Lora.from_state_dict(
        kohya(MODULE, *factors(8, 2, 6, seed=seed)) | {f"{MODULE}.diff_b": torch.ones(8)}, source=name
    )


def low_rank(name, size):
    up, down = torch.full((8, 2), size**0.5), torch.full((2, 6), size**0.5)
    return Lora.from_state_dict(kohya(MODULE, up, down), source=name)


def whole(name, size):
    return Lora.from_state_dict({f"{MODULE}.diff": torch.full((8, 6), size)}, source=name)


def bias(name, size):
    return Lora.from_state_dict({f"{MODULE}.diff_b": torch.full((8,), size)}, source=name)


def named(error):
    """Files in a message, in their order."""
    return sorted((name for name in NAMES if name in error), key=error.index)


def inputs(culprits, make, size):
    """(lora, strength) of three files, those of the culprits of that size."""
    return [(make(name, size) if number in culprits else usual(name, number), 1.5) for number, name in enumerate(NAMES)]


def refusal(work, *arguments, **options):
    with pytest.raises(ValueError, match=r"first|second|third") as found:
        work(*arguments, **options)
    return str(found.value)


@pytest.mark.parametrize("make", [low_rank, whole, bias])
@pytest.mark.parametrize("culprits", [(0,), (1,), (2,), (0, 2)])
@pytest.mark.parametrize(
    "options",
    [{}, {"method": "magnitude", "density": 1.0}, {"rank": 1}, {"keep": 0.5}, {"mu": 1.0, "protect": 1}],
    ids=str,
)
def test_the_files_whose_updates_no_number_can_hold(make, culprits, options):
    error = refusal(merge, inputs(culprits, make, MOST), **options)
    assert named(error) == [NAMES[number] for number in culprits]
    assert MODULE in error
    assert "ower" in error  # the way out


@pytest.mark.parametrize("make", [whole, bias])
@pytest.mark.parametrize("culprit", range(3))
def test_the_file_whose_update_the_results_dtype_cannot_hold(make, culprit):
    error = refusal(merge, inputs((culprit,), make, 1e6), out_dtype=torch.float16)
    assert named(error) == [NAMES[culprit]]
    assert MODULE in error
    assert "too large for float16; save as float32" in error


@pytest.mark.parametrize("make", [whole, bias])
def test_all_files_are_named_where_it_is_all_of_them_together(make):
    """Each alone is within float32, the sum of the first two is not; what has strength 0 has no part in it."""
    pair = [(make(name, 0.9 * MOST), 1.0) for name in NAMES[:2]]
    error = refusal(merge, [*pair, (make(NAMES[2], 0.9 * MOST), 0.0)])
    assert named(error) == [*NAMES[:2]]
    assert MODULE in error


@pytest.mark.parametrize("make", [low_rank, whole])
def test_one_file_alone_is_named_too(make):
    error = refusal(resize, inputs((0,), make, 1e38)[0][0], rank=1, out_dtype=torch.float16)
    assert named(error) == [*NAMES[:1]]
    assert MODULE in error


@pytest.mark.parametrize("culprit", range(3))
def test_a_comparison_names_it(culprit):
    error = refusal(compare, beyond(culprit))
    assert named(error) == [NAMES[culprit]]
    assert f"{NAMES[culprit]}: {MODULE}: the squares of its updates are beyond float64" in error


def beyond(culprit):
    """Factors and a scale whose product's square is beyond float64."""
    state = kohya(MODULE, torch.full((8, 2), 1e38), torch.full((2, 6), 1e38), alpha=1e38)
    return [
        (Lora.from_state_dict(state, source=name) if number == culprit else usual(name, number), 1.0)
        for number, name in enumerate(NAMES)
    ]


def test_the_update_itself_names_it():
    lora = beyond(0)[0][0]
    assert refusal(lora.delta, MODULE).startswith(f"{NAMES[0]}: {MODULE}: the update reaches")


@pytest.mark.parametrize("culprit", range(2))
@pytest.mark.parametrize("method", [name for name, method in METHODS.items() if not method.signed])
def test_a_negative_strength_that_a_method_does_not_take(method, culprit):
    pair = [(usual(name, number), -0.5 if number == culprit else 1.0) for number, name in enumerate(NAMES[:2])]
    error = refusal(merge, pair, method=method)
    assert named(error) == [NAMES[culprit]]
    assert f"strength is -0.5 at {MODULE}, but method {method} " in error


@pytest.mark.parametrize(("tuned", "base"), [(True, False), (False, True), (True, True)])
@pytest.mark.parametrize("shape", [(4, 3), (4,)])
def test_the_model_whose_weights_are_no_numbers(tuned, base, shape):
    weights = [torch.full(shape, float("nan") if broken else 1.0) for broken in (tuned, base)]
    name = "diffusion_model.x.weight" if len(shape) > 1 else "diffusion_model.x.bias"
    with pytest.raises(ValueError, match=f"{name}: the weights of ") as found:
        extract([(name, *weights)])
    assert ("the tuned model" in str(found.value), "the base" in str(found.value)) == (tuned, base)


def test_a_file_spells_its_module_in_its_own_way():
    """The second input's name, not that of the first or the one that both have here."""
    first = Lora.from_state_dict(kohya("lora_unet_middle_block_1_proj_in", *factors(8, 2, 6)), source=NAMES[0])
    error = refusal(merge, [(first, 1.0), (low_rank(NAMES[1], MOST), 1.5)])
    assert named(error) == [NAMES[1]]


def test_what_no_decomposition_can_use_is_named_with_its_file():
    loras = [usual(name, number) for number, name in enumerate(NAMES[:2])]
    attempts = [(loras[0], lambda: None), (loras[1], lambda: torch.linalg.cholesky(-torch.eye(2)))]
    with pytest.raises(ValueError, match=f"^{NAMES[1]}: {MODULE}: its values are of no use to a decomposition"):
        with in_words(MODULE, lambda: attempts):
            torch.linalg.cholesky(-torch.eye(2))
