"""The public names are listed, in order, and cost nothing until one is used."""

import subprocess
import sys

import ancestral

SLOW = {"matplotlib", "PIL", "torch"}


def imported_by(*arguments: str) -> set[str]:
    """The top-level names of all modules that `python *arguments` imports, in a process of its own."""
    command = [sys.executable, "-X", "importtime", *arguments]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    report = [line for line in result.stderr.splitlines() if line.startswith("import time:")]
    said = [line for line in result.stderr.splitlines() if not line.startswith("import time:")]
    assert result.returncode == 0, "\n".join(said)
    return {line.rpartition("|")[2].strip().partition(".")[0] for line in report}


def test_the_public_names_are_sorted() -> None:
    assert list(ancestral.__all__) == sorted(set(ancestral.__all__))


def test_every_public_name_resolves() -> None:
    missing = [name for name in ancestral.__all__ if not hasattr(ancestral, name)]
    assert missing == []


def test_dir_lists_the_public_names() -> None:
    """What is loaded late is still found by tab completion and by `help`."""
    assert set(ancestral.__all__) <= set(dir(ancestral))


def test_a_name_that_does_not_exist_is_an_attribute_error() -> None:
    """Anything else that `__getattr__` raised would pass through `hasattr`."""
    assert not hasattr(ancestral, "no_such_name")


def test_importing_the_package_is_cheap() -> None:
    modules = imported_by("-c", "import ancestral")
    assert "ancestral" in modules
    assert modules.isdisjoint(SLOW | {"typer"}), modules & (SLOW | {"typer"})


def test_asking_the_command_for_help_is_cheap() -> None:
    modules = imported_by("-m", "ancestral.apps.cli", "--help")
    assert "typer" in modules, "the command line is not running: ancestral.apps.cli has to call main() as a program"
    assert modules.isdisjoint(SLOW), modules & SLOW


def test_modules_of_the_public_packages_are_reached_through_them() -> None:
    names = [
        "diffusion.process.cosine",
        "diffusion.sample.heun",
        "training.recipes.choose",
        "measure.evaluate.evaluate",
    ]
    code = "import ancestral as ac; " + "; ".join(f"ac.{name}" for name in names)
    subprocess.run([sys.executable, "-c", code], check=True)
