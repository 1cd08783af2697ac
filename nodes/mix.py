"""Declares LoRA Mix: the LCM-LoRA and styles on a model, in one node."""

from comfy_api.latest import io, ui

from ..host.door.node import Node
from ..host.lora import auto, files, mix
from . import inputs
from .loading import CATEGORY, REPORT_TOOLTIP


def _row(number: int, names: list[str]) -> list:
    return [
        io.Boolean.Input(f"on_{number}", default=True, tooltip=f"Off leaves lora_{number} out, and its settings stay."),
        io.Combo.Input(
            f"lora_{number}",
            options=[mix.NONE, *names],
            default=mix.NONE,
            tooltip="A file in the loras folder, for example a style.",
        ),
        inputs.strength(f"strength_{number}", f"Strength of lora_{number}: 1 as trained, below 0 subtracts it."),
    ]


class LoRAMix(Node):
    @classmethod
    def define_schema(cls):
        names = files.lora_names()
        return io.Schema(
            node_id="LCMKitLoRAMix",
            display_name="LoRA Mix (LoRA stack)",
            category=CATEGORY,
            description="An LCM-LoRA and up to four styles on a model, merged exactly and applied: the formula of the LCM-LoRA "
            "paper in one node. Says of each row what it is, and gives the settings to sample with.",
            inputs=[
                io.Model.Input("model", tooltip="The base model or a fine-tune of it."),
                io.Clip.Input("clip", optional=True, tooltip="The text encoder, if styles should change it too."),
                io.Combo.Input(
                    mix.LCM,
                    options=[auto.AUTO, mix.NONE, *names],
                    default=auto.AUTO,
                    tooltip="The LoRA that makes few steps possible. auto finds the one for the connected model, whatever it is "
                    "called, and says where to get it if it is not there.",
                ),
                inputs.strength("lcm_strength", "1 is what the LCM-LoRA was trained for; 0 leaves it out."),
                *(entry for number in mix.ROWS for entry in _row(number, names)),
                io.String.Input(
                    "block_strengths",
                    default="",
                    multiline=True,
                    tooltip="Factors on the strengths by part of the model, such as down=0.5, mid=1, attention=0.8, te=0. For all "
                    "rows, or on a line of its own for one: lora_2: down=0. lora_0 is the LCM-LoRA.",
                    advanced=True,
                ),
                inputs.wrong_base(),
            ],
            outputs=[
                io.Model.Output(display_name="MODEL"),
                io.Clip.Output(display_name="CLIP"),
                io.LoraModel.Output(
                    display_name="LORA_MODEL", tooltip="The merge, for Save LoRA. Apply it at strength 1."
                ),
                io.Custom("LCM_PRESET").Output(
                    display_name="preset",
                    tooltip="The settings of the row that makes few steps possible; connect it to LCM KSampler.",
                ),
                io.Custom("LORA_STACK").Output(
                    display_name="LORA_STACK", tooltip="The rows that are on, for nodes that apply a stack."
                ),
                io.String.Output(display_name="report", tooltip=REPORT_TOOLTIP),
            ],
            search_aliases=["lora stack", "multi lora", "power lora", "lora merge", "lcm lora", "style lora"],
        )

    @classmethod
    def validate_inputs(cls, lcm_lora=None, lora_1=None, lora_2=None, lora_3=None, lora_4=None):
        chosen = {"lora_1": lora_1, "lora_2": lora_2, "lora_3": lora_3, "lora_4": lora_4}
        return mix.known({mix.LCM: lcm_lora, **chosen})

    @classmethod
    def fingerprint_inputs(
        cls, lcm_lora=mix.NONE, lora_1=mix.NONE, lora_2=mix.NONE, lora_3=mix.NONE, lora_4=mix.NONE, **others
    ):
        return mix.fingerprint([lcm_lora, lora_1, lora_2, lora_3, lora_4])

    @classmethod
    def execute(cls, model, lcm_lora, lcm_strength, block_strengths, wrong_base, clip=None, **rows) -> io.NodeOutput:
        made = mix.mix(
            model,
            clip,
            mix.rows_of(lcm_lora, lcm_strength, rows),
            block_strengths=block_strengths,
            allow_misfit=wrong_base == "warn",
        )
        return io.NodeOutput(
            made.model, made.clip, made.lora, made.preset, made.stack, made.report, ui=ui.PreviewText(made.report)
        )
