"""Declares the nodes that make LoRAs out of LoRAs: Merge LoRAs, Resize LoRA, Save LoRA."""

from comfy_api.latest import io, ui

from ..host.door.node import Node
from ..host.lora import files, merging
from ..lora_merge import METHODS
from . import inputs

CATEGORY = "LCM Kit/LoRA"
SLOT_TOOLTIPS = {1: "The first LoRA, for example a style.", 2: "The second LoRA, for example an LCM-LoRA."}
STRENGTH_TOOLTIP = (
    "Factor on {0}: 1 as trained, 0 leaves it out, below 0 subtracts it. Never normalised. No effect without {0}; the "
    "report names each strength with its file."
)


def about(name, tooltip):
    return io.String.Input(name, default="", optional=True, tooltip=tooltip, advanced=True)


def method_choice():
    """Each row of the table of methods, with its own parameters and no others."""
    return io.DynamicCombo.Input(
        "method",
        options=[io.DynamicCombo.Option(name, list(_of(method))) for name, method in METHODS.items()],
        tooltip="linear adds the LoRAs up, weighted and exact: what the LCM-LoRA paper does. The others prune, vote on signs "
        "or turn directions before they add, for LoRAs that disturb one another. See the help.",
    )


def _of(method):
    for name, parameter in method.parameters.items():
        meaning = parameter.meaning
        yield io.Float.Input(
            name,
            default=parameter.default,
            min=parameter.low,
            max=parameter.high,
            step=parameter.step,
            tooltip=f"{meaning[0].upper()}{meaning[1:]}.",
        )
    if method.draws:
        yield inputs.seed("Of what is dropped at random.")
    if method.entrywise:
        yield io.Boolean.Input(
            "dense",
            default=False,
            tooltip="Prune the whole weights as in the paper, which is gentler where it draws at random. Minutes instead of "
            "seconds, and without a rank the file is as large as the model's weights.",
            advanced=True,
        )


def _by_rank(default: int):
    rank = io.Int.Input(
        "rank",
        default=default,
        min=1,
        max=4096,
        tooltip="Largest rank of any module. The report says how large the error is.",
    )
    return io.DynamicCombo.Option("rank", [rank])


def _by_share(name: str, default: float, tooltip: str):
    share = io.Float.Input(name, default=default, min=0.005, max=1.0, step=0.005, tooltip=tooltip)
    return io.DynamicCombo.Option(name, [share])


def _by_keep():
    return _by_share(
        "keep",
        0.98,
        "Share of the energy to keep, with as few numbers as possible: ranks differ from module to module.",
    )


def _by_file_size(stored: str):
    tooltip = f"Largest size of the file in MB, {stored}. Ranks go where they are worth most."
    size = io.Float.Input("max_mb", default=100.0, min=0.001, max=1_000_000.0, step=1.0, tooltip=tooltip)
    return io.DynamicCombo.Option("file size", [size])


def size_choice():
    return io.DynamicCombo.Input(
        "size",
        options=[
            io.DynamicCombo.Option("exact", []),
            _by_rank(64),
            _by_keep(),
            _by_share("retain", 0.9, "Share of its own energy that every LoRA keeps, also the weakest."),
            _by_file_size("as fp16"),
        ],
        tooltip="exact: ranks add up, nothing is lost. The others make a smaller LoRA: by its largest rank, by the share kept of "
        "the sum, by the share kept of every LoRA, or by the size of the file.",
    )


class MergeLoRA(Node):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="LCMKitMergeLoRA",
            display_name="Merge LoRAs (add, TIES, DARE)",
            category=CATEGORY,
            description="One LoRA that does what two to four do together: the sum of strength times LoRA. Ranks, alphas "
            "and key spellings may differ, and one that is switched off is left out. Style 0.8 and LCM-LoRA 1.0 give that style in 4 steps.",
            inputs=[
                *inputs.lora_slots(SLOT_TOOLTIPS, STRENGTH_TOOLTIP),
                method_choice(),
                size_choice(),
                io.Boolean.Input(
                    "balanced",
                    default=False,
                    optional=True,
                    tooltip="When the result is cut: let every LoRA count alike, so that a weak style is not what gets lost. "
                    "Off is the smallest error of the sum.",
                    advanced=True,
                ),
                io.Combo.Input(
                    "protect",
                    options=list(merging.PROTECT),
                    default="auto",
                    optional=True,
                    tooltip="The LoRA that the others make room for when mu is above 0. auto is the one recognised as an "
                    "LCM-LoRA or another acceleration LoRA.",
                    advanced=True,
                ),
                io.Float.Input(
                    "mu",
                    default=0.0,
                    min=0.0,
                    max=1000.0,
                    step=0.05,
                    optional=True,
                    tooltip="How far the others step aside where the protected LoRA is strong. 0 is the plain sum, 1 halves "
                    "them there, large values clear them there.",
                    advanced=True,
                ),
                io.String.Input(
                    "block_strengths",
                    default="",
                    multiline=True,
                    optional=True,
                    tooltip="Factors on the strengths by part of the model, such as down=0.5, mid=1, up=1, attention=0.8, "
                    "conv=1, te=0, *attn2*=0.3. For all LoRAs, or on a line of its own for one: lora_2: down=0",
                    advanced=True,
                ),
                inputs.model_of_loras(),
            ],
            outputs=[
                io.LoraModel.Output(
                    display_name="LORA_MODEL",
                    tooltip="The merged LoRA. Apply it at strength 1. With this node bypassed, lora_1 as it came.",
                ),
                io.String.Output(display_name="report", tooltip="What went in, what came out, and any error made."),
            ],
            search_aliases=[
                "lora arithmetic",
                "combine loras",
                "add loras",
                "lora sum",
                "average loras",
                "lora block weight",
            ],
        )

    @classmethod
    def execute(
        cls, method, size, balanced=False, protect="auto", mu=0.0, block_strengths="", model=None, **slots
    ) -> io.NodeOutput:
        merged, text = merging.merge(
            slots,
            method=method,
            size=size,
            balanced=balanced,
            protect=protect,
            mu=mu,
            block_strengths=block_strengths,
            model=model,
        )
        return io.NodeOutput(merged, text, ui=ui.PreviewText(text))


