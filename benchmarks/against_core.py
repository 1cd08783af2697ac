"""How far ComfyUI's usual LCM set-ups and LCM Kit are from diffusers' LCMScheduler, on the embedded model.

    COMFYUI_PATH=.comfyui .venv/bin/python benchmarks/against_core.py

Same UNet with its LCM-LoRA, same prompts, same initial noise and same noise after every step, so that all that can
differ is the schedule and the arithmetic. Two tables: the distance of the finished latents, and at which timestep a
run with denoise < 1 starts. Prints Markdown, as kept in benchmarks/RESULTS.md.
"""

import warnings

from setting import embedded, load_comfyui, markdown

import torch

PROMPTS = ["cat face", "rocket", "pizza", "red heart blue background"]
STEPS = (1, 2, 4, 8)
STRENGTHS = (0.3, 0.5, 0.58, 0.6, 0.7, 0.75, 0.8, 0.9)
SETUPS = {
    "LCM Kit": None,
    'core: ModelSamplingDiscrete "lcm" + simple': (True, "simple"),
    'core: ModelSamplingDiscrete "lcm" + sgm_uniform': (True, "sgm_uniform"),
    "core: plain model + simple": (False, "simple"),
    "core: plain model + sgm_uniform": (False, "sgm_uniform"),
    "core: plain model + normal": (False, "normal"),
}


def prepare() -> None:
    """ComfyUI, the demo's model pack and LCM Kit, importable; done before anything of ComfyUI is touched."""
    load_comfyui()
    import comfy.supported_models
    from tiny_emoji.model import TinyEmoji

    comfy.supported_models.models.insert(0, TinyEmoji)


def load():
    """(model with its LCM-LoRA, conditioning)."""
    model, clip, _ = embedded()
    encoded = [clip.encode_from_tokens_scheduled(clip.tokenize(p))[0][0] for p in PROMPTS]
    return model, [[torch.cat(encoded), {}]]


def level_numbers_of(model, steps: int) -> list[int]:
    """What our step noise is asked for after each step of our schedule; other schedules get the same noise."""
    from lcm_kit.host.sampling.sampling import lcm_sigmas
    from lcm_kit.host.sampling.tables import sigma_table
    from lcm_kit.samplers.noise import level_numbers

    sigmas = lcm_sigmas(model, steps=steps, denoise=1.0, original_steps=50)
    return level_numbers(sigmas[1:], sigma_table(model.get_model_object("model_sampling")))


def reference(model, context, steps: int, noise, step_noise) -> torch.Tensor:
    """diffusers' LCMScheduler around the same UNet, in the variance-preserving space it works in."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from diffusers.schedulers import scheduling_lcm
    scheduler = scheduling_lcm.LCMScheduler(prediction_type="v_prediction")
    scheduler.set_timesteps(steps)
    drawn, levels = iter(range(steps)), level_numbers_of(model, steps)
    scheduling_lcm.randn_tensor = lambda *args, **kwargs: step_noise(levels[next(drawn)], noise)
    x = noise
    with torch.no_grad():
        for t in scheduler.timesteps:
            output = model.model.diffusion_model(x, torch.full((len(x),), float(t)), context=context)
            x, denoised = scheduler.step(output, t, x, return_dict=False)
    return denoised


def sampled(model, positive, setup, steps: int, noise, step_noise) -> torch.Tensor:
    """One set-up through ComfyUI's own sampling function."""
    import comfy.sample
    import comfy.samplers
    from comfy.k_diffusion import sampling as core
    from comfy_extras.nodes_model_advanced import ModelSamplingDiscrete

    from lcm_kit.host.sampling import sampling as ours
    from lcm_kit.host.sampling import schedules

    if setup is None:
        sampler = ours.lcm_sampler(gamma=1.0, seed=step_noise.seed)
        sigmas = schedules.lcm_sigmas(model, steps=steps, denoise=1.0, original_steps=50)
    else:
        patch, scheduler = setup
        if patch:
            # The node's own choice of prediction is epsilon; this model predicts v, so only its schedule is taken.
            (patched,) = ModelSamplingDiscrete().patch(model, "lcm", False)
            distilled = type(patched.get_model_object("model_sampling")).__mro__[1]
            model = model.clone()
            model.add_object_patch("model_sampling", with_schedule(model, distilled))
        sigmas = comfy.samplers.calculate_sigmas(model.get_model_object("model_sampling"), scheduler, steps)
        drawn, levels = iter(range(steps)), level_numbers_of(model, steps)
        sampler = comfy.samplers.KSAMPLER(
            lambda *args, **kwargs: core.sample_lcm(
                *args, **kwargs, noise_sampler=lambda sigma, sigma_next: step_noise(levels[next(drawn)], noise)
            )
        )
    latent = torch.zeros_like(noise)
    return comfy.sample.sample_custom(
        model, noise, 1.0, sampler, sigmas, positive, positive, latent, disable_pbar=True, seed=step_noise.seed
    )


