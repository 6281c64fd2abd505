"""``moe-interp demo``: the main job on the bundled model, offline, in about a minute."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated

import typer
from rich.markup import escape

from moe_interp.cli import console
from moe_interp.cli.isolate import first_of_each, read_items, write_isolation
from moe_interp.cli.load import DEMO, Seed, load_hooks
from moe_interp.experiments.domain_router import score_domain_router
from moe_interp.experiments.isolation import isolate_experts

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
    out: Annotated[Path, typer.Option("--out", "-o", help="Folder for results, figures and the page.")] = Path("demo"),
    per_domain: Annotated[int, typer.Option(help="Items of each domain.")] = PER_DOMAIN,
    seed: Seed = 0,
) -> None:
    """Which experts of the bundled model are good for which domain, and does its router prefer them?"""
    stage = Stages()
    with stage("loading the model"):
        moe = load_hooks(DEMO, "cpu")
        short = [item for item in read_items([DEMO], None, None) if len(item.prompt) + len(item.answer) <= LONGEST]
        items = first_of_each(short, per_domain)
    with stage("isolating experts"):
        result = isolate_experts(moe, items, seed=seed, store=out / "cells")
    with stage("replacing the router"):
        routers = score_domain_router(moe, items, result, seed=seed)
        routers.save(out / "domain_router.nc")
    with stage("statistics and figures"):
        write_isolation(result, out, **{name: f"{seconds:.1f} s" for name, seconds in stage.seconds.items()})
        summary = result.summary()
    console.out.print(escape(summary))
    console.out.print()
    console.out.print(escape(routers.summary()))
    console.out.print(f"\nOpen [bold]{out / 'index.html'}[/] in a browser.")
