"""The diffusion family: a network, a process and the facts of a data set, trained, sampled and measured."""

from collections.abc import Callable, Iterator, Mapping
from inspect import signature
from typing import Any

import torch
from torch import Tensor, nn

from ancestral import gaussian
from ancestral.data import Facts
from ancestral.diffusion import flow, likelihood
from ancestral.diffusion import sample as samplers
from ancestral.diffusion.denoise import VARIANCES, Clipped, Denoiser, Given, NetworkDenoiser, between
from ancestral.diffusion.fit import Fit, fit
from ancestral.diffusion.grids import GRIDS, LOG_SNR_MAX, grid
from ancestral.diffusion.process import CONSTRAINTS, LOG_SNR_MIN, Process
from ancestral.diffusion.watch import Glimpse, Watched, glimpses
from ancestral.errors import OptionError, unknown
from ancestral.labels import told
from ancestral.nets import MonotoneCurve
from ancestral.protocol import Batch, Density, Player
from ancestral.rng import Seeds, rand, randn, streams


def simple(denoiser: NetworkDenoiser, times: Tensor) -> tuple[Tensor, Tensor]:
    """Uniform times, and the plain squared error of whatever the network predicts: weight 1 / c_out^2."""
    _, c_out, _ = denoiser.coefficients(times)
    return torch.ones_like(times), c_out.square().reciprocal()


def bound(denoiser: NetworkDenoiser, times: Tensor) -> tuple[Tensor, Tensor]:
    """What the bound has of the squared error: in the middle terms, for reverse variance beta~, and in the density L_0.

        L_{t-1} = 1/2 (SNR_{t-1} - SNR_t) ||x_0 - x_0_hat||^2,   L_0 = 1/2 SNR_1 ||x_0 - x_0_hat||^2 / alpha_1^2 + const

    A term is drawn with probability proportional to the log-SNR it spans, where the noise-weighted error is even, and
    the first as often as the next; below LOG_SNR_MIN, where the terms vanish, none is drawn. Of a schedule that is
    learnt, which has the shape that makes all terms alike, each is drawn as often as any other.
    """
    process = denoiser.process
    snr = process.log_snr(times).exp()
    span = -process.log_snr(times).clamp(min=LOG_SNR_MIN).diff()
    often = torch.cat([span[:1], span]) if process.curve is None else torch.ones_like(times)
    lost = torch.cat([process(times[:1])[1] ** -2, snr[:-1] * process.gain(times[:-1], times[1:])])
    return often, torch.where(often > 0, 0.5 * lost * often.sum() / often, 0.0)


def min_snr(denoiser: NetworkDenoiser, times: Tensor) -> tuple[Tensor, Tensor]:
    """Uniform times, and min(SNR, 5): the squared error of eps where little noise is left does not outweigh the rest.

    Reference: Hang et al. (2023), eq. 8, with gamma = 5.
    """
    return torch.ones_like(times), denoiser.process.log_snr(times).exp().clamp(max=5.0)


def p2(denoiser: NetworkDenoiser, times: Tensor) -> tuple[Tensor, Tensor]:
    """Uniform times, and SNR / (1 + SNR): the squared error of eps, times 1 / (1 + SNR).

    Reference: Choi et al. (2022), eq. 8, with k = gamma = 1.
    """
    return torch.ones_like(times), denoiser.process.log_snr(times).sigmoid()


def edm(denoiser: NetworkDenoiser, times: Tensor) -> tuple[Tensor, Tensor]:
    """log(sigma / alpha) normal with mean -1.2 and deviation 1.2, and the squared error of EDM's F, 1 + SNR, there.

    Reference: Karras et al. (2022), table 1, for data of unit variance.
    """
    log_ratio = -0.5 * denoiser.process.log_snr(times).clamp(min=LOG_SNR_MIN)
    density = torch.exp(-0.5 * ((log_ratio + 1.2) / 1.2) ** 2)
    width = torch.cat([log_ratio.new_zeros(1), log_ratio.diff()])
    return density * width, 1 + denoiser.process.log_snr(times).exp()


STEPS = 50
"""Evaluations of the network for each sample, by default."""

HYBRID = 1e-3
"""Share of the bound in the hybrid objective."""

GENTLY = 1e-3
"""By how much the gradient of a schedule's shape is scaled: the network's is clipped as if it were not there."""

WEIGHTINGS = {"simple": simple, "bound": bound, "min-snr": min_snr, "p2": p2, "edm": edm}
"""(denoiser, times of the chain) -> (probability of training on each, weight of the squared error of x_0 there)."""


