"""A sampler and a grid fitted to a model: never worse than the best candidate, within the budget, and reproducible."""

import json
from dataclasses import asdict

import pytest
import torch

from ancestral import toys
from ancestral.diffusion import process as P
from ancestral.diffusion.bend import Counted, Pair, Starts, Way, bend, distances
from ancestral.diffusion.denoise import OracleDenoiser
from ancestral.diffusion.fit import DETERMINISTIC, Fit, candidates, fit
from ancestral.diffusion.grids import GRIDS, leading, log_snr, uniform
from ancestral.diffusion.respace import best_chain, best_grid, residuals
from ancestral.diffusion.sample import SAMPLERS, heun
from ancestral.errors import OptionError
from ancestral.rng import randn, stream

FEW = {label: GRIDS[label] for label in ("uniform", "quadratic", "log-snr", "karras")}
VARIED = {**{name: P.named(name) for name in P.SCHEDULES}, "zero-terminal": P.zero_terminal(P.linear())}


def oracle_of(toy: str, process: P.Process) -> OracleDenoiser:
    return OracleDenoiser(toys.named(toy), process)


def noise(process: P.Process, n: int = 24, seed: int = 0) -> torch.Tensor:
    return randn((n, 2), stream(seed), dtype=torch.float64) * process.prior_var() ** 0.5


def starts_of(oracle: OracleDenoiser, x_T: torch.Tensor) -> Starts:
    return Starts(Counted(oracle), x_T, heun(oracle, x_T, log_snr(oracle.process, 300)))


def small_fit(oracle: OracleDenoiser, evaluations: int = 5, n: int = 24, **options) -> Fit:
    own = {"samplers": ["euler", "heun"], "grids": FEW} | options
    return fit(oracle, noise(oracle.process, n), evaluations, **own)


@pytest.mark.parametrize("evaluations", [8, 12])
@pytest.mark.parametrize("toy", ["mixture", "ring-8"])
def test_a_fit_is_never_worse_than_the_best_candidate_and_gains_on_fresh_starts(toy, evaluations):
    """On the starts that were held out by construction; on 200 others by a fifth at the least, measured."""
    oracle = oracle_of(toy, P.linear())
    found = small_fit(oracle, evaluations, n=64)
    assert found.errors.typical <= found.candidate_errors.typical
    fresh = starts_of(oracle, noise(oracle.process, 200, seed=1))
    name, label = found.candidate
    steps = next(
        n for n in range(evaluations, 0, -1) if fresh.asked(Pair(name, label, uniform(None, n))) <= evaluations
    )
    before = fresh.errors(Pair(name, label, FEW[label](oracle.process, steps)))
    after = fresh.errors(Pair(found.sampler, "fitted", found.steps))
    assert after.typical < 0.8 * before.typical
    assert after.rms < before.rms


@pytest.mark.parametrize("name", VARIED)
def test_a_fit_keeps_its_budget_and_its_limits_on_every_process(name):
    """As many evaluations as are told, never more than allowed, and none at less noise than allowed."""
    oracle = oracle_of("mixture", VARIED[name])
    found = small_fit(oracle, 4, log_snr_max=8.0, grids=candidates(8.0))
    counted, x_T = Counted(oracle), noise(oracle.process, 7, seed=2)
    SAMPLERS[found.sampler](counted, x_T, found.steps)
    assert counted.asked == 7 * found.evaluations <= 7 * 4
    assert oracle.process.log_snr(found.times[-1]) <= 8 + 1e-6


def test_the_count_of_what_a_fit_costs_is_what_the_network_was_asked():
    counted = Counted(oracle_of("mixture", P.cosine()))
    found = small_fit(counted)
    assert found.asked + found.evaluations * 1 < counted.asked  # what follows the fit is its errors, on a few starts
    assert counted.asked - found.asked < 20 * 5


def test_a_fit_is_a_function_of_its_arguments_and_survives_json():
    oracle = oracle_of("ring-8", P.cosine())
    found = small_fit(oracle)
    assert small_fit(oracle) == found
    assert Fit(**json.loads(json.dumps(asdict(found)))) == found
    assert fit(oracle, noise(P.cosine(), seed=1), 5, samplers=["euler", "heun"], grids=FEW).times != found.times


@pytest.mark.parametrize("sampler", DETERMINISTIC)
def test_bending_makes_its_own_starts_miss_less_or_changes_nothing(sampler):
    starts = starts_of(oracle_of("mixture", P.linear()), noise(P.linear()))
    for label in ("uniform", "karras"):
        pair = Pair(sampler, label, GRIDS[label](P.linear(), 4))
        bent = bend(starts, pair, rounds=2)
        assert starts.loss(bent) < starts.loss(pair) or bent == pair
    assert bend(starts, pair, rounds=0) == pair


def test_where_every_grid_is_exact_the_candidate_is_kept():
    """One step takes any start to a point mass, so there is nothing to bend."""
    point = toys.gaussian(torch.tensor([0.4, -0.9]), 1e-30 * torch.eye(2))
    found = small_fit(OracleDenoiser(point, P.cosine()), 3)
    assert found.errors.rms < 1e-9
    assert found.errors == found.candidate_errors


