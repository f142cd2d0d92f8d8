"""What is improved after training: residuals, the reverse variance they give, and the best chain of K steps."""

import math
from dataclasses import replace
from itertools import combinations, pairwise

import pytest
import torch
from torch import nn

from ancestral import gaussian, toys
from ancestral.diffusion import process as P
from ancestral.diffusion.denoise import (
    FIXED,
    Clipped,
    Denoiser,
    Given,
    HasVariance,
    NetworkDenoiser,
    OracleDenoiser,
)
from ancestral.diffusion.grids import grid, quadratic, uniform
from ancestral.diffusion.likelihood import DECODERS, bound, kl_term, mean_and_stderr
from ancestral.diffusion.respace import Calibrated, Residuals, best_chain, best_chains, pair_terms, residuals
from ancestral.diffusion.respace import _smoother as smoother
from ancestral.diffusion.sample import SAMPLERS
from ancestral.errors import OptionError
from ancestral.rng import Rows, randn, stream, streams

MEAN, VAR = torch.tensor([0.3, -0.6]).double(), torch.tensor([0.5, 0.02]).double()


class Shrunken(Denoiser):
    """A guess that is wrong in a known way: a share of another, moved."""

    def __init__(self, denoiser: Denoiser, share: float = 0.7, shift: float = 0.1) -> None:
        super().__init__()
        self.denoiser, self.process, self.share, self.shift = denoiser, denoiser.process, share, shift

    def forward(self, x_t, t):
        return self.share * self.denoiser(x_t, t) + self.shift


def normal(process: P.Process, mean: torch.Tensor = MEAN, var: torch.Tensor = VAR) -> OracleDenoiser:
    return OracleDenoiser(toys.gaussian(mean, var.diag()), process)


@pytest.fixture
def exact_moments(monkeypatch):
    """Noise replaced by points whose averages are exact for quadratics of independent elements: no error is left."""

    def use(mean: torch.Tensor = MEAN, var: torch.Tensor = VAR):
        signs = torch.cartesian_prod(*[torch.tensor([1.0, -1.0]).double()] * (2 * len(mean)))
        x_0, eps = mean + var.sqrt() * signs[:, : len(mean)], signs[:, len(mean) :]
        monkeypatch.setattr("ancestral.diffusion.process.randn_like", lambda x, rng: eps.to(x))
        return x_0

    return use


def exact_residuals(denoiser: Denoiser, x_0: torch.Tensor, steps: int | torch.Tensor, variance: str) -> Residuals:
    """The residuals at every time, from examples and noise whose averages are exact."""
    process, times = denoiser.process, grid(denoiser.process, steps).flip(0)
    guesses = [denoiser(process.marginal(x_0, t, stream(0))[0], t) for t in times]
    mse = torch.stack([(x_0 - guess).square().mean() for guess in guesses])
    var = mse if variance == "optimal" else process(times)[1].square()
    decoder = x_0.shape[1] / 2 * (gaussian.LOG_2PI + var.log() + mse / var)
    zero, prior = torch.zeros_like(mse), float(process.terminal_kl(x_0, times[-1]).mean())
    return Residuals(times, x_0.shape[1], mse, zero, decoder, zero, prior, variance)


def anything(T: int, variance: str = "optimal") -> Residuals:
    """Residuals that no law would have, in which nothing is monotone."""
    mse, decoder = randn((2, T), stream(5, T), dtype=torch.float64).exp()
    return Residuals(uniform(P.cosine(), T).flip(0), 3, mse, 0 * mse, decoder, 0 * mse, 0.25, variance)


def mean_bound(denoiser, x_0, steps, variance, **options) -> float:
    return float(bound(denoiser, x_0, steps, rng=stream(0), variance=variance, **options).nats.mean())


