"""Every solver, for both paths: from noise to data along a list of times.

    python samplers.py             # measures each solver's order of convergence against an exact solution

All have one signature, `sampler(denoise, path, x, times, *, generator=None, on_step=None)`. x (B, ...) is
noise at times[0]; times (N + 1,) fall strictly in N steps, each from t to s (see times.py); the result is x
at the last time, which is 0, data, or slightly above. A sampler uses the model only through `denoise(xt, t)
-> (x0, eps)`. Every first-order step combines that pair,

    x_s = alpha_s * x0 + sigma_s * eps

which is DDIM on any path (Song et al. 2020, arXiv:2010.02502, eq. 12) and Euler's step on the straight one.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from math import factorial, inf, log1p

import torch
import torch.nn.functional as F
from torch import Tensor

# A denoiser returns (x0, eps). If it was built for a learned variance, and only then, it returns a third
# tensor: the fraction, in [0, 1], by which the variance of the reverse step lies between its smallest and its
# largest value on the log scale. Only `ddpm` with variance="learned" reads it.
# `jump`, and no other sampler, also passes the time that its step goes to.
Denoiser = Callable[..., tuple[Tensor, ...]]
Generators = torch.Generator | Sequence[torch.Generator] | None    # one for the batch, or one per image
OnStep = Callable[[int, Tensor, Tensor], None] | None              # (i, x at times[i + 1], x0 it came from)


# ---- denoisers

def guided(model, path, cond: dict, uncond: dict | None = None, scale: float = 1.0, *, weak=None,
           interval: tuple[float, float] = (0.0, 1.0), rescale: float = 0.0, channels: int | None = None,
           skipped=None, skip_scale: float = 2.8, skip_interval: tuple[float, float] = (0.0, 1.0),
           variance: bool = False) -> Denoiser:
    """A denoiser from a network, by classifier-free guidance
    (Ho & Salimans 2022, arXiv:2207.12598): raw = raw(uncond) + scale * (raw(cond) - raw(uncond)).

    cond, uncond: the network's keyword arguments, of the batch's length. A network with distilled guidance
    (Meng et al. 2023, arXiv:2210.03142; FLUX.1-dev) takes its scale here, as cond["guidance"] (B,), and needs
    no `uncond`: `scale` is then 1.
    scale: 1 is conditional, 0 unconditional; each evaluates only that branch.
    weak: another network, which then evaluates the branch `uncond`. With the conditions of `cond` there,
    this is autoguidance, away from what a weaker network draws under the same conditions, such as an earlier
    checkpoint (Karras et al. 2024, arXiv:2406.02507): raw = weak(cond) + scale * (raw(cond) - weak(cond)).
    interval: guide only where low < t <= high, and use scale 1 elsewhere
    (Kynkaanniemi et al. 2024, arXiv:2404.07724).
    rescale: 0 to 1, how far the standard deviation of each image's guided output is moved back to that of its
    conditional output, to avoid overexposure (Lin et al. 2023, arXiv:2305.08891, eqs. 15 and 16). Further
    channels, of a learned variance, do not count.
    channels: guide only so many first channels (None: all); the others are those of the conditional output.
    DiT's authors draw with 3 of 4.
    skipped: the network without some of its blocks, for skip-layer guidance as Stable Diffusion 3.5 has it:
    skip_scale * (raw(cond) - skipped(cond)) is added where low < t <= high of skip_interval.
    variance: return the learned variance as the third value, from the conditional output without guidance.
    The denoiser takes a third argument, the time s that a step goes to, for a network of two times: its raw
    output is then the mean velocity from t to s. Without it, the output is that at t.
    Raises ValueError for a scale other than 1 without `uncond`, and for `skipped` with scale 0, where there
    is no conditional output to compare with."""
    if scale != 1.0 and uncond is None:
        raise ValueError(f"guidance scale {scale} needs an unconditional branch")
    if scale == 0.0 and skipped is not None:
        raise ValueError("skip-layer guidance needs the conditional branch, which scale 0 leaves out")

    def denoise(xt: Tensor, t: Tensor, s: Tensor | None = None) -> tuple[Tensor, ...]:
        time = torch.full((len(xt),), float(t), dtype=torch.float32, device=xt.device)
        given, null = cond, uncond or {}
        if s is not None:
            second = {"s": torch.full_like(time, float(s))}
            given, null = given | second, null | second
        # unguided: the conditional output or, with scale 0, the unconditional one
        if scale == 1.0 or not interval[0] < t <= interval[1]:
            raw = unguided = model(xt, time, **given).to(xt.dtype)
        elif scale == 0.0 and channels is None:
            network = model if weak is None else weak
            raw = unguided = network(xt, time, **null).to(xt.dtype)
        else:
            if weak is None:               # both branches as one batch
                both = {name: torch.cat([given[name], null[name]]) for name in given}
                output = model(torch.cat([xt, xt]), time.repeat(2), **both).to(xt.dtype)
                unguided, unconditional = output.chunk(2)
            else:
                unguided = model(xt, time, **given).to(xt.dtype)
                unconditional = weak(xt, time, **null).to(xt.dtype)
            raw = unconditional + scale * (unguided - unconditional)
            if channels is not None:
                raw = torch.cat([raw[:, :channels], unguided[:, channels:]], 1)
        if skipped is not None and skip_interval[0] < t <= skip_interval[1]:
            raw = raw + skip_scale * (unguided - skipped(xt, time, **given).to(xt.dtype))
        if rescale and raw is not unguided:
            latent = slice(xt.shape[1])    # the channels of xt
            wanted, found = std_per_image(unguided[:, latent]), std_per_image(raw[:, latent])
            raw = raw * (rescale * wanted / found.clamp_min(1e-12) + 1 - rescale)
        x0, eps = path.to_x0_eps(raw, xt, t)
        if variance:
            return x0, eps, path.fraction(unguided, xt)
        return x0, eps

    return denoise


def std_per_image(raw: Tensor) -> Tensor:
    """(B, 1, ...) standard deviation over all values of each image."""
    return raw.flatten(1).std(1).view(-1, *[1] * (raw.ndim - 1))


def inpainting(denoise: Denoiser, path, x0: Tensor, repaint: Tensor) -> Denoiser:
    """A denoiser that keeps the known part of a picture, x0. repaint: bool, broadcast to x0.

    Where `repaint` is False it returns the known x0 and the eps that xt contains with it, so that every
    sampler, on either path, takes that part back to x0 whatever the network predicts. Where it is True it
    returns the prediction of the network, whose input holds the known part at the noise level of t
    (imputation: Song et al. 2021, arXiv:2011.13456, appendix I.2)."""

    def denoise_rest(xt: Tensor, t: Tensor, *s: Tensor) -> tuple[Tensor, ...]:
        guess, eps, *fraction = denoise(xt, t, *s)
        alpha, sigma = path.alpha_sigma(t)
        known_eps = (xt - alpha * x0) / sigma
        return torch.where(repaint, guess, x0), torch.where(repaint, eps, known_eps), *fraction

    return denoise_rest


def soft_border(mask: Tensor, width: int) -> Tensor:
    """Weights to blend a drawn patch into its picture without a visible seam. mask (B, 1, H, W), bool: True
    where the patch is -> (B, 1, H, W) float32: 0 outside the mask, rising to 1 within `width` pixels inside
    it, or up to the middle of what is narrower than that."""
    kept = 1 - mask.float()
    weight = torch.zeros_like(kept)
    for reach in range(width + 1):         # in each round: is every pixel within `reach` drawn?
        weight += (1 - F.max_pool2d(kept, 2 * reach + 1, 1, reach)) / (width + 1)
    highest = F.max_pool2d(weight, 2 * width + 1, 1, width)
    return weight / highest.clamp(min=1e-6)


# ---- what the solvers share

def noise_at(path, noise: Tensor, t: Tensor) -> Tensor:
    """Unit Gaussian noise, scaled to the deviation of xt at t, where sampling begins, if data has a deviation
    of 1: by 1 on the diffusion path, by less where the straight path begins before t = 1."""
    alpha, sigma = path.alpha_sigma(t)
    return (alpha**2 + sigma**2).sqrt().to(noise) * noise


def noise_like(x: Tensor, generator: Generators = None) -> Tensor:
    """Unit Gaussian noise of x's shape. With one generator per image, an image does not depend on the others
    in its batch; raises ValueError unless there are as many generators as images."""
    if isinstance(generator, Sequence):
        return torch.stack([noise_like(row, g) for row, g in zip(x, generator, strict=True)])
    device = x.device
    if generator is not None:
        device = generator.device          # a CPU generator draws the same numbers for every device
    return torch.randn(x.shape, dtype=x.dtype, device=device, generator=generator).to(x.device)


def check_times(times: Tensor) -> None:
    """Raise ValueError unless times (N + 1,) fall strictly, to 0 or above, and N is at least 1."""
    if times.ndim != 1 or len(times) < 2 or times[-1] < 0 or not (times[1:] < times[:-1]).all():
        raise ValueError(f"times must fall strictly, to 0 or above, in at least one step, got "
                         f"{times.tolist()}")


def log_snr(path, t: Tensor) -> Tensor:
    """lam = log(alpha / sigma), half the log of the signal-to-noise ratio: it rises from -inf at alpha = 0 to
    inf at t = 0."""
    alpha, sigma = path.alpha_sigma(t)
    return (alpha / sigma).log()


def fresh_std(path, t: Tensor, s: Tensor, eta: float) -> Tensor:
    """Standard deviation of the fresh noise of a step from t to s, whose other noise is kept from xt: eta 0
    is none, eta 1 that of the posterior q(xs | xt, x0) (Song et al. 2020, arXiv:2010.02502, eq. 16)."""
    alpha_t, sigma_t = path.alpha_sigma(t)
    alpha_s, sigma_s = path.alpha_sigma(s)
    return eta * sigma_s / sigma_t * (sigma_t**2 - (alpha_t / alpha_s * sigma_s) ** 2).clamp_min(0).sqrt()


def order_of_step(i: int, times: Tensor, highest: int, lower_order_final: bool) -> int:
    """The order of the i-th step of a multistep solver. It rises from 1 with the number of evaluations made
    and, with lower_order_final, falls to 1 over the last steps. A last step to 0 is of order 1 anyway, so
    this changes the step before it, and the last one of times that end above 0. It steadies few steps:
    diffusers does so below 15 steps, and always in its UniPC."""
    order = min(i + 1, highest)
    if lower_order_final:
        order = min(order, len(times) - 1 - i)
    return order


# ---- solvers in alpha and sigma

def euler(denoise: Denoiser, path, x: Tensor, times: Tensor, *, generator: Generators = None,
          on_step: OnStep = None) -> Tensor:
    """First order: (x0, eps) held over the step. DDIM at eta = 0; Euler's method on the straight path.
    1 evaluation per step."""
    check_times(times)
    for i, (t, s) in enumerate(zip(times, times[1:])):
        x0, eps = denoise(x, t)
        alpha_s, sigma_s = path.alpha_sigma(s)
        # predict
        x = alpha_s * x0 + sigma_s * eps
        if on_step:
            on_step(i, x, x0)
    return x


def jump(denoise: Denoiser, path, x: Tensor, times: Tensor, *, generator: Generators = None,
         on_step: OnStep = None) -> Tensor:
    """As `euler`, for a network that predicts the mean of the velocity over a step, with which any step is
    exact. The other samplers call such a network with one time and so follow its velocity. 1 evaluation per
    step. Geng et al. 2025 (arXiv:2505.13447)."""
    check_times(times)
    for i, (t, s) in enumerate(zip(times, times[1:])):
        x0, eps = denoise(x, t, s)
        alpha_s, sigma_s = path.alpha_sigma(s)
        x = alpha_s * x0 + sigma_s * eps
        if on_step:
            on_step(i, x, x0)
    return x


def heun(denoise: Denoiser, path, x: Tensor, times: Tensor, *, generator: Generators = None,
         on_step: OnStep = None, churn: float = 0.0, churn_min: float = 0.0, churn_max: float = inf,
         churn_noise: float = 1.0) -> Tensor:
    """Second order: (x0, eps) averaged over both ends of the step. 2 evaluations per step, 2N - 1 in all: a
    last step to 0 is of first order, because xt at s = 0 contains no noise from which to predict eps.

    churn: before each step, raise sigma / alpha by the factor 1 + min(churn / N, sqrt(2) - 1), with fresh
    noise of standard deviation churn_noise, where sigma / alpha is between churn_min and churn_max; never
    beyond the start of the path (Karras et al. 2022, arXiv:2206.00364, algorithm 2, there S_churn, S_min,
    S_max and S_noise). 0 is deterministic."""
    check_times(times)
    growth = min(churn / (len(times) - 1), 2**0.5 - 1)
    for i, (t, s) in enumerate(zip(times, times[1:])):
        alpha_t, sigma_t = path.alpha_sigma(t)
        # noise: the same x0 at a higher level, t_hat, is x * alpha_hat / alpha_t and the noise that it lacks
        if growth > 0 and alpha_t > 0 and churn_min <= sigma_t / alpha_t <= churn_max:
            t_hat = path.t_at(log_snr(path, t) - log1p(growth)).clamp(max=times[0])
            alpha_hat, sigma_hat = path.alpha_sigma(t_hat)
            std = (sigma_hat**2 - (alpha_hat / alpha_t * sigma_t) ** 2).clamp_min(0).sqrt()
            x = alpha_hat / alpha_t * x + churn_noise * std * noise_like(x, generator)
            t, alpha_t, sigma_t = t_hat, alpha_hat, sigma_hat
        x0, eps = denoise(x, t)
        alpha_s, sigma_s = path.alpha_sigma(s)
        # predict
        x_s = alpha_s * x0 + sigma_s * eps
        # correct: dx = x0 dalpha + eps dsigma, by the trapezoid rule
        if s > 0:
            x0_s, eps_s = denoise(x_s, s)
            x0 = (x0 + x0_s) / 2
            eps = (eps + eps_s) / 2
            x_s = x + (alpha_s - alpha_t) * x0 + (sigma_s - sigma_t) * eps
        x = x_s
        if on_step:
            on_step(i, x, x0)
    return x


def ddim(denoise: Denoiser, path, x: Tensor, times: Tensor, *, generator: Generators = None,
         on_step: OnStep = None, eta: float = 0.0) -> Tensor:
    """First order, with a share of fresh noise: eta 0 is `euler`, eta 1 draws from the posterior
    q(xs | xt, x0), on any path. 1 evaluation per step. Song et al. 2020 (arXiv:2010.02502).
    In x / alpha and sigma / alpha this is k-diffusion's ancestral Euler step, with the same eta."""
    check_times(times)
    for i, (t, s) in enumerate(zip(times, times[1:])):
        x0, eps = denoise(x, t)
        alpha_s, sigma_s = path.alpha_sigma(s)
        std = fresh_std(path, t, s, eta)
        # predict, eq. 12
        x = alpha_s * x0 + (sigma_s**2 - std**2).clamp_min(0).sqrt() * eps
        # noise
        if eta > 0 and s > 0:
            x = x + std * noise_like(x, generator)
        if on_step:
            on_step(i, x, x0)
    return x


