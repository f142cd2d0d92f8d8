"""The normalizing-flow family: exact densities, exact codes, and examples in one pass back."""

import copy
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import reduce
from typing import final

import torch
from torch import Tensor, nn

from ancestral.data import Facts
from ancestral.errors import OptionError, unknown
from ancestral.flow import dequantize
from ancestral.flow.bijector import Bijector, Chain, Ends, Tails, summed
from ancestral.flow.causal import Causal
from ancestral.flow.coupling import Coupling, masks
from ancestral.flow.dequantize import Dequantizer, Uniform, Variational
from ancestral.flow.patches import PatchNet
from ancestral.flow.spline import Splines
from ancestral.gaussian import LOG_2PI
from ancestral.importance import Weights
from ancestral.labels import checked, counted, told
from ancestral.nets.precision import lowered
from ancestral.protocol import Batch, Density, Player
from ancestral.rng import Rng, Seeds, randn, streams

KINDS = ("spline", "coupling", "causal")
DEQUANTIZATIONS = ("uniform", "variational")

FEATURES = 16
"""Of the vector that stands for a class."""

DRAWS = 8
"""Of the noise within a level, for each example, unless told otherwise."""

AT_ONCE = 2**17
"""Numbers, of all examples, that go through the networks at once where no gradient is kept."""

DEFAULTS = {
    "spline": {"transforms": 4, "width": 128, "depth": 2},
    "coupling": {"transforms": 10, "width": 64, "depth": 1},
    "causal": {"transforms": 4, "width": 64, "depth": 4},
}
"""What a kind of flow takes where a keyword is None."""


@dataclass(frozen=True)
class Trip:
    """How far values are from where they were after the way there and back, |y' - y| / max(1, |y|), model's units.

    Attributes:
        data: f^-1(f(x)) against x: the largest, over all values of all examples.
        data_most: what 99.9% of them do not exceed.
        latent: f(f^-1(z)) against z: the largest, for z drawn from the normal law.
        latent_most: what 99.9% of them do not exceed.
    """

    data: float
    data_most: float
    latent: float
    latent_most: float


@dataclass(frozen=True)
class RoundTrip:
    """The error of the inverse, in the precision the flow runs in and in twice that.

    Example:
        >>> print(RoundTrip(Trip(2e-6, 1e-6, 3e-6, 1e-6), Trip(2e-15, 1e-15, 3e-15, 1e-15)))
        round trip: float32 2e-06 (99.9%: 1e-06), latents 3e-06 (1e-06); float64 2e-15 (1e-15), latents 3e-15 (1e-15)
    """

    float32: Trip
    float64: Trip

    def __str__(self) -> str:
        a, b = self.float32, self.float64
        return (
            f"round trip: float32 {a.data:.2g} (99.9%: {a.data_most:.2g}), latents {a.latent:.2g} "
            f"({a.latent_most:.2g}); float64 {b.data:.2g} ({b.data_most:.2g}), latents {b.latent:.2g} "
            f"({b.latent_most:.2g})"
        )


class Law(nn.Module):
    """log p(x | context) in the model's units: a bijector to the normal law, and vectors that stand for classes.

    Class number `classes` stands for all classes together. A call without labels is of that.
    """

    def __init__(self, bijector: Bijector, classes: int, dequantizer: Dequantizer | None) -> None:
        super().__init__()
        self.bijector, self.classes, self.dequantizer = bijector, classes, dequantizer
        self.label = nn.Embedding(classes + 1, FEATURES)

    def context(self, n: int, labels: Tensor | None = None) -> Tensor:
        """The vectors of n labels, shape (n, FEATURES)."""
        index = torch.full((n,), self.classes, device=self.label.weight.device) if labels is None else labels
        return self.label(index)

    def forward(self, x: Tensor, context: Tensor) -> Tensor:
        """log p(x), nats, float64, shape (B,)."""
        z, log_det = self.bijector(x, context)
        return summed(-0.5 * (z.double().square() + LOG_2PI)) + log_det


