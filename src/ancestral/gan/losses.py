"""What the two players of a game minimise, on the critic's scores of real and of made examples.

    game           critic                                            generator
    relativistic   softplus(-(D(x) - D(G(z)))) + gamma/2 (R1 + R2)   softplus(-(D(G(z)) - D(x)))
    classic        softplus(-D(x)) + softplus(D(G(z)))               softplus(-D(G(z)))

with R1 = ||grad_x D(x)||^2 and R2 = ||grad D(G(z))||^2. At equilibrium the scores are constant. Near it the players of
the classic game go round each other and those of the other one, with its penalties, come closer at every step.

Reference: Jolicoeur-Martineau (2019), eq. 4; Huang et al. (2024), eqs. 3-6; Mescheder et al. (2018), eqs. 9 and 10, for
the penalties, and section 2 for the classic game, which is Goodfellow et al. (2014), section 3.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F


@dataclass(frozen=True)
class Game:
    """What the players minimise, and whether the critic's gradients are penalised unless told otherwise.

    Attributes:
        critic: (scores of reals, scores of fakes), shape (B,) each -> scalar.
        generator: the same.
        penalised: whether gamma has a rule; else it is 0.
    """

    critic: Callable[[Tensor, Tensor], Tensor]
    generator: Callable[[Tensor, Tensor], Tensor]
    penalised: bool


def relativistic_critic(real: Tensor, fake: Tensor) -> Tensor:
    """softplus(-(D(x) - D(G(z)))), mean over pairs.

    Example:
        >>> relativistic_critic(torch.zeros(2), torch.zeros(2)).item() == torch.tensor(2.0).log().item()
        True
    """
    return F.softplus(fake - real).mean()


def relativistic_generator(real: Tensor, fake: Tensor) -> Tensor:
    """softplus(-(D(G(z)) - D(x))), mean over pairs."""
    return F.softplus(real - fake).mean()


def classic_critic(real: Tensor, fake: Tensor) -> Tensor:
    """softplus(-D(x)) + softplus(D(G(z))): the cross-entropy of telling reals from fakes, mean over each."""
    return F.softplus(-real).mean() + F.softplus(fake).mean()


def classic_generator(real: Tensor, fake: Tensor) -> Tensor:
    """softplus(-D(G(z))), the loss that does not saturate where fakes are told from reals; reals do not matter."""
    return F.softplus(-fake).mean()


GAMES = {
    "relativistic": Game(relativistic_critic, relativistic_generator, penalised=True),
    "classic": Game(classic_critic, classic_generator, penalised=False),
}
"""Games by name."""


def squared_gradient(critic: Callable[[Tensor], Tensor], x: Tensor) -> tuple[Tensor, Tensor]:
    """The scores D(x) and ||grad_x D(x)||^2 of each, both differentiable in the critic's weights.

    Args:
        critic: (B, ...) -> (B,), each score a function of its own example alone.
        x: examples, shape (B, ...).

    Returns:
        Scores and squared norms, the latter summed over all numbers of an example; shape (B,) each.

    Example:
        >>> squared_gradient(lambda x: 3 * x[:, 0], torch.zeros(2, 5))[1]
        tensor([9., 9.])
    """
    with torch.enable_grad():
        x = x.detach().requires_grad_()
        scores = critic(x)
        (gradient,) = torch.autograd.grad(scores.sum(), x, create_graph=True)
        return scores, gradient.square().flatten(1).sum(1)
