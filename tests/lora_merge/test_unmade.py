"""Factors that stay in their file until they are needed, and what becomes of them when the file does not stay as it was."""

import gc
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from lcm_kit.lora_merge import Lora, load, merge, resize, save
from lcm_kit.lora_merge.algebra.precision import holds
from lcm_kit.lora_merge.comparing.compare import compare
from lcm_kit.lora_merge.disk import tensor_file
from lcm_kit.lora_merge.disk.tensor_file import count_open
from lcm_kit.lora_merge.files import load_save
from lcm_kit.lora_merge.updates import unmade as unmade_module
from lcm_kit.lora_merge.updates.layer import LoraLayer, Share, largest
from lcm_kit.lora_merge.updates.side_by_side import side_by_side, stored
from lcm_kit.lora_merge.updates.unmade import Unmade, borrowed_bytes, extremes, magnitude
from lcm_kit.tests.lora_merge import kinds

ROOT = Path(__file__).resolve().parents[2]
HALF, BRAIN, FULL = torch.float16, torch.bfloat16, torch.float32
LINEAR, CONV, FLAT = (
    "lora_unet_down_blocks_0_attentions_0_proj_in",
    "lora_unet_mid_block_resnets_0_conv1",
    "lora_unet_mid_block_resnets_1_conv1",
)
ONLY_POSIX = pytest.mark.skipif(os.name != "posix", reason="Windows replaces no file that is open")


def state(rank, dtype, seed, alpha=2.0):
    g = torch.Generator().manual_seed(seed)

    def normal(*shape):
        return (0.1 * torch.randn(*shape, generator=g)).to(dtype)

    return {
        f"{LINEAR}.lora_up.weight": normal(24, rank),
        f"{LINEAR}.lora_down.weight": normal(rank, 16),
        f"{LINEAR}.alpha": torch.tensor(alpha),
        f"{CONV}.lora_up.weight": normal(24, rank, 1, 1),
        f"{CONV}.lora_down.weight": normal(rank, 16, 3, 3),
        # Some trainers write a convolution's up without its ones.
        f"{FLAT}.lora_up.weight": normal(24, rank),
        f"{FLAT}.lora_down.weight": normal(rank, 16, 3, 3),
    }


@pytest.fixture
def large(monkeypatch):
    """Every file is a large one."""
    monkeypatch.setattr(load_save, "_STREAMED", 0)


def put(path, tensors):
    save_file(tensors, path)
    return path


def both(monkeypatch, path):
    """(the LoRA of which all is in memory, the one that stays in its file)"""
    monkeypatch.setattr(load_save, "_STREAMED", 1 << 40)
    kept = load(path)
    monkeypatch.setattr(load_save, "_STREAMED", 0)
    return kept, load(path)


def unmade(lora):
    return [m for m, layer in lora.modules.items() if any(isinstance(p, Unmade) for p in layer.pieces().values())]


@ONLY_POSIX
@pytest.mark.parametrize("dtype", [HALF, BRAIN, FULL])
def test_a_lora_that_stays_in_its_file_is_the_one_that_is_read_at_once(tmp_path, monkeypatch, dtype):
    kept, there = both(monkeypatch, put(tmp_path / "x.safetensors", state(3, dtype, 1)))
    assert unmade(there) == [*there.modules]
    assert unmade(kept) == []
    for module, layer in there.modules.items():
        other = kept.modules[module]
        for name in (
            "shape",
            "rank",
            "dim",
            "alpha",
            "scale",
            "written_alpha",
            "parameters",
            "dtypes",
            "device",
            "kind",
        ):
            assert getattr(layer, name) == getattr(other, name), name
        for one, two in zip(layer.factors(), other.factors(), strict=True):
            assert torch.equal(one, two)
        assert layer.parts().keys() == other.parts().keys()
        assert all(torch.equal(layer.parts()[part], tensor) for part, tensor in other.parts().items())
        assert torch.equal(layer.delta(), other.delta())
    # Nothing of it was kept.
    assert unmade(there) == [*there.modules]
    for dtype_out in (None, HALF, BRAIN, FULL):
        one, two = kept.to_state_dict(dtype_out), there.to_state_dict(dtype_out)
        assert one.keys() == two.keys()
        assert all(torch.equal(one[key], two[key]) and one[key].shape == two[key].shape for key in one)