def ddpm(denoise: Denoiser, path, x: Tensor, times: Tensor, *, generator: Generators = None,
         on_step: OnStep = None, variance: str = "small") -> Tensor:
    """Ancestral sampling, between any two times of any path. 1 evaluation per step.
    Ho et al. 2020 (arXiv:2006.11239), algorithm 2.

    variance: "small", that of the posterior q(xs | xt, x0), which is ddim at eta = 1; "large", that of the
    forward step (both section 3.2); "learned", between the two by the fraction that `denoise` then returns as
    its third value (Nichol & Dhariwal 2021, arXiv:2102.09672, eq. 15)."""
    check_times(times)
    if variance not in ("small", "large", "learned"):
        raise ValueError(f"variance {variance!r}: must be small, large or learned")
    for i, (t, s) in enumerate(zip(times, times[1:])):
        x0, eps, *fraction = denoise(x, t)               # fraction: a list, empty unless variance is learned
        alpha_t, sigma_t = path.alpha_sigma(t)
        alpha_s, sigma_s = path.alpha_sigma(s)
        large = (sigma_t**2 - (alpha_t / alpha_s * sigma_s) ** 2).clamp_min(0)
        small = large * (sigma_s / sigma_t) ** 2
        # predict the posterior's mean, eq. 7, here as a combination of x0 and eps
        x = alpha_s * x0 + (sigma_s**2 - small).clamp_min(0).sqrt() * eps
        # noise
        if s > 0:
            if variance == "small":
                std = small.sqrt()
            elif variance == "large":
                std = large.sqrt()
            else:
                std = (0.5 * (fraction[0] * large.log() + (1 - fraction[0]) * small.log())).exp()
            x = x + std * noise_like(x, generator)
        if on_step:
            on_step(i, x, x0)
    return x


