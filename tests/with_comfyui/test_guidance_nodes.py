"""Core's guidance nodes together with LCM Kit's samplers, and guidance in the first steps only."""

import comfy.sample
import comfy.samplers
import comfy_extras.nodes_post_processing  # noqa: F401 - it and nodes_latent import each other, in this order only
import pytest
import torch
from comfy.model_base import ModelType
from comfy_extras import (
    nodes_apg,
    nodes_cfg,
    nodes_eps,
    nodes_fresca,
    nodes_latent,
    nodes_mahiro,
    nodes_pag,
    nodes_perpneg,
    nodes_sag,
)
from comfy_extras import nodes_custom_sampler as custom
from comfy_extras import nodes_tcfg as tcfg
from comfy_extras.nodes_model_advanced import RescaleCFG

from lcm_kit.nodes.guidance import LCMNegativePrompt
from lcm_kit.nodes.sampling import LCMKSampler, LCMSampler
from lcm_kit.nodes.scheduling import LCMScheduler
from lcm_kit.tests.helpers import relative
from lcm_kit.tests.with_comfyui import tiny

SEED = 5
CFG = 1.7

# Nodes that combine the positive and the negative prediction: at cfg 1 there is nothing to combine.
COMBINING = {
    "none": lambda model: model,
    "RescaleCFG": lambda model: RescaleCFG().patch(model, 0.7)[0],
    "APG": lambda model: nodes_apg.APG.execute(model, 0.5, 5.0, 0.0).result[0],
    "APG with momentum": lambda model: nodes_apg.APG.execute(model, 0.5, 5.0, -0.5).result[0],
    "TCFG": lambda model: tcfg.TCFG.execute(model).result[0],
    "FreSca": lambda model: nodes_fresca.FreSca.execute(model, 1.0, 1.25, 2).result[0],
    "CFGZeroStar": lambda model: nodes_cfg.CFGZeroStar.execute(model).result[0],
    "CFGNorm": lambda model: nodes_cfg.CFGNorm.execute(model, 1.0).result[0],
    "Mahiro": lambda model: nodes_mahiro.Mahiro.execute(model).result[0],
    "PerpNeg": lambda model: nodes_perpneg.PerpNeg.execute(model, tiny.cond(4), 1.0).result[0],
}
# Nodes that do something of their own at every cfg.
ALWAYS = {
    "PAG": lambda model: nodes_pag.PerturbedAttentionGuidance.execute(model, 1.0).result[0],
    "SAG": lambda model: nodes_sag.SelfAttentionGuidance.execute(model, 0.5, 2.0).result[0],
    # Of the guidance, or of the prediction where that is alone.
    "LatentApplyOperationCFG": lambda model: nodes_latent.LatentApplyOperationCFG.execute(
        model, nodes_latent.LatentOperationTonemapReinhard.execute(1.0).result[0]
    ).result[0],
    "EpsilonScaling": lambda model: nodes_eps.EpsilonScaling.execute(model, 1.05).result[0],
    "LCM Negative Prompt": lambda model: LCMNegativePrompt.execute(model, tiny.cond(3), 3.0, 2.5, 0.5, -1).result[0],
}
NODES = COMBINING | ALWAYS


pytestmark = pytest.mark.usefixtures("no_gradients")


@pytest.fixture(scope="module")
def model():
    return tiny.tiny_model(ModelType.V_PREDICTION, **tiny.WITH_MIDDLE)  # some nodes patch the middle


def lcm(model, **changed):
    """LCM KSampler, whose guider is ours."""
    inputs = {"positive": tiny.cond(1), "negative": tiny.cond(2), "seed": SEED, "steps": 2, "cfg": CFG, "denoise": 1.0}
    inputs |= {"gamma": 1.0, "cfg_steps": -1, "original_steps": 50, "latent_image": tiny.latent()}
    return LCMKSampler.execute(model=model, **inputs | changed).result[0]["samples"]


def schedule(model, steps=2):
    return LCMScheduler.execute(model, steps, 1.0, 50, "").result[0]


def ours(gamma=1.0):
    return LCMSampler.execute(gamma, -1).result[0]


def core(model, cfg=CFG, *, sampler=None, sigmas=None, latent=None):
    """SamplerCustom, whose guider is core's. latent: goes on from there, without new noise."""
    sigmas = schedule(model) if sigmas is None else sigmas
    inputs = (tiny.cond(1), tiny.cond(2), sampler or ours(), sigmas, latent or tiny.latent())
    return custom.SamplerCustom.execute(model, latent is None, SEED, cfg, *inputs).result[0]["samples"]


def advanced(guider, model, sampler):
    noise = custom.RandomNoise.execute(SEED).result[0]
    inputs = (noise, guider, sampler, schedule(model), tiny.latent())
    return custom.SamplerCustomAdvanced.execute(*inputs).result[0]["samples"]


