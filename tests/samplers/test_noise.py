"""Step noise: the same for an image whatever surrounds it, independent between images, levels and seeds."""

import struct

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lcm_kit.samplers.noise import StepNoise, _splitmix64, level_numbers, stream_seed
from lcm_kit.samplers.schedule import sigmas_at
from lcm_kit.tests.samplers.toy import sigma_table

LATENT = (4, 8, 8)


def like(batch, dtype=torch.float32):
    return torch.zeros(batch, *LATENT, dtype=dtype)


@pytest.mark.parametrize("level", [0, 1, 7])
def test_an_image_has_the_same_noise_alone_and_in_a_batch(level):
    batch = StepNoise(42)(level, like(3))
    for index in range(3):
        assert torch.equal(StepNoise(42, [index])(level, like(1))[0], batch[index])
    assert torch.equal(StepNoise(42, [2, 0])(level, like(2)), batch[[2, 0]])


def test_noise_does_not_depend_on_what_was_drawn_before():
    source = StepNoise(5)
    first = source(0, like(2))
    source(3, like(1))
    assert torch.equal(source(0, like(2)), first)


def test_images_levels_and_seeds_differ():
    noises = [StepNoise(s, [b])(level, like(1)) for s in (0, 1, 2**32, 2**64 - 1) for b in (0, 1) for level in (0, 1)]
    for i, noise in enumerate(noises):
        assert not any(torch.equal(noise, other) for other in noises[:i])


def test_noise_is_never_the_initial_noise_of_this_or_a_neighbouring_seed():
    for seed in (0, 1, 42, 2**32 + 3):
        noises = [StepNoise(seed)(level, like(2))[image] for level in range(4) for image in range(2)]
        for other in range(max(seed - 4, 0), seed + 5):
            initial = torch.randn(2, *LATENT, generator=torch.Generator().manual_seed(other))
            assert not any(torch.equal(noise, image) for noise in noises for image in initial)


def test_noise_is_standard_normal_and_uncorrelated():
    big = torch.zeros(2, 4, 64, 64)
    n = big[0].numel()
    source = StepNoise(7)
    rows = torch.cat(
        [source(0, big), source(1, big), torch.randn(big.shape, generator=torch.Generator().manual_seed(7))]
    )
    rows = rows.flatten(1)
    # Bounds are five standard errors: 1/sqrt(n) for mean and correlation, sqrt(2/n) for the variance.
    assert rows.mean(1).abs().max() < 5 / n**0.5
    assert (rows.var(1) - 1).abs().max() < 5 * (2 / n) ** 0.5
    assert (torch.corrcoef(rows) - torch.eye(len(rows))).abs().max() < 5 / n**0.5


def test_the_global_generator_is_untouched():
    before = torch.get_rng_state()
    StepNoise(1)(0, like(2))
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_noise_has_the_latents_dtype_and_is_the_float32_noise_rounded(dtype):
    noise = StepNoise(3)(1, like(2, dtype))
    assert noise.dtype == dtype
    assert torch.equal(noise, StepNoise(3)(1, like(2)).to(dtype))


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32, torch.float64])
def test_noise_is_where_the_latent_is_and_the_same_whatever_a_process_takes_for_its_default(dtype):
    """Another pack may have set another default dtype or device: meta stands for a device without numbers."""
    away = StepNoise(3)(1, torch.zeros(2, 4, 8, 8, dtype=dtype, device="meta"))
    assert (away.device.type, away.dtype, away.shape) == ("meta", dtype, (2, 4, 8, 8))
    here, wanted = like(2, dtype), StepNoise(3)(1, like(2, dtype))
    with torch.device("meta"):
        assert torch.equal(StepNoise(3)(1, here), wanted)
    torch.set_default_dtype(torch.float64)
    try:
        assert torch.equal(StepNoise(3)(1, here), wanted)
    finally:
        torch.set_default_dtype(torch.float32)


@pytest.mark.parametrize("shape", [(2, 16), (2, 1, 37), (2, 4, 3, 8, 8), (2,), (0, 4, 8, 8)])
def test_any_number_of_dimensions(shape):
    assert StepNoise(0)(0, torch.zeros(shape)).shape == shape


@pytest.mark.parametrize(("indices", "batch"), [([0, 1, 2], 2), ([0], 2), ([], 1)])
def test_a_batch_of_another_length_than_its_indices_is_refused(indices, batch):
    with pytest.raises(ValueError, match=rf"holds {batch} images but batch_indices has {len(indices)} entries"):
        StepNoise(0, indices)(0, like(batch))


