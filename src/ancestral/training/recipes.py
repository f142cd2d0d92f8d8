"""Recipes: functions from the facts of a data set to a complete, named set-up, and from a set-up to a model.

A set-up is the record of every constructor's keywords. It is written into each checkpoint as JSON, so a run needs no
flags to be loaded again.
"""

import json
import math
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, get_args

import torch
from pydantic import ValidationError

from ancestral.data import Facts
from ancestral.diffusion import process as processes
from ancestral.diffusion.model import Diffusion
from ancestral.errors import OptionError, unknown
from ancestral.flow.model import Flow
from ancestral.gan.model import GAN
from ancestral.labels import counted
from ancestral.nets import MLP, DiT, UNet
from ancestral.training.loop import TrainingSection
from ancestral.training.settings import (
    DiffusionSection,
    DiTSection,
    Family,
    FlowSection,
    GANSection,
    MLPSection,
    ProcessSection,
    Setup,
    UNetSection,
    VAESection,
)
from ancestral.vae.model import VAE

Model = Diffusion | VAE | Flow | GAN
"""A model of any family."""


def plain(facts: Facts) -> DiffusionSection:
    """beta~ where the data has levels and the posterior is sharp at little noise; beta where it is a density."""
    return DiffusionSection(variance="fixed-small" if facts.levels else "beta")


def digits(facts: Facts) -> Setup:
    """Small images, such as the 8x8 digits: good samples and bits in two minutes on two cores."""
    return Setup(
        recipe="digits",
        diffusion=plain(facts),
        unet=UNetSection(width=32, multipliers=(1, 2), blocks=1),
        training=TrainingSection(minutes=2.0, batch=128),
    )


def images(facts: Facts) -> Setup:
    """Images of any channel count and side, on the small network."""
    return Setup(
        recipe="images",
        process=ProcessSection(options={"offset": 0.0}),
        diffusion=plain(facts),
        unet=unet("small", facts),
        training=TrainingSection(minutes=10.0, batch=64),
    )


def bits(facts: Facts, *, width: int, multipliers: tuple[int, ...], blocks: int) -> Setup:
    """For the fewest bits per dimension: a posterior over levels, on a log-SNR that is linear between its two ends.

    The network puts out a prior over the levels of each value, and Bayes' rule does the rest; the reverse variance is
    what that posterior knows, and the first step is finer than a level, where the decoder has nothing left to say.
    """
    return Setup(
        recipe="bits",
        process=ProcessSection(schedule="log-linear", options={"log_snr_max": finest(facts.levels or 256)}),
        diffusion=DiffusionSection(predicts="x0", weighting="bound", variance="optimal", decoder="softmax"),
        unet=UNetSection(width=width, multipliers=multipliers, blocks=blocks, posterior=True),
    )


def finest(levels: int) -> float:
    """The log-SNR at which half of the distance between two levels is three standard deviations of the noise.

    Example:
        >>> round(finest(256), 1)
        13.3
    """
    return 2 * math.log(3 * (levels - 1))


def digits_bits(facts: Facts) -> Setup:
    """Bits per dimension of small images with few levels, in five minutes on two cores.

    The number of steps is fixed: in a run of 4,000 on some 1,500 images, the second half lost 0.06 bits/dim on held-out
    ones.
    """
    training = TrainingSection(steps=2000, batch=128, rate=3e-3)
    setup = bits(facts, width=32, multipliers=(1, 2), blocks=2)
    return setup.model_copy(update={"recipe": "digits_bits", "training": training})


def mnist_bits(facts: Facts) -> Setup:
    """Bits per dimension of grey images of about 28x28, in an hour on two cores."""
    training = TrainingSection(minutes=60.0, batch=64, rate=3e-3)
    setup = bits(facts, width=48, multipliers=(1, 2, 2), blocks=3)
    return setup.model_copy(update={"recipe": "mnist_bits", "training": training})


