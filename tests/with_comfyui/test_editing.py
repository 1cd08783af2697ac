"""LCM Edit on ComfyUI's own models, masks, areas, ControlNets and progress, and on the embedded model."""

import comfy.controlnet
import comfy.hooks
import comfy.model_management
import comfy.sd
import comfy.utils
import latent_preview
import pytest
import torch
from comfy.cli_args import LatentPreviewMethod, args
from comfy.model_base import ModelType
from comfy_extras import nodes_apg, nodes_differential_diffusion
from nodes import ConditioningSetArea, LatentFromBatch, SetLatentNoiseMask

from lcm_kit.host.sampling.schedules import lcm_sigmas
from lcm_kit.nodes.editing import LCMEdit
from lcm_kit.nodes.sampling import LCMKSampler
from lcm_kit.samplers.noise import StepNoise, level_numbers
from lcm_kit.samplers.presets import PRESETS
from lcm_kit.samplers.schedule import lcm_timesteps
from lcm_kit.tests.helpers import relative
from lcm_kit.tests.with_comfyui import tiny
from lcm_kit.tests.with_comfyui.sampled import CAT, DOG, SEED
from lcm_kit.tests.with_comfyui.sampled import edited as edit

pytestmark = pytest.mark.usefixtures("no_gradients")


# ---- the edit


@pytest.mark.parametrize("model_type", [ModelType.EPS, ModelType.V_PREDICTION, ModelType.FLOW])
def test_equal_prompts_return_the_picture_to_the_bit(model_type):
    latent = tiny.latent(2, seed=9)
    assert torch.equal(edit(tiny.small_model(model_type), latent, target=CAT), latent["samples"])


@pytest.mark.parametrize("with_apg", [False, True])
def test_equal_prompts_return_the_picture_at_any_cfg(with_apg):
    model, latent = tiny.small_model(ModelType.V_PREDICTION), tiny.latent(seed=9)
    if with_apg:  # keeps a running average of what it has seen
        model = nodes_apg.APG.execute(model, 1.0, 5.0, -0.5).result[0]
    # float32 rounding of both prompts in one call against one alone
    assert relative(edit(model, latent, target=CAT, cfg=2.0), latent["samples"]) < 1e-4


@pytest.mark.parametrize("model_type", [ModelType.EPS, ModelType.V_PREDICTION, ModelType.FLOW])
@pytest.mark.parametrize(("steps", "denoise", "cfg"), [(1, 1.0, 1.0), (4, 0.6, 1.0), (4, 1.0, 1.7)])
def test_is_the_picture_and_the_difference_of_two_predictions(model_type, steps, denoise, cfg):
    """The same written without guider or sampler, on the model's own apply_model."""
    model, latent = tiny.small_model(model_type), tiny.latent(2, seed=9)
    timesteps = lcm_timesteps(steps, strength=denoise)
    if model_type is ModelType.FLOW:  # evenly spaced, to the thousandth
        timesteps = [round(1000 * denoise * (1 - i / steps)) - 1 for i in range(steps)]
    sampling = model.get_model_object("model_sampling")
    picture = model.model.process_latent_in(latent["samples"])

    def predicted(x, sigma, cond):
        return model.model.apply_model(x, sigma.expand(2), c_crossattn=cond[0][0].expand(2, -1, -1))

    edited = picture
    for timestep in timesteps:
        sigma = sampling.sigmas[timestep]
        noise = StepNoise(SEED)(*level_numbers(sigma[None], sampling.sigmas), picture)
        x = sampling.noise_scaling(sigma, noise, edited)
        plain = predicted(x, sigma, CAT)
        target = plain + cfg * (predicted(x, sigma, DOG) - plain)
        edited = picture + target - predicted(sampling.noise_scaling(sigma, noise, picture), sigma, CAT)
    expected = model.model.process_latent_out(edited)
    assert relative(edit(model, latent, steps=steps, denoise=denoise, cfg=cfg), expected) < 1e-4
    assert relative(expected, latent["samples"]) > 0.1