def reverse_sde(denoise: Denoiser, path, x: Tensor, times: Tensor, *, generator: Generators = None,
                on_step: OnStep = None, noise: float = 1.0) -> Tensor:
    """Euler-Maruyama for dx = x0 dalpha + eps dsigma - w / 2 score dt + sqrt(w) dW, backward in time.
    1 evaluation per step.

    Every w >= 0 leaves the distribution at each t as it is (Song et al. 2021, arXiv:2011.13456; Ma et al.
    2024, arXiv:2401.08740, eq. 5). Here w dt = noise * d(sigma^2): with score = -eps / sigma the drift is
    finite on either path, at alpha = 0 too. noise: 0 is the ODE (Euler in alpha and sigma), 1 adds as much
    noise as sigma loses. The last step, to the singular end sigma = 0, adds none."""
    check_times(times)
    if noise < 0:
        raise ValueError(f"noise {noise}: must not be negative")
    for i, (t, s) in enumerate(zip(times, times[1:])):
        x0, eps = denoise(x, t)
        _, sigma_t = path.alpha_sigma(t)
        alpha_s, sigma_s = path.alpha_sigma(s)
        # predict, by the ODE
        x = alpha_s * x0 + sigma_s * eps
        # noise, and the drift along the score that makes up for it
        if s > 0:
            dvar = noise * 2 * sigma_t * (sigma_t - sigma_s)        # w dt
            x = x - dvar / 2 / sigma_t * eps + dvar.sqrt() * noise_like(x, generator)
        if on_step:
            on_step(i, x, x0)
    return x


