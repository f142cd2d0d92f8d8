"""A trained model of images: how far each solver ends from the exact walk of the same network, and how its images look.

Every solver is given the same network, in float32, and the same starts. First the distance to the probability-flow ODE
of the network, followed in 300 steps of Heun even in log-SNR: RMS per pixel over some starts, for every pair of solver
and grid, and for the pair of ours that is fitted to the network on other starts. Then, for the fitted one, the best of
each side and what most people use, the Fréchet distance between generated and training images in the features of a
small classifier, which this file trains first, always alike. Its interval is twice the deviation over bootstraps of the
generated images; what as many held-out images score is the row to reach.
"""

import math
import time
from collections.abc import Callable
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any

import peer_diffusers_solvers as peer
import solver_ours as ours
import torch
from solver_oracles import steps_within
from torch import Tensor, nn
from torch.nn import functional as F

from ancestral.data import Data
from ancestral.diffusion import sample
from ancestral.diffusion.denoise import Denoiser
from ancestral.diffusion.process import LOG_SNR_MIN, Instant, Process
from ancestral.diffusion.sample import SAMPLERS
from ancestral.rng import randn, stream
from ancestral.training import checkpoint
from ancestral.training.run import reload

BUDGETS = (5, 8, 10, 15, 20, 50)
FITTED_AT, FITTED_ON = (5, 8, 10, 15, 20), 64
"""The budgets at which ours is fitted too, and on how many starts: as many as the command takes."""

USUAL = ("diffusers", "dpmpp-2m", "karras")
"""What is recommended most to users of diffusers."""

GRIDS = {"ours": ("uniform", "log-snr", "karras"), "diffusers": ("linspace", "trailing", "karras", "exponential")}
"""Those that are tried here; the others do not come first on laws that are known."""

Row = dict[str, Any]
Pair = tuple[str, str, str]
Walk = Callable[..., tuple[Tensor, float]]


class NetworkLaw:
    """A trained denoiser in the place of a law: asked at (alpha, sigma) itself, so that no time is rounded."""

    def __init__(self, denoiser: Denoiser) -> None:
        self.denoiser, self.asked = denoiser, 0

    @torch.no_grad()
    def posterior_mean(self, x_t: Tensor, alpha: Any, sigma: Any) -> Tensor:
        """E[x_0 | x_t] as the network has it."""
        at = Instant(0.5)
        at.alpha, at.sigma = float(alpha), float(sigma)
        at.log_snr = 2 * math.log(at.alpha / at.sigma)
        self.asked += 1
        return self.denoiser(x_t.float(), at).to(x_t.dtype)


def solution(denoiser: Denoiser, x_T: Tensor, steps: int) -> Tensor:
    """The end of the network's own probability-flow ODE, by Heun in steps even in log-SNR."""
    process = denoiser.process
    first = max(float(process.log_snr(1.0)), LOG_SNR_MIN)
    times = process.time(torch.linspace(first, 13.0, steps, dtype=torch.float64))
    return sample.heun(denoiser, x_T, torch.cat([torch.ones(1, dtype=torch.float64), times[1:]]))


def walks(process: Process, budget: int) -> dict[Pair, Walk]:
    """Every deterministic solver on every grid that is tried, at a budget of evaluations."""
    found: dict[Pair, Walk] = {}
    for name, grid in product(ours.counted(), GRIDS["ours"]):
        steps = steps_within(ours.cost(name), budget)
        if not SAMPLERS[name].stochastic and steps >= 1:
            found["ours", name, grid] = partial(ours.on_grid, name, grid, process, steps)
    for name, solver in peer.SOLVERS.items():
        for grid in set(GRIDS["diffusers"]) & set(solver.grids):
            if not solver.stochastic and not name.endswith("bh1"):
                steps = steps_within(solver.cost, budget)
                found["diffusers", name, grid] = partial(peer.walk, name, grid, process, steps=steps)
    return found


class Classifier(nn.Module):
    """Two convolutions and a layer of 64 features, of which the logits are linear."""

    def __init__(self, channels: int, classes: int) -> None:
        super().__init__()
        self.first, self.second = nn.Conv2d(channels, 16, 5, stride=2), nn.Conv2d(16, 32, 5, stride=2)
        self.features, self.logits = nn.LazyLinear(64), nn.Linear(64, classes)

    def embed(self, x: Tensor) -> Tensor:
        """(B, C, H, W) -> (B, 64)."""
        return F.relu(self.features(F.relu(self.second(F.relu(self.first(x)))).flatten(1)))


def classifier(data: Data, steps: int) -> tuple[Classifier, float]:
    """The classifier after so many steps on the training images, and its accuracy on held-out ones."""
    if data.train_labels is None or data.held_out_labels is None or data.facts.classes is None:
        raise SystemExit(f"{data.facts.name} has no labels to learn features from: give a run on labelled images")
    torch.manual_seed(0)
    net = Classifier(data.facts.shape[0], len(data.facts.classes))
    net.embed(data.batch([0, 1]))
    optimiser = torch.optim.Adam(net.parameters(), 1e-3)
    for step in range(steps):
        index = torch.from_numpy(stream(5, step).integers(len(data.train), size=128))
        loss = F.cross_entropy(net.logits(net.embed(data.batch(index))), data.train_labels[index])
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
    held_out = data.facts.scale.forward(data.held_out[:2000])
    right = net.logits(embedded(net, held_out).float()).argmax(1) == data.held_out_labels[:2000]
    return net, float(right.double().mean())


