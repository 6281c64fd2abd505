"""``moe-interp models``: what can be given to ``--model``."""

from __future__ import annotations

from typing import Annotated

import typer
from transformer_lens.tools.model_registry import api

from moe_interp.arch.families import FAMILIES
from moe_interp.cli import console


def models(
    family: Annotated[str | None, typer.Option(help="Only this family's.")] = None,
    all_models: Annotated[bool, typer.Option("--all", help="Every hub name, one a line.")] = False,
) -> None:
    """List what --model takes: 'demo', a local folder, or a hub name of a supported family.

    The hub names are those that TransformerLens lists for the families' architectures; some are dense variants, which
    are refused when loaded.
    """
    chosen = [f for f in FAMILIES if family in (None, f.name)]
    if not chosen:
        known = ", ".join(f.name for f in FAMILIES)
        raise typer.BadParameter(f"{family!r} is not one of {known}", param_hint="--family")
    names = {f.name: _hub_names(f.architectures) for f in chosen}
    if all_models:
        for name in dict.fromkeys(name for listed in names.values() for name in listed):
            print(name)
        return
    console.out.print("[bold]--model demo[/]          the model that comes with the package; needs no network")
    console.out.print("[bold]--model path/to/model[/] a folder written by save_pretrained")
    console.out.print("[bold]--model org/name[/]      a hub model of one of these families\n")
    rows = [(name, str(len(listed)), listed[0] if listed else "") for name, listed in names.items()]
    console.out.print(console.table("", ["family", "listed", "for example"], rows, wrap=["for example"]))
    console.out.print(
        "\n--all lists every name; a model that is not listed may work: try moe-interp verify.", style="dim"
    )


def _hub_names(architectures: tuple[str, ...]) -> list[str]:
    """Hub names of these architectures: verified ones first, then as TransformerLens orders them."""
    entries = [entry for name in architectures for entry in api.get_supported_models(architecture=name)]
    return [entry.model_id for entry in sorted(entries, key=lambda entry: entry.status != 1)]