@pytest.mark.parametrize("name", ["LCM", "AnimateLCM", "Turbo", "TCD", "Lightning 4 steps"])
def test_a_preset_gives_the_noise_levels_in_place_of_steps_and_original_steps(name):
    """Of a training grid, of listed timesteps; the same as a plain sampler's, which takes an edit of no picture."""
    preset = PRESETS[name]
    model, latent = tiny.small_model(), tiny.latent(seed=9)
    made = edit(model, latent, preset=preset, steps=7, original_steps=30)
    levels = lcm_sigmas(model, steps=1, denoise=1.0, original_steps=1, preset=preset)
    asked = []

    def record(apply, args):
        asked.append(float(args["timestep"].flatten()[0]))
        return apply(args["input"], args["timestep"], **args["c"])

    watched = tiny.small_model()
    watched.set_model_unet_function_wrapper(record)
    assert torch.equal(edit(watched, latent, preset=preset), made)
    assert sorted(set(asked), reverse=True) == pytest.approx(levels[:-1].tolist())
    if not preset.timesteps:
        assert torch.equal(made, edit(model, latent, steps=preset.steps, original_steps=preset.original_steps))


@pytest.mark.parametrize("name", {(p.cfg, p.gamma, p.flow): name for name, p in PRESETS.items()}.values())
def test_what_an_edit_has_no_place_for_in_a_preset_is_told(name, caplog):
    """Its gamma and cfg; a preset of another kind of model is refused as everywhere."""
    preset = PRESETS[name]
    model = tiny.small_model(ModelType.FLOW if preset.flow else ModelType.EPS)
    edit(model, tiny.latent(seed=9), preset=preset)
    told = [
        record.getMessage() for record in caplog.records if "LCM Edit takes the noise levels" in record.getMessage()
    ]
    assert bool(told) == ((preset.cfg, preset.gamma) != (1.0, 1.0))
    for line in told:
        named = line.partition("not its ")[2].partition(":")[0]
        assert (f"cfg {preset.cfg:g}" in named, "gamma" in named) == (preset.cfg != 1.0, preset.gamma != 1.0)


def test_a_lora_hook_on_the_target_acts_on_the_target_alone():
    """A LoRA that ComfyUI puts on one prompt, against two models of the same weights, one with the LoRA."""
    model, with_lora = tiny.small_model(), tiny.small_model()
    lora, latent = tiny.lora(model), tiny.latent(seed=9)
    patched, _ = comfy.sd.load_lora_for_models(with_lora, None, lora, 0.5, 0.0)
    patched.patch_model()
    sigma = model.get_model_object("model_sampling").sigmas[999]
    picture = model.model.process_latent_in(latent["samples"])
    x = picture + sigma * StepNoise(SEED)(1_000_000, picture)
    plain, changed = (
        entry.model.apply_model(x, sigma.expand(1), c_crossattn=prompt[0][0])
        for entry, prompt in ((model, CAT), (patched, DOG))
    )
    expected = model.model.process_latent_out(picture + changed - plain)
    hooked = [[DOG[0][0], {"hooks": comfy.hooks.create_hook_lora(lora, 0.5, 0.0)}]]
    assert relative(edit(model, latent, target=hooked, steps=1), expected) < 1e-4
    assert relative(edit(model, latent, steps=1), expected) > 0.01


@pytest.mark.parametrize(("cfg", "calls", "conds"), [(1.0, 8, [[0], [0]]), (2.0, 12, [[0], [0, 1]])])
def test_calls_the_model_once_a_prompt_and_step(cfg, calls, conds):
    model, seen = tiny.count_calls(tiny.small_model())
    edit(model, tiny.latent(seed=9), cfg=cfg)
    assert seen.calls == calls
    assert seen.conds == conds * 4


# ---- noise and batches


