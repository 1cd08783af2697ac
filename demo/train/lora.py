"""Train the demo's two LoRAs on the finished base, through ComfyUI's own BaseModel.

    python demo/train/lora.py lcm --minutes 25      an LCM-LoRA, distilled from the base with fixed guidance
    python demo/train/lora.py ink --minutes 12      a style LoRA, from the ink pictures

Resumes from its checkpoint in the work folder; exports demo/models/loras/tiny_emoji_<kind>_lora.safetensors.
"""

import argparse
import sys
import time

import torch
from base import CHECKPOINT, Captions, build, latents, v_loss
from common import MODELS, WORK, load_lcm_kit, load_state, save_state
from data import caption
from safetensors.torch import load_file, save_file
from tqdm import tqdm


def load_base():
    """(BaseModel, Captions) with the exported weights in float32, frozen."""
    model, text = build()
    state = load_file(CHECKPOINT)

    def part(prefix: str) -> dict[str, torch.Tensor]:
        return {k.removeprefix(prefix): v.float() for k, v in state.items() if k.startswith(prefix)}

    model.diffusion_model.load_state_dict(part("model.diffusion_model."))
    text.load_state_dict(part("cond_stage_model.clip_tiny.transformer."))
    return model.requires_grad_(False), Captions(text.requires_grad_(False).eval())


def lcm_loss(model, adapters, z0, context, uncond, args, generator) -> torch.Tensor:
    """One batch of the paper's Algorithm 1 with guidance `args.cfg`, skipping `args.skip` timesteps."""
    from lcm_kit.distillation.objective import consistency_loss, guided
    from lcm_kit.samplers.schedule import training_grid

    def student(x, sigma):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            return model.apply_model(x, sigma, c_crossattn=context)

    def teacher(x, sigma):
        with adapters.disabled(), torch.autocast("cpu", dtype=torch.bfloat16):
            both = model.apply_model(
                torch.cat([x, x]), torch.cat([sigma, sigma]), c_crossattn=torch.cat([context, uncond])
            )
        return guided(*both.chunk(2), args.cfg)

    grid = torch.tensor(training_grid())
    timestep = grid[torch.randint(len(grid), (len(z0),), generator=generator)]
    noise = torch.randn(z0.shape, generator=generator)
    return consistency_loss(
        student, teacher, student, z0, noise, timestep, args.skip, model.model_sampling.sigmas, huber_c=args.huber
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("kind", choices=["lcm", "ink"])
    parser.add_argument("--minutes", type=float, default=25, help="training time in this run")
    parser.add_argument("--batch", type=int, default=48)
    parser.add_argument("--lr", type=float, default=1e-3)
    parser.add_argument("--rank", type=int, default=32)
    parser.add_argument("--cfg", type=float, default=3.0, help="lcm: guidance that is distilled in")
    parser.add_argument("--huber", type=float, default=0.1, help="lcm: c of the pseudo-Huber loss")
    parser.add_argument("--skip", type=int, default=200, help="lcm: the paper's k, timesteps that a solver step skips")
    parser.add_argument("--views", type=int, default=160)
    args = parser.parse_args()
    sys.stdout.reconfigure(line_buffering=True)

    load_lcm_kit()
    from lcm_kit.distillation.adapter import LoraAdapters

    data = latents("noto" if args.kind == "lcm" else "ink", args.views)
    model, encode = load_base()
    adapters = LoraAdapters(model.diffusion_model, args.rank, generator=torch.Generator().manual_seed(5))
    parameters = list(adapters.parameters())
    average = [p.detach().clone() for p in parameters]
    optimizer = torch.optim.AdamW(parameters, lr=args.lr, betas=(0.9, 0.99), weight_decay=0)
    path, step = WORK / f"{args.kind}.pt", 0
    if state := load_state(path):
        adapters.load_state_dict(state["adapters"])
        optimizer.load_state_dict(state["optimizer"])
        average, step = state["average"], state["step"]
    with torch.no_grad():
        nothing = encode([""])

    generator = torch.Generator().manual_seed(3000 + step)
    start, seconds, running = time.monotonic(), args.minutes * 60, None
    with tqdm(total=round(seconds), unit="s", mininterval=5) as bar:
        while (elapsed := time.monotonic() - start) < seconds:
            left = 1 - elapsed / seconds
            for group in optimizer.param_groups:
                group["lr"] = args.lr * min(1.0, (step + 1) / 50, max(left / 0.4, 0.02))
            index = torch.randint(len(data["latent"]), (args.batch,), generator=generator)
            z0 = data["latent"][index].float()
            with torch.no_grad():
                context = encode([
                    caption(k, c, generator)
                    for k, c in zip(data["concept"][index].tolist(), data["colour"][index].tolist(), strict=True)
                ])  # fmt: skip
            if args.kind == "lcm":
                uncond = nothing.expand_as(context)
                loss = lcm_loss(model, adapters, z0, context, uncond, args, generator)
            else:
                loss = v_loss(model, z0, context, generator)
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            torch.nn.utils.clip_grad_norm_(parameters, 1.0)
            optimizer.step()
            step += 1
            with torch.no_grad():
                torch._foreach_lerp_(average, parameters, 1 - min(0.99, step / (step + 10)))
            running = loss.item() if running is None else 0.98 * running + 0.02 * loss.item()
            bar.n = round(elapsed)
            bar.set_postfix(step=step, loss=f"{running:.4f}")
            if step % 250 == 0 or elapsed + 2 > seconds:
                save_state(
                    path,
                    {"adapters": adapters.state_dict(), "optimizer": optimizer.state_dict(), "average": average,
                     "step": step},
                )  # fmt: skip
    with torch.no_grad():
        for p, mean in zip(parameters, average, strict=True):
            p.copy_(mean)
    name = f"tiny_emoji_{args.kind}_lora"
    metadata = {
        "format": "pt", "modelspec.title": name, "modelspec.architecture": "tiny-emoji/lora", "ss_steps": str(step),
        "ss_network_dim": str(args.rank), "ss_network_alpha": str(args.rank), "ss_network_module": "networks.lora",
    }  # fmt: skip
    state = {k: v.half().contiguous() for k, v in adapters.lora_state_dict().items()}
    save_file(state, MODELS / "loras" / f"{name}.safetensors", metadata=metadata)


if __name__ == "__main__":
    main()
