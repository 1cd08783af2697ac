"""The Markdown tables of quality_against_steps.py."""

from setting import markdown

from frechet import jackknife_error

BASE = "LCM Kit"


def tables(results: dict) -> str:
    """Score in percent, Frechet distance, and its difference to LCM Kit's at equal calls.

    A row a way, a column a number of steps.
    """
    rows = [row for row in results["rows"] if not row["way"].startswith("teacher")]
    steps = sorted({row["steps"] for row in rows})
    ways = list(dict.fromkeys(row["way"] for row in rows))
    found = {(row["way"], row["steps"]): row for row in rows}

    def table(title: str, cell) -> str:
        rows = ([way, *(cell(found[way, n]) if (way, n) in found else "" for n in steps)] for way in ways)
        columns = ["way", *(f"{n} step{'s' * (n > 1)}" for n in steps)]
        return f"{title}:\n\n{markdown(columns, (row for row in rows if any(row[1:])))}"

    score, distance = "Prompted concept named, %", "Frechet distance to the teacher"
    for floor in results["rows"]:
        if floor["way"].startswith("teacher"):
            score += f" (the teacher: {100 * floor['score']:.1f})"
            distance += f" (the floor, teacher against itself: {floor['frechet']:.1f})"

    def difference(row: dict) -> str:
        base = found.get((BASE, row["steps"]))
        if base is None or row is base or row["calls"] != base["calls"]:
            return ""
        pairs = zip(row["frechet_without_seed"], base["frechet_without_seed"], strict=True)
        return f"{row['frechet'] - base['frechet']:+.1f} ± {jackknife_error([a - b for a, b in pairs]):.1f}"

    return "\n\n".join([
        table(score, lambda row: f"{100 * row['score']:.1f}"),
        table(distance, lambda row: f"{row['frechet']:.1f}"),
        # The same initial noise on both sides: far surer than either distance.
        table(f"Frechet distance less {BASE}'s at the same steps, ± standard error over seeds", difference),
    ])  # fmt: skip
