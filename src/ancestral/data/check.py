"""What is in a set of data, and what may be wrong with it: the record that `ancestral data check --json` prints.

Renew the published schema with: python -m ancestral.data.check > docs/data-check.schema.json
"""

import json
from collections import Counter
from collections.abc import Sequence
from typing import Literal

import numpy as np
import torch
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor
from torch.nn import functional as F

from ancestral.data.dataset import Data, File, content_key, printable
from ancestral.data.facts import is_image

THUMBNAIL = 8  # pixels of a side
BITS = 3  # in which the perceptual hashes of near duplicates may differ, of 64
APART = 0.03  # of the range, by which their thumbnails may differ on average
SAME = 0.98  # correlation of the grey pixels of near duplicates, at least
NEIGHBOURS = 8  # in the order of the hashes, with which each is compared
CHUNK = 4096  # examples at a time
LISTED = 20  # names in a list of the record
FAR = 20.0  # standard deviations from the mean
MANY = 0.01  # of the examples
UNEVEN = 10.0  # times as many in the largest class as in the smallest


class Record(BaseModel):
    """A frozen part of the record; a key it does not have is an error."""

    model_config = ConfigDict(frozen=True, extra="forbid")


class Duplicates(Record):
    """Examples that are there more than once.

    `exact` counts those equal to an earlier one; `near` those that only look like one (images: found by a perceptual
    hash of a thumbnail of 8x8, confirmed by a correlation of grey pixels above 0.98; null if not looked for).
    `exact_across` and `near_across` count the held-out ones among them that are like one to learn from. `pairs` names
    some, those across the split first.
    """

    exact: int = Field(ge=0)
    near: int | None = Field(ge=0)
    exact_across: int = Field(ge=0)
    near_across: int | None = Field(ge=0)
    pairs: list[tuple[str, str]]


class Suggestion(Record):
    """What to begin with here: a side for images, a recipe, its steps, and how long they take on this machine."""

    size: int | None = Field(ge=1)
    recipe: str
    parameters: int = Field(ge=0)
    steps: int = Field(ge=1)
    batch: int = Field(ge=1)
    seconds_per_step: float = Field(ge=0)
    minutes: float = Field(ge=0)


class Check(Record):
    """What is in a set of data. Lists of names hold at most 20; `problems` are sentences, empty if nothing is wrong.

    `sizes` and `modes` count files as they are, before they are brought to one size; `shape` is that of an example.
    `constant` names examples of one value or one colour; `constant_features`, `discrete_features` (fewer different
    values than a hundredth of the rows) and `outliers` (how many values lie 20 standard deviations from the mean) are
    of real-valued vectors.
    """

    name: str
    source: str
    kind: Literal["images", "vectors", "arrays"]
    shape: tuple[int, ...]
    levels: int | None
    levels_used: int | None
    minimum: float
    maximum: float
    n_train: int = Field(ge=0)
    n_held_out: int = Field(ge=0)
    skipped: int = Field(ge=0)
    unreadable: list[str]
    sizes: dict[str, int]
    modes: dict[str, int]
    classes: dict[str, int] | None
    duplicates: Duplicates
    n_constant: int = Field(ge=0)
    constant: list[str]
    constant_features: list[str]
    discrete_features: list[str]
    outliers: dict[str, int]
    notes: list[str]
    problems: list[str]
    suggestion: Suggestion | None = None


def check(data: Data, *, near: bool = True) -> Check:
    """Look at every example once, and at pairs that may be duplicates.

    Args:
        data: what was read.
        near: look for images that are nearly copies too, which takes the most time.

    Example:
        >>> from ancestral.data import load
        >>> found = check(load("digits"))
        >>> found.levels_used, found.duplicates.exact, found.classes["0"], found.problems
        (17, 0, 178, [])
    """
    facts, files = data.facts, [*(data.train_files or ()), *(data.held_out_files or ())]
    names = _names(files, facts.n_train, facts.n_held_out)
    vectors = len(facts.shape) == 1 and facts.levels is None
    features = facts.features or tuple(f"feature {k + 1}" for k in range(facts.dims))
    constant = _constant(data.train), _constant(data.held_out)
    constants = [names[k] for k in np.flatnonzero(np.concatenate(constant))] if facts.dims > 1 else []
    low, high, used = _range(data)
    found = Check(
        name=facts.name,
        source=printable(facts.source),
        kind="images" if facts.is_image else "vectors" if len(facts.shape) == 1 else "arrays",
        shape=facts.shape,
        levels=facts.levels,
        levels_used=used,
        minimum=low,
        maximum=high,
        n_train=facts.n_train,
        n_held_out=facts.n_held_out,
        skipped=facts.skipped,
        unreadable=list(data.bad[:LISTED]),
        sizes=dict(Counter(f"{file.width}x{file.height}" for file in files if file.width).most_common(LISTED)),
        modes=dict(Counter(file.mode for file in files if file.mode).most_common()),
        classes=_balance(data),
        duplicates=_duplicates(data, names, near and facts.is_image),
        n_constant=len(constants),
        constant=constants[:LISTED],
        notes=list(data.notes),
        problems=[],
        **(_columns(data.train, features) if vectors else NO_COLUMNS),
    )
    return found.model_copy(update={"problems": _problems(found)})