class ResizeLoRA(Node):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="LCMKitResizeLoRA",
            display_name="Resize LoRA",
            category=CATEGORY,
            description="A smaller LoRA that does nearly the same, by rank, by share of its energy or by size of the file. "
            "What is cut is what matters least, and the report says how much that is.",
            inputs=[
                io.LoraModel.Input("lora", tooltip="The LoRA to make smaller."),
                io.DynamicCombo.Input(
                    "size",
                    options=[_by_rank(32), _by_keep(), _by_file_size("in this dtype")],
                    tooltip="What makes it smaller: a largest rank, a share of its energy to keep, or the size of the file.",
                ),
                inputs.dtype("fp16 is what most LoRAs use; fp32 is twice as large; bf16 is coarser."),
            ],
            outputs=[
                io.LoraModel.Output(display_name="LORA_MODEL", tooltip="The smaller LoRA, for the same strengths."),
                io.String.Output(display_name="report", tooltip="Ranks, size and what was lost."),
            ],
            search_aliases=["lora rank", "shrink lora", "compress lora", "svd resize"],
        )

    @classmethod
    def execute(cls, lora, size, dtype) -> io.NodeOutput:
        small, text = merging.resize(lora, size=size, dtype=dtype)
        return io.NodeOutput(small, text, ui=ui.PreviewText(text))


class SaveLoRA(Node):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="LCMKitSaveLoRA",
            display_name="Save LoRA",
            category=CATEGORY,
            description="Writes a LoRA into ComfyUI's loras folder, where every LoRA loader finds it (press R to refresh "
            "the lists). After Load LoRA it converts: format says whose names the file gets.",
            is_output_node=True,
            inputs=[
                io.LoraModel.Input("lora", tooltip="The LoRA to save."),
                io.String.Input(
                    "filename_prefix",
                    default="LCMKit/merged",
                    tooltip="Name of the file, without .safetensors; a folder may stand before it. %year%, %month%, "
                    "%day%, %hour%, %minute% and %second% are filled in.",
                ),
                inputs.dtype(
                    "fp16 is what most LoRAs use; fp32 is exact and twice as large; bf16 is coarser, with room "
                    "for very large values."
                ),
                io.Combo.Input(
                    "format",
                    options=list(files.FORMATS),
                    default="auto",
                    tooltip="auto is read by ComfyUI and most others: kohya's names for Stable Diffusion, for Flux, Qwen, Wan "
                    "and the like those that diffusers reads too. diffusers is for Python scripts; what ComfyUI's own loaders "
                    "miss of it, Load LoRA reads.",
                ),
                io.Combo.Input(
                    "output_name_mode",
                    options=list(files.NAME_MODES),
                    default="increment",
                    tooltip="increment adds a number, so nothing is overwritten; exact name stops if the file exists; "
                    "overwrite replaces a file that LCM Kit wrote, overwrite_any whatever is there.",
                ),
                about("title", "Title that programs and sites show. Empty keeps that of the LoRA, or the file's name."),
                about("author", "Who made it. Empty keeps the authors that the LoRA names."),
                about("trigger_words", "Words that the LoRA answers to, with commas. Empty keeps those that it names."),
            ],
            outputs=[io.String.Output(display_name="path", tooltip="The file's name in the loras folder.")],
            search_aliases=[
                "export lora",
                "write lora",
                "convert lora",
                "lora format",
                "kohya",
                "diffusers",
                "musubi",
                "peft",
            ],
        )

    @classmethod
    def execute(
        cls, lora, filename_prefix, dtype, format, output_name_mode, title="", author="", trigger_words=""
    ) -> io.NodeOutput:
        path = files.save_lora(
            lora,
            filename_prefix,
            dtype=dtype,
            format=format,
            name_mode=output_name_mode,
            about={"title": title, "author": author, "trigger_words": trigger_words},
        )
        return io.NodeOutput(path, ui=ui.PreviewText(path))
