"""Interpolants, times and samplers against closed forms."""

import pytest
import torch

from diffusion.samplers import Guidance, sample_ode, sample_sde
from diffusion.transport import coefficients, interpolate, sample_time

PATHS = ("linear", "cosine")


@pytest.mark.parametrize("path", PATHS)
def test_target_is_the_paths_derivative(path):
    z, noise = torch.randn(3, 1, 2, 2).double(), torch.randn(3, 1, 2, 2).double()
    t, h = torch.tensor([0.2, 0.5, 0.9]).double(), 1e-6
    numeric = (interpolate(path, z, noise, t + h)[0] - interpolate(path, z, noise, t - h)[0]) / (2 * h)
    torch.testing.assert_close(interpolate(path, z, noise, t)[1], numeric, atol=1e-8, rtol=1e-6)


def gaussian_velocity(path: str, std: float):
    """The exact velocity field when data is N(0, std²): E[α'z + σ'ε | x]."""

    def velocity(x, t, y):
        c = coefficients(path, t.double()[:, None, None, None])
        var = c.alpha**2 * std**2 + c.sigma**2
        return (c.d_alpha * c.alpha * std**2 + c.d_sigma * c.sigma) / var * x.double()

    return velocity


@pytest.mark.parametrize("path", PATHS)
def test_samplers_reach_the_data_distribution(path):
    std, generator = 0.5, torch.Generator().manual_seed(0)
    x = torch.randn(20000, 1, 1, 1, generator=generator)
    y = torch.zeros(20000, dtype=torch.int64)
    velocity = gaussian_velocity(path, std)
    exact = x.double() * std
    euler = sample_ode(velocity, x, y, 200)
    heun = sample_ode(velocity, x, y, 200, heun=True)
    assert (heun - exact).abs().max() < 0.1 * (euler - exact).abs().max() < 0.01
    sde = sample_sde(velocity, x, y, 400, path, lambda i: torch.randn(x.shape, generator=generator))
    assert abs(sde.std() - std) < 0.02
    assert abs((sde * exact).mean()) < 0.5 * std**2  # noise was added on the way


def test_the_state_is_float64_and_the_network_gets_float32():
    def velocity(x, t, y):
        assert (x.dtype, t.dtype, t.shape) == (torch.float32, torch.float32, (2,))
        return torch.zeros_like(x)

    x, y = torch.randn(2, 1, 2, 2), torch.zeros(2, dtype=torch.int64)
    assert sample_ode(velocity, x, y, 3).dtype == torch.float64
    assert sample_sde(velocity, x, y, 3, "linear", lambda i: torch.zeros_like(x)).dtype == torch.float64


def test_guidance_acts_on_its_interval_only_in_one_batch():
    sizes = []

    def velocity(x, t, y):
        sizes.append((round(float(t[0]), 3), len(x), y.tolist()))
        return torch.zeros_like(x)

    sample_ode(velocity, torch.zeros(1, 1, 2, 2), torch.tensor([3]), 4, Guidance(2.0, 10, 0.5, 0.75))
    assert sizes == [(1.0, 1, [3]), (0.75, 2, [3, 10]), (0.5, 2, [3, 10]), (0.25, 1, [3])]


@pytest.mark.parametrize("path", PATHS)
def test_times(path):
    u = torch.rand(200000, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(sample_time("uniform", path, u), u.float())
    t = sample_time("lognormal", path, u)
    c = coefficients(path, t)
    logs = torch.log(c.sigma / c.alpha)
    assert abs(logs.mean()) < 0.01
    assert abs(logs.std() - 1) < 0.01
