"""The command line. Nothing heavy is imported until a verb runs, so that `--help` answers at once."""

import contextlib
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, cast

import typer

from ancestral.apps import looking
from ancestral.apps.options import Debug, Ema, Features, Fitted, Json, RunPath, Seed
from ancestral.apps.speech import Sayer, guarded, print_json, say_failure, signals
from ancestral.errors import OptionError, unknown

if TYPE_CHECKING:
    from ancestral.apps import sampling
    from ancestral.apps.progress import Progress
    from ancestral.data import Data
    from ancestral.data.dataset import Fit
    from ancestral.training.checkpoint import Saved
    from ancestral.training.recipes import Model
    from ancestral.training.settings import Family

app = typer.Typer(
    name="ancestral",
    help="Train, sample and measure generative models.\n\n"
    "DATA is 'digits', a toy (ring-8, swiss-roll, ...), or a path: a folder, zip or tar of images, "
    "a table (.csv), IDX, .npy or .npz.",
    epilog="Start with:  ancestral train digits",
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    add_completion=False,
)

app.add_typer(looking.app)

LATENTS = 10_000  # of training examples, at most, to which a mixture is fitted
FAMILIES = ("diffusion", "vae", "flow", "gan")
LIKELIHOODS = ("bound", "all-steps", "limit", "ode", "both")


