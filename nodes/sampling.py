"""Declares the nodes that make pictures: LCM KSampler, LCM Multistep Sampler."""

from comfy_api.latest import io

from ..host.door.node import Node
from ..host.door.replaced import REPLACES
from ..host.sampling import sampling
from ..host.sampling.experts import WAN_BOUNDARY
from ..host.sampling.runs import Section
from ..samplers.schedule import MOST_STEPS
from . import inputs

CATEGORY = "LCM Kit/sampling"

GAMMA_TOOLTIP = (
    "How much of the noise is drawn fresh at every step. 1 is LCM as published and was best up to 8 steps; for 16 and "
    "more try 0.3 to 0.7. 0 draws none after the first step (deterministic)."
)
Presets = io.Custom("LCM_PRESET")


def gammas_input():
    return io.String.Input(
        "gammas",
        default="",
        optional=True,
        placeholder="0, 0, 1",
        tooltip="A gamma for each step, first step first, separated by commas; the last one holds to the end. "
        "0, 1 makes the first step deterministic and goes on as LCM. Empty uses gamma for all.",
        advanced=True,
    )


def preset_input(*replaces: str, more: str = ""):
    """replaces: the inputs of the node that have no effect while a preset is connected."""
    names = " and ".join(filter(None, [", ".join(replaces[:-1]), replaces[-1]]))
    return Presets.Input(
        "preset",
        optional=True,
        tooltip=f"From LCM Preset or LCM-LoRA Loader: settings that the model was made for. Replaces {names}{more}.",
        extra_dict={REPLACES: list(replaces)},
    )


class LCMKSampler(Node):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="LCMKitKSampler",
            display_name="LCM KSampler",
            category=CATEGORY,
            description="Makes a picture in a few steps with a model that carries an LCM-LoRA: the exact LCM schedule, "
            "the LCM sampler and noise that does not depend on the batch, in one node.",
            inputs=[
                io.Model.Input(
                    "model", tooltip="The model with its LCM-LoRA applied. ModelSamplingDiscrete is not needed."
                ),
                io.Conditioning.Input("positive", tooltip="What the picture should show."),
                io.Conditioning.Input(
                    "negative",
                    optional=True,
                    tooltip="What to avoid. Not needed while cfg is 1, where it has no effect. Above 1 and without it the empty "
                    "prompt is taken: see clip.",
                ),
                io.Latent.Input(
                    "latent_image", tooltip="An empty latent, or a picture to change with denoise below 1."
                ),
                inputs.seed(
                    "Fixes the initial noise and the noise of every step, for each image of a batch on its own.",
                    after_generate=True,
                ),
                inputs.steps(),
                inputs.cfg(
                    "Guidance. 1 is none and the fastest: an LCM-LoRA has its guidance built in. "
                    "1 to 2 strengthens the prompt and doubles the work; above 2 pictures burn.",
                ),
                inputs.denoise(),
                io.Float.Input(
                    "gamma",
                    default=1.0,
                    min=0.0,
                    max=1.0,
                    step=0.01,
                    tooltip=GAMMA_TOOLTIP,
                    advanced=True,
                ),
                io.Int.Input(
                    "cfg_steps",
                    default=-1,
                    min=-1,
                    max=1000,
                    tooltip="Use cfg in the first so many steps only, then 1. -1 uses it in all, 0 in none. "
                    "1 or 2 keep most of the effect of the negative prompt at little cost.",
                    advanced=True,
                ),
                inputs.original_steps(advanced=True),
                gammas_input(),
                preset_input("steps", "cfg", "gamma", "original_steps"),
                *inputs.section(),
                io.Model.Input(
                    "model_low",
                    optional=True,
                    tooltip="A second model for the noise levels below the boundary: the low-noise expert of Wan 2.2, or a "
                    "refiner. It goes on where the first stops, in one run; only one of the two has to be in memory.",
                ),
                io.Float.Input(
                    "boundary",
                    default=WAN_BOUNDARY,
                    min=0.0,
                    max=1.0,
                    step=0.001,
                    optional=True,
                    advanced=True,
                    tooltip="Where model_low takes over: steps that start below this share of the highest time are its own. "
                    "Wan 2.2 has 0.875 for text to video and 0.9 for image to video.",
                ),
                io.Clip.Input(
                    "clip",
                    optional=True,
                    tooltip="The text encoder, for the empty prompt where cfg is above 1 and no negative is connected. SDXL "
                    "needs none: it was trained with zeros for it.",
                ),
            ],
            outputs=[io.Latent.Output(display_name="LATENT", tooltip="The finished latent, for VAE Decode.")],
            search_aliases=["lcm", "latent consistency", "few step sampler", "turbo"],
        )

    @classmethod
    def execute(
        cls,
        model,
        positive,
        latent_image,
        seed,
        steps,
        cfg,
        denoise,
        gamma,
        cfg_steps,
        original_steps,
        negative=None,
        gammas="",
        preset=None,
        start_at_step=0,
        end_at_step=MOST_STEPS,
        add_noise=True,
        return_with_leftover_noise=False,
        model_low=None,
        boundary=WAN_BOUNDARY,
        clip=None,
    ) -> io.NodeOutput:
        return io.NodeOutput(
            sampling.sample(
                model,
                positive,
                negative,
                latent_image,
                seed=seed,
                steps=steps,
                cfg=cfg,
                denoise=denoise,
                gamma=gamma,
                cfg_steps=cfg_steps,
                original_steps=original_steps,
                gammas=gammas,
                preset=preset,
                section=Section(start_at_step, end_at_step, add_noise, return_with_leftover_noise),
                experts=None if model_low is None else (model_low, boundary),
                clip=clip,
            )
        )


