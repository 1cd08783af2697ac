"""LCM Grid: one picture for each pair of settings, from the same noise, on one sheet."""

import json
import time
import weakref
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from types import SimpleNamespace
from typing import Any

import torch

from ...samplers.preset import Preset
from ...samplers.presets import PRESETS
from ..lora import patches
from ..progress import Progress
from ..sampling.sampling import sample
from .axes import NOTHING, STRENGTH, WORDS, Axis, cells, check_axes, parse_axis, with_word
from .report import describe
from .sheet import Sheet, as_picture, cell_size

SHOWN = 1024  # longest side of the sheet while it fills up
KEPT, KEPT_BYTES = 4, 2**30  # grids whose cells are remembered, and how much of them


@dataclass(frozen=True)
class Parts:
    """What is connected. positive: None where the prompt is encoded here, with `clip`."""

    model: Any
    positive: Any
    negative: Any
    latent: Any
    vae: Any
    lora: Any
    clip: Any
    preset: Any


@dataclass(frozen=True)
class Made:
    """grid: IMAGE of the sheet.   pictures: IMAGE of each cell that there is, row by row.   settings: of each in words.
    about: the axes and what all cells share, for the file."""

    grid: torch.Tensor
    pictures: list[torch.Tensor]
    settings: list[str]
    report: str
    about: dict[str, Any]


@dataclass
class _Cells:
    """The pictures of a grid, by their settings.   parts: functions that give what was connected, see _hold."""

    parts: list
    made: dict[str, torch.Tensor] = field(default_factory=dict)

    @property
    def size(self) -> int:
        return sum(picture.nbytes for picture in self.made.values())


_kept: list[_Cells] = []
_GONE = object()


def grid(parts: Parts, *, row_axis, rows, column_axis, columns, prompt, cell, base: Mapping[str, Any]) -> Made:
    """All cells, made or found again. What was made before an interrupt or an error is found by the next run.

    base: seed, steps, cfg, denoise and gamma of every cell; a preset that is connected replaces all but the seed and
    denoise, and an axis replaces either.   cell: longest side of a picture on the sheet.
    A cell that cannot be made, such as steps that its preset does not have, holds the reason in place of a picture.
    Raises ValueError for axes that need what is not connected, before anything is made, and if no cell could be made.
    """
    down, across = parse_axis(row_axis, rows), parse_axis(column_axis, columns)
    check_axes(down, across)
    _check_parts(parts, down, across, prompt)
    plan, kept, patched, board = cells(down, across), _remembered(parts), _Patched(parts), _Board(down, across, cell)
    started, progress = time.monotonic(), Progress()
    for done, (row, column, own) in enumerate(plan, start=1):
        text = _words(prompt, own, (down, across))
        key = json.dumps([dict(base), {name: own[name] for name in own if name != WORDS}, text], sort_keys=True)
        try:
            if key not in kept.made:
                kept.made[key] = _picture(parts, patched, own, base, text)
            board.show(row, column, kept.made[key])
        except ValueError as error:
            board.fail(row, column, str(error))
        progress(done, len(plan), board.preview)
    _forget()
    return board.made(patched.sampled, time.monotonic() - started, base)


class _Board:
    """The sheet as it fills up. The first picture tells how large its cells are."""

    def __init__(self, down: Axis, across: Axis, longest: int) -> None:
        self.down, self.across, self.longest = down, across, longest
        self.sheet: Sheet | None = None
        self.found: dict[tuple[int, int], torch.Tensor] = {}
        self.failed: dict[tuple[int, int], str] = {}

    def show(self, row: int, column: int, picture: torch.Tensor) -> None:
        self.found[row, column] = picture
        if self.sheet is None:
            height, width = picture.shape[1:3]
            size = cell_size((width, height), self.longest, len(self.down.values), len(self.across.values))
            self.sheet = Sheet(self.down.labels, self.across.labels, size)
            for place in self.failed:
                self.sheet.note(*place, "not made")
        self.sheet.paste(row, column, as_picture(picture[0]))

    def fail(self, row: int, column: int, reason: str) -> None:
        self.failed[row, column] = reason
        if self.sheet is not None:
            self.sheet.note(row, column, "not made")

    def preview(self):
        """What ComfyUI's progress bar takes for a picture, None while there is nothing to see."""
        return None if self.sheet is None else ("JPEG", self.sheet.small(SHOWN), SHOWN)

    def told(self, place: tuple[int, int]) -> str:
        """The settings of a cell."""
        row, column = place
        return ", ".join(filter(None, (self.down.labels[row], self.across.labels[column]))) or "as set"

    def made(self, sampled: int, seconds: float, base: Mapping[str, Any]) -> Made:
        """sampled: cells that were made in this run.   Raises ValueError if there is none at all."""
        if self.sheet is None:
            raise ValueError(f"No cell could be made. The first: {next(iter(self.failed.values()))}")
        order = sorted(self.found)
        return Made(
            grid=self.sheet.tensor(),
            pictures=[self.found[place] for place in order],
            settings=[self.told(place) for place in order],
            report=describe(
                axes=[axis.setting for axis in (self.down, self.across) if axis.setting != NOTHING],
                sampled=sampled,
                known=len(self.found) - sampled,
                seconds=seconds,
                failed=[(self.told(place), reason) for place, reason in self.failed.items()],
            ),
            about={"rows": _about(self.down), "columns": _about(self.across), "all": dict(base)},
        )


