"""LoRA files: names <-> paths through folder_paths, reading with a cache, writing."""

import logging
import os
import posixpath
import re
from collections import OrderedDict
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path, PurePath

import comfy.utils
import folder_paths
import torch

from ...lora_merge import load, save
from ...lora_merge.disk.digests import keep_in, sha256_of
from ...lora_merge.disk.file_names import path_trouble
from ...lora_merge.files.dtypes import DTYPES
from ...lora_merge.files.formats import SAVE_FORMATS as FORMATS
from ...lora_merge.recognise.identity import identify, worth_hashing
from ..door.rules import not_there, shown
from .identity import KnownWeights
from .weights import LoraWeights, from_lora, to_lora

logger = logging.getLogger(__name__)

__all__ = ["FORMATS", "NAME_MODES", "fingerprint", "known", "lora_names", "read_lora", "save_lora"]

NAME_MODES = ("increment", "exact name", "overwrite", "overwrite_any")
OVERWRITE = {"overwrite": True, "overwrite_any": "any"}
# What the node asks for -> its name in the ModelSpec.
ABOUT = {
    "title": "modelspec.title",
    "author": "modelspec.author",
    "trigger_words": "modelspec.trigger_phrase",
}
SUFFIXES = (".safetensors", ".sft")

_warned: set[str] = set()

# A changed strength runs a loader again, but need not look at its file again. fingerprint -> weights, oldest first; bytes in
# memory, and files, which are open as long as they are here.
CACHE_BYTES = 1 << 30
CACHE_FILES = 16
_cache: OrderedDict[tuple, KnownWeights] = OrderedDict()


def lora_names() -> list[str]:
    """The files a user can choose. Pickles (.pt, .ckpt) are not opened, so they are not listed.

    Nor is a name with < in it, with a warning: old pages draw a list as HTML, where such a name can run a script.
    """
    names = [name for name in folder_paths.get_filename_list("loras") if name.lower().endswith(SUFFIXES)]
    for name in names:
        if "<" in name and name not in _warned:
            _warned.add(name)
            logger.warning("%r in the loras folder is not listed, for it has a < in its name. Rename it.", name)
    return [name for name in names if "<" not in name]


def known(lora_name: object) -> bool | str:
    """For ComfyUI's validate_inputs: True for a file that can be chosen, else what is wrong, in words.

    Also True for what is no text: a value that comes through a link, of which nothing is known yet.
    """
    if not isinstance(lora_name, str) or folder_paths.get_full_path("loras", lora_name) is not None:
        return True
    return f"lora_name: {unknown(lora_name)}"


def unknown(lora_name: str) -> str:
    """What to say of a name that no file in the loras folder has."""
    return not_there(lora_name, "not in the loras folder", lora_names())


def fingerprint(lora_name: object) -> tuple:
    """Changes when the file does, so that ComfyUI runs a loader again for a file that was overwritten.

    Times have steps of milliseconds; a file that was replaced within one is another file on the disk.
    """
    path = folder_paths.get_full_path("loras", lora_name) if isinstance(lora_name, str) else None
    return (lora_name,) if path is None else _state(path)


def _state(path: str) -> tuple:
    state = os.stat(path)
    return (path, state.st_mtime_ns, state.st_size, state.st_ino)


def read_lora(lora_name: str) -> KnownWeights:
    """The LORA_MODEL in a file of the loras folder, see read_file.

    Raises FileNotFoundError or ValueError, saying what is wrong.
    """
    path = folder_paths.get_full_path("loras", lora_name)
    if path is None:
        raise FileNotFoundError(unknown(lora_name))
    return read_file(path)


def read_file(path: str) -> KnownWeights:
    """The LORA_MODEL in a file that is there, wherever it lies; looked at once while it stays as it is."""
    key = _state(path)
    if key not in _cache:
        # What is known of an older state of the file is of no use any more.
        for old in [old for old in _cache if old[0] == path]:
            del _cache[old]
        _cache[key] = _read(path, key[2])
    _cache.move_to_end(key)
    while len(_cache) > CACHE_FILES or (len(_cache) > 1 and sum(map(_bytes, _cache.values())) > CACHE_BYTES):
        _cache.popitem(last=False)
    # A copy of the dict: a node further on may change what it is given.
    return _cache[key].again()


