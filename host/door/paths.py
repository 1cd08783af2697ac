"""Folders of the machine that ComfyUI runs on, kept out of what its users read: a server has more users than its owner."""

import os
import re
from collections.abc import Iterator
from pathlib import Path

import folder_paths

ENDS = r"(?=[\\/\s'\"`,;:)\]]|\.?$|\.\s)"


def without_folders(text: str) -> str:
    """The text with ComfyUI's folders by their names only: loras/style.safetensors for /home/.../loras/style.safetensors."""
    if os.sep not in text and "/" not in text:
        return text
    for folder, name in sorted(_folders(), key=lambda pair: -len(pair[0])):
        text = re.sub(re.escape(folder) + ENDS, lambda match, name=name: name, text)
    return text


def _folders() -> Iterator[tuple[str, str]]:
    """(path in every spelling, name). Of paths within paths the caller has to take the longest first."""
    named = {folder: kind for kind, (folders, *_) in folder_paths.folder_names_and_paths.items() for folder in folders}
    for kind in ("output", "temp", "input", "user"):
        named[getattr(folder_paths, f"get_{kind}_directory")()] = kind
    named |= {folder_paths.models_dir: "models", folder_paths.base_path: "ComfyUI", str(_home()): "~"}
    for folder, name in named.items():
        for one in dict.fromkeys((os.path.abspath(folder), os.path.realpath(folder))):
            # As it is, as Python's repr of a text writes it on Windows, and as pathlib's as_posix does.
            for spelling in dict.fromkeys((one, one.replace("\\", "\\\\"), one.replace("\\", "/"))):
                if len(Path(one).parts) > 1:
                    yield spelling, name


def _home() -> Path:
    return Path(os.path.expanduser("~"))
