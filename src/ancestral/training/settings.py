"""What can be set: the sections of a set-up, which is the record of every constructor's keywords."""

from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field

from ancestral.training.loop import TrainingSection

Family = Literal["diffusion", "vae", "flow", "gan"]


class Section(BaseModel):
    """A frozen part of a set-up; a keyword it does not have is an error."""

    model_config = ConfigDict(frozen=True, extra="forbid")


class ProcessSection(Section):
    """Which forward process: a schedule by name with constants of its own, or a table of betas in its place.

    Either is rescaled to end in pure noise when it is to be `zero_terminal`.
    """

    schedule: str = "cosine"
    options: dict[str, float] = {}
    betas: tuple[float, ...] | None = None
    zero_terminal: bool = False


class DiffusionSection(Section):
    """Keywords of `Diffusion`."""

    predicts: str = "v"
    weighting: str = "bound"
    variance: str = "fixed-small"
    decoder: str = "gaussian"
    chain: int = Field(1000, ge=2)


class UNetSection(Section):
    """Keywords of `UNet`; its channels and levels come from the data, its classes when `labels` are to be learnt."""

    width: int = Field(64, ge=1)
    multipliers: tuple[Annotated[int, Field(ge=1)], ...] = Field((1, 2, 2), min_length=1)
    blocks: int = Field(2, ge=1)
    labels: bool = False
    octaves: int = Field(3, ge=0)
    posterior: bool = False
    variance: bool = False
    attention: bool = True
    precision: str = "auto"


class DiTSection(Section):
    """Keywords of `DiT`; its channels and levels come from the data, its classes when `labels` are to be learnt."""

    width: int = Field(256, ge=4)
    depth: int = Field(6, ge=1)
    heads: int = Field(4, ge=1)
    patch: int = Field(4, ge=1)
    labels: bool = False
    octaves: int = Field(3, ge=0)
    variance: bool = False
    precision: str = "auto"


class MLPSection(Section):
    """Keywords of `MLP`; its shape comes from the data, its classes when `labels` are to be learnt."""

    width: int = Field(128, ge=1)
    depth: int = Field(4, ge=1)
    labels: bool = False
    octaves: int = Field(4, ge=0)
    variance: bool = False


class VAESection(Section):
    """Keywords of `VAE`; its classes when `labels` are to be learnt."""

    latents: int = Field(32, ge=1)
    ladder: int = Field(0, ge=0)
    channels: int = Field(4, ge=1)
    width: int = Field(32, ge=1)
    blocks: int = Field(1, ge=0)
    components: int = Field(5, ge=1)
    labels: bool = False
    precision: str = "auto"


class FlowSection(Section):
    """Keywords of `Flow`, None for those that its kind decides; its classes when `labels` are to be learnt."""

    kind: str | None = None
    transforms: int | None = Field(None, ge=1)
    width: int | None = Field(None, ge=1)
    depth: int | None = Field(None, ge=1)
    bins: int = Field(16, ge=2)
    patch: int | None = Field(None, ge=1)
    heads: int = Field(4, ge=1)
    dequantization: str = "uniform"
    labels: bool = False
    precision: str = "auto"


class GANSection(Section):
    """Keywords of `GAN`, None for those that the shape decides; its classes when `labels` are to be learnt."""

    loss: str = "relativistic"
    gamma: float | None = Field(None, ge=0)
    latent: int | None = Field(None, ge=1)
    width: int | None = Field(None, ge=1)
    depth: int | None = Field(None, ge=1)
    pac: int = Field(1, ge=1)
    augment: bool = False
    labels: bool = False
    precision: str = "auto"


class Setup(Section):
    """A complete, named set-up: the sections of one family, and how it is trained.

    A continuous flow is made of the sections of a diffusion model, whose process is then the straight one.
    """

    recipe: str
    family: Family = "diffusion"
    process: ProcessSection | None = ProcessSection()
    diffusion: DiffusionSection | None = DiffusionSection()
    unet: UNetSection | None = None
    dit: DiTSection | None = None
    mlp: MLPSection | None = None
    vae: VAESection | None = None
    flow: FlowSection | None = None
    gan: GANSection | None = None
    training: TrainingSection = TrainingSection()

    @property
    def labels(self) -> bool:
        """Whether the model learns classes."""
        sections = (self.unet, self.dit, self.mlp, self.vae, self.flow, self.gan)
        return any(section.labels for section in sections if section is not None)
