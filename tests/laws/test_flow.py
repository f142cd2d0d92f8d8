"""The probability-flow likelihood against densities and probabilities that are known exactly."""

import math

import pytest
import torch

from ancestral import gaussian, ode, toys
from ancestral.diffusion import process as P
from ancestral.diffusion.denoise import NetworkDenoiser, OracleDenoiser
from ancestral.diffusion.flow import (
    COMBINATIONS,
    DEQUANTIZATIONS,
    decode,
    encode,
    end,
    flow_likelihood,
    slope,
    truncated_normal,
    variational,
)
from ancestral.diffusion.likelihood import mean_and_stderr
from ancestral.errors import OptionError
from ancestral.nets import MLP
from ancestral.rng import randn, stream, streams
from oracles import COMBINATIONS as ROWS_ON_SCHEDULES
from oracles import FiniteSet, exact

TIGHT = {"rtol": 1e-8, "atol": 1e-8}
MEAN, COV = torch.tensor([0.3, -0.6]).double(), torch.tensor([[0.5, 0.2], [0.2, 0.3]]).double()


def at_the_end(law, process):
    """The law of x_T where the flow ends."""
    log_snr_T, _ = end(process)
    return law.diffused(*(float(c) for c in process(process.time(log_snr_T))))


def levels_of(log_snr):
    """alpha and sigma in variance-preserving scale."""
    return (float(c) for c in P.CONSTRAINTS["variance-preserving"](torch.tensor(log_snr, dtype=torch.float64)))


@pytest.mark.parametrize(("name", "predicts"), ROWS_ON_SCHEDULES)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_field_and_divergence_are_those_of_the_posterior(name, predicts, dtype):
    """dx/d lambda = alpha/2 (E[x_0|x] - alpha x), of divergence alpha^2/2 (tr Cov[x_0|x] / sigma^2 - D)."""
    law, process = toys.named("mixture"), P.named(name)
    log_snr_T, _ = end(process)
    log_snr = torch.linspace(log_snr_T, 10, 12, dtype=torch.float64)
    alpha, sigma = P.CONSTRAINTS["variance-preserving"](log_snr)
    x = alpha[:, None] * law.sample(12, rng=stream(0)) + sigma[:, None] * randn((12, 2), stream(1), dtype=torch.float64)
    denoiser = exact(law, process, predicts)
    value, divergence = ode.divergence_exact(lambda x: slope(denoiser, log_snr, x, dtype), x)
    expected = alpha[:, None] / 2 * (law.posterior_mean(x, alpha, sigma) - alpha[:, None] * x)
    trace = law.posterior_cov(x, alpha, sigma).diagonal(dim1=1, dim2=2).sum(1)
    accuracy = {"rtol": 1e-8, "atol": 1e-8} if dtype == torch.float64 else {"rtol": 1e-3, "atol": 1e-3}
    torch.testing.assert_close(value, expected, **accuracy)
    torch.testing.assert_close(divergence, alpha**2 / 2 * (trace / sigma**2 - 2), **accuracy)


@pytest.mark.parametrize(("name", "toy"), [*((name, "mixture") for name in P.SCHEDULES), ("straight", "gaussian")])
def test_the_density_is_exact_up_to_where_the_flow_begins(name, toy):
    """With the true p_T the error is proportional to exp(-log_snr_max), and is all there is: identity 30."""
    law, process = toys.named(toy), P.named(name)
    x_0, terminal = law.sample(4, rng=stream(0)), at_the_end(law, process).log_prob
    oracle = OracleDenoiser(law, process)
    errors = [
        flow_likelihood(oracle, x_0, rng=0, log_snr_max=start, terminal=terminal, **TIGHT).nats + law.log_prob(x_0)
        for start in (8.0, 11.0)
    ]
    torch.testing.assert_close(errors[0] / errors[1], torch.full((4,), math.exp(3)).double(), rtol=0.03, atol=0)
    assert float(errors[1].abs().max()) < 1e-3


def test_at_the_default_start_nothing_is_left_but_the_tolerance():
    law, process = toys.named("mixture"), P.straight()
    x_0, terminal = law.sample(5, rng=stream(0)), at_the_end(law, process).log_prob
    for tol, bound in ((1e-4, 2e-3), (1e-6, 2e-5), (1e-8, 1e-7)):
        result = flow_likelihood(OracleDenoiser(law, process), x_0, rng=0, rtol=tol, atol=tol, terminal=terminal)
        assert float((result.nats + law.log_prob(x_0)).abs().max()) < bound
        torch.testing.assert_close(result.nats, result.prior + result.divergence + result.dequantization)
        assert result.kind == "exact"
        assert result.stderr is None


