"""Boundary scalings against values computed by hand and by diffusers."""

import pytest
import torch

from lcm_kit.samplers.consistency import boundary_scalings
from lcm_kit.tests.samplers.toy import diffusers


def test_at_timestep_zero_the_consistency_function_is_the_identity():
    c_skip, c_out = boundary_scalings([0])
    assert (c_skip.item(), c_out.item()) == (1.0, 0.0)


def test_scalings_on_the_usual_grid():
    c_skip, c_out = boundary_scalings([19, 39, 99, 259, 499, 759, 999])
    expected = torch.tensor([6.925e-06, 1.644e-06, 2.551e-07, 3.727e-08, 1.004e-08, 4.34e-09, 2.505e-09])
    torch.testing.assert_close(c_skip, expected, rtol=1e-3, atol=0)  # the values above have four digits
    torch.testing.assert_close(c_out, torch.ones(7), rtol=0, atol=4e-6)


def test_scalings_equal_those_of_diffusers_for_every_timestep():
    scheduler = diffusers().LCMScheduler()
    ours = torch.stack(boundary_scalings(torch.arange(1000)))
    one_by_one = [boundary_scalings(t) for t in range(1000)]
    torch.testing.assert_close(torch.tensor(one_by_one).T, ours, rtol=1e-6, atol=0)
    theirs = [scheduler.get_scalings_for_boundary_condition_discrete(t) for t in range(1000)]
    torch.testing.assert_close(ours, torch.tensor(theirs).T, rtol=1e-6, atol=0)  # float32 against float64


@pytest.mark.parametrize("constants", [{"sigma_data": 0.0}, {"timestep_scaling": 0.0}, {"sigma_data": float("nan")}])
def test_constants_that_leave_no_scaling_are_refused(constants):
    with pytest.raises(ValueError, match=r"both must be above 0\. LCM uses 0\.5 and 10"):
        boundary_scalings([0], **constants)
