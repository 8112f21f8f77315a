"""The straight path: data turns into noise along a line, and a network learns the velocity along it.

    python rectified_flow.py             # learns a 2-D density in seconds and writes rectified_flow.png
    python train.py --arch dit --objective rf

    xt = (1 - t) * x0 + t * eps,   velocity = dxt/dt = eps - x0,   loss = |prediction - velocity|^2

Liu et al. 2022 (arXiv:2209.03003); Lipman et al. 2022 (arXiv:2210.02747); Esser et al. 2024
(arXiv:2403.03206, Stable Diffusion 3) for the densities of t and the shift. t = 0 is data, t = 1 is noise.
`MeanFlow` learns the mean velocity between two times instead, for samples in 1, 2 or 4 steps. Only these
classes depend on what the network predicts: samplers use just the pair (x0, eps).
"""

from __future__ import annotations

import math

import torch
from torch import Tensor


class RectifiedFlow:
    """The path and its loss.

    prediction: what the network returns, "velocity", or "v", "x0" or "eps" as on any path.
    loss_space: the quantity whose squared error is the loss, by the same four names. None: the predicted one.
    density: the density of the training times, never a weight of the loss; see `density_quantile`.
    mean, std: parameters of the density "logit_normal".
    mode_scale: parameter of the density "mode", between -1 and 2 / (pi - 2).
    shift: applied once, to training times and to sampling times alike; see `shift_time`.
    shift_tokens: n, where the shift follows each picture's number of tokens, m; see `shift_of`.
    Raises ValueError if any of them is out of range."""

    def __init__(self, prediction: str = "velocity", density: str = "logit_normal", mean: float = 0.0,
                 std: float = 1.0, mode_scale: float = 1.29, shift: float = 1.0,
                 loss_space: str | None = None, shift_tokens: int | None = None):
        check_options(prediction, density, mean, std, mode_scale, shift, loss_space)
        if shift_tokens is not None and (shift_tokens < 1 or shift != 1):
            raise ValueError(f"shift_tokens {shift_tokens}: must be at least 1, and without a shift of its "
                             f"own ({shift:g}); give one of them")
        self.shift_tokens = shift_tokens
        self.prediction = prediction
        self.loss_space = loss_space or prediction
        self.density = density
        self.mean = mean
        self.std = std
        self.mode_scale = mode_scale
        self.shift = shift
        # Where alpha = 0, eps does not determine x0, so with eps prediction the path starts a little later.
        self.t_max = 0.98 if prediction == "eps" else 1.0

    def alpha_sigma(self, t: Tensor) -> tuple[Tensor, Tensor]:
        """alpha and sigma at t, each of t's shape: xt = alpha * x0 + sigma * eps."""
        return 1 - t, t

    def target(self, x0: Tensor, eps: Tensor, t: Tensor) -> Tensor:
        """What the network should return at xt, of the shape of x0; t () or (B,)."""
        if self.prediction == "velocity":
            return eps - x0
        if self.prediction == "eps":
            return eps
        if self.prediction == "x0":
            return x0
        alpha, sigma = self.alpha_sigma(like(t, x0))
        return alpha * eps - sigma * x0                  # v: Salimans & Ho 2022 (arXiv:2202.00512)

    def loss(self, model, x0: Tensor, *, t: Tensor | None = None, eps: Tensor | None = None,
             **cond) -> Tensor:
        """(B,) mean squared error at random times. t (B,) and eps may be fixed, as validation does. x0 and
        eps may be lists of B latents (C, H, W) of different sizes; each counts as much as the others."""
        mixed = not isinstance(x0, Tensor)
        if t is None:
            t = self.sample_t(len(x0), x0[0].device)
        if eps is None:
            eps = [torch.randn_like(x) for x in x0] if mixed else torch.randn_like(x0)
        if mixed:
            # As batches of one, but for the network, which is called once for all.
            parts = [(x[None], e[None], time) for x, e, time in zip(x0, eps, t.split(1))]
            raws = model([self.add_noise(*part)[0] for part in parts], t, **cond)
            return torch.cat([self.error(raw[None], *part) for raw, part in zip(raws, parts)])
        return self.error(model(self.add_noise(x0, eps, t), t, **cond), x0, eps, t)

    def add_noise(self, x0: Tensor, eps: Tensor, t: Tensor) -> Tensor:
        """xt, of the shape of x0; t (B,)."""
        alpha, sigma = self.alpha_sigma(like(t, x0))
        return alpha * x0 + sigma * eps

    def error(self, raw: Tensor, x0: Tensor, eps: Tensor, t: Tensor) -> Tensor:
        """(B,) the loss of the network's output at xt."""
        raw = raw[:, :x0.shape[1]]
        error = (raw.float() - self.target(x0, eps, t)).square().flatten(1).mean(1)
        return error if self.loss_space == self.prediction else self.weight(t) * error

    def weight(self, t: Tensor) -> Tensor:
        """(B,) what the squared error of the prediction is multiplied by to become that of the loss space.

        At a given xt, x0 determines eps and with them all the others, so their errors are proportional: those
        of x0, eps, velocity and v are as sigma : alpha : 1 : alpha^2 + sigma^2. The divisor is at least 0.05,
        as in Li & He 2025 (arXiv:2511.13720): at sigma = 0, an error in x0 would have an infinite weight."""
        alpha, sigma = self.alpha_sigma(t)
        sizes = {"x0": sigma, "eps": alpha, "velocity": torch.ones_like(t), "v": alpha**2 + sigma**2}
        return (sizes[self.loss_space] / sizes[self.prediction].clamp(min=0.05)) ** 2

    def to_x0_eps(self, raw: Tensor, xt: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
        """The network's output at (xt, t) as the pair (x0, eps) for which alpha * x0 + sigma * eps = xt."""
        alpha, sigma = self.alpha_sigma(like(t, xt))
        raw = raw[:, :xt.shape[1]]                   # a published SiT returns further channels, never trained
        if self.prediction == "velocity":
            return xt - sigma * raw, xt + alpha * raw
        if self.prediction == "eps":
            return (xt - sigma * raw) / alpha, raw
        if self.prediction == "x0":
            return raw, (xt - alpha * raw) / sigma
        # (xt, v) is (x0, eps) rotated and, on this path, scaled by sqrt(alpha^2 + sigma^2), which is not 1
        norm2 = alpha**2 + sigma**2
        return (alpha * xt - sigma * raw) / norm2, (sigma * xt + alpha * raw) / norm2

    # ---- times: where to train, and where to sample

    def shift_of(self, tokens: Tensor | float | None = None) -> Tensor | float:
        """The shift of pictures of so many tokens: sqrt(m / n) (Esser et al. below eq. 23), or the same for
        all where it does not follow them. Raises ValueError where it does and they are not given."""
        if self.shift_tokens is None:
            return self.shift
        if tokens is None:
            raise ValueError(f"shift_tokens {self.shift_tokens}: the shift follows each picture's tokens; "
                             "give their number, or a path with a `shift` of its own")
        return (tokens / self.shift_tokens) ** 0.5

    def sample_t(self, n: int, device: torch.device | str = "cpu", generator: torch.Generator | None = None,
                 tokens: Tensor | None = None) -> Tensor:
        """(n,) float32 training times from the density, shifted. `generator` is a CPU generator. tokens (n,):
        of each picture, where the shift follows them."""
        # on the CPU, as not every device has float64; inside (0, 1), as both ends map to infinity
        u = torch.rand(n, dtype=torch.float64, generator=generator).clamp(1e-6, 1 - 1e-6)
        t = shift_time(density_quantile(self.density, u, self.mean, self.std, self.mode_scale),
                       self.shift_of(tokens))
        # Kept where to_x0_eps works: x0 prediction needs sigma > 0, and eps prediction t <= t_max, where
        # sampling begins. 2 % of uniform times become t_max, more if they are shifted.
        return t.clamp(1e-5, self.t_max).to(torch.float32).to(device)

    def training_times(self, n: int, tokens: Tensor | None = None) -> dict[str, Tensor]:
        """Training times, on the CPU, as keyword arguments of `loss`. tokens: as in sample_t."""
        return {"t": self.sample_t(n, tokens=tokens)}

    def times(self, steps: int) -> Tensor:
        """(steps + 1,) float64 sampling times from t_max to 0, evenly spaced and then shifted. t_max is 1,
        or 0.98 for eps prediction. Raises ValueError for steps < 1, and as `shift_of` does."""
        if steps < 1:
            raise ValueError(f"steps {steps}: at least 1")
        # the time that the shift maps to t_max, so that the shifted times start at t_max
        shift = self.shift_of()
        start = shift_time(torch.tensor(self.t_max, dtype=torch.float64), 1 / shift)
        times = shift_time(torch.linspace(start, 0, steps + 1, dtype=torch.float64), shift)
        times[0] = self.t_max              # exactly: rounding could exceed 1, and alpha would be negative
        return times

    def t_at(self, lam: Tensor) -> Tensor:
        """The time at which log(alpha / sigma) = lam: the inverse of `alpha_sigma`."""
        return torch.sigmoid(-lam)


class MeanFlow(RectifiedFlow):
    """The same path, with a network of two times, u(xt, s, t), s <= t, that learns the mean velocity on the
    way from t to s: x_s = xt - (t - s) * u. One evaluation then takes any step, also from noise to data.

    (t - s) * u is the integral of the velocity v over [s, t]. Its derivative by t along the flow is the
    MeanFlow identity, in which du/dt is total: that of u along xt, moving by v, and t, while s is held.

        v(xt, t) = u(xt, s, t) + (t - s) * du/dt

    Geng et al. 2025 (arXiv:2505.13447). As in "Improved Mean Flows" (arXiv:2512.02012), the right-hand side
    is regressed on eps - x0 like any velocity, and the v in du/dt is the network's own, u(xt, t, t), which is
    less noisy than eps - x0. At s = t this is flow matching, and u(xt, t, t) is the velocity.

    jumps: the share of training times with s < t.
    guidance: the scale of the guidance that the velocity is learned with, so that one evaluation draws a
    guided sample; `loss` then needs `uncond`.
    adaptive: an error e has the weight 1 / (e + 0.001)^adaptive in the gradient.
    density, mean, std, mode_scale, shift: as in RectifiedFlow, of both times.
    Raises ValueError if any of them is out of range."""

    def __init__(self, prediction: str = "velocity", density: str = "logit_normal", mean: float = 0.0,
                 std: float = 1.0, mode_scale: float = 1.29, shift: float = 1.0,
                 loss_space: str | None = None, jumps: float = 0.5, guidance: float = 1.0,
                 adaptive: float = 1.0):
        super().__init__(prediction, density, mean, std, mode_scale, shift, loss_space)
        for name, value in (("prediction", prediction), ("loss_space", self.loss_space)):
            if value != "velocity":
                raise ValueError(f"{name} {value}: a mean is taken of velocities only; leave it out")
        if not 0 <= jumps <= 1:
            raise ValueError(f"jumps {jumps}: must be between 0 and 1")
        if not math.isfinite(guidance):
            raise ValueError(f"guidance {guidance}: must be finite")
        self.jumps = jumps
        self.guidance = guidance
        self.adaptive = adaptive

    def training_times(self, n: int) -> dict[str, Tensor]:
        """Training times, on the CPU, as keyword arguments of `loss`: two from the density. The later one is
        t; s is the earlier one or, in a share of 1 - jumps, t as well."""
        first = self.sample_t(n)
        second = self.sample_t(n)
        t = torch.maximum(first, second)
        jump = torch.rand(n) < self.jumps
        return {"t": t, "s": torch.where(jump, torch.minimum(first, second), t)}

    def loss(self, model, x0: Tensor, *, t: Tensor | None = None, s: Tensor | None = None,
             eps: Tensor | None = None, uncond: dict | None = None, dropped: Tensor | None = None,
             derive: bool = False, **cond) -> Tensor:
        """(B,) mean squared error of the velocity. t and s (B,) and eps may be fixed, as validation does; t
        without s means s = 0. uncond: the null conditions, of the batch's length; without them nothing is
        guided. dropped (B,), bool: where `cond` is the null condition too, so that there is no guidance.
        derive: take the derivative even if s = t everywhere, as other parts of the batch do: processes that
        share the network's weights have to call it equally often."""
        if t is None:
            t, s = (part.to(x0.device) for part in self.training_times(len(x0)).values())
        if s is None:
            s = torch.zeros_like(t)
        if eps is None:
            eps = torch.randn_like(x0)
        xt = (1 - like(t, x0)) * x0 + like(t, x0) * eps
        # ---- constants of the gradient: the velocity to learn, and du/dt at the present weights
        with torch.no_grad():
            target = self.guided_velocity(model, xt, t, eps - x0, uncond, dropped)
            rate = self.total_derivative(model, xt, t, s, cond, derive)
        # ---- the identity's right-hand side, of which only u itself has a gradient
        u = model(xt, t, s=s, **cond)[:, :x0.shape[1]].float()
        error = (u + like(t - s, x0) * rate - target).square().flatten(1).mean(1)
        # The value is the error itself, which can be compared; only its gradient is weighted.
        weight = (error.detach() + 1e-3) ** -self.adaptive
        return error.detach() + weight * (error - error.detach())

    def guided_velocity(self, model, xt: Tensor, t: Tensor, velocity: Tensor, uncond: dict | None,
                        dropped: Tensor | None) -> Tensor:
        """The velocity of the guided flow at xt: v(null) + guidance * (velocity - v(null))."""
        if uncond is None or self.guidance == 1:
            return velocity
        null = model(xt, t, s=t, **uncond)[:, :xt.shape[1]].float()
        guided = null + self.guidance * (velocity - null)
        return guided if dropped is None else torch.where(like(dropped, xt), velocity, guided)

    @staticmethod
    def total_derivative(model, xt: Tensor, t: Tensor, s: Tensor, cond: dict,
                         derive: bool = False) -> Tensor:
        """du/dt along the flow, (B, ...), of the shape of xt; where s = t, nothing needs it. derive: see
        `loss`."""
        rate = torch.zeros_like(xt)
        rows = (s < t).nonzero().flatten()
        if len(rows) == 0 and derive:
            rows = rows.new_zeros(1)                   # one that does not need it
        if len(rows) == 0:
            return rate
        xt, t, s = xt[rows], t[rows], s[rows]
        cond = {name: part[rows] for name, part in cond.items()}
        velocity = model(xt, t, s=t, **cond)[:, :xt.shape[1]].to(xt.dtype)
        # In forward mode, one pass, about twice as long as one without derivatives. s is held.
        _, tangent = torch.func.jvp(lambda xt, t: model(xt, t, s=s, **cond), (xt, t),
                                    (velocity, torch.ones_like(t)))
        rate[rows] = tangent[:, :xt.shape[1]].to(rate.dtype)
        return rate


def shift_time(t: Tensor, shift: float | Tensor) -> Tensor:
    """Esser et al. eq. 23: move times toward the noise, monotonically from 0 to 1; shift 1 is the identity.

    More pixels need more noise to hide the same picture. With shift = sqrt(m / n) an image of m pixels (or
    tokens) is as uncertain at the shifted time as one of n pixels at t."""
    return shift * t / (1 + (shift - 1) * t)


def density_quantile(density: str, u: Tensor, mean: float, std: float, mode_scale: float) -> Tensor:
    """Map u, uniform on (0, 1), to times of the named density (Esser et al. section 3.1), elementwise, by its
    quantile function (for "mode", at 1 - u, because the paper's map falls from 1 to 0). Raises ValueError for
    an unknown density."""
    if density == "uniform":
        return u
    if density == "logit_normal":                        # eq. 19: logit(t) ~ N(mean, std^2)
        return torch.sigmoid(mean + std * torch.special.ndtri(u))
    if density == "mode":                                # eq. 20
        return 1 - u - mode_scale * (torch.cos(math.pi / 2 * u) ** 2 - 1 + u)
    if density == "cosmap":                              # eq. 21: the log-SNR of the cosine schedule
        return 1 - 1 / (torch.tan(math.pi / 2 * u) + 1)
    raise ValueError(f"density {density!r}: must be uniform, logit_normal, mode or cosmap")


def like(a: Tensor, x: Tensor) -> Tensor:
    """Append dimensions of size 1 to a, () or (B,), until it broadcasts over x (B, ...)."""
    if a.ndim == 0:
        return a                   # broadcasts as it is, and a float64 scalar leaves a float32 x in float32
    return a.reshape(a.shape + (1,) * (x.ndim - a.ndim))


def check_options(prediction: str, density: str, mean: float, std: float, mode_scale: float,
                  shift: float, loss_space: str | None = None) -> None:
    """Raise ValueError for options of RectifiedFlow that do not define a path."""
    for name, value in (("prediction", prediction), ("loss_space", loss_space or prediction)):
        if value not in ("velocity", "v", "x0", "eps"):
            raise ValueError(f"{name} {value!r}: the straight path has velocity, v, x0 and eps")
    if not 0 < shift < math.inf:
        raise ValueError(f"shift {shift}: must be positive and finite")
    if not 0 < std < math.inf:
        raise ValueError(f"std {std}: must be positive and finite")
    limit = 2 / (math.pi - 2)                            # between -1 and here the map of "mode" is monotone
    if not -1 < mode_scale < limit:
        raise ValueError(f"mode_scale {mode_scale}: must be between -1 and {limit:.4g}")
    density_quantile(density, torch.full((1,), 0.5), mean, std, mode_scale)     # raises for an unknown name


# ---- demonstration; ddpm.py trains the same network on the same data along its own path

def moons(n: int) -> Tensor:
    """(n, 2) points on two interleaved half circles, with a little noise."""
    side = torch.randint(2, (n,)) * 2 - 1
    angle = math.pi * torch.rand(n)
    points = torch.stack([angle.cos() * side + 0.5 * side, angle.sin() * side - 0.25 * side], 1)
    return 1.2 * points + 0.05 * torch.randn(n, 2)


class ToyNet(torch.nn.Module):
    """A network for points in the plane: xt (B, 2), t (B,) -> raw (B, 2)."""

    def __init__(self):
        super().__init__()
        self.layers = torch.nn.Sequential(
            torch.nn.Linear(2 + 16, 128), torch.nn.SiLU(),
            torch.nn.Linear(128, 128), torch.nn.SiLU(),
            torch.nn.Linear(128, 128), torch.nn.SiLU(),
            torch.nn.Linear(128, 2))

    def forward(self, xt: Tensor, t: Tensor) -> Tensor:
        angles = t[:, None] * math.pi * 2.0 ** torch.arange(-2, 6)              # (B, 8)
        return self.layers(torch.cat([xt, angles.cos(), angles.sin()], 1))


def train_toy(path) -> ToyNet:
    """Train on fresh points for 2000 steps, a few seconds on one core."""
    model = ToyNet()
    steps = 2000
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
    return model


def show_toy(frames: list[Tensor], samples: Tensor, file: str) -> None:
    """Print how far the samples are from the data, and draw frames, samples and data side by side."""
    import numpy as np
    from PIL import Image

    # fresh data shows the distance of perfect samples, noise that of an untrained model
    data = moons(4000)
    clouds = {"samples": samples, "fresh data": moons(4000), "noise": torch.randn(4000, 2)}
    distance = {name: torch.cdist(points, data).amin(1).mean().item() for name, points in clouds.items()}
    print("mean distance to the nearest of 4000 data points: "
          + ", ".join(f"{name} {value:.3f}" for name, value in distance.items()))
    panels = []
    for points in (*frames, samples, data):
        down, right = -points[:, 1].numpy(), points[:, 0].numpy()
        count = np.histogram2d(down, right, 120, [[-3, 3], [-3, 3]])[0]
        panels.append(255 - np.clip(80 * count, 0, 255))
    Image.fromarray(np.hstack(panels).astype(np.uint8)).resize((1440, 240)).save(file)
    print(f"{file}: noise ... samples | data")


def demo() -> None:
    """Learn two interleaved moons with a small network, and follow its velocity in 20 Euler steps."""
    torch.manual_seed(0)
    path = RectifiedFlow()
    model = train_toy(path)

    x = torch.randn(4000, 2)
    times = path.times(20).float()
    frames = []
    with torch.no_grad():
        for i, (t, s) in enumerate(zip(times, times[1:])):
            if i % 5 == 0:
                frames.append(x)
            x = x + (s - t) * model(x, t.expand(len(x)))
    show_toy(frames, x, "rectified_flow.png")


if __name__ == "__main__":
    demo()