def test_an_image_of_a_batch_is_the_image_edited_alone():
    model, latent = tiny.small_model(ModelType.V_PREDICTION), tiny.latent(3, 10, 14, seed=9)
    together = edit(model, latent)
    for index in range(3):
        (alone,) = LatentFromBatch().frombatch(latent, index, 1)
        assert relative(edit(model, alone), together[index : index + 1]) < 1e-5


def test_the_seed_decides_and_torchs_own_generator_is_left_alone():
    model, latent = tiny.small_model(), tiny.latent(seed=9)
    torch.manual_seed(123)
    expected = torch.randn(3)
    torch.manual_seed(123)
    first = edit(model, latent)
    assert torch.equal(torch.randn(3), expected)
    assert torch.equal(edit(model, latent), first)
    assert relative(edit(model, latent, seed=SEED + 1), first) > 0.01


def by_frames(model):
    """The MODEL with a UNet that takes video latents (b, c, frames, h, w), frame by frame."""
    model = model.clone()

    def wrapper(apply_model, given):
        x, count = given["input"], given["input"].shape[2]
        frames = x.movedim(2, 1).flatten(0, 1)
        c = given["c"] | {"c_crossattn": given["c"]["c_crossattn"].repeat_interleave(count, 0)}
        out = apply_model(frames, given["timestep"].repeat_interleave(count), **c)
        return out.unflatten(0, (-1, count)).movedim(1, 2)

    model.set_model_unet_function_wrapper(wrapper)
    return model


def test_video_latents_are_edited_and_kept():
    model = by_frames(tiny.small_model(ModelType.V_PREDICTION))
    video = {"samples": tiny.latent(6, seed=9)["samples"].unflatten(0, (2, 3)).movedim(1, 2)}
    assert torch.equal(edit(model, video, target=CAT), video["samples"])
    assert relative(edit(model, video), video["samples"]) > 0.1


# ---- masks, areas, ControlNets


def left_half(value=1.0):
    mask = torch.zeros(1, 8, 8)
    mask[:, :, :4] = value
    return mask


def test_a_noise_mask_keeps_what_it_does_not_cover_to_the_bit():
    model, latent = tiny.small_model(ModelType.V_PREDICTION), tiny.latent(2, seed=9)
    (masked,) = SetLatentNoiseMask().set_mask(latent, left_half())
    images = edit(model, masked)
    assert torch.equal(images[..., 4:], latent["samples"][..., 4:])
    assert (images[..., :4] - latent["samples"][..., :4]).abs().max() > 0.1


def test_nested_latents_are_edited_together_and_a_mask_keeps_its_part():
    model, latent = (
        tiny.pair_model(),
        tiny.nested(tiny.latent(2, seed=9)["samples"], torch.linspace(-1, 1, 30).view(2, 3, 5)),
    )
    parts = latent["samples"].unbind()
    assert all(map(torch.equal, edit(model, latent, target=CAT).unbind(), parts))
    assert all(relative(edited, part) > 1e-4 for edited, part in zip(edit(model, latent).unbind(), parts, strict=True))
    masks = tiny.nested(left_half(), torch.zeros(1, 1, 5))["samples"]
    picture, sound = edit(model, {**latent, "noise_mask": masks}).unbind()
    assert torch.equal(sound, parts[1])
    assert torch.equal(picture[..., 4:], parts[0][..., 4:])
    assert (picture[..., :4] - parts[0][..., :4]).abs().max() > 0.1


def test_a_noise_mask_over_all_changes_nothing_but_rounding():
    model, latent = tiny.small_model(ModelType.V_PREDICTION), tiny.latent(seed=9)
    (masked,) = SetLatentNoiseMask().set_mask(latent, torch.ones(1, 8, 8))
    assert relative(edit(model, masked), edit(model, latent)) < 1e-5


def test_half_a_mask_is_half_the_change_in_one_step():
    model, latent = tiny.small_model(ModelType.V_PREDICTION), tiny.latent(seed=9)
    (masked,) = SetLatentNoiseMask().set_mask(latent, torch.full((1, 8, 8), 0.5))
    full, half = (edit(model, entry, steps=1) - latent["samples"] for entry in (latent, masked))
    assert relative(2 * half, full) < 1e-3