# ---- solvers in eps
#
# Where eps is held, x / alpha is linear in sigma / alpha, so these step with a mean of several eps. From
# alpha = 0, where sigma / alpha is infinite, the step is of first order.

def plms(denoise: Denoiser, path, x: Tensor, times: Tensor, *, generator: Generators = None,
         on_step: OnStep = None) -> Tensor:
    """Pseudo linear multistep: the step of `euler` with the mean of up to four eps that is Adams-Bashforth's
    for even steps of sigma / alpha. Where they are not even, of second order. The first step averages eps at
    both its ends: 1 evaluation per step and 1 more. Liu et al. 2022 (arXiv:2202.09778), eqs. 9 and 12,
    without their Runge-Kutta steps, as Stable Diffusion 1 uses it."""
    check_times(times)
    past = []                                            # eps at t and before, the latest first
    for i, (t, s) in enumerate(zip(times, times[1:])):
        x0, eps = denoise(x, t)
        alpha_t, sigma_t = path.alpha_sigma(t)
        alpha_s, sigma_s = path.alpha_sigma(s)
        past = [eps, *past[:3]]
        # predict
        x = alpha_s * x0 + sigma_s * eps
        # correct, by the mean of eps
        if alpha_t > 0:
            if i == 0 and len(times) > 2:
                mean = (eps + denoise(x, s)[1]) / 2
            else:
                mean = sum(w * eps_k for w, eps_k in zip(ADAMS_BASHFORTH[len(past)], past))
            x = x + (sigma_s - alpha_s / alpha_t * sigma_t) * (mean - eps)
        if on_step:
            on_step(i, x, x0)
    return x


ADAMS_BASHFORTH = {1: (1,), 2: (3 / 2, -1 / 2), 3: (23 / 12, -16 / 12, 5 / 12),
                   4: (55 / 24, -59 / 24, 37 / 24, -9 / 24)}


