"""Make the demo's LCM-LoRA with LCM Kit's own distillation: `python -m distillation` on the finished base.

    python demo/train/lcm.py

Writes the Noto pictures with their captions as a webdataset file into the work folder, then distils from it. A run that was
stopped goes on with the same command. Replaces demo/models/loras/tiny_emoji_lcm_lora.safetensors.
"""

import io
import subprocess
import sys
import tarfile
from pathlib import Path

import torch
from common import DEMO, ROOT, WORK, comfyui_path
from data import COLOUR_NAMES, NAMES, caption, draw, glyphs
from PIL import Image
from studio import CHECKPOINT, LORAS, VAE
from tqdm import tqdm

VIEWS = 80  # pictures of each concept
TRAINING = """
  --width 64 --height 64 --steps 2000 --batch 48 --rank 32 --learning-rate 5e-4 --betas 0.9 0.99 --warmup 50 --decay 0.7
  --guidance-min 3 --guidance-max 3 --skip 200 --original-steps 50 --huber-c 0.1 --weighting v --average 0.95 --average-target
  --seed 11 --dtype bf16 --no-gradient-checkpointing --save-every 200
""".split()


def write_pictures(path: Path) -> None:
    """Pictures of every concept in random poses, and captions that are true of them, as one .tar; whole or not at all."""
    pictures, generator = glyphs("noto", WORK / "data"), torch.Generator().manual_seed(17)
    part = path.with_suffix(".part")
    with tarfile.open(part, "w") as tar:
        for view in tqdm(range(VIEWS), desc="Drawing pictures"):
            colour = torch.randint(len(COLOUR_NAMES), (len(NAMES),), generator=generator)
            drawn = (draw(pictures, colour, generator) * 255).round().byte().permute(0, 2, 3, 1).numpy()
            for concept, pixels in enumerate(drawn):
                png = io.BytesIO()
                Image.fromarray(pixels).save(png, "png", compress_level=1)
                words = caption(concept, int(colour[concept]), generator)
                name = f"{view * len(NAMES) + concept:06}"
                for suffix, content in (("png", png.getvalue()), ("txt", words.encode())):
                    member = tarfile.TarInfo(f"{name}.{suffix}")
                    member.size = len(content)
                    tar.addfile(member, io.BytesIO(content))
    part.replace(path)


def main() -> None:
    pictures = WORK / "noto.tar"
    if not pictures.exists():
        WORK.mkdir(parents=True, exist_ok=True)
        write_pictures(pictures)
    command = [
        sys.executable, "-m", "distillation", "--comfyui", comfyui_path(), "--custom-nodes", DEMO / "tiny_emoji",
        "--checkpoint", CHECKPOINT, "--vae", VAE, "--pictures", pictures, "--resume", WORK / "lcm.run",
        "--picture", WORK / "lcm.png", "--output", LORAS["lcm"], "--overwrite", *TRAINING, *sys.argv[1:],
    ]  # fmt: skip
    sys.exit(subprocess.run([str(part) for part in command], cwd=ROOT).returncode)


if __name__ == "__main__":
    main()
