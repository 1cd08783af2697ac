"""Declares the node that makes LoRAs from models: Distill LCM-LoRA."""

from comfy_api.latest import io, ui

from ..distillation.recipes import NONE, RECIPES
from ..distillation.settings import Settings, Setup
from ..host.door.node import Node
from ..host.training import distilling
from . import inputs

CATEGORY = "LCM Kit/training"


class Distill(Node):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="LCMKitDistill",
            display_name="Distill LCM-LoRA",
            category=CATEGORY,
            description="Makes an LCM-LoRA from the connected model, so that it, its fine-tunes and style LoRAs need 1 to "
            "8 steps. It learns from your pictures, or from pictures that the model makes itself. A long "
            "training: minutes to hours.",
            is_input_list=True,
            is_experimental=True,
            inputs=[
                io.Model.Input(
                    "model",
                    tooltip="What is distilled, with all LoRAs that are on it. It is not changed. Leave out "
                    "ModelSamplingDiscrete 'lcm'.",
                ),
                io.Conditioning.Input(
                    "positive",
                    tooltip="Prompts: one for all pictures, or one for each, as a list or combined. More and more "
                    "varied prompts make a LoRA that works for more.",
                ),
                io.Conditioning.Input(
                    "negative",
                    tooltip="What guidance moves away from, usually an empty prompt; for SDXL the positive through "
                    "ConditioningZeroOut, as LCM-LoRA was made.",
                ),
                io.Latent.Input(
                    "latent",
                    optional=True,
                    tooltip="Pictures to learn from, through VAE Encode. Nothing connected: the model makes its own. An "
                    "empty latent does too, in its size.",
                ),
                io.Vae.Input(
                    "vae",
                    optional=True,
                    tooltip="Shows the samples in the final picture well; without it they are rough.",
                ),
                io.Int.Input(
                    "steps",
                    default=Settings.steps,
                    min=1,
                    max=1_000_000,
                    tooltip="Training steps. The published ones had about 1000.",
                ),
                io.Int.Input(
                    "batch", default=Settings.batch, min=1, max=4096, tooltip="Images at once: more need more memory."
                ),
                io.Int.Input(
                    "accumulate",
                    default=Settings.accumulate,
                    min=1,
                    max=4096,
                    tooltip="Batches to a training step: 4 with batch 4 trains as batch 16 does, in the memory of 4.",
                ),
                io.Int.Input(
                    "rank", default=Setup.rank, min=1, max=4096, tooltip="Size of the LoRA. The published ones have 64."
                ),
                io.Float.Input(
                    "alpha",
                    default=Setup.alpha,
                    min=0.0,
                    max=4096.0,
                    step=0.5,
                    tooltip="Scale of the LoRA is alpha / rank. 0 takes the rank, so scale 1.",
                    advanced=True,
                ),
                io.Float.Input(
                    "learning_rate",
                    default=Settings.learning_rate,
                    min=1e-7,
                    max=1.0,
                    step=1e-7,
                    tooltip="Higher learns faster and less steadily.",
                ),
                io.Float.Input(
                    "guidance_min",
                    default=Settings.guidance_min,
                    min=1.0,
                    max=100.0,
                    step=0.1,
                    tooltip="Guidance that is built into the LoRA, on the scale of cfg in a KSampler (the paper's omega "
                    "+ 1; it took 8.5). Lower is softer and easier to learn.",
                ),
                io.Float.Input(
                    "guidance_max",
                    default=Settings.guidance_max,
                    min=1.0,
                    max=100.0,
                    step=0.1,
                    tooltip="The same as guidance_min for one guidance; above it each image draws one in between.",
                ),
                io.Int.Input(
                    "skip",
                    default=Settings.skip,
                    min=1,
                    max=1000,
                    tooltip="Timesteps that a solver step skips: 20 as published. More learns faster, with a coarser "
                    "solver; original_steps of the samplers is then 1000 / skip.",
                ),
                inputs.seed(
                    "Same seed and inputs, same LoRA (exactly so on a CPU).",
                ),
                io.Int.Input(
                    "samples",
                    default=Setup.samples,
                    min=1,
                    max=100_000,
                    tooltip="How many pictures the model makes to learn from, if none are connected; the prompts take "
                    "turns.",
                ),
                io.Int.Input(
                    "width", default=Setup.width, min=16, max=16384, step=8, tooltip="Of the model's own pictures."
                ),
                io.Int.Input(
                    "height", default=Setup.height, min=16, max=16384, step=8, tooltip="Of the model's own pictures."
                ),
                io.Combo.Input(
                    "dtype",
                    options=list(distilling.DTYPES),
                    default=Setup.dtype,
                    tooltip="What the network computes in; the LoRA itself is always trained in fp32. auto: bf16 where "
                    "the device is fast in it, else fp16; fp32 on a CPU.",
                    advanced=True,
                ),
                io.Boolean.Input(
                    "gradient_checkpointing",
                    default=Setup.gradient_checkpointing,
                    tooltip="On needs much less memory, off is faster. The LoRA is the same.",
                    advanced=True,
                ),
                io.String.Input(
                    "resume",
                    default="auto",
                    tooltip="Name under which the training is kept: checkpoint and losses in the output folder, "
                    "LCMKit/distilling, the LoRA so far in LCMKit of the loras folder. After a stop the same name and inputs "
                    "go on where it was, with more steps a finished training too. auto: a name of its own for each model and "
                    "settings. Empty keeps nothing.",
                ),
                io.Int.Input(
                    "original_steps",
                    default=Settings.original_steps,
                    min=0,
                    max=1000,
                    optional=True,
                    tooltip="How many timesteps are trained, evenly spaced: the samplers' original_steps. 0 trains those that "
                    "the solver visits, 1000 / skip. With a large skip, 50 trains those between them as well.",
                    advanced=True,
                ),
                io.Combo.Input(
                    "weighting",
                    options=list(distilling.WEIGHTINGS),
                    default=Settings.weighting,
                    optional=True,
                    tooltip="What the distance is measured in. x0 as published; v asks for the same precision at every noise "
                    "level, which gave our own model clearly better pictures.",
                    advanced=True,
                ),
                io.Float.Input(
                    "average",
                    default=Settings.average,
                    min=0.0,
                    max=0.9999,
                    step=0.0001,
                    optional=True,
                    tooltip="Rate of a moving average of the LoRA, which is then the target and the result: 0.95 in the first "
                    "paper. 0: none, as the published LCM-LoRAs.",
                    advanced=True,
                ),
                io.Int.Input(
                    "save_every",
                    default=Setup.save_every,
                    min=1,
                    max=1_000_000,
                    optional=True,
                    tooltip="Steps from one checkpoint, LoRA file, row of samples and validation loss to the next.",
                    advanced=True,
                ),
                io.Conditioning.Input(
                    "validation",
                    optional=True,
                    tooltip="Prompts of the samples that are shown on the way, up to 4; not connected: those of the first "
                    "pictures.",
                ),
                io.Float.Input(
                    "caption_dropout",
                    default=Settings.caption_dropout,
                    min=0.0,
                    max=1.0,
                    step=0.01,
                    optional=True,
                    tooltip="Share of the pictures that are learnt with the negative prompt in place of their own, so that "
                    "the LoRA works without a prompt, too.",
                    advanced=True,
                ),
                io.Combo.Input(
                    "optimizer",
                    options=list(distilling.OPTIMIZERS),
                    default=Settings.optimizer,
                    optional=True,
                    tooltip="adamw as published. adafactor needs the least memory, adamw8bit a quarter of adamw's and the "
                    "package bitsandbytes; sgd wants a far higher learning_rate.",
                    advanced=True,
                ),
                io.Boolean.Input(
                    "tf32",
                    default=Setup.tf32,
                    optional=True,
                    tooltip="On a GPU of 2020 or later: float32 products with fewer digits, and much faster. Of use where dtype "
                    "is fp32.",
                    advanced=True,
                ),
                io.LoraModel.Input(
                    "start_from",
                    optional=True,
                    tooltip="An LCM-LoRA to begin with, through Load LoRA, of this rank or less: refined for a style, it still "
                    "works without. Not connected: a new one.",
                ),
                io.Int.Input(
                    "phases",
                    default=Settings.phases,
                    min=1,
                    max=100,
                    optional=True,
                    tooltip="Parts of the way from noise to picture, each with an end of its own. A LoRA of 4 phases is for 4 "
                    "steps, at timesteps that its file tells the loaders. 1000 / phases has to be a multiple of skip: 125 for 4. "
                    "1: LCM, for 1 to 8 steps.",
                    advanced=True,
                ),
                io.Combo.Input(
                    "recipe",
                    options=list(RECIPES),
                    default=NONE,
                    optional=True,
                    tooltip="Sets what is left as it comes; what you set yourself stays, and the report lists both. accelerate "
                    "this style: with the style's LoRA on the model and an LCM-LoRA as start_from.",
                ),
                io.Boolean.Input(
                    "compile",
                    default=Setup.compile,
                    optional=True,
                    tooltip="torch.compile for teacher and target, half of a step's work: compiling takes minutes at first. "
                    "The LoRA is the same, to rounding.",
                    advanced=True,
                ),
            ],
            outputs=[
                io.LoraModel.Output(display_name="LORA_MODEL", tooltip="The LoRA, for Save LoRA and Apply LoRA."),
                io.Image.Output(display_name="IMAGE", tooltip="The losses, and samples in 4 steps on the way."),
                io.String.Output(display_name="report", tooltip="What was trained and how the loss fell."),
            ],
            search_aliases=[
                *("train lcm lora", "consistency distillation", "lcm lora training", "phased consistency", "pcm"),
                *("accelerate style", "speed up style lora"),
            ],
        )

    @classmethod
    def execute(cls, model, positive, negative, latent=(), vae=(None,), validation=(), start_from=(None,), **widgets):
        lora, picture, text = distilling.distil_lists(
            positive, negative, latent, vae, validation, model=model, start_from=start_from or (None,), **widgets
        )
        return io.NodeOutput(lora, picture, text, ui=ui.PreviewText(text))
