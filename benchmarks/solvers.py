"""Our solvers beside those of diffusers and k-diffusion: error against evaluations, faults, time of a step, images.

    make bench-solvers                                                        # all but images
    PYTHONPATH=src .venv-peers/bin/python benchmarks/solvers.py --run RUN     # images, of a trained model
    ... --quick                                                               # a smoke test of everything asked for

Everything runs in the peers' environment, in one process. Writes what it measured into results/solvers.json, part by
part, and the tables of it into results/solvers.md.
"""

import argparse
import json
import os
import platform
import tempfile
import time
import warnings
from importlib.metadata import version
from pathlib import Path
from typing import Any

import diffusers
import solver_faults
import solver_finals
import solver_images
import solver_oracles
import solver_overhead
import solver_tables
import torch
from solver_problems import PROBLEMS

RESULTS = Path(__file__).parent / "results"
PARTS = ("oracles", "finals", "faults", "overhead", "images")

began = time.perf_counter()


def say(line: str) -> None:
    """A line of the log."""
    print(f"{time.perf_counter() - began:7.1f} s  {line}", flush=True)


def oracles(options: argparse.Namespace) -> dict[str, Any]:
    """Error against evaluations on every problem."""
    budgets = (5, 10) if options.quick else solver_oracles.BUDGETS
    return {name: solver_oracles.measure(PROBLEMS[name](options.quick), budgets, say) for name in options.problems}


def finals(options: argparse.Namespace) -> dict[str, Any]:
    """The best of theirs and our default from fresh starts; the pairs are those that the oracles' part wrote down."""
    found: dict[str, Any] = {}
    for name, known in json.loads(results(options)[0].read_text())["oracles"].items():
        if name in options.problems:
            starts = 64 if options.quick else None
            found |= solver_finals.measure(PROBLEMS[name](options.quick), known["rows"], starts, say)
    return found


def faults(options: argparse.Namespace) -> dict[str, Any]:
    """How fast the peers' solvers converge, on the plane."""
    return solver_faults.measure(PROBLEMS["plane"](options.quick), options.quick, say)


def overhead(options: argparse.Namespace) -> dict[str, Any]:
    """Time of a step beside the network."""
    return solver_overhead.measure(3 if options.quick else 25, say)


def images(options: argparse.Namespace) -> dict[str, Any]:
    """What a trained model makes of all of it."""
    if options.run is None:
        raise SystemExit("images need a trained model: --run RUN")
    return solver_images.measure(options.run, options.quick, say)


def results(options: argparse.Namespace) -> tuple[Path, Path]:
    """The report and its tables."""
    folder = Path(tempfile.gettempdir()) if options.quick else RESULTS
    return folder / "solvers.json", folder / "solvers.md"


def rounded(found: Any) -> Any:
    """The same with five digits of every number."""
    if isinstance(found, dict):
        return {key: rounded(value) for key, value in found.items()}
    if isinstance(found, list | tuple):
        return [rounded(value) for value in found]
    return float(f"{found:.5g}") if isinstance(found, float) else found


def keep(part: str, found: dict[str, Any], path: Path) -> dict[str, Any]:
    """Put what was found into the report beside what is there already."""
    report = json.loads(path.read_text()) if path.exists() else {}
    report["machine"] = {
        "platform": platform.platform(),
        "cores": os.cpu_count(),
        **{name: version(name) for name in ("torch", "diffusers", "k-diffusion")},
    }
    report[part] = report.get(part, {}) | found
    report.setdefault("seconds", {})[part] = round(time.perf_counter() - began, 1)
    path.parent.mkdir(exist_ok=True)
    path.write_text(json.dumps(rounded(report)) + "\n")
    return report


def main() -> None:
    """What the first lines of this file say."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--run", type=Path, help="run directory of a trained model of images")
    parser.add_argument("--parts", nargs="*", choices=PARTS, help="by default images with --run, else all others")
    parser.add_argument("--problems", nargs="*", choices=list(PROBLEMS), default=list(PROBLEMS))
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--quick", action="store_true", help="small sizes, kept out of results/: a smoke test")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    warnings.filterwarnings("ignore")
    diffusers.logging.set_verbosity_error()
    report, tables = results(options)
    for part in options.parts or (("images",) if options.run else PARTS[:4]):
        kept = keep(part, globals()[part](options), report)
        tables.write_text(solver_tables.render(kept))
    print(f"{report}, {tables}")


if __name__ == "__main__":
    main()
