"""What the documents say is what the code does."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PAGES = [*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md")]


def test_the_readme_s_python_runs_as_printed(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (code,) = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
    exec(compile(code, "README.md", "exec"), {})
    printed = capsys.readouterr().out
    nats, entropy = (float(number) for number in re.findall(r"(\S+) >= (\S+)", printed)[0])
    assert nats > entropy - 0.1
    assert (tmp_path / "runs" / "api" / "final").is_dir()


def test_the_python_about_the_families_runs_as_printed(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (code,) = re.findall(r"```python\n(.*?)```", (ROOT / "docs" / "families.md").read_text(), re.DOTALL)
    exec(compile(code, "families.md", "exec"), {})


def test_the_python_about_metrics_runs_as_printed(capsys):
    (code,) = re.findall(r"```python\n(.*?)```", (ROOT / "docs" / "metrics.md").read_text(), re.DOTALL)
    exec(compile(code, "metrics.md", "exec"), {})
    assert capsys.readouterr().out.startswith("FD[digits-pca@")


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_link_and_picture_is_there(page):
    for target in re.findall(r"\]\(([^)#]+)\)", page.read_text()):
        if "://" not in target:
            assert (page.parent / target).exists(), target


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_name_of_code_in_the_derivation_exists(page):
    """Names in backquotes that look like `module.name` of the diffusion package resolve."""
    import ancestral.diffusion.model  # noqa: F401
    from ancestral import data, diffusion, langevin, nets, ode

    homes = {
        "Process": diffusion.process.Process,
        "Denoiser": diffusion.denoise.Denoiser,
        "Facts": data.Facts,
        "denoise": diffusion.denoise,
        "likelihood": diffusion.likelihood,
        "Bound": diffusion.likelihood.Bound,
        "flow": diffusion.flow,
        "respace": diffusion.respace,
        "ode": ode,
        "levels": nets.levels,
        "langevin": langevin,
    }
    for home, name in re.findall(r"`(\w+)\.(\w+)`", page.read_text()):
        if home in homes:
            assert hasattr(homes[home], name), f"{home}.{name}"
