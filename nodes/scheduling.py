"""Declares the nodes that say which noise levels a run visits: LCM Scheduler, LCM Preset."""

from comfy_api.latest import io, ui

from ..host.door.node import Node
from ..host.sampling import schedules
from ..samplers.presets import PRESETS
from . import inputs
from .sampling import CATEGORY, Presets, preset_input


class LCMScheduler(Node):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="LCMKitScheduler",
            display_name="LCM Scheduler",
            category=CATEGORY,
            description="The noise levels an LCM was trained on, read from the model's own table: 4 steps are the "
            "timesteps 999, 759, 499 and 259; of a flow model evenly spaced times through its shift. The model is not "
            "changed.",
            inputs=[
                io.Model.Input(
                    "model", tooltip="The model that will be sampled; only its table of noise levels is read."
                ),
                inputs.steps(),
                inputs.denoise(),
                inputs.original_steps(),
                io.String.Input(
                    "timesteps",
                    default="",
                    placeholder="999, 759, 499, 259",
                    tooltip="Your own timesteps, 0 to 999 on every model, highest first, separated by commas; they replace "
                    "steps and original_steps. Empty uses the LCM schedule. With denoise below 1 the last of them are run.",
                    advanced=True,
                ),
                preset_input("steps", "original_steps"),
            ],
            outputs=[io.Sigmas.Output(display_name="SIGMAS", tooltip="One more than steps; the last is 0.")],
            search_aliases=["lcm", "sigmas", "timesteps", "latent consistency"],
        )

    @classmethod
    def execute(cls, model, steps, denoise, original_steps, timesteps, preset=None) -> io.NodeOutput:
        return io.NodeOutput(
            schedules.lcm_sigmas(
                model,
                steps=steps,
                denoise=denoise,
                original_steps=original_steps,
                timesteps=timesteps,
                preset=preset,
            )
        )


class LCMPreset(Node):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="LCMKitPreset",
            display_name="LCM Preset (TCD, DMD2, Hyper, Lightning, Turbo)",
            category=CATEGORY,
            description="Steps, cfg, gamma and noise levels that a published few-step model was made for: LCM, DMD2, "
            "Hyper-SD, Lightning and others of Stable Diffusion; lightx2v, Qwen-Image-Lightning, Z-Image-Turbo, Flux, LTX-2 "
            "and others of flow models. For LCM KSampler, LCM Scheduler and LCM Multistep Sampler.",
            inputs=[
                io.Combo.Input(
                    "name",
                    options=list(PRESETS),
                    default="LCM",
                    tooltip="The kind of LoRA or checkpoint. Where a file was made for a number of steps, that number "
                    "is in its name.",
                ),
                io.Int.Input(
                    "steps",
                    default=0,
                    min=0,
                    max=1000,
                    tooltip="0 takes the usual number. Models made for exactly one number of steps take no other.",
                ),
            ],
            outputs=[
                Presets.Output(display_name="preset"),
                io.Int.Output(display_name="steps"),
                io.Float.Output(display_name="cfg", tooltip="For samplers that take no preset."),
                io.String.Output(display_name="report", tooltip="The settings and where they come from."),
            ],
            search_aliases=[
                *("tcd", "dmd2", "hyper-sd", "lightning", "pcm", "phased", "tdd", "turbo", "settings"),
                *("lightx2v", "wan", "qwen", "z-image", "flux", "ltx", "schnell", "klein", "rcm", "hidream"),
            ],
        )

    @classmethod
    def execute(cls, name, steps) -> io.NodeOutput:
        preset, text = schedules.preset_named(name, steps)
        return io.NodeOutput(preset, preset.steps, preset.cfg, text, ui=ui.PreviewText(text))
