"""Measure the demo's models: does the judge name the prompted thing, and how far are the samples from the teacher's?

    python demo/train/evaluate.py --seeds 3

Everything runs through ComfyUI's own loaders and samplers and LCM Kit's sampler. Writes demo/evaluation.json and
prints the tables of demo/MODEL_CARD.md. Way by way: model calls, steps, prompted concept named (score), style seen,
Frechet distance of the judge's features to the teacher's samples of other noise.
"""

import argparse
import json
import sys
import time

import classifier
import torch
from common import DEMO, MODELS, load_comfy, load_lcm_kit
from data import NAMES
from tqdm import tqdm

TEACHER_CFG = 3.0
LORAS = {"lcm": "tiny_emoji_lcm_lora.safetensors", "ink": "tiny_emoji_ink_lora.safetensors"}


class Studio:
    """The demo's models in ComfyUI, ready to draw one picture of each concept in any of the compared ways."""

    def __init__(self) -> None:
        load_comfy()
        load_lcm_kit()
        sys.path.insert(0, str(DEMO))
        import comfy.sd
        import comfy.supported_models
        import comfy.utils
        from tiny_emoji.model import TinyEmoji

        comfy.supported_models.models.insert(0, TinyEmoji)
        self.model, self.clip, *_ = comfy.sd.load_checkpoint_guess_config(
            str(MODELS / "checkpoints" / "tiny_emoji.safetensors"), output_vae=False
        )
        self.vae = comfy.sd.VAE(sd=comfy.utils.load_torch_file(str(MODELS / "vae" / "tiny_emoji_vae.safetensors")))
        self.loras = {
            kind: comfy.utils.load_torch_file(str(MODELS / "loras" / name))
            for kind, name in LORAS.items()
            if (MODELS / "loras" / name).exists()
        }
        context = torch.cat([self.encode(name)[0][0] for name in NAMES])
        self.positive = [[context, {}]]
        self.negative = self.encode("")

    def encode(self, text: str):
        return self.clip.encode_from_tokens_scheduled(self.clip.tokenize(text))

    def patched(self, **strengths: float):
        """The model with LoRAs at the given strengths, by ComfyUI's own loader."""
        import comfy.sd

        model = self.model
        for kind, strength in strengths.items():
            model, _ = comfy.sd.load_lora_for_models(model, None, self.loras[kind], strength, 0.0)
        return model

    def draw(self, model, way: str, steps: int, seed: int, cfg: float) -> torch.Tensor:
        """One picture of every concept, (n, 3, 64, 64) in 0..1. way: "lcm" (ours) or "sampler/scheduler" of core."""
        import comfy.sample
        import comfy.samplers

        from lcm_kit.samplers.multistep import sample_lcm
        from lcm_kit.samplers.noise import StepNoise
        from lcm_kit.samplers.schedule import lcm_timesteps, sigmas_at

        n = len(NAMES)
        latent = torch.zeros(n, 12, 8, 8)
        noise = comfy.sample.prepare_noise(latent, seed)
        if way == "lcm":
            table = model.get_model_object("model_sampling").sigmas
            timesteps = lcm_timesteps(steps)
            sampler = comfy.samplers.KSAMPLER(
                lambda m, x, sigmas, extra_args, callback, disable: sample_lcm(
                    m, x, sigmas, extra_args=extra_args, disable=True, noise=StepNoise(seed), timesteps=timesteps
                )
            )
            sigmas = sigmas_at(timesteps, table)
        else:
            name, scheduler = way.split("/")
            sampler = comfy.samplers.sampler_object(name)
            sigmas = comfy.samplers.calculate_sigmas(model.get_model_object("model_sampling"), scheduler, steps)
        samples = comfy.sample.sample_custom(
            model, noise, cfg, sampler, sigmas, self.positive, self.negative, latent, disable_pbar=True, seed=seed
        )
        return self.vae.decode(samples).movedim(-1, 1).clamp(0, 1)


