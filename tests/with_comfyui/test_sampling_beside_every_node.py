"""Every node of core that makes a MODEL of a MODEL, found by what it declares: before LCM KSampler it does what it does
before core's sampler.

The oracle is core's sample_lcm in core's SamplerCustom, with our schedule and our step noise.
"""

import asyncio
import logging
from functools import cache

import nodes
import pytest
import torch
from comfy.model_base import ModelType
from comfy_extras import nodes_custom_sampler as custom

from lcm_kit.tests.helpers import relative
from lcm_kit.tests.with_comfyui import tiny
from lcm_kit.tests.with_comfyui.families import FAMILIES
from lcm_kit.tests.with_comfyui.sampled import CAT, DOG, SEED, cores_sampler, ksampler, ours, picture, scheduled

pytestmark = pytest.mark.usefixtures("no_gradients")

# Settings where the defaults do nothing, or too little to be seen in a run of four steps.
SETTINGS = {
    "CFGOverride": {"cfg": 2.0, "end_percent": 0.6},
    "EasyCache": {"reuse_threshold": 3.0, "start_percent": 0.0, "end_percent": 1.0},
    "LazyCache": {"reuse_threshold": 3.0, "start_percent": 0.0, "end_percent": 1.0},
    "SkipLayerGuidanceSD3": {"layers": "0", "start_percent": 0.0, "end_percent": 1.0},
    "SkipLayerGuidanceDiT": {"double_layers": "0", "single_layers": "0", "start_percent": 0.0, "end_percent": 1.0},
    "SkipLayerGuidanceDiTSimple": {"double_layers": "0", "single_layers": "0", "end_percent": 1.0},
    "UNetSelfAttentionMultiply": {"q": 1.2},
    "UNetCrossAttentionMultiply": {"q": 1.2},
    "ContextWindowsManual": {"context_length": 4, "context_overlap": 1, "dim": 3},
    "ScaleROPE": {"scale_x": 1.5},
    "TomePatchModel": {"ratio": 0.5},
    "Epsilon Scaling": {"scaling_factor": 1.05},
}
# What this file has no such thing of at hand: types of inputs, and nodes that look for a file.
LACKING = {"VAE", "AUDIO", "MODEL_PATCH", "LORA_MODEL", "COMFY_DYNAMICCOMBO_V3"}
OF_FILES = {"LoraLoader", "LoraLoaderModelOnly", "LoraLoaderBypass", "LoraLoaderBypassModelOnly", "HypernetworkLoader"}
COMPILES = {"TorchCompileModel"}
# For two equal predictions, or where nothing is guided, what core makes of zeros (test_guidance_nodes.py says what we make).
UNDEFINED = {("APG", 1.0), ("RescaleCFG", 1.0), ("PerpNeg", 1.0)}
# An effect that is none of rounding's.
SEEN = 1e-4
# Doubles all weights: the picture is float32's rounding, many times over.
NO_PICTURE = {"ModelMergeAdd"}


def runs_of_four(family):
    model = FAMILIES[family]
    return model.model, model.cond(1), model.cond(2), model.latent(batch=1)


MODELS = {
    "UNet": lambda: (
        lambda: tiny.tiny_model(ModelType.V_PREDICTION, **tiny.WITH_MIDDLE),
        CAT,
        DOG,
        picture(batch=1),
    ),
    "SD3": lambda: runs_of_four("SD3"),
    "Flux": lambda: runs_of_four("Flux"),
}


@pytest.fixture(scope="module")
def patchers():
    """Name -> class, of all of core's own nodes, which are registered for this file only."""
    kept = dict(nodes.NODE_CLASS_MAPPINGS)
    asyncio.run(nodes.init_builtin_extra_nodes())
    found = {name: cls for name, cls in nodes.NODE_CLASS_MAPPINGS.items() if is_patcher(cls)}
    nodes.NODE_CLASS_MAPPINGS.clear()
    nodes.NODE_CLASS_MAPPINGS.update(kept)
    return found


def is_patcher(cls):
    inputs = cls.INPUT_TYPES()
    taken = [entry[0] for kind in ("required", "optional") for entry in inputs.get(kind, {}).values()]
    return "MODEL" in taken and "MODEL" in cls.RETURN_TYPES


def filled(name, cls, model, other):
    """The node's inputs: its defaults, and what SETTINGS has for it."""
    given = {"MODEL": model, "CONDITIONING": other, "LATENT_OPERATION": lambda latent: 0.9 * latent}
    inputs = {}
    for key, (kind, *options) in cls.INPUT_TYPES().get("required", {}).items():
        known = isinstance(kind, str) and kind in given
        inputs[key] = given[kind] if known else default(kind, *options)
    return inputs | SETTINGS.get(name, {})


