"""A certificate: what samplers, grids, parameterizations, processes and likelihoods claim, measured on exact laws.

Every denoiser here is exact, and reached through a parameterization as a trained network would be. What is left is the
error of the method alone, and each verdict is a theorem with a number:

    order         the error along the probability-flow ODE falls as n^-p, p the declared order
    exactness     where all data are one point c, x_s = alpha_s c + sigma_s / sigma_t (x_t - alpha_t c) in one step
    law           samples approach the law: four times the steps are as good as exact samples, or on their way there
    process       Bayes' rule, composition of transitions, and the ends, to rounding
    likelihood    E[nats + log p(x_0)] is KL(q(x_T) || p(x_T)), or for a bound at least that
"""

import math
import time
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from itertools import product
from typing import Any, TypeVar

import torch
from torch import nn

from ancestral import toys
from ancestral.diffusion.denoise import NetworkDenoiser
from ancestral.errors import OptionError
from ancestral.measure.certification import identities, law, order
from ancestral.measure.certification.certificate import Certificate, LawRow, LikelihoodRow, ProcessRow, Row, SamplerRow
from ancestral.measure.certification.subjects import Found, Subjects, known_rows, said, subjects

AnyRow = TypeVar("AnyRow", bound=Row)
Progress = Callable[[str, int, int], None]


def certify(
    *,
    samplers: Iterable[str] | None = None,
    schedules: Iterable[str] | None = None,
    predicts: Iterable[str] | None = None,
    grids: Iterable[str] | None = None,
    likelihoods: Iterable[str] | None = None,
    plugin: str | None = None,
    thorough: bool = False,
    seed: int = 0,
    progress: Progress = lambda what, done, of: None,
) -> Certificate:
    """Grade what is named; else what the plug-in adds; else everything.

    Args:
        samplers, schedules, predicts, grids, likelihoods: names, of the package or of the plug-in.
        plugin: a Python file, "package.module" or "package.module:name", whose code is run; see `subjects.load`.
        thorough: the full product with more samples, in place of a part of it in which every name is met.
        seed: of everything random.
        progress: called with (what, done, of).

    Raises:
        OptionError: if a name is unknown, the plug-in cannot be used, or the parameterizations that are named are
            undefined on the processes that are. What fails while it is graded raises nothing:
            it is a row with the verdict "fail" and the reason.

    Example:
        >>> found = certify(samplers=["heun"], schedules=["cosine"], predicts=["v"], grids=["uniform"])
        >>> found.passed, found.samplers[0].declared, round(found.samplers[0].measured, 1)
        (True, 2, 2.0)
    """
    began = time.perf_counter()
    what = subjects(
        {
            "SAMPLERS": samplers,
            "SCHEDULES": schedules,
            "ROWS": predicts,
            "GRIDS": grids,
            "LIKELIHOODS": likelihoods,
        },
        plugin,
    )
    with known_rows(what.tables["ROWS"]):
        _refuse_what_is_undefined(what)
        graded = _sampler_rows(what, thorough, progress) if what.asks("SAMPLERS", "SCHEDULES", "ROWS") else []
        laws, oracles = [], {}
        if what.asks("SAMPLERS", "GRIDS", "SCHEDULES"):
            oracles = law.oracles(thorough, seed)
            laws = _law_rows(what, oracles, thorough, seed, progress)
        processes = _process_rows(what) if what.asks("SCHEDULES", "ROWS") else []
        asked = what.asks("SCHEDULES", "LIKELIHOODS")
        measured = _likelihood_rows(what, thorough, seed, progress) if asked else []
    failures = sum(not row.passed for row in [*graded, *laws, *processes, *measured])
    return Certificate(
        passed=failures == 0,
        failures=failures,
        thorough=thorough,
        seed=seed,
        plugin=plugin,
        seconds=time.perf_counter() - began,
        samplers=graded,
        laws=laws,
        floors=[each.floor for each in oracles.values()],
        processes=processes,
        likelihoods=measured,
    )


def graded(kind: type[AnyRow], names: dict[str, str], measure: Callable[[], Found]) -> AnyRow:
    """One row. What a plug-in raises is the reason why it failed."""
    try:
        found, faults = measure()
    except (Exception, SystemExit) as error:
        found, faults = {}, [said(error)]
    return kind(
        **names,
        **{key: _finite(value) for key, value in found.items()},
        verdict="fail" if faults else "pass",
        reason="; ".join(faults) or None,
    )


