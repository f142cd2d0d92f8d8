"""The order of every deterministic sampler, what its steps are exact for, and what is known to go wrong elsewhere."""

import math
from functools import cache
from itertools import pairwise

import numpy as np
import pytest
import torch

from ancestral import ode, toys
from ancestral.diffusion import process as P
from ancestral.diffusion.denoise import Denoiser, OracleDenoiser
from ancestral.diffusion.grids import GRIDS, karras, uniform
from ancestral.diffusion.multistep import LIMIT, bounded, moments, weights
from ancestral.diffusion.sample import SAMPLERS, Point, walk
from ancestral.errors import OptionError
from ancestral.rng import randn, stream
from oracles import COMBINATIONS, exact

ORDERED = {name: sampler for name, sampler in SAMPLERS.items() if sampler.order}
MULTISTEP = [name for name, sampler in ORDERED.items() if sampler.evaluations == 1 and sampler.order > 1]
LAW = toys.named("mixture")
STOP = 4.0
"""The log-SNR where trajectories are compared."""


def beginning(process: P.Process) -> float:
    """The log-SNR of t = 1; where there is no signal, one at which there is none to float64 rounding."""
    return max(float(process.log_snr(1.0)), -75.0)


@cache
def trajectory() -> dict[float, torch.Tensor]:
    """Two trajectories of the flow in variance-preserving scale: where each process begins, and at `STOP`."""

    def field(log_snr: torch.Tensor, x: torch.Tensor, index: torch.Tensor) -> torch.Tensor:
        alpha, sigma = P.CONSTRAINTS["variance-preserving"](log_snr)
        return alpha[:, None] / 2 * (LAW.posterior_mean(x, alpha, sigma) - alpha[:, None] * x)

    levels = sorted({beginning(P.named(name)) for name in P.SCHEDULES} | {STOP})
    x = randn((2, 2), stream(0), dtype=torch.float64)
    found = {levels[0]: x}
    for start, stop in pairwise(levels):
        x = ode.dormand_prince(field, x, start, stop, rtol=1e-11, atol=1e-12, max_step=4.0).x
        found[stop] = x
    return found


def ends(process: P.Process) -> tuple[torch.Tensor, torch.Tensor]:
    """Where trajectories begin and where they are at `STOP`, in the scale of the process."""
    first, last = process.instants([1.0])[0], process.instant(STOP)
    at = trajectory()
    return at[beginning(process)] * math.hypot(first.alpha, first.sigma), at[STOP] * math.hypot(last.alpha, last.sigma)


def grid(process: P.Process, n: int, spread: float = 0.0) -> list[float]:
    """n steps from t = 1 to `STOP`, even in log-SNR, or each end moved by up to the spread, in steps."""
    u = torch.arange(n + 1, dtype=torch.float64)
    u[1:-1] += spread * (torch.rand(n - 1, dtype=torch.float64, generator=torch.Generator().manual_seed(n)) - 0.5) * 2
    start = max(beginning(process), P.LOG_SNR_MIN)
    times = process.time(start + (STOP - start) * u / n)
    return [1.0, *times[1:].tolist()]


def slope(counts: list[int], errors: list[float]) -> float:
    """The fitted order: -d log error / d log n."""
    n, e = torch.tensor(counts).double().log(), torch.tensor(errors).double().log()
    n, e = n - n.mean(), e - e.mean()
    return -float(n @ e / (n @ n))


def errors(name: str, process: P.Process, counts: list[int], spread: float = 0.0) -> list[float]:
    oracle, (x, truth) = OracleDenoiser(LAW, process), ends(process)
    found = []
    for n in counts:
        *_, end = walk(SAMPLERS[name].step, oracle, Point(1.0, x), grid(process, n, spread))
        found.append(float((end.x - truth).norm()))
    return found


@pytest.mark.parametrize("schedule", P.SCHEDULES)
@pytest.mark.parametrize("name", ORDERED)
def test_measured_order_is_at_least_the_declared_one(name, schedule):
    """From the beginning of the process to an interior time, on a mixture, over two doublings of the steps."""
    counts = [40, 80, 160]
    found = errors(name, P.named(schedule), counts)
    assert slope(counts, found) > SAMPLERS[name].order - 0.15
    assert min(found) > 1e-7


@pytest.mark.parametrize("name", ORDERED)
def test_order_survives_an_uneven_grid(name):
    """Every time moved by up to 0.3 of a step: neighbours differ in length by up to four times."""
    counts = [40, 80, 160, 320]
    assert slope(counts, errors(name, P.linear(), counts, spread=0.3)) > SAMPLERS[name].order - 0.3


