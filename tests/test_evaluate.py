"""Measuring held-out data: regression on what is known of all, tolerances, comparisons."""

import dataclasses
import math

import numpy as np
import pytest
import torch

from ancestral.data import Data, load
from ancestral.diffusion.likelihood import estimate
from ancestral.errors import OptionError
from ancestral.gaussian import log_density
from ancestral.measure import flow
from ancestral.measure.evaluate import evaluate, gap
from ancestral.measure.measured import regressed
from ancestral.protocol import Density
from ancestral.rng import randn, stream
from ancestral.training import recipes
from ancestral.training.loop import State, steps
from oracles import exact_model, plain_facts

QUICK = ["unet.width=8", "unet.blocks=1", "unet.octaves=0", "diffusion.chain=40"]
DIGITS = load("digits")


@pytest.fixture(scope="module")
def model():
    setup = recipes.change(recipes.digits(DIGITS.facts), [*QUICK, "training.rate=5e-3", "training.warmup=5"])
    model = recipes.build(setup, DIGITS.facts)
    for _ in steps(State(model, setup.training), DIGITS, 80, seed=0):
        pass
    return model.eval()


def test_what_was_measured_on_a_few_speaks_for_all_with_its_own_error():
    """Over 400 choices of 60 from 2,000, the regression is unbiased, with the error it states, below the plain one."""
    draw = stream(0)
    controls = torch.from_numpy(draw.normal(size=(2000, 2))) * torch.tensor([3.0, 1.0])
    y = controls @ torch.tensor([1.0, -2.0]).double() + torch.from_numpy(draw.normal(size=2000))
    found, plain = [], []
    for i in range(400):
        chosen = torch.from_numpy(stream(1, i).permutation(2000)[:60])
        found.append(regressed(y[chosen][:, None], controls, chosen))
        plain.append(estimate(y[chosen][:, None]))
    errors = torch.tensor([each.value for each in found]) - float(y.mean())
    within = (
        torch.tensor([each.stderr**2 for each in found])
        - float(controls.double().mul(torch.tensor([1.0, -2.0])).sum(1).var()) / 2000
    )
    assert abs(float(errors.mean())) < 4 * float(errors.std()) / 20
    assert float(within.mean().sqrt() / errors.std()) == pytest.approx(1, abs=0.15)
    assert float(errors.std()) < 0.4 * np.mean([each.stderr for each in plain])


def test_what_was_measured_on_all_is_their_plain_mean():
    y, controls = torch.randn(100, 2), torch.randn(100, 2)
    assert regressed(y, controls, torch.arange(100)) == estimate(y)


def test_a_tolerance_is_reached_with_no_more_examples_than_it_takes(model, monkeypatch):
    """And every evaluation of the network is counted."""
    monkeypatch.setattr("ancestral.measure.chain.FIRST", 40)
    monkeypatch.setattr("ancestral.measure.chain.BATCH", 20)
    all_of_them = evaluate(model, DIGITS)
    before = model.network.asked
    wanted = 1.5 * all_of_them.likelihood().stderr
    found = evaluate(model, DIGITS, tolerance=wanted)
    assert found.likelihood().stderr <= wanted
    assert 40 < len(found.chosen) < len(DIGITS.held_out)
    assert found.bound.evaluations == model.network.asked - before < all_of_them.bound.evaluations
    torch.testing.assert_close(found.bound.prior, all_of_them.bound.prior[: len(found.chosen)])


def test_when_all_examples_were_measured_the_noise_comes_below_the_tolerance(model):
    once = evaluate(model, DIGITS)
    noise = once.likelihood().stderr_noise
    again = evaluate(model, DIGITS, tolerance=noise / 2).likelihood()
    assert again.stderr_noise <= noise / 2
    assert again.stderr_examples**2 == pytest.approx(once.likelihood().stderr_examples ** 2, abs=noise**2)
    assert abs(again.value - once.likelihood().value) < 4 * noise


def test_parts_add_up_also_when_a_few_speak_for_all(model):
    found = evaluate(model, DIGITS, n=120).likelihood()
    assert found.value == pytest.approx(found.prior + found.diffusion + found.decoder, abs=1e-9)


def test_a_model_is_no_better_than_itself_and_better_than_one_that_is_worse(model):
    """Common examples and noise: the difference to itself is zero without error."""
    one = evaluate(model, DIGITS, n=100)
    assert (one.over(one).value, one.over(one).stderr) == (0.0, 0.0)
    worse = recipes.build(recipes.change(recipes.digits(DIGITS.facts), QUICK), DIGITS.facts)
    with torch.no_grad():
        worse.network.net.leave.bias.fill_(-0.3)
    other = evaluate(worse, DIGITS, n=100, like=one)
    assert torch.equal(other.bound.steps, one.bound.steps)
    margin = one.over(other)
    assert margin.value > 5 * margin.stderr > 0


def test_the_limit_of_infinitely_many_steps_is_below_any_chain(model):
    found = {limit: evaluate(model, DIGITS, n=200, limit=limit) for limit in (False, True)}
    coarse, limit = (found[key].likelihood() for key in (False, True))
    assert limit.diffusion < coarse.diffusion
    assert found[True].record()["limit"]


