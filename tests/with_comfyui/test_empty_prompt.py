"""cfg above 1 without a negative prompt: the empty prompt is taken, as by core's nodes, and that is said; or an error says how."""

from functools import cache

import comfy.model_base
import comfy.model_patcher
import node_helpers
import nodes
import pytest
import torch
from comfy.model_base import ModelType
from comfy_extras import nodes_sag

from lcm_kit.host.sampling.empty_prompt import negative_for, shared_by_all
from lcm_kit.nodes.sampling import LCMKSampler
from lcm_kit.samplers.presets import PRESETS
from lcm_kit.tests.helpers import relative
from lcm_kit.tests.with_comfyui import tiny
from lcm_kit.tests.with_comfyui.sampled import CAT, SEED, ksampler, picture

pytestmark = pytest.mark.usefixtures("no_gradients")


@cache
def clip():
    return tiny.tiny_clip(words=True, width=tiny.CONTEXT)


@cache
def model():
    return tiny.small_model()


@cache
def sdxl():
    config = tiny.TinyConfig(tiny.TWO_LEVELS)
    config.unet_config = tiny.TWO_LEVELS | tiny.SMALL | {"num_classes": "sequential", "adm_in_channels": 1280 + 6 * 256}
    config.sampling_settings, cpu = {}, torch.device("cpu")
    made = comfy.model_base.SDXL(config, device=cpu)
    tiny.fill(made.diffusion_model, 0)
    return comfy.model_patcher.ModelPatcher(made, load_device=cpu, offload_device=cpu)


@pytest.fixture(autouse=True, scope="module")
def _models_are_let_go():
    yield
    for made in (clip, model, sdxl):
        made.cache_clear()


def encoded(text=""):
    return nodes.CLIPTextEncode().encode(clip(), text)[0]


def pooled(prompt, seed=3):
    vector = torch.randn(1, 1280, generator=torch.Generator().manual_seed(seed))
    return node_helpers.conditioning_set_values(prompt, {"pooled_output": vector, "width": 96, "height": 64})


SETTINGS = {
    "cfg": {"cfg": 1.5},
    "cfg below 1": {"cfg": 0.5},
    "a preset's cfg": {"preset": PRESETS["TDD"]},
    "the first step alone": {"cfg": 2.0, "cfg_steps": 1},
    "from a picture": {"cfg": 1.5, "denoise": 0.5},
    "a section": {"cfg": 1.5, "end_at_step": 2, "return_with_leftover_noise": True},
}
EVERY_SETTING = pytest.mark.parametrize("setting", SETTINGS)


@EVERY_SETTING
def test_with_a_clip_the_picture_is_that_of_an_empty_clip_text_encode(setting):
    settings = SETTINGS[setting]
    result = ksampler(model(), picture(batch=2), clip=clip(), **settings)
    assert torch.equal(result, ksampler(model(), picture(batch=2), negative=encoded(), **settings))
    assert relative(result, ksampler(model(), picture(batch=2), **settings | {"cfg": 1.0, "preset": None})) > 1e-4


@EVERY_SETTING
def test_sdxl_without_a_clip_takes_the_zeros_it_was_trained_with(setting):
    settings, positive = SETTINGS[setting], pooled(CAT)
    (zeros,) = nodes.ConditioningZeroOut().zero_out(positive)
    result = ksampler(sdxl(), picture(), positive=positive, **settings)
    assert torch.equal(result, ksampler(sdxl(), picture(), positive=positive, negative=zeros, **settings))


def test_with_a_clip_sdxl_takes_what_it_makes_of_an_empty_text():
    ((tensor, about),) = negative_for(sdxl(), pooled(CAT), None, clip(), cfg=1.5, guided=True)
    ((expected, own),) = encoded()
    assert torch.equal(tensor, expected)
    assert torch.equal(about["pooled_output"], own["pooled_output"])
    assert (about["width"], about["height"]) == (96, 64)


@pytest.mark.parametrize(
    ("settings", "cfg"), [({"cfg": 1.5}, "1.5"), ({"preset": PRESETS["PCM normal cfg 4 steps"]}, "3")]
)
def test_where_there_is_no_way_to_the_empty_prompt_nothing_is_run_and_the_ways_are_named(settings, cfg):
    counted, seen = tiny.count_calls(model())
    with pytest.raises(
        ValueError, match=rf"^LCM KSampler: cfg is {cfg}, but .* no negative .*CLIP to clip, or CLIP Text"
    ):
        ksampler(counted, picture(), **settings)
    assert seen.calls == 0


