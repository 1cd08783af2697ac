"""What LCM Negative Prompt (NAG) costs against CFG 2, and what it does to pictures of the embedded model.

    COMFYUI_PATH=.comfyui .venv/bin/python benchmarks/negative_prompt.py
    COMFYUI_PATH=.comfyui .venv/bin/python benchmarks/negative_prompt.py --transformers
    COMFYUI_PATH=.comfyui .venv/bin/python benchmarks/negative_prompt.py --pictures docs/negative_prompt.png

The first prints the cost as Markdown: processor time inside the model, on one thread, of the embedded model and of a
UNet of SD 1.5's shape with random weights (3.4 GB of memory; leave it out with --tiny). The set-ups take turns in one
process and the quickest run of each counts, so that other work on the machine cancels. Beside it stands the arithmetic
alone, counted and not timed: matrix products and convolutions.
The second does so for a transformer of each road: widths, blocks and pictures are smaller than the published ones.
The third counts in how many pictures an unwanted background shows, and draws some of them.
"""

import argparse
import os
import time
from collections import Counter
from pathlib import Path

from setting import embedded, markdown

import torch
from against_core import prepare

SETUPS = ("cfg 1", "NAG, cfg 1", "cfg 2")
NAG = {"scale": 3.0, "tau": 2.5, "alpha": 0.5}  # the node's defaults
SD15 = {
    "image_size": 32, "in_channels": 4, "out_channels": 4, "model_channels": 320, "num_res_blocks": [2, 2, 2, 2],
    "channel_mult": [1, 2, 4, 4], "transformer_depth": [1, 1, 1, 1, 1, 1, 0, 0],
    "transformer_depth_output": [1, 1, 1, 1, 1, 1, 1, 1, 1, 0, 0, 0], "transformer_depth_middle": 1,
    "context_dim": 768, "num_heads": 8, "num_head_channels": -1, "use_linear_in_transformer": False,
    "use_spatial_transformer": True, "use_temporal_attention": False, "adm_in_channels": None,
    "dtype": torch.float32,
}  # fmt: skip

# Name -> (class in ComfyUI's supported models, its configuration, shape of the latents, tokens and width of the text,
# what else comes with the text). The quotient of text and picture is what counts: a video has less text.
TRANSFORMERS = {
    "Wan's kind (cross-attention): 640 tokens of picture, 128 of text": (
        "WAN21_T2V",
        {
            "image_model": "wan2.1", "model_type": "t2v", "dim": 384, "ffn_dim": 2240, "freq_dim": 256,
            "text_dim": 1024, "num_heads": 3, "num_layers": 2, "in_dim": 16,
        },
        (1, 16, 1, 40, 64), (128, 1024), {},
    ),
    "Flux' kind (joint attention): 576 of picture, 128 of text": (
        "Flux",
        {
            "image_model": "flux", "patch_size": 2, "theta": 10000, "hidden_size": 768, "mlp_ratio": 4.0,
            "num_heads": 6, "depth": 1, "depth_single_blocks": 2, "axes_dim": [16, 56, 56], "qkv_bias": True,
            "guidance_embed": False, "in_channels": 16, "out_channels": 16, "vec_in_dim": 768, "context_in_dim": 1024,
            "txt_ids_dims": [],
        },
        (1, 16, 48, 48), (128, 1024), {"pooled_output": torch.zeros(1, 768)},
    ),
    "Z-Image's kind (each picture twice): 576 of picture, 96 of text": (
        "ZImage",
        {
            "image_model": "lumina2", "patch_size": 2, "in_channels": 16, "dim": 768, "cap_feat_dim": 1024,
            "n_layers": 4, "qk_norm": True, "n_heads": 6, "n_kv_heads": 6, "axes_dims": [32, 48, 48],
            "axes_lens": [1024, 512, 512], "rope_theta": 256.0, "ffn_dim_multiplier": 8 / 3,
            "z_image_modulation": True, "time_scale": 1000.0, "pad_tokens_multiple": 32,
        },
        (1, 16, 48, 48), (96, 1024), {},
    ),
}  # fmt: skip

# (prompt, what is not wanted): the model paints any of nine backgrounds where the prompt names none
CASES = (
    ("rocket", "white background"),
    ("cat face", "blue background"),
    ("strawberry", "white background"),
    ("pizza", "yellow background"),
    ("ghost", "purple background"),
    ("penguin", "green background"),
)
SEEDS = 32
SHOWN = 2  # pictures of each case


