"""The variational autoencoder: a network, a likelihood and the facts of a data set, trained, sampled and measured."""

from collections.abc import Callable, Iterator, Mapping, Sequence

import torch
from torch import Tensor, nn

from ancestral.data import Facts
from ancestral.errors import OptionError
from ancestral.importance import Weights
from ancestral.labels import checked, counted, told
from ancestral.nets.ladder import network
from ancestral.nets.precision import lowered
from ancestral.protocol import Batch, Density, Player
from ancestral.rng import Rng, Seeds, randn, stream, streams
from ancestral.vae import aggregate, bound
from ancestral.vae.aggregate import LatentMixture
from ancestral.vae.bound import AT_ONCE
from ancestral.vae.decoders import decoder

DRAWS = 64
"""Importance weights of each example, unless told otherwise."""

TOGETHER = 16
"""Examples that are measured at a time, so that a pass of the network is over many draws of few examples."""


class VAE(nn.Module):
    """A variational autoencoder of data with the given facts: x ~ p(x | z), z ~ N(0, I), q(z | x) Gaussian.

    The likelihood of a value is told by the data: a mixture of discretized logistics on levels, a Bernoulli law on two
    of them, and a Gaussian whose deviation is learnt on real values. With nothing to weigh against each other, what is
    minimised is the bound itself.

    Of a ladder, each group of latents has a posterior that depends on the groups above it, so that all of them together
    are not Gaussian. They are told as multiples of the deviation of their prior, and z is all of them in a row.

    References: Kingma & Welling (2014); Rezende et al. (2014); Sønderby et al. (2016), for the ladder.

    Args:
        facts: of the data: shape, levels, scale, classes.
        latents: dimensions of z, or of its first group if there is a ladder.
        ladder: groups of latents below the first: of a vector in all, of an image at each side.
        channels: of each of those groups, in an image.
        width: channels of the network at the longest side of an image, or hidden features for a vector.
        blocks: residual blocks at each side, or layers, each way.
        components: of the mixture of logistics.
        classes: whether the network is told the class.
        precision: what training on images multiplies with: "float32", "bfloat16" (weights stay float32), or "auto":
            bfloat16 where the hardware has it. All that is measured and drawn is computed as the weights are kept.

    Raises:
        OptionError: if a number is too small, the precision is unknown, or classes are to be learnt that are not there.

    Example:
        >>> from ancestral.data import load
        >>> digits = load("digits")
        >>> model = VAE(digits.facts, width=8)
        >>> model.encode(digits.held_out[:5]).shape, model.sample(3).shape
        (torch.Size([5, 32]), torch.Size([3, 1, 8, 8]))
    """

    def __init__(
        self,
        facts: Facts,
        *,
        latents: int = 32,
        ladder: int = 0,
        channels: int = 4,
        width: int = 32,
        blocks: int = 1,
        components: int = 5,
        classes: bool = False,
        precision: str = "auto",
    ) -> None:
        super().__init__()
        self.lowered = lowered(precision) and facts.is_image
        least = {"latents": 1, "ladder": 0, "channels": 1, "width": 1, "blocks": 0}
        given = {"latents": latents, "ladder": ladder, "channels": channels, "width": width, "blocks": blocks}
        for name, number in given.items():
            if number < least[name]:
                raise OptionError(f"received {name}={number}: at least {least[name]} is needed")
        self.facts, self.decoder = facts, decoder(facts, components)
        self.network = network(
            facts.shape,
            self.decoder.per_value,
            width=width,
            blocks=blocks,
            latents=latents,
            rungs=ladder,
            channels=channels,
            classes=counted(facts.classes, facts.name, wanted=classes),
        )

    @property
    def device(self) -> torch.device:
        """Where the network computes. Data and samples in the user's units are on the CPU."""
        return next(self.parameters()).device

    @property
    def dtype(self) -> torch.dtype:
        """What the network computes with."""
        return next(self.parameters()).dtype

    @property
    def latents(self) -> int:
        """Dimensions of z, over all groups."""
        return self.network.latents

    def players(self) -> Mapping[str, Player]:
        """Encoder and decoder in one, with `loss`."""
        return {"autoencoder": Player(self, self.loss)}

    def loss(self, batch: Batch) -> Tensor:
        """Mean over the batch of the negative bound per dimension, in the model's units, with one draw of z.

            -ELBO / D = ( E_q[-log p(x | z)] + sum_l E_q[KL(q(z_l | z_<l, x) || N(0, I))] ) / D

        Reference: Kingma & Welling (2014), eq. 10.
        """
        x = batch.x.to(self.dtype)
        noise = randn((len(x), self.latents), batch.rows, dtype=self.dtype).to(x.device)
        with torch.autocast(x.device.type, torch.bfloat16, enabled=self.lowered):
            found = self.network(x, noise, told(batch, self.network.classes))
        out, mean, log_std = (each.to(x) for each in (found.out, found.mean, found.log_std))
        kl = 0.5 * (log_std.mul(2).expm1() - 2 * log_std + mean.square()).sum(1)
        return ((kl - self.decoder.log_prob(x, out).to(kl)) / self.facts.dims).mean()

    def sample(
        self,
        n: int,
        *,
        rng: Seeds = 0,
        start: int = 0,
        labels: Tensor | None = None,
        prior: LatentMixture | None = None,
    ) -> Tensor:
        """n draws from p(x) in the data's own units: integer levels, or real values. Example i depends on seed i alone.

        A model that knows classes draws from those of `labels`, int64, shape (n,), or from all of them.

        Args:
            n: how many.
            rng: a seed, one per example, or generators.
            start: index of the first example.
            labels: class of each example, if the model knows classes.
            prior: law of the first group of latents in place of the standard normal, as `aggregate` fits it.
        """
        each, labels = streams(rng, n, start=start), self._known(labels, n)
        z = randn((n, self.latents), each, dtype=self.dtype)
        if prior is not None:
            top = prior.sample(n, rng=each).to(self.dtype)
            z = torch.cat([top, z[:, top.shape[1] :]], 1)
        with torch.no_grad():
            x = self.decoder.sample(self._put_out(z, labels), each)
        return self.facts.to_raw(x.cpu())

    def log_prob(
        self, x: Tensor, *, rng: Seeds = 0, start: int = 0, labels: Tensor | None = None, draws: int = DRAWS
    ) -> Density:
        """The importance-weighted bound on log p(x), in nats of the data as given; see `importance.Weights`."""
        return self.bound(x, draws=draws, rng=rng, start=start, labels=labels).importance

    @torch.no_grad()
    def bound(
        self,
        x: Tensor,
        *,
        draws: int = DRAWS,
        rng: Seeds = 0,
        start: int = 0,
        labels: Tensor | None = None,
        at_once: int = AT_ONCE,
    ) -> Weights:
        """Importance weights of examples start, start + 1, ...: both the evidence bound and the tighter one.

        Their nats are of the data as given: a discrete probability where there are levels, else a density in the data's
        units. Memory does not grow with the number of draws.

        Args:
            x: examples in the user's units, shape (B, *shape).
            draws: of z for each.
            rng: a seed, one per example, or generators.
            start: index of the first example.
            labels: class of each example, if the model knows classes.
            at_once: latents that are decoded at a time.
        """

        def measured(x: Tensor, labels: Tensor | None, rng: Rng) -> Weights:
            features = self.network.features(x, labels)

            def log_weight(noise: Tensor) -> Tensor:
                K, noise = noise.shape[1], noise.flatten(0, 1).to(self.device)
                found = self.network.infer([h.repeat_interleave(K, 0) for h in features], noise, _repeated(labels, K))
                log_ratio = 0.5 * (noise.square() - found.z.square()) + found.log_std
                log_p = self.decoder.log_prob(x.repeat_interleave(K, 0), found.out)
                return (log_p + log_ratio.sum(1, dtype=torch.float64)).view(len(x), K)

            return bound.weights(log_weight, len(x), self.latents, draws, rng=rng, dtype=self.dtype, at_once=at_once)

        return self._measured(measured, x, rng, start, labels)

    @torch.no_grad()
    def anneal(
        self,
        x: Tensor,
        *,
        chains: int = 16,
        steps: int = 500,
        leapfrog: int = 5,
        rng: Seeds = 0,
        start: int = 0,
        labels: Tensor | None = None,
    ) -> Weights:
        """Weights by walks from the prior to the posterior, which the encoder has no part in; see `bound.annealed`.

        Args:
            x: examples in the user's units, shape (B, *shape).
            chains: walks for each example.
            steps: temperatures of a walk.
            leapfrog: evaluations of the gradient at each temperature.
            rng: a seed, one per example, or generators.
            start: index of the first example.
            labels: class of each example, if the model knows classes.
        """

        def measured(x: Tensor, labels: Tensor | None, rng: Rng) -> Weights:
            repeated, known = x.repeat_interleave(chains, 0), _repeated(labels, chains)

            def log_likelihood(z: Tensor) -> Tensor:
                out = self.network.generate(z.flatten(0, 1).to(self.device), known)
                return self.decoder.log_prob(repeated, out).view(len(x), chains).cpu()

            numbers = {"chains": chains, "steps": steps, "leapfrog": leapfrog}
            return bound.annealed(log_likelihood, len(x), self.latents, rng=rng, dtype=self.dtype, **numbers)

        return self._measured(measured, x, rng, start, labels)

    @torch.no_grad()
    def encode(self, x: Tensor, *, labels: Tensor | None = None) -> Tensor:
        """The posterior mean of each example's latents, shape (B, Z); of a ladder, each group's given those above."""
        parts = []
        for x_0, known in self._batches(x, labels):
            noise = torch.zeros(len(x_0), self.latents, dtype=self.dtype, device=self.device)
            parts.append(self.network(x_0, noise, known).mean.cpu())
        return torch.cat(parts)

    @torch.no_grad()
    def decode(self, z: Tensor, *, labels: Tensor | None = None) -> Tensor:
        """E[x | z] in the data's own units, rounded to a level where there are levels; shape (B, Z) -> (B, *shape)."""
        labels = self._known(labels, len(z))
        return self.facts.to_raw(self.decoder.mean(self._put_out(z, labels)).cpu())

    def traverse(self, x: Tensor, dim: int, values: Sequence[float], *, labels: Tensor | None = None) -> Tensor:
        """Each example decoded with one of its latents put to each of n values, shape (B, n, *shape).

        Raises:
            OptionError: if there is no such latent.
        """
        if not 0 <= dim < self.latents:
            raise OptionError(f"received latent {dim}: this model has latents 0 to {self.latents - 1}")
        z = self.encode(x, labels=labels)[:, None].repeat(1, len(values), 1)
        z[:, :, dim] = torch.tensor(values, dtype=z.dtype)
        known = _repeated(labels, len(values))
        return self.decode(z.flatten(0, 1), labels=known).view(len(x), len(values), *self.facts.shape)

    def interpolate(self, x: Tensor, y: Tensor, n: int, *, labels: Tensor | None = None) -> Tensor:
        """n examples from each x to each y, along great circles between their latents, shape (B, n, *shape).

            z(t) = ( sin((1 - t) a) z_x + sin(t a) z_y ) / sin(a),   a the angle between z_x and z_y

        On the way the length of z stays among those that the prior has, which on a straight line it does not. A label
        is of both ends of a line.

        Reference: White (2016), sampling generative networks, section 2; Shoemake (1985) for the formula.

        Raises:
            OptionError: if fewer than two examples are asked for, or x and y are not as many.
        """
        if n < 2 or len(x) != len(y):
            raise OptionError(
                f"received {len(x)} and {len(y)} ends and n={n}: give as many of each, and n of 2 or more"
            )
        z_x, z_y = (self.encode(ends, labels=labels).double()[:, None] for ends in (x, y))
        cosine = torch.cosine_similarity(z_x, z_y, 2)[..., None].clamp(-1, 1)
        a, t = cosine.arccos(), torch.linspace(0, 1, n, dtype=torch.float64)[:, None]
        straight = a.sin() < 1e-6
        a = a.where(~straight, 1.0)
        from_x = torch.where(straight, 1 - t, ((1 - t) * a).sin() / a.sin())
        from_y = torch.where(straight, t, (t * a).sin() / a.sin())
        z = (from_x * z_x + from_y * z_y).to(self.dtype)
        return self.decode(z.flatten(0, 1), labels=_repeated(labels, n)).view(len(x), n, *self.facts.shape)

    @torch.no_grad()
    def aggregate(self, x: Tensor, *, components: int = 10, rng: int = 0) -> LatentMixture:
        """A mixture of Gaussians fitted to the first group of latents of these examples, drawn from q(z | x) once each.

        For `sample(n, prior=mixture)`.

        Args:
            x: training examples in the user's units, shape (B, *shape).
            components: of the mixture, at most one per example.
            rng: a seed, of the draws and of the fit.
        """
        parts, top, generator = [], self.network.groups[0][0], stream(rng)
        for x_0, known in self._batches(x, None):
            noise = randn((len(x_0), self.latents), generator, dtype=self.dtype).to(self.device)
            parts.append(self.network(x_0, noise, known).z[:, :top].cpu())
        return aggregate.fit(torch.cat(parts), components, rng=rng)

    def _put_out(self, z: Tensor, labels: Tensor | None) -> Tensor:
        """What the network puts out for latents, some at a time."""
        z = z.to(self.device, self.dtype)
        known = [None] * -(-len(z) // AT_ONCE) if labels is None else torch.split(labels, AT_ONCE)
        return torch.cat([self.network.generate(*part) for part in zip(torch.split(z, AT_ONCE), known, strict=True)])

    def _measured(
        self,
        measured: Callable[[Tensor, Tensor | None, Rng], Weights],
        x: Tensor,
        rng: Seeds,
        start: int,
        labels: Tensor | None,
    ) -> Weights:
        """What is measured of some examples at a time, of all of them, in the units of the data."""
        each, found = streams(rng, len(x), start=start), None
        for first, (x_0, known) in enumerate(self._batches(x, labels, TOGETHER)):
            rows = slice(first * TOGETHER, first * TOGETHER + len(x_0))
            part = measured(x_0, known, each[rows] if isinstance(each, Sequence) else each)
            found = part if found is None else found.beside(part)
        if found is None:
            raise OptionError("received no examples: a bound is of at least one")
        return found if self.facts.levels else found.shifted(self.facts.scale.log_det(self.facts.shape))

    def _batches(self, x: Tensor, labels: Tensor | None, size: int = AT_ONCE) -> Iterator[tuple[Tensor, Tensor | None]]:
        """Examples in the model's units and their labels where the network computes, some at a time."""
        labels = self._known(labels, len(x))
        for first in range(0, len(x), size):
            x_0 = self.facts.scale.forward(x[first : first + size], dtype=self.dtype).to(self.device)
            yield x_0, None if labels is None else labels[first : first + size]

    def _known(self, labels: Tensor | None, n: int) -> Tensor | None:
        """The labels of n examples where the network computes, if it knows them."""
        return None if labels is None else checked(labels, n, self.network.classes).to(self.device)


def _repeated(labels: Tensor | None, times: int) -> Tensor | None:
    return None if labels is None else labels.repeat_interleave(times, 0)
