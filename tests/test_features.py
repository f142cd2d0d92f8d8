"""Features: what they are computed with is in their name, and an encoder is trained once and the same."""

import dataclasses
import json
import sys

import numpy as np
import pytest
import torch

from ancestral.data import load
from ancestral.errors import OptionError
from ancestral.measure import encoder, features
from ancestral.measure.metrics import coverage, distances
from ancestral.rng import stream

DIGITS = load("digits")
UNLABELLED = dataclasses.replace(DIGITS, train_labels=None, held_out_labels=None)


@pytest.fixture
def brief(monkeypatch, tmp_path):
    """A folder for encoders that are trained for few steps."""
    monkeypatch.setattr(encoder, "STEPS", 30)
    return tmp_path


def test_pixels_are_the_values_in_the_units_of_the_model():
    found = features.named("pixels", DIGITS)(DIGITS.held_out)
    assert found.dtype == torch.float64
    assert torch.equal(found, DIGITS.held_out.double().flatten(1) / 8 - 1)


def test_principal_components_are_those_of_the_singular_values():
    """All 64 of them keep every distance; their variances on the training split fall and they are uncorrelated."""
    found = features.named("pca", DIGITS)(DIGITS.train)
    pixels = DIGITS.train.double().flatten(1) / 8 - 1
    x = (pixels - pixels.mean(0)).numpy()
    singular = np.linalg.svd(x, compute_uv=False)
    assert found.std(0, correction=0).numpy() == pytest.approx(singular / len(x) ** 0.5, abs=1e-6)
    assert torch.allclose(torch.pdist(found[:50]), torch.pdist(pixels[:50]), rtol=1e-5)
    assert found.T.cov().fill_diagonal_(0).abs().max() < 1e-6


def test_principal_components_of_fewer_examples_than_values_are_the_same_map():
    """By the Gram matrix of examples: 41 of them span 40 dimensions, in which distances are those of pixels."""
    few = dataclasses.replace(DIGITS, train=DIGITS.train[:41])
    found = features.named("pca", few)(few.train)
    assert found.shape[1] == 40
    assert torch.allclose(torch.pdist(found), torch.pdist(few.train.double().flatten(1) / 8), rtol=1e-5)


def test_a_name_tells_what_features_were_computed_with():
    pca = features.named("pca", DIGITS)
    assert pca.told("FD", 10_000) == f"FD[digits-pca@{pca.digest[:8]}, N=10000]"
    assert features.named("pca", DIGITS).digest == pca.digest
    fewer = dataclasses.replace(DIGITS, train=DIGITS.train[:-1])
    assert features.named("pca", fewer).digest != pca.digest
    assert features.named("pixels", DIGITS).digest != pca.digest


def test_an_encoder_is_trained_once_and_read_after_that(brief, monkeypatch):
    first = features.named("encoder", DIGITS, folder=brief)
    kept = next((brief / "encoders").glob("*/"))
    assert {path.name for path in kept.iterdir()} == {"weights.safetensors", "encoder.json", "manifest.json"}
    assert json.loads((kept / "encoder.json").read_text())["digest"] == DIGITS.facts.digest
    monkeypatch.setattr(encoder, "fit", lambda *_, **__: pytest.fail("trained again"))
    again = features.named("encoder", DIGITS, folder=brief)
    assert again.digest == first.digest
    assert torch.equal(again(DIGITS.held_out), first(DIGITS.held_out))


def test_an_encoder_is_a_function_of_data_and_seed_whatever_was_drawn_before(brief):
    digests = []
    for seed, where in ((0, "a"), (0, "b"), (1, "a")):
        torch.rand(3)
        digests.append(features.named("encoder", DIGITS, seed=seed, folder=brief / where).digest)
    assert digests[0] == digests[1] != digests[2]


def test_a_damaged_encoder_is_trained_anew(brief):
    first = features.named("encoder", DIGITS, folder=brief)
    kept = next((brief / "encoders").glob("*/"))
    content = bytearray((kept / "weights.safetensors").read_bytes())
    content[-1] ^= 1
    (kept / "weights.safetensors").write_bytes(content)
    assert features.named("encoder", DIGITS, folder=brief).digest == first.digest


def test_encoders_are_kept_where_the_environment_says(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "shared"))
    monkeypatch.delenv("ANCESTRAL_CACHE", raising=False)
    assert encoder.kept_in() == tmp_path / "shared" / "ancestral"
    monkeypatch.setenv("ANCESTRAL_CACHE", str(tmp_path / "own"))
    assert encoder.kept_in() == tmp_path / "own"
    monkeypatch.delenv("ANCESTRAL_CACHE")
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert encoder.kept_in().parts[-2:] == (".cache", "ancestral")


def test_an_encoder_of_labelled_digits_tells_them_and_classes_that_are_missing_cost_what_they_should(
    monkeypatch, tmp_path
):
    monkeypatch.setattr(encoder, "STEPS", 120)
    found = features.named("encoder", DIGITS, folder=tmp_path)
    told = found.labels(DIGITS.held_out)
    assert float((told == DIGITS.held_out_labels).double().mean()) > 0.93
    few = DIGITS.held_out[DIGITS.held_out_labels < 8]
    balance = coverage.class_balance(found.labels(few), told, classes=10, rng=stream(0))
    assert balance.value == pytest.approx(0.2, abs=0.03)
    real, train = found(DIGITS.held_out), found(DIGITS.train[: len(DIGITS.held_out)])
    noise = found((16 * torch.rand(len(DIGITS.held_out), 1, 8, 8)).round().to(torch.uint8))
    assert distances.energy(real, train).high < distances.energy(noise, train).low