# ---- models


def sd15_shaped():
    """A MODEL of SD 1.5's shape. Weights are random: arithmetic takes the same time whatever they are."""
    import comfy.model_base
    import comfy.supported_models

    config = comfy.supported_models.SD15(SD15)
    return filled(comfy.model_base.BaseModel(config, device=torch.device("cpu")))


def transformer(name: str, unet_config: dict):
    """A MODEL of a class in ComfyUI's supported models, with random weights."""
    import comfy.supported_models

    config = getattr(comfy.supported_models, name)(unet_config | {"dtype": torch.float32})
    config.set_inference_dtype(torch.float32, None)
    return filled(config.get_model({}, device=torch.device("cpu")))


@torch.no_grad()
def filled(model):
    import comfy.model_patcher

    generator = torch.Generator().manual_seed(0)
    for name, weight in model.diffusion_model.named_parameters():
        if weight.ndim > 1:
            weight.uniform_(-1, 1, generator=generator).mul_(weight[0].numel() ** -0.5)
        else:
            weight.fill_(float(name.endswith("weight")))
    cpu = torch.device("cpu")
    return comfy.model_patcher.ModelPatcher(model, load_device=cpu, offload_device=cpu)


# ---- cost


def cost(model, positive, negative, shape, steps: int, rounds: int) -> dict[str, tuple[float, int]]:
    """Set-up -> (seconds of processor time in the model for one run, the quickest; its floating point operations)."""
    from torch.utils.flop_counter import FlopCounterMode

    from lcm_kit.host.sampling.negative import with_negative_prompt

    best = {}
    for turn in range(rounds):
        for name in SETUPS:
            patched = with_negative_prompt(model, negative, **NAG, end_step=-1) if "NAG" in name else model
            uncond = negative if name == "cfg 2" else None
            timed, spent = timed_model(patched)
            sampled(timed, positive, uncond, torch.zeros(shape), steps, name)
            if turn == 0:
                with FlopCounterMode(display=False) as counter:
                    sampled(patched, positive, uncond, torch.zeros(shape), steps, name)
                best[name] = sum(spent), counter.get_total_flops()
            best[name] = min(best[name][0], sum(spent)), best[name][1]
    return best


def timed_model(model):
    model, spent = model.clone(), []

    def wrapper(apply_model, args):
        started = time.process_time()
        result = apply_model(args["input"], args["timestep"], **args["c"])
        spent.append(time.process_time() - started)
        return result

    model.set_model_unet_function_wrapper(wrapper)
    return model, spent


def sampled(model, positive, negative, samples, steps: int, setup: str):
    from lcm_kit.host.sampling import sampling

    cfg = 2.0 if setup == "cfg 2" else 1.0
    numbers = {"seed": 0, "steps": steps, "cfg": cfg, "denoise": 1.0, "gamma": 1.0, "cfg_steps": -1}
    with torch.inference_mode():
        return sampling.sample(model, positive, negative, {"samples": samples}, **numbers, original_steps=50)["samples"]


def print_cost(with_sd15: bool) -> None:
    model, clip, _ = embedded()
    text = [clip.encode_from_tokens_scheduled(clip.tokenize(t)) for t in ("cat face", "blue background")]
    rows = [("embedded, 64 x 64 pixels, 12 tokens, 4 steps", cost(model, *text, (1, 12, 8, 8), 4, 10))]
    rows.append(("the same, 8 pictures at once", cost(model, *text, (8, 12, 8, 8), 4, 5)))
    if with_sd15:
        generator = torch.Generator().manual_seed(1)
        text = [[[torch.randn(1, 77, 768, generator=generator), {}]] for _ in range(2)]
        model = sd15_shaped()
        rows.append(("SD 1.5's shape, 512 x 512 pixels, 77 tokens, 1 step", cost(model, *text, (1, 4, 64, 64), 1, 3)))
    print_costs(rows)


def print_cost_of_transformers() -> None:
    rows = []
    for name, (family, config, shape, text, others) in TRANSFORMERS.items():
        generator = torch.Generator().manual_seed(1)
        texts = [[[torch.randn(1, *text, generator=generator), others]] for _ in range(2)]
        rows.append((name, cost(transformer(family, config), *texts, shape, 1, 8)))
    print_costs(rows)


