"""Evaluations of the network for a standard error: all terms of the chain, as older codebases do it, or ours.

    python benchmarks/likelihood.py RUN [--all 64] [--few 2000]

The loop over all terms is measured on some held-out examples, the estimator of `ancestral evaluate` on more. With V the
variance of an example and c its cost in evaluations, a standard error e takes V c / e^2 of them, so the ratio of the
two does not depend on e. Prints one JSON object.
"""

import argparse
import json
from pathlib import Path

import torch

from ancestral.diffusion.likelihood import mean_and_stderr
from ancestral.measure.evaluate import Measured, evaluate
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


def main() -> None:
    """What the first lines of this file say."""
    parser = argparse.ArgumentParser(description="Evaluations of the network for a standard error.")
    parser.add_argument("run", help="a run directory")
    parser.add_argument("--all", type=int, default=64, help="examples whose terms are all computed")
    parser.add_argument("--few", type=int, default=2000, help="examples whose terms are drawn")
    options = parser.parse_args()
    model, data = checkpoint.load(options.run), reload(Path(options.run))
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
