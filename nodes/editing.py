"""Declares LCM Edit, which changes a picture by two prompts."""

from comfy_api.latest import io

from ..host.door.node import Node
from ..host.sampling import editing
from . import inputs
from .sampling import CATEGORY, preset_input


class LCMEdit(Node):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="LCMKitEdit",
            display_name="LCM Edit (no inversion)",
            category=CATEGORY,
            description="Changes a picture from what one prompt says to what another says, in a few steps, and keeps "
            "what both prompts leave alone. Equal prompts return the picture.",
            inputs=[
                io.Model.Input(
                    "model", tooltip="The model with its LCM-LoRA applied. ModelSamplingDiscrete is not needed."
                ),
                io.Conditioning.Input(
                    "source",
                    tooltip="What the picture shows now. Say the same as target but for what is to change.",
                ),
                io.Conditioning.Input("target", tooltip="What the picture should show instead."),
                io.Latent.Input(
                    "latent_image",
                    tooltip="The picture, from VAE Encode. With a noise mask only what it covers can change.",
                ),
                inputs.seed(
                    "Fixes the noise of every step, for each image of a batch on its own.", after_generate=True
                ),
                inputs.steps(
                    "Steps of two model calls each, one for each prompt. 4 is usual, 2 nearly as good; more "
                    "seldom helps and moves more of the picture.",
                ),
                inputs.cfg(
                    "Guidance of the target away from the source. 1 is none and usually best; above 1 leads "
                    "further, keeps less of the picture, and takes three model calls a step.",
                ),
                inputs.denoise(
                    "How large the change may be: where on the schedule it begins. 1 can change all, colours "
                    "and layout too; lower keeps more. All steps are always run.",
                ),
                inputs.original_steps(advanced=True),
                io.Float.Input(
                    "keep",
                    default=0.2,
                    min=0.0,
                    max=0.5,
                    step=0.01,
                    tooltip="Places that the change of prompt moves by less than this share of the most moved place stay "
                    "as they are. 0 makes every change; higher keeps more of the picture.",
                ),
                preset_input("steps", "original_steps", more="; cfg and the noise between steps are the edit's own"),
            ],
            outputs=[io.Latent.Output(display_name="LATENT", tooltip="The edited latent, for VAE Decode.")],
            is_experimental=True,
            search_aliases=["lcm", "edit", "infedit", "ddcm", "virtual inversion", "prompt to prompt"],
        )

    @classmethod
    def execute(
        cls, model, source, target, latent_image, seed, steps, cfg, denoise, original_steps, keep, preset=None
    ) -> io.NodeOutput:
        return io.NodeOutput(
            editing.edit(
                model,
                source,
                target,
                latent_image,
                seed=seed,
                steps=steps,
                cfg=cfg,
                denoise=denoise,
                original_steps=original_steps,
                keep=keep,
                preset=preset,
            )
        )