NO_COLUMNS: dict[str, object] = {"constant_features": [], "discrete_features": [], "outliers": {}}


def _problems(found: Check) -> list[str]:
    """Sentences about what is probably not as it was meant to be."""
    n, copies, said = found.n_train + found.n_held_out, found.duplicates, []
    if found.skipped:
        said.append(f"{found.skipped:,} could not be read (first {found.unreadable[0]})")
    across = copies.exact_across + (copies.near_across or 0)
    if copies.exact_across or across > MANY * found.n_held_out:
        said.append(f"{across:,} held-out examples are copies of ones to learn from (such as {_pair(copies)})")
    elif copies.exact + (copies.near or 0) > MANY * n:
        near = f" and {copies.near:,} nearly" if copies.near else ""
        said.append(f"{copies.exact:,} of {n:,} are exactly{near} copies of others (such as {_pair(copies)})")
    if found.n_constant:
        said.append(f"{found.n_constant:,} hold one value or colour throughout (first {found.constant[0]})")
    if found.constant_features:
        said.append(f"columns of one value: {', '.join(found.constant_features)}")
    if found.outliers:
        worst = ", ".join(f"{name} ({count:,})" for name, count in found.outliers.items())
        said.append(f"values {FAR:g} standard deviations from the mean: {worst}")
    if found.discrete_features:
        said.append(f"few different values, so that nats say little: {', '.join(found.discrete_features)}")
    if found.levels is not None and found.levels_used == 1:
        said.append("all examples hold one and the same value")
    if found.classes:
        most, least = (
            max(found.classes, key=found.classes.__getitem__),
            min(found.classes, key=found.classes.__getitem__),
        )
        if found.classes[most] > UNEVEN * found.classes[least]:
            said.append(
                f"classes are uneven: {found.classes[most]:,} of {most!r} and {found.classes[least]:,} of {least!r}"
            )
    return said


def _pair(copies: Duplicates) -> str:
    return " and ".join(copies.pairs[0])


def _names(files: Sequence[File], n_train: int, n_held_out: int) -> list[str]:
    """What to call each example: its file, or its place on its side of the split."""
    if files:
        return [printable(file.name) for file in files]
    return [*(f"train {k}" for k in range(n_train)), *(f"held-out {k}" for k in range(n_held_out))]


def _constant(x: Tensor) -> NDArray[np.bool_]:
    """Which examples hold one value throughout, or images one colour."""
    flat = x.flatten(2) if is_image(x.shape[1:]) else x.reshape(len(x), 1, -1)
    return np.concatenate([(part == part[..., :1]).all(2).all(1).numpy() for part in torch.split(flat, CHUNK)])


def _range(data: Data) -> tuple[float, float, int | None]:
    """Lowest and highest value, and how many levels occur."""
    sides = (data.train, data.held_out)
    low, high = min(float(x.min()) for x in sides), max(float(x.max()) for x in sides)
    if data.facts.levels is None:
        return low, high, None
    counts = sum(torch.bincount(x.reshape(-1).long(), minlength=data.facts.levels) for x in _parts(sides))
    return low, high, int((torch.as_tensor(counts) > 0).sum())


def _parts(sides: Sequence[Tensor]) -> list[Tensor]:
    return [part for x in sides for part in torch.split(x, CHUNK)]


def _balance(data: Data) -> dict[str, int] | None:
    classes, labels = data.facts.classes, [y for y in (data.train_labels, data.held_out_labels) if y is not None]
    if classes is None or not labels:
        return None
    counts = torch.cat(labels).bincount(minlength=len(classes)).tolist()
    return {name: int(count) for name, count in zip(classes, counts, strict=True)}


def _columns(train: Tensor, features: Sequence[str]) -> dict[str, object]:
    """Which columns hold one value, few values, or values far from the mean."""
    x = train.numpy().astype(np.float64)
    constant, discrete, outliers = [], [], {}
    deviations = np.abs(x - x.mean(0)) / np.where(x.std(0) > 0, x.std(0), 1)
    for k, name in enumerate(features):
        different = len(np.unique(x[:, k]))
        if different == 1:
            constant.append(name)
        elif different < MANY * len(x):
            discrete.append(name)
        if far := int((deviations[:, k] > FAR).sum()):
            outliers[name] = far
    return {
        "constant_features": constant[:LISTED],
        "discrete_features": discrete[:LISTED],
        "outliers": dict(list(outliers.items())[:LISTED]),
    }


