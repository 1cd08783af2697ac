"""Phases: where they end, the target within one, and that a LoRA of M phases is the exact map of M steps."""

import dataclasses
import re

import pytest
import torch

from lcm_kit.distillation.objective import consistency, consistency_loss, ddim_step, noised, pseudo_huber
from lcm_kit.distillation.phases import START, check_phases, edge_below, edge_timesteps, levels, phased_target
from lcm_kit.distillation.settings import Settings
from lcm_kit.distillation.trainer import Trainer, adapters_on
from lcm_kit.samplers.multistep import sample_lcm
from lcm_kit.samplers.presets import PRESETS, phased, preset_called, trailing_timesteps
from lcm_kit.tests.distillation.toy import SIZE, SPREAD, TABLE, Gains, data, denoiser, perfect_denoiser, width

FLOW_TABLE = 3 * (times := torch.arange(1, 1001) / 1000) / (1 + 2 * times)
PHASES = [n for n in range(2, 11) if 1000 % n == 0]


def jump(x, sigma, sigma_edge):
    """Where the ODE of Gaussian data leads."""
    return x * (width(sigma_edge) / width(sigma)).view(-1, 1)


def perfect_phased(phases, table=TABLE):
    """The x0 whose one DDIM step to the edge below lands on the ODE's solution there."""

    def denoise(x, sigma):
        timestep = (table[None] - sigma[:, None]).abs().argmin(1)
        edge = levels(table, edge_below(timestep, phases, len(table)))
        share = (edge / sigma)[:, None]
        return (jump(x, sigma, edge) - share * x) / (1 - share)

    return denoise


def noise_after(*_):
    raise AssertionError("gamma 0 draws no noise")


# ---- edges


@pytest.mark.parametrize("phases", PHASES)
def test_the_edges_are_the_timesteps_of_a_trailing_run_of_as_many_steps(phases):
    assert edge_timesteps(phases, 1000) == trailing_timesteps(phases)


@pytest.mark.parametrize("phases", PHASES)
def test_every_timestep_belongs_to_the_phase_whose_upper_edge_is_the_next(phases):
    timesteps = torch.arange(1000)
    bounds = [*reversed(edge_timesteps(phases, 1000))]
    upper = torch.tensor(bounds)[torch.searchsorted(torch.tensor(bounds), timesteps)]
    below = torch.tensor([START, *bounds])[torch.searchsorted(torch.tensor(bounds), timesteps)]
    assert torch.equal(edge_below(timesteps, phases, 1000), below)
    assert bool((below < timesteps).all() and (timesteps <= upper).all())


def test_the_lowest_edge_is_the_picture():
    assert levels(TABLE, torch.tensor([START, 0, 999])).tolist() == [0.0, float(TABLE[0]), float(TABLE[999])]


@pytest.mark.parametrize(
    ("phases", "skip", "original_steps"),
    [(4, 125, 0), (4, 125, 8), (4, 125, 40), (4, 25, 40), (2, 20, 50), (8, 125, 8), (5, 20, 100), (2, 500, 1000)],
)
def test_trained_timesteps_divide_each_phase_evenly_and_lead_to_each_other(phases, skip, original_steps):
    grid = Settings(phases=phases, skip=skip, original_steps=original_steps).grid(1000)
    edges = {START, *edge_timesteps(phases, 1000)}
    assert edges - {START} <= {*grid}
    counts = {edge: sum(edge_below(torch.tensor(t), phases, 1000) == edge for t in grid) for edge in edges - {999}}
    assert len({*map(int, counts.values())}) == 1
    for t in grid:
        following = max(t - skip, int(edge_below(torch.tensor(t), phases, 1000)))
        assert following in edges or following in grid


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"phases": 3}, "phases is 3, which does not divide .* use 2 or 4"),
        ({"phases": 7, "skip": 1}, "use 5 or 8"),
        ({"phases": 999}, "use 500 or 1000"),
        ({"phases": 4}, "skip is 20, and a phase has 250 .* use 10 or 25 for skip"),
        ({"phases": 4, "skip": 200}, "use 125 or 250"),
        ({"phases": 4, "skip": 500}, "use 250 for skip"),
        ({"phases": 4, "skip": 125, "original_steps": 50}, "visits 8 timesteps in 4 phases: it has to be a multiple"),
        ({"phases": 4, "skip": 125, "original_steps": 4}, "Use 8, or 0"),
        ({"phases": 4, "skip": 125, "original_steps": 16}, "a divisor of 1000"),
    ],
)
def test_what_does_not_fit_is_refused_with_what_does(change, said):
    with pytest.raises(ValueError, match=said):
        Settings(**change).grid(1000)


