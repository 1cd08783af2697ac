"""Settings that published few-step models were trained for, by name: data, one row each (see preset.Preset)."""

from collections.abc import Iterable

from .preset import Preset


def trailing_timesteps(steps: int, train_timesteps: int = 1000) -> tuple[int, ...]:
    """The timesteps T - 1, T - T/steps - 1, ...: "trailing" spacing of diffusers, sgm_uniform of ComfyUI nearly.

    steps: 1..train_timesteps. Common Diffusion Noise Schedules and Sample Steps Are Flawed (Lin et al. 2023, arXiv
    2305.08891, table 2). Raises ValueError for other steps.
    """
    if not 1 <= steps <= train_timesteps:
        raise ValueError(f"steps is {steps}; it must be from 1 to {train_timesteps}.")
    return tuple(round(train_timesteps - i * train_timesteps / steps) - 1 for i in range(steps))


def _distilled_for(
    steps: Iterable[int], name: str, *, source: str, gamma: float = 0.0, cfg: float = 1.0, suffix: str = ""
) -> list[Preset]:
    """One preset for each of a family's files, each made for its own number of steps."""
    return [
        Preset(f"{name} {n} steps{suffix}", n, cfg, gamma, timesteps=trailing_timesteps(n), source=source)
        for n in steps
    ]


HYPER = "Ren et al. 2024, Hyper-SD, arXiv 2404.13686, and its model card"
PCM = "Wang et al. 2024, Phased Consistency Model, arXiv 2405.18407, and its demo"

PRESETS: dict[str, Preset] = {
    preset.name: preset
    for preset in [
        Preset("LCM", 4, 1.0, 1.0, source="Luo et al. 2023, LCM-LoRA, arXiv 2311.05556, and its model cards"),
        Preset("AnimateLCM", 4, 1.0, 1.0, original_steps=100, source="Wang et al. 2024, AnimateLCM, arXiv 2402.00769"),
        Preset("TCD", 4, 1.0, 0.3, source="Zheng et al. 2024, Trajectory Consistency Distillation, arXiv 2402.19159"),
        Preset(
            "DMD2",
            4,
            1.0,
            1.0,
            timesteps=(999, 749, 499, 249),
            source="Yin et al. 2024, DMD2, arXiv 2405.14867, README",
        ),
        Preset("DMD2 1 step", 1, 1.0, 1.0, timesteps=(399,), source="Yin et al. 2024, DMD2, arXiv 2405.14867, README"),
        Preset("Hyper-SD unified", 4, 1.0, 1.0, source=HYPER),
        Preset("Hyper-SD 1 step UNet", 1, 1.0, 1.0, timesteps=(800,), source=HYPER),
        *_distilled_for((2, 4, 8), "Hyper-SD", source=HYPER),
        *_distilled_for((8, 12), "Hyper-SD", cfg=5.0, suffix=" CFG", source=HYPER),
        *_distilled_for(
            (2, 4, 8), "Lightning", source="Lin et al. 2024, SDXL-Lightning, arXiv 2402.13929, and its model card"
        ),
        *_distilled_for((2, 4, 8, 16), "PCM small cfg", source=PCM),
        *_distilled_for((4, 8, 16), "PCM normal cfg", cfg=7.5, source=PCM),
        Preset("PCM LCM-like", 4, 1.0, 1.0, source=PCM),
        Preset(
            "TDD",
            4,
            1.7,
            0.2,
            original_steps=250,
            source="Wang et al. 2024, Target-Driven Distillation, arXiv 2409.01347",
        ),
        Preset(
            "Turbo",
            1,
            1.0,
            1.0,
            timesteps=trailing_timesteps(4),
            source="Sauer et al. 2023, Adversarial Diffusion Distillation, arXiv 2311.17042, and the SDXL-Turbo card",
        ),
    ]
}
"""Name -> preset. gamma 0 stands where the authors use DDIM or Euler, 1 where they use LCM's sampler, between where
they use TCD's. Only settings that the source gives; what other users prefer may differ."""
