"""Samplers: exactness, equivalence, measured order, and what an example depends on."""

import math
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from inspect import getsource
from itertools import pairwise
from pathlib import Path

import pytest
import torch

from ancestral import toys
from ancestral.diffusion import grids, multistep, sample, singlestep
from ancestral.diffusion import process as P
from ancestral.diffusion.denoise import NetworkDenoiser, OracleDenoiser
from ancestral.diffusion.grids import grid, karras, uniform
from ancestral.diffusion.sample import (
    SAMPLERS,
    Point,
    ancestral,
    annealed_langevin,
    ddim,
    euler,
    heun,
    walk,
)
from ancestral.errors import OptionError
from ancestral.nets import MLP
from ancestral.rng import randn, stream, streams
from oracles import COMBINATIONS, exact

MEAN, COV = torch.tensor([0.3, -0.6]), torch.tensor([[0.5, 0.2], [0.2, 0.3]])


def start(process: P.Process, n: int, seed: int = 0) -> torch.Tensor:
    return randn((n, 2), stream(seed), dtype=torch.float64) * process.prior_var() ** 0.5


def quick(name: str) -> dict[str, float]:
    """Options with which a sampler takes no longer than it must."""
    return {"tolerance": 0.01} if name == "adaptive" else {}


def gaussian_ode_map(process: P.Process, x_t: torch.Tensor, t: float, s: float) -> torch.Tensor:
    """The probability-flow ODE of N(m, S) in closed form: x_s = alpha_s m + C_s^(1/2) C_t^(-1/2) (x_t - alpha_t m)."""
    values, vectors = torch.linalg.eigh(COV.double())
    (alpha_t, sigma_t), (alpha_s, sigma_s) = process(t), process(s)
    ratio = ((alpha_s**2 * values + sigma_s**2) / (alpha_t**2 * values + sigma_t**2)).sqrt()
    return alpha_s * MEAN + (x_t - alpha_t * MEAN) @ (vectors * ratio) @ vectors.T


@pytest.mark.parametrize("name", P.SCHEDULES)
@pytest.mark.parametrize("sampler", [euler, heun])
def test_euler_and_heun_follow_the_flow_of_a_gaussian(name, sampler):
    """The error on the probability-flow ODE in closed form falls as n^-order: the fitted slope is within 0.1."""
    process = P.named(name)
    denoiser = OracleDenoiser(toys.gaussian(MEAN, COV), process)
    first, last = 0.9, 0.1
    x = start(P.linear(), 20) * float(process(first)[0] ** 2 + process(first)[1] ** 2) ** 0.5
    truth = gaussian_ode_map(process, x, first, last)
    errors = []
    for n in (40, 320):
        times = torch.linspace(first, last, n + 1, dtype=torch.float64).tolist()
        *_, end = walk(sampler.step, denoiser, Point(first, x), times)
        errors.append(float((end.x - truth).norm()))
    assert math.log(errors[0] / errors[1], 8) == pytest.approx(sampler.order, abs=0.1)


@pytest.mark.parametrize(("name", "predicts"), COMBINATIONS)
def test_ddim_with_eta_1_is_ancestral_sampling_and_with_eta_0_is_euler(name, predicts):
    process = P.named(name)
    denoiser, x = exact(toys.named("mixture"), process, predicts), start(process, 30)
    steps = 12
    tight = {"rtol": 1e-6, "atol": 1e-7}
    torch.testing.assert_close(
        ddim(denoiser, x, steps, eta=1.0, rng=stream(5)), ancestral(denoiser, x, steps, rng=stream(5)), **tight
    )
    torch.testing.assert_close(ddim(denoiser, x, steps), euler(denoiser, x, steps), **tight)