class Diffusion(nn.Module):
    """A diffusion model of data with the given facts.

    Args:
        net: network taking (x, log-SNR) to the shape of x.
        process: the forward process.
        facts: of the data: shape, levels, scale.
        predicts: parameterization, a key of `denoise.ROWS`.
        weighting: of the training loss, a key of `WEIGHTINGS`: "simple", the plain squared error of what the network
            predicts at uniform times; "bound", the squared errors of the variational bound of the chain; or "min-snr",
            "p2" or "edm", which care more for what is seen than for bits.
        variance: of the reverse chain that is sampled and measured, one of `denoise.VARIANCES`.
        decoder: of data on levels, one of `likelihood.DECODERS`.
        chain: the number of steps T of the chain that is trained and measured.

    Raises:
        OptionError: if a name is unknown or a combination is undefined.
    """

    def __init__(
        self,
        net: nn.Module,
        process: Process,
        facts: Facts,
        *,
        predicts: str = "v",
        weighting: str = "simple",
        variance: str = "fixed-small",
        decoder: str = "gaussian",
        chain: int = 1000,
    ) -> None:
        super().__init__()
        if weighting not in WEIGHTINGS:
            raise unknown("weighting", weighting, WEIGHTINGS)
        if variance not in VARIANCES:
            raise unknown("reverse variance", variance, VARIANCES)
        if variance == "optimal" and not getattr(net, "posterior", False):
            raise OptionError(
                "reverse variance 'optimal' needs Var[x_0|x_t], which only a network with a posterior over levels "
                "gives: --set unet.posterior=true, or use 'beta'"
            )
        if variance == "learned" and not getattr(net, "variance", False):
            raise OptionError(
                "reverse variance 'learned' needs a network that puts one out: --set unet.variance=true (or "
                "dit.variance, mlp.variance), or use 'beta'"
            )
        if decoder not in likelihood.DECODERS:
            raise unknown("decoder", decoder, likelihood.DECODERS)
        whole = weighting == "bound" and decoder == "softmax" and variance != "learned"
        if process.curve is not None and not (whole and facts.levels):
            raise OptionError(
                "a learned schedule needs data on levels, weighting 'bound', decoder 'softmax', whose cost one of its "
                f"ends decides, and no learned variance; received {facts.levels} levels, {weighting!r}, {decoder!r} "
                f"and {variance!r}: start from --recipe digits_bits or mnist_bits"
            )
        if chain < 2:
            raise OptionError(f"a chain needs at least 2 steps to be trained, received {chain}")
        self.facts, self.process, self.variance = facts, process, variance
        self.decoder, self.chain = decoder, chain
        self.network = NetworkDenoiser(net, process, predicts)
        self._times, self._weighting = grid(process, chain).flip(0), weighting
        probability, self._weight = WEIGHTINGS[weighting](self.network, self._times)
        if weighting == "bound" and decoder == "softmax" and facts.levels:
            probability[0] = 0  # this decoder asks no network
        self._probability = probability / probability.sum()
        self._cumulative = self._probability.cumsum(0)

    @property
    def denoiser(self) -> Denoiser:
        """E[x_0 | x_t] in the model's units, clipped to [-1, 1] when the data has levels."""
        return self.given(None)

    def given(self, labels: Tensor | None) -> Denoiser:
        """E[x_0 | x_t, label] in the same way; without labels, of all classes together.

        Raises:
            OptionError: if the model knows no classes, or not these.
        """
        denoiser = self.network if labels is None else Given(self.network, labels.to(self.device))
        return denoiser if self.facts.levels is None else Clipped(denoiser)

    @property
    def device(self) -> torch.device:
        """Where the network computes. Data and samples in the user's units are on the CPU."""
        return next((parameter.device for parameter in self.parameters()), torch.device("cpu"))

    def players(self) -> Mapping[str, Player]:
        """The denoiser, with `loss`."""
        return {"denoiser": Player(self.network, self.loss)}

    def loss(self, batch: Batch) -> Tensor:
        """Mean over the batch of w_t ||x_0 - x_0_hat||^2 per dimension, with t at low discrepancy over the chain.

        Times: u_b = (u + b) / B for one uniform u, through the inverse distribution function of the weighting.

        Reference: Kingma et al. (2021), appendix I.1, for the times.
        """
        x_0, rows = batch.x, batch.rows
        u = (rand((1,), rows.common) + rows.index) / rows.of
        step = torch.searchsorted(self._cumulative, u, right=True).clamp(max=self.chain - 1)
        if self.process.curve is not None:
            return self._with_schedule(self.process.curve, batch, step)
        t, weight = self._times[step], self._weight[step]
        x_t, _ = self.process.marginal(x_0, t, rows)
        if self.variance == "learned":
            return self._hybrid(x_0, x_t, step, weight, told(batch, self.network.classes))
        error = (self.network(x_t, t, told(batch, self.network.classes)) - x_0).square().flatten(1).mean(1)
        return (weight.to(error) * error).mean()

    def _with_schedule(self, curve: MonotoneCurve, batch: Batch, step: Tensor) -> Tensor:
        """The whole bound per dimension, (L_T + sum L_{t-1} + L_0) / D, whose gradient moves a schedule's ends too.

        To the middle terms the shape between the ends makes no difference, but to the variance of their estimate it
        does. It is moved by the gradient of

            sum_k E[L_{t-1}^2; bin k] / m_k,   m_k the share of time in bin k of the log-SNR,

        at its least where m_k is in proportion to the root mean square of what a nat of log-SNR costs there. L_0 is
        that of the decoder "softmax", on one value of each example.

        Reference: Kingma et al. (2021), eq. 11, and appendix I.2 for learning the ends and the shape apart.
        """
        x_0, rows = batch.x, batch.rows
        with curve.learning():
            t, (first, last) = self._times[step], self.process.log_snr(self._times[[0, -1]])
            weight = WEIGHTINGS["bound"](self.network, self._times)[1][step]
            x_t, _ = self.process.marginal(x_0, t, rows)
            error = (self.network(x_t, t, told(batch, self.network.classes)) - x_0).square().flatten(1).mean(1)
        terms = weight.to(error) * error
        x_0 = x_0.double().cpu().flatten(1)
        alpha, sigma = CONSTRAINTS[self.process.constraint](last)
        ends = gaussian.kl(alpha * x_0, sigma**2, torch.zeros_like(x_0), alpha**2 + sigma**2).mean()
        value = x_0.gather(1, (rand((len(x_0), 1), rows) * x_0.shape[1]).long())
        width = (-first / 2).exp()
        seen = value + width * randn(value.shape, rows, dtype=torch.float64)
        ends = ends - gaussian.log_softmax_level(value, seen, width, self.facts.levels or 0).mean()
        of_bin = curve.log_mass()[curve.bin(self.process.log_snr(t))]
        spread = -(terms.detach().double().cpu().square() * of_bin).mean()
        return terms.mean() + ends.to(terms) + GENTLY * (spread - spread.detach())

    def _hybrid(self, x_0: Tensor, x_t: Tensor, step: Tensor, weight: Tensor, labels: Tensor | None) -> Tensor:
        """The bound per dimension, which teaches the reverse variance; by itself, or with the weighted squared error.

        L = w_t ||x_0 - x_0_hat||^2 / D + 0.001 L_vlb / D, where no gradient of L_vlb reaches the guess. Of L_vlb a
        middle term is drawn for each example; the decoder is taught by none, and takes what the first of them learn.

        Reference: Nichol & Dhariwal (2021), eqs. 15 and 16.
        """
        guess, fraction = self.network.halves(x_t, self._times[step], labels)
        later = step.clamp(min=1)  # the first step has no middle term: what is computed for it is not counted
        s, t = self._times[later - 1], self._times[later]
        var = between(self.process, s, t, fraction)
        nats = likelihood.term(self.process, x_0, guess.detach() if self._weighting != "bound" else guess, var, s, t)
        share = torch.where(step > 0, 1 / self._probability[later], 0.0).to(nats)
        bound = (share * nats / x_0[0].numel()).mean()
        if self._weighting == "bound":
            return bound
        error = (guess - x_0).square().flatten(1).mean(1)
        return (weight.to(error) * error).mean() + HYBRID * bound

    def sample(
        self,
        n: int,
        *,
        steps: int | Tensor = STEPS,
        sampler: samplers.Sampler = samplers.ancestral,
        rng: Seeds = 0,
        start: int = 0,
        labels: Tensor | None = None,
        **options: Any,
    ) -> Tensor:
        """n examples in the data's own units: integer levels, or real values. Example i depends on seed i alone.

        They are examples start, ..., start + n - 1 of those that the seed gives. A model that knows classes draws from
        those of `labels`, int64, shape (n,), or from all of them.
        """
        with torch.inference_mode():
            path = self.sample_path(n, steps=steps, sampler=sampler, rng=rng, start=start, labels=labels, **options)
            for point in path:
                x = point.x
        return self.facts.to_raw(x.cpu().clone())

    def sample_batches(
        self,
        n: int,
        *,
        batch: int = 64,
        rng: int = 0,
        start: int = 0,
        every: int = 1,
        labels: Tensor | None = None,
        watch: Callable[[int, Glimpse], Any] | None = None,
        **options: Any,
    ) -> Iterator[Tensor]:
        """Examples start, ..., start + n - 1 as `sample` draws them, one batch at a time and in the memory of one.

        Nothing is computed before it is asked for, and a batch can be drawn without those before it.

        Args:
            n: how many.
            batch: examples in a batch; the last may have fewer.
            rng: the seed; example i has the stream (rng, i).
            start: index of the first example, for going on after so many.
            every: draw the first of so many batches and pass over the others: the share of one of several processes.
            labels: class of each example, int64, shape (n,), if the model knows classes.
            watch: told, at every point of a walk, the index of the first example of the batch and what is to be seen.
            options: of `sample`: steps, sampler, and those of its step.

        Example:
            >>> from ancestral.data import load
            >>> from ancestral.training import recipes
            >>> facts = load("ring-8").facts
            >>> model = recipes.build(recipes.choose(facts), facts)
            >>> [len(x) for x in model.sample_batches(150, steps=2)]
            [64, 64, 22]
            >>> torch.allclose(next(model.sample_batches(86, start=64, steps=2)), model.sample(128, steps=2)[64:])
            True
        """
        for first in range(0, n, batch * every):
            size = min(batch, n - first)
            watched = Watched(self.given(None if labels is None else labels[first : first + size]))
            path = self.sample_path(size, rng=rng, start=start + first, denoiser=watched, **options)
            with torch.inference_mode():
                for glimpse in glimpses(path, watched):
                    if watch:
                        watch(start + first, glimpse)
            yield self.facts.to_raw(glimpse.x_t.cpu().clone())

    def sample_path(
        self,
        n: int,
        *,
        steps: int | Tensor = STEPS,
        sampler: samplers.Sampler = samplers.ancestral,
        rng: Seeds = 0,
        start: int = 0,
        labels: Tensor | None = None,
        denoiser: Denoiser | None = None,
        **options: Any,
    ) -> Iterator[samplers.Point]:
        """Every point of the walk from noise to data, in the model's units, for examples start, ..., start + n - 1.

        Ancestral sampling walks the chain that is measured: with the model's own reverse variance. A denoiser that is
        given is asked in place of the model's own.

        A point and the generators are all that the rest of a walk depends on, and both can be pickled:

        Example:
            >>> import pickle
            >>> from itertools import islice
            >>> from ancestral.data import load
            >>> from ancestral.rng import streams
            >>> from ancestral.training import recipes
            >>> facts = load("ring-8").facts
            >>> model, rng = recipes.build(recipes.choose(facts), facts), streams(0, 4)
            >>> *_, point = islice(model.sample_path(4, steps=10, rng=rng), 6)
            >>> saved = pickle.dumps((point, rng))

            >>> point, rng = pickle.loads(saved)
            >>> left = [t for t in grid(model.process, 10).tolist() if t <= point.t] + [0.0]
            >>> options = {"rng": rng, "variance": model.variance}
            >>> *_, end = samplers.walk(samplers.ancestral.step, model.denoiser, point, left, **options)
            >>> torch.equal(facts.to_raw(end.x), model.sample(4, steps=10, rng=0))
            True
        """
        each = streams(rng, n, start=start)
        times = grid(self.process, steps)
        noise = randn((n, *self.facts.shape), each).to(self.device) * float(self.process.prior_var(times[0])) ** 0.5
        if sampler is samplers.ancestral:
            options.setdefault("variance", self.variance)
        return sampler.path(denoiser or self.given(labels), noise, times, rng=each, **options)

    def fitted(self, evaluations: int, *, n: int = 64, rng: Seeds = 0) -> Fit:
        """The deterministic sampler and its times that serve this model best for so many evaluations; see `fit.fit`.

        Nothing is asked at less noise than the first step of the chain has.

        Args:
            evaluations: of the network for each example that will be sampled, at most.
            n: walks from which it is learnt, at least 16.
            rng: a seed, one per walk, or generators.

        Example:
            >>> from ancestral.data import load
            >>> from ancestral.training import recipes
            >>> facts = load("ring-8").facts
            >>> model = recipes.build(recipes.choose(facts), facts)
            >>> found = model.fitted(3, n=16)
            >>> images = model.sample(5, sampler=samplers.SAMPLERS[found.sampler], steps=found.steps)
            >>> found.evaluations
            3
        """
        x_T = randn((n, *self.facts.shape), streams(rng, n)).to(self.device) * float(self.process.prior_var()) ** 0.5
        return fit(self.denoiser, x_T, evaluations, log_snr_max=self.finest)

    @property
    def finest(self) -> float:
        """The log-SNR of the least noise that grids go to, in nats: the network knows none before the chain's first."""
        return min(LOG_SNR_MAX, float(self.process.log_snr(self._times[0])))

    def times(self, grid: str, steps: int) -> Tensor:
        """So many times of the grid of that name, a key of `grids.GRIDS`, laid out over the chain that was trained.

        What has a T takes that of the chain, and what ends at a log-SNR ends with the chain's first step.

        Example:
            >>> from ancestral.data import load
            >>> from ancestral.training import recipes
            >>> facts = load("ring-8").facts
            >>> model = recipes.build(recipes.choose(facts), facts)
            >>> round(1 / float(model.times("linspace", 10)[-1])) == round(1 / float(model.times("karras", 10)[-1]))
            True
        """
        of: Callable[..., Tensor] = GRIDS[grid]
        own = {"T": self.chain, "log_snr_max": self.finest}
        return of(self.process, steps, **{name: own[name] for name in own if name in signature(of).parameters})

    def bound(
        self, x: Tensor, *, rng: Seeds = 0, start: int = 0, denoiser: Denoiser | None = None, **options: Any
    ) -> likelihood.Bound:
        """The variational bound of examples start, start + 1, ... in the data's units.

        Of the denoiser, chain, reverse variance and decoder of this model, unless `options` of `likelihood.bound` say
        otherwise.
        Its nats are of the data as given: a discrete probability when there are levels, else a density in data units.
        """
        own: dict[str, Any] = {"steps": self.chain, "variance": self.variance, "decoder": self.decoder}
        x_0, each = self.facts.scale.forward(x).to(self.device), streams(rng, len(x), start=start)
        result = likelihood.bound(
            denoiser or self.denoiser, x_0, rng=each, levels=self.facts.levels, **(own | options)
        ).cpu()
        return result if self.facts.levels else result.shifted(-self.facts.scale.log_det(self.facts.shape))

    def flow(self, x: Tensor, *, rng: Seeds = 0, start: int = 0, **options: Any) -> flow.FlowLikelihood:
        """The likelihood of examples start, start + 1, ... by the probability-flow ODE; see `flow.flow_likelihood`.

        It begins where `flow.DEQUANTIZATIONS` says, but at no less noise than the first step of the chain has.
        """
        levels, scheme = self.facts.levels, options.get("dequantization", "truncated-normal")
        if "log_snr_max" not in options and scheme in flow.DEQUANTIZATIONS:
            seen = float(self.process.log_snr(self._times[0]))
            options["log_snr_max"] = min(seen, flow.starts_at(scheme, levels))
        x_0, each = self.facts.scale.forward(x).to(self.device), streams(rng, len(x), start=start)
        result = flow.flow_likelihood(self.denoiser, x_0, rng=each, levels=levels, **options)
        return result if levels else result.shifted(-self.facts.scale.log_det(self.facts.shape))

    def log_prob(self, x: Tensor, *, rng: Seeds = 0, start: int = 0, labels: Tensor | None = None) -> Density:
        """A lower bound on log p(x) in nats, from all terms of the chain with one draw of noise each.

        Of examples start, start + 1, ... in the user's units; given their classes, if labels are.
        """
        return Density(-self.bound(x, rng=rng, start=start, denoiser=self.given(labels)).nats, "lower bound")

    def encode(self, x: Tensor, *, steps: int = 100) -> Tensor:
        """The latent of each example: the probability-flow ODE followed up the default grid, in the model's units.

        It starts at the first time after 0, from alpha_t x_0: the noise there is not drawn.
        """
        times = grid(self.process, steps).flip(0).tolist()
        start = samplers.Point(
            times[0], self.process(times[0])[0].float() * self.facts.scale.forward(x).to(self.device)
        )
        for point in samplers.walk(samplers.heun.step, self.denoiser, start, times):
            z = point.x
        return z

    def decode(self, z: Tensor, *, steps: int = 100) -> Tensor:
        """The example of each latent, in the data's units: the inverse of `encode` up to the solver's error."""
        return self.facts.to_raw(samplers.heun(self.denoiser, z.to(self.device), steps).cpu())
