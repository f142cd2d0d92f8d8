"""The training loop. It knows players, not families.

Batch, noise and time are functions of (seed, step), and schedules are functions of the step: nothing but weights,
their average and the optimiser's moments is carried from one step to the next.
"""

import copy
import math
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import lru_cache

import torch
from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor, nn

from ancestral.data import Data
from ancestral.errors import Diverged
from ancestral.protocol import Generative, Player
from ancestral.rng import stream

PURPOSES = {"batch": 1, "noise": 2}
"""Streams that one seed is divided into."""


class TrainingSection(BaseModel):
    """How long and how to train.

    Either `steps`, or `minutes`, which is turned into steps once, before the first one, by measuring the pace.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    steps: int | None = Field(None, ge=1)
    minutes: float | None = Field(None, gt=0, allow_inf_nan=False)
    batch: int = Field(128, ge=1)
    rate: float = Field(2e-3, gt=0)
    warmup: int = Field(100, ge=0)
    weight_decay: float = Field(0.01, ge=0)
    clip: float = Field(1.0, gt=0)
    ema: float = Field(0.05, gt=0, lt=0.28, description="length of the average of the weights, relative to the run")
    checkpoints: int = Field(4, ge=1, description="checkpoints and sample grids written along the way")


@dataclass(frozen=True)
class Record:
    """One step of training.

    Attributes:
        step: how many steps are done, from 1.
        loss: of each player that moved.
        grad_norm: before clipping, of each player that moved.
        rate: learning rate of the step.
        seconds: spent in steps so far.
    """

    step: int
    loss: Mapping[str, float]
    grad_norm: Mapping[str, float]
    rate: float
    seconds: float


class Average(nn.Module):
    """A copy of a module whose weights are averaged over training with a power function of time.

    w_t = b_t w_{t-1} + (1 - b_t) theta_t,   b_t = (1 - 1/t)^(gamma + 1)

    so that the average always covers the same share of the run, however long it is: `length` is the width of the
    window relative to the run.

    Reference: Karras et al. (2024), section 3.1.

    Example:
        >>> average = Average(nn.Linear(1, 1), 0.05)
        >>> round(average.gamma, 2)
        16.97
    """

    def __init__(self, module: nn.Module, length: float) -> None:
        super().__init__()
        self.module = copy.deepcopy(module).requires_grad_(False)
        self.gamma = _gamma(length)

    @torch.no_grad()
    def update(self, module: nn.Module, step: int) -> None:
        """Take in the weights after step number `step`, from 1."""
        keep = (1 - 1 / step) ** (self.gamma + 1)
        torch._foreach_lerp_(list(self.module.parameters()), list(module.parameters()), 1 - keep)


def _gamma(length: float) -> float:
    """The exponent whose window has standard deviation `length`: (g + 1)^(1/2) (g + 2)^-1 (g + 3)^(-1/2) = length."""
    low, high = 0.0, 1e6
    for _ in range(200):
        middle = (low + high) / 2
        wide = math.sqrt(middle + 1) / ((middle + 2) * math.sqrt(middle + 3)) > length
        low, high = (middle, high) if wide else (low, middle)
    return high


def rate(section: TrainingSection, step: int, total: int) -> float:
    """Learning rate of step number `step` (from 1) of `total`: a linear warm-up, then half a cosine down to zero."""
    warm = min(1.0, step / (section.warmup + 1))
    done = max(0.0, (step - section.warmup) / max(1, total - section.warmup))
    return section.rate * warm * 0.5 * (1 + math.cos(math.pi * min(1.0, done)))


def batch_indices(n: int, batch: int, seed: int, step: int) -> Tensor:
    """Which examples step number `step` (from 1) sees: successive slices of one shuffle of all n per epoch."""
    position = (step - 1) * batch + torch.arange(batch)
    epoch, within = position // n, position % n
    return torch.cat([_shuffle(n, seed, e)[within[epoch == e]] for e in range(int(epoch[0]), int(epoch[-1]) + 1)])


@lru_cache(maxsize=2)
def _shuffle(n: int, seed: int, epoch: int) -> Tensor:
    return torch.from_numpy(stream(seed, PURPOSES["batch"], epoch).permutation(n))


def steps(
    model: Generative,
    data: Data,
    section: TrainingSection,
    total: int,
    *,
    seed: int,
    averages: Mapping[str, Average] | None = None,
) -> Iterator[Record]:
    """Train, yielding a record after every step.

    Args:
        model: a family; its players move in their own order.
        data: to learn from.
        section: how.
        total: number of steps.
        seed: of batches, noise and times.
        averages: per player, averages of the weights to keep up to date.

    Raises:
        Diverged: before the optimiser moves, if a loss or a gradient is not finite.
    """
    players = model.players()
    optimisers = {name: _optimiser(player, section) for name, player in players.items()}
    seconds = 0.0
    for step in range(1, total + 1):
        began = time.perf_counter()
        x_0 = data.batch(batch_indices(len(data.train), section.batch, seed, step))
        loss, norm, lr = {}, {}, rate(section, step, total)
        for order, (name, player) in enumerate(players.items()):
            if step % player.every:
                continue
            value = player.loss(x_0, stream(seed, PURPOSES["noise"], step, order))
            optimisers[name].zero_grad(set_to_none=True)
            value.backward()  # type: ignore[no-untyped-call]
            total_norm = nn.utils.clip_grad_norm_(player.module.parameters(), section.clip, foreach=True)
            loss[name], norm[name] = float(value.detach()), float(total_norm)
            if not (math.isfinite(loss[name]) and math.isfinite(norm[name])):
                raise Diverged(
                    f"step {step}: the loss of the {name} is {loss[name]:.4g} and its gradient {norm[name]:.4g}, so "
                    f"training stopped; try a lower learning rate, such as --set training.rate={section.rate / 4:g}"
                )
            optimisers[name].param_groups[0]["lr"] = lr
            optimisers[name].step()
            if averages and name in averages:
                averages[name].update(player.module, step)
        seconds += time.perf_counter() - began
        yield Record(step, loss, norm, lr, seconds)


def _optimiser(player: Player, section: TrainingSection) -> torch.optim.Optimizer:
    return torch.optim.AdamW(
        player.module.parameters(), lr=section.rate, betas=(0.9, 0.99), weight_decay=section.weight_decay, fused=True
    )


def pace(model: Generative, data: Data, section: TrainingSection, *, seed: int, seconds: float = 4.0) -> float:
    """Seconds per step of this model on this machine, averages included, measured on a copy that is thrown away.

    The median of the steps that fit in `seconds`, after three to warm up.
    """
    scratch = copy.deepcopy(model)
    averages = {name: Average(player.module, section.ema) for name, player in scratch.players().items()}
    times: list[float] = []
    for record in steps(scratch, data, section, 10_000, seed=seed, averages=averages):
        times.append(record.seconds)
        if len(times) >= 8 and record.seconds > seconds:
            break
    return float(torch.tensor(times, dtype=torch.float64).diff()[3:].median())
