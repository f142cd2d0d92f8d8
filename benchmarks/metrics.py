"""How long every number about samples takes, and how much memory: 10,000 samples against 10,000 examples.

    python benchmarks/metrics.py                       # images of 28x28, features of 64 dimensions
    python benchmarks/metrics.py --n 50000 --features 2048

Prints the seconds of each number and the most memory the process held, and both as one line of JSON.
"""

import argparse
import json
import resource
import time

import torch

from ancestral.measure.quality import METRICS, Sets
from ancestral.rng import randn, stream


def main() -> None:
    """What the first lines of this file say."""
    parser = argparse.ArgumentParser(description="Time and memory of every number about samples.")
    parser.add_argument("--n", type=int, default=10_000)
    parser.add_argument("--values", type=int, default=784)
    parser.add_argument("--features", type=int, default=64)
    options = parser.parse_args()
    raw = [
        torch.from_numpy(stream(key).integers(0, 256, (options.n, options.values), dtype="uint8")) for key in range(3)
    ]
    x, held_out, training = (each.double() / 255 for each in raw)
    features = tuple(randn((options.n, options.features), stream(key), dtype=torch.float64) for key in (3, 4))
    labels = tuple(torch.from_numpy(stream(key).integers(0, 10, options.n)) for key in (5, 6))
    sets = Sets(raw[0], raw[2], x, held_out, training, (features[0], features[1]), (labels[0], labels[1]))
    took = {}
    for name, metric in METRICS.items():
        began = time.perf_counter()
        metric.of(sets)
        took[name] = round(time.perf_counter() - began, 2)
        print(f"{metric.label:<26}{took[name]:8.2f} s", flush=True)
    gib = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    print(json.dumps({"n": options.n, "threads": torch.get_num_threads(), "seconds": took, "all": sum(took.values())}))
    print(f"{sum(took.values()):.0f} s, at most {gib:.2f} GiB with the sets themselves")


if __name__ == "__main__":
    main()
