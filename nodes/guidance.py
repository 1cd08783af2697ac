"""Declares the nodes that steer a model: LCM Negative Prompt, LCM Guidance Embedding, Limit Denoised."""

from comfy_api.latest import io

from ..host.door.node import Node
from ..host.sampling import embedding, limits
from ..host.sampling import negative as host_negative

CATEGORY = "LCM Kit/guidance"


class LCMNegativePrompt(Node):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="LCMKitNegativePrompt",
            display_name="LCM Negative Prompt (NAG, cfg 1)",
            category=CATEGORY,
            description="A negative prompt that works at cfg 1: normalised attention guidance leads the picture away from "
            "it inside the model, at a part of what cfg costs. For SD 1.x, SD 2.x, SDXL and, not yet seen on their real "
            "weights, Wan, LTX, Cosmos Predict 2, Anima, Flux, Chroma, Qwen-Image, SD3, HiDream, Z-Image, Lumina 2 and "
            "HunyuanVideo.",
            inputs=[
                io.Model.Input(
                    "model",
                    tooltip="A few-step model, with its LoRAs applied. One of a family that this cannot work on is "
                    "refused by name.",
                ),
                io.Conditioning.Input(
                    "negative",
                    tooltip="What to avoid. One text; join several with ConditioningConcat. Name things, not their "
                    "absence.",
                ),
                io.Float.Input(
                    "scale",
                    default=3.0,
                    min=1.0,
                    max=100.0,
                    step=0.1,
                    round=0.01,
                    tooltip="How hard to lead away from the negative prompt. 1 is off; 3 suits few-step models; change "
                    "this one first.",
                ),
                io.Float.Input(
                    "tau",
                    default=2.5,
                    min=1.0,
                    max=10.0,
                    step=0.1,
                    round=0.01,
                    tooltip="How far guidance may enlarge what the prompt says at any place of the picture: 2.5 times. "
                    "Lower is safer, higher stronger.",
                    advanced=True,
                ),
                io.Float.Input(
                    "alpha",
                    default=0.5,
                    min=0.0,
                    max=1.0,
                    step=0.01,
                    round=0.01,
                    tooltip="Share of the guided attention in the result. 0 is off, 1 keeps none of the plain one.",
                    advanced=True,
                ),
                io.Int.Input(
                    "end_step",
                    default=-1,
                    min=-1,
                    max=1000,
                    tooltip="How many steps to work in, counted from the first. -1 is all, 0 none. Of 4 LCM steps the "
                    "first 2 decide what is in the picture. Z-Image, Lumina 2 and HunyuanVideo take twice the time in "
                    "these steps.",
                    advanced=True,
                ),
            ],
            outputs=[io.Model.Output(display_name="MODEL", tooltip="For the sampler; keep its cfg at 1.")],
            search_aliases=["nag", "normalized attention guidance", "negative", "cfg 1"],
        )

    @classmethod
    def execute(cls, model, negative, scale, tau, alpha, end_step) -> io.NodeOutput:
        return io.NodeOutput(
            host_negative.with_negative_prompt(model, negative, scale=scale, tau=tau, alpha=alpha, end_step=end_step)
        )


class LCMGuidanceEmbedding(Node):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="LCMKitGuidanceEmbedding",
            display_name="LCM Guidance Embedding",
            category=CATEGORY,
            description="Gives a full LCM (LCM_Dreamshaper_v7, lcm-sdxl, lcm-ssd-1b) the guidance it was trained to take "
            "as an input, which ComfyUI leaves out when it loads one. Models with an LCM-LoRA do not need it.",
            inputs=[
                io.Model.Input("model", tooltip="The full LCM, after its LoRAs; it is copied, not altered."),
                io.Combo.Input(
                    "unet_name",
                    options=embedding.unet_names(),
                    tooltip="The file the model was loaded from. One tensor is read from it that loaders drop.",
                ),
                io.Float.Input(
                    "guidance",
                    default=8.0,
                    min=0.0,
                    max=30.0,
                    step=0.1,
                    round=0.01,
                    tooltip="How strongly the prompt is followed, on the scale of cfg; it costs nothing. These models "
                    "were trained for about 3 to 13. Leave the sampler's cfg at 1.",
                ),
            ],
            outputs=[io.Model.Output(display_name="MODEL", tooltip="For the sampler; keep its cfg at 1.")],
            search_aliases=["full lcm", "w embedding", "cond_proj", "lcm dreamshaper"],
        )

    @classmethod
    def validate_inputs(cls, unet_name=None):
        return embedding.known(unet_name)

    @classmethod
    def fingerprint_inputs(cls, unet_name="", **others):
        return embedding.fingerprint(unet_name)

    @classmethod
    def execute(cls, model, unet_name, guidance) -> io.NodeOutput:
        return io.NodeOutput(embedding.with_guidance(model, unet_name, guidance))


class LimitDenoised(Node):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="LCMKitLimitDenoised",
            display_name="Limit Denoised (dynamic thresholding)",
            category=CATEGORY,
            description="Keeps cfg above 1 from pushing the picture beyond the range that it has without guidance, "
            "channel by channel and step by step. Works with every sampler; at cfg 1 it changes nothing.",
            inputs=[
                io.Model.Input("model", tooltip="The model to change; it is copied, not altered."),
                io.Float.Input(
                    "quantile",
                    default=0.95,
                    min=0.55,
                    max=1.0,
                    step=0.01,
                    round=0.001,
                    tooltip="Share of the unguided values that marks the edge of the range. 1 is off; 0.99 stops the "
                    "extremes only; lower is stricter and paler.",
                ),
            ],
            outputs=[io.Model.Output(display_name="MODEL")],
            search_aliases=["dynamic thresholding", "clip x0", "high cfg", "burnt", "saturation"],
        )

    @classmethod
    def execute(cls, model, quantile) -> io.NodeOutput:
        return io.NodeOutput(limits.with_limit(model, quantile))
