"""Inputs that several nodes have, declared once: a word means the same, with the same range, wherever it stands."""

from collections.abc import Mapping

from comfy_api.latest import io

from ..host.lora.slots import LORA, NUMBERS, STRENGTH
from ..lora_merge.files.dtypes import DTYPES
from ..samplers.schedule import MOST_STEPS

MAX_SEED = 0xFFFFFFFFFFFFFFFF
STEPS_TOOLTIP = "Model calls. 4 is the usual choice with an LCM-LoRA, 2 to 8 work; more than 8 rarely looks better."
ORIGINAL_STEPS_TOOLTIP = (
    "How many timesteps the LCM was distilled on: 50 for the published LCM-LoRAs, 100 for some video models. "
    "Steps are picked evenly from these. Means nothing for flow models (Flux, Wan, Qwen-Image, SD3 and their kin)."
)
DENOISE_TOOLTIP = (
    "1 starts from pure noise. Lower keeps more of the input picture: 0.5 starts half-way down the schedule; 0 returns "
    "it as it is. All steps are run on the part of the schedule that is left, as far as it has so many."
)


def strength(name: str, tooltip: str) -> io.Float.Input:
    """The strength of a LoRA; below 0 subtracts it."""
    return io.Float.Input(name, default=1.0, min=-100.0, max=100.0, step=0.01, tooltip=tooltip)


def lora_slots(tooltips: Mapping[int, str], strength_tooltip: str) -> list:
    """lora_1, strength_1, lora_2, ...; a LoRA may be missing, and its strength keeps its place.

    tooltips: of the LoRAs, by their numbers.   strength_tooltip: {} stands for the LoRA's name.
    """
    inputs: list = []
    for number in NUMBERS:
        lora, tooltip = f"{LORA}{number}", tooltips.get(number, "Another LoRA, if there is one.")
        inputs += [
            io.LoraModel.Input(lora, optional=True, tooltip=f"{tooltip} One that is switched off is left out."),
            strength(f"{STRENGTH}{number}", strength_tooltip.format(lora)),
        ]
    return inputs


def model_of_loras() -> io.Model.Input:
    """The model that several LoRAs are for, where their names alone do not tell which are of one weight."""
    return io.Model.Input(
        "model",
        optional=True,
        tooltip="The model that the LoRAs are for. Needed only where they name its weights differently and the report says that "
        "nothing tells which names are of one weight.",
    )


def wrong_base(optional: bool = False) -> io.Combo.Input:
    return io.Combo.Input(
        "wrong_base",
        options=["refuse", "warn"],
        default="refuse",
        optional=optional,
        tooltip="If the LoRA was made for another base model: refuse stops with a message that says which "
        "file to use, warn applies what fits and says so.",
        advanced=True,
    )


def dtype(tooltip: str) -> io.Combo.Input:
    """What a LoRA file stores its numbers in."""
    return io.Combo.Input("dtype", options=list(DTYPES), default="fp16", tooltip=tooltip)


def seed(tooltip: str, *, lowest: int = 0, after_generate: bool = False, advanced: bool | None = None) -> io.Int.Input:
    """after_generate: whether the page offers to change it after every run.   lowest: also the default."""
    return io.Int.Input(
        "seed",
        default=lowest,
        min=lowest,
        max=MAX_SEED,
        control_after_generate=after_generate,
        tooltip=tooltip,
        advanced=advanced,
    )


def steps(tooltip: str = STEPS_TOOLTIP) -> io.Int.Input:
    return io.Int.Input("steps", default=4, min=1, max=1000, tooltip=tooltip)


def cfg(tooltip: str) -> io.Float.Input:
    return io.Float.Input("cfg", default=1.0, min=0.0, max=100.0, step=0.1, round=0.01, tooltip=tooltip)


def denoise(tooltip: str = DENOISE_TOOLTIP) -> io.Float.Input:
    return io.Float.Input("denoise", default=1.0, min=0.0, max=1.0, step=0.01, tooltip=tooltip)


def original_steps(advanced: bool | None = None) -> io.Int.Input:
    return io.Int.Input(
        "original_steps", default=50, min=1, max=1000, tooltip=ORIGINAL_STEPS_TOOLTIP, advanced=advanced
    )


def section() -> list:
    """What core's KSamplerAdvanced calls by the same names."""
    return [
        io.Int.Input(
            "start_at_step",
            default=0,
            min=0,
            max=MOST_STEPS,
            optional=True,
            advanced=True,
            tooltip="The first step that is run, counted from 0. The steps before it are those of another LCM KSampler, "
            "with the same steps and seed, that ended there and left its noise.",
        ),
        io.Int.Input(
            "end_at_step",
            default=MOST_STEPS,
            min=0,
            max=MOST_STEPS,
            optional=True,
            advanced=True,
            tooltip="Steps before this one are run; a number above all steps runs to the end.",
        ),
        io.Boolean.Input(
            "add_noise",
            default=True,
            optional=True,
            advanced=True,
            tooltip="Off for a latent that comes with the noise of the step it starts from, left by the sampler before.",
        ),
        io.Boolean.Input(
            "return_with_leftover_noise",
            default=False,
            optional=True,
            advanced=True,
            tooltip="On where another sampler goes on at end_at_step: the latent keeps the noise of that level. Off ends "
            "in a picture.",
        ),
    ]


def shaped_noise(name: str, default: float, largest: float, tooltip: str):
    """As core's SamplerLCM has it by the same name."""
    return io.Float.Input(
        name, default=default, min=0.0, max=largest, step=0.01, optional=True, advanced=True, tooltip=tooltip
    )
