"""Numbers in sentences, and lists that numbers make short."""

import re
from collections.abc import Sequence

# A module with the number of its block.
_NUMBERED = re.compile(r"(.+?[._])(\d+)([._].+)")


def many(count: int, several: str, one: str = "") -> str:
    """The number with what there are so many of: many(2, "modules") is "2 modules", and many(1, "modules") "1 module".

    one: what stands after 1, where it is not the other without its last s: many(1, "modules fit", "module fits").
    """
    return f"{count} {(one or several.removesuffix('s')) if count == 1 else several}"


def counted(modules: Sequence[str]) -> list[str]:
    """Names of modules, those of one place in several blocks once: "blocks.0-39.cross_attn.k_img"."""
    numbers: dict[tuple[str, str], list[int]] = {}
    for module in modules:
        match = _NUMBERED.fullmatch(module)
        numbers.setdefault((match[1], match[3]) if match else (module, ""), []).append(int(match[2]) if match else -1)
    return [
        before if found == [-1] else f"{before}{_ranges(found)}{behind}" for (before, behind), found in numbers.items()
    ]


def _ranges(numbers: Sequence[int]) -> str:
    parts: list[list[int]] = []
    for number in sorted(numbers):
        if parts and number == parts[-1][-1] + 1:
            parts[-1].append(number)
        else:
            parts.append([number])
    return ",".join(str(run[0]) if len(run) == 1 else f"{run[0]}-{run[-1]}" for run in parts)
