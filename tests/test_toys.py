"""The toys are oracles that other tests trust: each of their numbers is checked against an independent one."""

import math

import pytest
import torch
from scipy.stats import truncnorm

from ancestral.errors import OptionError
from ancestral.rng import rand, stream, streams
from ancestral.toys import TOYS, Boxes, Mixture, gaussian, named, swiss_roll, two_moons

SPATIAL = Mixture(
    "spatial",
    torch.tensor([1.0, 3.0]),
    torch.tensor([[0.5, -0.5, 1.0], [-0.4, 0.3, 0.0]]),
    torch.tensor(
        [[[1.0, 0.3, 0.1], [0.3, 0.8, 0.2], [0.1, 0.2, 0.6]], [[0.2, 0.1, 0.0], [0.1, 0.3, -0.1], [0, -0.1, 0.5]]]
    ),
)
INTERVALS = Boxes("intervals", torch.tensor([[-2.0], [0.3]]), torch.tensor([[-1.2], [1.9]]))
CLEAN = {name: named(name) for name in TOYS} | {"spatial": SPATIAL, "intervals": INTERVALS}
NOISY = {f"{name}, noisy": toy.diffused(0.8, 0.3) for name, toy in CLEAN.items()}
LAWS = CLEAN | NOISY
LEVELS = [(1.0, 0.2), (0.8, 0.6), (0.2, 0.98)]

each_law = pytest.mark.parametrize("toy", LAWS.values(), ids=LAWS.keys())
each_clean = pytest.mark.parametrize("toy", CLEAN.values(), ids=CLEAN.keys())
each_noisy = pytest.mark.parametrize("toy", NOISY.values(), ids=NOISY.keys())
each_level = pytest.mark.parametrize(("alpha", "sigma"), LEVELS)


def scattered(toy, n=60):
    """Points where a sampler may be: draws of the toy, and others far from any mode."""
    return torch.cat([toy.sample(n, rng=stream(1)), 6 * rand((n, toy.dim), stream(2)) - 3])


def gradient(f, x, h=1e-5):
    """Central differences of f along each coordinate, stacked last."""
    steps = h * torch.eye(x.shape[1], dtype=torch.float64)
    return torch.stack([(f(x + step) - f(x - step)) / (2 * h) for step in steps], dim=-1)


def assert_mean(values, expected, weights=None):
    """The (self-normalised) weighted mean of the rows equals what is expected within 4 standard errors."""
    weights = torch.full((len(values),), 1 / len(values), dtype=torch.float64) if weights is None else weights
    weights = (weights / weights.sum()).reshape(-1, *[1] * (values.ndim - 1))
    mean = (weights * values).sum(0)
    stderr = (weights * (values - mean)).square().sum(0).sqrt()
    assert ((mean - expected).abs() <= 4 * stderr + 1e-12).all()


def outer(x):
    return x[:, :, None] * x[:, None, :]


@each_law
def test_draws_have_the_stated_mean_and_covariance(toy):
    x = toy.sample(20_000, rng=stream(0))
    assert_mean(x, toy.mean)
    assert_mean(outer(x - toy.mean), toy.cov)


@each_law
def test_a_draw_depends_on_its_own_generator_only(toy):
    batch = toy.sample(5, rng=streams(7, 5))
    alone = torch.cat([toy.sample(1, rng=streams(7, 1, start=i)) for i in range(5)])
    torch.testing.assert_close(batch, alone, rtol=0, atol=1e-14)


@pytest.mark.parametrize("name", [name for name, toy in LAWS.items() if toy.dim == 2])
def test_density_integrates_to_one(name):
    toy, step = LAWS[name], 0.05
    ticks = torch.arange(-8, 8, step, dtype=torch.float64) + step / 2
    grid = torch.cartesian_prod(ticks, ticks)
    mass = step**2 * sum(toy.log_prob(x).exp().sum() for x in grid.split(8192))
    assert mass.item() == pytest.approx(1.0, abs=1e-6)


@each_law
def test_score_is_the_gradient_of_log_prob(toy):
    x = scattered(toy)
    x = x[toy.log_prob(x).isfinite()]
    torch.testing.assert_close(toy.score(x), gradient(toy.log_prob, x), rtol=1e-5, atol=1e-5)


@each_noisy
def test_expected_score_is_zero(toy):
    assert_mean(toy.score(toy.sample(20_000, rng=stream(5))), torch.zeros(toy.dim))


@each_level
@each_law
def test_tweedie_posterior_mean_is_the_score_of_the_diffused_law(toy, alpha, sigma):
    """alpha E[x_0|x_t] = x_t + sigma^2 grad log p(x_t), Robbins (1956)."""
    x_t = scattered(toy.diffused(alpha, sigma))
    score = toy.diffused(alpha, sigma).score(x_t)
    denoised = toy.posterior_mean(x_t, alpha, sigma)
    torch.testing.assert_close(alpha * denoised, x_t + sigma**2 * score, rtol=1e-10, atol=1e-10)


