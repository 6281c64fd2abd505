"""``moe-interp demo``: expert isolation and counterfactual routes on the bundled model, offline, in two minutes."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated

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
    """Which experts of the bundled model are good for which domain, does its router prefer them, and would other routes
    have predicted the next token better?"""
    options.check_number("--first", first)
    options.check_common(DEMO, device, "float32", seed, out)
    budget = options.memory_bytes(memory)
    stage = Stages()
    with stage("loading the model"):
        from moe_interp.cli.commands.runs import cell_folder, finished_cells
        from moe_interp.cli.inputs import demo_sequences, first_of_each, read_items
        from moe_interp.cli.load import load_hooks
        from moe_interp.cli.outputs import CELLS, ROUTE_CELLS, write_counterfactual, write_isolation
        from moe_interp.experiments.counterfactual.experiment import counterfactual_routes
        from moe_interp.experiments.domain_router import score_domain_router
        from moe_interp.experiments.isolation.experiment import isolate_experts
        from moe_interp.report import (
            counterfactual_chapter,
            domain_router_chapter,
            isolation_chapter,
            render_page,
            write_page,
        )

        moe = load_hooks(DEMO, device)
        short = [item for item in read_items([DEMO], None, None) if len(item.prompt) + len(item.answer) <= LONGEST]
        items = first_of_each(short, first)
    work_begins()
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
        write_isolation(result, out)
        write_counterfactual(routes, out)
        page = render_page(
            [isolation_chapter(result), domain_router_chapter(routers), counterfactual_chapter(routes)],
            title="The demo model's experts and routes",
            model=result.data.attrs["model"],
            extra={name: f"{seconds:.1f} s" for name, seconds in stage.seconds.items()},
        )
        write_page(out / "index.html", page)
    console.summary("\n\n".join((result.summary(), routers.summary(), routes.summary())))
    console.point_to(out / "index.html")