ROADS = {
    "exact": lambda loras: merge([(loras[0], 0.7), (loras[1], -1.0)], out_dtype=HALF),
    "a merge of a merge": lambda loras: merge([(merge([(loras[0], 0.5)]), 1.0), (loras[1], 2.0)], out_dtype=BRAIN),
    "rank 2": lambda loras: merge([(loras[0], 0.7), (loras[1], 1.0)], rank=2, out_dtype=HALF),
    "ties": lambda loras: merge([(loras[0], 0.7), (loras[1], 1.0)], method="ties"),
    "kept": lambda loras: resize(loras[0], keep=0.5),
    "as it is": lambda loras: loras[1],
}


@ONLY_POSIX
@pytest.mark.parametrize("road", ROADS)
def test_what_is_made_of_it_has_the_same_bytes(tmp_path, monkeypatch, road):
    """float16: what is float32 in the file lies where it lies, which products of matrices may depend on."""
    pairs = [
        both(monkeypatch, put(tmp_path / f"{n}.safetensors", state(2 + n, dtype, n)))
        for n, dtype in enumerate((HALF, HALF))
    ]
    files = []
    for which, loras in enumerate(zip(*pairs, strict=True)):
        files.append(tmp_path / f"out{which}.safetensors")
        save(ROADS[road](loras), files[-1])
    assert load_file(files[0]).keys() == load_file(files[1]).keys()
    a, b = (path.read_bytes() for path in files)
    begin = [8 + int.from_bytes(whole[:8], "little") for whole in (a, b)]
    assert a[begin[0] :] == b[begin[1] :]


@ONLY_POSIX
def test_kinds_that_are_no_plain_lora_are_read_at_once(tmp_path, monkeypatch):
    tensors = {}
    for n, kind in enumerate(["LoHa", "LoKr, both whole", "DoRA, rows", "LoCon with a core"]):
        kernel = (3, 3) if kind == "LoCon with a core" else ()
        tensors |= kinds.state_dict(kind, f"lora_unet_x_{n}", kernel=kernel, alpha=1.5)
    kept, there = both(monkeypatch, put(tmp_path / "x.safetensors", tensors))
    assert unmade(there) == []
    assert there.kinds == kept.kinds
    one, two = kept.to_state_dict(), there.to_state_dict()
    assert all(torch.equal(one[key], two[key]) for key in one)


READINGS = ROADS | {
    "compared": lambda loras: compare([(lora, 1.0) for lora in loras]),
    "in memory": lambda loras: loras[1].to_state_dict(),
    "one update": lambda loras: [loras[1].delta(module) for module in (LINEAR, CONV)],
    "a factor": lambda loras: [(layer.up, layer.down) for layer in loras[1].modules.values()],
}


def written(reading, loras, out):
    made = reading(loras)
    if isinstance(made, Lora):
        save(made, out, overwrite=True)


@ONLY_POSIX
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("key", [f"{LINEAR}.lora_up.weight", f"{CONV}.lora_down.weight"])
@pytest.mark.parametrize("dtype", [HALF, BRAIN, FULL])
@pytest.mark.parametrize("reading", READINGS)
def test_values_that_are_no_numbers_are_found_when_they_are_read(tmp_path, large, reading, dtype, key, value):
    broken, out = state(3, dtype, 1), tmp_path / "out.safetensors"
    broken[key].view(-1)[-1] = value
    paths = [put(tmp_path / "whole.safetensors", state(2, dtype, 2)), put(tmp_path / "x.safetensors", broken)]
    save(load(paths[0]), out)
    before = out.read_bytes()
    # A LoRA that is cut alone is the first.
    loras = [load(path) for path in (reversed(paths) if reading == "kept" else paths)]
    with pytest.raises(ValueError, match=rf"x\.safetensors: NaN or infinite values in {key}"):
        written(READINGS[reading], loras, out)
    assert out.read_bytes() == before
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out.safetensors", "whole.safetensors", "x.safetensors"]


@ONLY_POSIX
@pytest.mark.parametrize(
    ("up", "down", "words"),
    [
        ((4,), (3, 5), "at least two dimensions"),
        ((4, 2), (3, 5), "ranks 2 and 3 differ"),
        ((4, 0), (3, 5), "no values"),
    ],
)
def test_shapes_that_do_not_belong_together_are_refused_as_ever(tmp_path, large, up, down, words):
    tensors = {"lora_unet_x.lora_up.weight": torch.ones(up), "lora_unet_x.lora_down.weight": torch.ones(down)}
    with pytest.raises(ValueError, match=words):
        load(put(tmp_path / "x.safetensors", tensors))


