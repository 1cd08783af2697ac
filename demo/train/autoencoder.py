"""Make the demo's autoencoder: TAESD's architecture (ComfyUI's own class), f = 8, 12 channels.

    python demo/train/autoencoder.py --minutes 15

The encoder is not trained but built: its weights are set so that the network computes, exactly, the 12 leading
principal components of every 8 x 8 block of pixels. So latents are known, and the base model can be trained, before
the decoder is; the decoder learns to draw the picture from them. Resumes from its checkpoint in the work folder;
exports demo/models/vae/tiny_emoji_vae.safetensors.
"""

import argparse
import time

import torch
import torch.nn.functional as F
from common import VAE, WORK, load_comfy, load_state, save_state
from data import CHANNELS, COLOUR_NAMES, NAMES, draw, glyphs
from safetensors.torch import save_file
from tqdm import tqdm

BLOCK = 8  # pixels
INNER = 0.6  # the decoder sees latent * INNER: its first layer, 3 tanh(x / 3), is then nearly the identity


def principal_components(sets: dict[str, torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
    """(CHANNELS, 3 * 64) projection and (CHANNELS,) offset: latent = projection @ block + offset.

    Components are scaled by the root of their standard deviation, half-way between pixels (fine channels drown in
    the sampler's noise) and whitened (noise in them counts as much as the colours), and to a mean variance of 1.
    """
    generator = torch.Generator().manual_seed(5)
    blocks = []
    for pictures in (sets["noto"], sets["noto"], sets["ink"]):
        index = torch.arange(len(NAMES)).repeat(10)
        colour = torch.randint(len(COLOUR_NAMES), (len(index),), generator=generator)
        x = draw(pictures[index], colour, generator)
        blocks.append(F.unfold(x, BLOCK, stride=BLOCK).transpose(1, 2).reshape(-1, 3 * BLOCK * BLOCK))
    data = torch.cat(blocks).double()
    mean = data.mean(0)
    _, vectors = torch.linalg.eigh((data - mean).T @ (data - mean))
    basis = vectors.flip(1)[:, :CHANNELS].T
    std = ((data - mean) @ basis.T).std(0)
    projection = basis / (std.sqrt() * std.mean().sqrt())[:, None]
    return projection.float(), (-projection @ mean).float()


def project(x: torch.Tensor, projection: torch.Tensor, offset: torch.Tensor) -> torch.Tensor:
    """Latents (b, CHANNELS, h / 8, w / 8) of pictures (b, 3, h, w) in 0..1: what the encoder computes, 50 times faster."""
    return F.conv2d(x, projection.view(CHANNELS, 3, BLOCK, BLOCK), offset, stride=BLOCK)


@torch.no_grad()
def build_encoder(encoder: torch.nn.Module, projection: torch.Tensor, offset: torch.Tensor) -> None:
    """Set the weights of TAESD's encoder so that it computes INNER * (projection @ block + offset), exactly.

    Two strided convolutions gather 2 x 2 pixels each into channels (3 -> 12 -> 48), the third reads the remaining
    2 x 2 and projects. Every value before it is a pixel, so at least 0, and ReLU does nothing; after it the positive
    and negative parts go in separate channels, and the last layer takes their difference. The residual blocks are 0.
    """
    for p in encoder.parameters():
        p.zero_()
    convs = [m for m in encoder if isinstance(m, torch.nn.Conv2d)]
    first, gather1, gather2, project, last = convs
    for c in range(3):
        first.weight[c, c, 1, 1] = 1
    for conv, channels in ((gather1, 3), (gather2, 12)):
        for c in range(channels):
            for dy in range(2):
                for dx in range(2):
                    conv.weight[4 * c + 2 * dy + dx, c, 1 + dy, 1 + dx] = 1
    # After the gathers, channel 4 * (4 * c + 2 * y1 + x1) + 2 * y2 + x2 holds the pixel at the offset
    # (2 * y2 + y1, 2 * x2 + x1) within a 4 x 4 block: the first gather took neighbouring pixels.
    kernel = projection.view(CHANNELS, 3, BLOCK, BLOCK) * INNER
    for c in range(3):
        for y in range(BLOCK):
            for x in range(BLOCK):
                y3, y2, y1 = y // 4, y // 2 % 2, y % 2
                x3, x2, x1 = x // 4, x // 2 % 2, x % 2
                channel = 4 * (4 * c + 2 * y1 + x1) + 2 * y2 + x2
                project.weight[:CHANNELS, channel, 1 + y3, 1 + x3] = kernel[:, c, y, x]
                project.weight[CHANNELS : 2 * CHANNELS, channel, 1 + y3, 1 + x3] = -kernel[:, c, y, x]
    for c in range(CHANNELS):
        last.weight[c, c, 1, 1] = 1
        last.weight[c, CHANNELS + c, 1, 1] = -1
    last.bias.copy_(offset * INNER)


def build(sets: dict[str, torch.Tensor]):
    """ComfyUI's TAESD: the encoder as above, the decoder with He initialisation."""
    load_comfy()
    from comfy.taesd.taesd import TAESD

    vae = TAESD(latent_channels=CHANNELS).requires_grad_(False)
    generator = torch.Generator().manual_seed(0)
    for name, module in vae.taesd_decoder.named_modules():
        if isinstance(module, torch.nn.Conv2d):
            fan_in = module.weight[0].numel()
            # The last convolution of a residual branch starts small: at the start a block is nearly the identity.
            gain = 0.2 if name.endswith("conv.4") else 1.0
            module.weight.copy_(torch.randn(module.weight.shape, generator=generator) * gain * (2 / fan_in) ** 0.5)
            if module.bias is not None:
                module.bias.zero_()
    vae.taesd_decoder[-1].weight.mul_(0.3)
    vae.taesd_decoder[-1].bias.fill_(0.5)
    build_encoder(vae.taesd_encoder, *principal_components(sets))
    vae.vae_scale.fill_(INNER)
    return vae.to(memory_format=torch.channels_last)


def export(vae) -> None:
    # float32 for the encoder's few exact numbers would not help: fp16 rounds a latent by less than 0.002.
    save_file({k: v.half().contiguous() for k, v in vae.state_dict().items()}, VAE, metadata={"format": "pt"})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=15, help="training time in this run")
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--lr", type=float, default=2e-3)
    parser.add_argument("--noise", type=float, default=0.25, help="largest standard deviation of noise on the latents")
    args = parser.parse_args()

    sets = {kind: glyphs(kind, WORK / "data") for kind in ("noto", "ink")}
    vae = build(sets)
    code = principal_components(sets)
    decoder = vae.taesd_decoder.requires_grad_(True)
    parameters = list(decoder.parameters())
    optimizer = torch.optim.AdamW(parameters, lr=args.lr, betas=(0.9, 0.98), weight_decay=1e-4)
    path, step = WORK / "autoencoder.pt", 0
    if state := load_state(path):
        decoder.load_state_dict(state["decoder"])
        optimizer.load_state_dict(state["optimizer"])
        step = state["step"]

    def checkpoint() -> None:
        save_state(path, {"decoder": decoder.state_dict(), "optimizer": optimizer.state_dict(), "step": step})
        export(vae)

    generator = torch.Generator().manual_seed(1000 + step)
    start, seconds, running = time.thread_time(), args.minutes * 60, None
    with tqdm(total=round(seconds), unit="s", mininterval=5) as bar:
        while (elapsed := time.thread_time() - start) < seconds:
            left = 1 - elapsed / seconds
            for group in optimizer.param_groups:
                group["lr"] = args.lr * min(1.0, (step + 1) / 30, max(left / 0.5, 0.02))
            index = torch.randint(len(NAMES), (args.batch,), generator=generator)
            colour = torch.randint(len(COLOUR_NAMES), (args.batch,), generator=generator)
            ink = torch.rand(args.batch, generator=generator) < 0.4
            glyph = torch.where(ink[:, None, None, None], sets["ink"][index], sets["noto"][index])
            x = draw(glyph, colour, generator).contiguous(memory_format=torch.channels_last)
            # Noise, of another strength in each picture: the decoder must forgive the errors of a sampler, and a
            # consistency model leaves some of the noise that is added between its steps.
            z = project(x, *code)
            strength = args.noise * torch.rand(len(z), 1, 1, 1, generator=generator)
            z = (z + strength * torch.randn(z.shape, generator=generator)) * INNER
            with torch.autocast("cpu", dtype=torch.bfloat16):
                y = decoder(z).float()
            edge = F.l1_loss(y.diff(dim=-1), x.diff(dim=-1)) + F.l1_loss(y.diff(dim=-2), x.diff(dim=-2))
            loss = F.l1_loss(y, x) + 2 * F.mse_loss(y, x) + edge
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            torch.nn.utils.clip_grad_norm_(parameters, 1.0)
            optimizer.step()
            step += 1
            mse = F.mse_loss(y.detach(), x).item()
            running = mse if running is None else 0.98 * running + 0.02 * mse
            bar.n = round(elapsed)
            bar.set_postfix(step=step, mse=f"{running:.5f}")
            if step % 500 == 0:
                checkpoint()
    checkpoint()


if __name__ == "__main__":
    main()
