"""LCM Negative Prompt (NAG) on ComfyUI's own transformers, against a slow model of two rows with attention by hand."""

from types import SimpleNamespace

import comfy.patcher_extension
import pytest
import torch
from comfy_extras.nodes_easycache import EasyCacheNode
from nodes import KSampler

from lcm_kit.host.sampling.negative import families
from lcm_kit.host.sampling.negative.rows import Rows
from lcm_kit.nodes.guidance import LCMNegativePrompt
from lcm_kit.nodes.sampling import LCMKSampler
from lcm_kit.tests.with_comfyui import dits
from lcm_kit.tests.with_comfyui.negative_models import MODELS, randn

USUAL = {"scale": 3.0, "tau": 2.5, "alpha": 0.5, "end_step": -1}
Wrap = comfy.patcher_extension.WrappersMP

pytestmark = pytest.mark.usefixtures("no_gradients")
every_model = pytest.mark.parametrize("name", MODELS)
FEW = ("Wan T2V", "Flux", "Z-Image")  # one of each road
JOINT = [name for name, model in MODELS.items() if model.joint]
NO_LONGER = ("Z-Image", "Lumina 2")  # the length of their text moves the picture


@pytest.fixture(scope="module")
def models():
    made = {}
    return lambda name: made.setdefault(name, MODELS[name].model())


def guided(model, negative, **changed):
    return LCMNegativePrompt.execute(model, negative, **USUAL | changed).result[0]


def sampled(name, model, positive=None, negative=None, *, cfg=1.0, steps=1, batch=1, latent=None, sampler="euler"):
    """(batch, ...) what core's KSampler makes; nested latents side by side."""
    positive, negative = positive or MODELS[name].text(1), negative or MODELS[name].text(4)
    latent = latent or MODELS[name].latent(batch)
    samples = KSampler().sample(model, 5, steps, cfg, sampler, "simple", positive, negative, latent)[0]["samples"]
    return torch.cat([one.flatten(1) for one in samples.unbind()], dim=1) if samples.is_nested else samples


def off_by(a, b):
    """Largest deviation, in spreads of b."""
    return float((a - b).abs().max() / b.std())


def watched(model, wrap, wrapper):
    model = model.clone()
    model.add_wrapper_with_key(wrap, "test", wrapper)
    return model


def with_override(model, override):
    model = model.clone()
    model.model_options["transformer_options"]["optimized_attention_override"] = override
    return model


# ---- the slow reference: a batch of two rows, texts filled up to one length, attention by hand with a mask


TEXTS = ("c_crossattn", "encoder_hidden_states_llama3")


def texts_read(name, model, text):
    """What core hands to the model as this text."""
    seen = {}

    def wrapper(executor, x, t, concat, context, control, options, **c):
        seen.update({"c_crossattn": context, "encoder_hidden_states_llama3": c.get("encoder_hidden_states_llama3")})
        return executor(x, t, concat, context, control, options, **c)

    sampled(name, watched(model, Wrap.APPLY_MODEL, wrapper), text, batch=len(text[0][0]))
    return {key: value for key, value in seen.items() if value is not None}


def filled(text, length):
    missing = length - text.shape[-2]
    return torch.cat([text, text.mean(-2, keepdim=True).expand(*text.shape[:-2], missing, -1)], dim=-2)


