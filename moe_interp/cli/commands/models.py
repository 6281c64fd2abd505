"""``moe-interp models``: what can be given to ``--model``."""

from __future__ import annotations

import re
from typing import Annotated

import typer

from moe_interp.cli import console, options

# of families whose architecture also serves dense models: what the names of those with experts have in common
WITH_EXPERTS = {
    "granite_moe_hybrid": r"granite-4\.[0-9]+-(h-)?(tiny|small)",
    "nemotron_h": r"A[0-9]+B",
    "llama4": r"Scout|Maverick",
    "gemma4": r"A[0-9]+B",
}
# made for tests of software: random weights, a few layers
FOR_TESTS = r"tiny-random|random|internal-testing|-testing/|dummy|ci-"
OWNERS = (
    *("mistralai", "allenai", "Qwen", "openai", "ibm-granite", "jetmoe", "deepseek-ai", "zai-org", "nvidia", "baidu"),
    *("LiquidAI", "MiniMaxAI", "arcee-ai", "poolside", "microsoft", "meta-llama", "google", "ai21labs"),
)


def models(
    family: Annotated[
        str | None, typer.Option(help="Only this family's.", autocompletion=options.completes(options.FAMILIES))
    ] = None,
    all_models: Annotated[bool, typer.Option("--all", help="Every hub name, one a line.")] = False,
) -> None:
    """List what --model takes: 'demo', a local folder, or a hub name of a supported family.

    The hub names are those that TransformerLens lists for the families' architectures, without dense variants and
    models of random weights.
    """
    if family is not None:
        options.check_one_of("--family", family, options.FAMILIES, "a family")

    from moe_interp.arch.families import FAMILIES

    names = {f.name: hub_names(f.name, f.architectures) for f in FAMILIES if family in (None, f.name)}
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


def hub_names(family: str, architectures: tuple[str, ...]) -> list[str]:
    """Hub names of a family: its makers' first, then those that TransformerLens has verified, then in its order."""
    from transformer_lens.tools.model_registry import api

    entries = [entry for name in architectures for entry in api.get_supported_models(architecture=name)]
    kept = [
        entry
        for entry in entries
        if re.search(WITH_EXPERTS.get(family, ""), entry.model_id, re.I)
        and not re.search(FOR_TESTS, entry.model_id, re.I)
    ]
    kept.sort(key=lambda entry: (entry.model_id.split("/")[0] not in OWNERS, entry.status != 1))
    return [entry.model_id for entry in kept]
