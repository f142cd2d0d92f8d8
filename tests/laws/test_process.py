"""The forward process: F1-F5 and R2 of the derivation, on every schedule."""

import math
from itertools import pairwise

import pytest
import torch
from torch.distributions import Normal

from ancestral import gaussian
from ancestral.diffusion import process as P
from ancestral.diffusion.denoise import NetworkDenoiser
from ancestral.errors import OptionError
from ancestral.rng import rand, randn, stream

SCHEDULES = [*P.SCHEDULES, "betas", "zero-terminal"]
TABLE = torch.tensor([0.3, 0.1, 0.2, 0.05, 0.4])


def schedule(name: str) -> P.Process:
    if name == "zero-terminal":
        return P.zero_terminal(P.linear())
    return P.from_betas(TABLE) if name == "betas" else P.named(name)


def random_times(n: int, seed: int = 0) -> torch.Tensor:
    return rand((n,), stream(seed)).sort().values


@pytest.mark.parametrize("name", SCHEDULES)
def test_transitions_compose_to_the_marginal_on_any_grid(name):
    process = schedule(name)
    alpha, var = torch.ones((), dtype=torch.float64), torch.zeros((), dtype=torch.float64)
    times = [0.0, *random_times(50).tolist(), 1.0]
    for s, t in pairwise(times):
        a, v = process.transition(s, t)
        alpha, var = a * alpha, a**2 * var + v
    alpha_T, sigma_T = process(1.0)
    torch.testing.assert_close(alpha, alpha_T, rtol=1e-12, atol=1e-15)
    torch.testing.assert_close(var, sigma_T**2, rtol=1e-12, atol=0)


@pytest.mark.parametrize("name", SCHEDULES)
def test_posterior_is_bayes(name):
    """q(x_s|x_t, x_0) q(x_t|x_0) = q(x_t|x_s) q(x_s|x_0) at random points."""
    process, draw = schedule(name), stream(1)
    s, t = rand((2, 200), draw).mul(0.99).add(0.005).sort(0).values
    x_0, x_s, x_t = randn((3, 200, 1), draw, dtype=torch.float64)
    (alpha_s, sigma_s), (alpha_t, sigma_t) = ((a[:, None], b[:, None]) for a, b in (process(s), process(t)))
    x_s, x_t = alpha_s * x_0 + sigma_s * x_s, alpha_t * x_0 + sigma_t * x_t
    a, v = (c[:, None] for c in process.transition(s, t))
    mean, var = process.posterior(x_t, x_0, s, t)
    log = gaussian.log_density
    left = log(x_s, mean, var) + log(x_t, alpha_t * x_0, sigma_t**2)
    right = log(x_t, a * x_s, v) + log(x_s, alpha_s * x_0, sigma_s**2)
    torch.testing.assert_close(left, right, rtol=1e-8, atol=1e-8)


@pytest.mark.parametrize("name", ["linear", "scaled-linear", "cosine", "sigmoid", "betas"])
def test_three_forms_of_the_posterior_mean_agree(name):
    """Ho et al. eqs. 6-7 in betas, the same through eps, and precision weighting, to float64 rounding."""
    process = schedule(name)
    T = 5 if name == "betas" else 1000
    chain = process.chain(T)
    t = torch.arange(2, T + 1, dtype=torch.float64)
    beta, ab, ab_prev = chain.betas[1:], chain.alpha_bar[1:], chain.alpha_bar[:-1]
    x_0, eps = randn((2, len(t), 1), stream(2), dtype=torch.float64)
    x_t = ab.sqrt()[:, None] * x_0 + (1 - ab).sqrt()[:, None] * eps
    mean, var = process.posterior(x_t, x_0, (t - 1) / T, t / T)

    in_betas = ((1 - beta).sqrt() * (1 - ab_prev) / (1 - ab))[:, None] * x_t
    in_betas += (ab_prev.sqrt() * beta / (1 - ab))[:, None] * x_0
    through_eps = (x_t - (beta / (1 - ab).sqrt())[:, None] * eps) / (1 - beta).sqrt()[:, None]
    a, v = (c[:, None] for c in process.transition((t - 1) / T, t / T))
    precision = a**2 / v + 1 / (1 - ab_prev)[:, None]
    weighted = (a * x_t / v + (ab_prev.sqrt() / (1 - ab_prev))[:, None] * x_0) / precision
    for other in (in_betas, through_eps, weighted):
        torch.testing.assert_close(other, mean, rtol=1e-11, atol=1e-11)
    torch.testing.assert_close(1 / precision, var, rtol=1e-10, atol=0)
    torch.testing.assert_close(((1 - ab_prev) / (1 - ab) * beta)[:, None], var, rtol=1e-10, atol=0)


