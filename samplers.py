"""Every solver, for both paths: from noise to data along a list of times.

    python samplers.py             # measures each solver's order of convergence against an exact solution

All have one signature, `sampler(denoise, path, x, times, *, generator=None, on_step=None)`. `denoise(xt, t)`
returns the pair (x0, eps); nothing else of the model is seen. x (B, ...) is noise at times[0]; times (N + 1,)
fall strictly to 0 in N steps. Each step combines x0 and eps with the path's own alpha and sigma,

    x_s = alpha_s * x0 + sigma_s * eps

which is DDIM (Song et al. 2020, arXiv:2010.02502, eq. 12) on any path, and Euler's step on the straight one.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

Denoiser = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]
Generators = torch.Generator | Sequence[torch.Generator] | None    # one for the batch, or one per image
OnStep = Callable[[int, Tensor, Tensor], None] | None              # (i, x at times[i + 1], x0 it came from)


def guided(model, path, cond: dict, uncond: dict | None = None, scale: float = 1.0) -> Denoiser:
    """A denoiser from a network: classifier-free guidance on all channels
    (Ho & Salimans 2022, arXiv:2207.12598).

    raw = raw(uncond) + scale * (raw(cond) - raw(uncond)): scale 1 is conditional, 0 unconditional, and
    neither evaluates the other. `cond` and `uncond` are the network's keyword arguments, of the batch's
    length."""
    if scale != 1.0 and uncond is None:
        raise ValueError(f"guidance scale {scale} needs an unconditional branch")

    def denoise(xt: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
        time = t.to(torch.float32).to(xt.device).expand(len(xt))
        if scale in (0.0, 1.0):
            raw = model(xt, time, **(cond if scale else uncond)).to(xt.dtype)
        else:
            both = {k: torch.cat([cond[k], uncond[k]]) for k in cond}
            with_cond, without = model(torch.cat([xt, xt]), time.repeat(2), **both).to(xt.dtype).chunk(2)
            raw = without + scale * (with_cond - without)
        return path.to_x0_eps(raw, xt, t)

    return denoise


def noise_like(x: Tensor, generator: Generators = None) -> Tensor:
    """Unit Gaussian noise of x's shape; with one generator per image,
    image i does not depend on who else is in the batch."""
    if isinstance(generator, Sequence):
        return torch.stack([noise_like(row, g) for row, g in zip(x, generator, strict=True)])
    device = x.device if generator is None else generator.device
    return torch.randn(x.shape, dtype=x.dtype, device=device, generator=generator).to(x.device)


def check_times(times: Tensor) -> None:
    if times.ndim != 1 or len(times) < 2 or times[-1] != 0 or not (times[1:] < times[:-1]).all():
        raise ValueError(f"times must fall strictly to 0 in at least one step, got {times.tolist()}")


def euler(denoise: Denoiser, path, x: Tensor, times: Tensor, *, generator: Generators = None,
          on_step: OnStep = None) -> Tensor:
    """First order: (x0, eps) held over the step. DDIM at eta = 0; Euler's method on the straight path."""
    check_times(times)
    for i, (t, s) in enumerate(zip(times, times[1:])):
        x0, eps = denoise(x, t)
        alpha_s, sigma_s = path.alpha_sigma(s)
        x = alpha_s * x0 + sigma_s * eps
        if on_step:
            on_step(i, x, x0)
    return x


def heun(denoise: Denoiser, path, x: Tensor, times: Tensor, *, generator: Generators = None,
         on_step: OnStep = None) -> Tensor:
    """Second order: (x0, eps) averaged over both ends of the step, dx = x0 dalpha + eps dsigma by the
    trapezoid rule. The last step is first order: at t = 0 the network has nothing to say. 2N - 1
    evaluations."""
    check_times(times)
    for i, (t, s) in enumerate(zip(times, times[1:])):
        x0, eps = denoise(x, t)
        (alpha_t, sigma_t), (alpha_s, sigma_s) = path.alpha_sigma(t), path.alpha_sigma(s)
        end = alpha_s * x0 + sigma_s * eps
        if s > 0:
            x0_s, eps_s = denoise(end, s)
            x0, eps = (x0 + x0_s) / 2, (eps + eps_s) / 2
            end = x + (alpha_s - alpha_t) * x0 + (sigma_s - sigma_t) * eps
        x = end
        if on_step:
            on_step(i, x, x0)
    return x


