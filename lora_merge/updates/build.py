"""Which kind of update the parts of a module make, whether they are complete, and the update itself."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from functools import lru_cache
from math import prod

from torch import Tensor

from ..words import many
from .layer import Layer, LoraLayer
from .loha import LohaLayer
from .lokr import LokrLayer
from .parts import DIFF_PARTS, WEIGHT_PARTS
from .side_by_side import stored
from .unmade import Unmade, made
from .weight_dependent import BOFT, BUNDLED, DORA, GLORA, OFT, REPLACED, RESIZED, Carried

# Kind -> parts that have to be there, parts that may.
_KINDS: dict[str, tuple[frozenset[str], frozenset[str]]] = {
    "LoRA": (frozenset({"up", "down"}), frozenset({"mid"})),
    "LoHa": (
        frozenset({"hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b"}),
        frozenset({"hada_t1", "hada_t2"}),
    ),
    # Which of them have to be there depends on one another: LokrLayer says what is missing.
    "LoKr": (
        frozenset(),
        frozenset({"lokr_w1", "lokr_w1_a", "lokr_w1_b", "lokr_w2", "lokr_w2_a", "lokr_w2_b", "lokr_t2"}),
    ),
    GLORA: (frozenset({"a1", "a2", "b1", "b2"}), frozenset()),
    OFT: (frozenset({"oft_blocks"}), frozenset({"rescale"})),
    REPLACED: (frozenset({"set_weight"}), frozenset()),
    BUNDLED: (frozenset({"bundle"}), frozenset()),
}
_KIND_OF = {part: kind for kind, (needed, allowed) in _KINDS.items() for part in needed | allowed}
ADDITIVE = ("LoRA", "LoHa", "LoKr")
# Parts that make an additive kind depend on the weight.
_MODIFIERS = {"dora_scale": DORA, "magnitude": DORA, "reshape_weight": RESIZED}
# Of any kind, without alpha.
PARTS = frozenset({*_KIND_OF, *_MODIFIERS, *DIFF_PARTS})


def kinds_of(parts: Collection[str]) -> list[str]:
    """The kinds that parts of one module belong to; more than one is a contradiction, none means differences only."""
    return list(dict.fromkeys(_KIND_OF[part] for part in parts if part in _KIND_OF))


def is_carried(parts: Collection[str]) -> bool:
    """Whether a module with these parts depends on the weight it changes."""
    return _is_carried(frozenset(parts))


# A file has thousands of modules, and a few sets of parts.
@lru_cache(maxsize=1024)
def _is_carried(parts: frozenset[str]) -> bool:
    return not _MODIFIERS.keys().isdisjoint(parts) or any(kind not in ADDITIVE for kind in kinds_of(parts))


def problem(parts: Mapping[str, str]) -> str | None:
    """What is missing from or contradictory in a module's parts (part -> key of the file); None if nothing is."""
    kinds = kinds_of(parts)
    dense = sorted(parts.keys() & set(WEIGHT_PARTS))
    if len(kinds) + len(dense) > 1:
        if dense:
            return f"has both {parts[dense[0]]} and another update of its weight"
        return f"has {' and '.join(kinds)} at once"
    for first, second in (("diff_b", "b_norm"), ("dora_scale", "magnitude")):
        if first in parts and second in parts:
            return f"has both {parts[first]} and {parts[second]}"
    if not kinds:
        return None
    needed, _ = _KINDS[kinds[0]]
    if missing := sorted(needed - parts.keys()):
        return f"has {', '.join(parts.values())} but no {' and '.join(missing)}"
    return None


def idle(parts: Collection[str]) -> frozenset[str]:
    """Which parts of one module have no effect in ComfyUI's loader: scales of nothing, or of what has no such scale."""
    return _idle(frozenset(parts))


@lru_cache(maxsize=1024)
def _idle(parts: frozenset[str]) -> frozenset[str]:
    kinds = kinds_of(parts)
    scales = parts.intersection({"alpha", *_MODIFIERS})
    if not kinds:
        return scales
    if kinds[0] not in ADDITIVE:
        return scales & {"reshape_weight", "magnitude"}
    return scales & {"reshape_weight"} if kinds[0] != "LoRA" else frozenset()


def ignores_alpha(parts: Collection[str]) -> bool:
    """Whether alpha has no effect beside these parts, so that any value of it will do."""
    return _ignores_alpha(frozenset(parts))


@lru_cache(maxsize=1024)
def _ignores_alpha(parts: frozenset[str]) -> bool:
    if "alpha" in idle(parts):
        return True
    return REPLACED in kinds_of(parts) or {"lokr_w1", "lokr_w2"} <= set(parts)


