"""``moe-interp``: the application, and how errors are shown."""

from __future__ import annotations

import sys
from typing import Annotated

import typer

from moe_interp import __version__
from moe_interp.cli import console
from moe_interp.cli.counterfactual import counterfactual
from moe_interp.cli.demo import demo
from moe_interp.cli.isolate import isolate
from moe_interp.cli.models import models
from moe_interp.cli.support import support
from moe_interp.cli.testbed import compare_strategies
from moe_interp.cli.verify import verify_model
from moe_interp.errors import MoEInterpError

cli = typer.Typer(
    help="Mixture-of-Experts layers as HookPoints of a TransformerLens bridge, and experiments on them.",
    invoke_without_command=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
cli.command()(demo)
cli.command()(isolate)
cli.command()(counterfactual)
cli.command("testbed")(compare_strategies)
cli.command()(support)
cli.command("verify")(verify_model)
cli.command()(models)


@cli.callback()
def main(
    context: typer.Context,
    version: Annotated[bool, typer.Option("--version", help="Show the version and exit.", is_eager=True)] = False,
) -> None:
    if version:
        console.out.print(f"moe-interp {__version__}")
        raise typer.Exit
    if context.invoked_subcommand is None:
        print(context.get_help())


def app() -> None:
    """The entry point: errors of the project's own are one red message and exit code 1, never a traceback."""
    try:
        cli()
    except MoEInterpError as error:
        console.fail(error)
        sys.exit(1)