CHANGES = {
    "cut off": lambda path: os.truncate(path, 700),
    "emptied": lambda path: path.write_bytes(b""),
    "written to": lambda path: (path.write_bytes(path.read_bytes()[::-1]), os.utime(path, (5, 5))),
}


@ONLY_POSIX
@pytest.mark.parametrize("change", CHANGES)
def test_a_file_that_was_changed_is_refused_in_words_and_nothing_is_written(tmp_path, large, change):
    path = put(tmp_path / "x.safetensors", state(3, HALF, 1))
    lora = load(path)
    merged = merge([(lora, 0.5)])
    CHANGES[change](path)
    words = r"x\.safetensors: was changed by another program while it was read"
    with pytest.raises(ValueError, match=words):
        save(merged, tmp_path / "out.safetensors")
    assert [one.name for one in tmp_path.iterdir()] == ["x.safetensors"]
    for attempt in (lambda: merge([(lora, 1.0)], rank=1), lambda: compare([(lora, 1.0)]), lora.to_state_dict):
        with pytest.raises(ValueError, match=words):
            attempt()


@ONLY_POSIX
@pytest.mark.parametrize("replaced", [True, False])
def test_a_file_that_is_replaced_or_deleted_lives_on_for_who_has_it(tmp_path, large, replaced):
    path = put(tmp_path / "x.safetensors", state(3, HALF, 1))
    lora = load(path)
    wanted = lora.to_state_dict()
    if replaced:
        os.replace(put(tmp_path / "y.safetensors", state(2, HALF, 2)), path)
    else:
        path.unlink()
    # Also by what is made of it.
    save(merge([(lora, 1.0)]), path, overwrite="any")
    found = lora.to_state_dict()
    assert all(torch.equal(found[key], tensor) for key, tensor in wanted.items())


@ONLY_POSIX
def test_a_file_is_closed_when_its_lora_is_forgotten(tmp_path, large):
    gc.collect()
    before = count_open()
    lora = load(put(tmp_path / "x.safetensors", state(3, HALF, 1)))
    merged = merge([(lora, 1.0)])
    assert count_open() == before + 1
    del lora
    assert count_open() == before + 1
    del merged
    gc.collect()
    assert count_open() == before


@ONLY_POSIX
def test_of_very_many_files_only_some_are_held_open(tmp_path, large, monkeypatch):
    gc.collect()
    monkeypatch.setattr(load_save, "_OPEN", count_open() + 2)
    loras = [load(put(tmp_path / f"{n}.safetensors", state(3, HALF, n))) for n in range(4)]
    assert [bool(unmade(lora)) for lora in loras] == [True, True, False, False]


@ONLY_POSIX
def test_several_threads_read_what_one_reads(tmp_path, large):
    lora = load(put(tmp_path / "x.safetensors", state(3, HALF, 1)))
    pieces = [piece for layer in lora.modules.values() for piece in layer.pieces().values()]
    wanted = [piece.made() for piece in pieces]
    with ThreadPoolExecutor(8) as pool:
        for _ in range(20):
            assert all(map(torch.equal, pool.map(Unmade.made, pieces), wanted))


FORKED = """
import os, sys
import torch
from lora_merge import load
from lora_merge.files import load_save

load_save._STREAMED = 0
pieces = [p for layer in load(sys.argv[1]).modules.values() for p in layer.pieces().values()]
wanted = [piece.made() for piece in pieces]
child = os.fork()
right = all(torch.equal(piece.made(), one) for _ in range(500) for piece, one in zip(pieces, wanted))
if not child:
    os._exit(not right)
print(right, os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
"""


