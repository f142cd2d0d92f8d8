"""Evaluations of the network for a standard error: all terms of the chain, as older codebases do it, or ours.

    python benchmarks/likelihood.py RUN [--all 64] [--few 2000] [--controls 2000]

The loop over all terms is measured on some held-out examples, the estimator of `ancestral evaluate` on more. With V the
variance of an example and c its cost in evaluations, a standard error e takes V c / e^2 of them, so the ratio of the
two does not depend on e. Prints one JSON object.

With --controls it says, in place of that, how much of the noise of drawn terms a control variate could take away: the
same term of a Gaussian with the data's mean and covariance, whose expectation over noise is known in closed form.
Every example draws one term twice; the share is that of the variance between the two which a regression on the two
terms of the Gaussian explains, with a coefficient for each sixteenth of the draws.
"""

import argparse
import json
from pathlib import Path

import torch

from ancestral import toys
from ancestral.data import Data
from ancestral.diffusion import likelihood
from ancestral.diffusion.denoise import OracleDenoiser
from ancestral.diffusion.likelihood import mean_and_stderr
from ancestral.diffusion.model import Diffusion
from ancestral.diffusion.process import per_example
from ancestral.measure.evaluate import evaluate
from ancestral.measure.measured import Measured
from ancestral.rng import stream
from ancestral.training import checkpoint
from ancestral.training.run import reload


def side(measured: Measured) -> dict[str, float]:
    """What a measurement says and took, in bits per dimension."""
    found = measured.likelihood()
    cost = measured.bound.evaluations / len(measured.chosen)
    plain = float(mean_and_stderr(measured.facts.bits_per_dim(measured.bound.nats))[1])
    return {
        "examples": len(measured.chosen),
        "evaluations": measured.bound.evaluations,
        "value": found.value,
        "stderr": found.stderr,
        "stderr_noise": found.stderr_noise or 0.0,
        "evaluations_for_0.005": cost * len(measured.chosen) * (found.stderr / 0.005) ** 2,
        "evaluations_for_0.005_without_regression": cost * len(measured.chosen) * (plain / 0.005) ** 2,
        "seconds": measured.seconds,
    }


def controls(model: Diffusion, data: Data, n: int) -> dict[str, float]:
    """The share of the noise that terms of a Gaussian explain, and the share of the whole error that is noise."""
    pilot = evaluate(model, data, n=200)
    times, p = pilot.bound.times, pilot.probability
    train = model.facts.scale.forward(data.train).flatten(1).double()
    law = toys.gaussian(train.mean(0), train.T.cov() + 1e-4 * torch.eye(train.shape[1]))
    oracle = OracleDenoiser(law, model.process)
    x_0 = model.facts.scale.forward(data.held_out[:n])
    index = torch.searchsorted((p / p.sum()).cumsum(0), (torch.arange(len(x_0)) + 0.5) / len(x_0)).clamp(max=len(p) - 1)
    index = index[torch.from_numpy(stream(0).permutation(len(x_0)))]
    s, t, weight = times[index], times[index + 1], 1 / p[index]
    with torch.no_grad():
        pair = []
        for draw in (1, 2):
            x_t, _ = model.process.marginal(x_0, t, stream(0, draw))
            both = []
            for guess in (model.denoiser(x_t, t), oracle(x_t.flatten(1), t).reshape(x_t.shape)):
                beta_tilde = per_example(model.process.posterior_coefficients(s, t)[2], x_0)
                both.append(weight * likelihood.term(model.process, x_0, guess, beta_tilde, s, t))
            pair.append(both)
    (model_1, gaussian_1), (model_2, gaussian_2) = pair
    noise, control = model_1 - model_2, gaussian_1 - gaussian_2
    left = torch.zeros(())
    for part in index.argsort().tensor_split(16):
        beta = (noise[part] @ control[part]) / control[part].square().sum()
        left = left + (noise[part] - beta * control[part]).square().sum()
    found = pilot.likelihood()
    return {
        "examples": len(x_0),
        "share_of_noise_explained": float(1 - left / noise.square().sum()),
        "share_of_error_that_is_noise": (found.stderr_noise or 0.0) ** 2 / found.stderr**2,
    }


def main() -> None:
    """What the first lines of this file say."""
    parser = argparse.ArgumentParser(description="Evaluations of the network for a standard error.")
    parser.add_argument("run", help="a run directory")
    parser.add_argument("--all", type=int, default=64, help="examples whose terms are all computed")
    parser.add_argument("--few", type=int, default=2000, help="examples whose terms are drawn")
    parser.add_argument("--controls", type=int, help="examples for the study of a control variate")
    options = parser.parse_args()
    model, data = checkpoint.load(options.run), reload(Path(options.run))
    if options.controls:
        print(json.dumps(controls(model, data, options.controls), indent=2))
        return
    few = evaluate(model, data, n=options.few)
    every = evaluate(model, data, n=options.all, draws=None)
    common = few.bound.nats[: options.all] - every.bound.nats
    difference, stderr = mean_and_stderr(model.facts.bits_per_dim(common))
    loop, ours = side(every), side(few)
    plain = "evaluations_for_0.005_without_regression"
    report = {
        "loop": loop,
        "ours": ours,
        "difference_on_common_examples": float(difference),
        "its_stderr": float(stderr),
        "loop_over_ours": loop[plain] / ours["evaluations_for_0.005"],
        "loop_over_ours_without_regression": loop[plain] / ours[plain],
        "threads": torch.get_num_threads(),
    }
    print(json.dumps(report, indent=2))


if __name__ == "__main__":
    main()
