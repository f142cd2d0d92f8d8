"""The variational bound of the reverse chain, term by term, in nats per example.

    -log p(x_0) <= E_q[ L_T + sum_{t=2..T} L_{t-1} + L_0 ]
    L_T     = KL(q(x_T|x_0) || p(x_T))                              nothing to learn
    L_{t-1} = KL(q(x_{t-1}|x_t, x_0) || p_theta(x_{t-1}|x_t))       closed form between Gaussians
    L_0     = -log p_theta(x_0|x_1)                                 the decoder

Reference: Sohl-Dickstein et al. (2015); Ho et al. (2020), eq. 5. L_T and L_0 are computed for every example. The
middle terms are stratified: T - 1 of them are cut into as many strata as terms are drawn per example, one term is
drawn in each, and weighted by the size of its stratum. One stratum is the estimator over one random step; T - 1
strata are all terms.
"""

from dataclasses import dataclass, replace
from typing import Self

import torch
from torch import Tensor

from ancestral import gaussian
from ancestral.diffusion.denoise import Denoiser, known_variance, reverse
from ancestral.diffusion.process import per_example
from ancestral.diffusion.sample import grid
from ancestral.errors import OptionError
from ancestral.rng import Rng, Seeds, rand, streams


@dataclass(frozen=True)
class Bound:
    """The bound on -log p(x_0) for a batch of B examples, in nats.

    Attributes:
        prior: L_T, shape (B,).
        decoder: L_0, shape (B,).
        terms: the drawn L_{t-1}, shape (B, K).
        steps: which t in 2..T each drawn term belongs to, shape (B, K).
        weights: how many terms each drawn one stands for, shape (K,).
        times: the grid as increasing times t_1, ..., t_T, shape (T,).
        evaluations: of the network, over the whole batch.
    """

    prior: Tensor
    decoder: Tensor
    terms: Tensor
    steps: Tensor
    weights: Tensor
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
        return replace(self, prior=self.prior.cpu(), decoder=self.decoder.cpu(), terms=self.terms.cpu())

    def by_step(self) -> tuple[Tensor, Tensor]:
        """Mean of every term and its standard error over images, each of shape (T + 1,): L_0, L_1, ..., L_{T-1}, L_T.

        A term that was drawn fewer than twice has standard error NaN; one never drawn has mean NaN as well.
        """
        T = len(self.times)
        flat = torch.full((T + 1,), torch.nan, dtype=torch.float64)
        mean, stderr = flat.clone(), flat.clone()
        mean[0], stderr[0] = mean_and_stderr(self.decoder)
        mean[T], stderr[T] = mean_and_stderr(self.prior)
        index, values = self.steps.flatten() - 1, self.terms.flatten()
        count = torch.zeros(T + 1, dtype=torch.float64).index_add(0, index, torch.ones_like(values))
        total = torch.zeros_like(count).index_add(0, index, values)
        middle = slice(1, T)
        mean[middle] = total[middle] / count[middle]
        centred = (values - (total / count)[index]).square()
        squares = torch.zeros_like(count).index_add(0, index, centred)
        stderr[middle] = (squares[middle] / (count[middle] - 1).clamp(min=0) / count[middle]).sqrt()
        return mean, stderr

    def shifted(self, nats: float) -> Self:
        """The same bound with a constant added to every decoder term, such as the log-determinant of a scaling."""
        return replace(self, decoder=self.decoder + nats)

    @classmethod
    def join(cls, parts: list[Self]) -> Self:
        """One bound for several batches that were measured on the same grid."""
        rows = {name: torch.cat([getattr(part, name) for part in parts]) for name in _ROWS}
        return cls(
            **rows, weights=parts[0].weights, times=parts[0].times, evaluations=sum(part.evaluations for part in parts)
        )


_ROWS = ("prior", "decoder", "terms", "steps")


def mean_and_stderr(values: Tensor) -> tuple[Tensor, Tensor]:
    """The mean of independent values and its standard error, std / sqrt(n)."""
    return values.mean(), values.std() / len(values) ** 0.5


