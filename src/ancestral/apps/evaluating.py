"""What `ancestral evaluate` asks of a model, by what its family can answer, and where the answers go."""

import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ancestral import toys
from ancestral.apps import figures, output
from ancestral.data import Data, draw
from ancestral.diffusion.model import STEPS, Diffusion
from ancestral.errors import OptionError
from ancestral.flow import model as flows
from ancestral.flow.model import Flow
from ancestral.gan.model import GAN
from ancestral.measure import chain, flow
from ancestral.measure.evaluate import evaluate, gap
from ancestral.measure.measured import Measured, refuse_other
from ancestral.measure.modes import apart, modes
from ancestral.measure.quality import ENOUGH, METRICS, SAMPLES, Bench, Standing
from ancestral.measure.record import Averaged, Comparison, Evaluation, Interval, OdeLikelihood, RoundTrip, Samples
from ancestral.training import checkpoint, durable
from ancestral.training.checkpoint import Saved
from ancestral.training.processes import Processes
from ancestral.training.recipes import Model
from ancestral.vae import model as vae
from ancestral.vae.model import VAE

PAIRS = 24
"""Samples that are shown beside the training examples nearest to them."""

AT_ONCE, WALKED, DRAWN, INVERTED = 64, 256, 10_000, 256
"""Samples that are drawn at a time, those of a diffusion model that are compared by default, those of others whose
modes are counted, and held-out examples that a flow takes there and back."""


