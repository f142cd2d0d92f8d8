"""One competitor in a process of its own: requests come as lines of JSON, and answers go back as lines of JSON.

    python worker.py ours|diffusers|ddpm-pytorch IMAGES.npy ...

A request names a set-up of the competitor, which is made when it is first named, and a method:
{"style": "user", "channels": 1, "do": "train", "steps": 3}. The answer is what the method returned, or the error.
"""

import json
import os
import resource
import sys
import time
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

THREADS = 2


class Competitor(Protocol):
    """A library at work, in one style: "user" as its README says, "tuned" by us, "compiled" by torch.compile too."""

    def size(self) -> dict[str, int]:
        """Parameters, and FLOPs forward per image."""
        ...

    def train(self, steps: int) -> None:
        """So many full steps of training."""
        ...

    def sample(self, evaluations: int) -> None:
        """A batch of images from so many evaluations of the network."""
        ...


def make(name: str, style: str, images: Tensor) -> Competitor:
    """The competitor of that name, on uint8 images of shape (N, C, H, W)."""
    torch.manual_seed(0)
    if name == "ours":
        from ours import Ours

        return Ours(style, images)
    if name == "diffusers":
        from peer_diffusers import Diffusers

        return Diffusers(style, images)
    from peer_ddpm import DDPMPytorch

    return DDPMPytorch(style, images)


def peak_bytes() -> int:
    """The most memory that this process has held."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def serve(name: str, paths: list[Path]) -> None:
    """Answer requests until there are no more."""
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)  # what a library prints is not an answer
    torch.set_num_threads(THREADS)
    arrays = [torch.from_numpy(np.load(path)) for path in paths]
    images = {array.shape[1]: array for array in arrays}
    made: dict[tuple[str, int], Competitor] = {}
    answers.write(json.dumps({"ready": True}) + "\n")
    for line in sys.stdin:
        request: dict[str, Any] = json.loads(line)
        style, channels, do = request.pop("style"), request.pop("channels"), request.pop("do")
        try:
            before = peak_bytes()
            if (style, channels) not in made:
                made[style, channels] = make(name, style, images[channels])
            began = time.perf_counter()
            result = getattr(made[style, channels], do)(**request)
            answer = {"seconds": time.perf_counter() - began, "result": result, "grown": peak_bytes() - before}
        except Exception as error:
            answer = {"error": f"{type(error).__name__}: {error}".splitlines()[0]}
        answers.write(json.dumps(answer) + "\n")


if __name__ == "__main__":
    serve(sys.argv[1], [Path(path) for path in sys.argv[2:]])
