"""Averages of the weights: what a power function promises, and making one afterwards from a few that were kept."""

import math

import pytest
import torch
from torch import nn

from ancestral.errors import OptionError
from ancestral.rng import randn, stream
from ancestral.training import average
from ancestral.training.average import LENGTHS, LONGEST, Average, coefficients, gamma, profiles, snapshot_steps


def walk(total: int, seed: int = 0) -> torch.Tensor:
    """Weights along a training: a drift that slows down, and noise from step to step."""
    noise = randn((total, 40), stream(seed), dtype=torch.float64)
    return torch.linspace(0, 1, total, dtype=torch.float64).sqrt()[:, None] * torch.arange(40) / 40 + 0.3 * noise


def tracked(path: torch.Tensor, length: float) -> list[torch.Tensor]:
    """The average after every step, by the running update."""
    module = nn.Linear(path.shape[1], 1, bias=False).double()
    shadow, found = Average(module, length), []
    for step, weights in enumerate(path, 1):
        module.weight.data.copy_(weights)
        shadow.update(module, step)
        found.append(shadow.module.weight.clone().flatten())
    return found


@pytest.mark.parametrize("length", [0.02, 0.05, 0.1, 0.2, 0.28])
def test_the_running_average_has_the_profile_of_the_closed_form(length):
    path = walk(300)
    after = tracked(path, length)
    for step in (1, 2, 17, 300):
        weights = profiles([(step, length)], 1, 300)[0]
        assert float(weights.sum()) == pytest.approx(1, abs=1e-12)
        assert not weights[step:].any()
        torch.testing.assert_close(after[step - 1], weights @ path, rtol=0, atol=1e-12)


@pytest.mark.parametrize("length", [0.01, 0.05, 0.1, 0.25])
@pytest.mark.parametrize("total", [2000, 200_000])
def test_the_window_has_the_declared_length(length, total):
    """Its standard deviation is `length` times the run, up to the width of a step."""
    weights, time = profiles([(total, length)], 1, total)[0], torch.arange(1, total + 1).double() / total
    mean = weights @ time
    assert math.sqrt(float(weights @ (time - mean).square())) == pytest.approx(length, rel=1e-3, abs=1 / total)


def test_the_exponents_are_the_published_ones():
    """Karras et al. (2024), section 3.1: lengths 0.05 and 0.10 are gamma = 16.97 and 6.94."""
    assert [round(gamma(length), 2) for length in (0.05, 0.10)] == [16.97, 6.94]
    for length in (0.0, -0.1, LONGEST, 0.5, math.nan):
        with pytest.raises(OptionError, match="not a power function's"):
            gamma(length)


@pytest.mark.parametrize("n", [8, 16])
@pytest.mark.parametrize("length", [0.03, 0.04, 0.07, 0.12, 0.15])
def test_an_average_made_afterwards_is_the_one_that_was_not_kept(n, length):
    """To what `residual` says: relative to the noise that is in the average itself, over 40 weights."""
    total, path = 2000, walk(2000)
    kept = [(step, each) for step in snapshot_steps(total, n) for each in LENGTHS]
    found, residual = coefficients(kept, total, length)
    histories = {each: tracked(path, each) for each in LENGTHS}
    made = average.synthesise(({"w": histories[each][step - 1]} for step, each in kept), found)["w"]
    wanted = tracked(path, length)[-1]
    noise = 0.3 * float(profiles([(total, length)], 1, total).norm())
    error = float((made - wanted).square().mean().sqrt()) / noise
    assert error < 1.3 * residual
    assert residual < {8: 0.105, 16: 0.04}[n]
    assert float(found.sum()) == pytest.approx(1, abs=1e-9)


def test_an_average_that_was_kept_is_made_exactly():
    kept = [(step, each) for step in snapshot_steps(500, 8) for each in LENGTHS]
    for which in (0, 7, 14, 15):
        found, residual = coefficients(kept, *kept[which])
        one_hot = torch.zeros(16, dtype=torch.float64)
        one_hot[which] = 1
        torch.testing.assert_close(found, one_hot, rtol=0, atol=1e-9)
        assert residual < 1e-9


def test_an_average_that_cannot_be_made_says_so():
    """Far shorter than the time between two that were kept, or over a stretch of which nothing was kept."""
    kept = [(step, each) for step in snapshot_steps(1000, 8) for each in LENGTHS]
    assert coefficients(kept, 1000, 0.005)[1] > 0.5
    assert coefficients(kept[:8], 1000, 0.05)[1] > 0.9
    assert coefficients(kept, 1000, 0.05)[1] < 1e-9


def test_long_runs_are_divided_into_chunks_that_change_nothing(monkeypatch):
    kept = [(step, each) for step in snapshot_steps(1000, 4) for each in LENGTHS]
    whole = coefficients(kept, 1000, 0.08)
    monkeypatch.setattr(average, "CHUNK", 77)
    parts = coefficients(kept, 1000, 0.08)
    torch.testing.assert_close(parts[0], whole[0], rtol=1e-6, atol=1e-8)
    assert parts[1] == pytest.approx(whole[1], rel=1e-6)


def test_buffers_follow_the_module():
    module = nn.BatchNorm1d(3)
    shadow = Average(module, 0.1)
    module.running_mean.fill_(2.0)
    shadow.update(module, 1)
    assert torch.equal(shadow.module.running_mean, module.running_mean)


@pytest.mark.parametrize(("total", "n"), [(1000, 8), (5, 8), (1, 3), (7, 0)])
def test_snapshots_are_distinct_steps_that_end_with_the_run(total, n):
    steps = snapshot_steps(total, n)
    assert steps == sorted(set(steps))
    assert len(steps) == min(total, n)
    assert not steps or (steps[0] >= 1 and steps[-1] == total)
