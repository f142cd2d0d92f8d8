"""Imports point down, and reach only what pyproject.toml declares."""

import ast
import re
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from importlib.metadata import packages_distributions
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SOURCE = ROOT / "src" / "ancestral"


def imports(path: Path) -> Iterator[str]:
    """The top-level names of every absolute import in a file, those inside functions included."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name.partition(".")[0] for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and not node.level:
            yield str(node.module).partition(".")[0]


def strangers() -> dict[str, set[str]]:
    """For each name imported from outside the package and the standard library, the files that import it."""
    found: dict[str, set[str]] = {}
    for path in SOURCE.rglob("*.py"):
        for name in imports(path):
            if name != "ancestral" and name not in sys.stdlib_module_names:
                found.setdefault(name, set()).add(str(path.relative_to(ROOT)))
    return found


def normal(distribution: str) -> str:
    """The one spelling under which a package index files all spellings of a name."""
    return re.sub(r"[-_.]+", "-", distribution).lower()


def lint_imports(folder: Path) -> subprocess.CompletedProcess[str]:
    """Run import-linter in a process of its own on the package under `folder`/src, by the rules in `folder`."""
    program = "import sys; sys.path.insert(0, 'src'); from importlinter.cli import lint_imports_command as run; run()"
    return subprocess.run(
        [sys.executable, "-c", program, "--no-cache", "--no-logo"],
        cwd=folder,
        capture_output=True,
        text=True,
        check=False,
    )


def test_imports_point_down() -> None:
    result = lint_imports(ROOT)
    assert result.returncode == 0, result.stdout + result.stderr


def test_an_import_that_points_up_is_caught(tmp_path: Path) -> None:
    """The contract has teeth: the same rules, on a package of empty parts where the lowest imports the highest."""
    rules = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    (tmp_path / "pyproject.toml").write_text(rules, encoding="utf-8")
    package = tmp_path / "src" / "ancestral"
    package.mkdir(parents=True)
    (package / "__init__.py").touch()
    layers = tomllib.loads(rules)["tool"]["importlinter"]["contracts"][0]["layers"]
    parts = [part.strip(" ()") for layer in layers for part in layer.split("|")]
    for part in parts:
        (package / f"{part}.py").touch()
    assert lint_imports(tmp_path).returncode == 0
    highest, lowest = parts[0], parts[-1]
    (package / f"{lowest}.py").write_text(f"def late():\n    import ancestral.{highest}\n", encoding="utf-8")
    result = lint_imports(tmp_path)
    assert result.returncode == 1
    assert f"ancestral.{lowest} -> ancestral.{highest}" in result.stdout


@pytest.mark.parametrize("name", ["torchvision", "sklearn", "scipy"])
def test_what_only_tests_and_benchmarks_may_use_stays_out(name: str) -> None:
    assert strangers().get(name, set()) == set()


def test_everything_imported_is_declared() -> None:
    """A plain install is enough to import any part: nothing rests on what another package happens to bring."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    extras = [line for extra, lines in project["optional-dependencies"].items() if extra != "dev" for line in lines]
    declared = {normal(re.split(r"[^\w.-]", line)[0]) for line in [*project["dependencies"], *extras]}
    providers = packages_distributions()
    undeclared = {
        name: files
        for name, files in strangers().items()
        if declared.isdisjoint(normal(provider) for provider in providers.get(name, [name]))
    }
    assert undeclared == {}
