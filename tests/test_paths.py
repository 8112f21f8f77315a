"""ddpm.py and rectified_flow.py against closed forms."""

import itertools
import math

import numpy as np
import pytest
import torch

from ddpm import DDPM, Circle, betas
from rectified_flow import RectifiedFlow, density_quantile, shift_time

DDPM_KINDS = [dict(prediction=p, schedule=s, zero_terminal_snr=z) for p in ("eps", "v", "x0")
              for s in ("linear", "scaled_linear", "cosine") for z in (False, True) if not (z and p == "eps")]
PATHS = ([DDPM(**kind) for kind in DDPM_KINDS]
         + [RectifiedFlow(prediction=p) for p in ("velocity", "v", "x0", "eps")]
         + [RectifiedFlow("eps", shift=3.0), Circle(), Circle("x0")])


def f64(*values):
    return torch.tensor(values, dtype=torch.float64)


@pytest.mark.parametrize("path", PATHS, ids=lambda p: f"{type(p).__name__}-{p.prediction}")
def test_to_x0_eps_inverts_target(path):
    """If the network returns the target exactly, the pair is exactly (x0, eps), for (B,) and for scalar t."""
    t = path.sample_t(64).double()
    x0, eps = torch.randn(2, 64, 3, 4, 6, dtype=torch.float64)
    alpha, sigma = (a.view(-1, 1, 1, 1) for a in path.alpha_sigma(t))
    xt = alpha * x0 + sigma * eps
    got = path.to_x0_eps(path.target(x0, eps, t), xt, t)
    torch.testing.assert_close(got[0], x0, rtol=0, atol=1e-8)
    torch.testing.assert_close(got[1], eps, rtol=0, atol=1e-8)
    one = path.to_x0_eps(path.target(x0, eps, t)[:1], xt[:1], t[0])
    torch.testing.assert_close(one[0], x0[:1], rtol=0, atol=1e-8)


def test_t_is_per_example():
    """(B,) times with B = H = W must not be broadcast along the width."""
    for path in PATHS:
        t, x0 = f64(0.1, 0.5, 0.9), torch.randn(3, 1, 3, 3, dtype=torch.float64)
        eps = torch.randn_like(x0)
        whole = path.target(x0, eps, t)
        for i in range(3):
            torch.testing.assert_close(whole[i:i + 1], path.target(x0[i:i + 1], eps[i:i + 1], t[i:i + 1]))
        losses = path.loss(lambda xt, t: torch.zeros_like(xt), x0, t=t, eps=eps)
        torch.testing.assert_close(losses, whole.square().mean((1, 2, 3)))


@pytest.mark.parametrize("path", PATHS, ids=lambda p: f"{type(p).__name__}-{p.prediction}")
def test_times(path):
    for steps in (1, 2, 7, 50, 999, 1000):
        times = path.times(steps)
        assert len(times) == steps + 1 and times[-1] == 0 and (times[1:] < times[:-1]).all()
        first = 0.98 if isinstance(path, RectifiedFlow) and path.prediction == "eps" else 1.0
        assert abs(times[0] - first) < 1e-12
    with pytest.raises(ValueError, match="steps 0"):
        path.times(0)


def test_ddpm_times_are_thousandths():
    n = DDPM().times(30) * 1000
    assert (n == n.round()).all()
    with pytest.raises(ValueError, match="steps 1001"):
        DDPM().times(1001)


