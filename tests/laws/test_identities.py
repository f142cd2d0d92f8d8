"""Identities that follow from the definitions alone, each to rounding in float64.

The numbers are those of a list of 38, which notes how far float64 leaves each from holding. Tests below come first; a
name like `order.measured_order` begins that of one in test_order.py, which proves the same in another form, or alone.

     1  test_the_posterior_mean_is_x_t_without_the_noise_of_its_transition; `process.three_forms_of_the_posterior_mean`
     2  test_a_thousand_transitions_compose_to_the_marginal; `process.transitions_compose_to_the_marginal`
     3  test_the_posterior_averaged_over_the_marginal_is_the_marginal; `process.posterior_is_bayes`
     4  test_the_posterior_variance_is_a_share_of_that_of_the_transition; `process.posterior_variance_is_at_most`
     5  test_what_a_chain_has_lost_is_the_logistic_of_its_log_snr; `process.log_snr_decreases_from_the_data`
     6  test_a_term_is_half_the_snr_lost_times_the_error_of_the_network, for x_0; `likelihood.a_term_is_half`
     7  the same, for eps, and test_the_weight_of_the_noise_is_that_of_the_betas
     8  test_kl_is_zero_where_gaussians_are_equal_and_keeps_its_digits_beside
     9  test_the_guess_is_wrong_by_c_out_times_the_error_of_the_network, "v" among all; `denoise.a_network_that_outputs`
    10  test_ddim_with_eta_1_draws_from_the_posterior_with_the_guess_in_place_of_x_0
    11  the same; over whole walks `sample.ddim_with_eta_1_is_ancestral_sampling`
    12  test_ddim_is_euler_in_x_over_alpha_and_the_exponential_step_of_dpm_solver
    13  the same: DDIM is DPM-Solver++ of first order, and no other order of it is here
    14  test_ancestral_sampling_of_exploding_variance_goes_down_and_up_again, which is k-diffusion's split
    15  test_edm_preconditioning_has_unit_input_unit_target_and_the_published_weight; `denoise.edm_row_has_unit_input`
    16  test_karras_grid_has_the_published_noise_levels; `sample.grids_decrease_from_the_end`
    17  `process.zero_terminal_is_the_published_rescaling`; the straight schedule ends there by itself
    18  test_a_chain_of_fewer_steps_keeps_alpha_bar; `process.linear_is_the_published_table`
    19  test_a_chain_of_optimal_variance_loses_the_terminal_kl_alone; `likelihood.with_the_optimal_variance`
    20  test_a_chain_of_variance_beta_loses_nothing_of_unit_variance_and_1_over_T_of_any_other;
        `likelihood.with_variance_beta`, and `likelihood.with_the_historical_first_step` for the fixed ones
    21  test_no_guess_and_no_variance_have_a_bound_below_the_terminal_kl; `likelihood.the_bound_is_above`
    22  test_the_terms_approach_their_limit_from_above_whatever_the_shape_of_the_grid; `likelihood.the_continuous_limit`
    23  test_score_and_curvature_are_those_of_the_posterior; `toys.tweedie`, `toys.posterior_covariance`
    24  test_the_jacobian_of_the_denoiser_is_the_posterior_covariance; its trace `flow.field_and_divergence`
    25  test_the_expected_score_is_zero; over draws `toys.expected_score`
    26  test_what_is_known_of_the_noise_and_what_is_not_add_up_to_one
    27  test_variances_within_and_between_add_up_to_that_of_the_data; `toys.density_integrates_to_one`
    28  test_information_grows_with_the_snr_by_half_the_squared_error
    29  test_gaussian_probes_have_twice_the_squared_norm_for_variance; `ode.over_all_sign_vectors`, `ode.one_rademacher`
    30  `flow.the_density_is_exact_up_to_where_the_flow_begins`, `flow.at_the_default_start_nothing_is_left`
    31  `flow.encoding_then_decoding_returns_to_the_start`, `ode.there_and_back_returns_to_the_start`
    32  `flow.the_latent_of_a_gaussian_is_its_closed_form_map`, `order.measured_order_is_at_least`
    33  test_a_decoder_sums_to_one_and_knows_no_left_from_right; `likelihood.the_decoder_is_exact_in_the_tails`
    34  test_nats_move_by_the_logarithm_of_the_unit, test_the_bound_does_not_depend_on_the_order_of_the_pixels;
        `flow.permuting_the_coordinates`
    35  no code: there is no codec
    36  no code: there is no codec to refuse. To rounding `likelihood.an_image_has_the_same`,
        `flow.an_example_has_the_same`, `sample.example_i_depends`; bit for bit `ode.an_example_is_the_same`
    37  test_a_walk_draws_as_much_noise_as_is_said
    38  test_at_little_noise_the_score_of_points_leads_to_the_nearest, test_every_sampler_ends_in_the_set
"""

import itertools
import math
import re
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.distributions import Normal, kl_divergence

from ancestral import gaussian, toys
from ancestral.data import Scale
from ancestral.diffusion import likelihood
from ancestral.diffusion import process as P
from ancestral.diffusion.denoise import ROWS, VARIANCES, Denoiser, NetworkDenoiser, OracleDenoiser
from ancestral.diffusion.grids import karras, uniform
from ancestral.diffusion.model import Diffusion
from ancestral.diffusion.sample import SAMPLERS
from ancestral.diffusion.singlestep import ancestral_step, ddim_step, euler_step
from ancestral.ode import divergence_hutchinson
from ancestral.rng import rand, randn, randn_like, stream
from oracles import COMBINATIONS, ExactNetwork, FiniteSet, exact, plain_facts, two_point

