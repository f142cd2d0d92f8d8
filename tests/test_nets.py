"""Networks: what they promise about shapes, precision, batches and their start."""

import math

import pytest
import torch
from torch.nn import functional as F

from ancestral.errors import OptionError
from ancestral.nets import MLP, UNet
from ancestral.nets.blocks import Attention, NoiseEmbedding, channel_norm, modulated_norm_
from ancestral.nets.levels import LevelPhases
from ancestral.rng import randn, stream


def lively(net: torch.nn.Module, seed: int = 0) -> torch.nn.Module:
    """The network with the layers that start at zero filled in, so that every branch matters."""
    draw = stream(seed)
    for parameter in net.parameters():
        if not parameter.any():
            parameter.data.copy_(0.1 * randn(parameter.shape, draw))
    return net.eval()


@pytest.mark.parametrize("shape", [(1, 8, 8), (3, 7, 5), (2, 1, 9), (4, 33, 32)])
def test_unet_takes_any_channel_count_and_any_side(shape):
    """The output is as large as the input and depends on every pixel of it, and on the noise level."""
    net = lively(UNet(shape[0], width=8, multipliers=(1, 2, 2), blocks=1, precision="float32"))
    x = randn((1, *shape), stream(1)).requires_grad_()
    out = net(x, torch.zeros(1))
    assert out.shape == x.shape
    (slope,) = torch.autograd.grad(out.square().sum(), x)
    assert (slope != 0).all()
    assert not torch.equal(net(x, torch.ones(1)), out)


@pytest.mark.parametrize("net", [UNet(1, width=16, precision="float32"), MLP((1, 8, 8), width=32)])
def test_an_untrained_network_outputs_zero(net):
    """So that the first guess is what the parameterization skips through, at every noise level."""
    assert not net(torch.randn(3, 1, 8, 8), torch.tensor([-5.0, 0.0, 5.0])).any()


def test_an_image_does_not_depend_on_its_batch():
    net = lively(UNet(1, width=16, levels=17, precision="float32"))
    x, level = randn((6, 1, 8, 8), stream(1)), torch.linspace(-5, 5, 6)
    with torch.no_grad():
        together = net(x, level)
        alone = torch.cat([net(x[i : i + 1], level[i : i + 1]) for i in range(6)])
    torch.testing.assert_close(together, alone, rtol=1e-4, atol=1e-5)


def test_bfloat16_agrees_with_float32_to_its_own_rounding():
    torch.manual_seed(0)
    net = lively(UNet(1, width=16, levels=17, precision="float32"))
    x, level = randn((4, 1, 8, 8), stream(1)), torch.linspace(-5, 5, 4)
    exact = net(x, level).detach()
    net.lowered = True
    lowered = net(x, level).detach()
    assert lowered.dtype == torch.float32
    assert 0 < float((lowered - exact).norm() / exact.norm()) < 0.02


@pytest.mark.parametrize("channels", [1, 3])
def test_bfloat16_descends_the_same_loss_as_float32(channels):
    """The loss to half a percent, the direction of the whole gradient to 3 degrees, and its length to 1%."""
    torch.manual_seed(0)
    net = lively(UNet(channels, width=8, multipliers=(4, 8, 8), levels=256, precision="float32"))
    x, level = randn((8, channels, 16, 16), stream(1)), torch.linspace(-8, 8, 8)
    target, losses, gradients = randn(x.shape, stream(2)), [], []
    for net.lowered in (False, True):
        loss = (net(x, level) - target).square().mean()
        losses.append(loss.item())
        gradients.append(torch.cat([g.flatten() for g in torch.autograd.grad(loss, list(net.parameters()))]))
    exact, lowered = gradients
    assert losses[1] == pytest.approx(losses[0], rel=5e-3)
    assert torch.cosine_similarity(exact, lowered, 0) > math.cos(math.radians(3))
    assert float(lowered.norm() / exact.norm()) == pytest.approx(1, abs=0.01)


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_every_convolution_works_in_channels_last(precision):
    """From the first to the last, forward and backward, whatever the layout of the input: none converts on its own."""
    net = lively(UNet(3, width=16, levels=256, precision=precision))
    layers, seen = [m for m in net.modules() if isinstance(m, torch.nn.Conv2d)], set()

    def watch(layer, inputs, output):
        for tensor in (inputs[0], output, layer.weight):
            assert tensor.is_contiguous(memory_format=torch.channels_last), (layer, tensor.shape, tensor.stride())
        output.register_hook(lambda g: watch_gradient(layer, g))

    def watch_gradient(layer, gradient):
        assert gradient.is_contiguous(memory_format=torch.channels_last), (layer, gradient.shape, gradient.stride())
        seen.add(layer)

    for layer in layers:
        layer.register_forward_hook(watch)
    net(torch.randn(2, 3, 20, 12), torch.zeros(2)).square().sum().backward()
    assert seen == set(layers)


def test_every_parameter_takes_part():
    """Joined processes wait for the gradient of every parameter; one without would stop them."""
    net = lively(UNet(2, width=8, multipliers=(1, 2, 3), blocks=2, levels=17))
    net(torch.randn(2, 2, 9, 9), torch.zeros(2)).square().sum().backward()
    assert [name for name, p in net.named_parameters() if p.grad is None or not p.grad.any()] == []


