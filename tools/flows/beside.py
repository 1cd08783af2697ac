"""Workflows with nodes of other packs, which a user installs first; see packs.py."""

from __future__ import annotations

from .files import ANIMATELCM, ANIMATELCM_MOTION, SD15
from .flow import Flow
from .parts import checkpoint, described, fast, sampled, text

FLOWS: list[Flow] = []


@described(
    FLOWS,
    "Video with AnimateLCM",
    """
## 16 frames of SD 1.5 in 4 steps
1. Install the pack **AnimateDiff Evolved** by *Kosinkadink* (Manager, *Install Missing Custom Nodes*): the node under **Motion**
   is its own.
2. Download the three files that ComfyUI asks for, press **R**, then **Run**.

**LCM Preset** says what AnimateLCM was trained for: 4 steps, cfg 1; its `steps` takes 6 or 8 as well. The LoRA's strength of 0.8 is its
authors' own. Longer videos: *Context Options* of the same pack.
""",
)
def animate_lcm(flow: Flow) -> None:
    with flow.group("Model with AnimateLCM's LoRA"):
        base = checkpoint(flow, SD15)
        lcm = fast(flow, base["MODEL"], ANIMATELCM, strength_model=0.8)
    with flow.group("Motion"):
        moving = flow.add("ADE_AnimateDiffLoaderGen1", model=lcm["MODEL"], model_name=ANIMATELCM_MOTION)
        preset = flow.add("LCMKitPreset", name="AnimateLCM")
    with flow.group("Prompt"):
        prompt = text(flow, base["CLIP"], "a fox running through a snowy forest, morning light, best quality")
        latent = flow.add("EmptyLatentImage", "16 frames", width=512, height=512, batch_size=16)["LATENT"]
    with flow.group("Four steps"):
        sampler = sampled(flow, moving["MODEL"], prompt, latent, preset["preset"])
    with flow.group("Video"):
        frames = flow.add("VAEDecode", samples=sampler, vae=base["VAE"])
        video = flow.add("CreateVideo", images=frames["IMAGE"], fps=8.0)
        flow.add("SaveVideo", video=video["VIDEO"], filename_prefix="LCMKit/video")
