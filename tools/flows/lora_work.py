"""Workflows that work on LoRAs themselves."""

from __future__ import annotations

from .files import LCM_SD15, SD15, SDXL, SDXL_TURBO, STYLE
from .flow import Flow, Output
from .parts import PROMPT, checkpoint, described, empty, fast, shown, text

FLOWS: list[Flow] = []
_INK = "ink painting, " + PROMPT


def drawn(flow: Flow, model: Output, lora: Output, title: str, **sampler: Output) -> Output:
    """The latent of a picture made with a LoRA at strength 1."""
    applied = flow.add("LCMKitApplyLoRA", title, model=model, lora=lora)
    return flow.add("LCMKitKSampler", model=applied["MODEL"], seed=1, **sampler)["LATENT"]


@described(
    FLOWS,
    "Merge, compare, save",
    """
## Will two LoRAs fight?
**Compare LoRAs** says where a style and the LCM-LoRA work on the same weights, and whether they pull apart there. **Merge
LoRAs** adds them up exactly; other methods prune or vote first. **Save LoRA** writes one file that any LoRA loader reads.
""",
)
def merge(flow: Flow) -> None:
    with flow.group("The two LoRAs"):
        style = flow.add("LCMKitLoadLoRA", "Style LoRA", lora_name=STYLE)
        lcm = flow.add("LCMKitLoadLoRA", "LCM-LoRA", lora_name=LCM_SD15)
    two = {"lora_1": style["LORA_MODEL"], "strength_1": 0.8, "lora_2": lcm["LORA_MODEL"], "strength_2": 1.0}
    with flow.group("Compare"):
        compared = flow.add("LCMKitCompareLoRA", **two)
        flow.add("PreviewImage", "Where they meet", images=compared["IMAGE"])
    with flow.group("Merge and save"):
        merged = flow.add("LCMKitMergeLoRA", **two)
        flow.add("LCMKitSaveLoRA", lora=merged["LORA_MODEL"], filename_prefix="LCMKit/style-in-4-steps")
    with flow.group("Try it"):
        base = checkpoint(flow, SD15)
        preset = flow.add("LCMKitPreset", name="LCM")
        prompt = text(flow, base["CLIP"], _INK)
        latent = empty(flow, 512)
    with flow.group("Four steps"):
        made = drawn(
            flow, base["MODEL"], merged["LORA_MODEL"], "The merged LoRA", positive=prompt, latent_image=latent,
            preset=preset["preset"],
        )  # fmt: skip
    with flow.group("Picture"):
        shown(flow, made, base["VAE"], "Picture", save=True)


@described(
    FLOWS,
    "Shrink a LoRA",
    """
## A smaller file, before and after
**Resize LoRA** keeps what matters most: here rank 16 of the LCM-LoRA's 64, about a quarter of the file. The report says how much
of it is lost, the two pictures show what that means. **Save LoRA** writes the small one.
""",
)
def shrink(flow: Flow) -> None:
    with flow.group("Model and prompt"):
        base = checkpoint(flow, SD15)
        prompt = text(flow, base["CLIP"], PROMPT)
        latent = empty(flow, 512)
        preset = flow.add("LCMKitPreset", name="LCM")
    with flow.group("Shrink"):
        large = flow.add("LCMKitLoadLoRA", lora_name=LCM_SD15)
        small = flow.add("LCMKitResizeLoRA", lora=large["LORA_MODEL"], **{"size.rank": 16})
        flow.add("LCMKitSaveLoRA", lora=small["LORA_MODEL"], filename_prefix="LCMKit/smaller")
    given = {"positive": prompt, "latent_image": latent, "preset": preset["preset"]}
    with flow.group("Before"):
        before = drawn(flow, base["MODEL"], large["LORA_MODEL"], "As it came", **given)
    with flow.group("After"):
        after = drawn(flow, base["MODEL"], small["LORA_MODEL"], "The small one", **given)
    with flow.group("Pictures"):
        shown(flow, before, base["VAE"], "Before")
        shown(flow, after, base["VAE"], "After", save=True)


@described(
    FLOWS,
    "Extract and carry over",
    """
## SDXL-Turbo's speed as a LoRA
What SDXL-Turbo has that SDXL has not is taken out as a LoRA, saved, and put on another model: choose your own SDXL fine-tune
in **Your fine-tune**. As it comes that is SDXL itself, which the LoRA turns back into SDXL-Turbo.
""",
)
def extract(flow: Flow) -> None:
    with flow.group("Turbo minus base"):
        turbo = checkpoint(flow, SDXL_TURBO, "SDXL-Turbo")
        base = checkpoint(flow, SDXL, "SDXL")
        difference = flow.add("LCMKitExtractLoRA", model_tuned=turbo["MODEL"], model_base=base["MODEL"], rank=64)
        flow.add("LCMKitSaveLoRA", lora=difference["LORA_MODEL"], filename_prefix="LCMKit/sdxl-turbo")
    with flow.group("Carried over"):
        tuned = checkpoint(flow, SDXL, "Your fine-tune")
        prompt = text(flow, tuned["CLIP"], PROMPT)
        latent = empty(flow, 512)
        preset = flow.add("LCMKitPreset", name="Turbo", steps=4)
    with flow.group("Four steps"):
        made = drawn(
            flow, tuned["MODEL"], difference["LORA_MODEL"], "The difference", positive=prompt, latent_image=latent,
            preset=preset["preset"],
        )  # fmt: skip
    with flow.group("Picture"):
        shown(flow, made, tuned["VAE"], "Picture", save=True)