class LCMSampler(Node):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="LCMKitSampler",
            display_name="LCM Multistep Sampler",
            category=CATEGORY,
            description="The LCM sampler for SamplerCustom and SamplerCustomAdvanced. Use it with LCM Scheduler.",
            inputs=[
                io.Float.Input("gamma", default=1.0, min=0.0, max=1.0, step=0.01, tooltip=GAMMA_TOOLTIP),
                inputs.seed(
                    "Seed of the noise added between steps; -1 takes the seed of the noise input. A run in parts is the "
                    "undivided run if this is the same in all of them; where DisableNoise follows, which has no seed, set "
                    "it. An image of a batch keeps its noise alone, as in LCM KSampler.",
                    lowest=-1,
                ),
                gammas_input(),
                preset_input("gamma"),
                io.Sigmas.Input(
                    "sigmas",
                    optional=True,
                    tooltip="For a run in parts (SplitSigmas): the whole schedule, as it was before the split, so that "
                    "gammas counts its steps in every part. Not needed where one gamma holds for all steps.",
                ),
                inputs.shaped_noise("s_noise", 1.0, 64.0, "What the fresh noise of the first step is multiplied by."),
                inputs.shaped_noise(
                    "s_noise_end",
                    1.0,
                    64.0,
                    "And that of the last step; the steps between go evenly from one to the other.",
                ),
                inputs.shaped_noise(
                    "noise_clip_std",
                    0.0,
                    10.0,
                    "Fresh noise further out than so many of its standard deviations is moved there. 0 leaves it.",
                ),
            ],
            outputs=[io.Sampler.Output(display_name="SAMPLER")],
            search_aliases=["lcm", "latent consistency", "tcd", "stochastic"],
        )

    @classmethod
    def execute(
        cls,
        gamma,
        seed,
        gammas="",
        preset=None,
        sigmas=None,
        s_noise=1.0,
        s_noise_end=1.0,
        noise_clip_std=0.0,
    ) -> io.NodeOutput:
        sampler = sampling.lcm_sampler(
            gamma=sampling.chosen_gamma(gamma, gammas, preset),
            seed=seed,
            schedule=sigmas,
            s_noise=s_noise,
            s_noise_end=s_noise_end,
            noise_clip_std=noise_clip_std,
        )
        return io.NodeOutput(sampling.from_pure_noise(sampler, preset))
