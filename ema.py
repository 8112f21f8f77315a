"""Averages of the weights over training, whose length can still be chosen when the training is over.

    python ema.py                        # averages a toy trajectory, and rebuilds another length from two profiles
    python sample.py runs/shapes-dit-rf --ema 0.07

Karras et al. 2024 (arXiv:2312.02696), section 3 and appendix C; equations cited without a name are theirs. An
average of the profile gamma weights step tau of T by (tau / T)^gamma: it grows with the training, so one number
fits runs of any length, and what was learned early is forgotten. Its width, relative to T, is sigma_rel. An
average with any other width is, to a good approximation, a linear combination of two that were kept.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

SIGMAS = (0.05, 0.10)      # widths of the two profiles that are kept


def gamma_of(sigma_rel: float) -> float:
    """The exponent of the profile with this relative width, in (0, 0.28]: the root of eq. 123,
    sigma_rel^2 = (gamma + 1) / ((gamma + 2)^2 (gamma + 3)). Raises ValueError outside that range."""
    if not 0 < sigma_rel <= 0.28:
        raise ValueError(f"width {sigma_rel}: must be above 0 and at most 0.28")
    low, high = 0.0, 2 / sigma_rel          # the width falls as gamma grows, and is below 1 / gamma
    for _ in range(100):
        middle = (low + high) / 2
        if (middle + 1) / ((middle + 2) ** 2 * (middle + 3)) > sigma_rel**2:
            low = middle
        else:
            high = middle
    return (low + high) / 2


def decay(step: int, gamma: float) -> float:
    """What remains of the average when step `step` (from 1) is added, eq. 2: the first one replaces it."""
    return (1 - 1 / step) ** (gamma + 1)


def inner_product(a: tuple[float, float], b: tuple[float, float]) -> float:
    """The integral of the product of two profiles, eq. 124. a, b: the step at which each was taken, and its
    gamma: p(tau) = (gamma + 1) tau^gamma / step^(gamma + 1) for tau up to that step."""
    (step_a, gamma_a), (step_b, gamma_b) = a, b
    first = min(step_a, step_b)
    # by logarithms, because powers of a step overflow
    power = gamma_a * math.log(first / step_a) + gamma_b * math.log(first / step_b)
    scale = first / (step_a * step_b)
    return (gamma_a + 1) * (gamma_b + 1) / (gamma_a + gamma_b + 1) * scale * math.exp(power)


def coefficients(kept: list[tuple[float, float]], wanted: tuple[float, float]) -> list[float]:
    """How much of each kept average makes up the wanted one: the least squares of the profiles' difference.
    kept, wanted: (step, gamma)."""
    products = torch.tensor([[inner_product(a, b) for b in kept] for a in kept], dtype=torch.float64)
    with_wanted = torch.tensor([inner_product(a, wanted) for a in kept], dtype=torch.float64)
    return torch.linalg.lstsq(products, with_wanted[:, None], driver="gelsd").solution[:, 0].tolist()


def combine(states: list[dict[str, Tensor]], weights: list[float]) -> dict[str, Tensor]:
    """The weighted sum of these states, tensor by tensor, in float32. Other types than floating point, such as
    counters, are taken from the first."""
    total = {}
    for name, first in states[0].items():
        if not first.is_floating_point():
            total[name] = first
            continue
        total[name] = sum(weight * state[name].float() for state, weight in zip(states, weights))
    return total


def demo() -> None:
    """Average a wandering value with two profiles; compare a third, kept directly, with the one that is rebuilt
    from them."""
    torch.manual_seed(0)
    steps = 2000
    values = torch.randn(steps, dtype=torch.float64).cumsum(0)
    names = {sigma: gamma_of(sigma) for sigma in (*SIGMAS, 0.07)}
    averages = dict.fromkeys(names, 0.0)
    for step, value in enumerate(values.tolist(), 1):
        for sigma, gamma in names.items():
            keep = decay(step, gamma)
            averages[sigma] = keep * averages[sigma] + (1 - keep) * value
    kept = [(steps, names[sigma]) for sigma in SIGMAS]
    weights = coefficients(kept, (steps, names[0.07]))
    rebuilt = sum(weight * averages[sigma] for weight, sigma in zip(weights, SIGMAS))
    print(f"gamma of {SIGMAS}: {names[0.05]:.2f} and {names[0.1]:.2f}")
    print(f"width 0.07: {averages[0.07]:.3f} kept, {rebuilt:.3f} rebuilt from {SIGMAS}; last value {values[-1]:.3f}")


if __name__ == "__main__":
    demo()