@ONLY_POSIX
def test_a_process_and_its_fork_read_side_by_side(tmp_path):
    """They share the file that is open, and the place in it."""
    path = put(tmp_path / "x.safetensors", state(3, HALF, 1))
    done = subprocess.run([sys.executable, "-c", FORKED, path], cwd=ROOT, capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (0, "True 0\n"), done.stderr


MEMORY = """
import resource, sys
import torch
from lora_merge import load, merge, save
from safetensors.torch import save_file

folder, rank = sys.argv[1], 0 if sys.argv[2] == "exact" else 64
def peak():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
def work(names):
    inputs = [(load(f"{folder}/{name}.safetensors"), 0.7) for name in names]
    save(merge(inputs, out_dtype=torch.float16, rank=rank), f"{folder}/out.safetensors", overwrite=True)
work(["small", "small"])
before = peak()
work(["a", "b"])
print(peak() - before)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="counts the process's memory as Linux does")
@pytest.mark.parametrize(("job", "share"), [("exact", 0.1), ("cut", 0.5)])
def test_an_exact_merge_needs_no_memory_for_its_inputs_and_a_cut_only_for_its_result(tmp_path, job, share):
    """Two files of 96 MB, 48 modules; a tenth is a few pieces at once, half is the cut's own result."""
    g = torch.Generator().manual_seed(0)
    shapes = {"up": (2048, 128), "down": (128, 6144)}
    for name, count in (("small", 3), ("a", 48), ("b", 48)):
        tensors = {
            f"lora_unet_x_{n}.lora_{part}.weight": 0.1 * torch.randn(shape, generator=g, dtype=FULL).half()
            for n in range(count)
            for part, shape in shapes.items()
        }
        save_file(tensors, tmp_path / f"{name}.safetensors")
    size = (tmp_path / "a.safetensors").stat().st_size / (1 << 20)
    command = [sys.executable, "-c", MEMORY, tmp_path, job]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "MALLOC_ARENA_MAX": "1"}
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    assert float(done.stdout) < share * size + 12


@pytest.mark.parametrize("dtype", [HALF, BRAIN, FULL])
@pytest.mark.parametrize("column", [1.0, 0.0, 1e-3, 1e3])
@pytest.mark.parametrize("by", [1.0, 1e-3, 1e-5, 1e-9, 5e2, 6e5, 1e7])
@pytest.mark.parametrize("rows", [3, 200])
def test_what_is_told_of_an_unmade_tensor_is_told_of_the_tensor(dtype, column, by, rows):
    up = 0.5 * torch.randn(rows, 4, generator=torch.Generator().manual_seed(1))
    up[:, 2] *= column
    up = up.to(dtype)
    down = torch.ones(4, 9, dtype=dtype)
    there = [Unmade(t.dtype, t.shape, lambda place, t=t: place.copy_(t), t.device) for t in (up, down)]
    assert largest(there[0]) == largest(up)
    shares = [Share(up, down, by, 1.0)], [Share(*there, by, 1.0)]
    told = [holds(side_by_side(one, (rows, 9), HALF)) for one in shares]
    assert told[0] == told[1]
    found = extremes(up)
    assert found.least <= float(up.float().abs().amax(dim=1 - found.component).min())
    layer = stored(*there, 3.0)
    assert torch.equal(layer.up, up)
    assert layer.alpha == LoraLayer(up, down, 3.0).alpha


def spread(tensor):
    """The same values, further apart in memory."""
    return torch.stack([tensor, tensor], dim=-1)[..., 0]


@pytest.mark.parametrize("form", [torch.Tensor.contiguous, spread])
@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, HALF, BRAIN, FULL, torch.float64])
@pytest.mark.parametrize("shape", [(100, 3), (3, 100), (5, 3, 2, 2), (40, 3, 2, 2), (3, 40, 2, 2), (7, 7)])
def test_extremes_are_those_of_the_values_and_of_the_components_along_the_rank(shape, dtype, form):
    """The rank is the shorter side, or the one that is asked for; of long components a beginning is looked at."""
    tensor = form(torch.randn(shape, generator=torch.Generator().manual_seed(2), dtype=FULL).to(dtype))
    matrix = tensor.double().flatten(1)
    for component, asked in ((int(matrix.shape[0] > matrix.shape[1]), None), (0, 0), (1, 1)):
        found = extremes(tensor, asked)
        assert found.largest == magnitude(tensor) == matrix.abs().max()
        assert found.component == component
        beginning = matrix.narrow(1 - component, 0, min(64, matrix.shape[1 - component]))
        assert found.least == pytest.approx(float(beginning.abs().amax(dim=1 - component).min()), rel=1e-7)


