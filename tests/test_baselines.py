"""Both baselines are distributions, are fitted on the training side alone, and reach what theory says they reach."""

import itertools
import math
import time

import numpy as np
import pytest
import torch
from scipy.stats import logistic, norm
from torch.distributions import MultivariateNormal

from ancestral.data import load
from ancestral.data.dataset import Examples, divide
from ancestral.errors import OptionError
from ancestral.measure import baselines
from ancestral.measure.baselines import RIDGE, full_gaussian, independent_pixels
from ancestral.rng import rand, randn, stream
from ancestral.toys import named

each_baseline = pytest.mark.parametrize("baseline", [independent_pixels, full_gaussian])


def data_of(train, held_out, levels=None):
    """Data with this split."""
    dtype = np.float32 if levels is None else np.uint8
    x = torch.cat([torch.as_tensor(train), torch.as_tensor(held_out)]).numpy().astype(dtype)
    return divide(Examples(x, levels, held_out=np.arange(len(x)) >= len(train)), name="test", source="test")


def score(baseline, data):
    return baseline(data, data.held_out)


def shrunk(x):
    """Ledoit and Wolf's covariance from its definition: beta^2 is the mean squared error of a mean of products."""
    n, D = x.shape
    x = x - x.mean(0)
    products = x[:, :, None] * x[:, None, :]
    S = products.mean(0)
    target = S.trace() / D * torch.eye(D, dtype=x.dtype)
    beta2, delta2 = (products - S).square().sum() / n**2, (S - target).square().sum()
    w = min(beta2, delta2) / delta2
    return w * target + (1 - w) * S


def ramp(D, rho=0.9):
    """Draws of D standard normal numbers with correlation rho^|i - j|, as a function of n and a seed."""
    place = torch.arange(D, dtype=torch.float64)
    L = torch.linalg.cholesky(rho ** (place[:, None] - place).abs())
    return lambda n, seed: randn((n, D), stream(seed), dtype=torch.float64) @ L.T


def onto_levels(x, levels):
    return ((x + 3) / 6 * (levels - 1)).round().clamp(0, levels - 1)


CUBE = torch.tensor(list(itertools.product(range(4), repeat=3)))
"""All examples of 3 pixels on 4 levels."""


@each_baseline
@pytest.mark.parametrize(
    "train",
    [
        onto_levels(ramp(3)(500, 0), 4),
        torch.tensor([[0, 3, 1]] * 400 + [[0, 3, 2]]),
        torch.tensor([[0, 3, 1], [1, 1, 1]]),
    ],
    ids=["correlated", "constant pixels", "fewer examples than pixels"],
)
def test_the_masses_of_all_examples_sum_to_one(baseline, train):
    nats = score(baseline, data_of(train, CUBE, levels=4))
    assert (-nats).exp().sum().item() == pytest.approx(1, abs=1e-12)


def test_half_an_observation_is_added_to_each_level():
    """Two of three training values are 0, one is 2, none is 1: of 4.5 = 3 + 3/2, that is 2.5, 1.5 and 0.5."""
    nats = score(independent_pixels, data_of([[0], [2], [0]], [[0], [1], [2]], levels=3))
    assert (-nats).exp().tolist() == pytest.approx([2.5 / 4.5, 0.5 / 4.5, 1.5 / 4.5])


def test_independent_pixels_reach_the_entropy_of_a_product():
    """In expectation over the true law, N examples leave an excess of about (L - 1) / 2N per pixel."""
    pmf = torch.tensor([[0.5, 0.3, 0.1, 0.1], [0.01, 0.04, 0.05, 0.9]], dtype=torch.float64)
    u = rand((40_000, 2), stream(0))
    draws = torch.stack([torch.searchsorted(p.cumsum(0)[:-1], u[:, d].contiguous()) for d, p in enumerate(pmf)], 1)
    data = data_of(draws[:20_000], draws[20_000:], levels=4)
    table = data_of(draws[:20_000], CUBE[:16, 1:], levels=4)
    product = (pmf[0][:, None] * pmf[1]).flatten()
    excess = (product * (score(independent_pixels, table) + product.log())).sum().item()
    assert 0 < excess < 5 * 2 * 3 / (2 * 20_000)
    nats, entropy = score(independent_pixels, data), -(pmf * pmf.log()).sum()
    assert abs(nats.mean() - entropy) < 4 * nats.std() / len(nats) ** 0.5


def test_the_gaussian_on_levels_integrates_each_conditional_over_its_bin():
    """Two pixels by the textbook: p(x_1), then N(m_2 + c/v_1 (x_1 - m_1), v_2 - c^2/v_1), in units of levels."""
    train = onto_levels(ramp(2)(300, 0), 8)
    pairs = torch.tensor(list(itertools.product(range(8), repeat=2)))
    (m_1, m_2), S = train.mean(0).tolist(), shrunk(train).numpy() + np.eye(2) / 12
    edges = np.array([-np.inf, *np.arange(0.5, 7), np.inf])
    expected = []
    for x_1, x_2 in pairs.tolist():
        first = np.diff(norm.cdf(edges, m_1, S[0, 0] ** 0.5))[x_1]
        mean, var = m_2 + S[0, 1] / S[0, 0] * (x_1 - m_1), S[1, 1] - S[0, 1] ** 2 / S[0, 0]
        expected.append(first * np.diff(norm.cdf(edges, mean, var**0.5))[x_2])
    nats = score(full_gaussian, data_of(train, pairs, levels=8))
    assert (-nats).exp().tolist() == pytest.approx(expected, abs=1e-12)


