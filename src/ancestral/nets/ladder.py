"""Networks of a variational autoencoder: a way up from the data, and a way down past one group of latents or several.

Every latent has the prior N(0, 1), whatever is above it. What a prior that depends on the latents above would be, the
way down makes of that: z_l of N(m, s^2) is m + s u_l, and m and s may be learnt by what takes u_l in. So all latents of
a ladder are one vector, of standard normal prior, and a posterior begins as the prior exactly.

Shapes: B batch, C channels, H height, W width, D dimensions of a vector, E width, Z latents, P numbers per value.
"""

import math
from abc import ABC, abstractmethod
from collections.abc import Callable
from itertools import pairwise
from typing import NamedTuple, final

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ancestral.nets.blocks import zeroed

SPREAD = 7.0
"""Bound on the size of the log deviation of a posterior."""

SMALLEST = 4
"""Pixels of the side at which an image is no longer halved."""

LARGE = 16
"""Pixels of the longer side above which the network takes 2x2 of them as one: the full side would take most of the
time, and what it would add is little where values are independent given the latents."""

Choose = Callable[[int, Tensor], Tensor]
"""(which group, the features so far) -> its latents."""


class Inferred(NamedTuple):
    """Latents drawn from q(z | x), the law each was drawn from given those above it, and what is put out for them.

    Attributes:
        out: for each value, shape (B, P, *shape).
        z: shape (B, Z).
        mean: shape (B, Z).
        log_std: shape (B, Z).
    """

    out: Tensor
    z: Tensor
    mean: Tensor
    log_std: Tensor


class Ladder(nn.Module, ABC):
    """Both ways of a variational autoencoder. What is inferred on the way down sees what is above it, and the data.

    References: Sønderby et al. (2016), for a posterior that goes down the way of the prior; Child (2021), for the form
    of a step; Vahdat & Kautz (2020), section 3.2, for a posterior told relative to the prior.

    Attributes:
        groups: shape of each group of latents, from the top.
        classes: that labels may name; None without labels.
    """

    groups: list[tuple[int, ...]]
    classes: int | None

    @abstractmethod
    def features(self, x: Tensor, labels: Tensor | None = None) -> list[Tensor]:
        """The way up: all that a posterior takes from the data, each of shape (B, ...)."""

    @abstractmethod
    def posterior(self, group: int, h: Tensor, features: list[Tensor]) -> Tensor:
        """Mean and log deviation of a group, before the latter is bounded, shape (B, 2 C_l, ...)."""

    @abstractmethod
    def descend(self, choose: Choose, n: int, labels: Tensor | None = None) -> Tensor:
        """The way down for n examples, asking for the latents of each group in turn, to (B, P, *shape)."""

    @property
    def latents(self) -> int:
        """Z, over all groups."""
        return sum(map(math.prod, self.groups))

    def forward(self, x: Tensor, noise: Tensor, labels: Tensor | None = None) -> Inferred:
        """(B, *shape), standard normal (B, Z), labels (B,) -> latents from q(z | x) and what is put out for them."""
        return self.infer(self.features(x, labels), noise, labels)

    def infer(self, features: list[Tensor], noise: Tensor, labels: Tensor | None = None) -> Inferred:
        """The same from the features."""
        shares, found = self._divided(noise), []

        def choose(group: int, h: Tensor) -> Tensor:
            mean, log_std = self.posterior(group, h, features).chunk(2, 1)
            log_std = SPREAD * (log_std / SPREAD).tanh()
            z = mean + log_std.exp() * shares[group]
            found.append((z.flatten(1), mean.flatten(1), log_std.flatten(1)))
            return z

        out = self.descend(choose, len(noise), labels)
        return Inferred(out, *(torch.cat(parts, 1) for parts in zip(*found, strict=True)))

    def generate(self, z: Tensor, labels: Tensor | None = None) -> Tensor:
        """(B, Z), labels (B,) -> (B, P, *shape)."""
        shares = self._divided(z)
        return self.descend(lambda group, h: shares[group], len(z), labels)

    def _divided(self, z: Tensor) -> list[Tensor]:
        shares = torch.split(z, [math.prod(shape) for shape in self.groups], 1)
        return [share.reshape(-1, *shape) for share, shape in zip(shares, self.groups, strict=True)]


class _Label(nn.Module):
    """A vector for each class, zero at first; label number `classes` stands for all classes together."""

    def __init__(self, classes: int, features: int) -> None:
        super().__init__()
        self.classes = classes
        self.vectors = zeroed(nn.Embedding(classes + 1, features))

    def forward(self, n: int, labels: Tensor | None) -> Tensor:
        if labels is None:
            labels = torch.full((n,), self.classes, device=next(self.parameters()).device)
        out: Tensor = self.vectors(labels)
        return out


