"""Models in two halves, each with a LoRA of its own: what can be said of whether the two belong together.

Wan 2.2's A14B models come as two files, one for high noise and one for low. Both halves have the same weights' names and
shapes, and so have their LoRAs, so that only names and published hashes tell one from the other.
"""

from .case import Case

_OF = "of Wan 2.2"


def about_halves(case: Case) -> list[str]:
    """A line for a LoRA that is for one half, [] for any other. It is never refused: names may be wrong."""
    half = case.identity.expert if case.identity else None
    if half is None or case.model.make is None or "Wan" not in case.model.make.name:
        return []
    said = f"It is for the {half.expert}-noise half {_OF}, by {half.source}"
    if case.model.expert is None:
        return [
            f"{said}. Nothing says which half this model is{_file(case)}: see that it is the {half.expert}-noise one."
        ]
    if case.model.expert == half.expert:
        return [f"{said}, and this model is that half by its file name{_file(case)}."]
    return [
        f"Warning: {said}, but this model is the {case.model.expert}-noise half by its file name{_file(case)}. It is applied "
        "all the same; if the two LoRAs were swapped, swap them back."
    ]


def _file(case: Case) -> str:
    return f" ({case.model.file})" if case.model.file else ""
