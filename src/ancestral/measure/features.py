"""Features of examples, in which distances are measured: by name, with a hash of what they were computed with.

    pixels       the values themselves, in the model's units
    pca          principal components of the training split, 64 at most
    encoder      what a small network sees that was trained on the training split, standardised over it: see `encoder`
    onnx:PATH    the first output of a network in a file, which is given examples in the model's units
    inception:PATH   what Inception-v3 sees, with the weights in a file: the features of FID and KID, and no others are

A distance means little without the features it was measured in and the number of samples, so both are part of how it
is told: FD[digits-encoder@1a2b3c4d, N=10000]. Nothing is downloaded.
"""

import hashlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path

import torch
from torch import Tensor

from ancestral.data import Data, Facts
from ancestral.errors import OptionError, unknown
from ancestral.measure import encoder
from ancestral.nets.inception import Inception

COMPONENTS = 64
"""Principal components, at most."""

FITTED = 2048
"""Training examples that they are fitted on, at most, evenly thinned."""

AT_ONCE = 256
"""Examples at a time."""

NAMES = ("pixels", "pca", "encoder", "onnx:PATH", "inception:PATH")

INCEPTION = "6726825d0af5f729cebd5821db510b11b1cfad8faad88a03f1befd49fb9129b2"
"""SHA-256 of the weights that FID is defined by, `pt_inception-2015-12-05-6726825d.pth`."""

SEEN = 16
"""Images that Inception-v3 sees at a time, 0.1 GiB of values."""


@dataclass(frozen=True, eq=False)
class Features:
    """A map from examples to features.

    Attributes:
        kind: such as "encoder".
        facts: of the data whose examples it takes.
        digest: SHA-256 of everything it computes with, in hexadecimal.
        compute: from examples in the model's units, float32, to features, for `AT_ONCE` at most.
        classify: the same to the class of each, int64, if the network tells classes.
    """

    kind: str
    facts: Facts
    digest: str
    compute: Callable[[Tensor], Tensor]
    classify: Callable[[Tensor], Tensor] | None = None

    @property
    def name(self) -> str:
        """The data, the kind, and 8 digits of the hash."""
        return f"{self.facts.name}-{self.kind}@{self.digest[:8]}"

    def told(self, metric: str, n: int) -> str:
        """How a metric in these features from n samples is told."""
        return f"{metric}[{self.name}, N={n}]"

    def __call__(self, raw: Tensor) -> Tensor:
        """Features of examples in the user's units, (n, *shape) -> (n, D), float64.

        Raises:
            OptionError: if the examples are of another shape.
        """
        return self._mapped(self.compute, raw).double()

    def labels(self, raw: Tensor) -> Tensor:
        """The class of examples in the user's units as the network tells it, (n, *shape) -> (n,), int64.

        Raises:
            OptionError: if the features do not come from a network that tells classes.
        """
        if self.classify is None:
            raise OptionError(f"{self.name}: tells no classes; those of data with labels do that are named 'encoder'")
        return self._mapped(self.classify, raw)

    def _mapped(self, compute: Callable[[Tensor], Tensor], raw: Tensor) -> Tensor:
        if tuple(raw.shape[1:]) != self.facts.shape:
            raise OptionError(
                f"received examples of shape {tuple(raw.shape)}: {self.name} takes those of shape {self.facts.shape}"
            )
        with torch.no_grad():
            parts = [compute(self.facts.scale.forward(part)) for part in torch.split(raw, AT_ONCE)]
        return torch.cat(parts)


def named(name: str, data: Data, *, seed: int = 0, folder: Path | None = None) -> Features:
    """The features of a name, fitted on a data set's training split where there is something to fit.

    Args:
        name: one of `NAMES`.
        data: whose examples are to be measured.
        seed: of an encoder.
        folder: where encoders are kept; by default as `encoder` says.

    Raises:
        OptionError: if the name is unknown, or a file or what reads it is not there.

    Example:
        >>> from ancestral.data import load
        >>> digits = load("digits")
        >>> pixels = named("pixels", digits)
        >>> pixels(digits.train[:3]).shape, pixels.told("FD", 3)
        (torch.Size([3, 64]), 'FD[digits-pixels@a2e5d8e6, N=3]')
    """
    if name == "pixels":
        return _made("pixels", data, {}, lambda x: x.flatten(1))
    if name == "pca":
        return _pca(data)
    if name == "encoder":
        return _encoder(data, seed, folder)
    kind, _, path = name.partition(":")
    if kind == "onnx" and path:
        return _onnx(data, Path(path))
    if kind == "inception" and path:
        return _inception(data, Path(path))
    raise unknown("features", name, NAMES)


def _made(
    kind: str,
    data: Data,
    tensors: Mapping[str, Tensor],
    compute: Callable[[Tensor], Tensor],
    classify: Callable[[Tensor], Tensor] | None = None,
) -> Features:
    """Features whose hash is over the scale and these tensors."""
    digest = hashlib.sha256(data.facts.scale.model_dump_json().encode())
    for name, tensor in sorted(tensors.items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)};".encode())
        digest.update(tensor.contiguous().numpy().tobytes())
    return Features(kind, data.facts, digest.hexdigest(), compute, classify)


