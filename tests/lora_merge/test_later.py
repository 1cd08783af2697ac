"""Cuts of LoRAs in files, made when somebody asks for them."""

import os

import pytest
import torch
from safetensors.torch import load_file, save_file

from lcm_kit.lora_merge import Lora, LoraLayer, load, merge, save
from lcm_kit.lora_merge.algebra.later import made_later, surely_holds, write_product
from lcm_kit.lora_merge.algebra.precision import holds
from lcm_kit.lora_merge.files import load_save
from lcm_kit.lora_merge.updates.unmade import Unmade

pytestmark = pytest.mark.skipif(os.name != "posix", reason="Windows replaces no file that is open: all is in memory")
HALF, BRAIN, FULL = torch.float16, torch.bfloat16, torch.float32
NAMES = (
    "lora_unet_mid_block_attentions_0_proj_in",
    "lora_unet_mid_block_resnets_0_conv1",
    "lora_unet_time_embedding_linear_1",
)
AIMS = {"keep": {"keep": 0.6}, "retain": {"retain": 0.6}, "max_mb": {"max_mb": 0.0085}}


def state(rank, seed, size=0.1):
    g = torch.Generator().manual_seed(seed)
    result = {}
    for name, kernel in zip(NAMES[: 3 - seed], ((), (3, 3), ()), strict=False):
        ones = (1,) * len(kernel)
        result[f"{name}.lora_up.weight"] = (size * torch.randn(24, rank, *ones, generator=g)).half()
        result[f"{name}.lora_down.weight"] = (size * torch.randn(rank, 16, *kernel, generator=g)).half()
        result[f"{name}.alpha"] = torch.tensor(2.0)
    return result


@pytest.fixture
def pair(tmp_path, monkeypatch):
    """Two LoRAs, the second without a module that the first has, each as (in its file, in memory)."""
    monkeypatch.setattr(load_save, "_STREAMED", 0)
    paths = [tmp_path / f"{seed}.safetensors" for seed in range(2)]
    for seed, path in enumerate(paths):
        save_file(state(6 - 2 * seed, seed), path)
    return [(load(path), Lora.from_state_dict(load_file(path), source=path.name)) for path in paths]


def merged(loras, **options):
    return merge([(loras[0], 0.7), (loras[1], -1.0)], workers=1, **options)


def unmade(lora):
    return {m for m, layer in lora.modules.items() if all(isinstance(p, Unmade) for p in layer.pieces().values())}


@pytest.mark.parametrize("dtype", [HALF, BRAIN, FULL])
@pytest.mark.parametrize("aim", AIMS)
def test_a_cut_that_is_made_later_has_the_bits_of_one_that_is_made_at_once(tmp_path, pair, aim, dtype):
    in_files, in_memory = (merged(loras, out_dtype=dtype, **AIMS[aim]) for loras in zip(*pair, strict=True))
    assert all(in_memory.modules[module].rank < 10 for module in pair[1][0].modules)
    assert unmade(in_files) == {*in_files.modules}
    for module, layer in in_memory.modules.items():
        other = in_files.modules[module]
        assert (other.rank, other.alpha, other.shape, other.dtypes) == (layer.rank, layer.alpha, layer.shape, {dtype})
        assert (other.up.shape, other.down.shape) == (layer.up.shape, layer.down.shape)
        assert torch.equal(other.up, layer.up)
        assert torch.equal(other.down, layer.down)
    files = [tmp_path / f"{name}.out.safetensors" for name in ("files", "memory")]
    for path, lora in zip(files, (in_files, in_memory), strict=True):
        save(lora, path, dtype=dtype)
    first, second = map(load, files)
    for module, layer in first.modules.items():
        assert torch.equal(layer.up, second.modules[module].up)
        assert torch.equal(layer.down, second.modules[module].down)