def test_without_labels_an_encoder_learns_features_that_vary_and_have_neighbours_of_the_same_class(
    monkeypatch, tmp_path
):
    monkeypatch.setattr(encoder, "STEPS", 60)
    found = features.named("encoder", UNLABELLED, folder=tmp_path)
    train, held_out = found(DIGITS.train), found(DIGITS.held_out)
    nearest = torch.cdist(held_out, train).argmin(1)
    assert float((DIGITS.train_labels[nearest] == DIGITS.held_out_labels).double().mean()) > 0.9
    values = torch.linalg.eigvalsh(train.T.cov())
    assert float(values.sum().square() / values.square().sum()) > 3  # effective dimensions
    with pytest.raises(OptionError, match="tells no classes"):
        found.labels(DIGITS.held_out)


def test_an_encoder_of_vectors_learns_without_labels(brief):
    moons = load("two-moons")
    found = features.named("encoder", moons, folder=brief)(moons.held_out)
    assert found.shape == (len(moons.held_out), encoder.FEATURES)
    assert torch.pdist(found[:100]).min() > 0


def test_the_loss_without_labels_is_nothing_of_alike_varied_and_unrepeated_features():
    """Each of its three parts alone, as it is defined."""
    z = torch.tensor([[2.0, 0.0], [-2.0, 0.0], [0.0, 2.0], [0.0, -2.0]])
    assert encoder.vicreg(z, z).item() == 0
    moved = encoder.vicreg(z, z + torch.tensor([1.0, 0.0]))
    assert moved.item() == pytest.approx(25 / 2)
    repeated = torch.tensor([[1.0, 1.0], [-1.0, -1.0]]) * 2
    assert encoder.vicreg(repeated, repeated).item() == pytest.approx(2 * 2 * 8**2 / 2)
    collapsed = torch.zeros(4, 2)
    assert encoder.vicreg(collapsed, collapsed).item() == pytest.approx(2 * 25 * (1 - 1e-2), rel=1e-5)


def test_features_do_not_depend_on_how_many_are_computed_at_once(brief, monkeypatch):
    for name in ("pixels", "pca", "encoder"):
        found = features.named(name, DIGITS, folder=brief)
        whole = found(DIGITS.held_out[:60])
        monkeypatch.setattr(features, "AT_ONCE", 7)
        assert torch.allclose(found(DIGITS.held_out[:60]), whole, rtol=1e-4, atol=1e-5)
        monkeypatch.undo()
        monkeypatch.setattr(encoder, "STEPS", 30)


def test_what_cannot_be_computed_is_refused_in_a_sentence(monkeypatch, tmp_path):
    with pytest.raises(OptionError, match="did you mean 'pixels'"):
        features.named("pixel", DIGITS)
    with pytest.raises(OptionError, match="takes those of shape"):
        features.named("pixels", DIGITS)(torch.zeros(2, 1, 9, 9))
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    with pytest.raises(OptionError, match=r"pip install 'ancestral\[onnx\]'"):
        features.named("onnx:net.onnx", DIGITS)


def field(number, content):
    """A field of a protocol buffer: a whole number, text, or a message that was encoded before."""
    if isinstance(content, int):
        return bytes([number << 3, content])
    content = content.encode() if isinstance(content, str) else content
    assert len(content) < 2**14
    size = bytes([len(content)]) if len(content) < 128 else bytes([len(content) & 127 | 128, len(content) >> 7])
    return bytes([number << 3 | 2]) + size + content


def a_network(shape):
    """An ONNX network whose output is the positive part of its input."""

    def value(name):
        dims = field(1, field(2, "n")) + b"".join(field(1, field(1, side)) for side in shape)
        return field(1, name) + field(2, field(1, field(1, 1) + field(2, dims)))

    node = field(1, "x") + field(2, "y") + field(4, "Relu")
    graph = field(1, node) + field(2, "positive part") + field(11, value("x")) + field(12, value("y"))
    return field(1, 8) + field(7, graph) + field(8, field(2, 13))


def test_a_network_in_a_file_is_given_the_units_of_the_model(tmp_path):
    pytest.importorskip("onnxruntime")
    path = tmp_path / "net.onnx"
    path.write_bytes(a_network((1, 8, 8)))
    found = features.named(f"onnx:{path}", DIGITS)
    pixels = features.named("pixels", DIGITS)(DIGITS.held_out)
    assert torch.allclose(found(DIGITS.held_out), pixels.clamp(min=0))
    assert found.name.startswith("digits-onnx@")
    path.write_bytes(a_network((1, 9, 9)))
    with pytest.raises(OptionError, match="cannot take examples of shape"):
        features.named(f"onnx:{path}", DIGITS)(DIGITS.held_out)
    path.write_bytes(b"nothing")
    with pytest.raises(OptionError, match="cannot be read"):
        features.named(f"onnx:{path}", DIGITS)
    with pytest.raises(OptionError, match="no such file"):
        features.named(f"onnx:{tmp_path / 'none.onnx'}", DIGITS)
