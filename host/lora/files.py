"""LoRA files: names <-> paths through folder_paths, reading with a cache, writing."""

import os
from collections import OrderedDict
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor

import folder_paths
import torch

from ...lora_merge import load, save
from ...lora_merge.files.lora import FORMATS
from ...lora_merge.recognise.identity import identify, sha256_of, worth_hashing
from .identity import KnownWeights
from .weights import LoraWeights, from_lora, to_lora

__all__ = ["DTYPES", "FORMATS", "NAME_MODES", "fingerprint", "lora_names", "read_lora", "save_lora"]

DTYPES = {"fp16": torch.float16, "bf16": torch.bfloat16, "fp32": torch.float32}
NAME_MODES = ("increment", "exact name", "overwrite")
# What the node asks for -> its name in the ModelSpec.
ABOUT = {
    "title": "modelspec.title",
    "author": "modelspec.author",
    "trigger_words": "modelspec.trigger_phrase",
}
SUFFIXES = (".safetensors", ".sft")

# A changed strength runs a loader again, but need not read its file again. fingerprint -> weights, oldest first.
CACHE_BYTES = 1 << 30
_cache: OrderedDict[tuple, KnownWeights] = OrderedDict()


def lora_names() -> list[str]:
    """The files a user can choose. Pickles (.pt, .ckpt) are not opened, so they are not listed."""
    return [name for name in folder_paths.get_filename_list("loras") if name.lower().endswith(SUFFIXES)]


def fingerprint(lora_name: str) -> tuple:
    """Changes when the file does, so that ComfyUI runs a loader again for a file that was overwritten.

    Times have steps of milliseconds; a file that was replaced within one is another file on the disk.
    """
    path = folder_paths.get_full_path("loras", lora_name)
    if path is None:
        return (lora_name,)
    state = os.stat(path)
    return (path, state.st_mtime_ns, state.st_size, state.st_ino)


def read_lora(lora_name: str) -> KnownWeights:
    """The LORA_MODEL in a file of the loras folder. Raises FileNotFoundError or ValueError, saying what is wrong."""
    path = folder_paths.get_full_path("loras", lora_name)
    if path is None:
        raise FileNotFoundError(
            f"{lora_name} is not in the loras folder ({', '.join(folder_paths.get_folder_paths('loras'))}). "
            "Put it there and press R to refresh the lists, or choose another file."
        )
    key = fingerprint(lora_name)
    if key not in _cache:
        # What is known of an older state of the file is of no use any more.
        for old in [old for old in _cache if old[0] == path]:
            del _cache[old]
        _cache[key] = _read(path, key[2])
    _cache.move_to_end(key)
    while len(_cache) > 1 and sum(map(_bytes, _cache.values())) > CACHE_BYTES:
        _cache.popitem(last=False)
    # A copy of the dict: a node further on may change what it is given.
    return _cache[key].again()


def _read(path: str, size: int) -> KnownWeights:
    # hashlib lets go of the interpreter lock, so a hash that will be wanted costs little beside the reading.
    with ThreadPoolExecutor(1) as pool:
        if worth_hashing(size):
            pool.submit(sha256_of, path)
        lora = load(path)
        weights = from_lora(lora)
    identity = identify(lora, path)
    return KnownWeights(dict(weights), name=weights.name, metadata=weights.metadata, identity=identity)


def save_lora(weights, prefix: str, *, dtype: str, format: str, name_mode: str, about: Mapping[str, str]) -> str:
    """Writes into the first loras folder and returns the path. Raises ValueError or FileExistsError.

    prefix: name without extension, folders before it allowed. name_mode: one of NAME_MODES.
    about: names in ABOUT -> text for the file; an empty one leaves what the LoRA says already.
    """
    lora = to_lora(weights)
    texts = {key: about.get(name, "").strip() for name, key in ABOUT.items()}
    folder, name, counter = _place(prefix.strip().removesuffix(".safetensors"))
    file = f"{name}_{counter:05}_.safetensors" if name_mode == "increment" else f"{name}.safetensors"
    path = os.path.join(folder, file)
    save(lora, path, dtype=DTYPES[dtype], format=format, overwrite=name_mode == "overwrite",
         metadata={key: text for key, text in texts.items() if text})  # fmt: skip
    return path


def _place(prefix: str) -> tuple[str, str, int]:
    """(folder, made if needed; file name; first free number), as core counts its saved files."""
    loras = os.path.abspath(folder_paths.get_folder_paths("loras")[0])
    # A backslash separates folders on Windows, and a shared workflow should mean the same everywhere.
    prefix = prefix.replace("\\", "/")
    inside = os.path.normpath(os.path.join(loras, prefix))
    if not os.path.basename(prefix) or os.path.basename(prefix) in (".", ".."):
        raise ValueError(f"filename_prefix is {prefix!r}, which names no file. Write a name such as LCMKit/merged.")
    if os.path.isabs(prefix) or os.path.splitdrive(prefix)[0] or not inside.startswith(loras + os.sep):
        raise ValueError(
            f"filename_prefix is {prefix!r}, which lies outside the loras folder ({loras}). Write a name, with folders "
            "inside that one before it if you like."
        )
    folder, name, counter, _, _ = folder_paths.get_save_image_path(prefix, loras)
    # Core makes the folder only where it counts in vain.
    os.makedirs(folder, exist_ok=True)
    return folder, name, counter


def _bytes(weights: LoraWeights) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in weights.values())
