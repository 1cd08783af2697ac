"""edit_ddcm: what must come out by hand, the published algorithm in its own form, flow models, calls and errors."""

import math

import pytest
import torch

from lcm_kit.samplers.editing import changed_share, edit_ddcm
from lcm_kit.samplers.noise import StepNoise, level_numbers
from lcm_kit.samplers.schedule import lcm_timesteps, sigmas_at, timesteps_at
from lcm_kit.tests.samplers import toy

TABLE = toy.sigma_table()
CAT, DOG = 0.7, -0.4


def picture(*shape, seed=1):
    return torch.randn(shape or (2, 4, 6, 6), generator=torch.Generator().manual_seed(seed))


def schedule(steps=4, strength=1.0):
    return sigmas_at(lcm_timesteps(steps, strength=strength), TABLE)


def flow(sigma, noise, latent):
    """The forward process of flow models, as ComfyUI's CONST.noise_scaling."""
    return sigma * noise + (1.0 - sigma) * latent


def output_of(x_vp, timestep, prompt):
    """A network: its output depends on the prompt in every place, but not in the same way."""
    return toy.toy_network(x_vp + prompt, timestep) + 0.1 * prompt


def denoiser(prediction, prompt):
    """That network behind (x, sigma) -> x0 in sigma space."""

    def model(x, sigma):
        (level,) = sigma.unique()
        x_vp, s = x / (1.0 + level**2).sqrt(), level
        output = output_of(x_vp, int(timesteps_at(sigma[:1], TABLE)), prompt)
        if prediction == "epsilon":
            return x - s * output
        return output if prediction == "sample" else (x_vp - s * output) / (1.0 + s**2).sqrt()

    return model


def as_published(prediction, z0, timesteps, noise, source, target):
    """Virtual inversion, Algorithm 2 of arXiv 2312.04965, in the variance-preserving latent and in predicted noise.

    Departs from it once, as edit_ddcm does: it draws the first latent itself, we the noise that is in it.
    """

    def epsilon(z, t, prompt):
        a, b = abar[t].sqrt(), (1 - abar[t]).sqrt()
        output = output_of(z, t, prompt)
        if prediction == "epsilon":
            return output
        return (z - a * output) / b if prediction == "sample" else a * output + b * z

    abar, edited = toy.alphas_cumprod().double(), z0
    for step, t in enumerate(timesteps):
        fresh = noise(step, z0)
        z_source = abar[t].sqrt() * z0 + (1 - abar[t]).sqrt() * fresh
        z_target = abar[t].sqrt() * edited + (1 - abar[t]).sqrt() * fresh
        eps_cons = (z_source - abar[t].sqrt() * z0) / (1 - abar[t]).sqrt()
        eps_target = epsilon(z_target, t, target) + (eps_cons - epsilon(z_source, t, source))
        edited = (z_target - (1 - abar[t]).sqrt() * eps_target) / abar[t].sqrt()
    return edited


@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction", "sample"])
@pytest.mark.parametrize(("steps", "strength"), [(1, 1.0), (2, 1.0), (4, 1.0), (4, 0.6), (8, 0.8), (12, 1.0)])
def test_equals_the_published_algorithm(prediction, steps, strength):
    z0, noise = picture(), StepNoise(3)
    timesteps = lcm_timesteps(steps, strength=strength)
    sigmas = sigmas_at(timesteps, TABLE)
    levels = level_numbers(sigmas)
    expected = as_published(prediction, z0.double(), timesteps, lambda i, like: noise(levels[i], z0).double(), CAT, DOG)
    actual = edit_ddcm(denoiser(prediction, CAT), denoiser(prediction, DOG), z0, sigmas, noise=noise, disable=True)
    # 1e-4: at sigma 14.6 an x0 is the small difference of large numbers, here in float32 and there in float64
    torch.testing.assert_close(actual, expected.float(), rtol=0, atol=1e-4)
    assert (actual - z0).abs().mean() > 0.05


