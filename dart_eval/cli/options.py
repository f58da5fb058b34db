"""Options that several verbs have."""

from __future__ import annotations

from typing import Annotated

import typer

Model = Annotated[str | None, typer.Option(help=r"Hub id, local folder or gemma-3-270m.  \[default: the demo model]")]
Revision = Annotated[str | None, typer.Option(help="Branch, tag or commit on the hub.")]
Dtype = Annotated[str | None, typer.Option(help=r"auto, float32, bfloat16 or float16.  \[default: auto]")]
Device = Annotated[str | None, typer.Option(help=r"auto, cpu, cuda, cuda:1, mps.  \[default: auto]")]
DeviceMap = Annotated[str | None, typer.Option(help="Spread the model over GPUs, e.g. auto.")]
TrustRemoteCode = Annotated[
    bool | None,
    typer.Option("--trust-remote-code", metavar="", help="Run Python code that comes with the model (default: none)."),
]
UnsafeCode = Annotated[
    bool | None,
    typer.Option(
        "--confirm-run-unsafe-code", metavar="", help="Let tasks run what the model writes, or code in this folder."
    ),
]
DataDir = Annotated[str | None, typer.Option(help="Local data instead of the hub.")]

Executor = Annotated[
    str | None, typer.Option(help=r"local, or ray: many processes, GPUs or machines.  \[default: local]")
]
RayAddress = Annotated[
    str | None, typer.Option(help=r"A running Ray cluster, e.g. auto.  \[default: one on this machine]")
]
GpusPerCell = Annotated[float | None, typer.Option(help=r"GPUs of a Ray worker.  \[default: 1 if there are any]")]
CpusPerCell = Annotated[float | None, typer.Option(help=r"CPUs of a Ray worker.  \[default: 1]")]
Shards = Annotated[
    int | None, typer.Option(help=r"Parts that Ray splits every cell into.  \[default: as many as are worth it]")
]
