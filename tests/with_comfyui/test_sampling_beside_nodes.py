"""Beside core's nodes that patch a model, draw, or say where and when a prompt holds: one picture a seed, and core's maths.

The oracle is core's sample_lcm in core's SamplerCustom, with our schedule and our step noise.
"""

from functools import cache

import comfy.controlnet
import comfy.hooks
import node_helpers
import nodes
import pytest
import torch
from comfy.model_base import ModelType
from comfy_extras import (
    nodes_apg,
    nodes_cfg,
    nodes_differential_diffusion,
    nodes_eps,
    nodes_freelunch,
    nodes_fresca,
    nodes_hypertile,
    nodes_mahiro,
    nodes_model_downscale,
    nodes_pag,
    nodes_sag,
    nodes_tcfg,
    nodes_tomesd,
)
from comfy_extras import nodes_custom_sampler as custom
from comfy_extras.nodes_model_advanced import RescaleCFG

from lcm_kit.tests.helpers import relative
from lcm_kit.tests.with_comfyui import tiny
from lcm_kit.tests.with_comfyui.sampled import (
    CAT,
    DOG,
    SEED,
    cores_sampler,
    ksampler,
    ours,
    picture,
    scheduled,
)

pytestmark = pytest.mark.usefixtures("no_gradients")

OTHER = tiny.cond(3)


@cache
def made(kind):
    if kind == "inpaint":
        model = tiny.small_model(ModelType.V_PREDICTION, in_channels=9)
        model.model.set_inpaint()
        return model
    if kind == "attention":
        # At the picture's own size, where HyperTile and Token Merging work. A flow model, so without boundary scalings.
        return tiny.tiny_model(ModelType.FLOW)
    return tiny.tiny_model(ModelType.V_PREDICTION, **tiny.WITH_MIDDLE)  # some nodes patch the middle


@pytest.fixture(autouse=True, scope="module")
def _models_are_let_go():
    yield
    made.cache_clear()


def result_of(output):
    return getattr(output, "result", output)[0]


def masked(latent):
    mask = torch.zeros(1, *latent["samples"].shape[2:])
    mask[..., :5] = 1.0
    return nodes.SetLatentNoiseMask().set_mask(latent, mask)[0]


def graded(latent):
    """A mask that falls from left to right, which Differential Diffusion turns into one for each step."""
    height, width = latent["samples"].shape[2:]
    mask = torch.linspace(1, 0, width).expand(1, height, width)
    return nodes.SetLatentNoiseMask().set_mask(latent, mask)[0]


# Node -> the MODEL that it makes, and on which model.
PATCHES = {
    "HyperTile": ("attention", lambda model: nodes_hypertile.HyperTile.execute(model, 32, 8, 0, False)),
    "Token Merging": ("attention", lambda model: nodes_tomesd.TomePatchModel.execute(model, 0.5)),
    "PAG": ("plain", lambda model: nodes_pag.PerturbedAttentionGuidance.execute(model, 1.0)),
    "SAG": ("plain", lambda model: nodes_sag.SelfAttentionGuidance.execute(model, 0.5, 2.0)),
    "FreSca": ("plain", lambda model: nodes_fresca.FreSca.execute(model, 1.0, 1.5, 2)),
    "TCFG": ("plain", lambda model: nodes_tcfg.TCFG.execute(model)),
    "FreeU V2": ("plain", lambda model: nodes_freelunch.FreeU_V2.execute(model, 1.3, 1.4, 0.9, 0.2)),
    "Deep Shrink": (
        "plain",
        lambda model: nodes_model_downscale.PatchModelAddDownscale.execute(
            model, 1, 2.0, 0.0, 0.35, True, "bicubic", "bicubic"
        ),
    ),
    "RescaleCFG": ("plain", lambda model: RescaleCFG().patch(model, 0.7)),
    "APG": ("plain", lambda model: nodes_apg.APG.execute(model, 0.5, 5.0, -0.5)),
    "CFGZeroStar": ("plain", lambda model: nodes_cfg.CFGZeroStar.execute(model)),
    "Mahiro": ("plain", lambda model: nodes_mahiro.Mahiro.execute(model)),
    "EpsilonScaling": ("plain", lambda model: nodes_eps.EpsilonScaling.execute(model, 1.05)),
}


# Token Merging joins the most alike tokens. Two pairs that are alike to float rounding are joined the one way or the
# other, and the pictures part; in this one there are none.
PICTURES = {"Token Merging": 11}


def patched(name):
    def setup():
        kind, patch = PATCHES[name]
        return result_of(patch(made(kind))), CAT, DOG, picture(size=16, batch=2, seed=PICTURES.get(name, 9))

    return setup


