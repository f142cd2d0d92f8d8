"""The training loop. It knows players, not families.

Batch, noise and time are functions of (seed, step, row), and schedules are functions of the step: a `State` is all
that one step hands to the next. What is in it, and nothing else, has to be saved for a run to go on to the bit.
"""

import copy
import math
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import lru_cache

import torch
from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor, nn

from ancestral.data import Data
from ancestral.errors import Diverged, OptionError
from ancestral.protocol import Batch, Generative, Player
from ancestral.rng import Rows, rand, stream
from ancestral.training.average import LENGTHS, Average
from ancestral.training.processes import ALONE, Processes, apart, laid_out_as, whole

PURPOSES = {"batch": 1, "noise": 2, "flip": 3, "held out": 4}
"""Streams that one seed is divided into."""

HELD_OUT = 512
"""Examples whose loss is followed while training, at most."""


class TrainingSection(BaseModel):
    """How long and how to train.

    Either `steps`, or `minutes`, which is turned into steps once, before the first one, by measuring the pace.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    steps: int | None = Field(None, ge=1)
    minutes: float | None = Field(None, gt=0, allow_inf_nan=False)
    batch: int = Field(128, ge=1, description="examples per step, over all processes")
    accumulate: int = Field(1, ge=1, description="parts in which a process takes its share of the batch")
    rate: float = Field(2e-3, gt=0)
    warmup: int = Field(100, ge=0)
    weight_decay: float = Field(0.01, ge=0)
    betas: tuple[float, float] = Field((0.9, 0.99), description="decay of the two moments of Adam")
    clip: float = Field(1.0, gt=0)
    shard: bool = Field(False, description="leave each process a share of the weights, their averages and moments")
    flip: bool = Field(False, description="mirror half of the images left to right")
    ema: float = Field(0.05, gt=0, lt=0.28, description="length of the average of the weights, relative to the run")
    snapshots: int = Field(8, ge=0, description="averages kept along the way, from which any other is made later")
    checkpoints: int = Field(10, ge=1, description="checkpoints written along the way")
    checkpoint_every: int | None = Field(None, ge=1, description="steps between checkpoints, in place of their number")
    keep: int = Field(2, ge=1, description="checkpoints that are kept, beside the best")
    pictures: int = Field(4, ge=0, description="sample grids drawn along the way")


@dataclass(frozen=True)
class Record:
    """One step of training.

    Attributes:
        step: how many steps are done, from 1.
        loss: of each player that moved, over the whole batch.
        grad_norm: before clipping, of each player that moved.
        rate: learning rate of the step.
        seconds: spent in steps since the loop was entered.
    """

    step: int
    loss: Mapping[str, float]
    grad_norm: Mapping[str, float]
    rate: float
    seconds: float


class State:
    """What one step hands to the next: every player's weights, their averages, and the optimiser's moments.

    Args:
        model: a family; its players are trained in place.
        section: how.
        group: the processes that train together.

    Raises:
        OptionError: if the batch cannot be divided evenly among them.
    """

    def __init__(self, model: Generative, section: TrainingSection, group: Processes = ALONE) -> None:
        parts = group.count * section.accumulate
        if section.batch % parts:
            raise OptionError(
                f"a batch of {section.batch} cannot be divided evenly among {group.count} processes that take it in "
                f"{section.accumulate}: try --set training.batch={-(-section.batch // parts) * parts}"
            )
        self.section, self.group, self.players = section, group, dict(model.players())
        self.averages = {
            name: {length: Average(player.module, length) for length in sorted({section.ema, *LENGTHS})}
            for name, player in self.players.items()
        }
        divided = section.shard and group.count > 1
        if divided:
            for name, player in self.players.items():
                for module in (player.module, *(average.module for average in self.averages[name].values())):
                    group.divide(module)
        self.optimisers = {name: _optimiser(player, section) for name, player in self.players.items()}
        self.objectives = {
            name: _Objective(player) if divided else group.joined(_Objective(player))
            for name, player in self.players.items()
        }

    def tensors(self) -> dict[str, Tensor]:
        """Everything in it by name: PLAYER/weights/..., PLAYER/average-LENGTH/..., PLAYER/optimiser/INDEX/...

        Where it is divided among processes, all of them have to ask, and the first is given it.
        """
        found: dict[str, Tensor] = {}
        for name, player in self.players.items():
            found |= {f"{name}/weights/{key}": value for key, value in player.module.state_dict().items()}
            for length, average in self.averages[name].items():
                found |= {average_key(name, length) + key: value for key, value in average.module.state_dict().items()}
            for index, moments in self.optimisers[name].state_dict()["state"].items():
                found |= {f"{name}/optimiser/{index}/{key}": value for key, value in moments.items()}
        tensors: dict[str, Tensor] = {}
        for key, value in found.items():
            gathered = whole(value.detach())
            if self.group.first:
                tensors[key] = gathered
        return tensors

    def restore(self, tensors: Mapping[str, Tensor]) -> None:
        """Take in what `tensors` gave, on whatever devices, divided among whatever number of processes.

        Raises:
            KeyError, RuntimeError: if they are of another model.
        """
        for name, player in self.players.items():
            _fill(player.module, under(tensors, f"{name}/weights/"))
            for length, average in self.averages[name].items():
                _fill(average.module, under(tensors, average_key(name, length)))
            moments: dict[int, dict[str, Tensor]] = {}
            parameters = list(player.module.parameters())
            for key, value in under(tensors, f"{name}/optimiser/").items():
                index, _, moment = key.partition("/")
                own = parameters[int(index)]  # a moment lies in memory as its parameter does: fused kernels rely on it
                alike = value.ndim > 0 and value.shape == own.shape
                moments.setdefault(int(index), {})[moment] = laid_out_as(own, value) if alike else value.clone()
            groups = self.optimisers[name].state_dict()["param_groups"]
            self.optimisers[name].load_state_dict({"state": moments, "param_groups": groups})


def average_key(player: str, length: float) -> str:
    """What the names of an average's tensors begin with."""
    return f"{player}/average-{length:g}/"


