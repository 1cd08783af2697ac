"""Makes pictures through a running ComfyUI and keeps count of model calls and time."""

from __future__ import annotations

import io
import statistics
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass

from comfyui_client import Client, ExecutionFailed
from graphs import TINY, Shot, Way, pictures
from PIL import Image
from tqdm import tqdm


@dataclass(frozen=True)
class Made:
    """A finished picture. seconds: of its sampler node, so without text encoder and decoder."""

    way: Way
    shot: Shot
    picture: Image.Image
    seconds: float


Album = dict[tuple[Way, Shot], Made]


def make(client: Client, orders: Sequence[tuple[Way, Sequence[Shot]]]) -> Album:
    """Every picture, with one progress bar over all calls of the UNet. Raises ExecutionFailed."""
    # ComfyUI makes equal pictures of one workflow only once.
    unique = [(way, list(dict.fromkeys(shots))) for way, shots in orders]
    calls = sum(way.calls_per_step * shot.steps for way, shots in unique for shot in shots)
    album: Album = {}
    seldom = 0.1 if sys.stderr.isatty() else 10  # a log file wants few lines
    with tqdm(total=calls, unit="call", desc="model calls", mininterval=seldom, dynamic_ncols=True) as bar:
        for way, shots in unique:
            album |= {(way, made.shot): made for made in _make_in_one_way(client, way, shots, bar)}
    return album


def _make_in_one_way(client: Client, way: Way, shots: Sequence[Shot], bar: tqdm) -> list[Made]:
    graph, ids = pictures(TINY, way, shots)
    steps = {sampler: shot.steps for (sampler, _), shot in zip(ids, shots, strict=True)}
    done = dict.fromkeys(steps, 0)
    started: dict[str, float] = {}
    ended: dict[str, float] = {}
    running = None

    def advance(node: str, step: int) -> None:
        bar.update((step - done[node]) * way.calls_per_step)
        done[node] = step

    prompt_id = client.submit(graph)
    for event in client.follow(prompt_id):
        if event.kind == "execution_error":
            raise ExecutionFailed(event.data)
        if event.kind == "progress" and event.node in steps:
            advance(event.node, event.data["value"])
        if event.kind in ("executing", "execution_success"):
            now = time.monotonic()
            if running in steps:
                ended[running] = now
                advance(running, steps[running])
            running = event.node
            if running in steps:
                started[running] = now
    outputs = client.history(prompt_id)["outputs"]
    made = []
    for (sampler, preview), shot in zip(ids, shots, strict=True):
        (entry,) = outputs[preview]["images"]
        picture = Image.open(io.BytesIO(client.view(entry))).convert("RGB")
        made.append(Made(way, shot, picture, ended[sampler] - started[sampler]))
    return made


def table(album: Album) -> str:
    """Way, steps, model calls and the median time of sampling one picture, as text."""
    groups: dict[tuple[str, int], list[Made]] = {}
    for made in album.values():
        groups.setdefault((made.way.name, made.shot.steps), []).append(made)
    wide = max(len(name) for name, _ in groups)
    lines = [f"{'way':{wide}}  steps  model calls  seconds per picture"]
    for (name, steps), ones in sorted(groups.items()):
        # The median: the first picture of a way also waits for the model to be loaded and patched.
        seconds = statistics.median(one.seconds for one in ones)
        lines.append(f"{name:{wide}}  {steps:5}  {steps * ones[0].way.calls_per_step:11}  {seconds:19.3f}")
    return "\n".join(lines)
