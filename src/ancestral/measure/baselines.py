"""Two simple densities that a trained model's likelihood is printed beside, so that the number means something.

    independent_pixels   every dimension by itself: what is known without any dependence between dimensions
    full_gaussian        one Gaussian with all covariances: what is known from the first two moments

Both are fitted on the training side alone and are proper: their masses sum, or their densities integrate, to one over
everything the data could be. They are told in nats per example, as a model's likelihood is.
"""

import math
from collections.abc import Iterator

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from ancestral.data import Data
from ancestral.errors import OptionError
from ancestral.gaussian import log_bin, log_density

SIZES = [2**i for i in range(11)]  # numbers of bins of a real-valued feature
RIDGE = 1e-6  # added to the variances of real values: two examples are not shrunk, and equal ones do not vary
AT_ONCE = 2**20  # numbers in each piece of work, 8 MiB in float64


def independent_pixels(data: Data, held_out: Tensor) -> Tensor:
    """-log p of examples under independent dimensions, each with the histogram of its training values.

    p(x) = prod_d p_d(x_d). With n_k of N training values on level k of L,

        p_d(k) = (n_k + 1/2) / (N + L/2)

    Between real values, bins take the place of levels. They have equal mass under the logistic density g with the
    feature's mean and deviation, which carries the tails; their number K is averaged over powers of two, each weighted
    by the probability that it gives to the training values:

        p_d(x) = sum_K P(K | train) K (n_k(x) + 1/2) / (N + K/2) g(x),   K = 1, 2, 4, ..., 1024

    References: Krichevsky and Trofimov (1981), for the half added to each count; Knuth (2019), "Optimal data-based
    binning for histograms", for P(K | train).

    Args:
        data: what to fit, its training side only.
        held_out: examples to score, in the user's units, shape (N, *data.facts.shape).

    Returns:
        Nats per example, shape (N,), float64; in the user's units where values are real.

    Raises:
        OptionError: if `held_out` has another shape or is not on the levels of the data.

    Example:
        >>> from ancestral.data import load
        >>> digits = load("digits")
        >>> nats = independent_pixels(digits, digits.held_out)
        >>> round(digits.facts.bits_per_dim(nats).mean().item(), 2)
        2.43
    """
    facts = data.facts
    _check(data, held_out)
    columns = max(1, AT_ONCE // max(len(data.train), len(held_out), facts.levels or SIZES[-1] * len(SIZES)))
    units = torch.tensor(facts.scale.factor, dtype=torch.float64).expand(facts.dims)
    nats = torch.zeros(len(held_out), dtype=torch.float64)
    for train, x, unit in zip(
        torch.split(data.train.flatten(1), columns, 1),
        torch.split(held_out.flatten(1), columns, 1),
        torch.split(units, columns),
        strict=True,
    ):
        log_p = _log_level(train, x, facts.levels) if facts.levels else _log_value(train.double(), x.double(), unit)
        nats -= log_p.sum(1)
    return nats


def full_gaussian(data: Data, held_out: Tensor) -> Tensor:
    """-log p of examples under one Gaussian with the training mean and the full covariance, shrunk.

    p(x) = prod_d N(x_d; m_d + sum_{e<d} L_de z_e, L_dd^2),   L L^T = C,   z = L^-1 (x - m)

    Each factor is the conditional p(x_d | x_<d). With levels it is integrated over the bin of its level, in the order
    of the flattened example, so that the masses of all examples sum to one. C is the training covariance S, moved
    towards a multiple of the identity by as much as its own error calls for,

        C = (1 - w) S + (w mu + r) I,   mu = tr S / D,   w = min(beta^2, delta^2) / delta^2
        beta^2 = (1/N^2) (sum_k |x_k - m|^4 - N |S|^2),   delta^2 = |S - mu I|^2

    so that few examples say little about the directions in which they happen not to vary, and many leave S as it is
    (only two do so as well: both their products x x^T equal S, which hides its error). To the diagonal comes r, the
    variance of rounding to levels, width^2 / 12, or 1e-6 for real values, whose variance is about 1: C is invertible
    whatever is constant. All this is in the model's units.

    References: Ledoit and Wolf (2004), "A well-conditioned estimator for large-dimensional covariance matrices", for
    w; Pourahmadi (1999), for the Cholesky factor as a chain of regressions.

    Time grows as N D^2 + D^3; beside the data, memory is two matrices of D x D in float64.

    Args:
        data: what to fit, its training side only.
        held_out: examples to score, in the user's units, shape (N, *data.facts.shape).

    Returns:
        Nats per example, shape (N,), float64; in the user's units where values are real.

    Raises:
        OptionError: if `held_out` has another shape or is not on the levels of the data.

    Example:
        >>> from ancestral.data import load
        >>> digits = load("digits")
        >>> nats = full_gaussian(digits, digits.held_out)
        >>> round(digits.facts.bits_per_dim(nats).mean().item(), 2)
        2.33
    """
    facts = data.facts
    _check(data, held_out)
    mean, C = _shrunk_moments(data)
    C.diagonal().add_((2 / (facts.levels - 1)) ** 2 / 12 if facts.levels else RIDGE)
    L = torch.linalg.cholesky(C)
    std = L.diagonal()
    nats = []
    for x in _in_model_units(data, held_out):
        z = torch.linalg.solve_triangular(L, (x - mean).T, upper=False).T
        given = x - std * z
        log_p = log_bin(x, given, std, facts.levels) if facts.levels else log_density(x, given, std.square())
        nats.append(-log_p.sum(1))
    return torch.cat(nats) - (0.0 if facts.levels else facts.scale.log_det(facts.shape))


def _log_level(train: Tensor, x: Tensor, levels: int) -> Tensor:
    """log p_d(x_d) of levels, for every example and column of x."""
    n = _counts(train, levels)
    return ((n + 1 / 2) / (len(train) + levels / 2)).log().gather(0, x.long())


def _log_value(train: Tensor, x: Tensor, unit: Tensor) -> Tensor:
    """log p_d(x_d) of real values, for every example and column of x; a constant column has the deviation `unit`."""
    N, finest = len(train), SIZES[-1]
    varies = train.amin(0) < train.amax(0)
    mean, scale = train.mean(0), train.std(0, correction=0).where(varies, unit) * math.sqrt(3) / math.pi
    z_train, z = (train - mean) / scale, (x - mean) / scale
    counts = _counts(_logistic_bin(z_train, finest), finest)

    log_evidence, log_ratio = [], []
    for K in SIZES:
        n = counts.reshape(K, finest // K, -1).sum(1)
        log_prior = math.lgamma(K / 2) - K * math.lgamma(1 / 2) - math.lgamma(N + K / 2)
        log_evidence.append(N * math.log(K) + log_prior + (n + 1 / 2).lgamma().sum(0))
        log_ratio.append((K * (n + 1 / 2) / (N + K / 2)).log().repeat_interleave(finest // K, 0))
    log_weight = torch.stack(log_evidence).log_softmax(0)
    log_averaged = (log_weight[:, None] + torch.stack(log_ratio)).logsumexp(0)

    log_g = logsigmoid(z) + logsigmoid(-z) - scale.log()
    return log_averaged.gather(0, _logistic_bin(z, finest)) + log_g


def _logistic_bin(z: Tensor, size: int) -> Tensor:
    """Which of `size` bins of equal mass under the standard logistic distribution holds z."""
    return (z.sigmoid() * size).long().clamp(max=size - 1)


def _counts(index: Tensor, size: int) -> Tensor:
    """How often each of 0 .. size - 1 stands in each column, shape (size, D), float64."""
    D = index.shape[1]
    return (index.long() * D + torch.arange(D)).flatten().bincount(minlength=size * D).reshape(size, D).double()


def _shrunk_moments(data: Data) -> tuple[Tensor, Tensor]:
    """Mean and Ledoit-Wolf covariance of the training side in the model's units, shapes (D,) and (D, D)."""
    N, D = len(data.train), data.facts.dims
    mean = torch.zeros(D, dtype=torch.float64)
    for x in _in_model_units(data, data.train):
        mean += x.sum(0) / N
    S, fourth = torch.zeros(D, D, dtype=torch.float64), 0.0
    for x in _in_model_units(data, data.train):
        centred = x - mean
        S.addmm_(centred.T, centred, alpha=1 / N)
        fourth += centred.square().sum(1).square().sum().item()

    mu = S.trace().item() / D
    beta2 = (fourth - N * S.square().sum().item()) / N**2
    S.diagonal().sub_(mu)
    delta2 = S.square().sum().item()
    w = min(max(beta2, 0.0), delta2) / delta2 if delta2 else 0.0  # beta2 is a sum of squares, but for rounding
    S.mul_(1 - w).diagonal().add_(mu)
    return mean, S


def _in_model_units(data: Data, raw: Tensor) -> Iterator[Tensor]:
    """Flattened examples in the model's units, float64, some at a time."""
    for part in torch.split(raw, max(1, AT_ONCE // data.facts.dims)):
        yield data.facts.scale.forward(part, dtype=torch.float64).flatten(1)


def _check(data: Data, held_out: Tensor) -> None:
    facts = data.facts
    if tuple(held_out.shape[1:]) != facts.shape:
        raise OptionError(
            f"received examples of shape {tuple(held_out.shape[1:])}: {facts.name} needs shape {facts.shape}"
        )
    if facts.levels is None or not held_out.numel():
        return
    low, high = (end.item() for end in held_out.aminmax())
    if held_out.is_floating_point() or low < 0 or high >= facts.levels:
        raise OptionError(
            f"received {held_out.dtype} values between {low:g} and {high:g}: {facts.name} holds the integers "
            f"0 .. {facts.levels - 1}, and facts.to_raw brings examples in the model's units back to them"
        )
