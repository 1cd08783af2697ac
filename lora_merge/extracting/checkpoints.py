"""The weights of two checkpoint files, pair by pair, under the names that LoRA files give to modules."""

from __future__ import annotations

import os
import re
from collections import Counter
from collections.abc import Collection, Iterator, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

from ..disk.header import check_header
from ..disk.tensor_file import NAMES, tensor_file
from ..naming import names
from ..naming.unet import infer_layout
from ..words import many
from .extract import NAMELESS, Weights

_MODEL = "model.diffusion_model."
# What no LoRA changes, or what is no weight.
_ASIDE = (
    "first_stage_model.",
    "vae.",
    "model_ema.",
    "alphas_cumprod",
    "betas",
    "sqrt_",
    "log_",
    "posterior_",
    "logvar",
)
_CLIP = re.compile(
    r"(?:cond_stage_model\.transformer|conditioner\.embedders\.(\d)\.transformer|text_encoder(?:_(\d))?)\.(text_model\..+)"
)
_ENCODERS = ("cond_stage_model.", "conditioner.", "text_encoder.", "text_encoder_2.")
_OPEN_CLIP = re.compile(
    r"(?:cond_stage_model|conditioner\.embedders\.(\d))\.model\.transformer\.resblocks\.(\d+)\.(.+)"
)
# The matrices of a CLIP text encoder that LoRA files have names for; OpenCLIP's name -> theirs.
_OURS = re.compile(r"text_model\.encoder\.layers\.\d+\.(?:self_attn\.(?:q|k|v|out)_proj|mlp\.fc[12])\.(?:weight|bias)")
_OF_OPEN_CLIP = {"attn.out_proj": "self_attn_out_proj", "mlp.c_fc": "mlp_fc1", "mlp.c_proj": "mlp_fc2"}
_FUSED = ("attn.in_proj_weight", "attn.in_proj_bias")
# What stands beside quantised weights: ComfyUI's scales and marks, bitsandbytes', GPTQ's and AWQ's, Nunchaku's.
_QUANTISED = re.compile(
    r"(?:.*[._])?(scale_weight|weight_scale(?:_\d)?|scaled_fp8|comfy_quant|absmax|nested_absmax|quant_map|nested_quant_map"
    r"|quant_state\..+|qweight|qzeros|wscales|wzeros|SCB|weight_format)"
)
# Under this name newer files keep the formats of their weights in the header.
_QUANTISED_NOTE = "_quantization_metadata"
# First and last share of the rows.
_WHOLE = (0.0, 1.0)
# Two models of one family share nearly all keys; a few come and go with training extras.
_FAMILY = 0.9
# By what a model that was distilled with guidance is told how much, which its base has not: of LCMs, of Flux and its kin.
_GUIDANCE = re.compile(r"(?:.*[._])?(?:cond_proj|guidance_in|guidance_embed(?:der)?)[._].+")


def pairs(tuned: str | os.PathLike[str], base: str | os.PathLike[str]) -> Pairs:
    """Both files opened and checked. Raises FileNotFoundError, or ValueError for files that do not go together."""
    return Pairs(Path(tuned), Path(base))


@dataclass(frozen=True)
class _File:
    """weights: key -> (shape, dtype as safetensors writes it) of everything a LoRA may change.   prefix: of the keys of its
    diffusion model, "" for one that is the whole file."""

    path: Path
    weights: Mapping[str, tuple[tuple[int, ...], str]]
    prefix: str

    def encoders(self) -> bool:
        return any(map(_is_encoders, self.weights))

    def by_name(self, prefix: str) -> dict[str, str]:
        """Key with that prefix in place of the file's own -> key, for the diffusion model; other keys as they are."""
        own = len(self.prefix)
        return {
            prefix + key[own:] if key.startswith(self.prefix) and not _is_encoders(key) else key: key
            for key in self.weights
        }


