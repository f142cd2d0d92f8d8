"""What the verbs say, and where they leave things: free numbers, a plan, the lines of an evaluation."""

import math
from pathlib import Path
from typing import Any

from ancestral.data import machine
from ancestral.measure.quality import METRICS, called
from ancestral.measure.record import Evaluation, Interval, Likelihood, OdeLikelihood
from ancestral.training import resources
from ancestral.training.processes import Processes
from ancestral.training.start import Plan


def fresh(folder: Path, stem: str) -> Path:
    """The first of folder/stem-0001, folder/stem-0002, ... that no file or directory starts with."""
    taken = {path.name.split(".")[0] for path in folder.glob(f"{stem}-*")} if folder.is_dir() else set()
    number = 1
    while f"{stem}-{number:04d}" in taken:
        number += 1
    return folder / f"{stem}-{number:04d}"


def number(found: Interval) -> str:
    """A number with its interval, in as many digits as the interval bears.

    Example:
        >>> number(Interval(value=0.123456, stderr=0.01, low=0.1034, high=0.1436))
        '0.123 (0.103 to 0.144)'
    """
    width = found.high - found.low
    digits = 4 if width <= 0 else max(0, min(6, 1 - math.floor(math.log10(width))))
    value, low, high = (f"{each:,.{digits}f}" for each in (found.value, found.low, found.high))
    return f"{value} ({low} to {high})"