def lms(denoise: Denoiser, path, x: Tensor, times: Tensor, *, generator: Generators = None,
        on_step: OnStep = None, order: int = 4) -> Tensor:
    """Linear multistep: as `plms`, with the weights of the steps as they are, so that a polynomial through
    the eps of up to `order` times is integrated over sigma / alpha exactly. 1 evaluation per step.
    k-diffusion's and the textbook's: Hairer et al. 1993, Solving Ordinary Differential Equations I, III.5."""
    check_times(times)
    past = []                                            # (sigma / alpha, eps), the latest first
    for i, (t, s) in enumerate(zip(times, times[1:])):
        x0, eps = denoise(x, t)
        alpha_t, sigma_t = path.alpha_sigma(t)
        alpha_s, sigma_s = path.alpha_sigma(s)
        # predict
        x = alpha_s * x0 + sigma_s * eps
        # correct, by the mean of eps
        if alpha_t > 0:
            level = sigma_t / alpha_t
            h = sigma_s / alpha_s - level
            past = [(level, eps), *past[:order - 1]]
            weights = mean_weights([(level_k - level) / h for level_k, _ in past])
            x = x + alpha_s * h * sum(w * (eps_k - eps) for w, (_, eps_k) in zip(weights, past))
        if on_step:
            on_step(i, x, x0)
    return x


def mean_weights(r: list[Tensor]) -> list[Tensor]:
    """Weights w_k, one per r_k, with which the mean over [0, 1] of a polynomial of degree len(r) - 1 is that
    of its values at r_k: sum_k w_k r_k^j = 1 / (j + 1)."""
    distances = torch.stack(r).cpu()                     # at most `order`: too few to be worth a GPU
    degrees = torch.arange(len(r), dtype=distances.dtype)
    weights = torch.linalg.solve(distances ** degrees[:, None], 1 / (degrees + 1))
    return list(weights.to(r[0].device))


# ---- solvers in log-SNR
#
# Higher orders expand x0 or eps in lam = log(alpha / sigma), of which a step covers h. A step from alpha = 0
# or to sigma = 0 has h = inf, so nothing can be expanded and the step is of first order. (UniPC corrects even
# a step from alpha = 0.) A later step that divides by such an h gets a slope of 0.

def dpm_solver_2(denoise: Denoiser, path, x: Tensor, times: Tensor, *, generator: Generators = None,
                 on_step: OnStep = None) -> Tensor:
    """Second order, single step: eps from the middle of the step. 2 evaluations per step.
    Lu et al. 2022 (arXiv:2206.00927), algorithm 1."""
    check_times(times)
    for i, (t, s) in enumerate(zip(times, times[1:])):
        x0, eps = denoise(x, t)
        alpha_s, sigma_s = path.alpha_sigma(s)
        lam = log_snr(path, t)
        h = log_snr(path, s) - lam
        # predict
        x = alpha_s * x0 + sigma_s * eps
        # correct, by eps in the middle of the step
        if h.isfinite():
            middle = path.t_at(lam + h / 2)
            alpha_m, sigma_m = path.alpha_sigma(middle)
            _, eps_m = denoise(alpha_m * x0 + sigma_m * eps, middle)
            x = x - sigma_s * h.expm1() * (eps_m - eps)
        if on_step:
            on_step(i, x, x0)
    return x


def dpm_solver_3(denoise: Denoiser, path, x: Tensor, times: Tensor, *, generator: Generators = None,
                 on_step: OnStep = None) -> Tensor:
    """Third order, single step: eps from one and two thirds of the step. 3 evaluations per step.
    Lu et al. 2022 (arXiv:2206.00927), algorithm 2 with r1 = 1/3, r2 = 2/3."""
    check_times(times)
    r1, r2 = 1 / 3, 2 / 3
    for i, (t, s) in enumerate(zip(times, times[1:])):
        x0, eps = denoise(x, t)
        alpha_s, sigma_s = path.alpha_sigma(s)
        lam = log_snr(path, t)
        h = log_snr(path, s) - lam
        # predict
        x = alpha_s * x0 + sigma_s * eps
        # correct: eps at one third gives a slope, with which eps at two thirds is good enough
        if h.isfinite():
            t_1, t_2 = path.t_at(lam + r1 * h), path.t_at(lam + r2 * h)
            alpha_1, sigma_1 = path.alpha_sigma(t_1)
            alpha_2, sigma_2 = path.alpha_sigma(t_2)
            _, eps_1 = denoise(alpha_1 * x0 + sigma_1 * eps, t_1)
            slope = r2 / r1 * ((r2 * h).expm1() / (r2 * h) - 1) * (eps_1 - eps)
            _, eps_2 = denoise(alpha_2 * x0 + sigma_2 * eps - sigma_2 * slope, t_2)
            x = x - sigma_s / r2 * (h.expm1() / h - 1) * (eps_2 - eps)
        if on_step:
            on_step(i, x, x0)
    return x


def dpmpp_2m(denoise: Denoiser, path, x: Tensor, times: Tensor, *, generator: Generators = None,
             on_step: OnStep = None, lower_order_final: bool = False) -> Tensor:
    """DPM-Solver++(2M): second order, multistep: the slope of x0 from the step before. 1 evaluation per step.
    Lu et al. 2022 (arXiv:2211.01095), algorithm 2. lower_order_final: see `order_of_step`."""
    check_times(times)
    h_last = x0_last = None
    for i, (t, s) in enumerate(zip(times, times[1:])):
        x0, eps = denoise(x, t)
        alpha_s, sigma_s = path.alpha_sigma(s)
        h = log_snr(path, s) - log_snr(path, t)
        # predict
        x = alpha_s * x0 + sigma_s * eps
        # correct, by the slope of x0
        if order_of_step(i, times, 2, lower_order_final) == 2 and h.isfinite():
            change = h / h_last * (x0 - x0_last)
            x = x - alpha_s * (-h).expm1() / 2 * change
        if on_step:
            on_step(i, x, x0)
        h_last, x0_last = h, x0
    return x


