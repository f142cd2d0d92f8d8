"""Presets: networks by name, of the sizes they say, for images of any shape."""

from inspect import signature
from itertools import pairwise

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from ancestral.data import Facts, Scale, load
from ancestral.errors import OptionError
from ancestral.flow.model import Flow
from ancestral.gan.model import GAN
from ancestral.rng import stream
from ancestral.training import recipes
from ancestral.training.settings import FlowSection, GANSection, VAESection
from ancestral.vae.model import VAE


def of_shape(*shape: int) -> Facts:
    return load("digits").facts.model_copy(update={"shape": shape, "levels": 256})


def size(preset: str, facts: Facts) -> tuple[int, float]:
    """Parameters, and GFLOP forward an image."""
    model = recipes.build(recipes.choose(facts, "images", preset), facts)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model.network(torch.zeros(1, *facts.shape), torch.full((1,), 0.5))
    return sum(parameter.numel() for parameter in model.parameters()), counter.get_total_flops() / 1e9


@pytest.mark.parametrize("kind", ["", "dit-"])
@pytest.mark.parametrize("channels", [1, 3])
def test_presets_grow_by_about_four_times_and_more_in_what_they_cost(kind, channels):
    costs = [size(kind + name, of_shape(channels, 32, 32)) for name in recipes.SIZES]
    for less, more in pairwise(costs):
        assert 3 < more[1] / less[1] < 8
        assert more[0] > 2 * less[0]
    assert 0.4 < costs[1][1] < 0.8


@pytest.mark.parametrize("preset", recipes.PRESETS)
@pytest.mark.parametrize("shape", [(1, 8, 8), (3, 17, 40), (1, 64, 64)])
def test_every_preset_takes_every_shape(preset, shape):
    facts = of_shape(*shape)
    model = recipes.build(recipes.choose(facts, "images", preset), facts)
    assert model.network(torch.zeros(2, *shape), torch.full((2,), 0.5)).shape == (2, *shape)


def test_a_preset_replaces_the_network_and_its_settings_can_be_changed():
    facts = load("digits").facts
    setup = recipes.choose(facts, preset="dit-tiny")
    assert setup.unet is None
    assert recipes.change(setup, ["dit.depth=2"]).dit.depth == 2
    for change, sentence in [("unet.width=8", "unknown setting 'unet.width'"), ("dit.width=2", "dit.width = 2")]:
        with pytest.raises(OptionError, match=sentence):
            recipes.change(setup, [change])
    with pytest.raises(OptionError, match="did you mean 'small'"):
        recipes.choose(facts, preset="smal")
    with pytest.raises(OptionError, match="a network for images"):
        recipes.choose(load("ring-8").facts, preset="small")


@pytest.mark.parametrize("name", ["digits_bits", "mnist_bits", "cifar10_bits"])
@pytest.mark.parametrize("levels", [17, 256])
def test_the_ends_of_a_chain_for_bits_cost_next_to_nothing(name, levels):
    """Where it starts noise is finer than a level, and where it ends nothing of an example is left to tell."""
    facts = load("digits").facts.model_copy(update={"levels": levels, "scale": Scale.of_levels(levels)})
    setup = recipes.change(recipes.choose(facts, name), ["unet.width=8", "unet.blocks=1"])
    x = torch.from_numpy(stream(0).integers(0, levels, (100, *facts.shape)))
    found = recipes.build(setup, facts).bound(x, draws=1)
    assert facts.bits_per_dim(float(found.decoder.mean())) < 0.02
    assert facts.bits_per_dim(float(found.prior.mean())) < 1e-3


def test_a_preset_keeps_the_posterior_of_a_recipe_for_bits():
    facts = load("digits").facts
    assert recipes.choose(facts, "digits_bits", "tiny").unet.posterior
    assert not recipes.choose(facts, "digits", "tiny").unet.posterior


@pytest.mark.parametrize(("section", "family"), [(VAESection, VAE), (FlowSection, Flow), (GANSection, GAN)])
def test_a_section_has_the_keywords_of_its_family_with_the_same_defaults(section, family):
    keywords = {name: parameter.default for name, parameter in signature(family).parameters.items() if name != "facts"}
    assert {**section().model_dump(exclude={"labels"}), "classes": section().labels} == keywords