def default(kind, options=None):
    options = options or {}
    choices = kind if isinstance(kind, list) else options.get("options", [])
    if "default" in options or choices:
        return options.get("default", choices[0] if choices else None)
    return {"INT": options.get("min", 0), "FLOAT": options.get("min", 0.0), "STRING": "", "BOOLEAN": False}[kind]


def patched(cls, inputs):
    output = cls.execute(**inputs) if hasattr(cls, "execute") else getattr(cls(), cls.FUNCTION)(**inputs)
    return getattr(output, "result", output)[0]


def is_tried(name, cls):
    # Merges by block have an input for each block of one whole model.
    taken = {entry[0] for entry in cls.INPUT_TYPES().get("required", {}).values() if isinstance(entry[0], str)}
    by_block = name.startswith("ModelMerge") and len(cls.INPUT_TYPES()["required"]) > 6
    return not (taken & LACKING or by_block or name in OF_FILES | COMPILES | NO_PICTURE)


def attempted(run):
    """(its result or None, its error in words)."""
    try:
        return run(), ""
    except Exception as error:
        return None, str(error).replace("\u2060", "")


@cache
def made(kind):
    """(MODEL, positive, negative and another prompt, latent)."""
    make, positive, negative, latent = MODELS[kind]()
    return make(), positive, negative, tiny.cond(3) if kind == "UNet" else FAMILIES[kind].cond(3), latent


@cache
def without(kind, cfg):
    model, positive, negative, _, latent = made(kind)
    return ksampler(model, latent, positive=positive, negative=negative, cfg=cfg)


@pytest.fixture(autouse=True, scope="module")
def _models_are_let_go():
    yield
    made.cache_clear()
    without.cache_clear()


def compared(name, cls, kind, cfg):
    """How far the node moves the picture, which is held against core's; 0 for a model that the node is not for."""
    model, positive, negative, other, latent = made(kind)
    inputs, state = filled(name, cls, model, other), torch.get_rng_state()
    # A MODEL for each side: whoever runs a prompt again samples with the one that the node made before.
    made_for = cache(lambda whom: patched(cls, inputs))

    def by_core(sampler):
        node = made_for("core")
        arguments = (node, True, SEED, cfg, positive, negative, sampler, scheduled(node), latent)
        return custom.SamplerCustom.execute(*arguments).result[0]["samples"]

    def by_us():
        return ksampler(made_for("us"), latent, positive=positive, negative=negative, cfg=cfg)

    theirs, error = attempted(lambda: by_core(cores_sampler()))
    if error:  # ours says what core says
        assert error[-40:] in attempted(by_us)[1], name
        return 0.0
    torch.set_rng_state(state)
    mine, effect = by_us(), relative(theirs, without(kind, cfg))
    assert torch.equal(torch.get_rng_state(), state), name
    assert mine.isfinite().all(), name
    if (name, cfg) not in UNDEFINED:
        assert relative(theirs, mine) < 2e-5, name
    if effect > SEEN:
        assert torch.equal(by_us(), mine), name
        assert (name, cfg) in UNDEFINED or torch.equal(by_core(ours()), mine), name
    return effect


@pytest.mark.parametrize("cfg", [1.0, 1.5])
def test_it_is_one_picture_and_cores_maths(cfg, patchers, caplog):
    """On a model where the node does something, if there is one among these."""
    caplog.set_level(logging.CRITICAL)
    changing = set()
    for name in filter(lambda name: is_tried(name, patchers[name]), patchers):
        if any(compared(name, patchers[name], kind, cfg) > SEEN for kind in MODELS):
            changing.add(name)
    assert patchers.keys() & EFFECTIVE[cfg] <= changing
    assert len(changing) > 20


# Some where the settings above are seen to do something, else the comparison would prove nothing.
EFFECTIVE = {1.0: {"EasyCache", "LazyCache", "ContextWindowsManual", "LatentApplyOperationCFG", "CFGOverride"}}
EFFECTIVE[1.5] = EFFECTIVE[1.0] | {"SkipLayerGuidanceSD3", "SkipLayerGuidanceDiT"}


def test_a_node_that_is_not_tried_is_named(patchers):
    """What core gains and cannot be tried here fails until it was looked at."""
    looked_at = {
        "ARVideoI2V", "AnimaLLLiteApply", "LTXVReferenceAudio", "LoraModelLoader", "QwenImageDiffsynthControlnet", "SUPIRApply",
        "TripoSplatSamplingPreview", "USOStyleReference", "WanInfiniteTalkToVideo", "WanUni3CControlnetApply",
        "ZImageFunControlnet",
    }  # fmt: skip
    left = {name for name, cls in patchers.items() if not is_tried(name, cls) and not name.startswith("ModelMerge")}
    assert left - OF_FILES - COMPILES <= looked_at
    assert len(patchers) > 60
