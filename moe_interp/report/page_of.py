"""The page of any result, by its kind."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from moe_interp.plots.figures import FIGURES
from moe_interp.report.atlas import atlas_page
from moe_interp.report.counterfactual import counterfactual_page
from moe_interp.report.domain_router import domain_router_page
from moe_interp.report.geometry import geometry_page
from moe_interp.report.isolation import isolation_page
from moe_interp.report.page import Chapter, render_page, section, write_page
from moe_interp.report.pass_at_k import pass_at_k_page
from moe_interp.report.router_tuning import router_tuning_page

PAGES: dict[str, Callable[[Any], str]] = {
    "isolation": isolation_page,
    "counterfactual": counterfactual_page,
    "domain_router": domain_router_page,
    "geometry": geometry_page,
    "pass_at_k": pass_at_k_page,
    "router_tuning": router_tuning_page,
    "atlas": atlas_page,
}


def write_result(result: Any, kind: str, path: str | Path) -> Path:
    """Write the page of a result of this kind."""
    return write_page(path, PAGES.get(kind, _plain_page)(result))


def _plain_page(result: Any) -> str:
    """Summary, figures and the main table of a result whose kind has no chapter of its own."""
    title = type(result).__name__.removesuffix("Result") or "Result"
    sections = [
        section(name, name.replace("_", " ").capitalize(), "", lambda draw=draw: draw(result))  # type: ignore[misc]
        for name, draw in FIGURES.get(result.kind, {}).items()
    ]
    sections.append(section("data", "Data", "", tabulate=result.to_dataframe))
    chapter = Chapter(title, result.summary(), tuple(sections), manifest=result.manifest)
    return render_page([chapter], model=str(result.data.attrs.get("model", "")))
