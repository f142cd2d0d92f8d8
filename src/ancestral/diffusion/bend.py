"""A grid bent to a model: its times are moved until the ends of a few starts come closer to their true ones.

Starts are draws of p(x_T), and their ends x_0* what a fine solution of the probability-flow ODE makes of them. With
lambda the log-SNR of the times, and u even from 0 to 1 over the gaps between them, a grid of any length is bent by

    lambda_1 + delta,   (lambda_{i+1} - lambda_i) exp(sum_j theta_j cos(pi j u_i)),   j = 0, ..., 7
    min over (delta, theta) of  mean ||x_0 - x_0*||^2

The mean square counts mostly the starts that are near the border of two basins: on which side they end is what so many
evaluations can get wrong. The mean root, which counts them little, brings the typical start up to ten times closer and
sends more of them astray.

Where the law is of finitely many points, an end is met or it is not, and a few hundred starts cannot tell which grid
meets more. There the way is compared too, at every time of the grid: of grids that meet all these ends, those that
stray from it miss more of others.
"""

import math
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from torch import Tensor

from ancestral.diffusion.denoise import Denoiser
from ancestral.diffusion.grids import LOG_SNR_MAX
from ancestral.diffusion.multistep import weights
from ancestral.diffusion.process import LOG_SNR_MIN, Time
from ancestral.diffusion.sample import SAMPLERS

COSINES = 8
"""Of theta, at most."""

WAY = 3.0
"""How much a distance on the way counts, where ways are compared, in units of one at the end.

Measured on the 8x8 digits and on random points: 1 leaves it to the few ends that are missed, ways alone forget them.
"""


class Errors(NamedTuple):
    """Distances ||x_0 - x_0*|| of ends from those of the reference.

    Attributes:
        rms: root mean square, which is made small.
        typical: the square of the mean root.
        median: the median.
        astray: share of starts that end more than a quarter of the spread of all ends away, as in another basin.
    """

    rms: float
    typical: float
    median: float
    astray: float


class Pair(NamedTuple):
    """A sampler and a grid by name, and the times."""

    sampler: str
    grid: str
    times: Tensor


class Counted(Denoiser):
    """A denoiser that counts the examples it is given."""

    def __init__(self, denoiser: Denoiser) -> None:
        super().__init__()
        self.denoiser, self.process, self.asked = denoiser, denoiser.process, 0

    def forward(self, x_t: Tensor, t: Time) -> Tensor:
        """E[x_0 | x_t], unchanged."""
        self.asked += len(x_t)
        return self.denoiser(x_t, t)


class Way(NamedTuple):
    """States of a fine solution at log-SNR that are even: first, first + gap, ..., shape (T, n, ...), T >= 4."""

    states: Tensor
    first: float
    gap: float

    def at(self, log_snr: float) -> Tensor:
        """The state at a log-SNR between them, by the cubic through the four nearest, shape (n, ...)."""
        place = (log_snr - self.first) / self.gap
        i = min(max(int(place) - 1, 0), len(self.states) - 4)
        shares = weights(range(4), [(place - i) ** k for k in range(4)])
        return torch.stack([share * state for share, state in zip(shares, self.states[i:], strict=False)]).sum(0)


@dataclass(frozen=True)
class Starts:
    """A few starts.

    Attributes:
        denoiser: of the model.
        noise: draws of p(x_T), shape (n, ...).
        ends: where a fine solution takes them, x_0*, the same shape.
        way: on which it takes them there, if that is what is compared.
    """

    denoiser: Counted
    noise: Tensor
    ends: Tensor
    way: Way | None = None

    def __getitem__(self, rows: slice) -> "Starts":
        way = self.way and self.way._replace(states=self.way.states[:, rows])
        return Starts(self.denoiser, self.noise[rows], self.ends[rows], way)

    def at_first(self, pair: Pair) -> Tensor:
        """The draws of p(x_T), scaled to draws at the pair's first time."""
        process = self.denoiser.process
        return self.noise * float(process.prior_var(pair.times[0]) / process.prior_var()) ** 0.5

    def path(self, pair: Pair) -> list[Tensor]:
        """Every point of the pair's walk."""
        walk = SAMPLERS[pair.sampler].path(self.denoiser, self.at_first(pair), pair.times)
        return [point.x for point in walk]

    def along(self, pair: Pair) -> "Starts":
        """The same starts, compared with the way of a fine pair, whose times are even in log-SNR."""
        levels = self.denoiser.process.log_snr(pair.times).clamp(min=LOG_SNR_MIN)
        states = torch.stack(self.path(pair)[:-1])
        return replace(self, way=Way(states, float(levels[0]), float(levels.diff().mean())))

    def misses(self, pair: Pair) -> Tensor:
        """x_0 - x_0* of every start, shape (n, D), float64.

        Where ways are compared, beside it x_t - x_t* at every time but the first, `WAY` times the root of its share of
        the way in log-SNR: a row gets the length of both.
        """
        if self.way is None or len(pair.times) == 1:
            return self.missed(pair)
        levels = self.denoiser.process.log_snr(pair.times).clamp(min=LOG_SNR_MIN)
        shares = WAY * (levels.diff() / (levels[-1] - levels[0])).sqrt()
        _, *between, end = self.path(pair)
        told = zip(between, levels[1:].tolist(), shares.tolist(), strict=True)
        strayed = [share * _flat(x - self.way.at(level)) for x, level, share in told]
        return torch.cat([_flat(end - self.ends), *strayed], 1)

    def missed(self, pair: Pair) -> Tensor:
        """x_0 - x_0* of every start, shape (n, D), float64."""
        return _flat(SAMPLERS[pair.sampler](self.denoiser, self.at_first(pair), pair.times) - self.ends)

    def errors(self, pair: Pair) -> Errors:
        """How far from the ends of the reference the pair ends."""
        far = distances(self.missed(pair))
        astray = far > self.spread / 4
        means = far.square().mean().sqrt(), far.sqrt().mean().square(), far.median(), astray.double().mean()
        return Errors(*(float(mean) for mean in means))

    @property
    def spread(self) -> float:
        """The root mean square of the distances of all ends from their mean."""
        return loss(_flat(self.ends - self.ends.mean(0)))

    def loss(self, pair: Pair) -> float:
        """The root mean square of the misses."""
        return loss(self.misses(pair))

    def asked(self, pair: Pair) -> int:
        """Evaluations of the network for one example."""
        before, _ = self.denoiser.asked, self[:1].missed(pair)
        return self.denoiser.asked - before


