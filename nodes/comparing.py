"""Declares the node that looks at LoRAs together: Compare LoRAs."""

from comfy_api.latest import io, ui

from ..host.door.node import Node
from ..host.lora import comparing
from .inputs import lora_slots, model_of_loras

CATEGORY = "LCM Kit/LoRA"
SLOT_TOOLTIPS = {
    1: "The first LoRA: its strength is swept in the picture.",
    2: "The second LoRA, for example an LCM-LoRA.",
}
STRENGTH_TOOLTIP = "Strength that {0} is meant to have: 1 as trained, below 0 subtracts it. No effect without {0}."


class CompareLoRA(Node):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="LCMKitCompareLoRA",
            display_name="Compare LoRAs",
            category=CATEGORY,
            description="Will these LoRAs fight, and where? How strong each is in every block, whether they cancel, share "
            "directions or leave each other alone, and what a smaller rank of their sum would lose.",
            is_output_node=True,
            inputs=[
                *lora_slots(SLOT_TOOLTIPS, STRENGTH_TOOLTIP),
                io.Int.Input(
                    "rank",
                    default=0,
                    min=0,
                    max=4096,
                    tooltip="A rank that you think of cutting their merge to: it is marked in the picture and told in the "
                    "report. 0 marks none.",
                ),
                model_of_loras(),
            ],
            outputs=[
                io.Image.Output(
                    display_name="IMAGE",
                    tooltip="Norms by block, what a cut to each rank loses, and how the sum grows with strength_1.",
                ),
                io.String.Output(display_name="report", tooltip="The answer in words, and all of it in numbers."),
            ],
            search_aliases=["analyze lora", "lora conflict", "lora similarity", "lora heat map"],
        )

    @classmethod
    def execute(cls, rank, model=None, **slots) -> io.NodeOutput:
        picture, text = comparing.compare_slots(slots, rank, model)
        preview = ui.PreviewImage(picture, cls=cls).as_dict() | ui.PreviewText(text).as_dict()
        return io.NodeOutput(picture, text, ui=preview)
