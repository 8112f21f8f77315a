"""samplers.py against exact solutions."""

import pytest
import torch

from ddpm import DDPM
from rectified_flow import RectifiedFlow
from samplers import SAMPLERS, ddim, ddpm, euler, gaussian_mixture, guided, heun, noise_like

PATHS = {"rf": RectifiedFlow(), "rf-shift": RectifiedFlow(shift=3.0), "ddpm": DDPM(),
         "ddpm-cosine": DDPM(schedule="cosine"), "ddpm-zero-snr": DDPM("v", zero_terminal_snr=True)}
MEAN, STD = 0.8, 0.3


def gaussian(path):
    """Exact denoiser of x0 ~ N(MEAN, STD^2)."""
    def denoise(xt, t):
        alpha, sigma = path.alpha_sigma(t)
        var = (alpha * STD) ** 2 + sigma**2
        return MEAN + alpha * STD**2 / var * (xt - alpha * MEAN), sigma / var * (xt - alpha * MEAN)
    return denoise


def start(path, n):
    """Draws of the exact marginal where the path starts; Stable Diffusion's does not start in pure noise."""
    alpha, sigma = path.alpha_sigma(path.times(1)[0])
    return alpha * MEAN + ((alpha * STD) ** 2 + sigma**2).sqrt() * torch.randn(n, 1, dtype=torch.float64)


@pytest.mark.parametrize("name", SAMPLERS)
@pytest.mark.parametrize("path", PATHS)
def test_every_sampler_recovers_a_gaussian(name, path):
    n, path = 20_000, PATHS[path]
    y = SAMPLERS[name](gaussian(path), path, start(path, n), path.times(200))
    # statistical error at five sigma, and the discretisation of 200 steps;
    # Ho et al.'s own variance is small by O(1/N)
    assert abs(y.mean() - MEAN) < 5 * STD / n**0.5 + 0.01
    assert abs(y.std() / STD - 1) < 5 / (2 * n) ** 0.5 + 0.05


@pytest.mark.parametrize("name", SAMPLERS)
@pytest.mark.parametrize("path", ["rf", "ddpm"])
def test_flipped_signs_fail(name, path):
    """The test above must not pass a denoiser whose eps has the wrong sign, or whose pair is swapped."""
    path = PATHS[path]
    for wrong in (lambda x0, eps: (x0, -eps), lambda x0, eps: (eps, x0)):
        denoise = lambda x, t: wrong(*gaussian(path)(x, t))
        y = SAMPLERS[name](denoise, path, start(path, 5000), path.times(200))
        assert not (abs(y.mean() - MEAN) < 0.03 and abs(y.std() / STD - 1) < 0.1)


def exact_flow(path, x):
    """Probability flow of N(MEAN, STD^2) from t = times[0] to 0: it keeps the standardised value."""
    alpha, sigma = path.alpha_sigma(path.times(1)[0])
    return MEAN + STD * (x - alpha * MEAN) / ((alpha * STD) ** 2 + sigma**2).sqrt()


def grids(path, steps):
    """A list of times on which both paths are smooth to the end:
    sigma falls in proportion to the remaining steps."""
    u = torch.linspace(1, 0, steps + 1, dtype=torch.float64)
    return u if isinstance(path, RectifiedFlow) else u**2


@pytest.mark.parametrize("path", ["rf", "ddpm"])
@pytest.mark.parametrize("sampler, order", [(euler, 1), (ddim, 1), (heun, 2)])
def test_order_of_convergence(path, sampler, order):
    path, x = PATHS[path], torch.linspace(-2, 2, 9, dtype=torch.float64)[:, None]
    errors = [(sampler(gaussian(path), path, x, grids(path, n)) - exact_flow(path, x)).abs().max()
              for n in (40, 80, 160)]
    slopes = [torch.log2(a / b).item() for a, b in zip(errors, errors[1:])]
    assert all(order - 0.1 < slope < order + 0.35 for slope in slopes), slopes


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

    def counting(xt, t):
        calls.append(float(t))
        return gaussian(path)(xt, t)

    for steps in (1, 5):
        calls.clear(), shown.clear()
        y = SAMPLERS[name](counting, path, torch.randn(3, 1), path.times(steps),
                           on_step=lambda i, x, x0: shown.append(i))
        assert torch.isfinite(y).all() and shown == list(range(steps))
        assert len(calls) == (2 * steps - 1 if name == "heun" else steps)
        assert min(calls) > 0                                   # the network is never asked at t = 0


def test_bad_times_are_refused():
    for times in ([1.0], [1.0, 0.5], [0.5, 1.0, 0.0], [1.0, 0.5, 0.5, 0.0]):
        with pytest.raises(ValueError, match="fall strictly to 0"):
            euler(gaussian(PATHS["rf"]), PATHS["rf"], torch.zeros(1, 1), torch.tensor(times))


def test_guidance():
    """Scale 1 and 0 evaluate one branch; others extrapolate in raw, on every channel, from one batch."""
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
