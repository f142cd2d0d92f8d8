"""ancestral, as `ancestral train` and `ancestral sample` use it: there is nothing to tune.

With `training` and `in_turns` for the other benchmarks, which take the loop from here.
"""

import statistics
import time
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from typing import Any

import numpy as np
import torch
from networks import BATCH, OURS, size
from torch import Tensor, nn

from ancestral.data import Data
from ancestral.data.dataset import Examples, divide
from ancestral.diffusion import denoise, sample
from ancestral.diffusion.process import cosine
from ancestral.training import recipes
from ancestral.training.loop import Record, State, steps


def data_of(images: Tensor, held_out: int = 256) -> Data:
    """uint8 images as a data set whose last examples are held out."""
    is_held_out = np.arange(len(images)) >= len(images) - held_out
    examples = Examples(x=images.numpy(), levels=256, held_out=is_held_out)
    return divide(examples, name="images", source="benchmarks")


def setup_of(data: Data, changes: list[str]) -> recipes.Setup:
    """The recipe for images at this batch, with changes as `--set` takes them."""
    return recipes.change(recipes.images(data.facts), [f"training.batch={BATCH}", *changes])


def training(state: State, data: Data, total: int, seed: int = 0) -> Iterator[Record]:
    """The loop of `ancestral train`, without the run directory around it."""
    return steps(state, data, total, seed=seed)


def in_turns(loops: Mapping[str, Iterator[object]], rounds: int, warm_up: int = 3) -> dict[str, list[float]]:
    """Seconds of a step of every loop, in rounds in which all take turns."""
    times: dict[str, list[float]] = {name: [] for name in loops}
    for attempt in range(warm_up + rounds):
        for name, loop in loops.items():
            seconds = _seconds(partial(next, loop))
            if attempt >= warm_up:
                times[name].append(seconds)
    return times


class Ours:
    """The image recipe with a network of the peers' size; style "recipe" keeps the recipe's own."""

    def __init__(self, style: str, images: Tensor) -> None:
        data = data_of(images)
        changes = [] if style == "recipe" else [f"unet.{key}={value}" for key, value in OURS.items()]
        setup = setup_of(data, changes)
        self.model = recipes.build(setup, data.facts)
        self.net: nn.Module = self.model.network.net
        self.shape = data.facts.shape
        self.steps = training(State(self.model, setup.training), data, 100_000)

    def size(self) -> dict[str, int]:
        """Parameters, and FLOPs forward per image."""
        return size(self.net, self.shape[0])

    def train(self, steps: int) -> None:
        """Steps of the loop: gather, noise, forward, backward, clip, AdamW, averages."""
        for _ in range(steps):
            next(self.steps)

    def sample(self, evaluations: int) -> None:
        """A batch by DDIM."""
        self.model.sample(BATCH, steps=evaluations, sampler=sample.ddim, rng=0)

    def outside(self, rounds: int, steps: int) -> list[float]:
        """The share of a training step outside the network's forward and backward, in each of several rounds."""
        x, log_snr = torch.randn(BATCH, *self.shape), torch.linspace(-10, 10, BATCH)
        gradient = torch.randn(BATCH, *self.shape)

        def bare() -> None:
            self.net.zero_grad(set_to_none=True)
            self.net(x, log_snr).backward(gradient)

        return _shares(lambda: next(self.steps), bare, rounds, steps)

    def overhead(self, rounds: int, steps: int) -> list[float]:
        """(wall time - steps x bare network forward) / wall time of a DDIM walk, in each of several rounds."""
        x, log_snr = torch.randn(BATCH, *self.shape), torch.full((BATCH,), 1.0)

        @torch.inference_mode()
        def bare() -> None:
            self.net(x, log_snr)

        return _shares(lambda: sample.ddim(self.model.denoiser, x, steps), bare, rounds, steps, whole_is_one=True)

    def empty(self, rounds: int, steps: int) -> dict[str, list[float]]:
        """Microseconds a step of walks on one image with a network that does nothing, by sampler and round."""
        denoiser = denoise.Clipped(denoise.NetworkDenoiser(_Nothing(), cosine()))
        x, found = torch.randn(1, *self.shape), {}
        for name in ("ddim", "euler", "ancestral"):
            sampler = sample.SAMPLERS[name]
            sampler(denoiser, x, 20, rng=0)
            found[name] = [_seconds(partial(sampler, denoiser, x, steps, rng=0)) / steps * 1e6 for _ in range(rounds)]
        return found

    def ceiling(self, dtype: str, rounds: int) -> dict[str, Any]:
        """GFLOP/s of 3x3 convolutions forward and backward, channels-last: the median of the best of several shapes."""
        rates = {}
        for channels_in, channels, side in CONVOLUTIONS:
            kind = getattr(torch, dtype)
            layer = nn.Conv2d(channels_in, channels, 3, padding=1).to(kind).to(memory_format=torch.channels_last)
            x, g = (
                torch.randn(BATCH, c, side, side, dtype=kind).to(memory_format=torch.channels_last)
                for c in (channels_in, channels)
            )
            x.requires_grad_()
            flops = 3 * 2 * 9 * channels_in * channels * side**2 * BATCH
            repeats = max(1, round(2e10 / flops))

            def work(layer: nn.Module = layer, x: Tensor = x, g: Tensor = g, repeats: int = repeats) -> None:
                for _ in range(repeats):
                    x.grad = None
                    layer.zero_grad(set_to_none=True)
                    layer(x).backward(g)

            work()
            seconds = statistics.median(_seconds(work) for _ in range(rounds))
            rates[f"{channels_in}->{channels} at {side}x{side}"] = flops * repeats / seconds / 1e9
        best = max(rates, key=lambda shape: rates[shape])
        return {"shape": best, "gflops": rates[best], "all": rates}


CONVOLUTIONS = [(64, 64, 32), (128, 64, 32), (64, 64, 16), (128, 64, 16), (128, 128, 16)]


class _Nothing(nn.Module):
    def forward(self, x: Tensor, log_snr: Tensor) -> Tensor:
        return x


def _seconds(work: Callable[[], object]) -> float:
    began = time.perf_counter()
    work()
    return time.perf_counter() - began


def _shares(
    whole: Callable[[], object], bare: Callable[[], None], rounds: int, steps: int, *, whole_is_one: bool = False
) -> list[float]:
    """1 - steps x bare / whole, measured in turns; `whole` is one step, or all of them."""
    shares = []
    for attempt in range(rounds + 1):
        total = _seconds(whole) if whole_is_one else sum(_seconds(whole) for _ in range(steps))
        inside = sum(_seconds(bare) for _ in range(steps))
        if attempt:
            shares.append(1 - inside / total)
    return shares
