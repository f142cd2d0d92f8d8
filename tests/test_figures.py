"""Figures: the numbers in them are the theory's and the bound's, nothing overlaps, and equal seeds give equal bytes."""

import itertools
import subprocess
import sys

import matplotlib
import pytest
import torch
from matplotlib.backends.backend_agg import FigureCanvasAgg, RendererAgg
from matplotlib.colors import to_rgb

from ancestral import toys
from ancestral.apps import diagram, figures
from ancestral.data import draw, load
from ancestral.diffusion import process as P
from ancestral.diffusion.grids import karras
from ancestral.diffusion.likelihood import bound as bound_of
from ancestral.errors import DataError
from ancestral.rng import randn, stream
from ancestral.training import recipes
from oracles import exact_model

DIGITS = load("digits")
QUICK = ["unet.width=8", "unet.blocks=1", "unet.octaves=1", "training.batch=16"]


@pytest.fixture(scope="module")
def digits_bound():
    """The bound of an untrained model on digits, in nats: large, with every part on a scale of its own."""
    setup = recipes.change(recipes.choose(DIGITS.facts), QUICK)
    return recipes.build(setup, DIGITS.facts).bound(DIGITS.held_out[:12], draws=10)


@pytest.fixture(scope="module")
def quick_roll():
    """The figure of a roll that was hardly learned, and another one from the same seed."""
    return [figures.swiss_roll(seed=1, steps=10) for _ in range(2)]


def every_figure(digits_bound, quick_roll):
    model = exact_model("bound")
    points = toys.named("mixture").sample(100, rng=stream(0))
    return {
        "families": diagram.families(),
        "forward, images": figures.forward_chain(P.cosine(), DIGITS.facts, DIGITS.held_out),
        "forward, points": figures.forward_chain(P.edm(), model.facts, points.float()),
        "terms, levels": figures.terms(digits_bound, DIGITS.facts),
        "terms, density": figures.terms(model.bound(points), model.facts),
        "swiss roll": quick_roll[0],
    }


def words(figure):
    """Every text that is drawn, with the rectangle it takes up."""
    drawn = []

    class Recorder(RendererAgg):
        def draw_text(self, gc, x, y, s, prop, angle, ismath=False, mtext=None):
            drawn.append(mtext)

    width, height = figure.get_size_inches() * diagram.DPI
    renderer = Recorder(width, height, diagram.DPI)
    FigureCanvasAgg(figure)
    figure.draw(renderer)
    return [(text.get_text(), text.get_window_extent(renderer)) for text in drawn]


def axes_titled(figure, title):
    (found,) = [axes for axes in figure.axes if axes.get_title(loc="left").startswith(title)]
    return found


def written(figure):
    """The table of numbers in the figure of the bound: part -> value, where a tiny one is 0."""
    texts = [text.get_text() for text in figure.axes[0].texts]
    values = {"prior": texts[2], "diffusion": texts[5], "decoder": texts[8], "bound": texts[11]}
    assert [texts[i] for i in (0, 3, 6, 9)] == list(values)
    return {name: 0.0 if "<" in text else float(text.replace("\u2212", "-")) for name, text in values.items()}


@pytest.mark.parametrize("name", P.SCHEDULES)
def test_a_walk_through_the_transitions_measures_the_alpha_and_sigma_of_the_closed_form(name):
    """F3: transitions composed are the marginal. Each dot is within four standard errors of its line."""
    process, x_0 = P.named(name), randn((4000, 4), stream(1)) + 0.5
    for t, x_t in zip(figures.TIMES, figures.forward_walk(process, x_0, figures.TIMES, seed=2), strict=True):
        slope, spread, error = figures.regressed(x_0, x_t)
        alpha, sigma = (float(c) for c in process(t))
        assert abs(slope - alpha) <= 4 * error + 1e-9
        assert abs(spread - sigma) <= 4 * sigma / (2 * x_0.numel()) ** 0.5 + 1e-9


def test_the_dots_that_are_drawn_lie_on_the_lines_that_are_drawn():
    figure = figures.forward_chain(P.cosine(), DIGITS.facts, DIGITS.held_out, seed=3)
    tolerance = 4 / (DIGITS.held_out.numel()) ** 0.5
    alpha, alpha_dots, sigma, sigma_dots = axes_titled(figure, "signal").lines
    for line, dots in ((alpha, alpha_dots), (sigma, sigma_dots)):
        at = torch.as_tensor(dots.get_xdata())
        expected = torch.as_tensor(line.get_ydata())[(at * 400).round().long()]
        assert (torch.as_tensor(dots.get_ydata()) - expected).abs().max() < tolerance
    _, log_snr, *dots = axes_titled(figure, r"$\log").lines
    assert len(dots) == 4  # sigma is 0 at the start, and no alpha can be measured at the end
    for dot in dots:
        (t,), (value,) = dot.get_xdata(), dot.get_ydata()
        assert value == pytest.approx(log_snr.get_ydata()[round(t * 400)], abs=0.1)


