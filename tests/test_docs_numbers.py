"""Numbers that documents repeat are those of benchmarks/RESULTS.md, where each table is a benchmark's own output."""

import re
from functools import cache
from pathlib import Path

import pytest

from lcm_kit.tests.helpers import ROOT

RESULTS = ROOT / "benchmarks" / "RESULTS.md"
SAMPLED = {  # what docs/results.md calls a way of sampling -> what the benchmark calls it
    "LCM-LoRA, LCM Kit": "LCM Kit",
    "DPM++ 2M karras, guidance 3": "DPM++ 2M, karras",
    "DPM++ 2M sgm_uniform, guidance 3": "DPM++ 2M, sgm_uniform",
    "DDIM, guidance 3": "DDIM, sgm_uniform",
}
PICTURES = {
    "25 guided steps (50)": "DPM++ 2M karras, 25 steps: its own pictures",
    "4 guided steps (8)": "DPM++ 2M sgm_uniform, 4 steps",
    "2 guided steps (4)": "DPM++ 2M sgm_uniform, 2 steps",
    "LCM sampler without LCM-LoRA (4)": "LCM Kit's sampler without an LCM-LoRA, 4 steps",
    "4 LCM steps (4)": "LCM-LoRA, 4 steps",
    "LCM-LoRA at 0.7 (4)": "LCM-LoRA, 4 steps, LCM-LoRA 0.7",
}
LOWER = "the same, guidance lower (4)"  # the best in names of three


@cache
def tables(page: Path) -> list[tuple[str, list[dict[str, str]]]]:
    """(the paragraph before it, its rows as heading -> cell) of each table."""
    found = []
    blocks = re.split(r"\n\s*\n", page.read_text(encoding="utf-8"))
    for before, block in zip(["", *blocks], blocks, strict=False):
        lines = [
            [cell.strip() for cell in line.strip().strip("|").split("|")]
            for line in block.splitlines()
            if line.startswith("|")
        ]
        if len(lines) > 2:
            found.append((before, [dict(zip(lines[0], cells, strict=False)) for cells in lines[2:]]))
    return found


def only(page: Path, heading: str, before: str = "") -> list[dict[str, str]]:
    """The one table whose first heading is this one, behind a paragraph with those words."""
    those = [rows for told, rows in tables(page) if next(iter(rows[0])) == heading and before in told]
    assert len(those) == 1, (page.name, heading, before, len(those))
    return those[0]


def test_distance_from_diffusers():
    """docs/sampling.md has the table as it is."""
    assert only(ROOT / "docs" / "sampling.md", "set-up") == only(RESULTS, "set-up")


@pytest.mark.parametrize(
    ("column", "told"),
    [("names the prompt", "Prompted concept named, %"), ("Frechet to teacher", "Frechet distance to the teacher")],
)
def test_quality_against_steps(column, told):
    measured = {row["way"]: row for row in only(RESULTS, "way", told)}
    shown = [row for row in only(ROOT / "docs" / "results.md", "way") if row["way"] in SAMPLED]
    assert len(shown) > 5
    for row in shown:
        steps = row["steps"] + (" step" if row["steps"] == "1" else " steps")
        assert row[column].removesuffix(" %") == measured[SAMPLED[row["way"]]][steps], row


@cache
def universality() -> dict[tuple[str, str], tuple[float, float]]:
    """(model, way) -> names in %, Frechet distance."""
    return {
        (row["model"], row["pictures by"]): (
            float(row["names the prompt"].removesuffix("%")),
            float(row["Frechet to its own pictures"]),
        )
        for row in only(RESULTS, "model", "Twemoji LoRA and fine-tune are trained here")
    }


def test_on_models_it_never_saw():
    """Named to a tenth as it is, distances rounded."""
    for row in only(ROOT / "docs" / "results.md", "model"):
        model = row["model"]
        lower = max(universality()[model, f"DPM++ 2M sgm_uniform, 2 steps, guidance {g}"] for g in ("1.5", "2", "2.5"))
        wanted = {column: universality()[model, way] for column, way in PICTURES.items()} | {LOWER: lower}
        shown = {
            column: tuple(map(float, re.findall(r"[\d.]+", cell))) for column, cell in row.items() if column != "model"
        }
        for column, (names, distance) in wanted.items():
            assert shown[column][0] == names, (model, column)
            assert abs(shown[column][1] - distance) <= 0.5, (model, column)


@pytest.mark.parametrize(("cfg", "quantile", "column"), [
    (cfg, quantile, column) for cfg in ("1.5", "2", "3", "4") for quantile, column in (("off", "off"), ("0.95", "0.95"), ("0.8", "0.8"))
])  # fmt: skip
def test_limit_denoised(cfg, quantile, column):
    measured = {row["quantile"]: row for row in only(RESULTS, "quantile")}
    shown = {row["cfg"]: row for row in only(ROOT / "web" / "docs" / "LCMKitLimitDenoised.md", "cfg")}
    names, distance = re.findall(r"[\d.]+", measured[quantile][f"cfg {cfg}"])
    told_names, told_distance = re.findall(r"[\d.]+", shown[cfg][column])
    assert (told_names, abs(float(told_distance) - float(distance)) <= 0.5) == (names, True)


def test_readme_s_few_steps():
    """Whose differences are LCM's less the other's: the table's with the other sign, and rounded."""
    readme = " ".join((ROOT / "README.md").read_text(encoding="utf-8").split())
    paired = {
        (row["model"], row["pictures by"]): (row["names less LCM-LoRA's"], row["Frechet less LCM-LoRA's"])
        for row in only(RESULTS, "model", "Twemoji LoRA and fine-tune are trained here")
    }

    def turned(text: str) -> tuple[float, float]:
        difference, error = (float(part) for part in text.split(" ± "))
        return -difference, error

    names, distance = map(turned, paired["the base", "DPM++ 2M sgm_uniform, 4 steps"])
    assert (
        f"(names {names[0]:+g} ± {names[1]:g} points, distance to the model's own pictures {distance[0]:+g} ± {distance[1]:g})"
        in readme
    )
    names, distance = map(turned, paired["the base", "DPM++ 2M sgm_uniform, 2 steps"])
    said = f"at equal calls {names[0]:.0f} ± {names[1]:g} points and {-distance[0]:.0f} ± {distance[1]:g} in distance ahead of 2 guided"
    assert said in readme
    ink = {way: names for (model, way), (names, _) in universality().items() if model == "base + ink LoRA"}
    assert (
        f"names {ink['LCM-LoRA, 4 steps']:.0f} % with ink, the style alone with 50 calls "
        f"{ink['DPM++ 2M karras, 25 steps: its own pictures']:.0f} %, two guided steps at equal calls "
        f"{ink['DPM++ 2M sgm_uniform, 2 steps']:.0f} %"
    ) in readme
