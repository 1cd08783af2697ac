"""Train the demo's base model (UNet and text encoder) on Noto pictures, through ComfyUI's own BaseModel.

    python demo/train/base.py --minutes 60

Resumes from its checkpoint in the work folder; exports demo/models/checkpoints/tiny_emoji.safetensors.
"""

import argparse
import json
import sys
from pathlib import Path

import torch
from autoencoder import principal_components, project
from common import CHECKPOINT, DEMO, VAE, WORK, load_comfy
from data import CHANNELS, COLOUR_NAMES, NAMES, PACKAGES, draw, glyphs
from loop import Course, train
from safetensors.torch import load_file, save_file
from tqdm import tqdm


def load_vae():
    """The autoencoder in float32, ComfyUI's class, frozen."""
    load_comfy()
    from comfy.taesd.taesd import TAESD

    vae = TAESD(latent_channels=CHANNELS)
    vae.load_state_dict({k: v.float() for k, v in load_file(VAE).items()})
    return vae.requires_grad_(False).to(memory_format=torch.channels_last)


@torch.no_grad()
def latents(kind: str, views: int) -> dict[str, torch.Tensor]:
    """`views` pictures of every concept, encoded once and kept: latent (n, CHANNELS, 8, 8), concept (n,), colour (n,)."""
    path = WORK / f"latents_{kind}_{views}.safetensors"
    if not path.exists():
        # The encoder was built from these two, and encodes every other set too.
        code = principal_components({name: glyphs(name, WORK / "data") for name in ("noto", "ink")})
        pictures = glyphs(kind, WORK / "data")
        generator = torch.Generator().manual_seed(7 + list(PACKAGES).index(kind))
        rows = []
        for _ in tqdm(range(views), desc=f"encode {kind}"):
            colour = torch.randint(len(COLOUR_NAMES), (len(NAMES),), generator=generator)
            z = project(draw(pictures, colour, generator), *code)
            rows.append((z.half(), torch.arange(len(NAMES)), colour))
        names = ("latent", "concept", "colour")
        save_file({n: torch.cat(part) for n, part in zip(names, zip(*rows, strict=True), strict=True)}, path)
    return load_file(path)


def fit_preview() -> None:
    """Write the least-squares map from a latent pixel to the mean colour of its 8 x 8 pixels, for previews."""
    vae, pictures = load_vae(), glyphs("noto", WORK / "data")
    colour = torch.arange(len(NAMES)) % len(COLOUR_NAMES)
    x = draw(pictures, colour, torch.Generator().manual_seed(3))
    with torch.no_grad():
        z = vae.encode(x * 2 - 1).permute(0, 2, 3, 1).reshape(-1, CHANNELS)
    target = torch.nn.functional.avg_pool2d(x, 8).permute(0, 2, 3, 1).reshape(-1, 3) * 2 - 1
    solution = torch.linalg.lstsq(torch.cat([z, torch.ones(len(z), 1)], dim=1), target).solution
    rounded = [[round(v, 4) for v in row] for row in solution.tolist()]
    (DEMO / "tiny_emoji" / "latent_preview.json").write_text(
        json.dumps({"factors": rounded[:CHANNELS], "bias": rounded[CHANNELS]}) + "\n"
    )


def build():
    """(BaseModel, text transformer) with fresh weights: comfy.ops layers leave theirs uninitialised."""
    load_comfy()
    from comfy.cli_args import args

    args.use_pytorch_cross_attention = True
    sys.path.insert(0, str(DEMO))
    from tiny_emoji.model import UNET, TinyClip, TinyEmoji

    torch.manual_seed(0)
    config = TinyEmoji(UNET)
    config.set_inference_dtype(torch.float32, None)
    model, text = config.get_model({}), TinyClip(dtype=torch.float32).clip_tiny.transformer
    for module in [*model.modules(), *text.modules()]:
        if isinstance(module, torch.nn.Linear):
            torch.nn.Linear.reset_parameters(module)
        elif isinstance(module, torch.nn.Conv2d):
            torch.nn.Conv2d.reset_parameters(module)
        elif isinstance(module, torch.nn.Embedding):
            torch.nn.init.normal_(module.weight, std=0.5)
        elif isinstance(module, torch.nn.GroupNorm | torch.nn.LayerNorm):
            torch.nn.init.ones_(module.weight)
            torch.nn.init.zeros_(module.bias)
    for name, module in model.diffusion_model.named_modules():
        # Residual branches and the output start at zero (Ho et al. 2020), as UNetModel's zero_module meant it.
        if name.endswith(("out_layers.3", "proj_out")) or name == "out.2":
            torch.nn.init.zeros_(module.weight)
            torch.nn.init.zeros_(module.bias)
    return model, text.train()