def test_schedules_against_their_definitions():
    b = np.linspace(1e-4, 0.02, 1000)
    np.testing.assert_allclose(betas("linear").numpy(), b, rtol=1e-12)
    b = np.linspace(0.00085**0.5, 0.012**0.5, 1000) ** 2
    alpha, _ = DDPM(schedule="scaled_linear").alpha_sigma(torch.arange(1001, dtype=torch.float64) / 1000)
    np.testing.assert_allclose(alpha[1:].numpy() ** 2, np.cumprod(1 - b), rtol=1e-11)
    assert abs(alpha[-1].item() ** 2 - 0.0046600) < 1e-6                       # Stable Diffusion's last abar
    cosine = betas("cosine")
    assert cosine.max() == 0.999 and (cosine > 0).all()
    n = np.arange(1001) / 1000
    f = np.cos((n + 0.008) / 1.008 * np.pi / 2) ** 2
    alpha, sigma = DDPM(schedule="cosine").alpha_sigma(torch.arange(1001, dtype=torch.float64) / 1000)
    np.testing.assert_allclose(alpha[:990].numpy() ** 2, f[:990] / f[0], rtol=1e-10)
    torch.testing.assert_close(alpha**2 + sigma**2, torch.ones_like(alpha), rtol=0, atol=1e-14)
    with pytest.raises(ValueError, match="schedule"):
        DDPM(schedule="square")


def test_alpha_sigma_keep_precision():
    """A float32 call must not spoil a later float64 one, and small sigma must not be lost in 1 - alpha^2."""
    path = DDPM()
    path.alpha_sigma(torch.tensor(0.5))
    alpha, sigma = path.alpha_sigma(f64(0.001))
    assert abs(sigma.item() - 0.00085**0.5) < 1e-12
    _, sigma32 = path.alpha_sigma(torch.tensor([0.001]))
    assert abs(sigma32.item() / 0.00085**0.5 - 1) < 1e-5
    assert path.alpha_sigma(torch.zeros(1))[1].item() == 0


def test_zero_terminal_snr():
    for schedule in ("linear", "scaled_linear", "cosine"):
        path, plain = (DDPM("v", schedule, zero_terminal_snr=z) for z in (True, False))
        assert path.alpha_sigma(f64(1.0))[0].item() == 0
        torch.testing.assert_close(path.alpha_sigma(f64(0.001)), plain.alpha_sigma(f64(0.001)))
        root, roots = plain.table[0].sqrt(), path.table[0].sqrt()
        torch.testing.assert_close(roots[1:], (root[1:] - root[-1]) * root[1] / (root[1] - root[-1]))
    with pytest.raises(ValueError, match="eps prediction with zero terminal SNR"):
        DDPM("eps", zero_terminal_snr=True)


def test_posterior_is_ho_et_al_equation_7():
    path, x0, xt = DDPM(schedule="linear"), *torch.randn(2, 1, 5, dtype=torch.float64)
    beta, abar = betas("linear"), path.table[0]
    for n in (1, 2, 500, 1000):
        mean, var = path.posterior(x0, xt, f64((n - 1) / 1000)[0], f64(n / 1000)[0])
        want = (abar[n - 1].sqrt() * beta[n - 1] / (1 - abar[n]) * x0
                + (1 - beta[n - 1]).sqrt() * (1 - abar[n - 1]) / (1 - abar[n]) * xt)
        torch.testing.assert_close(mean, want, rtol=1e-9, atol=1e-9)
        torch.testing.assert_close(var, (1 - abar[n - 1]) / (1 - abar[n]) * beta[n - 1],
                                   rtol=1e-9, atol=1e-12)


def test_posterior_by_bayes():
    """q(xs|xt,x0) is proportional to q(xt|xs) q(xs|x0): the product of Gaussians,
    for a jump of many steps."""
    path, s, t, x0, xt = DDPM(), f64(0.3)[0], f64(0.8)[0], 0.7, -0.4
    (a_s, s_s), (a_t, s_t) = path.alpha_sigma(s), path.alpha_sigma(t)
    ratio, step_var = a_t / a_s, s_t**2 - (a_t / a_s * s_s) ** 2
    precision = 1 / s_s**2 + ratio**2 / step_var
    mean, var = path.posterior(f64(x0), f64(xt), s, t)
    assert abs(var - 1 / precision) < 1e-12
    assert abs(mean - (a_s * x0 / s_s**2 + ratio * xt / step_var) / precision) < 1e-12


