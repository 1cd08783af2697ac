"""The consistency distillation loss, against formulas worked out by hand and a problem with a known solution."""

import math
from contextlib import contextmanager
from itertools import pairwise

import pytest
import torch

from lcm_kit.distillation.objective import (
    Batch,
    Draws,
    consistency,
    consistency_loss,
    ddim_step,
    distillation_loss,
    guided,
    noised,
    pseudo_huber,
)
from lcm_kit.tests.distillation.toy import ALPHA_BAR, SPREAD, TABLE, perfect_denoiser, perfect_jump


def loss_of(student, points, timestep, **options):
    generator = torch.Generator().manual_seed(0)
    z0 = SPREAD * torch.randn(512, 3, generator=generator)
    noise = torch.randn(512, 3, generator=generator)
    stride = 1000 // points
    timestep = torch.full((512,), timestep)
    options = {"huber_c": 1e-6} | options
    return consistency_loss(student, perfect_denoiser, student, z0, noise, timestep, stride, TABLE, **options).item()


def test_guidance_is_one_plus_w_conditional_minus_w_unconditional():
    cond, uncond, w = torch.tensor([2.0]), torch.tensor([0.5]), 6.5
    assert guided(cond, uncond, 1 + w).item() == pytest.approx((1 + w) * 2.0 - w * 0.5)


def test_a_ddim_step_is_that_of_song_et_al_in_vp_scale():
    # z' = sqrt(a') x0 + sqrt(1 - a') eps with eps = (z - sqrt(a) x0) / sqrt(1 - a): equation 12, eta = 0.
    a, a_next = ALPHA_BAR[499].item(), ALPHA_BAR[479].item()
    z, x0 = 0.7, -0.2
    eps = (z - math.sqrt(a) * x0) / math.sqrt(1 - a)
    expected = math.sqrt(a_next) * x0 + math.sqrt(1 - a_next) * eps
    x = torch.tensor(z / math.sqrt(a))
    stepped = ddim_step(x, torch.tensor(x0), TABLE[499], TABLE[479])
    assert stepped.item() * math.sqrt(a_next) == pytest.approx(expected, rel=1e-5)


def test_a_step_of_a_flow_model_stays_on_its_straight_line():
    z0, noise = torch.randn(2, 4, 3, generator=torch.Generator().manual_seed(4))
    sigma, sigma_next = torch.tensor(0.8), torch.tensor(0.3)
    x, x_next = noised(z0, noise, sigma, flow=True), noised(z0, noise, sigma_next, flow=True)
    torch.testing.assert_close(x, 0.2 * z0 + 0.8 * noise)
    torch.testing.assert_close(ddim_step(x, z0, sigma, sigma_next), x_next)


def test_a_flow_model_that_knows_the_data_has_no_loss():
    """The straight line's own z0, which the consistency function of a single picture is."""
    table = torch.arange(1, 1001) / 1000
    z0, noise = torch.randn(2, 16, 3, generator=torch.Generator().manual_seed(4))
    timestep = torch.arange(16) * 60 + 99
    loss = consistency_loss(*[lambda x, s: z0] * 3, z0, noise, timestep, 20, table, flow=True)
    assert loss < 1e-9


def test_pseudo_huber_is_quadratic_below_c_and_linear_above():
    error = torch.tensor([0.0, 1e-5, 1.0])
    assert pseudo_huber(error, 1e-2).tolist() == pytest.approx([0.0, 1e-10 / 2e-2, 0.99005], rel=1e-2)


def test_pseudo_huber_bends_at_a_thousandth_unless_told():
    error = torch.tensor([1e-4, 1e-3, 1.0])
    assert torch.equal(pseudo_huber(error), pseudo_huber(error, 0.001))


def test_without_huber_the_distance_is_the_mean_square():
    student = lambda x, sigma: torch.zeros_like(x)  # noqa: E731
    z0, noise = torch.randn(2, 8, 3, generator=torch.Generator().manual_seed(4))
    timestep = torch.full((8,), 19)
    x_next = ddim_step(z0 + TABLE[19] * noise, z0, TABLE[19], TABLE[0])
    loss = consistency_loss(student, lambda x, s: z0, student, z0, noise, timestep, 20, TABLE, huber_c=None)
    # timestep 0: the target is the point itself. At timestep 19 c_skip is 7e-6.
    assert loss.item() == pytest.approx((x_next / (1 + TABLE[0] ** 2).sqrt()).square().mean().item(), rel=1e-4)