def cifar10_bits(facts: Facts) -> Setup:
    """Bits per dimension of coloured images of 32x32: sized for days of a GPU, and not for a CPU."""
    training = TrainingSection(minutes=3000.0, batch=128, rate=5e-4, warmup=1000, ema=0.02, flip=True)
    setup = bits(facts, width=128, multipliers=(1, 2, 2), blocks=8)
    return setup.model_copy(update={"recipe": "cifar10_bits", "training": training})


def vectors(facts: Facts) -> Setup:
    """Vectors and tables of real values: of few columns, with waves of them and a batch that steadies the gradient."""
    few = facts.dims <= 16
    return Setup(
        recipe="vectors",
        process=ProcessSection(schedule="log-linear", options={"log_snr_max": 10.0}),
        diffusion=plain(facts),
        mlp=MLPSection(width=128) if few else MLPSection(width=256, octaves=0),
        training=TrainingSection(steps=4000, batch=2048, rate=3e-3)
        if few
        else TrainingSection(minutes=1.0, batch=512, rate=1e-3),
    )


def vae(facts: Facts) -> Setup:
    """A variational autoencoder whose decoder is a likelihood: of levels, bits or real values."""
    section = VAESection(ladder=0 if small(facts) else 2)
    if len(facts.shape) != 3:
        section = VAESection(latents=min(32, facts.dims), ladder=2, width=128, blocks=2)
    return Setup(recipe="vae", family="vae", vae=section, training=autoencoding(facts), **NO_DIFFUSION)


def ladder(facts: Facts) -> Setup:
    """The same with a ladder of latents whatever the data: each group of them is drawn given those above."""
    setup = vae(facts)
    section = setup.vae and setup.vae.model_copy(update={"ladder": max(1, setup.vae.ladder)})
    return setup.model_copy(update={"recipe": "ladder", "vae": section})


def autoencoding(facts: Facts) -> TrainingSection:
    """Few steps for few small images, which a VAE learns by heart."""
    if len(facts.shape) != 3:
        return TrainingSection(steps=3000, batch=256, rate=2e-3)
    if small(facts):
        return TrainingSection(steps=1500, batch=128)
    return TrainingSection(minutes=10.0, batch=64)


def flow(facts: Facts) -> Setup:
    """A normalizing flow: splines for vectors, and causal splines and couplings for images."""
    if not facts.is_image:
        section = FlowSection(transforms=2, width=64, depth=2, bins=32)
        training = TrainingSection(steps=4000, batch=512, rate=5e-3, weight_decay=0.3)
    elif small(facts):
        section = FlowSection(width=32, dequantization="variational")
        training = TrainingSection(steps=1000, batch=64, rate=4e-3)
    else:
        section = FlowSection(dequantization="variational")
        training = TrainingSection(minutes=10.0, batch=32, rate=4e-3)
    return Setup(recipe="flow", family="flow", flow=section, training=training, **NO_DIFFUSION)


def continuous(facts: Facts) -> Setup:
    """A continuous flow: the straight path of a diffusion model, whose likelihood is that of its ODE.

    Reference: Lipman et al. (2023), section 4.1; Liu et al. (2023), for the path.
    """
    setup = choose(facts).model_copy(update={"recipe": "continuous", "family": "flow"})
    straight = {"process": ProcessSection(schedule="straight"), "diffusion": DiffusionSection(predicts="velocity")}
    return setup.model_copy(update=straight)


def gan(facts: Facts) -> Setup:
    """A generative adversarial network with the relativistic pairing loss and both gradient penalties."""
    return Setup(recipe="gan", family="gan", gan=players(facts), training=playing(facts), **NO_DIFFUSION)


def classic(facts: Facts) -> Setup:
    """The non-saturating game without a penalty, to be seen beside it."""
    section = players(facts).model_copy(update={"loss": "classic"})
    return Setup(recipe="classic-gan", family="gan", gan=section, training=playing(facts), **NO_DIFFUSION)


def players(facts: Facts) -> GANSection:
    """Narrow networks for large images, whose full side takes most of the time of a step."""
    return GANSection(width=16 if facts.is_image and not small(facts) else None)


