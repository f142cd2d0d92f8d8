"""Which block of the U-Net learns fastest per minute of a CPU: the study behind docs/results/blocks.md.

    python benchmarks/blocks.py DATA... [--minutes 1.5] [--rates 1e-3 2e-3 4e-3] [--blocks group pixel ...]

Every candidate has the same convolutions in the same U-Net. First the pace of all is measured in turns, on a machine
that must be quiet then. Then each is trained for the number of steps that its pace buys in so many minutes, the rate
falling to zero at that number, so that the result does not depend on what else the machine does. What is measured is
the loss of the averaged weights on fixed held-out examples, times and noise, under both weightings. Results are
appended to a file of JSON lines, and what is there already is not run again.
"""

import argparse
import json
import math
import statistics
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from networks import size
from ours import in_turns, training
from torch import Tensor, nn
from torch.nn import functional as F

from ancestral.data import Data, load
from ancestral.diffusion.model import Diffusion
from ancestral.nets.blocks import ResidualBlock, channel_norm, modulated_norm_
from ancestral.protocol import Batch
from ancestral.rng import Rows
from ancestral.training import recipes
from ancestral.training.loop import State, TrainingSection

HELD_OUT, PART = 2048, 256
ROUNDS = 9
RECORD = Path(__file__).parent / "results" / "blocks.jsonl"


def modulated(x: Tensor, modulation: Tensor) -> Tensor:
    """(1 + scale) x + shift."""
    scale, shift = modulation[:, :, None, None].to(x.dtype).chunk(2, 1)
    return torch.addcmul(shift, x, 1 + scale)