def test_min_snr_weights():
    t = f64(0.01, 0.2, 0.5, 0.9)
    alpha, sigma = DDPM().alpha_sigma(t)
    snr = alpha**2 / sigma**2
    clipped = torch.minimum(snr, torch.full_like(snr, 5.0))
    assert (snr > 5).any() and (snr < 5).any()
    for prediction, want in (("x0", clipped), ("eps", clipped / snr), ("v", clipped / (snr + 1))):
        torch.testing.assert_close(DDPM(prediction, min_snr=5.0).weight(t), want)
        torch.testing.assert_close(DDPM(prediction).weight(t), torch.ones_like(t))
    # the same error in x0 has the same loss whatever the network predicts
    x0, eps, wrong = torch.randn(3, 4, 2, dtype=torch.float64)
    losses = []
    for prediction in ("x0", "eps", "v"):
        path = DDPM(prediction, min_snr=5.0)
        xt = alpha[:, None] * x0 + sigma[:, None] * eps
        eps_of_wrong = (xt - alpha[:, None] * wrong) / sigma[:, None]
        raw = path.target(wrong, eps_of_wrong, t)
        losses.append(path.loss(lambda xt, t: raw, x0, t=t, eps=eps))
    torch.testing.assert_close(losses[0], losses[1])
    torch.testing.assert_close(losses[0], losses[2])
    weight = DDPM("v", zero_terminal_snr=True, min_snr=5.0).weight(f64(0.5, 1.0))
    assert torch.isfinite(weight).all() and weight[1] == 0


def test_densities_have_their_distribution():
    """Each density's samples against its own cumulative distribution (Kolmogorov-Smirnov, 100,000 draws)."""
    from math import erf

    def logit_normal_cdf(t, m, s):
        return 0.5 * (1 + np.vectorize(erf)((np.log(t / (1 - t)) - m) / s / 2**0.5))

    n = 100_000
    grid = np.linspace(0.01, 0.99, 99)
    cases = [
        (RectifiedFlow(density="uniform"), grid),
        (RectifiedFlow(), logit_normal_cdf(grid, 0, 1)),
        (RectifiedFlow(mean=-0.5, std=0.7), logit_normal_cdf(grid, -0.5, 0.7)),
        # shift applied once, undone once
        (RectifiedFlow(shift=3.0), logit_normal_cdf(grid / (3 - 2 * grid), 0, 1)),
        # cosmap: density 2 / (pi (1 - 2 t + 2 t^2)), Esser et al. eq. 21
        (RectifiedFlow(density="cosmap"), 2 / np.pi * (np.arctan(2 * grid - 1) + np.pi / 4)),
    ]
    for path, cdf in cases:
        t = path.sample_t(n).numpy()
        assert 0 < t.min() and t.max() <= 1
        empirical = (t[:, None] <= grid).mean(0)
        assert np.abs(empirical - cdf).max() < 1.95 / n**0.5, (path.density, path.shift)   # p = 0.001
    # mode: invert f(u) = 1 - u - s (cos^2(pi u / 2) - 1 + u) numerically; f falls from 1 to 0
    t = RectifiedFlow(density="mode", mode_scale=0.8).sample_t(n).numpy()
    u = np.linspace(0, 1, 100_001)
    f = 1 - u - 0.8 * (np.cos(np.pi * u / 2) ** 2 - 1 + u)
    cdf = 1 - np.interp(grid, f[::-1], u[::-1])
    assert np.abs((t[:, None] <= grid).mean(0) - cdf).max() < 1.95 / n**0.5
    with pytest.raises(ValueError, match="density"):
        RectifiedFlow(density="beta")


def test_density_is_not_a_weight():
    x0 = torch.zeros(3, 2, dtype=torch.float64)
    eps = torch.ones_like(x0)
    for density in ("uniform", "logit_normal", "mode", "cosmap"):
        loss = RectifiedFlow(density=density, shift=2.0).loss(
            lambda xt, t: torch.zeros_like(xt), x0, t=f64(0.01, 0.5, 0.99), eps=eps)
        torch.testing.assert_close(loss, torch.ones(3, dtype=torch.float64))


