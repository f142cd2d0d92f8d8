"""Modes that samples reach: exact draws reach all, and what is planted is found."""

import math

import pytest
import torch

from ancestral.errors import OptionError
from ancestral.measure.modes import expected_quality, modes
from ancestral.rng import stream
from ancestral.toys import gaussian, grid_25, ring_8

each_law = pytest.mark.parametrize("law", [ring_8(), grid_25()], ids=lambda law: law.name)
N = 20_000


@each_law
def test_exact_draws_reach_every_mode_with_the_share_of_chi_squared(law):
    """What held-out data scores: 1 - e^(-9/2) within four standard errors, and a KL of (K - 1) / 2n on average."""
    found, share = modes(law, law.sample(N, rng=stream(0))), 1 - math.exp(-9 / 2)
    assert found.hit == found.of == len(law.weights)
    assert abs(found.high_quality - share) < 4 * math.sqrt(share * (1 - share) / N)
    expected = (found.of - 1) / (2 * N)
    assert abs(found.reverse_kl - expected) < 5 * expected


@each_law
def test_a_memoriser_scores_as_the_examples_it_copies(law):
    """Modes do not tell copies from draws: each example twice is the same to the last figure."""
    x = law.sample(500, rng=stream(1))
    assert modes(law, torch.cat([x, x])) == modes(law, x)


@each_law
@pytest.mark.parametrize("dropped", [1, 3])
def test_modes_that_are_dropped_are_missed_and_cost_their_log_weight(law, dropped):
    """Of K equal modes K - k are left: KL(q || p) = log(K / (K - k))."""
    K = len(law.weights)
    found = modes(law, law.means[: K - dropped].repeat(7, 1))
    assert found.hit == K - dropped
    assert found.least == 0
    assert found.reverse_kl == pytest.approx(math.log(K / (K - dropped)), abs=1e-12)


def test_distance_is_in_standard_deviations_of_the_mode():
    """Three deviations along the long axis are near, and so many units along the short one are far."""
    law = gaussian([0.0, 0.0], [[4.0, 0.0], [0.0, 0.01]])
    near, far = torch.tensor([[5.9, 0.0]]), torch.tensor([[0.0, 5.9]])
    assert modes(law, near).high_quality == 1
    assert modes(law, far).high_quality == 0
    assert modes(law, far).reverse_kl is None


@pytest.mark.parametrize("dim", [1, 2, 5, 20])
def test_the_expected_share_is_that_of_exact_draws(dim):
    law = gaussian(torch.zeros(dim), torch.eye(dim))
    share = modes(law, law.sample(N, rng=stream(dim))).high_quality
    expected = expected_quality(dim)
    assert abs(share - expected) < 4 * math.sqrt(expected * (1 - expected) / N)


@pytest.mark.parametrize("shape", [(0, 2), (4, 3), (2,)])
def test_samples_of_another_shape_are_refused(shape):
    with pytest.raises(OptionError, match="give at least one"):
        modes(ring_8(), torch.zeros(shape))
