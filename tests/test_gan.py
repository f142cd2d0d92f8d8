"""The adversarial family: its losses in closed form, the game they make, and what each of its parts promises."""

import json
import math

import pytest
import torch
from torch import nn

from ancestral.data import load
from ancestral.errors import Diverged, OptionError
from ancestral.gan import augment, diagnostics
from ancestral.gan.losses import GAMES, squared_gradient
from ancestral.gan.model import GAN, packed
from ancestral.measure.modes import modes
from ancestral.nets.critic import ImageCritic, ImageGenerator, VectorCritic, resampled, sizes
from ancestral.protocol import Batch, Generative
from ancestral.rng import Rows, randn, stream, streams
from ancestral.toys import ring_8
from ancestral.training import start
from ancestral.training.loop import State, TrainingSection, steps

each_game = pytest.mark.parametrize("name", GAMES)
F64 = torch.float64


def normal(*shape, key=0):
    return randn(shape, stream(key), dtype=F64)


def batch_of(data, n=32, key=0, labels=False):
    return Batch(data.batch(range(n)), Rows((9, key), n), data.train_labels[:n] if labels else None)


# Losses


@each_game
def test_where_the_critic_knows_nothing_every_decision_costs_log_2(name):
    game, same = GAMES[name], torch.full((7,), 3.0 if name == "relativistic" else 0.0, dtype=F64)
    decisions = {"relativistic": 1, "classic": 2}[name]
    assert float(game.critic(same, same)) == pytest.approx(decisions * math.log(2), abs=1e-14)
    assert float(game.generator(same, same)) == pytest.approx(math.log(2), abs=1e-14)


def test_the_relativistic_game_sees_differences_alone():
    """A constant added to every score changes nothing: the critic's scores have no zero."""
    game, real, fake = GAMES["relativistic"], normal(9), normal(9, key=1)
    assert torch.allclose(game.critic(real, fake), game.critic(real + 5, fake + 5), atol=1e-14)
    assert torch.allclose(game.generator(real, fake), game.critic(fake, real), atol=1e-14)


def test_gradients_of_the_losses_are_those_of_a_linear_critic_and_a_point():
    """Reals at 0 and a fake at theta, D(x) = psi x: every derivative by hand, with s the logistic function."""
    s = torch.sigmoid
    for psi_0, theta_0 in [(0.7, -1.2), (-0.3, 2.0)]:
        psi, theta = (torch.tensor(value, dtype=F64, requires_grad=True) for value in (psi_0, theta_0))
        real, fake, product = 0 * psi.reshape(1), (psi * theta).reshape(1), (psi * theta).detach()
        expected = {
            ("relativistic", "critic"): (psi, theta.detach() * s(product)),
            ("relativistic", "generator"): (theta, -psi.detach() * s(-product)),
            ("classic", "critic"): (psi, theta.detach() * s(product)),
            ("classic", "generator"): (theta, -psi.detach() * s(-product)),
        }
        for (game, player), (of, value) in expected.items():
            loss = getattr(GAMES[game], player)(real, fake)
            (gradient,) = torch.autograd.grad(loss, of, retain_graph=True)
            assert torch.allclose(gradient, value, atol=1e-14)


def test_the_penalty_of_a_quadratic_critic_is_its_gradient():
    """D(x) = x^T A x / 2 + b^T x: ||A x + b||^2 with A symmetric, and its derivative in b is 2 (A x + b)."""
    A, x = normal(4, 4), normal(6, 4, key=1)
    A, b = A + A.T, normal(4, key=2).requires_grad_()
    scores, squares = squared_gradient(lambda x: torch.einsum("bi,ij,bj->b", x, A, x) / 2 + x @ b, x)
    gradient = x @ A + b
    assert torch.allclose(scores, ((x @ A) * x).sum(1) / 2 + x @ b)
    assert torch.allclose(squares, gradient.square().sum(1))
    (in_b,) = torch.autograd.grad(squares.sum(), b)
    assert torch.allclose(in_b, 2 * gradient.sum(0))


