"""``moe-interp verify``: check every hook by cause on one model."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from moe_interp.cli import console, options
from moe_interp.cli.options import Device, Dtype, Layers, Model, Seed
from moe_interp.errors import ConfigError


def verify_model(
    model: Model,
    device: Device = None,
    dtype: Dtype = "float32",
    text: Annotated[str | None, typer.Option(help="Text to run on, instead of random tokens.")] = None,
    tokens: Annotated[str | None, typer.Option(help="Token ids to run on, such as 12,7,99.")] = None,
    layers: Layers = None,
    seed: Seed = 0,
    full: Annotated[bool, typer.Option("--full", help="One row a layer, instead of the worst of all layers.")] = False,
) -> None:
    """Check every hook by cause on a model: pass-through changes nothing, edits do what the table of hooks says.

    Exit code 1 if a check fails.
    """
    options.check_common(model, device, dtype, seed)
    layer_names, ids = options.layer_names(layers), _ids(tokens, text)

    import torch

    from moe_interp.cli.load import load_hooks
    from moe_interp.hooks.trial import as_tokens

    moe = load_hooks(model, device, dtype)
    labels = None if layer_names is None else [moe.layer_label(name) for name in layer_names]
    if ids is not None:
        given: Any = torch.tensor([ids])
    else:
        given = as_tokens(moe.bridge, None, seed) if text is None else text
    table = moe.verify(given, labels)
    console.out.print(f"{model}: {moe!r}", markup=False)
    _print(table, full)
    if not table.ok:
        raise typer.Exit(1)


def _ids(tokens: str | None, text: str | None) -> list[int] | None:
    if tokens is None:
        return None
    if text is not None:
        raise ConfigError("both --text and --tokens", "at most one of them", "Leave one out.")
    parts = [part.strip() for part in tokens.split(",")]
    if not all(part.isdecimal() and part.isascii() and len(part) < 10 for part in parts):
        raise ConfigError(f"--tokens {tokens!r}", "integers separated by commas", "Write them as 12,7,99.")
    return [int(part) for part in parts]


def _print(table: Any, full: bool) -> None:
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
