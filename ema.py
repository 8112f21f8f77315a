"""Averages of the weights over training, whose length can still be chosen when the training is over.

    python ema.py                        # averages a toy trajectory, and rebuilds a third width from two
    python sample.py runs/shapes-dit-rf --ema 0.07

Karras et al. 2024 (arXiv:2312.02696), section 3 and appendix C; equations cited without a name are theirs.
After T steps, an average with the profile gamma weights step tau by (tau / T)^gamma. It grows with the
training, so one number suits runs of any length, and what was learned early is forgotten. That number is its
width, the standard deviation of the profile relative to T (the paper's sigma_rel). An average of another
width is, to a good approximation, a linear combination of those that were kept.
"""

from __future__ import annotations

import functools
import math

import torch
from torch import Tensor

Profile = tuple[float, float]      # the step at which an average was taken, and its gamma

WIDEST = 0.28      # gamma 0, the plain mean of all steps, has a width of 0.289
CONSTANT = 0.5     # from here on, a length is the decay of an ordinary average and not a width


def widths_kept(length: float) -> list[float]:
    """The averages that a training keeps for one --ema: a profile of that width and one twice as wide, from
    which sample.py makes those between; or only one, with a constant decay."""
    return [length, 2 * length] if 0 < length < CONSTANT else [length]


def remains(length: float, step: int) -> float:
    """The share of an average that remains when the weights of step `step`, from 1, are added. length: a
    width, or from CONSTANT on a decay, which is smaller in the first steps so that the initial weights are
    soon forgotten."""
    if 0 < length < CONSTANT:
        return decay(step, gamma_of(length))
    return min(length, step / (step + 9))


@functools.cache
def gamma_of(width: float) -> float:
    """The exponent of the profile with this relative width, in (0, 0.28]: the root of eq. 123,
    width^2 = (gamma + 1) / ((gamma + 2)^2 (gamma + 3)). Raises ValueError outside that range."""
    if not 0 < width <= WIDEST:
        raise ValueError(f"width {width}: must be above 0 and at most {WIDEST}")
    low, high = 0.0, 2 / width              # the width falls as gamma grows, and is below 1 / gamma
    for _ in range(100):
        middle = (low + high) / 2
        if (middle + 1) / ((middle + 2) ** 2 * (middle + 3)) > width**2:
            low = middle
        else:
            high = middle
    return (low + high) / 2


def decay(step: int, gamma: float) -> float:
    """What remains of the average when step `step` (from 1) is added, eq. 2: the first one replaces it."""
    return (1 - 1 / step) ** (gamma + 1)


def inner_product(a: Profile, b: Profile) -> float:
    """The integral of the product of two profiles, eq. 124: each p(tau) = (gamma + 1) tau^gamma /
    step^(gamma + 1) for tau up to its step, and 0 after."""
    (step_a, gamma_a), (step_b, gamma_b) = a, b
    first = min(step_a, step_b)
    # by logarithms, because powers of a step overflow
    power = gamma_a * math.log(first / step_a) + gamma_b * math.log(first / step_b)
    scale = first / (step_a * step_b)
    return (gamma_a + 1) * (gamma_b + 1) / (gamma_a + gamma_b + 1) * scale * math.exp(power)


def coefficients(kept: list[Profile], wanted: Profile) -> list[float]:
    """How much of each kept average makes up the wanted one: the least squares of the profiles' difference.

    Unlike in the paper, they must sum to 1: with few averages they would otherwise sum to 0.7 or 1.03, and
    scale all weights by that, which training has hardly moved in comparison."""
    n = len(kept)
    # The normal equations, with one more row and column for the sum (a Lagrange multiplier).
    matrix = torch.ones(n + 1, n + 1, dtype=torch.float64)
    matrix[n, n] = 0
    right = torch.ones(n + 1, 1, dtype=torch.float64)
    for i, a in enumerate(kept):
        right[i] = inner_product(a, wanted)
        for j, b in enumerate(kept):
            matrix[i, j] = inner_product(a, b)
    # Products of profiles are of the size 1 / step; scaled to that of the ones, rounding affects both alike.
    scale = matrix[0, 0].clone()
    matrix[:n, :n] /= scale
    right[:n] /= scale
    return torch.linalg.lstsq(matrix, right, driver="gelsd").solution[:n, 0].tolist()


def distance(kept: list[Profile], weights: list[float], wanted: Profile) -> float:
    """How far the combination is from the wanted profile: the norm of the difference, relative to it."""
    parts = [(1.0, wanted)] + [(-weight, profile) for weight, profile in zip(weights, kept)]
    square = sum(x * y * inner_product(a, b) for x, a in parts for y, b in parts)
    return math.sqrt(max(0.0, square) / inner_product(wanted, wanted))


def combine(states: list[dict[str, Tensor]], weights: list[float]) -> dict[str, Tensor]:
    """The weighted sum of these states, tensor by tensor, in float32. Other types than floating point, such
    as counters, are taken from the first."""
    total = {}
    for name, first in states[0].items():
        if not first.is_floating_point():
            total[name] = first
            continue
        total[name] = sum(weight * state[name].float() for state, weight in zip(states, weights))
    return total


def demo() -> None:
    """Average a wandering value with three profiles; compare one with what the two others make of it."""
    torch.manual_seed(0)
    steps = 2000
    values = torch.randn(steps, dtype=torch.float64).cumsum(0).tolist()
    averages = {0.05: 0.0, 0.1: 0.0, 0.07: 0.0}
    for step, value in enumerate(values, 1):
        for width in averages:
            share = remains(width, step)
            averages[width] = share * averages[width] + (1 - share) * value
    wanted = (steps, gamma_of(0.07))
    kept = [(steps, gamma_of(width)) for width in widths_kept(0.05)]
    weights = coefficients(kept, wanted)
    rebuilt = weights[0] * averages[0.05] + weights[1] * averages[0.1]
    print(f"gamma of the widths 0.05 and 0.1: {kept[0][1]:.2f} and {kept[1][1]:.2f}")
    print(f"the last value {values[-1]:.2f}, its averages {averages[0.05]:.2f} and {averages[0.1]:.2f}")
    print(f"width 0.07: {averages[0.07]:.3f} where it was kept, {rebuilt:.3f} from the two; the profiles "
          f"differ by {distance(kept, weights, wanted):.1%}")


if __name__ == "__main__":
    demo()