@pytest.mark.parametrize("name", P.SCHEDULES)
def test_residuals_of_the_exact_denoiser_are_the_posterior_variance(name):
    """On a Gaussian, mse_t = tr Cov[x_0|x_t] / D, and the decoder with v = mse_t costs D/2 log(2 pi e mse_t)."""
    process = P.named(name)
    oracle = normal(process)
    found = residuals(oracle, oracle.law.sample(4000, rng=stream(0)), 100, rng=stream(1))
    alpha, sigma = (c[:, None] for c in process(found.times))
    truth = (sigma**2 * VAR / (alpha**2 * VAR + sigma**2)).mean(1)
    assert ((found.mse - truth).abs() / found.mse_stderr).max() < 4
    assert (found.mse_stderr < 0.15 * truth).all()
    assert ((found.decoder - (2 * math.pi * math.e * truth).log()).abs() / found.decoder_stderr).max() < 4


def test_residuals_of_a_wrong_guess_are_its_mean_squared_error():
    """On a few times far apart, between which no curve is smooth."""
    process, law = P.cosine(), toys.named("ring-8")
    wrong, steps = Shrunken(OracleDenoiser(law, process)), process.time(torch.tensor([-9.0, -3.0, 3.0, 9.0]).double())
    found = residuals(wrong, law.sample(4000, rng=stream(0)), steps, rng=stream(1))
    x_0 = law.sample(20_000, rng=stream(2))
    for t, mse, stderr in zip(found.times, found.mse, found.mse_stderr, strict=True):
        x_t, _ = process.marginal(x_0, t, stream(3))
        truth, error = mean_and_stderr((wrong(x_t, t) - x_0).square().mean(1))
        assert abs(float(mse - truth)) < 4 * float((stderr**2 + error**2).sqrt())


def test_the_standard_error_is_the_deviation_of_the_means_and_smoothing_halves_it(monkeypatch):
    oracle = normal(P.cosine())

    def spread() -> torch.Tensor:
        """Deviation over repetitions, in claimed standard errors, at every time."""
        runs = [residuals(oracle, oracle.law.sample(500, rng=stream(0, i)), 30, rng=stream(1, i)) for i in range(100)]
        return torch.stack([run.mse for run in runs]).std(0) / torch.stack([run.mse_stderr for run in runs]).mean(0)

    smooth = spread()
    monkeypatch.setattr("ancestral.diffusion.respace._smoother", lambda knots, y, var: torch.eye(len(knots)).double())
    assert (spread().log().abs() < 0.35).all()
    assert (smooth < 1.3).all()
    assert smooth.median() < 0.7


def test_smoothing_removes_what_the_errors_explain_and_nothing_else():
    """A line stays as it is, noise around it is left with few degrees of freedom, and a kink beyond noise is kept."""
    knots = torch.linspace(0, 5, 64, dtype=torch.float64).square()
    line, kink = 1 + 0.3 * knots, (knots - 10).abs()
    var, noise = torch.full((64,), 0.01).double(), 0.1 * randn((64,), stream(0), dtype=torch.float64)
    S = smoother(knots, line + noise, var)
    torch.testing.assert_close(S @ line, line, rtol=1e-6, atol=0)
    assert S.trace() < 8
    assert (S @ noise).square().mean() < noise.square().mean() / 4
    kept = smoother(knots, kink + noise, var) @ (kink + noise)
    assert ((kept - kink).abs() < 0.4).all()


class Told(nn.Module):
    """What a network that knows classes would have to learn where class c is N(c, 0.04), to predict x_0."""

    classes = 2

    def forward(self, x, log_snr, labels):
        alpha, sigma = (c[:, None] for c in P.CONSTRAINTS["variance-preserving"](log_snr))
        mean = labels.double()[:, None]
        return mean + 0.04 * alpha / (0.04 * alpha**2 + sigma**2) * (x - alpha * mean)


def test_residuals_given_the_class_are_the_variance_within_it():
    process, labels = P.cosine(), torch.arange(2000) % 2
    given = Given(NetworkDenoiser(Told(), process, "x0"), labels)
    x_0 = labels.double()[:, None] + 0.2 * randn((2000, 1), stream(0), dtype=torch.float64)
    found = residuals(given, x_0, 50, rng=stream(1), batch=2000)
    alpha, sigma = process(found.times)
    truth = 0.04 * sigma**2 / (0.04 * alpha**2 + sigma**2)
    assert ((found.mse - truth).abs() / found.mse_stderr).max() < 4
    x_t, _ = process.marginal(x_0, found.times[20], stream(2))
    torch.testing.assert_close(Calibrated(given, found).moments(x_t, found.times[20])[0], given(x_t, found.times[20]))