@pytest.mark.parametrize("name", P.SCHEDULES)
def test_the_latent_of_a_gaussian_is_its_closed_form_map(name):
    """x_T = alpha_T m + C_T^(1/2) C_0^(-1/2) alpha_0 (x_0 - m), in the process's own scale: identity 32."""
    process, law = P.named(name), toys.gaussian(MEAN, COV)
    x_0 = law.sample(5, rng=stream(0))
    values, vectors = torch.linalg.eigh(COV)
    log_snr_T, _ = end(process)
    alpha_0, sigma_0 = levels_of(16.0)
    alpha_T, sigma_T = process(process.time(log_snr_T))
    ratio = ((alpha_T**2 * values + sigma_T**2) / (alpha_0**2 * values + sigma_0**2)).sqrt()
    expected = alpha_T * MEAN + alpha_0 * (x_0 - MEAN) @ (vectors * ratio) @ vectors.T
    oracle = OracleDenoiser(law, process)
    z = encode(oracle, x_0, log_snr_max=16.0, rtol=1e-7, atol=1e-7)
    torch.testing.assert_close(z, expected, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("name", P.SCHEDULES)
def test_encoding_then_decoding_returns_to_the_start(name):
    """Up to the tolerance, which is all that is lost: identity 31."""
    oracle = OracleDenoiser(toys.named("mixture"), P.named(name))
    x_0 = toys.named("mixture").sample(6, rng=stream(0))
    for tol in (1e-3, 1e-6):
        there = encode(oracle, x_0, rtol=tol, atol=tol)
        back = decode(oracle, there, rtol=tol, atol=tol)
        assert float((back - x_0).abs().max()) < 30 * tol


def test_an_assumed_terminal_law_leaves_an_error_that_no_tolerance_removes():
    """The error is log p(x_T)/q(x_T) at the latent, whose mean over the data is KL(q(x_T) || p(x_T))."""
    law, process = toys.named("gaussian"), P.linear()
    x_0 = law.sample(200, rng=stream(0))
    oracle, q_T = OracleDenoiser(law, process), at_the_end(law, process)
    for tol in (1e-4, 1e-6):
        result = flow_likelihood(oracle, x_0, rng=0, rtol=tol, atol=tol)
        x_T = result.latent[:, 0]
        p_T = gaussian.log_density(x_T, torch.zeros(()), process.prior_var()).sum(1)
        error = result.nats + law.log_prob(x_0)
        torch.testing.assert_close(error, q_T.log_prob(x_T) - p_T, rtol=0, atol=100 * tol)
        assert float(error.abs().max()) > 1e-3
    var_T = process.prior_var()
    kl = 0.5 * (q_T.cov.trace() / var_T + q_T.mean.square().sum() / var_T - 2 - (q_T.cov / var_T).logdet())
    mean, stderr = mean_and_stderr(error)
    assert abs(float(mean - kl)) < 4 * float(stderr)


def test_a_process_and_its_rescaling_have_the_same_likelihood():
    """One log-SNR curve under two constraints: latents differ by sqrt(alpha_T^2 + sigma_T^2), and nothing else does."""
    law, preserving = toys.named("mixture"), P.linear()
    exploding = P.Process(preserving.log_snr_curve, "variance-exploding")
    x_0 = law.sample(5, rng=stream(0))
    ours, theirs = (flow_likelihood(OracleDenoiser(law, process), x_0, rng=0) for process in (preserving, exploding))
    torch.testing.assert_close(ours.nats, theirs.nats, rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(ours.latent * exploding.prior_var().sqrt(), theirs.latent, rtol=1e-10, atol=1e-10)


def test_the_density_of_any_network_integrates_to_one():
    """The flow is a bijection whatever the network: here one with random weights, far from any denoiser.

    It sees no waves of its input: with random weights they make a density too narrow in places for 241 points.
    """
    net = MLP((1,), width=16, depth=2, octaves=0).double()
    with torch.no_grad():
        for k, parameter in enumerate(net.parameters()):
            parameter.copy_(0.25 * randn(parameter.shape, stream(3, k), dtype=torch.float64))
    x = torch.linspace(-12, 12, 241, dtype=torch.float64)
    result = flow_likelihood(NetworkDenoiser(net, P.straight()), x[:, None], rng=0)
    p = (-result.nats).exp()
    assert float(p[[0, -1]].max()) < 1e-6
    assert float(torch.trapezoid(p, x)) == pytest.approx(1, abs=3e-4)
    assert float((p - gaussian.log_density(x, x.mean(), x.new_ones(())).exp()).abs().max()) > 0.05


# Independent pixels on levels, of which P(x_0), and the density of z at every noise level, are known.

LEVELS = 5
PMF = torch.tensor([[0.5, 0.2, 0.1, 0.1, 0.1], [0.05, 0.05, 0.1, 0.1, 0.7]]).double()
POINTS = torch.cartesian_prod(*[torch.linspace(-1, 1, LEVELS).double()] * 2)
WEIGHTS = torch.outer(*PMF).flatten()


def blurred(alpha, sigma):
    """The law of alpha x_0 + sigma eps."""
    return toys.Mixture("pixels", WEIGHTS, alpha * POINTS, sigma**2 * torch.eye(2).expand(len(POINTS), 2, 2))


def log_weights(dequantization, x_0, log_snr, draws, rng):
    """log p(z) P(x_0|z) / q(z|x_0) from the law itself, and z."""
    dequantize, _ = DEQUANTIZATIONS[dequantization]
    x = x_0[:, None].expand(-1, draws, *x_0.shape[1:])
    z, cost = dequantize(x, LEVELS, torch.tensor(log_snr, dtype=torch.float64), rng)
    return blurred(*levels_of(log_snr)).log_prob(z.flatten(0, 1)).reshape(cost.shape) - cost, z


def log_decoder(x_0, z, log_snr):
    """log P(x_0|z) by Bayes' rule, if all levels of all pixels were as likely."""
    alpha_0, sigma_0 = levels_of(log_snr)
    values, var = torch.linspace(-1, 1, LEVELS, dtype=torch.float64), torch.tensor(sigma_0**2, dtype=torch.float64)
    log_p = gaussian.log_density(z[..., None], alpha_0 * values, var).log_softmax(-1)
    level = ((x_0 + 1) * (LEVELS - 1) / 2).round().long()
    return log_p.gather(-1, level[:, None, :, None].expand(*z.shape, 1)).sum((2, 3))


def default_start(dequantization):
    _, half_bin = DEQUANTIZATIONS[dequantization]
    return 2 * math.log(half_bin * (LEVELS - 1))


@pytest.mark.parametrize("combine", COMBINATIONS)
@pytest.mark.parametrize("dequantization", DEQUANTIZATIONS)
def test_on_levels_the_flow_gives_the_weights_of_the_law(dequantization, combine):
    """Draw for draw, with the same noise: log p(z) from the solver is that of the mixture which z belongs to."""
    process = P.straight()
    log_snr_T, _ = end(process)
    terminal = blurred(*(float(c) for c in process(process.time(log_snr_T)))).log_prob
    result = flow_likelihood(
        OracleDenoiser(FiniteSet(POINTS, WEIGHTS), process),
        POINTS,
        rng=7,
        levels=LEVELS,
        dequantization=dequantization,
        draws=3,
        combine=combine,
        terminal=terminal,
        rtol=1e-6,
        atol=1e-6,
    )
    log_w, _ = log_weights(dequantization, POINTS, default_start(dequantization), 3, streams(7, len(POINTS)))
    combined = {"mean": log_w.mean(1), "importance": log_w.exp().mean(1).log()}[combine]
    torch.testing.assert_close(-result.nats, combined, rtol=0, atol=1e-4)
    parts = result.prior + result.divergence + result.dequantization
    torch.testing.assert_close(-parts, log_w.mean(1), rtol=0, atol=1e-4)
    assert result.kind == "lower bound"


@pytest.mark.parametrize("half_bin", [None, 1.0])
@pytest.mark.parametrize("dequantization", DEQUANTIZATIONS)
def test_dequantizations_bound_the_probability_and_importance_is_tighter(dequantization, half_bin):
    """E_P[-log P(x_0)] <= the bound of many draws combined by importance < the mean of single draws.

    And that is at most what it would be if levels did not meet, p(z) = P(x_0) N(z; alpha_0 x_0, sigma_0^2).
    """
    log_snr = default_start(dequantization) if half_bin is None else 2 * math.log(half_bin * (LEVELS - 1))
    repeats = 400
    x_0 = POINTS.repeat(repeats, 1)
    log_w, z = log_weights(dequantization, x_0, log_snr, 8, stream(0))
    entropy = -float(WEIGHTS @ WEIGHTS.log())

    def gap(combine):
        """Over the law of the data, in nats, with its standard error."""
        log_p, _ = COMBINATIONS[combine](log_w)
        log_p = log_p.reshape(repeats, -1)
        stderr = (WEIGHTS.square() @ log_p.var(0) / repeats).sqrt()
        return -float(WEIGHTS @ log_p.mean(0)) - entropy, float(stderr)

    (single, single_err), (many, many_err) = gap("mean"), gap("importance")
    assert many > -4 * many_err
    assert single > many
    tau = half_bin or DEQUANTIZATIONS[dequantization][1]
    alone = {
        "truncated-normal": -math.log(math.erf(tau / 2**0.5)),
        "uniform": 0.5 * math.log(2 * math.pi) - math.log(2 * tau) + tau**2 / 6,
        "variational": -float(WEIGHTS @ log_decoder(x_0, z, log_snr).reshape(repeats, -1, 8).mean((0, 2))) / 2,
    }
    assert single < 2 * alone[dequantization] + 4 * single_err


def test_the_standard_error_over_draws_is_that_of_repeating_them():
    process = P.straight()
    oracle = OracleDenoiser(FiniteSet(POINTS, WEIGHTS), process)
    x_0 = POINTS[13:14].expand(200, 2)
    for combine in COMBINATIONS:
        result = flow_likelihood(
            oracle, x_0, rng=0, levels=LEVELS, dequantization="uniform", draws=16, combine=combine, rtol=1e-3, atol=1e-3
        )
        assert float(result.stderr.square().mean().sqrt() / result.nats.std()) == pytest.approx(1, abs=0.2)


def test_the_truncated_normal_has_its_entropy_and_stays_in_its_bin():
    """E[log q]/D = -1/2 (1 + log 2 pi sigma_0^2) - log Z + tau exp(-tau^2/2) / (sqrt(2 pi) Z), as i-DODE writes it."""
    x_0 = torch.zeros(1, 20_000, 1).double()
    for tau in (0.3, 1.0, 3.0, 12.0):
        log_snr = 2 * math.log(tau * (LEVELS - 1))
        alpha_0, sigma_0 = levels_of(log_snr)
        z, log_q = truncated_normal(x_0, LEVELS, torch.tensor(log_snr, dtype=torch.float64), stream(0))
        Z = math.erf(tau / 2**0.5)
        tail = tau * math.exp(-(tau**2) / 2) / ((2 * math.pi) ** 0.5 * Z)
        expected = -0.5 * (1 + math.log(2 * math.pi * sigma_0**2)) - math.log(Z) + tail
        mean, stderr = mean_and_stderr(log_q[0])
        assert abs(float(mean) - expected) < 4 * float(stderr)
        assert float(z.abs().max()) <= alpha_0 / (LEVELS - 1) * (1 + 1e-12)


def test_the_variational_decoder_is_bayes_rule_over_equally_likely_levels():
    log_snr = 2.0
    z, cost = variational(POINTS[:, None], LEVELS, torch.tensor(log_snr, dtype=torch.float64), streams(0, len(POINTS)))
    alpha_0, sigma_0 = levels_of(log_snr)
    var = torch.tensor(sigma_0**2, dtype=torch.float64)
    log_q = gaussian.log_density(z, alpha_0 * POINTS[:, None], var).sum(2)
    torch.testing.assert_close(cost, log_q - log_decoder(POINTS, z, log_snr), rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("probes", [None, 2])
def test_an_example_has_the_same_likelihood_in_any_batch(probes):
    oracle, x_0 = OracleDenoiser(FiniteSet(POINTS, WEIGHTS), P.straight()), POINTS[:4]
    options = {"levels": LEVELS, "draws": 2, "probes": probes}
    together = flow_likelihood(oracle, x_0, rng=streams(3, 4), **options)
    for i in range(4):
        alone = flow_likelihood(oracle, x_0[i : i + 1], rng=streams(3, 1, start=i), **options)
        torch.testing.assert_close(together.nats[i : i + 1], alone.nats, rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(together.stderr[i : i + 1], alone.stderr, rtol=1e-9, atol=1e-12)
        assert torch.equal(together.evaluations[i : i + 1], alone.evaluations)


def test_permuting_the_coordinates_of_data_and_model_changes_nothing():
    A = randn((4, 4), stream(0), dtype=torch.float64)
    mean, cov, order = A[0], A @ A.T + 0.1 * torch.eye(4), torch.tensor([2, 0, 3, 1])
    x_0 = toys.gaussian(mean, cov).sample(3, rng=stream(1))
    ours = OracleDenoiser(toys.gaussian(mean, cov), P.straight())
    theirs = OracleDenoiser(toys.gaussian(mean[order], cov[order][:, order]), P.straight())
    torch.testing.assert_close(
        flow_likelihood(ours, x_0, rng=0).nats, flow_likelihood(theirs, x_0[:, order], rng=0).nats, rtol=1e-9, atol=1e-9
    )


def test_every_probe_is_followed_and_their_standard_error_is_calibrated():
    """On a Gaussian int J d lambda = 1/2 log(C_T C_0^-1) =: S at every x, so a probe v integrates to v^T S v."""
    A = randn((6, 6), stream(0), dtype=torch.float64)
    cov = A @ A.T / 6 + 0.05 * torch.eye(6)
    law, process, n, probes, start = toys.gaussian(torch.zeros(6), cov), P.straight(), 300, 16, 16.0
    x_0 = law.sample(n, rng=stream(1))
    terminal, oracle = at_the_end(law, process).log_prob, OracleDenoiser(law, process)
    result = flow_likelihood(oracle, x_0, rng=0, probes=probes, log_snr_max=start, terminal=terminal)

    values, vectors = torch.linalg.eigh(cov)
    (alpha_0, sigma_0), (alpha_T, sigma_T) = levels_of(start), levels_of(end(process)[0])
    ratio = (alpha_T**2 * values + sigma_T**2) / (alpha_0**2 * values + sigma_0**2)
    S = (vectors * ratio.log() / 2) @ vectors.T
    v = ode.rademacher((n, 1, probes, 6), streams(0, n))[:, 0]
    integrals = torch.einsum("npi,ij,npj->np", v, S, v)
    torch.testing.assert_close(result.divergence, -integrals.mean(1), rtol=0, atol=2e-3)
    torch.testing.assert_close(result.stderr, integrals.std(1) / probes**0.5, rtol=0, atol=2e-3)

    error = result.nats + law.log_prob(x_0)
    mean, stderr = mean_and_stderr(error)
    assert abs(float(mean)) < 4 * float(stderr)
    assert float(error.square().mean() / result.stderr.square().mean()) == pytest.approx(1, abs=0.25)
    assert float(probes * result.stderr.square().mean()) == pytest.approx(4 * float(S.triu(1).square().sum()), rel=0.1)
    assert result.kind == "estimate"


def test_probes_are_exact_where_the_jacobian_is_diagonal():
    law, process = toys.gaussian(torch.zeros(3), torch.diag(torch.tensor([0.1, 1.0, 4.0]))), P.straight()
    x_0, oracle = law.sample(4, rng=stream(0)), OracleDenoiser(law, process)
    one, all_ = (flow_likelihood(oracle, x_0, rng=0, probes=probes, **TIGHT).nats for probes in (1, None))
    torch.testing.assert_close(one, all_, rtol=1e-7, atol=1e-7)


def test_images_keep_their_shape_and_float32_its_dtype():
    """A network in float32: the state is float64 around it, and the error of the network is the error of the nats."""
    process, law = P.cosine(), toys.gaussian(MEAN, COV)
    x_0 = law.sample(3, rng=stream(0))
    double = flow_likelihood(exact(law, process, "v"), x_0, rng=0)
    single = flow_likelihood(exact(law, process, "v"), x_0.float(), rng=0)
    assert single.nats.dtype == torch.float64
    torch.testing.assert_close(single.nats, double.nats, rtol=0, atol=1e-4)
    assert encode(exact(law, process, "v"), x_0.float()).dtype == torch.float32


def test_illegal_requests_are_refused():
    oracle, x_0 = OracleDenoiser(FiniteSet(POINTS, WEIGHTS), P.cosine()), POINTS[:2]
    for options, sentence in (
        ({"levels": LEVELS, "dequantization": "normal"}, "unknown dequantization"),
        ({"levels": LEVELS, "combine": "sum"}, "unknown combination"),
        ({"draws": 2}, "nothing to draw"),
        ({"levels": LEVELS, "draws": 0}, "1 or more"),
        ({"probes": 0}, "at least one"),
        ({"levels": LEVELS, "probes": 2, "draws": 2, "combine": "importance"}, "too large on average"),
        ({"log_snr_max": -25.0}, "start above"),
        ({"rtol": 0.0}, "must be positive"),
    ):
        with pytest.raises(OptionError, match=sentence):
            flow_likelihood(oracle, x_0, rng=0, **options)