def bound(
    denoiser: Denoiser,
    x_0: Tensor,
    steps: int | Tensor = 1000,
    *,
    rng: Seeds,
    draws: int | None = None,
    variance: str = "fixed-small",
    levels: int | None = None,
) -> Bound:
    """The variational bound on -log p(x_0), or its unbiased estimate from `draws` terms per example.

    Args:
        denoiser: E[x_0 | x_t].
        x_0: examples in the model's units, shape (B, ...); on `levels` values in [-1, 1] when there are levels.
        steps: the chain, a grid of decreasing times, or the number of steps of the default grid.
        rng: a seed, one per example, or generators.
        draws: middle terms per example, 1 to T - 1; None for all of them.
        variance: of the reverse chain, one of `denoise.VARIANCES`.
        levels: number of levels of the data; None for a real-valued density.

    Returns:
        The bound and its parts, nats per example, float64.

    Raises:
        OptionError: if `draws` is outside 1 .. T - 1, or the grid or the variance is not legal.

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
    draws = middle if draws is None else draws
    if not (draws == middle == 0 or 1 <= draws <= middle):
        raise OptionError(f"a chain of {middle + 1} steps has {middle} middle terms, cannot draw {draws} of them")
    n, process = len(x_0), denoiser.process
    rng = streams(rng, n)
    with torch.no_grad():
        edges = torch.arange(draws + 1) * middle // max(draws, 1)
        sizes = edges.diff()
        chosen = (edges[:-1] + (rand((n, draws), rng) * sizes).long()) + 2
        terms = [kl_term(denoiser, x_0, times[t - 2], times[t - 1], variance, rng) for t in chosen.unbind(1)]
        return Bound(
            prior=process.terminal_kl(x_0, times[-1]),
            decoder=decoder_nats(denoiser, x_0, times, variance, levels, rng),
            terms=torch.stack(terms, 1) if terms else x_0.new_zeros(n, 0, dtype=torch.float64),
            steps=chosen,
            weights=sizes.double(),
            times=times,
            evaluations=n * (draws + 1),
        )


def kl_term(denoiser: Denoiser, x_0: Tensor, s: Tensor, t: Tensor, variance: str, rng: Rng) -> Tensor:
    """L = KL(q(x_s|x_t, x_0) || p_theta(x_s|x_t)) at one draw of x_t ~ q(x_t|x_0), nats per example, shape (B,).

    The two means differ by c_0 (x_0 - x_0_hat) alone, so x_t cancels and the KL is taken between those.
    """
    x_t, _ = denoiser.process.marginal(x_0, t, rng)
    _, var, x_0_hat = reverse(denoiser, x_t, s, t, variance)
    _, c_0, beta_tilde = (per_example(c, x_0.double()) for c in denoiser.process.posterior_coefficients(s, t))
    return gaussian.kl(c_0 * x_0, beta_tilde, c_0 * x_0_hat, var.double()).flatten(1).sum(1)


def decoder_nats(denoiser: Denoiser, x_0: Tensor, times: Tensor, variance: str, levels: int | None, rng: Rng) -> Tensor:
    """L_0 = -log p_theta(x_0|x_1) at one draw of x_1, nats per example, shape (B,).

    p_theta(x_0|x_1) = N(x_0_hat, var), as a density, or integrated over the bin of each level, with

        "beta"                          var = beta_1 = sigma_1^2
        "fixed-large", "fixed-small"    var = beta~_2, which the original code puts in place of beta~_1 = 0 (in a chain
                                        of one step there is none, and beta_1 is taken)
        "optimal"                       var = Var[x_0|x_1]

    References: Ho et al. (2020), eq. 13 and the published code; Bao et al. (2022).
    """
    process, t_1 = denoiser.process, times[0]
    x_1, _ = process.marginal(x_0, t_1, rng)
    x_0_hat = denoiser(x_1, t_1)
    var = process(t_1)[1].square()
    if variance == "optimal":
        var = known_variance(denoiser, x_1, t_1).double()
    elif variance != "beta" and len(times) > 1:
        var = var * process.gain(t_1, times[1])
    if levels is None:
        return -gaussian.log_density(x_0.double(), x_0_hat.double(), var).flatten(1).sum(1)
    return -gaussian.log_bin(x_0, x_0_hat, var.sqrt(), levels).flatten(1).sum(1)


def continuous_bound(
    denoiser: Denoiser,
    x_0: Tensor,
    t_min: float = 1e-3,
    *,
    rng: Seeds,
    draws: int = 1,
    levels: int | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """The bound in the limit of infinitely many steps from t_min to 1: (prior, diffusion, decoder), each (B,), nats.

    L_inf = L_T + 1/2 E_{t, eps}[ (-d log_snr / dt) ||eps - eps_hat||^2 ] + L_0,   t ~ U(t_min, 1), stratified in draws

    Reference: Kingma et al. (2021), eq. 17.
    """
    process, n = denoiser.process, len(x_0)
    rng = streams(rng, n)
    total = torch.zeros(n, dtype=torch.float64)
    with torch.no_grad():
        for u in (rand((n, draws), rng) + torch.arange(draws)).div(draws).unbind(1):
            t = t_min + (1 - t_min) * u
            x_t, eps = process.marginal(x_0, t, rng)
            error = (eps - denoiser.eps(x_t, t)).double().square().flatten(1).sum(1).cpu()
            total += 0.5 * (1 - t_min) * process.rate(t) * error / draws
        decoder = decoder_nats(denoiser, x_0, torch.tensor([t_min]), "beta", levels, rng)
        return process.terminal_kl(x_0).cpu(), total, decoder.cpu()