@pytest.mark.parametrize(
    "change", [{"phases": 3}, {"phases": 4}, {"phases": 4, "skip": 200}, {"phases": 8, "skip": 50}]
)
def test_the_advice_of_a_refusal_is_accepted(change):
    settings = Settings(**change)
    for _ in range(2):  # phases first, then skip
        try:
            settings.grid(1000)
        except ValueError as error:
            name, number = str(error).split()[0], re.search(r"use (\d+)", str(error))
            settings = dataclasses.replace(settings, **{name: int(number[1])})
    assert settings.grid(1000)


@pytest.mark.parametrize("phases", [0, -1])
def test_there_is_at_least_one_phase(phases):
    with pytest.raises(ValueError, match="phases is"):
        Settings(phases=phases)


# ---- the target


@pytest.mark.parametrize("flow", [False, True])
@pytest.mark.parametrize("skip", [50, 125, 250])
def test_the_target_leads_where_the_two_steps_lead(flow, skip):
    """Written out: the teacher's step, the student's own from there, and the x0 that goes all the way at once."""
    table = (FLOW_TABLE if flow else TABLE).double()
    generator = torch.Generator().manual_seed(0)
    teacher, own, z0, noise = torch.randn(4, 20, 3, generator=generator, dtype=torch.float64)
    timestep = torch.arange(20) * 50 + 49
    edge = edge_below(timestep, 4, 1000)
    following = torch.maximum(timestep - skip, edge)
    sigma, sigma_next, sigma_edge = (levels(table, t)[:, None] for t in (timestep, following, edge))
    x = noised(z0, noise, sigma, flow=flow)
    at_edge = x_next = ddim_step(x, teacher, sigma, sigma_next)
    goes_on = (following > edge)[:, None]
    at_edge = torch.where(goes_on, ddim_step(x_next, own, sigma_next.clamp(min=1e-9), sigma_edge), x_next)
    wanted = phased_target(teacher, own, sigma, sigma_next, sigma_edge)
    torch.testing.assert_close(ddim_step(x, wanted, sigma, sigma_edge), at_edge, atol=1e-9, rtol=1e-9)


def test_at_an_edge_the_target_is_the_teachers_step_to_the_bit_whatever_the_student_says():
    sigma = torch.tensor([TABLE[374], TABLE[124]])[:, None]
    edge = torch.tensor([TABLE[249], 0.0])[:, None]
    teacher = torch.randn(2, 3, generator=torch.Generator().manual_seed(0))
    assert torch.equal(phased_target(teacher, torch.full_like(teacher, torch.nan), sigma, edge, edge), teacher)
    x = torch.randn(2, 3, generator=torch.Generator().manual_seed(1))
    assert torch.equal(ddim_step(x, torch.full_like(x, 99.0), sigma, sigma), x)  # f at the edge is x


def test_above_the_lowest_edge_the_target_is_the_students_own_as_in_lcm():
    sigma, following = TABLE[249], TABLE[124]
    own = torch.randn(2, 3, generator=torch.Generator().manual_seed(0))
    assert torch.equal(phased_target(torch.zeros(2, 3), own, sigma, following, torch.tensor(0.0)), own)


