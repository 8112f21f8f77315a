"""samplers.py against exact solutions."""

import re
from pathlib import Path

import pytest
import torch

import samplers
from ddpm import DDPM, Circle
from rectified_flow import RectifiedFlow
from samplers import (ADAMS_BASHFORTH, SAMPLERS, ddim, ddpm, dpm2_ancestral, dpmpp_2m, dpmpp_2m_sde,
                      dpmpp_3m, dpmpp_3m_sde, dpmpp_sde, euler, gaussian_mixture, guided, heun, inpainting,
                      lms, log_snr, mean_weights, noise_like, plms, reverse_sde)
from times import karras_times, log_snr_times

PATHS = {"rf": RectifiedFlow(), "rf-shift": RectifiedFlow(shift=3.0), "ddpm": DDPM(),
         "ddpm-cosine": DDPM(schedule="cosine"), "ddpm-zero-snr": DDPM("v", zero_terminal_snr=True),
         "circle": Circle()}
MEAN, STD = 0.8, 0.3


def gaussian(path):
    """Exact denoiser of x0 ~ N(MEAN, STD^2), at one time: with it, `jump` is `euler`."""
    def denoise(xt, t, s=None):
        alpha, sigma = path.alpha_sigma(t)
        var = (alpha * STD) ** 2 + sigma**2
        return MEAN + alpha * STD**2 / var * (xt - alpha * MEAN), sigma / var * (xt - alpha * MEAN)
    return denoise


def start(path, n):
    """Samples of the exact marginal at the start of the path, which for Stable Diffusion's schedule is not
    pure noise."""
    alpha, sigma = path.alpha_sigma(path.times(1)[0])
    return alpha * MEAN + ((alpha * STD) ** 2 + sigma**2).sqrt() * torch.randn(n, 1, dtype=torch.float64)


@pytest.mark.parametrize("name", SAMPLERS)
@pytest.mark.parametrize("path", PATHS)
def test_every_sampler_recovers_a_gaussian(name, path):
    n, path = 20_000, PATHS[path]
    y = SAMPLERS[name](gaussian(path), path, start(path, n), path.times(200))
    # statistical error at five sigma, and the discretisation of 200 steps;
    # Ho et al.'s own variance is too small by O(1/N)
    assert abs(y.mean() - MEAN) < 5 * STD / n**0.5 + 0.01
    assert abs(y.std() / STD - 1) < 5 / (2 * n) ** 0.5 + 0.05


@pytest.mark.parametrize("name", SAMPLERS)
@pytest.mark.parametrize("path", ["rf", "ddpm"])
def test_flipped_signs_fail(name, path):
    """The test above must not pass a denoiser whose signs are wrong, or whose pair is swapped."""
    path = PATHS[path]
    for wrong in (lambda x0, eps: (-x0, -eps), lambda x0, eps: (eps, x0)):
        denoise = lambda x, t, s=None: wrong(*gaussian(path)(x, t))
        y = SAMPLERS[name](denoise, path, start(path, 5000), path.times(200))
        assert not (abs(y.mean() - MEAN) < 0.03 and abs(y.std() / STD - 1) < 0.1)


MEANS = torch.tensor([[1.1], [-0.9], [0.1]], dtype=torch.float64)
X = torch.linspace(-1.5, 1.5, 32, dtype=torch.float64)[:, None]


def exact_flow(path, x):
    """Probability flow of the mixture of MEANS and STD from the path's start to 0: in one dimension it keeps
    the order of points and so their quantiles, which bisection inverts."""
    def cdf(t, x):
        alpha, sigma = path.alpha_sigma(t)
        std = ((alpha * STD) ** 2 + sigma**2).sqrt()
        return torch.special.ndtr((x - alpha * MEANS[:, 0]) / std).mean(1, True)

    start, low, high = path.times(1)[0], torch.full_like(x, -9), torch.full_like(x, 9)
    for _ in range(80):
        middle = (low + high) / 2
        below = cdf(torch.zeros_like(start), middle) < cdf(start, x)
        low, high = torch.where(below, middle, low), torch.where(below, high, middle)
    return low


def slope(sampler, path, end, steps=(40, 80, 160), **options):
    """Least-squares slope of log error over log step count, from the exact solution."""
    exact, denoise = exact_flow(path, X), gaussian_mixture(path, MEANS, STD)
    ends = [sampler(denoise, path, X, log_snr_times(path, n, end), **options) for n in steps]
    errors = torch.stack([(x - exact).abs().mean() for x in ends]).log()
    n = -torch.tensor(steps, dtype=torch.float64).log()
    return ((n - n.mean()) * (errors - errors.mean())).sum() / ((n - n.mean()) ** 2).sum()


# a variance-preserving path from near zero SNR, one from exactly alpha = 0, and the straight one: each to
# where sigma is about 1e-5, as the last step, to 0, is of first order
SMOOTH = {"rf": (RectifiedFlow(), 1e-5), "rf-shift": (RectifiedFlow(shift=3.0), 1e-5),
          "ddpm": (DDPM(schedule="linear"), 1e-9), "ddpm-zero-snr": (DDPM("v", zero_terminal_snr=True), 1e-9)}
ORDERS = {"euler": 1, "ddim": 1, "heun": 2, "plms": 2, "lms": 4, "dpm_solver_2": 2, "dpm_solver_3": 3,
          "dpmpp_2m": 2, "dpmpp_3m": 3, "unipc_2": 3, "unipc_3": 4}     # UniPC's corrector adds one
LEAST = {1: 0.95, 2: 1.9, 3: 2.85, 4: 3.85}


