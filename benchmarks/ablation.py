"""What each part of a recipe for bits per dimension is worth: the recipe, and the same with one part changed.

    python benchmarks/ablation.py digits --recipe digits_bits --steps 1000 --to runs/ablation

Trains every variant for as many steps from the same seed (a run that is there goes on, or is read), measures all on the
same held-out examples with the same noise, and prints one row each: bits per dimension, and by how much it is worse
than the recipe, paired. Writes DIR/ablation.json.
"""

import argparse
import json
from pathlib import Path

from ancestral.measure.evaluate import evaluate
from ancestral.training import checkpoint, start

PLAIN = ["unet.posterior=false", "diffusion.predicts=v", "diffusion.variance=fixed-small"]

VARIANTS: dict[str, list[str]] = {
    "as it is": [],
    "schedule learned, ends and shape": ["process.schedule=learned"],
    "schedule linear": ["process.schedule=linear"],
    "schedule cosine": ["process.schedule=cosine"],
    "no posterior over levels: v": PLAIN,
    "no posterior, no level phases": [*PLAIN, "unet.octaves=0"],
    "simple weighting": ["diffusion.weighting=simple"],
    "no attention": ["unet.attention=false"],
    "average of weights twice as long": ["training.ema=0.1"],
}


def main() -> None:
    """What the first lines of this file say."""
    parser = argparse.ArgumentParser(description="What each part of a recipe for bits is worth.")
    parser.add_argument("data")
    parser.add_argument("--recipe", default="digits_bits")
    parser.add_argument("--steps", type=int, default=1000)
    parser.add_argument("--to", type=Path, default=Path("runs/ablation"))
    parser.add_argument("--only", nargs="*", default=list(VARIANTS), help="variants, by name")
    options = parser.parse_args()
    rows, base = [], None
    for name in options.only:
        run = start.train(
            options.data,
            recipe=options.recipe,
            steps=options.steps,
            seed=0,
            changes=VARIANTS[name],
            to=options.to / name.replace(" ", "-").replace(",", "").replace(":", ""),
        )
        model = checkpoint.load(run.path)
        measured = evaluate(model, run.data)
        base = base or measured
        found, worse = measured.likelihood(), base.over(measured)
        rows.append(
            {
                "variant": name,
                "changes": VARIANTS[name],
                "bits_per_dim": found.value,
                "stderr": found.stderr,
                "worse": worse.value,
                "worse_stderr": worse.stderr,
                "parts": [found.prior, found.diffusion, found.decoder],
            }
        )
        print(
            f"| {name} | {found.value:.4f} ± {found.stderr:.4f} | {worse.value:+.4f} ± {worse.stderr:.4f} |", flush=True
        )
        (options.to / "ablation.json").write_text(json.dumps(rows, indent=2) + "\n")


if __name__ == "__main__":
    main()