class Captions:
    """Encodes a batch of captions with the text transformer: strings in, (b, words, width) out."""

    def __init__(self, text):
        from tiny_emoji.text import MAX_WORDS, WordTokenizer

        self.text, self.tokenizer, self.length = text, WordTokenizer(), MAX_WORDS

    def __call__(self, captions: list[str]) -> torch.Tensor:
        unique = sorted(set(captions))
        ids = [self.tokenizer(c)["input_ids"][: self.length] for c in unique]
        tokens = torch.tensor([row + [1] * (self.length - len(row)) for row in ids])
        context = self.text(tokens)[0]
        return context[torch.tensor([unique.index(c) for c in captions])]


def v_loss(model, z0: torch.Tensor, context: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """Mean squared error of v (Salimans and Ho 2022, appendix D), from the denoised image that apply_model returns.

    With x = z0 + sigma * eps in ComfyUI's scale, v_error = denoised_error * sqrt(sigma^2 + 1) / sigma.
    """
    table = model.model_sampling.sigmas
    # Stratified timesteps: one in each of b equal parts, so that the loss of a batch varies less.
    u = (torch.arange(len(z0)) + torch.rand(len(z0), generator=generator)) / len(z0)
    sigma = table[(u * len(table)).long()]
    s = sigma[:, None, None, None]
    x = z0 + s * torch.randn(z0.shape, generator=generator)
    with torch.autocast("cpu", dtype=torch.bfloat16):  # three times as fast on a CPU that has it
        denoised = model.apply_model(x, sigma, c_crossattn=context)
    error = denoised - z0
    return (error.square() * (s * s + 1) / (s * s)).mean()


def export(model_state: dict, text_state: dict, path: Path) -> None:
    """One ComfyUI checkpoint in fp16 (UNet and text encoder; the VAE is a file of its own)."""
    state = {f"model.diffusion_model.{k}": v for k, v in model_state.items()}
    state |= {f"cond_stage_model.clip_tiny.transformer.{k}": v for k, v in text_state.items()}
    save_file({k: v.half().contiguous() for k, v in state.items()}, path, metadata={"format": "pt"})


def load_base():
    """(BaseModel, Captions) with the exported weights in float32, frozen."""
    model, text = build()
    state = load_file(CHECKPOINT)

    def part(prefix: str) -> dict[str, torch.Tensor]:
        return {k.removeprefix(prefix): v.float() for k, v in state.items() if k.startswith(prefix)}

    model.diffusion_model.load_state_dict(part("model.diffusion_model."))
    text.load_state_dict(part("cond_stage_model.clip_tiny.transformer."))
    return model.requires_grad_(False), Captions(text.requires_grad_(False).eval())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=60, help="training time in this run")
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--lr", type=float, default=1.2e-3)
    parser.add_argument("--views", type=int, default=160, help="pictures of each concept")
    args = parser.parse_args()

    data = latents("noto", args.views)
    fit_preview()
    model, text = build()
    encode = Captions(text)
    course = Course(
        args.minutes, args.batch, args.lr,
        warm_up=200, average=0.999, seed=2000, weight_decay=1e-2, empty=0.12, save_every=500,
    )  # fmt: skip
    train(
        {"unet": model.diffusion_model, "text": text}, data,
        lambda z0, words, generator: v_loss(model, z0, encode(words), generator),
        course, WORK / "base.pt",
        lambda averaged, step: export(averaged["unet"], averaged["text"], CHECKPOINT),
    )  # fmt: skip


if __name__ == "__main__":
    main()
