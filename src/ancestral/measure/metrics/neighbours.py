"""Distances between features and their nearest neighbours, worked on by rows."""

from collections.abc import Iterator

import torch
from torch import Tensor

from ancestral.errors import OptionError

AT_ONCE = 2**22
"""Numbers in each piece of work, 32 MiB in float64."""

ROWS = 256
"""At a time, at least: fewer would not be worth what all of the other set costs to read."""


def distance(a: Tensor, b: Tensor) -> Tensor:
    """The Euclidean distance of each of a to each of b, about the first of b so that a common offset costs no digits.

    Args:
        a: features, shape (c, D).
        b: features, shape (m, D); copied a piece at a time, as `torch.cdist` copies what it is given.

    Example:
        >>> distance(torch.tensor([[0.0]]), torch.tensor([[3.0], [4.0]]))
        tensor([[3., 4.]])
    """
    pieces = torch.split(b, max(1, AT_ONCE // b.shape[1]))
    return torch.cat([torch.cdist(a - b[:1], piece - b[:1]) for piece in pieces], 1)


def by_rows(x: Tensor, y: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    """Indices of some rows of x, and their distances to every row of y, shapes (c,) and (c, m).

    Raises:
        OptionError: if the sets are of different dimensions.

    Example:
        >>> x = torch.tensor([[0.0], [3.0]])
        >>> next(by_rows(x, x))[1]
        tensor([[0., 3.],
                [3., 0.]])
    """
    if x.ndim != 2 or y.ndim != 2 or x.shape[1] != y.shape[1]:
        raise OptionError(f"received features of shape {tuple(x.shape)} and {tuple(y.shape)}: give (n, D) and (m, D)")
    for rows in torch.split(torch.arange(len(x)), max(ROWS, AT_ONCE // max(len(y), x.shape[1]))):
        yield rows, distance(x[rows], y)


def nearest(x: Tensor, y: Tensor | None = None, *, k: int = 1) -> tuple[Tensor, Tensor]:
    """The k nearest examples of y to each of x: their distances, nearest first, and their indices, shape (n, k) each.

    Found by inner products, and measured again by differences, so that equal examples are at distance 0.

    Args:
        x: features, float64, shape (n, D).
        y: features, shape (m, D); without them, the neighbours are other examples of x.
        k: how many.

    Raises:
        OptionError: if there are fewer than k to choose from, or the sets are of different dimensions.

    Example:
        >>> x = torch.tensor([[0.0], [1.0], [5.0]], dtype=torch.float64)
        >>> distance, index = nearest(x)
        >>> distance[:, 0].tolist(), index[:, 0].tolist()
        ([1.0, 1.0, 4.0], [1, 0, 1])
    """
    among = x if y is None else y
    others = len(among) - (y is None)
    if not 1 <= k <= others:
        raise OptionError(f"received k = {k} neighbours among {others}: give 1 to {others}")
    found, indices = [], []
    for rows, d in by_rows(x, among):
        if y is None:
            d[torch.arange(len(rows)), rows] = torch.inf
        index = d.topk(k, largest=False).indices
        exact = torch.stack([(x[rows] - among[each]).norm(dim=1) for each in index.T], 1)
        exact, order = exact.sort(1)
        found.append(exact)
        indices.append(index.gather(1, order))
    return torch.cat(found), torch.cat(indices)
