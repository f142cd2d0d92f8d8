"""What is graded: everything the package has by name, and what a plug-in adds under names of its own."""

import importlib
import importlib.util
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

from torch import Tensor

from ancestral.diffusion import grids
from ancestral.diffusion.denoise import ROWS, Denoiser
from ancestral.diffusion.flow import flow_likelihood
from ancestral.diffusion.grids import Grid
from ancestral.diffusion.likelihood import bound
from ancestral.diffusion.process import SCHEDULES, Process
from ancestral.diffusion.sample import SAMPLERS, Sampler
from ancestral.errors import OptionError, unknown
from ancestral.rng import Seeds

Found = tuple[dict[str, Any], list[str]]
"""The numbers of a row, and what is wrong with them in words."""

STANDARD_ERRORS = 4.0
"""Beyond which a statistical verdict is fail: for a normal statistic, one in 30,000 right ones on its side."""

ROUNDING = 1e-8
"""What an identity may be off by, relative to numbers of size one."""

Target = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]


@dataclass(frozen=True)
class Likelihood:
    """A way to measure -log p(x_0), and what it claims.

    Attributes:
        nats: (denoiser, x_0, rng) -> -log p(x_0) in nats, shape (B,).
        claim: "exact", on every law; "optimal", a bound that leaves nothing out on a Gaussian of independent
            coordinates; or "bound".
    """

    nats: Callable[[Denoiser, Tensor, Seeds], Tensor]
    claim: str


GRIDS: dict[str, Grid] = {"default": grids.grid, **grids.GRIDS}
"""(process, n) -> n decreasing times; the first is what a sampler takes that is given a number of steps."""

TARGETS: dict[str, Target] = {
    "x0": lambda x_0, eps, a, s: x_0,
    "eps": lambda x_0, eps, a, s: eps,
    "score": lambda x_0, eps, a, s: -eps / s,
    "v": lambda x_0, eps, a, s: a * eps - s * x_0,
    "velocity": lambda x_0, eps, a, s: eps - x_0,
    "edm": lambda x_0, eps, a, s: (s * x_0 - a * eps) / (a**2 + s**2) ** 0.5,
}
"""(x_0, eps, alpha, sigma) -> what a network of each row is taught, as it was published, for data of unit variance.
References: Ho et al. (2020), eq. 14; Song & Ermon (2019), eq. 5; Salimans & Ho (2022), section 4; Lipman et al. (2023);
Karras et al. (2022), eq. 7, brought to unit variance."""

LIKELIHOODS = {
    "bound-optimal": Likelihood(lambda d, x, rng: bound(d, x, 10, rng=rng, variance="optimal").nats, "optimal"),
    "bound-beta": Likelihood(lambda d, x, rng: bound(d, x, 10, rng=rng, variance="beta").nats, "bound"),
    "bound-fixed-large": Likelihood(lambda d, x, rng: bound(d, x, 10, rng=rng, variance="fixed-large").nats, "bound"),
    "bound-fixed-small": Likelihood(lambda d, x, rng: bound(d, x, 10, rng=rng, variance="fixed-small").nats, "bound"),
    "bound-limit": Likelihood(lambda d, x, rng: bound(d, x, 10, rng=rng, limit=True).nats, "bound"),
    "ode": Likelihood(lambda d, x, rng: flow_likelihood(d, x[:12], rng=rng).nats, "exact"),
}

TABLES: dict[str, tuple[str, Mapping[str, Any]]] = {
    "SAMPLERS": ("sampler", SAMPLERS),
    "SCHEDULES": ("schedule", SCHEDULES),
    "ROWS": ("parameterization", ROWS),
    "GRIDS": ("grid", GRIDS),
    "LIKELIHOODS": ("likelihood", LIKELIHOODS),
    "TARGETS": ("target", TARGETS),
}
"""What a plug-in may define, what an entry is called, and the entries that are there already."""


