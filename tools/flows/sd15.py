"""Workflows on SD 1.5."""

from __future__ import annotations

from .files import CANNY_SD15, LCM_SD15, SD15, STYLE
from .flow import Flow
from .parts import (
    PROMPT,
    checkpoint,
    checkpoint_and_lcm,
    described,
    empty,
    fast,
    photograph,
    prompt_and_size,
    sampled,
    shown,
    text,
)

FLOWS: list[Flow] = []


@described(
    FLOWS,
    "First picture with an LCM-LoRA",
    """
## A picture in 4 steps
1. Download the two files that ComfyUI asks for. If you have the LCM-LoRA already, under whatever name, choose **auto** in the
   loader: it finds it.
2. Press **R**, then **Run**.

The loader knows the file and sends its settings to the sampler through `preset`. Any fine-tune of SD 1.5 works too.
""",
)
def first(flow: Flow) -> None:
    base, lcm = checkpoint_and_lcm(flow, SD15, LCM_SD15)
    prompt, latent = prompt_and_size(flow, base["CLIP"], 512)
    with flow.group("Four steps"):
        sampler = sampled(flow, lcm["MODEL"], prompt, latent, lcm["preset"])
    with flow.group("Picture"):
        shown(flow, sampler, base["VAE"], "Picture", save=True)


@described(
    FLOWS,
    "Style LoRA and LCM-LoRA",
    """
## A style in 4 steps
Style LoRA x 0.8 + LCM-LoRA x 1.0, as in the LCM-LoRA paper, and beside it the same seed without the style.

- *MoXin* paints in ink. Choose your own style in **Load LoRA**, and move `strength_1` between 0.5 and 1.
- **Save LoRA** is switched off; Ctrl+B on it writes the sum as one file for any LoRA loader.
""",
)
def style(flow: Flow) -> None:
    with flow.group("Model and LoRAs"):
        base = checkpoint(flow, SD15)
        lcm = fast(flow, base["MODEL"], LCM_SD15)
        ink = flow.add("LCMKitLoadLoRA", "Style LoRA", lora_name=STYLE)
    with flow.group("Their sum"):
        merged = flow.add(
            "LCMKitMergeLoRA", lora_1=ink["LORA_MODEL"], strength_1=0.8, lora_2=lcm["LORA_MODEL"], strength_2=1.0
        )
    with flow.group("Model with the sum"):
        styled = flow.add("LCMKitApplyLoRA", model=base["MODEL"], clip=base["CLIP"], lora=merged["LORA_MODEL"])
        flow.add("LCMKitSaveLoRA", lora=merged["LORA_MODEL"], filename_prefix="LCMKit/style-in-4-steps", bypassed=True)
        latent = empty(flow, 512)
    with flow.group("With the style"):
        prompt = text(flow, styled["CLIP"], "ink painting, " + PROMPT)
        sampler = sampled(flow, styled["MODEL"], prompt, latent, lcm["preset"])
    with flow.group("Without"):
        plain = text(flow, base["CLIP"], PROMPT)
        other = sampled(flow, lcm["MODEL"], plain, latent, lcm["preset"])
    with flow.group("Pictures"):
        shown(flow, sampler, base["VAE"], "With the style", save=True)
        shown(flow, other, base["VAE"], "Without")


@described(
    FLOWS,
    "Image to image and inpaint",
    """
## Change a picture in 4 steps
- **Image to image**: `denoise` says how much changes: 0.3 a little, 0.6 much, 1 all.
- **Inpaint**: only the masked rectangle changes. For a mask of your own right-click the picture, *Open in MaskEditor*, and
  connect the MASK of **Load Image** to **Set Latent Noise Mask**.

`denoise` stays the sampler's own while `preset` sets all else.
""",
)
def image_to_image(flow: Flow) -> None:
    base, lcm = checkpoint_and_lcm(flow, SD15, LCM_SD15)
    with flow.group("Picture to change"):
        latent = photograph(flow, base["VAE"])
    with flow.group("What it becomes"):
        whole = text(flow, base["CLIP"], "an oil painting of a girl in a pink dress on a green hill", "Whole picture")
        part = text(flow, base["CLIP"], "a girl in a long white dress on a green hill", "Masked part")
        everything = flow.add("SolidMask", "All black", value=0.0, width=512, height=512)
        dress = flow.add("SolidMask", "A white rectangle", value=1.0, width=168, height=232)
        mask = flow.add(
            "MaskComposite", destination=everything["MASK"], source=dress["MASK"], x=172, y=212, operation="add"
        )
    with flow.group("Image to image"):
        changed = sampled(flow, lcm["MODEL"], whole, latent, lcm["preset"], denoise=0.6)
    with flow.group("Inpaint", below=True):
        masked = flow.add("SetLatentNoiseMask", samples=latent, mask=mask["MASK"])
        inpainted = sampled(flow, lcm["MODEL"], part, masked["LATENT"], lcm["preset"], denoise=0.9)
    with flow.group("Pictures"):
        shown(flow, changed, base["VAE"], "Image to image", save=True)
        shown(flow, inpainted, base["VAE"], "Inpaint", save=True)


