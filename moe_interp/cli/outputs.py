"""What the commands write of a result besides the page, and the table of routes for the terminal."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

from moe_interp.cli import console
from moe_interp.cli.figure_files import write_figures
from moe_interp.experiments.counterfactual.result import CounterfactualResult
from moe_interp.experiments.geometry.result import GeometryResult
from moe_interp.experiments.isolation.result import IsolationResult
from moe_interp.experiments.pass_at_k.result import PassAtKResult
from moe_interp.experiments.router_tuning.result import RouterTuningResult
from moe_interp.plots import FIGURES
from moe_interp.results.files import replacing
from moe_interp.results.tables import classed_by

CELLS = "cells"
ROUTE_CELLS = "route_cells"  # not the folder of an isolation run
GEOMETRY_CELLS = "geometry_cells"
COMPLETIONS = "completions.jsonl"


def write_isolation(result: IsolationResult, out: Path) -> None:
    """The result, and those of its figures that can be drawn as SVG files."""
    result.save(out / "isolation.nc")
    write_figures(result, FIGURES["isolation"], out / "figures")


def write_counterfactual(result: CounterfactualResult, out: Path) -> None:
    """The result, and those of its figures that can be drawn as SVG files."""
    result.save(out / "counterfactual.nc")
    write_figures(result, FIGURES["counterfactual"], out / "figures")


def write_geometry(result: GeometryResult, out: Path) -> None:
    """The result, and those of its figures that can be drawn as SVG files."""
    result.save(out / "geometry.nc")
    write_figures(result, FIGURES["geometry"], out / "figures")


def write_router_tuning(result: RouterTuningResult, out: Path) -> None:
    """The result, the weights' change as safetensors, the figures and the page."""
    result.save(out / "router_tuning.nc")
    result.save_delta(out / "router_delta.safetensors")
    write_figures(result, FIGURES["router_tuning"], out / "figures")
    result.report(out / "index.html")


def write_table(rows: str, path: Path) -> None:
    """Comma-separated rows as a file, whole or not at all."""
    with replacing(path) as file:
        file.write(rows.encode())


def group_table(result: CounterfactualResult) -> Any:
    """Regret and alignment by class of confidence and by layer, for the terminal."""
    classes = result.by_confidence(by=classed_by(result.data))
    layers = result.by_layer()
    named = [(row["class"], row) for row in classes.to_dict("records")]
    named += [(f"layer {row['layer']}", row) for row in layers.to_dict("records")]

    def shown(row: Any, name: str, digits: int) -> str:
        value, low, high = (row[key] for key in (name, f"{name}_low", f"{name}_high"))
        if math.isnan(low):
            return "–" if math.isnan(value) else f"{value:.{digits}f}"
        return f"{value:.{digits}f} [{low:.{digits}f}, {high:.{digits}f}]"

    rows = [
        [str(name), row["n_tokens"], shown(row, "regret", 3), shown(row, "alignment", 2), row["verdict"]]
        for name, row in named
    ]
    return console.table(
        "", ["", "tokens", "regret (nats) [95%]", "alignment [95%]", "router is"], rows, wrap=["router is"]
    )


def write_pass_at_k(result: PassAtKResult, out: Path) -> None:
    """The result, and those of its figures that can be drawn as SVG files."""
    result.save(out / "pass_at_k.nc")
    write_figures(result, FIGURES["pass_at_k"], out / "figures")


def pass_at_k_table(result: PassAtKResult) -> Any:
    """pass@K by domain and over all, for the terminal."""
    domains = result.by_domain()
    rows = domains.to_dict("records") if domains["domain"].nunique() > 1 else []
    rows += [{"domain": "all problems", **row} for row in result.curve().to_dict("records")]

    def shown(row: Any) -> str:
        interval = "" if math.isnan(row["ci_low"]) else f" [{row['ci_low']:.3f}, {row['ci_high']:.3f}]"
        return f"{row['mean']:.3f}{interval}"

    cells = [[str(row["domain"]), row["n"], row["k"], shown(row)] for row in rows]
    return console.table("", ["", "problems", "K", "pass@K [95%]"], cells)
