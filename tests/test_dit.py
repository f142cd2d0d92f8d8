"""The transformer: what it promises about shapes, positions, classes, precision, and its start."""

import numpy as np
import pytest
import torch

import ancestral
from ancestral import labels as labelling
from ancestral.data import load
from ancestral.errors import OptionError
from ancestral.nets import DiT, UNet
from ancestral.nets.dit import positions
from ancestral.protocol import Batch
from ancestral.rng import Rows, randn, stream
from ancestral.training import recipes
from test_nets import lively


def small(channels: int = 1, **options) -> DiT:
    torch.manual_seed(0)
    settings = {"width": 32, "depth": 2, "heads": 2, "patch": 2, "precision": "float32", **options}
    return lively(DiT(channels, **settings))


@pytest.mark.parametrize("shape", [(1, 8, 8), (3, 7, 5), (2, 1, 9), (4, 33, 32)])
@pytest.mark.parametrize("patch", [1, 2, 4])
def test_any_channel_count_side_and_patch(shape, patch):
    """The output is as large as the input and depends on every pixel of it, and on the noise level."""
    net = small(shape[0], patch=patch)
    x = randn((1, *shape), stream(1)).requires_grad_()
    out = net(x, torch.zeros(1))
    assert out.shape == x.shape
    (slope,) = torch.autograd.grad(out.square().sum(), x)
    assert (slope != 0).all()
    assert not torch.equal(net(x, torch.ones(1)), out)


def test_an_untrained_transformer_outputs_zero_whatever_it_is_told():
    net = DiT(1, width=32, depth=2, heads=2, classes=3, precision="float32")
    assert not net(torch.randn(3, 1, 8, 8), torch.tensor([-5.0, 0.0, 5.0]), torch.tensor([0, 1, 3])).any()


def test_a_patch_is_cut_and_put_back_where_it_was():
    """With one-hot weights at both ends and blocks that add nothing, pixels come out where they went in."""
    net = DiT(1, width=16, depth=1, heads=1, patch=2, precision="float32").eval()
    with torch.no_grad():
        net.enter.weight.copy_(100 * torch.eye(16)[:, :4].reshape(16, 1, 2, 2))
        net.enter.bias.zero_()
        net.leave.weight.copy_(torch.eye(16)[:4])
    x = torch.zeros(1, 1, 6, 4)
    x[0, 0, 3, 2] = 1
    seen = net(x, torch.zeros(1)) - net(torch.zeros_like(x), torch.zeros(1))
    assert int(seen.abs().argmax()) == 3 * 4 + 2


def test_positions_tell_every_patch_apart():
    """Nearest of all patches to each is itself, and a step in either direction changes them by as much."""
    where = positions(7, 9, 64)
    assert where.shape == (63, 64)
    apart = torch.cdist(where, where).fill_diagonal_(torch.inf)
    assert float(apart.min()) > 0.5
    grid = where.reshape(7, 9, 64)
    down, right = (grid[1:] - grid[:-1]).norm(dim=-1), (grid[:, 1:] - grid[:, :-1]).norm(dim=-1)
    torch.testing.assert_close(down.mean(), right.mean())


def test_patches_attend_to_each_other_and_know_where_they_are():
    net = small()
    x = randn((1, 1, 8, 8), stream(1))
    turned = x.flip(-1)
    assert not torch.allclose(net(turned, torch.zeros(1)).flip(-1), net(x, torch.zeros(1)), atol=1e-3)
    moved = x.clone()
    moved[..., 7, 7] += 1
    assert float((net(moved, torch.zeros(1)) - net(x, torch.zeros(1)))[..., 0, 0].detach().abs()) > 1e-5


@pytest.mark.parametrize("kind", ["dit", "unet"])
def test_labels_matter_and_none_is_the_law_of_all_classes(kind):
    net = small(classes=10) if kind == "dit" else lively(UNet(1, width=16, classes=10, precision="float32"))
    x, level = randn((4, 1, 8, 8), stream(1)), torch.zeros(4)
    told = [net(x, level, torch.full((4,), label)) for label in range(11)]
    assert all(not torch.equal(told[0], other) for other in told[1:])
    assert torch.equal(net(x, level), told[10])
    permuted = net(x, level, torch.tensor([3, 1, 2, 0]))
    torch.testing.assert_close(permuted[0], told[3][0], rtol=1e-4, atol=1e-5)


