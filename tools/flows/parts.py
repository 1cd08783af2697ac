"""Groups of nodes that many of the workflows have."""

from __future__ import annotations

from collections.abc import Callable

from .files import ModelFile
from .flow import Flow, Node, Output

PROMPT = "a fox in a snowy forest, morning light, best quality"


def described(flows: list[Flow], name: str, note: str) -> Callable[[Callable[[Flow], None]], None]:
    """Decorates the function that adds the nodes; the workflow comes to stand at the end of flows."""

    def describe(add: Callable[[Flow], None]) -> None:
        flow = Flow(name, note.strip())
        add(flow)
        flows.append(flow)

    return describe


def checkpoint(flow: Flow, file: ModelFile, title: str = "") -> Node:
    return flow.add("CheckpointLoaderSimple", title, ckpt_name=file)


def fast(flow: Flow, model: Output, file: ModelFile, title: str = "", **others: float) -> Node:
    return flow.add("LCMKitLoader", title, model=model, lora_name=file, **others)


def checkpoint_and_lcm(flow: Flow, file: ModelFile, lora: ModelFile) -> tuple[Node, Node]:
    """A group of a checkpoint and its LCM-LoRA."""
    with flow.group("Model with LCM-LoRA"):
        base = checkpoint(flow, file)
        return base, fast(flow, base["MODEL"], lora)


def prompt_and_size(flow: Flow, clip: Output, size: int) -> tuple[Output, Output]:
    """A group of the prompt and an empty latent."""
    with flow.group("Prompt"):
        return text(flow, clip, PROMPT), empty(flow, size)


def sampled(flow: Flow, model: Output, positive: Output, latent: Output, preset: Output, **others: float) -> Output:
    """The latent that LCM KSampler makes."""
    given = {"model": model, "positive": positive, "latent_image": latent, "preset": preset, "seed": 1}
    return flow.add("LCMKitKSampler", **given | others)["LATENT"]


def text(flow: Flow, clip: Output, words: str, title: str = "Prompt") -> Output:
    return flow.add("CLIPTextEncode", title, clip=clip, text=words)["CONDITIONING"]


def empty(flow: Flow, size: int) -> Output:
    return flow.add("EmptyLatentImage", width=size, height=size)["LATENT"]


def shown(flow: Flow, latent: Output, vae: Output, title: str, *, save: bool = False) -> None:
    """The picture of a latent: saved, or only shown."""
    image = flow.add("VAEDecode", samples=latent, vae=vae)["IMAGE"]
    if save:
        flow.add("SaveImage", title, images=image, filename_prefix="LCMKit/picture")
    else:
        flow.add("PreviewImage", title, images=image)


def photograph(flow: Flow, vae: Output, size: int = 512) -> Output:
    """ComfyUI's example picture as a latent."""
    image = flow.add("LoadImage", "Your picture", image="example.png")["IMAGE"]
    scaled = flow.add("ImageScale", image=image, upscale_method="lanczos", width=size, height=size, crop="center")
    return flow.add("VAEEncode", pixels=scaled["IMAGE"], vae=vae)["LATENT"]
