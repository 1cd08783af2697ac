"""The weights of two checkpoint files, pair by pair, under the names that LoRA files give to modules."""

from __future__ import annotations

import os
import re
from collections.abc import Collection, Iterator
from contextlib import ExitStack
from pathlib import Path

from safetensors import SafetensorError, safe_open
from torch import Tensor

from ..files.header import check_header
from ..naming import names
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
_QUANTISED = re.compile(r".*(?:scale_weight|weight_scale|scaled_fp8|comfy_quant|\.absmax|\.quant_map)")
# Two models of one family share nearly all keys; a few come and go with training extras.
_FAMILY = 0.9


def pairs(tuned: str | os.PathLike[str], base: str | os.PathLike[str]) -> Pairs:
    """Both files opened and checked. Raises FileNotFoundError, or ValueError for files that do not go together."""
    return Pairs(Path(tuned), Path(base))


class Pairs:
    """Iterates (name, tuned weight, base weight), reading one pair at a time. only_one: keys without a partner."""

    def __init__(self, tuned: Path, base: Path) -> None:
        self.files = (tuned, base)
        found = [_keys(path) for path in self.files]
        common, every = found[0].keys() & found[1].keys(), found[0].keys() | found[1].keys()
        self.only_one = sorted(every - common)
        if len(common) < _FAMILY * len(every):
            raise ValueError(
                f"{tuned} and {base}: only {len(common)} of {len(every)} weights have the same name (first other: "
                f"{self.only_one[0]}). Give two models of one family, in the same format."
            )
        differing = sorted(key for key in common if found[0][key] != found[1][key])
        if differing:
            key = differing[0]
            raise ValueError(
                f"{tuned} and {base}: {len(differing)} weights differ in shape (first: {key}, {found[0][key]} and "
                f"{found[1][key]}). The two models are not of one family."
            )
        self._prefix = prefix_of(common)
        self._keys = [key for key in found[0] if key in common]

    def __len__(self) -> int:
        return len(self._keys)

    def __iter__(self) -> Iterator[Weights]:
        with ExitStack() as stack:
            tuned, base = (stack.enter_context(safe_open(path, framework="pt")) for path in self.files)
            for key in self._keys:
                a: Tensor = tuned.get_tensor(key)
                b: Tensor = base.get_tensor(key)
                for name, rows in places(key, self._prefix):
                    start, end = (round(len(a) * share) for share in rows) if a.ndim else (0, 0)
                    whole = a.ndim == 0 or (start, end) == (0, len(a))
                    yield (name, a, b) if whole else (name, a[start:end], b[start:end])


def prefix_of(keys: Collection[str]) -> str:
    """What LoRA files put before the names of a file that holds a diffusion model alone; "" for any other file.

    ComfyUI knows `diffusion_model.` for every name of its own layout. Of diffusers' layouts it knows those whose names
    are others, by `transformer.`; blocks of the same name, with other layers around them, tell them apart.
    """
    if any(key.startswith((_MODEL, "model.", "unet.", "diffusion_model.")) for key in keys):
        return ""
    return "transformer." if _is_diffusers_transformer(keys) else "diffusion_model."


def _is_diffusers_transformer(keys: Collection[str]) -> bool:
    if any(key.startswith(("single_transformer_blocks.", "joint_transformer_blocks.")) for key in keys):
        return True
    blocks = any(key.startswith("transformer_blocks.") for key in keys)
    return blocks and any(key.startswith(("context_embedder.", "pos_embed.proj.")) for key in keys)


def places(key: str, prefix: str) -> list[tuple[str, tuple[float, float]]]:
    """(name for `extract`, first and last share of its rows) of a checkpoint's key; several for a fused weight.

    prefix: of names that have none in the file, see `prefix_of`.
    """
    whole = (0.0, 1.0)
    if match := _CLIP.fullmatch(key):
        module, _, part = match[3].rpartition(".")
        prefix = _encoder(match[1]) if match[1] else f"lora_te{match[2] or ''}"
        return [
            (f"{prefix}_{module.replace('.', '_')}.{part}" if _OURS.fullmatch(match[3]) else f"{key}{NAMELESS}", whole)
        ]
    if match := _OPEN_CLIP.fullmatch(key):
        prefix = f"{_encoder(match[1])}_text_model_encoder_layers_{match[2]}"
        if match[3] in _FUSED:
            part = match[3].rpartition("_")[2]
            return [(f"{prefix}_self_attn_{x}_proj.{part}", (n / 3, (n + 1) / 3)) for n, x in enumerate("qkv")]
        module, _, part = match[3].rpartition(".")
        return [(f"{prefix}_{_OF_OPEN_CLIP[module]}.{part}" if module in _OF_OPEN_CLIP else f"{key}{NAMELESS}", whole)]
    if key.startswith(_ENCODERS):
        return [(f"{key}{NAMELESS}", whole)]
    name = f"diffusion_model.{key.removeprefix(_MODEL)}" if key.startswith(_MODEL) else key
    module, _, part = name.rpartition(".")
    spelled = names.spelling(module)
    if prefix and spelled == module:
        spelled = prefix + module
    return [(f"{spelled}.{part}", whole)]


def _encoder(number: str | None) -> str:
    """SDXL numbers its two; SD1.5 and SD2 have one."""
    return "lora_te" if number is None else f"lora_te{int(number) + 1}"


def _keys(path: Path) -> dict[str, tuple[int, ...]]:
    """Key -> shape of everything a LoRA may change."""
    if not path.exists():
        raise FileNotFoundError(f"{path}: there is no such file; check the name and the folder.")
    if path.suffix != ".safetensors":
        raise ValueError(f"{path}: only .safetensors files are read; others can run code when they are opened.")
    check_header(path)
    try:
        with safe_open(path, framework="pt") as file:
            keys = [key for key in file.keys() if not key.startswith(_ASIDE)]
            shapes = {key: tuple(file.get_slice(key).get_shape()) for key in keys}
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{path}: is damaged ({error}); download it again.") from error
    if packed := next((key for key in shapes if _QUANTISED.fullmatch(key)), None):
        raise ValueError(
            f"{path}: its weights are quantised ({packed}). Give the original, or use the Extract LoRA node, which "
            "reads them as ComfyUI does."
        )
    return shapes