def plan_told(planned: Plan, group: Processes) -> tuple[list[str], dict[str, Any]]:
    """What a run would take, as a person reads it and as a record. Nothing was written."""
    setup, cost, seconds = planned.setup, planned.cost, planned.seconds_per_step or 0.0
    total = setup.training.steps or 0
    memory = cost.memory(setup.training.batch // (group.count * setup.training.accumulate))
    available, disk, free = machine.available_memory(), cost.disk(setup), resources.free_disk(Path())
    gib = 2**30
    lines = [
        planned.data.description,
        f"recipe {setup.recipe}: {cost.parameters:,} parameters, {cost.flops / 1e9:.4f} GFLOP forward an example",
        f"{total:,} steps of {setup.training.batch} at {seconds:.4f} s: {seconds * total / 60:.1f} minutes",
        f"memory: about {memory / gib:.2f} GiB, and {available / gib:.1f} are to be had",
        f"disk: at most {disk / gib:.2f} GiB, and {free / gib:.1f} are free; nothing was written",
    ]
    record = {
        "recipe": setup.recipe,
        "parameters": cost.parameters,
        "gflop_per_example": cost.flops / 1e9,
        "steps": total,
        "batch": setup.training.batch,
        "seconds_per_step": round(seconds, 6),
        "eta_seconds": round(seconds * total, 1),
        "memory_bytes": memory,
        "available_memory_bytes": available,
        "disk_bytes": disk,
        "free_disk_bytes": free,
        "setup": setup.model_dump(mode="json"),
    }
    return lines, record


def evaluation_lines(result: Evaluation) -> list[str]:
    """The evaluation as a person reads it."""
    return [
        f"{result.data}: {_examples(result)}{_model(result)}, seed {result.seed}",
        *(["  (other steps than it was trained for: the bound of another model)"] if result.respaced else []),
        *_likelihood_lines(result),
        *_tolerance_lines(result),
        *_ode_lines(result),
        *_comparison_lines(result),
        *_baseline_lines(result),
        *_gap_lines(result),
        *(
            f"  {f'average of length {each.length:g}':<24}{each.likelihood.value:10.4f} ± {each.likelihood.stderr:.4f}"
            f"   (made to {each.residual:.1%})"
            for each in result.ema or []
        ),
        *_inverse_lines(result),
        *_sample_lines(result),
        *(f"  {path}" for path in result.artifacts.values()),
    ]


def _examples(result: Evaluation) -> str:
    if result.likelihood is None:
        return ""
    of = "" if result.n_images == result.n_held_out else f" of {result.n_held_out:,}"
    return f"{result.n_images:,}{of} held-out examples, {result.unit}, "


def _likelihood_lines(result: Evaluation) -> list[str]:
    found = result.likelihood
    if found is None:
        return [f"  no likelihood: a {result.family} has none"]
    parts = {"L_T   prior": found.prior, "L_t-1 diffusion": found.diffusion, "L_0   decoder": found.decoder}
    return [
        f"  {_name(result):<24}{found.value:10.4f} ± {found.stderr:.4f}   {_apart(found)}({_took(result)})",
        *(f"    {name:<22}{part:10.4f}" for name, part in parts.items() if part is not None),
    ]


def _baseline_lines(result: Evaluation) -> list[str]:
    """The two simple densities, and the paired difference to each."""
    alone = "independent pixels" if result.unit == "bits/dim" else "independent values"
    labels = {"independent_pixels": alone, "gaussian": "full-covariance Gaussian"}
    lines = []
    for name, label in labels.items() if result.baselines else ():
        value, margin = getattr(result.baselines, name), getattr(result.margins, name)
        word = "better" if margin.value > 0 else "worse"
        ratio = abs(margin.value) / margin.stderr if margin.stderr else float("inf")
        difference = f"the model is {abs(margin.value):.4f} ± {margin.stderr:.4f} {word} ({ratio:.0f} s.e.)"
        lines.append(f"  {label:<24}{value:10.4f}   {difference}")
    return lines


def _gap_lines(result: Evaluation) -> list[str]:
    """Whether training examples are likelier than held-out ones."""
    if result.gap is None:
        return []
    word = "as likely as held-out ones, for all that can be told"
    if result.gap.low > 0:
        word = "likelier than held-out ones, as what is memorised is"
    elif result.gap.high < 0:
        word = "less likely than held-out ones"
    return [f"  {'likelihood gap':<24}{number(result.gap)}   training examples are {word}"]


def _inverse_lines(result: Evaluation) -> list[str]:
    """The error of a flow's way there and back."""
    if result.round_trip is None:
        return []
    single, double = result.round_trip.float32, result.round_trip.float64
    return [
        f"  {'round trip, at most':<24}data {single.data:.1e}, latents {single.latent:.1e} in float32; "
        f"{double.data:.1e}, {double.latent:.1e} in float64"
    ]


def _sample_lines(result: Evaluation) -> list[str]:
    """Samples of the model, and of held-out and training examples in their place."""
    lines = []
    if result.samples:
        found = result.samples
        lines += [
            f"  {found.n:,} samples, in {found.features}, 95% intervals; {found.rate:,.1f} samples/s of "
            f"{found.evaluations} evaluations each",
            f"    {'':<24}{'model':<30}{'held-out data':<30}training data",
            *(
                f"    {called(name, found.features):<24}{number(found.model[name]):<30}"
                f"{number(found.held_out[name]):<30}{number(found.training[name])}"
                for name in METRICS
                if name in found.model
            ),
        ]
    if result.modes:
        reached, kl = result.modes, result.modes.reverse_kl
        lines.append(
            f"  {'modes':<24}{reached.hit} of {reached.of}, {reached.high_quality:.1%} of the samples at one, "
            "reverse KL " + ("undefined" if kl is None else f"{kl:.3f}")
        )
    return lines


def _name(result: Evaluation) -> str:
    """What the likelihood of a family is called."""
    if result.chain is not None:
        return "variational bound"
    if result.kind == "exact":
        return "exact"
    return "importance-weighted" if result.family == "vae" else "dequantized"


def _model(result: Evaluation) -> str:
    """What is asked for its likelihood."""
    if result.chain is None:
        return result.family
    chain = f"{'best ' if result.best else ''}chain of {result.chain:,} steps, variance {result.variance}"
    chain += f", {result.decoder} decoder" if result.unit == "bits/dim" else ""
    return chain + (", in the limit of infinitely many" if result.limit else "")


def _took(result: Evaluation) -> str:
    evaluations = "" if result.n_evaluations is None else f"{result.n_evaluations:,} evaluations, "
    draws = "" if result.draws is None else f"{result.draws:,} draw{'s' if result.draws > 1 else ''}, "
    return f"{evaluations}{draws}{result.seconds:.0f} s"


def _apart(found: Likelihood | OdeLikelihood) -> str:
    if found.stderr_noise is None:
        return ""
    return f"examples ± {found.stderr_examples:.4f}, noise ± {found.stderr_noise:.4f}   "


def _tolerance_lines(result: Evaluation) -> list[str]:
    """Whether the tolerance was reached, and what stands in the way."""
    return _short_of(result.tolerance, result.likelihood, result.n_images)


def _short_of(wanted: float | None, found: Likelihood | OdeLikelihood | None, n: int) -> list[str]:
    if wanted is None or found is None or found.stderr <= wanted:
        return []
    if found.stderr_noise is not None and found.stderr_noise > wanted:
        return [
            f"  ± {wanted:g} was not reached: noise is left, and these {n:,} examples were measured as often as allowed"
        ]
    return [f"  ± {wanted:g} was not reached: what is left is the choice of these {n:,} examples; only more would help"]


def _ode_lines(result: Evaluation) -> list[str]:
    """The value along the flow, and the ordering check."""
    ode = result.ode
    if ode is None:
        return []
    how = f"{ode.scheme}, mean of {ode.draws} draws" if ode.scheme else "no dequantization"
    probes = "exact divergence" if ode.probes is None else f"{ode.draws * ode.probes} probes"
    above, side = ode.above, "above" if ode.above.value > 0 else "below"
    return [
        f"  {'probability-flow ODE':<24}{ode.value:10.4f} ± {ode.stderr:.4f}   {_apart(ode)}{ode.n_images:,} examples, "
        f"{how}, {probes} ({ode.n_evaluations:,} evaluations, {ode.seconds:.0f} s)",
        *_short_of(result.tolerance, ode, ode.n_images),
        f"    on these examples the bound is {abs(above.value):.4f} ± {above.stderr:.4f} {side} it",
    ]


def _comparison_lines(result: Evaluation) -> list[str]:
    """The paired difference to another run."""
    if result.comparison is None:
        return []
    other, better = result.comparison, result.comparison.better
    word = "no difference at this number of examples"
    if abs(better.value) > 2 * better.stderr:
        word = "this run is better" if better.value > 0 else "this run is worse"
    return [
        f"  {'compared with':<24}{other.likelihood.value:10.4f} ± {other.likelihood.stderr:.4f}   {other.run}",
        f"    paired difference     {better.value:10.4f} ± {better.stderr:.4f}   {word}",
    ]