def frechet(a: torch.Tensor, b: torch.Tensor) -> float:
    """Frechet distance of Gaussians fitted to features (n, d): |mu|^2 + tr(A + B - 2 (A B)^1/2)."""
    mean = (a.double().mean(0) - b.double().mean(0)).square().sum()
    cov_a, cov_b = torch.cov(a.double().T), torch.cov(b.double().T)
    eigenvalues, vectors = torch.linalg.eigh(cov_a)
    root = vectors @ torch.diag(eigenvalues.clamp(min=0).sqrt()) @ vectors.T
    cross = torch.linalg.eigvalsh(root @ cov_b @ root).clamp(min=0).sqrt().sum()
    return (mean + cov_a.trace() + cov_b.trace() - 2 * cross).item()


# name, LoRAs, way, steps, cfg is the teacher's (True) or 1
WAYS = [
    ("teacher, other noise", {}, "ddim/ddim_uniform", 50, True),
    *[("LCM-LoRA, LCM Kit", {"lcm": 1.0}, "lcm", n, False) for n in (1, 2, 4, 8)],
    *[("no LoRA, LCM Kit", {}, "lcm", n, False) for n in (4,)],
    *[("DPM++ 2M karras", {}, "dpmpp_2m/karras", n, True) for n in (1, 2, 4, 8)],
    *[("DPM++ 2M sgm_uniform", {}, "dpmpp_2m/sgm_uniform", n, True) for n in (2, 4, 8)],
    *[("DDIM", {}, "ddim/sgm_uniform", n, True) for n in (2, 4, 8)],
    *[("Euler", {}, "euler/normal", n, True) for n in (2, 4, 8)],
    ("ink, DPM++ 2M karras", {"ink": 1.0}, "dpmpp_2m/karras", 25, True),
    ("0.8 ink + LCM-LoRA, LCM Kit", {"ink": 0.8, "lcm": 1.0}, "lcm", 4, False),
    ("0.8 ink, DPM++ 2M karras", {"ink": 0.8}, "dpmpp_2m/karras", 4, True),
]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--cfg", type=float, default=TEACHER_CFG, help="guidance of the teacher and the baselines")
    args = parser.parse_args()

    judge, studio = classifier.load(), Studio()
    concept = torch.arange(len(NAMES))

    def run(loras, way, steps, guided, offset):
        features, right, inked, seconds = [], [], [], 0.0
        model = studio.patched(**loras)
        for seed in range(args.seeds):
            begin = time.monotonic()
            pictures = studio.draw(model, way, steps, 1000 * offset + seed, args.cfg if guided else 1.0)
            seconds += time.monotonic() - begin
            features.append(judge.features(pictures))
            by_concept, by_style = judge(pictures)
            right.append((by_concept.argmax(1) == concept).float().mean().item())
            inked.append((by_style.argmax(1) == 1).float().mean().item())
        return torch.cat(features), right, inked, seconds / args.seeds / len(NAMES)

    reference, *_ = run({}, "ddim/ddim_uniform", 50, True, 0)
    rows = []
    for name, loras, way, steps, guided in tqdm(WAYS):
        if not set(loras) <= set(studio.loras):
            continue
        features, right, inked, seconds = run(loras, way, steps, guided, 1)
        rows.append({
            "name": name, "steps": steps, "calls": steps * (2 if guided else 1),
            "score": sum(right) / len(right), "score_low": min(right), "score_high": max(right),
            "ink": sum(inked) / len(inked), "frechet": frechet(features, reference), "seconds": seconds,
        })  # fmt: skip
    (DEMO / "evaluation.json").write_text(
        json.dumps({"cfg": args.cfg, "seeds": args.seeds, "pictures": args.seeds * len(NAMES), "rows": rows}, indent=1)
        + "\n"
    )
    print("| way | steps | model calls | names the prompt | style ink | Frechet to teacher | ms a picture |")
    print("| --- | --- | --- | --- | --- | --- | --- |")
    for r in rows:
        print(
            f"| {r['name']} | {r['steps']} | {r['calls']} | {r['score']:.1%} ({r['score_low']:.0%} to "
            f"{r['score_high']:.0%}) | {r['ink']:.1%} | {r['frechet']:.3f} | {r['seconds'] * 1000:.1f} |"
        )


if __name__ == "__main__":
    main()
