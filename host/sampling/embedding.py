"""The guidance a full LCM was trained with, as an ordinary patch on a MODEL's time embedding.

A full LCM adds P @ emb(w) to its timestep embedding before the first linear layer of the time MLP (P is the tensor
`time_embedding.cond_proj.weight` of its file). For a fixed w that is a constant on this layer's bias, W1 @ P @ emb(w).
"""

import logging
import os
from collections import OrderedDict
from dataclasses import dataclass
from pathlib import Path

import comfy.lora
import comfy.model_management
import folder_paths
import torch
from comfy.patcher_extension import CallbacksMP
from safetensors import SafetensorError, safe_open

from ...lora_merge.disk.header import check_header
from ...lora_merge.words import many
from ...samplers.guidance import guidance_embedding
from ..door.rules import not_there
from ..lora.stored import is_readable, stored_weight

logger = logging.getLogger(__name__)

# A checkpoint in one file carries the tensor too, so both folders are offered; the first is where UNets belong.
FOLDERS = ("diffusion_models", "checkpoints")
SUFFIXES = (".safetensors", ".sft")
# diffusers' name, bare or after unet. or model.diffusion_model. and the like; and the name in the original layout.
# name -> the layer that follows it
PROJECTION = {
    "time_embedding.cond_proj.weight": "time_embedding.linear_1.weight",
    "time_embed.cond_proj.weight": "time_embed.0.weight",
}
WEIGHT = "diffusion_model.time_embed.0.weight"
BIAS = "diffusion_model.time_embed.0.bias"
ATTACHMENT = "lcm_kit_guidance"
PLAIN = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
# Relative distance of two first layers above which they are no fine-tunes of one another. Unrelated ones are 1.4 apart,
# and those of SD1.5 and SDXL have the same shape.
OTHER_MODEL = 0.5

# A changed guidance runs the node again, but need not open the file again. (path, time, size) -> what was read.
CACHED = 8
_cache: OrderedDict[tuple, "FileTensors"] = OrderedDict()


@dataclass(frozen=True)
class FileTensors:
    """projection: (in, dim) the tensor P.   first_layer: (out, in) the W1 it was trained with, if it is in the file."""

    projection: torch.Tensor
    first_layer: torch.Tensor | None


def unet_names() -> list[str]:
    """The files a user can choose. Pickles (.pt, .ckpt) are not opened, so they are not listed."""
    names = [name for folder in FOLDERS for name in folder_paths.get_filename_list(folder)]
    return [name for name in dict.fromkeys(names) if name.lower().endswith(SUFFIXES)]


def known(unet_name: object) -> bool | str:
    """For ComfyUI's validate_inputs: True for a file that can be chosen, else what is wrong, in words.

    Also True for what is no text: a value that comes through a link, of which nothing is known yet.
    """
    if not isinstance(unet_name, str) or _path(unet_name) is not None:
        return True
    return f"unet_name: {unknown(unet_name)}"


def unknown(unet_name: str) -> str:
    """What to say of a name that no file in the folders has."""
    return not_there(unet_name, f"in none of the folders {', '.join(FOLDERS)}", unet_names())


def fingerprint(unet_name: object) -> tuple:
    """Changes when the file does, so that ComfyUI runs the node again for a file that was overwritten."""
    path = _path(unet_name) if isinstance(unet_name, str) else None
    if path is None:
        return (unet_name,)
    state = os.stat(path)
    return (path, state.st_mtime_ns, state.st_size)


def with_guidance(model, unet_name: str, guidance: float):
    """A clone of the MODEL that runs at this guidance, in CFG's scale (w = guidance - 1).

    Raises FileNotFoundError or ValueError, before anything is patched, for a file or model that does not allow it.
    """
    before = model.get_attachment(ATTACHMENT)
    if before is not None:
        raise ValueError(
            f"This model already has guidance {before:g} from an LCM Guidance Embedding node, and two do not add up. "
            "Bypass one of the two nodes."
        )
    tensors = _tensors(unet_name)
    projection = tensors.projection
    base, patches = _first_layer(model)
    if projection.shape[0] != base.shape[1]:
        raise ValueError(
            f"{unet_name} is for a time embedding of width {projection.shape[0]}, but that of this model is "
            f"{base.shape[1]} wide. Choose the file that this model was loaded from."
        )
    if _differ(tensors.first_layer, base):
        raise ValueError(
            f"{unet_name} belongs to another kind of model: the first layers of their time embeddings have nothing in "
            "common. Choose the file that this model was loaded from."
        )
    first_layer = comfy.lora.calculate_weight(patches, base, WEIGHT)
    embedding = guidance_embedding(guidance - 1.0, projection.shape[1])
    constant = first_layer.double() @ (projection.double() @ embedding.double())
    model = model.clone()
    model.add_patches({BIAS: ("diff", (constant.float(),))})
    model.set_attachments(ATTACHMENT, guidance)
    model.add_callback(CallbacksMP.ON_PRE_RUN, _late_patch_warning(model.patches.get(WEIGHT, [])))
    return model


