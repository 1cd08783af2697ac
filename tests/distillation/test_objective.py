"""The consistency distillation loss, against formulas worked out by hand and a problem with a known solution."""

import math

import pytest
import torch

from lcm_kit.distillation.objective import consistency, consistency_loss, ddim_step, guided, pseudo_huber

BETAS = torch.linspace(0.00085**0.5, 0.012**0.5, 1000, dtype=torch.float64) ** 2
ALPHA_BAR = torch.cumprod(1 - BETAS, 0)
TABLE = ((1 - ALPHA_BAR) / ALPHA_BAR).sqrt().float()
SPREAD = 0.5  # standard deviation of the toy data, a centred Gaussian


def perfect_denoiser(x, sigma):
    """E[x0 | x] for Gaussian data."""
    variance = SPREAD**2
    return x * (variance / (variance + sigma.square())).view(-1, 1)


def perfect_jump(x, sigma):
    """Where the probability-flow ODE of Gaussian data leads from x at sigma, at the start of the table."""
    variance = SPREAD**2
    return x * ((variance + TABLE[0] ** 2) / (variance + sigma.square())).sqrt().view(-1, 1)


def loss_of(student, points, timestep):
    generator = torch.Generator().manual_seed(0)
    z0 = SPREAD * torch.randn(512, 3, generator=generator)
    noise = torch.randn(512, 3, generator=generator)
    stride = 1000 // points
    return consistency_loss(
        student, perfect_denoiser, student, z0, noise, torch.full((512,), timestep), stride, TABLE, huber_c=1e-6
    ).item()


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


def test_pseudo_huber_is_quadratic_below_c_and_linear_above():
    error = torch.tensor([0.0, 1e-5, 1.0])
    assert pseudo_huber(error, 1e-2).tolist() == pytest.approx([0.0, 1e-10 / 2e-2, 0.99005], rel=1e-2)


def test_the_consistency_function_at_timestep_0_is_its_input():
    x, sigma = torch.randn(4, 3, generator=torch.Generator().manual_seed(1)), TABLE[:1].expand(4)
    f = consistency(lambda x, sigma: torch.full_like(x, 99.0), x, sigma, torch.zeros(4, dtype=torch.long))
    torch.testing.assert_close(f, x / (1 + TABLE[0] ** 2).sqrt())


def test_the_exact_jump_has_almost_no_loss_and_less_on_a_finer_grid():
    # What is left is the error of one Euler step, of second order in the step: a fifth of the stride, a 25th of it.
    coarse, fine = loss_of(perfect_jump, 10, 499), loss_of(perfect_jump, 50, 499)
    assert coarse < 0.05
    assert coarse / fine == pytest.approx(25, rel=0.5)


def test_the_denoiser_itself_is_not_a_consistency_function():
    assert loss_of(perfect_denoiser, 50, 499) > 5 * loss_of(perfect_jump, 50, 499)


def test_a_map_trained_with_the_loss_converges_to_the_solution_of_the_ode():
    # Student: one gain per grid point, x0 = gain * x. The ODE's solution is such a gain.
    points, stride = 10, 100
    gain = torch.nn.Parameter(torch.full((1000,), 0.5))
    optimizer = torch.optim.Adam([gain], lr=0.03)
    generator = torch.Generator().manual_seed(2)

    def student(x, sigma):
        timestep = (TABLE[None] - sigma[:, None]).abs().argmin(1)
        return x * gain[timestep].view(-1, 1)

    def fine_teacher(x, sigma):
        """The x0 whose single Euler step lands on the ODE's own solution, so that only the loss is on trial."""
        timestep = (TABLE[None] - sigma[:, None]).abs().argmin(1)
        sigma_next = TABLE[(timestep - stride).clamp(min=0)]
        variance = SPREAD**2
        x_next = x * ((variance + sigma_next**2) / (variance + sigma**2)).sqrt().view(-1, 1)
        return x + (x_next - x) * (sigma / (sigma - sigma_next)).view(-1, 1)

    for step in range(600):
        for group in optimizer.param_groups:
            group["lr"] = 0.03 * (1 - step / 600)
        z0 = SPREAD * torch.randn(256, 1, generator=generator)
        timestep = torch.randint(points, (256,), generator=generator) * stride + stride - 1
        loss = consistency_loss(
            student, fine_teacher, student, z0, torch.randn(256, 1, generator=generator), timestep, stride, TABLE
        )
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    grid = torch.arange(points) * stride + stride - 1
    # The chain ends at the input in VP scale (c_skip is 1 there), hence the last root.
    solution = perfect_jump(torch.ones(points, 1), TABLE[grid])[:, 0] / (1 + TABLE[0] ** 2).sqrt()
    error = (gain.detach()[grid] - solution).abs() * (SPREAD**2 + TABLE[grid] ** 2).sqrt()
    assert error.max() < 0.02  # of data with standard deviation 0.5


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