def ddim(denoise: Denoiser, path, x: Tensor, times: Tensor, *, generator: Generators = None,
         on_step: OnStep = None, eta: float = 0.0) -> Tensor:
    """Song et al. 2020 eqs. 12 and 16: eta 0 is `euler`, eta 1 draws from the posterior q(xs | xt, x0),
    on any path."""
    check_times(times)
    for i, (t, s) in enumerate(zip(times, times[1:])):
        x0, eps = denoise(x, t)
        (alpha_t, sigma_t), (alpha_s, sigma_s) = path.alpha_sigma(t), path.alpha_sigma(s)
        std = eta * sigma_s / sigma_t * (sigma_t**2 - (alpha_t / alpha_s * sigma_s) ** 2).clamp_min(0).sqrt()
        x = alpha_s * x0 + (sigma_s**2 - std**2).clamp_min(0).sqrt() * eps
        if eta > 0 and s > 0:
            x = x + std * noise_like(x, generator)
        if on_step:
            on_step(i, x, x0)
    return x


def ddpm(denoise: Denoiser, path, x: Tensor, times: Tensor, *, generator: Generators = None,
         on_step: OnStep = None) -> Tensor:
    """Ancestral sampling (Ho et al. 2020, algorithm 2) with the posterior variance: ddim at eta = 1."""
    return ddim(denoise, path, x, times, generator=generator, on_step=on_step, eta=1.0)


SAMPLERS = {"euler": euler, "heun": heun, "ddim": ddim, "ddpm": ddpm}


def gaussian_mixture(path, means: Tensor, std: float) -> Denoiser:
    """The exact denoiser of data drawn evenly from Gaussians at `means` (K, D) with one `std`: E[x0 | xt] and
    its eps. What a perfect network would say; every solver can be held against it."""

    def denoise(xt: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
        alpha, sigma = path.alpha_sigma(t)
        var = (alpha * std) ** 2 + sigma**2
        weight = (-((xt[:, None] - alpha * means) ** 2).sum(-1) / (2 * var)).softmax(-1)[..., None]
        x0 = (weight * (means + alpha * std**2 / var * (xt[:, None] - alpha * means))).sum(1)
        eps = (weight * (sigma / var * (xt[:, None] - alpha * means))).sum(1)
        return x0, eps

    return denoise


def demo() -> None:
    from ddpm import DDPM
    from rectified_flow import RectifiedFlow

    torch.manual_seed(0)
    means = torch.tensor([[1.0, 0.5], [-1.0, 0.8], [0.2, -1.2]], dtype=torch.float64)
    x = torch.randn(64, 2, dtype=torch.float64)
    print("error against the exact flow of three Gaussians in 2-D, and its slope in log-log (the order)")
    for path, power in ((RectifiedFlow(), 1), (DDPM(), 2)):   # sigma must fall smoothly: for DDPM t = u^2

        def solve(sampler, steps: int) -> Tensor:
            times = torch.linspace(1, 0, steps + 1, dtype=torch.float64) ** power
            return sampler(gaussian_mixture(path, means, 0.4), path, x, times)

        exact = solve(heun, 5000)
        for sampler in (euler, heun):
            errors = {steps: (solve(sampler, steps) - exact).norm(dim=1).mean()
                      for steps in (20, 40, 80, 160)}
            print(f"{type(path).__name__:14s} {sampler.__name__:6s} "
                  + "  ".join(f"N={steps}: {error:.1e}" for steps, error in errors.items())
                  + f"   order {torch.log2(errors[80] / errors[160]):.2f}")


if __name__ == "__main__":
    demo()
