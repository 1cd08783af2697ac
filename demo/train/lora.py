"""Train a style LoRA on the finished base, through ComfyUI's own BaseModel.

    python demo/train/lora.py ink --minutes 12      black line art: the demo's style
    python demo/train/lora.py twemoji --minutes 10  flat colours: for benchmarks/universality.py

Resumes from its checkpoint in the work folder; exports the file that common.LORAS names.
"""

import argparse
import sys

import torch
from base import latents, load_base, v_loss
from common import LORAS, WORK, load_lcm_kit
from loop import Course, train
from safetensors.torch import save_file

# Of the random `down`, one for each style: LoRAs that begin with the same one share their inputs for good.
SEEDS = {"ink": 5, "twemoji": 6}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("kind", choices=list(SEEDS))
    parser.add_argument("--minutes", type=float, default=12, help="training time in this run")
    parser.add_argument("--batch", type=int, default=48)
    parser.add_argument("--lr", type=float, default=1e-3)
    parser.add_argument("--rank", type=int, default=32)
    parser.add_argument("--views", type=int, default=160, help="pictures of each concept")
    args = parser.parse_args()
    sys.stdout.reconfigure(line_buffering=True)

    load_lcm_kit()
    from lcm_kit.distillation.adapter import LoraAdapters

    data = latents(args.kind, args.views)
    model, encode = load_base()
    start = torch.Generator().manual_seed(SEEDS[args.kind])
    adapters = LoraAdapters(model.diffusion_model, args.rank, generator=start)

    def export(averaged: dict[str, dict[str, torch.Tensor]], step: int) -> None:
        trained = {name: value.clone() for name, value in adapters.state_dict().items()}
        adapters.load_state_dict(averaged["adapters"])
        state = {k: v.half().contiguous() for k, v in adapters.lora_state_dict().items()}
        adapters.load_state_dict(trained)
        path = LORAS[args.kind]
        metadata = {
            "format": "pt", "modelspec.title": path.stem, "modelspec.architecture": "tiny-emoji/lora",
            "ss_steps": str(step), "ss_network_dim": str(args.rank), "ss_network_alpha": str(args.rank),
            "ss_network_module": "networks.lora",
        }  # fmt: skip
        save_file(state, path, metadata=metadata)

    course = Course(args.minutes, args.batch, args.lr, warm_up=50, average=0.99, seed=3000)
    train(
        {"adapters": adapters}, data,
        lambda z0, words, generator: v_loss(model, z0, encode(words), generator),
        course, WORK / f"{args.kind}.pt", export,
    )  # fmt: skip


if __name__ == "__main__":
    main()
