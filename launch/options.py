"""What `python -m lcm_kit.distillation` can be told. The defaults are those of the node and of `Settings`."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

_DESCRIPTION = """Make an LCM-LoRA from a checkpoint: latent consistency distillation (arXiv 2311.05556), in your own ComfyUI.

What it learns from is one of
  captions alone          --prompts captions.txt: one on each line; the model makes its own pictures, once
  a folder of pictures    --pictures folder: name.png with its caption in name.txt
  webdataset files        --pictures shard-0.tar shard-1.tar: 0001.jpg with its caption in 0001.txt
Pictures without captions of their own take --prompts: one for all, or one for each in the order of their names.
Captions and latents stay in main memory: about 0.3 MB for each caption of SD1.5 and 0.7 MB for SDXL."""

_EPILOG = """examples:
  python -m lcm_kit.distillation --checkpoint sd15.safetensors --prompts captions.txt -o lcm.safetensors
    alone, without pictures; --checkpoint is a path, or a name in ComfyUI's folder of checkpoints.
  accelerate launch --multi_gpu --num_processes 4 -m lcm_kit.distillation --checkpoint sdxl.safetensors \\
      --pictures photos -o lcm.safetensors --width 1024 --height 1024 --batch 4 --zero-negative
    four GPUs: every step takes 4 * 4 pictures. Data parallel; each GPU needs the memory of one. --multi_gpu says that
    there are several processes, of CPUs too (then with --cpu at the end): without it accelerate may start just one.
  torchrun --nproc_per_node 8 --nnodes 2 --node_rank 0 --rdzv_backend c10d --rdzv_endpoint host:29500 \\
      -m lcm_kit.distillation --checkpoint sd15.safetensors --pictures shards/*.tar -o /shared/lcm.safetensors
    two machines with eight GPUs each; the same command with --node_rank 1 on the other one. The folder of
    the run (--resume) has to be one that both see.
In a clone, `python -m distillation` in its folder does the same. More than one process needs the package accelerate.

A run that was stopped goes on with the same command; with more --steps, so does a finished one.
Exit status: 0 done, 2 bad input, 130 stopped."""


def parsed(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """Options, checked one by one; argparse ends the process for those that make no sense."""
    parser = argparse.ArgumentParser(
        prog="python -m lcm_kit.distillation", description=_DESCRIPTION, epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    _files(parser.add_argument_group("files"))
    _data(parser.add_argument_group("data"))
    _training(parser.add_argument_group("training"))
    _memory(parser.add_argument_group("memory and speed"))
    options = parser.parse_args(arguments)
    if options.prompts is None and not options.pictures:
        parser.error("nothing to learn from: give --prompts FILE, or --pictures FOLDER or SHARD.tar")
    return options


def _files(add: argparse._ArgumentGroup) -> None:
    add.add_argument("--checkpoint", required=True, metavar="FILE", help="the model that is distilled")
    add.add_argument("--lora", action="append", default=[], metavar="FILE[:STRENGTH]", help="a LoRA that is distilled "
                     "along with it, such as a style; may be repeated")  # fmt: skip
    add.add_argument("--vae", metavar="FILE", help="encodes the pictures; default: the checkpoint's own")
    add.add_argument("-o", "--output", required=True, type=Path, metavar="FILE", help="the LCM-LoRA, .safetensors")
    add.add_argument(
        "--overwrite", action="store_true", help="replace an existing output or picture that LCM Kit wrote"
    )
    add.add_argument("--overwrite-any", dest="overwrite", action="store_const", const="any", help="replace any existing "
                     "output or picture")  # fmt: skip
    add.add_argument(
        "--save-dtype", choices=["fp16", "bf16", "fp32"], default="fp16", help="of the output; default: fp16"
    )
    add.add_argument("--picture", type=Path, metavar="FILE.png", help="write the loss and samples in 4 steps there")
    add.add_argument("--resume", type=Path, metavar="FOLDER", help="keeps latents and checkpoints, from which the same "
                     "command goes on; default: OUTPUT without its ending, and .run")  # fmt: skip
    add.add_argument("--save-every", type=_positive, default=100, metavar="STEPS", help="default: 100")
    add.add_argument("--comfyui", type=Path, metavar="FOLDER", help="your ComfyUI; default: COMFYUI_PATH, or the ComfyUI "
                     "in whose custom_nodes this is")  # fmt: skip
    add.add_argument("--custom-nodes", action="append", default=[], type=Path, metavar="FOLDER", help="a node pack to "
                     "load first, if the model needs one; may be repeated")  # fmt: skip


def _data(add: argparse._ArgumentGroup) -> None:
    add.add_argument("--prompts", type=Path, metavar="FILE", help="captions, one on each line")
    add.add_argument("--pictures", type=Path, nargs="+", default=[], metavar="PATH", help="folders and .tar files")
    add.add_argument(
        "--negative", default="", metavar="TEXT", help="what guidance moves away from; default: an empty prompt"
    )
    add.add_argument("--zero-negative", action="store_true", help="zeros in its place, as LCM-LoRA for SDXL was made")
    add.add_argument("--samples", type=_positive, default=64, metavar="N", help="how many pictures the model makes, if none "
                     "are given; default: 64")  # fmt: skip
    add.add_argument("--width", type=_positive, default=512, help="pictures are cropped and scaled to it; default: 512")
    add.add_argument("--height", type=_positive, default=512, help="default: 512")


def _training(add: argparse._ArgumentGroup) -> None:
    add.add_argument("--steps", type=_positive, default=1000, help="default: 1000")
    add.add_argument("--batch", type=_positive, default=4, help="images at once, on each process; default: 4")
    add.add_argument("--accumulate", type=_positive, default=1, help="batches to a step; default: 1")
    add.add_argument("--rank", type=_positive, default=64, help="size of the LoRA; default: 64")
    add.add_argument("--alpha", type=float, default=0.0, help="the scale is alpha / rank; default: the rank")
    add.add_argument("--learning-rate", type=float, default=1e-4, help="of AdamW; default: 1e-4")
    add.add_argument("--warmup", type=int, default=20, metavar="STEPS", help="steps until it is reached; default: 20")
    add.add_argument("--decay", type=float, default=0.0, metavar="SHARE", help="share of all steps, at the end, in which it "
                     "falls to 0; default: 0")  # fmt: skip
    add.add_argument("--weight-decay", type=float, default=0.0, help="of AdamW; default: 0")
    add.add_argument("--betas", type=float, nargs=2, default=(0.9, 0.999), help="of AdamW; default: 0.9 0.999")
    add.add_argument("--clip", type=float, default=1.0, help="largest norm of the gradient; default: 1")
    add.add_argument(
        "--guidance-min", type=float, default=8.5, help="guidance that is built in, on the scale of cfg; default: 8.5"
    )
    add.add_argument(
        "--guidance-max", type=float, default=8.5, help="above it, each image draws one in between; default: 8.5"
    )
    add.add_argument("--skip", type=_positive, default=20, help="timesteps that a solver step skips; default: 20")
    add.add_argument("--original-steps", type=int, default=0, metavar="N", help="timesteps that are trained, evenly spaced, as "
                     "the samplers' input of that name; default: one every --skip")  # fmt: skip
    add.add_argument(
        "--huber-c", type=float, default=0.001, help="c of the pseudo-Huber distance, 0 for L2; default: 0.001"
    )
    add.add_argument("--weighting", choices=["x0", "v"], default="x0", help="what the distance is measured in; v asks for the "
                     "same precision at every noise level; default: x0, as published")  # fmt: skip
    add.add_argument("--average", type=float, default=0.0, metavar="RATE", help="rate of a moving average that is saved in "
                     "place of the last weights, such as 0.95; default: 0, none")  # fmt: skip
    add.add_argument(
        "--average-target", action="store_true", help="the average is what the student is compared with, too"
    )
    add.add_argument("--seed", type=int, default=0, help="default: 0")


def _memory(add: argparse._ArgumentGroup) -> None:
    add.add_argument("--dtype", choices=["auto", "bf16", "fp16", "fp32"], default="auto", help="what the network computes in; "
                     "default: auto, by the device")  # fmt: skip
    add.add_argument("--no-gradient-checkpointing", dest="gradient_checkpointing", action="store_false",
                     help="faster, for much more memory")  # fmt: skip
    add.add_argument("--cpu", action="store_true", help="use no GPU")


def _positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"{value} is below 1")
    return value