def dpmpp_3m(denoise: Denoiser, path, x: Tensor, times: Tensor, *, generator: Generators = None,
             on_step: OnStep = None, as_published: bool = False,
             lower_order_final: bool = False) -> Tensor:
    """DPM-Solver++(3M): third order, multistep: slope and curvature of x0 from the two steps before.
    1 evaluation per step. Lu et al. 2022 (arXiv:2211.01095), section 4 and appendix A, at k = 3.

    as_published: the authors' code, and code derived from it, uses the second divided difference, half the
    second derivative, in place of the derivative and so is of second order. True reproduces its pictures.
    lower_order_final: see `order_of_step`."""
    check_times(times)
    h_last = h_before = x0_last = slope = slope_last = None         # last: one step before; before: two
    for i, (t, s) in enumerate(zip(times, times[1:])):
        x0, eps = denoise(x, t)
        alpha_s, sigma_s = path.alpha_sigma(s)
        h = log_snr(path, s) - log_snr(path, t)
        order = order_of_step(i, times, 3, lower_order_final)
        # predict
        x = alpha_s * x0 + sigma_s * eps
        # correct, by the slope of x0 (a divided difference over lam) and from the third step by the curvature
        if i > 0:
            slope = (x0 - x0_last) / h_last
        if order == 2 and h.isfinite():
            x = x - alpha_s * (-h).expm1() / 2 * h * slope
        elif order == 3 and h.isfinite():
            difference = (slope - slope_last) / (h_last + h_before)
            curvature = difference if as_published else 2 * difference
            phi2 = (-h).expm1() / h + 1
            slope_t = slope + h_last * difference        # at t; `slope` is that between the last two times
            x = x + alpha_s * phi2 * h * slope_t
            x = x - alpha_s * (phi2 / h - 0.5) * h**2 * curvature
        if on_step:
            on_step(i, x, x0)
        h_last, h_before = h, h_last
        x0_last, slope_last = x0, slope
    return x


def dpmpp_2m_sde(denoise: Denoiser, path, x: Tensor, times: Tensor, *, generator: Generators = None,
                 on_step: OnStep = None, eta: float = 1.0, lower_order_final: bool = False) -> Tensor:
    """SDE-DPM-Solver++(2M): the reverse SDE of the path, for which a step of order one is `ddpm`; x0 is
    extrapolated as in `dpmpp_2m`, which this is at eta = 0. 1 evaluation per step.
    Lu et al. 2022 (arXiv:2211.01095), eq. 19 and appendix A. eta: the share of the noise and of the drift
    that makes up for it, as in k-diffusion. lower_order_final: see `order_of_step`."""
    check_times(times)
    h_last = x0_last = None
    for i, (t, s) in enumerate(zip(times, times[1:])):
        x0, _ = denoise(x, t)
        _, sigma_t = path.alpha_sigma(t)
        alpha_s, sigma_s = path.alpha_sigma(s)
        h = log_snr(path, s) - log_snr(path, t)
        # correct, by the slope of x0: its mean over the step
        x0_mean = x0
        if order_of_step(i, times, 2, lower_order_final) == 2 and h.isfinite():
            x0_mean = x0 + h / h_last * (x0 - x0_last) / 2
        # predict
        share = -(-(1 + eta) * h).expm1()                # of x0 at s, the rest being that within x
        x = sigma_s / sigma_t * (-h).exp() ** eta * x + alpha_s * share * x0_mean
        # noise: `renewed` is the share that is replaced
        if s > 0 and eta > 0:
            renewed = -(-2 * eta * h).expm1()
            x = x + sigma_s * renewed.sqrt() * noise_like(x, generator)
        if on_step:
            on_step(i, x, x0)
        h_last, x0_last = h, x0
    return x


def dpmpp_3m_sde(denoise: Denoiser, path, x: Tensor, times: Tensor, *, generator: Generators = None,
                 on_step: OnStep = None, eta: float = 1.0, as_published: bool = False,
                 lower_order_final: bool = False) -> Tensor:
    """SDE-DPM-Solver++(3M): as `dpmpp_2m_sde`, with x0 extrapolated as in `dpmpp_3m`: at eta = 0 of third
    order. 1 evaluation per step. k-diffusion's, whose pictures as_published=True reproduces: it takes half of
    the curvature, as 3M does in its authors' code. eta: see `dpmpp_2m_sde`. lower_order_final: see
    `order_of_step`."""
    check_times(times)
    h_last = h_before = x0_last = slope = slope_last = None         # last: one step before; before: two
    for i, (t, s) in enumerate(zip(times, times[1:])):
        x0, _ = denoise(x, t)
        _, sigma_t = path.alpha_sigma(t)
        alpha_s, sigma_s = path.alpha_sigma(s)
        h = log_snr(path, s) - log_snr(path, t)
        order = order_of_step(i, times, 3, lower_order_final)
        # predict
        share = -(-(1 + eta) * h).expm1()
        x = sigma_s / sigma_t * (-h).exp() ** eta * x + alpha_s * share * x0
        # correct, by the slope of x0 and from the third step by the curvature
        if i > 0:
            slope = (x0 - x0_last) / h_last
        phi2 = 1 - share / ((1 + eta) * h)
        if order == 2 and h.isfinite():
            x = x + alpha_s * phi2 * h * slope
        elif order == 3 and h.isfinite():
            difference = (slope - slope_last) / (h_last + h_before)
            curvature = difference if as_published else 2 * difference
            slope_t = slope + h_last * difference
            x = x + alpha_s * phi2 * h * slope_t
            x = x - alpha_s * (phi2 / ((1 + eta) * h) - 0.5) * h**2 * curvature
        # noise
        if s > 0 and eta > 0:
            x = x + sigma_s * (-(-2 * eta * h).expm1()).sqrt() * noise_like(x, generator)
        if on_step:
            on_step(i, x, x0)
        h_last, h_before = h, h_last
        x0_last, slope_last = x0, slope
    return x


