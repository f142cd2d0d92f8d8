"""What a sampler does whatever the law: its measured order, and where it has to be exact.

order         the error along the probability-flow ODE falls as n^-p, p the declared order
exactness     where all data are one point c, x_s = alpha_s c + sigma_s / sigma_t (x_t - alpha_t c) in one step
"""

from collections.abc import Sequence
from functools import cache

import torch
from torch import Tensor

from ancestral import ode, toys
from ancestral.diffusion.denoise import exact
from ancestral.diffusion.flow import MAX_STEP
from ancestral.diffusion.process import CONSTRAINTS, Process
from ancestral.diffusion.sample import Point, Sampler, walk
from ancestral.errors import OptionError
from ancestral.measure.certification.subjects import ROUNDING, Found
from ancestral.rng import randn, stream, streams

COUNTS = (72, 108, 162, 242)
"""Steps at which the error of an order is measured; even, for the uneven grid."""

SHORT_BY = 0.15
"""How far a measured order may stay below the declared one: what the next power of 1/n is still worth at `COUNTS`."""

KEPT = 1e-2
"""How far from the flow a deterministic sampler may end that declares no order, because it keeps a tolerance."""

FLOW = (-7.5, 6.0)
"""Log-SNR over which an order is measured, in nats: all but the ends, where nothing changes."""


def grade(sampler: Sampler, process: Process, predicts: str) -> Found:
    """The numbers of a `certificate.SamplerRow`, and what is wrong with them."""
    point_mass, exponential, evaluations = _on_a_point(sampler, process, predicts)
    alone = _alone(sampler, process, predicts)
    found = {"declared": sampler.order, "point_mass": point_mass, "alone": alone, "evaluations": evaluations}
    faults = []
    if not point_mass < ROUNDING:
        faults.append(f"one step on a point mass ends {point_mass:.1e} from the point")
    if not alone < 1e-6:
        faults.append(f"examples depend on their batch, or on randomness that is not rng: {alone:.1e} apart")
    if sampler.evaluations is not None and abs(evaluations - sampler.evaluations) > 1e-9:
        faults.append(f"declares {sampler.evaluations} evaluations in a step and takes {evaluations:g}")
    if sampler.stochastic:
        return found, faults
    exact_to = KEPT if sampler.order is None else ROUNDING
    if exponential is not None and not exponential < exact_to:
        faults.append(f"a step between two times on a point mass is {exponential:.1e} off the exponential")
    found |= {"exponential": exponential}
    if sampler.order is None:
        (distance,) = _distances(sampler, process, predicts, COUNTS[:1])
        if not distance < KEPT:
            faults.append(f"declares no order, and is {distance:.1e} off the flow after {COUNTS[0]} steps")
        return found | {"evaluations": None, "distance": distance}, faults
    slope, stderr = measured(sampler, process, predicts)
    if not slope > sampler.order - SHORT_BY:
        faults.append(f"declares order {sampler.order} and has {slope:.2f} ± {stderr:.2f}")
    elif not stderr < SHORT_BY / 2:
        faults.append(f"its error does not fall as a power of the steps: order {slope:.2f} ± {stderr:.2f}")
    return found | {"measured": slope, "stderr": stderr}, faults


def _on_a_point(sampler: Sampler, process: Process, predicts: str) -> tuple[float, float | None, float]:
    """Distances from what is exact when all data are one point, and evaluations of each step but the last.

    The guess is c whatever x, and so the flow between any two times is the first-order exponential,
    x_s = alpha_s c + sigma_s / sigma_t (x_t - alpha_t c); at s = 0 it is at c.
    """
    point = torch.tensor([0.4, -0.9], dtype=torch.float64)
    denoiser = exact(toys.gaussian(point, 1e-30 * torch.eye(2)), process, predicts)
    x = randn((16, 2), stream(0), dtype=torch.float64) * process.prior_var() ** 0.5
    end_at = whole(sampler(denoiser, x, torch.tensor([0.9]), rng=0), x)
    last, denoiser.asked = denoiser.asked / len(x), 0
    whole(sampler(denoiser, x, torch.tensor([0.9, 0.6, 0.3]), rng=0), x)
    evaluations = (denoiser.asked / len(x) - last) / 2
    distance = float((end_at - point).abs().max())
    if sampler.stochastic:
        return distance, None, evaluations
    *_, stop = walk(sampler.step, denoiser, Point(0.9, x), [0.9, 0.7, 0.25, 0.2], rng=streams(0, len(x)))
    (alpha_t, sigma_t), (alpha_s, sigma_s) = process(0.9), process(0.2)
    flow = alpha_s * point + sigma_s / sigma_t * (x - alpha_t * point)
    return distance, float((whole(stop.x, x) - flow).abs().max() / (1 + flow.abs().max())), evaluations