class Point(nn.Module):
    """The Dirac game's generator: one point, whatever the noise."""

    def __init__(self) -> None:
        super().__init__()
        self.theta = nn.Parameter(torch.tensor(1.0, dtype=F64))

    def forward(self, z, labels=None):
        return self.theta.expand(len(z), 2)


class Slope(nn.Module):
    """The Dirac game's critic, D(x) = psi x, on the first coordinate."""

    def __init__(self) -> None:
        super().__init__()
        self.psi = nn.Parameter(torch.tensor(0.5, dtype=F64))

    def forward(self, x, labels=None):
        return self.psi * x[:, 0]


def dirac(name):
    """The game of one point against one slope, reals all at 0, with the losses of the model itself."""
    model = GAN(load("ring-8").facts, loss=name, gamma=1.0 if name == "relativistic" else None, width=1, depth=1)
    model.critic, model.generator = Slope(), Point()
    return model, Batch(torch.zeros(2, 2, dtype=F64), Rows((0,), 2))


def field(model, batch, psi, theta):
    """Minus the players' gradients at once, (2,)."""
    with torch.no_grad():
        model.critic.psi.copy_(psi), model.generator.theta.copy_(theta)
    return -torch.stack(
        [
            torch.autograd.grad(model.critic_loss(batch), model.critic.psi)[0],
            torch.autograd.grad(model.generator_loss(batch), model.generator.theta)[0],
        ]
    )


@pytest.mark.parametrize("rate", [0.01, 0.1, 0.5])
def test_gradient_steps_contract_to_the_equilibrium_with_penalties_and_do_not_without(rate):
    """The Jacobian of a step I + rate v' at psi = theta = 0: +-i/2 are the eigenvalues of the classic field.

    With R1 and R2 of weight gamma = 1, v' = [[-2, -1/2], [1/2, 0]]: real parts are negative.

    Reference: Mescheder et al. (2018), lemma 2.3 and section 4.1.
    """
    radius = {}
    for name in GAMES:
        model, batch = dirac(name)
        width = 1e-5
        columns = [
            (field(model, batch, *(width * e)) - field(model, batch, *(-width * e))) / (2 * width)
            for e in torch.eye(2, dtype=F64)
        ]
        step = torch.eye(2, dtype=F64) + rate * torch.stack(columns, 1)
        radius[name] = float(torch.linalg.eigvals(step).abs().max())
    assert radius["classic"] == pytest.approx(math.sqrt(1 + rate**2 / 4), abs=1e-8)
    slow = (-2 + math.sqrt(4 - 1)) / 2
    assert radius["relativistic"] == pytest.approx(1 + rate * slow, abs=1e-8)


def test_a_dirac_game_begun_near_the_data_ends_at_it_with_penalties_and_leaves_it_without():
    """Of the classic game d/dt (psi^2 + theta^2) / 2 = -psi theta tanh(psi theta / 2): what pulls it in vanishes with
    the fourth power of the distance, and steps push it out with the second, so it ends on an orbit, not at a point.
    """
    least = {}
    for name in GAMES:
        model, batch = dirac(name)
        at, distances = torch.tensor([0.05, 0.1], dtype=F64), []
        for _ in range(250):
            at = at + 0.5 * field(model, batch, *at)
            distances.append(float(at.norm()))
        least[name] = min(distances[-50:])
    assert least["relativistic"] < 1e-5
    assert least["classic"] > 0.5


# The model


@each_game
@pytest.mark.parametrize("source", ["ring-8", "digits"])
def test_a_loss_gives_its_own_player_a_gradient_and_the_other_none(name, source):
    data = load(source)
    model = GAN(data.facts, loss=name, width=8, depth=1, classes=source == "digits", augment=source == "digits")
    batch, players = batch_of(data, labels=source == "digits"), model.players()
    assert sorted(map(id, model.parameters())) == sorted(id(p) for a in players.values() for p in a.module.parameters())
    for mine, other in [("critic", "generator"), ("generator", "critic")]:
        model.zero_grad()
        players[mine].loss(batch).backward()
        assert all(p.grad is None for p in players[other].module.parameters())
        assert any(float(p.grad.abs().max()) > 0 for p in players[mine].module.parameters() if p.grad is not None)


