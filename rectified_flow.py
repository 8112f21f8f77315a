"""The straight path: data turns into noise along a line, and a network learns the velocity along it.

    python rectified_flow.py             # learns a 2-D density in seconds and writes rectified_flow.png
    python train.py --arch dit --objective rf

    xt = (1 - t) * x0 + t * eps,   velocity = dx/dt = eps - x0,   loss = |prediction - velocity|^2

Liu et al. 2022 (arXiv:2209.03003); Lipman et al. 2022 (arXiv:2210.02747); Esser et al. 2024
(arXiv:2403.03206, Stable Diffusion 3) for the densities of t and the shift. t = 0 is data, t = 1 is noise.
The density only says where t is drawn; it is never a weight of the loss. What the network predicts is known
here and nowhere else.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor


def shift_time(t: Tensor, shift: float) -> Tensor:
    """Esser et al. eq. 23: move times toward the noise; `shift` = sqrt(m / n) keeps, at m tokens or pixels,
    the uncertainty that t left at n. Monotone from 0 to 1; shift 1 is the identity."""
    return shift * t / (1 + (shift - 1) * t)


def draw(density: str, u: Tensor, mean: float, std: float, mode_scale: float) -> Tensor:
    """Map u, uniform on (0, 1), to a time of the named density (Esser et al. section 3.1),
    by its quantile function."""
    if density == "uniform":
        return u
    if density == "logit_normal":                  # eq. 19: logit(t) ~ N(mean, std^2)
        return torch.sigmoid(mean + std * torch.special.ndtri(u))
    if density == "mode":                          # eq. 20
        return 1 - u - mode_scale * (torch.cos(math.pi / 2 * u) ** 2 - 1 + u)
    if density == "cosmap":                        # eq. 21: the log-SNR of the cosine schedule
        return 1 - 1 / (torch.tan(math.pi / 2 * u) + 1)
    raise ValueError(f"density {density!r}: must be uniform, logit_normal, mode or cosmap")


def like(a: Tensor, x: Tensor) -> Tensor:
    """Give a, () or (B,), trailing ones until it broadcasts over x (B, ...)."""
    return a.reshape(a.shape + (1,) * (x.ndim - a.ndim)) if a.ndim else a


class RectifiedFlow:
    """The path and its loss. `prediction` is what the network returns: "velocity", or "v", "x0",
    "eps" as on any path.

    mean and std belong to logit_normal, mode_scale to mode (-1 .. 2 / (pi - 2)); shift is applied once, to
    training times and to sampling times alike. eps prediction says nothing of x0 where alpha = 0, so its path
    ends at alpha = 0.02."""

    def __init__(self, prediction: str = "velocity", density: str = "logit_normal", mean: float = 0.0,
                 std: float = 1.0, mode_scale: float = 1.29, shift: float = 1.0):
        if prediction not in ("velocity", "v", "x0", "eps"):
            raise ValueError(f"prediction {prediction!r}: the straight path knows velocity, v, x0 and eps")
        for name, value, low, high in (("shift", shift, 0, math.inf), ("std", std, 0, math.inf),
                                       ("mode_scale", mode_scale, -1, 2 / (math.pi - 2))):
            if not low < value < high:
                raise ValueError(f"{name} {value}: must be between {low} and {high:.4g}")
        draw(density, torch.full((1,), 0.5), mean, std, mode_scale)
        self.prediction, self.density, self.mean, self.std, self.mode_scale = (
            prediction, density, mean, std, mode_scale)
        self.shift = shift
        self.t_max = 0.98 if prediction == "eps" else 1.0

    def alpha_sigma(self, t: Tensor) -> tuple[Tensor, Tensor]:
        return 1 - t, t

    def t_at(self, lam: Tensor) -> Tensor:
        """The time at which log(alpha / sigma) = lam: the inverse of `alpha_sigma`."""
        return torch.sigmoid(-lam)

    def sample_t(self, n: int, device: torch.device | str = "cpu",
                 generator: torch.Generator | None = None) -> Tensor:
        """(n,) training times from the density, shifted."""
        # n numbers, drawn on the CPU in float64, which not every device has
        u = torch.rand(n, dtype=torch.float64, generator=generator).clamp(1e-6, 1 - 1e-6)
        t = draw(self.density, u, self.mean, self.std, self.mode_scale)
        # t = 0 would ask an x0 prediction for noise that is not there
        return shift_time(t, self.shift).clamp(1e-5, self.t_max).to(torch.float32).to(device)

    def times(self, steps: int) -> Tensor:
        """(steps + 1,) float64 from t_max (1, unless eps is predicted) to 0: evenly spaced, then shifted."""
        if steps < 1:
            raise ValueError(f"steps {steps}: at least 1")
        start = shift_time(torch.tensor(self.t_max, dtype=torch.float64), 1 / self.shift)   # unshifted t_max
        times = shift_time(torch.linspace(start, 0, steps + 1, dtype=torch.float64), self.shift)
        times[0] = self.t_max                        # whatever the rounding: beyond 1, alpha is negative
        return times

    def target(self, x0: Tensor, eps: Tensor, t: Tensor) -> Tensor:
        alpha, sigma = (like(a, x0) for a in self.alpha_sigma(t))
        return {"velocity": eps - x0, "eps": eps, "x0": x0, "v": alpha * eps - sigma * x0}[self.prediction]

    def to_x0_eps(self, raw: Tensor, xt: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
        """The network's answer at (xt, t) as the pair (x0, eps) with alpha * x0 + sigma * eps = xt."""
        alpha, sigma = (like(a, xt) for a in self.alpha_sigma(t))
        raw = raw[:, :xt.shape[1]]                    # published SiT has more channels, never trained
        if self.prediction == "velocity":
            return xt - sigma * raw, xt + alpha * raw
        if self.prediction == "eps":
            return (xt - sigma * raw) / alpha, raw
        if self.prediction == "x0":
            return raw, (xt - alpha * raw) / sigma
        norm2 = alpha**2 + sigma**2  # v's rotation is one of length sqrt(alpha^2 + sigma^2) here, not 1
        return (alpha * xt - sigma * raw) / norm2, (sigma * xt + alpha * raw) / norm2

    def loss(self, model, x0: Tensor, *, t: Tensor | None = None, eps: Tensor | None = None,
             **cond) -> Tensor:
        """(B,) mean squared error at random times; t (B,) and eps may be fixed, as validation does."""
        t = self.sample_t(len(x0), x0.device) if t is None else t
        eps = torch.randn_like(x0) if eps is None else eps
        alpha, sigma = (like(a, x0) for a in self.alpha_sigma(t))
        raw = model(alpha * x0 + sigma * eps, t, **cond)[:, :x0.shape[1]]
        return (raw.float() - self.target(x0, eps, t)).square().flatten(1).mean(1)


