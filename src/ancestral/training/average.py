"""Averages of the weights by a power function of time, and any other such average made from a few that were kept.

    w_t = b_t w_{t-1} + (1 - b_t) theta_t,   b_t = (1 - 1/t)^(gamma + 1)

covers the same share of a run however long it is: `length` is the standard deviation of its window relative to t. Its
weight on theta_j telescopes to (j^p - (j-1)^p) / t^p with p = gamma + 1, so the profile of every average over the steps
is known exactly, and an average that was not kept is the combination of kept ones whose profile is nearest to its own.

Reference: Karras et al. (2024), sections 3.1 and 3.2, appendix C.
"""

import copy
import math
from collections.abc import Iterable, Sequence

import torch
from torch import Tensor, nn

from ancestral.errors import OptionError

LENGTHS = (0.05, 0.10)
"""Lengths of the averages that are kept while training."""

LONGEST = 12**-0.5
"""The length of the plain mean over a whole run, gamma = 0; a power function has no longer one."""

CHUNK = 2**16
"""Steps whose profiles are in memory at a time."""

Kept = tuple[int, float]
"""The step and the length of an average that was kept."""


def gamma(length: float) -> float:
    """The exponent gamma whose window has the given length: (g + 1)^(1/2) (g + 2)^-1 (g + 3)^(-1/2) = length.

    Reference: Karras et al. (2024), eq. 4, solved by bisection.

    Raises:
        OptionError: if the length is not between 0 and `LONGEST`.

    Example:
        >>> round(gamma(0.10), 2), round(gamma(0.05), 2)
        (6.94, 16.97)
    """
    if not 0.001 <= length < LONGEST:
        raise OptionError(
            f"an average of length {length:g} is not a power function's: the length is relative to the run, from 0.001 "
            f"to below {LONGEST:.4f}, the plain mean"
        )
    low, high = 0.0, 1e6
    for _ in range(200):
        middle = (low + high) / 2
        wide = math.sqrt(middle + 1) / ((middle + 2) * math.sqrt(middle + 3)) > length
        low, high = (middle, high) if wide else (low, middle)
    return high


class Average(nn.Module):
    """A copy of a module whose weights are the average of a given length over its training.

    Example:
        >>> module = nn.Linear(1, 1)
        >>> average = Average(module, 0.05)
        >>> average.update(module, 1)
        >>> torch.equal(average.module.weight, module.weight)
        True
    """

    def __init__(self, module: nn.Module, length: float) -> None:
        super().__init__()
        self.module = copy.deepcopy(module).requires_grad_(False)
        self.power = gamma(length) + 1

    @torch.no_grad()
    def update(self, module: nn.Module, step: int) -> None:
        """Take in the weights after step number `step`, from 1; buffers are as they are now."""
        taken = -math.expm1(self.power * math.log1p(-1 / step)) if step > 1 else 1.0
        torch._foreach_lerp_(list(self.module.parameters()), list(module.parameters()), taken)
        for own, other in zip(self.module.buffers(), module.buffers(), strict=True):
            own.copy_(other)


def snapshot_steps(total: int, n: int) -> list[int]:
    """After which of `total` steps averages are kept: n times, evenly; the last at the end.

    Example:
        >>> snapshot_steps(1000, 4)
        [250, 500, 750, 1000]
    """
    return sorted({math.ceil(total * (i + 1) / n) for i in range(n)})


def profiles(kept: Sequence[Kept], first: int, last: int) -> Tensor:
    """Weights of theta_first .. theta_last in each average, (j^p - (j-1)^p) / t^p up to step t: float64, (K, J)."""
    j = torch.arange(first, last + 1, dtype=torch.float64)
    t = torch.tensor([step for step, _ in kept], dtype=torch.float64)[:, None]
    p = torch.tensor([gamma(length) + 1 for _, length in kept], dtype=torch.float64)[:, None]
    share = -torch.expm1(p * torch.log1p(-1 / j))
    return torch.where(j <= t, share * torch.exp(p * (j.log() - t.log())), 0.0)


def coefficients(kept: Sequence[Kept], step: int, length: float) -> tuple[Tensor, float]:
    """The combination of kept averages whose profile is nearest to that of another one, in the least-squares sense.

    The coefficients add up to 1, so weights that stand still are kept exactly.

    Args:
        kept: step and length of each average at hand.
        step: at which the other one ends.
        length: of the other one.

    Returns:
        Its coefficients, float64, shape (K,), and the relative error of its profile in the L2 norm: of weights that
        jitter independently from step to step, the relative error of the average.

    Raises:
        OptionError: if the length is not a power function's.

    Example:
        >>> kept = [(step, length) for step in snapshot_steps(800, 8) for length in LENGTHS]
        >>> found, residual = coefficients(kept, 800, 0.15)
        >>> round(float(found.sum()), 6), round(residual, 2)
        (1.0, 0.03)
    """
    every = [*kept, (step, length)]
    last = max(each for each, _ in every)
    spans = [(first, min(first + CHUNK - 1, last)) for first in range(1, last + 1, CHUNK)]
    gram = torch.zeros(len(every), len(every), dtype=torch.float64)
    for span in spans:
        rows = profiles(every, *span)
        gram += rows @ rows.T
    inverse = torch.linalg.pinv(gram[:-1, :-1], rtol=1e-12, hermitian=True)
    free, ones = inverse @ gram[:-1, -1], inverse.sum(1)
    found = free + (1 - free.sum()) / ones.sum() * ones  # the least squares, moved along the Lagrange direction
    missed = sum(float((found @ rows[:-1] - rows[-1]).square().sum()) for rows in (profiles(every, *s) for s in spans))
    return found, math.sqrt(missed / float(gram[-1, -1]))


def synthesise(averages: Iterable[dict[str, Tensor]], found: Tensor) -> dict[str, Tensor]:
    """The sum of averages times their coefficients, accumulated in float64, one average in memory at a time."""
    total: dict[str, Tensor] = {}
    dtypes: dict[str, torch.dtype] = {}
    for tensors, coefficient in zip(averages, found.tolist(), strict=True):
        for name, tensor in tensors.items():
            part = tensor.double() * coefficient
            total[name] = total[name] + part if name in total else part
            dtypes[name] = tensor.dtype
    return {name: tensor.to(dtypes[name]) for name, tensor in total.items()}