@pytest.mark.parametrize("path, expected", [
    (RectifiedFlow(density="uniform"), 1 / 2), (DDPM("v", schedule="cosine"), 1.008 / math.pi),
    (DDPM("v", schedule="scaled_linear"), None)], ids=["rf", "cosine", "scaled_linear"])
def test_losses_that_weight_noise_levels_alike(path, expected):
    """The weight of a squared error in x0 per unit of the log-SNR, lam = 2 log(alpha / sigma), is sigma^-2
    dt/dlam. With uniform times it is proportional to exp(lam / 2) on the straight path, and on the cosine
    schedule with v (Kingma & Gao 2023, arXiv:2303.00848); not so on Stable Diffusion's schedule."""
    t = torch.linspace(0.02, 0.98, 4001, dtype=torch.float64)
    alpha, sigma = path.alpha_sigma(t)
    lam = 2 * (alpha / sigma).log()
    weight = sigma**-2 / torch.gradient(lam, spacing=(t,))[0].abs()
    constant = (weight / (lam / 2).exp())[200:-200]
    if expected is None:
        assert constant[-1] > 3 * constant[0]
    else:
        torch.testing.assert_close(constant, torch.full_like(constant, expected), rtol=0.01, atol=0)


def test_shift():
    t = torch.linspace(0, 1, 11, dtype=torch.float64)
    torch.testing.assert_close(shift_time(t, 1.0), t)
    torch.testing.assert_close(shift_time(shift_time(t, 3.0), 1 / 3.0), t)
    assert shift_time(f64(0.5), 3.0).item() == 0.75
    # eq. 23: the noise-to-signal ratio is multiplied by the shift
    shifted = shift_time(t[1:-1], 3.0)
    torch.testing.assert_close(shifted / (1 - shifted), 3 * t[1:-1] / (1 - t[1:-1]))
    torch.testing.assert_close(RectifiedFlow(shift=3.0).times(10), shift_time(RectifiedFlow().times(10), 3.0))


def test_losses_at_the_optimum():
    """For x0 ~ N(0, 1) the best velocity is known and its loss has a closed form, 1 / (alpha^2 + sigma^2)."""
    n, t = 200_000, 0.3
    path = RectifiedFlow()
    x0 = torch.randn(n, 1, dtype=torch.float64)
    best = lambda xt, t: ((2 * t - 1) / (t**2 + (1 - t) ** 2))[:, None] * xt
    loss = path.loss(best, x0, t=torch.full((n,), t, dtype=torch.float64))
    want = 1 / (t**2 + (1 - t) ** 2)
    assert abs(loss.mean() - want) < 5 * math.sqrt(2 / n) * want


def test_wrong_predictions_are_refused():
    with pytest.raises(ValueError, match="velocity"):
        DDPM("velocity")
    with pytest.raises(ValueError, match="straight path"):
        RectifiedFlow("score")
    with pytest.raises(ValueError, match="shift"):
        RectifiedFlow(shift=0.0)
    assert density_quantile("uniform", f64(0.25), 0, 1, 1).item() == 0.25


def gaussian_reverse(path, mean, std):
    """Exact denoiser of N(mean, std^2), and the variance of its exact reverse step as a fraction between
    small and large on the log scale."""
    def denoise(xt, t):
        s = ((t * 1000).round() - 1) / 1000
        (alpha, sigma), (alpha_s, sigma_s) = path.alpha_sigma(t), path.alpha_sigma(s)
        var = (alpha * std) ** 2 + sigma**2
        x0 = mean + alpha * std**2 / var * (xt - alpha * mean)
        step = sigma**2 - (alpha / alpha_s * sigma_s) ** 2
        # Var(xs | xt) = variance of q(xs | xt, x0) + variance of its mean under p(x0 | xt), whose own
        # variance is std^2 sigma^2 / var
        exact = step * sigma_s**2 / sigma**2 + (alpha_s * step / sigma**2) ** 2 * std**2 * sigma**2 / var
        second = path.table[1, 1] / path.table[1, 2] * (path.table[1, 2] - path.table[0, 2] / path.table[0, 1]
                                                        * path.table[1, 1])
        small = torch.where(s == 0, second, step * sigma_s**2 / sigma**2)
        fraction = (exact / small).log() / (step / small).log()
        return x0, (xt - alpha * x0) / sigma, fraction.expand_as(xt)
    return denoise


