"""``moe-interp atlas``: the measures of recorded routing, without a model."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from moe_interp.cli import console, options
from moe_interp.errors import ConfigError, DataError


def atlas(
    paths: Annotated[
        list[str],
        typer.Argument(
            help="Recorded routes or counts (npz, parquet, a folder of them, or --format). Of several, one without "
            "labels of its own is a domain, named by its file; law=FILE labels all of it.",
            metavar="PATH...",
        ),
    ],
    format: Annotated[
        str | None, typer.Option("--format", help="What wrote the files; by the suffix without it.", metavar="NAME")
    ] = None,
    n_experts: Annotated[
        int | None, typer.Option("--n-experts", help="Experts a layer, for formats that do not say.")
    ] = None,
    layers: Annotated[
        str | None,
        typer.Option(help="The model's layer of each column, for formats that do not say: 'moe', 'all' or 1,2,5."),
    ] = None,
    against: Annotated[
        str | None, typer.Option(help="Routes of another model on the same tokens, in the same order.", metavar="PATH")
    ] = None,
    min_count: Annotated[int, typer.Option(help="Occurrences of a token id that counts.")] = 10,
    path_length: Annotated[int, typer.Option(help="Layers of a path.")] = 3,
    permutations: Annotated[int, typer.Option(help="Of the labels over sequences.")] = 9999,
    seed: options.Seed = 0,
    out: Annotated[
        Path | None, typer.Option("--out", "-o", help="Folder for the result, the figures and the page.")
    ] = None,
) -> None:
    """Measure recorded routing: load, domains, vocabulary, pairs, paths, margins. No model is needed.

    Prints the findings; --out writes the result, its figures and a page.
    """
    for name, value in (("--min-count", min_count), ("--path-length", path_length), ("--permutations", permutations)):
        options.check_number(name, value)
    options.check_number("--n-experts", n_experts)
    for text in [*paths, *([against] if against else [])]:
        path = text if options.exists(text) else text.partition("=")[2] or text
        if not text or not options.exists(path):
            raise DataError(f"{path[:200]!r}, which does not exist", "a file or folder of routes", "Check the path.")
    options.check_seed(seed)
    columns = None if layers is None else _columns(layers)
    if out is not None:
        options.check_out(out)

    from moe_interp.cli.figure_files import write_figures
    from moe_interp.plots import FIGURES
    from moe_interp.report import atlas_page, write_page
    from moe_interp.traces.atlas.build import from_paths

    given = {"n_experts": n_experts, "layers": columns}
    reading: dict[str, Any] = {name: value for name, value in given.items() if value is not None}
    result = from_paths(
        paths,
        against=against,
        format=format,
        min_count=min_count,
        path_length=path_length,
        n_permutations=permutations,
        seed=seed,
        **reading,
    )
    console.summary(result.summary())
    if out is not None:
        result.save(out / "atlas.nc")
        write_figures(result, FIGURES["atlas"], out / "figures")
        write_page(out / "index.html", atlas_page(result))
        console.point_to(out / "index.html", out / "atlas.nc")


def _columns(text: str) -> str | list[int]:
    if text in ("moe", "all"):
        return text
    parts = [part.strip() for part in text.split(",")]
    if not all(part.isdecimal() and len(part) < 6 for part in parts):
        raise ConfigError(f"--layers {text}", "'moe', 'all', or layers such as 1,2,5", "Correct it.")
    return [int(part) for part in parts]