@dataclass(frozen=True)
class Question:
    """What is asked of each model.

    Attributes:
        n: held-out examples, at most.
        likelihood: one of "bound", "all-steps", "limit", "ode" and "both".
        tolerance: standard error to reach.
        steps: of the chain, in place of the model's own.
        best: of all chains of so many steps, the one with the least bound.
        variance: of the reverse chain.
        draws: importance weights of each example, where its bound is made of them; None for the family's own number.
        seed: of the noise.
        progress: told (what, done, of).
        samples: that are compared with data, at most; 0 for none.
        features: in which they are.
        group: the processes that measure together.
    """

    n: int | None
    likelihood: str
    tolerance: float | None
    steps: int | None
    best: bool
    variance: str | None
    draws: int | None
    seed: int
    progress: Callable[[str, int, int], None]
    samples: int | None
    features: str | None
    group: Processes

    def asked(self, saved: Saved, examples: Data, like: Measured | None = None) -> Measured:
        """What the model answers."""
        model = saved.model.to(self.group.device)
        several = flow.EXAMPLES if self.likelihood == "ode" else 2000
        return evaluate(
            model,
            examples,
            n=self.n or (None if self.tolerance else several),
            like=like,
            seed=self.seed,
            progress=self.progress,
            group=self.group,
            **self._of_its_family(model, tolerance=self.tolerance),
        )

    def bench(self, model: Model, examples: Data) -> Bench | None:
        """What samples are held against; None if there are to be none, or there is too little data.

        Raises:
            OptionError: if there are no such features.
        """
        n = self.samples
        if n is None:
            n = WALKED if isinstance(model, Diffusion) else SAMPLES
        if n == 0 or min(len(examples.held_out) // 2, len(examples.train)) < ENOUGH:
            return None
        return Bench(examples, n=n, features=self.features)

    def gap(self, saved: Saved, examples: Data, held_out: Measured) -> Interval | None:
        """How much likelier what it learnt from is; None of data that it was not trained on."""
        if examples.facts.digest != saved.facts.digest:
            return None
        return gap(
            saved.model,
            examples,
            held_out,
            seed=self.seed,
            progress=self.progress,
            group=self.group,
            **self._of_its_family(saved.model),
        )

    def weights(self, model: Model) -> int | None:
        """How many importance weights of each example its bound is made of; None if it is not."""
        if isinstance(model, VAE):
            return self.draws or vae.DRAWS
        return self.draws or flows.DRAWS if isinstance(model, Flow) and model.facts.levels else None

    def _of_its_family(self, model: Model, **more: Any) -> dict[str, Any]:
        """How its likelihood is measured, with what only a chain can be asked."""
        if isinstance(model, Diffusion):
            return self._of_a_chain() | more
        draws = self.weights(model)
        return {} if draws is None else {"draws": draws}

    def _of_a_chain(self) -> dict[str, Any]:
        return {
            "draws": None if self.likelihood == "all-steps" else chain.DRAWS,
            "limit": self.likelihood == "limit",
            "steps": self.steps,
            "variance": self.variance,
            "best": self.best,
        }

    def ode(self, saved: Saved, examples: Data, beside: Measured) -> OdeLikelihood | None:
        """The likelihood along the probability-flow ODE, if it is asked for."""
        if self.likelihood not in ("ode", "both") or not isinstance(saved.model, Diffusion):
            return None
        followed = flow.follow(
            saved.model,
            examples,
            beside,
            n=self.n,
            tolerance=self.tolerance,
            seed=self.seed,
            progress=self.progress,
            group=self.group,
        )
        return followed.likelihood(beside)

    def refuse(self, saved: Saved, other: Saved | None, sweep: bool) -> None:
        """Refuses what the family of one of the two runs cannot answer, before anything is measured.

        Raises:
            OptionError: naming what was asked for.
        """
        for each in (saved, other):
            if each and not isinstance(each.model, Diffusion):
                self._refuse_a_chain(each)
        if self.draws and not self.weights(saved.model):
            raise OptionError(
                f"--draws is of importance weights, of which {saved.path}, a {saved.family}, has none: leave it out"
            )
        given = {"--compare": other is not None, "--ema": sweep, "--n": self.n is not None}
        if isinstance(saved.model, GAN):
            for name in (name for name, is_given in given.items() if is_given):
                raise OptionError(f"{name} is about a likelihood, and a {saved.family} has none: leave it out")
        if other and isinstance(other.model, GAN):
            raise OptionError(
                f"--compare is about a likelihood, and {other.path} is a {other.family}, which has none: "
                "'ancestral compare RUN RUN' compares samples"
            )

    def _refuse_a_chain(self, saved: Saved) -> None:
        given = {
            f"--likelihood {self.likelihood}": self.likelihood != "bound",
            "--tolerance": self.tolerance is not None,
            "--steps": self.steps is not None,
            "--best": self.best,
            "--variance": self.variance is not None,
        }
        for name in (name for name, is_given in given.items() if is_given):
            raise OptionError(
                f"{name} is about the chain of a diffusion model, and {saved.path} is a {saved.family}: leave it out"
            )


def evaluation(
    question: Question, opened: list[Saved], other: Saved | None, examples: Data, *, sweep: bool
) -> Evaluation | None:
    """The record of an evaluation, written with its figure into a fresh folder of the run; by the first process only.

    Args:
        question: what is asked.
        opened: the model under one or several averages of its weights.
        other: another model, asked the same.
        examples: whose held-out split is measured.
        sweep: whether the averages are to be told apart.

    Raises:
        OptionError: if the other model is for other data, or a family cannot answer.
    """
    saved = opened[0]
    if other and (other.facts.shape, other.facts.levels) != (saved.facts.shape, saved.facts.levels):
        raise OptionError(
            f"{other.path}: is for shape {other.facts.shape} with {other.facts.levels} levels, and {saved.path} for "
            f"{saved.facts.shape} with {saved.facts.levels}: only runs on data alike are compared"
        )
    refuse_other(saved.facts, examples)
    question.refuse(saved, other, sweep)
    bench = question.bench(saved.model, examples) if question.group.first else None  # features that are not, fail here
    whole = None if isinstance(saved.model, GAN) else question.asked(saved, examples)
    found = [(saved, whole), *((each, question.asked(each, examples, whole)) for each in opened[1:])] if whole else []
    ode, comparison = question.ode(saved, examples, whole) if whole else None, None
    between = question.gap(saved, examples, whole) if whole else None
    if other and whole:
        theirs = question.asked(other, examples, whole)
        comparison = Comparison(run=str(other.path), likelihood=theirs.likelihood(), better=whole.over(theirs))
    if not question.group.first:
        return None
    folder = output.fresh(checkpoint.run_of(saved.path), "evaluation")
    folder.mkdir(parents=True)
    artifacts = {"evaluation": str(folder / "evaluation.json")}
    if whole and whole.chain:
        artifacts["terms"] = str(folder / "terms.png")
        how = {"run": str(saved.path), "n": len(whole.chosen), "likelihood": question.likelihood, "seed": question.seed}
        figures.save(figures.terms(whole.bound, saved.facts, whole.likelihood()), Path(artifacts["terms"]), how)
    averages = [Averaged(length=each.ema, residual=each.residual, likelihood=one.likelihood()) for each, one in found]
    result = Evaluation(
        run=str(saved.path),
        family=saved.family,
        data=examples.facts.name,
        unit=examples.facts.unit,
        tolerance=question.tolerance,
        draws=question.weights(saved.model),
        seed=question.seed,
        artifacts=artifacts,
        ode=ode,
        gap=between,
        comparison=comparison,
        ema=averages if sweep else None,
        **(whole.record() if whole else {}),
        **_of_samples(saved, examples, bench, question, folder, artifacts),
        **_of_inverse(saved.model, examples),
    )
    durable.write_json(folder / "evaluation.json", result.model_dump(mode="json", exclude_none=True))
    return result


def _of_samples(
    saved: Saved, examples: Data, bench: Bench | None, question: Question, folder: Path, artifacts: dict[str, str]
) -> dict[str, Any]:
    """How samples stand to data, with a picture of what may be copies, and which modes are reached, if it is known.

    Whether samples copy is told of the data that the model was trained on, and of no other.
    """
    model, own = saved.model, examples.facts.digest == saved.facts.digest
    walks = isinstance(model, Diffusion)
    found: dict[str, Any] = {}

    def asked(standing: Standing) -> Standing:
        return {name: each for name, each in standing.items() if own or METRICS[name].group != "Memorisation"}

    if bench:
        parts, began = list[Tensor](), time.perf_counter()
        for start in range(0, bench.n, AT_ONCE):
            parts.append(model.sample(min(AT_ONCE, bench.n - start), rng=question.seed, start=start).cpu())
            question.progress("drawing samples", start + len(parts[-1]), bench.n)
        drawn = torch.cat(parts)
        if own and examples.facts.is_image:
            artifacts["nearest"] = str(folder / "nearest.png")
            picture = draw.grid(examples.facts, bench.suspects(drawn, PAIRS), columns=8)
            draw.save_png(picture, folder / "nearest.png", {"pairs": "sample, training example"})
        found["samples"] = Samples(
            n=bench.n,
            features=bench.features,
            rate=bench.n / (time.perf_counter() - began),
            model=asked(bench.of(drawn)),
            held_out=asked(bench.held_out),
            training=asked(bench.training),
            evaluations=STEPS if walks else 1,
        )
    law = toys.named(examples.facts.source) if examples.facts.source in toys.TOYS else None
    if not walks and isinstance(law, toys.Mixture) and apart(law):
        found["modes"] = modes(law, model.sample(DRAWN, rng=question.seed).double())
    return found


def _of_inverse(model: Model, examples: Data) -> dict[str, Any]:
    """How exactly a flow inverts."""
    if not isinstance(model, Flow):
        return {}
    return {"round_trip": RoundTrip.model_validate(asdict(model.round_trip(examples.held_out[:INVERTED])))}
