"""Grids of times: each is even in its own variable, and begins and ends where it is published to."""

import math

import pytest
import torch
from scipy.stats import beta as beta_law

from ancestral.diffusion import process as P
from ancestral.diffusion.grids import (
    GRIDS,
    beta,
    grid,
    karras,
    leading,
    linspace,
    log_snr,
    quadratic,
    trailing,
    uniform,
)
from ancestral.errors import OptionError

each_schedule = pytest.mark.parametrize("name", P.SCHEDULES)
each_grid = pytest.mark.parametrize("label", GRIDS)
T = 1000


def even(values: torch.Tensor, first: float, last: float, atol: float = 1e-12) -> None:
    """Evenly spaced between two ends, both included."""
    published = torch.linspace(0, 1, len(values), dtype=torch.float64) * (last - first) + first
    torch.testing.assert_close(values, published, rtol=0, atol=atol)


@pytest.mark.parametrize("n", [1, 2, 7, 100, 1000])
@each_schedule
@each_grid
def test_a_grid_is_n_decreasing_times_that_a_walk_takes(label, name, n):
    process = P.named(name)
    times = GRIDS[label](process, n)
    assert times.dtype == torch.float64
    assert len(times) == n
    assert torch.equal(grid(process, times), times)


@pytest.mark.parametrize("n", [2, 7, 40])
@each_schedule
def test_each_grid_is_even_in_its_own_variable(name, n):
    """From the end it is published to begin with to the one it ends with."""
    process = P.named(name)
    even(uniform(process, n), 1, 1 / n)
    even(quadratic(process, n).sqrt(), 1, 1 / n)
    even(trailing(process, n), 1, 1 / n)
    even(linspace(process, n), 1, 1 / T)
    even(leading(process, n), 1 - 1 / n + 1 / T, 1 / T)
    quantile = (beta(process, n) - 1 / T) / (1 - 1 / T)
    even(torch.from_numpy(beta_law.cdf(quantile.clamp(0, 1).numpy(), 0.6, 0.6)), 1, 0, atol=1e-8)


@pytest.mark.parametrize("last", [9.0, 12.0])
@pytest.mark.parametrize("n", [2, 7, 40])
@each_schedule
def test_log_snr_and_karras_grids_are_even_in_theirs(name, n, last):
    """Up to what float64 knows of times near 1, which are 2^-53 apart."""
    process = P.named(name)
    first = float(process.log_snr(1.0).clamp(min=P.LOG_SNR_MIN))

    def levels(times: torch.Tensor) -> torch.Tensor:
        return torch.cat([torch.tensor([first], dtype=torch.float64), process.log_snr(times[1:])])

    slack = 1e-11 + 2**-53 * float(process.rate(log_snr(process, n, last)[1]))
    even(levels(log_snr(process, n, last)), first, last, atol=slack)
    for rho in (1.0, 3.0, 7.0):
        ends = math.exp(-first / (2 * rho)), math.exp(-last / (2 * rho))
        slack = 2**-53 * float(process.rate(karras(process, n, rho, last)[1]))
        even((-levels(karras(process, n, rho, last)) / (2 * rho)).exp() / ends[0], 1, ends[1] / ends[0], 1e-11 + slack)


@each_schedule
def test_karras_approaches_even_log_snr_as_rho_grows(name):
    process = P.named(name)
    far = [float((karras(process, 20, rho) - log_snr(process, 20)).abs().max()) for rho in (7.0, 70.0, 700.0)]
    assert far[0] > 5 * far[1] > 25 * far[2]


@pytest.mark.parametrize("steps", [1, 10, 250])
def test_all_of_a_chain_can_be_taken_in_one_way(steps):
    process = P.linear()
    chain = uniform(process, steps)
    for way in (trailing, leading, linspace):
        torch.testing.assert_close(way(process, steps, T=steps), chain, rtol=0, atol=1e-15)
    assert leading(process, 50, T=1000)[0] == pytest.approx(0.981)


def test_the_default_is_karras_for_exploding_variance_and_even_in_time_for_others():
    for name in P.SCHEDULES:
        process = P.named(name)
        assert torch.equal(grid(process, 9), GRIDS["karras" if name == "edm" else "uniform"](process, 9))


@pytest.mark.parametrize(
    ("steps", "sentence"),
    [
        (0, "at least one step, received 0"),
        (torch.tensor([]), "at least one step, received a grid without times"),
        (torch.tensor([0.4, 0.6]), r"decreasing times in \(0, 1\], but time 2 of 2 is 0.6"),
        (torch.tensor([0.5, 0.5]), "but time 2 of 2 is 0.5"),
        (torch.tensor([1.5, 0.5]), "but time 1 of 2 is 1.5"),
        (torch.tensor([0.5, 0.0]), "but time 2 of 2 is 0.0: leave it out"),
        (torch.tensor([0.5, -0.25]), "but time 2 of 2 is -0.25"),
        (torch.tensor([0.5, math.nan, 0.25]), "but time 2 of 3 is nan"),
        (torch.tensor([math.nan]), "but time 1 of 1 is nan"),
        (torch.tensor([math.inf, 0.5]), "but time 1 of 2 is inf"),
    ],
)
def test_what_is_no_grid_is_refused_with_its_place(steps, sentence):
    with pytest.raises(OptionError, match=sentence):
        grid(P.cosine(), steps)


@each_grid
def test_no_grid_has_no_times_and_a_chain_has_as_many_as_it_has(label):
    with pytest.raises(OptionError, match=r"at least one step.*received 0"):
        GRIDS[label](P.cosine(), 0)
    if label in ("beta", "trailing", "leading", "linspace"):
        with pytest.raises(OptionError, match="at most the 1000 of the chain, received 1001"):
            GRIDS[label](P.cosine(), 1001)
