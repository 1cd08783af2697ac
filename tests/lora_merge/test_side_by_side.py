"""Sums of plain LoRAs, made when somebody asks for them, and the peace in which files are read."""

import copy
import gc
import pickle
import threading
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file

from lcm_kit.lora_merge import Lora, LoraLayer, load, merge, save
from lcm_kit.lora_merge.algebra.precision import holds
from lcm_kit.lora_merge.algebra.sums import weighted_sum
from lcm_kit.lora_merge.disk.garbage import uncollected
from lcm_kit.lora_merge.updates.layer import Share, shaped
from lcm_kit.lora_merge.updates.side_by_side import Sum, put, shares_of, side_by_side, stored
from lcm_kit.lora_merge.updates.unmade import Unmade

HALF, BRAIN, FULL = torch.float16, torch.bfloat16, torch.float32
MODULES = ["lora_unet_down_blocks_0_attentions_0_proj_in", "lora_unet_mid_block_resnets_0_conv1"]
KERNELS = [(), (3, 3)]


def layer(rank, alpha, dtype, seed, kernel=(), by=0.1):
    g = torch.Generator().manual_seed(seed)
    up = torch.randn(12, rank, *(1 for _ in kernel), generator=g) * by
    down = torch.randn(rank, 8, *kernel, generator=g) * by
    return LoraLayer(up.to(dtype), down.to(dtype), alpha)


def made(lora):
    return [module for module, one in lora.modules.items() if {"up", "down"} & vars(one).keys()]


def pair():
    first = {m: layer(4, 2.0, HALF, 1, k) for m, k in zip(MODULES, KERNELS, strict=True)}
    second = {m: layer(3, None, FULL, 2, k) for m, k in zip(MODULES, KERNELS, strict=True)}
    return [(Lora(first, source="first"), 0.8), (Lora(second, source="second"), -1.5)]


@pytest.mark.parametrize("format", ["kohya", "diffusers"])
@pytest.mark.parametrize("dtype", [HALF, BRAIN, FULL])
def test_a_file_is_written_from_a_sum_that_nobody_makes(tmp_path, dtype, format):
    merged = merge(pair(), out_dtype=dtype)
    path = tmp_path / "merged.safetensors"
    save(merged, path, dtype=dtype, format=format)
    assert all(isinstance(one, Sum) for one in merged.modules.values())
    assert not made(merged)
    state = merged.to_state_dict(dtype, format=format)
    assert not made(merged)
    found = load_file(path)
    assert found.keys() == state.keys()
    for key, tensor in found.items():
        assert tensor.dtype == state[key].dtype
        assert torch.equal(tensor, state[key]), key


@pytest.mark.parametrize("dtype", [HALF, BRAIN, FULL])
@pytest.mark.parametrize("kernel", KERNELS)
def test_a_sum_is_its_shares_side_by_side_rounded_once(dtype, kernel):
    one, other = layer(4, 2.0, HALF, 1, kernel), layer(3, None, FULL, 2, kernel)
    total = weighted_sum([(one, 0.8), (other, -1.5)], dtype)
    # 0.8 * 2 / 4 = 0.4 goes into alpha; -1.5 / 0.4 = -3.75 is shared as -1.875 and 2 (2 ** round(log2(3.75) / 2)).
    up = torch.cat([one.up.float(), other.up * (-1.5 / 0.4 / 2)], dim=1).to(dtype)
    down = torch.cat([one.down.float(), other.down * 2.0]).to(dtype)
    assert (total.rank, total.dim, total.shape) == (7, 7, (12, 8, *kernel))
    assert total.alpha == pytest.approx(0.4 * 7, rel=1e-15)
    assert total.parameters == up.numel() + down.numel()
    assert total.dtypes == {dtype}
    assert torch.equal(total.up, up)
    assert torch.equal(total.down, down)
    assert total.up is total.up


