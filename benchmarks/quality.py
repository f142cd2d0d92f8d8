"""Held-out loss against minutes of training: our network beside those of the peers, all else the same.

    make bench-quality

Every network is trained by the loop of `ancestral train` on the same batches, noise and times, with the same objective
(the plain squared error of v), optimiser and averages of the weights; each in the precision and memory layout that is
fastest for it. First the pace of all is measured in turns, on a machine that must be quiet then. A training that stands
for so many minutes has the number of steps that the pace buys in them, the rate falling to zero at that number, so that
the result does not depend on what else the machine does. The rate of each network is the best of several in short
trainings. The loss of the averaged weights is measured on fixed held-out images, times and noise.

Rows are appended to results/quality.jsonl, and what is there already is not run again.
"""

import argparse
import json
import math
import statistics
import sys
from pathlib import Path
from typing import Any

import matplotlib as mpl
import torch
from blocks import held_out, keep, known
from networks import OURS, ddpm_unet, diffusers_unet, size
from ours import in_turns, training
from torch import Tensor, nn

from ancestral.data import Data, load
from ancestral.diffusion.model import Diffusion
from ancestral.training import recipes
from ancestral.training.loop import State, TrainingSection

mpl.use("Agg")
import matplotlib.pyplot as plt

HERE = Path(__file__).parent
RECORD = HERE / "results" / "quality.jsonl"
PICTURE = HERE.parent / "docs" / "images" / "quality.png"
MINUTES = {"ours": (3.5, 7.0), "diffusers": (20.0,), "ddpm-pytorch": (20.0,)}
"""What each network is trained for, once its rate is chosen."""

ROUNDS, POINTS = 9, 10
COLOURS = {"ours": "C0", "diffusers": "C1", "ddpm-pytorch": "C2"}


class Peer(nn.Module):
    """A peer's network as one of ours: bfloat16, its favourite layout, and the cosine schedule's time for a log-SNR."""

    def __init__(self, net: nn.Module, layout: torch.memory_format) -> None:
        super().__init__()
        self.net, self.layout = net.to(memory_format=layout), layout  # type: ignore[call-overload]

    def forward(self, x_BCHW: Tensor, log_snr: Tensor) -> Tensor:
        """(B, C, H, W), (B,) -> (B, C, H, W), float32."""
        timesteps = 2000 / math.pi * (-0.5 * log_snr).exp().atan()
        with torch.autocast("cpu", torch.bfloat16):
            out = self.net(x_BCHW.contiguous(memory_format=self.layout), timesteps)
        found: Tensor = (out if isinstance(out, Tensor) else out.sample).float()
        return found


def make(data: Data, name: str, rate: float, seed: int) -> tuple[Diffusion, TrainingSection]:
    """The image recipe with the network of that name."""
    ours = [f"unet.{key}={value}" for key, value in OURS.items()]
    setup = recipes.change(
        recipes.images(data.facts), [*ours, "diffusion.weighting=simple", f"training.rate={rate}", "training.batch=64"]
    )
    model, channels = recipes.build(setup, data.facts, seed), data.facts.shape[0]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        if name == "diffusers":
            model.network.net = Peer(diffusers_unet(channels), torch.contiguous_format)
        if name == "ddpm-pytorch":
            model.network.net = Peer(ddpm_unet(channels, flash_attn=True), torch.channels_last)
    return model, setup.training


def measure_pace(data: Data) -> None:
    """Put on record the seconds a step of every network, the median of several rounds in which all take turns."""
    loops = {name: training(State(*make(data, name, 1e-3, 0)), data, 10_000) for name in MINUTES}
    for name, times in in_turns(loops, ROUNDS).items():
        row = {"seconds": statistics.median(times), "least": min(times), "greatest": max(times)}
        keep(RECORD, {"kind": "pace", "network": name, "rounds": ROUNDS} | row | sizes(data, name))