@described(
    FLOWS,
    "Strength x steps grid",
    """
## How strong, how many steps?
**LCM Grid** makes one sheet: a row for each strength of the style, a column for each number of steps, all of one seed. It
fills up while it runs; add a value, and only the new cells are made. The axes can be cfg, gamma, seed or preset instead.
""",
)
def grid(flow: Flow) -> None:
    with flow.group("Model with LCM-LoRA"):
        base = checkpoint(flow, SD15)
        lcm = fast(flow, base["MODEL"], LCM_SD15)
    with flow.group("Style and prompt"):
        style = flow.add("LCMKitLoadLoRA", "Style LoRA", lora_name=STYLE)
        prompt = text(flow, base["CLIP"], _INK)
        latent = empty(flow, 512)
    with flow.group("Grid"):
        sheet = flow.add(
            "LCMKitGrid", model=lcm["MODEL"], latent_image=latent, vae=base["VAE"], positive=prompt, seed=1,
            lora=style["LORA_MODEL"], preset=lcm["preset"], rows="0, 0.4, 0.8, 1.2", columns="1, 2, 4, 8",
        )  # fmt: skip
    with flow.group("Sheet"):
        flow.add("SaveImage", "Sheet", images=sheet["grid"], filename_prefix="LCMKit/grid")


@described(
    FLOWS,
    "Distill your own",
    """
## An LCM-LoRA for your own model
**Distill LCM-LoRA** teaches the model to draw in few steps what it draws in many. As set here it is a short try: 100 steps on
16 pictures of one prompt. For a LoRA of general use connect many prompts, and take 1000 steps and more pictures. Cancel
keeps what was learnt, and the same settings go on from there.
""",
)
def distil(flow: Flow) -> None:
    with flow.group("Model and prompts"):
        base = checkpoint(flow, SD15, "Your model")
        prompt = text(flow, base["CLIP"], PROMPT)
        negative = text(flow, base["CLIP"], "", "Negative: empty")
    with flow.group("Distil"):
        made = flow.add(
            "LCMKitDistill", model=base["MODEL"], positive=prompt, negative=negative, vae=base["VAE"], steps=100,
            samples=16, batch=2, rank=32,
        )  # fmt: skip
    with flow.group("What it learnt"):
        flow.add("PreviewImage", "Losses and samples", images=made["IMAGE"])
        flow.add("LCMKitSaveLoRA", lora=made["LORA_MODEL"], filename_prefix="LCMKit/my-lcm-lora")
    with flow.group("Try it"):
        latent = empty(flow, 512)
        preset = flow.add("LCMKitPreset", name="LCM")
        picture = drawn(
            flow, base["MODEL"], made["LORA_MODEL"], "Your LCM-LoRA", positive=prompt, latent_image=latent,
            preset=preset["preset"],
        )  # fmt: skip
    with flow.group("Picture"):
        shown(flow, picture, base["VAE"], "Picture", save=True)


@described(
    FLOWS,
    "Accelerate a style",
    """
## A style's own 4 steps
The model with the style on it teaches an LCM-LoRA to draw that style in 4 steps: nearer to it than style and LCM-LoRA added up.
The recipe sets the training. Put your prompts into **What you draw**, several nodes through Conditioning (Combine) for
varied pictures. **Before and after** shows the same noise with the LCM-LoRA as it came, and as it becomes.
""",
)
def accelerate(flow: Flow) -> None:
    with flow.group("The style"):
        base = checkpoint(flow, SD15)
        style = flow.add("LCMKitLoadLoRA", "Style LoRA", lora_name=STYLE)
        styled = flow.add("LCMKitApplyLoRA", "With the style", model=base["MODEL"], lora=style["LORA_MODEL"])
        lcm = flow.add("LCMKitLoadLoRA", "To begin with: LCM-LoRA", lora_name=LCM_SD15)
    with flow.group("Prompts"):
        prompt = text(flow, base["CLIP"], _INK, "What you draw")
        negative = text(flow, base["CLIP"], "", "Negative: empty")
    with flow.group("Learn"):
        made = flow.add(
            "LCMKitDistill", model=styled["MODEL"], positive=prompt, negative=negative, vae=base["VAE"],
            start_from=lcm["LORA_MODEL"], recipe="accelerate this style",
        )  # fmt: skip
    with flow.group("Before and after"):
        flow.add("PreviewImage", "Losses, before and after", images=made["IMAGE"])
        flow.add("LCMKitSaveLoRA", lora=made["LORA_MODEL"], filename_prefix="LCMKit/style-in-4-steps")
    with flow.group("Try it"):
        latent = empty(flow, 512)
        preset = flow.add("LCMKitPreset", name="Phased LCM 4 steps")
        picture = drawn(
            flow, styled["MODEL"], made["LORA_MODEL"], "Style and its LoRA", positive=prompt, latent_image=latent,
            preset=preset["preset"],
        )  # fmt: skip
    with flow.group("Picture"):
        shown(flow, picture, base["VAE"], "Picture", save=True)