def test_one_evaluation_is_fitted_too_by_the_time_it_is_made_at():
    found = small_fit(oracle_of("mixture", P.linear()), 1)
    assert len(found.times) == found.evaluations == 1
    assert 0.5 < found.times[0] <= 1


def test_a_pair_that_diverges_is_left_as_it_is():
    starts = starts_of(oracle_of("mixture", P.linear()), noise(P.linear()))
    lost = Starts(starts.denoiser, starts.noise, starts.ends * torch.nan)
    pair = Pair("heun", "uniform", uniform(P.linear(), 4))
    assert lost.loss(pair) == torch.inf
    assert bend(lost, pair) is pair


def test_errors_tell_starts_in_another_basin_from_the_rest():
    """Of 100 ends, four lie in another basin: they make the root mean square, and not the median."""
    starts = starts_of(oracle_of("ring-8", P.cosine()), noise(P.cosine(), 100))
    moved = torch.full((100, 2), 1e-3).double()
    moved[::25] = 2.0
    errors = Starts(starts.denoiser, starts.noise, starts.ends - moved).errors(
        Pair("heun", "fine", log_snr(P.cosine(), 300))
    )
    assert errors.astray == 0.04
    assert errors.rms == pytest.approx((0.04 * 8 + 0.96 * 2e-6) ** 0.5)
    assert errors.median == pytest.approx(2**0.5 * 1e-3)
    assert errors.typical == pytest.approx(2**0.5 * (0.04 * 2**0.5 + 0.96 * 1e-3**0.5) ** 2)
    assert distances(torch.tensor([[torch.nan, 0.0], [3.0, 4.0]])).tolist() == [torch.inf, 5]


@pytest.mark.parametrize("name", ["cosine", "edm"])
def test_a_start_below_the_end_of_the_process_is_a_draw_of_its_prior(name):
    """For unit Gaussian data the flow only scales, so a grid that begins late loses nothing."""
    process = P.named(name)
    oracle = OracleDenoiser(toys.gaussian(torch.zeros(2), torch.eye(2)), process)
    x_T = noise(process)
    starts = Starts(Counted(oracle), x_T, x_T / process.prior_var() ** 0.5)
    whole = starts.errors(Pair("heun", "whole", log_snr(process, 400)))
    late = starts.errors(Pair("heun", "late", log_snr(process, 400)[40:]))
    assert leading(process, 10)[0] < 1
    assert late.rms < 1.001 * whole.rms < 1e-3


def test_the_grid_of_least_bound_can_be_a_candidate():
    oracle = oracle_of("mixture", P.cosine())
    measured = residuals(oracle, oracle.law.sample(200, rng=stream(0)), 100, rng=stream(1))
    least = best_grid(measured)
    assert torch.equal(least(oracle.process, 5), best_chain(oracle.process, measured, 5).steps)
    assert small_fit(oracle, samplers=["euler"], grids={"least bound": least}).candidate == ("euler", "least bound")


def test_what_cannot_be_fitted_is_refused():
    oracle = oracle_of("mixture", P.cosine())
    with pytest.raises(OptionError, match="at least 16 starts and 1 evaluation, received 15 and 5"):
        fit(oracle, noise(P.cosine(), 15), 5)
    with pytest.raises(OptionError, match="received 24 and 0"):
        small_fit(oracle, 0)
    with pytest.raises(OptionError, match="unknown deterministic sampler 'ancestral'"):
        small_fit(oracle, samplers=["ancestral"])
    with pytest.raises(OptionError, match="at most 5 evaluations: allow more"):
        small_fit(oracle, log_snr_max=-8.0)


def test_the_way_of_a_reference_is_known_between_its_times():
    """Cubics exactly; and on the way of a fine walk a finer one is met, also before the first of the inner times."""
    levels = torch.arange(6.0, dtype=torch.float64)[:, None, None]
    way = Way(levels**3 - 2 * levels, first=0.0, gap=1.0)
    assert [float(way.at(u)) for u in (0.3, 2.5, 4.9)] == pytest.approx([u**3 - 2 * u for u in (0.3, 2.5, 4.9)])
    oracle = oracle_of("mixture", P.linear())
    fine, finer = (Pair("heun", "", log_snr(P.linear(), n)) for n in (200, 777))
    starts = starts_of(oracle, noise(P.linear())).along(fine)
    assert starts.loss(fine) == pytest.approx(starts.errors(fine).rms)  # what is its own way strays nowhere
    assert starts.loss(finer) < 1e-3


def test_where_ends_are_met_or_not_a_fit_misses_fewer_than_by_ends_alone(monkeypatch):
    """Forty points in six dimensions, 1,000 fresh starts; measured on others, a fifth to six sevenths fewer."""
    law = toys.Mixture("points", torch.ones(40), randn((40, 6), stream(5)), 1e-12 * torch.eye(6).expand(40, 6, 6))
    oracle = OracleDenoiser(law, P.linear())
    x_T, fresh = (randn((n, 6), stream(n), dtype=torch.float64) for n in (64, 1000))
    starts = starts_of(oracle, fresh)

    def missed() -> float:
        found = fit(oracle, x_T, 12, samplers=["unipc-2", "unipc-3"])
        return starts.errors(Pair(found.sampler, "fitted", found.steps)).astray

    both = missed()
    monkeypatch.setattr("ancestral.diffusion.fit.MET", 0.0)
    assert both < missed()