def test_the_mix_is_splitmix64():
    # First outputs for seed 1234567, as published with the reference implementation's ports (Rosetta Code).
    golden = 0x9E3779B97F4A7C15
    states = [(1234567 + k * golden) % 2**64 for k in range(3)]
    assert [_splitmix64(s) for s in states] == [6457827717110365317, 3203168211198807973, 9817491932198370423]


def test_stream_seeds_stay_what_they_are():
    # Written down from this implementation: people's pictures depend on them.
    assert [stream_seed(0, 0, 0), stream_seed(42, 3, 1)] == [4264698814250774852, 8199235884551635133]


@given(
    st.lists(st.tuples(st.integers(0, 2**64 - 1), st.integers(0, 4096), st.integers(0, 999)), unique=True, max_size=50)
)
def test_different_seed_image_or_level_means_another_stream(keys):
    assert len({stream_seed(*key) for key in keys}) == len(keys)


# ---- the number of a level


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_levels_and_tables_of_any_dtype_have_the_same_numbers(dtype):
    """A host may keep its table in float64: its levels are float32's, as those of the model are."""
    table = sigma_table()
    sigmas = sigmas_at(range(999, 0, -37), table)
    wanted = level_numbers(sigmas, table)
    assert level_numbers(sigmas.to(dtype), table) == level_numbers(sigmas, table.to(dtype)) == wanted


@pytest.mark.parametrize("length", [50, 1000, 10_000])
def test_an_entry_of_a_table_is_numbered_by_its_share_of_all_times_whatever_the_tables_length(length):
    table = torch.arange(1, length + 1) / length  # a flow model's
    levels = torch.tensor([1.0, 0.76, 0.5, 0.26])
    assert level_numbers(levels, table) == [1_000_000, 760_000, 500_000, 260_000]


def test_a_level_has_the_same_number_in_every_part_of_a_run_and_no_other_level_has_it():
    table = sigma_table()
    sigmas = sigmas_at(range(999, 0, -1), table)
    numbers = level_numbers(sigmas, table)
    assert len(set(numbers)) == len(numbers)
    for start in (0, 7, 500, 998):
        assert level_numbers(sigmas[start:], table) == numbers[start:]
    assert level_numbers(sigmas[3:4], table) == numbers[3:4]


def test_rounding_of_a_level_does_not_change_its_number():
    """As between a table and the logarithms that ComfyUI keeps of it, or two devices."""
    table = sigma_table()
    assert level_numbers(table * (1 + 3e-6), table) == level_numbers(table * (1 - 3e-6), table) == [
        1000 * (t + 1) for t in range(1000)
    ]  # fmt: skip


@pytest.mark.parametrize("table", [None, sigma_table()])
def test_levels_between_the_entries_or_without_a_table_have_the_bits_of_their_sigma(table):
    levels = torch.tensor([80.0, 3.3333, 1.0001, 0.5, 0.002, 0.0])
    expected = [int.from_bytes(struct.pack("<f", level), "little") for level in levels.tolist()]
    assert level_numbers(levels, table) == expected
    assert expected[-1] == 0
    assert min(expected[:-1]) > 1_000_000  # above the numbers of all entries


@given(st.lists(st.floats(2**-10, 5000, width=32), unique=True, max_size=30))
def test_no_two_levels_of_a_run_share_a_number(levels):
    # Nearer than a table's entries and their rounding they are one level.
    levels = [a for i, a in enumerate(levels) if all(abs(a / b - 1) > 3e-5 for b in levels[:i])]
    for table in (None, sigma_table()):
        assert len(set(level_numbers(torch.tensor(levels), table))) == len(levels)


def test_no_levels_have_no_numbers():
    assert level_numbers(torch.ones(0), sigma_table()) == level_numbers(torch.ones(0)) == []


@pytest.mark.parametrize("dtype", [torch.float16, torch.float64])
def test_the_dtype_of_sigmas_or_table_does_not_change_the_numbers(dtype):
    """Of levels that both dtypes hold exactly."""
    table = torch.linspace(0.25, 64.0, 256)
    levels = table[[200, 100, 3]]
    expected = level_numbers(levels, table)
    assert level_numbers(levels, table.to(dtype)) == expected
    assert level_numbers(levels.to(dtype), table) == expected


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_noise_is_drawn_on_the_cpu_and_given_where_the_latent_is(dtype):
    """The device "meta" is the one other device that every machine has."""
    expected = StepNoise(3)(1, like(2, dtype))
    with torch.device("meta"):
        assert torch.equal(StepNoise(3)(1, torch.zeros(2, *LATENT, dtype=dtype, device="cpu")), expected)
    elsewhere = StepNoise(3)(1, like(2, dtype).to("meta"))
    assert (elsewhere.device.type, elsewhere.dtype) == ("meta", dtype)
