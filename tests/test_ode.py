"""The solver against solutions that are known, one example against its batch, and traces against the Jacobian."""

import itertools
import math

import pytest
import torch

from ancestral.errors import OptionError
from ancestral.ode import divergence_exact, divergence_hutchinson, dormand_prince, rademacher
from ancestral.rng import randn, stream, streams

NEVER = {"rtol": 1e12, "atol": 1e12}
"""Tolerances that every step is within, so that all steps have the greatest length."""


def swing(t, x, index):
    """x' = x cos t, solved by x_0 exp(sin t)."""
    return x * t[:, None].cos()


START = torch.tensor([[1.0, 0.5], [0.25, 2.0]]).double()


def truth(stop):
    return START * math.exp(math.sin(stop))


MU = torch.tensor([0.1, 1.0, 3.0, 8.0, 20.0]).double()


def van_der_pol(t, x, index):
    """x'' = mu (1 - x^2) x' - x, with a stiffness of its own for each example."""
    mu, (position, speed) = MU[index], x.unbind(1)
    return torch.stack([speed, mu * (1 - position**2) * speed - position], 1)


def slope_of_logs(x, y):
    """Of the line through (log x, log y), by least squares."""
    x, y = torch.tensor(x).double().log(), torch.tensor(y).double().log()
    return float(((x - x.mean()) * (y - y.mean())).sum() / (x - x.mean()).square().sum())


def test_the_measured_order_of_fixed_steps_is_5():
    counts, errors = [16, 32, 64, 128], []
    for n in counts:
        end = dormand_prince(swing, START, 0.0, 3.0, max_step=3 / n, **NEVER)
        assert end.steps.tolist() == [n, n]
        assert end.evaluations.tolist() == [1 + 6 * n, 1 + 6 * n]
        errors.append(float((end.x - truth(3.0)).norm()))
    assert slope_of_logs(counts, errors) == pytest.approx(-5, abs=0.1)


def test_the_error_falls_with_the_tolerance_and_the_work_grows_as_its_fifth_root():
    tolerances = [10.0**-k for k in range(4, 12)]
    ends = [dormand_prince(swing, START, 0.0, 2.0, rtol=tol, atol=tol) for tol in tolerances]
    errors = [float((end.x - truth(2.0)).abs().max()) for end in ends]
    assert all(error < 10 * tol for error, tol in zip(errors, tolerances, strict=True))
    assert slope_of_logs(tolerances, errors) == pytest.approx(1, abs=0.2)
    steps = [float(end.steps.double().mean()) for end in ends]
    assert slope_of_logs(tolerances[3:], steps[3:]) == pytest.approx(-1 / 5, abs=0.03)


def test_there_and_back_returns_to_the_start():
    for tol in (1e-5, 1e-8, 1e-11):
        there = dormand_prince(swing, START, 0.0, 2.0, rtol=tol, atol=tol).x
        back = dormand_prince(swing, there, 2.0, 0.0, rtol=tol, atol=tol).x
        assert float((back - START).abs().max()) < 100 * tol


def test_an_example_is_the_same_bit_for_bit_alone_in_a_batch_and_in_any_order():
    x = torch.tensor([[2.0, 0.0]]).double().expand(5, 2)
    tight = {"rtol": 1e-7, "atol": 1e-7}
    together = dormand_prince(van_der_pol, x, 0.0, 10.0, **tight)
    assert len(set(together.evaluations.tolist())) == 5
    for i in range(5):
        alone = dormand_prince(lambda t, x, _, i=i: van_der_pol(t, x, torch.tensor([i])), x[:1], 0.0, 10.0, **tight)
        for whole, part in zip(together, alone, strict=True):
            assert torch.equal(whole[i : i + 1], part)
    order = torch.tensor([3, 0, 4, 1, 2])
    shuffled = dormand_prince(lambda t, x, index: van_der_pol(t, x, order[index]), x, 0.0, 10.0, **tight)
    for whole, part in zip(together, shuffled, strict=True):
        assert torch.equal(whole[order], part)


def test_only_examples_on_their_way_are_evaluated_and_each_evaluation_is_counted():
    seen = torch.zeros(5, dtype=torch.int64)

    def counted(t, x, index):
        seen.index_add_(0, index, torch.ones_like(index))
        return van_der_pol(t, x, index)

    end = dormand_prince(counted, torch.ones(5, 2).double(), 0.0, 10.0, rtol=1e-6, atol=1e-6)
    assert torch.equal(seen, end.evaluations)
    assert (end.evaluations >= 1 + 6 * end.steps).all()


