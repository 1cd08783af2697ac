"""What `python -m lcm_kit.distillation` can be told.

Names, defaults and explanations of what is trained and how are those of `Settings` and `Setup`, the node's too.
"""

from __future__ import annotations

import argparse
import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal, get_args, get_origin

from ..distillation.recipes import NONE, RECIPES
from ..distillation.settings import Settings, Setup
from .loggers import LOGGERS

# argparse presets none of these: their texts say what holds.
SWITCHES = [one.name for one in dataclasses.fields(Setup) if isinstance(one.default, bool)]

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
  python -m lcm_kit.distillation --checkpoint sd15.safetensors --lora style.safetensors --prompts captions.txt \\
      --recipe "accelerate this style" --start-from lcm-lora.safetensors -o fast-style.safetensors
    a style's own acceleration: the model with the style on it is the teacher, an LCM-LoRA the beginning.
  accelerate launch --multi_gpu --num_processes 4 -m lcm_kit.distillation --checkpoint sdxl.safetensors \\
      --pictures photos -o lcm.safetensors --width 1024 --height 1024 --batch 4 --zero-negative
    four GPUs: every step takes 4 * 4 pictures. Data parallel; each GPU needs the memory of one. --multi_gpu says that
    there are several processes, of CPUs too (then with --cpu at the end): without it accelerate may start just one.
  torchrun --nproc_per_node 8 --nnodes 2 --node_rank 0 --rdzv_backend c10d --rdzv_endpoint host:29500 \\
      -m lcm_kit.distillation --checkpoint sd15.safetensors --pictures shards/*.tar -o /shared/lcm.safetensors
    two machines with eight GPUs each; the same command with --node_rank 1 on the other one. The folder of
    the run (--resume) has to be one that both see.
In a clone, `python -m distillation` in its folder does the same. More than one process needs the package accelerate.

A run that was stopped goes on with the same command; with more --steps, so does a finished one. In the folder of the run are
  lora.safetensors   the LoRA so far, for use at any time
  losses.csv         loss, learning rate and seconds of each step, and a validation loss every --save-every steps
  samples            what the LoRA makes, as often
  kept               captions, latents and the model's own pictures, none of which is made twice
Exit status: 0 done, 2 bad input, 130 stopped."""


def parsed(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """Options, checked one by one; argparse ends the process for those that make no sense."""
    parser = argparse.ArgumentParser(
        prog="python -m lcm_kit.distillation", description=_DESCRIPTION, epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    _files(parser.add_argument_group("files"))
    _data(parser.add_argument_group("data"))
    training = parser.add_argument_group("training")
    training.add_argument("--recipe", choices=list(RECIPES), default=NONE, help="settings to begin with; those given beside it "
                          f"hold: {'; '.join(f'{name}, {one.about}' for name, one in RECIPES.items() if one.settings)}")  # fmt: skip
    _settings(training, Settings)
    _settings(training, Setup, "rank", "alpha")
    _course(parser.add_argument_group("watching it"))
    memory = parser.add_argument_group("memory and speed")
    _settings(memory, Setup, "dtype", "gradient_checkpointing", "tf32", "compile")
    memory.add_argument("--cpu", action="store_true", help="use no GPU")
    parser.set_defaults(**{name: getattr(Setup, name) for name in SWITCHES})
    options = parser.parse_args(arguments)
    # Read again: what is on the command line holds, and the recipe where it says nothing.
    parser.set_defaults(**RECIPES[options.recipe].settings)
    options = parser.parse_args(arguments)
    if options.prompts is None and not options.pictures:
        parser.error("nothing to learn from: give --prompts FILE, or --pictures FOLDER or SHARD.tar")
    return options


def _files(add: argparse._ArgumentGroup) -> None:
    add.add_argument("--checkpoint", required=True, metavar="FILE", help="the model that is distilled")
    add.add_argument("--lora", action="append", default=[], metavar="FILE[:STRENGTH]", help="a LoRA that is distilled "
                     "along with it, such as a style; may be repeated")  # fmt: skip
    add.add_argument(
        "--start-from", metavar="FILE", help="an LCM-LoRA to begin with, of --rank or less; default: a new one"
    )
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
    add.add_argument("--resume", type=Path, metavar="FOLDER", help="keeps latents, captions and checkpoints, from which "
                     "the same command goes on; default: OUTPUT without its ending, and .run")  # fmt: skip
    add.add_argument("--comfyui", type=Path, metavar="FOLDER", help="your ComfyUI; default: COMFYUI_PATH, or the ComfyUI "
                     "in whose custom_nodes this is")  # fmt: skip
    add.add_argument("--custom-nodes", action="append", default=[], type=Path, metavar="FOLDER", help="a node pack to "
                     "load first, if the model needs one; may be repeated")  # fmt: skip


def _course(add: argparse._ArgumentGroup) -> None:
    _settings(add, Setup, "save_every")
    add.add_argument("--validation", type=Path, metavar="FILE", help="prompts of the samples, one on each line; default: those "
                     "of the first pictures")  # fmt: skip
    add.add_argument("--keep-loras", action="store_true", help="keep the LoRA file of every --save-every steps, not the "
                     "latest only")  # fmt: skip
    add.add_argument("--log-with", nargs="+", default=[], choices=LOGGERS, metavar="NAME", help=f"{' and '.join(LOGGERS)}, if "
                     "installed, beside losses.csv")  # fmt: skip


def _data(add: argparse._ArgumentGroup) -> None:
    add.add_argument("--prompts", type=Path, metavar="FILE", help="captions, one on each line")
    add.add_argument("--pictures", type=Path, nargs="+", default=[], metavar="PATH", help="folders and .tar files")
    add.add_argument("--leave-out-broken", action="store_true", help="go on without pictures that cannot be read, after "
                     "naming them")  # fmt: skip
    add.add_argument(
        "--negative", default="", metavar="TEXT", help="what guidance moves away from; default: an empty prompt"
    )
    add.add_argument("--zero-negative", action="store_true", help="zeros in its place, as LCM-LoRA for SDXL was made")
    _settings(add, Setup, "samples", "width", "height", "buckets", "random_crop", "flip", "repeats", "size_labels")


def _settings(add: argparse._ArgumentGroup, owner: type, *names: str) -> None:
    """Flags for fields of Settings or Setup, all of them without names: called, explained and preset as they are there."""
    for one in dataclasses.fields(owner):
        if one.metadata and (not names or one.name in names):
            said = f"{one.metadata['help']}; default: {_words(one.default)}"
            add.add_argument(f"--{one.name.replace('_', '-')}", help=said, **_kind(one))


def _kind(one: dataclasses.Field[Any]) -> dict[str, Any]:
    """What argparse has to know to read the text for a field."""
    if isinstance(one.default, bool):
        return {"action": argparse.BooleanOptionalAction}
    known: dict[str, Any] = {"default": one.default, "metavar": one.metadata["metavar"]}
    if get_origin(one.type) is Literal:
        return known | {"choices": get_args(one.type)}
    if isinstance(one.default, tuple):
        return known | {"type": float, "nargs": len(one.default)}
    is_count = isinstance(one.default, int) and one.metadata["low"] == 1
    return known | {"type": _positive if is_count else type(one.default)}


def _words(default: Any) -> str:
    if isinstance(default, bool):
        return "yes" if default else "no"
    return " ".join(map(str, default)) if isinstance(default, tuple) else str(default)


def _positive(text: str) -> int:
    try:
        value = int(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is no whole number") from None
    if value < 1:
        raise argparse.ArgumentTypeError(f"{value} is below 1")
    return value