@each_level
@each_law
def test_posterior_covariance_is_the_curvature_of_the_diffused_law(toy, alpha, sigma):
    """Cov[x_0|x_t] = sigma^2/alpha^2 (I + sigma^2 Hessian log p(x_t))."""
    x_t = scattered(toy.diffused(alpha, sigma))
    hessian = gradient(toy.diffused(alpha, sigma).score, x_t)
    expected = (sigma / alpha) ** 2 * (torch.eye(toy.dim) + sigma**2 * hessian)
    torch.testing.assert_close(toy.posterior_cov(x_t, alpha, sigma), expected, rtol=1e-5, atol=1e-6)


@each_law
def test_posterior_agrees_with_weighted_draws(toy):
    """Bayes by brute force: draws x_0 ~ p weighted with N(x_t; alpha x_0, sigma^2 I)."""
    alpha, sigma = 0.8, 0.6
    x_0 = toy.sample(100_000, rng=stream(6))
    x_t = toy.diffused(alpha, sigma).sample(4, rng=stream(7))
    means, covs = toy.posterior_mean(x_t, alpha, sigma), toy.posterior_cov(x_t, alpha, sigma)
    for x, mean, cov in zip(x_t, means, covs, strict=True):
        weights = (-(x - alpha * x_0).square().sum(1) / (2 * sigma**2)).softmax(0)
        assert_mean(x_0, mean, weights)
        assert_mean(outer(x_0 - mean), cov, weights)


def test_checkerboard_posterior_agrees_with_a_fine_grid():
    toy, alpha, sigma = named("checkerboard"), 0.9, 0.4
    ticks = torch.arange(-2, 2, 0.01, dtype=torch.float64) + 0.005
    x_0 = torch.cartesian_prod(ticks, ticks)
    x_0 = x_0[toy.log_prob(x_0).isfinite()]
    x_t = toy.diffused(alpha, sigma).sample(30, rng=stream(8))
    weights = (-torch.cdist(x_t, alpha * x_0).square() / (2 * sigma**2)).softmax(1)
    mean = weights @ x_0
    cov = torch.einsum("nm,md,me->nde", weights, x_0, x_0) - outer(mean)
    torch.testing.assert_close(toy.posterior_mean(x_t, alpha, sigma), mean, rtol=0, atol=1e-4)
    torch.testing.assert_close(toy.posterior_cov(x_t, alpha, sigma), cov, rtol=0, atol=1e-4)


@pytest.mark.parametrize("sigma", [0.05, 0.3, 1.0])
def test_posterior_in_one_box_is_a_truncated_normal(sigma):
    box = Boxes("box", torch.tensor([[0.3]]), torch.tensor([[1.4]]))
    x = torch.linspace(0.1, 1.6, 7, dtype=torch.float64)[:, None]
    lower, upper = (box.lows.item() - x.numpy()) / sigma, (box.highs.item() - x.numpy()) / sigma
    expected = truncnorm(lower, upper, loc=x.numpy(), scale=sigma)
    torch.testing.assert_close(box.posterior_mean(x, 1.0, sigma), torch.from_numpy(expected.mean()), rtol=1e-8, atol=0)
    variance = torch.from_numpy(expected.var())[:, :, None]
    torch.testing.assert_close(box.posterior_cov(x, 1.0, sigma), variance, rtol=1e-6, atol=0)


@pytest.mark.parametrize("alpha", [1e-3, 1e-6, 1e-12])
def test_posterior_in_a_box_keeps_its_digits_under_overwhelming_noise(alpha):
    """The leading order in alpha is middle + alpha x_t width^2/12, and width^2/12; differences of Phi would lose it."""
    box, x, width = Boxes("box", torch.tensor([[0.0]]), torch.tensor([[2.0]])), torch.tensor([[1.5]]), 2.0
    shift = box.posterior_mean(x, alpha, 1.0) - 1.0
    assert shift.item() == pytest.approx(alpha * (1.5 - alpha) * width**2 / 12, rel=1e-4, abs=1e-15)
    assert box.posterior_cov(x, alpha, 1.0).item() == pytest.approx(width**2 / 12, rel=2 * alpha**2 + 1e-13)