def test_the_flow_and_the_bound_are_measured_on_the_same_examples(model):
    bound = evaluate(model, DIGITS, n=3)
    followed = flow.follow(model, DIGITS, bound, n=3)
    assert torch.equal(followed.chosen, bound.chosen)
    record = followed.likelihood(bound)
    assert record.value == pytest.approx(record.prior + record.divergence + record.dequantization, abs=1e-6)
    assert record.above.value == pytest.approx(bound.likelihood().value - record.value, abs=1e-6)
    assert (record.kind, record.draws, record.probes) == ("lower bound", flow.DRAWS, 1)
    assert record.stderr_noise * 3 == pytest.approx(bound.in_unit(float(followed.stderr.norm())), rel=1e-9)
    assert record.stderr**2 == pytest.approx(record.stderr_examples**2 + record.stderr_noise**2, rel=1e-9)


class Given:
    """A density that is known, in the place of a trained model."""

    def __init__(self, log_prob) -> None:
        self.facts, self._log_prob = plain_facts(2), log_prob

    def log_prob(self, x, *, rng, start):
        return Density(self._log_prob(x.double()), "exact", None)


def of_one_law(seed: int, n: int = 200) -> Data:
    x = randn((2 * n, 2), stream(seed), dtype=torch.float32)
    return Data(facts=plain_facts(2), train=x[:n], held_out=x[n:])


def test_the_law_itself_has_no_likelihood_gap_as_often_as_its_interval_says():
    """Over 200 data sets; the errors are those of the spread between them."""
    law = Given(lambda x: log_density(x, torch.zeros(()), torch.ones(())).sum(1))
    found = [gap(law, data, evaluate(law, data)) for data in map(of_one_law, range(200))]
    values = torch.tensor([each.value for each in found])
    assert abs(float(values.mean())) < 4 * float(values.std()) / 200**0.5
    assert np.mean([each.stderr for each in found]) == pytest.approx(float(values.std()), rel=0.15)
    assert 0.9 < np.mean([each.low <= 0 <= each.high for each in found]) < 1


def test_a_density_made_of_its_training_examples_has_the_gap_that_they_make():
    """A kernel estimate, in nats."""
    data, width = of_one_law(0), 0.05

    def log_prob(x):
        z = torch.cdist(x, data.train.double()) / width
        return (-z.square() / 2).logsumexp(1) - math.log(len(data.train) * 2 * math.pi * width**2)

    law = Given(log_prob)
    measured = evaluate(law, data)
    found = gap(law, data, measured)
    exact = float(log_prob(data.train.double()).mean() - log_prob(data.held_out.double()).mean())
    assert found.value == pytest.approx(exact, rel=1e-9)
    assert found.low > 2


def test_the_gap_of_a_chain_is_that_of_measuring_both_sides_and_changes_neither(model):
    """In bits/dim, of bounds by all terms, where no noise of the choice of terms comes between."""
    measured = evaluate(model, DIGITS, draws=None)
    found = gap(model, DIGITS, measured, draws=None)
    swapped = dataclasses.replace(DIGITS, train=DIGITS.held_out, held_out=DIGITS.train)
    plain = (measured.nats.mean() - evaluate(model, swapped, draws=None).nats.mean()) / (64 * math.log(2))
    assert found.value == pytest.approx(float(plain), abs=4 * found.stderr)
    assert found.stderr < 0.1
    assert gap(model, DIGITS, measured, draws=None) == found


def test_a_tolerance_is_reached_along_the_flow_with_more_examples(monkeypatch):
    """Those that were followed are not followed again: their values are those of one walk over all."""
    monkeypatch.setattr("ancestral.measure.flow.EXAMPLES", 40)
    exact, data = exact_model("simple"), load("mixture")
    bound = evaluate(exact, data, n=200)
    few, whole = (flow.follow(exact, data, bound, n=n) for n in (40, 200))
    wanted = 0.7 * few.likelihood(bound).stderr
    before = exact.network.asked
    found = flow.follow(exact, data, bound, n=200, tolerance=wanted)
    assert 40 < len(found.chosen) < 200
    assert found.likelihood(bound).stderr <= wanted
    assert found.evaluations == exact.network.asked - before
    torch.testing.assert_close(found.nats, whole.nats[: len(found.nats)], rtol=0, atol=1e-3)
    assert flow.follow(exact, data, bound, n=60, tolerance=wanted / 100).likelihood(bound).n_images == 60


@pytest.mark.parametrize("tolerance", [0.0, -1.0, math.nan, math.inf])
def test_a_tolerance_that_is_none_is_refused(model, tolerance):
    with pytest.raises(OptionError, match="positive standard error"):
        evaluate(model, DIGITS, tolerance=tolerance)


def test_the_best_chain_and_variance_are_learnt_after_training(model):
    """A variance from the residuals is better than a fixed one, and the best 8 of 40 steps than 8 even ones."""
    values = {
        (variance, best): evaluate(model, DIGITS, draws=None, steps=8, variance=variance, best=best).likelihood()
        for variance, best in (("beta", False), ("optimal", False), ("optimal", True))
    }
    fixed, learnt, chosen = values.values()
    assert learnt.value < fixed.value - 3 * fixed.stderr
    assert chosen.value < learnt.value - 3 * learnt.stderr


@pytest.mark.parametrize("options", [{}, {"steps": 41}, {"steps": 8, "variance": "fixed-small"}])
def test_a_best_chain_that_is_none_is_refused(model, options):
    with pytest.raises(OptionError, match="the best chain is one of 1 to 40 steps"):
        evaluate(model, DIGITS, best=True, **({"variance": "optimal"} | options))