class ByHand:
    """The model of twice the rows: positive texts, then negative ones; the paper's equations wherever a picture meets a
    text. Both halves stay one picture.
    """

    def __init__(self, name, negative, *, scale=3.0, tau=2.5, alpha=0.5):
        self.counted, self.negative, self.values = MODELS[name], negative, (scale, tau, alpha)

    def apply_model(self, executor, x, t, concat, context, control, options, **c):
        rows = len(x)
        texts = {"c_crossattn": context, **{key: c[key] for key in TEXTS if key in c}}
        self.own = context.shape[-2], self.negative["c_crossattn"].shape[-2]
        self.length, self.calls = max(self.own), 0

        def twice(value):
            if isinstance(value, list):
                return [twice(one) for one in value]
            return torch.cat([value, value]) if isinstance(value, torch.Tensor) and len(value) == rows else value

        made = {}
        for key, text in texts.items():
            negative = self.negative[key]
            negative = torch.stack([negative[i % len(negative)] for i in range(rows)])
            made[key] = torch.cat([filled(text, self.length), filled(negative, self.length)])
        c = {key: twice(value) for key, value in c.items()} | made
        if "attention_mask" in c:
            c["attention_mask"] = torch.ones(2 * rows, self.length, dtype=torch.long)
        options = options | {"optimized_attention_override": self.attention}
        context = c.pop("c_crossattn")
        return executor(twice(x), twice(t), twice(concat), context, control, options, **c)[:rows]

    def attention(self, func, q, k, v, heads, mask=None, *args, skip_reshape=False, **options):
        if not skip_reshape:
            q, k, v = (t.reshape(len(t), t.shape[1], heads, -1).transpose(1, 2) for t in (q, k, v))
        if (repeats := heads // k.shape[1]) > 1:
            k, v = (t.repeat_interleave(repeats, dim=1) for t in (k, v))
        self.calls += 1
        model, keys = self.counted, k.shape[2]
        text = -(-self.length // model.multiple) * model.multiple * model.parts + model.before + model.after
        refines = self.calls <= model.refiners
        meets = keys == (text + model.picture if model.joint else text) and not refines
        meets = meets and (model.joint or q.shape[2] != keys)
        scores = q @ k.transpose(2, 3) / q.shape[-1] ** 0.5
        if meets or refines:
            start = (model.picture if model.picture_first else model.before) if meets and model.joint else 0
            for part in range(model.parts):
                for half, own in zip(scores.chunk(2), self.own, strict=True):
                    first = start + part * self.length
                    half[..., first + own : first + self.length] = -torch.inf
        out = (scores.softmax(-1) @ v).transpose(1, 2).flatten(2)
        if meets:
            seen = slice(0, None)
            if model.joint:
                seen = slice(0, model.picture) if model.picture_first else slice(text, None)
            out[:, seen] = self.mixed(*out[:, seen].chunk(2)).repeat(2, 1, 1)
        return out

    def mixed(self, positive, negative):
        scale, tau, alpha = self.values
        z = scale * positive - (scale - 1) * negative
        ratio = z.norm(p=1, dim=-1, keepdim=True) / positive.norm(p=1, dim=-1, keepdim=True)
        return alpha * z * ratio.clamp(max=tau) / ratio + (1 - alpha) * positive


def by_hand(name, model, negative, **values):
    return watched(model, Wrap.APPLY_MODEL, ByHand(name, texts_read(name, model, negative), **values).apply_model)


LENGTHS = [
    (name, *lengths)
    for name in MODELS
    for lengths in ((5, 5), (8, 5), (5, 8))
    if not (name in NO_LONGER and lengths[1] == 8)
]


@pytest.mark.parametrize(("name", "own", "other"), LENGTHS)
def test_it_is_the_published_formula_wherever_the_picture_meets_the_text(models, name, own, other):
    model, text = models(name), MODELS[name].text
    expected = sampled(name, by_hand(name, model, text(2, other)), text(1, own))
    assert off_by(sampled(name, model, text(1, own)), expected) > 1e-2
    # Another order of sums, through all blocks, in float32.
    assert off_by(sampled(name, guided(model, text(2, other)), text(1, own)), expected) < 2e-5


@pytest.mark.parametrize(("name", "negatives"), [*((name, 2) for name in MODELS), *((name, 3) for name in FEW)])
def test_pictures_of_a_batch_share_one_negative_or_have_one_each(models, name, negatives):
    model = models(name)
    if name == "Anima":
        negatives = 1  # core gives its adapter the tokens of one text
    negative = MODELS[name].text(2, 4, negatives)
    expected = sampled(name, by_hand(name, model, negative), batch=2)
    assert off_by(sampled(name, guided(model, negative), batch=2), expected) < 2e-5


@pytest.mark.parametrize("values", [{"scale": 8.0}, {"tau": 1.0}, {"alpha": 1.0}, {"scale": 1.5, "alpha": 0.25}])
@pytest.mark.parametrize("name", FEW)
def test_scale_tau_and_alpha_are_those_of_the_formula(models, name, values):
    model, negative = models(name), MODELS[name].text(2)
    expected = sampled(name, by_hand(name, model, negative, **values))
    assert off_by(sampled(name, guided(model, negative, **values)), expected) < 2e-5


# ---- neutral points


@every_model
def test_a_negative_equal_to_the_positive_changes_nothing(models, name):
    model, text = models(name), MODELS[name].text(1)
    # 1e-5: texts are projected in batches of another shape.
    assert off_by(sampled(name, guided(model, text, scale=10.0), text), sampled(name, model, text)) < 1e-5


@pytest.mark.parametrize("off", [{"scale": 1.0}, {"alpha": 0.0}, {"end_step": 0}])
@every_model
def test_its_neutral_points_are_the_model_itself_to_the_bit(models, name, off):
    model, patched = models(name), guided(models(name), MODELS[name].text(2), **off)
    assert patched.wrappers == {}
    assert patched.model_options == model.model_options
    if name in FEW:
        assert torch.equal(sampled(name, patched), sampled(name, model))


def test_the_model_it_was_given_is_left_as_it_was(models):
    model = models("Flux")
    before, options = sampled("Flux", model), str(model.model_options)
    sampled("Flux", guided(model, MODELS["Flux"].text(2)))
    assert model.wrappers == {}
    assert str(model.model_options) == options
    assert torch.equal(sampled("Flux", model), before)


# ---- in company


@pytest.mark.parametrize("name", FEW)
def test_with_cfg_only_the_positive_prompt_is_guided(models, name):
    model, (positive, uncond) = models(name), (MODELS[name].text(1), MODELS[name].text(4))
    patched = guided(model, MODELS[name].text(2))

    def predicted(model, cfg, text):
        return sampled(name, model, text, uncond, cfg=cfg, batch=2)

    # One Euler step from noise to 0 is linear in what is predicted.
    plain, cond = predicted(model, 1.0, uncond), predicted(patched, 1.0, positive)
    assert off_by(predicted(patched, 2.0, positive), plain + 2.0 * (cond - plain)) < 2e-5


class Sharper:
    """An override in the manner of other attention kernels: it minds its rows, and here sharpens every attention."""

    def __init__(self, batch):
        self.batch, self.calls = batch, 0

    def __call__(self, func, q, k, v, heads, *args, transformer_options, **options):
        assert len(q) == len(k) == len(v) == self.batch * len(transformer_options["cond_or_uncond"])
        assert len(transformer_options["uuids"]) == len(transformer_options["cond_or_uncond"])
        self.calls += 1
        return func(q * 1.5, k, v, heads, *args, transformer_options=transformer_options, **options)


@pytest.mark.parametrize(("name", "cfg"), [*((name, 1.0) for name in MODELS), *((name, 2.0) for name in FEW)])
def test_an_override_that_is_there_is_kept(models, name, cfg):
    text, sharper = MODELS[name].text(1), Sharper(2)
    model = with_override(models(name), sharper)
    plain = sampled(name, model, text, cfg=cfg, batch=2)
    assert sharper.calls > 0
    assert off_by(plain, sampled(name, models(name), text, cfg=cfg, batch=2)) > 1e-3
    assert off_by(sampled(name, guided(model, text), text, cfg=cfg, batch=2), plain) < 2e-5
    other = guided(model, MODELS[name].text(2, 4))
    assert off_by(sampled(name, other, text, cfg=cfg, batch=2), plain) > 1e-3


@pytest.mark.parametrize("name", FEW)
def test_patches_of_weights_are_guided_as_weights_are(models, name):
    model, negative = models(name).clone(), MODELS[name].text(2)
    keys = [key for key in model.model_state_dict() if key.endswith("weight") and ("attn" in key or "atten" in key)]
    shapes = {key: model.model_state_dict()[key].shape for key in keys}
    factors = {key: (randn(shape[0], 2), randn(2, shape[1])) for key, shape in shapes.items() if len(shape) == 2}
    model.add_patches({key: ("diff", (0.02 * up @ down,)) for key, (up, down) in factors.items()})
    expected = sampled(name, by_hand(name, model, negative))
    assert off_by(expected, sampled(name, by_hand(name, models(name), negative))) > 1e-2
    assert off_by(sampled(name, guided(model, negative)), expected) < 2e-5


@pytest.mark.parametrize("name", [name for name in MODELS if name != "Cosmos Predict 2"])  # it has no LCM schedule
def test_it_works_in_the_first_steps_of_lcm_ksampler(models, name):
    model, text = models(name), MODELS[name].text
    inputs = {"seed": 5, "steps": 2, "cfg": 1.0, "denoise": 1.0, "gamma": 1.0, "cfg_steps": -1, "original_steps": 50}
    inputs |= {"positive": text(1), "latent_image": MODELS[name].latent()}

    def lcm(model):
        samples = LCMKSampler.execute(model=model, **inputs).result[0]["samples"]
        return torch.cat([one.flatten() for one in samples.unbind()]) if samples.is_nested else samples

    class FirstOnly(ByHand):
        steps = 0

        def apply_model(self, executor, *args, **c):
            self.steps += 1
            return super().apply_model(executor, *args, **c) if self.steps == 1 else executor(*args, **c)

    first = FirstOnly(name, texts_read(name, model, text(2)))
    expected = lcm(watched(model, Wrap.APPLY_MODEL, first.apply_model))
    assert first.steps == 2
    result = lcm(guided(model, text(2), end_step=1))
    assert off_by(result, expected) < 2e-5
    assert off_by(result, lcm(guided(model, text(2)))) > 1e-3


def test_attention_that_another_node_takes_away_is_an_error(models):
    def takes_away(executor, *args, **kwargs):
        for one in (*args, *kwargs.values()):
            if isinstance(one, dict):
                one.pop("optimized_attention_override", None)
        return executor(*args, **kwargs)

    model = watched(guided(models("Wan T2V"), MODELS["Wan T2V"].text(2)), Wrap.DIFFUSION_MODEL, takes_away)
    with pytest.raises(ValueError, match=r"met no attention to the text in the first step of this WanModel \(WAN21\)"):
        sampled("Wan T2V", model)


def test_a_text_that_another_node_lengthens_is_an_error(models):
    def lengthens(args):
        return args | {
            "txt": torch.cat([args["txt"][:, :2], args["txt"]], dim=1),
            "txt_ids": torch.cat([args["txt_ids"][:, :2], args["txt_ids"]], dim=1),
        }

    model = models("Flux").clone()
    model.set_model_patch(lengthens, "post_input")
    with pytest.raises(ValueError, match=r"expects a text of 5 tokens in this model and got 7: another node"):
        sampled("Flux", guided(model, MODELS["Flux"].text(2, 8)))


# ---- lengths and masks


@pytest.mark.parametrize(("own", "other"), [(16, 16), (20, 12), (20, 11)])
def test_texts_as_long_as_the_picture_are_told_from_it(models, own, other):
    """32 tokens of picture; and an image of 7 tokens to look at, which the next length must not hit either."""
    for name in ("Wan T2V", "Wan I2V"):
        model, text = models(name), MODELS[name].text
        expected = sampled(name, by_hand(name, model, text(2, other)), text(1, own))
        assert off_by(sampled(name, guided(model, text(2, other)), text(1, own)), expected) < 2e-5


def test_a_text_as_long_as_the_image_that_wan_looks_at_is_told_from_it(models):
    model, text = models("Wan I2V"), MODELS["Wan I2V"].text
    expected = sampled("Wan I2V", by_hand("Wan I2V", model, text(2, 3)), text(1, 4))
    assert off_by(sampled("Wan I2V", guided(model, text(2, 3)), text(1, 4)), expected) < 2e-5


def hidden(text, tokens):
    """The CONDITIONING with so many further tokens that its mask hides; their mean is the others'."""
    (context, options), more = text[0], randn(1, tokens, text[0][0].shape[-1], seed=8)
    more = more - more.mean(1, keepdim=True) + context.mean(1, keepdim=True)
    mask = torch.cat([torch.ones(1, context.shape[1], dtype=torch.long), torch.zeros(1, tokens, dtype=torch.long)], 1)
    return [[torch.cat([context, more], dim=1), {**options, "attention_mask": mask}]]


@pytest.mark.parametrize(("own", "other"), [(0, 3), (3, 0), (2, 3)])
@pytest.mark.parametrize("name", ["LTXV", "Qwen-Image", "Qwen-Image-Edit", "HunyuanVideo", "HunyuanVideo 1.5"])
def test_tokens_that_a_mask_hides_count_for_nothing(models, name, own, other):
    model, (positive, negative) = models(name), (MODELS[name].text(1), MODELS[name].text(2, 6))
    masked = [hidden(text, n) if n else text for text, n in ((positive, own), (negative, other))]
    if not name.startswith("Hunyuan"):  # core cannot run it: the mask leaves out the glyphs, or joins them
        assert off_by(sampled(name, model, masked[0]), sampled(name, model, positive)) < 1e-5
    expected = sampled(name, guided(model, negative), positive)
    assert off_by(sampled(name, guided(model, masked[1]), masked[0]), expected) < 2e-5


def test_a_mask_over_the_whole_sequence_keeps_its_meaning(models):
    """Flux Redux hides text tokens from all others; tokens of Flux have no place, so a hidden one might as well go."""
    model, (positive, negative) = models("Flux"), (MODELS["Flux"].text(1), MODELS["Flux"].text(2, 8))
    mask = torch.zeros(1, 21, 21)
    mask[:, :, 0] = -torch.inf
    (context, options) = positive[0]
    masked = [[context, {**options, "attention_mask": mask, "attention_mask_img_shape": (4, 4)}]]
    expected = sampled("Flux", guided(model, negative), [[context[:, 1:], options]])
    assert off_by(sampled("Flux", guided(model, negative), masked), expected) < 2e-5


@pytest.mark.parametrize("name", NO_LONGER)
def test_a_negative_longer_than_the_prompt_is_cut_where_it_would_move_the_picture(models, name, caplog):
    model, negative = models(name), MODELS[name].text(2, 8)
    result = sampled(name, guided(model, negative))
    assert "negative prompt is longer than the prompt (8 tokens against 5)" in caplog.text
    assert torch.equal(result, sampled(name, guided(model, [[negative[0][0][:, :5], negative[0][1]]])))


@pytest.mark.parametrize("name", [name for name in JOINT if "Qwen" in name or "Flux" in name])
def test_the_dearer_road_gives_the_same(models, name, monkeypatch):
    """The way of ComfyUI before 0.30 with Qwen-Image, which has no patch for positions there."""
    text = MODELS[name].text
    expected = sampled(name, guided(models(name), text(2, 8)), batch=2)
    monkeypatch.setattr(families, "_reads", lambda dit, patch: False)
    assert off_by(sampled(name, guided(models(name), text(2, 8)), batch=2), expected) < 2e-5


# ---- cost


@pytest.mark.parametrize("name", FEW)
def test_only_pairs_evaluate_a_picture_twice(models, name):
    seen = []
    inner = models(name).model.diffusion_model
    hook = inner.register_forward_pre_hook(lambda module, args: seen.append(len(args[0])))
    sampled(name, guided(models(name), MODELS[name].text(2), end_step=1), steps=2, batch=3)
    hook.remove()
    assert seen == [6 if name == "Z-Image" else 3, 3]


# ---- what it refuses


OUT = {"PixArt": "ComfyUI lets no patch", "HunyuanDiT": "ComfyUI lets no patch", "Ernie-Image": "ComfyUI lets no patch",
       "ACE-Step 1.5": "ComfyUI lets no patch", "AuraFlow": "is not known", "ACE-Step": "is not known",
       "OmniGen 2": "is not known", "Krea 2": "is not known", "Kandinsky 5": "is not known"}  # fmt: skip


@pytest.mark.parametrize("name", [name for name in OUT if name in dits.KNOWN])
def test_a_family_it_has_no_way_into_is_refused_by_name(name):
    base = dits.model(name)
    names = rf"This model is a {type(base.diffusion_model).__name__} \({type(base).__name__}\)"
    with pytest.raises(ValueError, match=names + f".*{OUT[name]}.*SDXL.*Flux, .*use cfg above 1"):
        families.family_of(SimpleNamespace(model=base))


def test_a_family_that_shares_a_transformer_can_be_out(models):
    class LongCatImage:
        diffusion_model = models("Flux").model.diffusion_model

    with pytest.raises(ValueError, match=r"LongCatImage.*the length of its text moves the picture"):
        families.family_of(SimpleNamespace(model=LongCatImage()))


def test_every_family_is_tested_here(models):
    tested = {type(models(name).model.diffusion_model) for name in MODELS}
    names = {f"{cls.__module__.removeprefix('comfy.ldm.')}.{cls.__name__}" for cls in tested}
    assert names == set(families.FAMILIES)


@pytest.mark.parametrize("name", FEW)
def test_a_text_of_another_clip_is_refused(models, name):
    with pytest.raises(
        ValueError, match=r"negative has the shape \(1, 5, 24\), and this model reads texts of width 16"
    ):
        sampled(name, guided(models(name), [[randn(1, 5, 24), {}]]))


def test_a_text_without_a_part_that_the_model_reads_is_refused(models):
    with pytest.raises(ValueError, match=r"negative lacks encoder_hidden_states_llama3, which this model reads"):
        sampled("HiDream", guided(models("HiDream"), MODELS["Flux"].text(2)))


def test_reference_latents_with_texts_of_their_own_are_refused(models):
    positive = MODELS["Z-Image"].text(1, reference_latents=[randn(1, 16, 8, 8)])
    with pytest.raises(ValueError, match="does not work with reference latents on this model"):
        sampled("Z-Image", guided(models("Z-Image"), MODELS["Z-Image"].text(2)), positive)


# ---- what it keeps


def test_a_text_that_goes_through_the_model_s_own_weights_follows_their_patches(models):
    """Anima's adapter: the text is kept from run to run, but not from one LoRA to another."""
    negative = MODELS["Anima"].text(2)
    first = guided(models("Anima"), negative)
    before = sampled("Anima", first)
    patches = {"diffusion_model.llm_adapter.out_proj.weight": ("diff", (randn(16, 16),))}
    model, second = models("Anima").clone(), first.clone()
    for one in (model, second):
        one.add_patches(patches)
    expected = sampled("Anima", by_hand("Anima", model, negative))
    assert off_by(expected, before) > 1e-2
    assert off_by(sampled("Anima", second), expected) < 2e-5
    assert torch.equal(sampled("Anima", first), before)


@pytest.mark.parametrize("name", FEW)
def test_half_precision_takes_the_text_along(name):
    model, text = MODELS[name].model(), MODELS[name].text(1)
    for key, weight in model.model.diffusion_model.named_parameters():
        if "patch_embedding" not in key:  # Wan's stays in float32
            weight.data = weight.data.to(torch.bfloat16)
    model.model.diffusion_model.dtype = torch.bfloat16
    plain = sampled(name, model, text)
    same, other = (sampled(name, guided(model, negative), text) for negative in (text, MODELS[name].text(2, 8)))
    assert torch.isfinite(other).all()
    assert off_by(same, plain) < 0.1  # bfloat16 has 8 bits
    assert off_by(other, plain) > off_by(same, plain)


@pytest.mark.parametrize("name", FEW)
def test_a_cache_of_steps_may_leave_steps_out(models, name):
    """Core's EasyCache evaluates the first step, and later ones as it sees fit; it sorts rows by their conditioning."""
    patched = EasyCacheNode.execute(guided(models(name), MODELS[name].text(2)), 0.2, 0.15, 0.95, False).result[0]
    always = EasyCacheNode.execute(guided(models(name), MODELS[name].text(2)), 0.0, 0.15, 0.95, False).result[0]
    plain = guided(models(name), MODELS[name].text(2))
    assert torch.equal(sampled(name, always, steps=4, batch=2), sampled(name, plain, steps=4, batch=2))
    assert torch.isfinite(sampled(name, patched, steps=4, batch=2)).all()


def test_what_a_model_is_given_is_doubled_for_the_guided_rows():
    rows = Rows([0], 2, 4)  # chunks: the positive prompt, and another
    x, lists = (
        torch.arange(4.0)[:, None],
        {"input": [None, torch.arange(8.0).reshape(4, 2)], "scale": torch.tensor(2.0)},
    )
    assert rows.doubled(x).flatten().tolist() == [0, 1, 2, 3, 0, 1]
    doubled = rows.doubled(lists)
    assert doubled["input"][0] is None
    assert doubled["input"][1].shape == (6, 2)
    assert doubled["scale"] is lists["scale"]
    options = rows.doubled_options({"cond_or_uncond": [0, 1], "uuids": ["a", "b"], "other": 3})
    assert options == {"cond_or_uncond": [0, 1, 0], "uuids": ["a", "b", "a"], "other": 3}