@pytest.mark.parametrize("flow", [False, True])
def test_the_distance_in_v_is_that_of_the_velocities(flow):
    """v = alpha * eps - sigma * x0 of Salimans and Ho 2022, in VP scale; of a flow model, eps - x0."""
    generator = torch.Generator().manual_seed(3)
    z0, noise, found, wanted = torch.randn(4, 16, 3, generator=generator).unbind()
    table = torch.arange(1, 1001) / 1000 if flow else TABLE
    timestep, last = torch.randint(20, 1000, (16,), generator=generator), torch.zeros(1, dtype=torch.int64)
    sigma = table[timestep].view(-1, 1)
    x = noised(z0, noise, sigma, flow=flow)

    def v(x0):
        if flow:
            return (x - x0) / sigma
        alpha = (1 + sigma**2).rsqrt()
        return alpha * (x - x0) / sigma - alpha * sigma * x0

    def student(_, at):
        return found if at.max() > table[last] else wanted

    def loss(weighting):
        # At stride 999 the neighbour is timestep 0 for all, where the target is where the teacher's step has led.
        return consistency_loss(
            student, lambda *_: wanted, student, z0, noise, timestep, 999, table, huber_c=None, weighting=weighting, flow=flow
        )  # fmt: skip

    target = ddim_step(x, wanted, sigma, table[last])
    target = target if flow else target / (1 + table[last] ** 2).sqrt()
    torch.testing.assert_close(loss("v"), (v(found) - v(target)).square().mean(), rtol=1e-4, atol=0)
    torch.testing.assert_close(loss("x0"), (found - target).square().mean(), rtol=1e-4, atol=0)


def test_the_consistency_function_at_timestep_0_is_its_input():
    x, sigma = torch.randn(4, 3, generator=torch.Generator().manual_seed(1)), TABLE[:1].expand(4)
    f = consistency(lambda x, sigma: torch.full_like(x, 99.0), x, sigma, torch.zeros(4, dtype=torch.long))
    torch.testing.assert_close(f, x / (1 + TABLE[0] ** 2).sqrt())


