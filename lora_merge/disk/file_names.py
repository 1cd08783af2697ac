"""Which names a new file may have: those that mean the same file on every system, in every list and in every log.

A shared workflow carries names from one system to another, and a name may come from a stranger. It is never changed:
it can be read back as it was written, or it is refused.
"""

from __future__ import annotations

import re
import unicodedata

# Linux and macOS count bytes, Windows counts UTF-16 units, of which there are never more.
MAX_BYTES = 255
# Of folders and name together. macOS takes 1,024 with everything before, Windows 260 unless it is told otherwise.
MAX_PATH_BYTES = 800
MAX_FOLDERS = 32
_SHOWN = 60

_FORBIDDEN = re.compile(r'[<>:"/\\|?*]')
# With any ending and in any case: the console, printers and ports of Windows.
_DEVICE = re.compile(r"(con|prn|aux|nul|conin\$|conout\$|(com|lpt)[0-9¹²³])", re.I)
# Joiners that Persian, the languages of India and emoji are spelled with.
_JOINERS = "\u200c\u200d"


def name_trouble(name: str) -> str | None:
    """What is wrong with the name of one file or folder, in words that follow the name; None for nothing."""
    if not name:
        return "is empty; write a name"
    if name in (".", ".."):
        return "stands for a folder; write a name"
    if any("\ud800" <= letter <= "\udfff" for letter in name):
        return "has half a character in it (a lone surrogate); write it anew"
    unseen = next((letter for letter in name if _unseen(letter)), None)
    if unseen is not None:
        return f"has a character in it that nobody sees (U+{ord(unseen):04X}); write it without"
    if found := _FORBIDDEN.search(name):
        return f"has {found[0]} in it, which not every system allows in a name; write it without"
    if name[-1] in ". " or name[0] == " ":
        where = "begins" if name[-1] not in ". " else "ends"
        what = "a dot" if where == "ends" and name[-1] == "." else "a space"
        return f"{where} with {what}, which Windows drops; write it without"
    if _DEVICE.fullmatch(name.partition(".")[0].rstrip()):
        return "is the name of a device on Windows; choose another name"
    if (composed := unicodedata.normalize("NFC", name)) != name:
        return f"has letters in pieces that look like whole ones; write {shown(composed)}"
    if (size := len(name.encode())) > MAX_BYTES:
        return f"has {size} bytes, and no system takes more than {MAX_BYTES}; choose a shorter name"
    return None


def path_trouble(path: str) -> str | None:
    """Why a file in folders that "/" separates may not be called so, and which part of its path that is; None if it may."""
    *folders, name = path.split("/")
    if len(folders) > MAX_FOLDERS:
        return f"goes {len(folders)} folders deep; write at most {MAX_FOLDERS}"
    for part in (*folders, name):
        if trouble := name_trouble(part):
            return trouble if not folders else f"is no path, since {shown(part)} {trouble}"
    if (size := len(path.encode())) > MAX_PATH_BYTES:
        return f"has {size} bytes with its folders; write at most {MAX_PATH_BYTES}"
    return None


def shown(name: str) -> str:
    """A name for a message: in quotes, one line, what cannot be printed escaped, not too long."""
    return repr(name) if len(name) <= _SHOWN else f"{name[: _SHOWN - 20]!r}...{name[-15:]!r}"


def visible(text: str) -> str:
    """For a terminal, which obeys what it does not show: such characters are written out; lines and tabs stay."""
    if text.isascii() and text.isprintable():
        return text
    return "".join(ascii(one)[1:-1] if one not in "\n\t" and _unseen(one) else one for one in text)


def _unseen(letter: str) -> bool:
    """Control characters, line ends, whatever turns the direction of writing, and what is no character at all."""
    number = ord(letter)
    if 0xD800 <= number <= 0xDFFF:
        return True
    if number & 0xFFFE == 0xFFFE or 0xFDD0 <= number <= 0xFDEF:
        return True
    return unicodedata.category(letter) in ("Cc", "Cf", "Zl", "Zp") and letter not in _JOINERS