@pytest.mark.parametrize("name", ORDERS)
@pytest.mark.parametrize("path", SMOOTH)
def test_order_of_convergence(path, name):
    order = ORDERS[name]
    steps = (40, 80, 160) if order == 4 else (80, 160, 320)   # order 4 is sooner at the error of the two ends
    if name == "lms":                                         # its first steps are of lower orders
        steps = (480, 960)
    measured = slope(SAMPLERS[name], *SMOOTH[path], steps=steps)
    assert LEAST[order] <= measured < order + 0.5


@pytest.mark.parametrize("sampler, order, options", [
    (lms, 3, {"order": 3}), (lms, 2, {"order": 2}), (dpmpp_sde, 2, {"eta": 0.0}),
    (dpm2_ancestral, 2, {"eta": 0.0}), (dpmpp_3m_sde, 3, {"eta": 0.0}),
    (dpmpp_3m, 3, {"lower_order_final": True}), (SAMPLERS["unipc_2"], 3, {"lower_order_final": True})])
@pytest.mark.parametrize("path", ["rf", "ddpm"])
def test_order_of_convergence_with_options(path, sampler, order, options):
    steps = (320, 640) if sampler is lms else (80, 160, 320)
    assert LEAST[order] <= slope(sampler, *SMOOTH[path], steps=steps, **options) < order + 0.5


def moments(sampler, path, times, monkeypatch, **options):
    """The exact mean and standard deviation of what a sampler draws for the data of `gaussian`. There every
    step is affine in x and in its noise, so a row of a batch for each noise shows its part in the end."""
    count, alpha, sigma = [], *path.alpha_sigma(times[0])
    run = lambda x: sampler(gaussian(path), path, x, times, **options)
    monkeypatch.setattr(samplers, "noise_like", lambda x, generator=None: count.append(1) or x * 0)
    run(torch.zeros(1, 1, dtype=torch.float64))
    draws = iter(range(len(count)))

    def unit(x, generator=None):
        noise = torch.zeros_like(x)
        noise[2 + next(draws)] = 1
        return noise

    monkeypatch.setattr(samplers, "noise_like", unit)
    x = (alpha * MEAN).expand(2 + len(count), 1).clone()
    x[1] += ((alpha * STD) ** 2 + sigma**2).sqrt()
    y = run(x)[:, 0]
    return y[0], (y[1:] - y[0]).square().sum().sqrt()


@pytest.mark.parametrize("name, order, options", [
    ("ddpm", 1, {}), ("ddim", 1, {"eta": 0.5}), ("reverse_sde", 1, {}), ("dpmpp_2m_sde", 2, {}),
    ("dpmpp_2m_sde", 2, {"eta": 0.5}), ("dpmpp_3m_sde", 2, {}), ("dpmpp_sde", 2, {}),
    ("dpmpp_sde", 2, {"eta": 0.5}), ("dpm2_ancestral", 2, {}), ("dpm2_ancestral", 2, {"eta": 0.5}),
    ("heun", 2, {"churn": 10.0})])
@pytest.mark.parametrize("path", ["rf", "ddpm"])
def test_weak_order_of_stochastic_solvers(path, name, order, options, monkeypatch):
    """The mean is exact at any number of steps, the standard deviation converges, measured without a
    statistical error."""
    path, end = SMOOTH[path]
    errors = []
    for steps in (160, 320):
        mean, std = moments(SAMPLERS[name], path, log_snr_times(path, steps, end), monkeypatch, **options)
        assert abs(mean - MEAN) < 1e-12
        errors.append((std / STD - 1).abs())
    assert errors[1] < (0.04 if order == 1 else 0.0015)
    assert 0.9 * order < torch.log2(errors[0] / errors[1]) < order + 0.3


def test_third_order_sde_is_more_accurate(monkeypatch):
    """Than the second, and than with half of its curvature, as published: in the standard deviation."""
    path, end = SMOOTH["rf"]
    error = lambda sampler, **options: (moments(sampler, path, log_snr_times(path, 160, end), monkeypatch,
                                                **options)[1] / STD - 1).abs()
    assert 2 * error(dpmpp_3m_sde) < error(dpmpp_2m_sde) and 1.8 * error(dpmpp_3m_sde) < error(
        dpmpp_3m_sde, as_published=True)


def test_weights_of_linear_multistep():
    """Even steps: Adams-Bashforth's, which are tabulated. Uneven ones: every cubic is integrated exactly."""
    for n, weights in ADAMS_BASHFORTH.items():
        even = [torch.tensor(-float(k), dtype=torch.float64) for k in range(n)]
        torch.testing.assert_close(torch.stack(mean_weights(even)), torch.tensor(weights).double(), rtol=1e-6,
                                   atol=0)
    r = [torch.tensor(x, dtype=torch.float64) for x in (0.0, -0.3, -1.7, -1.9)]
    cubic = lambda x: 2 - x + 3 * x**2 - 0.7 * x**3
    mean = sum(w * cubic(x) for w, x in zip(mean_weights(r), r))
    torch.testing.assert_close(mean.item(), 2 - 1 / 2 + 3 / 3 - 0.7 / 4)


def test_plms_is_exact_where_eps_is_a_polynomial():
    """On a path with alpha = 1, even steps: eps = cubic in sigma is integrated exactly from the fourth step
    on, and the trapezoid of the first step is exact for a line."""
    class Exploding:
        def alpha_sigma(self, t):
            return torch.ones_like(t), t

    times = torch.linspace(1, 0, 9, dtype=torch.float64)
    for power, first in ((1, 1), (3, 4)):
        states = [torch.ones(1, 1, dtype=torch.float64)]
        denoise = lambda x, t: (x - t * t**power, (t**power).expand(1, 1))
        plms(denoise, Exploding(), states[0], times, on_step=lambda i, x, x0: states.append(x))
        exact = times ** (power + 1) / (power + 1)
        for i in range(1, 8):
            change = states[i + 1] - states[i] if i >= first - 1 else exact[i + 1] - exact[i]
            torch.testing.assert_close(change.item(), (exact[i + 1] - exact[i]).item())
        if power == 1:
            torch.testing.assert_close((states[1] - states[0]).item(), (exact[1] - exact[0]).item())