@pytest.mark.parametrize("flow", [False, True])
@pytest.mark.parametrize("shape", [(3, 5), (3, 2, 4, 4)])
def test_the_consistency_function_is_the_papers_in_its_own_latent(flow, shape):
    """Equation 9 with 1 / 2 and 10 t, of z = x / sqrt(1 + sigma^2) in diffusion models and of x itself in flow models."""
    x, d = torch.randn(2, *shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    timestep, sigma = torch.tensor([0, 1, 40]), torch.tensor([3.0, 1.0, 0.5], dtype=torch.float64)
    found = consistency(lambda x, sigma: d, x, sigma, timestep, flow=flow)
    for image, (t, s) in enumerate(zip(timestep.tolist(), sigma.tolist(), strict=True)):
        z = x[image] if flow else x[image] / math.sqrt(1 + s**2)
        wanted = 0.25 / (0.25 + (10 * t) ** 2) * z + 10 * t / math.sqrt(0.25 + (10 * t) ** 2) * d[image]
        torch.testing.assert_close(found[image], wanted, rtol=1e-6, atol=1e-6)


def test_the_exact_jump_has_almost_no_loss_and_less_on_a_finer_grid():
    # What is left is the error of one Euler step, of second order in the step: a fifth of the stride, a 25th of it.
    coarse, fine = loss_of(perfect_jump, 10, 499), loss_of(perfect_jump, 50, 499)
    assert coarse < 0.05
    assert coarse / fine == pytest.approx(25, rel=0.5)


def test_the_denoiser_itself_is_not_a_consistency_function():
    assert loss_of(perfect_denoiser, 50, 499) > 5 * loss_of(perfect_jump, 50, 499)


@pytest.mark.parametrize("points", [10, 50])
def test_the_exact_consistency_function_of_the_solver_has_no_loss(points):
    """A DDIM step of Gaussian data multiplies x by 1 + (sigma' / sigma - 1) * sigma^2 / width^2; the exact function
    is the product of these down to timestep 0. That leaves rounding."""
    stride = 1000 // points
    timesteps = [0, *range(stride - 1, 1000, stride)]
    product, gains = 1 / (1 + TABLE[0].double() ** 2).sqrt(), {}
    for below, t in pairwise(timesteps):
        sigma, sigma_next = TABLE[t].double(), TABLE[below].double()
        product = product * (1 + (sigma_next / sigma - 1) * sigma**2 / (SPREAD**2 + sigma**2))
        gains[t] = float(product)

    def exact(x, sigma):
        t = int((TABLE - sigma[0]).abs().argmin())
        return x * gains[t] if t else x  # at 0 nothing of it is used

    for t in timesteps[2::5]:
        assert loss_of(exact, points, t, huber_c=1.0) < 1e-11  # errors of 3e-6 on data up to 40 wide, squared


AS_PUBLISHED = {"huber_c": 0.001, "weighting": "x0", "flow": False}


def test_the_loss_is_the_published_one_unless_told():
    z0, noise = torch.randn(2, 4, 3, generator=torch.Generator().manual_seed(4))
    parts = *[lambda x, s: 0.3 * x] * 3, z0, noise, torch.tensor([19, 99, 499, 999]), 20, TABLE
    assert torch.equal(consistency_loss(*parts), consistency_loss(*parts, **AS_PUBLISHED))


@pytest.mark.parametrize("options", [{}, {"huber_c": None}, {"weighting": "v"}, {"flow": True}])
def test_one_network_serves_as_teacher_student_and_target(options):
    """Teacher off, student and target on, and the target without a gradient: written out with three functions."""
    table = torch.arange(1, 1001) / 1000 if "flow" in options else TABLE
    gain = torch.nn.Parameter(torch.tensor(0.3))

    class Switch:
        on = True

        @contextmanager
        def disabled(self):
            self.on = False
            yield
            self.on = True

    switch = Switch()
    z0, noise = torch.randn(2, 4, 3, generator=torch.Generator().manual_seed(4))
    timestep, cfg = torch.tensor([19, 99, 499, 999]), torch.tensor([1.0, 2.0, 8.5, 14.0])
    prompts = {"cond": torch.tensor(0.4), "uncond": torch.tensor(0.1)}

    def denoise(x, sigma, cond):
        if isinstance(cond, tuple):
            return torch.cat([denoise(a, s, c) for a, s, c in zip(x.chunk(2), sigma.chunk(2), cond, strict=True)])
        return x * (prompts[cond] + gain * switch.on)

    def teacher(x, sigma):
        return x * (prompts["uncond"] + cfg[:, None] * 0.3)

    student = lambda x, s: x * (prompts["cond"] + gain)  # noqa: E731
    target = lambda x, s: x * (prompts["cond"] + gain.detach())  # noqa: E731
    expected = consistency_loss(student, teacher, target, z0, noise, timestep, 20, table, **AS_PUBLISHED | options)
    (expected_gradient,) = torch.autograd.grad(expected, gain)
    for both in (None, ("cond", "uncond")):
        loss = distillation_loss(
            denoise, switch, Batch(z0, "cond", "uncond", both), Draws(timestep, cfg, noise), stride=20, table=table, **options
        )  # fmt: skip
        (gradient,) = torch.autograd.grad(loss, gain)
        torch.testing.assert_close(loss, expected)
        torch.testing.assert_close(gradient, expected_gradient)


def test_only_the_student_gets_a_gradient():
    own, other = torch.nn.Parameter(torch.tensor(0.5)), torch.nn.Parameter(torch.tensor(0.5))
    z0 = torch.ones(2, 3)
    consistency_loss(
        lambda x, s: own * x, lambda x, s: other * x, lambda x, s: other * x,
        z0, torch.ones_like(z0), torch.tensor([499, 19]), 20, TABLE,
    ).backward()  # fmt: skip
    assert own.grad is not None
    assert own.grad != 0
    assert other.grad is None
