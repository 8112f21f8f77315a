"""The diffusion path: data turns into noise along a variance-preserving curve; a network learns the way back.

    python ddpm.py                       # learns a 2-D density in seconds and writes ddpm.png
    python train.py --arch unet --objective ddpm

    xt = alpha_t * x0 + sigma_t * eps,   alpha_t^2 = prod(1 - beta),   sigma_t^2 = 1 - alpha_t^2,
    loss = |prediction - target|^2

Ho et al. 2020 (arXiv:2006.11239) in its own indexing: t = n / 1000, n = 0 is data, n = 1..1000 the noisy
steps. Salimans & Ho 2022 (arXiv:2202.00512) for v; Hang et al. 2023 (arXiv:2303.09556) for min-SNR; Lin et
al. 2023 (arXiv:2305.08891) for zero terminal SNR. What the network predicts is known here and nowhere else.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

STEPS = 1000


def betas(schedule: str) -> Tensor:
    """(1000,) float64: beta_1 .. beta_1000."""
    if schedule == "linear":                       # Ho et al. section 4
        return torch.linspace(1e-4, 0.02, STEPS, dtype=torch.float64)
    if schedule == "scaled_linear":                # Stable Diffusion: linear in sqrt(beta)
        return torch.linspace(0.00085**0.5, 0.012**0.5, STEPS, dtype=torch.float64) ** 2
    if schedule == "cosine":                       # Nichol & Dhariwal 2021 (arXiv:2102.09672) eq. 17
        n = torch.arange(STEPS + 1, dtype=torch.float64) / STEPS
        f = torch.cos((n + 0.008) / 1.008 * math.pi / 2) ** 2
        return (1 - f[1:] / f[:-1]).clamp(max=0.999)
    raise ValueError(f"schedule {schedule!r}: must be linear, scaled_linear or cosine")


def like(a: Tensor, x: Tensor) -> Tensor:
    """Give a, () or (B,), trailing ones until it broadcasts over x (B, ...)."""
    return a.reshape(a.shape + (1,) * (x.ndim - a.ndim)) if a.ndim else a


class DDPM:
    """The path and its loss. `prediction` is what the network returns: "eps", "v" or "x0".

    min_snr: gamma of Hang et al., or None for the plain loss.
    zero_terminal_snr: rescale so that alpha_1000 = 0.
    learned_variance: the network returns twice the channels, of which the second half says where the variance
    of each step lies between smallest and largest (Nichol & Dhariwal 2021, arXiv:2102.09672, eq. 15)."""

    def __init__(self, prediction: str = "eps", schedule: str = "scaled_linear", min_snr: float | None = None,
                 zero_terminal_snr: bool = False, learned_variance: bool = False):
        if prediction not in ("eps", "v", "x0"):
            raise ValueError(f"prediction {prediction!r}: the diffusion path knows eps, v and x0")
        if prediction == "eps" and zero_terminal_snr:
            raise ValueError("eps prediction with zero terminal SNR: where alpha = 0, eps says nothing "
                             "of x0; use v or x0")
        if min_snr is not None and not min_snr > 0:
            raise ValueError(f"min_snr {min_snr}: must be positive")
        self.prediction, self.min_snr, self.learned_variance = prediction, min_snr, learned_variance
        abar = torch.cat([torch.ones(1, dtype=torch.float64), torch.cumprod(1 - betas(schedule), 0)])
        # Lin et al. algorithm 1: shift sqrt(abar) to end at 0, keep its start
        if zero_terminal_snr:
            root = abar.sqrt()
            abar = torch.cat([abar[:1], ((root[1:] - root[-1]) * root[1] / (root[1] - root[-1])) ** 2])
        self.table = torch.stack([abar, 1 - abar])    # (2, 1001) float64: alpha^2 and sigma^2 at n = 0..1000
        self._tables: dict[tuple, Tensor] = {}        # the same where and as a caller needs it

    def alpha_sigma(self, t: Tensor) -> tuple[Tensor, Tensor]:
        """t () or (B,) in [0, 1] -> alpha and sigma of its shape;
        alpha^2 and sigma^2 are linear between the steps n / 1000."""
        key = (t.device, t.dtype)
        if key not in self._tables:
            self._tables[key] = self.table.to(*key)
        table = self._tables[key]
        position = (t * STEPS).clamp(0, STEPS)
        left = position.floor().clamp(max=STEPS - 1).long()
        a, b = table[:, left], table[:, left + 1]
        alpha2, sigma2 = a + (position - left) * (b - a)
        return alpha2.sqrt(), sigma2.sqrt()

    def sample_t(self, n: int, device: torch.device | str = "cpu",
                 generator: torch.Generator | None = None) -> Tensor:
        """(n,) training times, uniform over 1/1000 .. 1."""
        return (torch.randint(1, STEPS + 1, (n,), generator=generator) / STEPS).to(device)

    def t_at(self, lam: Tensor) -> Tensor:
        """The time at which log(alpha / sigma) = lam: the inverse of `alpha_sigma`."""
        sigma2, grid = torch.sigmoid(-2 * lam.cpu().double()), self.table[1]
        left = (torch.searchsorted(grid, sigma2) - 1).clamp(0, STEPS - 1)
        a, b = grid[left], grid[left + 1]
        return ((left + (sigma2 - a) / (b - a)) / STEPS).clamp(0, 1).to(lam)

    def times(self, steps: int, spacing: str = "trailing") -> Tensor:
        """(steps + 1,) float64, falling to 0 along the thousandths. Spacing after Lin et al. table 2:
        "trailing" from 1 in even steps to 0; "linspace" from 1 evenly to 0.001, then 0; "leading" multiples
        of floor(1000 / steps), plus one, which fall short of 1 and so start with some signal left."""
        if not 1 <= steps <= STEPS:
            raise ValueError(f"steps {steps}: the diffusion path has 1 to {STEPS}")
        if spacing == "trailing":
            return torch.linspace(STEPS, 0, steps + 1, dtype=torch.float64).round() / STEPS
        if spacing == "linspace":
            noisy = torch.linspace(STEPS - 1, 0, steps, dtype=torch.float64).round() + 1
        elif spacing == "leading":
            noisy = torch.arange(steps - 1, -1, -1, dtype=torch.float64) * (STEPS // steps) + 1
        else:
            raise ValueError(f"spacing {spacing!r}: must be trailing, leading or linspace")
        return torch.cat([noisy, noisy.new_zeros(1)]) / STEPS

    def add_noise(self, x0: Tensor, eps: Tensor, t: Tensor) -> Tensor:
        """The forward process, eq. 4: q(xt | x0)."""
        alpha, sigma = (like(a, x0) for a in self.alpha_sigma(t))
        return alpha * x0 + sigma * eps

    def target(self, x0: Tensor, eps: Tensor, t: Tensor) -> Tensor:
        alpha, sigma = (like(a, x0) for a in self.alpha_sigma(t))
        return {"eps": eps, "x0": x0, "v": alpha * eps - sigma * x0}[self.prediction]

    def to_x0_eps(self, raw: Tensor, xt: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
        """The network's answer at (xt, t) as the pair (x0, eps) with alpha * x0 + sigma * eps = xt."""
        alpha, sigma = (like(a, xt) for a in self.alpha_sigma(t))
        raw = raw[:, :xt.shape[1]]                    # the rest, if any, speaks of the variance
        if self.prediction == "eps":
            return (xt - sigma * raw) / alpha, raw
        if self.prediction == "x0":
            return raw, (xt - alpha * raw) / sigma
        return alpha * xt - sigma * raw, sigma * xt + alpha * raw

    def fraction(self, raw: Tensor, xt: Tensor) -> Tensor:
        """What a network of learned variance says of it, 0 smallest to 1 largest on the log scale."""
        if raw.shape[1] != 2 * xt.shape[1]:
            raise ValueError("this network was not trained to say anything of the variance")
        return (raw[:, xt.shape[1]:] + 1) / 2

    def weight(self, t: Tensor) -> Tensor:
        """(B,) loss weight: 1, or min(SNR, gamma) of an error in x0, expressed as one of this prediction:
        |error of eps|^2 = SNR |error of x0|^2, and |error of v|^2 = (SNR + 1) |error of x0|^2.

        For v and x0 at zero terminal SNR it vanishes at t = 1, where such a path starts: do not combine."""
        if self.min_snr is None:
            return torch.ones_like(t)
        alpha, sigma = self.alpha_sigma(t)
        snr = (alpha / sigma) ** 2
        clipped = snr.clamp(max=self.min_snr)
        # min(SNR, gamma) / SNR, written so that SNR = 0 gives its limit, 1
        return {"x0": clipped, "eps": (self.min_snr / snr).clamp(max=1.0),
                "v": clipped / (snr + 1)}[self.prediction]

    def loss(self, model, x0: Tensor, *, t: Tensor | None = None, eps: Tensor | None = None,
             **cond) -> Tensor:
        """(B,) weighted mean squared error at random times, eq. 14; t (B,) and eps may be fixed,
        as validation does."""
        t = self.sample_t(len(x0), x0.device) if t is None else t
        eps = torch.randn_like(x0) if eps is None else eps
        xt = self.add_noise(x0, eps, t)
        raw = model(xt, t, **cond).float()
        error = (raw[:, :x0.shape[1]] - self.target(x0, eps, t)).square().flatten(1).mean(1)
        if not self.learned_variance:
            return self.weight(t) * error
        # Nichol & Dhariwal eq. 16: the bound teaches the variance and leaves the mean alone;
        # their weight 0.001 times the 1000 steps of which t is one
        bound = self.bound_term(x0, xt, t, self.to_x0_eps(raw, xt, t)[0].detach(), self.fraction(raw, xt))
        return self.weight(t) * error + bound

    def posterior(self, x0: Tensor, xt: Tensor, s: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and variance of q(xs | xt, x0) for s < t: eqs. 6 and 7, for any two times."""
        (alpha_s, sigma_s), (alpha_t, sigma_t) = self.alpha_sigma(s), self.alpha_sigma(t)
        ratio = alpha_t / alpha_s
        step_var = sigma_t**2 - ratio**2 * sigma_s**2            # beta_t, where s and t are neighbours
        mean = like(alpha_s * step_var / sigma_t**2, x0) * x0 + like(ratio * sigma_s**2 / sigma_t**2, x0) * xt
        return mean, step_var * sigma_s**2 / sigma_t**2

    def bound_term(self, x0: Tensor, xt: Tensor, t: Tensor, x0_hat: Tensor, variance: str | Tensor = "small",
                   bins: float | None = None) -> Tensor:
        """(B,) the term of eq. 5 at t = n / 1000, in bits per dimension: KL(q(xs | xt, x0) || p(xs | xt))
        with s = t - 1 / 1000, and -log p(x0 | xt) for n = 1.

        x0_hat: the network's. variance of p: "small" or "large" (section 3.2), or between them by a fraction.
        bins: width of the intervals to which x0 was rounded (eq. 13; 2 / 255 for 8 bits in [-1, 1]); None
        takes the density of p."""
        n = (t * STEPS).round()
        s, second = (n - 1) / STEPS, torch.full_like(n, 2) / STEPS
        (mean, small), (mean_hat, _) = self.posterior(x0, xt, s, t), self.posterior(x0_hat, xt, s, t)
        # at n = 1 the posterior is a point: p takes the variance of the step before
        floor = self.posterior(x0, xt, second - 1 / STEPS, second)[1]
        (alpha_s, sigma_s), (alpha_t, sigma_t) = self.alpha_sigma(s), self.alpha_sigma(t)
        low = torch.where(n == 1, floor, small).log()
        high = (sigma_t**2 - (alpha_t / alpha_s * sigma_s) ** 2).log()
        low, high, small = like(low, x0), like(high, x0), like(small, x0)
        fraction = {"small": 0.0, "large": 1.0}[variance] if isinstance(variance, str) else variance
        logvar = fraction * high + (1 - fraction) * low
        kl = 0.5 * (logvar - low - 1 + (small + (mean - mean_hat) ** 2) / logvar.exp())
        if bins is None:
            nll = 0.5 * (math.log(2 * math.pi) + logvar + (x0 - mean_hat) ** 2 / logvar.exp())
        else:
            above, below = (torch.special.ndtr((x0 - mean_hat + side * bins / 2) / (logvar / 2).exp())
                            for side in (1, -1))
            above, below = above.where(x0 < 1 - bins / 2, 1.0), below.where(x0 > bins / 2 - 1, 0.0)
            nll = -(above - below).clamp_min(1e-12).log()
        return torch.where(n == 1, nll.flatten(1).mean(1), kl.flatten(1).mean(1)) / math.log(2)

    @torch.no_grad()
    def bound(self, denoise, x0: Tensor, *, variance: str = "small", bins: float | None = None,
              generator: torch.Generator | None = None) -> Tensor:
        """(B, 1001) the terms L_0, L_1 .. L_999, L_T of the variational bound on -log p(x0), eq. 5, in bits
        per dimension, with one draw of xt each. Their sum is the bound.

        denoise(xt, t) as for samplers; variance "learned" takes its third value. bins as in bound_term."""
        terms = []
        for n in range(1, STEPS + 1):
            t = torch.tensor(n / STEPS, dtype=torch.float64)
            device = x0.device if generator is None else generator.device
            eps = torch.randn(x0.shape, dtype=x0.dtype, device=device, generator=generator).to(x0.device)
            xt = self.add_noise(x0, eps, t)
            x0_hat, _, *fraction = denoise(xt, t)
            kind = fraction[0] if variance == "learned" else variance
            terms.append(self.bound_term(x0, xt, t, x0_hat, kind, bins))
        alpha, sigma = self.alpha_sigma(t)
        prior = 0.5 * ((alpha * x0) ** 2 + sigma**2 - 1 - (sigma**2).log())
        return torch.stack([*terms, prior.flatten(1).mean(1) / math.log(2)], 1)


def demo() -> None:
    """Learn two interleaved moons with a small network, draw from it by ancestral sampling,
    and show the way there."""
    import numpy as np
    from PIL import Image

    torch.manual_seed(0)

    def moons(n: int) -> Tensor:
        side, angle = torch.randint(2, (n,)) * 2 - 1, math.pi * torch.rand(n)
        points = torch.stack([angle.cos() * side + 0.5 * side, angle.sin() * side - 0.25 * side], 1)
        return 1.2 * points + 0.05 * torch.randn(n, 2)

    class Net(torch.nn.Module):
        def __init__(self):
            super().__init__()
            sizes = (2 + 16, 128, 128, 128)
            hidden = [m for a, b in zip(sizes, sizes[1:]) for m in (torch.nn.Linear(a, b), torch.nn.SiLU())]
            self.layers = torch.nn.Sequential(*hidden, torch.nn.Linear(sizes[-1], 2))

        def forward(self, xt: Tensor, t: Tensor) -> Tensor:
            angles = t[:, None] * math.pi * 2.0 ** torch.arange(-2, 6)
            return self.layers(torch.cat([xt, angles.cos(), angles.sin()], 1))

    path, model, steps = DDPM(), Net(), 2000
    optimizer = torch.optim.Adam(model.parameters(), lr=5e-3)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    for step in range(1, steps + 1):
        loss = path.loss(model, moons(512)).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        if step % 500 == 0:
            print(f"step {step:4d}  loss {loss.item():.3f}")
    x, frames, times = torch.randn(4000, 2), [], path.times(200).float()
    with torch.no_grad():
        for i, (t, s) in enumerate(zip(times, times[1:])):
            if i % 50 == 0:
                frames.append(x)
            x0, _ = path.to_x0_eps(model(x, t.expand(len(x))), x, t)
            mean, var = path.posterior(x0, x, s, t)
            x = mean + var.sqrt() * torch.randn_like(x)
    data = moons(4000)
    clouds = {"samples": x, "fresh data": moons(4000), "noise": torch.randn(4000, 2)}
    distance = {name: torch.cdist(points, data).amin(1).mean().item() for name, points in clouds.items()}
    print("mean distance to the nearest of 4000 data points: "
          + ", ".join(f"{name} {value:.3f}" for name, value in distance.items()))
    panels = [np.histogram2d(-p[:, 1].numpy(), p[:, 0].numpy(), 120, [[-3, 3]] * 2)[0]
              for p in (*frames, x, data)]
    picture = Image.fromarray(np.hstack([255 - np.clip(p * 80, 0, 255) for p in panels]).astype(np.uint8))
    picture.resize((1440, 240)).save("ddpm.png")
    print("ddpm.png: noise ... samples | data")


if __name__ == "__main__":
    demo()
