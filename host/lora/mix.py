"""Rows of LoRAs on one model: read, merged exactly and applied, as Load, Merge and Apply LoRA do one after another."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from ...samplers.preset import Preset
from . import auto, files, merging, patches
from .case import Case
from .identity import identity_of, preset_of
from .reports import in_few_words, mixed, refusal
from .slots import LORA, Slot
from .weights import LoraWeights

NONE = "none"
LCM = "lcm_lora"
ROWS = range(1, 5)  # of styles; the LCM-LoRA's is 0
EXACT = {"method": {"method": "linear"}, "size": {"size": "exact"}}


@dataclass(frozen=True, kw_only=True)
class Row:
    """number: 0 for the LCM-LoRA.   name: of a file, `auto`, or none."""

    number: int
    name: str
    strength: float
    on: bool

    @property
    def input(self) -> str:
        return f"{LORA}{self.number}" if self.number else LCM

    @property
    def used(self) -> bool:
        return self.on and self.name != NONE and self.strength != 0

    @property
    def why_not(self) -> str:
        return (
            "none"
            if self.name == NONE
            else f"{self.name}: off"
            if not self.on
            else f"{self.name}: off, its strength is 0"
        )


@dataclass(frozen=True, kw_only=True)
class Mixed:
    """lora: what was applied, None where no row is on.   preset: of the LoRA that accelerates, None without one.
    stack: (file, model strength, text encoder strength) of each row, for nodes that apply them one after another.
    """

    model: object
    clip: object
    lora: LoraWeights | None
    preset: Preset | None
    stack: list[tuple[str, float, float]]
    report: str


def rows_of(lcm_lora: str, strength: float, inputs: Mapping[str, object]) -> list[Row]:
    """The node's rows. inputs: on_1, lora_1, strength_1, on_2, ..."""
    first = Row(number=0, name=lcm_lora, strength=strength, on=True)
    others = [
        Row(number=n, name=inputs[f"{LORA}{n}"], strength=inputs[f"strength_{n}"], on=inputs[f"on_{n}"]) for n in ROWS
    ]
    return [first, *others]


def known(chosen: Mapping[str, object]) -> bool | str:
    """For ComfyUI's validate_inputs: True, or what is wrong with the first file that is not there. chosen: by input."""
    for name, value in chosen.items():
        if value in (None, NONE) or (name == LCM and value == auto.AUTO):
            continue
        if (answer := files.known(value)) is not True:
            return f"{name}: {str(answer).removeprefix('lora_name: ')}"
    return True


def fingerprint(chosen: Sequence[object]) -> tuple:
    """Changes when one of the files does."""
    return tuple(auto.fingerprint(name) for name in chosen if name != NONE)


def mix(model, clip, rows: Sequence[Row], *, block_strengths: str, allow_misfit: bool) -> Mixed:
    """Raises FileNotFoundError for a file that is not there, and ValueError, naming the row, for a LoRA of another base.

    block_strengths: factors by part of the model, for all rows; see settings/block_strengths.py.
    allow_misfit: applies of such a LoRA what fits.
    """
    used = [row for row in rows if row.used]
    for row in used:
        if not (row.number == 0 and row.name == auto.AUTO) and files.known(row.name) is not True:
            raise FileNotFoundError(files.unknown(row.name))
    lines = {row.number: row.why_not for row in rows if not row.used}
    slots, cases, stack, notes = [], [], [], []
    for row in used:
        name, found = auto.choose(row.name, model) if row.number == 0 else (row.name, [])
        notes += found
        weights = files.read_lora(name)
        case = patches.case_of(weights, identity_of(weights), model, clip)
        wrong = case.wrong(demand_all=row.number == 0)
        if wrong and not allow_misfit:
            raise ValueError(f"{row.input}: {refusal(case)}")
        slots.append(Slot(number=row.number, weights=weights, strength=row.strength))
        cases.append(case)
        stack.append((name, row.strength, row.strength))
        lines[row.number] = f"{name} * {row.strength:g}: {in_few_words(case, wrong)}"
    said = {row.input: lines[row.number] for row in rows}
    if not slots:
        return Mixed(model=model, clip=clip, lora=None, preset=None, stack=[], report=mixed(0, said))
    merged, merge_report = merging.merge_used(
        slots, [row.number for row in rows], **EXACT, block_strengths=block_strengths
    )
    done = patches.apply(model, clip, merged, 1.0, 1.0, allow_misfit=allow_misfit)
    report = mixed(len(slots), said, notes, merge_report, done.report)
    return Mixed(model=done.model, clip=done.clip, lora=merged, preset=_preset(cases), stack=stack, report=report)


def _preset(cases: Sequence[Case]) -> Preset | None:
    """The settings of the first row that says which it wants."""
    return next((preset_of(case.identity) for case in cases if case.identity and case.identity.preset), None)
