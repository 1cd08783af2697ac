"""ComfyUI workflows in API format ({id: {class_type, inputs}}), as the demo and the tests post them.

`style_in_few_steps` is what demo/workflow.json shows as a graph, `lcm_only` the shortest way. The others make many
pictures at once, with the models loaded once.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

STYLE_STRENGTH = 0.8  # lambda_1 and lambda_2 of the paper's merge (Luo et al. 2023, arXiv 2311.05556, section 3.2)
LCM_STRENGTH = 1.0

# What stands against LCM: the usual sampler with guidance.
BASELINE_CFG = 3.0
BASELINE_SAMPLER = "dpmpp_2m"
BASELINE_SCHEDULER = "karras"


@dataclass(frozen=True)
class Files:
    """Names in ComfyUI's model folders. vae: None takes the checkpoint's own.   phased: the LCM-LoRA in 4 phases, where there
    is one.   size: pixels of a side.
    """

    checkpoint: str
    vae: str | None
    style: str
    lcm: str
    size: int
    phased: str | None = None


TINY = Files(
    checkpoint="tiny_emoji.safetensors",
    vae="tiny_emoji_vae.safetensors",
    style="tiny_emoji_ink_lora.safetensors",
    lcm="tiny_emoji_lcm_lora.safetensors",
    phased="tiny_emoji_phased_lora.safetensors",
    size=64,
)
SD15 = Files(
    checkpoint="v1-5-pruned-emaonly-fp16.safetensors",
    vae=None,
    style="my-style-lora.safetensors",
    lcm="lcm-lora-sdv1-5.safetensors",
    size=512,
)


@dataclass(frozen=True)
class Shot:
    """One picture to make."""

    prompt: str
    seed: int
    steps: int


@dataclass(frozen=True)
class Way:
    """A way to make pictures. style, lcm: strengths, 0 leaves the LoRA out.   phased: the LCM-LoRA is that in phases, which
    brings its own preset.
    """

    name: str
    style: float
    lcm: float
    cfg: float
    phased: bool = False

    @property
    def calls_per_step(self) -> int:
        """Evaluations of the UNet: guidance asks it with and without the prompt, cfg 1 only with."""
        return 1 if self.cfg == 1 else 2


LCM = Way(f"LCM-LoRA {LCM_STRENGTH}, LCM KSampler, cfg 1", 0, LCM_STRENGTH, 1)
PHASED = Way("LCM-LoRA in 4 phases, LCM KSampler, preset", 0, LCM_STRENGTH, 1, phased=True)
STYLED_LCM = Way(
    f"ink {STYLE_STRENGTH} + LCM-LoRA {LCM_STRENGTH}, LCM KSampler, cfg 1", STYLE_STRENGTH, LCM_STRENGTH, 1
)
STYLED_BASELINE = Way(f"ink {STYLE_STRENGTH}, DPM++ 2M, cfg {BASELINE_CFG}", STYLE_STRENGTH, 0, BASELINE_CFG)

Link = list[Any]
"""[id of a node, index of its output]"""


class Graph(dict[str, dict[str, Any]]):
    """A workflow that is being written down."""

    def add(self, class_type: str, **inputs: Any) -> str:
        """Adds a node and returns its id. Links are [id, index of the output]."""
        node = str(len(self) + 1)
        self[node] = {"class_type": class_type, "inputs": inputs}
        return node


@dataclass
class Loaded:
    """Outputs that every picture needs."""

    model: Link
    clip: Link
    vae: Link


def load(graph: Graph, files: Files) -> Loaded:
    checkpoint = graph.add("CheckpointLoaderSimple", ckpt_name=files.checkpoint)
    vae = [checkpoint, 2] if files.vae is None else [graph.add("VAELoader", vae_name=files.vae), 0]
    return Loaded([checkpoint, 0], [checkpoint, 1], vae)


def merge(graph: Graph, files: Files, style: float, lcm: float) -> Link:
    """Link to one LORA_MODEL: style * style LoRA + lcm * LCM-LoRA."""
    first = graph.add("LCMKitLoadLoRA", lora_name=files.style)
    second = graph.add("LCMKitLoadLoRA", lora_name=files.lcm)
    slots = {"lora_1": [first, 0], "strength_1": style, "lora_2": [second, 0], "strength_2": lcm}
    unused = {f"strength_{slot}": 1.0 for slot in range(3, 5)}
    merged = graph.add("LCMKitMergeLoRA", **slots, **unused, method="linear", size="exact")
    return [merged, 0]


def style_in_few_steps(files: Files, shot: Shot, *, batch: int = 1) -> Graph:
    """The paper's main job: a style LoRA and the LCM-LoRA, merged and applied, then the LCM KSampler."""
    graph = Graph()
    loaded = load(graph, files)
    lora = merge(graph, files, STYLE_STRENGTH, LCM_STRENGTH)
    applied = graph.add(
        "LCMKitApplyLoRA", model=loaded.model, clip=loaded.clip, lora=lora, strength_model=1.0, strength_clip=1.0
    )
    _finish(graph, [applied, 0], [applied, 1], loaded.vae, files, shot, batch)
    return graph