@dataclass(frozen=True)
class Subjects:
    """Tables of everything that can be graded, and the names that are.

    Attributes:
        tables: for each of `TABLES`, all entries by name.
        names: for each, those that are graded.
        named: those of which some were named, by an option or by a plug-in; empty when everything is graded.
        focus: those of `named` that the certificate is about; a process or a parameterization that is named beside a
            sampler, a grid or a likelihood says where these are graded.
    """

    tables: Mapping[str, Mapping[str, Any]]
    names: Mapping[str, list[str]]
    named: frozenset[str]
    focus: frozenset[str]

    def asks(self, *tables: str) -> bool:
        """Whether what depends on these tables is to be measured."""
        return not self.focus or not self.focus.isdisjoint(tables)

    def sampler(self, name: str) -> Sampler:
        """The sampler of that name.

        Raises:
            OptionError: if what a plug-in put there is none.
        """
        return _instance("SAMPLERS", name, self.tables["SAMPLERS"][name], Sampler)

    def likelihood(self, name: str) -> Likelihood:
        """The likelihood of that name.

        Raises:
            OptionError: if what a plug-in put there is none.
        """
        return _instance("LIKELIHOODS", name, self.tables["LIKELIHOODS"][name], Likelihood)

    def process(self, name: str) -> Process:
        """The process of the schedule of that name.

        Raises:
            OptionError: if what a plug-in put there makes none.
        """
        return _instance("SCHEDULES", name, self.tables["SCHEDULES"][name](), Process)


def _instance(table: str, name: str, value: Any, kind: type[Any]) -> Any:
    if not isinstance(value, kind):
        raise OptionError(f"{table}[{name!r}] gives a {type(value).__name__}: it takes a {kind.__name__}")
    return value


def subjects(options: Mapping[str, Iterable[str] | None], plugin: str | None = None) -> Subjects:
    """What the options name; else what the plug-in adds; else everything.

    Args:
        options: for keys of `TABLES`, names.
        plugin: as of `load`.

    Raises:
        OptionError: if a name is unknown, or the plug-in cannot be used.
    """
    added = {} if plugin is None else load(plugin)
    tables = {key: {**ours, **added.get(key, {})} for key, (_, ours) in TABLES.items()}
    names, named = {}, set()
    for key, table in tables.items():
        wanted = list(options.get(key) or added.get(key) or ())
        for name in wanted:
            if name not in table:
                raise unknown(TABLES[key][0], name, table)
        names[key] = wanted or list(table)
        named |= {key} if wanted else set()
    walking = {"SAMPLERS", "GRIDS", "LIKELIHOODS"} & named
    return Subjects(tables, names, frozenset(named), frozenset(walking | set(added) if walking else named))


def load(plugin: str) -> dict[str, dict[str, Any]]:
    """The tables that a plug-in defines. This runs the plug-in's code.

    Args:
        plugin: the path of a Python file; or a module, "package.module", or an object in one,
            "package.module:name", with the tables as attributes.

    Raises:
        OptionError: if it cannot be run, defines no table, takes a name that is there, or has a target of no row.
    """
    try:
        source = _run_file(Path(plugin)) if plugin.endswith(".py") else _imported(plugin)
    except (Exception, SystemExit) as error:
        raise OptionError(f"plug-in {plugin}: could not be run: {said(error)}") from error
    found = {key: table for key in TABLES if (table := getattr(source, key, None))}
    if not found:
        raise OptionError(
            f"plug-in {plugin}: defines no table: give it an entry of at least one of {', '.join(TABLES)}"
        )
    for key, table in found.items():
        kind, ours = TABLES[key]
        if not isinstance(table, Mapping):
            raise OptionError(f"plug-in {plugin}: {key} must be a dict of names, received {type(table).__name__}")
        for name in table:
            if name in ours and table[name] is not ours[name]:
                raise OptionError(f"plug-in {plugin}: there is a {kind} {name!r} already: give yours another name")
    for name in set(found.get("TARGETS", ())) - set(found.get("ROWS", ())):
        raise OptionError(f"plug-in {plugin}: TARGETS has {name!r}, and ROWS has not: give the row too")
    return {key: {str(name): entry for name, entry in table.items()} for key, table in found.items()}


def _run_file(path: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def _imported(name: str) -> Any:
    """A module that can be imported from here, or an object in it."""
    home, _, attribute = name.partition(":")
    sys.path.insert(0, str(Path.cwd()))
    try:
        module = importlib.import_module(home)
    finally:
        sys.path.remove(str(Path.cwd()))
    return getattr(module, attribute) if attribute else module


@contextmanager
def known_rows(rows: Mapping[str, Any]) -> Iterator[None]:
    """Within, a denoiser knows these parameterizations by name too."""
    before = dict(ROWS)
    ROWS.update(rows)
    try:
        yield
    finally:
        ROWS.clear()
        ROWS.update(before)


def said(error: BaseException) -> str:
    """An error in one line."""
    sentence = " ".join(str(error).split())
    return sentence if isinstance(error, OptionError) else f"{type(error).__name__}: {sentence}".rstrip(": ")
