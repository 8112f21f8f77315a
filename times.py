"""Which times are visited: the spacings of the steps from noise to data.

    python times.py                # prints the times that each spacing visits in 8 steps

A spacing is a function (path, steps) -> (steps + 1,) float64 times that fall strictly: N steps are N
intervals. They end at 0, data, or, where a published scheduler stops short of it, at the first noisy step.
TIMES names them for sample.py. Those of published models are their own schedulers', in our indexing, where a
network that embeds n - 1 is evaluated at t = n / 1000 (see ddpm.py).
"""

from __future__ import annotations

from collections.abc import Callable
from math import exp

import torch
from torch import Tensor

from rectified_flow import shift_time
from samplers import log_snr


# ---- evenly in another variable than t

def log_snr_times(path, steps: int, end: float = 1e-3, start: float | None = None) -> Tensor:
    """(steps + 1,) times evenly spaced in lam from `start` (None: the path's) to t = end, then 0. A start at
    alpha = 0, where lam = -inf, counts as t = 1 - end. Others call it exponential: sigma / alpha falls by the
    same factor in each step."""
    return times_at(path, steps, end, start,
                    lambda low, high: torch.linspace(low, high, steps, dtype=torch.float64))


def karras_times(path, steps: int, end: float = 1e-3, rho: float = 7.0, start: float | None = None) -> Tensor:
    """As log_snr_times, but (sigma / alpha)^(1 / rho) is evenly spaced:
    Karras et al. 2022 (arXiv:2206.00364), eq. 5."""
    def nodes(low: Tensor, high: Tensor) -> Tensor:
        roots = torch.linspace((-low / rho).exp(), (-high / rho).exp(), steps, dtype=torch.float64)
        return -rho * roots.log()
    return times_at(path, steps, end, start, nodes)


def beta_sigma_times(path, steps: int, end: float = 1e-3, start: float | None = None) -> Tensor:
    """As log_snr_times, but sigma / alpha takes the values that `beta_times` has for t, as it does in
    diffusers on the diffusion path."""
    def nodes(low: Tensor, high: Tensor) -> Tensor:
        most, least = (-low).exp(), (-high).exp()
        return -(least + beta_quantile(evenly_to_0(steps)) * (most - least)).log()
    return times_at(path, steps, end, start, nodes)


def times_at(path, steps: int, end: float, start: float | None,
             nodes: Callable[[Tensor, Tensor], Tensor]) -> Tensor:
    """(steps + 1,) times: the start, where lam is nodes(low, high) (steps,) without its first, then 0. low
    and high are lam at the start and at t = end."""
    first = path.times(1)[0]
    if start is not None:
        first = first.new_tensor(start)
    low = log_snr(path, first)
    if not low.isfinite():
        low = log_snr(path, first.clamp(max=1 - end))
    inner = path.t_at(nodes(low, log_snr(path, first.new_tensor(end))))[1:]
    return torch.cat([first[None], inner, first.new_zeros(1)])


def beta_times(path, steps: int, end: float = 1e-3) -> Tensor:
    """(steps + 1,) times from the path's start to t = end, then 0, at even quantiles of a beta distribution
    with a = b = 0.6: closer together at both ends. Lee et al. 2024 (arXiv:2407.12173)."""
    start = path.times(1)[0]
    noisy = end + beta_quantile(evenly_to_0(steps)) * (start - end)
    return torch.cat([noisy, noisy.new_zeros(1)])


def evenly_to_0(steps: int) -> Tensor:
    """(steps,) float64 from 1 to 0."""
    return torch.linspace(1, 0, steps, dtype=torch.float64)


def beta_quantile(u: Tensor, a: float = 0.6) -> Tensor:
    """The quantile function of the beta distribution whose two parameters are a, elementwise, float64."""
    n = torch.arange(64, dtype=torch.float64)
    # the coefficients of (1 - x)^(a - 1), whose series, times x^(a - 1), is integrated term by term
    terms = torch.cat([n.new_ones(1), ((n[1:] - a) / n[1:]).cumprod(0)]) / (a + n)

    def integral(x: Tensor) -> Tensor:                   # from 0 to x <= 1/2, where the series converges fast
        return x**a * (terms * x[..., None] ** n).sum(-1)

    # the distribution is symmetric, so only quantiles up to 1/2 are looked for, by bisection
    target = 2 * torch.minimum(u, 1 - u) * integral(u.new_tensor(0.5))
    low, high = torch.zeros_like(u), torch.full_like(u, 0.5)
    for _ in range(60):
        middle = (low + high) / 2
        below = integral(middle) < target
        low, high = torch.where(below, middle, low), torch.where(below, high, middle)
    found = torch.where(target > 0, high, 0.0)
    return torch.where(u > 0.5, 1 - found, found)


# ---- of published models