@pytest.mark.parametrize("pac", [1, 2])
def test_the_loss_of_a_batch_is_the_mean_over_its_shares(pac):
    """What several processes find together is what one finds alone."""
    data = load("ring-8")
    model, x = GAN(data.facts, width=16, pac=pac), data.batch(range(64))
    for player in model.players().values():
        whole = player.loss(Batch(x, Rows((3,), 64))).detach()
        shares = [player.loss(Batch(x[a : a + 16], Rows((3,), 64, a, a + 16))).detach() for a in range(0, 64, 16)]
        assert float(whole) == pytest.approx(float(torch.stack(shares).mean()), rel=1e-5)


def test_without_gradients_the_loss_is_that_of_the_game_alone():
    """What is followed on held-out data is the game; the penalty on gradients is what makes up the difference."""
    data = load("digits")
    model = GAN(data.facts, width=8, classes=True)
    game = GAN(data.facts, width=8, classes=True, gamma=0)
    game.load_state_dict(model.state_dict())
    for name, player in model.players().items():
        with torch.no_grad():
            followed = player.loss(batch_of(data))
        assert torch.allclose(followed, game.players()[name].loss(batch_of(data)).detach())
        assert (followed < player.loss(batch_of(data)).detach()) == (name == "critic")


@pytest.mark.parametrize(("source", "classes"), [("ring-8", False), ("digits", False), ("digits", True)])
def test_a_sample_depends_on_its_own_seed_alone(source, classes):
    data = load(source)
    torch.manual_seed(0)
    model = GAN(data.facts, width=8, classes=classes)
    assert isinstance(model, Generative)
    long = model.sample(300, rng=5)
    for part in (model.sample(40, rng=5, start=260), model.sample(40, rng=streams(5, 300)[260:])):
        assert torch.allclose(long[260:].double(), part.double(), atol=1e-6)
    assert not torch.equal(long, model.sample(300, rng=6))
    assert len(long.flatten(1).unique(dim=0)) > 290


def test_labels_choose_what_is_made_and_others_are_refused():
    data = load("digits")
    torch.manual_seed(0)
    model = GAN(data.facts, width=8, classes=True)
    labels = torch.arange(10)
    made = model.sample(10, labels=labels)
    other = model.sample(10, labels=labels.where(labels != 3, 7))
    assert [torch.equal(a, b) for a, b in zip(made, other, strict=True)] == [i != 3 for i in range(10)]
    with pytest.raises(OptionError, match="classes 0 to 9"):
        model.sample(2, labels=torch.tensor([0, 10]))
    with pytest.raises(OptionError, match="trained without"):
        GAN(data.facts, width=8).sample(2, labels=torch.tensor([0, 1]))


def test_classes_that_are_not_asked_for_come_as_often_as_in_the_data(monkeypatch):
    """Of 20,000 samples, each class within four standard errors of its share; one without examples never."""
    counts = (500, 0, 300, 150, 25, 25, 0, 0, 0, 0)
    model, told = GAN(load("digits").facts.model_copy(update={"class_counts": counts}), width=8, classes=True), []
    monkeypatch.setattr(
        model.generator, "forward", lambda z, labels: told.append(labels) or torch.zeros(len(z), 1, 8, 8)
    )
    model.sample(20_000)
    found = torch.cat(told).bincount(minlength=10) / 20_000
    for share, count in zip(found.tolist(), counts, strict=True):
        p = count / 1000
        assert abs(share - p) <= 4 * (p * (1 - p) / 20_000) ** 0.5


