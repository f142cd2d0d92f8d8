"""The founding claims, on models and samples of which the answer is known."""

import math

import numpy as np
import pytest
import torch

from ancestral import toys
from ancestral.data import load
from ancestral.diffusion.likelihood import mean_and_stderr
from ancestral.measure import claims
from ancestral.measure.quality import Bench
from ancestral.protocol import Density
from ancestral.rng import stream
from ancestral.training import recipes

DIGITS = load("digits")


def stacks(n: int, classes: int, seed: int = 0) -> torch.Tensor:
    """Three real digits as the channels of an image, of so many classes."""
    known = torch.tensor([int(name) for name in DIGITS.facts.classes])[DIGITS.train_labels] < classes
    pool = DIGITS.train[known]
    rows = torch.from_numpy(np.random.default_rng(seed).integers(len(pool), size=(n, 3)))
    return pool[rows].flatten(1, 2)


def test_real_stacks_show_all_triples_as_often_as_chance_has_it():
    found = claims.stacked(stacks(10_000, 10), DIGITS)
    assert found.triples > 995  # a triple is left out by chance once in e^10
    assert found.kl == pytest.approx(found.of_data, rel=0.2)


def test_stacks_of_five_classes_show_an_eighth_of_the_triples_and_the_divergence_of_that():
    found = claims.stacked(stacks(10_000, 5), DIGITS)
    assert found.triples == 125
    assert found.kl == pytest.approx(3 * math.log(2), rel=0.02)


def test_what_chance_leaves_is_that_of_a_simulation():
    counts = torch.from_numpy(np.random.default_rng(0).multinomial(500, [1 / 50] * 50, size=400)).double()
    q = counts / 500
    simulated, stderr = mean_and_stderr(torch.special.xlogy(q, q * 50).sum(1))
    assert abs(claims._uniform_kl(500, 50) - simulated) < 4 * stderr


class Plane:
    """A density of the plane and its own code, of which all is known."""

    def __init__(self, law: toys.Toy) -> None:
        self.law = law

    def log_prob(self, x, *, rng=0, start=0, labels=None):
        return Density(self.law.log_prob(x.double()), "exact")

    def encode(self, x):
        return x

    def decode(self, z):
        return z


def test_the_integral_of_an_exact_density_is_one_and_of_half_of_it_a_half():
    law = toys.named("gaussian")
    spread = 9 * law.cov.diagonal().sqrt()
    low, high = law.mean - spread, law.mean + spread
    assert claims.integral(Plane(law), low, high) == pytest.approx(1, abs=1e-6)
    half = torch.stack([law.mean[0], high[1]])
    assert claims.integral(Plane(law), low, half) == pytest.approx(0.5, abs=1e-3)


def test_a_straight_walk_has_length_and_jump_one_and_a_bent_one_more():
    x, y = torch.tensor([[0.0, 0.0]]), torch.tensor([[1.0, 0.0]])
    straight = claims.line(Plane(toys.named("gaussian")), x, y)
    assert (straight.length, straight.jump) == pytest.approx((1, 1))

    class Arc(Plane):
        def decode(self, z):
            angle = math.pi * z[:, :1].double()
            return torch.cat([angle.cos(), angle.sin()], 1)

    bent = claims.line(Arc(toys.named("gaussian")), x, y, steps=64)
    assert bent.length == pytest.approx(math.pi / 2, rel=1e-3)
    assert bent.jump == pytest.approx(bent.length, rel=1e-6)


def test_the_bound_of_an_untrained_model_of_a_gaussian_stands_above_its_entropy():
    data = load("gaussian")
    model = recipes.build(recipes.choose(data.facts), data.facts)
    entropy = toys.named("gaussian").entropy()
    found = claims.tightness(model, data.held_out[:20], entropy=entropy)
    assert found["bound - entropy"][0] == pytest.approx(found["bound"][0] - entropy)
    assert found["bound - ODE"][0] == pytest.approx(found["bound"][0] - found["ODE"][0], abs=1e-9)


def test_a_set_and_its_other_half_are_one_law_and_a_copy_is_told():
    """Samples that are training data are all nearer to it; a shift of the mean is seen by many standard errors."""
    bench = Bench(DIGITS)
    real = bench.of(DIGITS.train[-bench.n :])
    assert abs(real["energy"].value) < 3 * real["energy"].stderr
    assert bench.training["ratio"].value == 0
    assert bench.training["authentic"].value == 0
    assert bench.training["data-copying"].high < -3 < bench.held_out["data-copying"].value
    brighter = bench.of((DIGITS.train[-bench.n :] + 2).clamp(max=16))
    assert brighter["energy"].value > 5 * brighter["energy"].stderr


def test_near_copies_of_any_training_examples_are_told():
    """Not only of those in the samples' place: a model that learnt all examples by heart gives any of them."""
    bench = Bench(DIGITS)
    copies = DIGITS.train[torch.from_numpy(stream(5).permutation(len(DIGITS.train)))[: bench.n]].clone()
    copies[:, 0, 4, 4] = (copies[:, 0, 4, 4].int() - 1).abs().to(copies.dtype)
    found = bench.of(copies)
    assert found["duplicates"].value == 0
    assert found["data-copying"].high < -10
    assert found["authentic"].high < 0.05 < bench.held_out["authentic"].low
    assert found["ratio"].high < 0.6 * bench.held_out["ratio"].low


def test_a_run_that_failed_is_counted():
    assert claims.spread([None, None, 1.0]).failed == pytest.approx(2 / 3)
    assert claims.spread([None, 2.0, 1.0]).worst == math.inf
    assert claims.spread([3.0, 2.0, 1.0]).worst == 3
    calm, restless = claims.oscillation([5, 4, 3, 2, 1, 1, 1, 1]), claims.oscillation([5, 4, 3, 2, 1, 3, 1, 3])
    assert calm == (0, 0)
    assert restless == pytest.approx((2**0.5, 2))
    assert claims.oscillation([0.1] * 6 + [-0.01, 0.01])[0] == pytest.approx(0.02 / 2**0.5)  # about a mean of zero
