"""Workflows on SDXL, and the one for other sampler nodes."""

from __future__ import annotations

from .files import DMD2, HYPER, LCM_SD15, LCM_SDXL, LIGHTNING, SD15, SDXL
from .flow import Flow
from .parts import PROMPT, checkpoint, checkpoint_and_lcm, described, empty, fast, prompt_and_size, sampled, shown, text

FLOWS: list[Flow] = []


@described(
    FLOWS,
    "First picture SDXL",
    """
## 1024 x 1024 in 4 steps
1. Download the two files that ComfyUI asks for. The LCM-LoRA comes as `pytorch_lora_weights.safetensors`: call it
   `lcm-lora-sdxl.safetensors`, or choose it in the loader under its own name.
2. Press **R**, then **Run**.

Any fine-tune of SDXL works too. A LoRA for another base, such as SD 1.5, is refused with the reason.
""",
)
def first(flow: Flow) -> None:
    base, lcm = checkpoint_and_lcm(flow, SDXL, LCM_SDXL)
    prompt, latent = prompt_and_size(flow, base["CLIP"], 1024)
    with flow.group("Four steps"):
        sampler = sampled(flow, lcm["MODEL"], prompt, latent, lcm["preset"])
    with flow.group("Picture"):
        shown(flow, sampler, base["VAE"], "Picture", save=True)


@described(
    FLOWS,
    "LCM beside Lightning, Hyper-SD and DMD2",
    """
## Four few-step methods, one seed
Each loader knows its file by its hash and sends that method's own steps, noise levels and gamma to its sampler: nothing has
to be typed. Delete the columns whose file you do not want to download.
""",
)
def beside(flow: Flow) -> None:
    files = {"LCM": LCM_SDXL, "Lightning": LIGHTNING, "Hyper-SD": HYPER, "DMD2": DMD2}
    with flow.group("Model and prompt"):
        base = checkpoint(flow, SDXL)
        prompt = text(flow, base["CLIP"], PROMPT)
        latent = empty(flow, 1024)
    for number, (method, file) in enumerate(files.items()):
        with flow.group(method):
            loader = fast(flow, base["MODEL"], file, f"{method}: LoRA")
            sampler = sampled(flow, loader["MODEL"], prompt, latent, loader["preset"])
            shown(flow, sampler, base["VAE"], method, save=not number)


@described(
    FLOWS,
    "Two-pass hires",
    """
## 1024, then 1536 with new detail
The first pass makes the picture, the second enlarges its latent and paints over it: `denoise` 0.5 gives detail and keeps
the composition. Lower keeps more, and looks softer.
""",
)
def two_pass(flow: Flow) -> None:
    base, lcm = checkpoint_and_lcm(flow, SDXL, LCM_SDXL)
    prompt, latent = prompt_and_size(flow, base["CLIP"], 1024)
    with flow.group("First pass"):
        small = sampled(flow, lcm["MODEL"], prompt, latent, lcm["preset"])
    with flow.group("Second pass"):
        larger = flow.add("LatentUpscaleBy", samples=small, upscale_method="bislerp", scale_by=1.5)
        large = sampled(flow, lcm["MODEL"], prompt, larger["LATENT"], lcm["preset"], seed=2, denoise=0.5)
    with flow.group("Pictures"):
        shown(flow, small, base["VAE"], "1024")
        shown(flow, large, base["VAE"], "1536", save=True)


@described(
    FLOWS,
    "Any KSampler",
    """
## The exact LCM in nodes that you already use
Behind **LCM for any KSampler** the sampler **lcm** is LCM's own, in every node that takes a sampler by its name: *KSampler*,
*KSampler (Advanced)*, detailers, tile upscalers. Connect its MODEL to such a node and choose *lcm* there, 4 steps, cfg 1.
""",
)
def any_ksampler(flow: Flow) -> None:
    with flow.group("Model with LCM-LoRA"):
        base = checkpoint(flow, SD15)
        lcm = fast(flow, base["MODEL"], LCM_SD15)
        exact = flow.add("LCMKitAnyKSampler", model=lcm["MODEL"], preset=lcm["preset"])
    with flow.group("Prompt"):
        positive = text(flow, base["CLIP"], PROMPT)
        negative = text(flow, base["CLIP"], "", "No negative prompt: cfg is 1")
        latent = empty(flow, 512)
    with flow.group("ComfyUI's own sampler node"):
        sampler = flow.add(
            "KSampler", model=exact["MODEL"], positive=positive, negative=negative, latent_image=latent, seed=1,
            steps=4, cfg=1.0, sampler_name="lcm", scheduler="simple",
        )  # fmt: skip
    with flow.group("Picture"):
        shown(flow, sampler["LATENT"], base["VAE"], "Picture", save=True)
