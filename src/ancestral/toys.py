"""Densities of which everything is known: what a diffusion model has to learn, given exactly.

A point x_0 ~ p is seen through noise as x_t = alpha x_0 + sigma eps, eps ~ N(0, I). Two families are closed under
this map and keep their posterior p(x_0 | x_t) within reach of float64:

    Toy             what is known of a density
    ├── Mixture     Gaussians with full covariances: gaussian, mixture, ring-8, grid-25, two-moons, swiss-roll
    └── Boxes       uniform on disjoint boxes, blurred or not: checkerboard
"""

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import final

import numpy as np
import torch
from torch import Tensor

from ancestral.errors import OptionError, unknown
from ancestral.gaussian import LOG_2PI, log_density, log_ndtr_difference
from ancestral.rng import Rng, rand, randn

Level = float | Tensor


class Toy(ABC):
    """A density of which everything is known, in float64 and nats.

    `alpha` and `sigma` are at least 0 and not both 0. Where points come with them, each is a number or one number
    per point, shape (n,): every point may sit at its own noise level.
    """

    name: str

    @property
    @abstractmethod
    def mean(self) -> Tensor:
        """E[x_0], shape (D,)."""

    @property
    @abstractmethod
    def cov(self) -> Tensor:
        """Cov[x_0], shape (D, D)."""

    @property
    def dim(self) -> int:
        """Number of coordinates D of a point."""
        return self.mean.shape[0]

    @abstractmethod
    def sample(self, n: int, *, rng: Rng) -> Tensor:
        """Independent draws x_0 ~ p, shape (n, D)."""

    @abstractmethod
    def log_prob(self, x: Tensor) -> Tensor:
        """log p(x) in nats for points of shape (n, D), shape (n,)."""

    @abstractmethod
    def score(self, x: Tensor) -> Tensor:
        """grad log p(x) for points of shape (n, D), same shape."""

    @abstractmethod
    def diffused(self, alpha: Level, sigma: Level) -> "Toy":
        """The exact law of x_t = alpha x_0 + sigma eps, for one noise level."""

    @abstractmethod
    def posterior_mean(self, x_t: Tensor, alpha: Level, sigma: Level) -> Tensor:
        """E[x_0 | x_t], the ideal denoiser, shape (n, D)."""

    @abstractmethod
    def posterior_cov(self, x_t: Tensor, alpha: Level, sigma: Level) -> Tensor:
        """Cov[x_0 | x_t], shape (n, D, D)."""

    @abstractmethod
    def entropy(self) -> float:
        """-E[log p(x_0)] in nats; an OptionError where that is out of reach."""