@pytest.mark.parametrize("name", NODES)
def test_our_guider_gives_what_cores_does_to_the_bit(model, name):
    # patched twice: some of these nodes remember the last run
    assert torch.equal(lcm(NODES[name](model)), core(NODES[name](model)))


@pytest.mark.parametrize("name", [name for name in COMBINING if name != "none"])
def test_these_nodes_do_something_here(model, name):
    """Else the comparisons above would prove nothing."""
    assert relative(lcm(NODES[name](model)), lcm(model)) > 1e-3


@pytest.mark.parametrize("name", NODES)
def test_cfg_steps_is_the_patched_cfg_and_then_cfg_one(model, name):
    """Two runs of core's guider, the second at cfg 1: without the node, where all it does is to combine."""
    sigmas = schedule(model)
    first = core(NODES[name](model), sigmas=sigmas[:2])
    then = model if name in COMBINING else NODES[name](model)
    expected = core(then, 1.0, sigmas=sigmas[1:], latent={"samples": first})
    # float32 rounding: the latent goes through the model's latent scale between the runs
    assert relative(lcm(NODES[name](model), cfg_steps=1), expected) < 1e-5


@pytest.mark.parametrize("name", COMBINING)
@pytest.mark.parametrize("off", [{"cfg": 1.0}, {"cfg_steps": 0}])
def test_where_nothing_is_guided_a_node_that_combines_changes_nothing(model, name, off):
    """Core hands such nodes zeros in place of the negative prediction, which APG and PerpNeg take for one."""
    # float32 rounding: some of them still go through their formula
    assert relative(lcm(NODES[name](model), **off), lcm(model, cfg=1.0)) < 1e-5


@pytest.mark.parametrize("name", ALWAYS)
def test_at_cfg_one_the_other_nodes_give_what_they_do_with_core(model, name):
    assert torch.equal(lcm(NODES[name](model), cfg=1.0), core(NODES[name](model), 1.0))


@pytest.mark.parametrize(
    ("name", "calls"), [("none", 3), ("RescaleCFG", 3), ("APG", 3), ("TCFG", 3), ("PAG", 5), ("SAG", 6)]
)
def test_model_calls_with_one_guided_step_of_two(model, name, calls):
    """PAG adds one in each step; SAG adds one and looks at the negative prompt in each."""
    counted, seen = tiny.count_calls(model)
    lcm(NODES[name](counted), cfg_steps=1)
    assert seen.calls == calls


GUIDERS = {
    "BasicGuider": lambda model: custom.BasicGuider.execute(model, tiny.cond(1)),
    "CFGGuider": lambda model: custom.CFGGuider.execute(model, tiny.cond(1), tiny.cond(2), CFG),
    "DualCFGGuider": lambda model: custom.DualCFGGuider.execute(
        model, tiny.cond(1), tiny.cond(2), tiny.cond(4), CFG, 1.2, "regular"
    ),
    "DualCFGGuider, nested": lambda model: custom.DualCFGGuider.execute(
        model, tiny.cond(1), tiny.cond(2), tiny.cond(4), CFG, 1.2, "nested"
    ),
    "PerpNegGuider": lambda model: nodes_perpneg.PerpNegGuider.execute(
        model, tiny.cond(1), tiny.cond(2), tiny.cond(4), CFG, 0.5
    ),
}


@pytest.mark.parametrize("name", GUIDERS)
@pytest.mark.parametrize("node", ["none", "RescaleCFG", "PAG"])
def test_our_sampler_under_every_guider_of_core(model, name, node):
    """At gamma 0 it is core's Euler sampler, which is another program; at gamma 1 it must at least be finite."""
    patched = NODES[node](model)
    euler = advanced(GUIDERS[name](patched).result[0], model, comfy.samplers.sampler_object("euler"))
    assert relative(advanced(GUIDERS[name](patched).result[0], model, ours(0.0)), euler) < 1e-5
    assert torch.isfinite(advanced(GUIDERS[name](patched).result[0], model, ours())).all()


def test_a_node_that_needs_the_negative_prompt_asks_for_it(model):
    with pytest.raises(ValueError, match=r"such as Self-Attention Guidance, .*none is connected"):
        lcm(ALWAYS["SAG"](model), cfg=1.0, negative=None)


@pytest.mark.skipif(not hasattr(custom, "CFGOverride"), reason="this ComfyUI has no CFG Override yet")
def test_a_node_that_overrides_cfg_guides_as_with_core_or_asks_for_a_negative_prompt(model):
    patched = custom.CFGOverride.execute(model, 3.0, 0.0, 0.6).result[0]
    assert relative(lcm(patched, cfg=1.0), lcm(model, cfg=1.0)) > 1e-3
    assert torch.equal(lcm(patched, cfg=1.0), core(patched, 1.0))
    with pytest.raises(ValueError, match=r"such as CFG Override, sets cfg to 3, and there is no negative prompt"):
        lcm(patched, cfg=1.0, negative=None)