class _Residual(nn.Module):
    """h + second(f(first(f(h)))), with f a SiLU; of a vector, the second is of features brought to unit variance."""

    def __init__(self, first: nn.Module, second: nn.Module, normed: bool) -> None:
        super().__init__()
        self.first, self.second, self.normed = first, zeroed(second), normed

    def forward(self, h: Tensor) -> Tensor:
        hidden = self.first(F.silu(h))
        if self.normed:
            hidden = F.layer_norm(hidden, (hidden.shape[1],))
        out: Tensor = h + self.second(F.silu(hidden))
        return out


class _Rung(nn.Module):
    """A group of latents below the top: its posterior from what is above it and the data, and how it is taken in.

    h + into(2 S(gate(h)) z), with S the sigmoid: the gate is the deviation of a prior that depends on what is above.
    """

    def __init__(self, layer: Callable[[int, int], nn.Module], width: int, channels: int) -> None:
        super().__init__()
        self.look = layer(2 * width, width)
        self.infer = zeroed(layer(width, 2 * channels))
        self.gate = zeroed(layer(width, channels))
        self.into = layer(channels, width)

    def posterior(self, h: Tensor, features: Tensor) -> Tensor:
        out: Tensor = self.infer(F.silu(self.look(F.silu(torch.cat([h, features], 1)))))
        return out

    def forward(self, h: Tensor, z: Tensor) -> Tensor:
        out: Tensor = h + self.into(2 * self.gate(F.silu(h)).sigmoid() * z)
        return out


def _rung(steps: nn.ModuleList, group: int) -> _Rung:
    rung = steps[group - 1]
    assert isinstance(rung, _Rung)
    return rung


def _wide(channels_in: int, channels: int) -> nn.Module:
    return nn.Conv2d(channels_in, channels, 3, padding=1)


def _narrow(channels_in: int, channels: int) -> nn.Module:
    return nn.Conv2d(channels_in, channels, 1)


