"""Declares the nodes that make LoRAs out of LoRAs: Merge LoRAs, Save LoRA."""

from comfy_api.latest import io, ui

from .host import files, merging
from .host.compat import if_known
from .host.show import show

CATEGORY = "LCM Kit/LoRA"
STRENGTH = {"default": 1.0, "min": -100.0, "max": 100.0, "step": 0.01}
STRENGTH_TOOLTIP = "Factor on this LoRA: 1 as trained, 0 leaves it out, below 0 subtracts it."


class MergeLoRA(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="LCMKitMergeLoRA",
            display_name="Merge LoRAs",
            category=CATEGORY,
            description="One LoRA that does what two to six do together: the sum of strength times LoRA. Ranks, alphas "
            "and key spellings may differ. Style 0.8 and LCM-LoRA 1.0 give that style in 4 steps.",
            inputs=[
                io.LoraModel.Input("lora_1", tooltip="The first LoRA, for example a style."),
                io.Float.Input("strength_1", **STRENGTH, tooltip=STRENGTH_TOOLTIP),
                io.LoraModel.Input("lora_2", tooltip="The second LoRA, for example an LCM-LoRA."),
                io.Float.Input("strength_2", **STRENGTH, tooltip=STRENGTH_TOOLTIP),
                io.LoraModel.Input("lora_3", optional=True, tooltip="Another LoRA, if there is one."),
                io.Float.Input("strength_3", **STRENGTH, tooltip=STRENGTH_TOOLTIP),
                io.LoraModel.Input("lora_4", optional=True, tooltip="Another LoRA, if there is one."),
                io.Float.Input("strength_4", **STRENGTH, tooltip=STRENGTH_TOOLTIP),
                io.LoraModel.Input("lora_5", optional=True, tooltip="Another LoRA, if there is one."),
                io.Float.Input("strength_5", **STRENGTH, tooltip=STRENGTH_TOOLTIP),
                io.LoraModel.Input("lora_6", optional=True, tooltip="Another LoRA, if there is one."),
                io.Float.Input("strength_6", **STRENGTH, tooltip=STRENGTH_TOOLTIP),
                io.Combo.Input(
                    "method", options=["linear"], default="linear", tooltip="linear adds the LoRAs up, weighted."
                ),
                io.Int.Input(
                    "rank",
                    default=0,
                    min=0,
                    max=4096,
                    tooltip="0 is exact: the ranks add up. Above 0 the sum is compressed to at most this rank, which "
                    "makes a smaller file and a small error; the report says how large.",
                ),
                io.Float.Input(
                    "density",
                    default=1.0,
                    min=0.0,
                    max=1.0,
                    step=0.01,
                    tooltip="Share of each LoRA that a pruning method keeps. linear keeps all of it: 1.",
                    **if_known(io.Float.Input, advanced=True),
                ),
                io.Int.Input(
                    "seed",
                    default=0,
                    min=0,
                    max=0xFFFFFFFFFFFFFFFF,
                    control_after_generate=False,
                    tooltip="Seed of methods that draw at random. linear draws nothing.",
                    **if_known(io.Int.Input, advanced=True),
                ),
            ],
            outputs=[
                io.LoraModel.Output(display_name="LORA_MODEL", tooltip="The merged LoRA. Apply it at strength 1."),
                io.String.Output(display_name="report", tooltip="What went in, what came out, and any error made."),
            ],
            **if_known(io.Schema, search_aliases=["lora arithmetic", "combine loras", "add loras", "lora sum"]),
        )

    @classmethod
    def execute(cls, method, rank, density, seed, **slots) -> io.NodeOutput:
        merged, text = merging.merge(slots, method=method, rank=rank, density=density)
        show(text)
        return io.NodeOutput(merged, text, ui=ui.PreviewText(text))


class SaveLoRA(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="LCMKitSaveLoRA",
            display_name="Save LoRA",
            category=CATEGORY,
            description="Writes a LoRA into ComfyUI's loras folder, where every LoRA loader finds it (press R to refresh "
            "the lists).",
            is_output_node=True,
            inputs=[
                io.LoraModel.Input("lora", tooltip="The LoRA to save."),
                io.String.Input(
                    "filename_prefix",
                    default="LCMKit/merged",
                    tooltip="Name of the file, without .safetensors; a folder may stand before it. %year%, %month%, "
                    "%day%, %hour%, %minute% and %second% are filled in.",
                ),
                io.Combo.Input(
                    "dtype",
                    options=list(files.DTYPES),
                    default="fp16",
                    tooltip="fp16 is what most LoRAs use; fp32 is exact and twice as large; bf16 is coarser, with room "
                    "for very large values.",
                ),
                io.Combo.Input(
                    "format",
                    options=list(files.FORMATS),
                    default="kohya",
                    tooltip="kohya is read by ComfyUI, A1111 and most others. diffusers is for Python scripts: ComfyUI's "
                    "own loaders miss its attention layers (Load LoRA reads it whole).",
                ),
                io.Combo.Input(
                    "output_name_mode",
                    options=list(files.NAME_MODES),
                    default="increment",
                    tooltip="increment adds a number, so nothing is overwritten; exact name stops if the file exists; "
                    "overwrite replaces it.",
                ),
            ],
            outputs=[io.String.Output(display_name="path", tooltip="Where the file is.")],
            **if_known(io.Schema, search_aliases=["export lora", "write lora"]),
        )

    @classmethod
    def execute(cls, lora, filename_prefix, dtype, format, output_name_mode) -> io.NodeOutput:
        path = files.save_lora(lora, filename_prefix, dtype=dtype, format=format, name_mode=output_name_mode)
        show(path)
        return io.NodeOutput(path, ui=ui.PreviewText(path))