def group_norm(x: Tensor) -> Tensor:
    """The norm of `modulated_norm_` as torch has it."""
    return F.group_norm(x, max(1, x.shape[1] // 8))


def image_norm(x: Tensor) -> Tensor:
    """All values of an image together: one fused pass over contiguous memory."""
    return F.layer_norm(x.permute(0, 2, 3, 1), (*x.shape[2:], x.shape[1])).permute(0, 3, 1, 2)


def channel_rms(x: Tensor) -> Tensor:
    """The channels of each pixel, the mean left where it is."""
    return F.rms_norm(x.permute(0, 2, 3, 1), (x.shape[1],)).permute(0, 3, 1, 2)


class Normalised(ResidualBlock):
    """The product's block with another norm."""

    norm: Callable[[Tensor], Tensor]

    def forward(self, x_BCHW: Tensor, modulation: Tensor) -> Tensor:
        out: Tensor = self.second(F.relu_(modulated(type(self).norm(self.first(x_BCHW)), modulation)))
        out += self.shortcut(x_BCHW)
        return out


class GroupNative(Normalised):
    """The product's function of the same weights, from torch's own parts."""

    norm = group_norm


class Pixel(Normalised):
    """Layer norm over channels."""

    norm = channel_norm


class PixelRMS(Normalised):
    """RMS norm over channels."""

    norm = channel_rms


class Image(Normalised):
    """Layer norm over everything."""

    norm = image_norm


class GroupSiLU(ResidualBlock):
    """The product's block with a smooth activation."""

    def forward(self, x_BCHW: Tensor, modulation: Tensor) -> Tensor:
        out: Tensor = self.second(F.silu(modulated_norm_(self.first(x_BCHW), modulation)))
        out += self.shortcut(x_BCHW)
        return out


class Before(ResidualBlock):
    """The block before this study: two smooth activations, a layer norm of each pixel's channels."""

    def forward(self, x_BCHW: Tensor, modulation: Tensor) -> Tensor:
        hidden = modulated(channel_norm(self.first(F.silu(x_BCHW))), modulation)
        out: Tensor = self.shortcut(x_BCHW) + self.second(F.silu(hidden))
        return out


class Magnitude(ResidualBlock):
    """Magnitudes kept by construction: weights of unit norm, forced, and sums and activations that keep variance.

    Reference: Karras et al. (2024), configuration G, without the pixel norm of its encoder.
    """

    share = 0.3

    def __init__(self, channels_in: int, channels: int) -> None:
        super().__init__(channels_in, channels)
        for layer in self.modules():
            if isinstance(layer, nn.Conv2d):
                nn.init.normal_(layer.weight)

    def convolve(self, layer: nn.Module, x: Tensor) -> Tensor:
        if not isinstance(layer, nn.Conv2d):
            return x
        if self.training:
            with torch.no_grad():
                layer.weight.copy_(unit(layer.weight) * layer.weight[0].numel() ** 0.5)
        return F.conv2d(x, unit(layer.weight), padding=layer.padding)

    def forward(self, x_BCHW: Tensor, modulation: Tensor) -> Tensor:
        scale = 1 + modulation.chunk(2, 1)[0][:, :, None, None]
        hidden = self.convolve(self.first, F.silu(x_BCHW) / 0.596) * scale.to(x_BCHW.dtype)
        hidden = self.convolve(self.second, F.silu(hidden) / 0.596)
        out = torch.lerp(self.convolve(self.shortcut, x_BCHW).to(hidden.dtype), hidden, self.share)
        return out / math.hypot(1 - self.share, self.share)


def unit(weight: Tensor) -> Tensor:
    """Each output's weights divided by their norm."""
    return weight / (weight.flatten(1).norm(dim=1) + 1e-4)[:, None, None, None]


class NormFree(ResidualBlock):
    """Scaled weight standardisation, branches over sqrt(depth) behind a gain that starts at zero, and scaled inputs.

    References: Brock et al. (2021), sections 3-4; De & Smith (2020) for the gain.
    """

    depth, before = 1, 0  # blocks in the network, and those before this one; set by `swap`
    activation_gain = math.sqrt(2 / (1 - 1 / math.pi))

    def __init__(self, channels_in: int, channels: int) -> None:
        super().__init__(channels_in, channels)
        nn.init.kaiming_normal_(self.second.weight)
        self.gain = nn.Parameter(torch.zeros(()))
        self.scales = nn.ParameterList(torch.ones(channels, 1, 1, 1) for _ in range(2))

    def forward(self, x_BCHW: Tensor, modulation: Tensor) -> Tensor:
        first, second = (
            scale * standard(layer.weight) for scale, layer in zip(self.scales, (self.first, self.second), strict=True)
        )
        hidden = F.conv2d(x_BCHW, first / math.sqrt(1 + self.before / self.depth), padding=1)
        hidden = F.relu_(modulated(hidden, modulation))
        second = second * (self.gain * self.activation_gain / math.sqrt(self.depth))
        out = F.conv2d(hidden, second, padding=1)
        out += self.shortcut(x_BCHW)
        return out


def standard(weight: Tensor) -> Tensor:
    """Each output's weights at zero mean and the variance of one over their number."""
    variance, mean = torch.var_mean(weight, (1, 2, 3), keepdim=True)
    return (weight - mean) * torch.rsqrt(variance * weight[0].numel() + 1e-4)


BLOCKS: dict[str, type[ResidualBlock]] = {
    "group": ResidualBlock,
    "group-silu": GroupSiLU,
    "group-native": GroupNative,
    "image": Image,
    "pixel": Pixel,
    "pixel-rms": PixelRMS,
    "before": Before,
    "magnitude": Magnitude,
    "norm-free": NormFree,
}
"""The product's block first. Of "group-native", the same function of the same weights, only the pace is of interest."""


def swap(net: nn.Module, kind: type[ResidualBlock]) -> None:
    """Put blocks of that kind into the places of the product's."""
    for parent in list(net.modules()):
        for name, child in list(parent.named_children()):
            if type(child) is ResidualBlock and kind is not ResidualBlock:
                setattr(parent, name, kind(child.first.in_channels, child.first.out_channels))
    blocks = [block for block in net.modules() if isinstance(block, NormFree)]
    for before, block in enumerate(blocks):
        block.depth, block.before = len(blocks), before
    net.to(memory_format=torch.channels_last)  # type: ignore[call-overload]


def make(data: Data, block: str, changes: list[str], seed: int) -> tuple[Diffusion, TrainingSection]:
    """The image recipe's model with that block."""
    setup = recipes.change(recipes.images(data.facts), changes)
    model = recipes.build(setup, data.facts, seed)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        swap(model.network, BLOCKS[block])
    return model, setup.training


@torch.no_grad()
def held_out(state: State, data: Data, section: TrainingSection, weighting: str) -> float:
    """The loss of the averaged weights, in nats per dimension ("bound") or as a plain squared error ("simple")."""
    judge = recipes.build(recipes.change(recipes.images(data.facts), [f"diffusion.weighting={weighting}"]), data.facts)
    judge.network = state.averages["denoiser"][section.ema].module.eval()
    x, total = data.facts.scale.forward(data.held_out[:HELD_OUT]), 0.0
    for first in range(0, len(x), PART):
        part = x[first : first + PART]
        total += float(judge.loss(Batch(part, Rows((0,), len(x), first, first + len(part))))) * len(part) / len(x)
    return total


def measure_pace(data: Data, blocks: list[str], changes: list[str]) -> Iterator[dict[str, Any]]:
    """Seconds a step of every candidate, the median of several rounds in which all take turns."""
    loops = {block: training(State(*make(data, block, changes, 0)), data, 10_000) for block in blocks}
    times = in_turns(loops, ROUNDS)
    for block in blocks:
        net = make(data, block, changes, 0)[0].network.net
        yield {"block": block, "seconds": statistics.median(times[block]), "threads": torch.get_num_threads()} | size(
            net, data.facts.shape[0]
        )


def measure_loss(data: Data, block: str, changes: list[str], rate: float, total: int, seed: int) -> dict[str, float]:
    """Train, then measure."""
    model, section = make(data, block, [*changes, f"training.rate={rate}"], seed)
    state = State(model, section)
    for record in training(state, data, total, seed):
        if not record.step % 50:
            print(f"\r{block} {record.step}/{total}", end="", file=sys.stderr)
    return {
        "bound": held_out(state, data, section, "bound") / math.log(2),
        "simple": held_out(state, data, section, "simple"),
    }


def main() -> None:
    """What the first lines of this file say."""
    parser = argparse.ArgumentParser(description="Study of the U-Net's block: held-out loss per minute.")
    parser.add_argument("data", nargs="+", help="what `ancestral train` takes")
    parser.add_argument("--minutes", type=float, default=1.5, help="of quiet time that each training stands for")
    parser.add_argument("--rates", type=float, nargs="*", default=[1e-3, 2e-3, 4e-3])
    parser.add_argument("--blocks", nargs="+", choices=BLOCKS, default=list(BLOCKS))
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument(
        "--set", action="append", default=[], help="a change of the image recipe, as in `ancestral train`"
    )
    parser.add_argument("--limit", type=int, default=10_000, help="trainings after which to stop")
    parser.add_argument("--record", type=Path, default=RECORD)
    options = parser.parse_args()
    options.record.parent.mkdir(parents=True, exist_ok=True)
    for source in options.data:
        study(load(source), options)


def study(data: Data, options: argparse.Namespace) -> None:
    """What of the study is not on record yet."""
    place = {"data": data.facts.name, "set": options.set}
    pace = {row["block"]: row["seconds"] for row in known(options.record, place | {"kind": "pace"})}
    if not set(options.blocks) <= set(pace):
        for row in measure_pace(data, options.blocks, options.set):
            pace[row["block"]] = row["seconds"]
            keep(options.record, place | {"kind": "pace"} | row)
    for rate in options.rates:
        for block in options.blocks:
            for seed in options.seeds:
                total = round(60 * options.minutes / pace[block])
                run = place | {"kind": "loss", "block": block, "rate": rate, "minutes": options.minutes, "seed": seed}
                if options.limit and not known(options.record, run):
                    options.limit -= 1
                    keep(
                        options.record,
                        run | {"steps": total} | measure_loss(data, block, options.set, rate, total, seed),
                    )


def known(record: Path, wanted: dict[str, Any]) -> list[dict[str, Any]]:
    """The rows on record that agree with all that is wanted."""
    rows = [json.loads(line) for line in record.read_text().splitlines()] if record.exists() else []
    return [row for row in rows if all(row.get(key) == value for key, value in wanted.items())]


def keep(record: Path, row: dict[str, Any]) -> None:
    """Print a row and put it on record."""
    print(json.dumps(row), flush=True)
    with record.open("a") as file:
        file.write(json.dumps(row) + "\n")


if __name__ == "__main__":
    main()