@pytest.mark.parametrize("shape", [(1, 4, 8, 8), (3, 12, 5, 7), (2, 16, 3, 4, 4), (2, 8, 20)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.float16, torch.bfloat16])
def test_equal_prompts_return_the_picture_to_the_bit(shape, dtype):
    z0 = picture(*shape).to(dtype)
    model = denoiser("v_prediction", DOG)
    result = edit_ddcm(model, model, z0, schedule(), noise=StepNoise(0), disable=True)
    assert torch.equal(result, z0)
    assert result.dtype == dtype
    assert result.data_ptr() != z0.data_ptr()


def test_a_model_of_one_picture_a_prompt_moves_by_their_difference():
    """Point masses: the perfect denoiser returns its prompt's picture, whatever it is shown."""
    z0, cat, dog = picture(), picture(seed=2), picture(seed=3)
    result = edit_ddcm(lambda x, sigma: cat, lambda x, sigma: dog, z0, schedule(12), noise=StepNoise(0), disable=True)
    torch.testing.assert_close(result, z0 + dog - cat)


@pytest.mark.parametrize("strength", [0.3, 0.6, 1.0])
def test_a_model_of_gaussians_moves_by_the_share_that_noise_leaves_open(strength):
    """Prompts as N(mean, s^2): D = mean + w (x - mean), w = s^2 / (s^2 + sigma^2). The noise cancels, and the change
    d of the picture follows d <- (1 - w) (dog - cat) + w d."""
    s, sigmas = 0.5, schedule(4, strength)

    def gaussian(mean):
        def model(x, sigma):
            w = s**2 / (s**2 + sigma[0] ** 2)
            return mean + w * (x - mean)

        return model

    change = 0.0
    for sigma in sigmas[:-1].tolist():
        w = s**2 / (s**2 + sigma**2)
        change = (1 - w) * (DOG - CAT) + w * change
    z0 = picture()
    result = edit_ddcm(gaussian(CAT), gaussian(DOG), z0, sigmas, noise=StepNoise(0), disable=True)
    torch.testing.assert_close(result - z0, torch.full_like(z0, change), rtol=0, atol=1e-5)


def test_flow_models_are_edited_in_their_own_process():
    """The same correction written in velocities: v + (noise - z0) - v_source in place of v, and x0 = x - sigma v."""

    def velocity(x, sigma, prompt):
        return toy.toy_network(x + prompt, int(1000 * sigma))

    def model(prompt):
        return lambda x, sigma: x - sigma[0] * velocity(x, float(sigma[0]), prompt)

    z0, noise, sigmas = picture(), StepNoise(5), torch.tensor([1.0, 0.75, 0.5, 0.25, 0.0])
    expected = z0.double()
    for sigma, number in zip(sigmas[:-1].tolist(), level_numbers(sigmas[:-1]), strict=True):
        fresh = noise(number, z0).double()
        x = (1 - sigma) * expected + sigma * fresh
        z = (1 - sigma) * z0.double() + sigma * fresh
        corrected = velocity(x, sigma, DOG) + (fresh - z0.double()) - velocity(z, sigma, CAT)
        expected = x - sigma * corrected
    result = edit_ddcm(model(CAT), model(DOG), z0, sigmas, noise=noise, noise_scaling=flow, disable=True)
    torch.testing.assert_close(result, expected.float(), rtol=0, atol=1e-5)
    same = edit_ddcm(model(CAT), model(CAT), z0, sigmas, noise=noise, noise_scaling=flow, disable=True)
    assert torch.equal(same, z0)


# ---- keeping small changes away


def test_changed_share_by_hand():
    size = torch.tensor([[[0.0, 1.0, 2.0, 3.0, 4.0, 10.0]], [[0.0, 0.0, 0.0, 0.0, 0.0, 0.0]]])
    expected = torch.tensor([[[0.0, 0.0, 0.0, 0.5, 1.0, 1.0]], [[0.0, 0.0, 0.0, 0.0, 0.0, 0.0]]])
    torch.testing.assert_close(changed_share(size, 0.2), expected)


