"""times.py: the spacings, against closed forms. test_diffusers.py compares them with published schedulers."""

import math

import pytest
import torch

from ddpm import DDPM, Circle
from rectified_flow import RectifiedFlow
from samplers import log_snr
from times import (ONLY, TIMES, beta_quantile, beta_sigma_times, beta_times, interval_of_steps, karras_times,
                   log_snr_times, sd3_times, sd_times, sdxl_times, flux_shift,
                   stable_audio_times, stretched)

PATHS = {"rf": RectifiedFlow(), "rf-shift": RectifiedFlow(shift=3.0), "rf-eps": RectifiedFlow("eps"),
         "ddpm": DDPM(), "ddpm-zero-snr": DDPM("v", zero_terminal_snr=True),
         "circle": Circle()}


@pytest.mark.parametrize("path, name", [(path, name) for path in PATHS for name in TIMES
                                         if ONLY.get(name, path.split("-")[0]) == path.split("-")[0]])
def test_every_spacing_has_its_intervals(path, name):
    path = PATHS[path]
    for steps in (1, 2, 3, 9, 50):
        times = TIMES[name](path, steps)
        assert times.dtype == torch.float64 and len(times) == steps + 1
        assert (times.diff() < 0).all() and times[0] <= path.times(1)[0]
        assert times[-1] == (0.001 if name == "sd" else 0)


@pytest.mark.parametrize("path", ["rf", "rf-shift", "ddpm", "ddpm-zero-snr", "circle"])
@pytest.mark.parametrize("grid", [log_snr_times, karras_times, beta_sigma_times])
def test_grids_between_two_times(path, grid):
    """From `start` to `end`, evenly spaced in lam, in a root of sigma / alpha, or at the quantiles of a beta
    distribution between both sigma / alpha."""
    times = grid(PATHS[path], 9, end=0.02, start=0.9)
    assert times[0] == 0.9 and times[-1] == 0
    torch.testing.assert_close(times[-2].item(), 0.02)
    level = (-log_snr(PATHS[path], times[:-1])).exp()
    steps = {log_snr_times: level.log(), karras_times: level ** (1 / 7), beta_sigma_times: level}[grid]
    even = torch.linspace(1, 0, 9, dtype=torch.float64)
    even = beta_quantile(even) if grid is beta_sigma_times else even
    torch.testing.assert_close((steps - steps[-1]) / (steps[0] - steps[-1]), even, rtol=1e-9, atol=1e-9)


def test_beta_quantile():
    """Against two distributions in closed form, the uniform and the arcsine, and by integrating the density,
    whose poles a substitution by the fifth power removes: x = y^5."""
    u = torch.linspace(0, 1, 41, dtype=torch.float64)
    torch.testing.assert_close(beta_quantile(u, 1.0), u)
    torch.testing.assert_close(beta_quantile(u, 0.5), (math.pi / 2 * u).sin() ** 2)
    x = beta_quantile(u, 0.6)
    torch.testing.assert_close(x, 1 - x.flip(0))
    assert x[0] == 0 and x[-1] == 1 and (x.diff() > 0).all()
    whole = math.gamma(1.2) / math.gamma(0.6) ** 2
    for quantile, value in zip(u[1:21], x[1:21]):
        y = (torch.arange(200_000, dtype=torch.float64) + 0.5) / 200_000 * value ** (1 / 5)
        mass = (5 * y**2 * (1 - y**5) ** -0.4).mean() * value ** (1 / 5)           # x^-0.4 dx = 5 y^2 dy
        torch.testing.assert_close(whole * mass, quantile, rtol=1e-7, atol=0)


@pytest.mark.parametrize("path", PATHS)
def test_beta_times(path):
    path = PATHS[path]
    times, start = beta_times(path, 9, end=0.02), path.times(1)[0]
    torch.testing.assert_close(beta_quantile(torch.linspace(1, 0, 9, dtype=torch.float64)),
                               (times[:-1] - 0.02) / (start - 0.02))


def test_times_of_stable_diffusion():
    """50 steps, as they are listed in many places: 981, 961, ... 1 in the network's counting from 0."""
    listed = torch.arange(981, 0, -20, dtype=torch.float64)
    for grid, end in ((sd_times, 1.0), (sdxl_times, 0.0)):
        times = grid(DDPM(), 50) * 1000
        torch.testing.assert_close(times, torch.cat([listed + 1, listed.new_tensor([end])]))
        torch.testing.assert_close(grid(DDPM(), 999)[0].item(), 1.0)
        with pytest.raises(ValueError, match="steps 1000: times one step higher than leading .* at most 999"):
            grid(DDPM(), 1000)


def test_times_of_stable_diffusion_3():
    """Against RectifiedFlow's own: equal where nothing is shifted but for the lower end, 1/1000, which with a
    shift is shifted twice."""
    torch.testing.assert_close(sd3_times(RectifiedFlow(), 5)[:-1], torch.linspace(1, 1e-3, 5).double())
    path = RectifiedFlow(shift=3.0)
    once = 3 * 1e-3 / (1 + 2 * 1e-3)
    torch.testing.assert_close(sd3_times(path, 28)[-2].item(), 3 * once / (1 + 2 * once))
    assert (sd3_times(path, 28) - path.times(28)).abs().max() > 0.01


def test_times_of_stable_audio():
    """sigma / alpha from 500 to 0.3, by the same factor in each step; sigma / alpha is tan(pi t / 2)."""
    times = stable_audio_times(Circle(), 100)
    level = torch.tan(math.pi / 2 * times[:-1])
    torch.testing.assert_close(level[[0, -1]], torch.tensor([500, 0.3], dtype=torch.float64))
    torch.testing.assert_close(level[1:] / level[:-1], torch.full((99,), (0.3 / 500) ** (1 / 99)).double(),
                               rtol=1e-7, atol=0)


def test_shift_of_tokens():
    """mu is linear between its two points, and the shift exp(mu) turns 1/2 into sigmoid(mu)."""
    assert flux_shift(256) == pytest.approx(math.exp(0.5))
    assert flux_shift(4096) == pytest.approx(math.exp(1.15))
    assert flux_shift(2176) == pytest.approx(math.exp(0.825))
    assert flux_shift(1000, (500, 1.0), (1500, 3.0)) == pytest.approx(math.exp(2.0))
    middle = RectifiedFlow(shift=flux_shift(2176)).times(2)[1]
    assert middle.item() == pytest.approx(1 / (1 + math.exp(-0.825)))


def test_stretched():
    times = stretched(RectifiedFlow(shift=2.0).times(8), 0.1)
    assert times[0] == 1 and times[-1] == 0 and times[-2].item() == pytest.approx(0.1)
    plain = RectifiedFlow(shift=2.0).times(8)
    ratio = (1 - times[1:-1]) / (1 - plain[1:-1])
    torch.testing.assert_close(ratio, ratio[:1].expand_as(ratio))


@pytest.mark.parametrize("steps", [1, 4, 10, 28, 50, 100])
def test_interval_of_steps(steps):
    """Exactly the steps in the share lie in the interval, as `guided` reads it."""
    times = sd3_times(RectifiedFlow(shift=3.0), steps)
    for start, stop in ((0.01, 0.2), (0.0, 1.0), (0.3, 0.31)):
        low, high = interval_of_steps(times, start, stop)
        inside = [bool(low < t <= high) for t in times[:-1]]
        assert inside == [steps * start < i < steps * stop for i in range(steps)]
