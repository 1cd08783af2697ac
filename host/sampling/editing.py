"""Edits a LATENT by two prompts through ComfyUI's own sampling road: DDCM of samplers/editing.py as guider and sampler.

Both prompts are conds of one guider, so models, hooks, ControlNets, areas and previews are handled as in any sampling.
"""

import copy
import logging
import math

import comfy.model_management
import comfy.samplers
import comfy.utils

from ...samplers.editing import edit_ddcm
from ...samplers.noise import StepNoise
from .guidance import FirstStepsGuider
from .latents import fitted, given_out, has_picture
from .runs import run
from .schedules import lcm_sigmas
from .tables import forward_process, sigma_table

logger = logging.getLogger(__name__)

# Which prompt a prediction is for; rides in the model_options, which ComfyUI hands through to the guider.
PROMPT = "lcm_kit_prompt"


class TwoPromptsGuider(FirstStepsGuider):
    """Predicts for the source or the target prompt, as model_options[PROMPT] says.

    The source prompt is predicted alone. The target prompt is guided away from the source by cfg. The same calls, so
    two equal prompts give equal predictions at any cfg, whatever other nodes have put on the model.
    """

    def set_conds(self, source, target):
        # Not "negative": some models (the SDXL refiner) are told another aesthetic score under that name. "positive"
        # is the one whose ControlNets ComfyUI extends to the others, where their node asks for it.
        self.inner_set_conds({"positive": target, "source": source})

    def predict_noise(self, x, timestep, model_options=None, seed=None):
        source, target = self.conds["source"], self.conds["positive"]
        asked = copy.copy(self)
        if model_options[PROMPT] == "source":
            asked.conds, asked.last_guided_sigma = {"positive": source, "negative": source}, math.inf
        else:
            asked.conds = {"positive": target, "negative": source}
        return super(TwoPromptsGuider, asked).predict_noise(x, timestep, model_options, seed)


class EditSampler(comfy.samplers.Sampler):
    """ComfyUI's sampler protocol around edit_ddcm. batch_indices: (b,), numbers of the images for their noise."""

    def __init__(self, seed, batch_indices, keep):
        self.noise = StepNoise(seed, batch_indices)
        self.keep = keep

    def sample(
        self, model_wrap, sigmas, extra_args, callback, noise, latent_image=None, denoise_mask=None, disable_pbar=False
    ):
        """The edited latent. noise: only its shape matters; every step draws its own."""
        model = comfy.samplers.KSamplerX0Inpaint(model_wrap, sigmas)
        model.latent_image = latent_image
        options, seed = extra_args.get("model_options", {}), extra_args.get("seed")
        calls = 2 * (len(sigmas) - 1)
        model_sampling = model_wrap.model_patcher.get_model_object("model_sampling")

        def prompted(prompt):
            return lambda x, sigma: model(x, sigma, denoise_mask, model_options=options | {PROMPT: prompt}, seed=seed)

        def step_noise(level, like):
            # Outside a noise mask KSamplerX0Inpaint puts the picture with this noise: the very input it had there.
            model.noise = self.noise(level, like)
            return model.noise

        def after_call(info):
            # The server's progress hook raises too, but only where a progress bar is attached.
            comfy.model_management.throw_exception_if_processing_interrupted()
            if callback is not None:
                callback(info["i"], info["denoised"], info["x"], calls)

        return edit_ddcm(
            prompted("source"),
            prompted("target"),
            latent_image,
            sigmas,
            noise=step_noise,
            keep=self.keep,
            callback=after_call,
            disable=disable_pbar,
            table=sigma_table(model_sampling),
            noise_scaling=forward_process(model_sampling),
            trange=comfy.utils.model_trange,
        )


def edit(model, source, target, latent, *, seed, steps, cfg, denoise, original_steps, keep, preset=None) -> dict:
    """A LATENT, edited. Image k of a batch is the image edited alone with batch index k.

    preset: a Preset, whose noise levels replace those of steps and original_steps, or None.
    Raises ValueError for an empty latent, or a schedule that does not exist.
    """
    if not has_picture(latent["samples"]):
        raise ValueError(
            "latent_image is empty, and an edit needs a picture to change. Connect VAE Encode, or use LCM KSampler to "
            "make a picture from nothing."
        )
    sigmas = lcm_sigmas(model, steps=steps, denoise=denoise, original_steps=original_steps, preset=preset)
    _say_what_is_not_taken(preset)
    if len(sigmas) == 0:  # denoise 0
        latent = fitted(model, latent)
        return given_out(latent, latent["samples"])
    guider = TwoPromptsGuider(model)
    guider.set_conds(source, target)
    guider.set_cfg(cfg)
    return run(
        [(guider, sigmas)],
        latent,
        lambda indices: EditSampler(seed, indices, keep),
        seed=seed,
        calls=2 * (len(sigmas) - 1),
    )


def _say_what_is_not_taken(preset) -> None:
    """A warning for a preset of a gamma or cfg that an edit has no place for."""
    given = {"cfg": preset.cfg, "gamma": preset.gamma} if preset is not None else {}
    left = [f"{name} {value:g}" if isinstance(value, float) else name for name, value in given.items() if value != 1.0]
    if left:
        logger.warning(
            "LCM Edit takes the noise levels of the preset %s, not its %s: an edit draws the noise of every step afresh, as "
            "gamma 1 does, and its cfg leads from one prompt to the other.",
            preset.name,
            " and ".join(left),
        )
