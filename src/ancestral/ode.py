"""Ordinary differential equations for a batch whose examples know nothing of each other, and divergences.

    dx/dt = f(t, x)

Step control over a whole batch, as general solvers do it, makes every result depend on the batch it was computed in.
Here each example has its own time and step size, and only the examples that are still on their way are evaluated.
"""

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from ancestral.errors import OptionError
from ancestral.rng import Rng, rand

Field = Callable[[Tensor, Tensor, Tensor], Tensor]
"""(times (A,), x (A, ...), which examples of the batch these are (A,)) -> dx/dt (A, ...)."""

NODES = (1 / 5, 3 / 10, 4 / 5, 8 / 9, 1.0, 1.0)
STAGES = (
    (1 / 5,),
    (3 / 40, 9 / 40),
    (44 / 45, -56 / 15, 32 / 9),
    (19372 / 6561, -25360 / 2187, 64448 / 6561, -212 / 729),
    (9017 / 3168, -355 / 33, 46732 / 5247, 49 / 176, -5103 / 18656),
    (35 / 384, 0.0, 500 / 1113, 125 / 192, -2187 / 6784, 11 / 84),
)
ERROR = (71 / 57600, 0.0, -71 / 16695, 71 / 1920, -17253 / 339200, 22 / 525, -1 / 40)
"""The solution of order 5, which is the last row of `STAGES`, less the embedded one of order 4."""


class Solution(NamedTuple):
    """The end of a trajectory for each example of a batch.

    Attributes:
        x: states at the end, shape (B, ...).
        evaluations: of f, int64, shape (B,).
        steps: accepted ones, int64, shape (B,).
    """

    x: Tensor
    evaluations: Tensor
    steps: Tensor


def rms(x: Tensor) -> Tensor:
    """Root mean square of each example, shape (B,)."""
    return x.flatten(1).square().mean(1).sqrt()


def dormand_prince(
    f: Field,
    x: Tensor,
    start: float,
    stop: float,
    *,
    rtol: float,
    atol: float,
    max_step: float = math.inf,
    max_steps: int = 1000,
    norm: Callable[[Tensor], Tensor] = rms,
) -> Solution:
    """Follow dx/dt = f(t, x) from start to stop, in either direction, with a step size for each example.

    A step of size h from x to y is accepted where e <= 1, and the next one tried is h times 0.9 e^(-1/5), at least
    a fifth and at most five times h:

        e = norm[ (y - y_4) / (atol + rtol max(|x|, |y|)) ],   y of order 5, y_4 the embedded solution of order 4

    The first step tried is `max_step`, or all of the way.

    References: Dormand & Prince (1980), a family of embedded Runge-Kutta formulae, table 2; Hairer, Nørsett & Wanner
    (1993), Solving Ordinary Differential Equations I, eqs. II.4.10-13.

    Args:
        f: the field; times are float64, and it is called without gradients.
        x: states at the start, shape (B, ...).
        start, stop: times.
        rtol, atol: tolerances of one step, relative to a coordinate and in its unit.
        max_step: length of the longest step: what happens within one may be passed over.
        max_steps: tried by any example.
        norm: of the errors of each example in units of the tolerance, (A, ...) -> (A,).

    Raises:
        OptionError: if a tolerance is not positive, or an example does not arrive.

    Example:
        >>> rates = torch.tensor([[1.0], [9.0]]).double()
        >>> decay = dormand_prince(lambda t, x, i: -rates[i] * x, torch.ones(2, 1).double(), 0, 1, rtol=1e-6, atol=1e-9)
        >>> decay.x.log().round(decimals=3).flatten().tolist(), decay.evaluations.tolist()
        ([-1.0, -9.0], [37, 241])
    """
    if not (rtol > 0 and atol > 0 and max_step > 0):
        raise OptionError(f"received rtol {rtol}, atol {atol} and max_step {max_step}: all three must be positive")
    way, direction = abs(stop - start), math.copysign(1.0, stop - start)
    x = x.clone()
    t = torch.full((len(x),), start, dtype=torch.float64, device=x.device)
    h = torch.full_like(t, min(max_step, way))
    tried, steps = torch.zeros_like(t, dtype=torch.int64), torch.zeros_like(t, dtype=torch.int64)
    with torch.no_grad():
        slope = f(t, x, torch.arange(len(x), device=x.device))
        while len(index := (t != stop).nonzero()[:, 0]):
            left = (stop - t[index]).abs()
            size = torch.minimum(h[index], left)
            y, slope_y, error = _step(f, t[index], x[index], direction * size, slope[index], index)
            e = norm(error / (atol + rtol * torch.maximum(x[index].abs(), y.abs())))
            accepted = e <= 1
            h[index] = (size * (0.9 * e**-0.2).nan_to_num(nan=0.2).clamp(0.2, 5)).clamp(max=max_step)
            tried[index] += 1
            lost = ~accepted & ((tried[index] >= max_steps) | (size < 1e-14 * way))
            if lost.any():
                i = index[lost][0]
                raise OptionError(
                    f"example {int(i)} stands at {float(t[i]):.6g} on the way from {start:g} to {stop:g} after "
                    f"{int(tried[i])} steps, the last of {float(size[lost][0]):.1e}: its field may not be finite or "
                    f"smooth there, or allow more than rtol {rtol:g}, atol {atol:g} or max_steps {max_steps}"
                )
            there = index[accepted]
            x[there], slope[there] = y[accepted], slope_y[accepted]
            t[there] = torch.where(size < left, t[index] + direction * size, stop)[accepted]
            steps[there] += 1
    return Solution(x, 1 + len(STAGES) * tried, steps)