@pytest.mark.parametrize(
    ("keywords", "said"),
    [
        ({"loss": "relativist"}, "did you mean 'relativistic'"),
        ({"gamma": -1.0}, "at least 0"),
        ({"pac": 0}, "at least 1"),
        ({"augment": True}, "images alone"),
        ({"classes": True}, "has none"),
    ],
)
def test_options_out_of_range_are_refused_with_a_sentence(keywords, said):
    with pytest.raises(OptionError, match=said):
        GAN(load("ring-8").facts, **keywords)


# Packing


@pytest.mark.parametrize("shape", [(3,), (2, 4, 5)])
def test_a_pack_holds_its_examples_in_turn_and_nothing_else(shape):
    """Unpacked it is what was packed; a permutation within packs permutes blocks and reaches no other pack."""
    x = normal(12, *shape)
    packs = packed(x, 4)
    assert packs.shape == (3, 4 * shape[0], *shape[1:])
    assert torch.equal(packs.reshape(12, *shape), x)
    order = torch.tensor([2, 0, 3, 1])
    moved = packed(x.reshape(3, 4, *shape)[:, order].reshape(12, *shape), 4)
    assert torch.equal(moved.reshape(3, 4, *shape), packs.reshape(3, 4, *shape)[:, order])


# Networks


