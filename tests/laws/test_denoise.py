"""Parameterizations and the views of a denoiser: R3 and G2 of the derivation."""

import pytest
import torch
from torch import nn

from ancestral import toys
from ancestral.diffusion import process as P
from ancestral.diffusion.denoise import Clipped, NetworkDenoiser, OracleDenoiser, reverse
from ancestral.errors import OptionError
from ancestral.nets import MLP
from ancestral.rng import randn, stream
from oracles import COMBINATIONS, exact

TIMES = torch.linspace(0.05, 0.95, 7, dtype=torch.float64)


def noised(process: P.Process, seed: int = 0):
    """x_0, eps and x_t at TIMES."""
    x_0, eps = randn((2, len(TIMES), 3), stream(seed), dtype=torch.float64)
    alpha, sigma = (c[:, None] for c in process(TIMES))
    return x_0, eps, alpha, sigma, alpha * x_0 + sigma * eps


@pytest.mark.parametrize(("name", "predicts"), COMBINATIONS)
def test_a_network_that_outputs_the_target_is_the_denoiser(name, predicts):
    """Each row, fed what its paper defines as the target, returns x_0."""
    process = P.named(name)
    x_0, eps, alpha, sigma, x_t = noised(process)
    targets = {
        "x0": x_0,
        "eps": eps,
        "score": -eps / sigma,
        "v": alpha * eps - sigma * x_0,
        "velocity": eps - x_0,
        "edm": ((alpha**2 + sigma**2) * x_0 - alpha * x_t) / (sigma * (alpha**2 + sigma**2).sqrt()),
    }

    class Target(nn.Module):
        def forward(self, x, log_snr):
            return targets[predicts]

    denoiser = NetworkDenoiser(Target(), process, predicts)
    torch.testing.assert_close(denoiser(x_t, TIMES), x_0, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize(
    ("predicts", "weight"),
    [
        ("x0", lambda a, s, d: 1 + 0 * a),
        ("eps", lambda a, s, d: a**2 / s**2),
        ("v", lambda a, s, d: 1 + a**2 / s**2),
        ("edm", lambda a, s, d: (s**2 / a**2 + d**2) / (s * d / a) ** 2),
        ("velocity", lambda a, s, d: (1 + a / s) ** 2),
    ],
)
def test_the_squared_error_over_c_out_recovers_the_published_weight(predicts, weight):
    process = P.straight() if predicts == "velocity" else P.edm() if predicts == "edm" else P.cosine()
    d = 0.5 if predicts == "edm" else 1.0
    _, c_out, _ = NetworkDenoiser(nn.Identity(), process, predicts, sigma_data=d).coefficients(TIMES)
    torch.testing.assert_close(1 / c_out**2, weight(*process(TIMES), d), rtol=1e-10, atol=0)


@pytest.mark.parametrize("name", P.SCHEDULES)
def test_edm_row_has_unit_input_and_unit_target(name):
    """c_in brings x_t, and c_out the target, to unit variance for data of standard deviation sigma_data."""
    process, d = P.named(name), 0.7
    c_skip, c_out, c_in = NetworkDenoiser(nn.Identity(), process, "edm", sigma_data=d).coefficients(TIMES)
    alpha, sigma = process(TIMES)
    one = torch.ones_like(TIMES)
    torch.testing.assert_close(c_in**2 * (alpha**2 * d**2 + sigma**2), one, rtol=1e-12, atol=0)
    target_var = ((1 - c_skip * alpha) ** 2 * d**2 + c_skip**2 * sigma**2) / c_out**2
    torch.testing.assert_close(target_var, one, rtol=1e-9, atol=0)


@pytest.mark.parametrize(("name", "predicts"), COMBINATIONS)
def test_views_of_the_exact_denoiser_are_the_exact_score_noise_and_velocity(name, predicts):
    toy, process = toys.named("mixture"), P.named(name)
    denoiser = exact(toy, process, predicts)
    for t in (0.1, 0.5, 0.9):
        alpha, sigma = process(t)
        x_t = toy.diffused(float(alpha), float(sigma)).sample(50, rng=stream(1))
        score = toy.diffused(float(alpha), float(sigma)).score(x_t)
        torch.testing.assert_close(denoiser.score(x_t, t), score, rtol=1e-6, atol=1e-7)
        torch.testing.assert_close(denoiser.eps(x_t, t), -sigma * score, rtol=1e-6, atol=1e-7)
        x_0_hat = (x_t + sigma**2 * score) / alpha
        torch.testing.assert_close(denoiser.velocity(x_t, t), -sigma * score - x_0_hat, rtol=1e-5, atol=1e-6)


def test_optimal_reverse_variance_is_that_of_the_exact_reverse_transition():
    """On a Gaussian p(x_s|x_t) is Gaussian: its mean and variance by conditioning equal `reverse` with 'optimal'."""
    process, S = P.linear(), 0.4
    oracle = OracleDenoiser(toys.gaussian(torch.tensor([0.3]), torch.tensor([[S]])), process)
    s, t = 0.3, 0.5
    (alpha_s, sigma_s), (a, v) = process(s), process.transition(s, t)
    x_t = torch.tensor([[-1.0], [0.5]], dtype=torch.float64)
    marginal_mean, marginal_var = alpha_s * 0.3, alpha_s**2 * S + sigma_s**2
    precision = 1 / marginal_var + a**2 / v
    mean, var, _ = reverse(oracle, x_t, s, t, "optimal")
    torch.testing.assert_close(mean, (marginal_mean / marginal_var + a * x_t / v) / precision)
    torch.testing.assert_close(var, (1 / precision).expand(2, 1))


def test_clipping_brings_the_guess_closer_to_any_data_in_range():
    oracle = OracleDenoiser(toys.gaussian(torch.zeros(3), 2 * torch.eye(3)), P.cosine())
    x_0, _, _, _, x_t = noised(P.cosine())
    x_0 = x_0.clamp(-1, 1)
    plain, clipped = oracle(x_t, TIMES), Clipped(oracle)(x_t, TIMES)
    assert ((clipped - x_0).abs() <= (plain - x_0).abs()).all()
    assert ((clipped - x_0).abs() < (plain - x_0).abs()).any()


def test_illegal_combinations_are_refused_with_a_sentence():
    for predicts in ("eps", "score"):
        with pytest.raises(OptionError, match="undefined at t = 1"):
            NetworkDenoiser(nn.Identity(), P.straight(), predicts)
    with pytest.raises(OptionError, match="unknown parameterization 'epsilon'"):
        NetworkDenoiser(nn.Identity(), P.cosine(), "epsilon")
    denoiser, x = NetworkDenoiser(MLP((2,), 8, 1), P.cosine()), torch.zeros(1, 2)
    with pytest.raises(OptionError, match="needs a network that knows"):
        reverse(denoiser, x, 0.1, 0.2, "optimal")
    with pytest.raises(OptionError, match="did you mean 'fixed-large'"):
        reverse(denoiser, x, 0.1, 0.2, "fixed_large")
