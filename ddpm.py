"""The diffusion path: data turns into noise along a variance-preserving curve; a network learns the reverse.

    python ddpm.py                       # learns a 2-D density in seconds and writes ddpm.png
    python train.py --arch unet --objective ddpm

    xt = alpha_t * x0 + sigma_t * eps,   alpha_t^2 = prod(1 - beta),   sigma_t^2 = 1 - alpha_t^2

Ho et al. 2020 (arXiv:2006.11239), the source of equations cited without a name and of the indexing: t is
n / 1000, where n = 0 is data and n = 1..1000 are the noisy steps. v: Salimans & Ho 2022 (arXiv:2202.00512).
Min-SNR: Hang et al. 2023 (arXiv:2303.09556). Zero terminal SNR: Lin et al. 2023 (arXiv:2305.08891).
`Circle` is the path in continuous time, without steps. Only these classes depend on what the network
predicts: samplers use just the pair (x0, eps).
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

STEPS = 1000


class DDPM:
    """The path and its loss.

    prediction: what the network returns, "eps", "v" or "x0".
    loss_space: the quantity whose squared error is the loss, by the same names. None: the predicted one.
    schedule: the noise added at each step; see `betas`.
    min_snr: gamma of Hang et al., or None for the unweighted loss.
    zero_terminal_snr: rescale the schedule so that alpha_1000 = 0.
    learned_variance: the network returns twice the channels. The second half places the variance of each step
    between the smallest and the largest (Nichol & Dhariwal 2021, arXiv:2102.09672, eq. 15).
    Raises ValueError for an option out of range and for eps prediction with zero terminal SNR."""

    def __init__(self, prediction: str = "eps", schedule: str = "scaled_linear", min_snr: float | None = None,
                 zero_terminal_snr: bool = False, learned_variance: bool = False,
                 loss_space: str | None = None):
        check_options(prediction, min_snr, zero_terminal_snr, loss_space)
        self.prediction = prediction
        self.loss_space = loss_space or prediction
        self.min_snr = min_snr
        self.learned_variance = learned_variance
        self.table = alpha2_sigma2(schedule, zero_terminal_snr)     # (2, 1001) float64
        self._tables: dict[tuple, Tensor] = {}    # copies of the table, one per device and dtype in use

    def alpha_sigma(self, t: Tensor) -> tuple[Tensor, Tensor]:
        """alpha and sigma at t in [0, 1], each of t's shape: xt = alpha * x0 + sigma * eps.
        alpha^2 and sigma^2 are linear in t between the steps n / 1000."""
        key = (t.device, t.dtype)
        if key not in self._tables:
            self._tables[key] = self.table.to(*key)
        table = self._tables[key]
        position = (t * STEPS).clamp(0, STEPS)
        left = position.floor().clamp(max=STEPS - 1).long()
        below, above = table[:, left], table[:, left + 1]
        alpha2, sigma2 = below + (position - left) * (above - below)
        return alpha2.sqrt(), sigma2.sqrt()

    def add_noise(self, x0: Tensor, eps: Tensor, t: Tensor) -> Tensor:
        """The forward process, eq. 4: a draw xt from q(xt | x0)."""
        alpha, sigma = self.alpha_sigma(like(t, x0))
        return alpha * x0 + sigma * eps

    def target(self, x0: Tensor, eps: Tensor, t: Tensor) -> Tensor:
        """What the network should return at xt, of the shape of x0; t () or (B,)."""
        if self.prediction == "eps":
            return eps
        if self.prediction == "x0":
            return x0
        alpha, sigma = self.alpha_sigma(like(t, x0))
        return alpha * eps - sigma * x0                  # v: Salimans & Ho, section 4

    def loss(self, model, x0: Tensor, *, t: Tensor | None = None, eps: Tensor | None = None,
             **cond) -> Tensor:
        """(B,) weighted mean squared error at random times, eq. 14, plus the loss of a learned variance.
        t (B,) and eps may be fixed, as validation does. x0 and eps may be lists of B latents (C, H, W) of
        different sizes; each counts as much as the others."""
        mixed = not isinstance(x0, Tensor)
        if t is None:
            t = self.sample_t(len(x0), x0[0].device)
        if eps is None:
            eps = [torch.randn_like(x) for x in x0] if mixed else torch.randn_like(x0)
        if mixed:
            # As batches of one, but for the network, which is called once for all.
            parts = [(x[None], e[None], time) for x, e, time in zip(x0, eps, t.split(1))]
            xt = [self.add_noise(*part) for part in parts]
            raws = model([x[0] for x in xt], t, **cond)
            return torch.cat([self.error(raw[None], x, *part) for raw, x, part in zip(raws, xt, parts)])
        xt = self.add_noise(x0, eps, t)
        return self.error(model(xt, t, **cond), xt, x0, eps, t)

    def error(self, raw: Tensor, xt: Tensor, x0: Tensor, eps: Tensor, t: Tensor) -> Tensor:
        """(B,) the loss of the network's output at xt."""
        raw = raw.float()
        prediction = raw[:, :x0.shape[1]]
        error = (prediction - self.target(x0, eps, t)).square().flatten(1).mean(1)
        loss = self.weight(t) * error
        if self.learned_variance:
            loss = loss + self.variance_loss(raw, x0, xt, t)
        return loss

    def to_x0_eps(self, raw: Tensor, xt: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
        """The network's output at (xt, t) as the pair (x0, eps) for which alpha * x0 + sigma * eps = xt."""
        alpha, sigma = self.alpha_sigma(like(t, xt))
        raw = raw[:, :xt.shape[1]]                       # without the channels of a learned variance
        if self.prediction == "eps":
            return (xt - sigma * raw) / alpha, raw
        if self.prediction == "x0":
            return raw, (xt - alpha * raw) / sigma
        return alpha * xt - sigma * raw, sigma * xt + alpha * raw

    def weight(self, t: Tensor) -> Tensor:
        """(B,) what the squared error of the prediction is multiplied by to become the loss: 1, or what turns
        it into an error in the loss space, or Hang et al.'s min(SNR, gamma), which is meant for an error in
        x0, converted to this prediction: |eps error|^2 = SNR |x0 error|^2 and |v error|^2 = (SNR + 1) of it.

        With zero terminal SNR, the min-SNR weight for v and x0 vanishes at t = 1, where sampling starts, so
        do not combine the two."""
        if self.loss_space == self.prediction and self.min_snr is None:
            return torch.ones_like(t)
        alpha, sigma = self.alpha_sigma(t)
        if self.loss_space != self.prediction:
            # At a given xt, the errors of x0, eps and v are as sigma : alpha : 1. The divisor is at least
            # 0.05: an error in x0 says nothing at sigma = 0.
            sizes = {"x0": sigma, "eps": alpha, "v": torch.ones_like(t)}
            return (sizes[self.loss_space] / sizes[self.prediction].clamp(min=0.05)) ** 2
        snr = (alpha / sigma) ** 2
        if self.prediction == "eps":
            return (self.min_snr / snr).clamp(max=1.0)   # min(SNR, gamma) / SNR, which is 1 at SNR = 0
        clipped = snr.clamp(max=self.min_snr)
        if self.prediction == "x0":
            return clipped
        return clipped / (snr + 1)

    # ---- times: where to train, and where to sample

    def sample_t(self, n: int, device: torch.device | str = "cpu",
                 generator: torch.Generator | None = None) -> Tensor:
        """(n,) float32 training times, uniform over 1/1000 .. 1. `generator` is a CPU generator."""
        return (torch.randint(1, STEPS + 1, (n,), generator=generator) / STEPS).to(device)

    def training_times(self, n: int, tokens: Tensor | None = None) -> dict[str, Tensor]:
        """Training times, on the CPU, as keyword arguments of `loss`. tokens (n,) of each picture change
        nothing on this path."""
        return {"t": self.sample_t(n)}

    def times(self, steps: int, spacing: str = "trailing") -> Tensor:
        """(steps + 1,) float64 sampling times, multiples of 1/1000 that fall to 0. Spacings of Lin et al.
        table 2: "trailing" goes from 1 in even steps to 0; "linspace" from 1 evenly to 0.001, then to 0;
        "leading" takes multiples of floor(1000 / steps), plus one, so it starts short of 1, where xt should
        still contain some signal (Stable Diffusion's are one higher: see times.py). Raises ValueError unless
        1 <= steps <= 1000."""
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

    def t_at(self, lam: Tensor) -> Tensor:
        """The time at which log(alpha / sigma) = lam: the inverse of `alpha_sigma`."""
        grid = self.table[1]
        sigma2 = torch.sigmoid(-2 * lam.cpu().double())  # as alpha^2 + sigma^2 = 1
        left = (torch.searchsorted(grid, sigma2) - 1).clamp(0, STEPS - 1)
        below, above = grid[left], grid[left + 1]
        return ((left + (sigma2 - below) / (above - below)) / STEPS).clamp(0, 1).to(lam)

    # ---- the reverse step and its learned variance

    def posterior(self, x0: Tensor, xt: Tensor, s: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
        """Mean, of the shape of x0, and variance, of the shape of t, of q(xs | xt, x0) for s < t: eqs. 6
        and 7, for any two times."""
        alpha_s, sigma_s = self.alpha_sigma(s)
        alpha_t, sigma_t = self.alpha_sigma(t)
        ratio = alpha_t / alpha_s
        step_var = sigma_t**2 - ratio**2 * sigma_s**2    # variance of q(xt | xs): beta_t, for neighbours
        x0_weight = alpha_s * step_var / sigma_t**2
        xt_weight = ratio * sigma_s**2 / sigma_t**2
        mean = like(x0_weight, x0) * x0 + like(xt_weight, x0) * xt
        return mean, step_var * sigma_s**2 / sigma_t**2

    def fraction(self, raw: Tensor, xt: Tensor) -> Tensor:
        """The learned variance in a network's output, of the shape of xt: 0 for the smallest and 1 for the
        largest, on the log scale. Raises ValueError unless raw has twice the channels of xt."""
        channels = xt.shape[1]
        if raw.shape[1] != 2 * channels:
            raise ValueError(f"this network was not trained to predict the variance: it returns "
                             f"{raw.shape[1]} channels, not {2 * channels}")
        return (raw[:, channels:] + 1) / 2

    def variance_loss(self, raw: Tensor, x0: Tensor, xt: Tensor, t: Tensor) -> Tensor:
        """(B,) loss of the learned variance, Nichol & Dhariwal eq. 16: the term of the bound at t. Its weight
        is 1: their 0.001, times the 1000 steps from which t was drawn."""
        # detached, so that the bound trains only the variance, and the squared error only the mean
        x0_hat = self.to_x0_eps(raw, xt, t)[0].detach()
        return self.bound_term(x0, xt, t, x0_hat, self.fraction(raw, xt))

    # ---- the variational bound on -log p(x0)

    def bound_term(self, x0: Tensor, xt: Tensor, t: Tensor, x0_hat: Tensor, variance: str | Tensor = "small",
                   bins: float | None = None) -> Tensor:
        """(B,) the term of eq. 5 at t = n / 1000, in bits per dimension: KL(q(xs | xt, x0) || p(xs | xt))
        with s = t - 1 / 1000, and -log p(x0 | xt) for n = 1.

        x0_hat: the predicted x0. variance of p: "small" or "large" (section 3.2), or a tensor that places it
        between the two, as `fraction` returns. bins: width of the intervals to which x0 was rounded (eq. 13;
        2 / 255 for 8 bits in [-1, 1]); None uses the density of p instead."""
        n = (t * STEPS).round()
        s = (n - 1) / STEPS
        mean, small = self.posterior(x0, xt, s, t)
        mean_hat, _ = self.posterior(x0_hat, xt, s, t)

        # At n = 1 the posterior is a point with variance 0, so p takes the variance of n = 2.
        second = torch.full_like(n, 2) / STEPS
        small_of_second = self.posterior(x0, xt, second - 1 / STEPS, second)[1]
        low = like(torch.where(n == 1, small_of_second, small).log(), x0)
        alpha_s, sigma_s = self.alpha_sigma(s)
        alpha_t, sigma_t = self.alpha_sigma(t)
        high = like((sigma_t**2 - (alpha_t / alpha_s * sigma_s) ** 2).log(), x0)
        if isinstance(variance, Tensor):
            fraction = variance
        elif variance == "small":
            fraction = 0.0
        elif variance == "large":
            fraction = 1.0
        else:
            raise ValueError(f"variance {variance!r}: must be small, large or a tensor")
        logvar = fraction * high + (1 - fraction) * low

        # n > 1: the divergence of two Gaussians
        kl = 0.5 * (logvar - low - 1 + (like(small, x0) + (mean - mean_hat) ** 2) / logvar.exp())
        # n = 1: the likelihood of x0, as a density or, eq. 13, as the probability of its interval
        if bins is None:
            nll = 0.5 * (math.log(2 * math.pi) + logvar + (x0 - mean_hat) ** 2 / logvar.exp())
        else:
            std = (logvar / 2).exp()
            above = torch.special.ndtr((x0 - mean_hat + bins / 2) / std)
            below = torch.special.ndtr((x0 - mean_hat - bins / 2) / std)
            # the outermost intervals extend to infinity
            above = above.where(x0 < 1 - bins / 2, 1.0)
            below = below.where(x0 > bins / 2 - 1, 0.0)
            nll = -(above - below).clamp_min(1e-12).log()
        return torch.where(n == 1, nll.flatten(1).mean(1), kl.flatten(1).mean(1)) / math.log(2)

    @torch.no_grad()
    def bound(self, denoise, x0: Tensor, *, variance: str = "small", bins: float | None = None,
              generator: torch.Generator | None = None) -> Tensor:
        """(B, 1001) the terms L_0, L_1 .. L_999, L_T of the variational bound on -log p(x0), eq. 5, in bits
        per dimension, with one draw of xt each. Their sum is the bound.

        denoise(xt, t): as for samplers. variance: "small", "large", or "learned", for which denoise returns
        the fraction as its third value. bins: as in `bound_term`."""
        device = x0.device
        if generator is not None:
            device = generator.device      # noise is drawn where its generator is
        terms = []
        for n in range(1, STEPS + 1):
            t = torch.tensor(n / STEPS, dtype=torch.float64)
            eps = torch.randn(x0.shape, dtype=x0.dtype, device=device, generator=generator).to(x0.device)
            xt = self.add_noise(x0, eps, t)
            x0_hat, _, *fraction = denoise(xt, t)
            kind = fraction[0] if variance == "learned" else variance
            terms.append(self.bound_term(x0, xt, t, x0_hat, kind, bins))
        # L_T: the divergence of q(xt | x0) at t = 1 from the prior N(0, 1)
        alpha, sigma = self.alpha_sigma(torch.tensor(1.0, dtype=torch.float64))
        prior = 0.5 * ((alpha * x0) ** 2 + sigma**2 - 1 - (sigma**2).log())
        return torch.stack([*terms, prior.flatten(1).mean(1) / math.log(2)], 1)


class Circle(DDPM):
    """The diffusion path in continuous time, along a quarter of a circle (Salimans & Ho, section 4; Stable
    Audio: Evans et al. 2024, arXiv:2407.14358):

        xt = cos(pi t / 2) * x0 + sin(pi t / 2) * eps,   dxt/dt = pi / 2 * v

    prediction: "v" or "x0"; eps does not determine x0 at t = 1, where nothing of it is left.
    loss_space, min_snr: as in DDPM. Raises ValueError for an option out of range."""

    def __init__(self, prediction: str = "v", min_snr: float | None = None, loss_space: str | None = None):
        # Not that of DDPM, which makes the table of its 1000 steps.
        check_options(prediction, min_snr, zero_terminal_snr=True, loss_space=loss_space)
        self.prediction = prediction
        self.loss_space = loss_space or prediction
        self.min_snr = min_snr
        self.learned_variance = False

    def alpha_sigma(self, t: Tensor) -> tuple[Tensor, Tensor]:
        """alpha and sigma at t in [0, 1], each of t's shape. Both are sines: the cosine of a rounded pi / 2
        is not 0, and negative in float32."""
        return torch.sin(math.pi / 2 * (1 - t)), torch.sin(math.pi / 2 * t)

    def sample_t(self, n: int, device: torch.device | str = "cpu",
                 generator: torch.Generator | None = None) -> Tensor:
        """(n,) float32 training times, uniform over (0, 1]. `generator` is a CPU generator."""
        return (1 - torch.rand(n, generator=generator)).to(device)

    def times(self, steps: int) -> Tensor:
        """(steps + 1,) float64 sampling times, evenly from 1 to 0. Raises ValueError for steps < 1."""
        if steps < 1:
            raise ValueError(f"steps {steps}: at least 1")
        return torch.linspace(1, 0, steps + 1, dtype=torch.float64)

    def t_at(self, lam: Tensor) -> Tensor:
        """The time at which log(alpha / sigma) = lam: the inverse of `alpha_sigma`."""
        return torch.atan((-lam).exp()) * 2 / math.pi

    def bound_term(self, *args, **options) -> Tensor:
        raise NotImplementedError("the variational bound is that of DDPM's 1000 steps; this path has none")


def betas(schedule: str) -> Tensor:
    """(1000,) float64: beta_1 .. beta_1000, the variance of the noise that each step adds."""
    if schedule == "linear":                             # Ho et al. section 4
        return torch.linspace(1e-4, 0.02, STEPS, dtype=torch.float64)
    if schedule == "scaled_linear":                      # Stable Diffusion: linear in sqrt(beta)
        return torch.linspace(0.00085**0.5, 0.012**0.5, STEPS, dtype=torch.float64) ** 2
    if schedule == "cosine":                             # Nichol & Dhariwal 2021 (arXiv:2102.09672) eq. 17
        n = torch.arange(STEPS + 1, dtype=torch.float64) / STEPS
        f = torch.cos((n + 0.008) / 1.008 * math.pi / 2) ** 2
        return (1 - f[1:] / f[:-1]).clamp(max=0.999)
    raise ValueError(f"schedule {schedule!r}: must be linear, scaled_linear or cosine")


def alpha2_sigma2(schedule: str, zero_terminal_snr: bool) -> Tensor:
    """(2, 1001) float64: alpha^2 and sigma^2 at n = 0..1000. Both are kept, because in float32 the smallest
    sigma^2 would lose its digits in 1 - alpha^2."""
    alpha2 = torch.cat([torch.ones(1, dtype=torch.float64), torch.cumprod(1 - betas(schedule), 0)])
    if zero_terminal_snr:
        # Lin et al. algorithm 1: shift and scale alpha so that it ends at 0 and starts where it did
        alpha = alpha2.sqrt()
        rescaled = (alpha[1:] - alpha[-1]) * alpha[1] / (alpha[1] - alpha[-1])
        alpha2 = torch.cat([alpha2[:1], rescaled**2])
    return torch.stack([alpha2, 1 - alpha2])


def like(a: Tensor, x: Tensor) -> Tensor:
    """Append dimensions of size 1 to a, () or (B,), until it broadcasts over x (B, ...)."""
    if a.ndim == 0:
        return a                   # broadcasts as it is, and a float64 scalar leaves a float32 x in float32
    return a.reshape(a.shape + (1,) * (x.ndim - a.ndim))


def check_options(prediction: str, min_snr: float | None, zero_terminal_snr: bool,
                  loss_space: str | None = None) -> None:
    """Raise ValueError for options of DDPM that do not define a path and its loss."""
    for name, value in (("prediction", prediction), ("loss_space", loss_space or prediction)):
        if value not in ("eps", "v", "x0"):
            raise ValueError(f"{name} {value!r}: the diffusion path has eps, v and x0")
    if loss_space and loss_space != prediction and min_snr is not None:
        raise ValueError(f"loss_space {loss_space} with min_snr {min_snr}: each is a weight of the loss; "
                         "give one of them")
    if prediction == "eps" and zero_terminal_snr:
        raise ValueError("eps prediction with zero terminal SNR: where alpha = 0, eps does not determine x0; "
                         "use v or x0")
    if min_snr is not None and not min_snr > 0:
        raise ValueError(f"min_snr {min_snr}: must be positive")


def demo() -> None:
    """Learn two interleaved moons with a small network and draw from it by ancestral sampling."""
    from rectified_flow import show_toy, train_toy

    torch.manual_seed(0)
    path = DDPM()
    model = train_toy(path)

    x = torch.randn(4000, 2)
    times = path.times(200).float()
    frames = []
    with torch.no_grad():
        for i, (t, s) in enumerate(zip(times, times[1:])):
            if i % 50 == 0:
                frames.append(x)
            x0, _ = path.to_x0_eps(model(x, t.expand(len(x))), x, t)
            mean, var = path.posterior(x0, x, s, t)
            x = mean + var.sqrt() * torch.randn_like(x)
    show_toy(frames, x, "ddpm.png")


if __name__ == "__main__":
    demo()