@pytest.mark.parametrize("path", PATHS)
def test_churn_raises_the_noise_level_along_the_path(path):
    """Karras et al. algorithm 2 in x / alpha and sigma / alpha, from what the network is given to see; below
    churn_min, above churn_max and beyond the start of the path nothing is raised."""
    path = PATHS[path]
    times, seen = path.times(10), []

    def denoise(x, t):
        seen.append((x, t))
        return gaussian(path)(x, t)

    levels = path.alpha_sigma(times)[1] / path.alpha_sigma(times)[0]
    options = dict(churn=2.0, churn_min=levels[8].item(), churn_max=levels[3].item() * (1 + 1e-9),
                   churn_noise=1.1)
    states, x = [], torch.randn(3, 1, dtype=torch.float64)
    heun(denoise, path, x, times, generator=torch.Generator().manual_seed(1),
         on_step=lambda i, x, x0: states.append(x), **options)
    generator = torch.Generator().manual_seed(1)
    for i in range(10):
        before = x if i == 0 else states[i - 1]
        given, t = seen[2 * i]
        if 3 <= i <= 8:
            level = (1 + 0.2) * levels[i]
            noise = torch.randn(3, 1, dtype=torch.float64, generator=generator)
            alpha, sigma = path.alpha_sigma(t)
            torch.testing.assert_close(sigma / alpha, level)
            want = before / path.alpha_sigma(times[i])[0] + 1.1 * (level**2 - levels[i] ** 2).sqrt() * noise
            torch.testing.assert_close(given / alpha, want)
        else:
            assert t == times[i] and torch.equal(given, before)
    seen.clear()                                       # at most sqrt(2), and not above where the path begins
    heun(denoise, path, x, times, churn=1e9)
    assert seen[0][1] == times[0] and all(t <= times[0] for _, t in seen)
    twice = path.t_at(log_snr(path, times[5]) - torch.tensor(2.0).log() / 2)
    torch.testing.assert_close(seen[10][1], twice, rtol=1e-6, atol=0)
    torch.testing.assert_close(heun(denoise, path, x, times, churn=0.0), heun(denoise, path, x, times),
                               rtol=0, atol=0)


def test_lower_order_final():
    """The last step but one is of the second order, the last of the first, also where it does not go to 0."""
    path = PATHS["ddpm"]
    denoise = gaussian_mixture(path, MEANS, STD)
    run = lambda sampler, times, **options: sampler(denoise, path, X, times, **options)
    times = path.times(9)

    def states(sampler, times, **options):
        found = []
        sampler(denoise, path, X, times, on_step=lambda i, x, x0: found.append((x, x0)), **options)
        return found

    for sampler in (dpmpp_2m, dpmpp_2m_sde, dpmpp_3m, dpmpp_3m_sde, SAMPLERS["unipc_3"]):
        options = {"eta": 0.0} if sampler in (dpmpp_2m_sde, dpmpp_3m_sde) else {}
        plain, lower = (states(sampler, times[:-1], lower_order_final=on, **options) for on in (False, True))
        x, x0 = lower[-2][0], lower[-1][1]
        (_, sigma_t), (alpha_s, sigma_s) = path.alpha_sigma(times[-3]), path.alpha_sigma(times[-2])
        eps = (x - path.alpha_sigma(times[-3])[0] * x0) / sigma_t
        torch.testing.assert_close(lower[-1][0], alpha_s * x0 + sigma_s * eps)       # the step of `euler`
        assert (plain[-1][0] - lower[-1][0]).abs().max() > 1e-5
        changed = [(a[0] - b[0]).abs().max() > 1e-9 for a, b in zip(plain, lower)]
        second = sampler in (dpmpp_2m, dpmpp_2m_sde)
        assert changed == [False] * (7 if second else 6) + [True] * (1 if second else 2)
        if second:                             # to 0 the last step is of first order anyway
            torch.testing.assert_close(run(sampler, times, lower_order_final=True, **options),
                                       run(sampler, times, **options), rtol=0, atol=0)


@pytest.mark.parametrize("name", [name for name in SAMPLERS if "unipc" not in name])
@pytest.mark.parametrize("path", ["rf", "ddpm"])
def test_times_may_end_above_0(path, name):
    """There the result is what a run to 0 passes through (UniPC looks ahead; see the next test)."""
    path, states = PATHS[path], []
    times, x = path.times(8), start(path, 16)
    seeds = lambda: torch.Generator().manual_seed(2)
    SAMPLERS[name](gaussian(path), path, x, times, generator=seeds(),
                   on_step=lambda i, x, x0: states.append(x))
    for n in (7, 4):
        end = SAMPLERS[name](gaussian(path), path, x, times[:n + 1], generator=seeds())
        torch.testing.assert_close(end, states[n - 1])


@pytest.mark.parametrize("name", SAMPLERS)
def test_what_ends_above_0_has_the_noise_of_there(name):
    n, path = 5000, PATHS["ddpm"]
    times = log_snr_times(path, 100, 0.3)[:-1]                    # which ends at 0.3
    alpha, sigma = path.alpha_sigma(times[-1])
    torch.manual_seed(0)
    y = SAMPLERS[name](gaussian(path), path, start(path, n), times)
    std = ((alpha * STD) ** 2 + sigma**2).sqrt()
    assert times[-1] == pytest.approx(0.3) and abs(y.mean() - alpha * MEAN) < 5 * std / n**0.5 + 0.01
    assert abs(y.std() / std - 1) < 5 / (2 * n) ** 0.5 + 0.02


