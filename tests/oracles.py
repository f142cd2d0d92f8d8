"""What the laws are measured against: exact denoisers, posed as networks, and noise of which every moment is known."""

import torch
from torch import Tensor

from ancestral.data import Facts, Scale
from ancestral.diffusion.denoise import ROWS, ExactNetwork
from ancestral.diffusion.denoise import exact as exact
from ancestral.diffusion.model import Diffusion
from ancestral.diffusion.process import SCHEDULES, cosine
from ancestral.gaussian import LOG_2PI
from ancestral.toys import named

COMBINATIONS = [
    (schedule, predicts)
    for schedule in SCHEDULES
    for predicts in ROWS
    if not (schedule == "straight" and predicts in ("eps", "score"))
]
"""Every schedule with every parameterization that is defined on it: alpha = 0 ends the straight path."""


class FiniteSet:
    """Points y_i with probabilities w_i: the law of discrete data, with its exact posterior under noise."""

    def __init__(self, points: Tensor, weights: Tensor) -> None:
        self.points, self.weights = points.double(), weights.double()

    def posterior_mean(self, x_t: Tensor, alpha: Tensor, sigma: Tensor) -> Tensor:
        alpha, sigma = alpha.reshape(-1, 1, 1), sigma.reshape(-1, 1)
        distance = (x_t[:, None] - alpha * self.points).square().sum(2)
        return (self.weights.log() - distance / (2 * sigma.square())).softmax(1) @ self.points


def two_point(mean: float, var: float) -> tuple[Tensor, Tensor]:
    """Four pairs (x_0, eps) whose averages are exact for any quadratic of N(mean, var) and N(0, 1)."""
    sign = torch.tensor([1.0, 1.0, -1.0, -1.0], dtype=torch.float64)
    eps = torch.tensor([1.0, -1.0, 1.0, -1.0], dtype=torch.float64)
    return (mean + var**0.5 * sign)[:, None], eps[:, None]


def plain_facts(dim: int) -> Facts:
    """Facts of real-valued vectors that are already in the model's units."""
    return Facts(
        name="plain",
        source="plain",
        shape=(dim,),
        levels=None,
        scale=Scale(offset=(0.0,), factor=(1.0,)),
        classes=None,
        n_train=2,
        n_held_out=1,
        skipped=0,
        digest="",
    )


def exact_model(weighting: str, predicts: str = "v", chain: int = 100) -> Diffusion:
    """The model that training on the mixture toy would end with, given for ever."""
    process = cosine()
    net = ExactNetwork(named("mixture"), process, predicts)
    return Diffusion(net, process, plain_facts(2), predicts=predicts, weighting=weighting, chain=chain)


def squared_errors_of_the_bound(model: Diffusion, x_0: Tensor) -> Tensor:
    """(B, dim) -> (B,): L_0 + ... + L_{T-1} in nats per dimension, without the constant of L_0's normal density."""
    _, sigma_1 = model.process(1 / model.chain)
    middle = model.bound(x_0, rng=5).diffusion
    density = model.bound(x_0, rng=5, variance="beta", draws=1).decoder
    return (middle + density) / x_0.shape[1] - (LOG_2PI / 2 + sigma_1.log())
