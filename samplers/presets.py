"""Settings that published few-step models were made for, by name. Data: a new one is a row (see preset.Preset).

gamma 0 stands where the source uses DDIM, Euler or a solver of higher order, 1 where it uses LCM's sampler or the like
(x0 and fresh noise), between where it uses TCD's. Only settings that the source gives; what other users prefer may differ.
"""

import math
import re
from collections.abc import Iterable
from typing import Any

from .preset import Preset


def trailing_timesteps(steps: int, train_timesteps: int = 1000) -> tuple[int, ...]:
    """The timesteps T - 1, T - T/steps - 1, ...: "trailing" spacing of diffusers, sgm_uniform of ComfyUI nearly.

    steps: 1..train_timesteps. Common Diffusion Noise Schedules and Sample Steps Are Flawed (Lin et al. 2023, arXiv
    2305.08891, table 2). Raises ValueError for other steps.
    """
    if not 1 <= steps <= train_timesteps:
        raise ValueError(f"steps is {steps}; it must be from 1 to {train_timesteps}.")
    return tuple(round(train_timesteps - i * train_timesteps / steps) - 1 for i in range(steps))


def shifted_levels(steps: int, shift: float) -> tuple[float, ...]:
    """Levels of evenly spaced times through a flow's shift, where a source lists what the model's own shift is not."""
    return tuple(shift * (steps - i) / (steps + (shift - 1) * (steps - i)) for i in range(steps))


def trigflow_levels(*angles: float) -> tuple[float, ...]:
    """Levels of a flow model at TrigFlow's angles t, x = cos t x0 + sin t noise: sin t / (sin t + cos t)."""
    return tuple(math.sin(t) / (math.sin(t) + math.cos(t)) for t in angles)


def _each(
    steps: Iterable[int], name: str, cfg: float | dict[int, float] = 1.0, suffix: str = "", **others: Any
) -> list[Preset]:
    """One preset for each of a family's files, each made for its own number of steps, evenly from 999."""
    return [
        Preset(
            f"{name} {n} steps{suffix}", steps=n, cfg=cfg[n] if isinstance(cfg, dict) else cfg, gamma=0.0,
            timesteps=trailing_timesteps(n), strength=1.0, **others,
        )
        for n in steps
    ]  # fmt: skip


def phased(steps: int) -> Preset:
    """Of a LoRA that was distilled in so many phases: a step from each edge to the next, without noise in between."""
    return Preset(
        f"{PHASED} {steps} steps", steps=steps, cfg=1.0, gamma=0.0, timesteps=trailing_timesteps(steps), strength=1.0,
        models="LoRAs of Distill LCM-LoRA with so many phases, of any model", source=f"{PCM} section 3.2", date="2024-05",
    )  # fmt: skip


def preset_called(name: str) -> Preset | None:
    """The preset of that name, of phased LoRAs of any number of steps too; None if there is none."""
    if name not in PRESETS and (match := re.fullmatch(rf"{PHASED} ([1-9]\d{{0,2}}) steps", name)):
        return phased(int(match[1]))
    return PRESETS.get(name)


SD = "SD 1.5, SDXL"
LCM_LORA = "Luo et al. 2023, LCM-LoRA, arXiv 2311.05556, and its model cards"
TCD = "Zheng et al. 2024, Trajectory Consistency Distillation, arXiv 2402.19159"
DMD2 = "Yin et al. 2024, DMD2, arXiv 2405.14867, README"
HYPER = "Ren et al. 2024, Hyper-SD, arXiv 2404.13686, and its model card"
LIGHTNING = "Lin et al. 2024, SDXL-Lightning, arXiv 2402.13929, and its model card"
PCM = "Wang et al. 2024, Phased Consistency Model, arXiv 2405.18407, and its"
PHASED = "Phased LCM"
LIGHTX2V = "ModelTC, LightX2V, step distillation (denoising_step_list 1000 750 500 250, sample_shift 5)"
TEMPLATES = "ComfyUI's workflow templates 0.1.123:"
IN_TEMPLATES = "2026-10"