def test_a_copy_of_a_sum_is_a_plain_layer_with_the_same_bits():
    total = weighted_sum([(layer(4, 2.0, HALF, 1), 0.3), (layer(3, None, HALF, 2), 1.0)], HALF)
    for again in (copy.deepcopy(total), pickle.loads(pickle.dumps(total)), total.with_parts(total.parts())):
        assert type(again) is LoraLayer
        assert again.alpha == total.alpha
        assert torch.equal(again.up, total.up)
        assert torch.equal(again.down, total.down)
    halved = replace(total, alpha=3.5)
    assert halved.alpha == 3.5
    assert torch.equal(halved.up, total.up)


@pytest.mark.parametrize("dtype", [HALF, BRAIN, FULL])
@pytest.mark.parametrize("given", [HALF, FULL])
@pytest.mark.parametrize("column", [1.0, 0.0, 1e-3, 1e3, float("nan"), float("inf")])
@pytest.mark.parametrize("by", [1.0, 1e-3, 1e-5, 1e-9, 5e2, 6e5, 1e7])
def test_what_a_sum_holds_is_told_from_its_shares_as_from_what_they_make(dtype, given, column, by):
    one, other = layer(4, None, given, 3, by=0.5), layer(2, None, HALF, 4)
    up = one.up.clone()
    up[:, 2] *= column
    shares = [Share(up, one.down, by, 1.0), Share(other.up, other.down)]
    total = side_by_side(shares, (12, 8), dtype)
    # What goes in as it came has lost nothing, whatever there is of it.
    looked_at = shares[:1] if by != 1 or given != dtype else []
    made = [side_by_side([share], (12, 8), dtype) for share in looked_at]
    alive = bool(total.up.isfinite().all())
    assert holds(total) == (alive and all(holds(shaped(one.up, one.down, (12, 8))) for one in made))


def test_a_row_far_down_that_is_large_enough_counts():
    up = torch.zeros(200, 2, dtype=HALF)
    up[150] = 1.0
    assert holds(LoraLayer(up, torch.ones(2, 200, dtype=HALF)))
    assert not holds(LoraLayer(up * 0, torch.ones(2, 200, dtype=HALF)))


def test_no_collection_happens_while_a_file_is_read_merged_and_written(tmp_path):
    path = tmp_path / "first.safetensors"
    save(pair()[0][0], path)
    seen = []

    def note(phase, info):
        seen.append(info["generation"])

    before = gc.get_threshold()
    gc.collect()
    gc.callbacks.append(note)
    gc.set_threshold(5, 1, 1)
    try:
        lora = load(path)
        merged = merge([(lora, 1.0)])
        save(merged, tmp_path / "again.safetensors")
        # Between the three calls and after them it is as it was.
        assert len(seen) < 20
        assert gc.isenabled()
    finally:
        gc.set_threshold(*before)
        gc.callbacks.remove(note)


def test_the_last_who_leaves_turns_collection_on_again_and_who_had_it_off_keeps_it_off():
    inside, leave = threading.Event(), threading.Event()

    def other():
        with uncollected():
            inside.set()
            leave.wait(30)

    thread = threading.Thread(target=other)
    with uncollected():
        thread.start()
        assert inside.wait(30)
    assert not gc.isenabled()
    leave.set()
    thread.join()
    assert gc.isenabled()
    gc.disable()
    try:
        with uncollected():
            pass
        assert not gc.isenabled()
    finally:
        gc.enable()


def test_who_leaves_looks_at_what_is_new_and_not_at_everything():
    """A full collection would be due as soon as collection is on again."""
    seen = []

    def note(phase, info):
        seen.append(info["generation"])

    before = gc.get_threshold()
    gc.collect()
    gc.set_threshold(1000, 1, 1)
    gc.disable()
    # Many, since Python waits until a quarter of all is new.
    due = [[] for _ in range(len(gc.get_objects()))]
    for _ in range(3):
        gc.collect(1)
    gc.enable()
    gc.callbacks.append(note)
    try:
        with uncollected():
            kept = [[] for _ in range(5000)]
            due.append(kept)
        found = max(seen)
    finally:
        gc.callbacks.remove(note)
        gc.set_threshold(*before)
    assert found == 0, (len(due), len(kept))