@pytest.mark.parametrize("draws", [None, 1, 7, 98])
@pytest.mark.parametrize("bins", [1, 5, 60])
def test_binned_terms_add_up_to_the_bound_with_its_standard_error(draws, bins):
    """Exactly, for every number of draws and bins; in one bin, the standard error is that of the sum as well."""
    model, points = exact_model("bound"), toys.named("mixture").sample(40, rng=stream(4))
    bound = bound_of(model.denoiser, points, 100, rng=stream(5), draws=draws)
    parts = figures.binned(bound, bins)
    assert float(parts.sizes.sum()) == 99
    assert float(parts.sizes @ parts.mean) == pytest.approx(float(bound.diffusion.mean()), rel=1e-12)
    assert parts.edges[[0, -1]].tolist() == [0.01, 1.0]
    if bins == 1:
        assert float(99 * parts.stderr[0]) == pytest.approx(float(bound.diffusion.std()) / 40**0.5, rel=1e-12)


def test_a_bin_holds_the_terms_between_its_edges():
    """With all terms drawn and a bin for each, the bins are the steps of `Bound.by_step`."""
    bound = exact_model("bound").bound(toys.named("mixture").sample(30, rng=stream(6)))
    mean, stderr = bound.by_step()
    parts = figures.binned(bound, bins=1000)
    torch.testing.assert_close(parts.mean, mean[1:-1], rtol=1e-12, atol=0)
    torch.testing.assert_close(parts.stderr, stderr[1:-1], rtol=1e-9, atol=0)
    torch.testing.assert_close(parts.edges, bound.times)


def test_on_an_uneven_grid_the_area_under_the_stairs_is_still_the_sum():
    """The axis counts steps: by their times, forty of these fifty would stand in the last fifth of it."""
    model, points = exact_model("bound"), toys.named("mixture").sample(30, rng=stream(9))
    bound = bound_of(model.denoiser, points, karras(model.process, 50), rng=stream(10))
    parts = figures.binned(bound, bins=7)
    assert float(50 * parts.edges.diff() @ parts.mean) == pytest.approx(float(bound.diffusion.mean()), rel=1e-12)
    assert parts.edges[[0, -1]].tolist() == [0.02, 1.0]


@pytest.mark.parametrize("kind", ["bits/dim", "nats"])
def test_the_numbers_in_the_figure_of_the_bound_are_the_bound_in_the_datas_unit(kind, digits_bound):
    """The table, the area under the stairs and the running sum all tell the same; a density's decoder is below 0."""
    model, points = exact_model("bound"), toys.named("mixture").sample(40, rng=stream(7))
    bound, facts = (digits_bound, DIGITS.facts) if kind == "bits/dim" else (model.bound(points), model.facts)
    one = facts.bits_per_dim(1.0) if kind == "bits/dim" else 1.0
    figure = figures.terms(bound, facts)
    each, summed = axes_titled(figure, "one term"), axes_titled(figure, "sum")
    assert each.get_title(loc="left").endswith(f", {kind}")

    numbers = written(figure)
    for name, nats in (("prior", bound.prior), ("decoder", bound.decoder), ("bound", bound.nats)):
        assert numbers[name] == pytest.approx(one * float(nats.mean()), abs=6e-4)
    assert numbers["prior"] + numbers["diffusion"] + numbers["decoder"] == pytest.approx(numbers["bound"], abs=2e-3)
    assert (numbers["decoder"] < 0) == (kind == "nats")

    heights, edges, _ = each.patches[0].get_data()
    sizes = torch.as_tensor(edges).diff() * len(bound.times)
    assert float(sizes @ torch.as_tensor(heights)) == pytest.approx(numbers["diffusion"], abs=6e-4)
    running = summed.lines[1].get_ydata()
    assert running[0] == pytest.approx(numbers["decoder"], abs=6e-4)
    assert running[-1] == pytest.approx(numbers["bound"] - numbers["prior"], abs=2e-3)


def test_the_learned_reverse_chain_ends_nearer_to_the_roll_than_the_noise_it_started_from():
    """After a sixth of the training already: seven in ten points are within three deviations of the curve."""
    model, data = figures.learn_roll(steps=400, seed=0)
    path = list(model.sample_path(500, steps=100, rng=0))
    roll = toys.named("swiss-roll")
    start, end = (data.facts.scale.inverse(point.x).double() for point in (path[0], path[-1]))
    near = [float((torch.cdist(x, roll.means).amin(1) < 0.3).double().mean()) for x in (start, end)]
    assert near[0] < 0.5
    assert near[1] > 0.7
    assert float(roll.log_prob(end).mean()) > float(roll.log_prob(start).mean()) + 8


def test_the_four_families_are_named_with_what_they_say_about_likelihood():
    before = dict(matplotlib.rcParams)
    texts = [text for text, _ in words(diagram.families())]
    for name in ("GAN", "VAE", "Flow", "Diffusion"):
        assert name in texts
    for says in ("none", "lower bound", "exact", "lower bound, term by term"):
        assert says in texts
    assert dict(matplotlib.rcParams) == before


