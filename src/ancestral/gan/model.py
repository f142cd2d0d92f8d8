"""The adversarial family: a critic that tells examples from samples, and a generator that it has to please."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict

import torch
from torch import Tensor, nn

from ancestral.data import Facts
from ancestral.errors import OptionError, unknown
from ancestral.gan.augment import augmented
from ancestral.gan.diagnostics import collapsed, standing
from ancestral.gan.losses import GAMES, squared_gradient
from ancestral.labels import checked, counted
from ancestral.nets.critic import ImageCritic, ImageGenerator, VectorCritic, VectorGenerator
from ancestral.nets.precision import lowered
from ancestral.protocol import Batch, Player
from ancestral.rng import Rows, Seeds, rand, randn, streams

GAMMA_VECTORS, GAMMA_IMAGES = 5e-3, 1e-3
"""gamma for each number in an example: at twice the side, the same change of an image is a gradient half as long."""

AT_ONCE = 256
"""Samples made at a time."""


class GAN(nn.Module):
    """A generator of data with the given facts, and its critic.

    Grey or colour images have convolutional networks, anything else is taken as a vector.

    Args:
        facts: of the data: shape, levels, scale, classes.
        loss: what the players minimise, a key of `losses.GAMES`: "relativistic", or "classic", which is unstable.
        gamma: weight of the penalties on the critic's gradients; None for `GAMMA_VECTORS` or `GAMMA_IMAGES` times the
            numbers in an example in the relativistic game, and 0 in the classic one.
        latent: dimensions of the noise that a sample is made of; None for those of a vector, and 64 for an image.
        width: features of the networks, 128 by default, or channels at the full size of an image, 32.
        depth: residual layers, 4 by default, or blocks at each size of an image, 1.
        pac: examples that the critic judges together, as one, so that it sees when they are alike.
        augment: whether the critic sees images through random changes, for few examples.
        classes: whether to learn the law of each class.
        precision: what training on images multiplies with: "float32", "bfloat16" (weights and scores stay float32), or
            "auto": bfloat16 where the hardware has it. Samples are computed as the weights are kept.

    Raises:
        OptionError: if a name is unknown, a number out of range, or the data is not of the kind that an option needs.

    Reference: Huang et al. (2024), The GAN is dead; long live the GAN!; Lin et al. (2018), PacGAN, for `pac`.

    Example:
        >>> from ancestral.data import load
        >>> model = GAN(load("ring-8").facts)
        >>> model.sample(5).shape
        torch.Size([5, 2])
    """

    def __init__(
        self,
        facts: Facts,
        *,
        loss: str = "relativistic",
        gamma: float | None = None,
        latent: int | None = None,
        width: int | None = None,
        depth: int | None = None,
        pac: int = 1,
        augment: bool = False,
        classes: bool = False,
        precision: str = "auto",
    ) -> None:
        super().__init__()
        self.lowered = lowered(precision) and facts.is_image
        if loss not in GAMES:
            raise unknown("loss", loss, GAMES)
        if gamma is not None and not 0 <= gamma < float("inf"):
            raise OptionError(f"received gamma={gamma}: the weight of a penalty is at least 0")
        if pac < 1:
            raise OptionError(f"received pac={pac}: the critic judges at least 1 example at a time")
        if pac > 1 and (classes or augment):
            raise OptionError(f"received pac={pac} with classes or augment: packs are for plain examples, give pac=1")
        if augment and not facts.is_image:
            raise OptionError(f"received augment=True for examples of shape {facts.shape}: it changes images alone")
        self.facts, self.game, self.pac, self.augment = facts, GAMES[loss], pac, augment
        per_number = (GAMMA_IMAGES if facts.is_image else GAMMA_VECTORS) * self.game.penalised
        self.gamma = per_number * facts.dims if gamma is None else gamma
        self.classes = counted(facts.classes, facts.name, wanted=classes)
        packed_shape = (pac * facts.shape[0], *facts.shape[1:])
        if facts.is_image:
            self.latent, width, depth = latent or 64, width or 32, depth or 1
            self.critic: nn.Module = ImageCritic(packed_shape, width, depth, classes=self.classes)
            self.generator: nn.Module = ImageGenerator(facts.shape, self.latent, width, depth, classes=self.classes)
        else:
            self.latent, width, depth = latent or min(facts.dims, 64), width or 128, depth or 4
            self.critic = VectorCritic(packed_shape, width, depth, classes=self.classes)
            self.generator = VectorGenerator(facts.shape, self.latent, width, depth, classes=self.classes)

    @property
    def device(self) -> torch.device:
        """Where the networks compute. Data and samples in the user's units are on the CPU."""
        return next((parameter.device for parameter in self.parameters()), torch.device("cpu"))

    def players(self) -> Mapping[str, Player]:
        """The critic, which moves first and is as good as it gets when the generator answers, and the generator."""
        return {
            "critic": Player(self.critic, self.critic_loss),
            "generator": Player(self.generator, self.generator_loss),
        }

    def critic_loss(self, batch: Batch) -> Tensor:
        """What the critic minimises, see `losses`; the generator is given no gradient.

        Where no gradients are asked for, it is the loss of the game alone, without the penalty that is made of them.
        """
        with torch.no_grad():
            fake = self._seen(self._generated(batch), batch.rows)
            real = self._seen(batch.x, batch.rows)
        labels = self._told(batch)
        if self.gamma == 0 or not torch.is_grad_enabled():
            return self.game.critic(self._scores(real, labels), self._scores(fake, labels))
        both = None if labels is None else torch.cat([labels, labels])
        scores, squares = squared_gradient(lambda x: self._scores(x, both), torch.cat([real, fake]))
        return self.game.critic(*scores.chunk(2)) + self.gamma * squares.mean()

    def generator_loss(self, batch: Batch) -> Tensor:
        """What the generator minimises, see `losses`; the critic is given no gradient."""
        labels = self._told(batch)
        with _still(self.critic):
            fake = self._scores(self._seen(self._generated(batch), batch.rows), labels)
            with torch.no_grad():
                real = self._scores(self._seen(batch.x, batch.rows), labels)
            return self.game.generator(real, fake)

    def sample(self, n: int, *, rng: Seeds = 0, start: int = 0, labels: Tensor | None = None) -> Tensor:
        """n examples in the data's own units: integer levels, or real values. Example i has stream (rng, start + i).

        A model that knows classes draws from those of `labels`, int64, shape (n,), or from each as often as the data.

        Raises:
            OptionError: if the model knows no classes, or not these.
        """
        each = streams(rng, n, start=start)
        z = randn((n, self.latent), each)
        if labels is not None:
            checked(labels, n, self.classes, together=False)
        elif self.classes:
            labels = self._classes(rand((n,), each))
        parts = []
        with torch.no_grad():
            for first in range(0, n, AT_ONCE):
                rows = slice(first, first + AT_ONCE)
                told = None if labels is None else labels[rows].to(self.device)
                parts.append(self.facts.to_raw(self.generator(z[rows].to(self.device), told).cpu()))
        return torch.cat(parts)

    def standing(self, batch: Batch, held_out: Tensor) -> Mapping[str, float]:
        """How the game stands on a batch and on held-out examples in the model's units; see `diagnostics.standing`."""
        with torch.no_grad():
            fake = self.generator(*self._made(batch))
        found = standing(lambda x: self.critic(packed(x, self.pac)), batch.x, fake, held_out, batch.labels)
        return {name: value for name, value in asdict(found).items() if value is not None}

    def check(self, batch: Batch) -> str | None:
        """Why the generator has collapsed, on samples made beside a batch, or None; see `diagnostics.collapsed`."""
        with torch.no_grad():
            fake = self.generator(*self._made(batch))
        if not bool(fake.isfinite().all()):
            return "its samples are not finite"
        return collapsed(fake, batch.x)

    def _generated(self, batch: Batch) -> Tensor:
        """Samples for training, as many as the batch has examples."""
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.lowered):
            fake: Tensor = self.generator(*self._made(batch))
        return fake.to(batch.x)

    def _scores(self, x: Tensor, labels: Tensor | None) -> Tensor:
        """What the critic gives in training."""
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.lowered):
            scores: Tensor = self.critic(x, labels)
        return scores

    def _made(self, batch: Batch) -> tuple[Tensor, Tensor | None]:
        """What as many samples as the batch has examples are made of: latents and, of the same classes, labels."""
        z = randn((len(batch.x), self.latent), batch.rows).to(self.device)
        if self.classes and batch.labels is None:
            return z, self._classes(rand((len(z),), batch.rows)).to(self.device)
        return z, self._told(batch)

    def _classes(self, u: Tensor) -> Tensor:
        """The class of each uniform number: as often as the data have it, or all alike where they do not say."""
        counts = torch.tensor(self.facts.class_counts or [1] * (self.classes or 1), dtype=torch.float64)
        return torch.searchsorted(counts.cumsum(0) / counts.sum(), u.double(), right=True)

    def _told(self, batch: Batch) -> Tensor | None:
        """The labels that the critic is told."""
        return batch.labels if self.classes else None

    def _seen(self, x: Tensor, rows: Rows) -> Tensor:
        """Examples in the model's units as the critic sees them."""
        return packed(augmented(x, rows) if self.augment else x, self.pac)


def packed(x: Tensor, pac: int) -> Tensor:
    """Every `pac` consecutive examples as one, along their first axis; the first ones again to fill the last.

    Reference: Lin et al. (2018), PacGAN, section 3.

    Example:
        >>> packed(torch.arange(6).reshape(3, 2), 2)
        tensor([[0, 1, 2, 3],
                [4, 5, 0, 1]])
    """
    if pac == 1:
        return x
    packs = -(-len(x) // pac)
    return x[torch.arange(packs * pac) % len(x)].reshape(packs, pac * x.shape[1], *x.shape[2:])


@contextmanager
def _still(module: nn.Module) -> Iterator[None]:
    """Within it a gradient passes through the module and is not gathered in its parameters."""
    learning = [parameter for parameter in module.parameters() if parameter.requires_grad]
    for parameter in learning:
        parameter.requires_grad_(False)
    try:
        yield
    finally:
        for parameter in learning:
            parameter.requires_grad_(True)
