"""What people read about a preset."""

from __future__ import annotations

from .preset import Preset


def describe(preset: Preset) -> str:
    """Its settings, what else it asks for, what it was made for and where that is said, a line each."""
    needs = "; ".join(needs_in_words(preset))
    fewer_below_one = bool(preset.timesteps) and preset.calls(0.5) < preset.steps
    return "\n".join(
        [
            f"{preset.name}: {settings_in_words(preset)}.",
            *([f"It also asks for: {needs}."] if needs else []),
            *(["Below denoise 1 fewer steps are run, each as long as it was trained for."] if fewer_below_one else []),
            f"Made for {preset.models}; there sampled with {preset.sampler}.",
            f"From {preset.source}, {preset.date}.",
        ]
    )


def settings_in_words(preset: Preset) -> str:
    """Such as "4 steps, cfg 1, gamma 1, 50 original steps"."""
    gammas = preset.gamma if isinstance(preset.gamma, tuple) else (preset.gamma,)
    gamma = ", ".join(f"{value:g}" for value in gammas)
    steps = "1 step" if preset.steps == 1 else f"{preset.steps} steps"
    return f"{steps}, cfg {preset.cfg:g}, gamma {gamma}, {schedule_in_words(preset)}"


def schedule_in_words(preset: Preset) -> str:
    """Where the steps of a preset lie, such as "timesteps 999, 749, 499, 249"."""
    if preset.sigmas:
        return f"sigmas {', '.join(f'{sigma:.4g}' for sigma in preset.sigmas)}"
    if preset.timesteps:
        which = "timesteps" if preset.fixed else "of the timesteps"
        return f"{which} {', '.join(map(str, preset.timesteps))}"
    if not preset.flow:
        return f"{preset.original_steps} original steps"
    spaced = "evenly spaced" if preset.spacing == "even" else f"{preset.spacing} spaced"
    return f"{spaced} through the model's own shift"


def needs_in_words(preset: Preset) -> list[str]:
    """What a preset asks for outside the sampler: "shift 5", "LoRA at strength 1", each if it says so."""
    return [
        *([f"shift {preset.shift:g}"] if preset.shift is not None else []),
        *([f"LoRA at strength {preset.strength:g}"] if preset.strength is not None else []),
        *([f"the first {preset.first_expert} steps by the high-noise model"] if preset.first_expert else []),
        *([preset.remark] if preset.remark else []),
    ]
