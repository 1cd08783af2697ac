"""Writes docs/presets.md: every preset of samplers/presets.py with its numbers and where they are from.

make presets
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
DOCUMENT = ROOT / "docs" / "presets.md"
HELP_PAGE = ROOT / "web" / "docs" / "LCMKitPreset.md"

INTRODUCTION = """\
# Presets

What each preset of **LCM Preset** sets, for what, and where it is from. Made by `make presets` from
`samplers/presets.py`, where a row adds one. Numbers are the source's own; none is a guess of ours.

- **gamma** 1 draws the noise anew at every step (LCM's way), 0 draws none after the first (Euler's), between a share.
  Where the source uses a solver of higher order (res_multistep, uni_pc), gamma 0 takes the same levels with Euler's method.
- **levels**: *timesteps* are thousandths of the way to noise on every model; *sigmas* are a flow model's noise levels,
  1 being pure noise; *of 50* picks the steps from a training grid of 50; *even* spaces them evenly in time, 1, 0.75, 0.5,
  0.25 for four, and sends them through the model's own shift; *normal* and *sgm_uniform* are ComfyUI's spacings of these names.
- **shift**: what the model should have. If it has another, the log says so and names the node to add; the run goes through
  the model's own.
- **LoRA**: its strength; a dash where the preset is for a whole model, or the source says none.
- **steps** in bold are the only ones the preset takes; others are the usual number.
- **denoise** below 1 starts at the level asked for. Where timesteps are listed and gamma is 0 the steps stay as long as
  they were trained for, so that there are fewer; everywhere else all are run, each the shorter.
- The presets of flow models are refused by other models. Those of Stable Diffusion run on flow models too, evenly
  spaced where they list no timesteps.
"""
HEADER = ("preset", "for", "steps", "cfg", "gamma", "levels", "shift", "LoRA", "there with", "also", "source", "date")
TITLES = {False: "Stable Diffusion and its kin", True: "Flow models"}


def levels(preset) -> str:
    """The column of that name."""
    if preset.sigmas:
        return "sigmas " + " ".join(f"{sigma:.6g}" for sigma in preset.sigmas)
    if preset.timesteps:
        return "timesteps " + " ".join(map(str, preset.timesteps))
    return preset.spacing if preset.flow else f"of {preset.original_steps}"


def cells(preset) -> list[str]:
    """One for each column of HEADER."""
    gammas = preset.gamma if isinstance(preset.gamma, tuple) else (preset.gamma,)
    also = [f"first {preset.first_expert} steps by the high-noise model"] if preset.first_expert else []
    return [
        preset.name,
        preset.models,
        f"**{preset.steps}**" if preset.fixed else str(preset.steps),
        f"{preset.cfg:g}",
        " ".join(f"{gamma:g}" for gamma in gammas),
        levels(preset),
        "-" if preset.shift is None else f"{preset.shift:g}",
        "-" if preset.strength is None else f"{preset.strength:g}",
        preset.sampler,
        "; ".join([*also, *([preset.remark] if preset.remark else [])]),
        preset.source,
        preset.date,
    ]


def document(presets: Mapping) -> str:
    """The whole text of docs/presets.md."""
    return "\n".join([INTRODUCTION, *sections(presets, table)])


def item(preset) -> str:
    """Of the help page's list, from the same words: its panel is too narrow for a table."""
    name, models, steps, cfg, gamma, spaced, shift, *_ = cells(preset)
    said = [f"steps {steps}", f"cfg {cfg}", f"gamma {gamma}", spaced, *([] if shift == "-" else [f"shift {shift}"])]
    return f"- **{name}** for {models}: {', '.join(said)}\n"


def help_page(text: str, presets: Mapping) -> str:
    """The text of the help page with its closing lists made anew."""
    lists = sections(presets, lambda own: "".join(map(item, own)))
    return "\n".join([text[: text.index(f"## {TITLES[False]}")].rstrip() + "\n", *lists])


def table(presets: Iterable) -> str:
    return "".join(map(line, [HEADER, ["---"] * len(HEADER), *map(cells, presets)]))


def sections(presets: Mapping, written: Callable[[list], str]) -> list[str]:
    """One for Stable Diffusion, one for flow models, each with its heading. written: what stands under it."""
    by_kind = {flow: [preset for preset in presets.values() if preset.flow is flow] for flow in TITLES}
    return [f"## {title}\n\n{written(by_kind[flow])}" for flow, title in TITLES.items()]


def line(row: Iterable[str]) -> str:
    return f"| {' | '.join(cell.replace('|', '/') for cell in row)} |\n"


def main() -> int:
    from workflows import package_module  # the script beside this one, which is found when this one is run

    presets = package_module("samplers.presets")
    DOCUMENT.write_text(document(presets.PRESETS), encoding="utf-8")
    HELP_PAGE.write_text(help_page(HELP_PAGE.read_text(encoding="utf-8"), presets.PRESETS), encoding="utf-8")
    print(f"{len(presets.PRESETS)} presets in {DOCUMENT.relative_to(ROOT)} and {HELP_PAGE.relative_to(ROOT)}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