@final
@dataclass(frozen=True, eq=False)
class Mixture(Toy):
    """A mixture of Gaussians, p(x_0) = sum_k w_k N(x_0; m_k, S_k).

    With C_k = alpha^2 S_k + sigma^2 I, responsibilities r_k ∝ w_k N(x_t; alpha m_k, C_k) and
    mu_k = m_k + alpha S_k C_k^-1 (x_t - alpha m_k):

        grad log p(x_t) = sum_k r_k C_k^-1 (alpha m_k - x_t)
        E[x_0 | x_t]    = sum_k r_k mu_k
        Cov[x_0 | x_t]  = sum_k r_k (sigma^2 S_k C_k^-1 + (mu_k - E)(mu_k - E)^T)

    S_k is diagonalised once, so that C_k^-1 and log det C_k are elementwise at every noise level.

    Reference: Bishop (2006), Pattern Recognition and Machine Learning, 2.113-2.117 for each component.

    Args:
        name: what to call it.
        weights: w_k up to a common factor, positive, shape (K,).
        means: m_k, shape (K, D).
        covs: S_k, symmetric and positive definite, shape (K, D, D).

    Raises:
        OptionError: if the shapes disagree, a weight is not positive, or a covariance is not positive definite.

    Example:
        >>> coin = Mixture("coin", torch.tensor([0.5, 0.5]), torch.tensor([[-1.0], [1.0]]), 0.01 * torch.ones(2, 1, 1))
        >>> round(coin.posterior_mean(torch.tensor([[0.5]]), 1.0, 0.5).item(), 3)
        0.941
    """

    name: str
    weights: Tensor
    means: Tensor
    covs: Tensor

    def __post_init__(self) -> None:
        _as_float64(self, "weights", "means", "covs")
        K, D = _table_shape("means", self.means)
        if self.weights.shape != (K,) or self.covs.shape != (K, D, D):
            raise OptionError(
                f"received {K} means in {D} dimensions with weights of shape {tuple(self.weights.shape)} and covs of "
                f"shape {tuple(self.covs.shape)}: give weights ({K},) and covs ({K}, {D}, {D})"
            )
        if not bool((self.weights > 0).all()):
            raise OptionError(f"received weights {self.weights.tolist()}: every weight must be positive")
        if not (torch.allclose(self.covs, self.covs.mT) and bool((self._spectrum[0] > 0).all())):
            raise OptionError("received covs of which one is not symmetric positive definite: check every matrix")
        object.__setattr__(self, "weights", self.weights / self.weights.sum())

    @cached_property
    def _spectrum(self) -> tuple[Tensor, Tensor]:
        """Eigenvalues (K, D) and eigenvectors (K, D, E) of every S_k."""
        values, vectors = torch.linalg.eigh(self.covs)
        return values, vectors

    @cached_property
    def mean(self) -> Tensor:
        """E[x_0], shape (D,)."""
        return self.weights @ self.means

    @cached_property
    def cov(self) -> Tensor:
        """Cov[x_0], shape (D, D)."""
        offsets = self.means - self.mean
        return torch.einsum("k,kde->de", self.weights, self.covs + offsets[:, :, None] * offsets[:, None, :])

    def sample(self, n: int, *, rng: Rng) -> Tensor:
        """Independent draws x_0 ~ p, shape (n, D)."""
        k = _choose(self.weights, rand((n,), rng))
        eps = randn((n, self.dim), rng, dtype=torch.float64)
        values, vectors = self._spectrum
        return self.means[k] + (vectors[k] @ (values[k].sqrt() * eps)[:, :, None])[:, :, 0]

    def log_prob(self, x: Tensor) -> Tensor:
        """log p(x) in nats for points of shape (n, D), shape (n,)."""
        log_joint, _, _ = self._components(x, 1.0, 0.0)
        return log_joint.logsumexp(1)

    def score(self, x: Tensor) -> Tensor:
        """grad log p(x) for points of shape (n, D), same shape."""
        log_joint, residuals, variances = self._components(x, 1.0, 0.0)
        r = log_joint.softmax(1)
        return -torch.einsum("nk,nke,kde->nd", r, residuals / variances, self._spectrum[1])

    def diffused(self, alpha: Level, sigma: Level) -> "Mixture":
        """The exact law of x_t = alpha x_0 + sigma eps, for one noise level."""
        a, s = (level.item() for level in _levels(1, alpha, sigma))
        noise = torch.eye(self.dim, dtype=torch.float64)
        return Mixture(self.name, self.weights, a * self.means, a**2 * self.covs + s**2 * noise)

    def posterior_mean(self, x_t: Tensor, alpha: Level, sigma: Level) -> Tensor:
        """E[x_0 | x_t], the ideal denoiser, shape (n, D)."""
        r, mu, _ = self._posterior(x_t, alpha, sigma)
        return torch.einsum("nk,nkd->nd", r, mu)

    def posterior_cov(self, x_t: Tensor, alpha: Level, sigma: Level) -> Tensor:
        """Cov[x_0 | x_t], shape (n, D, D)."""
        r, mu, variances = self._posterior(x_t, alpha, sigma)
        offsets = mu - torch.einsum("nk,nkd->nd", r, mu)[:, None]
        _, vectors = self._spectrum
        within = torch.einsum("nke,kdef->ndf", r[:, :, None] * variances, vectors[..., None] * vectors.mT[:, None])
        return within + torch.einsum("nkd,nkf->ndf", r[:, :, None] * offsets, offsets)

    def entropy(self) -> float:
        """-E[log p(x_0)] in nats, in closed form for one component and integrated on a grid for several.

        Raises:
            OptionError: when the components are too narrow, or the dimensions too many, for a grid.
        """
        values, _ = self._spectrum
        if len(self.weights) == 1:
            return 0.5 * float((LOG_2PI + 1 + values.log()).sum())
        margins = 9 * self.covs.diagonal(dim1=1, dim2=2).sqrt()
        low, high = (self.means - margins).amin(0), (self.means + margins).amax(0)
        return _entropy_on_grid(self, low, high, float(values.min().sqrt()))

    def _components(self, x_t: Tensor, alpha: Level, sigma: Level) -> tuple[Tensor, Tensor, Tensor]:
        """log w_k N(x_t; alpha m_k, C_k); then x_t - alpha m_k and the variances of C_k along the axes of S_k."""
        x_t = _points(x_t, self.dim)
        a, s = (level[:, :, None] for level in _levels(len(x_t), alpha, sigma))
        values, vectors = self._spectrum
        residuals = torch.einsum("nkd,kde->nke", x_t[:, None] - a * self.means, vectors)
        variances = a**2 * values + s**2
        log_normal = log_density(residuals, torch.zeros(()), variances).sum(2)
        return self.weights.log() + log_normal, residuals, variances

    def _posterior(self, x_t: Tensor, alpha: Level, sigma: Level) -> tuple[Tensor, Tensor, Tensor]:
        """r_k (n, K) and mu_k (n, K, D); then the variances of sigma^2 S_k C_k^-1 along the axes of S_k."""
        log_joint, residuals, variances = self._components(x_t, alpha, sigma)
        a, s = (level[:, :, None] for level in _levels(len(x_t), alpha, sigma))
        values, vectors = self._spectrum
        mu = self.means + torch.einsum("nke,kde->nkd", a * values / variances * residuals, vectors)
        return log_joint.softmax(1), mu, s**2 * values / variances