@pytest.mark.parametrize("name", P.SCHEDULES)
def test_ancestral_sampling_of_a_gaussian_reproduces_its_mean_and_covariance(name):
    """With the exact denoiser and the optimal variance every step is exact, so 8 steps are as good as 1000."""
    process, n = P.named(name), 100_000
    mean, var = torch.tensor([0.3, -0.6]).double(), torch.tensor([0.5, 0.02]).double()
    toy = toys.gaussian(mean, var.diag())
    oracle = OracleDenoiser(toy, process)
    t_1 = process.time(14.0)
    steps = torch.cat([uniform(process, 7), t_1.reshape(1)])
    alpha, sigma = (float(c) for c in process(1.0))
    x_T = toy.diffused(alpha, sigma).sample(n, rng=stream(1))
    *_, before, _ = ancestral.path(oracle, x_T, steps, rng=stream(2), variance="optimal")
    alpha_1, sigma_1 = process(t_1)
    scale = (alpha_1**2 * var + sigma_1**2).sqrt()
    z = (before.x - alpha_1 * mean) / scale
    assert (z.mean(0).abs() < 4 / n**0.5).all()
    assert ((z.T @ z / n - torch.eye(2)).abs() < 4 * (2 / n) ** 0.5).all()


@pytest.mark.parametrize("variance", ["beta", "fixed-small"])
def test_ancestral_sampling_with_fixed_variances_converges_to_the_law(variance):
    """The variance of the samples approaches the data's as 1/T, from above with beta, from below with beta~."""
    process, S = P.linear(), 0.25
    oracle = OracleDenoiser(toys.gaussian(torch.tensor([0.3]), torch.tensor([[S]])), process)

    def excess(T: int) -> float:
        """Exact propagation of mean and variance: the reverse chain of a Gaussian is affine."""
        mean, var = torch.zeros((), dtype=torch.float64), torch.ones((), dtype=torch.float64)
        times = [*uniform(process, T).tolist(), 0.0]
        for t, s in pairwise(times[:-1]):
            probe = torch.tensor([[0.0], [1.0]], dtype=torch.float64)
            (shift, shifted), noise = _affine(oracle, probe, s, t, variance)
            mean, var = shift + (shifted - shift) * mean, (shifted - shift) ** 2 * var + noise
        alpha, sigma = process(times[-2])
        return float(var - (alpha**2 * S + sigma**2)) / S

    coarse, fine = excess(200), excess(400)
    assert math.copysign(1, coarse) == (1 if variance == "beta" else -1)
    assert abs(fine / coarse) < 0.62


def _affine(oracle, probe, s, t, variance):
    from ancestral.diffusion.denoise import reverse

    mean, var, _ = reverse(oracle, probe, s, t, variance)
    return mean.flatten(), var.flatten()[0]