@pytest.mark.parametrize("schedule", ["linear", "cosine"])
def test_bound_is_the_entropy_of_a_gaussian(schedule):
    """With the exact reverse process the bound is tight: its mean is the differential entropy of the data in
    bits, up to the prior N(0, 1), from which the data at t = 1 differ a little. Other variances are worse."""
    path, n, std = DDPM(schedule=schedule), 4000, 0.5
    generator = torch.Generator().manual_seed(0)
    x0 = 0.3 + std * torch.randn(n, 2, dtype=torch.float64, generator=generator)
    entropy = 0.5 * math.log2(2 * math.pi * math.e * std**2)
    means = {}
    for variance in ("learned", "small", "large"):
        terms = path.bound(gaussian_reverse(path, 0.3, std), x0, variance=variance, generator=generator)
        assert terms.shape == (n, 1001)
        means[variance] = terms.sum(1).mean().item()
    error = 5 * terms.sum(1).std().item() / n**0.5
    assert abs(means["learned"] - entropy) < error + 1e-3
    assert means["learned"] < min(means["small"], means["large"]) - 1e-3
    alpha, sigma = path.alpha_sigma(torch.tensor(1.0, dtype=torch.float64))
    prior = 0.5 * (alpha**2 * x0.square().mean() + sigma**2 - 1 - (sigma**2).log()) / math.log(2)
    torch.testing.assert_close(terms[:, -1].mean(), prior)


def test_bound_of_rounded_data():
    """8-bit data: the probability of an interval is close to its width times the density, and the outermost
    intervals include the tails, so that all 256 probabilities sum to one."""
    path = DDPM(schedule="linear")
    values = torch.linspace(-1, 1, 256, dtype=torch.float64)[:, None]
    t, x0_hat = torch.full((256,), 1e-3, dtype=torch.float64), torch.full_like(values, 0.97)
    bits = path.bound_term(values, values, t, x0_hat, "large", bins=2 / 255)
    torch.testing.assert_close((2.0 ** -bits[60:]).sum().item(), 1.0, atol=1e-6, rtol=0)
    t, middle = t[:1], torch.zeros(1, 1, dtype=torch.float64)
    narrow = path.bound_term(middle, middle, t, middle, "large", bins=1e-5)
    density = path.bound_term(middle, middle, t, middle, "large")
    torch.testing.assert_close(narrow, density - math.log2(1e-5), atol=1e-4, rtol=0)


def test_learned_variance_loss():
    """Only the bound trains the second half of the channels, and only the squared error the first half."""
    path, plain = DDPM(learned_variance=True), DDPM()
    x0, eps, t = torch.randn(5, 2, 3, 3), torch.randn(5, 2, 3, 3), torch.tensor([1, 2, 400, 900, 1000]) / 1000
    raw = torch.randn(5, 4, 3, 3, requires_grad=True)
    path.loss(lambda xt, t: raw, x0, t=t, eps=eps).sum().backward()
    mean = raw[:, :2].detach().requires_grad_()
    plain.loss(lambda xt, t: mean, x0, t=t, eps=eps).sum().backward()
    torch.testing.assert_close(raw.grad[:, :2], mean.grad)
    assert (raw.grad[:, 2:].flatten(1).abs().amax(1) > 0).all()
    xt = plain.add_noise(x0, eps, t)
    pair, both = plain.to_x0_eps(raw[:, :2], xt, t), path.to_x0_eps(raw, xt, t)
    torch.testing.assert_close(pair, both)
    with pytest.raises(ValueError, match="not trained"):
        path.fraction(raw[:, :2], xt)


# ---- the space of the loss

@pytest.mark.parametrize("kind, names", [(RectifiedFlow, ("velocity", "v", "x0", "eps")),
                                         (DDPM, ("eps", "v", "x0"))])
