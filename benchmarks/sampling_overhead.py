"""What LCM Kit's sampler costs beyond the model calls, against ComfyUI's own "lcm" sampler, in time and in memory.

    COMFYUI_PATH=.comfyui .venv/bin/python benchmarks/sampling_overhead.py

The model returns a tensor that was ready before, so all that is left is the sampler: the noise of each step, the
arithmetic, the progress bar. Both are called as ComfyUI calls them, through KSAMPLER.sample, with the same noise levels,
alternately, on one thread; a time is the smallest of many, in CPU time of that thread. Prints Markdown, as kept in
benchmarks/RESULTS.md.
"""

import os
import time
import warnings

from setting import markdown

import torch
from against_core import prepare

# name -> shape of the latent, model type, runs of each sampler and number of steps
LATENTS = {
    "SD1.5, 512 x 512": ((1, 4, 64, 64), "EPS", 600),
    "SD1.5, 512 x 512, batch of 4": ((4, 4, 64, 64), "EPS", 200),
    "video, 81 frames of 832 x 480": ((1, 16, 21, 60, 104), "FLOW", 9),
}
STEPS = (4, 10, 50)


def stand_in(shape, model_type):
    """A MODEL with ComfyUI's noise levels and forward process, but no network."""
    import comfy.model_base
    import comfy.model_patcher
    import comfy.supported_models_base

    config = comfy.supported_models_base.BASE({"disable_unet_model_creation": True})
    config.latent_format = comfy.latent_formats.SD15()
    model = comfy.model_base.BaseModel(config, model_type=comfy.model_base.ModelType[model_type])
    return comfy.model_patcher.ModelPatcher(model, load_device="cpu", offload_device="cpu")


def ready_model(patcher, answer):
    """What KSAMPLER gets for a model: a guider. This one returns the answer at once."""
    import comfy.samplers

    class Ready(comfy.samplers.CFGGuider):
        def __call__(self, x, timestep, model_options=None, seed=None):
            return answer

    guider = Ready(patcher)
    guider.inner_model = patcher.model
    return guider


def runs(shape, model_type):
    """{name: run(steps)} of the two samplers on one latent."""
    import comfy.samplers

    from lcm_kit.host.sampling.sampling import lcm_sampler
    from lcm_kit.host.sampling.schedules import lcm_sigmas

    patcher = stand_in(shape, model_type)
    generator = torch.Generator().manual_seed(0)
    answer, noise, latent = (torch.randn(shape, generator=generator) for _ in range(3))
    guider = ready_model(patcher, answer)
    samplers = {
        "ours": lcm_sampler(gamma=1.0, seed=-1, batch_indices=list(range(shape[0]))),
        "core": comfy.samplers.sampler_object("lcm"),
    }
    sigmas = {n: lcm_sigmas(patcher, steps=n, denoise=1.0, original_steps=50) for n in STEPS}

    def run(sampler, steps):
        arguments = {"model_options": {}, "seed": 1}
        return sampler.sample(guider, sigmas[steps], arguments, None, noise.clone(), latent, None, disable_pbar=True)

    return {name: lambda steps, sampler=sampler: run(sampler, steps) for name, sampler in samplers.items()}


def least_times(runs, count):
    """{(name, steps): seconds}, the smallest of `count`, taken alternately; short runs are repeated within each."""
    times = {}
    for _ in range(count):
        for steps in STEPS:
            repeats = max(STEPS) // steps
            for name, run in runs.items():
                start = time.thread_time()
                for _ in range(repeats):
                    run(steps)
                taken = (time.thread_time() - start) / repeats
                times[name, steps] = min(taken, times.get((name, steps), taken))
    return times


def peak_bytes(run, steps):
    """Most bytes that torch's CPU allocator held at once during the run, beyond what it held before."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that it would clear events between cycles, of which there is one
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
            run(steps)
    # The public list of events leaves out what falls between operators.
    events = [event for event in profile.profiler.kineto_results.events() if event.name() == "[memory]"]
    held = most = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        held += event.nbytes()
        most = max(most, held)
    return most


def main() -> None:
    prepare()
    torch.set_num_threads(1)
    import comfy.latent_formats  # noqa: F401

    rows = []
    with torch.inference_mode():
        for name, (shape, model_type, count) in LATENTS.items():
            samplers = runs(shape, model_type)
            times = least_times(samplers, count)
            step = {who: (times[who, 50] - times[who, 10]) / 40 for who in samplers}
            whole = {who: times[who, 4] for who in samplers}
            size = torch.Size(shape).numel() * 4
            peak = {who: peak_bytes(run, 4) / size for who, run in samplers.items()}
            cells = [
                f"{in_words(t['ours'])}, {in_words(t['core'])}, **{t['ours'] / t['core']:.2f}**" for t in (step, whole)
            ]
            memory = f"{peak['ours']:.2f}, {peak['core']:.2f}, **{peak['ours'] / peak['core']:.2f}**"
            rows.append([f"{name} {'x'.join(map(str, shape))}", *cells, memory])
    columns = ["latent", "a further step: ours, core, ratio", "a run of 4 steps: ours, core, ratio"]
    print(markdown([*columns, "peak memory, in latents"], rows))


def in_words(seconds: float) -> str:
    return f"{seconds * 1e3:.2f} ms" if seconds >= 1e-3 else f"{seconds * 1e6:.0f} us"


if __name__ == "__main__":
    # Waiting threads would spin on the cores that the measured one needs.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    main()
