"""Inception-v3: read from one file and no other, resized and pooled as the distances it is famous for are defined."""

import dataclasses
import hashlib
import json

import pytest
import torch
from typer.testing import CliRunner

from ancestral.apps.cli import app
from ancestral.data import load
from ancestral.errors import OptionError
from ancestral.measure import features
from ancestral.measure.metrics import distances
from ancestral.measure.quality import Bench, called
from ancestral.nets.inception import SIDE, Inception, mean_3x3, resized
from ancestral.rng import randn, stream

DIGITS = load("digits")
DIGEST = "09ba1580d4d5cbfeb71ad1160029fad7758f2cdb131cdcd006d37b578c109998"


@pytest.fixture(scope="module")
def network():
    """With weights that are none, but of the size of which activations neither vanish nor grow."""
    found = Inception().eval()
    for i, (name, each) in enumerate(found.state_dict().items()):
        drawn = randn(each.shape, stream(0, i), dtype=torch.float32)
        if name.endswith("conv.weight"):
            each.copy_(drawn * (2 / each[0].numel()) ** 0.5)
        elif name.endswith(("bn.weight", "running_var")):
            each.copy_(1 + 0.1 * drawn)
        elif each.is_floating_point():
            each.copy_(0.1 * drawn)
    return found


def test_parameters_have_the_names_and_shapes_of_the_file_that_is_handed_around():
    """By a hash of all of them, which was taken of torch-fidelity's; the classifier is not among them."""
    state = Inception().state_dict()
    told = "".join(f"{name} {tuple(each.shape)};" for name, each in sorted(state.items()))
    assert hashlib.sha256(told.encode()).hexdigest() == DIGEST


def test_images_are_resized_as_tensorflow_does_it():
    """By hand: from 3 pixels to 4, places are 0, 3/4, 3/2 and 9/4, and beyond the last pixel is the last."""
    x = torch.tensor([[0.0, 10.0, 40.0], [100.0, 110.0, 140.0], [200.0, 210.0, 240.0]])[None, None]
    across = torch.tensor([0.0, 7.5, 25.0, 40.0])
    down = torch.tensor([0.0, 75.0, 150.0, 200.0])
    assert torch.equal(resized(x, 4)[0, 0], down[:, None] + across)
    assert torch.equal(resized(x, 3), x)
    every_other = torch.arange(64.0).reshape(1, 1, 8, 8)
    assert torch.equal(resized(every_other, 4), every_other[:, :, ::2, ::2])  # without a filter


def test_pooling_does_not_count_what_is_padded():
    """A corner is the mean of the four pixels that are there."""
    x = torch.arange(9.0).reshape(1, 1, 3, 3)
    assert mean_3x3(x)[0, 0].tolist() == [[2.0, 2.5, 3.0], [3.5, 4.0, 4.5], [5.0, 5.5, 6.0]]
    assert torch.equal(mean_3x3(torch.ones(1, 1, 5, 7)), torch.ones(1, 1, 5, 7))


def test_features_of_a_constant_image_are_those_of_one_pixel_of_it(network):
    """Whatever the size it comes in; and each image has its own, whatever the batch."""
    with torch.no_grad():
        whole = network(torch.full((1, 3, SIDE, SIDE), 200.0))
        both = network(torch.cat([torch.full((1, 3, 1, 1), 200.0), torch.zeros(1, 3, 1, 1)]))
    torch.testing.assert_close(both[:1], whole, rtol=1e-4, atol=1e-5)
    assert float((both[0] - both[1]).norm() / both[0].norm()) > 0.1


def test_numbers_are_called_fid_and_kid_in_these_features_and_in_no_others(network, monkeypatch, tmp_path):
    """What the network is given are the 8 bits of the image; another file is refused before it is opened."""
    path = tmp_path / "weights.pth"
    torch.save({**network.state_dict(), "fc.weight": torch.zeros(1008, 2048)}, path)
    with pytest.raises(OptionError, match="is not the file that FID is defined by"):
        features.named(f"inception:{path}", DIGITS)
    monkeypatch.setattr(features, "INCEPTION", hashlib.sha256(path.read_bytes()).hexdigest())
    found = features.named(f"inception:{path}", DIGITS)
    raw = DIGITS.held_out[:3]
    with torch.no_grad():
        seen = network((raw.float() * 255 / 16).round().expand(-1, 3, -1, -1))
    torch.testing.assert_close(found(raw), seen.double(), rtol=1e-4, atol=1e-5)
    assert [called(name, found.name) for name in ("frechet", "kid", "energy")] == ["FID∞", "KID", "energy distance²"]
    pixels = features.named("pixels", DIGITS).name
    assert not any(name in called(metric, pixels) for metric in ("frechet", "kid") for name in ("FID", "KID"))

    narrow = dataclasses.replace(found, compute=lambda x: x.flatten(1))
    assert "fid" not in Bench(DIGITS, n=120, features="pixels").held_out
    monkeypatch.setattr("ancestral.measure.quality.named", lambda *_: narrow)
    bench = Bench(DIGITS, n=120)
    assert bench.held_out["fid"] == distances.frechet(narrow(bench._other), narrow(bench._against))


def test_a_file_that_is_not_there_or_is_another_is_one_sentence_and_nothing_is_written(tmp_path):
    run, other = tmp_path / "run", tmp_path / "other.pth"
    other.write_bytes(b"cos\nsystem\n(S'exit 1'\ntR.")
    quick = ["--set", "unet.width=8", "--set", "unet.blocks=1", "--set", "diffusion.chain=25"]
    assert CliRunner().invoke(app, ["train", "digits", "--steps", "1", "--to", str(run), *quick]).exit_code == 0
    for path, words in ((other, "SHA-256"), (tmp_path / "none.pth", "no such file")):
        command = ["evaluate", str(run), "--features", f"inception:{path}", "--json"]
        result = CliRunner().invoke(app, command)
        assert result.exit_code == 2
        assert words in json.loads(result.stdout)["error"]
        assert len(result.stderr.strip().splitlines()) <= 2
        assert not list(run.glob("evaluation*"))


def test_vectors_and_real_values_have_no_such_features():
    with pytest.raises(OptionError, match="grey or RGB images on levels, and ring-8"):
        features.named("inception:any.pth", load("ring-8"))
