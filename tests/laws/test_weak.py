"""Weak convergence of every sampler that draws noise, as a rate: the law of its end computed exactly, without sampling.

Where the data are Gaussian the exact denoiser is affine in x_t, and so is every step in x and in the noise it draws:

    x_end = c + M x_T + sum_k B_k z_k,   E = c + M E[x_T],   Var = M^2 Var[x_T] + sum_k B_k^2

c, M and B_k are the responses of the sampler itself to x_T = 0, to x_T = 1, and to one z_k = 1, all in one batch.
"""

import numpy as np
import pytest
import torch

from ancestral import toys
from ancestral.diffusion import process as P
from ancestral.diffusion.denoise import OracleDenoiser
from ancestral.diffusion.sample import SAMPLERS, Point, walk
from ancestral.rng import stream

MEAN, VAR = torch.tensor([0.4, -0.9]).double(), torch.tensor([0.05, 1.7]).double()
"""Coordinates are independent, so that one impulse is given to both at once."""

STOP = 4.0
"""The log-SNR where the law of the end is compared."""


class Impulses(np.random.Generator):
    """Noise that is 0, but for draw k of example 2 + k, which is 1 in every coordinate."""

    def __init__(self) -> None:
        super().__init__(np.random.Philox(0))
        self.drawn = 0

    def standard_normal(self, size=None, dtype=np.float64, out=None):
        noise = np.zeros(size, dtype)
        noise[2 + self.drawn : 3 + self.drawn] = 1
        self.drawn += 1
        return noise


def responses(step, process: P.Process, times: list[float], denoiser=None, **options) -> tuple[torch.Tensor, ...]:
    """c and M, shape (2,), and B of every draw, shape (draws, 2)."""
    oracle, count = denoiser or OracleDenoiser(toys.gaussian(MEAN, VAR.diag()), process), Impulses()
    for _ in walk(step, oracle, Point(times[0], torch.zeros(1, 2).double()), times, rng=count, **options):
        pass
    x = torch.zeros(2 + count.drawn, 2).double()
    x[1] = 1
    *_, end = walk(step, oracle, Point(times[0], x), times, rng=Impulses(), **options)
    return end.x[0], end.x[1] - end.x[0], end.x[2:] - end.x[0]


def law_of_the_end(step, process: P.Process, times: list[float], **options) -> tuple[torch.Tensor, torch.Tensor]:
    """E and Var of the end in variance-preserving scale, from a start that has the law of its time exactly."""
    c, M, B = responses(step, process, times, **options)
    mean, var = exact_law(process, times[0])
    scale = process.prior_var(times[-1])
    return (c + M * mean) / scale.sqrt(), (M.square() * var + B.square().sum(0)) / scale


def exact_law(process: P.Process, t: float) -> tuple[torch.Tensor, torch.Tensor]:
    """E[x_t] and Var[x_t]."""
    alpha, sigma = process(t)
    return alpha * MEAN, alpha**2 * VAR + sigma**2


def rate(counts: list[int], errors: list[float]) -> float:
    """The fitted order: -d log error / d log n."""
    n, e = torch.tensor(counts).double().log(), torch.tensor(errors).double().log()
    n, e = n - n.mean(), e - e.mean()
    return -float(n @ e / (n @ n))


def errors(name: str, process: P.Process, counts: list[int], options) -> list[float]:
    """Of mean and variance after so many steps even in log-SNR, from the end of the process."""
    first, found = max(float(process.log_snr(1.0)), -12.0), []
    for n in counts:
        times = process.time(torch.linspace(first, STOP, n + 1, dtype=torch.float64)).tolist()
        mean, var = law_of_the_end(SAMPLERS[name].step, process, times, **options(n))
        true_mean, true_var = exact_law(process, times[-1])
        scale = process.prior_var(times[-1])
        found.append(float((mean - true_mean / scale.sqrt()).norm() + (var - true_var / scale).norm()))
    return found