each_schedule = pytest.mark.parametrize("name", P.SCHEDULES)
each_combination = pytest.mark.parametrize(("name", "predicts"), COMBINATIONS)

ONE = torch.ones((), dtype=torch.float64)
LOG_SNR = torch.tensor([-6.0, -2.0, 0.0, 2.0, 6.0]).double()


def close(actual, expected, atol=0.0, rtol=0.0):
    torch.testing.assert_close(actual, torch.as_tensor(expected).expand_as(actual), rtol=rtol, atol=atol)


def random_pairs(n=1000):
    """Times s < t."""
    return rand((2, n), stream(1)).mul(0.99).add(0.005).sort(0).values


def noised(process, t, shape=(1,)):
    """x_0, eps and x_t for each time."""
    x_0, eps = randn((2, len(t), *shape), stream(0), dtype=torch.float64)
    alpha, sigma = (c.reshape(-1, *[1] * len(shape)) for c in process(t))
    return x_0, eps, alpha * x_0 + sigma * eps


def test_every_test_in_the_table_is_there():
    """And every test of this file is in the table."""
    named = {*re.findall(r"\btest_\w+\b(?!\.py)", __doc__), "test_every_test_in_the_table_is_there"}
    assert named == {name for name in globals() if name.startswith("test_")}
    for home, name in re.findall(r"`(\w+)\.(\w+)`", __doc__):
        files = Path(__file__).parents[1].rglob(f"test_{home}.py")
        assert any(f"def test_{name}" in file.read_text() for file in files), f"{home}.{name}"


# The process: identities 1 to 5, and 18.


@each_schedule
def test_the_posterior_mean_is_x_t_without_the_noise_of_its_transition(name):
    """mu~ = (x_t - var_{t|s} / sigma_t eps) / alpha_{t|s} for any pair of times: identity 1."""
    process, (s, t) = P.named(name), random_pairs()
    x_0, eps, x_t = noised(process, t)
    a, v = (c[:, None] for c in process.transition(s, t))
    mean, _ = process.posterior(x_t, x_0, s, t)
    close(mean, (x_t - v / process(t)[1][:, None] * eps) / a, atol=1e-13)


@each_schedule
def test_a_thousand_transitions_compose_to_the_marginal(name):
    """N(alpha_{t|s} x, var_{t|s}) step by step is N(alpha_T x_0, sigma_T^2): identity 2."""
    process, alpha, var = P.named(name), ONE, 0 * ONE
    times = torch.arange(1001, dtype=torch.float64) / 1000
    for a, v in zip(*process.transition(times[:-1], times[1:]), strict=True):
        alpha, var = a * alpha, a**2 * var + v
    alpha_T, sigma_T = process(1.0)
    close(alpha, alpha_T, atol=1e-17)
    close(var, sigma_T**2, rtol=3e-15)


@each_schedule
def test_the_posterior_averaged_over_the_marginal_is_the_marginal(name):
    """c_t alpha_t + c_0 = alpha_s and var + c_t^2 sigma_t^2 = sigma_s^2: identity 3."""
    process, (s, t) = P.named(name), random_pairs()
    (alpha_s, sigma_s), (alpha_t, sigma_t) = process(s), process(t)
    c_t, c_0, var = process.posterior_coefficients(s, t)
    close(c_t * alpha_t + c_0, alpha_s, atol=2e-15)
    close(var + c_t**2 * sigma_t**2, sigma_s**2, rtol=2e-15)


@each_schedule
def test_the_posterior_variance_is_a_share_of_that_of_the_transition(name):
    """beta~_t / beta_t = sigma_s^2 / sigma_t^2, from 0 up to 1 and strictly growing where betas do: identity 4."""
    process, times = P.named(name), torch.arange(1001, dtype=torch.float64) / 1000
    s, t = times[:-1], times[1:]
    share = process.posterior_coefficients(s, t)[2] / process.transition(s, t)[1]
    close(share, (process(s)[1] / process(t)[1]) ** 2, rtol=1e-15)
    assert share[0] == 0
    assert (share < 1).all()
    if process.chain(1000).increasing:
        assert (share.diff() > 0).all()


@each_schedule
def test_what_a_chain_has_lost_is_the_logistic_of_its_log_snr(name):
    """1 - alpha_bar_t = 1 - prod (1 - beta_i) = sigmoid(-log SNR_t): identity 5."""
    process, times = P.named(name), torch.arange(1, 1001, dtype=torch.float64) / 1000
    chain, lost = process.chain(1000), (-process.log_snr(times)).sigmoid()
    close(1 - chain.alpha_bar, lost, atol=3e-16)
    close(1 - (1 - chain.betas).cumprod(0), lost, atol=3e-15)
    assert (process.log_snr(times).diff() < 0).all()