class Pairs:
    """Iterates (name, tuned weight, base weight), reading one pair at a time. only_one: keys without a partner."""

    def __init__(self, tuned: Path, base: Path) -> None:
        self.files = (tuned, base)
        first, second = (_opened(path) for path in self.files)
        # One may be the diffusion model alone and the other hold text encoders beside it.
        prefix = max(first.prefix, second.prefix, key=len)
        a, b = first.by_name(prefix), second.by_name(prefix)
        if not any(key in b for key in a if not _is_encoders(key)):
            a, b = _in_one_naming(a, prefix), _in_one_naming(b, prefix)
        self.only_one = sorted(a.keys() ^ b.keys(), key=lambda key: (_is_encoders(key), key))
        both = first.encoders() and second.encoders()
        counted = [key for key in a.keys() | b.keys() if both or not _is_encoders(key)]
        common = [key for key in a if key in b]
        if self.only_one and (not common or len(common) < _FAMILY * sum(not is_told_guidance(key) for key in counted)):
            raise ValueError(
                f"{tuned} and {base}: only {len(common)} of {many(len(counted), 'weights')} have the same name (first other: "
                f"{self.only_one[0]}). Give two models of one family, in the same format."
            )
        self._pairs = [(key, a[key], b[key]) for key in common]
        self._check_alike(first, second)
        self._prefix = prefix_of(common)

    def _check_alike(self, first: _File, second: _File) -> None:
        tuned, base = self.files
        weights = [(key, first.weights[a], second.weights[b]) for key, a, b in self._pairs]
        if differing := sorted((key, a[0], b[0]) for key, a, b in weights if a[0] != b[0]):
            key, shape, other = differing[0]
            raise ValueError(
                f"{tuned} and {base}: {many(len(differing), 'weights differ', 'weight differs')} in shape (first: {key}, {shape} and {other}). The two "
                "models are not of one family."
            )
        if whole := sorted(key for key, a, b in weights if ("I8" in (a[1], b[1])) and a[1] != b[1]):
            raise ValueError(
                f"{tuned} and {base}: {len(whole)} of {many(len(weights), 'weights')} are 8-bit integers in one of them only, "
                f"without a scale to read them by (first: {whole[0]}). Give both in the same format."
            )

    def __len__(self) -> int:
        return len(self._pairs)

    def __iter__(self) -> Iterator[Weights]:
        with ExitStack() as stack:
            tuned, base = (stack.enter_context(tensor_file(path)) for path in self.files)
            for key, in_tuned, in_base in self._pairs:
                a, b = tuned.tensor(in_tuned), base.tensor(in_base)
                for name, rows in named_rows(key, self._prefix):
                    if rows == _WHOLE or not a.ndim:
                        yield name, a, b
                    else:
                        start, end = (round(len(a) * share) for share in rows)
                        yield name, a[start:end], b[start:end]


def is_told_guidance(key: str) -> bool:
    """Whether a weight is what tells a distilled model its guidance; the model that it was made from may lack it."""
    return _GUIDANCE.fullmatch(key) is not None


def _in_one_naming(keys: Mapping[str, str], prefix: str) -> dict[str, str]:
    """Modules of a Stable Diffusion UNet by the one name that they have here, whether diffusers or ldm named the keys."""
    modules = {name: name.removeprefix(prefix).rpartition(".") for name in keys if not _is_encoders(name)}
    spelled = {name: names.kohya_name(module) for name, (module, *_) in modules.items()}
    layout = infer_layout(names.unet_bodies(spelled.values()))
    found = {
        name: f"{names.canonical(spelling, layout)}.{modules[name][2]}"
        for name, spelling in spelled.items()
        if spelling.startswith("lora_unet_")
    }
    return {found.get(name, name): key for name, key in keys.items()}


def prefix_of(keys: Collection[str]) -> str:
    """What LoRA files put before the names of a file that holds a diffusion model alone; "" for any other file.

    ComfyUI knows `diffusion_model.` for every name of its own layout. Of diffusers' layouts it knows those whose names
    are others, by `transformer.`; blocks of the same name, with other layers around them, tell them apart.
    """
    if any(key.startswith((_MODEL, "model.", "unet.", "diffusion_model.", "lora_unet_")) for key in keys):
        return ""
    return "transformer." if _is_diffusers_transformer(keys) else "diffusion_model."