def lcm_only(files: Files, shot: Shot, *, batch: int = 1) -> Graph:
    """The shortest way: LCM-LoRA Loader, which also sets steps and cfg, and LCM KSampler."""
    graph = Graph()
    loaded = load(graph, files)
    loader = graph.add("LCMKitLoader", model=loaded.model, lora_name=files.lcm, strength_model=1.0, wrong_base="refuse")
    _finish(graph, [loader, 0], loaded.clip, loaded.vae, files, shot, batch, steps=[loader, 4], cfg=[loader, 5])
    return graph


def strength_by_steps(files: Files, prompt: str, seed: int) -> Graph:
    """One sheet by LCM Grid: the style's strength downwards, steps to the right."""
    graph = Graph()
    loaded = load(graph, files)
    loader = graph.add("LCMKitLoader", model=loaded.model, lora_name=files.lcm, strength_model=1.0, wrong_base="refuse")
    style = graph.add("LCMKitLoadLoRA", lora_name=files.style)
    positive = graph.add("CLIPTextEncode", text=prompt, clip=loaded.clip)
    latent = graph.add("EmptyLatentImage", width=files.size, height=files.size, batch_size=1)
    graph.add(
        "LCMKitGrid", model=[loader, 0], latent_image=[latent, 0], vae=loaded.vae, positive=[positive, 0], lora=[style, 0],
        row_axis="strength of lora", rows="0:1.2:0.4", column_axis="steps", columns="1, 2, 4, 8", seed=seed, steps=4,
        cfg=1.0, cell=128,
    )  # fmt: skip
    return graph


def _finish(
    graph: Graph, model: Link, clip: Link, vae: Link, files: Files, shot: Shot, batch: int, **sampler: Any
) -> None:
    positive = graph.add("CLIPTextEncode", text=shot.prompt, clip=clip)
    latent = graph.add("EmptyLatentImage", width=files.size, height=files.size, batch_size=batch)
    inputs = lcm_inputs(shot) | sampler
    sampled = graph.add("LCMKitKSampler", model=model, positive=[positive, 0], latent_image=[latent, 0], **inputs)
    decoded = graph.add("VAEDecode", samples=[sampled, 0], vae=vae)
    graph.add("SaveImage", images=[decoded, 0], filename_prefix="LCMKit/picture")


def lcm_inputs(shot: Shot) -> dict[str, Any]:
    """The settings of an LCM KSampler."""
    return {
        "seed": shot.seed,
        "steps": shot.steps,
        "cfg": 1.0,
        "denoise": 1.0,
        "gamma": 1.0,
        "cfg_steps": -1,
        "original_steps": 50,
    }


def pictures(files: Files, way: Way, shots: Iterable[Shot]) -> tuple[Graph, list[tuple[str, str]]]:
    """A graph that makes every shot in one way, and for each shot the ids of its sampler and its preview."""
    graph = Graph()
    loaded = load(graph, files)
    model, preset = loaded.model, {}
    if way.lcm and way.style:
        lora = merge(graph, files, way.style, way.lcm)
        model = [graph.add("LCMKitApplyLoRA", model=model, lora=lora, strength_model=1.0, strength_clip=1.0), 0]
    elif way.lcm:
        name = files.phased if way.phased else files.lcm
        loader = graph.add("LCMKitLoader", model=model, lora_name=name, strength_model=way.lcm, wrong_base="refuse")
        model = [loader, 0]
        preset = {"preset": [loader, 2]} if way.phased else {}
    elif way.style:
        model = [graph.add("LoraLoaderModelOnly", model=model, lora_name=files.style, strength_model=way.style), 0]
    latent = [graph.add("EmptyLatentImage", width=files.size, height=files.size, batch_size=1), 0]
    texts: dict[str, Link] = {}
    made = []
    for shot in shots:
        for text in ("", shot.prompt):
            if text not in texts:
                texts[text] = [graph.add("CLIPTextEncode", text=text, clip=loaded.clip), 0]
        at = {"model": model, "positive": texts[shot.prompt], "latent_image": latent}
        if way.lcm:
            sampled = graph.add("LCMKitKSampler", **at, **lcm_inputs(shot), **preset)
        else:
            sampled = graph.add(
                "KSampler",
                **at,
                negative=texts[""],
                seed=shot.seed,
                steps=shot.steps,
                cfg=way.cfg,
                denoise=1.0,
                sampler_name=BASELINE_SAMPLER,
                scheduler=BASELINE_SCHEDULER,
            )
        decoded = graph.add("VAEDecode", samples=[sampled, 0], vae=loaded.vae)
        made.append((sampled, graph.add("PreviewImage", images=[decoded, 0])))
    return graph, made
