"""The lines of a certificate."""

from collections.abc import Iterable, Iterator
from itertools import groupby

from ancestral.measure.certification.certificate import (
    Certificate,
    LawRow,
    LikelihoodRow,
    Point,
    ProcessRow,
    Row,
    SamplerRow,
)
from ancestral.measure.certification.law import BUDGETS


def lines(found: Certificate) -> list[str]:
    """The certificate as a person reads it: a line for each name, and every failure in words."""
    rows, kind = len(found.rows), "thorough" if found.thorough else "short"
    verdict = "all pass" if found.passed else f"{found.failures} FAIL"
    return [
        *(_samplers(found.samplers) if found.samplers else []),
        *(_laws(found) if found.laws else []),
        *(_processes(found.processes) if found.processes else []),
        *(_likelihoods(found.likelihoods) if found.likelihoods else []),
        *(_failures(found) if not found.passed else []),
        f"{rows:,} verdicts, {verdict} ({kind} version, seed {found.seed}, {found.seconds:.0f} s)",
    ]


def _samplers(rows: list[SamplerRow]) -> Iterator[str]:
    yield "samplers: order along the probability-flow ODE, and distances from what is exact (worst over processes)"
    header = f"{'order':>6}{'measured':>14}{'point mass':>12}{'exponential':>13}{'alone':>9}{'evaluations':>13}"
    yield f"  {'sampler':<22}{header}{'processes':>11}  verdict"
    for sampler, group in groupby(rows, lambda row: row.sampler):
        same = list(group)
        slopes = [row for row in same if row.measured is not None]
        worst = min(slopes, key=lambda row: row.measured or 0.0, default=None)
        slope = "-" if worst is None else f"{worst.measured:.2f} ± {worst.stderr:.2f}"
        declared = "-" if same[0].declared is None else str(same[0].declared)
        evaluations = _largest(row.evaluations for row in same)
        yield (
            f"  {sampler:<22}{declared:>6}{slope:>14}{_tiny(row.point_mass for row in same):>12}"
            f"{_tiny(row.exponential for row in same):>13}{_tiny(row.alone for row in same):>9}"
            f"{'-' if evaluations is None else f'{evaluations:g}':>13}{len(same):>11}  {_verdict(same)}"
        )


def _laws(found: Certificate) -> Iterator[str]:
    for floor in found.floors:
        rows = [row for row in found.laws if row.oracle == floor.oracle]
        yield (
            f"law {floor.oracle}: errors of mean, covariance and energy distance of {floor.samples:,} samples, by "
            "evaluations"
        )
        head = "".join(f"{budget:>18}" for budget in BUDGETS)
        yield f"  {'sampler, grid, process':<40}{head}{'finest':>24}  verdict"
        exact = f"{floor.mean:.3f} {floor.covariance:.3f} {floor.energy:.3f}".replace("0.", ".")
        yield f"  {'(exact samples)':<40}{'':>{18 * len(BUDGETS)}}{exact:>24}"
        for row in rows:
            cells = "".join(f"{_cell(_within(row, budget)):>18}" for budget in BUDGETS)
            fine = "-" if row.fine is None else f"{_cell(row.fine)} ({row.fine.evaluations})"
            yield f"  {f'{row.sampler}, {row.grid}, {row.schedule}':<40}{cells}{fine:>24}  {_verdict([row])}"


def _within(row: LawRow, budget: int) -> Point | None:
    """The last point that took no more evaluations, and more than the budget before allows."""
    before = max((b for b in BUDGETS if b < budget), default=0)
    return next((point for point in reversed(row.points) if before < point.evaluations <= budget), None)


def _cell(point: Point | None) -> str:
    if point is None:
        return "-"
    return " ".join(_short(x) for x in (point.mean, point.covariance, point.energy))


def _short(x: float | None) -> str:
    """At most five characters."""
    if x is None:
        return "-"
    return f"{x:.3f}".removeprefix("0") if x < 1 else f"{x:.2f}" if x < 100 else f"{x:.0e}"


def _processes(rows: list[ProcessRow]) -> Iterator[str]:
    yield "processes: errors of identities, the ends, and the worst parameterization"
    header = (
        f"{'Bayes':>9}{'marginal':>10}{'inverse':>9}{'alpha 0, 1':>16}{'sigma 0, 1':>14}{'target':>9}{'round trip':>12}"
    )
    yield f"  {'process':<22}{header}{'rows':>6}  verdict"
    for schedule, group in groupby(rows, lambda row: row.schedule):
        same = list(group)
        first = next((row for row in same if row.alpha_1 is not None), same[0])
        alpha, sigma = (_ends(*pair) for pair in ((first.alpha_0, first.alpha_1), (first.sigma_0, first.sigma_1)))
        yield (
            f"  {schedule:<22}{_tiny(row.bayes for row in same):>9}{_tiny(row.marginal for row in same):>10}"
            f"{_tiny(row.inverse for row in same):>9}{alpha:>16}{sigma:>14}{_tiny(row.target for row in same):>9}"
            f"{_tiny(row.round_trip for row in same):>12}{len(same):>6}  {_verdict(same)}"
        )


def _likelihoods(rows: list[LikelihoodRow]) -> Iterator[str]:
    yield "likelihoods: E[nats + log p], nats, beside KL(q(x_T) || p(x_T)), below which nothing can be"
    yield f"  {'likelihood':<22}{'claim':>9}  {'law':<13}{'process':<15}{'gap':>20}{'terminal KL':>13}  verdict"
    for row in rows:
        gap = "-" if row.gap is None or row.stderr is None else f"{row.gap:.5f} ± {row.stderr:.5f}"
        expected = "-" if row.expected is None else f"{row.expected:.5f}"
        yield (
            f"  {row.likelihood:<22}{row.claim or '-':>9}  {row.oracle:<13}{row.schedule:<15}{gap:>20}{expected:>13}"
            f"  {_verdict([row])}"
        )


def _failures(found: Certificate) -> Iterator[str]:
    yield "failures:"
    for row in found.rows:
        if not row.passed:
            yield f"  FAIL {', '.join(_names(row))}: {row.reason}"


def _names(row: Row) -> Iterator[str]:
    """What was graded: a sampler, a grid, a process, ..., as far as the row has them."""
    for name in ("sampler", "grid", "likelihood", "schedule", "predicts", "oracle"):
        if hasattr(row, name):
            yield getattr(row, name)


def _verdict(rows: Iterable[Row]) -> str:
    return "pass" if all(row.passed for row in rows) else "FAIL"


def _largest(values: Iterable[float | None]) -> float | None:
    return max((value for value in values if value is not None), default=None)


def _tiny(values: Iterable[float | None]) -> str:
    largest = _largest(values)
    return "-" if largest is None else "0" if largest == 0 else f"{largest:.0e}"


def _ends(first: float | None, last: float | None) -> str:
    return "-" if first is None or last is None else f"{first:g}, {last:.3g}"
