"""Declares LCM Grid, which shows what settings do: many pictures of one noise on one sheet."""

from comfy_api.latest import io, ui

from ..host.door.node import Node
from ..host.grid import grid
from ..host.grid.axes import SETTINGS
from . import inputs
from .sampling import CATEGORY, preset_input

AXIS_TOOLTIP = (
    "What changes from one {one} to the next; nothing makes a single one. Strength of lora needs lora, prompt words need "
    "clip and prompt."
)
VALUES_TOOLTIP = (
    "Its values, between commas: 0, 0.4, 0.8. A range is first:last:step, 0:1.2:0.4. For presets their names; for prompt "
    "words the first is what the others replace in prompt."
)


class LCMGrid(Node):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="LCMKitGrid",
            display_name="LCM Grid (XY plot)",
            category=CATEGORY,
            description="One sheet of many pictures from the same noise: how strong the LoRA, how many steps, which preset, "
            "cfg, gamma, denoise, seed or words. Fills up while it runs, and makes only what is new.",
            inputs=[
                io.Model.Input("model", tooltip="The model with its LCM-LoRA applied."),
                io.Latent.Input("latent_image", tooltip="An empty latent, or a picture to change with denoise below 1."),
                io.Vae.Input("vae", tooltip="Makes pictures of the latents."),
                io.Combo.Input(
                    "row_axis", options=list(SETTINGS), default=SETTINGS[0], tooltip=AXIS_TOOLTIP.format(one="row")
                ),
                io.String.Input("rows", default="0, 0.4, 0.8, 1.2", tooltip=VALUES_TOOLTIP),
                io.Combo.Input(
                    "column_axis", options=list(SETTINGS), default="steps", tooltip=AXIS_TOOLTIP.format(one="column")
                ),
                io.String.Input("columns", default="1, 2, 4, 8", tooltip=VALUES_TOOLTIP),
                inputs.seed("Fixes all noise: every cell starts from the same.", after_generate=True),
                inputs.steps(),
                inputs.cfg("Guidance; above 1 it needs negative, or clip for the empty prompt."),
                io.Conditioning.Input(
                    "positive", optional=True, tooltip="What the pictures should show; or connect clip and write a prompt."
                ),
                io.Conditioning.Input("negative", optional=True, tooltip="What to avoid. Not needed while cfg is 1."),
                io.LoraModel.Input(
                    "lora", optional=True, tooltip="The LoRA whose strength is varied; at strength 1 where it is not."
                ),
                io.Clip.Input(
                    "clip", optional=True, tooltip="Encodes prompt, with the LoRA on it; in place of positive."
                ),
                preset_input("steps", "cfg", "gamma", more="; an axis replaces its numbers"),
                io.String.Input(
                    "prompt", default="", multiline=True, optional=True, tooltip="Used where clip is connected.", advanced=True
                ),
                io.Float.Input(
                    "denoise", default=1.0, min=0.0, max=1.0, step=0.01, optional=True, tooltip=inputs.DENOISE_TOOLTIP,
                    advanced=True,
                ),
                io.Float.Input(
                    "gamma", default=1.0, min=0.0, max=1.0, step=0.01, optional=True, advanced=True,
                    tooltip="How much of the noise is drawn fresh at every step.",
                ),
                io.Int.Input(
                    "cell", default=512, min=64, max=2048, optional=True, advanced=True,
                    tooltip="Longest side of a picture on the sheet, in pixels; the pictures of the second output keep their size.",
                ),
            ],
            outputs=[
                io.Image.Output(display_name="grid", tooltip="The sheet with its labels."),
                io.Image.Output(display_name="pictures", is_output_list=True, tooltip="Each picture on its own, row by row."),
                io.String.Output(
                    display_name="settings", is_output_list=True, tooltip="Of each picture, in words, for file names."
                ),
                io.String.Output(display_name="report", tooltip="What was made, in words; also shown on the node."),
            ],
            hidden=[io.Hidden.prompt, io.Hidden.extra_pnginfo],
            is_output_node=True,
            search_aliases=["xy plot", "x/y plot", "grid", "compare settings", "strength steps", "lora strength", "contact sheet"],
        )  # fmt: skip

    @classmethod
    def execute(
        cls, model, latent_image, vae, row_axis, rows, column_axis, columns, seed, steps, cfg, positive=None, negative=None,
        lora=None, clip=None, preset=None, prompt="", denoise=1.0, gamma=1.0, cell=512,
    ) -> io.NodeOutput:  # fmt: skip
        made = grid.grid(
            grid.Parts(
                model=model, positive=positive, negative=negative, latent=latent_image, vae=vae, lora=lora, clip=clip,
                preset=preset,
            ),
            row_axis=row_axis, rows=rows, column_axis=column_axis, columns=columns, prompt=prompt, cell=cell,
            base={"seed": seed, "steps": steps, "cfg": cfg, "denoise": denoise, "gamma": gamma},
        )  # fmt: skip
        shown = ui.PreviewImage(made.grid, cls=grid.with_metadata(cls.hidden, made.about)).as_dict()
        shown |= ui.PreviewText(made.report).as_dict()
        return io.NodeOutput(made.grid, made.pictures, made.settings, made.report, ui=shown)