def print_costs(rows) -> None:
    print("Time in the model and, in brackets, arithmetic, as multiples of cfg 1 without a negative prompt:\n")
    print("| model | cfg 1 | NAG at cfg 1 | cfg 2 | NAG against cfg 2 |\n| --- | --- | --- | --- | --- |")
    for name, found in rows:
        (plain, plain_flops), (nag, nag_flops), (cfg, cfg_flops) = (found[s] for s in SETUPS)
        print(
            f"| {name} | 1 ({plain:.3g} s) | {nag / plain:.2f} ({nag_flops / plain_flops:.3f}) | "
            f"{cfg / plain:.2f} ({cfg_flops / plain_flops:.3f}) | {nag / cfg:.2f} ({nag_flops / cfg_flops:.2f}) |"
        )
    print(f"\nOne thread, torch {torch.__version__}, load of the machine {os.getloadavg()[0]:.1f}.")


# ---- effect


def backgrounds(pictures: torch.Tensor) -> list[str]:
    """The named colour nearest to the median of each picture's border. pictures: (b, height, width, 3) in 0..1."""
    from train.data import COLOURS

    sides = (pictures[:, :2], pictures[:, -2:], pictures[:, :, :2], pictures[:, :, -2:])
    border = torch.cat([side.flatten(1, 2) for side in sides], dim=1).median(dim=1).values
    palette = torch.tensor(list(COLOURS.values())) / 255
    return [list(COLOURS)[i] for i in torch.cdist(border, palette).argmin(dim=1)]


def print_effect(file: Path) -> None:
    from PIL import Image
    from sheet import Row, draw, enlarge

    from lcm_kit.host.sampling.negative import with_negative_prompt

    model, clip, vae = embedded()
    columns: dict[str, list[Image.Image]] = {name: [] for name in SETUPS}
    captions = []
    total: Counter = Counter()
    print(f"Pictures of {SEEDS} that show the unwanted background, 4 steps:\n")
    rows: list[list[object]] = []
    for prompt, unwanted in CASES:
        positive, negative = (clip.encode_from_tokens_scheduled(clip.tokenize(t)) for t in (prompt, unwanted))
        pictures, shown = {}, {}
        for name in SETUPS:
            patched = with_negative_prompt(model, negative, **NAG, end_step=-1) if "NAG" in name else model
            latent = sampled(
                patched, positive, negative if name == "cfg 2" else None, torch.zeros(SEEDS, 12, 8, 8), 4, name
            )
            pictures[name] = vae.decode(latent).float().clamp(0, 1).clone()
            shown[name] = [colour == unwanted.split()[0] for colour in backgrounds(pictures[name])]
            total[name] += sum(shown[name])
        rows.append([prompt, unwanted, *(sum(shown[name]) for name in SETUPS)])
        for i in [i for i, hit in enumerate(shown["cfg 1"]) if hit][:SHOWN]:
            for name in SETUPS:
                pixels = (pictures[name][i] * 255).round().to(torch.uint8).numpy()
                columns[name].append(enlarge(Image.fromarray(pixels), 2))
            captions.append(f"{prompt}, not: {unwanted}")
    rows.append(["all", "", *(f"{total[name]} of {len(CASES) * SEEDS}" for name in SETUPS)])
    print(markdown(["prompt", "not wanted", "no negative prompt", "NAG at cfg 1", "cfg 2"], rows))
    labels = ("no negative\nprompt", "LCM Negative\nPrompt, cfg 1", "cfg 2")
    rows = [
        Row(columns[name], label, captions if name == SETUPS[-1] else ())
        for name, label in zip(SETUPS, labels, strict=True)
    ]
    draw(rows, "Embedded model, 4 steps: the first seeds whose picture shows what is not wanted").save(file)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--tiny", action="store_true", help="leave out the UNet of SD 1.5's shape")
    parser.add_argument("--transformers", action="store_true", help="a transformer of each road instead of UNets")
    parser.add_argument("--pictures", type=Path, metavar="FILE", help="count and draw pictures instead")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    prepare()
    if arguments.pictures:
        print_effect(arguments.pictures)
    elif arguments.transformers:
        print_cost_of_transformers()
    else:
        print_cost(not arguments.tiny)


if __name__ == "__main__":
    main()