def test_differential_diffusion_decides_step_by_step_what_is_masked():
    model, latent = tiny.small_model(ModelType.V_PREDICTION), tiny.latent(seed=9)
    model = nodes_differential_diffusion.DifferentialDiffusion.execute(model).result[0]
    masks = {value: SetLatentNoiseMask().set_mask(latent, left_half(value))[0] for value in (0.2, 0.5)}
    change = (edit(model, masks[0.5]) - latent["samples"]).abs()
    assert change[..., 4:].max() == 0
    assert change[..., :4].max() > 0.1
    # its threshold ends at timestep 259 of 999
    assert torch.equal(edit(model, masks[0.2]), latent["samples"])


def test_a_prompt_for_an_area_changes_that_area():
    """One step: in later ones the network carries the change beyond the area, as it should."""
    model, latent = tiny.small_model(ModelType.V_PREDICTION), tiny.latent(height=16, width=16, seed=9)
    (area,) = ConditioningSetArea().append(DOG, width=64, height=128, x=0, y=0, strength=1.0)
    result = edit(model, latent, target=CAT + area, steps=1)
    change = (result - latent["samples"]).abs()
    assert change[..., 8:].max() < 1e-5
    assert change[..., :8].max() > 0.1
    assert relative(edit(model, latent, source=CAT + area, target=CAT + area), latent["samples"]) < 1e-5


class MiddleControl(comfy.controlnet.ControlBase):
    """A ControlNet whose net is a constant for the UNet's middle block. Copies count in one place."""

    def __init__(self):
        super().__init__()
        self.seen = []

    def get_control(self, x_noisy, t, cond, batched_number, transformer_options):
        self.seen.append(batched_number)
        return {"middle": [torch.linspace(-1, 1, 64)[None, :, None, None].expand(len(x_noisy), 64, 4, 4)]}


@pytest.mark.parametrize(("to_all", "calls"), [(True, 8), (False, 4)])
def test_a_controlnet_on_the_target_reaches_the_source_where_its_node_says_so(to_all, calls):
    model, latent = tiny.tiny_model(ModelType.V_PREDICTION, **tiny.WITH_MIDDLE), tiny.latent(seed=9)
    control = MiddleControl()
    target = [[DOG[0][0], {"control": control, "control_apply_to_uncond": to_all}]]
    controlled = edit(model, latent, target=target)
    assert len(control.seen) == calls
    assert relative(controlled, edit(model, latent)) > 0.01


# ---- the host around the loop


def test_progress_counts_model_calls(monkeypatch):
    seen = []
    monkeypatch.setattr(
        comfy.utils, "PROGRESS_BAR_HOOK", lambda value, total, preview, **more: seen.append((value, total))
    )
    edit(tiny.small_model(), tiny.latent(seed=9), steps=3)
    assert seen == [(call, 6) for call in range(1, 7)]


@pytest.mark.parametrize("last_call", [1, 2, 5])
def test_an_interrupt_stops_after_the_model_call_it_came_in(last_call):
    model, seen = tiny.count_calls(tiny.small_model())
    inner = model.model_options["model_function_wrapper"]

    def interrupted(apply_model, given):
        result = inner(apply_model, given)
        if seen.calls == last_call:
            comfy.model_management.interrupt_current_processing()
        return result

    model.set_model_unet_function_wrapper(interrupted)
    with pytest.raises(comfy.model_management.InterruptProcessingException):
        edit(model, tiny.latent(seed=9), steps=8)
    assert seen.calls == last_call