def _pca(data: Data) -> Features:
    """Principal components, by the smaller of the two Gram matrices; the largest weight of each is positive.

    Reference: Hotelling (1933).
    """
    every = -(-len(data.train) // FITTED)
    x = data.facts.scale.forward(data.train[::every], dtype=torch.float64).flatten(1)
    mean = x.mean(0)
    x = x - mean
    k = min(COMPONENTS, len(x) - 1, x.shape[1])
    if len(x) < x.shape[1]:
        vectors = torch.linalg.eigh(x @ x.T).eigenvectors[:, -k:].flip(1)
        axes = x.T @ vectors
    else:
        axes = torch.linalg.eigh(x.T @ x).eigenvectors[:, -k:].flip(1)
    axes = axes / axes.norm(dim=0).clamp(min=torch.finfo(torch.float64).tiny)
    axes = axes * axes.gather(0, axes.abs().argmax(0, keepdim=True)).sign()
    return _made("pca", data, {"mean": mean, "axes": axes}, lambda x: (x.flatten(1).double() - mean) @ axes)


def _encoder(data: Data, seed: int, folder: Path | None) -> Features:
    network = encoder.trained(data, seed=seed, folder=folder)
    tensors = {f"body.{name}": tensor for name, tensor in network.body.state_dict().items()}
    tensors |= {f"head.{name}": tensor for name, tensor in network.head.state_dict().items()}
    with torch.no_grad():
        x = data.facts.scale.forward(data.train[:: -(-len(data.train) // FITTED)])
        seen = torch.cat([network.body(part) for part in torch.split(x, AT_ONCE)])
    mean, deviation = seen.mean(0), seen.std(0).clamp(min=torch.finfo(torch.float32).tiny)

    def compute(x: Tensor) -> Tensor:
        return (network.body(x) - mean) / deviation

    def classify(x: Tensor) -> Tensor:
        return network.head(network.body(x)).argmax(1)

    return _made("encoder", data, tensors, compute, classify if network.labelled else None)


def _onnx(data: Data, path: Path) -> Features:
    try:
        import onnxruntime
    except ImportError:
        raise OptionError(
            f"features 'onnx:{path}' need onnxruntime, which is not installed: type pip install 'ancestral[onnx]'"
        ) from None
    if not path.is_file():
        raise OptionError(f"{path}: there is no such file; name an ONNX network, as in onnx:path/to/network.onnx")
    content = path.read_bytes()
    try:
        session = onnxruntime.InferenceSession(content, providers=["CPUExecutionProvider"])
    except Exception as error:
        raise OptionError(f"{path}: cannot be read as an ONNX network ({str(error).splitlines()[0]})") from None
    into = session.get_inputs()[0].name

    def compute(x: Tensor) -> Tensor:
        try:
            out = session.run(None, {into: x.numpy()})[0]
        except Exception as error:
            raise OptionError(
                f"{path}: cannot take examples of shape {tuple(x.shape)} ({str(error).splitlines()[0]})"
            ) from None
        return torch.from_numpy(out).flatten(1)

    return _made("onnx", data, {"file": torch.frombuffer(bytearray(content), dtype=torch.uint8)}, compute)


def _inception(data: Data, path: Path) -> Features:
    """What Inception-v3 sees of images as they are written to files: 8 bits, and grey in all three channels."""
    if not data.facts.is_image or data.facts.levels is None or data.facts.shape[0] not in (1, 3):
        raise OptionError(
            f"features 'inception:{path}' are of grey or RGB images on levels, and {data.facts.name} has examples of "
            f"shape {data.facts.shape}{'' if data.facts.levels else ' with real values'}: name others with --features"
        )
    if not path.is_file():
        raise OptionError(
            f"{path}: there is no such file; name the weights of Inception-v3, as in "
            "inception:pt_inception-2015-12-05-6726825d.pth"
        )
    content = path.read_bytes()
    found = hashlib.sha256(content).hexdigest()
    if found != INCEPTION:
        raise OptionError(
            f"{path}: is not the file that FID is defined by (SHA-256 {found[:8]}..., which should be "
            f"{INCEPTION[:8]}...): name pt_inception-2015-12-05-6726825d.pth"
        )
    weights = torch.load(BytesIO(content), map_location="cpu", weights_only=True)
    network = Inception().eval()
    network.load_state_dict({name: each for name, each in weights.items() if not name.startswith("fc.")})

    def compute(x: Tensor) -> Tensor:
        images = ((x + 1) * 127.5).round().clamp(0, 255).expand(-1, 3, -1, -1)
        return torch.cat([network(part) for part in torch.split(images, SEEN)])

    return _made("inception", data, network.state_dict(), compute)