def test_it_is_the_same_in_every_thread_and_for_every_number_of_them(pair):
    loras = [in_file for in_file, _ in pair]
    one, two = (merge([(loras[0], 0.7), (loras[1], -1.0)], keep=0.6, workers=workers) for workers in (1, 3))
    for module, layer in one.modules.items():
        assert torch.equal(layer.up, two.modules[module].up)
        assert torch.equal(layer.down, two.modules[module].down)


@pytest.mark.parametrize("made", ["in memory", "in one pass", "too small", "balanced"])
def test_what_may_change_meanwhile_or_may_not_fit_is_made_at_once(tmp_path, pair, made):
    loras, options = [in_file for in_file, _ in pair], {"keep": 0.6, "out_dtype": HALF}
    if made == "in memory":
        loras = [loras[0], pair[1][1]]
    elif made == "in one pass":
        options = {"rank": 2, "out_dtype": HALF}
    elif made == "balanced":
        options |= {"balanced": True}
    else:
        save_file(state(6, 0, 2e-4), tmp_path / "small.safetensors")
        save_file(state(4, 1, 2e-4), tmp_path / "smaller.safetensors")
        loras = [load(tmp_path / f"{name}.safetensors") for name in ("small", "smaller")]
    result = merged(loras, **options)
    shared = [module for module in result.modules if module in loras[1].modules]
    assert len(shared) == 2
    assert unmade(result).isdisjoint(shared)


def test_a_file_that_is_written_to_before_the_cut_is_made_is_refused(tmp_path, pair):
    result = merged([in_file for in_file, _ in pair], keep=0.6)
    with open(tmp_path / "0.safetensors", "r+b") as file:
        file.truncate(2000)
    with pytest.raises(ValueError, match=r"0\.safetensors: was changed by another program"):
        save(result, tmp_path / "out.safetensors")
    assert not (tmp_path / "out.safetensors").exists()


@pytest.mark.parametrize("dtype", [HALF, BRAIN, FULL])
@pytest.mark.parametrize("power", [-105, -80, -12, -8, 0, 13, 15, 30, 126, 127])
def test_what_is_sure_to_fit_does_fit(power, dtype):
    """float16 of components that have one large number, or many of one size."""
    one, even = torch.zeros(40, 1), torch.full((40, 1), 40**-0.5)
    sure = surely_holds(torch.tensor([2.0**power, 1.0], dtype=torch.float64), (40, 3), dtype)
    for up in (one.index_fill(0, torch.tensor([3]), 1.0), even):
        both = torch.cat([up * 2.0**power, even], dim=1)
        assert holds(LoraLayer(both.to(dtype), both.T.contiguous().to(dtype))) or not sure
    assert sure is surely_holds(torch.tensor([2.0**power, 1.0], dtype=torch.float64), (3, 10, 2, 2), dtype)
    assert sure is {HALF: -8 <= power <= 13, BRAIN: -80 <= power <= 126, FULL: -80 <= power <= 126}[dtype]


def test_components_are_taken_to_be_as_long_as_the_longer_side(pair):
    terms = [(pair[0][0].modules[pair[0][0].find(NAMES[2])], 1.0)]  # 24 by 16
    assert terms[0][0].shape == (24, 16)
    left, right = torch.eye(6), torch.eye(6)
    for length, is_made_now in ((30, False), (20, True)):
        norms = torch.full((6,), 2.0**-11 * length**0.5)
        assert (made_later(terms, left, right, norms, HALF) is None) is is_made_now
    turned = [(LoraLayer(terms[0][0].down.T, terms[0][0].up.T), 1.0)]
    assert made_later(turned, left, right, torch.ones(6), HALF) is None  # in memory


@pytest.mark.parametrize("dtype", [HALF, BRAIN, FULL])
def test_a_product_is_rounded_once(dtype):
    first, second = torch.randn(7, 5), torch.randn(5, 9)
    place = torch.empty(63, dtype=dtype)
    write_product(first, second, place)
    assert torch.equal(place.view(7, 9), (first @ second).to(dtype))