def dpmpp_sde(denoise: Denoiser, path, x: Tensor, times: Tensor, *, generator: Generators = None,
              on_step: OnStep = None, eta: float = 1.0) -> Tensor:
    """DPM-Solver++ SDE: the step of `ddim` with x0 from the middle of the step, which it reaches by another.
    2 evaluations per step. k-diffusion's, with r = 1/2; there the noises of both have the correlation of a
    Brownian motion over sigma / alpha, here that of the reverse SDE, 1 / sqrt(1 + e^h)."""
    check_times(times)
    for i, (t, s) in enumerate(zip(times, times[1:])):
        x0, eps = denoise(x, t)
        alpha_s, sigma_s = path.alpha_sigma(s)
        lam = log_snr(path, t)
        h = log_snr(path, s) - lam
        noise = noise_like(x, generator) if eta > 0 and s > 0 else torch.zeros_like(x)
        # correct, by x0 in the middle, and the eps that x contains with it
        if h.isfinite():
            middle = path.t_at(lam + h / 2)
            alpha_t, sigma_t = path.alpha_sigma(t)
            alpha_m, sigma_m = path.alpha_sigma(middle)
            std = fresh_std(path, t, middle, eta)
            x_m = alpha_m * x0 + (sigma_m**2 - std**2).clamp_min(0).sqrt() * eps + std * noise
            x0, _ = denoise(x_m, middle)
            eps = (x - alpha_t * x0) / sigma_t
            if eta > 0:                    # of the step's noise, the first half of the step has this share
                half = 1 / (1 + h.exp())
                noise = half.sqrt() * noise + (1 - half).sqrt() * noise_like(x, generator)
        # predict and noise
        std = fresh_std(path, t, s, eta)
        x = alpha_s * x0 + (sigma_s**2 - std**2).clamp_min(0).sqrt() * eps + std * noise
        if on_step:
            on_step(i, x, x0)
    return x


def dpm2_ancestral(denoise: Denoiser, path, x: Tensor, times: Tensor, *, generator: Generators = None,
                   on_step: OnStep = None, eta: float = 1.0) -> Tensor:
    """The step of `ddim`, whose part without fresh noise is one of `dpm_solver_2`: eps from its middle.
    2 evaluations per step. k-diffusion's second-order ancestral sampler."""
    check_times(times)
    for i, (t, s) in enumerate(zip(times, times[1:])):
        x0, eps = denoise(x, t)
        alpha_s, sigma_s = path.alpha_sigma(s)
        std = fresh_std(path, t, s, eta)
        kept = (sigma_s**2 - std**2).clamp_min(0).sqrt()             # the noise of xs that is not fresh
        lam = log_snr(path, t)
        h = (alpha_s / kept).log() - lam
        # predict
        x = alpha_s * x0 + kept * eps
        # correct, by eps in the middle
        if h.isfinite():
            middle = path.t_at(lam + h / 2)
            alpha_m, sigma_m = path.alpha_sigma(middle)
            _, eps_m = denoise(alpha_m * x0 + sigma_m * eps, middle)
            x = x - kept * h.expm1() * (eps_m - eps)
        # noise
        if eta > 0 and s > 0:
            x = x + std * noise_like(x, generator)
        if on_step:
            on_step(i, x, x0)
    return x


