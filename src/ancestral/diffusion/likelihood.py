"""The variational bound of the reverse chain, term by term, in nats per example.

    -log p(x_0) <= E_q[ L_T + sum_{t=2..T} L_{t-1} + L_0 ]
    L_T     = KL(q(x_T|x_0) || p(x_T))                              nothing to learn
    L_{t-1} = KL(q(x_{t-1}|x_t, x_0) || p_theta(x_{t-1}|x_t))       closed form between Gaussians
    L_0     = -log p_theta(x_0|x_1)                                 the decoder

Reference: Sohl-Dickstein et al. (2015); Ho et al. (2020), eq. 5. L_T and L_0 are computed for every example; of the
middle terms, K are drawn. With probabilities p_t over the T - 1 terms, whose distribution function is cut into K strata
of equal mass, one term is drawn in each and divided by K p_t:

    sum_t L_{t-1} = E[ 1/K sum_k L_{t_k - 1} / p_{t_k} ]

One stratum is the estimator over one random step, T - 1 strata of equal terms are all of them, and probabilities in
proportion to the root mean square of the terms, learnt by `importance`, draw a term as often as it matters. Drawn
several times over, the bound tells the error that is due to its own noise from the one that is due to the choice of
examples.
"""

import math
from dataclasses import dataclass, replace
from typing import NamedTuple, Self

import torch
from torch import Tensor

from ancestral import gaussian
from ancestral.diffusion.denoise import Denoiser, halves, moments, reverse
from ancestral.diffusion.grids import grid
from ancestral.diffusion.process import LOG_SNR_MIN, Process, per_example
from ancestral.errors import OptionError, unknown
from ancestral.rng import Rng, Rows, Seeds, rand, streams

GROUPS = 48
"""Groups of neighbouring terms whose size `importance` learns."""

EXPLORED = 0.1
"""Share of draws that `importance` leaves to terms whatever their size, so that none is divided by almost nothing."""


class Estimate(NamedTuple):
    """A mean over examples with its standard errors.

    Attributes:
        value: the mean.
        stderr: of the mean, over examples and Monte-Carlo noise together.
        over_examples: what other examples would change, had there been no noise.
        over_noise: what other noise would change, for these examples; None if nothing was drawn twice.
    """

    value: float
    stderr: float
    over_examples: float | None
    over_noise: float | None


