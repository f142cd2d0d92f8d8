"""Options that several verbs of the command line have."""

from pathlib import Path
from typing import Annotated

import typer

Json = Annotated[bool, typer.Option("--json", help="Print one JSON object on stdout, everything else on stderr.")]
Seed = Annotated[int, typer.Option(min=0, help="Of everything random; printed and recorded.")]
Debug = Annotated[bool, typer.Option("--debug", hidden=True)]
Ema = Annotated[
    float | None, typer.Option(help="Length of the average of the weights, relative to the run, made from snapshots.")
]
Features = Annotated[
    str | None,
    typer.Option(
        help="In which samples are compared: encoder, trained on the data (the default for images), pixels, pca, "
        "onnx:PATH, or inception:PATH for FID."
    ),
]
Fitted = Annotated[
    str | None, typer.Option(help="Of other proportions: 'crop' the centre (default), 'pad' with black, 'stretch'.")
]
RunPath = Annotated[Path, typer.Argument(metavar="RUN", help="A run directory, or a checkpoint inside one.")]
