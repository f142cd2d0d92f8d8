"""The command line. Nothing heavy is imported until a verb runs, so that `--help` answers at once."""

import contextlib
import errno
import json
import signal
import sys
import traceback
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ancestral.errors import AncestralError, unknown

if TYPE_CHECKING:
    from ancestral.apps.progress import Progress
    from ancestral.data import Data
    from ancestral.diffusion.model import Diffusion

app = typer.Typer(
    name="ancestral",
    help="Train, sample and measure generative models.\n\n"
    "DATA is 'digits', a toy (ring-8, swiss-roll, ...), or a path: a folder or zip of images, IDX, .npy or .npz.",
    epilog="Start with:  ancestral train digits",
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    add_completion=False,
)

Json = Annotated[bool, typer.Option("--json", help="Print one JSON object on stdout, everything else on stderr.")]
Seed = Annotated[int, typer.Option(min=0, help="Of everything random; printed and recorded.")]
Debug = Annotated[bool, typer.Option("--debug", hidden=True)]
RunPath = Annotated[Path, typer.Argument(metavar="RUN", help="A run directory, or a checkpoint inside one.")]


@app.command(
    epilog="Examples:  ancestral train digits  |  ancestral train photos/ --size 32 --minutes 30  |  "
    "ancestral train mnist/ --set unet.width=48 --set process.schedule=linear"
)
def train(
    data: Annotated[str, typer.Argument(metavar="DATA", help="'digits', a toy's name, or a path.")],
    to: Annotated[Path | None, typer.Option(help="Run directory; by default the next free runs/NAME-0001.")] = None,
    minutes: Annotated[float | None, typer.Option(help="Of training; turned into steps by measuring the pace.")] = None,
    steps: Annotated[int | None, typer.Option(help="Number of steps, in place of minutes.")] = None,
    seed: Seed = 0,
    size: Annotated[int | None, typer.Option(min=4, help="Side to which images are cropped and resized.")] = None,
    recipe: Annotated[str | None, typer.Option(help="digits, images or vectors; by default chosen by shape.")] = None,
    changes: Annotated[list[str] | None, typer.Option("--set", help="section.key=value; may be repeated.")] = None,
    on_bad: Annotated[str, typer.Option(help="'skip' files that cannot be read and count them, or 'fail'.")] = "skip",
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Train a model on DATA and write a run directory."""
    with _guarded(as_json, debug):
        from ancestral.training import run as runs

        if on_bad not in ("skip", "fail"):
            raise unknown("--on-bad", on_bad, ("skip", "fail"))
        from ancestral.apps.progress import Progress

        with _signals(), Progress() as progress:
            run = runs.prepare(
                data,
                to=to,
                minutes=minutes,
                steps=steps,
                seed=seed,
                size=size,
                recipe=recipe,
                changes=changes or [],
                on_bad="fail" if on_bad == "fail" else "skip",
                argv=["ancestral", *sys.argv[1:]],
                progress=progress.update,
            )
            parameters = sum(p.numel() for p in run.model.parameters())
            say = _Sayer(as_json, run)
            say(run.data.description)
            say(
                f"recipe {run.setup.recipe}: {parameters:,} parameters, {run.total:,} steps of "
                f"{run.setup.training.batch} examples, seed {seed}"
            )
            _warn_of_the_chain(run.model, run.data, say)
            with contextlib.closing(run.steps()) as records:  # an interrupt between two steps, too, is seen to
                for record in records:
                    (loss,) = record.loss.values()
                    progress.update("training", record.step, run.total, f"loss {loss:.4f}")
        seconds = record.seconds
        speed = record.step * run.setup.training.batch / seconds
        say(f"trained in {seconds / 60:.1f} minutes, {speed:,.0f} examples/s")
        say(f"run: {run.path}")
        if as_json:
            _print_json(
                run=str(run.path),
                steps=record.step,
                images_per_second=round(speed, 1),
                seconds=round(seconds, 2),
                seed=seed,
                loss=loss,
                artifacts={"final": str(run.path / "final"), "samples": str(run.path / "samples")},
            )


@app.command(epilog="Examples:  ancestral sample runs/digits-0001  |  ancestral sample RUN -n 16 --steps 250 --gif")
def sample(
    run: RunPath,
    n: Annotated[int, typer.Option("-n", "--n", min=1, help="How many.")] = 64,
    steps: Annotated[int, typer.Option(min=1, help="Steps of the sampler.")] = 100,
    sampler: Annotated[str, typer.Option(help="ancestral, ddim, euler, heun or annealed-langevin.")] = "ancestral",
    seed: Seed = 0,
    out: Annotated[Path | None, typer.Option(help="Directory for the files; by default inside RUN.")] = None,
    gif: Annotated[bool, typer.Option("--gif", help="Also the reverse chain as an animation.")] = False,
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Draw samples: a PNG, an .npz, and on request a GIF of the reverse chain."""
    with _guarded(as_json, debug):
        from ancestral.apps import output
        from ancestral.apps.progress import Progress
        from ancestral.diffusion.sample import SAMPLERS
        from ancestral.training import checkpoint

        if sampler not in SAMPLERS:
            raise unknown("sampler", sampler, SAMPLERS)
        model, _, source = checkpoint.load_with_setup(run)
        with Progress() as progress:
            drawn = output.draw_samples(
                model, n, steps=steps, sampler=SAMPLERS[sampler], seed=seed, keep_path=gif, progress=progress.update
            )
        recipe = {"run": str(source), "n": n, "sampler": sampler, "steps": steps, "seed": seed}
        folder = out or checkpoint.run_of(run) / "samples"
        artifacts = output.write_samples(folder, model.facts, drawn, recipe)
        say = _Sayer(as_json)
        say(
            f"{n} samples by {sampler} in {steps} steps, seed {seed}: {drawn.seconds:.1f} s, "
            f"{drawn.evaluations:,} evaluations"
        )
        for path in artifacts.values():
            say(f"  {path}")
        if as_json:
            _print_json(
                images=n, evaluations=drawn.evaluations, seconds=round(drawn.seconds, 3), seed=seed, artifacts=artifacts
            )


@app.command(
    epilog="Examples:  ancestral evaluate runs/digits-0001  |  "
    "ancestral evaluate RUN --likelihood all-steps --n 100 --json"
)
def evaluate(
    run: RunPath,
    data: Annotated[str | None, typer.Option(help="Measure on the held-out split of this instead.")] = None,
    n: Annotated[int, typer.Option("-n", "--n", min=2, help="Held-out examples, at most.")] = 2000,
    likelihood: Annotated[
        str, typer.Option(help="'bound' draws terms at random steps; 'all-steps' computes all.")
    ] = "bound",
    seed: Seed = 0,
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Measure the variational bound on held-out data, term by term, beside two simple densities."""
    with _guarded(as_json, debug):
        from ancestral.apps import figures, output
        from ancestral.apps.progress import Progress
        from ancestral.measure import evaluate as measuring
        from ancestral.training import checkpoint

        if likelihood not in ("bound", "all-steps"):
            raise unknown("--likelihood", likelihood, ("bound", "all-steps"))
        model, _, source = checkpoint.load_with_setup(run)
        say = _Sayer(as_json)
        with Progress() as progress:
            examples = _data_of(run, data, model, progress, say)
            _warn_of_the_chain(model, examples, say)
            measured = measuring.evaluate(
                model,
                examples,
                n=n,
                draws=None if likelihood == "all-steps" else measuring.DRAWS,
                seed=seed,
                progress=progress.update,
            )
        folder = output.fresh(checkpoint.run_of(run), "evaluation")
        folder.mkdir(parents=True)
        artifacts = {"terms": str(folder / "terms.png"), "evaluation": str(folder / "evaluation.json")}
        recipe = {"run": str(source), "n": n, "likelihood": likelihood, "seed": seed}
        figures.save(figures.terms(measured.bound, model.facts), Path(artifacts["terms"]), recipe)
        result = measured.evaluation(
            run=str(source), data=examples.facts.name, variance=model.variance, seed=seed, artifacts=artifacts
        )
        record = result.model_dump(mode="json", exclude_none=True)
        checkpoint.write_json(folder / "evaluation.json", record)
        for line in output.evaluation_lines(result):
            say(line)
        if as_json:
            _print_json(**record)


@app.command(epilog="Example:  ancestral figures runs/digits-0001")
def figures(
    run: RunPath,
    seed: Seed = 0,
    out: Annotated[Path | None, typer.Option(help="Directory for the files; by default inside RUN.")] = None,
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Draw the derivation: four families, the forward chain, the swiss roll there and back, the terms of the bound."""
    with _guarded(as_json, debug):
        from ancestral.apps import figures as drawing
        from ancestral.apps import output
        from ancestral.apps.progress import Progress
        from ancestral.training import checkpoint
        from ancestral.training.run import reload

        model, _, source = checkpoint.load_with_setup(run)
        with Progress() as progress:
            data = reload(run, progress.update)
            folder = output.fresh(out or checkpoint.run_of(run), "figures")
            artifacts = drawing.draw_all(model, data, folder, seed=seed, progress=progress.update)
        say = _Sayer(as_json)
        say(f"figures of {source}, seed {seed}")
        for path in artifacts.values():
            say(f"  {path}")
        if as_json:
            _print_json(seed=seed, artifacts={name: str(path) for name, path in artifacts.items()})


class _Sayer:
    """Says lines on stdout, or on stderr when stdout is for JSON, and into the log of a run that is being made."""

    def __init__(self, as_json: bool, run: Any = None) -> None:
        self.stream, self.run = sys.stderr if as_json else sys.stdout, run

    def __call__(self, line: str) -> None:
        print(line, file=self.stream, flush=True)
        if self.run is not None:
            self.run.log(line)


@contextlib.contextmanager
def _guarded(as_json: bool, debug: bool) -> Iterator[None]:
    """Turns what goes wrong into one sentence on stderr and the exit code that stands for it."""
    try:
        yield
    except KeyboardInterrupt:
        _fail("stopped; what was saved is whole", 3, as_json)
    except AncestralError as error:
        if debug:
            traceback.print_exc()
        _fail(" ".join(str(error).split()), error.exit_code, as_json)
    except OSError as error:
        if debug:
            traceback.print_exc()
        full = error.errno == errno.ENOSPC
        _fail(f"{error.filename or 'the disk'}: {error.strerror or error}", 4 if full else 2, as_json)
    except Exception as error:
        if debug:
            raise
        _fail(f"a bug in ancestral: {type(error).__name__}: {error} (--debug shows where)", 1, as_json)


def _fail(sentence: str, code: int, as_json: bool) -> None:
    raise typer.Exit(_say_failure(sentence, code, as_json))


def _say_failure(sentence: str, code: int, as_json: bool) -> int:
    print(f"ancestral: {sentence}", file=sys.stderr)  # noqa: T201
    if as_json:
        _print_json(error=sentence, exit_code=code)
    return code


def _print_json(**record: Any) -> None:
    print(json.dumps(record))  # noqa: T201


def _data_of(run: Path, data: str | None, model: "Diffusion", progress: "Progress", say: "_Sayer") -> "Data":
    """The data to measure on: what was named, or what the run was trained on, read again in the same way."""
    from ancestral.data import load
    from ancestral.training.run import reload

    if data is not None:
        square = model.facts.is_image and model.facts.shape[1] == model.facts.shape[2]
        files = Path(data).is_dir() or data.lower().endswith(".zip")
        return load(data, size=model.facts.shape[1] if square and files else None, progress=progress.update)
    examples = reload(run, progress.update)
    if examples.facts.digest != model.facts.digest:
        say(f"note: {examples.facts.name} has changed since the run: what is held out may have been learnt from")
    return examples


def _warn_of_the_chain(model: "Diffusion", data: "Data", say: "_Sayer") -> None:
    """F4 and F5: says when betas do not increase, and when the end of the chain still knows of the data."""
    facts, process = model.facts, model.process
    if process.constraint == "variance-preserving" and not process.chain(model.chain).increasing:
        say("note: the betas of this chain do not increase throughout; alpha_bar decreases, which is what is needed")
    left = float(process.terminal_kl(facts.scale.forward(data.held_out[:256])).mean())
    left = facts.bits_per_dim(left) if facts.levels else left
    if left > 0.01:
        say(
            f"note: the chain ends with {left:.3f} {facts.unit} of the data not forgotten; a schedule that ends in "
            "more noise would forget them"
        )


@contextlib.contextmanager
def _signals() -> Iterator[None]:
    """While training, SIGTERM stops as Ctrl-C does: with a checkpoint."""
    previous = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    for number in previous:
        signal.signal(number, signal.default_int_handler)
    try:
        yield
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


def main() -> None:
    """Entry point of the command: a usage error, too, is one sentence and exit code 2."""
    try:
        code = app(sys.argv[1:] or ["--help"], standalone_mode=False)
    except typer.Abort:
        code = 3
    except Exception as error:
        if not hasattr(error, "format_message"):
            raise
        sentence = " ".join(error.format_message().split()).rstrip(".")
        context = getattr(error, "ctx", None)
        shown = f"'{context.command_path if context else 'ancestral'} --help' shows what can be given"
        code = _say_failure(f"{sentence}; {shown}", 2, "--json" in sys.argv)
    sys.exit(code)


if __name__ == "__main__":
    main()