@torch.no_grad()
def embedded(net: Classifier, x: Tensor) -> Tensor:
    """Features of images in the model's units, float64, (B, 64)."""
    return torch.cat([net.embed(part) for part in x.float().clamp(-1, 1).split(500)]).double()


def frechet(a: Tensor, b: Tensor) -> float:
    """|m_a - m_b|^2 + tr(S_a + S_b - 2 (S_a S_b)^(1/2)) between Gaussians fitted to two sets of features.

    Reference: Dowson & Landau (1982).
    """
    S_a, S_b = torch.cov(a.T), torch.cov(b.T)
    values, vectors = torch.linalg.eigh(S_a)
    root = vectors * values.clamp(min=0).sqrt() @ vectors.T
    cross = torch.linalg.eigvalsh(root @ S_b @ root).clamp(min=0).sqrt().sum()
    return float((a.mean(0) - b.mean(0)).square().sum() + S_a.trace() + S_b.trace() - 2 * cross)


def with_interval(features: Tensor, real: Tensor, repeats: int = 50) -> dict[str, float]:
    """The distance, and twice its deviation over bootstraps of the generated side."""
    again = [
        frechet(features[torch.from_numpy(stream(6, i).integers(len(features), size=len(features)))], real)
        for i in range(repeats)
    ]
    return {"frechet": frechet(features, real), "plus_minus": 2 * float(torch.tensor(again).std())}


def measure(run: Path, quick: bool, say: Callable[[str], None]) -> dict[str, Any]:
    """Distances to the exact walk of all pairs, and Fréchet distances of the chosen ones, by budget."""
    began = time.perf_counter()
    model, data = checkpoint.load(run), reload(run)
    model.network.net.lowered = False
    denoiser, shape = model.denoiser, data.facts.shape
    starts, images, fine, budgets = (8, 64, 40, (5, 10)) if quick else (16, 1000, 300, BUDGETS)
    net, accuracy = classifier(data, 50 if quick else 1000)
    real = embedded(net, data.facts.scale.forward(data.train[:10_000]))
    held_out = with_interval(embedded(net, data.facts.scale.forward(data.held_out[:images])), real)
    say(f"classifier: {100 * accuracy:.1f}% right; held-out images: {held_out}")
    x_T = randn((images, *shape), stream(7), dtype=torch.float64)
    truth = solution(denoiser, x_T[:starts].float(), fine).double()
    say(f"the exact walk of {starts} starts is done")
    distances: list[Row] = []
    found: dict[int, dict[Pair, Walk]] = {}
    for budget in budgets:
        found[budget] = walks(model.process, budget)
        if budget in FITTED_AT:
            fit = ours.fitted(model.process, budget, NetworkLaw(denoiser), randn((FITTED_ON, *shape), stream(12)))
            found[budget]["ours", "fitted", fit.sampler] = partial(ours.on_fit, fit, model.process)
            say(f"{budget} evaluations: fitted by {fit.asked} evaluations: {fit.sampler}, {fit.times}")
        for (library, name, grid), walk in found[budget].items():
            x, _ = walk(law=NetworkLaw(denoiser), x_T=x_T[:starts])
            each = (x - truth).flatten(1).square().mean(1)
            row = {"library": library, "solver": name, "grid": grid, "budget": budget}
            row |= {"rms": float(each.mean().sqrt()), "median": float(each.median().sqrt())}
            distances.append(row)
        say(f"{budget} evaluations: {best(distances, budget, True)}; {best(distances, budget, False)}")
    looks: list[Row] = []
    for budget in budgets:
        fits = [pair for pair in found[budget] if pair[1] == "fitted"]
        pairs = [*fits, best(distances, budget, True), best(distances, budget, False), USUAL]
        for pair in dict.fromkeys(pairs):
            parts = [found[budget][pair](law=NetworkLaw(denoiser), x_T=part)[0] for part in x_T.split(250)]
            look = with_interval(embedded(net, torch.cat(parts)), real)
            looks.append({"library": pair[0], "solver": pair[1], "grid": pair[2], "budget": budget, **look})
            say(f"{budget} evaluations, {' '.join(pair)}: {look}")
    return {
        "run": run.name,
        "features": "64 of a classifier of two convolutions",
        "accuracy": accuracy,
        "starts": starts,
        "images": images,
        "held_out": held_out,
        "distances": distances,
        "looks": looks,
        "minutes": (time.perf_counter() - began) / 60,
    }


def best(rows: list[Row], budget: int, of_ours: bool) -> Pair:
    """The pair of ours, or of theirs, that ends nearest to the exact walk."""
    known = [row for row in rows if row["budget"] == budget and (row["library"] == "ours") == of_ours]
    row = min((row for row in known if math.isfinite(row["rms"])), key=lambda row: row["rms"])
    return row["library"], row["solver"], row["grid"]