def test_no_way_is_no_change():
    end = dormand_prince(swing, START, 0.5, 0.5, rtol=1e-6, atol=1e-6)
    assert torch.equal(end.x, START)
    assert end.steps.tolist() == [0, 0]


def test_the_start_is_not_written_over():
    x = START.clone()
    dormand_prince(swing, x, 0.0, 1.0, rtol=1e-6, atol=1e-6)
    assert torch.equal(x, START)


def test_an_example_that_does_not_arrive_is_named():
    x = torch.ones(5, 2).double()
    with pytest.raises(OptionError, match=r"example 1 stands at 5.* on the way from 0 to 10 after 50 steps"):
        dormand_prince(van_der_pol, x, 0.0, 10.0, rtol=1e-6, atol=1e-6, max_steps=50)
    with pytest.raises(OptionError, match=r"example 1 stands at 0\.5 on the way.*finite"):
        dormand_prince(
            lambda t, x, index: torch.where((t[:, None] > 0.5) & (index[:, None] == 1), math.nan, 1.0) * x,
            torch.ones(2, 1).double(),
            0.0,
            1.0,
            rtol=1e-6,
            atol=1e-6,
        )
    for options in ({"rtol": 0.0, "atol": 1e-6}, {"rtol": 1e-6, "atol": -1.0}, {"rtol": 1, "atol": 1, "max_step": 0}):
        with pytest.raises(OptionError, match="must be positive"):
            dormand_prince(swing, START, 0.0, 1.0, **options)


W = randn((6, 6), stream(9), dtype=torch.float64)


def field(x):
    """A smooth map of examples of shape (2, 3) that mixes their coordinates and nothing else."""
    flat = x.flatten(1)
    return (torch.tanh(flat @ W) + flat.prod(1, keepdim=True)).reshape(x.shape)


def jacobians(x):
    return torch.stack([torch.func.jacrev(lambda one: field(one[None])[0])(one).reshape(6, 6) for one in x])


X = randn((3, 2, 3), stream(1), dtype=torch.float64)


def test_the_exact_divergence_is_the_trace_of_the_jacobian():
    value, divergence = divergence_exact(field, X)
    torch.testing.assert_close(value, field(X))
    torch.testing.assert_close(divergence, jacobians(X).diagonal(dim1=1, dim2=2).sum(1), rtol=1e-12, atol=1e-12)
    assert not value.requires_grad
    assert not divergence.requires_grad


def test_over_all_sign_vectors_the_estimate_has_the_trace_for_mean_and_the_known_variance():
    """Var v^T J v = 4 sum_{i<j} S_ij^2 with S the symmetric part of J: no sampling, all 64 probes."""
    signs = torch.tensor(list(itertools.product([-1.0, 1.0], repeat=6))).double()
    _, estimates = divergence_hutchinson(field, X, signs.reshape(64, 1, 2, 3).expand(64, 3, 2, 3))
    J = jacobians(X)
    S = (J + J.mT) / 2
    torch.testing.assert_close(estimates.mean(0), J.diagonal(dim1=1, dim2=2).sum(1), rtol=1e-12, atol=1e-12)
    variance = 4 * S.triu(1).square().sum((1, 2))
    torch.testing.assert_close(estimates.var(0, correction=0), variance, rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(estimates, torch.einsum("pi,bij,pj->pb", signs, J, signs), rtol=1e-10, atol=1e-12)


def test_one_rademacher_probe_is_exact_for_a_diagonal_jacobian():
    probe = rademacher((3, 2, 3), stream(0))[None]
    (_, estimate), (_, exact) = divergence_hutchinson(torch.sin, X, probe), divergence_exact(torch.sin, X)
    torch.testing.assert_close(estimate[0], exact, rtol=1e-14, atol=0)


def test_divergences_are_found_without_gradients_around_them():
    with torch.no_grad():
        _, without = divergence_exact(field, X)
    assert torch.equal(without, divergence_exact(field, X)[1])


def test_signs_are_fair_and_depend_on_the_seed_of_the_example():
    v = rademacher((6, 2000), streams(0, 6))
    assert torch.equal(v.abs(), torch.ones_like(v))
    assert (v.mean(1).abs() < 4 / 2000**0.5).all()
    assert torch.equal(v[4:5], rademacher((1, 2000), streams(0, 1, start=4)))
