"""A small network trained on a data set's own training split, so that distances between features mean something there.

With labels it learns to tell the classes, and features are what it tells them from. Without, it learns to give two
changed copies of an example features that are alike, while features vary over examples and do not repeat each other:

    25 mean |z - z'|^2 / E + 25 mean_i relu(1 - sd z_i) + sum_{i != j} Cov(z)_ij^2 / E,   and the same of z'

It is trained once for a data set and a seed, and kept: in the folder that ANCESTRAL_CACHE names, else in `ancestral`
under XDG_CACHE_HOME or ~/.cache. Nothing is downloaded.

Reference: Bardes, Ponce & LeCun (2022), VICReg, section 4, for what is learnt without labels.
"""

import hashlib
import json
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from filelock import FileLock
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn import functional as F

from ancestral.data import Data
from ancestral.errors import OptionError
from ancestral.gan.augment import augmented
from ancestral.nets.encoder import ImageEncoder, VectorEncoder
from ancestral.rng import Rows, randn, stream
from ancestral.training import durable

FEATURES = 64
"""E."""

STEPS = 600
BATCH = 128
RATE = 2e-3
"""Of Adam, falling to nothing along a cosine."""

NOISE = 0.25
"""Deviation of the noise that changes a copy, in the model's units."""

PROJECTED = 128
"""Dimensions of z, a layer above the features, that exists while there are no labels to learn from."""

EDITION = 1
"""To be raised when what is learnt changes, so that nothing older is taken for it."""

WEIGHTS, ABOUT = "weights.safetensors", "encoder.json"


@dataclass(frozen=True, eq=False)
class Encoder:
    """A trained encoder.

    Attributes:
        body: from examples in the model's units to features.
        head: from features, through the rectifier, to a logit for each class, or to z.
        labelled: whether it learnt from labels, so that `head` tells classes.
    """

    body: nn.Module
    head: nn.Module
    labelled: bool


def trained(data: Data, *, seed: int = 0, folder: Path | None = None) -> Encoder:
    """The encoder of a data set: read from where it is kept, or trained and put there.

    Args:
        data: whose training split is learnt from.
        seed: of the weights, the batches and the changes.
        folder: where encoders are kept; by default as the module says.

    Raises:
        OptionError: if the folder cannot be written to.
        NoSpace: if the disk is full.
    """
    folder = folder or kept_in()
    path = folder / "encoders" / key(data, seed)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(path.with_suffix(".lock")):
            if durable.fault(path, {WEIGHTS, ABOUT}) is not None:
                _keep(path, fit(data, seed=seed), data, seed)
    except PermissionError:
        raise OptionError(
            f"{folder}: cannot be written to, and encoders are kept there: name another folder in ANCESTRAL_CACHE"
        ) from None
    encoder = untrained(data, seed)
    _joined(encoder).load_state_dict(load_file(path / WEIGHTS))
    return encoder


def kept_in() -> Path:
    """The folder in which encoders are kept."""
    own, shared = os.environ.get("ANCESTRAL_CACHE"), os.environ.get("XDG_CACHE_HOME")
    return Path(own) if own else (Path(shared) if shared else Path.home() / ".cache") / "ancestral"


def key(data: Data, seed: int) -> str:
    """What an encoder is kept under: a hash of the data, the seed and everything here that decides the weights.

    Example:
        >>> from ancestral.data import load
        >>> len(key(load("digits"), 0))
        32
    """
    parts = [data.facts.digest, data.facts.scale.model_dump_json(), seed, EDITION, FEATURES, STEPS, BATCH, RATE, NOISE]
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:32]


def untrained(data: Data, seed: int) -> Encoder:
    """The encoder for data of this shape and these classes, initialised from the seed."""
    classes = data.facts.classes if data.train_labels is not None else None
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        network = ImageEncoder if data.facts.is_image else VectorEncoder
        body = network(data.facts.shape, FEATURES)
        head = nn.Sequential(nn.ReLU(), nn.Linear(FEATURES, len(classes) if classes else PROJECTED))
    return Encoder(body.eval(), head.eval(), bool(classes))


def fit(data: Data, *, seed: int = 0) -> Encoder:
    """The encoder trained on the training split: `STEPS` steps of Adam, the same for the same seed.

    Reference: Kingma & Ba (2015) for Adam; Loshchilov & Hutter (2017) for the cosine.
    """
    encoder = untrained(data, seed)
    parameters = [*encoder.body.parameters(), *encoder.head.parameters()]
    optimiser = torch.optim.Adam(parameters, lr=RATE)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimiser, STEPS)
    for step in range(STEPS):
        rows = torch.from_numpy(stream(seed, step).integers(len(data.train), size=BATCH))
        x = data.batch(rows)
        if data.train_labels is not None and encoder.labelled:
            loss = F.cross_entropy(encoder.head(encoder.body(x)), data.train_labels[rows])
        else:
            changed = _changed_image if data.facts.is_image else _changed_vector
            loss = vicreg(*(encoder.head(encoder.body(changed(x, Rows((seed, step, i), BATCH)))) for i in range(2)))
        optimiser.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        optimiser.step()
        schedule.step()
    return encoder


def vicreg(z: Tensor, other: Tensor) -> Tensor:
    """What makes two sets of features alike, varied, and without repetition: see the module.

    Args:
        z: of one changed copy of each example, shape (B, E).
        other: of another, same shape.

    Example:
        >>> z = torch.tensor([[2.0, 0.0], [-2.0, 0.0], [0.0, 2.0], [0.0, -2.0]])
        >>> vicreg(z, z).item()
        0.0
    """
    alike = F.mse_loss(z, other)
    varied = sum((F.relu(1 - (each.var(0) + 1e-4).sqrt()).mean() for each in (z, other)), torch.zeros(()))
    covariances = [each.T.cov().fill_diagonal_(0) for each in (z, other)]
    repeated = sum((cov.square().sum() / z.shape[1] for cov in covariances), torch.zeros(()))
    return 25 * alike + 25 * varied + repeated


def _changed_image(x: Tensor, rng: Rows) -> Tensor:
    return augmented(x, rng)


def _changed_vector(x: Tensor, rng: Rows) -> Tensor:
    return x + NOISE * randn(x.shape, rng)


def _joined(encoder: Encoder) -> nn.Module:
    return nn.ModuleDict({"body": encoder.body, "head": encoder.head})


def _keep(path: Path, encoder: Encoder, data: Data, seed: int) -> None:
    facts = data.facts
    about = {"data": facts.name, "digest": facts.digest, "shape": facts.shape, "seed": seed, "edition": EDITION}
    files: dict[str, Callable[[Path], None]] = {
        WEIGHTS: lambda file: save_file(_joined(encoder).state_dict(), file),
        ABOUT: lambda file: _write(file, json.dumps({**about, "classes": facts.classes}, indent=2)),
    }
    durable.write_folder(path, files)


def _write(file: Path, text: str) -> None:
    file.write_text(text + "\n", encoding="utf-8")
