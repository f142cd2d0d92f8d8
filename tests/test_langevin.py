"""Langevin dynamics against laws known exactly, and its diagnostics against chains whose answers are known."""

import math

import pytest
import torch

from ancestral.errors import OptionError
from ancestral.langevin import Chains, langevin_step, mala, ula
from ancestral.rng import randn, stream, streams
from ancestral.toys import Mixture, checkerboard, gaussian, mixture

S = torch.tensor([[1.0, 0.6], [0.6, 2.0]], dtype=torch.float64)
NORMAL = gaussian([0.0], [[1.0]])
TWO_MODES = Mixture("two modes", torch.tensor([0.2, 0.8]), torch.tensor([[-1.2], [1.2]]), 0.36 * torch.ones(2, 1, 1))


def mean_and_stderr(samples):
    """Mean of (steps, chains, D) over steps and chains, and its standard error from the effective sample size."""
    draws = samples.flatten(0, 1)
    return draws.mean(0), draws.std(0) / Chains(samples).ess().sqrt()


def normal(shape, *key):
    return randn(shape, stream(*key), dtype=torch.float64)


def ar_1(phi, steps, chains, *key):
    """Stationary chains x_t = phi x_{t-1} + sqrt(1 - phi^2) eps."""
    eps = normal((steps, chains, 1), *key)
    x = [eps[0]]
    for e in eps[1:]:
        x.append(phi * x[-1] + math.sqrt(1 - phi**2) * e)
    return torch.stack(x)


def stationary_covariance(delta):
    """Of the affine map that one step is on N(0, S), by doubling V = sum_j A^j delta (A^j)^T."""
    identity = torch.eye(2, dtype=torch.float64)
    A = langevin_step(-torch.linalg.solve(S, identity), identity, delta, rng=stream(0), temperature=0.0)
    V = delta * identity
    for _ in range(20):
        V, A = V + A @ V @ A.T, A @ A
    return V


def test_step_adds_noise_of_variance_temperature_times_delta():
    x, score = normal((5, 2), 1), normal((5, 2), 2)
    ascent = langevin_step(score, x, 0.3, rng=stream(3), temperature=0.0)
    noisy = langevin_step(score, x, 0.3, rng=stream(3), temperature=0.5)
    torch.testing.assert_close(ascent, x + 0.15 * score)
    torch.testing.assert_close(noisy - ascent, math.sqrt(0.15) * normal((5, 2), 3))


def test_step_size_may_differ_between_states():
    x, score = normal((3, 2), 4), normal((3, 2), 5)
    delta = torch.tensor([[0.1], [0.2], [0.4]], dtype=torch.float64)
    together = langevin_step(score, x, delta, rng=streams(0, 3))
    for i in range(3):
        alone = langevin_step(score[i : i + 1], x[i : i + 1], delta[i].item(), rng=streams(0, 1, start=i))
        torch.testing.assert_close(together[i : i + 1], alone)


def test_ula_bias_on_a_gaussian_is_linear_in_delta():
    """The stationary covariance of the recursion is (I - delta/4 S^-1)^-1 S, so the bias is delta/4 I + O(delta^2)."""
    deltas = torch.tensor([0.04, 0.02, 0.01], dtype=torch.float64)
    covariances = [stationary_covariance(delta.item()) for delta in deltas]
    for delta, V in zip(deltas, covariances, strict=True):
        torch.testing.assert_close(V, torch.linalg.solve(torch.eye(2) - delta / 4 * S.inverse(), S))
    bias = torch.stack([torch.linalg.matrix_norm(V - S) for V in covariances])
    slopes = bias.log().diff() / deltas.log().diff()
    torch.testing.assert_close(slopes, torch.ones(2, dtype=torch.float64), rtol=0, atol=0.02)


@pytest.mark.parametrize("delta", [0.2, 0.4, 0.8])
def test_ula_has_its_known_bias_and_mala_has_none(delta):
    """On N(0, 1) ULA's variance is 1/(1 - delta/4), at every one of these steps told apart from 1."""
    start = normal((1000, 1), 6)
    unadjusted = ula(NORMAL.score, start, delta, 600, rng=stream(7)).after(100)
    variance, stderr = mean_and_stderr(unadjusted.samples**2)
    assert (variance - 1 / (1 - delta / 4)).abs() < 4 * stderr
    assert (variance - 1).abs() > 4 * stderr

    adjusted = mala(NORMAL.log_prob, NORMAL.score, start, delta, 600, rng=stream(8)).after(100)
    variance, stderr = mean_and_stderr(adjusted.samples**2)
    assert (variance - 1).abs() < 4 * stderr