@pytest.mark.parametrize("path", ["rf", "ddpm"])
def test_order_of_3m_as_published(path):
    """Without the factor 2, as in the authors' code, the solver loses one order."""
    assert 1.9 < slope(dpmpp_3m, *SMOOTH[path], steps=(80, 160, 320), as_published=True) < 2.3


@pytest.mark.parametrize("path", ["rf", "ddpm"])
def test_order_on_even_times(path):
    """euler and heun also converge at their order when t itself, not the log-SNR, is evenly spaced."""
    path = SMOOTH[path][0]
    for sampler, order in ((euler, 1), (heun, 2)):
        u = [torch.linspace(1, 0, n + 1, dtype=torch.float64) for n in (80, 160)]
        times = u if isinstance(path, RectifiedFlow) else [v**2 for v in u]    # sigma must fall smoothly to 0
        a, b = ((sampler(gaussian_mixture(path, MEANS, STD), path, X, t) - exact_flow(path, X)).abs().mean()
                for t in times)
        assert LEAST[order] <= torch.log2(a / b) < order + 0.5


@pytest.mark.parametrize("name, options", [
    ("ddpm", {}), ("ddpm", {"variance": "large"}), ("ddim", {"eta": 0.5}), ("dpmpp_2m_sde", {}),
    ("dpmpp_sde", {}), ("heun", {"churn": 100.0}),
    ("reverse_sde", {"noise": 1.0}), ("reverse_sde", {"noise": 0.3}), ("reverse_sde", {"noise": 0})])
@pytest.mark.parametrize("path", ["rf", "ddpm-cosine"])
def test_stochastic_solvers_draw_the_right_gaussian(path, name, options):
    """Mean and covariance of 20,000 samples within four standard errors, in two correlated dimensions."""
    n, path = 20_000, PATHS[path]
    mean = torch.tensor([0.8, -0.5], dtype=torch.float64)
    cov = torch.tensor([[0.5, 0.3], [0.3, 0.4]], dtype=torch.float64)

    def denoise(xt, t):
        alpha, sigma = path.alpha_sigma(t)
        whole = alpha**2 * cov + sigma**2 * torch.eye(2, dtype=torch.float64)
        residual = torch.linalg.solve(whole, (xt - alpha * mean).T).T
        return mean + alpha * residual @ cov, sigma * residual

    generator = torch.Generator().manual_seed(0)
    x = torch.randn(n, 2, dtype=torch.float64, generator=generator)
    y = SAMPLERS[name](denoise, path, x, log_snr_times(path, 800, 1e-4), generator=generator, **options)
    assert ((y.mean(0) - mean).abs() < 4 * (cov.diag() / n).sqrt()).all()
    error = ((cov.diag()[:, None] * cov.diag() + cov**2) / n).sqrt()
    assert ((torch.cov(y.T) - cov).abs() < 4 * error).all()


