"""The solver and the grid of times fitted to one model: the most accurate that so many evaluations allow.

A few starts are followed along the probability-flow ODE to the data: finely, and by every deterministic sampler on
every grid. The grids of the best are then bent to the model (`bend`), and starts that were held out say whether that
helped. Which grid is best depends on the model more than anything else does: no default is.

For the reverse chain, a grid of least bound follows from the model's own terms: `respace.best_chain`.
"""

from bisect import bisect_right
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from ancestral.diffusion.bend import Counted, Errors, Pair, Starts, bend
from ancestral.diffusion.denoise import Denoiser
from ancestral.diffusion.grids import GRIDS, LOG_SNR_MAX, Grid, karras, log_snr, uniform
from ancestral.diffusion.sample import SAMPLERS
from ancestral.errors import OptionError, unknown

DETERMINISTIC = tuple(name for name, sampler in SAMPLERS.items() if sampler.order)
"""What follows the ODE on a grid that is given."""

FINE, FINALISTS, BENT = 100, 12, 4
"""Times of the reference at least, pairs that are tried on all starts, and samplers whose grids are bent."""

MET = 1e-6
"""A median miss so small, in units of the spread of all ends, is none: ends are met or not, and ways are compared."""


@dataclass(frozen=True)
class Fit:
    """A sampler and its times for one model: `dataclasses.asdict` makes it JSON, and `Fit(**record)` reads it back.

    Attributes:
        sampler: a key of `SAMPLERS`.
        times: decreasing, in (0, 1].
        evaluations: of the network for one example.
        errors: on the starts that were held out.
        candidate: the best sampler and grid before any was bent.
        candidate_errors: its errors, on the same starts.
        asked: how many examples the network was given in order to fit.
    """

    sampler: str
    times: tuple[float, ...]
    evaluations: int
    errors: Errors
    candidate: tuple[str, str]
    candidate_errors: Errors
    asked: int

    def __post_init__(self) -> None:
        read = {"times": tuple(self.times), "candidate": tuple(self.candidate)}
        read |= {"errors": Errors(*self.errors), "candidate_errors": Errors(*self.candidate_errors)}
        for field, value in read.items():  # JSON has lists
            object.__setattr__(self, field, value)

    @property
    def steps(self) -> Tensor:
        """The times as a grid."""
        return torch.tensor(self.times, dtype=torch.float64)


def fit(
    denoiser: Denoiser,
    x_T: Tensor,
    evaluations: int,
    *,
    samplers: Collection[str] = DETERMINISTIC,
    grids: Mapping[str, Grid] | None = None,
    log_snr_max: float = LOG_SNR_MAX,
) -> Fit:
    """The sampler and the times that follow the probability-flow ODE of a model best, for so many evaluations.

    A quarter of the starts is held out. Candidates run on a twelfth of the others, the best of them on all, the grids
    of the four best samplers are bent, and the best of these once more. Where the RMS over all starts is not smaller
    then, it is the best candidate that is returned; errors are those of the starts that were held out. Where ends are
    met or not, as those of a finite set are, the way there counts too: see `bend`. The result is a function of the
    arguments.

    Args:
        denoiser: E[x_0 | x_t].
        x_T: draws of p(x_T), shape (n, ...), n >= 16. Few know little of starts that go astray: a thousand do.
        evaluations: of the network for each example that will be sampled, at most.
        samplers: of `DETERMINISTIC`, to choose from.
        grids: to choose from; by default `candidates`. `respace.best_grid` is another.
        log_snr_max: nothing is asked beyond, in nats: log_snr(1/T) for a network trained on a chain of T steps.

    Raises:
        OptionError: if there are too few starts or evaluations, or a sampler is not one of these.

    Example:
        >>> from ancestral import toys
        >>> from ancestral.diffusion import denoise, process
        >>> from ancestral.rng import randn, stream
        >>> oracle = denoise.OracleDenoiser(toys.named("mixture"), process.linear())
        >>> found = fit(oracle, randn((64, 2), stream(0), dtype=torch.float64), 6, samplers=["euler", "heun"])
        >>> found.errors.rms < found.candidate_errors.rms
        True
    """
    if len(x_T) < 16 or evaluations < 1:
        raise OptionError(f"a fit takes at least 16 starts and 1 evaluation, received {len(x_T)} and {evaluations}")
    for name in samplers:
        if name not in DETERMINISTIC:
            raise unknown("deterministic sampler", name, DETERMINISTIC)
    counted = Counted(denoiser)
    best = max(DETERMINISTIC, key=lambda name: (SAMPLERS[name].order or 0, name))
    finest = Pair(best, "finest", log_snr(denoiser.process, max(FINE, 8 * evaluations), log_snr_max))
    starts, n = Starts(counted, x_T, SAMPLERS[best](counted, x_T, finest.times)), 3 * len(x_T) // 4

    pairs = _pairs(starts, samplers, grids or candidates(log_snr_max), evaluations, log_snr_max)
    if not pairs:
        raise OptionError(f"no sampler and grid of these takes at most {evaluations} evaluations: allow more")
    few = starts[: -(-n // 12)]
    pairs.sort(key=few.loss)
    if few.errors(pairs[0]).median < MET * starts.spread:
        starts = starts.along(finest)
        few = starts[: -(-n // 12)]
        pairs.sort(key=few.loss)
    seen, held = starts[:n], starts[n:]
    pairs[:FINALISTS] = sorted(pairs[:FINALISTS], key=seen.loss)
    first, best_of_each = pairs[0], dict[str, Pair]()
    for pair in pairs:
        best_of_each.setdefault(pair.sampler, pair)
    bent = [bend(seen, pair, log_snr_max, rounds=3) for pair in list(best_of_each.values())[:BENT]]
    last = min(first, bend(seen, min(bent, key=seen.loss), log_snr_max, rounds=4), key=starts.loss)

    asked, named = counted.asked, (first.sampler, first.grid)
    errors, before = held.errors(last), held.errors(first)
    return Fit(last.sampler, tuple(last.times.tolist()), held.asked(last), errors, named, before, asked)


def candidates(log_snr_max: float = LOG_SNR_MAX) -> dict[str, Grid]:
    """`GRIDS`, and those even in log-SNR and in Karras's variable for more rho, to log_snr_max and to 3/4 of it."""
    grids = dict(GRIDS)
    for end in (log_snr_max, 0.75 * log_snr_max):
        grids[f"log-snr to {end:g}"] = partial(log_snr, log_snr_max=end)
        for rho in (3.0, 7.0):
            grids[f"karras {rho:g} to {end:g}"] = partial(karras, rho=rho, log_snr_max=end)
    return grids


def _pairs(
    starts: Starts, samplers: Collection[str], grids: Mapping[str, Grid], evaluations: int, log_snr_max: float
) -> list[Pair]:
    """Every sampler on every different grid of as many times as the evaluations allow, none beyond log_snr_max."""
    process, pairs = starts.denoiser.process, list[Pair]()
    for name in samplers:
        counts = range(1, evaluations + 1)
        n = bisect_right(counts, evaluations, key=lambda n: starts.asked(Pair(name, "uniform", uniform(process, n))))
        distinct = {tuple(grid(process, n).tolist()): label for label, grid in grids.items()} if n else {}
        pairs += [Pair(name, label, torch.tensor(times, dtype=torch.float64)) for times, label in distinct.items()]
    return [pair for pair in pairs if process.log_snr(pair.times[-1]) <= log_snr_max + 1e-6]