def playing(facts: Facts) -> TrainingSection:
    """Without momentum, for the players answer each other; and hardly clipped, for the penalty's gradients are long."""
    betas = (0.0, 0.99)
    if not facts.is_image:
        return TrainingSection(steps=3000, batch=128, rate=1e-3, betas=betas, clip=100.0)
    if small(facts):
        return TrainingSection(steps=2000, batch=64, rate=5e-4, betas=betas, clip=100.0)
    return TrainingSection(minutes=10.0, batch=64, rate=5e-4, betas=betas, clip=100.0)


def small(facts: Facts) -> bool:
    """Whether images are such as the digits."""
    return len(facts.shape) == 3 and max(facts.shape[1:]) <= 10


NO_DIFFUSION: dict[str, None] = {"process": None, "diffusion": None}
"""Sections that only a diffusion model has."""

SIZES = ("tiny", "small", "base")


def unet(size: str, facts: Facts) -> UNetSection:
    """A U-Net whose resolution is halved until it is about 8."""
    side = max(facts.shape[1:])
    levels = max(2, 1 + sum(side > limit for limit in (10, 20, 40, 80)))
    width, multipliers, blocks = {
        "tiny": (16, (1, 2, 2, 4, 4), 3),
        "small": (32, (1, 2, 2, 4, 4), 3),
        "base": (64, (1, 2, 2, 4, 4), 4),
    }[size]
    return UNetSection(width=width if side <= 40 else width * 3 // 4, multipliers=multipliers[:levels], blocks=blocks)


def dit(size: str, facts: Facts) -> DiTSection:
    """A transformer over about 8 patches a side, in heads of 64 features."""
    width, depth = {"tiny": (128, 4), "small": (256, 6), "base": (384, 10)}[size]
    return DiTSection(width=width, depth=depth, heads=width // 64, patch=max(1, round(max(facts.shape[1:]) / 8)))


PRESETS: dict[str, Callable[[Facts], UNetSection | DiTSection]] = {
    **{size: partial(unet, size) for size in SIZES},
    **{f"dit-{size}": partial(dit, size) for size in SIZES},
}
"""Networks by name, for images of any shape."""

FOR_IMAGES: dict[str, Callable[[Facts], Setup]] = {
    "digits": digits,
    "images": images,
    "digits_bits": digits_bits,
    "mnist_bits": mnist_bits,
    "cifar10_bits": cifar10_bits,
}

RECIPES: dict[str, Callable[[Facts], Setup]] = {
    **FOR_IMAGES,
    "vectors": vectors,
    "vae": vae,
    "ladder": ladder,
    "flow": flow,
    "continuous": continuous,
    "gan": gan,
    "classic-gan": classic,
}
"""Recipes by name; one named after a family is what the family takes by default."""


def choose(facts: Facts, name: str | None = None, preset: str | None = None, family: Family | None = None) -> Setup:
    """The recipe of that name, or the one for this family and shape; with the network of a preset in place of its own.

    Raises:
        OptionError: if there is no recipe or preset of that name, it is of another family, or for images only.
    """
    if family is not None and family not in get_args(Family):
        raise unknown("family", family, get_args(Family))
    picture = len(facts.shape) == 3
    if name is None and family not in (None, "diffusion"):
        name = family
    if name is None:
        name = "vectors" if not picture else "digits" if small(facts) else "images"
    if name not in RECIPES:
        raise unknown("recipe", name, RECIPES)
    if name in FOR_IMAGES and not picture:
        raise OptionError(f"recipe {name!r} is for images, but {facts.name} has shape {facts.shape}: use 'vectors'")
    setup = RECIPES[name](facts)
    if family not in (None, setup.family):
        raise OptionError(f"recipe {name!r} is of the family {setup.family!r}, not {family!r}: leave one of them out")
    return setup if preset is None else _with_preset(setup, preset, facts)


def _with_preset(setup: Setup, preset: str, facts: Facts) -> Setup:
    if preset not in PRESETS:
        raise unknown("preset", preset, PRESETS)
    if not (setup.unet or setup.dit):
        raise OptionError(
            f"preset {preset!r} is a network for images of a diffusion model, but recipe {setup.recipe!r} has another: "
            "leave it out"
        )
    net = PRESETS[preset](facts)
    if isinstance(net, UNetSection) and setup.unet:
        net = net.model_copy(update={"posterior": setup.unet.posterior})
    chosen = {"unet": net, "dit": None} if isinstance(net, UNetSection) else {"unet": None, "dit": net}
    return setup.model_copy(update=chosen)


def change(setup: Setup, changes: Sequence[str]) -> Setup:
    """The set-up with `section.key=value` changes applied; values are JSON, or plain words.

    Raises:
        OptionError: if a change has no value, names no setting (the close match is told), or is outside its range.

    Example:
        >>> change(Setup(recipe="x", mlp=MLPSection()), ["mlp.width=64", "process.schedule=linear"]).mlp
        MLPSection(width=64, depth=4, labels=False, octaves=4, variance=False)
    """
    record = setup.model_dump()
    allowed = [f"{section}.{key}" for section, keys in record.items() if isinstance(keys, dict) for key in keys]
    for text in changes:
        name, equals, value = text.partition("=")
        if not equals:
            raise OptionError(f"a change is written section.key=value, received {text!r}")
        if name not in allowed:
            raise unknown("setting", name, allowed)
        section, _, key = name.partition(".")
        record[section][key] = _parse(value)
        if name == "process.schedule":
            record[section]["options"] = {}  # the constants of one schedule mean nothing to another
    return read(record)


def read(record: Mapping[str, Any]) -> Setup:
    """A set-up from its JSON record.

    Raises:
        OptionError: naming the first setting that is unknown or outside its range.
    """
    try:
        return Setup.model_validate(record)
    except ValidationError as error:
        first = error.errors()[0]
        name = ".".join(str(part) for part in first["loc"])
        raise OptionError(f"{name} = {first['input']!r}: {first['msg'].lower()}") from None


def build(setup: Setup, facts: Facts, seed: int = 0) -> Model:
    """The model of a set-up for data of these facts, initialised from the seed.

    Raises:
        OptionError: if a name is unknown, or a combination is undefined.
    """
    if setup.training.shard and not setup.diffusion:
        raise OptionError(
            f"the networks of a {setup.family} are asked for more than one output, which one whose weights are divided "
            "cannot give: leave training.shard=true out"
        )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        if setup.vae:
            return VAE(facts, **_keywords(setup.vae))
        if setup.flow:
            return Flow(facts, **_keywords(setup.flow))
        if setup.gan:
            return GAN(facts, **_keywords(setup.gan))
        return _diffusion(setup, facts)


def _keywords(section: VAESection | FlowSection | GANSection) -> dict[str, Any]:
    return {**section.model_dump(exclude={"labels"}), "classes": section.labels}


def _diffusion(setup: Setup, facts: Facts) -> Diffusion:
    process, diffusion = _process(setup.process or ProcessSection()), setup.diffusion or DiffusionSection()
    if setup.training.shard and (process.curve is not None or diffusion.variance == "learned"):
        raise OptionError(
            "a network with a learned schedule or variance is asked for more than its output, which one whose weights "
            "are divided cannot give: leave training.shard=true out"
        )
    section = setup.unet or setup.dit or setup.mlp or MLPSection()
    classes = counted(facts.classes, facts.name, wanted=section.labels)
    keywords = section.model_dump(exclude={"labels"})
    if isinstance(section, MLPSection):
        net: torch.nn.Module = MLP(facts.shape, classes=classes, **keywords)
    else:
        kind = UNet if setup.unet else DiT
        net = kind(facts.shape[0], classes=classes, levels=facts.levels, **keywords)
    return Diffusion(net, process, facts, **diffusion.model_dump())


def _process(section: ProcessSection) -> processes.Process:
    if section.betas is None:
        process = processes.named(section.schedule, **section.options)
    else:
        process = processes.from_betas(section.betas)
    return processes.zero_terminal(process) if section.zero_terminal else process


def _parse(value: str) -> Any:
    try:
        return json.loads(value)
    except json.JSONDecodeError:
        return value