@pytest.mark.parametrize("number", [1, 2, -1, 0.3])
@pytest.mark.parametrize("given", [HALF, BRAIN, FULL])
@pytest.mark.parametrize("wanted", [HALF, BRAIN, FULL])
@pytest.mark.parametrize("turned", [False, True])
def test_a_factor_is_put_as_its_product_in_float32_whether_it_is_there_or_in_a_file(number, given, wanted, turned):
    factor = layer(4, None, given, 3).up
    unmade = Unmade(dtype=given, shape=factor.shape, write=lambda place: place.copy_(factor), device=factor.device)
    for one in (factor, unmade):
        place = torch.zeros(factor.shape[::-1], dtype=wanted).T if turned else torch.zeros(factor.shape, dtype=wanted)
        put(one, number, place)
        assert torch.equal(place, (factor.float() * number).to(wanted))


def in_a_file(tensor, *, of_file=True):
    """As a factor that lies in a file is."""
    return Unmade(
        tensor.dtype, tensor.shape, lambda place: place.copy_(tensor.view(place.shape)), tensor.device, of_file
    )


@pytest.mark.parametrize("dtype", [HALF, FULL])
@pytest.mark.parametrize("count", [1, 2, 3])
@pytest.mark.parametrize("there", [[], [0], [0, 1], [0, 1, 2]])
def test_a_sum_is_the_same_wherever_its_shares_lie(dtype, count, there):
    """In memory or in a file, with factors of their own numbers, as at strength 1 without alpha."""
    layers = [layer(rank, None, dtype, rank) for rank in range(2, 2 + count)]
    shares = [
        Share(one.up, one.down) if index in there else Share(in_a_file(one.up), in_a_file(one.down))
        for index, one in enumerate(layers)
    ]
    total = side_by_side(shares, (12, 8), dtype)
    up, down = torch.cat([one.up for one in layers], dim=1), torch.cat([one.down for one in layers])
    for found, wanted in ((total.up, up), (total.down, down), *zip(total.parts().values(), (up, down), strict=True)):
        assert torch.equal(found, wanted)
    # A file gives the same whenever it is asked: what needs more than files says so, and what needs none is kept.
    in_memory = sum(index in there for index in range(count))
    pieces = total.pieces().values()
    assert {isinstance(piece, Unmade) and piece.of_file for piece in pieces} == {in_memory == 0}
    assert (total.up is total.up) == (total.down is total.down) == (in_memory == count)


@pytest.mark.parametrize("wanted", [HALF, BRAIN, FULL])
@pytest.mark.parametrize("dtype", [HALF, BRAIN, FULL])
@pytest.mark.parametrize("by", [(1.0, 1.0), (1.0, 0.3), (0.7, 0.3)])
def test_a_sum_in_another_dtype_has_its_own_numbers_rounded(by, dtype, wanted):
    """Not those of what it is made of, which it has rounded already; made when somebody asks where they are the same."""
    layers = [layer(rank, None, dtype, rank) for rank in (2, 3)]
    total = side_by_side([Share(one.up, one.down, b, b) for one, b in zip(layers, by, strict=True)], (12, 8), dtype)
    found = total.in_dtype(wanted)
    unrounded = dtype == FULL or by == (1.0, 1.0)
    assert all(isinstance(piece, Unmade) == (unrounded or wanted == dtype) for piece in found.pieces().values())
    assert torch.equal(found.up, total.up.to(wanted))
    assert torch.equal(found.down, total.down.to(wanted))
    assert (found.alpha, found.dtypes) == (5.0, {wanted})


@pytest.mark.parametrize("kernel", KERNELS)
def test_stored_factors_of_a_sum_are_matrices_once_they_are_made(kernel):
    total = weighted_sum([(layer(4, 2.0, HALF, 1, kernel), 0.3), (layer(3, None, HALF, 2, kernel), 1.0)], HALF)
    up, down = total.up.flatten(1), total.down.flatten(1)
    assert all(map(torch.equal, total.stored_factors(), (up, down)))


