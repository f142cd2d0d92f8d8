"""The latents of data as a mixture of Gaussians, to draw from in place of the prior.

What a model was trained to decode is the aggregate posterior, the mean of q(z | x) over the data, of which the prior is
only an approximation. Drawn from a mixture fitted to it, latents are where the decoder has been.

Reference: Ghosh et al. (2020), section 4, for the mixture; Dempster et al. (1977), for its fit.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from ancestral.errors import OptionError
from ancestral.gaussian import LOG_2PI
from ancestral.rng import Rng, rand, randn, stream

TOLERANCE, ROUNDS = 1e-5, 300
"""Gain per example, in nats, below which the fit ends, and how many rounds it has at most."""


@dataclass(frozen=True, eq=False)
class LatentMixture:
    """sum_k pi_k N(z; m_k, C_k) over D dimensions.

    Attributes:
        weights: pi, float64, shape (K,).
        means: float64, shape (K, D).
        covariances: float64, shape (K, D, D).
        history: what each round of the fit attained, in nats per example; empty if it was not fitted.
    """

    weights: Tensor
    means: Tensor
    covariances: Tensor
    history: tuple[float, ...] = ()

    def log_prob(self, z: Tensor) -> Tensor:
        """log p(z) in nats, shape (B, D) -> (B,), float64."""
        return self._log_joint(z).logsumexp(1)

    def sample(self, n: int, *, rng: Rng) -> Tensor:
        """n draws, float64, shape (n, D), from one generator or one each."""
        u, noise = rand((n,), rng), randn((n, self.means.shape[1]), rng, dtype=torch.float64)
        chosen = (self.weights.cumsum(0) <= u[:, None]).sum(1).clamp(max=len(self.weights) - 1)
        L = torch.linalg.cholesky(self.covariances)[chosen]
        return self.means[chosen] + (L @ noise[..., None])[..., 0]

    def _log_joint(self, z: Tensor) -> Tensor:
        """log pi_k + log N(z; m_k, C_k), shape (B, K)."""
        L = torch.linalg.cholesky(self.covariances)
        whitened = torch.linalg.solve_triangular(L, (z.double() - self.means[:, None]).mT, upper=False)
        log_det = L.diagonal(dim1=1, dim2=2).log().sum(1)
        rest = self.weights.log() - log_det - 0.5 * self.means.shape[1] * LOG_2PI
        return (rest[:, None] - 0.5 * whitened.square().sum(1)).T


def fit(z: Tensor, components: int = 10, *, strength: float = 1.0, rng: int = 0) -> LatentMixture:
    """A mixture with full covariances, by expectation-maximisation from centres that are far apart.

    Each covariance is that of its share of the points and of `strength` D points more, with the covariance of the
    prior of latents:

        C_k = (sum_n r_nk (z_n - m_k)(z_n - m_k)^T + s D I) / (sum_n r_nk + s D)

    What rises with every round is the log-likelihood with the log-density of that as a prior of C_k,

        sum_n log p(z_n) - (s D / 2) sum_k (log det C_k + tr C_k^-1)

    Reference: Dempster et al. (1977), section 4.3; Arthur & Vassilvitskii (2007), for the centres.

    Args:
        z: points, shape (N, D).
        components: K.
        strength: s, positive: with none, a component on one point would have no bound.
        rng: a seed, of the centres.

    Raises:
        OptionError: if there are fewer points than components, or the strength is not positive.

    Example:
        >>> z = torch.cat([randn((500, 1), stream(0)) - 5, randn((500, 1), stream(1)) + 5])
        >>> found = fit(z, 2)
        >>> [round(mean) for mean in sorted(found.means[:, 0].tolist())]
        [-5, 5]
    """
    z = z.double()
    (N, D), generator = z.shape, stream(rng)
    if not 1 <= components <= N:
        raise OptionError(f"received {components} components for {N} latents: at least 1 and at most as many")
    if not strength > 0:
        raise OptionError(f"received strength {strength:g}: a positive one keeps every covariance invertible")
    means = z[int(rand((), generator) * N)][None]
    while len(means) < components:
        nearest = torch.cdist(z, means).square().amin(1).cumsum(0)
        chosen = torch.searchsorted(nearest, rand((), generator) * nearest[-1], right=True).clamp(max=N - 1)
        means = torch.cat([means, z[chosen][None]])
    extra, eye = strength * D, torch.eye(D, dtype=torch.float64)
    spread = (z - z.mean(0)).T @ (z - z.mean(0)) / N + eye / N
    found = LatentMixture(
        torch.full((components,), 1 / components, dtype=torch.float64), means, spread.repeat(len(means), 1, 1)
    )
    history: list[float] = []
    while len(history) < ROUNDS:
        log_joint = found._log_joint(z)
        log_p = log_joint.logsumexp(1)
        r = (log_joint - log_p[:, None]).exp()
        L = torch.linalg.cholesky(found.covariances)
        prior = 2 * L.diagonal(dim1=1, dim2=2).log().sum() + torch.cholesky_inverse(L).diagonal(dim1=1, dim2=2).sum()
        history.append(float(log_p.sum() - 0.5 * extra * prior) / N)
        if len(history) > 1 and history[-1] - history[-2] < TOLERANCE:
            break
        share = r.sum(0) + math.ulp(1.0)
        means = r.T @ z / share[:, None]
        apart = z - means[:, None]
        scatter = (apart * r.T[..., None]).mT @ apart + extra * eye
        found = LatentMixture(share / share.sum(), means, scatter / (share + extra)[:, None, None])
    return LatentMixture(found.weights, found.means, found.covariances, tuple(history))