@pytest.mark.parametrize("settings", [{}, {"cfg": 1.5, "cfg_steps": 0}, {"cfg": 1.5, "denoise": 0.0}])
def test_where_nothing_is_guided_no_text_is_encoded_and_nothing_said(settings, caplog):
    encoder = tiny.tiny_clip()  # of no words
    ksampler(model(), picture(), clip=encoder, **settings)
    assert not caplog.records


def test_it_is_said_in_the_log_and_on_the_node_and_taken_away_by_the_next_run(caplog):
    def told(**changed):
        widgets = {
            "seed": SEED,
            "steps": 2,
            "cfg": 1.5,
            "denoise": 1.0,
            "gamma": 1.0,
            "cfg_steps": -1,
            "original_steps": 50,
        }
        output = LCMKSampler.execute(model=model(), positive=CAT, latent_image=picture(), **widgets | changed)
        return output.ui["text"]

    (line,) = told(clip=clip())
    said = "No negative prompt is connected: cfg 1.5 guides away from the empty prompt (an empty text, encoded)."
    assert line == said
    assert said in caplog.text
    assert told(negative=CAT) == []
    # Whatever else there is to say stands there too, each thing once.
    caplog.clear()
    (lines,) = told(clip=clip(), steps=8, denoise=0.1)
    assert lines.splitlines() == caplog.messages
    assert lines.startswith("denoise 0.1 leaves 5 of the 50")
    assert lines.endswith("encoded).")


def test_the_text_is_encoded_once_for_many_pictures_and_again_for_a_changed_clip(monkeypatch):
    encoder, calls = tiny.tiny_clip(words=True, width=tiny.CONTEXT), []
    encode = type(encoder).encode_from_tokens_scheduled
    monkeypatch.setattr(
        type(encoder), "encode_from_tokens_scheduled", lambda clip, *rest: calls.append(clip) or encode(clip, *rest)
    )
    for seed in range(3):
        ksampler(model(), picture(), clip=encoder, cfg=1.5, seed=seed)
    assert len(calls) == 1
    plain = ksampler(model(), picture(), clip=encoder, cfg=1.5)
    changed = encoder.clone()
    changed.add_patches({key: (torch.ones_like(value),) for key, value in encoder.get_sd().items() if "final" in key})
    assert not torch.equal(ksampler(model(), picture(), clip=changed, cfg=1.5), plain)
    skipping = encoder.clone()
    skipping.clip_layer(-2)
    assert not torch.equal(ksampler(model(), picture(), clip=skipping, cfg=1.5), plain)
    assert calls == [encoder, changed, skipping]


def test_what_belongs_to_the_picture_goes_with_both_prompts():
    """The background of an inpainting model; without it the model would be told of another picture there."""
    inpainting = tiny.small_model(ModelType.V_PREDICTION, in_channels=9)
    inpainting.model.set_inpaint()
    mask = torch.zeros(1, 1, 64, 64)
    mask[..., 40:] = 1.0
    background = {"concat_latent_image": picture(seed=4)["samples"], "concat_mask": mask}
    regional = CAT + nodes.ConditioningSetArea().append(tiny.cond(3), 32, 64, 0, 0, 1.0)[0]
    for prompt in (CAT, regional):
        positive, negative = (node_helpers.conditioning_set_values(one, background) for one in (prompt, encoded()))
        result = ksampler(inpainting, picture(), positive=positive, clip=clip(), cfg=1.5)
        assert torch.equal(result, ksampler(inpainting, picture(), positive=positive, negative=negative, cfg=1.5))
        assert not torch.equal(result, ksampler(inpainting, picture(), positive=positive, negative=encoded(), cfg=1.5))


def test_what_a_prompt_says_of_its_text_its_place_and_its_time_stays_its_own():
    both, one = {"concat_latent_image": torch.ones(1), "guidance": 3.5}, torch.ones(1)
    own = {"area": (1, 1, 0, 0), "mask": one, "strength": 0.5, "start_percent": 0.1, "pooled_output": one,
           "attention_mask": one, "conditioning_lyrics": one, "t5xxl_ids": one}  # fmt: skip
    assert shared_by_all([[one, both | own]]) == both
    assert shared_by_all([[one, both | own], [one, dict(both) | {"control": one}]]) == both
    assert shared_by_all([[one, both], [one, both | {"guidance": 2.0}]]).keys() == {"concat_latent_image"}


def test_a_node_that_looks_at_the_negative_prompt_at_cfg_1_gets_it_too():
    guided = nodes_sag.SelfAttentionGuidance.execute(tiny.tiny_model(**tiny.WITH_MIDDLE), 0.5, 2.0).result[0]
    result = ksampler(guided, picture(), clip=clip())
    assert torch.equal(result, ksampler(guided, picture(), negative=encoded()))