def unipc(denoise: Denoiser, path, x: Tensor, times: Tensor, *, generator: Generators = None,
          on_step: OnStep = None, order: int = 3, lower_order_final: bool = False) -> Tensor:
    """UniPC: a multistep predictor of the given order and a corrector, one order higher, that uses the
    evaluation at the predicted point; the next step uses that evaluation too. 1 evaluation per step.
    Zhao et al. 2023 (arXiv:2302.04867), algorithms 1 and 2 for x0, with B = e^-h - 1.
    lower_order_final: see `order_of_step`."""
    check_times(times)
    past = []                                            # (lam, x0) of earlier times, the latest first
    x0 = denoise(x, times[0])[0]
    for i, (t, s) in enumerate(zip(times, times[1:])):
        alpha_t, sigma_t = path.alpha_sigma(t)
        alpha_s, sigma_s = path.alpha_sigma(s)
        lam = log_snr(path, t)
        h = log_snr(path, s) - lam
        # predict, first order; then by the slopes of x0 from t to the earlier times
        first = sigma_s / sigma_t * x + (alpha_s - sigma_s * alpha_t / sigma_t) * x0
        past = past[:order_of_step(i, times, order, lower_order_final) - 1]
        if not h.isfinite():
            past = []
        r = [(lam_k - lam) / h for lam_k, _ in past]     # their distances from t in steps of h: negative
        slopes = [(x0_k - x0) / r_k for r_k, (_, x0_k) in zip(r, past)]
        x = first - alpha_s * sum(w * d for w, d in zip(unipc_weights(r, h), slopes))
        # correct, by the slope from t to s too; after the last step nothing is evaluated
        x0_s = x0
        if i + 2 < len(times):
            x0_s = denoise(x, s)[0]
            slopes.append(x0_s - x0)
            x = first - alpha_s * sum(w * d for w, d in zip(unipc_weights([*r, 1.0], h), slopes))
        if on_step:
            on_step(i, x, x0)
        past = [(lam, x0), *past]
        if not lam.isfinite():
            past = []                                    # there is no slope from alpha = 0, where lam = -inf
        x0 = x0_s
    return x


def unipc_weights(r: list, h: Tensor) -> list[Tensor]:
    """Weights w_k, one per r_k, for which sum_k w_k r_k^(j-1) = j! psi_j, j = 1, 2, ..., where psi_1 =
    (e^-h - 1) / -h - 1 and psi_{j+1} = psi_j / -h - 1 / (j + 1)! (theorem 3.1: B cancels). One weight
    alone is free up to O(h^2): B / 2."""
    if len(r) < 2:
        return [(-h).expm1() / 2] * len(r)
    psi = (-h).expm1() / -h - 1
    right = []
    for j in range(1, len(r) + 1):
        right.append(factorial(j) * psi)
        psi = psi / -h - 1 / factorial(j + 1)
    # at most `order` equations: too few to be worth a GPU
    powers = torch.stack([torch.as_tensor(r_k, dtype=h.dtype).cpu() ** torch.arange(len(r)) for r_k in r], 1)
    return list(torch.linalg.solve(powers, torch.stack(right).cpu()).to(h.device))


SAMPLERS = {"euler": euler, "jump": jump, "heun": heun, "ddim": ddim, "ddpm": ddpm,
            "plms": plms, "lms": lms, "dpm_solver_2": dpm_solver_2, "dpm_solver_3": dpm_solver_3,
            "dpmpp_2m": dpmpp_2m, "dpmpp_3m": dpmpp_3m, "dpmpp_2m_sde": dpmpp_2m_sde,
            "dpmpp_3m_sde": dpmpp_3m_sde, "dpmpp_sde": dpmpp_sde, "dpm2_ancestral": dpm2_ancestral,
            "unipc_2": partial(unipc, order=2), "unipc_3": partial(unipc, order=3),
            "reverse_sde": reverse_sde}


# ---- measuring a solver

def gaussian_mixture(path, means: Tensor, std: float) -> Denoiser:
    """The exact denoiser of data drawn evenly from Gaussians at `means` (K, D) with one `std`: E[x0 | xt] and
    its eps. This is what a perfect network would predict, so every solver can be compared with it."""

    def denoise(xt: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
        alpha, sigma = path.alpha_sigma(t)
        var = (alpha * std) ** 2 + sigma**2
        # probability of each Gaussian given xt, (B, K, 1)
        weight = (-((xt[:, None] - alpha * means) ** 2).sum(-1) / (2 * var)).softmax(-1)[..., None]
        x0 = (weight * (means + alpha * std**2 / var * (xt[:, None] - alpha * means))).sum(1)
        eps = (weight * (sigma / var * (xt[:, None] - alpha * means))).sum(1)
        return x0, eps

    return denoise


def demo() -> None:
    """Print each solver's error at 20 to 160 steps, and how fast it falls."""
    from ddpm import DDPM
    from rectified_flow import RectifiedFlow
    from times import log_snr_times

    torch.manual_seed(0)
    means = torch.tensor([[1.0, 0.5], [-1.0, 0.8], [0.2, -1.2]], dtype=torch.float64)
    x = torch.randn(64, 2, dtype=torch.float64)
    names = ("euler", "heun", "plms", "dpm_solver_2", "dpmpp_2m", "dpm_solver_3", "dpmpp_3m", "unipc_2",
             "unipc_3")
    print("median error against the exact flow of three Gaussians in 2-D, and its slope: the order")
    for path, end in ((RectifiedFlow(), 1e-5), (DDPM(schedule="linear"), 1e-9)):
        denoise = gaussian_mixture(path, means, 0.4)
        exact = dpm_solver_3(denoise, path, x, log_snr_times(path, 2000, end))
        for name in names:
            errors = {}
            for steps in (20, 40, 80, 160):
                samples = SAMPLERS[name](denoise, path, x, log_snr_times(path, steps, end))
                errors[steps] = (samples - exact).norm(dim=1).median()
            print(f"{type(path).__name__:14s} {name:12s} "
                  + "  ".join(f"N={steps}: {error:.1e}" for steps, error in errors.items())
                  + f"   order {torch.log2(errors[80] / errors[160]):.2f}")


if __name__ == "__main__":
    demo()
