"""Declares the node that makes a LoRA out of two models: Extract LoRA."""

from comfy_api.latest import io, ui

from ..host.door.node import Node
from ..host.lora import extracting

CATEGORY = "LCM Kit/LoRA"


class ExtractLoRA(Node):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="LCMKitExtractLoRA",
            display_name="Extract LoRA",
            category=CATEGORY,
            description="The LoRA that makes one model out of another: what fine-tuning added, as a small file. From an "
            "LCM model and its base it gives the acceleration, for use on other models.",
            inputs=[
                io.Model.Input(
                    "model_tuned", tooltip="The model with what you want, with all LoRAs that are on it. Not changed."
                ),
                io.Model.Input("model_base", tooltip="The model that it was made from. Not changed."),
                io.Int.Input(
                    "rank",
                    default=64,
                    min=1,
                    max=4096,
                    tooltip="Size of the LoRA: higher is closer to the tuned model and a larger file. The report says how "
                    "close.",
                ),
                io.Float.Input(
                    "keep",
                    default=1.0,
                    min=0.01,
                    max=1.0,
                    step=0.01,
                    tooltip="Below 1, each module stops at the smallest rank that holds this share of its difference: a "
                    "smaller file. 1 uses the whole rank everywhere.",
                ),
                io.Clip.Input(
                    "clip_tuned", optional=True, tooltip="Text encoder of the tuned model, to have it in the LoRA too."
                ),
                io.Clip.Input("clip_base", optional=True, tooltip="Text encoder of the base; needs clip_tuned."),
            ],
            outputs=[
                io.LoraModel.Output(display_name="LORA_MODEL", tooltip="The LoRA, for Save LoRA and Apply LoRA."),
                io.String.Output(
                    display_name="report", tooltip="Modules, ranks, and how much of the difference is kept."
                ),
            ],
            search_aliases=["lora from models", "turbo lora", "model difference", "subtract models", "svd lora"],
        )

    @classmethod
    def execute(cls, model_tuned, model_base, rank, keep, clip_tuned=None, clip_base=None) -> io.NodeOutput:
        lora, text = extracting.extract_lora(model_tuned, model_base, rank, keep, clip_tuned, clip_base)
        return io.NodeOutput(lora, text, ui=ui.PreviewText(text))