def test_the_loss_may_be_taken_in_another_space(kind, names):
    """It is the squared error that the prediction's own pair (x0, eps) has there."""
    x0, eps, guess = torch.randn(3, 4, 2, 3, 3, dtype=torch.float64).float().double()
    t = f64(0.2, 0.4, 0.7, 0.9)
    for prediction, space in itertools.product(names, names):
        path = kind(prediction, loss_space=space)
        alpha, sigma = path.alpha_sigma(t.view(-1, 1, 1, 1))
        pair = path.to_x0_eps(guess, alpha * x0 + sigma * eps, t)
        error = kind(space).target(*pair, t) - kind(space).target(x0, eps, t)
        loss = path.loss(lambda xt, t: guess, x0, t=t, eps=eps)
        torch.testing.assert_close(loss, error.square().flatten(1).mean(1), rtol=1e-9, atol=0)
    # the default is the prediction's own, to the bit
    assert torch.equal(kind(names[0]).loss(lambda xt, t: guess, x0, t=t, eps=eps),
                       kind(names[0], loss_space=names[0]).loss(lambda xt, t: guess, x0, t=t, eps=eps))


def test_where_the_loss_space_would_be_infinite():
    """An x0 prediction at sigma = 0 and an eps prediction at alpha = 0: the factor ends at 1 / 0.05."""
    path = RectifiedFlow("x0", loss_space="velocity")
    torch.testing.assert_close(path.weight(f64(0.0, 0.01, 0.05, 0.5, 1.0)), f64(400, 400, 400, 4, 1))
    path = RectifiedFlow("eps", loss_space="velocity")
    torch.testing.assert_close(path.weight(f64(0.0, 0.5, 0.98)), f64(1, 4, 400))
    path = DDPM("x0", loss_space="v", schedule="linear")
    assert path.weight(f64(0.001)).item() == pytest.approx(1 / 0.05**2)                  # sigma is 0.01


@pytest.mark.parametrize("make, message", [
    (lambda: RectifiedFlow(loss_space="score"), "loss_space 'score': the straight path has"),
    (lambda: DDPM(loss_space="velocity"), "loss_space 'velocity': the diffusion path has"),
    (lambda: DDPM("v", min_snr=5.0, loss_space="x0"), "loss_space x0 with min_snr 5.0: each is a weight"),
])
def test_loss_spaces_that_are_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_circle():
    """A quarter of a circle, walked at an even pace: xt turns toward v by pi / 2 in all; nothing is left of
    x0 at t = 1, whatever the precision, and nothing of eps at t = 0."""
    path = Circle()
    for dtype in (torch.float32, torch.float64):
        alpha, sigma = path.alpha_sigma(torch.tensor([0.0, 0.5, 1.0], dtype=dtype))
        assert alpha[0] == sigma[2] == 1 and alpha[2] == sigma[0] == 0
        torch.testing.assert_close(alpha[1], sigma[1])
    t = torch.linspace(0.01, 1, 100, dtype=torch.float64)
    alpha, sigma = path.alpha_sigma(t)
    torch.testing.assert_close(path.t_at((alpha / sigma).log()), t)
    x0, eps, h = torch.randn(1, 2).double(), torch.randn(1, 2).double(), 1e-6
    at = lambda t: path.add_noise(x0, eps, f64(t))
    torch.testing.assert_close((at(0.3 + h) - at(0.3 - h)) / (2 * h),
                               math.pi / 2 * path.target(x0, eps, f64(0.3)), rtol=1e-6, atol=1e-6)
    drawn = path.sample_t(100_000)
    assert drawn.dtype == torch.float32 and drawn.min() > 0 and drawn.max() <= 1
    quartiles = torch.tensor([0.25, 0.5, 0.75])
    torch.testing.assert_close(drawn.quantile(quartiles), quartiles, rtol=0, atol=0.01)
    with pytest.raises(ValueError, match="eps prediction with zero terminal SNR"):
        Circle("eps")
    with pytest.raises(NotImplementedError, match="1000 steps"):
        path.bound(lambda xt, t: (xt, xt), torch.zeros(1, 1, 1, 1))