def test_temperature_scales_the_spread():
    chains = ula(NORMAL.score, normal((1000, 1), 9), 0.4, 400, rng=stream(10), temperature=0.25).after(100)
    variance, stderr = mean_and_stderr(chains.samples**2)
    assert (variance - 0.25 / (1 - 0.4 / 4)).abs() < 4 * stderr


def test_mala_rejections_vanish_as_delta_to_the_three_halves():
    """1 - acceptance = O(delta^(3/2)) at stationarity, Roberts & Rosenthal (1998)."""
    start, deltas = normal((10_000, 1), 11), torch.tensor([0.4, 0.2, 0.1])
    runs = [mala(NORMAL.log_prob, NORMAL.score, start, delta.item(), 60, rng=stream(12)) for delta in deltas]
    rejected = torch.tensor([1 - run.acceptance for run in runs])
    assert rejected[-1] < 0.005
    order = (rejected[0] / rejected[-1]).log() / (deltas[0] / deltas[-1]).log()
    assert order.item() == pytest.approx(1.5, abs=0.15)


@pytest.mark.parametrize("delta", [0.3, 1.0])
def test_one_step_of_mala_leaves_a_mixture_as_it_is_and_one_of_ula_does_not(delta):
    toy = mixture()
    x = toy.sample(100_000, rng=stream(13))

    def deviation(y):
        """Of the second moments, in standard errors."""
        squares = (y - toy.mean)[:, :, None] * (y - toy.mean)[:, None, :]
        return ((squares.mean(0) - toy.cov) / squares.std(0) * len(y) ** 0.5).abs().max()

    assert deviation(mala(toy.log_prob, toy.score, x, delta, 1, rng=stream(14)).samples[0]) < 4
    assert deviation(ula(toy.score, x, delta, 1, rng=stream(14)).samples[0]) > 10


def test_mala_finds_mean_covariance_and_mass_of_a_mixture_from_a_wrong_start():
    toy = mixture()
    chains = mala(toy.log_prob, toy.score, 3 * normal((50, 2), 15), 0.5, 5000, rng=stream(16)).after(200)
    assert (chains.r_hat() < 1.01).all()

    centred = chains.samples - toy.mean
    moments = torch.cat([centred, centred**2, centred[..., :1] * centred[..., 1:]], dim=2)
    expected = torch.stack([*torch.zeros(2), *toy.cov.diagonal(), toy.cov[0, 1]])
    below = [torch.special.ndtr((c - toy.means) / toy.covs.diagonal(dim1=1, dim2=2).sqrt()) for c in (-1.0, 0.0)]
    masses = torch.stack([toy.weights @ b for b in below]).flatten()
    counts = torch.cat([(chains.samples < -1.0).double(), (chains.samples < 0.0).double()], dim=2)

    mean, stderr = mean_and_stderr(torch.cat([moments, counts], dim=2))
    assert ((mean - torch.cat([expected, masses])).abs() < 4 * stderr).all()


def test_mala_keeps_to_the_support_and_fills_it_evenly():
    toy, n = checkerboard(), 20_000
    run = mala(toy.log_prob, toy.score, toy.sample(n, rng=stream(17)), 0.3, 20, rng=stream(18))
    x = run.samples[-1]
    assert toy.log_prob(x).isfinite().all()
    quarters = ((2 * x).floor() + 4) @ torch.tensor([8.0, 1.0], dtype=torch.float64)
    _, counts = quarters.unique(return_counts=True)
    assert len(counts) == 32
    assert ((counts / n - 1 / 32).abs() < 4 * math.sqrt(1 / 32 * 31 / 32 / n)).all()


def test_without_noise_the_recursion_ends_in_local_maxima():
    """Gradient ascent stops where the score is 0 and p a maximum; how many chains stop there says nothing of mass."""
    start = normal((1000, 1), 19)
    end = ula(TWO_MODES.score, start, 0.1, 500, rng=stream(20), temperature=0.0).samples[-1]
    assert TWO_MODES.score(end).abs().max() < 1e-9
    for aside in (-0.05, 0.05):
        assert (TWO_MODES.log_prob(end + aside) < TWO_MODES.log_prob(end)).all()
    assert len(end.round(decimals=6).unique()) == 2
    assert (end < 0).double().mean() > 0.3

    # From the same start, noise at the exact temperature gives each mode its mass and its spread.
    run = ula(TWO_MODES.score, start, 0.05, 2500, rng=stream(21)).after(500)
    mass = TWO_MODES.weights @ torch.special.ndtr((0 - TWO_MODES.means) / 0.6)
    moments = torch.cat([run.samples < 0, run.samples, (run.samples - TWO_MODES.mean) ** 2], dim=2).double()
    expected = torch.cat([mass, TWO_MODES.mean, TWO_MODES.cov[0]])
    mean, stderr = mean_and_stderr(moments)
    assert ((mean - expected).abs() < 4 * stderr + 0.02).all()
    assert (stderr < 0.02).all()