@pytest.mark.parametrize("form", [torch.Tensor.contiguous, spread])
@pytest.mark.parametrize("dtype", [torch.float8_e5m2, HALF, BRAIN, FULL, torch.float64])
@pytest.mark.parametrize("value", [0.0, -0.0, 1.0, -3.0, float("inf"), -float("inf"), float("nan"), -float("nan")])
@pytest.mark.parametrize("beside", [0.5, -0.5, 2.0, -2.0])
def test_the_largest_magnitude_is_that_of_the_values_whatever_their_sign(value, beside, dtype, form):
    found = magnitude(form(torch.tensor([beside, value, beside / 4]).to(dtype)))
    assert found == max(abs(value), abs(beside)) or (value != value and found != found)


@pytest.mark.parametrize("first", ["fill", "extremes"])
@pytest.mark.parametrize("broken", [False, True])
def test_a_factor_of_a_file_is_looked_at_once_where_it_is_whole_and_refused_whenever_it_is_not(
    monkeypatch, first, broken
):
    looks, real = [], unmade_module.magnitude
    monkeypatch.setattr(unmade_module, "magnitude", lambda tensor: looks.append(tensor.shape) or real(tensor))
    values = torch.tensor([[1.0, float("inf") if broken else 2.0]], dtype=torch.float64)
    factor = Unmade(
        values.dtype, values.shape, lambda place: place.copy_(values), values.device, called=("x", "y.lora_up")
    )
    for way in (first, "fill", "extremes"):
        with pytest.raises(ValueError, match=r"x: NaN or infinite values in y\.lora_up") if broken else nullcontext():
            assert way == "fill" or factor.extremes.largest == 2.0
            factor.fill(torch.empty(1, 2, dtype=torch.float64))
    assert broken or len(looks) == (1 if first == "extremes" else 2)


@pytest.mark.parametrize("dtype", [torch.float16, torch.float64])
def test_an_unmade_tensor_is_made_in_its_dtype_where_it_belongs(dtype):
    """meta stands for a device without numbers."""
    made = Unmade(dtype, torch.Size((2, 3)), lambda place: None, torch.device("meta")).made()
    assert (made.dtype, made.shape, made.device.type) == (dtype, (2, 3), "meta")
    with borrowed_bytes(7, torch.device("meta")) as memory:
        assert (memory.dtype, memory.shape, memory.device.type) == (torch.uint8, (7,), "meta")


def test_memory_that_is_lent_is_nobody_elses_meanwhile():
    with borrowed_bytes(8) as one, borrowed_bytes(8) as other:
        one.fill_(1)
        other.fill_(2)
        assert one.eq(1).all()
    where = one.data_ptr(), other.data_ptr()
    with borrowed_bytes(4) as again:
        assert again.data_ptr() in where


@pytest.mark.parametrize(("maps", "mapping", "mapped"), [(False, True, 0), (True, True, 1), (True, False, 0)])
def test_a_file_is_mapped_where_the_system_holds_it_and_the_caller_lets_it(
    tmp_path, monkeypatch, maps, mapping, mapped
):
    """Elsewhere whoever cuts a mapped file off ends this process; and what is held in its file is not mapped at all."""
    path, found = put(tmp_path / "x.safetensors", state(2, torch.float32, 0)), []
    mmap = tensor_file.mmap.mmap
    monkeypatch.setattr(tensor_file, "MAPPED_ABOVE", 0)
    monkeypatch.setattr(tensor_file.mmap, "mmap", lambda *a, **k: found.append(a) or mmap(*a, **k))
    assert load_save._MAPS is (os.name != "posix")
    monkeypatch.setattr(load_save, "_MAPS", maps)
    monkeypatch.setattr(load_save, "_STREAMED", 1 << 40)
    load(path, mapping=mapping)
    assert len(found) == mapped


@ONLY_POSIX
@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.float8_e5m2])
def test_8_bit_floats_are_read_at_once_for_nothing_can_be_computed_with_them(tmp_path, monkeypatch, dtype):
    path = put(tmp_path / "x.safetensors", {key: one.to(dtype) for key, one in state(3, HALF, 1).items()})
    kept, there = both(monkeypatch, path)
    assert unmade(there) == []
    for module in kept.modules:
        assert torch.equal(there.delta(module), kept.delta(module))


def test_memory_is_borrowed_where_a_tensor_belongs():
    """meta stands for a device without numbers."""
    with Unmade(HALF, torch.Size((2, 3)), lambda place: None, torch.device("meta")).borrowed() as there:
        assert (there.dtype, there.shape, there.device.type) == (HALF, (2, 3), "meta")