def sizes(data: Data, name: str) -> dict[str, int]:
    """Parameters and FLOPs at 32x32, where every network is as it is compared in `make bench`."""
    net = make(data, name, 1e-3, 0)[0].network.net
    return size(net.net if isinstance(net, Peer) else net, data.facts.shape[0])


def measure_loss(data: Data, name: str, rate: float, minutes: float, seed: int, pace: float) -> dict[str, Any]:
    """Train for what the pace buys in so many minutes; the loss at the end, and the plain one along the way."""
    total = round(60 * minutes / pace)
    model, section = make(data, name, rate, seed)
    state, curve = State(model, section), []
    look = {math.ceil(total * share / POINTS) for share in range(1, POINTS + 1)}
    for record in training(state, data, total, seed):
        if record.step in look:
            curve.append((record.step * pace / 60, held_out(state, data, section, "simple")))
            print(f"\r{name} {rate:g} {record.step}/{total} {curve[-1][1]:.4f} ", end="", file=sys.stderr)
    bound = held_out(state, data, section, "bound") / math.log(2)
    return {"steps": total, "simple": curve[-1][1], "bound": bound, "curve": curve}


def study(data: Data, names: list[str], rates: list[float], search: float, seed: int) -> None:
    """What of the study is not on record yet."""
    if not known(RECORD, {"kind": "pace"}):
        measure_pace(data)
    for name in names:
        pace = known(RECORD, {"kind": "pace", "network": name})[-1]["seconds"]

        def train(rate: float, minutes: float, name: str = name, pace: float = pace) -> float:
            run = {"kind": "loss", "network": name, "rate": rate, "minutes": minutes, "seed": seed}
            if not known(RECORD, run):
                keep(RECORD, run | measure_loss(data, name, rate, minutes, seed, pace))
            return float(known(RECORD, run)[0]["simple"])

        best = min(rates, key=lambda rate: train(rate, search))
        for minutes in MINUTES[name]:
            train(best, minutes)


def draw() -> None:
    """The curves of the long trainings, and where each ends."""
    figure, axes = plt.subplots(figsize=(7, 4.2), layout="constrained")
    for name, all_minutes in MINUTES.items():
        for minutes in all_minutes:
            for row in known(RECORD, {"kind": "loss", "network": name, "minutes": minutes}):
                times, losses = zip(*row["curve"], strict=True)
                label = f"{name}, rate {row['rate']:g}" if minutes == all_minutes[0] else None
                axes.plot(times, losses, color=COLOURS[name], label=label)
                axes.plot(times[-1], losses[-1], "o", color=COLOURS[name])
                if name != "ours":
                    axes.axhline(losses[-1], color=COLOURS[name], linewidth=0.8, linestyle=":")
    axes.set(xlabel="minutes of training on 2 cores", ylabel="held-out squared error of v", yscale="log")
    axes.set_title("MNIST: the same loop, objective and averages; the network differs", fontsize=10)
    axes.legend(frameon=False)
    axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(PICTURE, dpi=150)


def main() -> None:
    """What the first lines of this file say."""
    parser = argparse.ArgumentParser(description="Held-out loss against minutes of training, beside the peers.")
    parser.add_argument("--data", default=str(HERE.parent.parent / "shared" / "data" / "mnist"))
    parser.add_argument("--networks", nargs="+", choices=MINUTES, default=list(MINUTES))
    parser.add_argument("--rates", type=float, nargs="+", default=[1e-3, 2e-3, 4e-3])
    parser.add_argument("--search", type=float, default=1.5, help="minutes that a training of the search stands for")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    RECORD.parent.mkdir(exist_ok=True)
    study(load(options.data), options.networks, options.rates, options.search, options.seed)
    draw()
    for row in known(RECORD, {"kind": "loss", "seed": options.seed}):
        if row["minutes"] in MINUTES[row["network"]]:
            print(json.dumps({key: value for key, value in row.items() if key != "curve"}))


if __name__ == "__main__":
    main()