@each_law
def test_without_noise_the_posterior_is_the_point_and_without_signal_the_prior(toy):
    x_t = toy.sample(10, rng=stream(9))
    torch.testing.assert_close(toy.posterior_mean(x_t, 0.5, 0.0), x_t / 0.5, rtol=1e-12, atol=1e-12)
    assert toy.posterior_cov(x_t, 0.5, 0.0).abs().max() < 1e-20
    torch.testing.assert_close(toy.posterior_mean(x_t, 0.0, 2.0), toy.mean.expand(10, -1), rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(toy.posterior_cov(x_t, 0.0, 2.0), toy.cov.expand(10, -1, -1), rtol=1e-12, atol=1e-12)


@each_law
def test_every_point_may_have_its_own_noise_level(toy):
    alpha = torch.tensor([1.0, 0.9, 0.5, 0.0, 0.7], dtype=torch.float64)
    sigma = torch.tensor([0.0, 0.4, 0.8, 1.0, 2.0], dtype=torch.float64)
    x_t = toy.sample(5, rng=stream(10))
    for posterior in (toy.posterior_mean, toy.posterior_cov):
        one_by_one = torch.cat([posterior(x_t[i : i + 1], alpha[i].item(), sigma[i].item()) for i in range(5)])
        torch.testing.assert_close(posterior(x_t, alpha, sigma), one_by_one, rtol=1e-12, atol=1e-12)


@each_law
@pytest.mark.parametrize("b", [0.7, 0.0])
def test_noise_merges(toy, b):
    """Two stages of noise are one: N(0, s^2) then N(0, r^2) add their variances."""
    a, s, r = 0.9, 0.4, 0.5
    twice, once = toy.diffused(a, s).diffused(b, r), toy.diffused(a * b, math.hypot(b * s, r))
    x = scattered(once)
    torch.testing.assert_close(twice.log_prob(x), once.log_prob(x), rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("name", [name for name, toy in LAWS.items() if toy is not SPATIAL])
def test_entropy_is_minus_the_expected_log_prob(name):
    toy = LAWS[name]
    entropy = toy.entropy()
    assert_mean(-toy.log_prob(toy.sample(20_000, rng=stream(11)))[:, None], entropy)


def test_entropy_of_modes_far_apart_is_that_of_one_mode_and_the_choice():
    """H = H(w) + sum_k w_k H_k when the components do not overlap."""
    covs = torch.tensor([[[0.5, 0.2], [0.2, 0.3]], [[0.1, 0.0], [0.0, 0.4]]], dtype=torch.float64)
    weights, means = torch.tensor([0.25, 0.75], dtype=torch.float64), torch.tensor([[-10.0, 0.0], [10.0, 1.0]])
    parts = torch.tensor([gaussian([0.0, 0.0], cov).entropy() for cov in covs], dtype=torch.float64)
    expected = (weights @ (parts - weights.log())).item()
    assert Mixture("far", weights, means, covs).entropy() == pytest.approx(expected, abs=1e-9)


def test_entropy_out_of_reach_is_refused_with_the_way_out():
    needles = Mixture("needles", torch.ones(2), torch.eye(2), 1e-8 * torch.eye(2).expand(2, 2, 2))
    with pytest.raises(OptionError, match=r"'needles' in 2 dimensions .* average -log_prob"):
        needles.entropy()


@each_noisy
def test_far_tails_do_not_underflow(toy):
    """Along a ray log p stays finite and falls, and the score is still its slope."""
    direction = torch.arange(1.0, toy.dim + 1, dtype=torch.float64)
    ray = torch.tensor([[10.0], [30.0], [100.0]], dtype=torch.float64) * direction / direction.norm()
    log_p = toy.log_prob(ray)
    assert log_p.isfinite().all()
    assert (log_p.diff() < 0).all()
    torch.testing.assert_close(toy.score(ray), gradient(toy.log_prob, ray, h=1e-3), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize(("curve", "arms"), [(two_moons(), 2), (swiss_roll(), 1)], ids=["two-moons", "swiss-roll"])
def test_curves_are_smooth_and_not_beads_on_a_string(curve, arms):
    """Between two neighbouring centres the density is that at the centres, away from the ends of the curve."""
    for arm in curve.means.chunk(arms):
        at, between = curve.log_prob(arm), curve.log_prob((arm[1:] + arm[:-1]) / 2)
        ripple = between - (at[1:] + at[:-1]) / 2
        assert ripple[8:-8].abs().max() < 1e-3


@pytest.mark.parametrize("name", TOYS)
def test_toys_are_centred_and_of_unit_order(name):
    toy = named(name)
    assert toy.name == name
    assert toy.mean.abs().max() <= 0.5
    assert ((toy.cov.diagonal() > 0.5**2) & (toy.cov.diagonal() < 2.5**2)).all()


def test_an_unknown_toy_is_answered_with_the_closest_one():
    with pytest.raises(OptionError, match="did you mean 'two-moons'"):
        named("two-moon")


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Boxes("b", torch.zeros(2, 1), torch.ones(2, 1)), "overlap"),
        (lambda: Boxes("b", torch.ones(1, 2), torch.ones(1, 2)), "every low must be below its high"),
        (lambda: gaussian([0.0, 0.0], [[1.0, 2.0], [2.0, 1.0]]), "positive definite"),
        (lambda: gaussian([0.0, 0.0], [[1.0]]), r"give weights \(1,\) and covs \(1, 2, 2\)"),
        (lambda: named("gaussian").log_prob(torch.zeros(3)), r"this toy takes \(n, 2\)"),
        (lambda: named("gaussian").diffused(-1.0, 0.5), "at least 0, and not both 0"),
        (lambda: named("checkerboard").posterior_mean(torch.zeros(3, 2), 0.0, 0.0), "at least 0, and not both 0"),
        (lambda: named("mixture").posterior_mean(torch.zeros(3, 2), torch.ones(2), 1.0), "one per point"),
    ],
)
def test_what_makes_no_density_is_refused_in_a_sentence(make, message):
    with pytest.raises(OptionError, match=message):
        make()
