"""What a run costs, estimated before it starts, and what this disk has to spend.

Parameters, FLOPs and the activations that a gradient needs are counted on the model itself, with two examples and with
four; memory is what they come to, with factors that were measured once and lean to the high side (docs/training.md).
"""

import shutil
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from ancestral.data import Data
from ancestral.errors import OptionError
from ancestral.protocol import Batch
from ancestral.rng import Rows
from ancestral.training.average import LENGTHS
from ancestral.training.recipes import Model
from ancestral.training.settings import Setup

BASE = 400 * 2**20
"""Bytes of an interpreter with torch that has made its first step."""

TRANSIENT = 1.5
"""Peak memory of a step over what is saved for the gradient: gradients of activations, buffers of convolutions."""

COPIES = 3
"""Copies of the weights while a checkpoint is written: what a channels-last tensor takes to become contiguous."""


@dataclass(frozen=True)
class Cost:
    """What a model takes.

    Attributes:
        parameters: how many.
        flops: floating-point operations forward, per example; a training step takes three times as many.
        activation_bytes: saved for the gradient, per example.
        data_bytes: of the examples in memory.
        averages: of the weights that are kept while training.
    """

    parameters: int
    flops: int
    activation_bytes: int
    data_bytes: int
    averages: int

    def memory(self, batch: int) -> int:
        """Bytes of a process that trains with so many examples at a time: an estimate."""
        copies = 1 + 1 + 2 + self.averages + COPIES  # weights, gradients, two moments
        return int(BASE + self.data_bytes + 4 * self.parameters * copies + TRANSIENT * batch * self.activation_bytes)

    def largest_batch(self, available: int) -> int:
        """The largest batch whose estimate is within so many bytes; 0 if there is none."""
        left = available - self.memory(0)
        return max(0, int(left / (TRANSIENT * max(1, self.activation_bytes))))

    def disk(self, setup: Setup) -> int:
        """Bytes of a run directory at its largest: checkpoints that are kept, one being written, averages, the end."""
        training, weights = setup.training, 4 * self.parameters
        checkpoints = (training.keep + 2) * (1 + 1 + 2 + self.averages) * weights
        return checkpoints + training.snapshots * len(LENGTHS) * weights + weights + 2**20


def cost(model: Model, setup: Setup, data: Data) -> Cost:
    """Count what a model of this set-up takes on this data."""
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        _losses(model, data, 1)
    saved = [_saved_bytes(model, data, n) for n in (2, 4)]
    examples = (data.train, data.held_out)
    return Cost(
        parameters=sum(parameter.numel() for parameter in model.parameters()),
        flops=counter.get_total_flops(),
        activation_bytes=(saved[1] - saved[0]) // 2,
        data_bytes=0 if data.mapped else sum(tensor.numel() * tensor.element_size() for tensor in examples),
        averages=len({setup.training.ema, *LENGTHS}),
    )


def refuse_if_too_large(cost: Cost, batch: int, available: int) -> None:
    """See that a run fits.

    Args:
        cost: of the model.
        batch: examples that a process takes at a time.
        available: bytes that this process may have, those it has included.

    Raises:
        OptionError: if it does not, naming the batch that does.
    """
    if cost.memory(batch) <= available:
        return
    fits = cost.largest_batch(available)
    remedy = f"{fits} would fit: --set training.batch={fits}" if fits else "not even one fits: try a smaller preset"
    raise OptionError(
        f"training takes about {cost.memory(batch) / 2**30:.1f} GiB with {batch} examples at a time, and "
        f"{available / 2**30:.1f} GiB are to be had; {remedy}"
    )


def free_disk(path: Path) -> int:
    """Bytes free where this path is, or will be."""
    while not path.exists():
        path = path.parent
    return shutil.disk_usage(path).free


def _losses(model: Model, data: Data, n: int) -> list[Tensor]:
    """Of every player, on so many examples."""
    chosen = torch.arange(n) % len(data.train)
    labels = None if data.train_labels is None else data.train_labels[chosen].to(model.device)
    batch = Batch(data.batch(chosen).to(model.device), Rows((0,), n), labels)
    return [player.loss(batch) for player in model.players().values()]


def _saved_bytes(model: Model, data: Data, n: int) -> int:
    """Bytes that the gradient of a batch keeps, each piece of memory once."""
    pieces: dict[int, tuple[int, Tensor]] = {}

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        pieces[storage.data_ptr()] = (storage.nbytes(), tensor)  # held, so that no other is put in its place
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        _losses(model, data, n)
    return sum(size for size, _ in pieces.values())