def build(
    parts: Mapping[str, Tensor | Unmade], alpha: float | None, kernel: tuple[int, ...] = ()
) -> Layer | Carried | None:
    """The update that complete parts make; None for parts that are differences only.

    parts: those of a plain LoRA stay unmade if they are.
    kernel: of the weight, where its name tells, for kinds that keep it flattened.
    Raises ValueError if the shapes do not belong together.
    """
    kinds = kinds_of(parts)
    if not kinds:
        return None
    if kinds[0] == "LoRA" and "mid" not in parts and _MODIFIERS.keys().isdisjoint(parts):
        return stored(parts["up"], parts["down"], alpha)
    return _made(kinds[0], {name: made(part) for name, part in parts.items()}, alpha, kernel)


def _made(kind: str, parts: Mapping[str, Tensor], alpha: float | None, kernel: tuple[int, ...]) -> Layer | Carried:
    layer = _additive(kind, parts, alpha, kernel) if kind in ADDITIVE else None
    own = {name: part for name, part in parts.items() if name not in DIFF_PARTS and name != "alpha"}
    if layer is not None and _MODIFIERS.keys().isdisjoint(parts):
        return layer
    if kind == OFT:
        return _oft(own, alpha)
    if kind == GLORA:
        return Carried(kind, own, alpha, _glora_shape(own))
    if kind == REPLACED:
        return Carried(kind, own, alpha, tuple(own["set_weight"].shape))
    if layer is None:
        return Carried(BUNDLED, own, alpha)
    if "reshape_weight" in parts:
        if parts["reshape_weight"].ndim != 1:
            raise ValueError(f"reshape_weight is {tuple(parts['reshape_weight'].shape)}, but it is a list of sizes")
        return Carried(RESIZED, own, alpha)
    if "magnitude" in own:
        # PEFT's (out,) or (1, out, 1, 1) as the (out, 1, ...) by which ComfyUI multiplies the weight.
        rows = own.pop("magnitude")
        if rows.numel() != layer.shape[0]:
            raise ValueError(
                f"lora_magnitude_vector is {tuple(rows.shape)}, but the weight has {many(layer.shape[0], 'rows')}"
            )
        own["dora_scale"] = rows.reshape(-1, *(1 for _ in layer.shape[1:]))
    if own["dora_scale"].ndim == 0:
        raise ValueError("dora_scale is a single number, but it has one for each row or column")
    return Carried(DORA, own, alpha, layer.shape)


def _additive(kind: str, parts: Mapping[str, Tensor], alpha: float | None, kernel: tuple[int, ...]) -> Layer:
    if kind == "LoRA":
        return LoraLayer(parts["up"], parts["down"], alpha=alpha, mid=parts.get("mid"))
    if kind == "LoHa":
        return LohaLayer(
            w1_a=parts["hada_w1_a"],
            w1_b=parts["hada_w1_b"],
            w2_a=parts["hada_w2_a"],
            w2_b=parts["hada_w2_b"],
            alpha=alpha,
            t1=parts.get("hada_t1"),
            t2=parts.get("hada_t2"),
            unfold=kernel,
        )
    return LokrLayer(
        **{name.removeprefix("lokr_"): part for name, part in parts.items() if name.startswith("lokr_")},
        alpha=alpha,
        unfold=kernel,
    )


def _oft(own: Mapping[str, Tensor], alpha: float | None) -> Carried:
    shape = tuple(own["oft_blocks"].shape)
    if len(shape) not in (3, 4) or shape[-1] != shape[-2]:
        raise ValueError(
            f"oft_blocks is {shape}, but OFT needs (blocks, size, size), BOFT (factors, blocks, size, size)"
        )
    return Carried(OFT if len(shape) == 3 else BOFT, own, alpha, (prod(shape[-3:-1]),))


def _glora_shape(own: Mapping[str, Tensor]) -> tuple[int, ...]:
    a1, a2, b1, b2 = (tuple(own[name].shape) for name in ("a1", "a2", "b1", "b2"))
    if min(map(len, (a1, a2, b1, b2))) > 1:
        shapes = []
        # W a1 a2 + b1 b2, where a1 and a2 work on the channels of a convolution.
        if b2[0] == b1[1] == a1[1] == a2[0] and a1[0] == a2[1] and prod(b2[1:]) % a1[0] == 0:
            shapes.append((b1[0], *b2[1:]))
        # W a2 a1 + b2 b1, as LyCORIS wrote it at first.
        if b2[1] == b1[0] == a1[0] == a2[1] and prod(a1[1:]) == a2[0] == prod(b1[1:]):
            shapes.append((b2[0], *b1[1:]))
        if shapes:
            return max(shapes)  # a square weight allows both readings, and is larger than its rank
    raise ValueError(f"a1 is {a1}, a2 {a2}, b1 {b1}, b2 {b2}; their ranks or widths differ")
