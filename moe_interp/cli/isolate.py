"""``moe-interp isolate``: expert isolation and router calibration of a model on items."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.markup import escape

from moe_interp.cli import console
from moe_interp.cli.figures import write_figures
from moe_interp.cli.load import DEMO, Device, Dtype, Model, Seed, load_hooks
from moe_interp.cli.runs import check_out, finished_cells, layer_labels, memory_bytes
from moe_interp.errors import ConfigError
from moe_interp.experiments.findings import plan_isolation
from moe_interp.experiments.isolation import isolate_experts
from moe_interp.experiments.isolation_result import IsolationResult
from moe_interp.experiments.items import Item, check_items, load_items
from moe_interp.plots import calibration_scatter, dominance, layer_impact, sorted_p, specialization_map
from moe_interp.report import isolation_page, write_page
from moe_interp.testbed.demo import load_demo_assets

FIGURES: dict[str, Callable[..., Any]] = {
    "specialization": specialization_map,
    "calibration": calibration_scatter,
    "dominance": dominance,
    "layer_impact": layer_impact,
    "sorted_p": sorted_p,
}
CELLS = "cells"

Out = Annotated[Path, typer.Option("--out", "-o", help="Folder for the result, the figures and the page.")]


def isolate(
    model: Model,
    out: Out,
    items: Annotated[list[str] | None, typer.Option(help="JSON-lines files, or 'demo' for the bundled items.")] = None,
    prompt_field: Annotated[str, typer.Option(help="The field of the files that holds the prompt.")] = "prompt",
    answer_field: Annotated[str, typer.Option(help="The field of the files that holds the answer.")] = "answer",
    domain_field: Annotated[str, typer.Option(help="The field of the files that names the domain.")] = "domain",
    domains: Annotated[str | None, typer.Option(help="Keep these domains only, e.g. math,science.")] = None,
    per_domain: Annotated[int | None, typer.Option(help="Keep the first N items of each domain.")] = None,
    layers: Annotated[str | None, typer.Option(help="MoE layers, e.g. 0,3,-1; all by default.")] = None,
    experts: Annotated[str | None, typer.Option(help="Experts, e.g. 0,1,2+5 (a set); all by default.")] = None,
    mode: Annotated[str, typer.Option(help="force (alone) or ablate (taken away).")] = "force",
    random_draws: Annotated[int, typer.Option(help="Experts drawn for the random baseline.")] = 8,
    memory: Annotated[float | None, typer.Option(help="Memory a pass may use, in GiB; half of what is free.")] = None,
    device: Device = None,
    dtype: Dtype = "float32",
    seed: Seed = 0,
    resume: Annotated[bool, typer.Option(help="Go on with the finished cells in --out.")] = True,
) -> None:
    """Send all tokens of a layer through one expert at a time: which experts are good for which domain, and does the
    router prefer them?"""
    check_out(out)
    budget = memory_bytes(memory)
    names = {"prompt_field": prompt_field, "answer_field": answer_field, "domain_field": domain_field}
    chosen = read_items(items or ([DEMO] if model == DEMO else []), domains, per_domain, **names)
    moe = load_hooks(model, device, dtype)
    sets = _experts(experts)
    labels = layer_labels(moe, layers)
    _announce_plan(chosen, len(labels or moe.layers), len(sets or range(moe.spec(moe.layers[0]).n_experts)))
    store = out / CELLS
    with finished_cells(store, resume):
        result = isolate_experts(
            moe,
            chosen,
            layers=labels,  # type: ignore[arg-type]
            experts=sets,
            mode=mode,  # type: ignore[arg-type]
            random_draws=random_draws,
            memory_budget=budget,
            seed=seed,
            store=store,
        )
    write_isolation(result, out)
    write_page(out / "index.html", isolation_page(result))
    console.out.print(escape(result.summary()))
    console.point_to(out / "index.html", out / "isolation.nc")


def read_items(sources: list[str], domains: str | None, per_domain: int | None, **names: str) -> list[Item]:
    """Items of files and of the bundled set, the first ``per_domain`` of each domain.

    ``names`` are the ``*_field`` arguments of :func:`moe_interp.load_items`.
    """
    if not sources:
        raise ConfigError("no items", "--items FILE.jsonl (id, domain, prompt, answer)", "Or use --items demo.")
    if per_domain is not None and per_domain < 1:
        raise ConfigError(f"--per-domain {per_domain}", "at least 1", "Leave it out to use all items.")
    wanted = None if domains is None else [name.strip() for name in domains.split(",")]
    found: list[Item] = []
    for source in sources:
        if source == DEMO:
            found += check_items([item for group in load_demo_assets().items.values() for item in group])
        else:
            found += load_items(source, **names)
    return first_of_each(check_items(found, wanted), per_domain)


def first_of_each(items: list[Item], per_domain: int | None) -> list[Item]:
    """The first items of each domain; all where no number is given."""
    seen: Counter[str] = Counter()
    kept = []
    for item in items:
        seen[item.domain] += 1
        if per_domain is None or seen[item.domain] <= per_domain:
            kept.append(item)
    return kept


def write_isolation(result: IsolationResult, out: Path) -> None:
    """The result, and those of its figures that can be drawn as SVG files."""
    result.save(out / "isolation.nc")
    write_figures(result, FIGURES, out / "figures")


def _announce_plan(items: list[Item], n_layers: int, n_experts: int) -> None:
    """Before the run: what the tests will be able to show."""
    counts = Counter(item.domain for item in items)
    sizes = ", ".join(f"{name} {count}" for name, count in sorted(counts.items()))
    console.err.print(
        escape(f"{console.quantity(len(items), 'item')} ({sizes}). {plan_isolation(counts, n_layers, n_experts)}")
    )


def _experts(text: str | None) -> list[int | tuple[int, ...]] | None:
    if text is None:
        return None
    try:
        sets = [tuple(int(e) for e in part.split("+")) for part in text.split(",")]
    except ValueError:
        raise ConfigError(f"--experts {text}", "ids such as 0,1,2+5", "Separate sets by commas.") from None
    return [s[0] if len(s) == 1 else s for s in sets]