def _is_diffusers_transformer(keys: Collection[str]) -> bool:
    if any(key.startswith(("single_transformer_blocks.", "joint_transformer_blocks.")) for key in keys):
        return True
    blocks = any(key.startswith("transformer_blocks.") for key in keys)
    return blocks and any(key.startswith(("context_embedder.", "pos_embed.proj.")) for key in keys)


def named_rows(key: str, prefix: str) -> list[tuple[str, tuple[float, float]]]:
    """(name for `extract`, first and last share of its rows) of a checkpoint's key; several for a fused weight.

    prefix: of names that have none in the file, see `prefix_of`.
    """
    if match := _CLIP.fullmatch(key):
        module, _, part = match[3].rpartition(".")
        prefix = _encoder(match[1]) if match[1] else f"lora_te{match[2] or ''}"
        return [
            (f"{prefix}_{module.replace('.', '_')}.{part}" if _OURS.fullmatch(match[3]) else f"{key}{NAMELESS}", _WHOLE)
        ]
    if match := _OPEN_CLIP.fullmatch(key):
        prefix = f"{_encoder(match[1])}_text_model_encoder_layers_{match[2]}"
        if match[3] in _FUSED:
            part = match[3].rpartition("_")[2]
            return [(f"{prefix}_self_attn_{x}_proj.{part}", (n / 3, (n + 1) / 3)) for n, x in enumerate("qkv")]
        module, _, part = match[3].rpartition(".")
        return [(f"{prefix}_{_OF_OPEN_CLIP[module]}.{part}" if module in _OF_OPEN_CLIP else f"{key}{NAMELESS}", _WHOLE)]
    if key.startswith(_ENCODERS):
        return [(f"{key}{NAMELESS}", _WHOLE)]
    name = f"diffusion_model.{key.removeprefix(_MODEL)}" if key.startswith(_MODEL) else key
    module, _, part = name.rpartition(".")
    spelled = names.kohya_name(module)
    if prefix and spelled == module:
        spelled = prefix + module
    return [(f"{spelled}.{part}", _WHOLE)]


def _encoder(number: str | None) -> str:
    """SDXL numbers its two; SD1.5 and SD2 have one."""
    return "lora_te" if number is None else f"lora_te{int(number) + 1}"


def _is_encoders(key: str) -> bool:
    return key.startswith((*_ENCODERS, "text_encoders."))


def _opened(path: Path) -> _File:
    if not path.exists():
        raise FileNotFoundError(f"{path}: there is no such file; check the name and the folder.")
    if path.suffix != ".safetensors":
        raise ValueError(f"{path}: only .safetensors files are read; others can run code when they are opened.")
    header = check_header(path)
    weights = {
        key: (shape, NAMES[dtype])
        for key, (dtype, shape, *_) in sorted(header.entries.items())
        if not key.startswith(_ASIDE)
    }
    _check_plain(path, weights, header.metadata)
    prefix = next(
        (prefix for prefix in (_MODEL, "diffusion_model.") if any(key.startswith(prefix) for key in weights)), ""
    )
    return _File(path, weights, prefix)


def _check_plain(path: Path, weights: Mapping[str, tuple[tuple[int, ...], str]], notes: Mapping[str, str]) -> None:
    """Raises ValueError for weights that mean other numbers than those they are written with."""
    marks = {key: match[1].partition(".")[0] for key in weights if (match := _QUANTISED.fullmatch(key))}
    # Two or more numbers to a byte.
    marks |= {
        key: "U8" for key, (shape, dtype) in weights.items() if dtype == "U8" and len(shape) > 1 and key not in marks
    }
    if marks or _QUANTISED_NOTE in notes:
        counts = ", ".join(f"{count} {mark}" for mark, count in sorted(Counter(marks.values()).items()))
        first = f", first: {next(iter(marks))}" if marks else ""
        raise ValueError(
            f"{path}: its weights are quantised ({counts or _QUANTISED_NOTE} among {many(len(weights), 'tensors')}{first}). Give the "
            "original, or use the Extract LoRA node, which reads them as ComfyUI does."
        )