@described(
    FLOWS,
    "Edit by two prompts",
    """
## Say what is there, and what should be
**LCM Edit** changes what the two prompts say differently and keeps the rest; no mask, no inversion. Experimental.

- Describe your picture in *What it shows*, copy that to *What it should show*, and change one thing.
- Too little changes: lower `keep`. Too much: raise it, or lower `denoise`.
""",
)
def edit(flow: Flow) -> None:
    base, lcm = checkpoint_and_lcm(flow, SD15, LCM_SD15)
    with flow.group("Picture to change"):
        latent = photograph(flow, base["VAE"])
    with flow.group("The two prompts"):
        source = text(flow, base["CLIP"], "a drawing of a girl in a pink dress on a green hill", "What it shows")
        target = text(flow, base["CLIP"], "a drawing of a girl in a red dress on a green hill", "What it should show")
    with flow.group("Edit"):
        edited = flow.add(
            "LCMKitEdit", model=lcm["MODEL"], source=source, target=target, latent_image=latent, seed=1,
            preset=lcm["preset"],
        )  # fmt: skip
    with flow.group("Picture"):
        shown(flow, edited["LATENT"], base["VAE"], "Edited", save=True)


@described(
    FLOWS,
    "Negative prompt at cfg 1",
    """
## A negative prompt that costs no second model call
At cfg 1 a sampler never asks the model about the negative prompt. **LCM Negative Prompt (NAG)** puts it into the model's
attention instead. Beside it: the same seed without it.

More `scale` pushes further away; 1 switches it off.
""",
)
def negative_prompt(flow: Flow) -> None:
    base, lcm = checkpoint_and_lcm(flow, SD15, LCM_SD15)
    with flow.group("Prompts"):
        positive = text(flow, base["CLIP"], "a house in the mountains, photograph")
        negative = text(flow, base["CLIP"], "snow, white", "What it should not show")
        latent = empty(flow, 512)
    with flow.group("With the negative prompt"):
        away = flow.add("LCMKitNegativePrompt", model=lcm["MODEL"], negative=negative)
        sampler = sampled(flow, away["MODEL"], positive, latent, lcm["preset"])
    with flow.group("Without"):
        other = sampled(flow, lcm["MODEL"], positive, latent, lcm["preset"])
    with flow.group("Pictures"):
        shown(flow, sampler, base["VAE"], "With the negative prompt", save=True)
        shown(flow, other, base["VAE"], "Without")


@described(
    FLOWS,
    "ControlNet",
    """
## The outlines of a picture, another content, 4 steps
A ControlNet works at cfg 1 as it does elsewhere: put it behind the prompt. Weaker at the end (`end_percent` 0.8) leaves the last
step free. Any ControlNet of SD 1.5 will do; **Canny** is part of ComfyUI.
""",
)
def control_net(flow: Flow) -> None:
    base, lcm = checkpoint_and_lcm(flow, SD15, LCM_SD15)
    with flow.group("Outlines"):
        image = flow.add("LoadImage", "Your picture", image="example.png")["IMAGE"]
        scaled = flow.add("ImageScale", image=image, upscale_method="lanczos", width=512, height=512, crop="center")
        edges = flow.add("Canny", image=scaled["IMAGE"], low_threshold=0.2, high_threshold=0.5)["IMAGE"]
        flow.add("PreviewImage", "Outlines", images=edges)
    with flow.group("Prompt"):
        prompt = text(flow, base["CLIP"], "a statue of bronze in a garden, photograph")
        nothing = text(flow, base["CLIP"], "", "Empty: not asked at cfg 1")
        latent = empty(flow, 512)
    with flow.group("ControlNet"):
        net = flow.add("ControlNetLoader", control_net_name=CANNY_SD15)
        controlled = flow.add(
            "ControlNetApplyAdvanced", positive=prompt, negative=nothing, control_net=net["CONTROL_NET"], image=edges,
            strength=0.8, end_percent=0.8,
        )  # fmt: skip
    with flow.group("Four steps"):
        sampler = sampled(flow, lcm["MODEL"], controlled["positive"], latent, lcm["preset"])
    with flow.group("Picture"):
        shown(flow, sampler, base["VAE"], "Picture", save=True)
