"""LCM Negative Prompt (NAG) on ComfyUI's own UNet, against attention worked out by hand."""

import sys
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager

import comfy.model_base
import comfy.model_management
import comfy.model_patcher
import comfy.samplers
import pytest
import torch
from comfy.ldm.modules.attention import BasicTransformerBlock
from comfy.model_base import ModelType
from comfy_extras import nodes_custom_sampler as custom
from comfy_extras.nodes_sag import SelfAttentionGuidance
from nodes import KSampler

from lcm_kit.host.sampling.negative.rows import Rows
from lcm_kit.host.sampling.negative.unet import UNetRoad
from lcm_kit.nodes.guidance import LCMNegativePrompt
from lcm_kit.nodes.sampling import LCMKSampler, LCMSampler
from lcm_kit.nodes.scheduling import LCMScheduler
from lcm_kit.tests.helpers import relative
from lcm_kit.tests.with_comfyui import tiny

SEED = 5
USUAL = {"scale": 3.0, "tau": 2.5, "alpha": 0.5, "end_step": -1}


pytestmark = pytest.mark.usefixtures("no_gradients")


@pytest.fixture(scope="module")
def model():
    small = {"num_res_blocks": [1, 1], "transformer_depth": [1, 2], "transformer_depth_output": [1, 2, 1, 1]}
    return tiny.tiny_model(ModelType.V_PREDICTION, **small)


def guided(model, negative=None, **changed):
    return LCMNegativePrompt.execute(model, negative or tiny.cond(3), **USUAL | changed).result[0]


def lcm(model, latent=None, **changed):
    inputs = {"positive": tiny.cond(1), "seed": SEED, "steps": 2, "cfg": 1.0, "denoise": 1.0}
    inputs |= {"gamma": 1.0, "cfg_steps": -1, "original_steps": 50, "latent_image": latent or tiny.latent()}
    return LCMKSampler.execute(model=model, **inputs | changed).result[0]["samples"]


def attention_by_hand(attn2, x, context):
    """Before the output projection, head by head."""
    q, k, v = attn2.to_q(x), attn2.to_k(context), attn2.to_v(context)
    heads = []
    for i in range(attn2.heads):
        part = slice(i * attn2.dim_head, (i + 1) * attn2.dim_head)
        weights = (q[..., part] @ k[..., part].transpose(1, 2) / attn2.dim_head**0.5).softmax(dim=-1)
        heads.append(weights @ v[..., part])
    return torch.cat(heads, dim=-1)


