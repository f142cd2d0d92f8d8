"""What a trained denoiser gains without being trained again: its reverse variance, and the best chain of K steps.

Both follow from one curve that is measured once: how wrong the guess is at each time.

    mse_t = E ||x_0 - x_0_hat(x_t)||^2 / D

Of reverse variances that depend on the time alone, v = beta~ + c_0^2 mse_t has the least bound, however wrong the
guess; with any of them the expected term of every pair s < t is known from mse_t. The bound of a sub-chain is then the
length of a path, and the shortest path of K steps is found by dynamic programming.

References: Bao et al. (2022), 2206.07309, the optimal covariance for an imperfect mean; Watson et al. (2021),
2106.03802, the chain.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from ancestral import gaussian
from ancestral.diffusion.denoise import FIXED, Denoiser
from ancestral.diffusion.grids import Grid, grid
from ancestral.diffusion.likelihood import DECODERS
from ancestral.diffusion.process import LOG_SNR_MIN, Process, Time, per_example
from ancestral.errors import OptionError, unknown
from ancestral.rng import Rng, Seeds, rand, streams

DRAWS = 8
"""Times drawn per example, by default."""

KNOTS = 64
"""Levels of noise, evenly spaced over a chain, at which its curves are estimated."""


@dataclass(frozen=True)
class Residuals:
    """How wrong a denoiser's guess is along a chain of T times, on average over examples.

    Attributes:
        times: the chain as increasing times t_1, ..., t_T, shape (T,), float64.
        dim: D, the number of elements of an example.
        mse: E ||x_0 - x_0_hat(x_t)||^2 / D at each time, shape (T,), float64.
        mse_stderr: its standard error before smoothing, which lowers it, shape (T,).
        decoder: L_0 = E[-log p_theta(x_0|x_t)] of a chain that starts at each time, nats per example, shape (T,).
        decoder_stderr: its standard error in the same way, shape (T,).
        prior: L_T of the chain, nats per example.
        variance: of the reverse chain whose decoder this is: "beta" or "optimal".
    """

    times: Tensor
    dim: int
    mse: Tensor
    mse_stderr: Tensor
    decoder: Tensor
    decoder_stderr: Tensor
    prior: float
    variance: str


def residuals(
    denoiser: Denoiser,
    x_0: Tensor,
    steps: int | Tensor = 1000,
    *,
    rng: Seeds,
    draws: int = DRAWS,
    variance: str = "optimal",
    levels: int | None = None,
    decoder: str = "gaussian",
    batch: int = 256,
) -> Residuals:
    """The residuals of a denoiser on examples, at every time of a chain, for the cost of `draws` times per example.

    Times are drawn evenly over the log-SNR of the chain, stratified in draws. What is smoothed over the log-SNR is the
    root of (1 + SNR_t) mse_t, which is 1 for unit Gaussian data at any level of noise: by a cubic spline as stiff as
    the errors of its points allow, because a search for the best chain finds every dip that is left in a curve, and a
    root, squared again, is never negative.

    Real-valued data need no more: their decoder is D/2 [log(2 pi v) + mse_t / v]. Data with levels are passed over a
    second time for theirs, in which v = mse_t has to be known.

    Args:
        denoiser: E[x_0 | x_t].
        x_0: examples in the model's units, shape (n, ...); on `levels` values in [-1, 1] when there are levels.
        steps: the chain, a grid of decreasing times, or the number of steps of the default grid.
        rng: a seed, one per example, or generators.
        draws: times per example.
        variance: of the decoder: "beta", v = sigma_t^2, or "optimal", v = mse_t.
        levels: number of levels of the data; None for a real-valued density.
        decoder: of data on levels, one of `likelihood.DECODERS`; "softmax" asks no network.
        batch: examples that the denoiser is given at once.

    Raises:
        OptionError: if the variance is another, the grid is not legal, or there are too few draws for the chain.

    Example:
        >>> from ancestral import toys
        >>> from ancestral.diffusion import denoise, process
        >>> from ancestral.rng import stream
        >>> toy = toys.gaussian([0.0], [[1.0]])
        >>> oracle = denoise.OracleDenoiser(toy, process.cosine())
        >>> result = residuals(oracle, toy.sample(500, rng=stream(0)), 100, rng=stream(1))
        >>> sigma_t = process.cosine()(result.times)[1]
        >>> bool(((result.mse - sigma_t**2).abs() < 4 * result.mse_stderr).all())
        True
    """
    if variance not in ("beta", "optimal"):
        raise OptionError(
            f"received variance {variance!r}: give 'beta' or 'optimal', whose decoder depends on the first time of a "
            "chain alone"
        )
    if decoder not in DECODERS:
        raise unknown("decoder", decoder, DECODERS)
    if draws < 1:
        raise OptionError(f"every example needs at least one draw, received draws = {draws}")
    process, dim = denoiser.process, x_0[0].numel()
    times = grid(process, steps).flip(0)
    left = _noise(process, times).sigmoid()
    measured = partial(_measured, denoiser, x_0, times, rng=streams(rng, len(x_0)), draws=draws, batch=batch)

    def error(x_0: Tensor, x_t: Tensor, x_0_hat: Tensor, step: Tensor) -> Tensor:
        return (x_0 - x_0_hat).double().square().flatten(1).mean(1).cpu() / left[step]

    mse, mse_stderr = (left * curve for curve in measured(error))
    var = mse if variance == "optimal" else process(times)[1].square()
    if levels is None:
        L_0, L_0_stderr = dim / 2 * (gaussian.LOG_2PI + var.log() + mse / var), dim / 2 * mse_stderr / var
    else:

        def surprise(x_0: Tensor, x_t: Tensor, x_0_hat: Tensor, step: Tensor) -> Tensor:
            if decoder == "softmax":
                alpha, sigma = (per_example(c, x_0.double()) for c in process(times[step]))
                log_p = gaussian.log_softmax_level(x_0, x_t.double() / alpha, sigma / alpha, levels)
            else:
                log_bin = gaussian.log_bin if decoder == "gaussian" else gaussian.log_bin_tanh
                log_p = log_bin(x_0, x_0_hat, per_example(var[step].sqrt(), x_0.double()), levels)
            return -log_p.flatten(1).sum(1).cpu()

        L_0, L_0_stderr = measured(surprise)
    prior = float(process.terminal_kl(x_0, times[-1]).mean())
    return Residuals(times, dim, mse, mse_stderr, L_0, L_0_stderr, prior, variance)


class Calibrated(Denoiser):
    """A denoiser that knows how wrong it is on average: Var[x_0 | x_t] is taken to be mse_t, for every element alike.

    Reverse variance "optimal" is then beta~ + c_0^2 mse_t, the best that is isotropic and depends on the time alone,
    also for a guess that is not E[x_0 | x_t].

    Reference: Bao et al. (2022), 2206.07309.

    Args:
        denoiser: any.
        residuals: of that denoiser. Between its times (1 + SNR_t) mse_t is linear in the log-SNR.

    Example:
        >>> from ancestral import toys
        >>> from ancestral.diffusion import denoise, likelihood, process
        >>> from ancestral.rng import stream
        >>> toy = toys.named("mixture")
        >>> clipped = denoise.Clipped(denoise.OracleDenoiser(toy, process.cosine()), -2.0, 2.0)
        >>> x_0 = toy.sample(500, rng=stream(0))
        >>> calibrated = Calibrated(clipped, residuals(clipped, x_0, 50, rng=stream(1)))
        >>> gain = [likelihood.bound(calibrated, x_0, 10, rng=stream(2), variance=v) for v in ("beta", "optimal")]
        >>> bool(gain[1].nats.mean() < gain[0].nats.mean())
        True
    """

    def __init__(self, denoiser: Denoiser, residuals: Residuals) -> None:
        super().__init__()
        self.denoiser, self.process = denoiser, denoiser.process
        self._knots = _noise(self.process, residuals.times)
        self._relative = residuals.mse / self._knots.sigmoid()

    def forward(self, x_t: Tensor, t: Time) -> Tensor:
        """The guess of the denoiser, unchanged."""
        return self.denoiser(x_t, t)

    def moments(self, x_t: Tensor, t: Time) -> tuple[Tensor, Tensor]:
        """The guess, and mse_t, each the shape of x_t."""
        noise = _noise(self.process, t)
        mse = noise.sigmoid() * (_hats(noise, self._knots) @ self._relative)
        return self(x_t, t), per_example(mse, x_t).expand_as(x_t)


def pair_terms(process: Process, residuals: Residuals, variance: str = "optimal") -> Tensor:
    """E[L] = E[KL(q(x_s|x_t, x_0) || p_theta(x_s|x_t))] for every pair s < t of the chain, which mse_t determines.

    The divergence is linear in the squared error of the guess: KL(N(0, beta~) || N(c_0 sqrt(mse_t), v)) per dimension.

        "fixed-small", v = beta~                    D/2 (SNR_s - SNR_t) mse_t
        "optimal", v = beta~ + c_0^2 mse_t          D/2 log(1 + (SNR_s - SNR_t) mse_t), the least of any v
        "beta", "fixed-large", v = var_{t|s}        D/2 [r - 1 - log r + c_0^2 mse_t / v],   r = beta~ / v

    Args:
        process: of the denoiser.
        residuals: of the denoiser.
        variance: of the reverse chain, one of `denoise.FIXED`, or "optimal".

    Returns:
        Nats per example, shape (T, T), row s and column t, float64; inf where s >= t.

    Raises:
        OptionError: if the variance is unknown.
    """
    if variance not in (*FIXED, "optimal"):
        raise unknown("reverse variance", variance, (*FIXED, "optimal"))
    s, t = residuals.times[:, None], residuals.times
    _, c_0, beta_tilde = process.posterior_coefficients(s, t)
    error = c_0**2 * residuals.mse
    var = {"fixed-small": beta_tilde, "optimal": beta_tilde + error}.get(variance, process.transition(s, t)[1])
    terms = residuals.dim * gaussian.kl(torch.zeros_like(error), beta_tilde, error.sqrt(), var)
    return torch.where(s < t, terms, torch.inf)


class Respaced(NamedTuple):
    """A sub-chain: its grid of decreasing times, shape (K,), and its predicted bound in nats per example."""

    steps: Tensor
    nats: float


def best_chain(process: Process, residuals: Residuals, K: int) -> Respaced:
    """The K times of a chain, its last one among them, whose bound is the least; see `best_chains`.

    Example:
        >>> from ancestral import toys
        >>> from ancestral.diffusion import denoise, process
        >>> from ancestral.rng import stream
        >>> toy = toys.named("mixture")
        >>> oracle = denoise.OracleDenoiser(toy, process.cosine())
        >>> errors = residuals(oracle, toy.sample(500, rng=stream(0)), 100, rng=stream(1))
        >>> chain = best_chain(oracle.process, errors, 5)
        >>> len(chain.steps), chain.steps[0].item(), chain.nats > toy.entropy()
        (5, 1.0, True)
    """
    return best_chains(process, residuals, K)[-1]


def best_grid(residuals: Residuals) -> Grid:
    """The best chain as a grid, (process, n) -> times, for the process whose residuals they are; see `best_chain`."""
    return lambda process, n: best_chain(process, residuals, n).steps


def best_chains(process: Process, residuals: Residuals, K: int) -> list[Respaced]:
    """The sub-chains of 1, 2, ..., K steps with the least bound, for the variance of the residuals' decoder.

    least_1(t) = L_0(t),   least_k(t) = min_{s < t} [least_{k-1}(s) + L(s, t)],   bound = least_K(t_T) + L_T

    The least of many estimates is too low by about the error of one: `likelihood.bound` on the grid says what it costs.

    Reference: Watson et al. (2021), 2106.03802. Time and memory are of order K T^2 and T^2.

    Args:
        process: of the denoiser.
        residuals: of the denoiser, on the chain of T steps to choose from.
        K: number of steps, 1 to T.

    Raises:
        OptionError: if K is not in 1 .. T.
    """
    T = len(residuals.times)
    if not 1 <= K <= T:
        raise OptionError(f"a chain of {T} steps has sub-chains of 1 to {T} steps, cannot choose {K}")
    terms = pair_terms(process, residuals, residuals.variance)
    least, before, chains = residuals.decoder, list[list[int]](), list[Respaced]()
    for k in range(1, K + 1):
        if k > 1:
            least, s = (least[:, None] + terms).min(0)
            before.append(s.tolist())
        path = [T - 1]
        for earlier in reversed(before):
            path.append(earlier[path[-1]])
        chains.append(Respaced(residuals.times[path], float(least[-1]) + residuals.prior))
    return chains


def _measured(
    denoiser: Denoiser,
    x_0: Tensor,
    times: Tensor,
    of: Callable[[Tensor, Tensor, Tensor, Tensor], Tensor],
    *,
    rng: Rng,
    draws: int,
    batch: int,
) -> tuple[Tensor, Tensor]:
    """Mean and standard error, at every time, of what `of` says of (x_0, x_t, x_0_hat, index of it), (B,)."""
    process, noise = denoiser.process, _noise(denoiser.process, times)
    at, values = [], []
    for start in range(0, len(x_0), batch):
        rows = slice(start, start + batch)
        x, each = x_0[rows], rng[rows] if isinstance(rng, Sequence) else rng
        share = (rand((len(x), draws), each) + torch.arange(draws)) / draws
        drawn = _nearest(noise[0] + share * (noise[-1] - noise[0]), noise)
        found = []
        for step in drawn.unbind(1):
            x_t, _ = process.marginal(x, times[step], each)
            with torch.no_grad():
                x_0_hat = denoiser(x_t, times[step])
            found.append(of(x, x_t, x_0_hat, step))
        at.append(noise[drawn])
        values.append(torch.stack(found, 1))
    return _smoothed(torch.cat(at), torch.cat(values), noise)


def _noise(process: Process, t: Time) -> Tensor:
    """log(sigma_t^2 / alpha_t^2) in nats, float64, cut where no signal is left; its sigmoid is 1 / (1 + SNR_t)."""
    return -process.log_snr(t).clamp(min=LOG_SNR_MIN)


def _nearest(at: Tensor, knots: Tensor) -> Tensor:
    """The index of the nearest of increasing knots, int64, the shape of at."""
    return torch.searchsorted((knots[1:] + knots[:-1]) / 2, at)


def _hats(at: Tensor, knots: Tensor) -> Tensor:
    """The share of each of K increasing knots in every point, shape (..., K): linear between two, all beyond an end."""
    passed = ((at[..., None] - knots[:-1]) / knots.diff().clamp(min=1e-9)).clamp(0, 1)
    one = torch.ones_like(at[..., None])
    return torch.cat([one, passed], -1) - torch.cat([passed, 0 * one], -1)


def _smoothed(at: Tensor, values: Tensor, noise: Tensor) -> tuple[Tensor, Tensor]:
    """The curve behind values >= 0 of n examples at drawn noise, both (n, draws), at the noise of all T times.

    Each knot has the mean of the values, weighted by its share in their noise, and the roots of these means are
    smoothed. Standard errors are those of the means, as ratios of sums over examples, whose draws are not independent:
    what smoothing gains is not claimed.
    """
    even = torch.linspace(float(noise[0]), float(noise[-1]), KNOTS, dtype=torch.float64)
    knots = noise[sorted(set(_nearest(even, noise).tolist()))]
    shares = _hats(at, knots)
    mass, total = shares.sum(1), torch.einsum("ndk,nd->nk", shares, values)
    weight = mass.sum(0)
    if not (weight > 0).all():
        raise OptionError(
            f"received {at.numel()} draws for {len(knots)} levels of noise, and some have none: give more examples or "
            "more draws"
        )
    mean = total.sum(0) / weight
    root = mean.sqrt()
    influence = (total - mass * mean) / weight / (2 * root.clamp(min=1e-150))
    hats, covariance = _hats(noise, knots), influence.T @ influence
    curve = hats @ _smoother(knots, root, covariance.diagonal()) @ root
    return curve.square(), 2 * curve.abs() * ((hats @ covariance) * hats).sum(1).sqrt()


def _smoother(knots: Tensor, y: Tensor, var: Tensor) -> Tensor:
    """S, shape (K, K), with S y = argmin_f sum (y - f)^2 / var + (1 / scale) integral f''^2: a cubic smoothing spline.

    The scale is the one of least estimated risk, sum (y - S y)^2 / var + 2 tr S.

    References: Reinsch (1967), Smoothing by spline functions; Mallows (1973), Some comments on C_p.
    """
    gaps, size, eye = knots.diff(), y.square().mean(), torch.eye(len(knots), dtype=torch.float64)
    slope = eye.diff(dim=0) / gaps[:, None]
    bend = slope.diff(dim=0) / ((gaps[1:] + gaps[:-1]) / 2).sqrt()[:, None]
    var = var + 1e-12 * size
    scales = torch.logspace(-8, 4, 49, dtype=torch.float64) * size
    precision = (1 / var).diag()
    S = torch.linalg.solve(precision + bend.T @ bend / scales[:, None, None], precision)
    risk = ((y - S @ y).square() / var).sum(1) + 2 * S.diagonal(dim1=1, dim2=2).sum(1)
    return S[risk.argmin()]