@final
class ConvLadder(Ladder):
    """For images: halved to about 4x4 and back, with residual blocks at each side and no norm.

    A side is halved by averaging, rounding up, and brought back by repetition. The group at the top is a vector; those
    below it, if any, are images. Of a `LARGE` image, the longest of these sides is half of its own.

    Args:
        shape: of one example, (C, H, W).
        per_value: P.
        width: channels at the longest side; twice as many at all others.
        blocks: residual blocks at each side, each way.
        latents: at the top.
        rungs: groups of latents at each side, below the top.
        channels: of each of these groups.
        classes: that labels may name; None without labels.

    Example:
        >>> net = ConvLadder((3, 7, 5), 6, width=16, rungs=1)
        >>> net.groups, net.generate(torch.zeros(2, net.latents)).shape
        ([(32,), (4, 4, 3), (4, 7, 5)], torch.Size([2, 6, 3, 7, 5]))
    """

    def __init__(
        self,
        shape: tuple[int, ...],
        per_value: int,
        width: int = 32,
        blocks: int = 1,
        latents: int = 32,
        rungs: int = 0,
        channels: int = 4,
        classes: int | None = None,
    ) -> None:
        super().__init__()
        self.shape, self.per_value, self.classes, self.rungs = shape, per_value, classes, rungs
        self.patch = 2 if max(shape[1:]) > LARGE else 1
        self.sides = [tuple(-(-side // self.patch) for side in shape[1:])]
        while max(self.sides[-1]) > SMALLEST:
            self.sides.append(tuple(-(-side // 2) for side in self.sides[-1]))
        widths = [width, *[2 * width] * (len(self.sides) - 1)]
        top = (widths[-1], *self.sides[-1])
        self.groups = [(latents,), *((channels, *side) for side in reversed(self.sides) for _ in range(rungs))]

        self.enter = _wide(shape[0] * self.patch**2, width)
        self.up = nn.ModuleList(_stack(E, blocks) for E in widths)
        self.change = nn.ModuleList(_narrow(above, below) for above, below in pairwise(widths))
        self.label = _Label(classes, widths[-1]) if classes else None
        self.infer_top = zeroed(nn.Linear(math.prod(top), 2 * latents))
        self.start = nn.Parameter(torch.zeros(top))
        self.into_top = nn.Linear(latents, math.prod(top))
        down = list(reversed(widths))
        self.steps = nn.ModuleList(_Rung(_narrow, E, channels) for E in down for _ in range(rungs))
        self.after = nn.ModuleList(_stack(E, 1) for E in down for _ in range(rungs))
        self.down = nn.ModuleList(_stack(E, blocks) for E in down)
        self.grow = nn.ModuleList(_narrow(above, below) for above, below in pairwise(down))
        self.leave = zeroed(_wide(width, per_value * shape[0] * self.patch**2))
        self.to(memory_format=torch.channels_last)  # type: ignore[call-overload]

    def features(self, x: Tensor, labels: Tensor | None = None) -> list[Tensor]:
        (height, across), (_, H, W) = self.sides[0], self.shape
        x = F.pad(x, (0, across * self.patch - W, 0, height * self.patch - H))
        h = F.pixel_unshuffle(x, self.patch)
        h, found = self.enter(h.contiguous(memory_format=torch.channels_last)), []
        for side, up in enumerate(self.up):
            if side:
                h = F.avg_pool2d(self.change[side - 1](h), 2, ceil_mode=True)
            h = up(h)
            found.append(h)
        if self.label:
            found[-1] = h + self.label(len(x), labels)[:, :, None, None]
        return found

    def posterior(self, group: int, h: Tensor, features: list[Tensor]) -> Tensor:
        if group == 0:
            out: Tensor = self.infer_top(F.silu(features[-1]).flatten(1))
            return out
        side = len(self.sides) - 1 - (group - 1) // self.rungs
        return _rung(self.steps, group).posterior(h, features[side])

    def descend(self, choose: Choose, n: int, labels: Tensor | None = None) -> Tensor:
        h = self.start.expand(n, *self.start.shape)
        if self.label:
            h = h + self.label(n, labels)[:, :, None, None]
        h = h + self.into_top(choose(0, h)).view_as(h)
        h = h.contiguous(memory_format=torch.channels_last)
        for level, (side, down) in enumerate(zip(reversed(self.sides), self.down, strict=True)):
            if level:
                h = F.interpolate(self.grow[level - 1](h), size=side, mode="nearest")
            for rung in range(level * self.rungs, (level + 1) * self.rungs):
                h = self.after[rung](self.steps[rung](h, choose(rung + 1, h)))
            h = down(h)
        out, (_, H, W) = F.pixel_shuffle(self.leave(F.silu(h)), self.patch), self.shape
        return out[..., :H, :W].reshape(n, self.per_value, *self.shape)


def _stack(width: int, blocks: int) -> nn.Module:
    return nn.Sequential(*(_Residual(_wide(width, width), _wide(width, width), False) for _ in range(blocks)))


@final
class MLPLadder(Ladder):
    """For vectors: residual layers, flattened inside. A network whose branches are zero, as all begin, is linear.

    Args:
        shape: of one example.
        per_value: P.
        width: hidden features.
        blocks: residual layers on the way up, and below each group on the way down.
        latents: of each group.
        rungs: groups of latents below the top.
        classes: that labels may name; None without labels.

    Example:
        >>> net = MLPLadder((5,), 1, width=16, latents=3, rungs=2)
        >>> net.groups, net.generate(torch.zeros(2, net.latents)).shape
        ([(3,), (3,), (3,)], torch.Size([2, 1, 5]))
    """

    def __init__(
        self,
        shape: tuple[int, ...],
        per_value: int,
        width: int = 256,
        blocks: int = 2,
        latents: int = 8,
        rungs: int = 0,
        classes: int | None = None,
    ) -> None:
        super().__init__()
        self.shape, self.per_value, self.classes = shape, per_value, classes
        dims = math.prod(shape)
        self.groups = [(latents,)] * (1 + rungs)
        self.enter = nn.Linear(dims, width)
        self.up = _layers(width, blocks)
        self.label = _Label(classes, width) if classes else None
        self.infer_top = zeroed(nn.Linear(width, 2 * latents))
        self.start = nn.Parameter(torch.zeros(width))
        self.into_top = nn.Linear(latents, width)
        self.steps = nn.ModuleList(_Rung(nn.Linear, width, latents) for _ in range(rungs))
        self.down = nn.ModuleList(_layers(width, blocks) for _ in range(1 + rungs))
        self.leave = zeroed(nn.Linear(width, dims * per_value))

    def features(self, x: Tensor, labels: Tensor | None = None) -> list[Tensor]:
        h = self.enter(x.flatten(1))
        if self.label:
            h = h + self.label(len(x), labels)
        return [self.up(h)]

    def posterior(self, group: int, h: Tensor, features: list[Tensor]) -> Tensor:
        out: Tensor = _rung(self.steps, group).posterior(h, features[0]) if group else self.infer_top(features[0])
        return out

    def descend(self, choose: Choose, n: int, labels: Tensor | None = None) -> Tensor:
        h = self.start.expand(n, -1)
        if self.label:
            h = h + self.label(n, labels)
        h = self.down[0](h + self.into_top(choose(0, h)))
        for rung, step in enumerate(self.steps, 1):
            h = self.down[rung](step(h, choose(rung, h)))
        out: Tensor = self.leave(h)
        return out.view(n, self.per_value, *self.shape)


def _layers(width: int, blocks: int) -> nn.Module:
    return nn.Sequential(*(_Residual(nn.Linear(width, width), nn.Linear(width, width), True) for _ in range(blocks)))


def network(
    shape: tuple[int, ...],
    per_value: int,
    *,
    width: int,
    blocks: int,
    latents: int,
    rungs: int,
    channels: int,
    classes: int | None,
) -> Ladder:
    """The network for examples of this shape: convolutions for what has channels and two sides, layers for the rest."""
    if len(shape) == 3:
        return ConvLadder(shape, per_value, width, blocks, latents, rungs, channels, classes)
    return MLPLadder(shape, per_value, width, blocks, latents, rungs, classes)