def test_keep_leaves_small_changes_out_to_the_bit_and_large_ones_whole():
    """Point masses again: the left half differs by 1, a tenth as much on the right."""
    z0 = picture()
    change = torch.ones_like(z0)
    change[..., 3:] = 0.1
    models = (lambda x, sigma: torch.zeros_like(x)), (lambda x, sigma: change)
    result = edit_ddcm(*models, z0, schedule(), noise=StepNoise(0), keep=0.2, disable=True)
    assert torch.equal(result[..., 3:], z0[..., 3:])
    torch.testing.assert_close(result[..., :3], z0[..., :3] + 1)


@pytest.mark.parametrize("keep", [0.2, 0.5])
def test_keep_returns_the_picture_for_equal_prompts(keep):
    z0, model = picture(), denoiser("v_prediction", DOG)
    assert torch.equal(edit_ddcm(model, model, z0, schedule(), noise=StepNoise(0), keep=keep, disable=True), z0)


def test_a_tiny_keep_is_next_to_none():
    z0, models = picture(), (denoiser("v_prediction", CAT), denoiser("v_prediction", DOG))
    plain, kept = (
        edit_ddcm(*models, z0, schedule(), noise=StepNoise(0), keep=keep, disable=True) for keep in (0.0, 1e-6)
    )
    torch.testing.assert_close(kept, plain, rtol=0, atol=1e-4)


@pytest.mark.parametrize("keep", [-0.1, 0.6, math.nan])
def test_keep_outside_its_range_is_refused(keep):
    with pytest.raises(ValueError, match=r"keep is .*from 0 .* to 0\.5"):
        edit_ddcm(None, None, picture(), schedule(), noise=StepNoise(0), keep=keep, disable=True)


def test_a_position_keeps_the_picture_in_all_of_its_channels_or_in_none():
    """Point masses: each step differs alike, so the size at a position is the root mean square over its channels."""
    z0, change = picture(), picture(seed=4)
    result = edit_ddcm(
        lambda x, sigma: torch.zeros_like(x), lambda x, sigma: change, z0, schedule(), noise=StepNoise(0), keep=0.3,
        disable=True,
    )  # fmt: skip
    share = changed_share(change.square().mean(dim=1, keepdim=True).sqrt(), 0.3)
    assert 0 < float((share == 0).sum() + (share == 1).sum()) < share.numel()
    torch.testing.assert_close(result, z0 + share * change)


# ---- what the model and the callback see


def test_both_prompts_see_the_same_noise_and_in_the_first_step_the_same_latent():
    seen = []

    def recorded(name, prompt):
        inner = denoiser("epsilon", prompt)

        def model(x, sigma):
            seen.append((name, x.clone(), sigma))
            return inner(x, sigma)

        return model

    z0, sigmas, edits = picture(), schedule(3), []
    edit_ddcm(
        recorded("source", CAT), recorded("target", DOG), z0, sigmas, noise=StepNoise(7), disable=True,
        callback=lambda info: edits.append(info["denoised"]),
    )  # fmt: skip
    assert [name for name, *_ in seen] == ["source", "target"] * 3
    assert torch.equal(seen[0][1], seen[1][1])
    before = z0
    for step, level in enumerate(sigmas[:-1]):
        fresh = StepNoise(7)(*level_numbers(level[None]), z0)
        for (_, x, sigma), clean in zip(seen[2 * step : 2 * step + 2], (z0, before), strict=True):
            torch.testing.assert_close(x, clean + level * fresh)
            assert torch.equal(sigma, level.expand(2))
        before = edits[2 * step + 1]


def test_the_callback_follows_every_call_and_keeps_what_it_was_shown():
    infos, copies = [], []

    def callback(info):
        infos.append(info)
        copies.append({key: value.clone() for key, value in info.items() if isinstance(value, torch.Tensor)})

    z0 = picture()
    untouched = z0.clone()
    sigmas = schedule(3)
    result = edit_ddcm(
        denoiser("epsilon", CAT), denoiser("epsilon", DOG), z0, sigmas, noise=StepNoise(0), callback=callback,
        disable=True,
    )  # fmt: skip
    assert [info["i"] for info in infos] == list(range(6))
    assert [info["sigma"] for info in infos] == [level for level in sigmas[:-1] for _ in range(2)]
    assert torch.equal(infos[0]["denoised"], z0)
    assert torch.equal(infos[2]["denoised"], infos[1]["denoised"])
    assert torch.equal(infos[-1]["denoised"], result)
    assert torch.equal(z0, untouched)
    for info, copy in zip(infos, copies, strict=True):
        assert all(torch.equal(info[key], value) for key, value in copy.items())