class MiddleControl(comfy.controlnet.ControlBase):
    """A ControlNet whose net is a constant for the UNet's middle block."""

    def __init__(self, percents):
        super().__init__()
        self.timestep_percent_range = percents

    def get_control(self, x_noisy, t, cond, batched_number, transformer_options):
        first, last = self.timestep_range
        if t[0] > first or t[0] < last:
            return None
        half = [side // 2 for side in x_noisy.shape[2:]]
        return {"middle": [torch.linspace(-1, 1, 64)[None, :, None, None].expand(len(x_noisy), 64, *half)]}


def controlled(start, end, to_all):
    def setup():
        control = {"control": MiddleControl((start, end)), "control_apply_to_uncond": to_all}
        return made("plain"), node_helpers.conditioning_set_values(CAT, control), DOG, picture(batch=2)

    return setup


def regional():
    left = nodes.ConditioningSetArea().append(OTHER, 32, 64, 0, 0, 1.0)[0]
    corner = torch.zeros(1, 8, 8)
    corner[:, 4:, 4:] = 1.0
    masked_prompt = nodes.ConditioningSetMask().append(tiny.cond(4), corner, "default", 0.8)[0]
    return made("plain"), CAT + left + masked_prompt, DOG, picture(batch=2)


def prompt_ranges():
    early = nodes.ConditioningSetTimestepRange().set_range(CAT, 0.0, 0.4)[0]
    late = nodes.ConditioningSetTimestepRange().set_range(OTHER, 0.4, 1.0)[0]
    return made("plain"), early + late, DOG, picture(batch=2)


def lora_hook():
    """A LoRA that holds for one prompt alone."""
    model = made("plain")
    hooks = {"hooks": comfy.hooks.create_hook_lora(tiny.lora(model), 0.5, 0.0)}
    return model, node_helpers.conditioning_set_values(CAT, hooks), DOG, picture(batch=2)


def inpaint_model():
    latent = masked(picture(batch=2))
    concat = {"concat_latent_image": picture(batch=1, seed=4)["samples"], "concat_mask": latent["noise_mask"]}
    prompts = (node_helpers.conditioning_set_values(prompt, concat) for prompt in (CAT, DOG))
    return made("inpaint"), *prompts, latent


def differential():
    model = result_of(nodes_differential_diffusion.DifferentialDiffusion.execute(made("plain")))
    return model, CAT, DOG, graded(picture(batch=2))


SETUPS = {name: patched(name) for name in PATCHES} | {
    "Differential Diffusion": differential,
    "ControlNet": controlled(0.0, 1.0, False),
    "ControlNet at first": controlled(0.0, 0.5, True),
    "ControlNet later": controlled(0.5, 1.0, True),
    "regional prompts": regional,
    "prompts of some steps": prompt_ranges,
    "LoRA hook": lora_hook,
    "inpaint model": inpaint_model,
}
EVERY_SETUP = pytest.mark.parametrize("name", SETUPS)


def ours_alone(name, cfg, **changed):
    model, positive, negative, latent = SETUPS[name]()
    return ksampler(model, latent, positive=positive, negative=negative, cfg=cfg, **changed)


def sampler_custom(name, cfg, sampler):
    model, positive, negative, latent = SETUPS[name]()
    return custom.SamplerCustom.execute(
        model, True, SEED, cfg, positive, negative, sampler, scheduled(model), latent
    ).result[0]["samples"]


# Where nothing is guided, core hands these zeros for a prediction; our guider hands them the positive one.
UNDEFINED = {("RescaleCFG", 1.0), ("APG", 1.0)}


@EVERY_SETUP
@pytest.mark.parametrize("cfg", [1.0, 1.5])
def test_it_is_one_picture_and_cores_maths(name, cfg):
    state = torch.get_rng_state()
    once = ours_alone(name, cfg)
    torch.rand(3)
    assert torch.equal(ours_alone(name, cfg), once)
    if (name, cfg) not in UNDEFINED:
        assert torch.equal(sampler_custom(name, cfg, ours()), once)
        assert relative(sampler_custom(name, cfg, cores_sampler()), once) < 2e-5
    torch.set_rng_state(state)
    ours_alone(name, cfg)
    assert torch.equal(torch.get_rng_state(), state)


@EVERY_SETUP
def test_it_does_something_here(name):
    """Else the comparison above would prove nothing."""
    _, _, _, latent = SETUPS[name]()
    kind = "inpaint" if name == "inpaint model" else PATCHES.get(name, ("plain",))[0]
    bare = {"samples": latent["samples"]}
    assert relative(ours_alone(name, 1.5), ksampler(made(kind), bare, negative=DOG, cfg=1.5)) > 1e-4


DRAW_OR_REMEMBER = {"HyperTile", "Token Merging", "APG"}
MASKED = {"Differential Diffusion", "inpaint model"}


@pytest.mark.parametrize("name", sorted(SETUPS.keys() - DRAW_OR_REMEMBER - MASKED))
def test_two_sections_are_the_undivided_run(name):
    """Not beside nodes that draw or remember from step to step, nor under a mask: as in core, the second section has no
    noise for what the mask keeps.
    """
    model, positive, negative, latent = SETUPS[name]()
    undivided = ours_alone(name, 1.5)
    first = ours_alone(name, 1.5, end_at_step=2, return_with_leftover_noise=True)
    rest = ksampler(
        model,
        latent | {"samples": first},
        positive=positive,
        negative=negative,
        cfg=1.5,
        start_at_step=2,
        add_noise=False,
    )
    assert torch.equal(rest, undivided)