def sd_times(path, steps: int) -> Tensor:
    """Stable Diffusion 1 and 2 by PLMS or DDIM: "leading" times one step of 1/1000 higher, which end at
    1/1000 and not at 0 (in their configurations, steps_offset 1 and set_alpha_to_one false). As there, the
    stride is 1000 / steps rounded down, so that many steps leave out the noisy end: 50 begin at 0.982, 400
    at 0.8 and 501 at 0.502."""
    noisy = one_higher(path, steps)
    return torch.cat([noisy, noisy.new_tensor([1.0])]) / 1000


def sdxl_times(path, steps: int) -> Tensor:
    """Stable Diffusion XL by Euler: the times of `sd_times`, of which the last step goes to 0."""
    noisy = one_higher(path, steps)
    return torch.cat([noisy, noisy.new_zeros(1)]) / 1000


def one_higher(path, steps: int) -> Tensor:
    """(steps,) the "leading" times of the diffusion path, in thousandths and one higher. Raises ValueError
    where the first of them would be above 1000."""
    noisy = (path.times(steps, "leading")[:-1] * 1000).round() + 1
    if noisy[0] > 1000:
        raise ValueError(f"steps {steps}: times one step higher than leading begin above 1; at most 999")
    return noisy


def sd3_times(path, steps: int) -> Tensor:
    """Stable Diffusion 3: times are spaced evenly between the shifted ends 1 and 1/1000, and then shifted; a
    last step goes to 0. As the lower end is shifted twice, all of them differ a little from path.times."""
    shift = path.shift_of()
    least = shift_time(torch.tensor(1e-3, dtype=torch.float64), shift)
    start = shift_time(least.new_tensor(path.t_max), 1 / shift)
    noisy = shift_time(torch.linspace(start, least, steps, dtype=torch.float64), shift)
    return torch.cat([noisy.clamp(max=path.t_max), noisy.new_zeros(1)])


def stable_audio_times(path, steps: int) -> Tensor:
    """Stable Audio Open: sigma / alpha falls by the same factor in each step, from 500 to 0.3; a last step
    goes to 0."""
    start, end = path.t_at(-torch.tensor([500.0, 0.3], dtype=torch.float64).log()).tolist()
    return log_snr_times(path, steps, end, start)


def flux_shift(tokens: float, low: tuple[float, float] = (256, 0.5),
                    high: tuple[float, float] = (4096, 1.15)) -> float:
    """The shift, for RectifiedFlow, with which FLUX.1-dev draws a picture of so many tokens: exp(mu), mu
    linear in the tokens through the points `low` and `high`. (FLUX.1-schnell: 1 for all.)"""
    rise = (high[1] - low[1]) / (high[0] - low[0])
    return exp(low[1] + rise * (tokens - low[0]))


def stretched(times: Tensor, terminal: float) -> Tensor:
    """times (N + 1,) that end at 0, whose distances from 1 are scaled so that the last time above 0 becomes
    `terminal`, as in LTX-Video (shift_terminal)."""
    noisy = 1 - (1 - times[:-1]) * (1 - terminal) / (1 - times[-2])
    return torch.cat([noisy, times[-1:]])


# The value of --times -> a function of path and steps: the path's own spacings, or even in another variable.
TIMES = {"even": lambda path, steps: path.times(steps),
         "leading": lambda path, steps: path.times(steps, "leading"),
         "linspace": lambda path, steps: path.times(steps, "linspace"),
         "log-snr": log_snr_times, "karras": karras_times, "beta": beta_times, "beta-sigma": beta_sigma_times,
         "sd": sd_times, "sdxl": sdxl_times, "sd3": sd3_times, "stable-audio": stable_audio_times}

# Of these, the spacings that only one path has.
ONLY = {"leading": "ddpm", "linspace": "ddpm", "beta-sigma": "ddpm", "sd": "ddpm", "sdxl": "ddpm",
        "sd3": "rf", "stable-audio": "circle"}


# ---- a part of the steps

def interval_of_steps(times: Tensor, start: float, stop: float) -> tuple[float, float]:
    """(low, high), so that low < t <= high at the beginning of the i-th of N steps where start * N < i <
    stop * N: the interval in which skip-layer guidance acts, as Stable Diffusion 3.5 counts it (from 0.01 to
    0.2). (0, 0), in which no time lies, where there is no such step."""
    steps = len(times) - 1
    inside = [i for i in range(steps) if start * steps < i < stop * steps]
    if not inside:
        return 0.0, 0.0
    return times[inside[-1] + 1].item(), times[inside[0]].item()


def demo() -> None:
    """Print the times of every spacing on every path that has it."""
    from ddpm import DDPM, Circle
    from rectified_flow import RectifiedFlow

    for name, path in (("ddpm", DDPM()), ("rf", RectifiedFlow(shift=3.0)), ("circle", Circle())):
        for spacing, function in TIMES.items():
            if ONLY.get(spacing, name) == name:
                times = ", ".join(f"{t:.3f}" for t in function(path, 8).tolist())
                print(f"{name:6s} {spacing:12s} {times}")
    print("FLUX.1-dev at 512 x 512, 1024 x 1024 and 2048 x 2048: shift "
          + ", ".join(f"{flux_shift(side * side / 256):.2f}" for side in (512, 1024, 2048)))


if __name__ == "__main__":
    demo()
