"""Declares LoRA by Step, whose strength changes in the course of sampling."""

from comfy_api.latest import io, ui

from ..host.door.lists import numbers
from ..host.door.node import Node
from ..host.lora.by_step import by_step
from .loading import CATEGORY, REPORT_TOOLTIP

MOST = 1000


class LoRAByStep(Node):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="LCMKitLoRAByStep",
            display_name="LoRA by Step",
            category=CATEGORY,
            description="Applies a LoRA with a strength of its own for each step, through the prompts: a speed LoRA that "
            "lets go where it would kill the motion, a style that begins late. The model is not changed.",
            inputs=[
                io.Model.Input("model", tooltip="The model that is sampled, without this LoRA; it tells where the LoRA goes."),
                io.LoraModel.Input("lora", tooltip="From Load LoRA or Merge LoRAs. What it has for the text encoder is left out."),
                io.Conditioning.Input("positive", tooltip="The prompt that the LoRA goes with."),
                io.Conditioning.Input("negative", optional=True, tooltip="The same for the negative prompt, if there is one."),
                io.String.Input(
                    "strengths",
                    default="1, 1, 0, 0",
                    tooltip="A strength for each step, first step first; 1:0:-0.25 is a range. Of fewer than there are steps, "
                    "each holds for an equal share of the schedule.",
                ),
            ],
            outputs=[
                io.Conditioning.Output(display_name="positive"),
                io.Conditioning.Output(display_name="negative"),
                io.Hooks.Output(display_name="HOOKS", tooltip="For core's nodes for hooks, such as Cond Set Props."),
                io.String.Output(display_name="report", tooltip=REPORT_TOOLTIP),
            ],
            search_aliases=["lora schedule", "lora hook", "lora per step", "lora first steps", "lora keyframes", "motion"],
        )  # fmt: skip

    @classmethod
    def execute(cls, model, lora, positive, strengths, negative=None) -> io.NodeOutput:
        values = numbers(strengths, "strengths", low=-100, high=100, most=MOST)
        if not values:
            raise ValueError("strengths is empty. Write one for each step, such as 1, 1, 0, 0.")
        (first, second), hooks, report = by_step(model, lora, values, [positive, negative])
        return io.NodeOutput(first, second, hooks, report, ui=ui.PreviewText(report))