def test_factors_of_a_file_that_are_of_two_dtypes_are_read_as_they_are():
    one = layer(4, 2.0, FULL, 1)
    found = stored(in_a_file(one.up.half()), in_a_file(one.down), 2.0)
    assert (found.up.dtype, found.down.dtype, found.alpha) == (HALF, FULL, 2.0)
    assert torch.equal(found.up, one.up.half())
    assert torch.equal(found.down, one.down)


def test_who_asks_together_shares_one_tensor_and_it_is_known_again():
    one, other = (in_a_file(layer(4, None, HALF, seed).up) for seed in (1, 2))
    assert not one.gave(None)
    first = one.shared()
    assert one.shared() is first
    assert one.gave(first)
    assert not one.gave(first.clone())
    assert not one.gave(None)
    assert not other.gave(first)
    assert not one.gave(other.shared())
    before = first.clone()
    del first
    assert not one.gave(None)  # nobody has it any more
    assert torch.equal(one.shared(), before)


@pytest.mark.parametrize("dtype", [HALF, FULL])
def test_a_sum_of_sums_is_told_as_the_updates_that_it_is_made_of(dtype):
    """Unless its numbers were rounded: what was rounded is not their sum."""
    layers = [layer(rank, None, HALF, rank) for rank in (2, 3, 4)]
    inner = side_by_side(
        [Share(one.up, one.down, above, 0.5) for one, above in zip(layers, (0.3, -2.0), strict=False)], (12, 8), dtype
    )
    up, down = inner.stored_factors()
    outer = side_by_side([Share(up, down, 0.7, 3.0), Share(layers[2].up, layers[2].down)], (12, 8), FULL)
    shares = shares_of(*outer.stored_factors())
    if dtype == HALF:
        assert [share.up for share in shares] == [up, layers[2].up]
        return
    assert [(share.up, share.down) for share in shares] == [(one.up, one.down) for one in layers]
    assert [share.above * share.below for share in shares] == pytest.approx(
        [0.3 * 0.5 * 0.7 * 3, -2 * 0.5 * 0.7 * 3, 1]
    )
    sums = sum(share.above * share.below * share.up.double() @ share.down.double() for share in shares)
    torch.testing.assert_close(sums, outer.delta().double(), rtol=1e-5, atol=1e-6)


def test_factors_that_are_not_side_by_side_of_the_same_ranks_are_themselves():
    first, second = (
        side_by_side([Share(one.up, one.down) for one in layers], (12, 8), FULL).stored_factors()
        for layers in (
            [layer(2, None, HALF, 1), layer(3, None, HALF, 2)],
            [layer(3, None, HALF, 3), layer(2, None, HALF, 4)],
        )
    )
    (only,) = shares_of(first[0], second[1])
    assert (only.up, only.down) == (first[0], second[1])
    (only,) = shares_of(torch.ones(3, 2), torch.ones(2, 4))
    assert (only.above, only.below) == (1, 1)


@pytest.mark.parametrize("there", [True, False])
@pytest.mark.parametrize("count", [1, 2])
def test_factors_have_the_shape_that_was_asked_for_wherever_they_lie(count, there):
    """A convolution's update as that of a matrix."""
    layers = [layer(rank, None, FULL, rank, (3, 3)) for rank in range(2, 2 + count)]
    shares = [Share(*(one.stored_factors() if there else map(in_a_file, (one.up, one.down)))) for one in layers]
    total = side_by_side(shares, (12, 72), FULL)
    assert torch.equal(total.up, torch.cat([one.up.flatten(1) for one in layers], dim=1))
    assert torch.equal(total.down, torch.cat([one.down.flatten(1) for one in layers]))
    assert [piece.shape for piece in total.pieces().values()] == [total.up.shape, total.down.shape]