@pytest.mark.parametrize("path", [RectifiedFlow(), DDPM(zero_terminal_snr=True, prediction="v")])
@pytest.mark.parametrize("name", SAMPLERS)
def test_inpainting_brings_the_known_part_back(path, name):
    """Whatever the network predicts, by every sampler; and the repainted part depends on the known part."""
    torch.manual_seed(0)
    x0 = torch.randn(2, 3, 4, 4, dtype=torch.float64)
    repaint = torch.zeros(1, 1, 4, 4, dtype=torch.bool)
    repaint[..., 2:] = True

    def denoise(xt, t, s=None):
        guess = torch.tanh(3 * xt.mean((1, 2, 3), keepdim=True) + xt)      # depends on every pixel
        alpha, sigma = path.alpha_sigma(t)
        return guess, (xt - alpha * guess) / sigma

    def run(x0):
        times = path.times(8)
        x = torch.randn(x0.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
        return SAMPLERS[name](inpainting(denoise, path, x0, repaint), path, x, times,
                              generator=torch.Generator().manual_seed(2))

    out, other = run(x0), run(x0 + 1)
    torch.testing.assert_close(out[..., :2], x0[..., :2], rtol=0, atol=1e-9)
    torch.testing.assert_close(other[..., :2], x0[..., :2] + 1, rtol=0, atol=1e-9)
    assert (out[..., 2:] - x0[..., 2:]).abs().min() > 1e-6
    assert (out[..., 2:] - other[..., 2:]).abs().max() > 1e-3


def test_noise_0_is_the_ode():
    path = RectifiedFlow()
    denoise = gaussian_mixture(path, MEANS, STD)
    want, got = (euler(denoise, path, X, path.times(9)),
                 reverse_sde(denoise, path, X, path.times(9), noise=0.0))
    torch.testing.assert_close(got, want)
    assert (reverse_sde(denoise, path, X, path.times(9)) - want).abs().max() > 0.01
    with pytest.raises(ValueError, match="noise"):
        reverse_sde(denoise, path, X, path.times(9), noise=-1.0)


def test_learned_variance_reaches_from_small_to_large():
    path = PATHS["ddpm"]
    run = lambda denoise, variance: ddpm(denoise, path, X, path.times(9), variance=variance,
                                         generator=torch.Generator().manual_seed(0))
    exact = gaussian_mixture(path, MEANS, STD)
    for variance, fraction in (("small", 0.0), ("large", 1.0)):
        learned = lambda x, t: (*exact(x, t), torch.full_like(x, fraction))
        torch.testing.assert_close(run(learned, "learned"), run(exact, variance))
    with pytest.raises(ValueError, match="variance 'medium'"):
        run(exact, "medium")


@pytest.mark.parametrize("path", SMOOTH)
@pytest.mark.parametrize("grid", [log_snr_times, karras_times])
def test_grids(path, grid):
    """Times fall strictly from the path's start to 0, evenly spaced in lam or in a root of sigma / alpha."""
    path, end = SMOOTH[path]
    for n in (1, 2, 9):
        times = grid(path, n)
        assert len(times) == n + 1 and times[0] == path.times(1)[0] and times[-1] == 0
        assert (times.diff() < 0).all()
    lam = log_snr(path, times[1:-1])
    steps = (lam if grid is log_snr_times else (-lam / 7).exp()).diff()
    torch.testing.assert_close(steps, steps.mean().expand_as(steps))
    torch.testing.assert_close(times[-2].item(), 1e-3)


@pytest.mark.parametrize("path", PATHS)
def test_t_at_inverts_log_snr(path):
    path = PATHS[path]
    t = torch.linspace(0.0003, 0.999, 77, dtype=torch.float64)
    torch.testing.assert_close(path.t_at(log_snr(path, t)), t, rtol=1e-9, atol=0)


def test_one_sampler_is_another():
    x, times = torch.randn(7, 3, dtype=torch.float64), None
    means = torch.randn(4, 3, dtype=torch.float64)
    for path in PATHS.values():
        times = path.times(12)
        denoise = gaussian_mixture(path, means, 0.5)
        torch.testing.assert_close(ddim(denoise, path, x, times), euler(denoise, path, x, times))
        seeds = lambda: torch.Generator().manual_seed(3)
        torch.testing.assert_close(ddim(denoise, path, x, times, eta=1.0, generator=seeds()),
                                   ddpm(denoise, path, x, times, generator=seeds()))
        assert (ddpm(denoise, path, x, times) - euler(denoise, path, x, times)).abs().max() > 0.01
        for stochastic, deterministic in (("dpmpp_2m_sde", "dpmpp_2m"), ("dpm2_ancestral", "dpm_solver_2")):
            torch.testing.assert_close(SAMPLERS[stochastic](denoise, path, x, times, eta=0.0),
                                       SAMPLERS[deterministic](denoise, path, x, times))
        torch.testing.assert_close(lms(denoise, path, x, times, order=1), euler(denoise, path, x, times))


def test_euler_is_euler_on_the_straight_path():
    """x + (s - t) * velocity, written the textbook way."""
    path, x = RectifiedFlow(shift=2.0), torch.randn(5, 2, dtype=torch.float64)
    denoise, times = gaussian(path), RectifiedFlow(shift=2.0).times(6)
    want = x
    for t, s in zip(times, times[1:]):
        x0, eps = denoise(want, t)
        want = want + (s - t) * (eps - x0)
    torch.testing.assert_close(euler(denoise, path, x, times), want)


def test_heun_is_heun_on_the_straight_path():
    path, x = RectifiedFlow(), torch.randn(5, 2, dtype=torch.float64)
    denoise, times = gaussian(path), RectifiedFlow().times(6)
    velocity = lambda x, t: (lambda x0, eps: eps - x0)(*denoise(x, t))
    want = x
    for t, s in zip(times, times[1:]):
        slope = velocity(want, t)
        end = want + (s - t) * slope
        want = end if s == 0 else want + (s - t) * (slope + velocity(end, s)) / 2
    torch.testing.assert_close(heun(denoise, path, x, times), want)


def test_ancestral_step_is_the_posterior():
    """One ddpm step = a draw from ddpm.py's posterior at the predicted x0."""
    path, x = DDPM(), torch.randn(4, 2, dtype=torch.float64)
    t, s = path.times(10)[3:5]
    denoise = gaussian(path)
    mean, var = path.posterior(denoise(x, t)[0], x, s, t)
    want = mean + var.sqrt() * torch.randn(x.shape, dtype=x.dtype, generator=torch.Generator().manual_seed(5))
    seen = []
    ddpm(denoise, path, x, torch.stack([t, s, torch.zeros_like(s)]),
         generator=torch.Generator().manual_seed(5), on_step=lambda i, x, x0: seen.append(x))
    torch.testing.assert_close(seen[0], want)


@pytest.mark.parametrize("name", SAMPLERS)
@pytest.mark.parametrize("path", PATHS)
def test_steps_are_intervals_and_one_works(name, path):
    path = PATHS[path]
    calls, shown = [], []

    def counting(xt, t, s=None):
        calls.append(float(t))
        return gaussian(path)(xt, t)

    for steps in (1, 5):
        calls.clear(), shown.clear()
        y = SAMPLERS[name](counting, path, torch.randn(3, 1), path.times(steps),
                           on_step=lambda i, x, x0: shown.append(i))
        assert torch.isfinite(y).all() and shown == list(range(steps))
        # one evaluation per step, and more inside a step unless it starts at alpha = 0 or ends at 0
        inside = {"heun": 1, "dpm_solver_2": 1, "dpm_solver_3": 2, "dpmpp_sde": 1,
                  "dpm2_ancestral": 1}.get(name, 0)
        from_pure_noise = name != "heun" and steps > 1 and path.alpha_sigma(path.times(1)[0])[0] == 0
        first = int(name == "plms" and steps > 1 and not from_pure_noise)      # it evaluates both ends
        assert len(calls) == steps + first + inside * (steps - 1 - int(from_pure_noise))
        assert min(calls) > 0                                   # the network is never evaluated at t = 0


def test_bad_times_are_refused():
    for times in ([1.0], [1.0, -0.5], [0.5, 1.0, 0.0], [1.0, 0.5, 0.5, 0.0]):
        with pytest.raises(ValueError, match="fall strictly, to 0 or above"):
            euler(gaussian(PATHS["rf"]), PATHS["rf"], torch.zeros(1, 1), torch.tensor(times))


def test_guidance():
    """Scales 1 and 0 evaluate one branch; others extrapolate raw on every channel, from one batch."""
    path, x, t = RectifiedFlow(), torch.randn(3, 4, 2, 2), torch.tensor(0.5)
    batches = []

    def model(xt, t, y):
        batches.append(len(xt))
        assert t.dtype == torch.float32 and t.shape == (len(xt),)
        return y.view(-1, 1, 1, 1).float() * torch.arange(1.0, 5.0).view(4, 1, 1).expand(4, 2, 2)

    cond, uncond = {"y": torch.tensor([1, 2, 3])}, {"y": torch.tensor([7, 7, 7])}
    channels = torch.arange(1.0, 5.0).view(4, 1, 1)
    for scale, y, size in ((1.0, [1, 2, 3], 3), (0.0, [7, 7, 7], 3),
                           (2.5, [7 + 2.5 * (k - 7) for k in (1, 2, 3)], 6)):
        batches.clear()
        x0, eps = guided(model, path, cond, uncond, scale)(x, t)
        raw = torch.tensor(y).view(-1, 1, 1, 1).float() * channels
        torch.testing.assert_close(eps - x0, raw.expand_as(x))
        torch.testing.assert_close(0.5 * x0 + 0.5 * eps, x)
        assert batches == [size]
    with pytest.raises(ValueError, match="unconditional"):
        guided(model, path, cond, None, 2.0)
    batches.clear()
    for t in (0.2, 0.5, 0.8, 1.0):
        x0, eps = guided(model, path, cond, uncond, 2.5, interval=(0.2, 0.8))(x, torch.tensor(t))
        scale = 2.5 if t in (0.5, 0.8) else 1.0
        raw = torch.tensor([7 + scale * (k - 7) for k in (1, 2, 3)]).view(-1, 1, 1, 1) * channels
        torch.testing.assert_close(eps - x0, raw.expand_as(x))
    assert batches == [3, 6, 6, 3]
    for t, y in ((0.5, [7, 7, 7]), (0.9, [1, 2, 3])):          # scale 0 within the interval, 1 outside it
        x0, eps = guided(model, path, cond, uncond, 0.0, interval=(0.2, 0.8))(x, torch.tensor(t))
        torch.testing.assert_close(eps - x0, (torch.tensor(y).view(-1, 1, 1, 1) * channels).expand_as(x))
    # fully rescaled, the guided output has the deviation of the conditional one; half rescaled, the mean
    base = torch.randn(3, 4, 2, 2)
    noisy = lambda xt, t, y: torch.cat([base, -0.3 * base + 1])[:len(xt)]
    pair = lambda **more: guided(noisy, path, cond, uncond, 4.0, **more)(x, t_half)
    raw = lambda **more: (lambda x0, eps: eps - x0)(*pair(**more))
    t_half, std = torch.tensor(0.5), lambda r: r.flatten(1).std(1)
    torch.testing.assert_close(std(raw(rescale=1.0)), std(base))
    torch.testing.assert_close(std(raw(rescale=0.5)), (std(base) + std(raw())) / 2)
    assert (std(raw()) > 2 * std(base)).all()
    base = torch.ones(3, 4, 2, 2)                          # no deviation to scale to, nor from
    assert raw(rescale=0.5).isfinite().all()


def doubled(xt, t, y):
    """A network of twice the channels of xt, all of which depend on all of xt, on t and on y."""
    mixed = torch.einsum("oc,bchw->bohw", torch.linspace(-1, 2, 32).view(8, 4).sin().to(xt), xt)
    return (mixed + y.view(-1, 1, 1, 1) * t.view(-1, 1, 1, 1)).sin() * torch.arange(1.0, 9.0).view(8, 1, 1)


@pytest.mark.parametrize("path", [DDPM(learned_variance=True), RectifiedFlow()], ids=["ddpm", "rf"])
def test_rescale_counts_only_the_channels_of_the_latent(path):
    """Lin et al. eqs. 15 and 16, for a network that returns more of them; its variance is left alone."""
    x, t, y = torch.randn(3, 4, 2, 2), torch.tensor(0.5), torch.tensor([1, 2, 3])
    cond, uncond = {"y": y}, {"y": torch.zeros(3)}
    times = torch.full((3,), 0.5)
    positive, negative = doubled(x, times, y), doubled(x, times, uncond["y"])
    guided_by_4 = negative + 4 * (positive - negative)
    ratio = positive[:, :4].flatten(1).std(1) / guided_by_4[:, :4].flatten(1).std(1)
    want = (0.7 * ratio.view(3, 1, 1, 1) + 0.3) * guided_by_4[:, :4]
    options = {"variance": True} if isinstance(path, DDPM) else {}
    x0, eps, *fraction = guided(doubled, path, cond, uncond, 4.0, rescale=0.7, **options)(x, t)
    for found, expected in zip((x0, eps), path.to_x0_eps(want, x, t)):
        torch.testing.assert_close(found, expected)
    if fraction:
        torch.testing.assert_close(fraction[0], (positive[:, 4:] + 1) / 2)


def test_guidance_on_three_channels_is_the_formula_of_dit():
    """Three of the network's eight channels are guided, and every other, the fourth of the latent and the
    variance too, is that of the half of the batch that is drawn, the conditional one."""
    path, x, t = DDPM(learned_variance=True), torch.randn(3, 4, 2, 2), torch.tensor(0.5)
    y, null = torch.tensor([1, 2, 3]), torch.zeros(3, dtype=torch.long)

    def as_dit(pair, times, labels, scale):              # a batch whose halves hold the same noise
        half = pair[:3]
        out = doubled(torch.cat([half, half]), times, labels)
        first, others = out[:, :3], out[:, 3:]
        positive, negative = first.chunk(2)
        mixed = negative + scale * (positive - negative)
        return torch.cat([torch.cat([mixed, mixed]), others], dim=1)

    out = as_dit(torch.cat([x, x]), torch.full((6,), 0.5), torch.cat([y, null]), 4.0)[:3]
    denoise = guided(doubled, path, {"y": y}, {"y": null}, 4.0, channels=3, variance=True)
    for found, expected in zip(denoise(x, t), (*path.to_x0_eps(out, x, t), (out[:, 4:] + 1) / 2)):
        torch.testing.assert_close(found, expected)
    # all four are the usual guidance, and at scale 0 only three are unconditional
    four, usual = (guided(doubled, path, {"y": y}, {"y": null}, 4.0, channels=n)(x, t) for n in (4, None))
    torch.testing.assert_close(four, usual, rtol=0, atol=0)
    assert (usual[1][:, 3] - out[:, 3]).abs().max() > 0.1
    _, eps = guided(doubled, path, {"y": y}, {"y": null}, 0.0, channels=3)(x, t)
    positive, negative = (doubled(x, torch.full((3,), 0.5), labels)[:, :4] for labels in (y, null))
    torch.testing.assert_close(eps, torch.cat([negative[:, :3], positive[:, 3:]], 1))


def test_skip_layer_guidance():
    """The difference to a network without some blocks is added, within its own interval, after the guidance
    of the other kind, or without any."""
    path, x, y, null = RectifiedFlow(), torch.randn(3, 4, 2, 2), torch.tensor([1, 2, 3]), torch.zeros(3)
    calls = []

    def network(factor):
        def forward(xt, t, y):
            calls.append((factor, len(xt)))
            return (factor * xt + y.view(-1, 1, 1, 1) * t.view(-1, 1, 1, 1)).sin()
        return forward

    def raw(t, scale, **more):
        calls.clear()
        x0, eps = guided(network(1.7), path, {"y": y}, {"y": null}, scale, skipped=network(0.9), **more)(x, t)
        return eps - x0

    for t in (0.5, 0.8, 0.9):
        at = torch.full((3,), t)
        positive, negative, without = (network(f)(x, at, c) for f, c in ((1.7, y), (1.7, null), (0.9, y)))
        for scale in (1.0, 5.0):
            want = negative + scale * (positive - negative)
            if 0.5 < t <= 0.8:
                want = want + 1.5 * (positive - without)
            found = raw(torch.tensor(t), scale, skip_scale=1.5, skip_interval=(0.5, 0.8))
            torch.testing.assert_close(found, want)
            assert calls == [(1.7, 3 if scale == 1 else 6)] + [(0.9, 3)] * (t == 0.8)
    with pytest.raises(ValueError, match="needs the conditional branch, which scale 0 leaves out"):
        raw(torch.tensor(0.5), 0.0)


def test_distilled_guidance_is_a_condition():
    """A network whose guidance is distilled takes the scale as an input: one evaluation, without a null
    branch."""
    path, x, batches = RectifiedFlow(), torch.randn(3, 4, 2, 2), []

    def model(xt, t, y, guidance):
        batches.append(len(xt))
        return y.view(-1, 1, 1, 1) * guidance.view(-1, 1, 1, 1) * torch.ones_like(xt)

    cond = {"y": torch.tensor([1.0, 2.0, 3.0]), "guidance": torch.full((3,), 3.5)}
    x0, eps = guided(model, path, cond)(x, torch.tensor(0.5))
    torch.testing.assert_close(eps - x0, 3.5 * cond["y"].view(3, 1, 1, 1).expand_as(x))
    assert batches == [3]


def spaced_by_openai(model, betas, count, x, noise):
    """OpenAI's respaced diffusion as improved-diffusion defines it: `count` of the steps at even fractions,
    the betas of that subsequence, an output of the mean (eps) and, as "learned range", of the variance.
    model(x, step) -> (B, 2C, ...). Written here step by step from Nichol & Dhariwal's sections 3.1 and 4."""
    total = len(betas)
    stride, kept = (total - 1) / (count - 1), []
    for i in range(count):
        kept.append(round(i * stride))
    cumulative, previous, steps = torch.cumprod(1 - betas, 0), 1.0, []
    for step in kept:
        steps.append(1 - cumulative[step].item() / previous)
        previous = cumulative[step].item()
    steps = torch.tensor(steps, dtype=torch.float64)
    bars = torch.cumprod(1 - steps, 0)
    before = torch.cat([bars.new_ones(1), bars[:-1]])
    posterior = steps * (1 - before) / (1 - bars)
    clipped = torch.cat([posterior[1:2], posterior[1:]]).log()
    for i in reversed(range(count)):
        eps, share = model(x, kept[i]).chunk(2, dim=1)
        share = (share + 1) / 2
        logvar = share * steps[i].log() + (1 - share) * clipped[i]
        x0 = (1 / bars[i]).sqrt() * x - (1 / bars[i] - 1).sqrt() * eps
        mean = (before[i].sqrt() * steps[i] / (1 - bars[i])) * x0
        mean = mean + ((1 - steps[i]).sqrt() * (1 - before[i]) / (1 - bars[i])) * x
        x = mean if i == 0 else mean + (logvar / 2).exp() * noise[count - 1 - i]
    return x


@pytest.mark.parametrize("count", [10, 250])
def test_dit_recipe_is_openais_spaced_diffusion(count):
    """Ancestral sampling with a learned variance at "linspace" times, with the schedule that DiT has."""
    path = DDPM(schedule="linear", learned_variance=True)
    x = torch.randn(3, 4, 2, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    noise = [torch.randn(x.shape, dtype=x.dtype, generator=g)
             for g in [torch.Generator().manual_seed(1)] for _ in range(count - 1)]
    y = torch.tensor([1.0, 2.0, 3.0], dtype=torch.float64)
    network = lambda x, t, y: doubled(x, t.to(x), y) / torch.arange(1.0, 9.0).view(8, 1, 1)
    theirs = spaced_by_openai(lambda x, step: network(x, torch.full((3,), (step + 1) / 1000), y),
                              torch.linspace(1e-4, 0.02, 1000, dtype=torch.float64), count, x, noise)
    denoise = guided(network, path, {"y": y}, variance=True)
    ours = ddpm(denoise, path, x, path.times(count, "linspace"), variance="learned",
                generator=torch.Generator().manual_seed(1))
    torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-9)
    small = ddpm(denoise, path, x, path.times(count, "linspace"), generator=torch.Generator().manual_seed(1))
    assert (small - theirs).abs().max() > 1e-3


@pytest.mark.parametrize("path", [RectifiedFlow(), DDPM(), DDPM(prediction="v")], ids=["rf", "eps", "v"])
def test_autoguidance(path):
    """weak(cond) + scale * (model(cond) - weak(cond)), one batch each; at scale 1 only the model runs."""
    x, t, y = torch.randn(3, 4, 2, 2), torch.tensor(0.4), torch.tensor([1, 2, 3])
    called = []

    def network(name, factor):
        def forward(xt, t, y):
            called.append((name, len(xt)))
            return (factor * xt + y.view(-1, 1, 1, 1)).sin()
        return forward

    def raw(scale, model, weak, **more):
        called.clear()
        pair = guided(model, path, {"y": y}, {"y": y}, scale, weak=weak, **more)(x, t)
        return torch.stack(pair)

    strong, weak = network("strong", 1.7), network("weak", 0.9)
    plain = raw(1.0, strong, None)
    for scale in (-1.0, 0.5, 1.5, 3.0):
        assert torch.equal(raw(scale, strong, strong), plain)          # to the bit, whatever the scale
        found = raw(scale, strong, weak)
        assert called == [("strong", 3), ("weak", 3)]
        output, other = (1.7 * x + y.view(3, 1, 1, 1)).sin(), (0.9 * x + y.view(3, 1, 1, 1)).sin()
        expected = path.to_x0_eps((1 - scale) * other + scale * output, x, t)
        torch.testing.assert_close(found, torch.stack(expected))
    assert torch.equal(raw(1.0, strong, weak), plain) and called == [("strong", 3)]
    assert torch.equal(raw(2.0, strong, weak, interval=(0.5, 1.0)), plain) and called == [("strong", 3)]
    assert torch.equal(raw(0.0, strong, weak), raw(1.0, weak, None))
    # rescaled as by classifier-free guidance: back to the deviation of the conditional output
    output, other = (1.7 * x + y.view(3, 1, 1, 1)).sin(), (0.9 * x + y.view(3, 1, 1, 1)).sin()
    far = other + 3 * (output - other)
    ratio = (output.flatten(1).std(1) / far.flatten(1).std(1)).view(3, 1, 1, 1)
    torch.testing.assert_close(raw(3.0, strong, weak, rescale=1.0),
                               torch.stack(path.to_x0_eps(far * ratio, x, t)))


def test_noise_is_per_image():
    x = torch.empty(3, 2, 2)
    generators = [torch.Generator().manual_seed(i) for i in range(3)]
    noise = noise_like(x, generators)
    torch.testing.assert_close(noise[2], torch.randn(2, 2, generator=torch.Generator().manual_seed(2)))
    with pytest.raises(ValueError):
        noise_like(x, generators[:2])


def test_mixture_denoiser_by_monte_carlo():
    """E[x0 | xt] of the mixture against importance-weighted draws from it."""
    path, means, t = (RectifiedFlow(), torch.tensor([[1.0], [-1.0]], dtype=torch.float64),
                      torch.tensor(0.4, dtype=torch.float64))
    draws = means[torch.randint(2, (400_000,))] + 0.3 * torch.randn(400_000, 1, dtype=torch.float64)
    xt = torch.tensor([[0.1]], dtype=torch.float64)
    weight = torch.exp(-((xt - 0.6 * draws) ** 2) / (2 * 0.4**2))
    x0, eps = gaussian_mixture(path, means, 0.3)(xt, t)
    assert abs(x0.item() - ((weight * draws).sum() / weight.sum()).item()) < 0.01
    torch.testing.assert_close(0.6 * x0 + 0.4 * eps, xt)


@pytest.mark.parametrize("make", [RectifiedFlow, DDPM])
def test_the_lines_in_the_readme_are_the_loss_and_the_sampler(make):
    """On either path, word for word, but for the path that is named there."""
    code, = re.findall(r"```python\n(.*?)```", (Path(__file__).parent.parent / "README.md").read_text(), re.S)
    assert code.startswith("path = RectifiedFlow()")
    x0, path = torch.randn(6, 4, 8, 8), make()
    model = lambda xt, t, **cond: 0.3 * xt + t.view(-1, 1, 1, 1)
    names = {"torch": torch, "RectifiedFlow": make, "x0": x0, "model": model}
    torch.manual_seed(0)
    exec(code, names)
    torch.manual_seed(0)
    torch.testing.assert_close(names["loss"], path.loss(model, x0).mean())
    x = SAMPLERS["euler"](guided(model, path, {}), path, torch.randn_like(x0), path.times(20))
    torch.testing.assert_close(names["x"], x, rtol=1e-4, atol=1e-4)