def test_what_is_handed_in_stays_as_it_was():
    model, latent = tiny.small_model(), tiny.latent(2, seed=9) | {"batch_index": [3, 4]}
    before, sampling, conds = latent["samples"].clone(), model.get_model_object("model_sampling"), CAT[0][0].clone()
    result = LCMEdit.execute(model, CAT, DOG, latent, SEED, 2, 1.0, 1.0, 50, 0.2).result[0]
    assert result["batch_index"] == [3, 4]
    assert torch.equal(latent["samples"], before)
    assert torch.equal(CAT[0][0], conds)
    assert CAT[0][1] == {}
    assert model.get_model_object("model_sampling") is sampling
    assert "lcm_kit_prompt" not in model.model_options


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"steps": 51}, r"steps is 51 .*original_steps = 50"),
        ({"latent": tiny.latent()}, r"latent_image is empty.*Connect VAE Encode"),
    ],
)
def test_refuses_with_the_value_and_the_way_out(changed, message):
    changed = {"latent": tiny.latent(seed=9)} | changed
    with pytest.raises(ValueError, match=message):
        edit(tiny.small_model(), **changed)


def test_denoise_zero_gives_the_latent_back():
    latent = tiny.latent(seed=9)
    assert torch.equal(edit(tiny.small_model(), latent, denoise=0.0), latent["samples"])


# ---- the embedded model


@pytest.fixture(scope="module")
def demo(tiny_emoji, tiny_emoji_lcm):
    """(model with its LCM-LoRA, function from a prompt to its conditioning)"""
    _, clip = tiny_emoji
    return tiny_emoji_lcm, lambda text: clip.encode_from_tokens_scheduled(clip.tokenize(text))


@pytest.fixture(scope="module")
def owls(demo):
    """A LATENT of two pictures."""
    model, prompt = demo
    empty = {"samples": torch.zeros(2, 12, 8, 8)}
    with torch.inference_mode():
        return LCMKSampler.execute(model, prompt("owl blue background"), empty, 1, 4, 1.0, 1.0, 1.0, -1, 50).result[0]


def test_the_embedded_model_returns_the_picture_for_equal_prompts(demo, owls):
    model, prompt = demo
    owl = prompt("owl blue background")
    assert torch.equal(edit(model, owls, source=owl, target=owl), owls["samples"])


def test_the_embedded_model_repaints_the_background_and_keeps_the_owl(demo, owls):
    """Against image to image with the target prompt at the same steps and denoise, which draws another owl."""
    model, prompt = demo
    owl, red = prompt("owl blue background"), prompt("owl red background")
    edited = edit(model, owls, source=owl, target=red)
    redrawn = LCMKSampler.execute(model, red, owls, SEED, 4, 1.0, 1.0, 1.0, -1, 50).result[0]["samples"]
    corner, owl_itself = (..., slice(0, 1), slice(0, 1)), (..., slice(2, 6), slice(3, 5))

    def moved(samples, where):
        return (samples - owls["samples"])[where].square().mean().sqrt().item()

    assert moved(edited, corner) > 0.5 * moved(redrawn, corner) > 0.2
    assert moved(edited, owl_itself) < 0.5 * moved(redrawn, owl_itself)
    careful = edit(model, owls, source=owl, target=red, keep=0.2)
    assert moved(careful, corner) > 0.9 * moved(edited, corner)
    assert moved(careful, owl_itself) < moved(edited, owl_itself)


def test_the_preview_shows_the_edit_so_far(demo, owls, monkeypatch):
    model, prompt = demo
    seen = []
    monkeypatch.setattr(args, "preview_method", LatentPreviewMethod.Latent2RGB)
    monkeypatch.setattr(comfy.utils, "PROGRESS_BAR_HOOK", lambda value, total, preview, **more: seen.append(preview[1]))
    result = edit(model, owls, source=prompt("owl blue background"), target=prompt("owl red background"), steps=2)
    previewer = latent_preview.get_previewer(model.load_device, model.model.latent_format)
    first, last = (previewer.decode_latent_to_preview(entry) for entry in (owls["samples"], result))
    assert [seen[0].tobytes(), seen[-1].tobytes()] == [first.tobytes(), last.tobytes()]
    assert seen[1].tobytes() == seen[2].tobytes()