def _late_patch_warning(known: list):
    """A callback for each run: the constant holds for the first layer with the patches it had then."""
    known = list(known)

    def check(patcher):
        if list(map(id, patcher.patches.get(WEIGHT, []))) != list(map(id, known)):
            logger.warning(
                "A LoRA or merge after LCM Guidance Embedding changes %s, so the guidance is not exactly the one that "
                "was asked for. Put LCM Guidance Embedding behind it.",
                WEIGHT,
            )

    return check


def _differ(in_file: torch.Tensor | None, in_model: torch.Tensor) -> bool:
    if in_file is None:
        return False
    return in_file.shape != in_model.shape or bool((in_file - in_model).norm() > OTHER_MODEL * in_file.norm())


def _first_layer(model) -> tuple[torch.Tensor, list]:
    """(out, in) first weight of the time MLP, float32 on the CPU, a copy without patches; and the MODEL's patches."""
    if not {WEIGHT, BIAS} <= model.model.state_dict().keys():
        raise ValueError(
            f"This model ({type(model.model.model_config).__name__}) has no {WEIGHT.rsplit('.', 1)[0]}, where full LCMs "
            "take in their guidance. Full LCMs are UNets of the kinds SD1.5, SSD-1B and SDXL; other models need no "
            "such node."
        )
    weight, convert = stored_weight(model, WEIGHT)
    if weight.ndim != 2 or not is_readable(weight, convert):
        raise ValueError(
            f"{WEIGHT} is stored as {weight.dtype} of shape {tuple(weight.shape)} in this model, a quantisation that "
            "cannot be read here. Load the model unquantised, in fp16, bf16 or a format of ComfyUI's own."
        )
    # As core does where it patches a weight: a cast to float32, then what quantised layers make plain numbers by.
    value = comfy.model_management.cast_to_device(weight, torch.device("cpu"), torch.float32, copy=True)
    return convert(value, inplace=True) if convert else value, model.patches.get(WEIGHT, [])


def _tensors(unet_name: str) -> FileTensors:
    path = _path(unet_name)
    if path is None:
        raise FileNotFoundError(unknown(unet_name))
    key = fingerprint(unet_name)
    if key not in _cache:
        _cache[key] = _read(path)
    _cache.move_to_end(key)
    while len(_cache) > CACHED:
        _cache.popitem(last=False)
    return _cache[key]


def _read(path: str) -> FileTensors:
    try:
        # The header and two tensors of 2 MB together, not the gigabytes of the UNet.
        with safe_open(path, framework="pt") as file:
            keys = [key for key in file.keys() if key in PROJECTION or key.endswith(tuple("." + p for p in PROJECTION))]
            if len(keys) == 1:
                return FileTensors(_projection(path, file, keys[0]), _layer_after(file, keys[0]))
    except (SafetensorError, OSError) as error:
        # Only now: whole models hold tensors without values, which are no damage.
        check_header(Path(path))
        raise ValueError(f"{path}: is damaged ({error}); download it again.") from error
    if keys:
        raise ValueError(
            f"{path}: has {many(len(keys), 'such tensors')} ({', '.join(keys)}). Choose a file with one UNet."
        )
    raise ValueError(
        f"{path}: has no tensor {next(iter(PROJECTION))}, so it is no full LCM that takes its guidance as an input. Checkpoints "
        "with an LCM-LoRA, merged in or applied, have their guidance built in and need no such node: bypass it. For a "
        "full LCM, choose the UNet file that the model was loaded from."
    )


def _layer_after(file, key: str) -> torch.Tensor | None:
    name = next(name for name in PROJECTION if key.endswith(name))
    layer = key.removesuffix(name) + PROJECTION[name]
    tensor = file.get_tensor(layer) if layer in file.keys() else None
    return _copied(tensor) if tensor is not None and tensor.dtype in PLAIN else None


def _projection(path: str, file, key: str) -> torch.Tensor:
    tensor = file.get_tensor(key)
    if tensor.ndim != 2 or tensor.dtype not in PLAIN or not tensor.isfinite().all():
        raise ValueError(
            f"{path}: {key} is of shape {tuple(tensor.shape)} and {tensor.dtype}; it has to be a matrix of finite "
            "numbers in fp16, bf16 or fp32. Choose the original file here; the model itself may be a quantised copy."
        )
    return _copied(tensor)


def _copied(tensor: torch.Tensor) -> torch.Tensor:
    # The file is mapped: a tensor that stays there is lost, and the process with it, when the file is cut off.
    return tensor.to(torch.float32, copy=True)


def _path(unet_name: str) -> str | None:
    paths = (folder_paths.get_full_path(folder, unet_name) for folder in FOLDERS)
    return next((path for path in paths if path is not None), None)