def _finite(value: Any) -> Any:
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _spread(items: Sequence[Any], n: int, offset: int) -> list[Any]:
    """n of the items, evenly apart, from another one for each offset; all of them if there are no more."""
    if len(items) <= n:
        return list(items)
    return [items[(offset + i * len(items) // n) % len(items)] for i in range(n)]


def _sampler_rows(what: Subjects, thorough: bool, progress: Progress) -> list[SamplerRow]:
    """Every sampler; in short on two processes, through another parameterization each.

    Where only processes or parameterizations are asked for, one sampler stands for all.
    """
    pairs = [pair for pair in product(what.names["SCHEDULES"], what.names["ROWS"]) if _is_defined(what, *pair)]
    pairs = pairs or [("cosine", "v")]  # where a plug-in has broken ones only, they fail by themselves
    jobs = [
        (name, *pair)
        for i, name in enumerate(what.names["SAMPLERS"] if what.asks("SAMPLERS") else [_one(what)])
        for pair in (pairs if thorough else _spread(pairs, 2, 5 * i))
    ]
    rows = []
    for i, (sampler, schedule, predicts) in enumerate(jobs):
        progress("samplers", i, len(jobs))
        names = {"sampler": sampler, "schedule": schedule, "predicts": predicts}
        rows.append(graded(SamplerRow, names, partial(_sampler, what, sampler, schedule, predicts)))
    return rows


def _sampler(what: Subjects, name: str, schedule: str, predicts: str) -> Found:
    return order.grade(what.sampler(name), what.process(schedule), predicts)


def _one(what: Subjects) -> str:
    """The sampler that stands for all where something else is graded."""
    return "heun" if "heun" in what.names["SAMPLERS"] else what.names["SAMPLERS"][0]


def _is_defined(what: Subjects, schedule: str, predicts: str) -> bool:
    """Whether there is such a denoiser; a process that ends in pure noise has none that divides by alpha."""
    try:
        NetworkDenoiser(nn.Identity(), what.process(schedule), predicts)
    except (Exception, SystemExit):
        return False
    return True


def _law_rows(
    what: Subjects, oracles: dict[str, law.Oracle], thorough: bool, seed: int, progress: Progress
) -> list[LawRow]:
    """What is asked for on all laws, the first name standing for what is not; or, if thorough, the whole product.

    Where nothing is asked for, every sampler on two laws and the first grid, and one sampler on every grid and process.
    """
    schedules = what.names["SCHEDULES"] if "SCHEDULES" in what.named else ["cosine", "edm", "straight"]
    samplers, grids = what.names["SAMPLERS"], what.names["GRIDS"]
    if thorough:
        jobs = list(product(samplers, grids, schedules, oracles))
    elif what.focus:
        some = samplers if "SAMPLERS" in what.named else [_one(what)]
        on = grids if "GRIDS" in what.named else grids[:1]
        jobs = list(product(some, on, schedules if "SCHEDULES" in what.named else schedules[:1], oracles))
    else:
        jobs = [(s, grids[0], schedules[0], o) for i, s in enumerate(samplers) for o in _spread([*oracles], 2, i)]
        jobs += [(_one(what), grid, schedules[0], "mixture") for grid in grids[1:]]
        jobs += [(_one(what), grids[0], schedule, "mixture") for schedule in schedules[1:]]
    rows = []
    for i, (sampler, grid, schedule, oracle) in enumerate(jobs):
        progress("laws", i, len(jobs))
        names = {"sampler": sampler, "grid": grid, "schedule": schedule, "oracle": oracle}
        rows.append(graded(LawRow, names, partial(_law, what, sampler, grid, schedule, oracles[oracle], seed)))
    return rows


def _law(what: Subjects, name: str, grid: str, schedule: str, oracle: law.Oracle, seed: int) -> Found:
    return law.grade(what.sampler(name), what.tables["GRIDS"][grid], what.process(schedule), oracle, seed)


def _process_rows(what: Subjects) -> list[ProcessRow]:
    rows = []
    for schedule, predicts in product(what.names["SCHEDULES"], what.names["ROWS"]):
        names = {"schedule": schedule, "predicts": predicts}
        if not _is_undefined_by_right(what, schedule, predicts):
            rows.append(graded(ProcessRow, names, partial(_process, what, schedule, predicts)))
    return rows


def _is_undefined_by_right(what: Subjects, schedule: str, predicts: str) -> bool:
    """Whether the row divides by an alpha that is 0 at the end, and is defined just before it."""
    try:
        process = what.process(schedule)
        alpha_T, _ = process(1.0)
        before = torch.stack(list(what.tables["ROWS"][predicts](*process(0.999), 1.0)))
    except (Exception, SystemExit):
        return False
    return float(alpha_T) == 0 and bool(before.isfinite().all()) and not _is_defined(what, schedule, predicts)


def _refuse_what_is_undefined(what: Subjects) -> None:
    """Where no process that is named has a parameterization that is, nothing would be graded as it was asked for."""
    pairs = [*product(what.names["SCHEDULES"], what.names["ROWS"])]
    if all(_is_undefined_by_right(what, *pair) for pair in pairs):
        schedule, predicts = pairs[0]
        raise OptionError(
            f"predicting {predicts!r} is undefined on {schedule!r}, which ends where no signal is left (alpha = 0): "
            "name another --predicts or --schedule"
        )


def _likelihood_rows(what: Subjects, thorough: bool, seed: int, progress: Progress) -> list[LikelihoodRow]:
    schedules = what.names["SCHEDULES"]
    jobs = [
        (name, schedule, toy)
        for i, name in enumerate(what.names["LIKELIHOODS"])
        for schedule in (schedules if thorough else _spread(schedules, 3, i))
        for toy in (identities.independent(), toys.named("mixture"))
    ]
    rows = []
    for i, (name, schedule, toy) in enumerate(jobs):
        progress("likelihoods", i, len(jobs))
        names = {"likelihood": name, "schedule": schedule, "oracle": toy.name}
        n = 16_384 if thorough else 4096
        rows.append(graded(LikelihoodRow, names, partial(_likelihood, what, name, schedule, toy, n, seed)))
    return rows


def _process(what: Subjects, schedule: str, predicts: str) -> Found:
    return identities.grade_process(what.process(schedule), predicts, what.tables["TARGETS"].get(predicts))


def _likelihood(what: Subjects, name: str, schedule: str, toy: toys.Toy, n: int, seed: int) -> Found:
    return identities.grade_likelihood(what.likelihood(name), what.process(schedule), toy, n, seed)
