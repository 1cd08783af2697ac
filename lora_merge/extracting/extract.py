"""A LoRA out of two models: the difference of their weights in a small rank, the best there is of that rank."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from ..algebra.precision import is_finite
from ..files.lora import Lora
from ..keywords import named
from ..metadata.fields import ARCHITECTURE
from ..naming import names, unet
from ..naming.unet import infer_layout
from ..recognise.identity import architecture_of
from ..updates.layer import Layer, shaped

# Name of a weight as its module is spelt, with ".weight" or ".bias"; the weight of the tuned model; that of the base.
Weights = tuple[str, Tensor, Tensor]
Device = Callable[[Tensor], str | torch.device] | str | torch.device
# Ends a name for which LoRA files have none.
NAMELESS = " (no LoRA name)"


@dataclass(frozen=True, kw_only=True)
class Extraction:
    """What became of every weight. modules: with a LoRA.   vectors: biases and norms, kept whole.
    equal: weights that do not differ.   other: names of differing parameters that are not extracted: of no module's
        weight or bias, or no floating point.   unwanted: names of differing biases and norms, left out on request.
    ranks: smallest and largest, None without modules.   error: relative, of all weights with a LoRA together, 0..1,
        measured on the float32 factors.   energy: squared norm of the difference in those weights.
    """

    modules: int
    vectors: int
    equal: int
    other: tuple[str, ...]
    ranks: tuple[int, int] | None
    error: float
    energy: float
    unwanted: tuple[str, ...] = ()


@named
def extract(
    weights: Iterable[Weights],
    *,
    rank: int = 64,
    keep: float = 1.0,
    source: str = "extracted",
    device: Device = "cpu",
    dtype: torch.dtype = torch.float32,
    vectors: bool = True,
) -> tuple[Lora, Extraction]:
    """The LoRA that makes the tuned model out of the base at strength 1, as well as `rank` allows.

    weights: (name, tuned, base) one after the other; only one pair is held at a time. name: the module as a LoRA file
        spells it (lora_unet_..., diffusion_model.x.y, lora_te_...), with ".weight" or ".bias" at its end. Matrices and
        convolutions become low-rank updates, vectors whole differences. Other parameters are listed in the Extraction: a
        file could hold their differences, but most loaders would not find them. 8-bit floats and signed integers count
        as the numbers that they are.
    rank: the largest of any module, 1 or more.   keep: (0, 1], stop at the smallest rank that holds this share of a
        module's energy (squared norm).
    device: where to compute, or what tells it for each difference; one without float64 passes work to the CPU.
    dtype: of the result's tensors, which are on the CPU. Computed in float64, nothing is clamped.
    vectors: False leaves biases and norms out, which tools other than ComfyUI may not read; they are named then.
    Components below float32's rounding of the weights themselves are no difference.
    Raises ValueError for rank or keep out of range, weights of different shape, and values that are not finite.
    """
    if rank < 1:
        raise ValueError(f"rank is {rank}, but the smallest rank is 1")
    if not 0 < keep <= 1:
        raise ValueError(f"keep is {keep:g}; it is a share of the energy, above 0 and at most 1.")
    found = _Found(rank=rank, keep=keep, device=device, dtype=dtype, vectors=vectors)
    for name, tuned, base in weights:
        found.add(name, tuned, base)
    _as_norms(found.diffs)
    return _lora(found.layers, found.diffs, source), found.extraction()


@dataclass(eq=False, kw_only=True)
class _Found:
    """What the weights so far came to. rank to vectors: those of `extract`.   energy, lost: of the low-rank updates."""

    rank: int
    keep: float
    device: Device
    dtype: torch.dtype
    vectors: bool
    layers: dict[str, Layer] = field(default_factory=dict)
    diffs: dict[tuple[str, str], Tensor] = field(default_factory=dict)
    equal: int = 0
    other: list[str] = field(default_factory=list)
    unwanted: list[str] = field(default_factory=list)
    energy: float = 0.0
    lost: float = 0.0

    def add(self, name: str, tuned: Tensor, base: Tensor) -> None:
        if tuned.shape != base.shape:
            raise ValueError(
                f"{name}: the tuned model has {tuple(tuned.shape)}, the base {tuple(base.shape)}. "
                "The two models are not of one family."
            )
        tuned, base = _plain(tuned), _plain(base)
        if tuned is base or torch.equal(tuned, base):
            self.equal += 1
        elif not _is_of_module(name, tuned):
            self.other.append(name)
        elif tuned.ndim == 1 and not self.vectors:
            self.unwanted.append(name)
        elif tuned.ndim == 1:
            self._add_vector(name, tuned, base)
        else:
            self._add_matrix(name, tuned, base)

    def _add_vector(self, name: str, tuned: Tensor, base: Tensor) -> None:
        diff = (tuned.double() - base.double()).to("cpu", self.dtype)
        _check(name, diff, tuned, base)
        module, _, part = name.rpartition(".")
        self.diffs[module, "diff_b" if part == "bias" else "w_norm"] = diff

    def _add_matrix(self, name: str, tuned: Tensor, base: Tensor) -> None:
        best = _best(name, tuned, base, self.rank, self.keep, self.device)
        if best is None:
            self.equal += 1
            return
        up, down, whole, missed = best
        layer = shaped(up.to("cpu", self.dtype), down.to("cpu", self.dtype), tuple(tuned.shape))
        self.layers[name.rpartition(".")[0]] = layer
        self.energy += whole
        self.lost += missed

    def extraction(self) -> Extraction:
        ranks = [layer.rank for layer in self.layers.values()]
        return Extraction(
            modules=len(self.layers),
            vectors=len(self.diffs),
            equal=self.equal,
            other=tuple(self.other),
            ranks=(min(ranks), max(ranks)) if ranks else None,
            error=math.sqrt(self.lost / self.energy) if self.energy > 0 else 0.0,
            energy=self.energy,
            unwanted=tuple(self.unwanted),
        )


def _is_of_module(name: str, weight: Tensor) -> bool:
    """Whether it is the weight or bias of a module, in floating point."""
    _, dot, part = name.rpartition(".")
    return part in ("weight", "bias") and bool(dot) and weight.ndim > 0 and weight.is_floating_point()


def _plain(weight: Tensor) -> Tensor:
    # 8-bit numbers have no arithmetic in torch; float16 holds all of them.
    return weight.half() if weight.dtype.itemsize == 1 and weight.dtype not in (torch.uint8, torch.bool) else weight


def _best(
    name: str, tuned: Tensor, base: Tensor, rank: int, keep: float, device: Device
) -> tuple[Tensor, Tensor, float, float] | None:
    """(out, r), (r, in * kernel) float32, the difference's energy, and that of what is missed; None for no difference.

    The nearest of its rank (Eckart and Young 1936), from the eigenvectors of the smaller of D D^T and D^T D in float64:
    good to 1e-8 of the largest singular value, which float32 factors cannot tell from exact, in a tenth of an SVD's time.
    """
    where = torch.device(device(tuned) if callable(device) else device)
    if where.type == "mps":  # no float64 there
        where = torch.device("cpu")
    diff = tuned.to(where, torch.float64, copy=True).flatten(1)
    size = float(torch.linalg.vector_norm(diff)) / math.sqrt(diff.numel())
    diff -= base.to(where).flatten(1)
    _check(name, diff, tuned, base)
    # What rounding the weights to float32 alone makes: entries of size eps * weight, in a random matrix.
    noise = torch.finfo(torch.float32).eps * size * (math.sqrt(diff.shape[0]) + math.sqrt(diff.shape[1]))
    tall = diff.shape[0] > diff.shape[1]
    wide = diff.T if tall else diff
    values, vectors = torch.linalg.eigh(wide @ wide.T)
    values, vectors = values.flip(0).clamp(min=0), vectors.flip(1)
    used = min(rank, int((values > max(noise**2, 1e-14 * float(values[0]))).sum()))
    if used == 0:
        return None
    if keep < 1:
        held = values.cumsum(0)
        used = min(used, int((held < keep * (1 - 1e-12) * held[-1]).sum()) + 1)
    u, s = vectors[:, :used], values[:used].sqrt()
    root = s.sqrt()
    # Both factors alike in size, which suits float16 best.
    short, long = u * root, (u.T @ wide) / root[:, None]
    up, down = (long.T.float(), short.T.float()) if tall else (short.float(), long.float())
    missed = torch.addmm(diff.float(), up, down, alpha=-1)
    return up, down, _energy(diff), _energy(missed)


def _energy(matrix: Tensor) -> float:
    return float(torch.linalg.vector_norm(matrix, dtype=torch.float64)) ** 2


def _check(name: str, diff: Tensor, tuned: Tensor, base: Tensor) -> None:
    if is_finite(diff):
        return
    if whose := " and of ".join(
        whose for whose, weight in (("the tuned model", tuned), ("the base", base)) if not is_finite(weight)
    ):
        raise ValueError(
            f"{name}: the weights of {whose} are not all finite numbers. Load the models again, in float32 if need be."
        )
    raise ValueError(f"{name}: the two models differ by more than the dtype of the result can hold. Take float32.")


def _as_norms(diffs: dict[tuple[str, str], Tensor]) -> None:
    """Renames diff_b to b_norm beside a w_norm, as LyCORIS pairs them."""
    for module, part in list(diffs):
        if part == "diff_b" and (module, "w_norm") in diffs:
            diffs[module, "b_norm"] = diffs.pop((module, part))


def _lora(layers: dict[str, Layer], diffs: dict[tuple[str, str], Tensor], source: str) -> Lora:
    modules = dict.fromkeys([*layers, *(module for module, _ in diffs)])
    spelled = {module: names.kohya_name(module) for module in modules}
    bodies = names.unet_bodies(spelled.values())
    layout = infer_layout(bodies)
    mixed = any(map(unet.is_diffusers, bodies)) and any(map(unet.is_ldm, bodies))
    if mixed:
        raise ValueError(f"{source}: its weights mix the block names of diffusers with those of ldm.")
    found = {module: names.canonical(spelling, layout) for module, spelling in spelled.items()}
    lora = Lora(
        modules={found[module]: layer for module, layer in layers.items()},
        diffs={(found[module], part): diff for (module, part), diff in diffs.items()},
        spellings={found[module]: spelling for module, spelling in spelled.items()},
        metadata={"modelspec.title": source},
        source=source,
    )
    architecture = architecture_of(lora)
    return replace(lora, metadata={**lora.metadata, ARCHITECTURE: architecture}) if architecture else lora