def test_bfloat16_agrees_with_float32_in_loss_and_gradient():
    """To its own rounding, 2^-8 a product: the loss within 1%, the gradient within 5% and its direction within 0.2%."""
    x, level = randn((16, 1, 8, 8), stream(1)), torch.linspace(-5, 5, 16)
    net = small(levels=17)
    losses, gradients = [], []
    for net.lowered in (False, True):
        loss = (net(x, level) - x).square().mean()
        losses.append(float(loss.detach()))
        gradients.append(torch.cat([g.flatten() for g in torch.autograd.grad(loss, list(net.parameters()))]))
    exact, rounded = gradients
    assert losses[1] == pytest.approx(losses[0], rel=0.01)
    assert losses[1] != losses[0]
    assert float((rounded - exact).norm() / exact.norm()) < 0.05
    assert float(torch.cosine_similarity(rounded, exact, 0)) > 0.998


DIT = ["dit.width=32", "dit.depth=1", "dit.heads=1", "dit.patch=1", "dit.labels=true"]
UNET = ["unet.width=16", "unet.multipliers=[1]", "unet.blocks=1", "unet.labels=true"]


@pytest.mark.parametrize(("preset", "changes"), [("dit-tiny", DIT), ("tiny", UNET)])
def test_a_model_that_is_told_classes_learns_them(tmp_path, preset, changes):
    """Two classes, all black and all white: soon a sample is of the class that was asked for, or of either."""
    pictures = np.zeros((400, 1, 4, 4), dtype=np.uint8)
    pictures[200:] = 16
    pictures += np.random.default_rng(0).integers(0, 3, pictures.shape, dtype=np.uint8)
    np.savez(tmp_path / "two.npz", x=pictures, y=np.repeat([0, 1], 200))
    changes = [*changes, "training.batch=64", "training.warmup=5", "training.pictures=0"]
    run = ancestral.train(tmp_path / "two.npz", to=tmp_path / "run", steps=600, preset=preset, changes=changes)
    model = ancestral.load(run.path)
    for label in (0, 1):
        mean = model.sample(32, steps=20, labels=torch.full((32,), label)).float().mean((1, 2, 3))
        assert int(((mean > 9) == bool(label)).sum()) >= 31
    mixed = model.sample(64, steps=20).float().mean((1, 2, 3))
    assert 2 < int((mixed > 9).sum()) < 62


def test_a_tenth_of_the_labels_are_not_told():
    data = load("digits")
    labels = torch.arange(1000) % 10
    batch = Batch(torch.zeros(1000, 1, 8, 8), Rows((0,), 1000), labels)
    told = labelling.told(batch, len(data.facts.classes))
    assert torch.equal(told[told < 10], labels[told < 10])
    assert 60 < int((told == 10).sum()) < 140


def test_labels_that_a_model_does_not_know_are_refused():
    facts = load("digits").facts
    told = recipes.build(recipes.change(recipes.choose(facts, preset="dit-tiny"), ["dit.labels=true"]), facts)
    with pytest.raises(OptionError, match="this model knows classes 0 to 9"):
        told.sample(2, labels=torch.tensor([3, 11]))
    plain = recipes.build(recipes.choose(facts), facts)
    with pytest.raises(OptionError, match="was trained without"):
        plain.sample(2, labels=torch.tensor([3, 1]))
    unlabelled = facts.model_copy(update={"classes": None})
    with pytest.raises(OptionError, match="but digits has none"):
        recipes.build(recipes.change(recipes.choose(facts, preset="dit-tiny"), ["dit.labels=true"]), unlabelled)
    with pytest.raises(OptionError, match="a multiple of 4"):
        DiT(1, width=30, heads=3)