RATES = [
    ("ancestral", 1, lambda n: {}),
    ("ancestral", 1, lambda n: {"variance": "beta"}),
    ("ddim", 1, lambda n: {"eta": 0.7}),
    ("euler", 1, lambda n: {"churn": 1 / n}),  # S_churn of Karras et al. is the noise of a whole walk
    ("heun", 2, lambda n: {"churn": 1 / n}),
    ("sde-dpmpp-2m", 2, lambda n: {}),
    ("sde-dpmpp-3m", 2, lambda n: {}),  # noise within a step is known to its end alone
    ("sa-solver", 2, lambda n: {}),
    ("sa-solver", 2, lambda n: {"tau": 0.5}),
    ("predictor-corrector", 1, lambda n: {}),
    ("restart", 2, lambda n: {"inner": n}),
]


@pytest.mark.parametrize("schedule", ["linear", "edm", "straight"])
@pytest.mark.parametrize(("name", "order", "options"), RATES)
def test_the_law_of_the_end_converges_at_its_rate(name, order, options, schedule):
    """Of mean and variance together, to exact ones: no noise of sampling, so a wrong coefficient of z has rate 0."""
    counts = [30, 60, 120]
    assert rate(counts, errors(name, P.named(schedule), counts, options)) > order - 0.15


EXACT = [case for case in RATES if case[0] != "predictor-corrector" and case[2](1) != {"variance": "beta"}]
"""All but Langevin dynamics, and a variance that is meant for spread data."""


@pytest.mark.parametrize("schedule", ["linear", "edm", "straight"])
@pytest.mark.parametrize(("name", "order", "options"), EXACT)
def test_where_all_data_are_one_point_three_long_steps_have_the_law_exactly(name, order, options, schedule):
    """The guess is that point whatever x, so what is left of a step is its linear part and its noise."""
    process = P.named(schedule)
    times = process.time(torch.tensor([-6.0, -1.0, 1.5, 6.0]).double()).tolist()
    point = OracleDenoiser(toys.gaussian(MEAN, 1e-30 * torch.eye(2)), process)
    c, M, B = responses(SAMPLERS[name].step, process, times, denoiser=point, **options(3))
    (alpha_t, sigma_t), (alpha_s, sigma_s) = process(times[0]), process(times[-1])
    torch.testing.assert_close(c + M * alpha_t * MEAN, alpha_s * MEAN, rtol=1e-10, atol=1e-10)
    var = M.square() * sigma_t**2 + B.square().sum(0)
    torch.testing.assert_close(var, (sigma_s**2).expand(2), rtol=1e-9, atol=0)


def test_every_sampler_that_draws_noise_has_a_rate():
    """Langevin dynamics alone has one in the length of its steps, below."""
    known = {name for name, _, _ in RATES} | {"annealed-langevin"}
    assert {name for name, sampler in SAMPLERS.items() if sampler.stochastic} <= known


@pytest.mark.parametrize(("name", "order", "options"), RATES)
def test_the_end_is_the_sum_of_its_responses(name, order, options):
    """For noise as it is drawn: nothing else is random, and every z was counted."""
    process, step = P.linear(), SAMPLERS[name].step
    times = process.time(torch.linspace(-8, STOP, 7, dtype=torch.float64)).tolist()
    oracle = OracleDenoiser(toys.gaussian(MEAN, VAR.diag()), process)
    c, M, B = responses(step, process, times, **options(6))
    x_T, z = torch.tensor([[0.3, -1.1]]).double(), torch.from_numpy(stream(5).standard_normal(B.shape))
    *_, end = walk(step, oracle, Point(times[0], x_T), times, rng=stream(5), **options(6))
    torch.testing.assert_close(end.x, c + M * x_T + (B * z).sum(0, keepdim=True), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("schedule", ["linear", "edm"])
def test_langevin_dynamics_keep_the_law_of_a_level_to_the_length_of_their_steps(schedule):
    """For as long in all, n steps of 2 / n: first order in their length, and the next level begins to scale."""
    process, counts, found = P.named(schedule), [40, 80, 160], []
    times = process.time(torch.tensor([-0.5, 0.0]).double()).tolist()
    (mean, var), scale = exact_law(process, times[0]), process.prior_var(times[0])
    for n in counts:
        options = {"updates": n, "size": 2 / n}
        ours = law_of_the_end(SAMPLERS["annealed-langevin"].step, process, times, **options)
        torch.testing.assert_close(ours[0], mean / scale.sqrt(), rtol=1e-9, atol=1e-9)
        found.append(float((ours[1] - var / scale).norm()))
    assert rate(counts, found) == pytest.approx(1, abs=0.1)
