"""Workflows on flow models: Qwen-Image, Z-Image, Flux, Wan 2.2."""

from __future__ import annotations

from . import files
from .flow import Flow, Node, Output
from .parts import checkpoint, described, fast, sampled, shown, text

FLOWS: list[Flow] = []
_FOX = (
    "A photograph of a fox in a snowy forest in the morning light, every hair of its fur sharp, mist between the trees."
)


def unet(flow: Flow, file: files.ModelFile, title: str = "") -> Node:
    return flow.add("UNETLoader", title, unet_name=file)


def texts_and_pictures(flow: Flow, clip: files.ModelFile, type: str, vae: files.ModelFile) -> tuple[Output, Output]:
    """CLIP and VAE."""
    encoder = flow.add("CLIPLoader", clip_name=clip, type=type)
    return encoder["CLIP"], flow.add("VAELoader", vae_name=vae)["VAE"]


@described(
    FLOWS,
    "Qwen-Image Lightning",
    """
## Qwen-Image in 4 steps
The loader knows the Lightning LoRA and sends *Qwen-Image-Lightning 4 steps* to the sampler: evenly spaced times through the
model's shift, which **ModelSamplingAuraFlow** sets to 3, and no new noise between the steps.
""",
)
def qwen(flow: Flow) -> None:
    with flow.group("Model with Lightning LoRA"):
        base = unet(flow, files.QWEN)
        lightning = fast(flow, base["MODEL"], files.QWEN_LIGHTNING)
        shifted = flow.add("ModelSamplingAuraFlow", model=lightning["MODEL"], shift=3.0)
    with flow.group("Prompt"):
        clip, vae = texts_and_pictures(flow, files.QWEN_TEXT, "qwen_image", files.QWEN_VAE)
        prompt = text(flow, clip, _FOX)
        latent = flow.add("EmptySD3LatentImage", width=1328, height=1328)["LATENT"]
    with flow.group("Four steps"):
        sampler = sampled(flow, shifted["MODEL"], prompt, latent, lightning["preset"])
    with flow.group("Picture"):
        shown(flow, sampler, vae, "Picture", save=True)


@described(
    FLOWS,
    "Z-Image-Turbo",
    """
## Z-Image-Turbo in 8 steps
The model is distilled as a whole, so there is no LoRA to load: **LCM Preset** sends its settings to the sampler. Choose
another few-step model there, and its steps, cfg, gamma and noise levels follow.
""",
)
def z_image(flow: Flow) -> None:
    with flow.group("Model"):
        base = unet(flow, files.Z_IMAGE)
        shifted = flow.add("ModelSamplingAuraFlow", model=base["MODEL"], shift=3.0)
        preset = flow.add("LCMKitPreset", name="Z-Image-Turbo")
    with flow.group("Prompt"):
        clip, vae = texts_and_pictures(flow, files.Z_IMAGE_TEXT, "lumina2", files.Z_IMAGE_VAE)
        prompt = text(flow, clip, _FOX)
        latent = flow.add("EmptySD3LatentImage", width=1024, height=1024)["LATENT"]
    with flow.group("Eight steps"):
        sampler = sampled(flow, shifted["MODEL"], prompt, latent, preset["preset"], steps=8)
    with flow.group("Picture"):
        shown(flow, sampler, vae, "Picture", save=True)


@described(
    FLOWS,
    "Flux schnell",
    """
## Flux in 4 steps
*schnell* is few-step as a whole: **LCM Preset** *Flux schnell* says 4 steps, no new noise, shift 1. For FLUX.1 dev with a Turbo or
Hyper LoRA take its checkpoint, **LCM-LoRA Loader** behind it, and the loader's `preset`.
""",
)
def flux(flow: Flow) -> None:
    with flow.group("Model"):
        base = checkpoint(flow, files.FLUX_SCHNELL)
        preset = flow.add("LCMKitPreset", name="Flux schnell")
    with flow.group("Prompt"):
        prompt = text(flow, base["CLIP"], _FOX)
        latent = flow.add("EmptySD3LatentImage", width=1024, height=1024)["LATENT"]
    with flow.group("Four steps"):
        sampler = sampled(flow, base["MODEL"], prompt, latent, preset["preset"])
    with flow.group("Picture"):
        shown(flow, sampler, base["VAE"], "Picture", save=True)


@described(
    FLOWS,
    "Wan 2.2 with two experts",
    """
## A video in 4 steps, both experts in one sampler
Wan 2.2 14B is two models. `model` takes the high-noise one, `model_low` the low-noise one, each with its own LoRA; the
preset of the high-noise LoRA gives it the first two of the four steps. 640 x 640, 81 frames, 16 a second.
""",
)
def wan(flow: Flow) -> None:
    experts = {"High noise": (files.WAN_HIGH, files.WAN_LORA_HIGH), "Low noise": (files.WAN_LOW, files.WAN_LORA_LOW)}
    shifted, loaders = [], []
    for name, (model, lora) in experts.items():
        with flow.group(name):
            loaders.append(fast(flow, unet(flow, model, f"{name}: model")["MODEL"], lora, f"{name}: LoRA"))
            shifted.append(flow.add("ModelSamplingSD3", model=loaders[-1]["MODEL"], shift=5.0))
    with flow.group("Prompt"):
        clip, vae = texts_and_pictures(flow, files.WAN_TEXT, "wan", files.WAN_VAE)
        prompt = text(flow, clip, "A fox runs through a snowy forest, the camera follows it, powder snow flies up.")
        latent = flow.add("EmptyHunyuanLatentVideo", width=640, height=640, length=81)["LATENT"]
    with flow.group("Four steps"):
        sampler = flow.add(
            "LCMKitKSampler", model=shifted[0]["MODEL"], model_low=shifted[1]["MODEL"], positive=prompt,
            latent_image=latent, preset=loaders[0]["preset"], seed=1,
        )  # fmt: skip
    with flow.group("Video"):
        frames = flow.add("VAEDecode", samples=sampler["LATENT"], vae=vae)
        video = flow.add("CreateVideo", images=frames["IMAGE"], fps=16.0)
        flow.add("SaveVideo", video=video["VIDEO"], filename_prefix="LCMKit/video")