def _alone(sampler: Sampler, process: Process, predicts: str) -> float:
    """How far examples 2 .. 4 of eight are from the same ones, drawn from the same seeds by themselves."""
    denoiser = exact(toys.named("mixture"), process, predicts)
    x = randn((8, 2), stream(1), dtype=torch.float64) * process.prior_var() ** 0.5
    together = whole(sampler(denoiser, x, 6, rng=streams(2, 8)), x)
    alone = whole(sampler(denoiser, x[2:5], 6, rng=streams(2, 3, start=2)), x[2:5])
    return float((together[2:5] - alone).abs().max())


def measured(sampler: Sampler, process: Process, predicts: str) -> tuple[float, float]:
    """The order p in error ~ n^-p along the probability-flow ODE, and its standard error from the fit."""
    errors = torch.tensor(_distances(sampler, process, predicts, COUNTS), dtype=torch.float64)
    return _slope(torch.tensor(COUNTS).double().log(), -errors.log())


def _distances(sampler: Sampler, process: Process, predicts: str, counts: Sequence[int]) -> list[float]:
    """How far from the probability-flow ODE of a mixture so many steps end, the geometric mean over 32 starts.

    The steps are between two noise levels, of lengths that are as 2 to 3 in log-SNR by turns: a formula for even steps
    shows.
    """
    first, last = max(FLOW[0], float(process.log_snr(1.0))), FLOW[1]
    start, truth = _flow(first, last)
    denoiser, distances = exact(toys.named("mixture"), process, predicts), []
    for n in counts:
        steps = torch.tensor([0.0] + [2.0, 3.0] * (n // 2), dtype=torch.float64).cumsum(0) / (2.5 * n)
        times = process.time(first + (last - first) * steps)
        scale_t, scale_s = (process.prior_var(t).sqrt() for t in (times[0], times[-1]))
        place = Point(float(times[0]), scale_t * start)
        *_, stop = walk(sampler.step, denoiser, place, times.tolist(), rng=streams(0, len(start)))
        distances.append(float((whole(stop.x, start) / scale_s - truth).norm(dim=1).log().mean().exp()))
    return distances


def _slope(x: Tensor, y: Tensor) -> tuple[float, float]:
    """The slope of a line by least squares, and its standard error from the residuals."""
    x, y = x - x.mean(), y - y.mean()
    slope = (x @ y) / (x @ x)
    return float(slope), float((y - slope * x).norm() / (len(x) - 2) ** 0.5 / x.norm())


def at(law: toys.Toy, log_snr: float) -> toys.Toy:
    """The law at a noise level, in variance-preserving scale."""
    alpha, sigma = CONSTRAINTS["variance-preserving"](torch.tensor(log_snr, dtype=torch.float64))
    return law.diffused(alpha, sigma)


@cache
def _flow(first: float, last: float) -> tuple[Tensor, Tensor]:
    """Draws of the mixture at the first noise level, and where the probability-flow ODE takes them, to 1e-10.

    By another way than any sampler: Dormand and Prince in log-SNR and variance-preserving scale, as in `flow`.
    """
    law = toys.named("mixture")
    start = at(law, first).sample(32, rng=stream(0))

    def field(log_snr: Tensor, x: Tensor, index: Tensor) -> Tensor:
        alpha, sigma = CONSTRAINTS["variance-preserving"](log_snr)
        return alpha[:, None] / 2 * (law.posterior_mean(x, alpha, sigma) - alpha[:, None] * x)

    return start, ode.dormand_prince(field, start, first, last, rtol=1e-10, atol=1e-10, max_step=MAX_STEP).x


def whole(x: Tensor, like: Tensor) -> Tensor:
    """x, which has to be what a sampler returns.

    Raises:
        OptionError: if it has another shape or dtype, or is not finite.
    """
    if x.shape != like.shape or x.dtype != like.dtype:
        received = f"{tuple(like.shape)} {like.dtype}"
        raise OptionError(f"returned shape {tuple(x.shape)} and {x.dtype} for x of {received}".replace("torch.", ""))
    if not x.isfinite().all():
        raise OptionError(f"returned values that are not finite, {float((~x.isfinite()).double().mean()):.0%} of them")
    return x
