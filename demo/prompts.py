"""What the demo draws, and what its tiny model can read."""

from __future__ import annotations

import re
from pathlib import Path

VOCABULARY = Path(__file__).parent / "tiny_emoji" / "vocabulary.txt"

GRID = (
    ("cat face", "fox face", "panda face", "frog face", "owl", "penguin", "octopus", "butterfly"),
    ("grinning smiley", "robot", "ghost", "pumpkin", "star", "sun", "snowflake", "mushroom"),
    (
        "pizza blue background",
        "strawberry white background",
        "donut pink background",
        "red heart pink background",
        "rocket blue background",
        "balloon green background",
        "crown purple background",
        "tree yellow background",
    ),
)
FIGURE = ("cat face", "rocket blue background")
EXAMPLES = ("cat face", "red heart pink background", "rocket", "pizza blue background")


def split(prompt: str) -> tuple[list[str], list[str]]:
    """(words that the model knows, other words), found in the prompt as its tokenizer does."""
    vocabulary = set(VOCABULARY.read_text(encoding="utf-8").split())
    words = re.findall(r"[a-z]+", prompt.lower())
    return [word for word in words if word in vocabulary], [word for word in words if word not in vocabulary]