@pytest.mark.parametrize("name", SCHEDULES)
def test_posterior_variance_is_at_most_the_transition_variance(name):
    process = schedule(name)
    times = torch.arange(1001, dtype=torch.float64) / 1000
    s, t = times[:-1], times[1:]
    beta_tilde, beta = process.posterior_coefficients(s, t)[2], process.transition(s, t)[1]
    assert beta_tilde[0] == 0
    assert (beta_tilde <= beta).all()
    if process.chain(1000).increasing:
        assert ((beta_tilde / beta).diff() > -1e-12).all()


@pytest.mark.parametrize("name", SCHEDULES)
def test_log_snr_decreases_from_the_data_and_its_inverse_is_time(name):
    process, t = schedule(name), random_times(100)
    assert process.log_snr(0.0) == math.inf
    assert (process.log_snr(t).diff() < 0).all()
    torch.testing.assert_close(process.time(process.log_snr(t)), t, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("name", SCHEDULES)
def test_rate_is_the_derivative_of_log_snr(name):
    process, t, h = schedule(name), 0.02 + 0.96 * random_times(50), 1e-7
    if name in ("linear", "scaled-linear", "betas"):
        h = 1e-9  # the curve has corners at its knots
    slope = (process.log_snr(t - h) - process.log_snr(t + h)) / (2 * h)
    torch.testing.assert_close(process.rate(t), slope, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", SCHEDULES)
def test_alpha_and_sigma_keep_the_constraint_and_the_log_snr(name):
    process, t = schedule(name), random_times(100)
    alpha, sigma = process(t)
    total = {
        "variance-preserving": alpha**2 + sigma**2,
        "variance-exploding": alpha,
        "straight": alpha + sigma,
    }[process.constraint]
    torch.testing.assert_close(total, torch.ones_like(t), rtol=1e-14, atol=0)
    torch.testing.assert_close((alpha / sigma).log() * 2, process.log_snr(t), rtol=1e-12, atol=1e-12)


def test_linear_is_the_published_table_and_keeps_its_curve_at_other_lengths():
    betas = torch.linspace(1e-4, 0.02, 1000, dtype=torch.float64)
    chain = P.linear().chain(1000)
    torch.testing.assert_close(chain.betas, betas, rtol=1e-11, atol=0)
    assert float(chain.alpha_bar[-1]) == pytest.approx(4.036e-5, rel=1e-3)
    torch.testing.assert_close(P.linear().chain(100).alpha_bar, chain.alpha_bar[9::10], rtol=1e-13, atol=0)


def test_cosine_is_the_published_curve():
    t = torch.linspace(0, 0.9, 10, dtype=torch.float64)
    f = ((t + 0.008) / 1.008 * math.pi / 2).cos() ** 2
    torch.testing.assert_close(P.cosine(log_snr_min=-60)(t)[0] ** 2, f / f[0], rtol=1e-9, atol=0)


@pytest.mark.parametrize("T", [10, 1000])
@pytest.mark.parametrize("name", ["linear", "scaled-linear", "cosine", "sigmoid", "log-linear", "betas"])
def test_zero_terminal_is_the_published_rescaling_of_the_chain(name, T):
    """alpha is shifted to 0 at the end and scaled to what it was at the first step, and falls all the way."""
    process = schedule(name)
    rescaled = P.zero_terminal(process, T)
    t = torch.arange(1, T + 1, dtype=torch.float64) / T
    alpha, after = process(t)[0], rescaled(t)[0]
    published = (alpha - alpha[-1]) * alpha[0] / (alpha[0] - alpha[-1])
    torch.testing.assert_close(after, published, rtol=1e-12, atol=1e-15)
    assert after[-1] == 0
    assert rescaled(1.0)[1] == 1
    torch.testing.assert_close(rescaled(1 / T)[1], process(1 / T)[1], rtol=1e-12, atol=0)
    assert (rescaled.log_snr(torch.linspace(0, 1, 5000, dtype=torch.float64)).diff() < 0).all()
    assert (rescaled.terminal_kl(torch.ones(2, 3)) == 0).all()
    again = P.zero_terminal(rescaled, T)
    torch.testing.assert_close(again(t)[0], after, rtol=1e-12, atol=0)


@pytest.mark.parametrize("name", ["edm", "straight"])
def test_only_a_variance_preserving_process_is_rescaled(name):
    with pytest.raises(OptionError, match=r"only a variance-preserving process is rescaled.*choose another schedule"):
        P.zero_terminal(P.named(name))


@pytest.mark.parametrize("predicts", ["eps", "score"])
def test_noise_and_score_say_nothing_where_no_signal_is_left(predicts):
    with pytest.raises(OptionError, match=r"where no signal is left.*predict 'v'"):
        NetworkDenoiser(torch.nn.Identity(), P.zero_terminal(P.linear()), predicts)


def test_edm_times_are_log_normal_noise_levels():
    """Uniform times give log sigma ~ N(-1.2, 1.2^2), up to the cut at 80."""
    t = (torch.arange(20000, dtype=torch.float64) + 0.5) / 20000
    log_sigma = P.edm()(t)[1].log()
    assert float(log_sigma.mean()) == pytest.approx(-1.2, abs=2e-3)
    assert float(log_sigma.std()) == pytest.approx(1.2, abs=2e-3)


def test_chain_of_a_user_is_the_table_and_need_not_increase():
    chain = P.from_betas(TABLE).chain(5)
    torch.testing.assert_close(chain.betas, TABLE.double(), rtol=1e-12, atol=0)
    assert not chain.increasing
    assert P.linear().chain(1000).increasing


def test_a_beta_outside_its_range_is_refused_with_its_place():
    with pytest.raises(OptionError, match=r"step 3 of 4 has 1\.5"):
        P.from_betas([0.1, 0.2, 1.5, 0.3])
    with pytest.raises(OptionError, match="step 1 of 2 has 0"):
        P.from_betas([0.0, 0.2])


def test_a_curve_that_is_not_a_noising_chain_is_refused_with_the_place():
    with pytest.raises(OptionError, match="does not at step 501 of 1000"):
        P.Process(lambda t: torch.where(t <= 0.5, -t.log(), 1 + t))
    with pytest.raises(OptionError, match="start at the data"):
        P.Process(lambda t: 5 - t)
    with pytest.raises(OptionError, match="T = 0"):
        P.linear().chain(0)
    with pytest.raises(OptionError, match="did you mean 'cosine'"):
        P.named("cosin")


def test_what_the_chain_has_not_forgotten_falls_with_its_last_log_snr():
    x_0 = randn((100, 8), stream(3))
    left = [float(P.cosine(log_snr_min=end).terminal_kl(x_0).mean()) for end in (-2, -4, -8, -12, -16)]
    assert all(a > 2 * b for a, b in pairwise(left))
    assert 0 <= left[-1] < 1e-6
    assert float(P.straight().terminal_kl(x_0).abs().max()) == 0


def test_marginal_has_the_moments_it_declares():
    x_0 = torch.full((200_000, 1), 0.7, dtype=torch.float64)
    process = P.sigmoid()
    x_t, eps = process.marginal(x_0, 0.4, stream(4))
    alpha, sigma = process(0.4)
    noise = Normal(0.0, 1.0)
    assert float((x_t.mean() - 0.7 * alpha).abs()) < 4 * float(sigma) / 200_000**0.5
    assert float(x_t.var() / sigma**2) == pytest.approx(1, abs=4 * (2 / 200_000) ** 0.5)
    below = (eps < 0.5).double().mean()
    assert float(below) == pytest.approx(float(noise.cdf(torch.tensor(0.5))), abs=4 * 0.5 / 200_000**0.5)