def test_residuals_do_not_depend_on_how_the_examples_are_divided():
    oracle = normal(P.cosine())
    x_0 = oracle.law.sample(300, rng=stream(0))
    whole, parts = (residuals(oracle, x_0, 20, rng=streams(1, 300), batch=batch) for batch in (300, 7))
    torch.testing.assert_close(whole.mse, parts.mse, rtol=1e-12, atol=0)
    torch.testing.assert_close(whole.mse_stderr, parts.mse_stderr, rtol=1e-9, atol=0)


@pytest.mark.parametrize("name", P.SCHEDULES)
@pytest.mark.parametrize("T", [1, 2, 5, 50])
def test_calibrated_on_a_round_gaussian_the_gap_is_the_terminal_kl_at_every_T(exact_moments, name, T):
    mean, var, process = torch.tensor([0.3]).double(), torch.tensor([0.25]).double(), P.named(name)
    x_0, oracle = exact_moments(mean, var), normal(process, mean, var)
    calibrated = Calibrated(oracle, exact_residuals(oracle, x_0, T, "optimal"))
    alpha, sigma = process(1.0)
    terminal = gaussian.kl(alpha * mean, alpha**2 * var + sigma**2, torch.zeros(1).double(), process.prior_var())
    gap = mean_bound(calibrated, x_0, T, "optimal") - oracle.law.entropy()
    assert gap == pytest.approx(float(terminal), abs=1e-9)


def test_between_its_times_the_variance_of_a_unit_gaussian_is_still_exact():
    """(1 + SNR) mse is then 1 at any level of noise."""
    process, unit = P.cosine(), torch.ones(2).double()
    oracle = normal(process, 0 * unit, unit)
    times = uniform(process, 7).flip(0)
    mse = process(times)[1].square()
    calibrated = Calibrated(oracle, Residuals(times, 2, mse, 0 * mse, mse, 0 * mse, 0.0, "optimal"))
    t = torch.linspace(float(times[0]), 1, 30, dtype=torch.float64)
    x_t = torch.zeros(30, 2)
    torch.testing.assert_close(calibrated.moments(x_t, t), oracle.moments(x_t, t), rtol=1e-6, atol=0)
    assert isinstance(calibrated, HasVariance)


@pytest.mark.parametrize("T", [1, 2, 10, 100])
def test_for_a_wrong_guess_no_isotropic_variance_has_a_lower_bound(exact_moments, T):
    """Nor the fixed ones, nor any multiple of the mean squared error, in the sum or in a single term."""
    x_0, wrong = exact_moments(), Shrunken(normal(P.cosine()))
    measured = exact_residuals(wrong, x_0, T, "optimal")
    best = mean_bound(Calibrated(wrong, measured), x_0, T, "optimal")
    for variance in ("beta", "fixed-large", "fixed-small"):
        assert best < mean_bound(wrong, x_0, T, variance)
    for factor in (0.1, 0.5, 0.9, 0.99, 1.01, 1.1, 2.0, 10.0):
        scaled = Calibrated(wrong, replace(measured, mse=factor * measured.mse))
        assert best < mean_bound(scaled, x_0, T, "optimal")
        for s, t in pairwise(measured.times):
            least, other = (
                float(kl_term(denoiser, x_0, s, t, "optimal", stream(0)).mean())
                for denoiser in (Calibrated(wrong, measured), scaled)
            )
            assert least < other


def test_the_variance_of_the_guess_alone_is_worse_than_that_of_its_error(exact_moments):
    """Var[x_0|x_t] is optimal for E[x_0|x_t] only: of a wrong guess the bias belongs to the variance."""
    x_0, oracle = exact_moments(), normal(P.cosine())
    wrong = Shrunken(oracle)
    by_law, by_error = (
        mean_bound(Calibrated(wrong, exact_residuals(of, x_0, 20, "optimal")), x_0, 20, "optimal")
        for of in (oracle, wrong)
    )
    assert by_error < by_law - 0.1


