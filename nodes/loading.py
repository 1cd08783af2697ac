"""Declares the nodes that read LoRA files and apply LoRAs: LCM-LoRA Loader, Load LoRA, Apply LoRA."""

from comfy_api.latest import io, ui

from ..host.door.node import Node
from ..host.lora import auto, files, patches, stack
from ..host.lora.reports import contents
from . import inputs

CATEGORY = "LCM Kit/LoRA"
REPORT_TOOLTIP = "What was done, in words; also shown on the node."


class LCMLoader(Node):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="LCMKitLoader",
            display_name="LCM-LoRA Loader",
            category=CATEGORY,
            description="Applies an LCM-LoRA, or another LoRA that makes few-step models, and gives the settings that go "
            "with it. Says what the file is, and refuses one that was made for another base model.",
            inputs=[
                io.Model.Input("model", tooltip="The base model or a fine-tune of it, before or after style LoRAs."),
                io.Clip.Input("clip", optional=True, tooltip="Passed through; LCM-LoRAs do not change it."),
                io.Combo.Input(
                    "lora_name",
                    options=[auto.AUTO, *files.lora_names()],
                    tooltip="A file in the loras folder. auto finds the one for the connected model, whatever it is called, "
                    "and says where to get it if it is not there.",
                ),
                inputs.strength(
                    "strength_model",
                    "1 is what it was trained for. Lower gives softer pictures that need more steps, "
                    "0 leaves the model as it is.",
                ),
                inputs.wrong_base(),
                io.Custom("LORA_STACK").Input(
                    "lora_stack",
                    optional=True,
                    tooltip="Style LoRAs from a stacker node of another pack, applied before this LoRA.",
                ),
            ],
            outputs=[
                io.Model.Output(display_name="MODEL"),
                io.Clip.Output(display_name="CLIP"),
                io.Custom("LCM_PRESET").Output(
                    display_name="preset",
                    tooltip="All settings this LoRA is made for; connect it to LCM KSampler and there is nothing to type.",
                ),
                io.LoraModel.Output(display_name="LORA_MODEL", tooltip="The LoRA itself, for merging."),
                io.Int.Output(display_name="steps", tooltip="The number of steps this LoRA is made for."),
                io.Float.Output(display_name="cfg", tooltip="The guidance this LoRA is made for."),
                io.String.Output(display_name="report", tooltip=REPORT_TOOLTIP),
            ],
            search_aliases=["lcm lora", "lcm-lora", "acceleration lora", "load lora"],
        )

    @classmethod
    def validate_inputs(cls, lora_name=None):
        return auto.known(lora_name)

    @classmethod
    def fingerprint_inputs(cls, lora_name="", **others):
        return auto.fingerprint(lora_name)

    @classmethod
    def execute(cls, model, lora_name, strength_model, wrong_base, clip=None, lora_stack=None) -> io.NodeOutput:
        lora, done = stack.load_and_apply(
            model, clip, lora_name, strength_model, lora_stack, allow_misfit=wrong_base == "warn"
        )
        return io.NodeOutput(
            done.model, done.clip, done.preset, lora, done.steps, done.cfg, done.report, ui=ui.PreviewText(done.report)
        )


class LoadLoRA(Node):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="LCMKitLoadLoRA",
            display_name="Load LoRA (weights)",
            category=CATEGORY,
            description="Reads a LoRA file without applying it, for merging, applying or saving, and says what it holds.",
            inputs=[io.Combo.Input("lora_name", options=files.lora_names(), tooltip="A file in the loras folder.")],
            outputs=[
                io.LoraModel.Output(display_name="LORA_MODEL"),
                io.String.Output(display_name="report", tooltip="Modules, rank, alpha, scale and size."),
            ],
            search_aliases=["lora info", "lora weights", "open lora", "convert lora"],
        )

    @classmethod
    def validate_inputs(cls, lora_name=None):
        return files.known(lora_name)

    @classmethod
    def fingerprint_inputs(cls, lora_name=""):
        return files.fingerprint(lora_name)

    @classmethod
    def execute(cls, lora_name) -> io.NodeOutput:
        lora = files.read_lora(lora_name)
        text = contents(lora)
        return io.NodeOutput(lora, text, ui=ui.PreviewText(text))


class ApplyLoRA(Node):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="LCMKitApplyLoRA",
            display_name="Apply LoRA (weights)",
            category=CATEGORY,
            description="Applies a LoRA from Load LoRA or Merge LoRAs to a model, and to its text encoder if one is "
            "connected. A LoRA for another model is refused.",
            inputs=[
                io.Model.Input("model", tooltip="The model to change; it is copied, not altered."),
                io.Clip.Input("clip", optional=True, tooltip="The text encoder, if the LoRA should change it too."),
                io.LoraModel.Input("lora", tooltip="The LoRA to apply."),
                inputs.strength(
                    "strength_model",
                    "How strongly the model is changed: 1 as trained, 0 not at all, below 0 the opposite way. "
                    "A merged LoRA has its strengths inside already, so 1.",
                ),
                inputs.strength("strength_clip", "The same for the text encoder; no effect without one."),
                inputs.wrong_base(optional=True),
            ],
            outputs=[
                io.Model.Output(display_name="MODEL"),
                io.Clip.Output(display_name="CLIP"),
                io.String.Output(display_name="report", tooltip=REPORT_TOOLTIP),
            ],
            search_aliases=["use lora", "lora model", "patch model"],
        )

    @classmethod
    def execute(cls, model, lora, strength_model, strength_clip, clip=None, wrong_base="refuse") -> io.NodeOutput:
        done = patches.apply(model, clip, lora, strength_model, strength_clip, allow_misfit=wrong_base == "warn")
        return io.NodeOutput(done.model, done.clip, done.report, ui=ui.PreviewText(done.report))