def with_schedule(model, schedule):
    """ModelSamplingDiscrete's shortened schedule around v-prediction: core's own patch would take v for epsilon."""
    import comfy.model_sampling

    class Both(schedule, comfy.model_sampling.V_PREDICTION):
        pass

    return Both(model.model.model_config)


def main() -> None:
    prepare()
    from lcm_kit.samplers.noise import StepNoise

    model, positive = load()
    generator = torch.Generator().manual_seed(0)
    channels = model.model.latent_format.latent_channels
    noise = torch.randn(len(PROMPTS), channels, 8, 8, generator=generator)
    step_noise = StepNoise(1)
    expected = {n: reference(loaded(model), positive[0][0], n, noise, step_noise) for n in STEPS}
    scale = expected[4].std().item()
    print(f"Largest difference from diffusers' LCMScheduler, in latents of standard deviation {scale:.2f}:\n")
    rows = []
    for name, setup in SETUPS.items():
        differences = (sampled(model, positive, setup, n, noise, step_noise) - expected[n] for n in STEPS)
        rows.append([name, *(f"{difference.abs().max().item():.1e}" for difference in differences)])
    print(markdown(["set-up", *(f"{n} step{'s' * (n > 1)}" for n in STEPS)], rows))

    print("\nTimestep at which a run starts:\n")
    starts = start_timesteps(model.get_model_object("model_sampling"))
    print(markdown(["denoise", *STRENGTHS], ([name, *timesteps] for name, timesteps in starts.items())))


def start_timesteps(sampling) -> dict[str, list[int]]:
    """Row by row: what was asked for, where LCM Kit and diffusers start, and where core's KSampler does."""
    import comfy.samplers
    from diffusers.schedulers.scheduling_lcm import LCMScheduler

    from lcm_kit.samplers.schedule import lcm_timesteps

    def diffusers(steps, strength):
        scheduler = LCMScheduler()
        scheduler.set_timesteps(steps, strength=strength)
        return int(scheduler.timesteps[0])

    def core(steps, strength):
        # As KSampler.set_steps counts: a longer schedule, of which the last steps are run.
        sigmas = comfy.samplers.calculate_sigmas(sampling, "simple", int(steps / strength))[-(steps + 1) :]
        return round(float(sampling.timestep(sigmas[:1])[0]))

    rows = {"asked for: denoise of 1000": [round(1000 * s) - 1 for s in STRENGTHS]}
    for name, start in {
        "LCM Kit": lambda steps, s: lcm_timesteps(steps, strength=s)[0],
        "diffusers": diffusers,
        "core: KSampler, simple": core,
    }.items():
        starts = {steps: [start(steps, s) for s in STRENGTHS] for steps in STEPS}
        if all(row == starts[STEPS[0]] for row in starts.values()):
            rows[f"{name}, any number of steps"] = starts[STEPS[0]]
        else:
            rows |= {f"{name}, {n} step{'s' * (n > 1)}": row for n, row in starts.items()}
    return rows


def loaded(model):
    """The model with its patches in the weights, for use without ComfyUI's sampler."""
    import comfy.model_management

    comfy.model_management.load_models_gpu([model], force_full_load=True)
    return model


if __name__ == "__main__":
    main()
