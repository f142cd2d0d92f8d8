"""The verbs of the command line that look, and train nothing: at data, at a derivation, at this program and machine.

Nothing heavy is imported until a verb runs.
"""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, cast

import typer

from ancestral.apps.options import Debug, Json, RunPath, Seed
from ancestral.apps.speech import Sayer, guarded, print_json
from ancestral.errors import OptionError, Refused

if TYPE_CHECKING:
    from ancestral.data.dataset import Fit

app = typer.Typer(rich_markup_mode=None)
about_data = typer.Typer(help="Look at data before training on it.", rich_markup_mode=None, no_args_is_help=True)
app.add_typer(about_data, name="data")


@app.command(epilog="Example:  ancestral figures runs/digits-0001")
def figures(
    run: RunPath,
    seed: Seed = 0,
    out: Annotated[Path | None, typer.Option(help="Directory for the files; by default inside RUN.")] = None,
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Draw the derivation: four families, the forward chain, the swiss roll there and back, the terms of the bound."""
    with guarded(as_json, debug):
        from ancestral.apps import figures as drawing
        from ancestral.apps import output
        from ancestral.apps.progress import Progress
        from ancestral.diffusion.model import Diffusion
        from ancestral.training import checkpoint
        from ancestral.training.run import reload

        saved = checkpoint.open_run(run)
        if not isinstance(saved.model, Diffusion):
            raise OptionError(f"{run}: is a {saved.family}, and the figures are of a diffusion model's chain")
        with Progress() as progress:
            data = reload(run, progress.update)
            folder = output.fresh(out or checkpoint.run_of(run), "figures")
            artifacts = drawing.draw_all(saved.model, data, folder, seed=seed, progress=progress.update)
        say = Sayer(as_json)
        say(f"figures of {saved.path}, seed {seed}")
        for path in artifacts.values():
            say(f"  {path}")
        if as_json:
            print_json(seed=seed, artifacts={name: str(path) for name, path in artifacts.items()})


@app.command(
    epilog="Examples:  ancestral certify  |  ancestral certify --sampler heun --thorough  |  "
    "ancestral certify --plugin mine.py --json"
)
def certify(
    sampler: Annotated[list[str] | None, typer.Option(help="Only this sampler; may be repeated.")] = None,
    schedule: Annotated[list[str] | None, typer.Option(help="Only this schedule.")] = None,
    predicts: Annotated[list[str] | None, typer.Option(help="Only this parameterization.")] = None,
    grid: Annotated[list[str] | None, typer.Option(help="Only this grid.")] = None,
    likelihood: Annotated[list[str] | None, typer.Option(help="Only this likelihood.")] = None,
    plugin: Annotated[
        str | None, typer.Option(help="Grade what a Python file or module:name defines; this runs its code.")
    ] = None,
    thorough: Annotated[bool, typer.Option("--thorough", help="The full product with more samples.")] = False,
    seed: Seed = 0,
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Grade samplers, grids, processes and likelihoods against exact laws; exit code 6 if one fails."""
    with guarded(as_json, debug):
        from ancestral.apps import certify as told
        from ancestral.apps.progress import Progress
        from ancestral.measure.certification import certify as grading

        with Progress() as progress:
            found = grading.certify(
                samplers=sampler,
                schedules=schedule,
                predicts=predicts,
                grids=grid,
                likelihoods=likelihood,
                plugin=plugin,
                thorough=thorough,
                seed=seed,
                progress=progress.update,
            )
        for line in told.lines(found):
            Sayer(as_json)(line)
        if as_json:
            print_json(**found.model_dump(mode="json", exclude_none=True))
    if not found.passed:
        raise typer.Exit(Refused.exit_code)


@about_data.command("check", epilog="Examples:  ancestral data check photos/  |  ancestral data check table.csv --json")
def check_data(
    data: Annotated[str, typer.Argument(metavar="DATA", help="'digits', a toy's name, or a path.")],
    size: Annotated[int | None, typer.Option(min=4, help="Side to which images are brought.")] = None,
    fit: Annotated[
        str, typer.Option(help="Of other proportions: 'crop' the centre, 'pad' with black, 'stretch'.")
    ] = "crop",
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Count, measure and compare everything in DATA, name what is wrong, and say what to begin with here."""
    with guarded(as_json, debug):
        from ancestral.apps import checking
        from ancestral.apps.progress import Progress

        with Progress() as progress:
            found = checking.checked(data, size, cast("Fit", fit or "crop"), progress.update)
        for line in checking.lines(found):
            Sayer(as_json)(line)
        if as_json:
            print_json(**found.model_dump(mode="json"))


@app.command(epilog="Example:  ancestral doctor --json")
def doctor(as_json: Json = False, debug: Debug = False) -> None:
    """Say what this machine has: versions, cores, threads, bfloat16, memory, disk, and how fast it convolves."""
    with guarded(as_json, debug):
        from ancestral.apps import doctor as machine

        found = machine.doctor()
        for line in machine.lines(found):
            Sayer(as_json)(line)
        if as_json:
            print_json(**found)


@app.command(epilog="Example:  ancestral presets --size 32 --channels 3")
def presets(
    size: Annotated[int, typer.Option(min=4, help="Side of the images.")] = 32,
    channels: Annotated[int, typer.Option(min=1, max=4, help="Channels of the images.")] = 3,
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Print every preset network with its parameters, FLOPs, memory, and its speed on this machine."""
    with guarded(as_json, debug):
        from ancestral.apps import doctor as machine
        from ancestral.apps.progress import Progress

        with Progress() as progress:
            table = machine.presets_table(channels, size, progress=progress.update)
        for line in machine.table_lines(table):
            Sayer(as_json)(line)
        if as_json:
            print_json(size=size, channels=channels, presets=table)