def _duplicates(data: Data, names: Sequence[str], near: bool) -> Duplicates:
    """Copies, by content and by looks."""
    sides = (data.train, data.held_out)
    keys = np.array([content_key(example) for x in sides for example in x.numpy()], dtype=np.uint64)
    _, first, inverse = np.unique(keys, return_index=True, return_inverse=True)
    original = first[inverse]
    copy = original != np.arange(len(keys))
    exact = np.stack([original[copy], np.flatnonzero(copy)], axis=1)
    alike = np.zeros((0, 2), dtype=np.int64)
    if near:
        alike = _alike(torch.cat([_thumbnails(x) for x in _parts(sides)]).numpy())
        alike = alike[~copy[alike].any(axis=1)]
        alike = alike[_correlation(data, alike) > SAME]
    across = [
        pairs[(pairs[:, 0] < data.facts.n_train) & (pairs[:, 1] >= data.facts.n_train)] for pairs in (exact, alike)
    ]
    shown = dict.fromkeys((int(a), int(b)) for pairs in (*across, exact, alike) for a, b in pairs[:LISTED])
    return Duplicates(
        exact=len(exact),
        near=len(np.unique(alike[:, 1])) if near else None,
        exact_across=len(np.unique(across[0][:, 1])),
        near_across=len(np.unique(across[1][:, 1])) if near else None,
        pairs=[(names[a], names[b]) for a, b in list(shown)[:LISTED]],
    )


def _correlation(data: Data, pairs: NDArray[np.int64]) -> NDArray[np.float64]:
    """Of the grey pixels of two images, for each pair."""
    found = [np.zeros(0)]
    for part in np.array_split(pairs, 1 + len(pairs) // CHUNK):
        a, b = (_standardised(data, part[:, k]) for k in (0, 1))
        found.append((a * b).mean(axis=1))
    return np.concatenate(found)


def _standardised(data: Data, chosen: NDArray[np.int64]) -> NDArray[np.float64]:
    """Grey images of mean 0 and deviation 1, shape (N, H W), numbered through both sides."""
    learnt = chosen < data.facts.n_train
    x = np.empty((len(chosen), *data.facts.shape))
    x[learnt] = data.train[torch.from_numpy(chosen[learnt])]
    x[~learnt] = data.held_out[torch.from_numpy(chosen[~learnt] - data.facts.n_train)]
    x = x.mean(axis=1).reshape(len(x), np.prod(data.facts.shape[1:]))
    x -= x.mean(axis=1, keepdims=True)
    return x / np.maximum(x.std(axis=1, keepdims=True), 1e-6)


def _thumbnails(x: Tensor) -> Tensor:
    """Grey thumbnails, shape (N, 64), each over its own range."""
    small = F.adaptive_avg_pool2d(x.float().mean(1, keepdim=True), THUMBNAIL).flatten(1)
    low, high = small.amin(1, keepdim=True), small.amax(1, keepdim=True)
    return (small - low) / (high - low).clamp(min=1e-6)


def _alike(thumbnails: NDArray[np.float32]) -> NDArray[np.int64]:
    """Pairs of thumbnails that look alike, shape (P, 2), the earlier first.

    The perceptual hash of a thumbnail has a bit for each pixel: whether it is above the median. Hashes that differ in
    at most 3 bits agree in one of four quarters, so each is compared with its neighbours in the order of each quarter.
    """
    bits = thumbnails > np.median(thumbnails, axis=1, keepdims=True)
    contrast = thumbnails.std(axis=1) > 0
    hashes = np.packbits(bits, axis=1).view(np.uint64)[:, 0]
    found = []
    for quarter in range(4):
        turned = np.packbits(np.roll(bits, 16 * quarter, axis=1), axis=1).view(">u8")[:, 0]
        order = np.argsort(turned, kind="stable")
        for apart in range(1, NEIGHBOURS + 1):
            a, b = order[:-apart], order[apart:]
            close = np.bitwise_count(hashes[a] ^ hashes[b]) <= BITS
            a, b = a[close], b[close]
            close = (np.abs(thumbnails[a] - thumbnails[b]).mean(axis=1) < APART) & contrast[a] & contrast[b]
            found.append(np.stack([np.minimum(a, b)[close], np.maximum(a, b)[close]], axis=1))
    return np.unique(np.concatenate(found), axis=0)


if __name__ == "__main__":
    print(json.dumps(Check.model_json_schema(), indent=2))  # noqa: T201
