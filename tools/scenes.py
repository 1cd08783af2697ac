"""Each node at work on the embedded model, for the pictures of the help pages: a graph, and which of its nodes are shown."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from ..demo.graphs import TINY, Graph, Link

Shown = list[list[str]]
"""Ids in columns from left to right."""
SCENES: dict[str, Callable[[Scene], Shown]] = {}
FULL_LCM = "LCM_Dreamshaper_v7.safetensors"
NOT_RUN = {"LCMKitGuidanceEmbedding"}  # for want of a full LCM
PLAIN = {"seed": 7, "steps": 4, "cfg": 1.0}


class Scene(Graph):
    """A graph with the embedded model in it. first: number of its first node."""

    def __init__(self, first: int = 1) -> None:
        super().__init__()
        self.first = first
        base = self.add("CheckpointLoaderSimple", ckpt_name=TINY.checkpoint)
        self.model, self.clip = [base, 0], [base, 1]
        self.vae = [self.add("VAELoader", vae_name=TINY.vae), 0]
        self.latent = [self.add("EmptyLatentImage", width=64, height=64, batch_size=1), 0]

    def add(self, class_type: str, **inputs: Any) -> str:
        node = str(self.first + len(self))
        self[node] = {"class_type": class_type, "inputs": inputs}
        return node

    def text(self, words: str, clip: Link | None = None) -> Link:
        return [self.add("CLIPTextEncode", text=words, clip=clip or self.clip), 0]

    def fast(self) -> str:
        return self.add("LCMKitLoader", model=self.model, lora_name=TINY.lcm, strength_model=1.0, wrong_base="refuse")

    def lora(self, name: str) -> Link:
        return [self.add("LCMKitLoadLoRA", lora_name=name), 0]

    def sampled(self, model: Link, **more: Any) -> str:
        given: dict[str, Any] = {"positive": self.text("cat face"), "latent_image": self.latent, "denoise": 1.0} | PLAIN
        return self.add("LCMKitKSampler", model=model, **given | more)

    def shown(self, latent: Link) -> str:
        """Four times as large, to be seen."""
        decoded = self.add("VAEDecode", samples=latent, vae=self.vae)
        large = self.add("ImageScaleBy", image=[decoded, 0], upscale_method="lanczos", scale_by=4.0)
        return self.add("PreviewImage", images=[large, 0])

    def picture(self, model: Link, **more: Any) -> str:
        return self.shown([self.sampled(model, **more), 0])

    def told(self, link: Link) -> None:
        """Makes a node run whose only use here is its report."""
        self.add("PreviewAny", source=link)


def of(node: str) -> Callable[[Callable[[Scene], Shown]], Callable[[Scene], Shown]]:
    def add(scene: Callable[[Scene], Shown]) -> Callable[[Scene], Shown]:
        SCENES[node] = scene
        return scene

    return add


@of("LCMKitKSampler")
def ksampler(scene: Scene) -> Shown:
    loader = scene.fast()
    node = scene.sampled([loader, 0], preset=[loader, 2])
    return [[loader], [node], [scene.shown([node, 0])]]


@of("LCMKitPreset")
def preset(scene: Scene) -> Shown:
    node = scene.add("LCMKitPreset", name="TCD", steps=0)
    sampler = scene.sampled([scene.fast(), 0], preset=[node, 0])
    scene.picture([scene.fast(), 0], preset=[node, 0])
    scene.shown([sampler, 0])
    return [[node], [sampler]]


@of("LCMKitSampler")
def sampler(scene: Scene) -> Shown:
    node = scene.add("LCMKitSampler", gamma=1.0, seed=-1)
    return _custom(
        scene, node, scene.add("LCMKitScheduler", model=scene.model, steps=4, denoise=1.0, original_steps=50)
    )


@of("LCMKitScheduler")
def scheduler(scene: Scene) -> Shown:
    return sampler(scene)


def _custom(scene: Scene, node: str, levels: str) -> Shown:
    model, prompt = [scene.fast(), 0], scene.text("cat face")
    custom = scene.add(
        "SamplerCustom", model=model, add_noise=True, noise_seed=7, cfg=1.0, positive=prompt, negative=prompt,
        sampler=[node, 0], sigmas=[levels, 0], latent_image=scene.latent,
    )  # fmt: skip
    return [[node, levels], [custom], [scene.shown([custom, 0])]]


@of("LCMKitAnyKSampler")
def any_ksampler(scene: Scene) -> Shown:
    node = scene.add("LCMKitAnyKSampler", model=[scene.fast(), 0], gamma=1.0, original_steps=50)
    prompt = scene.text("cat face")
    core = scene.add(
        "KSampler", model=[node, 0], positive=prompt, negative=prompt, latent_image=scene.latent, sampler_name="lcm",
        scheduler="simple", denoise=1.0, **PLAIN,
    )  # fmt: skip
    return [[node], [core], [scene.shown([core, 0])]]


@of("LCMKitGrid")
def grid(scene: Scene) -> Shown:
    style = scene.lora(TINY.style)
    node = scene.add(
        "LCMKitGrid", model=[scene.fast(), 0], latent_image=scene.latent, vae=scene.vae, positive=scene.text("cat face"),
        lora=style, row_axis="strength of lora", rows="0, 0.6, 1.2", column_axis="steps", columns="1, 2, 4", cell=128,
        **PLAIN,
    )  # fmt: skip
    return [[style[0]], [node]]


@of("LCMKitEdit")
def edit(scene: Scene) -> Shown:
    model = [scene.fast(), 0]
    first = scene.sampled(model, positive=scene.text("cat face yellow background"))
    before = scene.shown([first, 0])
    node = scene.add(
        "LCMKitEdit", model=model, source=scene.text("cat face yellow background"), keep=0.2, denoise=1.0,
        target=scene.text("cat face blue background"), latent_image=[first, 0], original_steps=50, **PLAIN,
    )  # fmt: skip
    return [[before], [node], [scene.shown([node, 0])]]


@of("LCMKitLoader")
def loader(scene: Scene) -> Shown:
    node = scene.fast()
    return [[node], [scene.picture([node, 0], preset=[node, 2])]]


@of("LCMKitLoRAMix")
def mix(scene: Scene) -> Shown:
    node = scene.add(
        "LCMKitLoRAMix", model=scene.model, clip=scene.clip, lcm_lora=TINY.lcm, lora_1=TINY.style, strength_1=0.8
    )
    return [[node], [scene.picture([node, 0], preset=[node, 3])]]


@of("LCMKitLoadLoRA")
def load_lora(scene: Scene) -> Shown:
    lora = scene.lora(TINY.lcm)
    scene.told([lora[0], 1])
    return [[lora[0]]]


@of("LCMKitMergeLoRA")
def merge(scene: Scene) -> Shown:
    style, lcm = scene.lora(TINY.style), scene.lora(TINY.lcm)
    node = scene.add(
        "LCMKitMergeLoRA", lora_1=style, strength_1=0.8, lora_2=lcm, strength_2=1.0, method="linear", size="exact"
    )
    scene.told([node, 1])
    return [[style[0], lcm[0]], [node]]


@of("LCMKitApplyLoRA")
def apply(scene: Scene) -> Shown:
    lora = scene.lora(TINY.lcm)
    node = scene.add(
        "LCMKitApplyLoRA", model=scene.model, clip=scene.clip, lora=lora, strength_model=1.0, strength_clip=1.0
    )
    return [[lora[0]], [node], [scene.picture([node, 0])]]


@of("LCMKitLoRAByStep")
def by_step(scene: Scene) -> Shown:
    style = scene.lora(TINY.style)
    model = [scene.fast(), 0]
    node = scene.add(
        "LCMKitLoRAByStep", model=model, lora=style, positive=scene.text("cat face"), strengths="0, 0, 1, 1"
    )
    scene.told([node, 3])
    return [[style[0]], [node], [scene.picture(model, positive=[node, 0])]]


@of("LCMKitSaveLoRA")
def save(scene: Scene) -> Shown:
    lora = scene.lora(TINY.lcm)
    node = scene.add(
        "LCMKitSaveLoRA",
        lora=lora,
        filename_prefix="LCMKit/smaller",
        dtype="fp16",
        format="auto",
        output_name_mode="increment",
    )
    return [[lora[0]], [node]]


@of("LCMKitResizeLoRA")
def resize(scene: Scene) -> Shown:
    lora = scene.lora(TINY.lcm)
    node = scene.add("LCMKitResizeLoRA", lora=lora, dtype="fp16", size="rank", **{"size.rank": 8})
    scene.told([node, 1])
    return [[lora[0]], [node]]


@of("LCMKitCompareLoRA")
def compare(scene: Scene) -> Shown:
    style, lcm = scene.lora(TINY.style), scene.lora(TINY.lcm)
    node = scene.add("LCMKitCompareLoRA", lora_1=style, strength_1=0.8, lora_2=lcm, strength_2=1.0, rank=16)
    return [[style[0], lcm[0]], [node]]


@of("LCMKitExtractLoRA")
def extract(scene: Scene) -> Shown:
    tuned = scene.fast()
    node = scene.add("LCMKitExtractLoRA", model_tuned=[tuned, 0], model_base=scene.model, rank=16, keep=1.0)
    scene.told([node, 1])
    return [[tuned], [node]]


@of("LCMKitNegativePrompt")
def negative(scene: Scene) -> Shown:
    node = scene.add(
        "LCMKitNegativePrompt", model=[scene.fast(), 0], negative=scene.text("yellow background"), scale=3.0
    )
    return [[node], [scene.picture([node, 0])]]


@of("LCMKitLimitDenoised")
def limit(scene: Scene) -> Shown:
    node = scene.add("LCMKitLimitDenoised", model=[scene.fast(), 0], quantile=0.95)
    return [[node], [scene.picture([node, 0], cfg=3.0, negative=scene.text(""))]]


@of("LCMKitGuidanceEmbedding")
def guidance(scene: Scene) -> Shown:
    node = scene.add("LCMKitGuidanceEmbedding", model=scene.model, unet_name=FULL_LCM, guidance=8.0)
    return [[node]]


@of("LCMKitDistill")
def distill(scene: Scene) -> Shown:
    prompt, empty = scene.text("cat face"), scene.text("")
    node = scene.add(
        "LCMKitDistill", model=scene.model, positive=prompt, negative=empty, vae=scene.vae, steps=6, batch=2, rank=8,
        samples=4, width=64, height=64, resume="",
    )  # fmt: skip
    return [[node], [scene.add("PreviewImage", images=[node, 1])]]


def scene_of(node: str) -> tuple[Scene, Shown]:
    """The graph that shows a node, and its ids in columns. Raises KeyError for a node without one.

    No two scenes have a number in common: the page keeps previews by the numbers of nodes.
    """
    scene = Scene(100 * (1 + list(SCENES).index(node)))
    return scene, SCENES[node](scene)