@pytest.mark.parametrize(("channels", "groups"), [(7, 1), (8, 1), (20, 2), (32, 4)])
def test_modulated_norm_is_a_group_norm_that_is_then_modulated(channels, groups):
    """The value, and the gradient by every input, which is written out by hand, as autograd has it of the parts."""
    x = (3 + 2 * randn((3, channels, 5, 4), stream(0), dtype=torch.float64)).requires_grad_()
    modulation = randn((3, 2 * channels), stream(1), dtype=torch.float64).requires_grad_()
    scale, shift = modulation[:, :, None, None].chunk(2, 1)
    parts = F.group_norm(x, groups) * (1 + scale) + shift
    whole = modulated_norm_(x, modulation)
    torch.testing.assert_close(whole, parts)
    with torch.no_grad():
        written = x.clone()
        assert torch.equal(modulated_norm_(written, modulation), whole)
        assert torch.equal(written, whole)
    by = randn(x.shape, stream(2), dtype=torch.float64)
    torch.testing.assert_close(
        torch.autograd.grad(whole, (x, modulation), by), torch.autograd.grad(parts, (x, modulation), by)
    )


def test_modulated_norm_keeps_its_precision_far_from_zero():
    """In bfloat16 a mean of 8 standard deviations is taken off as exactly as the input was given."""
    x = (8 + randn((2, 16, 32, 32), stream(0))).bfloat16()
    exact = modulated_norm_(x.double(), torch.zeros(2, 32).double())
    assert (modulated_norm_(x, torch.zeros(2, 32)) - exact).square().mean().sqrt() < 0.05


def test_attention_is_the_same_for_few_pixels_as_for_many():
    """16x16 pixels are attended by two products, 17x16 by the fused kernel: each agrees with the definition."""
    torch.manual_seed(0)
    attention = lively(Attention(64))
    for side in (16, 17):
        x = randn((1, 64, side, 16), stream(side))
        q, k, v = attention.qkv(channel_norm(x)).flatten(2).transpose(1, 2).chunk(3, 2)
        mixed = (q @ k.transpose(1, 2) / 8).softmax(2) @ v
        expected = x + attention.out(mixed.transpose(1, 2).reshape(x.shape))
        torch.testing.assert_close(attention(x), expected, rtol=1e-4, atol=1e-4)


def test_unknown_precision_is_refused():
    with pytest.raises(OptionError, match="did you mean 'bfloat16'"):
        UNet(1, precision="bfloat")


def test_channel_norm_brings_each_pixel_to_zero_mean_and_unit_variance():
    x = 3 + 2 * randn((2, 64, 5, 4), stream(0))
    y = channel_norm(x)
    torch.testing.assert_close(y.mean(1), torch.zeros(2, 5, 4), rtol=0, atol=1e-5)
    torch.testing.assert_close(y.var(1, correction=0), torch.ones(2, 5, 4), rtol=1e-3, atol=0)


@pytest.mark.parametrize("levels", [17, 256])
def test_phases_tell_levels_apart_and_fade_as_noise_does(levels):
    """On a level the first phase is sin 0, cos 1; under noise the features are the mean of the noiseless ones."""
    phases = LevelPhases(levels, octaves=3)
    values = torch.linspace(-1, 1, levels, dtype=torch.float64)
    clean = phases(values.reshape(1, 1, 1, -1), torch.tensor([60.0], dtype=torch.float64))[0, :, 0]
    assert clean.shape == (7, levels)
    sign = torch.cos(torch.tensor((levels - 1) * torch.pi)).double()  # level 0 sits at -1, half the range from 0
    torch.testing.assert_close(clean[1], torch.zeros(levels).double(), rtol=0, atol=1e-9)
    torch.testing.assert_close(clean[2], sign.expand(levels), rtol=0, atol=1e-9)

    rho = 0.3 * 2 / (levels - 1)
    log_snr = torch.tensor([-2.0]).double() * torch.tensor(rho).double().log()
    noise = torch.linspace(-8, 8, 4001, dtype=torch.float64)
    weight = torch.exp(-(noise**2) / 2)
    x = torch.tensor(0.1234, dtype=torch.float64)
    average = phases((x + rho * noise).reshape(1, 1, 1, -1), torch.tensor([200.0]).double())[0, 1:, 0]
    average = (average * weight).sum(1) / weight.sum()
    scale = (1 + rho**2) ** -0.5
    faded = phases((scale * x).reshape(1, 1, 1, 1), log_snr)[0, 1:, 0, 0]
    torch.testing.assert_close(faded, average, rtol=1e-5, atol=1e-7)


def test_noise_embedding_separates_levels_over_the_whole_range():
    torch.manual_seed(0)
    embedding = NoiseEmbedding(64)
    levels = torch.linspace(-20, 20, 81)
    apart = torch.cdist(embedding(levels), embedding(levels))
    neighbours = apart.diagonal(1)
    assert neighbours.min() > 0.1 * apart.median()
