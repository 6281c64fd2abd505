"""``moe-interp demo``: the quick experiments, on the bundled model, offline."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import typer

from moe_interp.cli import console, options
from moe_interp.cli.options import DEMO, Device, Memory, Resume, Seed
from moe_interp.cli.startup import work_begins

PER_DOMAIN = 40  # enough for the tests, and within a minute on two cores
LONGEST = 260  # characters of prompt and answer: long code items would take most of that minute


class Stages:
    """How long each stage took."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}

    @contextmanager
    def __call__(self, name: str) -> Iterator[None]:
        start = time.perf_counter()
        yield
        self.seconds[name] = time.perf_counter() - start
        console.err.print(f"[dim]{name}: {self.seconds[name]:.1f} s[/]")


def demo(
    context: typer.Context,
    out: Annotated[Path, typer.Option("--out", "-o", help="Folder for results, figures and the page.")] = Path("demo"),
    first: Annotated[int, typer.Option(help="Use the first N items of each domain.")] = PER_DOMAIN,
    memory: Memory = None,
    device: Device = "cpu",
    seed: Seed = 0,
    resume: Resume = True,
) -> None:
    """What does the routing of the bundled model look like, and why? Which experts are good for which domain, does the
    router prefer them, and would other routes have predicted the next token better?"""
    options.check_number("--first", first)
    options.check_common(DEMO, device, "float32", seed, out)
    budget = options.memory_bytes(memory)
    stage = Stages()
    with stage("loading the model"):
        from moe_interp.cli.commands.runs import cell_folder, finished_cells
        from moe_interp.cli.figure_files import write_figures
        from moe_interp.cli.inputs import demo_sequences, first_of_each, read_items
        from moe_interp.cli.load import load_hooks
        from moe_interp.cli.outputs import CELLS, ROUTE_CELLS, write_counterfactual, write_geometry, write_isolation
        from moe_interp.experiments.capture.experiment import capture_routing
        from moe_interp.experiments.counterfactual.experiment import counterfactual_routes
        from moe_interp.experiments.domain_router import score_domain_router
        from moe_interp.experiments.geometry import measure
        from moe_interp.experiments.isolation.experiment import isolate_experts
        from moe_interp.experiments.show_routing import show
        from moe_interp.plots import FIGURES
        from moe_interp.report import (
            atlas_chapter,
            counterfactual_chapter,
            domain_router_chapter,
            geometry_chapter,
            isolation_chapter,
            prompt_chapter,
            render_page,
            write_page,
        )
        from moe_interp.traces.atlas.build import atlas

        moe = load_hooks(DEMO, device)
        short = [item for item in read_items([DEMO], None, None) if len(item.prompt) + len(item.answer) <= LONGEST]
        items = first_of_each(short, first)
    work_begins()
    with stage("recording routes"):
        view = show(moe, f"{items[0].prompt}{items[0].answer}")
        routed = [
            {"id": item.id, "prompt": item.prompt, "answer": item.answer, "domain": item.domain} for item in items
        ]
        trace: Any = capture_routing(moe, routed, norms=True, memory_budget=budget)
        recorded = atlas(trace, seed=seed)
    with stage("measuring the geometry of routing"):
        shape = measure(moe, routed, memory_budget=budget, seed=seed)
    with stage("isolating experts"), finished_cells(out / CELLS, resume):
        store = cell_folder(context, out / CELLS, "items")
        result = isolate_experts(moe, items, memory_budget=budget, seed=seed, store=store)
    with stage("replacing the router"):
        routers = score_domain_router(moe, items, result, seed=seed)
        routers.save(out / "domain_router.nc")
    with stage("scoring counterfactual routes"), finished_cells(out / ROUTE_CELLS, resume):
        sequences = demo_sequences(first, LONGEST)
        store = cell_folder(context, out / ROUTE_CELLS, "sequences")
        routes = counterfactual_routes(moe, sequences, memory_budget=budget, seed=seed, store=store)
    with stage("statistics and figures"):
        recorded.save(out / "atlas.nc")
        write_figures(recorded, FIGURES["atlas"], out / "figures")
        write_geometry(shape, out)
        write_isolation(result, out)
        write_counterfactual(routes, out)
        page = render_page(
            [
                prompt_chapter(view.html(page=False)),
                atlas_chapter(recorded),
                geometry_chapter(shape),
                isolation_chapter(result),
                domain_router_chapter(routers),
                counterfactual_chapter(routes),
            ],
            title="The demo model's experts and routes",
            model=result.data.attrs["model"],
            extra={name: f"{seconds:.1f} s" for name, seconds in stage.seconds.items()},
        )
        write_page(out / "index.html", page)
    results = (recorded, shape, result, routers, routes)
    console.summary("\n\n".join(each.summary() for each in results))
    console.point_to(out / "index.html")
