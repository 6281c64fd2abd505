"""``moe-interp verify``: check every hook by cause on one model."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from moe_interp.cli import console, options
from moe_interp.cli.options import Device, DeviceMap, Dtype, Layers, Model, Seed
from moe_interp.errors import ConfigError


def verify_model(
    model: Model,
    device: Device = None,
    dtype: Dtype = "auto",
    device_map: DeviceMap = None,
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
    options.check_device_map(device_map, device)
    layer_names, ids = options.layer_names(layers), options.token_ids(tokens)
    if text is not None and ids is not None:
        raise ConfigError("both --text and --tokens", "at most one of them", "Leave one out.")

    import torch

    from moe_interp.cli.load import load_hooks
    from moe_interp.verification.model_under_test import as_tokens

    moe = load_hooks(model, device, dtype, device_map)
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


def _print(table: Any, full: bool) -> None:
    """One line a check, and every hook and layer below it where one failed (or all, if wanted)."""
    rows: list[tuple[str, ...]] = []
    for check, group in table.groupby("check", sort=False):
        lines: list[Any] = group.to_dict("records")
        passed = sum(bool(line["passed"]) for line in lines)
        worst = max(lines, key=_closeness)
        counted = f"{passed}/{len(lines)}"
        rows.append((f"[bold]{check}[/]", counted, *_figures(worst), _mark(passed == len(lines))))
        shown = lines if full else [line for line in lines if not line["passed"]]
        rows += [
            (f"  {line['hook']}, layer {line['layer']}", "", *_figures(line), _mark(line["passed"])) for line in shown
        ]
    console.out.print(console.table("", ["check", "passed", "worst", "must be", ""], rows, wrap=["check"]))
    noted = table[table["note"].str.startswith("excepted") | ~table["passed"] & (table["note"] != "")]
    for note, group in noted.groupby("note", sort=False):
        where = ", ".join(dict.fromkeys(f"{hook} ({check})" for hook, check in zip(group["hook"], group["check"])))
        console.out.print(f"{where}: {note}", markup=False)
    failed = int((~table["passed"]).sum())
    verdict = "[green]all passed[/]" if not failed else f"[bold red]{failed} failed[/]"
    console.out.print(f"{len(table)} checks, {verdict}")
    console.out.print(table.attrs.get("policy", ""), markup=False)


def _closeness(line: dict[str, Any]) -> tuple[bool, float, float]:
    """By which the worst line of a check is found: failed ones first, then how near the figure is to its bound."""
    figure, bound = float(line["figure"]), float(line["bound"])
    if figure != figure:
        return False, -1.0, 0.0
    if line["relation"] == ">":
        return not line["passed"], bound / figure if figure else float("inf"), bound
    return not line["passed"], figure / bound if bound else (float("inf") if figure else 0.0), bound


def _figures(line: dict[str, Any]) -> tuple[str, str]:
    if line["figure"] != line["figure"]:
        return "-", "excepted"
    return f"{line['figure']:.2g}", f"{line['relation']} {line['bound']:.2g}"


def _mark(passed: bool) -> str:
    return "[green]ok[/]" if passed else "[bold red]FAILED[/]"