@pytest.mark.parametrize("keep", [0.0, 0.3])
def test_an_image_of_a_batch_is_the_image_edited_alone(keep):
    z0 = picture(3, 4, 5, 5)
    models = denoiser("v_prediction", CAT), denoiser("v_prediction", DOG)
    together = edit_ddcm(*models, z0, schedule(), noise=StepNoise(2), keep=keep, disable=True)
    for index in range(3):
        noise = StepNoise(2, [index])
        alone = edit_ddcm(*models, z0[index : index + 1], schedule(), noise=noise, keep=keep, disable=True)
        torch.testing.assert_close(alone, together[index : index + 1], rtol=0, atol=1e-6)


def test_half_precision_goes_in_and_out_but_the_sum_is_wider():
    seen = set()

    def model(prompt):
        def inner(x, sigma):
            seen.add((x.dtype, sigma.dtype))
            return denoiser("v_prediction", prompt)(x.float(), sigma).to(x.dtype)

        return inner

    z0 = picture().half()
    result = edit_ddcm(model(CAT), model(DOG), z0, schedule(), noise=StepNoise(0), disable=True)
    exact = edit_ddcm(model(CAT), model(DOG), z0.float(), schedule(), noise=StepNoise(0), disable=True)
    assert result.dtype == torch.float16
    assert (torch.float16, torch.float32) in seen
    # the model's own input is rounded to 11 bits at sigma 14.6
    torch.testing.assert_close(result.float(), exact, rtol=0, atol=0.02)


def test_no_step_is_no_edit():
    z0 = picture()
    result = edit_ddcm(None, None, z0, torch.zeros(1), noise=StepNoise(0), disable=True)
    assert torch.equal(result, z0)
    assert result.data_ptr() != z0.data_ptr()


@pytest.mark.parametrize(
    ("sigmas", "message"),
    [
        ([], r"shape \(0,\).*\(steps \+ 1,\)"),
        ([[1.0, 0.0]], r"shape \(1, 2\)"),
        ([1.0, 0.5], r"sigmas are \[1\.0, 0\.5\].*last one 0"),
        ([1.0, 0.0, 0.0], "above 0"),
        ([math.nan, 0.0], "finite"),
        ([math.inf, 0.0], "finite"),
        ([-1.0, 0.0], "above 0"),
    ],
)
def test_refuses_a_schedule_that_is_none(sigmas, message):
    with pytest.raises(ValueError, match=message):
        edit_ddcm(None, None, picture(), torch.tensor(sigmas), noise=StepNoise(0), disable=True)


@pytest.mark.parametrize("keep", [0.0, 0.3])
def test_an_edit_takes_place_where_the_latent_is(keep):
    """meta stands for a device without numbers."""
    told = []

    def model(x, sigma):
        told.append((x.device.type, sigma.device.type))
        return 0.5 * x

    z0 = picture().to("meta")
    assert edit_ddcm(model, model, z0, schedule(2), noise=StepNoise(0), keep=keep, disable=True).device.type == "meta"
    assert told == [("meta", "meta")] * 4


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16])
def test_levels_are_float32_whatever_they_are_handed_in_as(dtype):
    sigmas, seen = schedule().to(dtype), set()

    def model(prompt):
        def inner(x, sigma):
            seen.add(sigma.dtype)
            return denoiser("v_prediction", prompt)(x, sigma)

        return inner

    def edited(levels):
        def callback(info):
            seen.update((info["sigma"].dtype, info["sigma_hat"].dtype))

        return edit_ddcm(
            model(CAT), model(DOG), picture(), levels, noise=StepNoise(0), callback=callback, disable=True
        )  # fmt: skip

    assert torch.equal(edited(sigmas), edited(sigmas.float()))
    assert seen == {torch.float32}