@contextmanager
def by_hand(model, negative, *, scale=3.0, tau=2.5, alpha=0.5, steps=99, extra=0.0):
    """The UNet with both attentions and the paper's three equations in every block; no patch of ComfyUI's is used.

    steps: model calls it works in. extra: added to each attention, as an adapter would.
    """
    unet, calls = model.model.diffusion_model, []

    def replaced(attn2):
        def forward(x, context, value=None, transformer_options=None):
            positive = attention_by_hand(attn2, x, context) + extra
            if len(calls) > steps:
                return attn2.to_out(positive)
            other = negative[0][0].repeat(-(-len(x) // len(negative[0][0])), 1, 1)[: len(x)]
            z = scale * positive - (scale - 1) * (attention_by_hand(attn2, x, other) + extra)
            ratio = z.norm(p=1, dim=-1, keepdim=True) / positive.norm(p=1, dim=-1, keepdim=True)
            z = z * ratio.clamp(max=tau) / ratio
            return attn2.to_out(alpha * z + (1 - alpha) * positive)

        return forward

    with pytest.MonkeyPatch.context() as patch:
        for block in unet.modules():
            if isinstance(block, BasicTransformerBlock):
                patch.setattr(block.attn2, "forward", replaced(block.attn2))
        counter = unet.register_forward_pre_hook(lambda *_: calls.append(1))
        yield model
        counter.remove()


@contextmanager
def rows_projected(model):
    """Collects how many texts the first cross-attention projects, one number for each model call."""
    attn2 = next(b for b in model.model.diffusion_model.modules() if isinstance(b, BasicTransformerBlock)).attn2
    seen = []
    hook = attn2.to_k.register_forward_pre_hook(lambda module, args: seen.append(len(args[0])))
    yield seen
    hook.remove()


# ---- neutral points


@pytest.mark.parametrize("off", [{"scale": 1.0}, {"alpha": 0.0}, {"end_step": 0}])
def test_its_neutral_points_are_the_model_itself_to_the_bit(model, off):
    assert torch.equal(lcm(guided(model, **off)), lcm(model))


def test_a_negative_equal_to_the_positive_changes_nothing(model):
    # float32 rounding: both attentions are computed, in batches of another shape
    assert relative(lcm(guided(model, tiny.cond(1), scale=10.0)), lcm(model)) < 1e-5


def test_a_negative_changes_the_picture(model):
    assert relative(lcm(guided(model)), lcm(model)) > 0.05


def test_the_model_it_was_given_is_left_as_it_was(model):
    before, negative = lcm(model), tiny.cond(3)
    text = negative[0][0].clone()
    lcm(guided(model, negative))
    assert model.wrappers == {}
    assert "patches_replace" not in model.model_options["transformer_options"]
    assert torch.equal(negative[0][0], text)
    assert torch.equal(lcm(model), before)


# ---- against the equations


@pytest.mark.parametrize(("tokens", "negative_tokens"), [(5, 5), (5, 7), (4, 12), (12, 4)])
def test_it_is_the_published_formula_in_every_block(model, tokens, negative_tokens):
    positive, negative = tiny.cond(1, tokens), tiny.cond(3, negative_tokens)
    with by_hand(model, negative):
        expected = lcm(model, positive=positive)
    assert relative(lcm(guided(model, negative), positive=positive), expected) < 1e-5


@pytest.mark.parametrize("values", [{"scale": 8.0}, {"tau": 1.0}, {"alpha": 1.0}, {"scale": 1.5, "alpha": 0.25}])
def test_scale_tau_and_alpha_are_those_of_the_formula(model, values):
    with by_hand(model, tiny.cond(3), **values):
        expected = lcm(model)
    assert relative(lcm(guided(model, **values)), expected) < 1e-5


@pytest.mark.parametrize("negatives", [1, 2, 3, 5])
def test_images_of_a_batch_share_one_negative_or_have_one_each(model, negatives):
    negative = [[torch.cat([tiny.cond(seed)[0][0] for seed in range(3, 3 + negatives)]), {}]]
    with by_hand(model, negative):
        expected = lcm(model, tiny.latent(3))
    assert relative(lcm(guided(model, negative), tiny.latent(3)), expected) < 1e-5


def one_step(model, positive, negative=None, cfg=1.0, batch=1):
    """The denoised picture of the first model call."""
    return lcm(model, tiny.latent(batch), positive=positive, negative=negative, cfg=cfg, steps=1)


@pytest.mark.parametrize("batch", [1, 2])
def test_with_cfg_only_the_positive_prompt_is_guided(model, batch):
    positive, uncond = tiny.cond(1), tiny.cond(2)
    with by_hand(model, tiny.cond(3)):
        cond = one_step(model, positive, batch=batch)
    plain = one_step(model, uncond, batch=batch)
    result = one_step(guided(model), positive, uncond, cfg=2.0, batch=batch)
    assert relative(result, plain + 2.0 * (cond - plain)) < 1e-5


@pytest.mark.parametrize("cfg", [1.0, 2.0])
def test_regional_prompts_are_all_guided(model, cfg):
    """With cfg, core gives the negative prompt a copy of each region that passes for the positive one by its uuid."""
    left, right = tiny.cond(1)[0], tiny.cond(4, tokens=8)[0]
    positive = [[left[0], {"area": (8, 4, 0, 0), "strength": 1.0}], [right[0], {"area": (8, 4, 0, 4), "strength": 1.0}]]
    with by_hand(model, tiny.cond(3)):
        expected = cond = one_step(model, positive)
    if cfg > 1:
        regions = [[tiny.cond(2)[0][0], {}], *([tiny.cond(2)[0][0], options] for _, options in positive)]
        plain = one_step(model, regions)
        expected = plain + cfg * (cond - plain)
    assert relative(one_step(guided(model), positive, tiny.cond(2), cfg), expected) < 1e-5


def test_a_guider_that_puts_the_positive_prompt_last_is_understood(model):
    positive, middle, negative = tiny.cond(1), tiny.cond(2), tiny.cond(4)
    with by_hand(model, tiny.cond(3)):
        cond = one_step(model, positive)
    first, second = one_step(model, negative), one_step(model, middle)
    expected = first + 3.0 * (second - first) + 1.5 * (cond - second)
    guider = custom.DualCFGGuider.execute(guided(model), positive, middle, negative, 1.5, 3.0, "regular").result[0]
    assert relative(advanced(model, guider, steps=1), expected) < 1e-5


def advanced(model, guider, steps=2):
    sigmas = LCMScheduler.execute(model, steps, 1.0, 50, "").result[0]
    sampler, noise = LCMSampler.execute(1.0, -1).result[0], custom.RandomNoise.execute(SEED).result[0]
    return custom.SamplerCustomAdvanced.execute(noise, guider, sampler, sigmas, tiny.latent()).result[0]["samples"]


def test_a_node_that_evaluates_the_negative_prompt_alone_gets_it_unguided(model):
    patched = SelfAttentionGuidance.execute(guided(model), 0.5, 2.0).result[0]
    with rows_projected(model) as rows:
        one_step(patched, tiny.cond(1), tiny.cond(2), cfg=2.0)
    assert rows == [3, 1]  # positive, negative and the guiding text; then the negative on a blurred picture


def adapter(amount):
    """An attn2 replace patch in the manner of image adapters: attention to the text, and something on top."""

    def attend(q, k, v, options):
        assert len(q) == len(k) == len(v) == len(options["cond_or_uncond"])
        return comfy.ldm.modules.attention.optimized_attention(q, k, v, options["n_heads"]) + amount

    return attend


@pytest.mark.parametrize("adapter_first", [True, False])
@pytest.mark.parametrize("whole_block", [True, False])
def test_an_adapter_in_cross_attention_keeps_its_effect_wherever_it_stands(model, adapter_first, whole_block):
    """Its part is in both attentions, so guidance leads away from the negative text and not from it."""
    blocks = [("input", n) for n in (1, 3)] + [("middle", 0)] + [("output", n) for n in range(4)]

    def adapted(model):
        model = model.clone()
        for name, number in blocks:
            for index in (None,) if whole_block else (0, 1):
                model.set_model_attn2_replace(adapter(0.3), name, number, index)
        return model

    both = guided(adapted(model)) if adapter_first else adapted(guided(model))
    with by_hand(model, tiny.cond(3), extra=0.3):
        expected = lcm(model)
    assert relative(lcm(both), expected) < 1e-5
    lcm(both, cfg=2.0, negative=tiny.cond(2))


def test_half_precision_takes_the_text_along():
    model, negative = tiny.tiny_model(ModelType.V_PREDICTION, dtype=torch.bfloat16), tiny.cond(3)
    model.model.diffusion_model.to(torch.bfloat16)
    picture, plain = lcm(guided(model, negative)), lcm(model)
    assert torch.isfinite(picture).all()
    assert relative(picture, plain) > 0.01
    assert negative[0][0].dtype == torch.float32


# ---- cost, steps and samplers


def test_it_is_one_model_call_a_step_and_one_more_text(model):
    counted, seen = tiny.count_calls(guided(model))
    with rows_projected(model) as rows:
        lcm(counted, tiny.latent(3))
    assert seen.conds == [[0]] * 2
    assert rows == [4] * 2


@pytest.mark.parametrize("end_step", [1, 2, 3])
def test_it_ends_after_end_step_and_then_costs_nothing(model, end_step):
    with by_hand(model, tiny.cond(3), steps=end_step):
        expected = lcm(model, steps=4)
    with rows_projected(model) as rows:
        result = lcm(guided(model, end_step=end_step), steps=4)
    assert relative(result, expected) < 1e-5
    assert rows == [2] * end_step + [1] * (4 - end_step)


@pytest.mark.parametrize("end_step", [2, 3, 1000])
def test_an_end_beyond_the_run_is_no_end(model, end_step):
    assert torch.equal(lcm(guided(model, end_step=end_step)), lcm(guided(model)))


@pytest.mark.parametrize(
    ("name", "rows"), [("euler", [2, 1, 1]), ("heun", [2, 1, 1, 1, 1]), ("dpm_2", [2, 2, 1, 1, 1])]
)
def test_levels_between_two_steps_belong_to_the_earlier_one(model, name, rows):
    with rows_projected(model) as seen:
        KSampler().sample(
            guided(model, end_step=1), SEED, 3, 1.0, name, "simple", tiny.cond(1), tiny.cond(2), tiny.latent()
        )
    assert seen == rows


def test_the_end_is_counted_from_where_image_to_image_starts(model):
    with rows_projected(model) as rows:
        lcm(guided(model, end_step=2), tiny.latent(seed=9), denoise=0.5, steps=4)
    assert rows == [2, 2, 1, 1]


def test_every_sampler_node_gives_the_same(model):
    patched = guided(model, end_step=1)
    sigmas, sampler = LCMScheduler.execute(model, 2, 1.0, 50, "").result[0], LCMSampler.execute(1.0, -1).result[0]
    inputs = (tiny.cond(1), tiny.cond(2), sampler, sigmas, tiny.latent())
    expected = lcm(patched)
    assert torch.equal(custom.SamplerCustom.execute(patched, True, SEED, 1.0, *inputs).result[0]["samples"], expected)
    basic = custom.BasicGuider.execute(patched, tiny.cond(1)).result[0]
    assert torch.equal(advanced(model, basic), expected)
    assert torch.equal(lcm(patched, negative=tiny.cond(2), cfg=2.0, cfg_steps=0), expected)


def test_without_a_schedule_an_end_is_refused_and_no_end_works(model):
    def prediction(patched):
        options = {"wrappers": patched.wrappers, "cond_or_uncond": [0]}
        x, sigma = torch.zeros(1, 4, 8, 8), torch.ones(1)
        return model.model.apply_model(x, sigma, c_crossattn=tiny.cond(1)[0][0], transformer_options=options)

    assert torch.isfinite(prediction(guided(model))).all()
    with pytest.raises(ValueError, match=r"cannot tell the step.*Set end_step to -1"):
        prediction(guided(model, end_step=1))


# ---- on a model that can paint


def test_what_is_not_wanted_is_not_painted(tiny_emoji, tiny_emoji_lcm, vae):
    """Where the prompt names no background the demo's model chooses: white in 5 of these 16 (0.89 and up; guided, none is above 0.75)."""
    model, clip = tiny_emoji_lcm, tiny_emoji[1]
    wanted, unwanted = (
        clip.encode_from_tokens_scheduled(clip.tokenize(text)) for text in ("strawberry", "white background")
    )

    def white(model):
        latent = {"samples": torch.zeros(16, 12, 8, 8)}
        pictures = vae.decode(lcm(model, latent, positive=wanted, seed=0, steps=4))
        border = torch.cat([pictures[:, :2].flatten(1, 2), pictures[:, -2:].flatten(1, 2)], dim=1)
        return int((border.median(dim=1).values.amin(dim=1) > 0.85).sum())

    assert white(model) >= 3
    assert white(guided(model, unwanted)) == 0


# ---- what it refuses


def test_a_unet_over_time_is_refused():
    time = {"use_temporal_attention": True, "use_temporal_resblock": True, "video_kernel_size": [3, 1, 1]}
    video = tiny.tiny_model(**time, merge_strategy="learned_with_images", extra_ff_mix_layer=True)
    with pytest.raises(ValueError, match="attends over time"):
        guided(video)


def test_a_unet_without_text_is_refused():
    depths = {"transformer_depth": [0] * 4, "transformer_depth_output": [0] * 6, "transformer_depth_middle": -1}
    with pytest.raises(ValueError, match="no cross-attention to a text"):
        guided(tiny.tiny_model(**depths))


@pytest.mark.parametrize(
    ("negative", "message"),
    [
        ([], r"negative is a list of 0 entries"),
        (tiny.cond(1) + tiny.cond(2), r"negative has 2 entries; .*ConditioningConcat"),
        ([[torch.zeros(1, 5, 24), {}]], r"shape \(1, 5, 24\), and this model reads texts of width 16.*Encode it"),
        ([[torch.zeros(1, 16), {}]], r"shape \(1, 16\)"),
        ([[None, {}]], r"shape None"),
    ],
)
def test_a_conditioning_that_does_not_fit_is_refused(model, negative, message):
    with pytest.raises(ValueError, match=message):
        LCMNegativePrompt.execute(model, negative, **USUAL)


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ({"scale": 0.5}, r"scale is 0\.5"),
        ({"tau": 0.0}, r"tau is 0\.0, .* from 1 to 10"),
        ({"alpha": 2.0}, r"alpha is 2\.0, .* from 0 to 1"),
        ({"end_step": -2}, r"end_step is -2, .* from -1 to 1,000"),
    ],
)
def test_values_out_of_range_are_refused(model, value, message):
    with pytest.raises(ValueError, match=message):
        guided(model, **value)