def _step(f: Field, t: Tensor, x: Tensor, h: Tensor, slope: Tensor, index: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """y at t + h, the slope there, with which the next step begins, and y - y_4."""
    width = h.to(x).reshape(-1, *[1] * (x.ndim - 1))
    slopes, y = [slope], x
    for node, row in zip(NODES, STAGES, strict=True):
        y = x + width * _combination(row, slopes)
        slopes.append(f(t + node * h, y, index))
    return y, slopes[-1], width * _combination(ERROR, slopes)


def _combination(coefficients: tuple[float, ...], slopes: list[Tensor]) -> Tensor:
    total = torch.zeros_like(slopes[0])
    for coefficient, slope in zip(coefficients, slopes, strict=True):
        total = total + coefficient * slope
    return total


def rademacher(shape: tuple[int, ...], rng: Rng) -> Tensor:
    """Independent signs, -1 or 1 with probability 1/2, float64, batch first, from one generator or one per example.

    Example:
        >>> from ancestral.rng import stream
        >>> rademacher((1000,), stream(0)).square().mean()
        tensor(1., dtype=torch.float64)
    """
    return torch.where(rand(shape, rng) < 0.5, -1.0, 1.0).double()


def divergence_hutchinson(f: Callable[[Tensor], Tensor], x: Tensor, probes: Tensor) -> tuple[Tensor, Tensor]:
    """f(x), and an estimate of its divergence from each probe: v^T J v with J = df/dx, whose mean is tr J.

    Its variance over Rademacher probes is 4 sum_{i<j} S_ij^2 with S = (J + J^T)/2: none where J is diagonal.

    References: Hutchinson (1990); Grathwohl et al. (2019), section 3.1.

    Args:
        f: maps each example by itself, (B, ...) to the same shape.
        x: shape (B, ...).
        probes: independent coordinates of mean 0 and variance 1, shape (P, B, ...).

    Returns:
        f(x), shape (B, ...), and the estimates, shape (P, B), without gradients.

    Example:
        >>> swap = lambda x: x.square() + x.flip(1)
        >>> divergence_hutchinson(swap, torch.tensor([[1.0, 2.0]]), torch.tensor([[[1.0, 1.0]], [[1.0, -1.0]]]))
        (tensor([[3., 5.]]), tensor([[8.],
                [4.]]))
    """
    with torch.enable_grad():
        x = x.detach().requires_grad_()
        value = f(x)
        estimates = []
        for v in probes.to(value):
            (product,) = torch.autograd.grad(value, x, v, retain_graph=True)
            estimates.append((v * product).flatten(1).sum(1))
    return value.detach(), torch.stack(estimates)


def divergence_exact(f: Callable[[Tensor], Tensor], x: Tensor) -> tuple[Tensor, Tensor]:
    """f(x), and its divergence sum_i df_i/dx_i, shape (B,): the unit vectors are D probes that each give one term.

    Args:
        f: maps each example by itself, (B, ...) to the same shape.
        x: shape (B, ...), D coordinates an example.

    Example:
        >>> divergence_exact(lambda x: x.square() + x.flip(1), torch.tensor([[1.0, 2.0]]))
        (tensor([[3., 5.]]), tensor([6.]))
    """
    D = x.shape[1:].numel()
    unit_vectors = torch.eye(D, dtype=x.dtype, device=x.device).reshape(D, 1, *x.shape[1:]).expand(D, *x.shape)
    value, terms = divergence_hutchinson(f, x, unit_vectors)
    return value, terms.sum(0)