def _read(path: str, size: int) -> KnownWeights:
    # A file is hashed once: it costs as much as all else that a loader does.
    keep_in(Path(folder_paths.get_user_directory()) / "lcm_kit" / "sha256.json")
    # hashlib lets go of the interpreter lock, so a hash that will be wanted costs little beside the reading.
    with ThreadPoolExecutor(1) as pool:
        if worth_hashing(size):
            pool.submit(sha256_of, path)
        # As core's own loader, which looks at this while it runs.
        lora = load(path, mapping=not comfy.utils.DISABLE_MMAP)
        weights = from_lora(lora)
    identity = identify(lora, path)
    return KnownWeights(weights.pieces, name=weights.name, metadata=weights.metadata, identity=identity)


def save_lora(weights, prefix: str, *, dtype: str, format: str, name_mode: str, about: Mapping[str, str]) -> str:
    """Writes into the first loras folder; returns the file's name there, with folders and slashes, as loaders list it.

    Raises ValueError, FileExistsError or OSError.

    prefix: name without extension, folders before it allowed. name_mode: one of NAME_MODES.
    about: names in ABOUT -> text for the file; an empty one leaves what the LoRA says already.
    """
    lora = to_lora(weights)
    texts = {key: about.get(name, "").strip() for name, key in ABOUT.items()}
    texts = {key: text for key, text in texts.items() if text}
    increment = name_mode == "increment"
    folder, name, number = _place(prefix, "_00001_.safetensors" if increment else ".safetensors")
    while True:
        path = os.path.join(folder, f"{name}_{number:05}_.safetensors" if increment else f"{name}.safetensors")
        try:
            overwrite = OVERWRITE.get(name_mode, False)
            save(lora, path, dtype=DTYPES[dtype], format=format, overwrite=overwrite, metadata=texts)
            # Not the path: the folders above are the server's own affair.
            return PurePath(os.path.relpath(path, _loras_folder())).as_posix()
        except FileExistsError:
            if not increment:
                raise
            # Somebody was faster: another thread, another server on this folder.
            number += 1


def _loras_folder() -> str:
    return os.path.abspath(folder_paths.get_folder_paths("loras")[0])


def _place(prefix: str, ending: str) -> tuple[str, str, int]:
    """(folder, made if needed; file name; first free number), as core counts its saved files."""
    loras = _loras_folder()
    said = f"filename_prefix is {shown(prefix)}"
    # A backslash separates folders on Windows, and a shared workflow should mean the same everywhere.
    name = prefix.replace("\\", "/")
    if name.lower().endswith(".safetensors"):
        name = name[: -len(".safetensors")]
    if name.rpartition("/")[2].strip() in ("", ".", ".."):
        raise ValueError(f"{said}, which names no file. Write a name such as LCMKit/merged.")
    name = posixpath.normpath(name)
    outside = ValueError(
        f"{said}, which lies outside the loras folder. Write a name, with folders inside that one before it if you like."
    )
    if name.startswith(("/", "../")) or re.match(r"[A-Za-z]:", name):
        raise outside
    if trouble := path_trouble(name) or path_trouble(name + ending):
        raise ValueError(f"{said}, and it {trouble}.")
    try:
        folder, file, number, _, _ = folder_paths.get_save_image_path(name, loras)
        # Core makes the folder only where it counts in vain.
        os.makedirs(folder, exist_ok=True)
    except OSError as error:
        raise OSError(f"{said}, and its folder cannot be made ({error.strerror}).") from error
    except Exception as error:
        raise outside from error  # core's own check has no class of its own
    return os.path.normpath(folder), file, number


def _bytes(weights: LoraWeights) -> int:
    return sum(piece.nbytes for piece in weights.pieces.values() if isinstance(piece, torch.Tensor))