@pytest.mark.parametrize("name", P.SCHEDULES)
def test_one_step_is_exact_for_a_point_mass(name):
    process, point = P.named(name), torch.tensor([0.4, -0.9]).double()
    oracle = OracleDenoiser(toys.gaussian(point, 1e-30 * torch.eye(2)), process)
    x = start(process, 5)
    for sampler in SAMPLERS.values():
        if sampler.stochastic or not sampler.order:
            continue
        torch.testing.assert_close(sampler(oracle, x, 1), point.expand(5, 2), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("name", P.SCHEDULES)
def test_every_sampler_finds_the_modes_in_their_proportions(name):
    process, n = P.named(name), 4000
    toy = toys.named("ring-8")
    oracle = OracleDenoiser(toy, process)
    x = start(process, n, seed=3)
    for label, sampler in SAMPLERS.items():
        end = sampler(oracle, x, 40 if sampler.evaluations else 10, rng=stream(4), **quick(label))
        mode = torch.cdist(end, toy.means).min(1)
        share = torch.bincount(mode.indices, minlength=8) / n
        slack = 5 * (0.125 * 0.875 / n) ** 0.5
        assert (share - 0.125).abs().max() < slack + (0.02 if label == "annealed-langevin" else 0), label
        assert float(mode.values.median()) < 0.3, label


@pytest.mark.parametrize("name", SAMPLERS)
def test_example_i_depends_on_seed_i_and_not_on_its_batch(name):
    """To rounding: a matrix product may add up in another order for another number of rows."""
    process, sampler = P.cosine(), SAMPLERS[name]
    torch.manual_seed(0)
    net = MLP((2,), width=32, depth=2).double()
    for parameter in net.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    denoiser = NetworkDenoiser(net, process)

    def run(n: int, begin: int = 0) -> torch.Tensor:
        each = streams(7, n, start=begin)
        return sampler(denoiser, randn((n, 2), each, dtype=torch.float64), 6, rng=each)

    full = run(8)
    torch.testing.assert_close(run(3), full[:3], rtol=1e-8, atol=1e-9)
    torch.testing.assert_close(run(2, begin=5), full[5:7], rtol=1e-8, atol=1e-9)
    assert torch.equal(randn((3, 2), streams(7, 3)), randn((8, 2), streams(7, 8))[:3])
    assert torch.equal(randn((2, 2), streams([11, 12], 2))[1:], randn((1, 2), streams([12], 1)))
    assert (full[:, None] - full).abs().amax(2).fill_diagonal_(1).min() > 1e-3


@pytest.mark.parametrize("name", SAMPLERS)
def test_a_walk_can_be_taken_up_at_any_point(name):
    """To the bit: a point has all that the rest of the walk needs, and what is done with it leaves it as it was."""
    process, step = P.linear(), SAMPLERS[name].step
    oracle = OracleDenoiser(toys.named("two-moons"), process)
    x, times = start(process, 5), [*uniform(process, 7).tolist(), 0.0]
    rng, points, states = stream(1), [Point(1.0, x)], []
    for t, s in pairwise(times):
        states.append(rng.bit_generator.state)
        points.extend([*walk(step, oracle, points[-1], [t, s], rng=rng, **quick(name))][1:])
    assert [point.t for point in points] == times
    whole = list(SAMPLERS[name].path(oracle, x, 7, rng=stream(1), **quick(name)))
    for i in (1, 2, 5, 2):
        rng = stream(1)
        rng.bit_generator.state = states[i]
        *_, end = walk(step, oracle, whole[i], times[i:], rng=rng, **quick(name))
        assert torch.equal(end.x, whole[-1].x)
        assert torch.equal(end.x, points[-1].x)


@pytest.mark.parametrize("name", SAMPLERS)
def test_walks_in_two_threads_know_nothing_of_each_other(name):
    process, sampler = P.linear(), SAMPLERS[name]
    oracle = OracleDenoiser(toys.named("mixture"), process)
    x = start(process, 4)

    def points(seed: int) -> list[Point]:
        return list(sampler.path(oracle, x + seed, 6, rng=seed, **quick(name)))

    with ThreadPoolExecutor(2) as pool:
        together = list(pool.map(points, [1, 2, 3, 4]))
    for seed, found in zip([1, 2, 3, 4], together, strict=True):
        for ours, theirs in zip(points(seed)[1:], found[1:], strict=True):
            assert torch.equal(ours.x, theirs.x)


@pytest.mark.parametrize("name", SAMPLERS)
def test_a_sampler_asks_as_often_as_it_says(name):
    """`evaluations` a step, but for the last, which may take fewer or one more."""
    process, sampler = P.cosine(), SAMPLERS[name]
    oracle, asked = OracleDenoiser(toys.named("mixture"), process), []
    oracle.register_forward_hook(lambda _module, _inputs, x_0_hat: asked.append(x_0_hat))
    for i, _ in enumerate(sampler.path(oracle, start(process, 3), 4, rng=stream(0), **quick(name))):
        if sampler.evaluations and i:
            assert len(asked) == sampler.evaluations or i == 4
        asked.clear()


STOCHASTIC = [
    *((name, {}) for name, sampler in SAMPLERS.items() if sampler.stochastic and name != "annealed-langevin"),
    ("ddim", {"eta": 0.7}),
    ("euler", {"churn": 0.05}),
    ("heun", {"churn": 0.2}),
    ("sa-solver", {"tau": 0.5}),
]


@pytest.mark.parametrize(("name", "options"), STOCHASTIC)
def test_noise_leaves_the_law_as_it_is(name, options):
    """Moments and weights of a mixture are those of as many exact draws, where steps are many enough for the order.

    In particular noise is added before the network is asked, and no weight has a wrong limit.
    """
    law, process, n = toys.named("mixture"), P.linear(), 8000
    oracle, sampler = OracleDenoiser(law, process), SAMPLERS[name]
    alpha, sigma = (float(c) for c in process(1.0))
    x = law.diffused(alpha, sigma).sample(n, rng=stream(1))
    steps = 300 if name in ("ancestral", "ddim", "euler", "predictor-corrector") else 100
    end = sampler(oracle, x, karras(process, steps), rng=stream(2), **options)
    drawn = law.sample(n, rng=stream(3))

    def features(x: torch.Tensor) -> torch.Tensor:
        """Coordinates, their products, and which Gaussian it came from."""
        nearest = torch.nn.functional.one_hot(law._components(x, 1.0, 0.0)[0].argmax(1), 3)
        return torch.cat([x, x.square(), x.prod(1, keepdim=True), nearest], 1)

    ours, exact_ones = features(end), features(drawn)
    error = (ours.mean(0) - exact_ones.mean(0)) / (2 * exact_ones.var(0) / n).sqrt()
    assert error.abs().max() < 4.5, error


def test_annealed_langevin_reports_which_levels_were_explored():
    """Steps are in units of the noise, so chains mix where noise is as wide as the data and stand still far below."""
    process = P.edm()
    oracle = OracleDenoiser(toys.gaussian(MEAN, COV), process)
    x, steps = start(process, 200), karras(process, 15)
    first, *levels = annealed_langevin.path(oracle, x, steps, rng=stream(6), updates=300, size=0.7)
    assert first.memory is None
    for t, level in zip(steps, levels, strict=True):
        sigma = float(process(t)[1])
        if sigma > 0.7:
            assert (level.memory.r_hat() < 1.1).all()
        if sigma < 0.05:
            assert (level.memory.r_hat() > 1.5).all()
    assert (levels[-1].x.mean(0) - MEAN).abs().max() < 4 * (0.5 / 200) ** 0.5


@pytest.mark.parametrize("name", P.SCHEDULES)
def test_grids_decrease_from_the_end_of_the_process(name):
    process = P.named(name)
    for steps in (uniform(process, 20), karras(process, 20), grid(process, 1), grid(process, 333)):
        assert steps[0] == 1
        assert (steps.diff() < 0).all()
        assert steps[-1] > 0
    ratio = torch.exp(-process.log_snr(karras(process, 20)[1:]) / 14)
    torch.testing.assert_close(ratio.diff(), ratio.diff()[0].expand(18), rtol=1e-4, atol=1e-9)


def test_a_seed_a_list_of_seeds_and_generators_name_the_same_noise():
    oracle, x = OracleDenoiser(toys.named("ring-8"), P.cosine()), start(P.cosine(), 3)
    by_seed = ancestral(oracle, x, 5, rng=7)
    assert torch.equal(by_seed, ancestral(oracle, x, 5, rng=streams(7, 3)))
    one_each = ancestral(oracle, x, 5, rng=[1, 2, 3])
    assert torch.equal(one_each[1:2], ancestral(oracle, x[1:2], 5, rng=[2]))


def test_illegal_grids_and_missing_noise_are_refused():
    oracle, x = OracleDenoiser(toys.named("ring-8"), P.cosine()), start(P.cosine(), 2)
    for steps in (0, torch.tensor([]), torch.tensor([0.5, 0.5]), torch.tensor([1.5, 0.5]), torch.tensor([0.5, 0.0])):
        with pytest.raises(OptionError, match=r"steps|step"):
            ddim(oracle, x, steps)
    with pytest.raises(OptionError, match="pass rng="):
        ancestral(oracle, x, 5)
    with pytest.raises(OptionError, match="pass rng="):
        ddim(oracle, x, 5, eta=0.5)
    with pytest.raises(OptionError, match=r"lies in \[0, 1\], received 1.5"):
        ddim(oracle, x, 5, eta=1.5, rng=0)


def test_every_step_is_one_screen_and_all_of_them_with_the_grids_are_under_900_lines():
    """Whole files, docstrings and blank lines too; what is measured in order to choose a grid is not among them."""
    files = (sample, singlestep, multistep, grids)
    assert sum(len(Path(module.__file__).read_text().splitlines()) for module in files) < 900
    for name, sampler in SAMPLERS.items():
        step = sampler.step.func if isinstance(sampler.step, partial) else sampler.step
        assert len(getsource(step).splitlines()) <= 50, name