def bend(starts: Starts, pair: Pair, log_snr_max: float = LOG_SNR_MAX, rounds: int = 3) -> Pair:
    """The pair with times moved so that its ends come closer to those of the reference.

    The misses r are linearized in (delta, theta) by differences, and the step is the damped one of least sum ||r||^2;
    one that does not make it smaller is not taken.

    Reference: Marquardt (1963), for the damping.

    Args:
        starts: whose misses are made small.
        pair: to begin with.
        log_snr_max: of the last time, at most, in nats.
        rounds: steps at most, each for as many walks as there are (delta, theta), and up to 4.

    Example:
        >>> from ancestral import toys
        >>> from ancestral.diffusion import denoise, grids, process
        >>> from ancestral.rng import randn, stream
        >>> oracle = denoise.OracleDenoiser(toys.named("mixture"), process.linear())
        >>> noise = randn((20, 2), stream(0), dtype=torch.float64)
        >>> starts = Starts(Counted(oracle), noise, SAMPLERS["heun"](oracle, noise, grids.log_snr(oracle.process, 60)))
        >>> straight = Pair("heun", "uniform", grids.uniform(oracle.process, 4))
        >>> starts.errors(bend(starts, straight)).rms < starts.errors(straight).rms / 2
        True
    """
    process, width = starts.denoiser.process, 0.02
    end, level = process.log_snr(1.0).clamp(min=LOG_SNR_MIN), process.log_snr(pair.times).clamp(min=LOG_SNR_MIN)
    bends = torch.zeros(1 + min(COSINES, len(level) - 1), dtype=torch.float64)
    misses, damping = starts.misses(pair), 0.1

    def moved(bends: Tensor) -> Pair:
        """The pair with other (delta, theta), squeezed between the end of the process and log_snr_max."""
        u = torch.linspace(0, 1, len(level) - 1, dtype=torch.float64)
        cosines = torch.cos(math.pi * u[:, None] * torch.arange(len(bends) - 1))
        gaps = (level.diff() * (cosines @ bends[1:]).exp()).cumsum(0)
        first = (level[0] + bends[0]).clamp(end, (end + log_snr_max) / 2)
        gaps = gaps * ((log_snr_max - first) / gaps[-1:]).clamp(max=1)
        times = process.time(first + torch.cat([gaps.new_zeros(1), gaps]))
        times[0] = 1 if first <= end else times[0]
        return Pair(pair.sampler, f"{pair.grid}, bent", times)

    for _ in range(rounds):
        before, nudges = loss(misses), width * torch.eye(len(bends), dtype=torch.float64)
        slopes = torch.stack([(starts.misses(moved(bends + nudge)) - misses) / width for nudge in nudges], 2)
        H, g = torch.einsum("ndp,ndq->pq", slopes, slopes), torch.einsum("ndp,nd->p", slopes, misses)
        if not H.isfinite().all():
            break
        for _ in range(4):
            ridge = (damping * H.diagonal() + 1e-9 * H.trace() + 1e-30).diag()
            trial = bends - torch.linalg.solve(H + ridge, g).clamp(-1, 1)
            there = starts.misses(moved(trial))
            if loss(there) < before:
                break
            damping *= 5
        else:
            break
        bends, misses, damping = trial, there, damping / 4
        if loss(there) > 0.99 * before:
            break
    return moved(bends) if bends.any() else pair


def loss(misses: Tensor) -> float:
    """The root mean square of the lengths of the rows."""
    return float(distances(misses).square().mean().sqrt())


def _flat(x: Tensor) -> Tensor:
    return x.double().flatten(1).cpu()


def distances(misses: Tensor) -> Tensor:
    """The length of each row; what is not finite is infinitely far."""
    return misses.norm(dim=1).nan_to_num(torch.inf, torch.inf).clamp(min=1e-12)