@pytest.mark.parametrize(
    "run",
    [
        lambda x, rng: ula(TWO_MODES.score, x, 0.2, 20, rng=rng),
        lambda x, rng: mala(TWO_MODES.log_prob, TWO_MODES.score, x, 0.8, 20, rng=rng),
    ],
    ids=["ula", "mala"],
)
def test_a_chain_depends_on_its_own_generator_only(run):
    x = normal((4, 1), 22)
    together = run(x, streams(5, 4)).samples
    alone = torch.cat([run(x[i : i + 1], streams(5, 1, start=i)).samples for i in range(4)], dim=1)
    torch.testing.assert_close(together, alone, rtol=0, atol=1e-12)


def test_scores_by_autograd_leave_no_graph_behind():
    def score(x):
        x = x.detach().requires_grad_()
        return torch.autograd.grad(NORMAL.log_prob(x).sum(), x, create_graph=True)[0]

    x = normal((3, 1), 23)
    for run in (
        lambda score: ula(score, x, 0.5, 10, rng=stream(24)).samples,
        lambda score: mala(NORMAL.log_prob, score, x, 0.5, 10, rng=stream(24)).samples,
    ):
        assert not run(score).requires_grad
        torch.testing.assert_close(run(score), run(NORMAL.score))


@pytest.mark.parametrize("phi", [0.0, 0.5, 0.9, -0.5])
def test_ess_of_an_autoregression(phi):
    """An AR(1) of n draws is worth n (1 - phi)/(1 + phi) of them: fewer when it drags, more when it alternates."""
    steps, chains = 4000, 25
    ess = Chains(ar_1(phi, steps, chains, 25)).ess()
    assert ess.item() == pytest.approx(steps * chains * (1 - phi) / (1 + phi), rel=0.1)


def test_ess_of_short_chains_is_its_definition_summed_by_hand():
    x = ar_1(0.7, 24, 3, 29)
    halves = torch.cat([x[:12], x[12:]], dim=1)[..., 0]
    centred, within = halves - halves.mean(0), halves.var(0).mean()
    pooled = 11 / 12 * within + halves.mean(0).var()
    lagged = [(centred[lag:] * centred[: 12 - lag]).sum(0).mean() / 11 for lag in range(12)]
    rho = [(1 - (within - covariance) / pooled).item() for covariance in lagged]
    tau, previous = -1.0, math.inf
    for t in range(0, 12, 2):
        pair = min(rho[t] + rho[t + 1], previous)
        if pair <= 0:
            break
        tau, previous = tau + 2 * pair, pair
    assert Chains(x).ess().item() == pytest.approx(72 / tau, rel=1e-9)


def test_ess_is_the_variance_of_the_mean():
    """Over 2000 repetitions, Var[mean of a chain] = Var[x]/ESS."""
    x = ar_1(0.8, 400, 2000, 26)
    typical = torch.stack([Chains(x[:, i : i + 1]).ess() for i in range(50)]).median()
    assert (x.var() / x.mean(0).var()).item() == pytest.approx(typical.item(), rel=0.15)


def test_r_hat_is_near_one_for_mixed_chains_only():
    mixed = normal((1000, 4, 2), 27)
    modes = torch.tensor([-3.0, -3.0, 3.0, 3.0], dtype=torch.float64)[:, None]
    stuck = mixed + modes * torch.tensor([0.0, 1.0], dtype=torch.float64)
    assert (Chains(mixed).r_hat() < 1.01).all()
    free, caught = Chains(stuck).r_hat()
    assert free < 1.01
    assert caught > 2
    assert Chains(stuck).ess()[1] < 20


def test_r_hat_splits_a_single_chain_and_burn_in_mends_it():
    drifting = normal((2000, 1, 1), 28)
    drifting[:500] += torch.linspace(8, 0, 500, dtype=torch.float64)[:, None, None]
    assert Chains(drifting).r_hat() > 1.1
    assert Chains(drifting).after(500).r_hat() < 1.01


@pytest.mark.parametrize(
    ("run", "message"),
    [
        (lambda: ula(NORMAL.score, torch.zeros(3), 0.1, 5, rng=stream(0)), r"start from \(chains, D\)"),
        (lambda: ula(NORMAL.score, torch.zeros(3, 1), -0.1, 5, rng=stream(0)), "delta -0.1 and 5 steps"),
        (
            lambda: mala(checkerboard().log_prob, checkerboard().score, 9 * torch.ones(1, 2), 0.1, 5, rng=stream(0)),
            "start every chain where p is positive",
        ),
        (lambda: Chains(torch.zeros(3, 2, 1)).ess(), "need at least 4"),
    ],
)
def test_what_makes_no_chain_is_refused_in_a_sentence(run, message):
    with pytest.raises(OptionError, match=message):
        run()