@pytest.mark.parametrize("constant", [False, True])
@pytest.mark.parametrize(("n", "shape"), [(500, (5,)), (500, (1, 2, 3)), (10, (20,)), (2, (3,))])
def test_the_gaussian_of_real_values_has_the_shrunk_moments(n, shape, constant):
    """Images have one unit for all pixels, vectors one per feature: the density in the user's units is the same law."""
    D = math.prod(shape)
    raw = 7 + ramp(D)(n + 50, 0) * torch.linspace(0.5, 20, D)
    if constant:
        raw[:, 1] = 0.5
    data = data_of(*raw.float().reshape(-1, *shape).split([n, 50]))
    train, held_out = data.train.double().flatten(1), data.held_out.double().flatten(1)
    unit = torch.tensor(data.facts.scale.factor, dtype=torch.float64).expand(D)
    covariance = (shrunk(train / unit) + RIDGE * torch.eye(D)) * torch.outer(unit, unit)
    fitted = MultivariateNormal(train.mean(0), covariance)
    torch.testing.assert_close(score(full_gaussian, data), -fitted.log_prob(held_out), rtol=1e-6, atol=1e-6)


def test_fewer_noise_images_than_pixels_do_not_mislead_the_gaussian():
    """Uniform pixels have 8 bits, and cost 0.25 more where they are taken for Gaussian."""
    noise = (rand((247, 1, 8, 8), stream(0)) * 256).floor()
    data = data_of(noise[:47], noise[47:], levels=256)
    alone, together = (data.facts.bits_per_dim(score(b, data)).mean() for b in (independent_pixels, full_gaussian))
    assert 8 < together < alone + 0.1


def test_a_covariance_within_its_own_error_of_a_round_one_is_taken_as_round_and_not_beyond():
    """Eight corners of a box: beta^2 is about 6/8, delta^2 about 0.03, and the law is N(0, mu I) with their mean mu."""
    x = torch.tensor(list(itertools.product([-1, 1], [-1, 1], [-1.1, 1.1]))).reshape(-1, 1, 1, 3)
    mu = (1 + 1 + 1.1**2) / 3 * (1 + RIDGE)
    held_out = ramp(3)(20, 0).reshape(-1, 1, 1, 3)
    expected = 1.5 * math.log(2 * math.pi * mu) + held_out.flatten(1).square().sum(1) / (2 * mu)
    torch.testing.assert_close(score(full_gaussian, data_of(x, held_out)), expected, rtol=1e-6, atol=1e-6)


def test_many_examples_leave_the_sample_covariance_as_it_is():
    """The shrinkage is of order 1/n: sixteen times the examples leave a sixteenth of the difference in nats."""
    x = (ramp(4)(16_200, 0) * torch.linspace(1, 2, 4)).reshape(-1, 1, 2, 2)

    def difference(n):
        data = data_of(x[:n], x[-200:])
        train, held_out = data.train.double().flatten(1), data.held_out.double().flatten(1)
        sample = MultivariateNormal(train.mean(0), train.T.cov(correction=0))
        return (score(full_gaussian, data) + sample.log_prob(held_out)).abs().mean().item()

    few, many = difference(1_000), difference(16_000)
    assert few > 0.01
    assert many == pytest.approx(few / 16, rel=0.25)


def test_on_a_gaussian_the_difference_is_the_total_correlation():
    """The full Gaussian reaches the entropy, the independent one the sum of the marginals' entropies."""
    draw = ramp(3)
    data = data_of(draw(20_000, 0), draw(5_000, 1))
    alone, together = score(independent_pixels, data), score(full_gaussian, data)
    marginals = 3 * 0.5 * math.log(2 * math.pi * math.e)
    total_correlation = -math.log(1 - 0.9**2)
    for nats, entropy in [(alone, marginals), (together, marginals - total_correlation)]:
        assert abs(nats.mean() - entropy) < 4 * nats.std() / len(nats) ** 0.5
    assert (alone - together).mean().item() == pytest.approx(total_correlation, abs=0.06)


def test_correlated_pixels_are_better_under_the_gaussian():
    draw = ramp(16)
    data = data_of(onto_levels(draw(2_000, 0), 16), onto_levels(draw(500, 1), 16), levels=16)
    assert score(full_gaussian, data).mean() < 0.7 * score(independent_pixels, data).mean()


def test_the_bins_of_real_values_become_as_fine_as_the_data_asks():
    """grid-25 is five narrow modes by five, a product: its entropy is within reach of independent dimensions."""
    nats = score(independent_pixels, load("grid-25")).mean().item()
    assert nats == pytest.approx(named("grid-25").entropy(), abs=0.05)