@final
@dataclass(frozen=True, eq=False)
class Boxes(Toy):
    """Uniform on disjoint boxes, plus independent noise N(0, sigma^2 I) when sigma is not 0.

    With V the total volume and Phi the normal distribution function,

        p(x) = 1/V sum_k prod_d [Phi((high_kd - x_d)/sigma) - Phi((low_kd - x_d)/sigma)]

    and given x, the clean point is in box k with probability r_k, a truncated normal along each axis.

    Reference: Johnson, Kotz & Balakrishnan (1994), Continuous Univariate Distributions 1, 13.10.

    Args:
        name: what to call it.
        lows: lower corners, shape (K, D).
        highs: upper corners, shape (K, D).
        sigma: standard deviation of the noise on every coordinate.

    Raises:
        OptionError: if the shapes disagree, a box is empty, two boxes overlap or sigma is negative.

    Example:
        >>> unit = Boxes("interval", torch.tensor([[0.0]]), torch.tensor([[2.0]]))
        >>> round(unit.entropy(), 3), unit.posterior_mean(torch.tensor([[1.0]]), 1.0, 0.3).item()
        (0.693, 1.0)
    """

    name: str
    lows: Tensor
    highs: Tensor
    sigma: float = 0.0

    def __post_init__(self) -> None:
        _as_float64(self, "lows", "highs")
        K, D = _table_shape("lows", self.lows)
        if self.highs.shape != (K, D):
            raise OptionError(f"received lows ({K}, {D}) and highs {tuple(self.highs.shape)}: give one of each per box")
        if not bool((self.lows < self.highs).all()):
            raise OptionError("received an empty box: every low must be below its high")
        overlap = torch.minimum(self.highs[:, None], self.highs) - torch.maximum(self.lows[:, None], self.lows)
        if bool((overlap > 0).all(2).triu(1).any()):
            raise OptionError("received boxes that overlap: split them into disjoint ones")
        if not self.sigma >= 0:
            raise OptionError(f"received sigma {self.sigma}: the noise on the boxes must be at least 0")

    @cached_property
    def _volumes(self) -> Tensor:
        return (self.highs - self.lows).prod(1)

    @cached_property
    def mean(self) -> Tensor:
        """E[x_0], shape (D,)."""
        return self._volumes @ (self.lows + self.highs) / (2 * self._volumes.sum())

    @cached_property
    def cov(self) -> Tensor:
        """Cov[x_0], shape (D, D)."""
        weights = self._volumes / self._volumes.sum()
        offsets = (self.lows + self.highs) / 2 - self.mean
        variances = weights @ (self.highs - self.lows) ** 2 / 12 + self.sigma**2
        return torch.diag(variances) + (weights[:, None] * offsets).T @ offsets

    def sample(self, n: int, *, rng: Rng) -> Tensor:
        """Independent draws x_0 ~ p, shape (n, D)."""
        k = _choose(self._volumes, rand((n,), rng))
        clean = self.lows[k] + (self.highs - self.lows)[k] * rand((n, self.dim), rng)
        return clean + self.sigma * randn((n, self.dim), rng, dtype=torch.float64)

    def log_prob(self, x: Tensor) -> Tensor:
        """log p(x) in nats for points of shape (n, D), shape (n,); -inf outside boxes without noise."""
        x = _points(x, self.dim)[:, None]
        if self.sigma == 0:
            log_mass = ((self.lows <= x) & (x < self.highs)).all(2).double().log()
        else:
            log_mass = log_ndtr_difference((self.lows - x) / self.sigma, (self.highs - x) / self.sigma).sum(2)
        return log_mass.logsumexp(1) - self._volumes.sum().log()

    def score(self, x: Tensor) -> Tensor:
        """grad log p(x) for points of shape (n, D), same shape; nan outside boxes without noise."""
        x = _points(x, self.dim)
        if self.sigma == 0:
            return torch.where(self.log_prob(x).isfinite()[:, None], 0.0, torch.nan).expand_as(x).double()
        one = torch.ones(1, 1, dtype=torch.float64)
        r, mu, _ = self._posterior(x, one, self.sigma**2 * one)
        return (torch.einsum("nk,nkd->nd", r, mu) - x) / self.sigma**2

    def diffused(self, alpha: Level, sigma: Level) -> Toy:
        """The exact law of x_t = alpha x_0 + sigma eps, for one noise level; a Gaussian when alpha is 0."""
        a, s = (level.item() for level in _levels(1, alpha, sigma))
        if a == 0:
            return gaussian(torch.zeros(self.dim), s**2 * torch.eye(self.dim, dtype=torch.float64), name=self.name)
        return Boxes(self.name, a * self.lows, a * self.highs, math.hypot(a * self.sigma, s))

    def posterior_mean(self, x_t: Tensor, alpha: Level, sigma: Level) -> Tensor:
        """E[x_0 | x_t], the ideal denoiser, shape (n, D)."""
        mean, _ = self._moments(x_t, alpha, sigma)
        return mean

    def posterior_cov(self, x_t: Tensor, alpha: Level, sigma: Level) -> Tensor:
        """Cov[x_0 | x_t], shape (n, D, D)."""
        _, cov = self._moments(x_t, alpha, sigma)
        return cov

    def entropy(self) -> float:
        """-E[log p(x_0)] in nats: log V without noise, integrated on a grid with noise.

        Raises:
            OptionError: when there is so little noise, or so many dimensions, that the grid would be too large.
        """
        if self.sigma == 0:
            return float(self._volumes.sum().log())
        margin = 9 * self.sigma
        return _entropy_on_grid(self, self.lows.amin(0) - margin, self.highs.amax(0) + margin, self.sigma)

    def _moments(self, x_t: Tensor, alpha: Level, sigma: Level) -> tuple[Tensor, Tensor]:
        """E[x_0 | x_t] and Cov[x_0 | x_t] from those of the clean point u, where x_0 = u + self.sigma eps.

        x_0 given (u, x_t) is Gaussian: x_t is u under noise of variance v = alpha^2 self.sigma^2 + sigma^2, so
        x_0 = keep u + gain x_t + noise of variance keep self.sigma^2, keep = sigma^2/v, gain = alpha self.sigma^2/v.
        """
        x_t = _points(x_t, self.dim)
        a, s = _levels(len(x_t), alpha, sigma)
        v = (a * self.sigma) ** 2 + s**2
        noiseless, v = v == 0, torch.where(v == 0, 1.0, v)
        keep, gain = s**2 / v, torch.where(noiseless, 1 / a, a * self.sigma**2 / v)

        r, mu, variances = self._posterior(x_t, a, v)
        u = torch.einsum("nk,nkd->nd", r, mu)
        offsets = mu - u[:, None]
        cov_u = torch.einsum("nk,nkd->nd", r, variances).diag_embed()
        cov_u = cov_u + torch.einsum("nkd,nke->nde", r[:, :, None] * offsets, offsets)
        eye = torch.eye(self.dim, dtype=torch.float64)
        return keep * u + gain * x_t, keep[..., None] ** 2 * cov_u + keep[..., None] * self.sigma**2 * eye

    def _posterior(self, x_t: Tensor, a: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """For x_t = a u + N(0, v I): which box u is in (n, K), and its mean and variance there, (n, K, D).

        The textbook moments of a truncated normal cancel when the box is narrow against the noise (near the end of
        every diffusion), so they are integrated: Gauss-Legendre on the part of each side within 40 nats of its peak,
        where 64 nodes are exact to rounding for every ratio of box and noise, a = 0 included.
        """
        x_t, a, v = x_t[:, None], a[:, :, None], v[:, :, None]
        peak = torch.where(a > 0, x_t / a, 0.0).clamp(self.lows, self.highs)
        slope, curvature = a * (x_t - a * peak) / v, a**2 / v
        reach = 80 / (slope.abs() + (slope**2 + 80 * curvature).sqrt())
        left, right = torch.maximum(self.lows, peak - reach), torch.minimum(self.highs, peak + reach)
        middle, half = (left + right) / 2, (right - left) / 2

        mass, first, second = torch.zeros(3, *middle.shape, dtype=torch.float64)
        for node, weight in zip(*np.polynomial.legendre.leggauss(64), strict=True):
            from_middle = half * node
            from_peak = middle - peak + from_middle
            p = weight * (slope * from_peak - curvature * from_peak**2 / 2).exp()
            mass, first, second = mass + p, first + p * from_middle, second + p * from_middle**2

        log_mass = (half * mass).log() - (x_t - a * peak) ** 2 / (2 * v)
        shift = first / mass
        return log_mass.sum(2).softmax(1), middle + shift, second / mass - shift**2


def gaussian(
    mean: Tensor | Sequence[float], cov: Tensor | Sequence[Sequence[float]], *, name: str = "gaussian"
) -> Mixture:
    """The normal law N(mean, cov), a mixture of one.

    Args:
        mean: shape (D,).
        cov: symmetric and positive definite, shape (D, D).
        name: what to call it.

    Raises:
        OptionError: if the shapes disagree or `cov` is not positive definite.

    Example:
        >>> gaussian([0.0], [[4.0]]).posterior_mean(torch.tensor([[1.0]]), 1.0, 2.0).item()
        0.5
    """
    mean, cov = (torch.as_tensor(a, dtype=torch.float64)[None] for a in (mean, cov))
    return Mixture(name, torch.ones(1), mean, cov)


def mixture() -> Mixture:
    """Three overlapping Gaussians of unequal weight, shape and direction: nothing cancels by symmetry.

    Example:
        >>> mixture().mean.norm().item() < 1e-12
        True
    """
    weights = torch.tensor([0.5, 0.3, 0.2], dtype=torch.float64)
    means = torch.tensor([[-1.0, 0.2], [1.0, 0.6], [1.0, -1.4]], dtype=torch.float64)
    covs = [[[0.5, 0.3], [0.3, 0.4]], [[0.2, -0.1], [-0.1, 0.6]], [[0.5, 0.2], [0.2, 0.2]]]
    return Mixture("mixture", weights, means, torch.tensor(covs, dtype=torch.float64))


def ring_8() -> Mixture:
    """Eight Gaussians of deviation 0.15 on a circle of radius 2: modes ten deviations apart.

    Example:
        >>> ring_8().means.norm(dim=1).tolist() == [2.0] * 8
        True
    """
    angles = torch.arange(8, dtype=torch.float64) * (math.pi / 4)
    return _isotropic("ring-8", 2 * torch.stack([angles.cos(), angles.sin()], dim=1), 0.15)


def grid_25() -> Mixture:
    """Twenty-five Gaussians of deviation 0.1 on the integer grid from -2 to 2: does a model find every mode?

    Example:
        >>> grid_25().weights.sum().item()
        1.0
    """
    ticks = torch.arange(-2, 3, dtype=torch.float64)
    return _isotropic("grid-25", torch.cartesian_prod(ticks, ticks), 0.1)


def checkerboard() -> Boxes:
    """Uniform on the eight dark unit squares of a 4 x 4 board centred on 0: sharp edges and corners that touch.

    Example:
        >>> checkerboard().log_prob(torch.tensor([[0.5, 0.5], [0.5, -0.5]])).exp().round(decimals=9).tolist()
        [0.125, 0.0]
    """
    ticks = torch.arange(-2, 2, dtype=torch.float64)
    lows = torch.cartesian_prod(ticks, ticks)
    lows = lows[lows.sum(1) % 2 == 0]
    return Boxes("checkerboard", lows, lows + 1)


def two_moons() -> Mixture:
    """Two interleaved half circles of radius 1.4, each as 64 Gaussians of deviation 0.12: exactly a mixture.

    Example:
        >>> two_moons().mean.norm().item() < 1e-12
        True
    """
    angles = torch.linspace(0, math.pi, 64, dtype=torch.float64)
    upper = torch.stack([angles.cos() - 0.5, angles.sin() - 0.25], dim=1)
    return _isotropic("two-moons", 1.4 * torch.cat([upper, -upper]), 0.12)


def swiss_roll() -> Mixture:
    """A spiral of one and a half turns out to radius 2.4, as 192 Gaussians of deviation 0.1: exactly a mixture.

    Example:
        >>> swiss_roll().mean.norm().item() < 1e-12
        True
    """
    # Along r = c theta the arc length grows as theta^2: equal steps of theta^2 are nearly equal steps of length.
    angles = torch.linspace((1.5 * math.pi) ** 2, (4.5 * math.pi) ** 2, 192, dtype=torch.float64).sqrt()
    curve = 2.4 / (4.5 * math.pi) * angles[:, None] * torch.stack([angles.cos(), angles.sin()], dim=1)
    return _isotropic("swiss-roll", curve - curve.mean(0), 0.1)


TOYS: dict[str, Callable[[], Toy]] = {
    "gaussian": lambda: gaussian([0.5, -0.5], [[1.5, 0.8], [0.8, 1.0]]),
    "mixture": mixture,
    "ring-8": ring_8,
    "grid-25": grid_25,
    "checkerboard": checkerboard,
    "two-moons": two_moons,
    "swiss-roll": swiss_roll,
}


def named(name: str) -> Toy:
    """The toy of this name, one of `TOYS`.

    Raises:
        OptionError: for any other name, with the closest one there is.

    Example:
        >>> named("ring-8").dim
        2
    """
    if name not in TOYS:
        raise unknown("toy", name, TOYS)
    return TOYS[name]()


def _entropy_on_grid(toy: Toy, low: Tensor, high: Tensor, deviation: float) -> float:
    """-∫ p log p over a box, with four grid points to the deviation of the narrowest Gaussian in p.

    The trapezoidal rule converges exponentially on such analytic integrands: the error is near 1e-10 nats.

    Reference: Trefethen & Weideman (2014), The exponentially convergent trapezoidal rule.
    """
    step = deviation / 4
    points = float(((high - low) / step).ceil().add(1).prod())
    if points > 1e7:
        raise OptionError(
            f"the entropy of {toy.name!r} in {toy.dim} dimensions would take a grid of {points:.0e} points: "
            "average -log_prob over samples"
        )
    axes = [torch.arange(start, stop + step, step, dtype=torch.float64) for start, stop in zip(low, high, strict=True)]
    grid = torch.cartesian_prod(*axes).reshape(-1, toy.dim)
    surprise = [torch.special.entr(toy.log_prob(x).exp()).sum() for x in torch.split(grid, 8192)]
    return step**toy.dim * float(torch.stack(surprise).sum())


def _isotropic(name: str, means: Tensor, deviation: float) -> Mixture:
    """Equal round Gaussians at the given means."""
    K, D = means.shape
    covs = deviation**2 * torch.eye(D, dtype=torch.float64)
    return Mixture(name, torch.full((K,), 1 / K, dtype=torch.float64), means, covs.expand(K, D, D))


def _choose(weights: Tensor, u: Tensor) -> Tensor:
    """The index whose slice of the cumulated weights holds u, for u uniform on [0, 1)."""
    edges = weights.cumsum(0)
    return torch.searchsorted(edges[:-1], u * edges[-1], right=True)


def _as_float64(owner: object, *fields: str) -> None:
    for field in fields:
        object.__setattr__(owner, field, getattr(owner, field).to(torch.float64))


def _table_shape(field: str, table: Tensor) -> tuple[int, int]:
    if table.ndim != 2 or 0 in table.shape:
        raise OptionError(f"received {field} of shape {tuple(table.shape)}: give one row per component, (K, D)")
    return table.shape[0], table.shape[1]


def _points(x: Tensor, dim: int) -> Tensor:
    if x.ndim != 2 or x.shape[1] != dim:
        raise OptionError(f"received points of shape {tuple(x.shape)}: this toy takes (n, {dim})")
    return x.to(torch.float64)


def _levels(n: int, alpha: Level, sigma: Level) -> tuple[Tensor, Tensor]:
    """alpha and sigma as float64 columns: (n, 1), or (1, 1) when all points share one."""
    a, s = (torch.as_tensor(level, dtype=torch.float64) for level in (alpha, sigma))
    for symbol, level in (("alpha", a), ("sigma", s)):
        if level.shape not in ((), (n,)):
            raise OptionError(
                f"received {symbol} of shape {tuple(level.shape)} for {n} points: give a number, or one per point"
            )
    if not bool(((a >= 0) & (s >= 0) & (a + s > 0)).all()):
        raise OptionError(f"received alpha {alpha} and sigma {sigma}: both must be at least 0, and not both 0")
    return a.reshape(-1, 1), s.reshape(-1, 1)