def test_a_second_one_is_refused(model):
    with pytest.raises(ValueError, match=r"already has an LCM Negative Prompt.*ConditioningConcat"):
        guided(guided(model))


def test_what_else_a_conditioning_carries_is_named(model, caplog):
    guided(model, [[tiny.cond(3)[0][0], {"area": (1, 1, 0, 0), "start_percent": 0.5, "pooled_output": None}]])
    assert "area, start_percent is not used" in caplog.text


def test_regional_attention_of_another_node_is_refused(model):
    def split(q, context, value, options):
        return q.repeat(2, 1, 1), context.repeat(2, 1, 1), value.repeat(2, 1, 1)

    patched = guided(model).clone()
    patched.set_model_attn2_patch(split)
    with pytest.raises(ValueError, match=r"expects 1 image .* got 2 with 2: another node"):
        lcm(patched)


def test_threads_get_the_text_as_each_of_them_needs_it():
    """ComfyUI samples on several GPUs in threads; here they differ in dtype, not in device."""
    context = torch.randn(1, 5, 16)
    patch = UNetRoad(context, [], {})
    texts = [torch.zeros(1, 7, 16, dtype=dtype) for dtype in (torch.float32, torch.float64, torch.bfloat16)]
    wrong, interval = [], sys.getswitchinterval()

    def work(text):
        append = patch._append_negative(Rows([0], 1, 1))
        for _ in range(2000):
            try:
                _, joined, _ = append(None, text, None, {})
                ours = joined[1:, :5]
                if ours.dtype != text.dtype or not torch.equal(ours, context.to(text.dtype)):
                    wrong.append(ours.dtype)
            except RuntimeError as error:  # two dtypes in one torch.cat
                wrong.append(error)

    sys.setswitchinterval(1e-6)
    try:
        with ThreadPoolExecutor(len(texts)) as pool:
            list(pool.map(work, texts))
    finally:
        sys.setswitchinterval(interval)
    assert wrong == []
