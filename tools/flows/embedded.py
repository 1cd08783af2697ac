"""demo/workflow.json: the paper's main job on the embedded model, whose files come with a clone."""

from __future__ import annotations

from .flow import Flow
from .parts import described, text

FLOWS: list[Flow] = []


@described(
    FLOWS,
    "What to try",
    """
## A style in 4 steps, on the embedded model
The *ink* LoRA and the LCM-LoRA become one LoRA, and the LCM KSampler makes pictures with it in 4 model calls.

- **Prompt**: `rocket blue background`, `owl`, `red heart`. This tiny model knows some 120 words, no others.
- **strength_1** 0: no style. 1.2: more of it.
- **strength_2** 0: no LCM-LoRA, and 4 steps are not enough.
- **steps** 1, 2, 8.

The same for Stable Diffusion: *Templates*, *lcm-kit*.
""",
)
def demo(flow: Flow) -> None:
    with flow.group("1 Model and LoRAs"):
        base = flow.add("CheckpointLoaderSimple", ckpt_name="tiny_emoji.safetensors")
        vae = flow.add("VAELoader", vae_name="tiny_emoji_vae.safetensors")
        style = flow.add("LCMKitLoadLoRA", "Load style LoRA", lora_name="tiny_emoji_ink_lora.safetensors")
        lcm = flow.add("LCMKitLoadLoRA", "Load LCM-LoRA", lora_name="tiny_emoji_lcm_lora.safetensors")
    with flow.group("2 Merge"):
        merged = flow.add(
            "LCMKitMergeLoRA", lora_1=style["LORA_MODEL"], strength_1=0.8, lora_2=lcm["LORA_MODEL"], strength_2=1.0
        )
    with flow.group("3 Apply"):
        applied = flow.add("LCMKitApplyLoRA", model=base["MODEL"], clip=base["CLIP"], lora=merged["LORA_MODEL"])
        prompt = text(flow, applied["CLIP"], "cat face")
        latent = flow.add("EmptyLatentImage", width=64, height=64, batch_size=4)
    with flow.group("4 Four steps"):
        sampler = flow.add(
            "LCMKitKSampler", model=applied["MODEL"], positive=prompt, latent_image=latent["LATENT"], seed=1
        )
    with flow.group("5 Picture"):
        small = flow.add("VAEDecode", samples=sampler["LATENT"], vae=vae["VAE"])
        large = flow.add(
            "ImageScaleBy", "Enlarge to see it", image=small["IMAGE"], upscale_method="lanczos", scale_by=4.0
        )
        flow.add("SaveImage", images=large["IMAGE"], filename_prefix="LCMKit/picture")