# fmt: off
_ROWS = [
    # ---- Stable Diffusion: timesteps 0..999
    Preset("LCM", steps=4, cfg=1.0, gamma=1.0, models=SD, strength=1.0, source=LCM_LORA, date="2023-11"),
    Preset("AnimateLCM", steps=4, cfg=1.0, gamma=1.0, original_steps=100, models="SD 1.5, AnimateDiff",
           source="Wang et al. 2024, AnimateLCM, arXiv 2402.00769", date="2024-02"),
    Preset("TCD", steps=4, cfg=1.0, gamma=0.3, models=SD, strength=1.0, sampler="tcd", source=TCD, date="2024-02"),
    Preset("DMD2", steps=4, cfg=1.0, gamma=1.0, timesteps=(999, 749, 499, 249), models="SDXL", source=DMD2,
           date="2024-05"),
    Preset("DMD2 1 step", steps=1, cfg=1.0, gamma=1.0, timesteps=(399,), models="SDXL", source=DMD2, date="2024-05"),
    Preset("Hyper-SD unified", steps=4, cfg=1.0, gamma=1.0, models=SD, strength=1.0, sampler="tcd", source=HYPER,
           date="2024-04", remark="1 to 8 steps; a lower gamma gives more detail"),
    Preset("Hyper-SD 1 step UNet", steps=1, cfg=1.0, gamma=1.0, timesteps=(800,), models="SDXL", source=HYPER,
           date="2024-04"),
    *_each((2, 4, 8), "Hyper-SD", models=SD, sampler="ddim", source=HYPER, date="2024-04"),
    *_each((8, 12), "Hyper-SD", 5.0, " CFG", models=SD, sampler="ddim", source=HYPER, date="2024-04"),
    *_each((2, 4, 8), "Lightning", models="SDXL", sampler="euler", source=LIGHTNING, date="2024-02"),
    *_each((2, 4, 8, 16), "PCM small cfg", models=SD, sampler="ddim", source=f"{PCM} demo", date="2024-05"),
    *_each((4, 8), "PCM normal cfg", {4: 3.0, 8: 4.5}, models=SD, sampler="ddim", date="2024-05",
           source=f"{PCM} model card (cfg 2.5 to 3.5 with 4 steps, 3 to 6 with 8)"),
    *_each((16,), "PCM normal cfg", 7.5, models=SD, sampler="ddim", source=f"{PCM} demo", date="2024-05"),
    Preset("PCM LCM-like", steps=4, cfg=1.0, gamma=1.0, models=SD, strength=1.0, source=f"{PCM} demo", date="2024-05"),
    *map(phased, (2, 4, 8)),
    Preset("TDD", steps=4, cfg=1.7, gamma=0.2, original_steps=250, models=SD, sampler="tcd", date="2024-09",
           source="Wang et al. 2024, Target-Driven Distillation, arXiv 2409.01347"),
    Preset("Turbo", steps=1, cfg=1.0, gamma=1.0, timesteps=trailing_timesteps(4), models="SD-Turbo, SDXL-Turbo",
           sampler="euler_ancestral", remark="1 to 4 steps", date="2023-11",
           source="Sauer et al. 2023, Adversarial Diffusion Distillation, arXiv 2311.17042, and the SDXL-Turbo card"),
    # ---- Wan
    Preset("Wan 2.1 lightx2v", steps=4, cfg=1.0, gamma=1.0, flow=True, shift=5.0, strength=1.0, models="Wan 2.1",
           source=f"{LIGHTX2V}; its scheduler draws noise anew at every step", date="2025-07"),
    Preset("Wan 2.2 lightx2v", steps=4, cfg=1.0, gamma=0.0, flow=True, shift=5.0, strength=1.0, first_expert=2,
           sampler="euler", models="Wan 2.2 14B", source=f"{LIGHTX2V}; {TEMPLATES} video_wan2_2_14B_t2v, _i2v",
           date=IN_TEMPLATES),
    Preset("Wan Animate 2 lightx2v", steps=6, cfg=1.0, gamma=1.0, flow=True, shift=5.0, strength=1.0,
           models="Wan Animate 2", source=f"{TEMPLATES} video_wan_animate2", date=IN_TEMPLATES),
    Preset("Wan Animate 2 distilled", steps=10, cfg=1.0, gamma=1.0, flow=True, shift=5.0, models="Wan Animate 2",
           source=f"{TEMPLATES} video_wan_animate2_distilled", date=IN_TEMPLATES),
    Preset("CausVid", steps=3, cfg=1.0, gamma=1.0, sigmas=(1.0, 0.757, 0.522), flow=True, models="Wan 2.1",
           date="2024-12",
           source="Yin et al. 2024, CausVid, arXiv 2412.07772, and its configuration (denoising_step_list 1000 757 522)"),
    Preset("CausVid LoRA", steps=4, cfg=1.0, gamma=0.0, flow=True, shift=8.0, strength=0.3, sampler="uni_pc",
           models="Wan 2.1 VACE 14B", remark="strength 0.3 to 0.7; 3 steps for outpainting", date=IN_TEMPLATES,
           source=f"{TEMPLATES} video_wan_vace_14B_ref2v, _t2v, _v2v, video_wan_vace_outpainting"),
    Preset("Self-Forcing", steps=4, cfg=1.0, gamma=1.0, flow=True, shift=5.0, models="Wan 2.1 1.3B", date="2025-06",
           source="Huang et al. 2025, Self Forcing, arXiv 2506.08009 (denoising_step_list 1000 750 500 250, "
                  "timestep_shift 5)"),
    Preset("rCM", steps=4, cfg=1.0, gamma=1.0, sigmas=trigflow_levels(math.atan(80.0), 1.5, 1.4, 1.0), flow=True,
           models="Wan 2.1, Cosmos",
           source="Zheng et al. 2025, rCM, arXiv 2510.08431, and its inference script (sigma_max 80)", date="2025-10"),
    Preset("ChronoEdit", steps=4, cfg=1.0, gamma=0.0, flow=True, shift=5.0, strength=1.0, sampler="uni_pc",
           models="ChronoEdit 14B", source=f"{TEMPLATES} image_chrono_edit_14B", date=IN_TEMPLATES),
    # ---- Qwen-Image
    *[Preset(f"Qwen-Image-Lightning {n} steps", steps=n, cfg=1.0, gamma=0.0, flow=True, shift=3.0, strength=1.0,
             sampler="euler", models="Qwen-Image, Qwen-Image-Edit", date=IN_TEMPLATES,
             source=f"ModelTC, Qwen-Image-Lightning, generate_with_diffusers.py (base_shift log 3); {TEMPLATES} "
                    "image_qwen_image, image_qwen_image_edit") for n in (4, 8)],
    Preset("Wuli Qwen-Image Turbo", steps=2, cfg=1.0, gamma=0.0, flow=True, shift=3.0, strength=1.0, sampler="euler",
           models="Qwen-Image 2512", source=f"{TEMPLATES} image_qwen_image_2512_with_2steps_lora", date=IN_TEMPLATES),
    Preset("FireRed-Edit Lightning", steps=8, cfg=1.0, gamma=0.0, flow=True, shift=3.1, strength=1.0, sampler="euler",
           models="FireRed-Image-Edit 1.0, 1.1", source=f"{TEMPLATES} image_firered_image_edit1_1", date=IN_TEMPLATES),
    Preset("Qwen-Image 2.1 turbo", steps=8, cfg=1.0, gamma=0.0, flow=True, sampler="euler", models="Qwen-Image 2.1 turbo",
           sigmas=(1.0, 0.978453, 0.95418, 0.926626, 0.89508, 0.845148, 0.704534, 0.414568),
           source=f"{TEMPLATES} image_qwen_image_2_1_turbo_t2i", date=IN_TEMPLATES),
    # ---- other pictures
    Preset("Z-Image-Turbo", steps=8, cfg=1.0, gamma=0.0, flow=True, shift=3.0, sampler="res_multistep",
           models="Z-Image-Turbo", source=f"{TEMPLATES} image_z_image_turbo", date=IN_TEMPLATES),
    Preset("Flux schnell", steps=4, cfg=1.0, gamma=0.0, flow=True, shift=1.0, sampler="euler", models="FLUX.1 schnell",
           source=f"{TEMPLATES} flux_schnell", date=IN_TEMPLATES),
    Preset("Flux Turbo", steps=8, cfg=1.0, gamma=0.0, flow=True, strength=1.0, sampler="euler", models="FLUX.1 dev",
           source="alimama-creative, FLUX.1-Turbo-Alpha, model card", date="2024-10"),
    Preset("Hyper-FLUX 8 steps", steps=8, cfg=1.0, gamma=0.0, flow=True, strength=0.125, sampler="euler",
           models="FLUX.1 dev",
           source="ByteDance, Hyper-SD, model card (Hyper-FLUX.1-dev-8steps-lora, lora_scale 0.125)", date="2024-08"),
    Preset("Flux.2 Turbo", steps=8, cfg=1.0, gamma=0.0, flow=True, strength=1.0, sampler="euler", models="FLUX.2 dev",
           sigmas=(1.0, 0.6509, 0.4374, 0.2932, 0.1893, 0.1108, 0.0495, 0.00031), remark="FluxGuidance 2.5",
           source="fal, FLUX.2-dev-Turbo, model card (TURBO_SIGMAS, guidance_scale 2.5)", date="2025-12"),
    Preset("Flux.2 Klein", steps=4, cfg=1.0, gamma=0.0, flow=True, sampler="euler", models="FLUX.2 klein 4B, 9B",
           sigmas=shifted_levels(4, math.exp(2.29118)), remark="for 1024 x 1024; Flux2Scheduler for other sizes",
           source=f"{TEMPLATES} image_flux2_klein_text_to_image (Flux2Scheduler, 4 steps)", date=IN_TEMPLATES),
    Preset("SD3.5 Turbo", steps=4, cfg=1.0, gamma=0.0, flow=True, shift=3.0, sampler="euler",
           models="SD 3.5 Large Turbo", source="Stability AI, stable-diffusion-3.5-large-turbo, model card",
           date="2024-10"),
    *[Preset(f"HiDream {kind}", steps=n, cfg=1.0, gamma=1.0, flow=True, spacing="normal", shift=shift,
             models=f"HiDream-I1 {kind}", source=f"{TEMPLATES} hidream_i1_{kind}", date=IN_TEMPLATES)
      for kind, n, shift in (("dev", 28, 6.0), ("fast", 16, 3.0))],
    Preset("HiDream-O1 dev", steps=28, cfg=1.0, gamma=1.0, flow=True, spacing="normal", models="HiDream-O1 dev",
           remark="SamplerLCM with noise_clip_std 2.5", source=f"{TEMPLATES} image_hidream_o1_dev", date=IN_TEMPLATES),
    Preset("Anima turbo", steps=8, cfg=1.0, gamma=0.0, flow=True, strength=1.0, sampler="euler", models="Anima",
           source=f"{TEMPLATES} image_anima_base_v1", date=IN_TEMPLATES),
    Preset("Krea 2 turbo", steps=8, cfg=1.0, gamma=0.0, flow=True, sampler="euler", models="Krea 2 turbo",
           source=f"{TEMPLATES} image_krea2_turbo_t2i", date=IN_TEMPLATES),
    Preset("ERNIE-Image turbo", steps=8, cfg=1.0, gamma=0.0, flow=True, sampler="euler", models="ERNIE-Image turbo",
           source=f"{TEMPLATES} image_ernie_image_turbo", date=IN_TEMPLATES),
    Preset("Lens turbo", steps=4, cfg=1.0, gamma=0.0, flow=True, sampler="euler", models="Lens turbo",
           remark="ModelSamplingFlux 1.15, 0.5 at the picture's size",
           source=f"{TEMPLATES} image_lens_turbo_t2i", date=IN_TEMPLATES),
    Preset("Mage-Flow turbo", steps=4, cfg=1.0, gamma=0.0, flow=True, sampler="euler", models="Mage-Flow turbo, edit turbo",
           source=f"{TEMPLATES} image_mage_flow_turbo_t2i_int8, image_mage_flow_edit_turbo_int8", date=IN_TEMPLATES),
    Preset("FIBO 2 turbo", steps=4, cfg=1.0, gamma=0.0, flow=True, sampler="euler", models="FIBO 2 edit turbo",
           source=f"{TEMPLATES} image_fibo2_edit_turbo_pe", date=IN_TEMPLATES),
    Preset("Boogu turbo", steps=4, cfg=1.0, gamma=1.0, flow=True, spacing="sgm_uniform", models="Boogu-Image 0.1 turbo",
           source=f"{TEMPLATES} image_boogu_image_0_1_turbo_t2i", date=IN_TEMPLATES),
    Preset("PiD", steps=4, cfg=1.0, gamma=1.0, flow=True, models="PiD upscaler",
           source=f"{TEMPLATES} utility_pid_latent_upscale_dit", date=IN_TEMPLATES),
    # ---- other videos, and sound
    Preset("LTX-2 distilled", steps=8, cfg=1.0, gamma=0.0, flow=True, sampler="euler, euler_ancestral",
           models="LTX-2, 2.3, 2.5", sigmas=(1.0, 0.99375, 0.9875, 0.98125, 0.975, 0.909375, 0.725, 0.421875),
           remark="the LoRA of 2.3 at strength 0.5, the whole model else",
           source=f"Lightricks, LTX-2, DISTILLED_SIGMA_VALUES (EulerDiffusionStep); {TEMPLATES} video_ltx2_t2v_distilled",
           date=IN_TEMPLATES),
    Preset("LTX-2 second stage", steps=3, cfg=1.0, gamma=0.0, sigmas=(0.909375, 0.725, 0.421875), flow=True,
           sampler="euler_ancestral", models="LTX-2", remark="on the upscaled latent of the first stage",
           source=f"{TEMPLATES} video_ltx2_t2v_distilled", date=IN_TEMPLATES),
    Preset("LTX-2.3 second stage", steps=3, cfg=1.0, gamma=0.0, sigmas=(0.85, 0.725, 0.4219), flow=True, strength=0.5,
           sampler="euler, euler_ancestral", models="LTX-2.3, 2.5", remark="on the upscaled latent of the first stage",
           source=f"{TEMPLATES} video_ltx2_3_t2v, video_ltx2_5_t2v", date=IN_TEMPLATES),
    Preset("HunyuanVideo distilled", steps=6, cfg=1.0, gamma=0.0, flow=True, shift=17.0, sampler="euler",
           models="FastHunyuan", remark="FluxGuidance 6", date="2024-12",
           source="FastVideo, FastHunyuanConfig (num_inference_steps 6, flow_shift 17, embedded_cfg_scale 6)"),
    Preset("HunyuanVideo 1.5 upscaler", steps=8, cfg=1.0, gamma=0.0, flow=True, shift=2.0, sampler="euler",
           models="HunyuanVideo 1.5 1080p SR distilled",
           source=f"{TEMPLATES} video_hunyuan_video_1.5_720p_t2v, _i2v", date=IN_TEMPLATES),
    Preset("MiniMax-H3 turbo", steps=8, cfg=1.0, gamma=0.0, flow=True, strength=1.0, sampler="res_multistep", models="MiniMax-H3",
           source=f"{TEMPLATES} image_minimax_h3_t2i", date=IN_TEMPLATES),
    Preset("FastH3", steps=8, cfg=1.0, gamma=0.0, flow=True, sampler="res_multistep", models="FastVideo FastH3",
           source=f"{TEMPLATES} video_fastvideo_fasth3_t2v", date=IN_TEMPLATES),
    Preset("Stable Audio 3 pingpong", steps=8, cfg=1.0, gamma=1.0, flow=True, models="Stable Audio 3 medium",
           source=f"{TEMPLATES} audio_stable_audio_3_medium", date=IN_TEMPLATES),
    Preset("ACE-Step 1.5 turbo", steps=8, cfg=1.0, gamma=0.0, flow=True, shift=3.0, sampler="euler",
           models="ACE-Step 1.5 turbo", source=f"{TEMPLATES} audio_ace_step_1_5_checkpoint", date=IN_TEMPLATES),
]
# fmt: on

PRESETS: dict[str, Preset] = {preset.name: preset for preset in _ROWS}
"""Name -> preset."""
