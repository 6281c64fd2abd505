"""``moe-interp verify``: check every hook by cause on one model."""

from __future__ import annotations

from typing import Annotated

import torch
import typer

from moe_interp.cli import console
from moe_interp.cli.load import Device, Dtype, Model, Seed, load_hooks
from moe_interp.errors import ConfigError
from moe_interp.hooks.attach import MoEHooks
from moe_interp.hooks.trial import as_tokens
from moe_interp.hooks.verify import Verification


def verify_model(
    model: Model,
    device: Device = None,
    dtype: Dtype = "float32",
    text: Annotated[str | None, typer.Option(help="Text to run on, instead of random tokens.")] = None,
    tokens: Annotated[str | None, typer.Option(help="Token ids to run on, such as 12,7,99.")] = None,
    layer: Annotated[
        list[str] | None, typer.Option(help="A layer to check (repeatable), such as 3, -1 or encoder.1.")
    ] = None,
    seed: Seed = 0,
    full: Annotated[bool, typer.Option("--full", help="One row a layer, instead of the worst of all layers.")] = False,
) -> None:
    """Check every hook by cause on a model: pass-through changes nothing, edits do what the table of hooks says.

    Exit code 1 if a check fails.
    """
    moe = load_hooks(model, device, dtype)
    layers = None if layer is None else [moe.layer_label(label) for label in layer]
    table = moe.verify(_tokens(moe, text, tokens, seed), layers)
    console.out.print(f"{model}: {moe!r}", markup=False)
    _print(table, full)
    if not table.ok:
        raise typer.Exit(1)


def _tokens(moe: MoEHooks, text: str | None, ids: str | None, seed: int) -> torch.Tensor | str:
    if text is not None and ids is not None:
        raise ConfigError("both --text and --tokens", "at most one of them", "Leave one out.")
    if ids is None:
        return as_tokens(moe.bridge, None, seed) if text is None else text
    try:
        return torch.tensor([[int(part) for part in ids.split(",")]])
    except ValueError:
        raise ConfigError(f"--tokens {ids!r}", "integers separated by commas", "Write them as 12,7,99.") from None


def _print(table: Verification, full: bool) -> None:
    """One line a check, and below it one a hook."""
    rows: list[tuple[str, ...]] = []
    shown = table.assign(layers=table["layer"], worst=table["figure"]) if full else table.summary()
    for check, group in shown.groupby("check", sort=False):
        rows.append((f"[bold]{check}[/]", "", "", "", "", ""))
        for line in group.to_dict("records"):
            must_be = f"{line['relation']} {line['bound']:.2g}"
            mark = _mark(bool(line["passed"]))
            rows.append((f"  {line['hook']}", line["layers"], f"{line['worst']:.2g}", must_be, mark, line["note"]))
    figure = "figure" if full else "worst"
    columns = ["check, hook", "layer" if full else "layers", figure, "must be", "", "note"]
    console.out.print(console.table("", columns, rows, wrap=["note"]))
    failed = int((~table["passed"]).sum())
    verdict = "[green]all passed[/]" if not failed else f"[bold red]{failed} failed[/]"
    console.out.print(f"{len(table)} checks, {verdict}")


def _mark(passed: bool) -> str:
    return "[green]ok[/]" if passed else "[bold red]FAILED[/]"