@pytest.mark.parametrize("variance", [*FIXED, "optimal"])
@pytest.mark.parametrize("name", P.SCHEDULES)
def test_pair_terms_are_the_expected_terms_of_the_bound(exact_moments, name, variance):
    x_0, wrong = exact_moments(), Shrunken(normal(P.named(name)))
    measured = exact_residuals(wrong, x_0, 6, "optimal")
    terms, calibrated = pair_terms(wrong.process, measured, variance), Calibrated(wrong, measured)
    for i, j in combinations(range(6), 2):
        term = kl_term(calibrated, x_0, measured.times[i], measured.times[j], variance, stream(0)).mean()
        torch.testing.assert_close(terms[i, j], term, rtol=1e-9, atol=1e-12)
    assert torch.equal(terms.isfinite(), torch.ones(6, 6).triu(1).bool())


@pytest.mark.parametrize("name", P.SCHEDULES)
def test_pair_terms_have_their_closed_forms(name):
    """D/2 x for beta~ and D/2 log(1 + x) for the optimum, x = (SNR_s - SNR_t) mse_t."""
    process, found = P.named(name), anything(12)
    snr = process.log_snr(found.times).exp()
    x, above = (snr[:, None] - snr) * found.mse, torch.ones(12, 12).triu(1).bool()
    small, optimal = (pair_terms(process, found, variance)[above] for variance in ("fixed-small", "optimal"))
    torch.testing.assert_close(small, 1.5 * x[above], rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(optimal, 1.5 * x[above].log1p(), rtol=1e-9, atol=1e-12)


def test_with_constant_error_and_variance_beta_tilde_every_path_has_the_same_length():
    found = replace(anything(10), mse=torch.full((10,), 0.3).double())
    terms = pair_terms(P.cosine(), found, "fixed-small")
    for i, j, k in combinations(range(10), 3):
        torch.testing.assert_close(terms[i, j] + terms[j, k], terms[i, k])


@pytest.mark.parametrize("variance", ["beta", "optimal"])
def test_the_best_chain_is_the_best_of_all_sub_chains(variance):
    process, found = P.cosine(), anything(8, variance)
    terms = pair_terms(process, found, variance)

    def length(path: tuple[int, ...]) -> float:
        return float(found.decoder[path[0]] + sum(terms[s, t] for s, t in pairwise(path)) + found.prior)

    for K, chain in enumerate(best_chains(process, found, 8), 1):
        paths = [(*path, 7) for path in combinations(range(7), K - 1)]
        best = min(paths, key=length)
        assert chain.steps.tolist() == found.times[list(best)].flip(0).tolist()
        assert chain.nats == pytest.approx(length(best), rel=1e-12)
        assert best_chain(process, found, K).nats == chain.nats
    assert torch.equal(chain.steps, uniform(process, 8))
    assert len({chain.steps[-1].item() for chain in best_chains(process, found, 8)}) > 1


@pytest.mark.parametrize("variance", ["beta", "optimal"])
@pytest.mark.parametrize("name", P.SCHEDULES)
def test_the_predicted_bound_of_every_best_chain_is_its_bound(exact_moments, name, variance):
    """Without error on either side, and for a guess that is wrong."""
    x_0, wrong = exact_moments(), Shrunken(normal(P.named(name)))
    found = exact_residuals(wrong, x_0, 12, variance)
    for chain in best_chains(wrong.process, found, 12):
        measured = mean_bound(Calibrated(wrong, found), x_0, chain.steps, variance)
        assert measured == pytest.approx(chain.nats, rel=1e-9)


@pytest.mark.parametrize("name", P.SCHEDULES)
def test_one_step_more_never_costs_the_exact_denoiser_anything(exact_moments, name):
    """mse falls with the SNR at least as mse^2, so (1 + (SNR_s - SNR_u) mse_u) (1 + (SNR_u - SNR_t) mse_t) is at most
    1 + (SNR_s - SNR_t) mse_t: with the optimal variance a finer chain is never worse.

    Reference: Guo et al. (2011), Estimation in Gaussian noise, for the derivative of the error.
    """
    oracle = normal(P.named(name))
    chains = best_chains(oracle.process, exact_residuals(oracle, exact_moments(), 40, "optimal"), 40)
    assert all(coarse.nats >= fine.nats - 1e-12 for coarse, fine in pairwise(chains))
    assert chains[0].nats > chains[-1].nats + 0.1


@pytest.mark.parametrize("variance", ["beta", "optimal"])
@pytest.mark.parametrize("K", [3, 5, 10, 20])
def test_the_best_chain_beats_evenly_and_quadratically_spaced_ones(exact_moments, variance, K):
    """Of what K such steps lose to the density, by 5 % at the least; by a half against the even ones at K = 20."""
    x_0, oracle = exact_moments(), normal(P.cosine())
    fine = exact_residuals(oracle, x_0, 400, variance)
    chains = best_chain(oracle.process, fine, K).steps, uniform(oracle.process, K), quadratic(oracle.process, K)
    best, even, squared = (
        mean_bound(Calibrated(oracle, exact_residuals(oracle, x_0, steps, variance)), x_0, steps, variance)
        - oracle.law.entropy()
        for steps in chains
    )
    assert best < 0.95 * min(even, squared)


@pytest.mark.parametrize("variance", ["beta", "optimal"])
def test_what_is_measured_once_predicts_the_bound_on_other_examples(variance):
    law, process = toys.named("mixture"), P.cosine()
    oracle, seen, fresh = OracleDenoiser(law, process), law.sample(5000, rng=stream(0)), law.sample(5000, rng=stream(1))
    found = residuals(oracle, seen, 200, rng=stream(2), draws=16, variance=variance)
    for K in (2, 8, 30):
        chain = best_chain(process, found, K)
        measured = bound(Calibrated(oracle, found), fresh, chain.steps, rng=stream(3), variance=variance).nats
        gap, stderr = mean_and_stderr(measured + law.log_prob(fresh))
        assert abs(chain.nats + float(law.log_prob(seen).mean() - gap)) < 4 * float(stderr)


class Pixels:
    """Independent pixels that share a law on the levels, with its exact posterior under noise."""

    def __init__(self, pmf: torch.Tensor) -> None:
        self.pmf, self.values = pmf, torch.linspace(-1, 1, len(pmf), dtype=torch.float64)

    def posterior_mean(self, x_t, alpha, sigma):
        alpha, sigma = alpha.reshape(-1, 1, 1), sigma.reshape(-1, 1, 1)
        distance = (x_t[..., None] - alpha * self.values).square()
        return (self.pmf.log() - distance / (2 * sigma.square())).softmax(-1) @ self.values

    def draw(self, n: int, dim: int, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Examples, and -log p of each in nats."""
        level = torch.from_numpy(stream(seed).choice(len(self.pmf), (n, dim), p=self.pmf.numpy()))
        return self.values[level], -self.pmf[level].log().sum(1)


@pytest.mark.parametrize("variance", ["beta", "optimal"])
def test_on_data_with_levels_the_best_chain_halves_what_an_even_one_loses(variance):
    """32 pixels of 17 levels, most of them near three: the predicted bound is that of other examples too."""
    law, process, levels = Pixels((torch.linspace(-7, 7, 17).double().cos() * 2).softmax(0)), P.cosine(), 17
    denoiser = Clipped(OracleDenoiser(law, process))
    (seen, seen_nll), (fresh, fresh_nll) = law.draw(1000, 32, 0), law.draw(500, 32, 1)
    found = residuals(denoiser, seen, 200, rng=stream(2), variance=variance, levels=levels)
    calibrated = Calibrated(denoiser, found)
    for K in (4, 12, 40):
        chain = best_chain(process, found, K)
        best, even = (
            bound(calibrated, fresh, steps, rng=stream(3), variance=variance, levels=levels).nats - fresh_nll
            for steps in (chain.steps, K)
        )
        gap, stderr = mean_and_stderr(best)
        assert abs(chain.nats - float(seen_nll.mean() + gap)) < 5 * float(stderr)
        assert float(gap) < {"beta": 0.9, "optimal": 0.55}[variance] * float(even.mean())


@pytest.mark.parametrize("decoder", DECODERS)
def test_with_every_decoder_the_first_term_is_that_of_a_chain_which_starts_there(decoder):
    """On pixels of five levels, where noise is as wide as a level and half of one: as `likelihood.bound` has it."""
    law, process, levels = Pixels(torch.tensor([0.4, 0.1, 0.2, 0.1, 0.2]).double()), P.cosine(), 5
    denoiser, (x_0, _) = Clipped(OracleDenoiser(law, process)), law.draw(2000, 8, 0)
    options = {"variance": "optimal", "levels": levels, "decoder": decoder}
    found = residuals(denoiser, x_0, 200, rng=stream(1), **options)
    for first in (40, 60):
        measured = bound(
            Calibrated(denoiser, found), x_0, found.times[first:].flip(0), rng=stream(2), draws=1, **options
        )
        value, stderr = mean_and_stderr(measured.decoder)
        assert float(value) > 0.01
        assert abs(float(found.decoder[first] - value)) < 4 * float(
            (found.decoder_stderr[first] ** 2 + stderr**2) ** 0.5
        )


def test_every_sampler_takes_the_best_chain():
    law, process = toys.named("ring-8"), P.cosine()
    oracle = OracleDenoiser(law, process)
    found = residuals(oracle, law.sample(1000, rng=stream(0)), 100, rng=stream(1))
    chain = best_chain(process, found, 12)
    x = randn((50, 2), stream(2), dtype=torch.float64)
    for sampler in SAMPLERS.values():
        end = sampler(Calibrated(oracle, found), x, chain.steps, rng=stream(3))
        assert float((end.norm(dim=1) - 2).abs().mean()) < 0.5


def test_times_at_which_no_signal_is_left_are_one_level():
    process = P.straight()
    steps = torch.tensor([1.0, 1 - 1e-7, 1 - 1e-6, 0.9, 0.5, 0.1]).double()
    oracle = normal(process)
    found = residuals(oracle, oracle.law.sample(1000, rng=stream(0)), steps, rng=stream(1))
    assert ((found.mse[-3:] - VAR.mean()).abs() < 4 * found.mse_stderr[-3:]).all()
    assert math.isfinite(best_chain(process, found, 6).nats)


def test_illegal_requests_are_refused():
    oracle = normal(P.cosine())
    x_0 = oracle.law.sample(100, rng=stream(0))
    for K in (0, 9, -1):
        with pytest.raises(OptionError, match="sub-chains of 1 to 8 steps"):
            best_chain(oracle.process, anything(8), K)
    with pytest.raises(OptionError, match="unknown reverse variance"):
        pair_terms(oracle.process, anything(8), "large")
    for variance in ("fixed-small", "fixed-large", "large"):
        with pytest.raises(OptionError, match="'beta' or 'optimal'"):
            residuals(oracle, x_0, 8, rng=stream(0), variance=variance)
    with pytest.raises(OptionError, match="unknown decoder 'tan': did you mean 'tanh'"):
        residuals(oracle, x_0, 8, rng=stream(0), decoder="tan")
    with pytest.raises(OptionError, match="at least one draw"):
        residuals(oracle, x_0, 8, rng=stream(0), draws=0)
    with pytest.raises(OptionError, match="decreasing times"):
        residuals(oracle, x_0, uniform(oracle.process, 8).flip(0), rng=stream(0))
    with pytest.raises(OptionError, match="more examples or more draws"):
        residuals(oracle, x_0[:2], 1000, rng=stream(0))
    with pytest.raises(OptionError, match="randomness of 100 rows"):
        residuals(oracle, x_0, 8, rng=Rows((0,), 100), batch=7)