@final
class Flow(nn.Module):
    """A normalizing flow of data with the given facts.

        log p(x) = log N(f(x); 0, I) + log |det df/dx|

    A flow of vectors is of splines, see `spline.Splines`; one of images of couplings, see `coupling.Coupling`, behind
    splines of each patch as those before it tell, see `causal.Causal`, or without these. Real values pass `Tails`
    first, whatever they are. Data on levels is dequantized, see `dequantize`, and passes `Ends`.

    Args:
        facts: of the data: shape, levels, scale, classes.
        kind: "spline", "coupling" or "causal"; by default that of the data: "causal" for images.
        transforms: splines of a vector, or couplings of an image, one after the other.
        width: features of a conditioner.
        depth: hidden layers of a spline's, transformer blocks of a coupling's, or of those before the couplings.
        bins: of a spline of a vector.
        patch: side of a patch of couplings; by default about eight of them a side.
        heads: of a transformer's attention.
        dequantization: of data on levels, "uniform" or "variational".
        classes: learn the law of each class too.
        precision: what training on images multiplies with: "float32", "bfloat16" (weights and values stay float32), or
            "auto": bfloat16 where the hardware has it. All that is measured and drawn is computed as the weights are
            kept.

    Raises:
        OptionError: if a name is unknown, a number is out of range, or a combination is undefined.

    Example:
        >>> from ancestral.data import load
        >>> data = load("ring-8")
        >>> flow, x = Flow(data.facts, transforms=2, width=16), data.train[:3]
        >>> flow.log_prob(x).kind, bool((flow.decode(flow.encode(x)) - x).abs().max() < 1e-4)
        ('exact', True)
    """

    def __init__(
        self,
        facts: Facts,
        *,
        kind: str | None = None,
        transforms: int | None = None,
        width: int | None = None,
        depth: int | None = None,
        bins: int = 16,
        patch: int | None = None,
        heads: int = 4,
        dequantization: str = "uniform",
        classes: bool = False,
        precision: str = "auto",
    ) -> None:
        super().__init__()
        self.lowered = lowered(precision) and facts.is_image
        kind = kind or ("causal" if facts.is_image and min(facts.shape[1:]) > 1 else "spline")
        if kind not in KINDS:
            raise unknown("kind of flow", kind, KINDS)
        if dequantization not in DEQUANTIZATIONS:
            raise unknown("dequantization", dequantization, DEQUANTIZATIONS)
        if kind != "spline" and len(facts.shape) != 3:
            raise OptionError(f"{kind!r} is for images, but {facts.name} has shape {facts.shape}: use kind='spline'")
        transforms, width, depth = (
            DEFAULTS[kind][name] if given is None else given
            for name, given in (("transforms", transforms), ("width", width), ("depth", depth))
        )
        if min(transforms, width, depth, heads, bins - 1) < 1:
            raise OptionError(
                f"received transforms {transforms}, width {width}, depth {depth}, heads {heads} and bins {bins}: each "
                "is at least 1, and bins at least 2"
            )
        self.facts = facts
        shape = (facts.dims, 1, 1) if kind == "spline" else (facts.shape[0], facts.shape[1], facts.shape[2])
        side = patch or patch_side(shape)
        blocks: list[Bijector] = [Ends(facts.levels / (facts.levels - 1)) if facts.levels else Tails()]
        if kind == "spline":
            blocks.append(Splines(facts.dims, FEATURES, transforms=transforms, bins=bins, width=width, depth=depth))
        if kind == "causal":
            blocks.append(Causal(shape, side, FEATURES, width=width, depth=depth, heads=heads))
        if kind != "spline":
            keeps, deep = masks(shape, side), depth if kind == "coupling" else 1
            for _ in range(transforms):
                net = PatchNet(shape, side, FEATURES, width=width, depth=deep, heads=heads)
                blocks.append(Coupling(net, next(keeps)))
        dequantizer: Dequantizer | None = None
        if facts.levels and dequantization == "uniform":
            dequantizer = Uniform()
        elif facts.levels:
            dequantizer = Variational(shape, side, FEATURES, width=width, heads=heads)
        self.law = Law(Chain(blocks), counted(facts.classes, facts.name, wanted=classes) or 0, dequantizer)

    @property
    def device(self) -> torch.device:
        """Where the flow computes. Data and samples in the user's units are on the CPU."""
        return self.law.label.weight.device

    def players(self) -> Mapping[str, Player]:
        """The law, with `loss`."""
        return {"flow": Player(self.law, self.loss)}

    def loss(self, batch: Batch) -> Tensor:
        """-log p(x) per dimension in nats, of the density in the model's units, or of the bin of x with one draw."""
        context = self.law.context(len(batch.x), told(batch, self.law.classes or None))
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.lowered):
            log_p = self._log_weight(batch.x, context, batch.rows)
        return -log_p.mean() / self.facts.dims

    def _log_weight(self, x: Tensor, context: Tensor, rng: Rng) -> Tensor:
        """log p(x) in the model's units; on levels, log p(y) - log q(u|x) + D log(2h) of one draw. Shape (B,)."""
        if self.facts.levels is None or self.law.dequantizer is None:
            return self.law(x, context)
        u, log_q = self.law.dequantizer(x, context, rng)
        y = x + (2 * u - 1) / (self.facts.levels - 1)
        return self.law(y, context) - log_q + dequantize.width(self.facts.levels, self.facts.dims)

    @torch.no_grad()
    def log_prob(
        self, x: Tensor, *, draws: int | None = None, labels: Tensor | None = None, rng: Seeds = 0, start: int = 0
    ) -> Density:
        """log p of examples start, start + 1, ... in the user's units, in nats; given their classes, if labels are.

        Of real values, the exact density. On levels, a lower bound on the probability: the logarithm of the mean weight
        of so many draws, `DRAWS` by default, in the memory of one.

        Raises:
            OptionError: if there is nothing to draw, the labels are not known, or a value is not a number or a level.
        """
        draws = (DRAWS if self.facts.levels else 1) if draws is None else draws
        if draws < 1 or (self.facts.levels is None and draws > 1):
            raise OptionError(
                f"received {draws} draws: data on levels takes 1 or more, real-valued data has nothing to draw"
            )
        levels, given = self.facts.levels, x.double()
        if levels is not None and bool(((given != given.round()) | (given < 0) | (given >= levels)).any()):
            raise OptionError(f"received values that are not levels: {self.facts.name} has 0 to {levels - 1}")
        x, each = self._model_units(x), streams(rng, len(x), start=start)
        if levels is None:
            nats = torch.cat([self.law(x[rows], context) for rows, context in self._parts(len(x), labels)])
            return Density((nats + self.facts.scale.log_det(self.facts.shape)).cpu(), "exact")
        found = []
        for rows, context in self._parts(len(x), labels):
            own = each[rows] if isinstance(each, Sequence) else each
            one_each = (Weights.of(self._log_weight(x[rows], context, own)[:, None].cpu()) for _ in range(draws))
            found.append(reduce(Weights.joined, one_each))
        return reduce(Weights.beside, found).importance

    @torch.no_grad()
    def sample(self, n: int, *, rng: Seeds = 0, start: int = 0, labels: Tensor | None = None) -> Tensor:
        """n examples in the user's units: integer levels, or real values. Example i depends on seed (rng, i) alone.

        A flow that knows classes draws from those of `labels`, int64, shape (n,), or from all of them.
        """
        z = randn((n, *self.facts.shape), streams(rng, n, start=start))
        return self.decode(z, labels=labels)

    @torch.no_grad()
    def encode(self, x: Tensor, *, labels: Tensor | None = None) -> Tensor:
        """The latent f(x) of each example, in the shape of the example. Levels are not dequantized first.

        Raises:
            OptionError: naming the first example that holds no number, or has no latent that is one.
        """
        y = self._model_units(x)
        z = torch.cat([self.law.bijector(y[rows], context)[0].cpu() for rows, context in self._parts(len(x), labels)])
        return _finite(z, x, "example")

    @torch.no_grad()
    def decode(self, z: Tensor, *, labels: Tensor | None = None) -> Tensor:
        """The example f^-1(z) of each latent, in the user's units; levels are rounded to.

        Raises:
            OptionError: naming the first latent that holds no number, or has no example that is one.
        """
        y, inverse = z.to(self.law.label.weight), self.law.bijector.inverse
        x = torch.cat([inverse(y[rows], context).cpu() for rows, context in self._parts(len(z), labels)])
        return self.facts.to_raw(_finite(x, z, "latent"))

    @torch.no_grad()
    def round_trip(self, x: Tensor, *, labels: Tensor | None = None, rng: Seeds = 0) -> RoundTrip:
        """How exactly the flow inverts, for examples in the user's units and as many latents from the normal law."""
        z = randn(x.shape, streams(rng, len(x)), dtype=torch.float64)
        both = (copy.deepcopy(self).float(), copy.deepcopy(self).double())
        return RoundTrip(
            *(_trip(flow.law.bijector, flow._model_units(x), z, flow._context(len(x), labels)) for flow in both)
        )

    def _model_units(self, x: Tensor) -> Tensor:
        if tuple(x.shape[1:]) != self.facts.shape:
            raise OptionError(
                f"received examples of shape {tuple(x.shape[1:])}: those of {self.facts.name} have {self.facts.shape}"
            )
        like = self.law.label.weight
        return _finite(self.facts.scale.forward(x, dtype=like.dtype), x, "example").to(like.device)

    def _parts(self, n: int, labels: Tensor | None) -> list[tuple[slice, Tensor]]:
        """Rows of n examples that go through the networks at once, each with what says their classes."""
        context, some = self._context(n, labels), max(1, AT_ONCE // self.facts.dims)
        return [(slice(i, i + some), context[i : i + some]) for i in range(0, max(n, 1), some)]

    def _context(self, n: int, labels: Tensor | None) -> Tensor:
        if labels is None:
            return self.law.context(n)
        return self.law.context(n, checked(labels, n, self.law.classes or None).to(self.device))


def patch_side(shape: tuple[int, ...]) -> int:
    """The side of a patch that divides an image into at most about eight a side, and has two values at least.

    Example:
        >>> patch_side((1, 8, 8)), patch_side((1, 28, 28)), patch_side((3, 32, 32)), patch_side((3, 7, 5))
        (2, 4, 4, 1)
    """
    common = math.gcd(*shape[1:])
    sides = [side for side in range(1, common + 1) if common % side == 0]
    return next((side for side in sides if side > 1 and max(shape[1:]) <= 8 * side), sides[-1])


def _trip(bijector: Bijector, x: Tensor, z: Tensor, context: Tensor) -> Trip:
    z = z.to(x)
    there, _ = bijector(x, context)
    back = bijector.inverse(z, context)
    data, latent = _error(bijector.inverse(there, context), x), _error(bijector(back, context)[0], z)
    return Trip(float(data.max()), _most(data), float(latent.max()), _most(latent))


def _error(back: Tensor, y: Tensor) -> Tensor:
    """|back - y| / max(1, |y|) of every value, float64; infinite where the way back led to no number."""
    error = ((back.double() - y.double()).abs() / y.double().abs().clamp(min=1)).flatten()
    return error.nan_to_num(nan=math.inf)


def _most(error: Tensor) -> float:
    """What 99.9% of the errors do not exceed."""
    return float(error.kthvalue(math.ceil(0.999 * len(error))).values)


def _finite(values: Tensor, source: Tensor, whose: str) -> Tensor:
    """The values that were made of `source`, if all are finite.

    Raises:
        OptionError: naming the first example that is not, and its largest number.
    """
    bad = (~values.isfinite()).flatten(1).any(1)
    if bool(bad.any()):
        i = int(bad.nonzero()[0, 0])
        worst = source[i].double().flatten().nan_to_num(nan=math.inf).abs().argmax()
        raise OptionError(
            f"{whose} {i} cannot be taken, for its number {int(worst)}: {float(source[i].flatten()[worst]):g} is "
            "not finite, or too far from the data to be mapped to a finite number"
        )
    return values
