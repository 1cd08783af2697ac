"""Fine-tune the finished base on another set: all weights of its UNet, no LoRA; the text encoder stays.

    python demo/train/finetune.py --minutes 10      Fluent Emoji 3D, for benchmarks/universality.py

Resumes from its checkpoint in the work folder; exports the ComfyUI checkpoint that common.FINETUNE names.
"""

import argparse

from base import export, latents, load_base, v_loss
from common import FINETUNE, WORK
from loop import Course, train


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=10, help="training time in this run")
    parser.add_argument("--batch", type=int, default=48)
    parser.add_argument("--lr", type=float, default=4e-4, help="a third of the base's: it starts from a finished model")
    parser.add_argument("--views", type=int, default=160, help="pictures of each concept")
    args = parser.parse_args()

    data = latents("fluent", args.views)
    model, encode = load_base()

    course = Course(
        args.minutes, args.batch, args.lr, warm_up=50, average=0.99, seed=4000, weight_decay=1e-2, empty=0.12
    )
    train(
        {"unet": model.diffusion_model}, data,
        lambda z0, words, generator: v_loss(model, z0, encode(words), generator),
        course, WORK / "fluent.pt",
        lambda averaged, step: export(averaged["unet"], encode.text.state_dict(), FINETUNE),
    )  # fmt: skip


if __name__ == "__main__":
    main()