def test_no_words_overlap_and_none_leave_the_page(digits_bound, quick_roll):
    for name, figure in every_figure(digits_bound, quick_roll).items():
        placed = words(figure)
        assert len(placed) > 5, name
        for text, box in placed:
            assert min(box.x0, figure.bbox.x1 - box.x1) > 5, f"{name}: {text} is cut off at a side"
            assert min(box.y0, figure.bbox.y1 - box.y1) > 5, f"{name}: {text} is cut off above or below"
        for (first, one), (second, other) in itertools.combinations(placed, 2):
            assert not one.overlaps(other), f"{name}: {first} runs into {second}"


def test_no_words_are_small(digits_bound, quick_roll):
    """At 900 pixels across a page, the smallest letters are set at 11.5 points in 100 to the inch: 16 pixels."""
    for name, figure in every_figure(digits_bound, quick_roll).items():
        sizes = {text.get_fontsize() for axes in figure.axes for text in axes.texts}
        sizes |= {label.get_fontsize() for axes in figure.axes for label in axes.get_xticklabels()}
        assert min(sizes) >= diagram.SMALL, name


@pytest.mark.parametrize(
    "seen",
    [
        [[1, 0, 0], [0, 1, 0], [0, 0, 1]],
        [[0.152286, 1.052583, -0.204868], [0.114503, 0.786281, 0.099216], [-0.003882, -0.048116, 1.051998]],
        [[0.367322, 0.860646, -0.227968], [0.280085, 0.672501, 0.047413], [-0.011820, 0.042940, 0.968881]],
    ],
    ids=["trichromat", "protanope", "deuteranope"],
)
def test_the_colours_are_apart_and_legible_for_every_eye(seen):
    """As seen without red or green cones (Machado et al. 2009), with the contrast that WCAG asks of large text."""

    def light(colour):
        c = torch.tensor(to_rgb(colour), dtype=torch.float64)
        linear = torch.where(c <= 0.04045, c / 12.92, ((c + 0.055) / 1.055) ** 2.4)
        return (torch.tensor(seen, dtype=torch.float64) @ linear).clamp(0, 1)

    for colour in (diagram.BLUE, diagram.GREY, diagram.RED, diagram.MUTED, diagram.INK):
        luminance = float(light(colour) @ torch.tensor([0.2126, 0.7152, 0.0722], dtype=torch.float64))
        assert 1.05 / (luminance + 0.05) > 3, colour
    for one, other in itertools.combinations((diagram.BLUE, diagram.GREY, diagram.RED), 2):
        assert float((light(one).sqrt() - light(other).sqrt()).norm()) > 0.2, (one, other)


def test_equal_seeds_give_equal_bytes_and_other_seeds_do_not(tmp_path, quick_roll, digits_bound):
    makers = {
        "families": diagram.families,
        "forward": lambda: figures.forward_chain(P.cosine(), DIGITS.facts, DIGITS.held_out[:20], seed=8),
        "terms": lambda: figures.terms(digits_bound, DIGITS.facts),
        "roll": iter(quick_roll).__next__,
    }
    for name, make in makers.items():
        paths = [tmp_path / f"{name}-{i}.png" for i in range(2)]
        for path in paths:
            figures.save(make(), path, {"seed": 8})
        assert paths[0].read_bytes() == paths[1].read_bytes(), name
    other = figures.forward_chain(P.cosine(), DIGITS.facts, DIGITS.held_out[:20], seed=9)
    figures.save(other, tmp_path / "other.png", {"seed": 8})
    assert (tmp_path / "other.png").read_bytes() != (tmp_path / "forward-0.png").read_bytes()


def test_a_model_becomes_four_files_that_say_how_they_were_made_and_are_never_replaced(tmp_path, monkeypatch):
    monkeypatch.setattr(figures, "swiss_roll", lambda seed, progress: diagram.families())
    model = recipes.build(recipes.change(recipes.choose(DIGITS.facts), QUICK), DIGITS.facts)
    told = []
    files = figures.draw_all(model, DIGITS, tmp_path / "out", seed=3, progress=lambda *what: told.append(what))
    assert list(files) == ["families", "forward", "swiss-roll", "terms"]
    for name, path in files.items():
        assert draw.read_recipe(path) == {"figure": name, "data": "digits", "seed": 3}
    assert ("measuring the bound", 200, 200) in told
    before = {path: path.read_bytes() for path in (tmp_path / "out").iterdir()}
    with pytest.raises(FileExistsError):
        figures.draw_all(model, DIGITS, tmp_path / "out", seed=4)
    assert {path: path.read_bytes() for path in (tmp_path / "out").iterdir()} == before


def test_data_of_another_kind_is_refused_before_anything_is_written(tmp_path):
    with pytest.raises(DataError, match=r"trained on shape \(2,\)"):
        figures.draw_all(exact_model("bound"), DIGITS, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_matplotlib_is_loaded_by_the_first_figure_and_not_before():
    code = "import sys, ancestral.apps.figures as f; assert 'matplotlib' not in sys.modules; f.families()"
    subprocess.run([sys.executable, "-c", f"{code}; assert 'matplotlib.pyplot' not in sys.modules"], check=True)