def test_a_real_feature_is_predicted_as_one_value_after_another():
    """p(x | train) = sum_K P(train, x | K) / sum_K P(train | K), each P a product of (n + 1/2) / (N + K/2) in turn."""
    train, held_out = np.float32([-1.0, 1.0, 1.25, 0.9]), np.float32([-3.0, 0.0, 1.1, 1.25])
    law = logistic(train.mean(), train.std() * 3**0.5 / math.pi)

    def joint(values):
        total = 0.0
        for K in 2.0 ** np.arange(11):
            bins = np.floor(law.cdf(values) * K)
            total += math.prod((np.sum(bins[:i] == b) + 0.5) / (i + K / 2) * K for i, b in enumerate(bins))
        return total

    expected = [joint(np.append(train, x)) / joint(train) * law.pdf(x) for x in held_out]
    nats = score(independent_pixels, data_of(train[:, None], held_out[:, None]))
    assert (-nats).exp().tolist() == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize(
    "train",
    [
        [[0.3], [0.3]],
        randn((3, 1), stream(0)),
        torch.cat([randn((900, 1), stream(1)), 0.01 * randn((100, 1), stream(2)) + 2]),
        rand((2_000, 1), stream(3)).exp(),
    ],
    ids=["constant", "three", "narrow mode", "bounded"],
)
def test_the_density_of_a_real_feature_integrates_to_one(train):
    """The midpoint rule over 80 deviations; beyond, the logistic tails hold less than 1e-15."""
    train = torch.as_tensor(train)
    centre, width = train.mean().double(), 80 * (train.std(correction=0).double() or 1.0)
    n = 2**20
    x = centre + width * ((torch.arange(n, dtype=torch.float64)[:, None] + 0.5) / n - 0.5)
    density = (-independent_pixels(data_of(train, train[:1]), x)).exp()
    assert density.sum().item() * width / n == pytest.approx(1, abs=2e-3)


@each_baseline
def test_no_real_value_is_impossible(baseline):
    """Far out, the density falls and stays above zero."""
    data = data_of(randn((100, 1), stream(0)), [[10.0], [-1e3], [1e5], [-1e30]])
    nats = score(baseline, data)
    assert nats.diff().gt(0).all()
    assert nats.isfinite().all()


def test_a_constant_feature_adds_the_same_number_to_every_example():
    train, held_out = ramp(2)(200, 0), ramp(2)(50, 1)
    wider = [torch.cat([x[:, :1], torch.full((len(x), 1), 0.7), x[:, 1:]], 1) for x in (train, held_out)]
    added = score(independent_pixels, data_of(*wider)) - score(independent_pixels, data_of(train, held_out))
    torch.testing.assert_close(added, added[:1].expand(50), rtol=0, atol=1e-9)


@each_baseline
@pytest.mark.parametrize("shape", [(6,), (1, 2, 3)])
def test_ten_times_smaller_units_cost_ln_10_per_number(baseline, shape):
    """Pixels share their unit, so that those that never change follow it too."""
    x = ramp(6)(1_200, 0).reshape(-1, *shape)
    if len(shape) == 3:
        x[:, 0, 0, 0] = 0.5
    once, tenfold = (score(baseline, data_of(unit * x[:1_000], unit * x[1_000:])) for unit in (1, 10))
    torch.testing.assert_close(tenfold - once, torch.full_like(once, 6 * math.log(10)), rtol=0, atol=1e-4)


@each_baseline
@pytest.mark.parametrize("levels", [None, 16])
def test_an_example_is_scored_by_the_training_side_alone(baseline, levels, monkeypatch):
    """Neither what is held out, nor what is scored beside it, nor the pieces of work, change its nats."""
    train, held_out = ramp(5)(300, 0), ramp(5)(40, 1)
    if levels:
        train, held_out = onto_levels(train, levels), onto_levels(held_out, levels)
    data = data_of(train, held_out, levels)
    nats = score(baseline, data)
    other = data_of(train, train[:1], levels)
    monkeypatch.setattr(baselines, "AT_ONCE", 600)
    pieces = torch.cat([baseline(other, data.held_out[:1]), baseline(other, data.held_out[1:])])
    torch.testing.assert_close(pieces, nats, rtol=1e-12, atol=1e-12)


@each_baseline
def test_a_small_mnist_takes_two_seconds(baseline):
    images = onto_levels(randn((2_500, 784), stream(0)), 256).reshape(-1, 1, 28, 28)
    data = data_of(images[:2_000], images[2_000:], levels=256)
    start = time.process_time()
    score(baseline, data)
    assert time.process_time() - start < 2


@each_baseline
@pytest.mark.parametrize(
    "held_out", [torch.zeros(2, 64, dtype=torch.uint8), torch.zeros(2, 1, 8, 8), torch.full((2, 1, 8, 8), 17)]
)
def test_examples_that_are_not_the_datas_are_refused(baseline, held_out):
    with pytest.raises(OptionError, match="digits"):
        baseline(load("digits"), held_out)