@pytest.mark.parametrize("side", [8, 16])
def test_halving_is_the_adjoint_of_doubling(side):
    """<down x, y> = <x, up y> / 4 for images that are zero near the border, where both have weights of their own."""
    x, y = torch.zeros(1, 1, side, side, dtype=F64), torch.zeros(1, 1, side // 2, side // 2, dtype=F64)
    x[..., 2:-2, 2:-2] = normal(side - 4, side - 4)
    y[..., 1:-1, 1:-1] = normal(side // 2 - 2, side // 2 - 2, key=1)
    down, up = resampled(x, (side // 2, side // 2)), resampled(y, (side, side))
    assert torch.allclose((down * y).sum(), (x * up).sum() / 4, atol=1e-14)


@pytest.mark.parametrize("size", [(4, 4), (5, 3), (14, 20)])
def test_resampling_keeps_constants_and_goes_no_further_than_its_pixels(size):
    """Weights are shares: nothing rings, at the border neither."""
    x = normal(2, 3, 9, 7)
    assert torch.allclose(resampled(torch.full_like(x, 0.3), size), torch.tensor(0.3, dtype=F64), atol=1e-14)
    out = resampled(x, size)
    assert bool((out.amax((2, 3)) <= x.amax((2, 3))).all())
    assert bool((out.amin((2, 3)) >= x.amin((2, 3))).all())


def test_halving_filters_out_what_the_smaller_image_cannot_hold():
    """Stripes a pixel wide leave a quarter of themselves away from the border at most, not aliases at full height."""
    stripes = torch.tensor([1.0, -1.0], dtype=F64).repeat(16).expand(1, 1, 32, 32)
    assert float(resampled(stripes, (16, 16))[..., 2:-2].abs().max()) < 0.3
    assert float(stripes[..., ::2].abs().max()) == 1


@pytest.mark.parametrize("shape", [(1, 1, 1), (1, 5, 9), (3, 13, 6), (1, 28, 28)])
def test_images_of_any_side_are_made_and_scored_each_on_its_own(shape):
    torch.manual_seed(0)
    critic, generator = ImageCritic(shape, 8, classes=3), ImageGenerator(shape, 4, 8, classes=3)
    assert max(sizes(*shape[1:])[-1]) <= 5
    labels = torch.arange(3).repeat(2)
    x = generator(randn((6, 4), stream(0)), labels)
    assert x.shape == (6, *shape)
    assert torch.allclose(critic(x, labels)[4:], critic(x[4:], labels[4:]), atol=1e-5)


def test_without_a_label_the_score_is_the_mean_over_classes():
    critic = VectorCritic((2,), 16, classes=4)
    nn.init.normal_(critic.score.label.weight)
    x = randn((5, 2), stream(0))
    each = torch.stack([critic(x, torch.full((5,), k)) for k in range(4)]).detach()
    assert torch.allclose(critic(x), each.mean(0), atol=1e-5)
    assert float(each.std(0).min()) > 1e-3


# Augmentation


def test_changes_of_an_image_can_be_undone_or_are_its_own_pixels():
    x, by = normal(5, 2, 8, 6), normal(5, key=1)
    assert torch.allclose(augment.brightened(augment.brightened(x, by), -by), x, atol=1e-14)
    assert torch.allclose(augment.contrasted(augment.contrasted(x, by.exp()), (-by).exp()), x, atol=1e-13)
    moves = torch.tensor([[0, 0], [1, 0], [0, -2], [3, 1], [-1, 2]])
    moved = augment.translated(x, moves)
    assert torch.equal(moved[0], x[0])
    assert torch.equal(moved[1, :, 1:], x[1, :, :-1])
    assert torch.equal(moved[2, :, :, :-2], x[2, :, :, 2:])
    assert torch.equal(augment.translated(moved, -moves)[3, :, :-3, :-1], x[3, :, :-3, :-1])


def test_a_cut_box_is_half_of_each_side_and_the_rest_stays():
    x = 1 + normal(3, 1, 8, 12).abs()
    cut = augment.cut(x, torch.tensor([[0.5, 0.5], [0.99, 0.5], [0.0, 0.0]]))
    assert (cut == 0).flatten(1).sum(1).tolist() == [4 * 6, 3 * 6, 2 * 3]
    assert torch.equal(cut[cut != 0], x[cut != 0])


def test_changes_of_colour_are_none_on_average_and_alike_for_reals_and_fakes():
    """E[seen] of a uniform image is the image where no box is cut; two draws have one law, whatever they are for."""
    x = torch.full((20_000, 1, 8, 8), 0.5)
    one, other = (augment.augmented(x, Rows((k,), len(x))) for k in range(2))
    shades = [seen.flatten(1).amax(1) for seen in (one, other)]
    stderr = augment.STRENGTH / math.sqrt(3 * len(x))
    for shade in shades:
        assert abs(float(shade.mean()) - 0.5) < 4 * stderr
    gap = (shades[0].sort().values - shades[1].sort().values).abs().max()
    assert float(gap) < 0.02
    rows = Rows((5,), 8)
    both = augment.augmented(torch.cat([x[:4], x[:4] + 1]), rows)
    assert not torch.allclose(both[:4] + 1, both[4:])


def test_a_gradient_passes_through_the_changes():
    """They are affine in the image: the derivative along a direction is the change of the difference, exactly."""
    x, direction, weights = (normal(16, 1, 8, 8, key=key) for key in range(3))
    x.requires_grad_()
    before, after = (augment.augmented(image, streams(0, 16)) for image in (x, x + direction))
    (gradient,) = torch.autograd.grad((weights * before).sum(), x)
    expected = (weights * (after - before)).flatten(1).sum(1)
    assert torch.allclose((gradient * direction).flatten(1).sum(1), expected, atol=1e-12)
    assert bool((expected != 0).all())


# Diagnostics


def test_a_standing_is_that_of_a_linear_critic():
    w, x = normal(3), normal(50, 3, key=1)
    found = diagnostics.standing(lambda x: x @ w, x, x + 1, x[:10])
    assert found.fake - found.real == pytest.approx(float(w.sum()))
    assert found.steep_real == found.steep_fake == pytest.approx(float(w.norm()))
    assert found.gap == pytest.approx(float((x.mean(0) - x[:10].mean(0)) @ w))


def test_classes_that_samples_show_are_those_of_the_examples_they_copy():
    """A memoriser shows all as they are; of K equal classes one alone is log K nats away; without labels, none."""
    data, K = load("digits"), 10
    x = data.facts.scale.forward(data.train, dtype=F64)
    labels = data.train_labels
    assert diagnostics.shown(x, x, labels) == (K, 0)
    rows = torch.cat([(labels == k).nonzero()[:20, 0] for k in range(K)])
    assert diagnostics.shown(x[rows[:20]], x[rows], labels[rows]) == (1, pytest.approx(math.log(K), abs=1e-12))
    found = diagnostics.standing(lambda x: x.flatten(1).sum(1), x[:20], x[:20], x[:20])
    assert found.classes is None


def test_collapse_is_told_from_the_data_and_from_a_memoriser():
    """Held-out reals, copies of the training examples and half of the modes pass, and noise, which is no collapse; a
    point, a handful and two modes of eight do not.
    """
    law = ring_8()
    data, held_out = (law.sample(256, rng=stream(k)) for k in range(2))
    assert diagnostics.collapsed(held_out, data) is None
    assert diagnostics.collapsed(data[torch.randperm(256)], data) is None
    many = law.sample(4000, rng=stream(2))
    assert diagnostics.collapsed(many[many[:, 0] > 0.7][:256], data) is None
    assert diagnostics.collapsed(5 * randn((256, 2), stream(3)), data) is None
    assert "few kinds: 9" in diagnostics.collapsed(many[(many[:, 0].abs() < 0.7) & (many[:, 1] > 0)][:256], data)
    assert "of the data near them" in diagnostics.collapsed(many[many[:, 0].abs() < 0.7][:256], data)
    assert "alike" in diagnostics.collapsed(data.mean(0) + 0.01 * held_out, data)
    assert "few" in diagnostics.collapsed(law.means.repeat(32, 1), data)
    assert "alike" in diagnostics.collapsed(torch.full_like(data, math.nan), data)


def test_the_model_says_when_its_generator_has_collapsed():
    data = load("digits")
    torch.manual_seed(0)
    model = GAN(data.facts, width=8)
    assert model.check(batch_of(data)) is None
    nn.init.zeros_(model.generator.leave.weight)
    assert "alike" in model.check(batch_of(data))


def test_a_few_seconds_of_training_reach_every_mode_of_the_ring():
    """By the engine, whose average is what is sampled; the classic game is left to `benchmarks/gan_modes.py`."""
    data, law = load("ring-8"), ring_8()
    torch.manual_seed(0)
    model, section = GAN(data.facts, width=64, depth=2), TrainingSection(batch=64, rate=2e-3)
    state = State(model, section)
    for optimiser in state.optimisers.values():
        optimiser.param_groups[0]["betas"] = (0.0, 0.99)
    before = modes(law, model.sample(1000)).high_quality
    for _ in steps(state, data, 600, seed=0):
        pass
    assert model.check(batch_of(data, 256)) is None
    model.generator = state.averages["generator"][section.ema].module
    found = modes(law, model.sample(1000))
    assert found.hit == 8
    assert found.high_quality > 2 * before
    assert found.reverse_kl < 0.2


def test_a_run_whose_generator_collapses_stops_and_says_so(tmp_path, monkeypatch):
    """The last good checkpoint is of before: one of a collapsed generator is not written."""
    monkeypatch.setattr("ancestral.training.run.SETTLED", 4)
    looks = iter([None, "all are alike"])
    monkeypatch.setattr(GAN, "check", lambda self, batch: next(looks))
    changes = ["training.checkpoint_every=3"]
    made = start.prepare(load("ring-8"), to=tmp_path / "run", family="gan", steps=12, changes=changes)
    with pytest.raises(Diverged, match=r"step 9: .* collapsed, all are alike; .*step-0000006 is the last good"):
        for _ in made.steps():
            pass
    rows = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    (found,) = [row["standing"] for row in rows if "standing" in row][-1:]
    assert set(found) == {"real", "fake", "steep_real", "steep_fake", "gap"}


def test_a_run_on_labelled_data_says_how_many_classes_its_samples_show(tmp_path):
    changes = ["gan.width=8", "training.batch=8", "training.pictures=0"]
    made = start.prepare(load("digits"), to=tmp_path / "run", family="gan", steps=2, changes=changes)
    for _ in made.steps():
        pass
    rows = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert 1 <= rows[-1]["standing"]["classes"] <= 10
    assert rows[-1]["standing"]["uneven"] >= 0