def demo() -> None:
    """Learn two interleaved moons with a small network, follow its velocity from noise in 20 Euler steps,
    show the way."""
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

    path, model, steps = RectifiedFlow(), Net(), 2000
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
    x, frames, times = torch.randn(4000, 2), [], path.times(20).float()
    with torch.no_grad():
        for i, (t, s) in enumerate(zip(times, times[1:])):
            if i % 5 == 0:
                frames.append(x)
            x = x + (s - t) * model(x, t.expand(len(x)))
    data = moons(4000)
    clouds = {"samples": x, "fresh data": moons(4000), "noise": torch.randn(4000, 2)}
    distance = {name: torch.cdist(points, data).amin(1).mean().item() for name, points in clouds.items()}
    print("mean distance to the nearest of 4000 data points: "
          + ", ".join(f"{name} {value:.3f}" for name, value in distance.items()))
    panels = [np.histogram2d(-p[:, 1].numpy(), p[:, 0].numpy(), 120, [[-3, 3]] * 2)[0]
              for p in (*frames, x, data)]
    picture = Image.fromarray(np.hstack([255 - np.clip(p * 80, 0, 255) for p in panels]).astype(np.uint8))
    picture.resize((1440, 240)).save("rectified_flow.png")
    print("rectified_flow.png: noise ... samples | data")


if __name__ == "__main__":
    demo()