@cache
def end_of(name: str, schedule: str, n: int, predicts: str | None = None) -> torch.Tensor:
    """Where n steps even in log-SNR end, by the oracle or by a network of some parameterization."""
    process = P.named(schedule)
    denoiser = exact(LAW, process, predicts) if predicts else OracleDenoiser(LAW, process)
    *_, end = walk(SAMPLERS[name].step, denoiser, Point(1.0, ends(process)[0]), grid(process, n))
    return end.x


@pytest.mark.parametrize(("schedule", "predicts"), COMBINATIONS)
def test_orders_are_the_same_behind_every_parameterization(schedule, predicts):
    """What a conversion loses on the way is a few units of 1e-9, and errors by which orders are measured above 1e-7.

    Nothing is lost but on the straight path, whose infinite first log-SNR a network is told as -20; elsewhere it is
    rounding. So the measured order is that of the exact denoiser, for every deterministic sampler.
    """
    most = 2e-8 if schedule == "straight" else 1e-12
    for name in ORDERED:
        for n in (10, 30):
            lost = end_of(name, schedule, n, predicts) - end_of(name, schedule, n)
            assert lost.norm() < most, (name, n)


@pytest.mark.parametrize("schedule", P.SCHEDULES)
def test_the_adaptive_sampler_keeps_its_tolerance(schedule):
    process = P.named(schedule)
    oracle, (x, truth) = OracleDenoiser(LAW, process), ends(process)
    for tolerance in (1e-4, 1e-6):
        *_, end = walk(SAMPLERS["adaptive"].step, oracle, Point(1.0, x), grid(process, 3), tolerance=tolerance)
        assert (end.x - truth).abs().max() < 20 * tolerance


# What steps are exact for.


class Known(Denoiser):
    """A denoiser whose guess, or whose noise, is a given function of the instant alone."""

    def __init__(self, process: P.Process, of, noise: bool = False) -> None:
        super().__init__()
        self.process, self.of, self.noise = process, of, noise

    def forward(self, x_t, t):
        value = torch.full_like(x_t, self.of(t.log_snr / 2))
        return (x_t - t.sigma * value) / t.alpha if self.noise else value


@pytest.mark.parametrize("kappa", [-30.0, -2.0, -1.0, -1e-3, -1e-12, 0.0, 1e-12, 1e-6, 0.9, 1.0, 1.1, 5.0, 40.0])
def test_moments_are_exact_for_long_steps_and_for_short_ones(kappa):
    """Against Gauss-Legendre on 64 pieces of 20 nodes."""
    node, weight = (torch.from_numpy(a) for a in np.polynomial.legendre.leggauss(20))
    v = (torch.arange(64)[:, None] + (node + 1) / 2) / 64
    density = weight * (kappa * (v - float(kappa > 0))).exp()
    for k, moment in enumerate(moments(kappa, 5)):
        assert moment == pytest.approx(float((v**k * density).sum() / density.sum()), rel=3e-14)


def test_weights_add_up_to_one_and_reproduce_polynomials():
    nodes, M = [0.0, -0.3, -1.1, 1.0], moments(2.3, 4)
    w = weights(nodes, M)
    for k in range(4):
        assert sum(c * node**k for c, node in zip(w, nodes, strict=True)) == pytest.approx(M[k], abs=1e-14)