def under(tensors: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    """The tensors whose names begin with the prefix, without it."""
    return {key.removeprefix(prefix): value for key, value in tensors.items() if key.startswith(prefix)}


def _fill(module: nn.Module, tensors: Mapping[str, Tensor]) -> None:
    own = module.state_dict()
    module.load_state_dict({key: laid_out_as(own[key], value) for key, value in tensors.items()})


class _Objective(nn.Module):
    """A player's loss as a module that holds what the player owns, so that processes can be joined around it."""

    def __init__(self, player: Player) -> None:
        super().__init__()
        self.module, self.loss = player.module, player.loss

    def forward(self, batch: Batch) -> Tensor:
        """The loss."""
        return self.loss(batch)


def _optimiser(player: Player, section: TrainingSection) -> torch.optim.Optimizer:
    return torch.optim.AdamW(
        player.module.parameters(),
        lr=section.rate,
        betas=section.betas,
        weight_decay=section.weight_decay,
        fused=True,
    )


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


def parts(state: State, data: Data, seed: int, step: int) -> Iterator[tuple[Tensor, Tensor | None, int, int]]:
    """This process's share of the batch of a step, in as many parts as it is taken in: x, labels, first row, last + 1.

    A part is gathered whole from the array of examples, in memory or mapped from a file.
    """
    section, group = state.section, state.group
    indices = batch_indices(len(data.train), section.batch, seed, step)
    size = section.batch // (group.count * section.accumulate)
    for part in range(section.accumulate):
        start = (group.rank * section.accumulate + part) * size
        chosen = indices[start : start + size]
        x = data.batch(chosen)
        if section.flip and data.facts.is_image:
            mirrored = rand((size,), Rows((seed, PURPOSES["flip"], step), section.batch, start, start + size)) < 0.5
            x = torch.where(mirrored[:, None, None, None], x.flip(-1), x)
        labels = None if data.train_labels is None else data.train_labels[chosen].to(group.device)
        yield x.to(group.device), labels, start, start + size


def steps(
    state: State,
    data: Data,
    total: int,
    *,
    seed: int,
    start: int = 0,
    stop: Callable[[], bool] = lambda: False,
) -> Iterator[Record]:
    """Train from step `start` to step `total`, yielding a record after every step.

    Args:
        state: after `start` steps.
        data: to learn from.
        total: number of steps of the whole run.
        seed: of batches, noise and times.
        start: steps that are done.
        stop: asked once a step; training ends after a step in which it was true in any process.

    Raises:
        Diverged: before the optimiser moves, if a loss or a gradient is not finite.
    """
    section, group, seconds = state.section, state.group, 0.0
    if group.count > 1 and start < total:
        _settle(state, data, seed)
    for step in range(start + 1, total + 1):
        began = time.perf_counter()
        shares = list(parts(state, data, seed, step))
        loss, norm, lr, halt = {}, {}, rate(section, step, total), 0.0
        for order, (name, player) in enumerate(state.players.items()):
            if step % player.every:
                continue
            objective, key, mine = state.objectives[name], (seed, PURPOSES["noise"], step, order), 0.0
            state.optimisers[name].zero_grad(set_to_none=True)
            for x, labels, first, last in shares:
                with apart(objective, last < shares[-1][-1]):
                    value = objective(Batch(x, Rows(key, section.batch, first, last), labels)) / len(shares)
                    value.backward()
                mine += float(value.detach())
            length = nn.utils.clip_grad_norm_(player.module.parameters(), section.clip, foreach=True)
            norm[name] = float(whole(length))
            loss[name], halt = group.mean([mine, float(stop())])
            if not (math.isfinite(loss[name]) and math.isfinite(norm[name])):
                raise Diverged(
                    f"step {step}: the loss of the {name} is {loss[name]:.4g} and its gradient {norm[name]:.4g}, so "
                    f"training stopped; try a lower learning rate, such as --set training.rate={section.rate / 4:g}"
                )
            state.optimisers[name].param_groups[0]["lr"] = lr
            state.optimisers[name].step()
            for average in state.averages[name].values():
                average.update(player.module, step)
        seconds += time.perf_counter() - began
        yield Record(step, loss, norm, lr, seconds)
        if halt:
            return


def _settle(state: State, data: Data, seed: int) -> None:
    """Take gradients that are thrown away: joined processes choose the order in which they add them up after the first.

    Without it a run that goes on would add its first gradients in another order than one that was not stopped.
    """
    shares = list(parts(state, data, seed, 1))
    for order, (name, player) in enumerate(state.players.items()):
        for x, labels, first, last in shares:
            with apart(state.objectives[name], last < shares[-1][-1]):
                rows = Rows((seed, PURPOSES["noise"], 1, order), state.section.batch, first, last)
                state.objectives[name](Batch(x, rows, labels)).backward()
        player.module.zero_grad(set_to_none=True)


@torch.no_grad()
def held_out_loss(model: Generative, data: Data, seed: int) -> dict[str, float]:
    """Every player's loss on the same held-out examples, times and noise each time: the first of a fixed shuffle."""
    order = torch.from_numpy(stream(0).permutation(len(data.held_out)))[:HELD_OUT]
    x, n = data.facts.scale.forward(data.held_out[order]), len(order)
    sums: dict[str, float] = {}
    for which, (name, player) in enumerate(model.players().items()):
        for first in range(0, n, 128):
            part = x[first : first + 128].to(next(player.module.parameters()).device)
            rows = Rows((seed, PURPOSES["held out"], which), n, first, first + len(part))
            sums[name] = sums.get(name, 0.0) + float(player.loss(Batch(part, rows))) * len(part) / n
    return sums


def pace(
    model: Generative, data: Data, section: TrainingSection, *, seed: int, group: Processes = ALONE, seconds: float = 4
) -> float:
    """Seconds per step of this model on this machine, averages included, measured on a copy that is thrown away.

    The median of the steps that fit in about `seconds`, after four to warm up; the same in every process. Where one
    thread of one process works, the seconds are those in which it does: other work beside it does not make them more.
    """
    one_core = group.count == 1 and group.device.type == "cpu" and torch.get_num_threads() == 1
    clock = time.process_time if one_core else time.perf_counter
    scratch = State(copy.deepcopy(model), section, group)
    warm = [clock() for _ in steps(scratch, data, 4, seed=seed)]
    more = group.told(min(500, max(5, math.ceil(seconds / (warm[3] - warm[1]) * 2))))
    times = [clock(), *(clock() for _ in steps(scratch, data, 4 + more, seed=seed, start=4))]
    return group.told(float(torch.tensor(times, dtype=torch.float64).diff().median()))