@pytest.mark.parametrize("phases", PHASES)
@pytest.mark.parametrize("weighting", ["x0", "v"])
def test_the_exact_map_has_almost_no_loss_and_less_with_a_finer_solver(phases, weighting):
    """What is left is Euler's error, of second order in the step."""
    z0 = SPREAD * torch.randn(400, SIZE, generator=torch.Generator().manual_seed(1))
    noise = torch.randn(400, SIZE, generator=torch.Generator().manual_seed(2))

    def loss(student, skip):
        timestep = torch.arange(400) % (1000 // phases // 50) * 50 + 49 + 1000 // phases * (torch.arange(400) % phases)
        return consistency_loss(
            student, perfect_denoiser, student, z0, noise, timestep, skip, TABLE, huber_c=None, weighting=weighting, phases=phases
        ).item()  # fmt: skip

    exact = perfect_phased(phases)
    coarse, fine = loss(exact, 10), loss(exact, 1)
    assert fine < coarse / 30  # squared errors of first order in the step, near an edge of second
    assert loss(perfect_denoiser, 1) > 10 * fine


def test_a_flow_models_exact_map_has_almost_no_loss_and_less_with_a_finer_solver():
    """x = (1 - sigma) z0 + sigma noise of Gaussian data: along the ODE x grows as its standard deviation does."""

    def wide(sigma):
        return (((1 - sigma) * SPREAD) ** 2 + sigma**2).sqrt()[:, None]

    def teacher(x, sigma):
        return x * ((1 - sigma) * SPREAD**2)[:, None] / wide(sigma) ** 2  # E[z0 | x]

    def exact(x, sigma):
        edge = levels(FLOW_TABLE, edge_below((FLOW_TABLE - sigma[:, None]).abs().argmin(1), 4, 1000))
        share = (edge / sigma)[:, None]
        return (x * wide(edge) / wide(sigma) - share * x) / (1 - share)

    z0 = SPREAD * torch.randn(400, SIZE, generator=torch.Generator().manual_seed(1))
    noise = torch.randn(400, SIZE, generator=torch.Generator().manual_seed(2))

    def loss(student, skip):
        timestep = torch.arange(400) % 20 * 50 + 49
        return float(consistency_loss(
            student, teacher, student, z0, noise, timestep, skip, FLOW_TABLE, huber_c=None, flow=True, phases=4
        ))  # fmt: skip

    coarse, fine = loss(exact, 10), loss(exact, 1)
    assert fine < coarse / 30
    assert loss(teacher, 1) > 10 * fine


@pytest.mark.parametrize("flow", [False, True])
@pytest.mark.parametrize("weighting", ["x0", "v"])
def test_one_phase_is_the_latent_consistency_loss_to_the_bit(flow, weighting):
    table = FLOW_TABLE if flow else TABLE
    z0, noise = torch.randn(2, 16, SIZE, generator=torch.Generator().manual_seed(1))
    timestep = torch.arange(16) * 60 + 19

    def student(x, sigma):
        return 0.3 * x

    following = (timestep - 100).clamp(min=0)
    sigma, sigma_next = table[timestep][:, None], table[following][:, None]
    x = noised(z0, noise, sigma, flow=flow)
    x_next = ddim_step(x, 0.5 * x, sigma, sigma_next)
    error = consistency(student, x, sigma[:, 0], timestep, flow=flow)
    error = error - consistency(student, x_next, sigma_next[:, 0], following, flow=flow)
    if weighting == "v":
        error = error * (1 / sigma if flow else (1 + sigma**-2).sqrt())
    found = consistency_loss(
        student, lambda x, s: 0.5 * x, student, z0, noise, timestep, 100, table, weighting=weighting, flow=flow, phases=1
    )  # fmt: skip
    assert torch.equal(found, pseudo_huber(error).mean())


def test_only_the_student_gets_a_gradient():
    own, other = torch.nn.Parameter(torch.tensor(0.5)), torch.nn.Parameter(torch.tensor(0.5))
    consistency_loss(
        lambda x, s: own * x, lambda x, s: other * x, lambda x, s: other * x,
        torch.ones(2, 3), torch.ones(2, 3), torch.tensor([499, 124]), 125, TABLE, phases=4,
    ).backward()  # fmt: skip
    assert own.grad is not None
    assert own.grad != 0
    assert other.grad is None


@pytest.mark.parametrize("flow", [False, True])
def test_a_model_that_knows_the_data_has_no_loss(flow):
    table = FLOW_TABLE if flow else TABLE
    z0, noise = torch.randn(2, 8, 3, generator=torch.Generator().manual_seed(4))
    timestep = torch.arange(8) * 125 + 124
    loss = consistency_loss(*[lambda x, s: z0] * 3, z0, noise, timestep, 125, table, flow=flow, phases=4)
    assert loss < 1e-9


def test_networks_are_asked_for_no_level_below_the_table():
    seen = []

    def denoise(x, sigma):
        seen.append(sigma)
        return x

    z0, timestep = torch.ones(8, 3), torch.arange(8) * 125 + 124
    consistency_loss(*[denoise] * 3, z0, z0, timestep, 125, TABLE, phases=4)
    following = torch.maximum(timestep - 125, edge_below(timestep, 4, 1000)).clamp(
        min=0
    )  # of the lowest edge the lowest level
    at, below = TABLE[timestep], TABLE[following]
    assert [[*sigma] for sigma in seen] == [[*at], [*below], [*at]]  # teacher, target, student


# ---- what it converges to


@pytest.mark.parametrize("phases", [2, 4])
def test_the_lora_of_m_phases_is_the_exact_map_of_m_steps(phases):
    """The teacher's DDIM steps solve the toy's ODE exactly, so the student's M steps from pure noise have to as well."""
    skip = 125
    settings = Settings(
        steps=250, batch=32, learning_rate=0.03, decay=1.0, warmup=0, guidance_min=1.0, guidance_max=1.0, skip=skip,
        huber_c=0.1, seed=2, phases=phases,
    )  # fmt: skip
    network = PhasedGains(skip, phases)
    edges = edge_timesteps(phases, 1000)
    sigmas = torch.cat([TABLE[list(edges)], torch.zeros(1)])
    x = width(sigmas[0]) * torch.randn(64, SIZE, generator=torch.Generator().manual_seed(10))
    solution = jump(x, sigmas[:1].expand(64), torch.zeros(64))

    def error():
        """Of the picture after M steps, in units of the data."""
        made = sample_lcm(network, x, sigmas, disable=True, noise=noise_after, gamma=0.0)
        return float((made - solution).square().mean().sqrt() / SPREAD)

    with adapters_on(network, SIZE, seed=settings.seed) as adapters:
        before = error()
        Trainer(denoiser(network), adapters, data, TABLE, settings).run()
        assert before > 0.05
        assert error() < 0.01


class PhasedGains(Gains):
    """A teacher whose DDIM steps of `skip`, to sigma 0 too, solve the ODE exactly."""

    def __init__(self, skip, phases):
        points = torch.arange(1000 // skip) * skip + skip - 1
        super().__init__(points, skip)
        for layer, point in zip(self.blocks[1:], points, strict=True):
            sigma, following = TABLE[point], levels(TABLE, point - skip)
            gain = (width(following) / width(sigma) - following / sigma) / (1 - following / sigma)
            layer.weight.data = torch.eye(SIZE) * gain


# ---- its settings


def test_a_run_of_one_phase_keeps_the_facts_it_kept_before():
    assert "phases" not in Settings().kept()
    assert Settings(phases=4, skip=125).kept()["phases"] == 4


@pytest.mark.parametrize("steps", [2, 4, 5, 8, 10])
def test_its_preset_is_a_step_a_phase_without_noise(steps):
    preset = preset_called(phased(steps).name)
    assert preset == phased(steps)
    assert preset.schedule() == [*edge_timesteps(steps, 1000)]
    assert (preset.steps, preset.cfg, preset.gamma) == (steps, 1.0, 0.0)
    sigmas = preset.levels(FLOW_TABLE)
    torch.testing.assert_close(sigmas[:-1], FLOW_TABLE[list(edge_timesteps(steps, 1000))], atol=1e-5, rtol=0)


@pytest.mark.parametrize("name", ["Phased LCM 0 steps", "Phased LCM x steps", "Phased LCM 4 steps.", "phased", ""])
def test_other_names_are_no_phased_preset(name):
    assert preset_called(name) is PRESETS.get(name) is None


@pytest.mark.parametrize(
    ("phases", "skip", "total", "use"),
    [
        (2, 1, 999, "use 1 or 3."),
        (501, 1, 1000, "use 500 or 1000."),
        (8, 2, 1000, "use 1 or 5 for skip."),
        (4, 200, 1000, "use 125 or 250 for skip."),
    ],
)
def test_the_next_numbers_that_divide_evenly_are_told_one_and_the_whole_among_them(phases, skip, total, use):
    with pytest.raises(ValueError, match=f"evenly; {use}"):
        check_phases(phases, skip, total)