class _Patched:
    """The model with the LoRA at a strength, patched anew only when the strength changes, and its prompt."""

    def __init__(self, parts: Parts) -> None:
        self.parts, self.sampled = parts, 0
        self._strength: float | None = None
        self._applied: Any = None
        self._texts: dict[str, Any] = {}

    def at(self, strength: float | None) -> Any:
        """The MODEL, of which everything else here is asked for next.   strength: None is without the LoRA."""
        parts = self.parts
        if self._applied is None or strength != self._strength:
            self._strength, self._texts = strength, {}
            self._applied = SimpleNamespace(model=parts.model, clip=parts.clip)
            if strength is not None:
                self._applied = patches.apply(parts.model, parts.clip, parts.lora, strength, strength)
        return self._applied.model

    @property
    def clip(self) -> Any:
        """The CLIP with the LoRA on it, None where there is none."""
        return self._applied.clip

    def positive(self, text: str) -> Any:
        """CONDITIONING of the text, or what is connected where there is no CLIP."""
        clip = self._applied.clip
        if clip is None or not text.strip():
            return self.parts.positive
        if text not in self._texts:
            self._texts[text] = clip.encode_from_tokens_scheduled(clip.tokenize(text))
        return self._texts[text]


def _picture(parts: Parts, patched: _Patched, own: Mapping, base: Mapping, text: str) -> torch.Tensor:
    """(1, height, width, channels) of one cell, on the CPU."""
    settings = dict(base) | {name: own[name] for name in base if name in own}
    model = patched.at(own.get(STRENGTH, None if parts.lora is None else 1.0))
    latent = sample(
        model, patched.positive(text), parts.negative, parts.latent, **settings, cfg_steps=-1, original_steps=50,
        preset=_preset(parts.preset, own), clip=patched.clip, watch=lambda *_: None,  # the sheet is what is shown
    )  # fmt: skip
    images = parts.vae.decode(latent["samples"])
    patched.sampled += 1
    # Of a batch the first, of a video the first frame.
    return images.reshape(-1, *images.shape[-3:])[:1].float().cpu()


def _preset(connected: Preset | None, own: Mapping[str, Any]) -> Preset | None:
    """The preset of a cell, with what the axes say in place of its own numbers."""
    preset = PRESETS[own["preset"]] if "preset" in own else connected
    if preset is None:
        return None
    if "steps" in own:
        preset = preset.with_steps(own["steps"])
    return replace(preset, **{name: own[name] for name in ("cfg", "gamma") if name in own})


def _words(prompt: str, own: Mapping[str, Any], axes: tuple[Axis, Axis]) -> str:
    if WORDS not in own:
        return prompt
    first = next(axis.values[0] for axis in axes if axis.setting == WORDS)
    return with_word(prompt, first, own[WORDS])


def _check_parts(parts: Parts, down: Axis, across: Axis, prompt: str) -> None:
    varied = {down.setting: down, across.setting: across}
    if STRENGTH in varied and parts.lora is None:
        raise ValueError(
            f"{STRENGTH} is varied, but no lora is connected. Connect a Load LoRA, or vary something else."
        )
    if WORDS in varied:
        first = varied[WORDS].values[0]
        if parts.clip is None or first not in prompt:
            raise ValueError(
                f"{WORDS} are varied, and {first[:40]!r} is what the others replace. Connect clip and write a prompt that "
                "holds it into prompt."
            )
        for word in varied[WORDS].values:
            with_word(prompt, first, word)
    elif parts.positive is None and (parts.clip is None or not prompt.strip()):
        raise ValueError("There is no prompt. Connect positive, or clip and write into prompt.")


def _about(axis: Axis) -> dict[str, Any]:
    return {"setting": axis.setting, "values": list(axis.values)}


def _remembered(parts: Parts) -> _Cells:
    """The cells made with these very objects: equal ones are not enough, a changed patch is another model."""
    now = list(vars(parts).values())
    for kept in _kept:
        if all(hold() is one for hold, one in zip(kept.parts, now, strict=True)):
            _kept.remove(kept)
            break
    else:
        kept = _Cells([_hold(one) for one in now])
    _kept.append(kept)
    return kept


def _hold(one: Any):
    """A function that returns the object, or _GONE once it is no more: a new one at its address is another one.

    Models are not kept alive by it. Lists and dicts, as conditionings and latents are, can only be held as they are.
    """
    try:
        held = weakref.ref(one)
    except TypeError:
        return lambda: one
    return lambda: _GONE if (found := held()) is None else found


def _forget() -> None:
    """The oldest grids, beyond what may be kept; the last one stays, so that it can be made wider."""
    while len(_kept) > KEPT or (len(_kept) > 1 and sum(one.size for one in _kept) > KEPT_BYTES):
        del _kept[0]


def with_metadata(hidden, about: Mapping[str, Any]):
    """What ComfyUI's image saver takes for a node: prompt and workflow as given, and the grid's settings beside them."""
    more = dict(getattr(hidden, "extra_pnginfo", None) or {}) | {"lcm_kit.grid": dict(about)}
    return SimpleNamespace(hidden=SimpleNamespace(prompt=getattr(hidden, "prompt", None), extra_pnginfo=more))