@pytest.mark.parametrize("schedule", P.SCHEDULES)
@pytest.mark.parametrize("name", ORDERED)
def test_a_guess_that_stands_still_is_followed_exactly(name, schedule):
    """Any step, however long, is exact for a constant x_0_hat, and for a constant eps_hat: the linear part is."""
    process = P.named(schedule)
    x, times = (
        randn((3, 2), stream(1), dtype=torch.float64),
        process.time(torch.tensor([-6.0, -1.0, 0.5, 6.0])).tolist(),
    )
    t, *_, s = process.instants(times)
    *_, end = walk(SAMPLERS[name].step, Known(process, lambda _: 0.7), Point(times[0], x), times)
    torch.testing.assert_close(end.x, s.sigma / t.sigma * (x - t.alpha * 0.7) + s.alpha * 0.7, rtol=1e-11, atol=1e-11)
    *_, end = walk(SAMPLERS[name].step, Known(process, lambda _: 0.7, noise=True), Point(times[0], x), times)
    torch.testing.assert_close(end.x, s.alpha / t.alpha * (x - t.sigma * 0.7) + s.sigma * 0.7, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize(("name", "degree"), [("dpmpp-3m", 2), ("unipc-3", 2), ("deis-2", 1), ("deis-3", 2)])
@pytest.mark.parametrize("schedule", ["cosine", "edm", "straight"])
def test_polynomials_are_integrated_exactly(name, degree, schedule):
    """A guess that is a polynomial in lambda, of as many coefficients as there are guesses: the step has no error.

    x_s / sigma_s - x_t / sigma_t = int p(l) e^l dl, and x_s / alpha_s - x_t / alpha_t = -int p(l) e^-l dl for noise.
    """
    process, noise = P.named(schedule), name.startswith("deis")
    levels = torch.tensor([-0.9, -0.5, -0.2, 0.3, 0.6, 1.2], dtype=torch.float64)
    denoiser = Known(process, lambda at: sum((k + 1) * at**k for k in range(degree + 1)), noise)
    times = process.time(2 * levels).tolist()
    *_, before, end = walk(SAMPLERS[name].step, denoiser, Point(times[0], torch.ones(1, 1).double()), times)
    t, s = process.instants(times)[-2:]
    rate = -1 if noise else 1

    def primitive(at: float) -> float:
        """Of p(l) e^(rate l), by parts."""
        coefficients, total = [k + 1.0 for k in range(degree + 1)], 0.0
        for j in range(degree + 1):
            derivative = sum(c * at**k for k, c in enumerate(coefficients))
            total += (-1) ** j * rate ** (j + 1) * derivative * math.exp(rate * at)
            coefficients = [k * c for k, c in enumerate(coefficients)][1:]
        return total

    change = rate * (primitive(s.log_snr / 2) - primitive(t.log_snr / 2))
    scale_t, scale_s = (t.alpha, s.alpha) if noise else (t.sigma, s.sigma)
    torch.testing.assert_close(end.x / scale_s, before.x / scale_t + change, rtol=1e-11, atol=1e-11)


# What is published, written out again.


def test_dpmpp_2m_and_2s_and_unipc_2_are_the_published_formulas():
    process, oracle = P.cosine(), OracleDenoiser(LAW, P.cosine())
    times = process.time(torch.tensor([-4.0, -2.5, -1.8, 0.4])).tolist()
    instants = process.instants(times)
    x = randn((4, 2), stream(2), dtype=torch.float64)

    def first(x, t, s, D):
        h = (s.log_snr - t.log_snr) / 2
        return s.sigma / t.sigma * x - s.alpha * math.expm1(-h) * D

    y, previous, h_before = x, None, 0.0
    for t, s in pairwise(instants):
        h, x_0 = (s.log_snr - t.log_snr) / 2, oracle(y, t)
        r = h_before / h
        D = x_0 if previous is None else (1 + 1 / (2 * r)) * x_0 - previous / (2 * r)
        y, previous, h_before = first(y, t, s, D), x_0, h
    *_, end = walk(SAMPLERS["dpmpp-2m"].step, oracle, Point(times[0], x), times)
    torch.testing.assert_close(end.x, y, rtol=1e-13, atol=1e-13)

    y = x
    for t, s in pairwise(instants):
        middle = process.instant((t.log_snr + s.log_snr) / 2)
        y = first(y, t, s, oracle(first(y, t, middle, oracle(y, t)), middle))
    *_, end = walk(SAMPLERS["dpmpp-2s"].step, oracle, Point(times[0], x), times)
    torch.testing.assert_close(end.x, y, rtol=1e-13, atol=1e-13)

    for variant, B in (("B1", lambda h: -h), ("B2", lambda h: math.expm1(-h))):
        t, s, u, _ = instants
        h, k = (s.log_snr - t.log_snr) / 2, (u.log_snr - s.log_snr) / 2
        m_t = oracle(x, t)
        m_s = oracle(first(x, t, s, m_t), s)
        y = first(x, t, s, m_t) - s.alpha * B(h) * 0.5 * (m_s - m_t)
        y = first(y, s, u, m_s) - u.alpha * B(k) * 0.5 * (m_t - m_s) / (-h / k)
        *_, end = walk(SAMPLERS["unipc-2"].step, oracle, Point(times[0], x), times[:3], variant=variant)
        torch.testing.assert_close(end.x, y, rtol=1e-13, atol=1e-13)


def test_lms_and_plms_are_adams_and_bashforth_on_even_steps():
    assert [round(24 * w, 9) for w in weights([0, -1, -2, -3], [1, 1 / 2, 1 / 3, 1 / 4])] == [55, -59, 37, -9]


# Faults known of other solvers.


@pytest.mark.parametrize("schedule", P.SCHEDULES)
@pytest.mark.parametrize("name", SAMPLERS)
def test_every_sampler_ends_with_the_guess_at_its_last_time(name, schedule):
    """From any number of steps, without nan: the end is the guess made at the last time, in B1 of UniPC as in B2."""
    process = P.named(schedule)
    oracle, x, guesses = OracleDenoiser(LAW, process), ends(process)[0], []
    oracle.register_forward_hook(lambda _module, _inputs, x_0_hat: guesses.append(x_0_hat))
    kinds = {"unipc": [{}, {"variant": "B1"}], "adaptive": [{"tolerance": 0.1}]}
    for options in kinds.get(name.partition("-")[0], [{}]):
        for n in (1, 2, 5):
            *_, end = SAMPLERS[name].path(oracle, x, uniform(process, n), rng=stream(0), **options)
            torch.testing.assert_close(end.x, guesses[-1], rtol=0, atol=1e-10)


@pytest.mark.parametrize("name", MULTISTEP)
def test_a_thousand_steps_are_as_good_as_they_should_be(name):
    """Coefficients are float64 and do not cancel: tiny steps do not make it worse."""
    coarse, fine = errors(name, P.linear(), [100, 800])
    assert fine < coarse / 8 ** (SAMPLERS[name].order - 0.15)


@pytest.mark.parametrize("name", ["dpmpp-2m", "dpmpp-3m", "unipc-2", "unipc-3", "deis-3"])
def test_more_steps_are_no_worse_around_fifteen(name):
    """Nothing depends on how many steps there are."""
    found = errors(name, P.linear(), [10, 13, 14, 15, 16, 20])
    assert all(after < 1.1 * before for before, after in pairwise(found)), found


@pytest.mark.parametrize("label", GRIDS)
@pytest.mark.parametrize("name", ["ddim", "plms", "dpmpp-2m", "unipc-2", "deis-3"])
def test_on_every_grid_four_times_the_steps_follow_the_flow_closer(name, label):
    """From its first time to its last: no step ends elsewhere than at the next time, and no time is rounded.

    150 and 600 do not divide the 1000 steps of a chain; of the second order and more, a floor of 3e-3 would show, as
    rounded times have.
    """
    process, found = P.linear(), []
    oracle = OracleDenoiser(LAW, process)
    for n in (150, 600):
        times = GRIDS[label](process, n)
        x = randn((16, 2), stream(3), dtype=torch.float64) * process.prior_var(times[0]) ** 0.5
        first, last = (float(process.log_snr(t)) for t in times[[0, -1]])
        between = process.time(torch.linspace(first, last, 400, dtype=torch.float64)[1:-1]).tolist()
        fine = [float(times[0]), *between, float(times[-1])]
        *_, truth = walk(SAMPLERS["unipc-3"].step, oracle, Point(fine[0], x), fine)
        *_, end = walk(SAMPLERS[name].step, oracle, Point(fine[0], x), times.tolist())
        found.append(float((end.x - truth.x).norm(dim=1).median()))
    assert found[1] < max(found[0] / 3, 1e-7), found
    assert name == "ddim" or found[1] < 3e-4, found


def test_weights_with_noise_tend_to_their_limits():
    """In a step without length all weight is on what is known at its beginning; in an endless one it is at its end."""
    for tau in (0.0, 1.0, 2.0):
        for h in (1e-4, 1e-8, 1e-12):
            nodes = [0.0, -0.1 / h, -0.2 / h]
            w = weights(nodes, moments((1 + tau**2) * h, 3))
            assert w[0] == pytest.approx(1, abs=20 * h)
            assert max(abs(w[1]), abs(w[2])) < 20 * h
        assert moments(1e6, 3) == pytest.approx([1, 1, 1], abs=1e-5)


def test_a_step_much_longer_than_those_before_it_is_of_lower_order():
    """Errors of guesses are not magnified without bound, whatever the grid."""
    assert bounded([0, -1e-3, -2e-3], [1, 1 / 2, 1 / 3], 2.0) == [1.0]
    for nodes in ([0, -0.5, -1.0, -1.5], [0, -0.1, -0.2, -0.3], [0, -0.02, -5.0]):
        for h in (0.1, 0.7, 3.0):
            w = bounded(nodes, moments(h, len(nodes)), h)
            assert -math.expm1(-h) * sum(map(abs, w)) <= LIMIT
    x = ends(P.edm())[0]
    for name in MULTISTEP:
        end = SAMPLERS[name](OracleDenoiser(LAW, P.edm()), x, karras(P.edm(), 12))
        assert float((end - LAW.mean).norm(dim=1).max()) < 6, name


def test_unknown_variants_are_refused():
    with pytest.raises(OptionError, match="unknown variant of UniPC 'b1'"):
        SAMPLERS["unipc-2"](OracleDenoiser(LAW, P.linear()), ends(P.linear())[0], 3, variant="b1")