@dataclass(frozen=True)
class Bound:
    """The bound on -log p(x_0) for a batch of B examples, drawn R times over, in nats.

    Attributes:
        prior: L_T, shape (B,).
        decoder: L_0, the mean of its R draws, shape (B,).
        terms: the drawn L_{t-1}, K in each of R draws one after the other, shape (B, R K).
        weights: how many terms each drawn one stands for, divided by R, shape (B, R K).
        steps: which t in 2..T each drawn term belongs to, shape (B, R K).
        replicates: R independent estimates of the bound, shape (B, R).
        times: the grid as increasing times t_1, ..., t_T, shape (T,).
        evaluations: of the network, over the whole batch.
    """

    prior: Tensor
    decoder: Tensor
    terms: Tensor
    weights: Tensor
    steps: Tensor
    replicates: Tensor
    times: Tensor
    evaluations: int

    @property
    def diffusion(self) -> Tensor:
        """sum_{t=2..T} L_{t-1}, or its unbiased estimate, shape (B,)."""
        return (self.terms * self.weights).sum(1)

    @property
    def nats(self) -> Tensor:
        """The bound, or its unbiased estimate, shape (B,)."""
        return self.prior + self.diffusion + self.decoder

    def cpu(self) -> Self:
        """The same on the CPU."""
        return replace(self, **{name: getattr(self, name).cpu() for name in _ROWS})

    def estimate(self) -> Estimate:
        """The mean over examples, with the two standard errors apart."""
        return estimate(self.replicates)

    def by_step(self) -> tuple[Tensor, Tensor]:
        """Mean of every term and its standard error, each of shape (T + 1,): L_0, L_1, ..., L_{T-1}, L_T.

        The draws of one example belong together: the error is that over examples. A term that was drawn for fewer than
        two has standard error NaN; one never drawn has mean NaN as well.
        """
        T = len(self.times)
        flat = torch.full((T + 1,), torch.nan, dtype=torch.float64)
        mean, stderr = flat.clone(), flat.clone()
        mean[0], stderr[0] = mean_and_stderr(self.decoder)
        mean[T], stderr[T] = mean_and_stderr(self.prior)
        index, values = self.steps - 1, self.terms.double()
        count = index.flatten().bincount(minlength=T + 1).double()
        total = torch.zeros_like(count).index_add(0, index.flatten(), values.flatten())
        drawn, which = torch.unique(index + (T + 1) * torch.arange(len(index))[:, None], return_inverse=True)
        step, centred = drawn % (T + 1), (values - (total / count)[index]).flatten()
        squares = torch.zeros(len(drawn), dtype=torch.float64).index_add(0, which.flatten(), centred).square()
        examples = step.bincount(minlength=T + 1).double()
        spread = torch.zeros_like(count).index_add(0, step, squares) * examples / (examples - 1)
        middle = slice(1, T)
        mean[middle] = (total / count)[middle]
        stderr[middle] = torch.where(examples > 1, spread.sqrt() / count, torch.nan)[middle]
        return mean, stderr

    def importance(self) -> Tensor:
        """Probabilities of the T - 1 middle terms in proportion to their root mean square, from the terms drawn here.

        Neighbouring terms are grouped so that each group was drawn equally often, and share one mean square.

        Raises:
            OptionError: if a term is not finite.

        Reference: Nichol & Dhariwal (2021), eq. 18.
        """
        order = self.steps.flatten().argsort(stable=True)
        steps, squares = self.steps.flatten()[order] - 2, self.terms.flatten()[order].double().square()
        middle, groups = len(self.times) - 1, max(1, min(GROUPS, len(order) // 8))
        first = torch.tensor([part[0] for part in steps.tensor_split(groups)])
        root = torch.stack([part.mean() for part in squares.tensor_split(groups)]).sqrt()
        group = (torch.searchsorted(first, torch.arange(middle), right=True) - 1).clamp(min=0)
        size = root[group]
        if not size.isfinite().all():
            raise OptionError("some terms of the bound are not finite: the model's weights may not be, or its chain")
        if not size.any():
            return torch.full_like(size, 1 / middle)
        return (1 - EXPLORED) * size / size.sum() + EXPLORED / middle

    def shifted(self, nats: float) -> Self:
        """The same bound with a constant added to every decoder term, such as the log-determinant of a scaling."""
        return replace(self, decoder=self.decoder + nats, replicates=self.replicates + nats)

    @classmethod
    def join(cls, parts: list[Self]) -> Self:
        """One bound for several batches that were measured on the same grid."""
        rows = {name: torch.cat([getattr(part, name) for part in parts]) for name in _ROWS}
        return cls(**rows, times=parts[0].times, evaluations=sum(part.evaluations for part in parts))

    @classmethod
    def repeat(cls, parts: list[Self]) -> Self:
        """One bound for the same examples that were measured several times over with other noise."""
        shares = torch.tensor([part.replicates.shape[1] for part in parts]).double() / sum(
            part.replicates.shape[1] for part in parts
        )
        return cls(
            prior=parts[0].prior,
            decoder=sum((share * part.decoder for share, part in zip(shares, parts, strict=True)), torch.zeros(())),
            terms=torch.cat([part.terms for part in parts], 1),
            weights=torch.cat([share * part.weights for share, part in zip(shares, parts, strict=True)], 1),
            steps=torch.cat([part.steps for part in parts], 1),
            replicates=torch.cat([part.replicates for part in parts], 1),
            times=parts[0].times,
            evaluations=sum(part.evaluations for part in parts),
        )


_ROWS = ("prior", "decoder", "terms", "weights", "steps", "replicates")


def mean_and_stderr(values: Tensor) -> tuple[Tensor, Tensor]:
    """The mean of independent values and its standard error, std / sqrt(n)."""
    return values.mean(), values.std() / len(values) ** 0.5


def estimate(replicates: Tensor) -> Estimate:
    """The mean of n examples, each of which was estimated R times over, with its standard errors.

    Of the variance V of the examples' means, the noise makes W / R, where W is the variance between the estimates of
    one example; the rest is between examples. Of few examples V may come out below W / R, and the rest is then none.

        over_noise^2 = W / (R n),   over_examples^2 = max(0, V - W / R) / n,   stderr^2 = the sum of the two

    Args:
        replicates: independent estimates, shape (n, R).

    Example:
        >>> found = estimate(torch.tensor([[1.0, 3.0], [2.0, 4.0], [6.0, 8.0]]))
        >>> [round(number, 3) for number in found]
        [4.0, 1.528, 1.414, 0.577]
    """
    n, R = replicates.shape
    value, stderr = (float(part) for part in mean_and_stderr(replicates.mean(1)))
    return apart(value, stderr**2, None if R == 1 else float(replicates.var(1).mean() / (R * n)))


def apart(value: float, variance: float, noise: float | None) -> Estimate:
    """An estimate whose variance is that of the noise, if it is known, and what is left of it for the examples."""
    if noise is None:
        return Estimate(value, variance**0.5, None, None)
    examples = max(0.0, variance - noise)
    return Estimate(value, (examples + noise) ** 0.5, examples**0.5, noise**0.5)


def bound(
    denoiser: Denoiser,
    x_0: Tensor,
    steps: int | Tensor = 1000,
    *,
    rng: Seeds,
    draws: int | None = None,
    replicates: int = 1,
    probability: Tensor | None = None,
    limit: bool = False,
    variance: str = "fixed-small",
    decoder: str = "gaussian",
    levels: int | None = None,
) -> Bound:
    """The variational bound on -log p(x_0), or its unbiased estimate from `draws` terms per example.

    Args:
        denoiser: E[x_0 | x_t].
        x_0: examples in the model's units, shape (B, ...); on `levels` values in [-1, 1] when there are levels.
        steps: a grid of decreasing times, or the number of steps of the default grid. Fewer steps than a model was
            trained for give the bound of another model.
        rng: a seed, one per example, or generators. Of `Rows`, the draws of steps are spread evenly over the rows
            too (low discrepancy), which makes the mean less noisy and examples dependent.
        draws: middle terms per example and replicate, 1 to T - 1; None for all of them.
        replicates: how many times over everything is drawn; two tell the noise from the examples.
        probability: of drawing each of the T - 1 middle terms, such as `Bound.importance` gives; by default equal.
        limit: put in place of every middle term what infinitely many steps between its two times would give.
        variance: of the reverse chain, one of `denoise.VARIANCES`.
        decoder: a key of `DECODERS` when there are levels.
        levels: number of levels of the data; None for a real-valued density.

    Returns:
        The bound and its parts, nats per example, float64.

    Raises:
        OptionError: if `draws` is outside 1 .. T - 1, or the grid, the variance or the decoder is not legal.

    Example:
        >>> from ancestral import toys
        >>> from ancestral.diffusion import denoise, process
        >>> from ancestral.rng import stream
        >>> toy = toys.named("gaussian")
        >>> oracle = denoise.OracleDenoiser(toy, process.cosine())
        >>> x_0 = toy.sample(2000, rng=stream(0))
        >>> result = bound(oracle, x_0, 100, rng=stream(1), draws=5)
        >>> bool(result.nats.mean() > toy.entropy()), result.evaluations
        (True, 12000)
    """
    times = grid(denoiser.process, steps).flip(0)
    middle = len(times) - 1
    if draws is not None and not (draws == middle == 0 or 1 <= draws <= middle):
        raise OptionError(f"a chain of {middle + 1} steps has {middle} middle terms, cannot draw {draws} of them")
    if replicates < 1:
        raise OptionError(f"a bound is drawn at least once, received replicates = {replicates}")
    n, rng = len(x_0), streams(rng, len(x_0))
    with torch.no_grad():
        prior = denoiser.process.terminal_kl(x_0, times[-1])
        chosen, weights = _drawn(n, middle, draws, replicates, probability, rng)
        L_0, columns = [], []
        for replicate in chosen.unbind(1):
            ends = [(times[t - 2], times[t - 1]) for t in replicate.unbind(1)]
            if limit:
                columns += [limit_term(denoiser, x_0, s, t, rng) for s, t in ends]
            else:
                columns += [kl_term(denoiser, x_0, s, t, variance, rng) for s, t in ends]
            L_0.append(decoder_nats(denoiser, x_0, times, variance, levels, rng, decoder))
        terms = torch.stack(columns, 1) if columns else x_0.new_zeros(n, 0, dtype=torch.float64)
    decoders, weights = torch.stack(L_0, 1), weights.flatten(1).to(terms.device)
    sums = (terms * weights).view(n, replicates, -1).sum(2)
    asked = terms.shape[1] + (0 if decoder == "softmax" and levels else replicates)
    return Bound(
        prior=prior,
        decoder=decoders.mean(1),
        terms=terms,
        weights=weights / replicates,
        steps=chosen.flatten(1),
        replicates=prior[:, None] + sums + decoders,
        times=times,
        evaluations=n * asked,
    )


def _drawn(
    n: int, middle: int, draws: int | None, replicates: int, probability: Tensor | None, rng: Rng
) -> tuple[Tensor, Tensor]:
    """Which t of 2 .. T, int64, and for how many terms each stands: (n, R, K)."""
    if draws is None or middle == 0:
        every = torch.arange(2, middle + 2).expand(n, replicates, middle)
        return every, torch.ones(n, replicates, middle, dtype=torch.float64)
    p = torch.full((middle,), 1 / middle, dtype=torch.float64) if probability is None else probability.double()
    if p.shape != (middle,) or not (p > 0).all():
        raise OptionError(
            f"a chain of {middle + 1} steps takes {middle} positive probabilities, received {tuple(p.shape)}"
        )
    cumulative = (p / p.sum()).cumsum(0)
    if isinstance(rng, Rows):
        spread = (rng.index * GOLDEN)[:, None, None]
        within = (rand((replicates, draws), rng.common)[None] + spread) % 1
    else:
        within = rand((n, replicates, draws), rng)
    position = (torch.arange(draws) + within) / draws
    index = torch.searchsorted(cumulative, position, right=True).clamp(max=middle - 1)
    return index + 2, 1 / (draws * (p / p.sum())[index])


GOLDEN = (math.sqrt(5) - 1) / 2
"""Multiples of it, modulo 1, fill the unit interval more evenly than random numbers do."""


def spans(process: Process, times: Tensor) -> Tensor:
    """Probabilities of the middle terms in proportion to the log-SNR that each spans, before `importance` is learnt.

    Args:
        process: of the chain.
        times: increasing, shape (T,).
    """
    span = -process.log_snr(times).clamp(min=LOG_SNR_MIN).diff()
    return (1 - EXPLORED) * span / span.sum() + EXPLORED / len(span)


def kl_term(denoiser: Denoiser, x_0: Tensor, s: Tensor, t: Tensor, variance: str, rng: Rng) -> Tensor:
    """L = KL(q(x_s|x_t, x_0) || p_theta(x_s|x_t)) at one draw of x_t ~ q(x_t|x_0), nats per example, shape (B,).

    The two means differ by c_0 (x_0 - x_0_hat) alone, so x_t cancels and the KL is taken between those.
    """
    x_t, _ = denoiser.process.marginal(x_0, t, rng)
    _, var, x_0_hat = reverse(denoiser, x_t, s, t, variance)
    return term(denoiser.process, x_0, x_0_hat, var, s, t)


def term(process: Process, x_0: Tensor, x_0_hat: Tensor, var: Tensor, s: Tensor, t: Tensor) -> Tensor:
    """The middle term of a guess and a reverse variance that are known, nats per example, shape (B,)."""
    _, c_0, beta_tilde = (per_example(c, x_0.double()) for c in process.posterior_coefficients(s, t))
    return gaussian.kl(c_0 * x_0, beta_tilde, c_0 * x_0_hat, var.double()).flatten(1).sum(1)


def limit_term(denoiser: Denoiser, x_0: Tensor, s: Tensor, t: Tensor, rng: Rng) -> Tensor:
    """What infinitely many terms between s and t add up to, estimated at one log-SNR between theirs, shape (B,).

    1/2 int ||eps - eps_hat||^2 d log_snr = 1/2 (log_snr_s - log_snr_t) E[||eps - eps_hat||^2],
    with the log-SNR uniform between the two.

    Reference: Kingma et al. (2021), eq. 17, with the log-SNR for time, on which alone it depends.
    """
    process = denoiser.process
    high, low = (process.log_snr(end).clamp(LOG_SNR_MIN, -LOG_SNR_MIN) for end in (s, t))
    time = process.time(low + (high - low) * rand((len(x_0),), rng))
    x_t, eps = process.marginal(x_0, time, rng)
    error = (eps - denoiser.eps(x_t, time)).double().square().flatten(1).sum(1)
    return 0.5 * (high - low).to(error) * error


def decoder_nats(
    denoiser: Denoiser,
    x_0: Tensor,
    times: Tensor,
    variance: str,
    levels: int | None,
    rng: Rng,
    decoder: str = "gaussian",
) -> Tensor:
    """L_0 = -log p_theta(x_0|x_1) at one draw of x_1, nats per example, shape (B,).

    p_theta(x_0|x_1) = N(x_0_hat, var) as a density, or what a decoder of `DECODERS` makes of it on levels, with

        "beta"                          var = beta_1 = sigma_1^2
        "fixed-large", "fixed-small"    var = beta~_2, which the original code puts in place of beta~_1 = 0 (in a chain
                                        of one step there is none, and beta_1 is taken)
        "optimal"                       var = Var[x_0|x_1]
        "learned"                       between beta_1 and beta~_2, where the network says

    The decoder "softmax" asks no network: p(x_0|x_1) is proportional to q(x_1|x_0) over the levels.

    References: Ho et al. (2020), eq. 13 and the published code; Bao et al. (2022); Kingma et al. (2021), section 3.2.
    """
    if decoder not in DECODERS:
        raise unknown("decoder", decoder, DECODERS)
    process, t_1 = denoiser.process, times[0]
    x_1, _ = process.marginal(x_0, t_1, rng)
    alpha_1, sigma_1 = process(t_1)
    if levels is not None and decoder == "softmax":
        return -gaussian.log_softmax_level(x_0, x_1.double() / alpha_1, sigma_1 / alpha_1, levels).flatten(1).sum(1)
    var, narrow = sigma_1.square(), process.gain(t_1, times[1]) if len(times) > 1 else torch.ones_like(t_1)
    if variance == "optimal":
        x_0_hat, var = moments(denoiser, x_1, t_1)
    elif variance == "learned":
        x_0_hat, fraction = halves(denoiser, x_1, t_1)
        var = var * narrow ** (1 - fraction.double())
    else:
        x_0_hat = denoiser(x_1, t_1)
        var = var if variance == "beta" else var * narrow
    if levels is None:
        return -gaussian.log_density(x_0.double(), x_0_hat.double(), var.double()).flatten(1).sum(1)
    log_bin = gaussian.log_bin if decoder == "gaussian" else gaussian.log_bin_tanh
    return -log_bin(x_0, x_0_hat, var.sqrt(), levels).flatten(1).sum(1)


DECODERS = ("gaussian", "tanh", "softmax")
"""What turns N(x_0_hat, var) into probabilities of levels: its exact mass on the bin of each, an approximation of that
mass which older papers used, or a softmax over the levels of log q(x_1|x_0)."""
