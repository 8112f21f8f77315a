"""ema.py: averages of the weights whose length is chosen afterwards, against integrals and a kept average."""

import numpy as np
import pytest
import torch

from ema import coefficients, combine, decay, distance, gamma_of, inner_product, remains, widths_kept


def profile(tau, step, gamma):
    return np.where(tau <= step, (gamma + 1) * (tau / step) ** gamma / step, 0.0)


@pytest.mark.parametrize("sigma, gamma", [(0.05, 16.97), (0.10, 6.94), (0.20, 1.81), (0.25, 0.72)])
def test_widths_of_profiles(sigma, gamma):
    """Those that the paper names, and the standard deviation of the profile itself."""
    tau = (np.arange(200_000) + 0.5) / 200_000
    weight = profile(tau, 1.0, gamma_of(sigma)) / len(tau)
    mean = (weight * tau).sum()
    assert ((weight * (tau - mean) ** 2).sum()) ** 0.5 == pytest.approx(sigma, rel=1e-5)
    if sigma <= 0.1:
        assert gamma_of(sigma) == pytest.approx(gamma, abs=0.005)


@pytest.mark.parametrize("sigma", [0, -1, 0.29, float("nan")])
def test_widths_that_no_profile_has(sigma):
    with pytest.raises(ValueError, match="must be above 0 and at most 0.28"):
        gamma_of(sigma)


def test_the_running_average_is_the_profile():
    """What each step weighs in the end, from the decays, is (tau / T)^gamma up to the width of a step."""
    steps, gamma = 400, gamma_of(0.1)
    weight = np.zeros(steps)
    for step in range(1, steps + 1):
        keep = decay(step, gamma)
        weight *= keep
        weight[step - 1] = 1 - keep
    assert decay(1, gamma) == 0 and weight.sum() == pytest.approx(1)
    expected = profile(np.arange(1, steps + 1) - 0.5, steps, gamma)
    assert np.abs(weight - expected).max() < 0.01 * expected.max()


@pytest.mark.parametrize("a, b", [((1000, 17.0), (1000, 7.0)), ((800, 17.0), (1000, 7.0)),
                                  ((1000, 3.0), (250, 0.5)), ((500, 2.0), (500, 2.0))])
def test_inner_products_are_integrals(a, b):
    tau = (np.arange(1_000_000) + 0.5) / 1000
    assert inner_product(a, b) == pytest.approx((profile(tau, *a) * profile(tau, *b)).sum() / 1000, rel=1e-5)
    assert inner_product(a, b) == pytest.approx(inner_product(b, a))


def test_what_was_kept_is_rebuilt_exactly():
    kept = [(1000, gamma_of(0.05)), (1000, gamma_of(0.1)), (500, gamma_of(0.05)), (500, gamma_of(0.1))]
    for i, wanted in enumerate(kept):
        assert coefficients(kept, wanted) == pytest.approx(np.eye(4)[i], abs=1e-6)


def test_the_combination_is_an_average():
    """Its shares sum to 1, so weights that training does not move stay as they are; among such combinations
    it is the nearest, and the distance is that of the profiles."""
    kept = [(1000, gamma_of(0.05)), (1000, gamma_of(0.1))]
    tau = (np.arange(100_000) + 0.5) / 100
    for width in (0.03, 0.07, 0.15):
        wanted = (1000, gamma_of(width))
        weights = coefficients(kept, wanted)
        assert sum(weights) == pytest.approx(1, abs=1e-12)

        def apart(shares):
            made = sum(share * profile(tau, *a) for share, a in zip(shares, kept))
            target = profile(tau, *wanted)
            return (((made - target) ** 2).sum() / (target**2).sum()) ** 0.5

        assert distance(kept, weights, wanted) == pytest.approx(apart(weights), rel=1e-4)
        for change in (0.01, -0.01):
            assert apart(weights) < apart([weights[0] + change, weights[1] - change])


def test_what_a_length_means():
    assert widths_kept(0.05) == [0.05, 0.1] and widths_kept(0.999) == [0.999] and widths_kept(0.0) == [0.0]
    assert [remains(0.999, step) for step in (1, 10, 10**6)] == [0.1, 10 / 19, 0.999]
    assert remains(0.05, 1) == 0 and remains(0.05, 100) == 0.99 ** (gamma_of(0.05) + 1)
    assert remains(0.0, 5) == 0


def test_another_length_from_snapshots():
    """The more snapshots, the closer: to 1 % of what the average differs from the last weights with eight."""
    torch.manual_seed(0)
    steps, kept, states, direct = 1600, [], [], 0.0
    values = torch.randn(steps, dtype=torch.float64).cumsum(0).tolist()
    running = {0.05: 0.0, 0.1: 0.0}
    for step, value in enumerate(values, 1):
        keep = decay(step, gamma_of(0.15))
        direct = keep * direct + (1 - keep) * value
        for sigma in running:
            keep = decay(step, gamma_of(sigma))
            running[sigma] = keep * running[sigma] + (1 - keep) * value
            if step % 200 == 0:
                kept.append((step, gamma_of(sigma)))
                states.append({"w": torch.tensor([running[sigma]])})
    errors = []
    for last in (2, 4, 16):
        weights = coefficients(kept[-last:], (steps, gamma_of(0.15)))
        errors.append(abs(combine(states[-last:], weights)["w"].item() - direct))
    assert errors[2] < errors[1] < errors[0] and errors[2] < 0.01 * abs(direct - values[-1])


def test_counters_are_not_averaged():
    states = [{"w": torch.ones(2), "n": torch.tensor(3)}, {"w": 3 * torch.ones(2), "n": torch.tensor(5)}]
    found = combine(states, [0.25, 0.75])
    assert found["n"] == 3 and torch.equal(found["w"], torch.full((2,), 2.5))
