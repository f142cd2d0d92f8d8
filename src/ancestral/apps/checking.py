"""`ancestral data check`: what is in a set of data, what may be wrong with it, and what to begin with here."""

from pathlib import Path

from ancestral.data import Data, load, machine
from ancestral.data.check import Check, Suggestion, check
from ancestral.data.dataset import Fit, Progress
from ancestral.data.sources import is_resized
from ancestral.errors import OptionError
from ancestral.training import loop, recipes, resources

LARGE = 96  # pixels of a side from which a smaller one is suggested
SMALLER = 64
PACE = 4.0  # seconds of training that are measured


def checked(source: str | Path, size: int | None, fit: Fit, progress: Progress | None) -> Check:
    """Read the data and look at all of it, then see how long the recipe that suits it takes here."""
    data = load(source, size=size, fit=fit, progress=progress)
    found = check(data)
    if size is None and data.facts.is_image and max(data.facts.shape[1:]) > LARGE and is_resized(source):
        data = load(source, size=SMALLER, fit=fit, progress=progress)
    try:
        return found.model_copy(update={"suggestion": _suggested(data)})
    except OptionError as error:  # not even the recipe that suits it fits
        return found.model_copy(update={"problems": [*found.problems, str(error)]})


def lines(found: Check) -> list[str]:
    """The same as a person reads it."""
    copies = found.duplicates
    near = "" if copies.near is None else f", {copies.near:,} nearly ({copies.near_across:,} across the split)"
    levels = f", {found.levels_used:,} of {found.levels:,} levels occur" if found.levels else ""
    said = [
        f"{found.name}: {found.n_train:,} train + {found.n_held_out:,} held-out {found.kind} of "
        f"{'x'.join(map(str, found.shape))}",
        f"values from {found.minimum:g} to {found.maximum:g}{levels}",
    ]
    said += [f"sizes: {_counts(found.sizes)}; modes: {_counts(found.modes)}"] if found.sizes else []
    said += [f"classes: {_counts(found.classes)}"] if found.classes else []
    said += [f"copies: {copies.exact:,} exactly ({copies.exact_across:,} across the split){near}"]
    said += [f"note: {note}" for note in found.notes]
    said += [f"cannot be read: {bad}" for bad in found.unreadable]
    said += [f"problem: {problem}" for problem in found.problems] or ["no problems found"]
    if found.suggestion:
        size = f" --size {found.suggestion.size}" if found.suggestion.size else ""
        said.append(
            f"begin with: ancestral train {found.source}{size}   (recipe {found.suggestion.recipe}: "
            f"{found.suggestion.parameters:,} parameters, {found.suggestion.steps:,} steps of "
            f"{found.suggestion.batch:,}, about {found.suggestion.minutes:.1f} minutes here)"
        )
    return said


def warning(data: Data) -> str | None:
    """One line for who trains, if something is wrong with the data."""
    problems = check(data, near=False).problems
    shown = f"'ancestral data check {data.facts.source}' shows more"
    return f"note: {'; '.join(problems)}; {shown}" if problems else None


def _suggested(data: Data) -> Suggestion:
    facts = data.facts
    setup = recipes.choose(facts)
    model = recipes.build(setup, facts, 0)
    cost = resources.cost(model, setup, data)
    resources.refuse_if_too_large(cost, setup.training.batch, machine.available_memory())
    seconds = loop.pace(model, data, setup.training, seed=0, seconds=PACE)
    steps = setup.training.steps or max(1, round((setup.training.minutes or 1.0) * 60 / seconds))
    square = facts.is_image and facts.shape[1] == facts.shape[2]
    return Suggestion(
        size=facts.shape[1] if square and is_resized(facts.source) else None,
        recipe=setup.recipe,
        parameters=cost.parameters,
        steps=steps,
        batch=setup.training.batch,
        seconds_per_step=seconds,
        minutes=steps * seconds / 60,
    )


def _counts(counts: dict[str, int]) -> str:
    shown = [f"{name} ({count:,})" for name, count in list(counts.items())[:10]]
    return ", ".join(shown + ["..."] * (len(counts) > len(shown)))