@each_schedule
@pytest.mark.parametrize("every", [4, 10, 100])
def test_a_chain_of_fewer_steps_keeps_alpha_bar(name, every):
    """prod (1 - beta_i) over the steps that are kept is alpha_bar of the long chain: identity 18."""
    process = P.named(name)
    kept = process.chain(1000).alpha_bar[every - 1 :: every]
    close((1 - process.chain(1000 // every).betas).cumprod(0), kept, atol=2e-15)


# The terms of the bound, and parameterizations: identities 6 to 9, and 15.


class Wrong(nn.Module):
    """A network that misses the target of its parameterization by the given errors."""

    def __init__(self, predicts, x_0, eps, alpha, sigma, error):
        super().__init__()
        total = alpha**2 + sigma**2
        x_t = alpha * x_0 + sigma * eps
        targets = {
            "x0": x_0,
            "eps": eps,
            "score": -eps / sigma,
            "v": alpha * eps - sigma * x_0,
            "velocity": eps - x_0,
            "edm": (total * x_0 - alpha * x_t) / (sigma * total.sqrt()),
        }
        assert targets.keys() == ROWS.keys()
        self.out = targets[predicts] + error

    def forward(self, x, log_snr):
        return self.out


@each_combination
def test_the_guess_is_wrong_by_c_out_times_the_error_of_the_network(name, predicts):
    """x_0_hat - x_0 = c_out (net - target) and eps_hat - eps = -alpha/sigma c_out (net - target): identity 9.

    For "v" with alpha^2 + sigma^2 = 1 these are -sigma (v_hat - v) and alpha (v_hat - v).
    """
    process, t = P.named(name), torch.linspace(0.05, 0.95, 50, dtype=torch.float64)
    (x_0, eps, x_t), (alpha, sigma) = noised(process, t), (c[:, None] for c in process(t))
    error = 0.5 * randn((50, 1), stream(2), dtype=torch.float64)
    denoiser = NetworkDenoiser(Wrong(predicts, x_0, eps, alpha, sigma, error), process, predicts)
    c_out = {
        "x0": ONE,
        "eps": -sigma / alpha,
        "score": sigma**2 / alpha,
        "v": -sigma / (alpha**2 + sigma**2),
        "velocity": -sigma / (alpha + sigma),
        "edm": sigma / (alpha**2 + sigma**2).sqrt(),
    }[predicts]
    close(denoiser(x_t, t) - x_0, c_out * error, atol=1e-13)
    close(denoiser.eps(x_t, t) - eps, -alpha / sigma * c_out * error, atol=1e-13, rtol=1e-15)


@each_combination
def test_a_term_is_half_the_snr_lost_times_the_error_of_the_network(name, predicts):
    """KL = 1/2 (SNR_s - SNR_t) c_out^2 (net - target)^2 with variance beta~: identities 6 and 7.

    For "x0" that is c_out = 1, for "eps" 1/2 (SNR_s / SNR_t - 1).
    """
    process = P.named(name)
    s, t = process.time(torch.linspace(9, -5, 301).double()).unfold(0, 2, 1).T
    x_0, eps, _ = noised(process, t)
    alpha, sigma = (c[:, None] for c in process(t))
    c_out = NetworkDenoiser(nn.Identity(), process, predicts).coefficients(t)[1]
    error = (1 + rand((300,), stream(2))) / c_out
    denoiser = NetworkDenoiser(Wrong(predicts, x_0, eps, alpha, sigma, error[:, None]), process, predicts)
    snr_s, snr_t = process.log_snr(s).exp(), process.log_snr(t).exp()
    weight = {"x0": snr_s - snr_t, "eps": snr_s / snr_t - 1}.get(predicts, (snr_s - snr_t) * c_out**2)
    term = likelihood.kl_term(denoiser, x_0, s, t, "fixed-small", Noise(eps))
    close(term, 0.5 * weight * error**2, rtol=3e-14)


@each_schedule
def test_the_weight_of_the_noise_is_that_of_the_betas(name):
    """1/2 (SNR_s / SNR_t - 1) = beta_t^2 / (2 beta~_t (1 - beta_t) (1 - alpha_bar_t)) in any scale: identity 7."""
    process, (s, t) = P.named(name), random_pairs()
    a, v = process.transition(s, t)
    _, _, beta_tilde = process.posterior_coefficients(s, t)
    ratio = torch.expm1(process.log_snr(s) - process.log_snr(t))
    close(v**2 / (2 * beta_tilde * a**2 * process(t)[1] ** 2), 0.5 * ratio, rtol=1e-14)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_kl_is_zero_where_gaussians_are_equal_and_keeps_its_digits_beside(dtype):
    """KL >= 0 in any float, and sum_{n >= 2} (-d)^n / 2n for var_1 = (1 + d) var_2 down to the last d: identity 8."""
    digits, eps = (52, 2.0**-52) if dtype == torch.float64 else (23, 2.0**-23)
    d = torch.cat([sign * 2.0 ** -torch.arange(7, digits - 1, dtype=torch.float64) for sign in (1, -1)])
    series = sum((-d) ** n / (2 * n) for n in range(2, 12))
    zero, var = torch.zeros((), dtype=dtype), (1 + d).to(dtype)
    for scale in (2.0**-20, 1.0, 2.0**20):
        found = gaussian.kl(zero, scale * var, zero, torch.tensor(scale, dtype=dtype))
        assert (found >= 0).all()
        assert (found[d.abs() > 4 * eps] > 0).all()
        assert ((found.double() - series).abs() <= eps * d.abs()).all()
    mean, log_var = randn((2, 1000), stream(0), dtype=dtype)
    here, there = ((mean.roll(k), log_var.roll(k).exp()) for k in (0, 1))
    assert (gaussian.kl(*here, *here) == 0).all()
    other = kl_divergence(*(Normal(m.double(), v.double().sqrt()) for m, v in (here, there)))
    close(gaussian.kl(*here, *there).double(), other, rtol=8 * eps, atol=8 * eps)


@each_schedule
@pytest.mark.parametrize("d", [0.5, 1.0])
def test_edm_preconditioning_has_unit_input_unit_target_and_the_published_weight(name, d):
    """c_in^2 Var x_t = 1, Var(target) = 1 and lambda c_out^2 = 1 at data variance d^2: identity 15."""
    process, t = P.named(name), torch.arange(1, 1000, dtype=torch.float64) / 1000
    alpha, sigma = process(t)
    c_skip, c_out, c_in = NetworkDenoiser(nn.Identity(), process, "edm", sigma_data=d).coefficients(t)
    total = alpha**2 * d**2 + sigma**2
    close(c_in**2 * total, ONE, atol=1e-15)
    close(((1 - c_skip * alpha) ** 2 * d**2 + c_skip**2 * sigma**2) / c_out**2, ONE, atol=1e-15)
    close(total / (sigma * d) ** 2 * c_out**2, ONE, atol=1e-15)


# Samplers: identities 10 to 14, 16, 37.


def legs(denoiser):
    """Neighbouring instants t > s down a grid, and what a walk may stand at at t."""
    instants = denoiser.process.instants(torch.linspace(0.95, 0.05, 8).double().tolist())
    x_0, eps = toys.named("mixture").sample(20, rng=stream(2)), randn((20, 2), stream(3), dtype=torch.float64)
    return [(t, s, t.alpha * x_0 + t.sigma * eps) for t, s in pairwise(instants)]


@each_combination
def test_ddim_with_eta_1_draws_from_the_posterior_with_the_guess_in_place_of_x_0(name, predicts):
    """N(mu~(x_t, x_0_hat), beta~), and so does ancestral sampling: identities 10 and 11.

    beta~ = sigma_s^2 / sigma_t^2 (sigma_t^2 - alpha_{t|s}^2 sigma_s^2). A smaller eta is that share of its deviation,
    and leaves what eps_hat was given for less noise: sigma_s^2 = (sigma_s^2 - eta^2 beta~) + eta^2 beta~.
    """
    denoiser = exact(toys.named("mixture"), P.named(name), predicts)
    for t, s, x in legs(denoiser):
        beta_tilde = (s.sigma / t.sigma) ** 2 * (t.sigma**2 - (t.alpha / s.alpha) ** 2 * s.sigma**2)
        guess, z = denoiser(x, t), randn_like(x, stream(4))
        mean, var = denoiser.process.posterior(x, guess, s, t)
        assert var == pytest.approx(beta_tilde, rel=2e-15)
        x_s, _ = ddim_step(denoiser, x, t, s, None, rng=stream(4), eta=1.0)
        close(x_s, mean + beta_tilde**0.5 * z, atol=3e-15)
        close(ancestral_step(denoiser, x, t, s, None, rng=stream(4))[0], x_s, atol=3e-15)
        x_s, _ = ddim_step(denoiser, x, t, s, None, rng=stream(4), eta=0.3)
        kept = (s.sigma**2 - 0.09 * beta_tilde) ** 0.5 * denoiser.eps(x, t_of(t))
        close(x_s, s.alpha * guess + kept + 0.3 * beta_tilde**0.5 * z, atol=3e-15)


@each_combination
def test_ddim_is_euler_in_x_over_alpha_and_the_exponential_step_of_dpm_solver(name, predicts):
    """d(x / alpha) = eps_hat d(sigma / alpha), and with h = (log SNR_s - log SNR_t) / 2: identities 12 and 13.

    x_s = sigma_s / sigma_t x_t - alpha_s (e^-h - 1) x_0_hat

    Reference: Lu et al. (2022), DPM-Solver++, the solver of first order, for the second.
    """
    denoiser = exact(toys.named("mixture"), P.named(name), predicts)
    for t, s, x in legs(denoiser):
        x_s, _ = ddim_step(denoiser, x, t, s, None)
        ratio = x / t.alpha + (s.sigma / s.alpha - t.sigma / t.alpha) * denoiser.eps(x, t_of(t))
        close(x_s, s.alpha * ratio, atol=1e-14)
        h = (s.log_snr - t.log_snr) / 2
        close(x_s, s.sigma / t.sigma * x - s.alpha * math.expm1(-h) * denoiser(x, t), atol=2e-15)
        close(x_s, euler_step(denoiser, x, t, s, None)[0], atol=2e-15)


def test_ancestral_sampling_of_exploding_variance_goes_down_and_up_again():
    """Euler to sigma_down, then noise of sigma_up, with sigma_down^2 + sigma_up^2 = sigma_s^2: identity 14.

    sigma_up^2 = sigma_s^2 (sigma_t^2 - sigma_s^2) / sigma_t^2

    Reference: Katherine Crowson, k-diffusion, get_ancestral_step.
    """
    denoiser = OracleDenoiser(toys.named("mixture"), P.edm())
    for t, s, x in legs(denoiser):
        up = s.sigma * (t.sigma**2 - s.sigma**2) ** 0.5 / t.sigma
        down = (s.sigma**2 - up**2) ** 0.5
        x_down = x + (down - t.sigma) * denoiser.eps(x, t_of(t))
        x_s, _ = ancestral_step(denoiser, x, t, s, None, rng=stream(4))
        close(x_s, x_down + up * randn_like(x, stream(4)), atol=4e-15)


def t_of(instant):
    """The time alone, at which coefficients are tensors."""
    return torch.tensor(float(instant), dtype=torch.float64)


@each_schedule
@pytest.mark.parametrize("n", [2, 10, 40])
def test_karras_grid_has_the_published_noise_levels(name, n):
    """(sigma / alpha)^(1/7) is evenly spaced, from the end of the process to e^-6: identity 16.

    Between the ends it is as exact as float64 has times near 1, which lie 2^-53 apart.
    """
    process = P.named(name)
    times = karras(process, n)
    alpha, sigma = process(times)
    log_snr = torch.stack([process.log_snr(1.0).clamp(min=P.LOG_SNR_MIN), 12 * ONE])
    ends = (-log_snr / 14).exp()
    published = (ends[0] + torch.linspace(0, 1, n, dtype=torch.float64) * (ends[1] - ends[0])) ** 7
    ratio = sigma / alpha
    error = (ratio / published)[1:].log().abs()
    assert (error <= 1e-13 + 2**-53 * process.rate(times[1:])).all()
    close(ratio[-1], published[-1], atol=3e-16)
    if math.isfinite(process.log_snr(1.0)):
        close(ratio[0], published[0], rtol=1e-14)
    assert (ratio.diff() < 0).all()


@pytest.mark.parametrize("steps", [1, 2, 9])
@each_schedule
def test_a_walk_draws_as_much_noise_as_is_said(name, steps):
    """One normal number for each element and step but the last, or for each update, or none: identity 37."""
    oracle = OracleDenoiser(toys.named("ring-8"), P.named(name))
    x = randn((3, 2), stream(1), dtype=torch.float64)
    walks = {
        "ancestral": [(steps - 1, {})],
        "ddim": [(0, {}), (steps - 1, {"eta": 0.5})],
        "euler": [(0, {})],
        "heun": [(0, {}), (steps - (name == "straight"), {"churn": 0.1})],  # nothing is above no signal
        "sde-dpmpp-2m": [(steps - 1, {})],
        "sde-dpmpp-3m": [(steps - 1, {}), (0, {"tau": 0.0})],
        "sa-solver": [(steps - 1, {}), (0, {"tau": 0.0})],
        "predictor-corrector": [(3 * (steps - 1), {"updates": 2})],
        "annealed-langevin": [(4 * steps, {"updates": 4})],
        "restart": [(2, {"restarts": 2})],
    }
    walks = {label: [(0, {})] for label, sampler in SAMPLERS.items() if not sampler.stochastic} | walks
    assert walks.keys() == SAMPLERS.keys()
    for label, count, options in ((key, *walk) for key, kinds in walks.items() for walk in kinds):
        used, counted = stream(0), stream(0)
        SAMPLERS[label](oracle, x, steps, rng=used, **options)
        randn((count, *x.shape), counted, dtype=torch.float64)
        assert torch.equal(randn((5,), used), randn((5,), counted)), label


# Chains on a Gaussian, of which every expectation is exact: identities 19 to 22.


class Noise:
    """Noise that is given instead of drawn, repeated as often as there are rows."""

    def __init__(self, eps):
        self.eps = eps


@pytest.fixture(autouse=True)
def noise_may_be_given(monkeypatch):
    def randn_or_given(x, rng):
        return rng.eps.repeat(len(x) // len(rng.eps), 1).to(x) if isinstance(rng, Noise) else randn_like(x, rng)

    monkeypatch.setattr("ancestral.diffusion.process.randn_like", randn_or_given)


def terms_and_ends(denoiser, mean, var, times, variance):
    """Expected sum of the middle terms on increasing times, and of prior and decoder, over N(mean, var): exact."""
    x_0, eps = two_point(mean, var)
    s, t = times.repeat_interleave(4).unfold(0, 4 * (len(times) - 1), 4)
    rows = x_0.repeat(len(times) - 1, 1)
    terms = likelihood.kl_term(denoiser, rows, s, t, variance, Noise(eps)).sum() / 4
    decoder = likelihood.decoder_nats(denoiser, x_0, times, variance, None, Noise(eps)).mean()
    return float(terms), float(denoiser.process.terminal_kl(x_0, times[-1]).mean() + decoder)


def gap(denoiser, mean, var, T, variance):
    """E[VLB] - NLL of N(mean, var) beyond the terminal KL, which no chain escapes."""
    process = denoiser.process
    alpha, sigma = process(1.0)
    terminal = gaussian.kl(alpha * mean, alpha**2 * var + sigma**2, 0 * ONE, process.prior_var())
    bound = sum(terms_and_ends(denoiser, mean, var, uniform(process, T).flip(0), variance))
    return bound - toys.gaussian([mean], [[var]]).entropy() - float(terminal)


def oracle_of(process, mean, var):
    return OracleDenoiser(toys.gaussian([mean], [[var]]), process)


@each_schedule
@pytest.mark.parametrize("T", [2, 30, 1000, 4000])
def test_a_chain_of_optimal_variance_loses_the_terminal_kl_alone(name, T):
    """E[VLB] - NLL = KL(q(x_T) || p(x_T)) for a round Gaussian at every T: identity 19."""
    for mean, var in ((0.3, 0.25), (-2.0, 4.0)):
        assert abs(gap(oracle_of(P.named(name), mean, var), mean, var, T, "optimal")) < 1e-12


PRESERVING = [name for name in P.SCHEDULES if P.named(name).constraint == "variance-preserving"]


@pytest.mark.parametrize("name", PRESERVING)
def test_a_chain_of_variance_beta_loses_nothing_of_unit_variance_and_1_over_T_of_any_other(name):
    """Where x_t keeps its variance beta is the reverse one; else T gap has a limit, 1.1 for linear: identity 20."""
    process = P.named(name)
    for T in (2, 30, 1000, 4000):
        assert abs(gap(oracle_of(process, 0.0, 1.0), 0.0, 1.0, T, "beta")) < 1e-12
    coarse, fine = (T * gap(oracle_of(process, 0.3, 0.25), 0.3, 0.25, T, "beta") for T in (2000, 4000))
    assert coarse == pytest.approx(fine, rel=0.01)
    if name == "linear":
        assert fine == pytest.approx(1.1, abs=0.05)


class Moved(Denoiser):
    """A guess, and a variance with it, that are wrong in a known way."""

    def __init__(self, oracle, share=1.0, shift=0.0, spread=1.0):
        super().__init__()
        self.oracle, self.process = oracle, oracle.process
        self.share, self.shift, self.spread = share, shift, spread

    def forward(self, x_t, t):
        return self.share * self.oracle(x_t, t) + self.shift

    def moments(self, x_t, t):
        return self(x_t, t), self.spread * self.oracle.moments(x_t, t)[1]

    def halves(self, x_t, t):
        return self(x_t, t), torch.full_like(x_t, self.spread - 0.5)


@pytest.mark.parametrize("variance", VARIANCES)
@each_schedule
def test_no_guess_and_no_variance_have_a_bound_below_the_terminal_kl(name, variance):
    """E[VLB] - NLL >= KL(q(x_T) || p(x_T)), and with any variance the exact guess has the least: identity 21."""
    spreads = (0.5, 1.0, 1.5) if variance in ("learned", "optimal") else (1.0,)
    for (mean, var), T, spread in itertools.product([(0.3, 0.25), (-1.0, 2.0)], (2, 50), spreads):
        oracle = oracle_of(P.named(name), mean, var)
        least = gap(Moved(oracle, spread=spread), mean, var, T, variance)
        assert least > -1e-12
        for share, shift in ((0.0, 0.4), (0.9, 0.0), (1.3, -0.5)):
            assert gap(Moved(oracle, share, shift, spread), mean, var, T, variance) > least


SHAPES = {"linear": lambda u: u, "square": lambda u: u**2, "root": lambda u: u**0.5}


@pytest.mark.parametrize("shape", SHAPES)
@each_schedule
def test_the_terms_approach_their_limit_from_above_whatever_the_shape_of_the_grid(name, shape):
    """1/2 log((1 + S SNR_0) / (1 + S SNR_1)) over equal steps of any function of the log-SNR: identity 22.

    Over T equal steps of the log-SNR L from above 13.3 - L, the excess is L/2T [limit - f_0 + f_1] to first order,
    f = 1/2 S SNR / (1 + S SNR).
    """
    process, S, L = P.named(name), 0.25, 18.3
    oracle, excess = oracle_of(process, 0.0, S), []
    for T in (100, 1000, 10_000):
        times = process.time(13.3 - L * SHAPES[shape](torch.linspace(0, 1, T + 1, dtype=torch.float64)))
        snr = S * process.log_snr(times[[0, -1]]).exp()
        limit = 0.5 * float((1 + snr).log().diff().neg())
        excess.append(terms_and_ends(oracle, 0.0, S, times, "fixed-small")[0] - limit)
    assert excess[0] > 5 * excess[1] > 25 * excess[2] > 0
    if shape == "linear":
        f_0, f_1 = (0.5 * snr / (1 + snr)).tolist()
        assert 10_000 * excess[2] == pytest.approx(L / 2 * (limit - f_0 + f_1), rel=2e-3)


# What is known of x_0 and what is not: identities 23 to 28.


def jacobian(f, x):
    """df_i/dx_j of every example, shape (n, D, D)."""
    x = x.detach().requires_grad_()
    return torch.stack([torch.autograd.grad(part.sum(), x, retain_graph=True)[0] for part in f(x).unbind(1)], 1)


def places(law, process):
    """Times, their levels, the law there, and points that are likely under it or not."""
    for log_snr in LOG_SNR:
        t = process.time(log_snr)
        alpha, sigma = process(t)
        at = law.diffused(float(alpha), float(sigma))
        yield t, alpha, sigma, at, torch.cat([at.sample(8, rng=stream(0)), 3 * at.sample(4, rng=stream(1))])


each_toy = pytest.mark.parametrize("toy", toys.TOYS)


@each_schedule
@each_toy
def test_score_and_curvature_are_those_of_the_posterior(toy, name):
    """alpha E[x_0|x] = x + sigma^2 score and SNR Cov[x_0|x] = I + sigma^2 Hess log p, by autograd: identity 23."""
    law, process = toys.named(toy), P.named(name)
    oracle = OracleDenoiser(law, process)
    for t, alpha, sigma, at, x in places(law, process):
        close(alpha * oracle(x, t) / sigma, x / sigma + sigma * at.score(x), rtol=1e-14, atol=2e-14)
        curvature = torch.eye(2) + sigma**2 * jacobian(at.score, x)
        close((alpha / sigma) ** 2 * law.posterior_cov(x, alpha, sigma), curvature, atol=3e-13)


@each_schedule
@each_toy
def test_the_jacobian_of_the_denoiser_is_the_posterior_covariance(toy, name):
    """dE[x_0|x]/dx = alpha / sigma^2 Cov[x_0|x]: symmetric, and positive in every direction: identity 24."""
    law, process = toys.named(toy), P.named(name)
    oracle = OracleDenoiser(law, process)
    for t, alpha, sigma, _, x in places(law, process):
        J = alpha * jacobian(lambda x, t=t: oracle(x, t), x)
        close(J, (alpha / sigma) ** 2 * law.posterior_cov(x, alpha, sigma), atol=2e-12)
        close(J, J.mT, atol=2e-12)
        assert (torch.linalg.eigvalsh(J) > -2e-12).all()


def column(*values):
    return torch.tensor(values, dtype=torch.float64)[:, None]


LINE = {
    "mixture": toys.Mixture(
        "mixture", torch.tensor([0.5, 0.3, 0.2]), column(-1, 0.5, 1.5), column(0.3, 0.1, 0.2)[..., None]
    ),
    "intervals": toys.Boxes("intervals", column(-2, 0.3), column(-1.2, 1.9)),
}
each_line = pytest.mark.parametrize("law", LINE.values(), ids=LINE.keys())


def line(reach, n):
    """n points from -reach to reach, and the step between them."""
    return reach * torch.linspace(-1, 1, n, dtype=torch.float64), 2 * reach / (n - 1)


def weighed(law, process, log_snr):
    """A time, points on the line, and their weights in an integral over q(x_t), exact to rounding; log q(x_t) there."""
    t = process.time(log_snr)
    alpha, sigma = (float(c) for c in process(t))
    x, step = line(6 * alpha + 9 * sigma, 1501)
    log_q = law.diffused(alpha, sigma).log_prob(x[:, None])
    return t, x[:, None], step * log_q.exp(), log_q


@each_combination
def test_the_expected_score_is_zero(name, predicts):
    """E[sigma_t score] = -E[eps_hat] = 0, and so it is whatever the network predicts: identity 25."""
    law, process = LINE["mixture"], P.named(name)
    denoiser = exact(law, process, predicts)
    for log_snr in LOG_SNR:
        t, x, weight, _ = weighed(law, process, log_snr)
        assert abs(float(process(t)[1] * (weight @ denoiser.score(x, t)))) < 1e-15


@each_combination
def test_what_is_known_of_the_noise_and_what_is_not_add_up_to_one(name, predicts):
    """E|eps_hat|^2 + E|eps - eps_hat|^2 = 1 per dimension, the second over x_0 and eps themselves: identity 26."""
    law, process = LINE["mixture"], P.named(name)
    denoiser = exact(law, process, predicts)
    (x_0, d_x_0), (eps, d_eps) = line(6, 201), line(9, 61)
    over_x_0, over_eps = law.log_prob(x_0[:, None]).exp() * d_x_0, gaussian.log_density(eps, 0 * ONE, ONE).exp() * d_eps
    for log_snr in LOG_SNR:
        t, x, weight, _ = weighed(law, process, log_snr)
        alpha, sigma = process(t)
        eps_hat = denoiser.eps((alpha * x_0[:, None] + sigma * eps).reshape(-1, 1), t).view(201, 61)
        unknown = over_x_0 @ (eps - eps_hat).square() @ over_eps
        known = weight @ denoiser.eps(x, t)[:, 0].square()
        close(known + unknown, ONE, atol=2e-14)


@each_line
@each_schedule
def test_variances_within_and_between_add_up_to_that_of_the_data(name, law):
    """E Var[x_0|x_t] + Var E[x_0|x_t] = Var x_0, and Var x_t = alpha^2 Var x_0 + sigma^2: identity 27."""
    process = P.named(name)
    for log_snr in LOG_SNR:
        t, x, weight, _ = weighed(law, process, log_snr)
        alpha, sigma = process(t)
        mean, within = (part[:, 0] for part in OracleDenoiser(law, process).moments(x, t))
        close(weight.sum(), ONE, atol=2e-14)
        close(weight @ mean, law.mean[0], atol=2e-14)
        close(weight @ within + weight @ (mean - weight @ mean).square(), law.cov[0, 0], atol=2e-14)
        var_t = alpha**2 * law.cov[0, 0] + sigma**2
        close((weight @ (x[:, 0] - alpha * law.mean[0]).square()) / var_t, ONE, atol=2e-14)


@each_line
@each_schedule
def test_information_grows_with_the_snr_by_half_the_squared_error(name, law):
    """d I(x_0; x_t) / d log SNR = 1/2 SNR E Var[x_0|x_t], I from entropies: identity 28.

    Reference: Guo, Shamai & Verdú (2005), theorem 1. The derivative is by differences of order 6.
    """
    process, h = P.named(name), 0.02

    def information(log_snr):
        t, _, weight, log_q = weighed(law, process, log_snr)
        return -(weight @ log_q) - 0.5 * (gaussian.LOG_2PI + 1) - process(t)[1].log()

    for log_snr in (-3.0, 0.0, 3.0):
        t, x, weight, _ = weighed(law, process, log_snr)
        _, within = OracleDenoiser(law, process).moments(x, t)
        rise = [information(log_snr + k * h) - information(log_snr - k * h) for k in (1, 2, 3)]
        slope = (45 * rise[0] - 9 * rise[1] + rise[2]) / (60 * h)
        close(slope, 0.5 * math.exp(log_snr) * (weight @ within[:, 0]), atol=1e-11)


# Probes, decoders, units and discrete data: identities 29, 33, 34 and 38.


def test_gaussian_probes_have_twice_the_squared_norm_for_variance():
    """Var v^T J v = 2 |S|_F^2, S = (J + J^T)/2, by a quadrature that is exact for quartics: identity 29."""
    W, x = randn((4, 4), stream(9), dtype=torch.float64), randn((3, 4), stream(1), dtype=torch.float64)

    def field(x):
        return torch.tanh(x @ W) + x.prod(1, keepdim=True)

    probes = torch.cartesian_prod(*[math.sqrt(3) * torch.tensor([-1, 0, 1], dtype=torch.float64)] * 4)
    weight = torch.where(probes == 0, 4.0, 1.0).double().prod(1) / 6**4
    _, estimates = divergence_hutchinson(field, x, probes[:, None].expand(81, 3, 4))
    J = jacobian(field, x)
    S, trace = (J + J.mT) / 2, J.diagonal(dim1=1, dim2=2).sum(1)
    close(weight @ estimates, trace, atol=1e-14)
    close(weight @ (estimates - trace).square(), 2 * S.square().sum((1, 2)), rtol=1e-14)


MASSES = {"gaussian": gaussian.log_bin, "tanh": gaussian.log_bin_tanh, "softmax": gaussian.log_softmax_level}


@pytest.mark.parametrize("levels", [2, 17, 256])
@pytest.mark.parametrize("decoder", likelihood.DECODERS)
def test_a_decoder_sums_to_one_and_knows_no_left_from_right(decoder, levels):
    """sum_v P(v; mu, s) = 1 for any mu and s, and P(v; mu, s) = P(-v; -mu, s): identity 33."""
    values = torch.linspace(-1, 1, levels, dtype=torch.float64)
    floor = levels * 1e-12 if decoder == "tanh" else 0.0  # below which it puts no probability
    for std in (0.005, 0.05, 0.5, 3.0, 100.0):
        means = [float(values[i]) + k * std for i in (0, levels // 3, -1) for k in (-4, -0.3, 0, 1, 4)]
        for mean in means if decoder == "softmax" else [-3.0, *means, 5.0]:
            mu, s = torch.full_like(values, mean), torch.tensor(std, dtype=torch.float64)
            p, mirrored = MASSES[decoder](values, mu, s, levels), MASSES[decoder](values, -mu, s, levels).flip(0)
            close(p.exp().sum(), ONE, atol=2e-14 + floor)
            close(p.exp(), mirrored.exp(), atol=1e-14)
            if decoder != "tanh":  # the difference of two of its values near one has no digits to be right in
                close(p, mirrored, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("name", [name for name in P.SCHEDULES if name != "learned"])  # which is for levels
def test_nats_move_by_the_logarithm_of_the_unit(name):
    """bits/dim of a x + b, less log2 a on average, is that of x: by the bound and by the flow, identity 34."""
    process, facts = P.named(name), plain_facts(2)
    scale = Scale(offset=(1.0, -7.0), factor=(3.0, 0.01))
    net, x = ExactNetwork(toys.named("mixture"), process, "v"), toys.named("mixture").sample(3, rng=stream(0)).float()
    plain, moved = (
        Diffusion(net, process, facts.model_copy(update={"scale": unit}), chain=10) for unit in (facts.scale, scale)
    )
    factor, offset = torch.tensor([scale.factor, scale.offset], dtype=torch.float64)
    raw = x.double() * factor + offset
    for measured in ("bound", "flow"):
        options = {} if measured == "bound" else {"rtol": 1e-3, "atol": 1e-3}
        before, after = (
            facts.bits_per_dim(getattr(model, measured)(data, rng=0, **options).nats)
            for model, data in ((plain, x), (moved, raw))
        )
        close(after - factor.log2().mean(), before, atol=1e-13)


@pytest.mark.parametrize("variance", VARIANCES)
@each_schedule
def test_the_bound_does_not_depend_on_the_order_of_the_pixels(name, variance):
    """Of data, model and noise, permuted alike: identity 34."""
    A = randn((4, 4), stream(0), dtype=torch.float64)
    mean, cov, order = A[0], A @ A.T + 0.1 * torch.eye(4), torch.tensor([2, 0, 3, 1])
    x_0, eps = toys.gaussian(mean, cov).sample(5, rng=stream(1)), randn((5, 4), stream(2), dtype=torch.float64)
    times = uniform(P.named(name), 10).flip(0)

    def nats(mean, cov, x_0, eps):
        oracle = Moved(OracleDenoiser(toys.gaussian(mean, cov), P.named(name)))
        terms = [likelihood.kl_term(oracle, x_0, s, t, variance, Noise(eps)) for s, t in pairwise(times)]
        decoder = likelihood.decoder_nats(oracle, x_0, times, variance, None, Noise(eps))
        return torch.stack([oracle.process.terminal_kl(x_0), *terms, decoder], 1)

    close(
        nats(mean[order], cov[order][:, order], x_0[:, order], eps[:, order]),
        nats(mean, cov, x_0, eps),
        rtol=1e-12,
        atol=1e-14,
    )


class Points(FiniteSet):
    """Points that may be asked with plain numbers, as walks do."""

    def posterior_mean(self, x_t, alpha, sigma):
        levels = (torch.as_tensor(level, dtype=torch.float64) for level in (alpha, sigma))
        return super().posterior_mean(x_t, *levels)


SET = Points(
    torch.tensor([[0.0, 0.0], [1.0, 0.2], [-0.8, 0.9], [0.3, -1.1], [-1.2, -0.7]]),
    torch.tensor([0.4, 0.3, 0.1, 0.1, 0.1]),
)


@each_schedule
def test_at_little_noise_the_score_of_points_leads_to_the_nearest(name):
    """sigma^2 score = alpha y - x where no other y is nearly as near, whatever their probabilities: identity 38."""
    process = P.named(name)
    t = process.time(10.0)
    alpha, sigma = process(t)
    x = alpha * (4 * rand((500, 2), stream(0)) - 2)
    distance, nearest = torch.cdist(x, alpha * SET.points).square().sort(1)
    clear = distance[:, 1] - distance[:, 0] > 100 * sigma**2
    assert clear.double().mean() > 0.95
    leads = sigma**2 * OracleDenoiser(SET, process).score(x, t)
    close(leads[clear], (alpha * SET.points[nearest[:, 0]] - x)[clear], atol=1e-15)


@pytest.mark.parametrize("label", SAMPLERS)
@each_schedule
def test_every_sampler_ends_in_the_set(name, label):
    """Half of the walks within twice the last noise but one of a point, then all of them at one: identity 38."""
    process, sampler = P.named(name), SAMPLERS[label]
    oracle, steps = OracleDenoiser(SET, process), karras(process, 20)
    x = randn((50, 2), stream(0), dtype=torch.float64) * process.prior_var() ** 0.5
    options = {"updates": 40} if label == "annealed-langevin" else {}
    *_, before, end = sampler.path(oracle, x, steps, rng=stream(1), **options)
    (alpha, _), (alpha_2, sigma_2) = process(steps[-1]), process(steps[-2])
    assert to_the_set(before.x / alpha).median() < 2 * sigma_2 / alpha_2
    assert to_the_set(end.x).max() < 1e-15


def to_the_set(x):
    """The distance of each x to the point nearest to it."""
    return (x[:, None] - SET.points).norm(dim=2).amin(1)