@app.command(
    epilog="Examples:  ancestral train digits  |  ancestral train photos/ --size 32 --minutes 30  |  "
    "ancestral train mnist/ --set unet.width=48 --set process.schedule=linear  |  ancestral train --resume RUN  |  "
    "torchrun --nproc-per-node 2 -m ancestral train DATA --to RUN"
)
def train(
    data: Annotated[str | None, typer.Argument(metavar="DATA", help="'digits', a toy's name, or a path.")] = None,
    to: Annotated[
        Path | None, typer.Option(help="Run directory, which goes on if it is one; by default the next runs/NAME-0001.")
    ] = None,
    resume: Annotated[Path | None, typer.Option(metavar="RUN", help="Go on with this run, as it was begun.")] = None,
    weights: Annotated[
        Path | None,
        typer.Option(
            "--from", metavar="RUN", help="Begin with its weights: to train longer, or on other data of its kind."
        ),
    ] = None,
    minutes: Annotated[float | None, typer.Option(help="Of training; turned into steps by measuring the pace.")] = None,
    steps: Annotated[int | None, typer.Option(help="Number of steps, in place of minutes.")] = None,
    seed: Annotated[int | None, typer.Option(min=0, help="Of everything random, recorded; 0 by default.")] = None,
    size: Annotated[int | None, typer.Option(min=4, help="Side to which images are brought.")] = None,
    fit: Fitted = None,
    family: Annotated[str | None, typer.Option(help="diffusion (the default), vae, flow or gan.")] = None,
    recipe: Annotated[
        str | None,
        typer.Option(help="digits, images, vectors, mnist_bits, ladder, continuous, classic-gan, ..."),
    ] = None,
    preset: Annotated[
        str | None, typer.Option(help="Network: tiny, small, base, dit-tiny, dit-small, dit-base.")
    ] = None,
    changes: Annotated[list[str] | None, typer.Option("--set", help="section.key=value; may be repeated.")] = None,
    checkpoint_every: Annotated[int | None, typer.Option(min=1, help="Steps between checkpoints.")] = None,
    on_bad: Annotated[
        str | None, typer.Option(help="'skip' files that cannot be read and count them (default), or 'fail'.")
    ] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Say what it would take, and write nothing.")] = False,
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Train a model on DATA and write a run directory; the same command again goes on where it stopped."""
    with guarded(as_json, debug):
        from ancestral.apps import checking, output
        from ancestral.apps.progress import Progress
        from ancestral.training import processes, start

        if on_bad not in (None, "skip", "fail"):
            raise unknown("--on-bad", on_bad, ("skip", "fail"))
        if fit not in (None, "crop", "pad", "stretch"):
            raise unknown("--fit", fit, ("crop", "pad", "stretch"))
        every = [] if checkpoint_every is None else [f"training.checkpoint_every={checkpoint_every}"]
        wishes = start.Wishes(
            minutes=minutes,
            steps=steps,
            seed=seed,
            size=size,
            fit=cast("Fit | None", fit),
            family=cast("Family | None", family),
            recipe=recipe,
            preset=preset,
            changes=[*(changes or []), *every],
            on_bad=None if on_bad is None else "fail" if on_bad == "fail" else "skip",
            weights=weights,
        )
        argv = ["ancestral", *sys.argv[1:]]
        with signals() as asked, processes.join() as group, Progress(quiet=not group.first) as progress:
            if dry_run:
                about = _given(data, resume, to)
                planned = start.plan(about, group=group, progress=progress.update, measure=True, **wishes)
                lines, told = output.plan_told(planned, group)
                if group.first:
                    for line in lines:
                        Sayer(as_json)(line)
                    if as_json:
                        print_json(**told)
                return
            run = start.prepare(data, to=to, resume=resume, argv=argv, group=group, progress=progress.update, **wishes)
            say = Sayer(as_json, run, quiet=not group.first)
            parameters = sum(p.numel() for p in run.model.parameters())
            say(run.data.description)
            say(
                f"recipe {run.setup.recipe}: {parameters:,} parameters, {run.total:,} steps of "
                f"{run.setup.training.batch} examples, seed {run.seed}"
            )
            if begun := run.record.get("weights"):
                say(f"begun with the weights of {begun['run']} after its step {begun['step']:,}")
            if run.done:
                say(f"goes on after step {run.done:,}" if run.done < run.total else "has been trained to its end")
            if run.done and run.rounding:
                say(f"note: equal to an uninterrupted run up to rounding, not to the bit: {run.rounding}")
            _warn_of_the_chain(run.model, run.data, say)
            if group.first and (wrong := checking.warning(run.data)):
                say(wrong)
            asked.patiently(f"stopping after this step with a checkpoint in {run.path}; once more stops at once")
            loss, seconds = None, 0.0
            with contextlib.closing(run.steps(stop=lambda: asked.once)) as records:
                for record in records:
                    loss, seconds = sum(record.loss.values()), record.seconds
                    progress.update("training", record.step, run.total, f"loss {loss:.4f}")
        if not group.first:
            return
        speed = (run.total - run.done) * run.setup.training.batch / seconds if seconds else 0.0
        if seconds:
            say(f"trained in {seconds / 60:.1f} minutes, {speed:,.0f} examples/s")
        say(f"run: {run.path}")
        if as_json:
            print_json(
                run=str(run.path),
                steps=run.total,
                begun_at=run.done,
                images_per_second=round(speed, 1),
                seconds=round(seconds, 2),
                seed=run.seed,
                loss=loss,
                artifacts={"final": str(run.path / "final"), "samples": str(run.path / "samples")},
            )


@app.command(
    epilog="Examples:  ancestral sample runs/digits-0001 --sheet  |  ancestral sample RUN -n 50000 --steps 250"
)
def sample(
    run: RunPath,
    n: Annotated[int, typer.Option("-n", "--n", min=1, help="How many.")] = 64,
    steps: Annotated[
        int | None,
        typer.Option(min=1, max=100_000, help="Of the sampler, 50 by default; evaluations of one that is fitted."),
    ] = None,
    sampler: Annotated[
        str | None,
        typer.Option(help="ancestral (the default), ddim, heun, dpmpp-2m, ...; or 'fitted' to this model."),
    ] = None,
    grid: Annotated[
        str | None, typer.Option(help="Of times: uniform, log-snr, karras, ..., or 'best', the steps of least bound.")
    ] = None,
    seed: Seed = 0,
    ema: Ema = None,
    out: Annotated[Path | None, typer.Option(help="Directory for the files; by default inside RUN.")] = None,
    label: Annotated[str | None, typer.Option(help="Class to draw from, if the model knows classes.")] = None,
    prior: Annotated[
        str | None,
        typer.Option(help="'mixture': of a VAE, draw latents from a mixture fitted to those of training examples."),
    ] = None,
    sheet: Annotated[bool, typer.Option("--sheet", help="Also a contact sheet of how the first came about.")] = False,
    gif: Annotated[bool, typer.Option("--gif", help="Also an animation of it.")] = False,
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Draw samples, batch by batch into one .npy, with a PNG; the same command goes on where it was stopped."""
    with guarded(as_json, debug):
        from ancestral.apps import sampling, walking
        from ancestral.apps.progress import Progress
        from ancestral.diffusion.model import STEPS, Diffusion
        from ancestral.training import checkpoint, processes

        with signals(), processes.join() as group, Progress(quiet=not group.first) as progress:
            saved = checkpoint.open_run(run, ema)
            saved.model.to(group.device)
            if prior not in (None, "mixture"):
                raise unknown("--prior", prior, ("mixture",))
            if isinstance(saved.model, Diffusion):
                if prior:
                    raise OptionError("--prior is of the latents of a vae, and this is a diffusion model: leave it out")
                way: sampling.Way = walking.way(
                    saved,
                    saved.model,
                    sampler or "ancestral",
                    grid,
                    steps or STEPS,
                    checkpoint.run_of(run) / "fits",
                    gif=gif,
                    sheet=sheet,
                    progress=progress.update,
                    group=group,
                )
            else:
                _refuse_a_walk(saved.setup.family, sampler=sampler, steps=steps, grid=grid, gif=gif, sheet=sheet)
                way = _at_once(saved, prior, progress)
            recipe = {"run": str(saved.path), "n": n, **way.recipe, "seed": seed}
            recipe |= {"ema": ema} if ema is not None else {}
            recipe |= {"label": label} if label is not None else {}
            drawn = sampling.draw_samples(
                saved,
                out or checkpoint.run_of(run) / "samples",
                n,
                recipe,
                way,
                seed=seed,
                label=label,
                progress=progress.update,
                group=group,
            )
        if not group.first:
            return
        for line in drawn.lines(recipe):
            Sayer(as_json)(line)
        if as_json:
            print_json(**drawn.record(recipe))


@app.command(
    epilog="Examples:  ancestral evaluate runs/digits-0001  |  ancestral evaluate RUN --tolerance 0.005  |  "
    "ancestral evaluate RUN --likelihood both --json  |  ancestral evaluate RUN --compare OTHER"
)
def evaluate(
    run: RunPath,
    data: Annotated[str | None, typer.Option(help="Measure on the held-out split of this instead.")] = None,
    n: Annotated[
        int | None,
        typer.Option(
            "-n", "--n", min=2, help="Held-out examples, at most: 2,000, all with --tolerance, 64 by the ODE."
        ),
    ] = None,
    likelihood: Annotated[
        str,
        typer.Option(
            help="'bound' draws terms by importance, 'all-steps' computes all, 'limit' is of infinitely many steps; "
            "'ode' and 'both' also follow the probability-flow ODE."
        ),
    ] = "bound",
    tolerance: Annotated[
        float | None, typer.Option(help="Measure until the standard error is this small, in bits/dim (or nats).")
    ] = None,
    steps: Annotated[int | None, typer.Option(min=2, help="Of the chain, in place of the model's own.")] = None,
    best: Annotated[bool, typer.Option("--best", help="Of all chains of --steps steps, the least bound.")] = False,
    variance: Annotated[
        str | None, typer.Option(help="Of the reverse chain: beta, fixed-large, fixed-small, learned or optimal.")
    ] = None,
    draws: Annotated[
        int | None,
        typer.Option(min=1, help="Weights: 64 (vae), 8 (flow on levels)."),
    ] = None,
    compare: Annotated[
        Path | None, typer.Option(metavar="OTHER", help="Another run, measured on the same examples and noise.")
    ] = None,
    ema: Annotated[
        str | None, typer.Option(help="Lengths of the average of the weights, such as 0.02,0.05,0.1: one table of all.")
    ] = None,
    samples: Annotated[
        int | None,
        typer.Option(min=0, help="Compared with data: 1,000 (diffusion 256), and 120 at least; 0 for none."),
    ] = None,
    features: Features = None,
    seed: Seed = 0,
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Measure how likely held-out data is, beside two simple densities, and how samples stand to data."""
    with guarded(as_json, debug):
        from ancestral.apps import evaluating, output
        from ancestral.apps.progress import Progress
        from ancestral.training import checkpoint, processes

        if likelihood not in LIKELIHOODS:
            raise unknown("--likelihood", likelihood, LIKELIHOODS)
        lengths = _lengths(ema)
        with signals(), processes.join() as group, Progress(quiet=not group.first) as progress:
            say = Sayer(as_json, quiet=not group.first)
            question = evaluating.Question(
                n=n,
                likelihood=likelihood,
                tolerance=tolerance,
                steps=steps,
                best=best,
                variance=variance,
                draws=draws,
                seed=seed,
                progress=progress.update,
                samples=samples,
                features=features,
                group=group,
            )
            opened = [checkpoint.open_run(run, length) for length in lengths]
            other = None if compare is None else checkpoint.open_run(compare)
            examples = _data_of(run, data, opened[0].model, progress, say)
            _warn_of_the_chain(opened[0].model, examples, say)
            result = evaluating.evaluation(question, opened, other, examples, sweep=ema is not None)
        if result is None:
            return
        for line in output.evaluation_lines(result):
            say(line)
        if as_json:
            print_json(**result.model_dump(mode="json", exclude_none=True))


@app.command(
    epilog="Examples:  ancestral compare digits --minutes 3 --seeds 5  |  "
    "ancestral compare photos/ --families diffusion,flow  |  ancestral compare RUN RUN"
)
def compare(
    what: Annotated[list[str], typer.Argument(metavar="DATA|RUN...", help="Data to train on, or finished runs.")],
    families: Annotated[str, typer.Option(help="Of diffusion, vae, flow and gan, with commas.")] = ",".join(FAMILIES),
    minutes: Annotated[float, typer.Option(min=0.01, help="Of training for each run, on one core.")] = 3.0,
    seeds: Annotated[int, typer.Option(min=1, help="Runs of each family.")] = 5,
    n: Annotated[
        int, typer.Option("-n", "--n", min=120, help="Samples of each run that are compared, at most.")
    ] = 1000,
    features: Features = None,
    to: Annotated[
        Path | None,
        typer.Option(
            help="Directory, which goes on if it is one; by default runs/NAME-compared, of runs with a hash of which."
        ),
    ] = None,
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Train families under one protocol from several seeds, or take finished runs; one table and one report of all."""
    with guarded(as_json, debug):
        from ancestral.apps import comparing
        from ancestral.apps.progress import Progress

        say = Sayer(as_json)
        with signals(), Progress() as progress:
            planned = comparing.plan(
                what,
                families=[each.strip() for each in families.split(",")],
                minutes=minutes,
                seeds=seeds,
                n=n,
                features=features,
                to=to,
                argv=["ancestral", *sys.argv[1:]],
                progress=progress.update,
            )
            say(planned.data.description)
            if planned.minutes is not None:
                say(
                    f"{len(planned.entries)} runs of {planned.minutes:g} minutes, {planned.together} at a time: "
                    f"about {planned.promise(len(planned.entries)):.0f} minutes of training, then they are measured"
                )
            result = comparing.compare(planned, progress.update, say)
        for line in comparing.lines(result):
            say(line)
        if as_json:
            print_json(**result.model_dump(mode="json"))


def _data_of(run: Path, data: str | None, model: "Model", progress: "Progress", say: "Sayer") -> "Data":
    """The data to measure on: what was named, or what the run was trained on, read again in the same way."""
    from ancestral.data.sources import is_resized, load
    from ancestral.training.run import fit_of, reload

    if data is not None:
        square = model.facts.is_image and model.facts.shape[1] == model.facts.shape[2]
        if not is_resized(data):
            return load(data, progress=progress.update)
        return load(data, size=model.facts.shape[1] if square else None, fit=fit_of(run), progress=progress.update)
    examples = reload(run, progress.update)
    if examples.facts.digest != model.facts.digest:
        say(f"note: {examples.facts.name} has changed since the run: what is held out may have been learnt from")
    return examples


def _given(data: str | None, resume: Path | None, to: Path | None) -> str:
    """DATA of a dry run, which is about a run that is not there yet."""
    if resume is not None or data is None:
        raise OptionError("--dry-run is about a new run: give DATA, and not --resume")
    if to is not None and to.is_dir() and any(to.iterdir()):
        raise OptionError(f"--dry-run is about a new run, and {to} is there already; leave --to out")
    return data


def _at_once(saved: "Saved", prior: str | None, progress: "Progress") -> "sampling.AtOnce":
    """The way of a model that draws at once; of a VAE, from a mixture fitted to its latents if that is asked for."""
    from ancestral.apps import sampling
    from ancestral.training.run import reload
    from ancestral.vae.model import VAE

    if prior is None:
        return sampling.AtOnce(saved.model, {})
    if not isinstance(saved.model, VAE):
        raise OptionError(f"--prior is of the latents of a vae, and this is a {saved.family}: leave it out")
    data = reload(saved.path, progress.update)
    return sampling.AtOnce(saved.model, {"prior": prior}, prior=saved.model.aggregate(data.train[:LATENTS]))


def _refuse_a_walk(family: str, **given: object) -> None:
    """Refuses options of a walk from noise to data for a model that draws at once."""
    for name, value in given.items():
        if value:
            raise OptionError(f"--{name} is of a walk from noise to data, and a {family} draws at once: leave it out")


def _lengths(ema: str | None) -> list[float | None]:
    try:
        return [None] if ema is None else [float(part) for part in ema.split(",")]
    except ValueError:
        raise OptionError(f"--ema is a length such as 0.05, or several as 0.02,0.05,0.1, received {ema!r}") from None


def _warn_of_the_chain(model: "Model", data: "Data", say: "Sayer") -> None:
    """F4 and F5: says when betas do not increase, and when the end of the chain still knows of the data."""
    from ancestral.diffusion.model import Diffusion

    if not isinstance(model, Diffusion):
        return
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
        code = say_failure(f"{sentence}; {shown}", 2, "--json" in sys.argv)
    sys.exit(code)


if __name__ == "__main__":
    main()
