"""Classes of examples, as every family learns them and is asked for them.

A network of C classes knows the indices 0 to C - 1, and where it is also asked for all of them together, that is C.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from ancestral.errors import OptionError
from ancestral.protocol import Batch
from ancestral.rng import rand

UNTOLD = 0.1
"""Share of the training examples whose class the network is not told."""


def counted(classes: Sequence[str] | None, name: str, *, wanted: bool) -> int | None:
    """How many classes a network is to learn of data of this name; None if it is to learn none.

    Raises:
        OptionError: if it is to learn what the data does not have.
    """
    if wanted and not classes:
        raise OptionError(f"the network is to learn labels, but {name} has none: leave out labels=true")
    return len(classes or ()) if wanted else None


def told(batch: Batch, classes: int | None) -> Tensor | None:
    """The labels of a batch that a network of so many classes is told: all but a tenth of them; None if it knows none.

    Reference: Ho & Salimans (2022), algorithm 1: what is untold is learnt as the law of all classes together.
    """
    if batch.labels is None or classes is None:
        return None
    untold = rand((len(batch.x),), batch.rows) < UNTOLD
    return torch.where(untold.to(batch.labels.device), classes, batch.labels)


def checked(labels: Tensor, n: int, classes: int | None, *, together: bool = True) -> Tensor:
    """The labels that n examples are given, if a network of so many classes knows them.

    Args:
        labels: int64, shape (n,).
        n: examples.
        classes: C; None of a network that knows none.
        together: whether it can be asked for all classes together, as C.

    Raises:
        OptionError: if it knows no classes, or not these, or there is not one for each.
    """
    if classes is None:
        raise OptionError("received labels, but this model was trained without: its network takes labels=true")
    if labels.shape != (n,):
        raise OptionError(f"received labels of shape {tuple(labels.shape)} for {n} examples: give one each")
    if n and (int(labels.min()) < 0 or int(labels.max()) >= classes + together):
        named = sorted(set(labels.tolist()))
        raise OptionError(f"received labels {named}: this model knows classes 0 to {classes - 1}")
    return labels
