"""Declares LCM for any KSampler, for nodes that take a sampler's name."""

from comfy_api.latest import io

from ..host.door.node import Node
from ..host.sampling import any_ksampler
from . import inputs
from .sampling import CATEGORY, GAMMA_TOOLTIP, gammas_input, preset_input


class LCMAnyKSampler(Node):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="LCMKitAnyKSampler",
            display_name="LCM for any KSampler",
            category=CATEGORY,
            description="Behind this node the sampler lcm is the exact one, in every node that takes samplers by name: "
            "KSampler, KSampler (Advanced), detailers, tile upscalers. Choose lcm there; other samplers stay as they are.",
            inputs=[
                io.Model.Input(
                    "model", tooltip="The model with its LCM-LoRA applied. ModelSamplingDiscrete is not needed."
                ),
                io.Float.Input("gamma", default=1.0, min=0.0, max=1.0, step=0.01, tooltip=GAMMA_TOOLTIP),
                inputs.original_steps(advanced=True),
                gammas_input(),
                preset_input("gamma", "original_steps", more="; steps, cfg and denoise remain the sampler node's own"),
            ],
            outputs=[
                io.Model.Output(
                    display_name="MODEL",
                    tooltip="For any node that samples: set it to lcm, with any scheduler; simple starts where LCM does.",
                )
            ],
            search_aliases=["lcm", "facedetailer", "ultimate sd upscale", "ksampler advanced", "tcd", "dmd2"],
        )

    @classmethod
    def execute(cls, model, gamma, original_steps, gammas="", preset=None) -> io.NodeOutput:
        return io.NodeOutput(
            any_ksampler.with_exact_lcm(model, gamma=gamma, gammas=gammas, original_steps=original_steps, preset=preset)
        )
