"""Make the demo's LCM-LoRA with LCM Kit's own distillation: `python -m distillation` on the finished base.

    python demo/train/lcm.py
    python demo/train/lcm.py --kind phased      from it, in 4 phases, for 4 steps
    python demo/train/lcm.py --kind ink_fast    the same with the ink style on the model; for benchmarks/universality.py

The first writes the Noto pictures with their captions as a webdataset file into the work folder, then distils from it; the
others learn from pictures that the model makes. A run that was stopped goes on with the same command. Replaces the file
that common.LORAS names; the one in phases is distilled into the work folder and cut to a size for the repository.
"""

import argparse
import io
import shlex
import subprocess
import sys
import tarfile
from collections.abc import Sequence
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
REFINING = shlex.split("""
  --recipe "accelerate this style" --width 64 --height 64 --samples 412 --batch 24 --accumulate 1 --rank 32 --betas 0.9 0.99
  --huber-c 0.1 --seed 21 --dtype bf16 --no-gradient-checkpointing --save-every 50
""")
CUT = ["--max-mb", "1.5"]  # of what is shipped: all of the demo stays within 30 MB


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


def captions(path: Path) -> Path:
    """Each concept alone, and on a coloured background."""
    colours = torch.randint(len(COLOUR_NAMES), (len(NAMES),), generator=torch.Generator().manual_seed(18)).tolist()
    coloured = [f"{name} {COLOUR_NAMES[colour]} background" for name, colour in zip(NAMES, colours, strict=True)]
    text = "\n".join([*NAMES, *coloured]) + "\n"
    if not path.exists() or path.read_text(encoding="utf-8") != text:  # another run may be reading it
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")
    return path


def data(kind: str) -> list[object]:
    """What a kind learns from, and begins with."""
    if kind == "lcm":
        pictures = WORK / "noto.tar"
        if not pictures.exists():
            WORK.mkdir(parents=True, exist_ok=True)
            write_pictures(pictures)
        return ["--pictures", pictures, *TRAINING]
    begun = ["--prompts", captions(WORK / "captions.txt"), "--start-from", LORAS["lcm"], *REFINING]
    guidance = 3 if kind == "phased" else 4  # ink asks for more of it: at 3 its pictures are named less often
    begun += ["--guidance-min", guidance, "--guidance-max", guidance]
    return begun if kind == "phased" else ["--lora", LORAS["ink"], *begun]


def distil(kind: str, name: str, output: Path, others: Sequence[str]) -> int:
    """name: of the run's curve and samples in the work folder.   others: options that go before those of the kind.

    Returns the command's exit code.
    """
    command = [
        sys.executable, "-m", "distillation", "--comfyui", comfyui_path(), "--custom-nodes", DEMO / "tiny_emoji",
        "--checkpoint", CHECKPOINT, "--vae", VAE, "--resume", WORK / f"{name}.run", "--picture", WORK / f"{name}.png",
        "--output", output, "--overwrite", *data(kind), *others,
    ]  # fmt: skip
    return subprocess.run([str(part) for part in command], cwd=ROOT).returncode


def cut(whole: Path, output: Path) -> int:
    """The LoRA in as few numbers as the repository has room for. Returns the command's exit code."""
    command = [sys.executable, "-m", "lora_merge", "resize", whole, "-o", output, "--overwrite", *CUT]
    return subprocess.run([str(part) for part in command], cwd=ROOT).returncode


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kind", choices=["lcm", "phased", "ink_fast"], default="lcm")
    parser.add_argument(
        "--output", type=Path, help="another file, of a run of its name in the work folder; it is not cut"
    )
    args, others = parser.parse_known_args()
    if args.output:
        sys.exit(distil(args.kind, args.output.stem, args.output, others))
    shipped = LORAS[args.kind]
    if args.kind != "phased":
        sys.exit(distil(args.kind, args.kind, shipped, others))
    whole = WORK / shipped.name
    sys.exit(distil(args.kind, args.kind, whole, others) or cut(whole, shipped))


if __name__ == "__main__":
    main()
