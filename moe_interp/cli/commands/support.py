"""``moe-interp support``: which families have which hooks."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from moe_interp.cli import console, options


def support(
    family: Annotated[
        str | None, typer.Argument(help="Show one family in full.", autocompletion=options.completes(options.FAMILIES))
    ] = None,
    markdown: Annotated[bool, typer.Option("--markdown", help="Print the documentation page.")] = False,
    csv: Annotated[bool, typer.Option("--csv", help="Print one row a family and hook, comma separated.")] = False,
) -> None:
    """Show which MoE families are supported, which hooks each has, and what writing to them does."""
    if family is not None:
        options.check_one_of("family", family, options.FAMILIES, "a family")

    from moe_interp.hooks.support_table import support_markdown, support_table

    if markdown:
        print(support_markdown(), end="")
    elif csv:
        print(support_table().to_csv(index=False), end="")
    elif family is None:
        _overview()
    else:
        _one(family, support_table())


def _overview() -> None:
    from moe_interp.arch.families import FAMILIES
    from moe_interp.hooks.names import HOOKS, hooks_of

    hooks = console.table(
        "Hooks: blocks.{layer}.hook_<name>, in the order they fire",
        ["name", "axes", "writing to it means"],
        [(hook.name, hook.axes.replace(" ", ", "), hook.write) for hook in HOOKS],
        wrap=["writing to it means"],
    )
    console.out.print(hooks)
    console.out.print()
    rows = []
    for family in FAMILIES:
        served = hooks_of(family, has_shared=family.has_shared)
        lacks = ", ".join(hook.name for hook in HOOKS if hook.name not in served)
        rows.append((family.name, family.rule_text, lacks))
    wrap = ["rule", "has no"]
    console.out.print(console.table(f"{len(FAMILIES)} families", ["family", "rule", "has no"], rows, wrap=wrap))
    console.out.print("\nmoe-interp support <family> shows what is odd about one.", style="dim")


def _one(name: str, table: Any) -> None:
    chosen = table[table["family"] == name]
    first = chosen.iloc[0]
    console.out.print(f"[bold]{name}[/]: {first['rule']}\narchitectures: {first['architectures']}", soft_wrap=False)
    if first["note"]:
        console.out.print(f"note: {first['note']}")
    console.out.print()
    rows = [(r["hook"], r["present"], r["write"], r["transformer_lens"]) for _, r in chosen.iterrows()]
    columns = ["hook", "has it", "writing to it means, or why not", "TransformerLens' own"]
    console.out.print(console.table("", columns, rows, wrap=columns[2:]))
